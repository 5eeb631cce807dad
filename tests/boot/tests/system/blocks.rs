//! Stories of guests' disks: attached from a guest's file and by verbs, in memory and on disks of the machine.

use crate::stories::{BOOT, SHELL, SOON, dom0};
use anyhow::{Context, Result, ensure};
use boot::answers::{done, number, refused};
use boot::{Machine, Setup, answers::LEAVE};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;
use xtask::bundle::Bundle;
use xtask::disk::Disk;
use xtask::guest_file::{self, Described};
use xtask::machine::Failure;

/// Writes a MiB of random bytes to the disk past the guest's cache, and keeps their sum in `/root/sum`.
const WRITE: &str = "dd if=/dev/urandom of=/root/bytes bs=64k count=16 && md5sum < /root/bytes > /root/sum && \
                     dd if=/root/bytes of=/dev/xvda bs=64k oflag=direct conv=fsync";
/// Fails unless these bytes are read from the disk.
const READ: &str = "dd if=/dev/xvda bs=64k count=16 iflag=direct | md5sum | cmp - /root/sum";

/// A stock guest that is made again when it crashes, with these disks.
fn with_disks(folder: &Path, name: &str, disks: &[&str]) -> Result<Described> {
    let file = folder.join(format!("{name}.toml"));
    let text = format!("name = '{name}'\nkernel = '6.1'\nextra = 'console=hvc0'\nmemory = 128\non_crash = 'restart'\n");
    fs::write(&file, format!("{text}disk = {disks:?}\n"))?;
    guest_file::read(&boot::shell()?, &[file])?.pop().context("a file is a guest")
}

/// Boots a machine of a GiB with these guests, and the files that they name as its disks.
fn start(title: &str, mut guests: Vec<Described>) -> Result<Machine> {
    let mut disks = Vec::new();
    Disk::add(&mut disks, &mut guests)?;
    let mut setup = Setup::new(guests.iter().fold(dom0("")?, Bundle::described));
    setup.memory = 1024;
    setup.limit = Duration::from_secs(240);
    setup.arguments = disks.iter().enumerate().flat_map(|(number, disk)| disk.arguments(number)).collect();
    Machine::boot(title, &setup)
}

/// Types commands at the shell of the guest that is shown; all must succeed. The words that tell success are put together by the
/// guest, because what is typed is echoed.
fn shell(machine: &mut Machine, commands: &str) -> Result<()> {
    machine.type_line(&format!("( {commands} ) && echo all\"f\"ine || echo not\"f\"ine"))?;
    let output = machine.expect("fine\r\n", SOON).with_context(|| format!("no end of {commands:?}"))?;
    ensure!(output.ends_with("allfine\r\n"), "{commands:?} failed:\n{output}");
    machine.expect(SHELL, SOON).map(drop)
}

/// Leads from dom0's prompt to the shell of a guest.
fn console(machine: &mut Machine, name: &str) -> Result<()> {
    machine.type_keys(LEAVE)?;
    machine.type_line(&format!("console {name}"))?;
    machine.expect(&format!("[console of {name}"), SOON)?;
    machine.type_line("")?;
    machine.expect(SHELL, BOOT).map(drop)
}

/// The disk of this name in an answer to `block-list`.
fn disk<'a>(list: &'a Value, vdev: &str) -> Result<&'a Value> {
    let found = list.as_array().into_iter().flatten().find(|disk| disk["vdev"] == vdev);
    found.with_context(|| format!("no {vdev} in {list}"))
}

