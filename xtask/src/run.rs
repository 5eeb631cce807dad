//! `cargo xtask run`: one machine, on this terminal.

use crate::selection::Selection;
use crate::terminal::{RawTerminal, stop_on_signals};
use anyhow::{Context, Result, anyhow, bail, ensure};
use container_init::End as ProcessEnd;
use hypercall_abi::sched::ShutdownReason;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{self, Child, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;
use toolstack::bundle::ANSWER;
use toolstack::command::Command;
use toolstack::forward::Forward;
use toolstack::status::Failure;
use toolstack::vif::{NAT, UPLINK, VifConfig};
use xshell::Shell;
use xtask::debian::{Image, Recipe};
use xtask::disk::Disk;
use xtask::guest_file::Described;
use xtask::machine::{Console, End, Hardware, Medium, Network};
use xtask::oci::{Container, Wanted};
use xtask::qemu::Qemu;
use xtask::seed::{self, Seed};
use xtask::{build, cloud, firmware, mebibytes, ssh};

/// The status if the process of a container was not started, or its guest told no end of it.
const NO_PROCESS: u8 = 125;
/// The port of ssh.
const SSH: u16 = 22;
/// MiB of memory for what a guest from a cloud image writes.
const CLOUD_OVERLAY: u32 = 256;

/// What to run and in which machine.
#[derive(clap::Args)]
#[command(after_help = STATUSES)]
pub(crate) struct Options {
    #[command(flatten)]
    guests: Selection,
    /// Start a guest with a distribution, from the disk that `cargo xtask image` makes of it in Cargo's target folder. The disk
    /// is made now if it is not there. With `--kernel`, it starts from that kernel without a ramdisk
    #[arg(long, value_name = "SYSTEM", conflicts_with_all = ["first", "name", "ramdisk", "extra"])]
    #[arg(conflicts_with_all = ["extra_only", "vcpus", "memory", "iso"], group = "system")]
    guest: Option<System>,
    /// Start a guest with the files of a container image, and in it the image's process, or with `-- COMMAND` the image's
    /// entrypoint with this command: a folder with an OCI image layout, or an archive of one. What the process writes is kept
    /// in the guest's memory, and is lost with the guest. The exit status is that of the process
    #[arg(long, value_name = "PATH[:NAME]", conflicts_with_all = ["guests", "first", "kernel", "ramdisk", "extra_only"])]
    #[arg(conflicts_with_all = ["iso"], group = "system")]
    oci: Option<PathBuf>,
    /// Start a guest from a cloud image, raw or qcow2, with the newest kernel of the image, which is read here. The image stays
    /// as it is, unless --write is given
    #[arg(long, value_name = "IMAGE", group = "system", conflicts_with_all = ["guests", "first", "kernel", "ramdisk"])]
    #[arg(conflicts_with_all = ["extra_only", "iso"])]
    cloud: Option<PathBuf>,
    /// Let the guest of `--cloud` write the image
    #[arg(long, requires = "cloud", conflicts_with = "overlay")]
    write: bool,
    /// Leave the disk of `--guest` or `--cloud` as it is: what the guest writes is kept in memory of this size, in MiB or with
    /// a suffix, and is lost with the guest [default with --cloud: 256M]. With `--oci`, this is a part of the guest's memory,
    /// and the default is half of it
    #[arg(long, value_name = "SIZE", requires = "system", value_parser = |text: &str| mebibytes(text, 1))]
    overlay: Option<u32>,
    #[command(flatten)]
    seed: seed::Wishes,
    /// Start KERNEL as the first domain instead of dom0: a file, a test guest's name, or a stock kernel such as 6.1
    #[arg(long, value_name = "KERNEL", conflicts_with_all = ["guests", "name", "kernel"])]
    first: Option<String>,
    /// Carry out dom0's commands, separated by `;`, print only their answers, and turn the machine off, unless the last
    /// command is `console NAME`
    #[arg(long, value_name = "COMMANDS", conflicts_with = "first")]
    exec: Option<String>,
    /// Memory of the machine in MiB, or with a suffix: 2G
    #[arg(long, value_name = "SIZE", default_value = "1024", value_parser = |text: &str| mebibytes(text, 64))]
    machine_memory: u32,
    /// Model of the machine's CPU, as QEMU calls it: qemu64, Nehalem, EPYC-Milan [default: all that the emulator can do]
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// Give the machine a disk: a raw or qcow2 file, known by its header or by `,format=raw` or `,format=qcow2`; with `,ro`
    /// nobody writes it. Can be repeated. The disks have the serial numbers tenon0, tenon1 and so on, and a guest
    /// has one of them as `serial:tenon0`
    #[arg(long, value_name = "FILE[,ro]")]
    disk: Vec<String>,
    /// What the machine's network device is connected to: `user`, QEMU's network behind this host, or `none`. The default is
    /// `user` if a guest has a vif. With `user`, a guest that no file describes has a vif
    #[arg(long, value_name = "NETWORK")]
    net: Option<Net>,
    /// Lead connections to a port of this host to a guest's port: 2222:web:22, or udp:5353:dns:53. Can be repeated
    #[arg(long, value_name = "PORT:GUEST:PORT", conflicts_with_all = ["first", "iso"])]
    forward: Vec<Forward>,
    /// One more argument for QEMU; can be repeated: --qemu-arg=-d --qemu-arg=int
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
    /// The QEMU to use (also TENON_QEMU)
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Boot this image, made by `cargo xtask image iso`, the way a real machine does, and nothing else
    #[arg(long, value_name = "FILE")]
    #[arg(conflicts_with_all = ["guests", "first", "exec", "name", "kernel", "ramdisk", "extra", "extra_only"])]
    #[arg(conflicts_with_all = ["vcpus", "memory", "profile", "hypervisor"])]
    iso: Option<PathBuf>,
    /// The firmware that boots the image
    #[arg(long, requires = "iso", default_value = "bios")]
    firmware: Firmware,
    /// End the machine, as a failure, after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Cargo profile of the images: `release` or `checked`
    #[arg(long, default_value = "release")]
    profile: String,
    /// The hypervisor's own options, after `--`; with `--oci`, the container's command
    #[arg(last = true)]
    hypervisor: Vec<String>,
}

/// A distribution that a guest can have.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum System {
    /// Debian
    Debian,
}

