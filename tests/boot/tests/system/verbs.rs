//! Stories of dom0's command line: at its prompt, and through `cargo xtask run`.

use crate::stories::{BOOT, SHELL, SOON, answers, dom0, image, linux, md5, nonce, start, test_guest};
use anyhow::{Context, Result, ensure};
use boot::answers::{LEAVE, done, named, names, number, refused};
use boot::{Machine, Setup};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use xtask::bundle::{Bundle, Guest};
use xtask::{guest_file, kernels};

const PROMPT: &str = "dom0> ";

/// Leads from a guest's console to dom0 and types a command.
fn command(machine: &mut Machine, line: &str) -> Result<()> {
    machine.type_keys(LEAVE)?;
    machine.expect(PROMPT, SOON)?;
    machine.type_line(line)
}

/// Leads back to a guest's console.
fn console(machine: &mut Machine, name: &str) -> Result<()> {
    machine.expect(PROMPT, SOON)?;
    machine.type_line(&format!("console {name}"))?;
    machine.expect(&format!("[console of {name}"), SOON)?;
    Ok(())
}

/// A guest that is paused answers nothing; when it goes on, and goes by another name, what was typed is answered.
pub(crate) fn a_paused_guest_waits_and_a_renamed_one_answers() -> Result<()> {
    let mut machine = start("a_paused_guest_waits_and_a_renamed_one_answers", dom0("")?.guest(&linux("linux", 128)?))?;
    machine.expect(SHELL, BOOT)?;
    // Half a verb and half a name are completed.
    command(&mut machine, "pau\tli\t")?;
    console(&mut machine, "linux")?;
    let word = nonce()?;
    machine.type_line(&format!("echo {word} | md5sum"))?;
    let answered = machine.expect(&md5(&word)?, Duration::from_secs(5));
    ensure!(answered.is_err(), "a paused guest answered");
    let list = machine.ask("list")?;
    let state = named(&list, "linux")?["state"].as_str().unwrap_or("?");
    ensure!(state.contains('p'), "a paused guest is {state}");
    machine.require_answer("rename linux shop", &done("rename", "shop"))?;
    machine.require_answer("pause linux", &refused("there is no guest linux"))?;
    machine.require_answer("unpause shop", &done("unpause", "shop"))?;
    console(&mut machine, "shop")?;
    machine.expect(&md5(&word)?, SOON)?;
    // The last command but one comes back by the arrow keys: `console` is last.
    machine.type_keys(LEAVE)?;
    machine.expect(PROMPT, SOON)?;
    machine.type_keys(b"\x1b[A\x1b[A\r")?;
    machine.expect(&format!("unpause shop -j\r\n{}", done("unpause", "shop")), SOON)?;
    machine.expect(PROMPT, SOON)?;
    machine.type_line("destroy shop")?;
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}

/// A stock guest does what the store asks of it, and may be made again after its end.
pub(crate) fn guests_obey_the_store_and_are_made_anew() -> Result<()> {
    let bundle = dom0("")?.guest(&linux("web", 128)?).guest(&linux("other", 128)?);
    let mut machine = start("guests_obey_the_store_and_are_made_anew", bundle)?;
    machine.expect(SHELL, BOOT)?;
    machine.require_answer("reboot web", &done("reboot", "web"))?;
    machine.expect("guest web (domain 1) rebooted", SOON)?;
    machine.ask_until("domid web", |answer| *answer == json!({ "name": "web", "domid": 3 }))?;
    console(&mut machine, "web")?;
    machine.expect(SHELL, BOOT)?;
    machine.require_answer("shutdown web", &done("shutdown", "web"))?;
    machine.expect("guest web (domain 3) powered off", SOON)?;
    machine.require_answer("create web", &json!({ "done": "create", "name": "web", "domid": 4 }))?;
    console(&mut machine, "web")?;
    machine.expect(SHELL, BOOT)?;
    machine.require_answer("destroy web", &done("destroy", "web"))?;
    machine.require_answer("shutdown other", &done("shutdown", "other"))?;
    machine.expect("guest other (domain 2) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// What the guest says its memory is, in KiB.
fn guest_memory(machine: &mut Machine, word: &str) -> Result<u64> {
    machine.type_line(&format!("echo {word} | md5sum; grep MemTotal /proc/meminfo"))?;
    machine.expect(&md5(word)?, SOON)?;
    machine.expect("MemTotal:", SOON)?;
    let line = machine.expect(" kB", SOON)?;
    line.trim_end_matches(" kB").trim().parse().with_context(|| format!("no memory: {line:?}"))
}

/// Asks until the guest's memory is as it should be.
fn guest_memory_becomes(machine: &mut Machine, is: impl Fn(u64) -> bool) -> Result<u64> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let memory = guest_memory(machine, &nonce()?)?;
        if is(memory) {
            return Ok(memory);
        }
        ensure!(Instant::now() < until, "the balloon stays at {memory} KiB");
        thread::sleep(Duration::from_millis(500));
    }
}

