//! Stories of guests' disks: attached from a guest's file and by verbs, in memory and on disks of the machine.

use crate::stories::{BOOT, SHELL, SOON, dom0, image};
use anyhow::{Context, Result, ensure};
use boot::answers::{done, named, number, refused};
use boot::nbd::Server;
use boot::{FIRST_GUEST, Machine, Setup, answers::LEAVE, gpt};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;
use xtask::bundle::Bundle;
use xtask::disk::Disk;
use xtask::guest_file::{self, Described};
use xtask::machine::Failure;

/// Writes a MiB of random bytes to the disk past the guest's cache, and keeps their sum, in files of the guest that `READ`
/// compares with.
const WRITE: &str = "dd if=/dev/urandom of=bytes bs=64k count=16 && md5sum < bytes > sum && \
                     dd if=bytes of=/dev/xvda bs=64k oflag=direct conv=fsync";
/// Fails unless these bytes are read from the disk.
const READ: &str = "dd if=/dev/xvda bs=64k count=16 iflag=direct | md5sum | cmp - sum";

/// A stock guest that is made again when it crashes, with these disks.
fn with_disks(folder: &Path, name: &str, disks: &[&str]) -> Result<Described> {
    let file = folder.join(format!("{name}.toml"));
    let text = format!("name = '{name}'\nkernel = '6.1'\nextra = 'console=hvc0'\nmemory = 128\non_crash = 'restart'\n");
    fs::write(&file, format!("{text}disk = {disks:?}\n"))?;
    guest_file::read(&boot::shell()?, &[file])?.pop().context("a file is a guest")
}

/// Boots a machine of a GiB with these guests, and the files that they name as its disks.
fn start(title: &str, guests: Vec<Described>) -> Result<Machine> {
    start_with(title, "", Duration::from_secs(240), guests)
}

/// As above, with these words on dom0's command line, for at most so long.
fn start_with(title: &str, cmdline: &str, limit: Duration, mut guests: Vec<Described>) -> Result<Machine> {
    let mut disks = Vec::new();
    Disk::add(&mut disks, &mut guests)?;
    let mut setup = Setup::new(guests.iter().fold(dom0(cmdline)?, Bundle::described));
    setup.memory = 1024;
    setup.limit = limit;
    setup.arguments = disks.iter().enumerate().flat_map(|(number, disk)| disk.arguments(number)).collect();
    Machine::boot(title, &setup)
}

/// Types commands at the shell of the guest that is shown; all must succeed. The words that tell success are put together by
/// the guest, because what is typed is echoed.
pub(crate) fn shell(machine: &mut Machine, commands: &str) -> Result<()> {
    machine.type_line(&format!("( {commands} ) && echo all\"f\"ine || echo not\"f\"ine"))?;
    let output = machine.expect("fine\r\n", SOON).with_context(|| format!("no end of {commands:?}"))?;
    ensure!(output.ends_with("allfine\r\n"), "{commands:?} failed:\n{output}");
    machine.expect(SHELL, SOON).map(drop)
}

/// Leads from dom0's prompt to the shell of a guest.
pub(crate) fn console(machine: &mut Machine, name: &str) -> Result<()> {
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

/// A stock guest writes a disk in memory and reads it back, reads a file of the boot bundle, and writes over another copy of
/// it. The disk goes and another comes while the guest runs; one that is open goes as well, and one goes by force. After a
/// crash the guest has the disks of its file again, empty, and when all is over dom0 has the memory that it had before.
pub(crate) fn memory_disks_come_and_go() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("base.img"), vec![b'Z'; 1 << 20])?;
    let disks =
        ["memory:16M,,xvda,w", "memory:1M,,xvdb,r", "bundle:base.img,,xvdd,w,overlay=1M", "bundle:base.img,,xvde"];
    let guests = vec![with_disks(folder.path(), "web", &disks)?];
    let mut machine = start("memory_disks_come_and_go", guests)?;
    machine.expect(SHELL, BOOT)?;
    shell(&mut machine, WRITE)?;
    shell(&mut machine, READ)?;
    shell(
        &mut machine,
        "! dd if=bytes of=/dev/xvdb bs=64k count=1 conv=fsync && tr -d '\\0' < /dev/xvdb | wc -c | grep -x 0",
    )?;
    shell(
        &mut machine,
        "tr -d Z < /dev/xvde | wc -c | grep -x 0 && ! dd if=bytes of=/dev/xvde bs=64k count=1 conv=fsync",
    )?;
    shell(
        &mut machine,
        "dd if=bytes of=/dev/xvdd bs=512 count=9 seek=3 conv=fsync && echo 3 > /proc/sys/vm/drop_caches",
    )?;
    shell(&mut machine, "dd if=/dev/xvdd bs=512 skip=3 count=9 | cmp -n 4608 - bytes")?;
    shell(
        &mut machine,
        "dd if=/dev/xvdd bs=512 skip=12 | tr -d Z | wc -c | grep -x 0 && tr -d Z < /dev/xvde | wc -c | grep -x 0",
    )?;
    let list = machine.ask("block-list")?;
    let written = disk(&list, "xvda")?;
    ensure!(written["state"] == "connected" && number(written, "sectors_written")? == 2048, "{list}");
    ensure!(number(written, "sectors_read")? >= 2048 && number(disk(&list, "xvdb")?, "writes")? == 0, "{list}");
    let occupied = footprint(&mut machine)?;
    let why = "guest web: disk xvdc: there are not 4294967296 bytes of memory left";
    machine.require_answer("block-attach web memory:4G,,xvdc,w", &refused(why))?;
    let after = footprint(&mut machine)?;
    ensure!(after <= occupied + 512, "dom0 had {occupied} KiB, and has {after} KiB after a disk that does not fit");

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

