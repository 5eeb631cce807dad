//! Stories that start at dom0: a bundle is booted, guests are talked to, the machine ends.

use anyhow::{Context, Result, ensure};
use boot::answers::{LEAVE, among, named, names};
use boot::{FIRST_GUEST, Machine, Outcome, Setup};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use test_kernels::{Notes, cut_bzimage, elf, gzipped, load, smallest};
use xtask::bundle::{Bundle, Guest};
use xtask::machine::Failure;
use xtask::{build, kernels};

/// How long a guest may take to come up while others do.
pub(crate) const BOOT: Duration = Duration::from_secs(150);
/// How long an answer may take.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// What the shell of our guests says when it waits.
pub(crate) const SHELL: &str = "tenon-guest# ";

/// A stock guest with our initramfs.
pub(crate) fn linux(name: &str, memory: u32) -> Result<Guest> {
    let sh = boot::shell()?;
    Ok(Guest {
        name: name.into(),
        memory,
        vcpus: 1,
        kernel: kernels::stock(&sh, kernels::DEFAULT)?.vmlinux,
        ramdisk: Some(kernels::ramdisk(&sh)?),
        extra: "console=hvc0".into(),
        vif: Vec::new(),
    })
}

/// One of our own small guests.
pub(crate) fn test_guest(name: &str, program: &str, extra: &str) -> Result<Guest> {
    let kernel = image(program)?;
    Ok(Guest { name: name.into(), memory: 16, vcpus: 1, kernel, ramdisk: None, extra: extra.into(), vif: Vec::new() })
}

pub(crate) fn image(name: &str) -> Result<PathBuf> {
    build::image(&boot::images()?, name)
}

pub(crate) fn dom0(cmdline: &str) -> Result<Bundle> {
    Ok(Bundle::dom0(&image("dom0")?, cmdline))
}

/// Boots a machine of a GiB, for at most four minutes.
pub(crate) fn start(name: &str, bundle: Bundle) -> Result<Machine> {
    let mut setup = Setup::new(bundle);
    setup.memory = 1024;
    setup.limit = Duration::from_secs(240);
    Machine::boot(name, &setup)
}

/// A word nobody could have printed before.
pub(crate) fn nonce() -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(format!("{:x}-{:x}", now.as_nanos(), std::process::id()))
}

/// What `md5sum` of this machine makes of a line.
pub(crate) fn md5(line: &str) -> Result<String> {
    md5_of(format!("{line}\n").as_bytes())
}

/// What `md5sum` of this machine makes of these bytes.
pub(crate) fn md5_of(bytes: &[u8]) -> Result<String> {
    let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("md5sum without input")?;
    input.write_all(bytes)?;
    drop(input);
    let output = String::from_utf8(child.wait_with_output()?.stdout)?;
    let sum = output.split_whitespace().next().context("md5sum without output")?;
    ensure!(sum.len() == 32, "no MD5: {output}");
    Ok(sum.into())
}

/// The shell of a guest answers a word nobody has seen before; answers that word.
pub(crate) fn answers(machine: &mut Machine) -> Result<String> {
    let word = nonce()?;
    // What is typed is echoed, so the answer must differ from the question.
    machine.type_line(&format!("echo {word} | md5sum"))?;
    machine.expect(&md5(&word)?, SOON)?;
    Ok(word)
}

/// The kernel a distribution ships, unpatched, in a domain that dom0 builds: what is typed reaches its shell, the
/// answer comes back, and its power-off ends the machine.
pub(crate) fn stock_kernel_has_a_shell_and_powers_off() -> Result<()> {
    let bundle = dom0("")?.guest(&linux("linux", 192)?);
    let mut machine = start("stock_kernel_has_a_shell_and_powers_off", bundle)?;
    machine.expect("tenon-guest: init reached", BOOT)?;
    machine.expect(SHELL, SOON)?;
    let word = answers(&mut machine)?;
    machine.expect(SHELL, SOON)?;
    // Pasted text is longer than every queue on its way, and arrives whole.
    let lines: Vec<String> = (0..60).map(|line| format!("{line:03} {word} and so on, up to the end")).collect();
    let text = lines.join("\n");
    machine.type_line(&format!("md5sum <<END\n{text}\nEND"))?;
    machine.expect(&md5(&text)?, SOON)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 8) powered off", SOON)?;
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}

