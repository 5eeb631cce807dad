//! Many guests with Debian on one disk, for `cargo xtask soak`.

use crate::networks::{free_port, output};
use crate::stories::dom0;
use anyhow::{Context, Result, ensure};
use boot::answers::{LEAVE, named, number};
use boot::{Machine, Setup};
use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};
use xtask::bundle::Bundle;
use xtask::debian::{Image, Recipe};
use xtask::disk::Disk;
use xtask::guest_file;
use xtask::machine::Network;
use xtask::ssh::Client;

/// How long a guest may take from its kernel to where it is reached by ssh.
const LOGIN: Duration = Duration::from_mins(10);
/// How long a command may take.
const COMMAND: Duration = Duration::from_mins(5);
/// How long the guests of a crowd may take beside what each of them takes.
const CROWD: Duration = Duration::from_mins(20);
/// Guests with one disk. The overlays have room for all that is free in its file system.
const MANY: &str = "name = 'debian'
count = COUNT
kernel = '6.1'
extra = 'console=hvc0 root=/dev/xvda'
memory = 160
disk = ['debian.img,,xvda,overlay=640M']
vif = ['']
";

/// So many guests of one file share a disk, each with its own name, address and keys, and each is entered by ssh. One fills
/// its file system: it is told that there is no room, and the others write on. Prints what each takes.
pub(crate) fn share_a_disk(title: &str, count: u32) -> Result<()> {
    let sh = boot::shell()?;
    let folder = tempfile::tempdir()?;
    let image = Image::at(&folder.path().join("debian.img"))?;
    image.make(&sh, &Recipe { size: 1024, ..Recipe::default() })?;
    let file = folder.path().join("many.toml");
    fs::write(&file, MANY.replace("COUNT", &count.to_string()))?;
    let (mut guests, mut disks) = (guest_file::read(&sh, &[&file])?, Vec::new());
    Disk::add(&mut disks, &mut guests)?;
    ensure!(guests.len() == count as usize && disks.len() == 1, "{} guests, {disks:?}", guests.len());
    let mut doors = Vec::new();
    for guest in &guests {
        doors.push((guest.config.name.as_str(), free_port()?));
    }
    let forward = |(name, port): &(&str, u16)| format!("{port}:{name}:22").parse().map_err(anyhow::Error::msg);
    let forwards = doors.iter().map(forward).collect::<Result<Vec<_>>>()?;
    let bundle = guests.iter().fold(dom0("")?.forwards(&forwards), Bundle::described);
    let arguments = disks.iter().enumerate().flat_map(|(number, disk)| disk.arguments(number)).collect();
    let network = Some(Network { forwards });
    let limit = CROWD + LOGIN * count;
    let setup = Setup { memory: 4096, limit, network, arguments, counted: true, ..Setup::new(bundle) };
    let mut machine = Machine::boot(title, &setup)?;
    let client = Client::find(&sh)?;
    let until = Instant::now() + limit;
    let ssh = |port, script: &str| output(&mut client.command(port, script), COMMAND);
    let mut seen = BTreeSet::new();
    for (name, port) in &doors {
        let script = "hostname; hostname -I; cat /etc/machine-id; cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub";
        let said = loop {
            match ssh(*port, script) {
                Ok(said) => break said,
                Err(why) => ensure!(Instant::now() < until, "{name}: {why:#}"),
            }
            thread::sleep(Duration::from_secs(5));
        };
        let lines: Vec<&str> = said.split_whitespace().collect();
        ensure!(lines.len() == 4 && lines.first() == Some(name), "{name} says: {said}");
        println!("{name} is reached: {}", lines.join(" "));
        ensure!(lines.into_iter().all(|line| seen.insert(line.to_owned())), "{name} has what another has: {said}");
    }
    let (first, others) = doors.split_first().context("no guest")?;
    let full = ssh(
        first.1,
        "dd if=/dev/zero of=/full bs=1M conv=fsync 2>&1; df -k --output=avail / | tail -1; echo more > /more 2>&1; dmesg",
    )?;
    ensure!(full.contains("No space left on device") && !full.contains("I/O error"), "{}: {full}", first.0);
    for (name, port) in others {
        let said = ssh(*port, "head -c 1048576 /dev/urandom > /mine && sync /mine && stat -c %s /mine && dmesg")?;
        ensure!(said.starts_with("1048576\n") && !said.contains("I/O error"), "{name}: {said}");
    }
    let (list, disks) = (machine.ask("list")?, machine.ask("block-list")?);
    for (name, _) in &doors {
        let (domain, disk) = (named(&list, name)?, named(&disks, name)?);
        let (memory, held) = (number(domain, "memory_mib")?, number(disk, "overlay_kib")? >> 10);
        // Where the emulator counts, a second of the machine is 10^9 instructions.
        let seconds = &domain["seconds"];
        println!("{name}: {memory} MiB, {held} MiB in its overlay, {seconds} thousand million instructions");
    }
    machine.type_keys(LEAVE)?;
    machine.type_line("quit")?;
    machine.finish()?.require_success()
}