/// What the machine's network device is connected to.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Net {
    /// QEMU's user network
    User,
    /// Nothing: the machine has no network device
    None,
}

/// What starts a machine that boots from an image.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Firmware {
    /// PC BIOS
    Bios,
    /// UEFI
    Uefi,
}

/// What the exit status says, for `--help`.
const STATUSES: &str = "\
Exit status:
  0    every guest powered off, and every command was carried out
  1    refused before anything started
  2    a wrong command line
  10   a guest crashed
  11   a guest missed its watchdog
  12   a guest rebooted, and its on_reboot is not `restart`
  13   a guest suspended itself, or ended in another way that is no power-off
  14   a guest could not be made
  15   a command of --exec was refused
  20   dom0 failed
  21   the hypervisor panicked, or had nothing to start
  22   the machine was reset, or QEMU failed
  124  --timeout was over
  125  --oci: the process was not started, or the guest has not told how it ended
  130  interrupted
If several things go wrong, the first one counts. A guest that is made anew after its end (`restart`) has not ended.
With --oci, a guest that powered off gives the status of its process instead of 0, and standard error says so: `the process
exited with 7`; or 128 and the number of the signal that ended the process. What begins with `error:` is of this list.";

/// Builds what is to run, runs it, and gives the status this program ends with.
pub(crate) fn run(sh: &Shell, mut options: Options) -> Result<ExitCode> {
    // A seed that is wrong is refused before a disk is made.
    let seed = Seed::read(&options.seed)?;
    for what in seed.iter().flat_map(|seed| &seed.unknown) {
        eprintln!("warning: {what}: a guest without cloud-init leaves it out");
    }
    // A changed description is removed when the machine has ended.
    let _changed = options.add_system(sh)?;
    let container = options.add_container(sh)?;
    let _cloud = options.add_cloud()?;
    let options = &options;
    let mut disks = Disk::read_all(&options.disk).context("--disk")?;
    let hardware = |stays: bool, disks: &[Disk], network: Option<Network>| Hardware {
        memory: options.machine_memory,
        cpu: options.cpu.clone(),
        arguments: options.qemu_arg.clone(),
        disks: disks.to_vec(),
        network,
        console: match stays && io::stdin().is_terminal() && io::stdout().is_terminal() {
            true => Console::Terminal,
            false => Console::Plain,
        },
    };
    if let Some(iso) = &options.iso {
        ensure!(iso.is_file(), "no image {}", iso.display());
        let qemu = Qemu::find(sh, options.qemu.as_deref())?;
        let uefi = match options.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(firmware::uefi(sh)?),
        };
        let network = (options.net == Some(Net::User)).then(|| options.network());
        let hardware = hardware(true, &disks, network);
        let command = hardware.boot_image(&qemu, iso, Medium::Cd, uefi.as_deref());
        return Ok(status(options, &boot(options, command, hardware.console, true)?));
    }
    // What the user named is looked at before anything is built or fetched for it.
    let mut described = match &options.first {
        Some(_) => Vec::new(),
        None => options.guests.check(sh, options.machine_memory)?,
    };
    // The volume is removed when the machine has ended.
    let _volume = match (&seed, described.last_mut()) {
        (Some(seed), Some(guest)) => Some(seed.attach(guest)?),
        _ => None,
    };
    Disk::add(&mut disks, &mut described)?;
    let network = options.check_network(&described)?;
    for Forward { outer, guest, .. } in
        options.forward.iter().filter(|forward| forward.inner == SSH && container.is_none())
    {
        let key = ssh::key()?;
        eprintln!("to enter {guest}: ssh -i {} {} -p {outer} root@127.0.0.1", key.display(), ssh::ANY_HOST_KEY);
    }
    let words = match &options.first {
        Some(_) => options.guests.first_options(&options.hypervisor)?,
        None => options.hypervisor.clone(),
    };
    let stays = options.exec.as_deref().map(check_commands).transpose()?.unwrap_or(true);
    let qemu = Qemu::find(sh, options.qemu.as_deref())?;
    let images = build::images(sh, &options.profile)?;
    let hypervisor = build::image(&images, "hypervisor")?;
    let mut bundle = match &options.first {
        Some(first) => options.guests.first(sh, first, &images, options.machine_memory)?,
        None => options
            .guests
            .bundle(sh, &described, &build::image(&images, "dom0")?, options.vif(), |stock| stock.vmlinux)?,
    };
    bundle = bundle.forwards(&options.forward);
    if let Some(commands) = &options.exec {
        bundle = bundle.exec(commands);
    }
    let archive = bundle.write()?;
    let hardware = hardware(stays, &disks, network);
    let command = hardware.boot(&qemu, &hypervisor, archive.path(), &words.join(" "));
    let end = boot(options, command, hardware.console, stays)?;
    match container {
        Some(container) if verdict(options, &end).0 == 0 => Ok(status_of_process(&container)),
        _ => Ok(status(options, &end)),
    }
}