/// A kernel, in either of its forms, has a shell that answers, on a CPU of this model. Those that are not booted
/// elsewhere get two vcpus.
pub(crate) fn kernel_answers(title: &str, name: &str, elf: bool, cpu: Option<&str>) -> Result<Outcome> {
    let stock = kernels::named(&boot::shell()?, name)?;
    let kernel = if elf { stock.vmlinux } else { stock.bzimage };
    let (memory, vcpus) = if name == kernels::DEFAULT { (96, 1) } else { (256, 2) };
    let mut setup = Setup::new(dom0("")?.guest(&Guest { kernel, vcpus, ..linux("linux", memory)? }));
    setup.memory = 1024;
    setup.cpu = cpu.map(str::to_owned);
    setup.limit = Duration::from_secs(300);
    let mut machine = Machine::boot(title, &setup)?;
    machine.expect("tenon-guest: init reached", BOOT)?;
    machine.expect(SHELL, SOON)?;
    answers(&mut machine)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 8) powered off", SOON)?;
    let outcome = machine.finish()?;
    outcome.require_success()?;
    Ok(outcome)
}

/// A stock kernel runs programs on each of its vcpus, lets go of one and takes it back, and starts processes on all of them
/// at once.
pub(crate) fn a_stock_kernel_uses_all_its_vcpus() -> Result<()> {
    let bundle = dom0("")?.guest(&Guest { vcpus: 4, ..linux("linux", 192)? });
    let mut machine = start("a_stock_kernel_uses_all_its_vcpus", bundle)?;
    machine.expect(SHELL, BOOT)?;
    let word = nonce()?;
    machine.type_line(&format!("on() {{ echo {word} $1 $2 $(nproc) | taskset -c $1 md5sum; }}"))?;
    machine.expect(SHELL, SOON)?;
    let sum = |cpu: u32, when: &str, cpus: u32| md5(&format!("{word} {cpu} {when} {cpus}"));
    for cpu in 0..4 {
        machine.type_line(&format!("on {cpu} first"))?;
        machine.expect(&sum(cpu, "first", 4)?, SOON)?;
    }
    machine.type_line("echo 0 > /sys/devices/system/cpu/cpu3/online; on 0 without")?;
    machine.expect(&sum(0, "without", 3)?, SOON)?;
    machine.type_line("echo 1 > /sys/devices/system/cpu/cpu3/online; on 3 again")?;
    machine.expect(&sum(3, "again", 4)?, SOON)?;
    machine.type_line("loop() { for n in $(seq 50); do /bin/busybox true; done; on $1 many; }")?;
    machine.type_line("for cpu in 0 1 2 3; do loop $cpu & done; wait; on 0 last")?;
    machine.expect(&sum(0, "last", 4)?, SOON)?;
    machine.type_line("poweroff -f")?;
    let outcome = machine.finish()?;
    outcome.require_line("guest linux (domain 8) powered off")?;
    for cpu in 0..4 {
        outcome.require_line(&sum(cpu, "many", 4)?)?;
    }
    outcome.require_success()
}

/// A guest that has breakpoints does not show them in the DR6 of another that steps over the same address.
pub(crate) fn breakpoints_stay_with_their_guest() -> Result<()> {
    let owner = test_guest("owner", "breakpoints", "role=owner")?;
    let other = test_guest("other", "breakpoints", "role=other")?;
    let bundle = dom0("consoles=all")?.guest(&owner).guest(&other);
    let outcome = start("breakpoints_stay_with_their_guest", bundle)?.finish()?;
    outcome.require_success()?;
    outcome.require_line("owner| breakpoints: its own in 20 rounds")?;
    outcome.require_line("other| breakpoints: nobody's in 20 rounds")
}

/// A guest that has most of the machine's memory and reboots at once, again and again: nothing of its lives is left.
pub(crate) fn restarts_leave_nothing_behind() -> Result<()> {
    let guest = Guest { memory: 300, ..test_guest("again", "crash", "how=reboot")? };
    let mut setup = Setup::new(dom0("consoles=all")?.guest(&guest));
    setup.limit = Duration::from_secs(90);
    let mut machine = Machine::boot("restarts_leave_nothing_behind", &setup)?;
    for domain in (FIRST_GUEST..).take(6) {
        machine.expect(&format!("guest again (domain {domain}) rebooted"), SOON)?;
    }
    machine.type_line("destroy again")?;
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}

