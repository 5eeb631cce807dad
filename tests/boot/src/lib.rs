//! The harness of the system tests: a machine that is booted, watched, typed into, and never outlives its test.
//!
//! ```no_run
//! # use boot::{Machine, Setup};
//! # use std::time::Duration;
//! # fn story(bundle: xtask::bundle::Bundle) -> anyhow::Result<()> {
//! let mut machine = Machine::boot("a_guest_answers", &Setup::new(bundle))?;
//! machine.expect("login: ", Duration::from_secs(30))?;
//! machine.type_line("root")?;
//! machine.finish()?.require_success()
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod answers;
pub mod gpt;
pub mod guests;
pub mod http;
pub mod nbd;
pub mod selftests;

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use xshell::Shell;
use xtask::bundle::Bundle;
use xtask::machine::{Console, End, Failure, Hardware, Medium, Network};
use xtask::qemu::{Qemu, accelerator};
use xtask::xen::Xen;
use xtask::{build, firmware};

/// The Cargo profile of the images that are booted: release code with every assertion on.
pub const PROFILE: &str = "checked";

/// The id of the first guest that is made: those before it are given by request only.
pub const FIRST_GUEST: u16 = 8;

/// How many lines of the console a failure shows; the whole of it is in the file that is named as well.
const SHOWN: usize = 40;

/// The machine a test wants.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What the hypervisor is booted with.
    pub bundle: Bundle,
    /// The hypervisor's own command line.
    pub options: String,
    /// Memory of the machine in MiB.
    pub memory: u32,
    /// The model of its CPUs, as QEMU calls it; `None` for the one with most features.
    pub cpu: Option<String>,
    /// The machine is ended, as a failure, after this long.
    pub limit: Duration,
    /// Arguments for QEMU that stand behind our own.
    pub arguments: Vec<String>,
    /// Its network device; `None` if it has none.
    pub network: Option<Network>,
    /// Bytes that the terminal takes in a second; `None` for all that come.
    pub pace: Option<u32>,
    /// The machine's clock advances by a nanosecond an instruction, so that times in it do not depend on this machine's. Only
    /// an emulator can do that; where there is none, it goes as it does.
    pub counted: bool,
}

impl Setup {
    /// A machine of 512 MiB for a minute.
    #[must_use]
    pub fn new(bundle: Bundle) -> Self {
        Self {
            bundle,
            options: String::new(),
            memory: 512,
            cpu: None,
            limit: Duration::from_secs(60),
            arguments: Vec::new(),
            network: None,
            pace: None,
            counted: false,
        }
    }
}

/// The folder with the images that are booted.
///
/// # Errors
/// Cargo's target folder is unknown.
pub fn images() -> Result<PathBuf> {
    Ok(build::target_dir(&shell()?)?.join(xtask::TARGET).join(PROFILE))
}

/// How many times longer than usual the tests are to be, if this is a soak: `cargo xtask soak` says so in `TENON_SOAK`.
#[must_use]
pub fn soak() -> Option<u32> {
    std::env::var("TENON_SOAK").ok()?.parse().ok()
}

/// Options that every hypervisor is booted with besides its own: `cargo xtask soak` sets `TENON_OPTIONS`.
#[must_use]
pub fn options() -> String {
    std::env::var("TENON_OPTIONS").unwrap_or_default()
}

/// A shell in the top folder of the checkout, as the functions of `xtask` want it.
///
/// # Errors
/// There is no current folder.
pub fn shell() -> Result<Shell> {
    let sh = Shell::new()?;
    sh.change_dir(xtask::root());
    Ok(sh)
}

/// The folder for the logs of the test called `name`.
fn folder(sh: &Shell, name: &str) -> Result<PathBuf> {
    let folder = build::target_dir(sh)?.join("tmp/system").join(name);
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// A running machine. Its QEMU is killed when this is dropped.
pub struct Machine {
    child: Child,
    input: ChildStdin,
    console: Arc<Shared>,
    /// How much of the console earlier calls of [`Machine::expect`] have used up.
    mark: usize,
    deadline: Instant,
    folder: PathBuf,
    // The archive is on disk as long as the machine may read it.
    _bundle: Box<dyn Send>,
}

/// What the reader thread and the test share.
#[derive(Default)]
struct Shared {
    state: Mutex<Output>,
    changed: Condvar,
}

#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    closed: bool,
}

