//! `cargo xtask run`: one machine, on this terminal.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{self, OutputFlags, SetArg, Termios};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use xshell::Shell;
use xtask::bundle::{Bundle, Guest};
use xtask::machine::{self, Console, End};
use xtask::qemu::Qemu;
use xtask::{build, kernel_file, kernels};

/// What to run and in which machine.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Start KERNEL as the first domain instead of dom0: a file, a test guest's name, or a stock kernel such as 6.1
    #[arg(long, value_name = "KERNEL")]
    first: Option<String>,
    /// Memory of the machine in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..))]
    memory: u32,
    /// Memory of the guest in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..))]
    guest_memory: u32,
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

/// Builds what is to run, runs it, and gives the status this program ends with.
pub(crate) fn run(sh: &Shell, options: &Options) -> Result<ExitCode> {
    // What the user named is looked at before anything is built or fetched for it.
    if let Some(path) = &options.kernel {
        kernel_file::check(path)?;
    }
    if let Some(path) = &options.ramdisk {
        ensure!(path.is_file(), "no ramdisk {}", path.display());
    }
    let qemu = Qemu::find(sh, options.qemu.as_deref())?;
    let images = build::images(sh, &options.profile)?;
    let hypervisor = build::image(&images, "hypervisor")?;
    let bundle = match &options.first {
        Some(first) => first_bundle(sh, options, first, &images)?,
        None => dom0_bundle(sh, options, &build::image(&images, "dom0")?)?,
    };
    let archive = bundle.write()?;
    let end = boot(options, &qemu, &hypervisor, archive.path())?;
    if end == Some(End::Success) {
        return Ok(ExitCode::SUCCESS);
    }
    let why = end.map_or_else(|| format!("no end after {} s", options.timeout.unwrap_or_default()), End::explanation);
    bail!(why);
}

fn cmdline(options: &Options) -> String {
    format!("console=hvc0 {}", options.extra).trim_end().to_owned()
}

fn dom0_bundle(sh: &Shell, options: &Options, dom0: &Path) -> Result<Bundle> {
    let kernel = match &options.kernel {
        Some(path) => path.clone(),
        None => kernels::stock(sh, kernels::DEFAULT)?.vmlinux,
    };
    let ramdisk = match &options.ramdisk {
        Some(path) => path.clone(),
        None => kernels::ramdisk(sh)?,
    };
    Ok(Bundle::dom0(dom0, "").guest(&Guest {
        name: "linux".into(),
        memory: options.guest_memory,
        vcpus: 1,
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

/// Runs the machine to its end, or to the time limit (`None`).
fn boot(options: &Options, qemu: &Qemu, hypervisor: &Path, archive: &Path) -> Result<Option<End>> {
    let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
    let console = if interactive { Console::Terminal } else { Console::Plain };
    let words = options.hypervisor.join(" ");
    let mut command = machine::command(qemu, options.memory, hypervisor, archive, &words, console);
    let stopped = stop_on_signals()?;
    let _raw = interactive.then(RawTerminal::enter).transpose()?;
    let mut machine = Running(command.spawn().context("cannot start QEMU")?);
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