/// A reboot makes the guest anew from the bundle, as a new domain on the same terminal.
pub(crate) fn a_guest_that_reboots_is_made_anew() -> Result<()> {
    let bundle = dom0("")?.guest(&linux("linux", 192)?);
    let mut machine = start("a_guest_that_reboots_is_made_anew", bundle)?;
    machine.expect(SHELL, BOOT)?;
    machine.type_line("reboot -f")?;
    machine.expect("guest linux (domain 8) rebooted", SOON)?;
    machine.expect("Linux version", BOOT)?;
    machine.expect(SHELL, BOOT)?;
    answers(&mut machine)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 9) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// Two stock guests (one with two vcpus) and two small ones run at once; a small one and a stock one crash, each told
/// with its reason, and the other stock guest still knows what it was told before.
pub(crate) fn guests_do_not_notice_when_others_crash() -> Result<()> {
    let bundle = dom0("")?
        .guest(&linux("alpha", 128)?)
        .guest(&Guest { vcpus: 2, ..linux("beta", 128)? })
        .guest(&test_guest("small", "hello", "")?)
        .guest(&test_guest("faulty", "crash", "how=no-handler")?);
    let mut machine = start("guests_do_not_notice_when_others_crash", bundle)?;
    machine.expect("guest faulty (domain 11) crashed", BOOT)?;
    machine.expect("\r\n  rip ", SOON)?;

    machine.type_keys(LEAVE)?;
    machine.expect("dom0> ", SOON)?;
    machine.type_line("console beta")?;
    machine.expect("[console of beta", SOON)?;
    machine.expect(SHELL, BOOT)?;
    let word = nonce()?;
    machine.type_line(&format!("kept={word}"))?;
    machine.expect(SHELL, SOON)?;

    let list = machine.ask("list")?;
    ensure!(["alpha", "beta"].iter().all(|name| names(&list).contains(name)), "{list}");
    ensure!(!names(&list).contains(&"faulty"), "{list}");
    machine.expect("dom0> ", SOON)?;
    machine.type_line("console small")?;
    machine.expect("hello from a paravirtual guest", SOON)?;
    machine.type_keys(LEAVE)?;
    machine.expect("dom0> ", SOON)?;
    machine.type_line("console alpha")?;
    machine.expect("[console of alpha", SOON)?;
    machine.expect(SHELL, BOOT)?;
    machine.type_line("echo c > /proc/sysrq-trigger")?;
    machine.expect("sysrq triggered crash", SOON)?;
    machine.expect("guest alpha (domain 8) crashed", SOON)?;
    machine.expect("\r\n  rip ", SOON)?;
    machine.expect(" r14 ", SOON)?;
    machine.expect(" r15 ", SOON)?;

    // The next guest that lives takes the terminal.
    machine.expect("[console of beta", SOON)?;
    machine.type_line("echo $kept | md5sum")?;
    machine.expect(&md5(&word)?, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest beta (domain 9) powered off", SOON)?;
    machine.finish()?.require_end(Failure::Crashed)
}

/// Small guests that die in every way: dom0 tells each with its reason and registers, and the hypervisor lives on.
pub(crate) fn every_crash_is_told_with_reason_and_registers() -> Result<()> {
    const WAYS: [&str; 9] =
        ["ud2", "nullptr", "no-handler", "bad-stack", "hole-stack", "bad-iret", "no-user-root", "triple", "shutdown"];
    let mut bundle = dom0("consoles=all")?;
    for way in WAYS {
        bundle = bundle.guest(&test_guest(way, "crash", &format!("how={way}"))?);
    }
    bundle = bundle.guest(&test_guest("good", "crash", "how=poweroff")?);
    let outcome = start("every_crash_is_told_with_reason_and_registers", bundle)?.finish()?;
    outcome.require_end(Failure::Crashed)?;
    for (way, domain) in WAYS.iter().zip(FIRST_GUEST..) {
        outcome.require_line(&format!("{way}| crash: {way}"))?;
        outcome.require_line(&format!("guest {way} (domain {domain}) crashed: "))?;
    }
    for begins in ["  rip ", "  r13 "] {
        let told = outcome.console.lines().filter(|line| line.starts_with(begins)).count();
        ensure!(told == WAYS.len(), "{told} lines of registers begin with {begins:?}\n{}", outcome.console);
    }
    outcome.require_line("guest good (domain 17) powered off")?;
    outcome.require_line("all guests have ended")
}

/// A guest's kernel as text in a configuration of its own.
fn with_kernel(bundle: Bundle, name: &str, memory: u32, kernel: &Path) -> Bundle {
    let (kernel, extra) = (kernel.to_owned(), String::new());
    bundle.guest(&Guest { name: name.into(), memory, vcpus: 1, kernel, ramdisk: None, extra, vif: Vec::new() })
}

/// Kernels without notes, cut short, without enough memory, or named and not there: each is one line that names the
/// guest, a good guest runs beside them, and the machine ends as a failure.
pub(crate) fn bad_guests_are_refused_in_a_line_each() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = |name: &str, content: &[u8]| -> Result<PathBuf> {
        let path = folder.path().join(name);
        std::fs::write(&path, content)?;
        Ok(path)
    };
    let mut bundle = dom0("consoles=all")?;
    bundle = with_kernel(bundle, "plain", 16, &file("plain", &elf(&[load(0, &[], 0)]))?);
    bundle = with_kernel(bundle, "cut", 16, &file("cut", &cut_bzimage())?);
    bundle = with_kernel(bundle, "tiny", 1, &image("hello")?);
    bundle = with_kernel(bundle, "huge", 1 << 20, &image("hello")?);
    bundle = bundle
        .with_text("guests/wrong/config", "name = \"wrong\"\nmemory = \"much\"\nkernel = \"k\"\n")
        .with_text("guests/absent/config", "name = \"absent\"\nmemory = 16\nkernel = \"nowhere\"\n")
        .guest(&test_guest("good", "hello", "")?);
    let outcome = start("bad_guests_are_refused_in_a_line_each", bundle)?.finish()?;
    outcome.require_end(Failure::NotMade)?;
    for (line, why) in [
        ("error: guest plain: planning its memory: ", "note"),
        ("error: guest cut: unpacking the kernel: ", "cut off"),
        ("error: guest tiny: planning its memory: ", "has 1 MiB"),
        ("error: guest huge: ", "memory"),
        ("error: guests/wrong/config: line 2: memory: ", "invalid type"),
        ("error: guest absent: ", "nowhere"),
    ] {
        outcome.require_line(line)?;
        let told = outcome.console.lines().any(|told| told.contains(line) && told.contains(why));
        ensure!(told, "no {why:?} in the line with {line:?}\n{}", outcome.console);
    }
    outcome.require_line("good| @@ done: passed")
}