/// Sets the memory of the guest `linux`, and returns to its console.
fn set_memory(machine: &mut Machine, mib: u64) -> Result<()> {
    machine.require_answer(&format!("mem-set linux {mib}"), &done("mem-set", "linux"))?;
    console(machine, "linux")
}

/// An error unless dom0 lists the guest `linux` with this much memory.
fn require_listed_memory(machine: &mut Machine, mib: u64) -> Result<()> {
    let list = machine.ask("list")?;
    ensure!(named(&list, "linux")?["memory_mib"] == mib, "not {mib} MiB: {list}");
    Ok(())
}

/// Memory is taken from a guest and given back, and the guest's own numbers follow.
pub(crate) fn a_balloon_shrinks_and_grows() -> Result<()> {
    let mut machine = start("a_balloon_shrinks_and_grows", dom0("")?.guest(&linux("linux", 256)?))?;
    machine.expect(SHELL, BOOT)?;
    let before = guest_memory(&mut machine, &nonce()?)?;
    machine.require_answer("mem-set linux 9999", &refused("guest linux may have 1 to 256 MiB"))?;
    set_memory(&mut machine, 176)?;
    let less = guest_memory_becomes(&mut machine, |now| now + (80 << 10) <= before)?;
    require_listed_memory(&mut machine, 176)?;
    set_memory(&mut machine, 240)?;
    guest_memory_becomes(&mut machine, |now| now >= less + (64 << 10))?;
    require_listed_memory(&mut machine, 240)?;
    machine.require_answer("shutdown linux", &done("shutdown", "linux"))?;
    machine.expect("guest linux (domain 1) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// The exit status of `cargo xtask run` with these arguments, and what it printed.
fn run(arguments: &[&str]) -> Result<(i32, String, String)> {
    xtask(&[&["run", "--profile", boot::PROFILE, "--timeout", "200"], arguments].concat())
}

/// `cargo xtask` with these arguments, where nobody types.
fn xtask_command(arguments: &[&str]) -> Result<Command> {
    let folder = boot::images()?;
    let target = folder.ancestors().nth(2).context("no target folder")?;
    let mut command = Command::new("cargo");
    command.current_dir(xtask::root()).env("CARGO_TARGET_DIR", target).stdin(Stdio::null());
    command.args(["run", "--quiet", "--package", "xtask", "--"]).args(arguments);
    Ok(command)
}

/// The exit status of `cargo xtask` with these arguments, and what it printed.
pub(crate) fn xtask(arguments: &[&str]) -> Result<(i32, String, String)> {
    let output = xtask_command(arguments)?.output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code().context("no status")?, text(output.stdout), text(output.stderr)))
}

fn json(text: &str) -> Result<Vec<Value>> {
    let parse = |line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}"));
    text.lines().map(parse).collect()
}

