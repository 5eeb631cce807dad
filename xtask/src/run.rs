//! `cargo xtask run`: one machine, on this terminal.

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{self, OutputFlags, SetArg, Termios};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use toolstack::bundle::ANSWER;
use toolstack::command::Command;
use xshell::Shell;
use xtask::bundle::{Bundle, DOM0_SPARE, Guest};
use xtask::guest_file::{self, Described};
use xtask::machine::{self, Console, End};
use xtask::qemu::Qemu;
use xtask::{build, kernel_file, kernels};

/// What to run and in which machine.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Guests to start, each described by a TOML file with the keys of xl.cfg, instead of one stock Linux
    #[arg(value_name = "FILE.toml")]
    #[arg(conflicts_with_all = ["first", "kernel", "ramdisk", "extra", "vcpus", "guest_memory"])]
    guests: Vec<PathBuf>,
    /// Start KERNEL as the first domain instead of dom0: a file, a test guest's name, or a stock kernel such as 6.1
    #[arg(long, value_name = "KERNEL")]
    first: Option<String>,
    /// Carry out dom0's commands, separated by `;`, print only their answers, and turn the machine off, unless the last
    /// command is `console NAME`
    #[arg(long, value_name = "COMMANDS", conflicts_with = "first")]
    exec: Option<String>,
    /// Memory of the machine in MiB, or with a suffix: 2G
    #[arg(long, value_name = "SIZE", default_value = "1024", value_parser = |text: &str| mebibytes(text, 64))]
    memory: u32,
    /// Memory of the guest, likewise
    #[arg(long, value_name = "SIZE", default_value = "256", value_parser = |text: &str| mebibytes(text, 16))]
    guest_memory: u32,
    /// How many vcpus the guest has
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    vcpus: u32,
    /// The QEMU to use (also TENON_QEMU)
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// The guest's kernel, bzImage or ELF, instead of the stock one
    #[arg(long, value_name = "PATH", conflicts_with = "first")]
    kernel: Option<PathBuf>,
    /// The guest's initial ramdisk, instead of busybox
    #[arg(long, value_name = "PATH")]
    ramdisk: Option<PathBuf>,
    /// More words for the guest kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    extra: String,
    /// End the machine, as a failure, after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Cargo profile of the images: `release` or `checked`
    #[arg(long, default_value = "release")]
    profile: String,
    /// The hypervisor's own options, after `--`
    #[arg(last = true)]
    hypervisor: Vec<String>,
}

/// MiB the hypervisor may need for itself.
const HYPERVISOR_MIB: u64 = 32;

/// A size in MiB: `256`, `256M` or `1G`.
fn mebibytes(text: &str, least: u32) -> Result<u32, String> {
    let (number, unit) = match text.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let size = number.parse::<u32>().ok().and_then(|number| number.checked_mul(unit));
    let size = size.ok_or("a size is a number of MiB, or has a suffix: 256M, 1G")?;
    if size < least { Err(format!("at least {least}M")) } else { Ok(size) }
}

/// Builds what is to run, runs it, and gives the status this program ends with.
pub(crate) fn run(sh: &Shell, options: &Options) -> Result<ExitCode> {
    // What the user named is looked at before anything is built or fetched for it.
    let described = guest_file::read(&options.guests)?;
    fits(options, &described)?;
    let stays = options.exec.as_deref().map(check_commands).transpose()?.unwrap_or(true);
    if let Some(path) = &options.kernel {
        kernel_file::check(path)?;
    }
    if let Some(path) = &options.ramdisk {
        ensure!(path.is_file(), "no ramdisk {}", path.display());
    }
    let qemu = Qemu::find(sh, options.qemu.as_deref())?;
    let images = build::images(sh, &options.profile)?;
    let hypervisor = build::image(&images, "hypervisor")?;
    let mut bundle = match &options.first {
        Some(first) => first_bundle(sh, options, first, &images)?,
        None => dom0_bundle(sh, options, &described, &build::image(&images, "dom0")?)?,
    };
    if let Some(commands) = &options.exec {
        bundle = bundle.exec(commands);
    }
    let archive = bundle.write()?;
    let end = boot(options, &qemu, &hypervisor, archive.path(), stays)?;
    if end == Some(End::Success) {
        return Ok(ExitCode::SUCCESS);
    }
    let why = match end {
        None => format!("no end after {} s", options.timeout.unwrap_or_default()),
        Some(End::Panic) if options.first.is_none() => {
            "the machine ended as a failure: a guest crashed, a command failed, or worse; see above".into()
        }
        Some(end) => end.explanation(),
    };
    bail!(why);
}