/// A guest that ends before it has printed anything, and one that crashes, are told with what they were refused last; both
/// stay in `list -a`, with how and when, until they are made anew.
pub(crate) fn what_the_dead_were_refused_is_told() -> Result<()> {
    let bundle = dom0("consoles=all")?
        .guest(&test_guest("quiet", "crash", "how=silent")?)
        .guest(&test_guest("faulty", "crash", "how=no-handler")?)
        .guest(&test_guest("stays", "spin", "")?);
    let mut machine = start("what_the_dead_were_refused_is_told", bundle)?;
    let ended = |list: &Value, name| named(list, name).is_ok_and(|guest| guest["state"] == "ended");
    let list = machine.ask_until("list -a", |list| ended(list, "quiet") && ended(list, "faulty"))?;
    let quiet = past(named(&list, "quiet")?, "powered off", FIRST_GUEST)?;
    let faulty = past(named(&list, "faulty")?, "crashed", FIRST_GUEST + 1)?;
    require_refusals(quiet)?;
    let reports = [report(quiet)?, report(faulty)?];
    let silent = "guest quiet (domain 8) powered off\r\n  it had printed nothing\r\n  the hypervisor had refused it";
    ensure!(reports[0].starts_with(silent), "{quiet}");
    let crashed = "guest faulty (domain 9) crashed: vcpu 0: no handler for exception 6";
    ensure!(reports[1].starts_with(crashed), "{faulty}");
    machine.type_line("list -a")?;
    for (name, how, domain) in [("quiet", "powered off", FIRST_GUEST), ("faulty", "crashed", FIRST_GUEST + 1)] {
        machine.expect(&format!("{name:<20}     -       16     1 ended         -  {how} at 0:0"), SOON)?;
        machine.expect(&format!(" as domain {domain}\r\n"), SOON)?;
    }
    machine.type_line("destroy stays")?;
    machine.expect("all guests have ended", SOON)?;
    let outcome = machine.finish()?;
    ensure!(reports.iter().all(|report| outcome.console.contains(report)), "{reports:?}\n{}", outcome.console);
    outcome.require_end(Failure::Crashed)
}