/// Commands given from outside: nothing but JSON on standard output, a status, and an end when the guest has obeyed.
pub(crate) fn commands_from_outside_answer_in_json() -> Result<()> {
    let kernel = image("hello")?;
    let hello = kernel.to_string_lossy();
    let commands = "list -j; info -j; uptime -j; rename linux shop -j; domid shop -j; shutdown -w shop -j; list -j";
    let (status, out, err) = run(&["--memory", "128M", "--exec", commands])?;
    ensure!(status == 0, "{status} {out}\n{err}");
    let answers = json(&out)?;
    ensure!(answers.len() == 7, "{out}");
    ensure!(names(&answers[0]) == ["dom0", "linux"] && answers[0][1]["memory_mib"] == 128, "{out}");
    let field = |name: &str| number(&answers[1], name);
    let (total, free) = (field("total_mib")?, field("free_mib")?);
    let (hypervisor, own, bundle) = (field("hypervisor_kib")?, field("dom0_kib")?, field("bundle_kib")?);
    // Every page is somebody's; each of the numbers may have been rounded by less than a MiB.
    let sum = free + 128 + ((hypervisor + own + bundle) >> 10);
    ensure!(hypervisor > 0 && own > 0 && (total - 4..=total).contains(&sum), "{sum} MiB in all\n{out}");
    ensure!((800..=1024).contains(&total) && free > 0 && free + 128 < total, "{out}");
    ensure!(answers[1]["domains"] == 2 && answers[1]["cpus"].as_u64().is_some_and(|cpus| cpus >= 1), "{out}");
    ensure!(answers[2]["seconds"].is_u64() && answers[3] == done("rename", "shop"), "{out}");
    ensure!(answers[4] == json!({ "name": "shop", "domid": 1 }), "{out}");
    ensure!(answers[5] == done("shutdown", "shop") && names(&answers[6]) == ["dom0"], "{out}");
    ensure!(err.contains("guest shop (domain 1) powered off"), "{err}");

    let (status, out, err) = run(&["--kernel", &hello, "--exec", "pause nobody -j; list -j"])?;
    ensure!(status == 15, "a refused command ends with {status}\n{err}");
    let answers = json(&out)?;
    ensure!(answers == [refused("there is no guest nobody")], "{out}");
    let (status, out, err) = run(&["--exec", "list; dance"])?;
    ensure!(status == 1 && out.is_empty() && err.contains("--exec: dance: unknown command"), "{out}\n{err}");
    Ok(())
}

/// Two guests described by files run; what is wrong with a file is told, with its line, before anything starts.
pub(crate) fn guest_files_run_and_are_refused_with_their_lines() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let sh = boot::shell()?;
    let link = |name: &str, to: &Path| std::os::unix::fs::symlink(to, folder.path().join(name));
    link("vmlinux", &kernels::stock(&sh, kernels::DEFAULT)?.vmlinux)?;
    link("initrd", &kernels::ramdisk(&sh)?)?;
    let file = |name: &str, more: &str| -> Result<String> {
        let path = folder.path().join(format!("{name}.toml"));
        let common = "kernel = 'vmlinux'\nramdisk = 'initrd'\nextra = 'console=hvc0'\nmemory = 128\n";
        fs::write(&path, format!("name = '{name}'\n{common}{more}"))?;
        Ok(path.to_string_lossy().into_owned())
    };
    let (web, db) = (file("web", "vcpus = 2\n")?, file("db", "maxmem = 256\non_reboot = 'destroy'\n")?);
    let commands = "list -j; shutdown -w web -j; shutdown -w db -j; list -j";
    let (status, out, err) = run(&[&web, &db, "--exec", commands])?;
    ensure!(status == 0, "{status} {out}\n{err}");
    let answers = json(&out)?;
    ensure!(answers.len() == 4 && names(&answers[0]) == ["dom0", "web", "db"], "{out}");
    ensure!(answers[1..3] == ["web", "db"].map(|name| done("shutdown", name)), "{out}");
    ensure!(names(&answers[3]) == ["dom0"], "{out}");
    ensure!(err.contains("guest web (domain 1) powered off"), "{err}");

    let refused = |arguments: &[&str], why: &str| -> Result<()> {
        let (status, out, err) = run(arguments)?;
        ensure!(status == 1 && out.is_empty() && err.contains(why), "not refused with {why:?}:\n{out}\n{err}");
        ensure!(err.lines().filter(|line| line.starts_with("error: ")).count() == 1, "not one line:\n{err}");
        Ok(())
    };
    refused(&[&file("disky", "disk = ['x']\n")?], "disky.toml:6: disk: this build has no such devices")?;
    refused(&[&file("viffy", "vif = ['x']\n")?], "viffy.toml:6: vif: this build has no such devices")?;
    refused(&[&file("odd", "cpu = 1\n")?], "odd.toml:6: cpu: unknown field")?;
    refused(&[&web, &web], "web.toml:1: name: \"web\" is the guest of")?;
    refused(&[&web, &db, "--machine-memory", "340M"], "db.toml:5: memory: 128 MiB for db, but only")
}