impl Options {
    /// Adds the guest of `--guest`, and makes its disk if need be. Returns the file that describes the guest with an
    /// overlay or another kernel.
    fn add_system(&mut self, sh: &Shell) -> Result<Option<NamedTempFile>> {
        let Some(System::Debian) = self.guest else { return Ok(None) };
        let image = Image::usual(sh)?;
        if !image.disk.exists() {
            image.make(sh, &Recipe::default())?;
        }
        let kernel = self.guests.named_kernel(sh)?;
        let changes = self.overlay.is_some() || kernel.is_some();
        let changed = changes.then(|| image.changed(sh, self.overlay, kernel.as_deref())).transpose()?;
        self.guests.add(changed.as_ref().map_or(image.guest, |file| file.path().to_owned()));
        Ok(changed)
    }

    /// Adds the guest of `--oci`, and makes its disk if need be. The words after `--` are its command.
    fn add_container(&mut self, sh: &Shell) -> Result<Option<Container>> {
        let Some(image) = &self.oci else { return Ok(None) };
        let wanted =
            Wanted { vif: self.vif(), written: self.overlay, ..self.guests.container(image, &self.hypervisor) };
        let container = Container::make(sh, &wanted)?;
        self.guests.add(container.guest());
        self.hypervisor.clear();
        Ok(Some(container))
    }