impl Shared {
    /// A panic of another thread leaves the bytes as good as they were.
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a machine ended.
#[derive(Debug)]
pub struct Outcome {
    /// The reason of the end; `None` if its time was up.
    pub end: Option<End>,
    /// Everything the machine printed.
    pub console: String,
    /// Where that is kept.
    pub log: PathBuf,
}

impl Machine {
    /// Boots the hypervisor with what `setup` says. `name` is that of the test, and of the folder with its logs.
    ///
    /// # Errors
    /// No image, no QEMU, or no room for the bundle.
    pub fn boot(name: &str, setup: &Setup) -> Result<Self> {
        let sh = shell()?;
        let hypervisor = build::image(&images()?, "hypervisor").with_context(|| {
            format!("the system tests boot images of the profile {PROFILE}: run them with `cargo xtask test`")
        })?;
        let qemu = Qemu::find(&sh, None)?;
        let folder = folder(&sh, name)?;
        let bundle = setup.bundle.write()?;
        let counting =
            if setup.counted && accelerator().0 == "tcg" { ["-icount", "shift=0,sleep=off"].as_slice() } else { &[] };
        let arguments = counting.iter().map(|word| (*word).to_owned()).chain(setup.arguments.clone()).collect();
        let (cpu, network) = (setup.cpu.clone(), setup.network.clone());
        let hardware = Hardware { cpu, arguments, network, ..Hardware::new(setup.memory, Console::Plain) };
        let options = format!("{} {}", setup.options, options());
        let command = hardware.boot(&qemu, &hypervisor, bundle.path(), options.trim());
        Self::start(command, folder, setup.limit, setup.pace, Box::new(bundle))
    }

    /// Lets the firmware of a machine of a GiB, BIOS or UEFI, boot an image made by `cargo xtask image`.
    ///
    /// # Errors
    /// No QEMU, or no firmware.
    pub fn boot_image(name: &str, iso: &Path, medium: Medium, uefi: bool, limit: Duration) -> Result<Self> {
        let sh = shell()?;
        let qemu = Qemu::find(&sh, None)?;
        let uefi = if uefi { Some(firmware::uefi(&sh)?) } else { None };
        let command = Hardware::new(1024, Console::Plain).boot_image(&qemu, iso, medium, uefi.as_deref());
        Self::start(command, folder(&sh, name)?, limit, None, Box::new(()))
    }

    /// Boots Xen, the hypervisor we are measured by, with a kernel, its command line and its ramdisk as the first domain, which
    /// has two vcpus. Xen does not end QEMU when the guest is done.
    ///
    /// # Errors
    /// No QEMU.
    pub fn boot_on_xen(
        name: &str,
        xen: &Xen,
        (kernel, words, ramdisk): (&Path, &str, Option<&Path>),
        limit: Duration,
    ) -> Result<Self> {
        const OPTIONS: &str = "console=com1 com1=115200 dom0_mem=128M dom0_max_vcpus=2";
        let sh = shell()?;
        let qemu = Qemu::find(&sh, None)?;
        let ramdisk = ramdisk.map(|file| format!(",{}", file.display())).unwrap_or_default();
        // A comma in the words would begin another module.
        let modules = PathBuf::from(format!("{} {}{ramdisk}", kernel.display(), words.replace(',', ",,")));
        let command = Hardware::new(512, Console::Plain).boot(&qemu, &xen.image, &modules, OPTIONS);
        Self::start(command, folder(&sh, name)?, limit, None, Box::new(()))
    }

    /// Boots a kernel, a bzImage, that is alone on a machine of 256 MiB.
    ///
    /// # Errors
    /// No QEMU.
    pub fn boot_alone(name: &str, kernel: &Path, words: &str, ramdisk: &Path, limit: Duration) -> Result<Self> {
        let sh = shell()?;
        let qemu = Qemu::find(&sh, None)?;
        let command = Hardware::new(256, Console::Plain).boot(&qemu, kernel, ramdisk, words);
        Self::start(command, folder(&sh, name)?, limit, None, Box::new(()))
    }