/// How a guest ends is the status of the run; what could not be, too.
pub(crate) fn the_exit_status_says_how_guests_ended() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kernel = image("crash")?;
    let (crash, spin) = (kernel.to_string_lossy(), image("spin")?.to_string_lossy().into_owned());
    let file = |name: &str, how: &str, more: &str| -> Result<String> {
        let path = folder.path().join(format!("{name}.toml"));
        let text = format!("name = '{name}'\nmemory = 16\nkernel = '{crash}'\nextra = 'how={how}'\n{more}");
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let ends = |arguments: &[&str], wanted: i32, why: &str| -> Result<()> {
        let (status, out, err) = run(arguments)?;
        ensure!(status == wanted && err.contains(why), "{arguments:?}: {status} instead of {wanted}\n{out}\n{err}");
        Ok(())
    };
    let (off, good) = (file("off", "poweroff", "")?, "guest off (domain 1) powered off");
    let (out, err) = match run(&[&off])? {
        (0, out, err) => (out, err),
        (status, out, err) => anyhow::bail!("{status} after a power-off\n{out}\n{err}"),
    };
    ensure!(out.contains(good), "{out}\n{err}");
    ends(&[&file("ud2", "ud2", "")?, &off], 10, "error: a guest crashed")?;
    ends(&[&file("dog", "watchdog", "on_watchdog = 'destroy'\n")?], 11, "error: a guest missed its watchdog")?;
    ends(&[&file("again", "reboot", "on_reboot = 'destroy'\n")?], 12, "error: a guest rebooted")?;
    ends(
        &[&file("asleep", "suspend", "on_poweroff = 'destroy'\n")?],
        13,
        "error: a guest ended, but did not power off",
    )?;
    ends(&["--kernel", &crash, "--memory", "1M"], 1, "error: --memory: too little memory: needs ")?;
    // What dom0 alone finds out: there are vcpus for 15 such guests.
    let many: Vec<String> = (0..16).map(|n| file(&format!("many{n}"), "log", "vcpus = 32\n")).collect::<Result<_>>()?;
    let mut words: Vec<&str> = many.iter().map(String::as_str).collect();
    words.extend(["--exec", "quit"]);
    ends(&words, 14, "error: guest many15: creating the domain: ")?;
    ends(&["--first", "crash", "--extra", "how=shutdown"], 10, "error: the first domain crashed")?;
    ends(&["--kernel", &crash, "--ramdisk", "none", "--extra-only", "how=poweroff", "--name", "shop"], 0, "")?;
    let (status, _, err) = xtask(&["run", "--profile", boot::PROFILE, "--kernel", &spin, "--timeout", "5"])?;
    ensure!(status == 124 && err.contains("no end after 5 s"), "{status} after a timeout\n{err}");
    ends(&["--kernel", &spin, "--", "frobnicate=1"], 21, "error: the hypervisor panicked, or had nothing to start")?;
    // More than any process can address.
    ends(&["--kernel", &spin, "--machine-memory", "1000000G"], 22, "error: QEMU could not run the machine")?;
    ends(&["--kernel", &spin, "--cpu", "no-such-model"], 22, "error: QEMU could not run the machine")?;
    ends(&["--first", "hello", "--cpu", "Nehalem", "--qemu-arg=-name", "--qemu-arg=other"], 0, "")?;
    ends(&["--memory", "much"], 2, "--memory")?;
    ends(&["--memory", "2000M"], 1, "error: --memory: 2000 MiB for linux, but only")
}