    /// Adds the guest of `--cloud`, and returns it: its kernel and ramdisk disappear with it.
    fn add_cloud(&mut self) -> Result<Option<cloud::Guest>> {
        let Some(image) = &self.cloud else { return Ok(None) };
        let (name, memory, vcpus, extra) = self.guests.cloud();
        let overlay = (!self.write).then(|| self.overlay.unwrap_or(CLOUD_OVERLAY));
        let guest = cloud::guest(&cloud::Wish { image, name, memory, vcpus, extra, overlay })?;
        self.guests.give(guest.described.clone());
        Ok(Some(guest))
    }

    fn network(&self) -> Network {
        Network { forwards: self.forward.clone() }
    }

    /// The network device of a guest that no file describes.
    fn vif(&self) -> Option<VifConfig> {
        let wanted = self.net == Some(Net::User) || !self.forward.is_empty();
        (wanted && self.first.is_none()).then(VifConfig::default)
    }

    /// The machine's network device, if a guest or the user wants one.
    fn check_network(&self, described: &[Described]) -> Result<Option<Network>> {
        let names = self.guests.names(described);
        for forward in &self.forward {
            let (guest, port) = (&forward.guest, forward.outer);
            ensure!(names.contains(&guest.as_str()), "--forward {forward}: there is no guest {guest}");
            let on_nat = |guest: &Described| guest.config.vif.iter().any(|vif| vif.bridge == NAT);
            let described = described.iter().find(|it| it.config.name == *guest);
            ensure!(described.is_none_or(on_nat), "--forward {forward}: {guest} has no vif on the network {NAT}");
            let same = |other: &&Forward| other.outer == port && other.transport == forward.transport;
            ensure!(
                self.forward.iter().filter(same).count() == 1,
                "--forward {forward}: port {port} is forwarded twice"
            );
        }
        let uses = |name| described.iter().flat_map(|guest| &guest.config.vif).any(|vif| vif.bridge == name);
        ensure!(
            !(uses(NAT) && uses(UPLINK) && self.qemu_arg.is_empty()),
            "guests have vifs on {NAT} and on {UPLINK}, which cannot share the machine's network device; give it another one \
             with --qemu-arg"
        );
        let wanted = !self.forward.is_empty() || described.iter().any(|guest| !guest.config.vif.is_empty());
        match self.net {
            Some(Net::None) => {
                ensure!(self.forward.is_empty(), "--forward needs the network device that --net none leaves out");
                Ok(None)
            }
            None if !wanted => Ok(None),
            Some(Net::User) | None => Ok(Some(self.network())),
        }
    }
}

/// The status this program ends with; says on standard error what went wrong.
fn status(options: &Options, end: &Ended) -> ExitCode {
    let (status, why) = verdict(options, end);
    if status != 0 {
        eprintln!("error: {why}");
    }
    ExitCode::from(status)
}

/// The status of a container's process, if its guest has powered off; says on standard error what it is unless it is 0.
fn status_of_process(container: &Container) -> ExitCode {
    ExitCode::from(match container.end() {
        Ok(ProcessEnd::Exited(0)) => 0,
        Ok(ProcessEnd::Exited(status)) => {
            eprintln!("the process exited with {status}");
            status
        }
        Ok(ProcessEnd::Killed(number)) => {
            eprintln!("the process was ended by signal {number}");
            128 | number
        }
        Ok(ProcessEnd::Failed(why)) => {
            eprintln!("error: the process was not started: {}", why.escape_debug());
            NO_PROCESS
        }
        Err(why) => {
            eprintln!("error: {why:#}");
            NO_PROCESS
        }
    })
}

/// The exit status for an end, and what to say about it.
fn verdict(options: &Options, end: &Ended) -> (u8, String) {
    let end = match end {
        Ended::Machine(end) => *end,
        Ended::Late => return (124, format!("no end after {} s", options.timeout.unwrap_or_default())),
        Ended::Interrupted => return (130, "interrupted".into()),
    };
    let status = match end {
        End::Success => 0,
        End::First(reason) if options.first.is_some() => {
            Failure::of_end(ShutdownReason::from_number(reason.into())).map_or(0, Failure::exit_status)
        }
        End::First(reason) => match Failure::of_reason(reason) {
            Some(failure) => return (failure.exit_status(), format!("{}: see above", failure.explanation())),
            None => 20,
        },
        End::Panic => 21,
        End::Reset | End::Emulator | End::Other(_) => 22,
    };
    (status, end.explanation())
}

