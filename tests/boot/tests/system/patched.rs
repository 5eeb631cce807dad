//! What the patches for guest kernels must not change: sums under load, and what programs are shown.

use crate::stories::{BOOT, SHELL, SOON, dom0, image, linux, md5_of};
use anyhow::Result;
use boot::{Machine, Setup};
use std::fs;
use std::time::Duration;
use xtask::bundle::Guest;
use xtask::kernels;

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