/// A stock kernel as the first domain has the machine's console: it shows its log, and its shell takes what is typed.
pub(crate) fn a_stock_kernel_alone_has_a_console() -> Result<()> {
    let stock = kernels::stock(&boot::shell()?, kernels::DEFAULT)?.vmlinux;
    let ramdisk = kernels::ramdisk(&boot::shell()?)?;
    let bundle = Bundle::first(&stock, Some(&ramdisk), "console=hvc0 acpi=off").first_memory(256);
    let mut machine = start("a_stock_kernel_alone_has_a_console", bundle)?;
    machine.expect("Linux version 6.1", BOOT)?;
    machine.expect("tenon-guest: init reached", BOOT)?;
    machine.expect(SHELL, SOON)?;
    answers(&mut machine)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.finish()?.require_success()?;
    // A later one would look for the firmware's tables in memory that nobody may map: it shows its log.
    let (status, out, err) = run(&["--first", "6.12", "--extra", "tenon.oneshot"])?;
    let shown = ["Linux version 6.12", "Run /init as init process", "tenon-guest: init reached"];
    ensure!(status == 0 && shown.iter().all(|line| out.contains(line)), "{status} {out}\n{err}");
    Ok(())
}

/// A run that a test looks at from outside. It does not outlive this, nor does its QEMU, which a run takes along when
/// it is asked to end, and leaves behind when it is killed.
struct Run(Child);

impl Run {
    /// Its process: Cargo becomes the program it runs.
    fn process(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.0.id())?))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let (Ok(None), Ok(process)) = (self.0.try_wait(), self.process()) {
            // Both fail only if it has ended in between.
            let _ = kill(process, Signal::SIGTERM);
            let _ = self.0.wait();
        }
    }
}

/// The process of QEMU that the process `parent` has started, if it has.
fn qemu_of(parent: Pid) -> Result<Option<Pid>> {
    let mut children = String::new();
    for task in fs::read_dir(format!("/proc/{parent}/task"))?.flatten() {
        // A thread may have ended in the meantime.
        children += &fs::read_to_string(task.path().join("children")).unwrap_or_default();
    }
    for child in children.split_whitespace() {
        if fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| name.starts_with("qemu-system")) {
            return Ok(Some(Pid::from_raw(child.parse()?)));
        }
    }
    Ok(None)
}

/// Who is sent a signal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whom {
    Xtask,
    Qemu,
}

/// Starts a run of a guest that never ends, sends a signal when the guest is up, and gives status and standard error
/// of the run after its end. QEMU must be gone by then.
fn signalled(whom: Whom, signal: Signal) -> Result<(i32, String)> {
    let spin = image("spin")?.to_string_lossy().into_owned();
    let arguments = ["run", "--profile", boot::PROFILE, "--timeout", "60", "--kernel", &spin];
    let mut command = xtask_command(&arguments)?;
    let mut run = Run(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    let mut errors = run.0.stderr.take().context("no standard error")?;
    let errors = thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).map(|_| text)
    });
    let xtask = run.process()?;
    let mut output = BufReader::new(run.0.stdout.take().context("no standard output")?).lines();
    output
        .find(|line| line.as_ref().map_or(true, |line| line.contains("spin: from here on")))
        .context("no guest")??;
    let qemu = qemu_of(xtask)?.context("the run has no QEMU")?;
    kill(if whom == Whom::Qemu { qemu } else { xtask }, signal)?;
    // The output ends with the last of those that can write to it.
    output.try_for_each(|line| line.map(drop))?;
    let status = run.0.wait()?.code().context("the run was killed by the signal")?;
    ensure!(kill(qemu, None).is_err(), "QEMU outlives the run");
    let errors = errors.join().ok().context("the reader of standard error panicked")??;
    Ok((status, errors))
}

/// A run that is interrupted puts its machine away and says so; one whose QEMU is killed says that.
pub(crate) fn the_exit_status_says_who_was_killed() -> Result<()> {
    for (whom, signal, wanted, why) in [
        (Whom::Xtask, Signal::SIGINT, 130, "error: interrupted"),
        (Whom::Xtask, Signal::SIGTERM, 130, "error: interrupted"),
        (Whom::Qemu, Signal::SIGKILL, 22, "error: QEMU was killed"),
    ] {
        let (status, err) = signalled(whom, signal)?;
        ensure!(status == wanted && err.contains(why), "{status} instead of {wanted} after {signal}\n{err}");
    }
    Ok(())
}

