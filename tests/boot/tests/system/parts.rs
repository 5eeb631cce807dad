//! What single parts of the patches for guest kernels bring: memory in large folios, interrupts for several CPUs, counters.

use crate::stories::{BOOT, SHELL, SOON, dom0, image, linux};
use anyhow::Result;
use boot::{Machine, Setup};
use microbench::{DONE, mode};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;
use xtask::bundle::Guest;
use xtask::kernels;

/// Four processes of the patched kernel, on four vcpus and with the parts that `words` switch, share, split, move and give back
/// parts of large folios. They fill more memory than there is, and keep little of each folio. Every page holds what was written
/// to it; the kernel says whether it made folios (`made`) and that it offers none of 2 MiB, and its log has no warning.
pub(crate) fn folios_hold_what_was_written(title: &str, words: &str, made: bool) -> Result<()> {
    let mut machine = start(title, words)?;
    machine.type_line(&format!("microbench {}", mode::PRESS))?;
    machine.expect(DONE, Duration::from_secs(600))?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("sizes=/sys/kernel/mm/transparent_hugepage; stats=$sizes/hugepages-64kB/stats")?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("many() { echo $(($(cat $stats/$1 || echo 0) > 100)); }")?;
    machine.expect(SHELL, SOON)?;
    machine
        .type_line("echo made-$(many anon_fault_alloc)-$(many split)-$(ls $sizes | grep -c -E '^hugepages-2048')-")?;
    machine.expect(if made { "made-1-1-0-" } else { "made-0-0-0-" }, SOON)?;
    machine.expect(SHELL, SOON)?;
    end(machine)
}

/// On four vcpus, and with the parts that `words` switch, a process interrupts three others at once fifty times. It does so by
/// one call (`together`) or by one for each CPU, as the counters of the kernel say.
pub(crate) fn cpus_are_interrupted(title: &str, words: &str, together: bool) -> Result<()> {
    let mut machine = start(title, words)?;
    machine.type_line("mount -t debugfs none /sys/kernel/debug; cat /sys/kernel/debug/tenon")?;
    machine.expect(SHELL, SOON)?;
    // Events are sent by hypercall 32.
    machine
        .type_line("count() { sed -n \"s/^$1 //p\" /sys/kernel/debug/tenon; }; sends() { count 'hypercall 32'; }")?;
    machine.expect(SHELL, SOON)?;
    machine.type_line(&format!("before=$(sends); microbench {}; after=$(sends)", mode::INTERRUPT))?;
    machine.expect(DONE, Duration::from_secs(300))?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("echo calls $(count ipi), sends $((after - before))")?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("echo interrupts-$(($(count ipi) >= 45))-$((after - before >= 135))-")?;
    machine.expect(if together { "interrupts-1-0-" } else { "interrupts-0-1-" }, SOON)?;
    machine.expect(SHELL, SOON)?;
    end(machine)
}

/// Boots the patched kernel on four vcpus, with the benchmark program beside its shell.
fn start(title: &str, words: &str) -> Result<Machine> {
    let sh = boot::shell()?;
    let kernel = kernels::named(&sh, "patched")?.vmlinux;
    let program = BTreeMap::from([("bin/microbench".to_owned(), fs::read(image("microbench")?)?)]);
    let ramdisk = Some(kernels::ramdisk_with(&sh, kernels::DEFAULT, &program)?);
    let extra = format!("console=hvc0 tenon={words}");
    let mut setup = Setup::new(dom0("")?.guest(&Guest { kernel, ramdisk, vcpus: 4, extra, ..linux("linux", 192)? }));
    setup.memory = 1024;
    setup.limit = Duration::from_secs(900);
    let mut machine = Machine::boot(title, &setup)?;
    machine.expect(SHELL, BOOT)?;
    Ok(machine)
}

/// Ends the guest, whose log has no warning.
fn end(mut machine: Machine) -> Result<()> {
    machine.type_line("echo bad-$(dmesg | grep -c -E 'WARNING|BUG|multicall|Out of memory')-")?;
    machine.expect("bad-0-", SOON)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.expect("guest linux (domain 8) powered off", SOON)?;
    machine.finish()?.require_success()
}