/// Ten guests of 64 MiB share a base of the bundle, and each writes half a MiB to an overlay: beside what the overlays hold,
/// dom0 takes at most a MiB for each, with all that dom0 does not take before the first guest.
pub(crate) fn overlays_on_a_base_take_little() -> Result<()> {
    const GUESTS: u64 = 10;
    const BAR: u64 = 1024;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("base.img"), vec![b'Z'; 1 << 20])?;
    let mut files = Vec::new();
    for number in 0..GUESTS {
        let file = folder.path().join(format!("{number}.toml"));
        let text = format!("name = 'blk{number}'\nkernel = '{}'\nmemory = 64\n", image("blk")?.display());
        let text = format!("{text}extra = 'do=good pages=128'\ndisk = ['bundle:base.img,,xvda,w,overlay=1M']\n");
        fs::write(&file, text)?;
        files.push(file);
    }
    let setup = Setup { memory: 1024, limit: Duration::from_secs(120), ..Setup::new(dom0("")?.exec("info -j")) };
    let outcome = Machine::boot("overlays_on_a_base_take_little_without_guests", &setup)?.finish()?;
    // dom0 says that the bundle has no guests, and carries the command out.
    outcome.require_end(Failure::NotMade)?;
    let answers = outcome.answers()?;
    let without = number(answers.first().context("no answer to info")?, "dom0_kib")?;
    let guests = guest_file::read(&boot::shell()?, &files)?;
    let mut machine = start_with("overlays_on_a_base_take_little", "", Duration::from_secs(120), guests)?;
    let each = |list: &Value| -> Result<Vec<u64>> {
        list.as_array().into_iter().flatten().map(|disk| number(disk, "overlay_kib")).collect()
    };
    let full =
        |list: &Value| each(list).is_ok_and(|each| each.len() as u64 == GUESTS && each.iter().all(|kib| *kib >= 512));
    let list = machine.ask_until("block-list", full)?;
    let (overlays, with) = (each(&list)?, footprint(&mut machine)?);
    let held: u64 = overlays.iter().sum();
    let per_guest = (with - without - held).div_ceil(GUESTS);
    println!(
        "dom0: {without} KiB, and {with} KiB with {GUESTS} guests; overlays {overlays:?}: {per_guest} KiB a guest"
    );
    ensure!(per_guest <= BAR, "{per_guest} KiB a guest, and {BAR} are allowed");
    for number in 0..GUESTS {
        let name = format!("blk{number}");
        machine.require_answer(&format!("destroy {name}"), &done("destroy", &name))?;
    }
    machine.finish()?.require_success()
}

/// Hypervisor and dom0 take at most 24 MiB of a machine of a GiB also when a stock guest uses a disk of the machine.
pub(crate) fn a_machine_with_a_disk_is_small() -> Result<()> {
    const BAR: u64 = 24 << 10;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("data.img"), vec![0; 4 << 20])?;
    let guests = vec![with_disks(folder.path(), "web", &["data.img,,xvda,w"])?];
    let mut machine = start("a_machine_with_a_disk_is_small", guests)?;
    machine.expect(SHELL, BOOT)?;
    shell(&mut machine, WRITE)?;
    shell(&mut machine, READ)?;
    let info = machine.ask("info")?;
    let (hypervisor, dom0) = (number(&info, "hypervisor_kib")?, number(&info, "dom0_kib")?);
    let list = machine.ask("block-list")?;
    ensure!(number(disk(&list, "xvda")?, "sectors_written")? == 2048, "{list}");
    println!("hypervisor {hypervisor} KiB and dom0 {dom0} KiB with a disk: {} KiB", hypervisor + dom0);
    ensure!(hypervisor + dom0 <= BAR, "more than {BAR} KiB: {info}");
    machine.require_answer("destroy web", &done("destroy", "web"))?;
    machine.finish()?.require_success()
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
    shell(&mut machine, "! dd if=bytes of=/dev/xvdb bs=64k count=1 conv=fsync")?;
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

