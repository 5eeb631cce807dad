//! What a guest should be: a TOML file with the keys of `xl.cfg`.
//!
//! ```toml
//! name = "web"
//! memory = 256                  # MiB
//! maxmem = 512                  # MiB it may grow to, optional
//! kernel = "vmlinuz"            # in the boot bundle
//! ramdisk = "initrd"            # optional
//! extra = "console=hvc0"        # command line, optional
//! vcpus = 1                     # optional
//! on_poweroff = "destroy"       # destroy, restart or preserve; likewise on_reboot, on_crash
//! on_watchdog = "destroy"       # unless it is said: as on_crash
//! ```
//!
//! `disk` and `vif` are known and refused: this build has no such devices.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;

use serde::Deserialize;
use serde::de::IgnoredAny;
use toml::Spanned;

/// Vcpus the shared-info page has room for.
const MAX_VCPUS: u32 = 32;
/// Bytes of a command line in the start-info page, without its NUL.
pub const MAX_EXTRA: usize = 1023;
const MAX_NAME: usize = 64;
/// Bytes of a file; a longer one is refused unread.
const MAX_TEXT: usize = 64 << 10;

/// What happens when a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It goes, with all it had.
    Destroy,
    /// It goes, and is made anew.
    Restart,
    /// It stays as it is, to be looked at.
    Preserve,
}

/// A guest to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestConfig {
    /// See [`check_name`].
    pub name: String,
    /// Memory in MiB.
    pub memory: u64,
    /// Memory in MiB it may grow to.
    pub maxmem: u64,
    /// Vcpus, 1 to 32.
    pub vcpus: u32,
    /// Name of the kernel.
    pub kernel: String,
    /// Name of the ramdisk.
    pub ramdisk: Option<String>,
    /// The command line.
    pub extra: String,
    /// When it powers itself off.
    pub on_poweroff: Action,
    /// When it reboots.
    pub on_reboot: Action,
    /// When it crashes.
    pub on_crash: Action,
    /// When it misses its watchdog; as for a crash if it is not said.
    pub on_watchdog: Option<Action>,
}

/// What is wrong with a configuration, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Line, from 1 on; 0 if it is about the file as a whole.
    pub line: usize,
    /// The key on that line; may be empty.
    pub key: String,
    /// What is wrong.
    pub why: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line != 0 {
            write!(f, "line {}: ", self.line)?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.why)
    }
}

impl core::error::Error for ConfigError {}

/// The file as it is written; places are kept for the values that can be wrong in themselves.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Spanned<String>,
    memory: Spanned<u64>,
    maxmem: Option<Spanned<u64>>,
    vcpus: Option<Spanned<u32>>,
    kernel: Spanned<String>,
    ramdisk: Option<Spanned<String>>,
    extra: Option<Spanned<String>>,
    disk: Option<Spanned<IgnoredAny>>,
    vif: Option<Spanned<IgnoredAny>>,
    on_poweroff: Option<Action>,
    on_reboot: Option<Action>,
    on_crash: Option<Action>,
    on_watchdog: Option<Action>,
}

/// What a name must be.
const NAME_RULE: &str = "1 to 64 letters, digits, `-`, `_` or `.`, not only digits, and without `-` at the beginning";
/// What the first domain is called, by us and in the tree.
const FIRST_DOMAIN: [&str; 2] = ["dom0", "Domain-0"];

/// Judges what a guest may be called. A number would be taken for a domain's, and what begins with `-` for an option.
///
/// # Errors
/// What is wrong with the name.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let number = name.chars().all(|c| c.is_ascii_digit());
    if name.len() > MAX_NAME || number || name.starts_with('-') || !name.chars().all(plain) {
        return Err(NAME_RULE);
    }
    if FIRST_DOMAIN.contains(&name) { Err("this is the name of the first domain") } else { Ok(()) }
}

impl GuestConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// The first thing that is wrong, with its line and key.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        if text.len() > MAX_TEXT {
            let why = format!("{} bytes, and a configuration has at most {MAX_TEXT}", text.len());
            return Err(ConfigError { line: 0, key: String::new(), why });
        }
        let file: File = toml::from_str(text).map_err(|error| {
            // The parser may end its messages with a line break.
            let why = error.message().trim_end().replace('\n', ", ");
            ConfigError::at(text, error.span().map(|span| span.start), &why)
        })?;
        let refuse = |start: usize, why: &str| Err(ConfigError::at(text, Some(start), why));
        if let Some(device) = file.disk.as_ref().or(file.vif.as_ref()) {
            return refuse(device.span().start, "this build has no such devices");
        }
        if let Err(why) = check_name(file.name.get_ref()) {
            return refuse(file.name.span().start, why);
        }
        // Four bytes of list and tables for each page must be countable: far more than any machine has.
        let memory = *file.memory.get_ref();
        if !(1..=1 << 30).contains(&memory) {
            return refuse(file.memory.span().start, "a number of MiB from 1 on");
        }
        if let Some(most) = file.maxmem.as_ref().filter(|most| !(memory..=1 << 30).contains(most.get_ref())) {
            return refuse(most.span().start, "a number of MiB, and not less than `memory`");
        }
        if let Some(vcpus) = file.vcpus.as_ref().filter(|v| !(1..=MAX_VCPUS).contains(v.get_ref())) {
            return refuse(vcpus.span().start, "1 to 32 vcpus");
        }
        for file in [Some(&file.kernel), file.ramdisk.as_ref()].into_iter().flatten() {
            if file.get_ref().is_empty() {
                return refuse(file.span().start, "the name of a file");
            }
        }
        let fits = |extra: &str| extra.len() <= MAX_EXTRA && !extra.contains('\0');
        if let Some(extra) = file.extra.as_ref().filter(|extra| !fits(extra.get_ref())) {
            return refuse(extra.span().start, "at most 1023 bytes without a NUL");
        }
        Ok(Self {
            name: file.name.into_inner(),
            memory,
            maxmem: file.maxmem.map_or(memory, Spanned::into_inner),
            vcpus: file.vcpus.map_or(1, Spanned::into_inner),
            kernel: file.kernel.into_inner(),
            ramdisk: file.ramdisk.map(Spanned::into_inner),
            extra: file.extra.map(Spanned::into_inner).unwrap_or_default(),
            on_poweroff: file.on_poweroff.unwrap_or(Action::Destroy),
            on_reboot: file.on_reboot.unwrap_or(Action::Restart),
            on_crash: file.on_crash.unwrap_or(Action::Destroy),
            on_watchdog: file.on_watchdog,
        })
    }
}

impl ConfigError {
    /// An error at a byte of the text; `None` if nothing in the text is to blame, but something is missing.
    fn at(text: &str, start: Option<usize>, why: &str) -> Self {
        let whole = || Self { line: 0, key: String::new(), why: why.into() };
        let Some((before, _)) = start.and_then(|start| text.split_at_checked(start)) else {
            return whole();
        };
        if why.starts_with("missing field") {
            return whole();
        }
        let line = before.matches('\n').count() + 1;
        let source = text.lines().nth(line - 1).unwrap_or_default();
        let key = source.split_once('=').map(|(key, _)| key.trim().to_string()).unwrap_or_default();
        Self { line, key, why: why.into() }
    }
}