/// The end of a guest of 16 MiB, as it is listed: it must have ended this way, as this domain.
fn past<'a>(guest: &'a Value, how: &str, domain: u16) -> Result<&'a Value> {
    ensure!(guest["domid"].is_null() && guest["memory_mib"] == 16 && guest["vcpus"] == 1, "{guest}");
    let past = &guest["ended"];
    ensure!(past["how"] == how && past["domid"] == domain && past["uptime"].is_u64(), "{guest}");
    Ok(past)
}

/// An error unless a guest that has ended was refused a register and then a call, and its report says so.
fn require_refusals(past: &Value) -> Result<()> {
    let [register, call] = ["vcpu 0: rdmsr 0x345: fault 13, rip 0x", "vcpu 0: VcpuOp 0x0 0x4d: NoEnt"];
    let refused: Vec<&str> = past["refused"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(refused.len() == 2 && refused[0].starts_with(register) && refused[1] == call, "{past}");
    let report = past["report"].as_str().unwrap_or_default();
    ensure!(report.ends_with(&format!("\n    {}\n    {call}", refused[0])), "{past}");
    Ok(())
}

/// What was told of the end of a guest, as the terminal shows it.
fn report(past: &Value) -> Result<String> {
    let report = past["report"].as_str().with_context(|| format!("no report: {past}"))?;
    Ok(report.replace('\n', "\r\n"))
}

/// A stock bzImage that claims one byte more than it has: unpacked to the end, and refused.
fn larger_than_it_is() -> Result<Vec<u8>> {
    let mut image = std::fs::read(kernels::stock(&boot::shell()?, kernels::DEFAULT)?.bzimage)?;
    let word = |at: usize| -> Result<usize> { Ok(u32::from_le_bytes(image[at..at + 4].try_into()?).try_into()?) };
    // The payload lies behind the set-up sectors, and ends with its size.
    let end = (usize::from(image[0x1f1]) + 1) * 512 + word(0x248)? + word(0x24c)?;
    let size = u32::try_from(word(end - 4)?)? + 1;
    image[end - 4..end].copy_from_slice(&size.to_le_bytes());
    Ok(image)
}

/// While dom0 unpacks a kernel, which takes seconds, the console of another guest is shown and a command is answered: in
/// lines of that guest, many times what its ring holds.
pub(crate) fn others_are_served_while_a_kernel_is_unpacked() -> Result<()> {
    const LINES: usize = 1000;
    let kernel = tempfile::NamedTempFile::new()?;
    std::fs::write(&kernel, larger_than_it_is()?)?;
    let bundle = with_kernel(dom0("consoles=all")?.guest(&test_guest("flood", "flood", "")?), "big", 64, kernel.path());
    let mut machine = start("others_are_served_while_a_kernel_is_unpacked", bundle)?;
    machine.expect("flood| flood: begins", SOON)?;
    machine.type_line("list -j")?;
    let seen = machine.expect("payload of the bzImage claims", BOOT)?;
    let lines = seen.matches("flood| flood: line ").count();
    println!("{lines} lines of another guest are shown while a kernel is unpacked");
    ensure!(lines >= LINES, "only {lines} lines");
    let listed = among(&seen).iter().any(|list| named(list, "flood").is_ok_and(|guest| guest["domid"] == 8));
    ensure!(listed, "no list of guests meanwhile");
    machine.type_line("destroy flood")?;
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_end(Failure::NotMade)
}

/// A guest that is destroyed while its kernel is unpacked is never made, the next one is, and it can be made later.
pub(crate) fn a_guest_is_given_up_while_it_is_made() -> Result<()> {
    let kernel = kernels::stock(&boot::shell()?, kernels::DEFAULT)?.bzimage;
    let bundle = dom0("consoles=all")?
        .guest(&test_guest("flood", "flood", "")?)
        .guest(&Guest { kernel, ..linux("big", 96)? })
        .guest(&test_guest("small", "hello", "")?);
    let mut machine = start("a_guest_is_given_up_while_it_is_made", bundle)?;
    machine.expect("flood| flood: line 10,", SOON)?;
    machine.type_line("destroy big")?;
    machine.expect("small| hello from a paravirtual guest", BOOT)?;
    machine.expect("guest small (domain 9) powered off", SOON)?;
    machine.type_line("create big")?;
    machine.expect("guest big is domain 10", BOOT)?;
    machine.type_line("destroy big")?;
    machine.type_line("destroy flood")?;
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}

/// Kernels of others, with no more than an ELF header and some Xen notes: with and without the notes ENTRY, VIRT_BASE
/// and HYPERCALL_PAGE each is entered at the right address and calls the hypervisor.
pub(crate) fn kernels_with_few_notes_run() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut bundle = dom0("consoles=all")?.guest(&test_guest("log", "crash", "how=log")?);
    let names: Vec<String> = (0..8).map(|case| format!("few{case}")).collect();
    for (case, name) in names.iter().enumerate() {
        let [entry, virt_base, hypercall_page] = [1, 2, 4].map(|bit| case & bit != 0);
        let path = folder.path().join(name);
        std::fs::write(&path, smallest(name, Notes { entry, virt_base, hypercall_page }))?;
        bundle = with_kernel(bundle, name, 16, &path);
    }
    let mut machine = start("kernels_with_few_notes_run", bundle)?;
    // They need not end in order.
    for _ in &names {
        machine.expect(") powered off", SOON)?;
    }
    machine.type_line("dmesg")?;
    machine.type_line("destroy log")?;
    machine.expect("all guests have ended", SOON)?;
    let outcome = machine.finish()?;
    outcome.require_success()?;
    for (name, domain) in names.iter().zip(FIRST_GUEST + 1..) {
        outcome.require_line(&format!("guest {name} (domain {domain}) powered off"))?;
        outcome.require_line(&format!("(d{domain}) {name}"))?;
    }
    Ok(())
}

