//! What the patches for guest kernels must not change: sums under load.

use crate::stories::{BOOT, SHELL, SOON, dom0, linux, md5_of};
use anyhow::Result;
use boot::{Machine, Setup};
use std::time::Duration;
use xtask::bundle::Guest;
use xtask::kernels;

/// The patched kernel, on four vcpus and with these parts alone, sorts, packs and unpacks what it counts, and comes to the
/// right sums each time; its log says which parts are on, and nothing in it is a warning.
pub(crate) fn carries_load(title: &str, parts: &[String]) -> Result<()> {
    const ROUNDS: usize = 15;
    const LINES: usize = 5_000;
    const LOADED: Duration = Duration::from_secs(1800);
    let kernel = kernels::named(&boot::shell()?, "patched")?.vmlinux;
    let words = if parts.is_empty() { "none".to_owned() } else { parts.join(",") };
    let extra = format!("console=hvc0 tenon={words}");
    let mut setup = Setup::new(dom0("")?.guest(&Guest { kernel, vcpus: 4, extra, ..linux("linux", 256)? }));
    setup.memory = 1024;
    setup.limit = LOADED;
    let mut machine = Machine::boot(title, &setup)?;
    machine.expect(SHELL, BOOT)?;
    machine.type_line("dmesg | sed -n 's/.*tenon: \\(.*\\) is on/\\1/p' | sort | md5sum")?;
    let mut on = parts.to_vec();
    on.sort();
    machine.expect(&md5_of(on.iter().map(|part| format!("{part}\n")).collect::<String>().as_bytes())?, SOON)?;
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