/// Our own small guests that are front ends of a disk: name, what they do, disk.
fn front_ends(folder: &Path, guests: &[(&str, &str, &str)]) -> Result<Vec<Described>> {
    let mut files = Vec::new();
    for (name, what, disk) in guests {
        let file = folder.join(format!("{name}.toml"));
        let kernel = image("blk")?;
        let text = format!("name = '{name}'\nkernel = '{}'\nextra = 'do={what}'\nmemory = 16\n", kernel.display());
        fs::write(&file, format!("{text}on_crash = 'restart'\ndisk = ['{disk}']\n"))?;
        files.push(file);
    }
    guest_file::read(&boot::shell()?, &files)
}

/// How long a machine may take for so many lives.
fn time_for(lives: u64) -> Duration {
    Duration::from_secs(180 + lives)
}

/// Waits until so many domains have been made.
fn lives(machine: &mut Machine, count: u64) -> Result<()> {
    let newest = |list: &Value| {
        let numbers = list.as_array().into_iter().flatten().filter_map(|row| row["domid"].as_u64());
        numbers.max().unwrap_or(0)
    };
    let mut last = 0;
    while last < u64::from(FIRST_GUEST) + count {
        // Each look waits half a minute for another life.
        let list = machine.ask_until("list", |list| newest(list) > last)?;
        last = newest(&list);
    }
    Ok(())
}

/// The neighbour goes on after all that was printed before.
fn goes_on(machine: &mut Machine) -> Result<()> {
    for _ in 0..2 {
        machine.expect("good| blk: good ", SOON)?;
    }
    Ok(())
}

/// An error if one of our guests found something wrong.
fn require_sound(machine: &Machine) -> Result<()> {
    let console = machine.console();
    let wrong = console.lines().find(|line| line.contains("panicked"));
    ensure!(wrong.is_none(), "{wrong:?}");
    Ok(())
}

/// Guests connect, write, read, and crash with requests in flight, a hundred times in all; others are destroyed at any moment.
/// A neighbour on the same device sees nothing of it, and nothing is left.
pub(crate) fn a_hundred_lives_leave_nothing_of_their_disks() -> Result<()> {
    lives_leave_nothing("a_hundred_lives_leave_nothing_of_their_disks", 100)
}

/// As above, with so many lives.
pub(crate) fn lives_leave_nothing(title: &str, count: u64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (whole, _) = gpt::disk(&vec![vec![0; 1 << 20]; 5]);
    fs::write(folder.path().join("shared.img"), whole)?;
    let part = |number: usize| format!("shared.img,,xvda,w,part={number}");
    let names = ["one", "two", "three", "four", "five", "six", "seven"];
    let disks: Vec<String> = (0..7).map(|n| if n < 4 { part(n + 1) } else { "memory:1M,,xvda,w".into() }).collect();
    let mut guests: Vec<_> = names.iter().zip(&disks).map(|(name, disk)| (*name, "crash", &**disk)).collect();
    let fifth = part(5);
    guests.push(("good", "good", &*fifth));
    let mut machine = start_with(title, "consoles=all", time_for(count), front_ends(folder.path(), &guests)?)?;
    machine.expect("good| blk: good 16", BOOT)?;
    let mut footprints = Vec::new();
    for rounds in [20, 20 + count] {
        lives(&mut machine, rounds)?;
        for name in names {
            machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
        }
        let list = machine.ask("block-list")?;
        ensure!(list.as_array().is_some_and(|list| list.len() == 1) && list[0]["name"] == "good", "{list}");
        ensure!(number(&list[0], "errors")? == 0, "{list}");
        footprints.push(footprint(&mut machine)?);
        if rounds == 20 {
            for name in names {
                let made = machine.ask(&format!("create {name}"))?;
                ensure!(made["done"] == "create", "{made}");
            }
        }
    }
    goes_on(&mut machine)?;
    require_sound(&machine)?;
    ensure!(footprints[1] <= footprints[0] + 64, "KiB of dom0: {footprints:?}");
    machine.require_answer("destroy good", &done("destroy", "good"))?;
    machine.finish()?.require_success()
}

/// Front ends that do anything at any moment, on the same device and in memory, do not harm a neighbour or dom0.
pub(crate) fn hostile_front_ends_harm_nobody() -> Result<()> {
    harm("hostile_front_ends_harm_nobody", 60)
}