/// A kernel that is a gzip'ed ELF file runs as any other, started by dom0 or instead of it.
pub(crate) fn a_gzipped_kernel_runs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("hello.gz");
    std::fs::write(&path, gzipped(&std::fs::read(image("hello")?)?))?;
    let bundle = with_kernel(dom0("consoles=all")?, "packed", 16, &path);
    let outcome = start("a_gzipped_kernel_runs", bundle)?.finish()?;
    outcome.require_success()?;
    outcome.require_line("packed| @@ done: passed")?;
    let bundle = Bundle::first(&path, None, "").first_memory(64);
    Machine::boot("a_gzipped_kernel_runs_first", &Setup::new(bundle))?.finish()?.require_passed()
}

/// A ramdisk that a kernel could not unpack beside it is warned of. The guest is made all the same: this one leaves its
/// ramdisk as it is.
pub(crate) fn a_ramdisk_that_cannot_be_unpacked_is_warned_of() -> Result<()> {
    let ramdisk = tempfile::NamedTempFile::new()?;
    std::fs::write(&ramdisk, gzipped(&vec![0; 40 << 20]))?;
    let guest = Guest { ramdisk: Some(ramdisk.path().to_owned()), ..test_guest("small", "hello", "")? };
    let other = test_guest("other", "hello", "")?;
    let bundle = dom0("consoles=all")?.guest(&guest).guest(&other);
    let outcome = start("a_ramdisk_that_cannot_be_unpacked_is_warned_of", bundle)?.finish()?;
    outcome.require_success()?;
    outcome.require_line(
        "warning: guest small: 16 MiB of memory cannot hold the ramdisk (1 MiB) beside what it unpacks to (40 MiB) and \
         the kernel (",
    )?;
    outcome.require_line("warning: ")?;
    outcome.require_line("small| @@ done: passed")
}

/// A bundle with nothing to start.
pub(crate) fn a_bundle_without_a_first_domain_is_refused() -> Result<()> {
    let bundle = Bundle::default().with_text("guests/web/config", "name = \"web\"");
    let outcome = Machine::boot("a_bundle_without_a_first_domain_is_refused", &Setup::new(bundle))?.finish()?;
    outcome.require_failure()?;
    outcome.require_line("the boot bundle has neither `dom0` nor `first`")
}

/// An option the hypervisor does not have.
pub(crate) fn an_unknown_hypervisor_option_is_refused() -> Result<()> {
    let mut setup = Setup::new(dom0("")?);
    setup.options = "console=com1 frobnicate=1".into();
    let outcome = Machine::boot("an_unknown_hypervisor_option_is_refused", &setup)?.finish()?;
    outcome.require_failure()?;
    outcome.require_line("unknown hypervisor option `frobnicate=1`")
}