/// Whether the guests leave memory for dom0 and the hypervisor.
fn fits(options: &Options, guests: &[Described]) -> Result<()> {
    let bytes = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let files = |guest: &Described| bytes(&guest.kernel) + guest.ramdisk.as_deref().map_or(0, bytes);
    let ours = HYPERVISOR_MIB + DOM0_SPARE + guests.iter().map(files).sum::<u64>().div_ceil(1 << 20);
    let mut left = u64::from(options.memory).saturating_sub(ours);
    for guest in guests {
        let wanted = guest.config.memory;
        left = left.checked_sub(wanted).with_context(|| {
            format!(
                "{}: {wanted} MiB for {}, but only {left} MiB are left: the machine has {} MiB, of which dom0 and the \
                 hypervisor take {ours}; give it more with --memory",
                guest.memory_at, guest.config.name, options.memory
            )
        })?;
    }
    Ok(())
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

fn cmdline(options: &Options) -> String {
    format!("console=hvc0 {}", options.extra).trim_end().to_owned()
}

fn dom0_bundle(sh: &Shell, options: &Options, described: &[Described], dom0: &Path) -> Result<Bundle> {
    let bundle = Bundle::dom0(dom0, "");
    if !described.is_empty() {
        return Ok(described.iter().fold(bundle, Bundle::described));
    }
    let kernel = match &options.kernel {
        Some(path) => path.clone(),
        None => kernels::stock(sh, kernels::DEFAULT)?.vmlinux,
    };
    let ramdisk = match &options.ramdisk {
        Some(path) => path.clone(),
        None => kernels::ramdisk(sh)?,
    };
    Ok(bundle.guest(&Guest {
        name: "linux".into(),
        memory: options.guest_memory,
        vcpus: options.vcpus,
        kernel,
        ramdisk: Some(ramdisk),
        extra: cmdline(options),
    }))
}

fn first_bundle(sh: &Shell, options: &Options, first: &str, images: &Path) -> Result<Bundle> {
    let guest = images.join(first);
    if !first.contains('/') && guest.is_file() {
        let bundle = Bundle::first(&guest, options.ramdisk.as_deref(), &options.extra);
        return Ok(bundle.first_memory(options.guest_memory.into()));
    }
    let kernel = if kernels::names().any(|name| name == first) {
        kernels::stock(sh, first)?.vmlinux
    } else {
        kernel_file::check(Path::new(first))?;
        first.into()
    };
    let ramdisk = match &options.ramdisk {
        Some(path) => path.clone(),
        None => kernels::ramdisk(sh)?,
    };
    Ok(Bundle::first(&kernel, Some(&ramdisk), &cmdline(options)).first_memory(options.guest_memory.into()))
}

/// Runs the machine to its end, or to the time limit (`None`). Unless it stays on after its commands, nobody types, and
/// only the answers are printed on standard output; everything else goes to standard error.
fn boot(options: &Options, qemu: &Qemu, hypervisor: &Path, archive: &Path, stays: bool) -> Result<Option<End>> {
    let interactive = stays && io::stdin().is_terminal() && io::stdout().is_terminal();
    let console = if interactive { Console::Terminal } else { Console::Plain };
    let words = options.hypervisor.join(" ");
    let mut command = machine::command(qemu, options.memory, hypervisor, archive, &words, console);
    if !stays {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
    }
    let stopped = stop_on_signals()?;
    let _raw = interactive.then(RawTerminal::enter).transpose()?;
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

fn watch(options: &Options, machine: &mut Running, stopped: &AtomicBool) -> Result<Option<End>> {
    let deadline = options.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    loop {
        if let Some(status) = machine.0.try_wait()? {
            return Ok(Some(End::of(status)));
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(None);
        }
        ensure!(!stopped.load(Ordering::Relaxed), "interrupted");
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

/// Turns the signals that would end this program into a flag, so that machine, terminal and files are put in order.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    let stopped = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stopped);
    thread::spawn(move || {
        if signals.wait().is_ok() {
            flag.store(true, Ordering::Relaxed);
        }
    });
    Ok(stopped)
}

/// The terminal in raw mode; the guest at the other end edits and echoes. Restored when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        raw.output_flags |= OutputFlags::OPOST;
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing better can be done if the terminal is gone.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(mebibytes("256", 16), Ok(256));
        assert_eq!(mebibytes("256M", 16), Ok(256));
        assert_eq!(mebibytes("2g", 16), Ok(2048));
        for bad in ["", "M", "1T", "-1", "99999999G", "15", "1.5G"] {
            assert!(mebibytes(bad, 16).is_err(), "{bad}");
        }
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
