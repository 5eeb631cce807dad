//! A guest with Debian: set up by a seed, entered on its console and by ssh, given a package, started anew, and turned off.

use crate::networks::{free_port, output};
use crate::seeds::{self, NAME};
use crate::stories::dom0;
use anyhow::{Context, Result, ensure};
use boot::http::{self, HOST};
use boot::{Machine, Setup};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::{NamedTempFile, TempDir};
use xtask::debian::{Image, Recipe, Suite};
use xtask::disk::Disk;
use xtask::machine::Network;
use xtask::ssh::Client;
use xtask::{apt, ext4, guest_file};

/// How long a machine may take.
const LIMIT: Duration = Duration::from_mins(30);
/// How long a guest may take from its kernel to the login prompt, or from there to its end.
pub(crate) const LOGIN: Duration = Duration::from_mins(10);
/// How long a command may take.
const COMMAND: Duration = Duration::from_mins(5);
const PROMPT: &str = "root@web:~# ";
/// The package that is installed. Its program has the same name, and prints this.
const PACKAGE: &str = apt::TEST_PACKAGE;
const GREETING: &str = "Hello, world!\n";
/// Writes 100 MiB whose pieces differ, and prints their sum.
const WRITE: &str = "head -c 1048576 /dev/urandom > part && for n in $(seq 100); do echo $n; cat part; done > data && \
                     sync && md5sum data";

/// A machine with a guest that has Debian and a seed (see [`seeds`]).
pub(crate) struct Started {
    pub(crate) machine: Machine,
    /// Enters the guest as root at this port.
    pub(crate) client: Client,
    pub(crate) port: u16,
    image: Image,
    _volume: NamedTempFile,
    _folder: TempDir,
}

impl Started {
    /// Boots a guest from a new disk of this recipe.
    pub(crate) fn new(title: &str, recipe: &Recipe) -> Result<Self> {
        let sh = boot::shell()?;
        let folder = tempfile::tempdir()?;
        let image = Image::at(&folder.path().join("debian.img"))?;
        image.make(&sh, recipe)?;
        let (client, mut disks) = (Client::find(&sh)?, Vec::new());
        let mut guests = guest_file::read(&sh, &[&image.guest])?;
        let volume = seeds::give(guests.first_mut().context("a file is a guest")?, folder.path(), &client)?;
        Disk::add(&mut disks, &mut guests)?;
        let port = free_port()?;
        let forwards = vec![format!("{port}:debian:22").parse().map_err(anyhow::Error::msg)?];
        let bundle = dom0("")?.forwards(&forwards).described(guests.first().context("a file is a guest")?);
        let arguments = disks.iter().enumerate().flat_map(|(number, disk)| disk.arguments(number)).collect();
        let network = Some(Network { forwards });
        let machine =
            Machine::boot(title, &Setup { memory: 1024, limit: LIMIT, network, arguments, ..Setup::new(bundle) })?;
        Ok(Self { machine, client, port, image, _volume: volume, _folder: folder })
    }
}

/// A guest with this release of Debian is set up by its seed, once, by a small program of its own. It is entered on its console
/// and by ssh, and no unit of it fails. It installs a package from an archive on the host. The package and what the guest
/// writes are there when it has rebooted. After it has turned itself off, its file system needs no repair.
pub(crate) fn keeps_what_was_written(title: &str, suite: Suite) -> Result<()> {
    let sh = boot::shell()?;
    let begin = Instant::now();
    let started = Started::new(title, &Recipe { suite, ..Recipe::default() })?;
    // What is not named here stays until the guest has ended.
    let Started { mut machine, client, port, image, .. } = started;
    let login = format!("{NAME} login: ");
    machine.expect(&login, LOGIN)?;
    machine.type_line("root")?;
    machine.expect(PROMPT, COMMAND)?;
    let ssh = |script: &str| output(&mut client.command(port, script), COMMAND);
    let first = running(&ssh)?;
    seeds::check(&client, port)?;
    ensure!(ssh("hostname -f")? == format!("{NAME}.example.org\n"), "the guest does not know its domain");
    let unknown = "tenon-seed: user-data:11: timezone: not known here";
    ensure!(machine.console().contains(unknown), "no {unknown:?} in {}", machine.console());
    let release = ssh(". /etc/os-release; echo $VERSION_CODENAME")?;
    ensure!(release.trim_end() == suite.name(), "{suite:?} is {release}");
    let sources = ssh("cat /etc/apt/sources.list")?;
    ensure!(
        sources.lines().filter(|line| !line.is_empty()).eq(apt::sources(&sh, suite.name())?),
        "not the sources of this machine: {sources}"
    );
    let mirror = http::serve(http::files(&apt::mirror(&sh, suite.name(), &[PACKAGE])?)?)?;
    ssh(&format!("dpkg -s {PACKAGE} 2>/dev/null && exit 1; {}", install(mirror)))?;
    let sum = ssh(WRITE)?;
    // The guest makes its host keys itself, and its own number.
    let made =
        ssh("test $(stat -c %Y /etc/ssh/ssh_host_ed25519_key) -ge $(stat -c %Y /etc/hostname) && cat /etc/machine-id")?;
    ensure!(made.trim_end().len() == 32, "no machine id: {made}");
    machine.type_line("reboot")?;
    machine.expect(&login, 2 * LOGIN)?;
    let second = running(&ssh)?;
    ensure!(first != second, "the guest has not rebooted: {first}");
    seeds::check(&client, port)?;
    let greeting = ssh(PACKAGE)?;
    ensure!(greeting == GREETING, "{PACKAGE} prints {greeting:?}");
    let left = ssh("md5sum data")?;
    ensure!(left == sum, "the guest reads {left}, and wrote {sum}");
    machine.type_line("root")?;
    machine.expect(PROMPT, COMMAND)?;
    machine.type_line("poweroff")?;
    machine.finish()?.require_success()?;
    println!("Debian {} boots twice and is changed in {:.0} s", suite.name(), begin.elapsed().as_secs_f64());
    ext4::Tools::find(&sh)?.check(&image.disk)
}

/// Installs the package from the archive at this port of the host, and from no other.
fn install(port: u16) -> String {
    let apt = "apt-get -q -o Dir::Etc::SourceList=/root/mirror.list -o Dir::Etc::SourceParts=/dev/null";
    format!(
        "echo 'deb [trusted=yes] http://{HOST}:{port} ./' > mirror.list && {apt} update && {apt} install -y {PACKAGE}"
    )
}

/// Waits until the guest that `ssh` enters has started all its units, none of which may fail. Returns the number of this boot.
pub(crate) fn running(ssh: &impl Fn(&str) -> Result<String>) -> Result<String> {
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
