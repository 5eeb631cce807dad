//! A guest with Debian: entered on its console and by ssh, started anew, and turned off.

use crate::networks::{free_port, output};
use crate::stories::dom0;
use anyhow::{Context, Result, ensure};
use boot::{Machine, Setup};
use std::thread;
use std::time::{Duration, Instant};
use xtask::debian::{Image, Recipe, Suite};
use xtask::disk::Disk;
use xtask::machine::Network;
use xtask::ssh::Client;
use xtask::{ext4, guest_file};

/// How long a machine may take.
const LIMIT: Duration = Duration::from_mins(30);
/// How long a guest may take from its kernel to the login prompt, or from there to its end.
const LOGIN: Duration = Duration::from_mins(10);
/// How long a command may take.
const COMMAND: Duration = Duration::from_mins(5);
const PROMPT: &str = "root@debian:~# ";

/// A guest with this release of Debian is entered on its console and by ssh, and no unit of it fails. What it writes is there
/// when it has rebooted. After it has turned itself off, its file system needs no repair.
pub(crate) fn keeps_what_was_written(title: &str, suite: Suite) -> Result<()> {
    let sh = boot::shell()?;
    let folder = tempfile::tempdir()?;
    let image = Image::at(&folder.path().join("debian.img"))?;
    image.make(&sh, &Recipe { suite, ..Recipe::default() })?;
    let (mut guests, mut disks) = (guest_file::read(&sh, &[&image.guest])?, Vec::new());
    Disk::add(&mut disks, &mut guests)?;
    let port = free_port()?;
    let forwards = vec![format!("{port}:debian:22").parse().map_err(anyhow::Error::msg)?];
    let bundle = dom0("")?.forwards(&forwards).described(guests.first().context("a file is a guest")?);
    let arguments = disks.iter().enumerate().flat_map(|(number, disk)| disk.arguments(number)).collect();
    let network = Some(Network { forwards });
    let mut machine =
        Machine::boot(title, &Setup { memory: 1024, limit: LIMIT, network, arguments, ..Setup::new(bundle) })?;
    machine.expect("debian login: ", LOGIN)?;
    machine.type_line("root")?;
    machine.expect(PROMPT, COMMAND)?;
    let client = Client::find(&sh)?;
    let ssh = |script: &str| output(&mut client.command(port, script), COMMAND);
    let first = running(&ssh)?;
    let release = ssh(". /etc/os-release; echo $VERSION_CODENAME")?;
    ensure!(release.trim_end() == suite.name(), "{suite:?} is {release}");
    let sum = ssh("head -c 104857600 /dev/urandom > data && sync && sha256sum data")?;
    // The guest makes its host keys itself, and its own number.
    let made =
        ssh("test $(stat -c %Y /etc/ssh/ssh_host_ed25519_key) -ge $(stat -c %Y /etc/hostname) && cat /etc/machine-id")?;
    ensure!(made.trim_end().len() == 32, "no machine id: {made}");
    machine.type_line("reboot")?;
    machine.expect("debian login: ", 2 * LOGIN)?;
    let second = running(&ssh)?;
    ensure!(first != second, "the guest has not rebooted: {first}");
    let left = ssh("sha256sum data")?;
    ensure!(left == sum, "the guest reads {left}, and wrote {sum}");
    machine.type_line("root")?;
    machine.expect(PROMPT, COMMAND)?;
    machine.type_line("poweroff")?;
    machine.finish()?.require_success()?;
    ext4::Tools::find(&sh)?.check(&image.disk)
}

/// Waits until the guest that `ssh` enters has started all its units, none of which may fail. Returns the number of this boot.
fn running(ssh: &impl Fn(&str) -> Result<String>) -> Result<String> {
    let until = Instant::now() + LOGIN;
    loop {
        match ssh(
            "systemctl is-system-running --wait || systemctl --failed --no-legend; cat /proc/sys/kernel/random/boot_id",
        ) {
            Ok(said) => {
                let id = said.strip_prefix("running\n").with_context(|| format!("units have failed: {said}"))?;
                return Ok(id.trim_end().to_owned());
            }
            Err(why) => ensure!(Instant::now() < until, "{why:#}"),
        }
        thread::sleep(Duration::from_secs(1));
    }
}
