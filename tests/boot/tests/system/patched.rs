//! What the patches for guest kernels must not change: sums under load, what programs are shown, the verdicts of the kernel's
//! own tests, and what happens on other hypervisors and on none.

use crate::stories::{BOOT, SHELL, SOON, dom0, image, linux, md5_of};
use anyhow::{Context, Result, ensure};
use boot::selftests::{Verdict, differences, table, verdicts};
use boot::{Machine, Setup};
use std::fs;
use std::time::Duration;
use xtask::bundle::Guest;
use xtask::selftests::{COMMAND, Selftests};
use xtask::{built, kernels, xen};

/// Seconds that a test may take; the clock of the machine counts instructions, so that they do not depend on this machine's.
const SECONDS: u32 = 10;
/// How long all tests may take in a guest.
const LIMIT: Duration = Duration::from_secs(5400);

/// Without words on its command line, the patched kernel runs the old code on the bare machine and as Xen's first domain, and
/// all parts of the patches on Tenon: its log says which parts are on.
pub(crate) fn the_patched_kernel_boots_everywhere() -> Result<()> {
    const TITLE: &str = "the_patched_kernel_boots_everywhere";
    let sh = boot::shell()?;
    let (kernel, ramdisk) = (kernels::named(&sh, built::PATCHED_SMALL)?, kernels::ramdisk(&sh)?);
    // The kernel checks the emulated timer when it is alone, and once took it for broken, perhaps as the machine was busy.
    let (alone, words) = (format!("{TITLE}/alone"), "console=ttyS0 no_timer_check");
    has_parts(&mut Machine::boot_alone(&alone, &kernel.bzimage, words, &ramdisk, BOOT)?, 0)?;
    let first = (&*kernel.vmlinux, "console=hvc0", Some(&*ramdisk));
    has_parts(&mut Machine::boot_on_xen(&format!("{TITLE}/xen"), &xen::hypervisor(&sh)?, first, BOOT)?, 0)?;
    let guest = Guest { kernel: kernel.vmlinux, ..linux("linux", 128)? };
    let mut machine = Machine::boot(TITLE, &Setup { limit: BOOT, ..Setup::new(dom0("")?.guest(&guest)) })?;
    has_parts(&mut machine, built::parts(&built::series(built::DEFAULT)?).len())?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.finish()?.require_success()
}

/// The kernel's log says of so many parts that they are on, and of none more.
fn has_parts(machine: &mut Machine, parts: usize) -> Result<()> {
    machine.expect(SHELL, BOOT)?;
    machine.type_line("echo $(dmesg | grep -c 'Linux version')-log-$(dmesg | grep -c 'tenon: .* is on')-parts")?;
    machine.expect(&format!("1-log-{parts}-parts"), SOON)?;
    Ok(())
}