    fn start(
        mut command: Command,
        folder: PathBuf,
        limit: Duration,
        pace: Option<u32>,
        bundle: Box<dyn Send>,
    ) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(folder.join("qemu.log"))?);
        // A pipe would take 64 KiB at once whatever the pace, and then 4 KiB.
        let slow = pace.map(|_| UnixStream::pair()).transpose()?.map(|(ours, theirs)| {
            command.stdout(OwnedFd::from(theirs));
            ours
        });
        let mut child = command.spawn().context("cannot start QEMU")?;
        let output: Box<dyn Read + Send> = match slow {
            Some(slow) => Box::new(slow),
            None => Box::new(child.stdout.take().context("QEMU without output")?),
        };
        let input = child.stdin.take().context("QEMU without input")?;
        let console = Arc::new(Shared::default());
        let log = File::create(folder.join("console.log"))?;
        let shared = Arc::clone(&console);
        thread::spawn(move || watch(output, log, pace, &shared));
        let deadline = Instant::now() + limit;
        Ok(Self { child, input, console, mark: 0, deadline, folder, _bundle: bundle })
    }

    /// Waits until the machine prints `text`, and returns everything from the last match up to the end of this one.
    ///
    /// # Errors
    /// `within` or the machine's own limit is over, or the machine ended, before the text came.
    pub fn expect(&mut self, text: &str, within: Duration) -> Result<String> {
        let until = self.deadline.min(Instant::now() + within);
        let mut output = self.console.lock();
        let why = loop {
            let unread = output.bytes.get(self.mark..).unwrap_or_default();
            if let Some(at) = position(unread, text.as_bytes()) {
                let length = at + text.len();
                let seen = String::from_utf8_lossy(&unread[..length]).into_owned();
                self.mark += length;
                return Ok(seen);
            }
            if output.closed {
                break "the machine ended";
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break "the time was up";
            }
            let waited = self.console.changed.wait_timeout(output, left);
            output = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        let console = String::from_utf8_lossy(&output.bytes).into_owned();
        drop(output);
        bail!("waiting for {text:?}: {why}\n{}", excerpt(&console, &self.folder.join("console.log")));
    }

    /// Types a line on the machine's console, and the return key.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.type_keys(format!("{line}\n").as_bytes())
    }

    /// Types keys on the machine's console.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn type_keys(&mut self, keys: &[u8]) -> Result<()> {
        let typed = self.input.write_all(keys).and_then(|()| self.input.flush());
        typed.with_context(|| format!("cannot type {:?}: the machine ended", keys.escape_ascii().to_string()))
    }

    /// Everything the machine has printed so far.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.console.lock().bytes).into_owned()
    }

    /// Waits for the end of the machine, and ends it if its limit is over.
    ///
    /// # Errors
    /// QEMU cannot be waited for.
    pub fn finish(mut self) -> Result<Outcome> {
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break Some(status);
            }
            if Instant::now() >= self.deadline {
                self.child.kill()?;
                self.child.wait()?;
                break None;
            }
            thread::sleep(Duration::from_millis(5));
        };
        // The end of QEMU closes its output: what is still on the way arrives now.
        let mut output = self.console.lock();
        while !output.closed {
            output = self.console.changed.wait(output).unwrap_or_else(PoisonError::into_inner);
        }
        let console = String::from_utf8_lossy(&output.bytes).into_owned();
        drop(output);
        Ok(Outcome { end: status.map(End::of), console, log: self.folder.join("console.log") })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Outcome {
    /// An error unless the hypervisor ended the machine in good order.
    ///
    /// # Errors
    /// Says how it ended, with the last lines of the console and the file that has all of them.
    pub fn require_success(&self) -> Result<()> {
        match self.end {
            Some(End::Success) => Ok(()),
            other => {
                let why = other.map_or_else(|| "the machine did not end in time".to_owned(), End::explanation);
                bail!("{why}\n{}", self.excerpt())
            }
        }
    }

    /// An error unless the hypervisor ended the machine as a failure, in an orderly way.
    ///
    /// # Errors
    /// As [`Outcome::require_success`].
    pub fn require_failure(&self) -> Result<()> {
        match self.end {
            Some(End::Panic | End::First(_)) => Ok(()),
            Some(End::Success) => bail!("the machine ended as if all were well\n{}", self.excerpt()),
            other => {
                let why = other.map_or_else(|| "the machine did not end in time".to_owned(), End::explanation);
                bail!("{why}\n{}", self.excerpt())
            }
        }
    }

    /// An error unless dom0 ended the machine because of this failure.
    ///
    /// # Errors
    /// As [`Outcome::require_success`].
    pub fn require_end(&self, failure: Failure) -> Result<()> {
        match self.end {
            Some(End::First(reason)) if reason == failure.reason() => Ok(()),
            other => bail!("not the end of {failure:?}, but {other:?}\n{}", self.excerpt()),
        }
    }

    /// An error unless exactly one line of the console contains `text`.
    ///
    /// # Errors
    /// Says how many do.
    pub fn require_line(&self, text: &str) -> Result<()> {
        match self.console.lines().filter(|line| line.contains(text)).count() {
            1 => Ok(()),
            count => bail!("{count} lines with {text:?}\n{}", self.excerpt()),
        }
    }

    /// An error unless the machine ended in good order *and* the tests in its guest said at the end that they passed.
    ///
    /// # Errors
    /// As [`Outcome::require_success`]; neither half alone counts.
    pub fn require_passed(&self) -> Result<()> {
        self.require_success()?;
        let said = self.console.lines().rev().find_map(|line| line.split_once("@@ done: "));
        match said.map(|(_, word)| word.trim_end()) {
            Some("passed") => Ok(()),
            Some(other) => bail!("the guest ended with the word {other:?}\n{}", self.excerpt()),
            None => bail!("the guest ended without a word\n{}", self.excerpt()),
        }
    }

    /// The features that the machine's CPU model has and the accelerator cannot do, as QEMU warned.
    ///
    /// # Errors
    /// What QEMU said cannot be read.
    pub fn lacking_features(&self) -> Result<Vec<String>> {
        let file = self.log.with_file_name("qemu.log");
        let said = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(lacking(&said))
    }

    fn excerpt(&self) -> String {
        excerpt(&self.console, &self.log)
    }
}