/// As above, for so many lives of hostile guests.
pub(crate) fn harm(title: &str, count: u64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (whole, _) = gpt::disk(&vec![vec![0; 1 << 20]; 3]);
    fs::write(folder.path().join("shared.img"), whole)?;
    let part = |number: usize| format!("shared.img,,xvda,w,part={number}");
    let (first, second, third) = (part(1), part(2), part(3));
    let guests = [
        ("one", "harm", &*first),
        ("two", "harm", &second),
        ("three", "harm", "memory:1M,,xvda,w"),
        ("four", "harm", "memory:1M,,xvda,w"),
        ("good", "good", &third),
    ];
    let mut machine = start_with(title, "consoles=all", time_for(count), front_ends(folder.path(), &guests)?)?;
    machine.expect("good| blk: good 16", BOOT)?;
    for rounds in (15..=count).step_by(15) {
        lives(&mut machine, rounds)?;
        // A guest may have ended by then, or be on its way; what is answered must be an answer.
        for name in ["one", "two", "three", "four"] {
            let force = if rounds % 2 == 0 { "" } else { " --force" };
            for command in ["block-attach NAME memory:1M,,xvdb,w", "block-detach NAME xvda", "block-detach NAME xvdb"] {
                let force = if command.contains("detach") { force } else { "" };
                machine.ask(&format!("{}{force}", command.replace("NAME", name)))?;
            }
        }
    }
    goes_on(&mut machine)?;
    for name in ["one", "two", "three", "four"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    goes_on(&mut machine)?;
    let list = machine.ask("block-list")?;
    ensure!(list.as_array().is_some_and(|list| list.len() == 1) && number(&list[0], "errors")? == 0, "{list}");
    let console = machine.console();
    let wrong = console.lines().find(|line| line.contains("good| ") && line.contains("panicked"));
    ensure!(wrong.is_none(), "{wrong:?}");
    machine.require_answer("destroy good", &done("destroy", "good"))?;
    machine.finish()?.require_success()
}

/// Fifty thousand requests with any contents, changed while they are served, get one response each, and ten rings are broken.
/// Nothing of the guest stays pinned, and a neighbour keeps every byte.
pub(crate) fn every_request_gets_one_response() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let guests = [("good", "good", "memory:1M,,xvda,w"), ("bad", "count", "memory:1M,,xvda,w")];
    let guests = front_ends(folder.path(), &guests)?;
    let mut machine = start_with("every_request_gets_one_response", "consoles=all", Duration::from_secs(240), guests)?;
    machine.expect("bad| blk: counted 50000", BOOT)?;
    machine.expect("guest bad (domain 9) powered off", SOON)?;
    goes_on(&mut machine)?;
    let list = machine.ask("block-list")?;
    ensure!(list.as_array().is_some_and(|list| list.len() == 1) && number(&list[0], "errors")? == 0, "{list}");
    require_sound(&machine)?;
    machine.require_answer("destroy good", &done("destroy", "good"))?;
    machine.finish()?.require_success()
}

/// A guest whose disk does not answer cannot go, for the device may still write the guest's memory. The prompt and the other
/// guests do not wait for that, and the guest goes when the device has answered.
pub(crate) fn a_disk_that_does_not_answer_holds_up_its_guest_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::new(vec![0; 1 << 20])?;
    let guests =
        front_ends(folder.path(), &[("web", "good", "serial:late,,xvda,w"), ("good", "good", "memory:1M,,xvda,w")])?;
    let mut setup = Setup::new(guests.iter().fold(dom0("consoles=all")?, Bundle::described));
    setup.limit = Duration::from_secs(240);
    setup.arguments = server.arguments("late").into_iter().collect();
    let mut machine = Machine::boot("a_disk_that_does_not_answer_holds_up_its_guest_alone", &setup)?;
    machine.expect("web| blk: good 16", BOOT)?;
    server.withhold();
    for _ in 0..100 {
        if server.waiting() > 0 {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(server.waiting() > 0, "nothing waits: {server:?}");
    let waits = refused("guest web has ended, and is destroyed once its devices are removed");
    machine.require_answer("destroy web", &waits)?;
    machine.require_answer("create web", &waits)?;
    goes_on(&mut machine)?;
    ensure!(named(&machine.ask("list")?, "web").is_ok(), "the guest is gone, and its memory may be written");
    server.release();
    machine.ask_until("list", |list| named(list, "web").is_err())?;
    let made = machine.ask("create web")?;
    ensure!(made["done"] == "create", "{made}");
    machine.expect("web| blk: good 16", BOOT)?;
    require_sound(&machine)?;
    for name in ["web", "good"] {
        machine.require_answer(&format!("destroy {name}"), &done("destroy", name))?;
    }
    machine.finish()?.require_success()
}