/// The patched kernel, on four vcpus and with these parts alone, sorts, packs and unpacks what it counts, and comes to the
/// right sums each time; its log says which parts are on, and nothing in it is a warning. System calls end by SYSRET if
/// that part is on.
pub(crate) fn carries_load(title: &str, parts: &[String]) -> Result<()> {
    const ROUNDS: usize = 15;
    const LINES: usize = 5_000;
    const LOADED: Duration = Duration::from_secs(1800);
    let kernel = kernels::named(&boot::shell()?, "patched")?.vmlinux;
    let words = if parts.is_empty() { "none".to_owned() } else { parts.join(",") };
    let extra = format!("console=hvc0 tenon={words}");
    let program = [("bin/selectors".to_owned(), fs::read(image("selectors")?)?)].into();
    let ramdisk = Some(kernels::ramdisk_with(&boot::shell()?, kernels::DEFAULT, &program)?);
    let mut setup = Setup::new(dom0("")?.guest(&Guest { kernel, vcpus: 4, extra, ramdisk, ..linux("linux", 256)? }));
    setup.memory = 1024;
    setup.limit = LOADED;
    let mut machine = Machine::boot(title, &setup)?;
    machine.expect(SHELL, BOOT)?;
    machine.type_line("dmesg | sed -n 's/.*tenon: \\(.*\\) is on/\\1/p' | sort | md5sum")?;
    let mut on = parts.to_vec();
    on.sort();
    machine.expect(&md5_of(on.iter().map(|part| format!("{part}\n")).collect::<String>().as_bytes())?, SOON)?;
    machine.expect(SHELL, SOON)?;
    // SYSRET loads the hypervisor's selectors, IRET those of Linux, which are the ones that Linux shows in either case.
    let live = if parts.iter().any(|part| part == "sysret") { "0xe033 0xe02b" } else { "0x33 0x2b" };
    machine.type_line("selectors")?;
    machine.expect(&format!("selectors: {live} after a system call"), SOON)?;
    machine.expect("selectors: 0x33 0x2b in 61 signals", SOON)?;
    machine.expect("selectors: 0x33 0x2b in 5 stops", SOON)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line(&format!("once() {{ seq {LINES} | sort -r | gzip | gunzip | sort -n | md5sum; }}"))?;
    machine.expect(SHELL, SOON)?;
    machine.type_line(&format!("load() {{ for n in $(seq {ROUNDS}); do once; done > /tmp/$1; }}"))?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("for cpu in 0 1 2 3; do load $cpu & done; wait; cat /tmp/[0-3] | sort | uniq -c")?;
    let numbers: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    machine.expect(&format!("{} {}", 4 * ROUNDS, md5_of(numbers.as_bytes())?), LOADED)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("echo bad-$(dmesg | grep -c -E 'WARNING|BUG|multicall')-")?;
    machine.expect("bad-0-", SOON)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 8) powered off", SOON)?;
    machine.finish()?.require_success()
}

/// The kernel's selftests of x86 and of memory management come to the same verdicts in a guest without the patches and in one
/// with all of them. Both lists are printed.
pub(crate) fn has_the_verdicts_of_an_unpatched_guest(title: &str) -> Result<()> {
    let tests = Selftests::find(&boot::shell()?)?;
    let stock = run(&format!("{title}_unpatched"), "unpatched", "", &tests)?;
    let patched = run(&format!("{title}_patched"), "patched", "tenon=all", &tests)?;
    println!("of the kernel's selftests: unpatched | patched");
    for line in table(&stock, &patched) {
        println!("{line}");
    }
    for line in &tests.left_out {
        println!("not built: {line}");
    }
    let differences = differences(&tests.list(), &stock, &patched);
    ensure!(differences.is_empty(), "the patched guest differs:\n{}", differences.join("\n"));
    Ok(())
}

/// Runs all tests in a guest.
fn run(title: &str, kernel: &str, words: &str, tests: &Selftests) -> Result<Vec<Verdict>> {
    let sh = boot::shell()?;
    let (kernel, ramdisk) = (kernels::named(&sh, kernel)?.vmlinux, kernels::ramdisk_with_files(&sh, &tests.files())?);
    let extra = format!("console=hvc0 {words}");
    let guest = Guest { kernel, ramdisk: Some(ramdisk), vcpus: 2, extra, ..linux("linux", 1024)? };
    let mut setup = Setup::new(dom0("")?.guest(&guest));
    setup.memory = 1536;
    setup.limit = LIMIT;
    setup.counted = true;
    let mut machine = Machine::boot(title, &setup)?;
    // An emulator that counts instructions unpacks the programs slowly.
    machine.expect(SHELL, LIMIT)?;
    machine.type_line(&format!("{COMMAND} {SECONDS}"))?;
    let said = machine.expect("@@ all tests have ended", LIMIT).context("the tests have no end")?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 8) powered off", SOON)?;
    machine.finish()?.require_success()?;
    Ok(verdicts(&said))
}