/// What a guest writes by console_io is in the hypervisor's log, escaped and each line with its mark, until it is cleared;
/// nowhere else.
pub(crate) fn the_log_has_what_guests_write() -> Result<()> {
    let kernel = image("crash")?;
    let guest = Guest { name: "log".into(), memory: 16, vcpus: 1, kernel, ramdisk: None, extra: "how=log".into() };
    let mut machine = start("the_log_has_what_guests_write", dom0("consoles=all")?.guest(&guest))?;
    machine.expect("log| crash: log", SOON)?;
    machine.expect("log| crash: logged", SOON)?;
    machine.type_line("dmesg")?;
    let seen = machine.expect("(d1) wiped \\x1b[2J", SOON)?;
    ensure!(seen.contains("[info] Tenon") && !seen.contains("\u{1b}[2J"), "{seen}");
    for line in ["(d1) quiet", "(d1) [error] mfn 0x1234: dropped twice", "(d1) (d7) hello from d7"] {
        ensure!(seen.lines().any(|it| it == line), "no line `{line}` in {seen}");
    }
    let lines = machine.ask("dmesg -c")?;
    let last = lines.as_array().and_then(|lines| lines.last());
    ensure!(last == Some(&json!("(d1) wiped \\x1b[2J")), "{lines}");
    machine.require_answer("dmesg", &json!([]))?;
    machine.type_line("destroy log")?;
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}