/// The features named in lines such as `TCG doesn't support requested feature: CPUID.07H:EBX.hle [bit 4]`.
fn lacking(said: &str) -> Vec<String> {
    let named = |line: &str| {
        let (_, place) = line.split_once("requested feature: ")?;
        let (place, _) = place.split_once(" [").unwrap_or((place, ""));
        Some(place.rsplit_once('.').map_or(place, |(_, name)| name).to_owned())
    };
    said.lines().filter_map(named).collect()
}

/// The end of a console, and where the whole of it lies.
fn excerpt(console: &str, log: &Path) -> String {
    let lines: Vec<&str> = console.lines().collect();
    let shown = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
    format!("--- the end of {}\n{shown}\n---", log.display())
}

/// Copies what the machine prints to the file and to the test, until the machine ends: at most `pace` bytes in a second.
fn watch(mut output: impl Read, mut log: File, pace: Option<u32>, shared: &Shared) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = output.read(&mut buffer) {
        // A full disk must not stop the test: it reads the bytes in memory.
        let _ = log.write_all(&buffer[..length]);
        shared.lock().bytes.extend_from_slice(&buffer[..length]);
        shared.changed.notify_all();
        if let Some(pace) = pace {
            thread::sleep(Duration::from_secs(length as u64) / pace);
        }
    }
    shared.lock().closed = true;
    shared.changed.notify_all();
}

/// Where `needle` first stands in `text`.
fn position(text: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    text.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_accelerator_lacks_is_named() {
        let said = "qemu: warning: TCG doesn't support requested feature: CPUID.07H:EBX.hle [bit 4]\n\
                    qemu: warning: host doesn't support requested feature: CPUID.0DH:EAX.xsavec [bit 1]\n\
                    qemu: terminating\n";
        assert_eq!(lacking(said), ["hle", "xsavec"]);
        assert!(lacking("").is_empty());
    }

    fn outcome(end: Option<End>, console: &str) -> Outcome {
        Outcome { end, console: console.into(), log: "console.log".into() }
    }

    #[test]
    fn a_guest_passes_only_with_both_halves() {
        let good = Some(End::Success);
        outcome(good, "@@ done: failed\n@@ done: passed\r\n").require_passed().unwrap();
        outcome(good, "(guest) @@ done: passed\nand more\n").require_passed().unwrap();
        for (end, console) in [
            (good, ""),
            (good, "@@ done: passed\n@@ done: failed\n"),
            (Some(End::Panic), "@@ done: passed\n"),
            (Some(End::Reset), "@@ done: passed\n"),
            (None, "@@ done: passed\n"),
        ] {
            let error = outcome(end, console).require_passed().unwrap_err().to_string();
            assert!(error.contains("console.log"), "{error}");
        }
    }

    #[test]
    fn a_failure_shows_the_end_of_the_console() {
        let console: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let error = outcome(None, &console).require_success().unwrap_err().to_string();
        assert!(error.contains("line 99") && error.contains("line 60") && !error.contains("line 59"), "{error}");
    }

    #[test]
    fn text_is_found_once_it_is_there() {
        assert_eq!(position(b"abcabd", b"abd"), Some(3));
        assert_eq!(position(b"abc", b"abcd"), None);
        assert_eq!(position(b"", b""), Some(0));
    }
}