/// Whether the machine stays on after these commands, which must be sound.
fn check_commands(commands: &str) -> Result<bool> {
    let lines = commands.split(';').map(Command::parse).collect::<Result<Vec<_>, _>>();
    let lines = lines.map_err(|why| anyhow!("--exec: {why}"))?;
    let lines: Vec<_> = lines.into_iter().flatten().map(|line| line.command).collect();
    let Some((last, others)) = lines.split_last() else { bail!("--exec: no command") };
    let console = |command: &Command| matches!(command, Command::Console(_));
    ensure!(!others.iter().any(console), "--exec: `console` can only be the last command");
    Ok(console(last))
}

/// How a run came to its end.
enum Ended {
    /// By itself.
    Machine(End),
    /// The time limit was over.
    Late,
    /// By a signal.
    Interrupted,
}

/// Runs the machine to its end, or to the time limit. Unless it stays on after its commands, nobody types, and
/// only the answers are printed on standard output; everything else goes to standard error.
fn boot(options: &Options, mut command: process::Command, console: Console, stays: bool) -> Result<Ended> {
    if !stays {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
    }
    let stopped = stop_on_signals()?;
    let _raw = (console == Console::Terminal).then(RawTerminal::enter).transpose()?;
    let mut machine = Running(command.spawn().context("cannot start QEMU")?);
    let answers = machine.0.stdout.take().map(|output| thread::spawn(move || sort(output, io::stdout(), io::stderr())));
    let end = watch(options, &mut machine, &stopped);
    // QEMU has ended, or ends here, and with it its output.
    drop(machine);
    match answers.map(thread::JoinHandle::join) {
        None => {}
        Some(Ok(sorted)) => sorted.context("cannot print the answers")?,
        Some(Err(_)) => bail!("cannot read the answers"),
    }
    end
}

/// Sends the lines of the machine's console that are answers one way, all others the other way.
fn sort(console: impl io::Read, mut answers: impl Write, mut others: impl Write) -> io::Result<()> {
    for line in BufReader::new(console).split(b'\n') {
        let line = line?;
        let line = line.strip_suffix(b"\r").unwrap_or(&line);
        let mut mark = [0; 4];
        let (line, to): (_, &mut dyn Write) = match line.strip_prefix(ANSWER.encode_utf8(&mut mark).as_bytes()) {
            Some(answer) => (answer, &mut answers),
            None => (line, &mut others),
        };
        to.write_all(line)?;
        to.write_all(b"\n")?;
    }
    answers.flush()
}

fn watch(options: &Options, machine: &mut Running, stopped: &AtomicBool) -> Result<Ended> {
    let deadline = options.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    loop {
        if let Some(status) = machine.0.try_wait()? {
            return Ok(Ended::Machine(End::of(status)));
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(Ended::Late);
        }
        if stopped.load(Ordering::Relaxed) {
            return Ok(Ended::Interrupted);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A machine that does not outlive us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_explained() {
        let told = |status: u8| STATUSES.lines().any(|line| line.trim_start().starts_with(&format!("{status} ")));
        assert!(Failure::ALL.iter().all(|failure| told(failure.exit_status())));
        assert!([0, 1, 2, 20, 21, 22, 124, NO_PROCESS, 130].into_iter().all(told));
    }

    #[test]
    fn commands_are_checked_before_anything_starts() {
        assert!(!check_commands("list -j; shutdown -w linux").unwrap());
        assert!(check_commands("list; console linux;").unwrap());
        for (bad, why) in [("lst", "unknown command"), (" ; ", "no command"), ("console a; list", "last")] {
            let error = check_commands(bad).unwrap_err().to_string();
            assert!(error.starts_with("--exec: ") && error.contains(why), "{error}");
        }
    }

    #[test]
    fn answers_are_told_from_the_rest() {
        let (mut answers, mut others) = (Vec::new(), Vec::new());
        let console = b"[info] x\r\n\x1e[{}]\r\nguest \x1e ended\r\n\x1elast";
        sort(&console[..], &mut answers, &mut others).unwrap();
        assert_eq!((&answers[..], &others[..]), (&b"[{}]\nlast\n"[..], &b"[info] x\nguest \x1e ended\n"[..]));
    }
}