/// A guest that begins with less than it may have grows to all of it.
pub(crate) fn a_balloon_grows_beyond_the_beginning() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("linux.toml");
    let Guest { kernel, ramdisk, .. } = linux("linux", 128)?;
    let ramdisk = ramdisk.context("no ramdisk")?;
    let (kernel, ramdisk) = (kernel.display(), ramdisk.display());
    let files = format!("kernel = '{kernel}'\nramdisk = '{ramdisk}'\nextra = 'console=hvc0'\n");
    fs::write(&file, format!("name = 'linux'\nmemory = 128\nmaxmem = 256\n{files}"))?;
    let guests = guest_file::read(&[file])?;
    let bundle = guests.iter().fold(dom0("")?, Bundle::described);
    let mut machine = start("a_balloon_grows_beyond_the_beginning", bundle)?;
    machine.expect(SHELL, BOOT)?;
    let before = guest_memory(&mut machine, &nonce()?)?;
    machine.require_answer("mem-set linux 257", &refused("guest linux may have 1 to 256 MiB"))?;
    set_memory(&mut machine, 256)?;
    guest_memory_becomes(&mut machine, |now| now >= before + (120 << 10))?;
    require_listed_memory(&mut machine, 256)?;
    machine.require_answer("shutdown linux", &done("shutdown", "linux"))?;
    machine.expect("guest linux (domain 1) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// What the hypervisor and dom0 take, in KiB, by an answer to `info`.
fn footprint(info: &Value) -> Result<u64> {
    Ok(number(info, "hypervisor_kib")? + number(info, "dom0_kib")?)
}

/// Hypervisor and dom0 take at most 24 MiB of a machine of a GiB, and the same again after kernels have been unpacked for
/// guests that came and went.
pub(crate) fn hypervisor_and_dom0_are_small_and_stay_so() -> Result<()> {
    small_after(3)
}

/// As above, after so many rounds. `cargo xtask soak` makes fifty.
pub(crate) fn small_after(rounds: usize) -> Result<()> {
    const BAR: u64 = 24 << 10;
    let kernel = kernels::stock(&boot::shell()?, kernels::DEFAULT)?.bzimage;
    let commands = "destroy linux -j; create linux -j; ".repeat(rounds);
    let commands = format!("info -j; {commands}info -j; destroy linux -j; info -j");
    let bundle = dom0("")?.guest(&Guest { kernel, ..linux("linux", 96)? }).exec(&commands);
    let begun = Instant::now();
    let mut setup = Setup::new(bundle);
    setup.memory = 1024;
    setup.limit = Duration::from_secs(120 + 15 * rounds as u64);
    let outcome = Machine::boot(&format!("small_after_{rounds}_rounds"), &setup)?.finish()?;
    outcome.require_success()?;
    let answers = outcome.answers()?;
    let (made, others): (Vec<&Value>, Vec<&Value>) = answers.iter().partition(|answer| answer["done"] == "create");
    let infos = others.into_iter().filter(|answer| answer["done"].is_null());
    let infos: Vec<u64> = infos.map(footprint).collect::<Result<_>>()?;
    let seconds = begun.elapsed().as_secs_f64();
    println!("hypervisor and dom0: {infos:?} KiB, before and after {rounds} rounds in {seconds:.1} s");
    ensure!(infos.len() == 3 && made.len() == rounds, "{answers:?}");
    ensure!(infos.iter().all(|kib| *kib <= BAR), "more than {BAR} KiB: {infos:?}");
    ensure!(infos[0] == infos[1] && infos[2] <= infos[0], "it grows: {infos:?}");
    Ok(())
}

/// Five guests of 11 MiB on a machine of 82 MiB, where there is hardly anything left, hold all that their quotas let them hold in the store: dom0 had promised
/// it the memory when it made them, goes on answering, and has it all back when they are gone.
pub(crate) fn guests_that_fill_the_store_do_not_harm_dom0() -> Result<()> {
    const NAMES: [&str; 5] = ["one", "two", "three", "four", "five"];
    let mut bundle = dom0("")?;
    for name in NAMES {
        bundle = bundle.guest(&Guest { memory: 11, ..test_guest(name, "store", "do=fill")? });
    }
    let mut setup = Setup::new(bundle);
    setup.memory = 82;
    setup.limit = Duration::from_secs(240);
    let mut machine = Machine::boot("guests_that_fill_the_store_do_not_harm_dom0", &setup)?;
    machine.expect("store: stays", BOOT)?;
    for name in &NAMES[1..] {
        command(&mut machine, &format!("console {name}"))?;
        machine.expect("store: stays", BOOT)?;
    }
    let full = numbers(&machine.ask("info")?)?;
    let list = machine.ask("list")?;
    ensure!(names(&list) == [&["dom0"], &NAMES[..]].concat(), "{list}");
    for name in &NAMES[1..] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    // Those that are gone leave room for one like them.
    machine.require_answer("create two", &json!({ "done": "create", "name": "two", "domid": 6 }))?;
    command(&mut machine, "console two")?;
    machine.expect("store: stays", BOOT)?;
    let few = numbers(&machine.ask("info")?)?;
    // What is told is rounded.
    ensure!(full[0] >= 5 * (full[1] - 1) && few[1] == full[1], "{full:?}, then {few:?}");
    ensure!(few[0] < full[0] && few[2] <= full[2], "{full:?}, then {few:?}");
    machine.expect(PROMPT, SOON)?;
    machine.type_line("quit")?;
    machine.finish()?.require_success()
}

/// What an answer to `info` says of dom0: KiB promised to guests, KiB for each, KiB in all.
fn numbers(info: &Value) -> Result<[u64; 3]> {
    Ok([number(info, "for_guests_kib")?, number(info, "each_guest_kib")?, number(info, "dom0_kib")?])
}

/// A guest breaks its store ring two thousand times: the operator gets a handful of lines, and one that says how many more
/// there were.
pub(crate) fn a_guest_cannot_flood_the_operator_with_warnings() -> Result<()> {
    let bundle = dom0("")?.guest(&test_guest("breaker", "store", "do=break")?);
    let mut machine = start("a_guest_cannot_flood_the_operator_with_warnings", bundle)?;
    machine.expect("store: broken 2000 times", BOOT)?;
    let outcome = machine.finish()?;
    outcome.require_success()?;
    let warnings = outcome.console.lines().filter(|line| line.contains("the store serves domain 1 no longer")).count();
    ensure!((5..10).contains(&warnings), "{warnings} warnings");
    ensure!(outcome.console.contains("more warnings about domain 1 were suppressed"), "nothing tells of the others");
    Ok(())
}

/// Two guests that write without a pause, one of them to the terminal, slow only themselves: dom0 obeys at once, a
/// stock guest answers, and those that flood can be looked at, left and destroyed.
pub(crate) fn a_flooding_console_slows_only_its_guest() -> Result<()> {
    let bundle = dom0("")?
        .guest(&test_guest("flood", "flood", "")?)
        .guest(&test_guest("log", "flood", "how=log")?)
        .guest(&linux("linux", 128)?);
    let mut machine = start("a_flooding_console_slows_only_its_guest", bundle)?;
    machine.expect("flood: line 1000,", BOOT)?;
    let list = machine.ask("list")?;
    ensure!(names(&list) == ["dom0", "flood", "log", "linux"], "{list}");
    console(&mut machine, "linux")?;
    machine.expect(SHELL, BOOT)?;
    answers(&mut machine)?;
    // The flood goes on, and dom0 is listened to while it fills the terminal.
    let list = machine.ask("list")?;
    ensure!(names(&list) == ["dom0", "flood", "log", "linux"], "{list}");
    console(&mut machine, "flood")?;
    machine.expect("bytes are lost]", SOON)?;
    for _ in 0..1000 {
        machine.expect("flood: line ", SOON)?;
    }
    machine.require_answer("domid linux", &json!({ "name": "linux", "domid": 3 }))?;
    machine.require_answer("destroy flood", &done("destroy", "flood"))?;
    machine.require_answer("destroy log", &done("destroy", "log"))?;
    console(&mut machine, "linux")?;
    answers(&mut machine)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 3) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// A guest makes one call that takes days: dom0 is still listened to, another guest runs, and the call ends with its guest.
pub(crate) fn a_call_without_an_end_keeps_nobody_out() -> Result<()> {
    let bundle = dom0("consoles=all")?.guest(&test_guest("long", "long", "")?);
    let bundle = bundle.guest(&test_guest("log", "crash", "how=log")?);
    let mut machine = start("a_call_without_an_end_keeps_nobody_out", bundle)?;
    machine.expect("long| long: from here on a single call goes on", BOOT)?;
    machine.expect("log| crash: logged", BOOT)?;
    let list = machine.ask("list")?;
    ensure!(names(&list) == ["dom0", "long", "log"] && list[2]["domid"] == 2, "{list}");
    machine.require_answer("destroy log", &done("destroy", "log"))?;
    // The call is all that is left, and dom0 sleeps until a key is typed.
    for _ in 0..3 {
        let list = machine.ask("list")?;
        ensure!(named(&list, "long")?["domid"] == 1, "{list}");
    }
    machine.type_line("destroy long")?;
    machine.expect("all guests have ended", SOON)?;
    let outcome = machine.finish()?;
    ensure!(!outcome.console.contains("long: the call is over"), "{}", outcome.console);
    outcome.require_success()
}

/// Three guests write without a pause to a terminal that takes less than they write: dom0 shows a ring full of each in
/// turn, is listened to, and ends them. What is counted are lines, not seconds.
pub(crate) fn consoles_that_flood_take_turns() -> Result<()> {
    const NAMES: [&str; 3] = ["one", "two", "three"];
    const LINES: usize = 2000;
    // A ring has room for 27 lines; who finds the others' empty may take two in a row.
    const TURN: usize = 60;
    const WAITS: usize = 400;
    let bundle = NAMES.iter().try_fold(dom0("consoles=all")?, |bundle, name| -> Result<_> {
        Ok(bundle.guest(&test_guest(name, "flood", "")?))
    })?;
    let mut setup = Setup::new(bundle);
    setup.pace = Some(50_000);
    let mut machine = Machine::boot("consoles_that_flood_take_turns", &setup)?;
    // They are made in this order.
    machine.expect("three| flood: line 10,", SOON)?;
    let (mut lines, mut turn, mut longest, mut before) = ([0; NAMES.len()], 0, 0, NAMES.len());
    for _ in 0..LINES {
        let line = machine.expect("| flood: line ", SOON)?;
        let of = |name: &&str| line.ends_with(&format!("{name}| flood: line "));
        let who = NAMES.iter().position(of).with_context(|| format!("whose line is {line:?}?"))?;
        turn = if who == before { turn + 1 } else { 1 };
        before = who;
        lines[who] += 1;
        longest = longest.max(turn);
    }
    println!("of {LINES} lines {lines:?} are of each guest that floods, at most {longest} of one after another");
    ensure!(longest <= TURN && lines.iter().all(|count| *count >= LINES / 6), "{lines:?}, {longest} after another");
    machine.type_line("domid three -j")?;
    let waited = machine.expect("\"domid\":3}", SOON)?.matches("flood: line ").count();
    println!("{waited} lines until dom0 answers");
    ensure!(waited <= WAITS, "{waited} lines until dom0 answers");
    for name in NAMES {
        machine.type_line(&format!("destroy {name}"))?;
    }
    machine.expect("all guests have ended", SOON)?;
    machine.finish()?.require_success()
}