/// A stock guest writes a disk in memory and reads it back. The disk goes and another comes while the guest runs; one that is
/// open goes as well, and one goes by force. After a crash the guest has the disks of its file again, empty, and when all is
/// over dom0 has the memory that it had before.
pub(crate) fn memory_disks_come_and_go() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let guests = vec![with_disks(folder.path(), "web", &["memory:16M,,xvda,w", "memory:1M,,xvdb,r"])?];
    let mut machine = start("memory_disks_come_and_go", guests)?;
    machine.expect(SHELL, BOOT)?;
    shell(&mut machine, WRITE)?;
    shell(&mut machine, READ)?;
    shell(
        &mut machine,
        "! dd if=/root/bytes of=/dev/xvdb bs=64k count=1 conv=fsync && tr -d '\\0' < /dev/xvdb | wc -c | grep -x 0",
    )?;
    let list = machine.ask("block-list")?;
    let written = disk(&list, "xvda")?;
    ensure!(written["state"] == "connected" && number(written, "sectors_written")? == 2048, "{list}");
    ensure!(number(written, "sectors_read")? >= 2048 && number(disk(&list, "xvdb")?, "writes")? == 0, "{list}");
    let occupied = footprint(&mut machine)?;

    machine.require_answer("block-detach web xvda", &done("block-detach", "web"))?;
    machine.require_answer("block-detach web xvda", &refused("guest web: it has no disk xvda"))?;
    console(&mut machine, "web")?;
    shell(&mut machine, "[ ! -e /dev/xvda ]")?;
    machine.require_answer("block-attach web memory:2M,,xvda,w", &done("block-attach", "web"))?;
    machine.ask_until("block-list", |list| disk(list, "xvda").is_ok_and(|disk| disk["state"] == "connected"))?;
    console(&mut machine, "web")?;
    shell(&mut machine, "tr -d '\\0' < /dev/xvda | wc -c | grep -x 0")?;
    shell(&mut machine, WRITE)?;
    shell(&mut machine, READ)?;

    // This kernel lets go of a disk that is open.
    machine.type_line("exec 3< /dev/xvda")?;
    machine.expect(SHELL, SOON)?;
    machine.require_answer("block-detach web xvda", &done("block-detach", "web"))?;
    console(&mut machine, "web")?;
    shell(&mut machine, "[ ! -e /dev/xvda ]")?;
    machine.type_line("exec 3<&-")?;
    machine.expect(SHELL, SOON)?;
    machine.require_answer("block-attach web memory:2M,,xvda,w", &done("block-attach", "web"))?;
    machine.ask_until("block-list", |list| disk(list, "xvda").is_ok_and(|disk| disk["state"] == "connected"))?;
    machine.require_answer("block-detach web xvda --force", &done("block-detach", "web"))?;
    console(&mut machine, "web")?;

    machine.type_line("echo c > /proc/sysrq-trigger")?;
    machine.expect("guest web (domain 8) crashed", SOON)?;
    machine.expect(SHELL, BOOT)?;
    shell(&mut machine, "tr -d '\\0' < /dev/xvda | wc -c | grep -x 0")?;
    shell(&mut machine, WRITE)?;
    shell(&mut machine, READ)?;
    let list = machine.ask("block-list")?;
    ensure!(number(disk(&list, "xvda")?, "domid")? == 9, "{list}");
    let again = footprint(&mut machine)?;
    ensure!(again <= occupied + 512, "dom0 had {occupied} KiB, and has {again} KiB with the same disks");
    machine.require_answer("destroy web", &done("destroy", "web"))?;
    machine.finish()?.require_success()
}

/// KiB of dom0.
fn footprint(machine: &mut Machine) -> Result<u64> {
    number(&machine.ask("info")?, "dom0_kib")
}

/// Files of the host are disks of guests: what is written is in the file, also after the guest has crashed; a second writer is
/// refused by name; what is only read is not written.
pub(crate) fn machine_disks_have_one_writer() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    fs::write(path("data.img"), vec![0; 4 << 20])?;
    fs::write(path("fixed.img"), vec![0x5a; 1 << 20])?;
    let guests = vec![
        with_disks(folder.path(), "web", &["data.img,,xvda,w", "fixed.img,,xvdb,r"])?,
        with_disks(folder.path(), "db", &["fixed.img,,xvda,r"])?,
        with_disks(folder.path(), "late", &["data.img,,xvda,w"])?,
    ];
    let mut machine = start("machine_disks_have_one_writer", guests)?;
    machine.expect("error: guest late: disk xvda: data-", BOOT)?;
    machine.expect(" is in use: web writes it", SOON)?;
    machine.expect(SHELL, BOOT)?;
    shell(&mut machine, WRITE)?;
    shell(&mut machine, READ)?;
    shell(&mut machine, "echo beginning | dd of=/dev/xvda bs=512 conv=sync,fsync")?;
    shell(&mut machine, "! dd if=/root/bytes of=/dev/xvdb bs=64k count=1 conv=fsync")?;
    let target = disk(&machine.ask("block-list web")?, "xvda")?["target"].as_str().context("no target")?.to_owned();
    let serial = target.strip_prefix("serial:").context("no serial number")?;
    let why = |guest: &str| format!("guest {guest}: disk xvdc: {serial} is in use: web writes it");
    machine.require_answer(&format!("block-attach db {target},,xvdc,w"), &refused(&why("db")))?;
    machine.require_answer(&format!("block-attach db {target},,xvdc,r"), &refused(&why("db")))?;
    console(&mut machine, "web")?;
    machine.type_line("echo c > /proc/sysrq-trigger")?;
    machine.expect("guest web (domain ", SOON)?;
    machine.expect(SHELL, BOOT)?;
    shell(&mut machine, "head -c 9 /dev/xvda | grep -x beginning")?;
    machine.require_answer("destroy web", &done("destroy", "web"))?;
    let late = machine.ask("create late")?;
    ensure!(late["done"] == "create", "{late}");
    console(&mut machine, "late")?;
    shell(
        &mut machine,
        "head -c 9 /dev/xvda | grep -x beginning && echo ending | dd of=/dev/xvda bs=512 seek=1 conv=sync,fsync",
    )?;
    for name in ["late", "db"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_end(Failure::NotMade)?;
    let data = fs::read(path("data.img"))?;
    ensure!(data.starts_with(b"beginning\n") && data[512..].starts_with(b"ending\n"), "the file has something else");
    ensure!(fs::read(path("fixed.img"))?.iter().all(|byte| *byte == 0x5a), "what is only read was written");
    Ok(())
}
