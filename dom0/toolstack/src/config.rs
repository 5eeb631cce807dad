//! The configuration of a guest: a TOML file with the keys of `xl.cfg`.
//!
//! ```toml
//! name = "web"
//! memory = 256                  # MiB
//! maxmem = 512                  # MiB it may grow to, optional
//! kernel = "vmlinuz"            # in the boot bundle; in a file for xtask, a path
//! ramdisk = "initrd"            # optional
//! extra = "console=hvc0"        # command line, optional
//! vcpus = 1                     # optional
//! on_poweroff = "destroy"       # destroy, restart or preserve; likewise on_reboot, on_crash
//! on_watchdog = "destroy"       # optional; the default is what on_crash says
//! disk = ["serial:sys,,xvda,w"] # optional: see `disk.rs`
//! vif = ["bridge=lan"]          # optional: see `vif.rs`
//! ```
//!
//! `manager/make.rs` makes a guest from its configuration. A new key is a field of [`GuestConfig`] with its check, and
//! a line where it is used: in `manager/make.rs` or in `create.rs`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::de::{Error, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use toml::Spanned;

use crate::disk::DiskConfig;
use crate::vif::VifConfig;

/// Vcpus the shared-info page has room for.
const MAX_VCPUS: u32 = 32;
/// The most guests that one file describes.
const MAX_COUNT: u32 = 64;
/// Most bytes of a command line in the start-info page, without its NUL.
pub const MAX_EXTRA: usize = 1023;
const MAX_NAME: usize = 64;
/// Most disks of a guest.
pub const MAX_DISKS: usize = 16;
/// The maximum number of network devices of a guest.
pub const MAX_VIFS: usize = 8;
/// Most bytes of a configuration; a longer one is refused unread.
const MAX_TEXT: usize = 64 << 10;
/// Most memory in MiB: far more than any machine has, yet a list with four bytes for each page still has a 64-bit size.
const MAX_MEMORY: u64 = 1 << 30;

/// What happens when a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The guest is removed, with all it had.
    Destroy,
    /// The guest is removed, and made again.
    Restart,
    /// The guest stays as it is, so that it can be examined.
    Preserve,
}

/// What a guest is made from. Each field is a key of the file; each is checked by itself as it is read.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    /// The guest's name: see [`check_name`].
    #[serde(deserialize_with = "name")]
    pub name: String,
    /// How many such guests there are, 1 to 64. A file for `cargo xtask` may say so, which puts each of them into the boot
    /// bundle with a name of its own; dom0 makes one.
    #[serde(default = "one", deserialize_with = "count", skip_serializing_if = "is_one")]
    pub count: u32,
    /// Memory in MiB.
    #[serde(deserialize_with = "memory")]
    pub memory: u64,
    /// Memory in MiB that the guest may grow to; the default is `memory`.
    #[serde(default, deserialize_with = "maxmem")]
    pub maxmem: u64,
    /// Number of vcpus, 1 to 32.
    #[serde(default = "one", deserialize_with = "vcpus")]
    pub vcpus: u32,
    /// Name of the kernel's entry in the boot bundle.
    #[serde(deserialize_with = "file")]
    pub kernel: String,
    /// Name of the ramdisk's entry in the boot bundle.
    #[serde(default, deserialize_with = "optional_file", skip_serializing_if = "Option::is_none")]
    pub ramdisk: Option<String>,
    /// The command line.
    #[serde(default, deserialize_with = "extra")]
    pub extra: String,
    /// What happens when the guest powers itself off.
    #[serde(default = "destroy")]
    pub on_poweroff: Action,
    /// What happens when the guest reboots.
    #[serde(default = "restart")]
    pub on_reboot: Action,
    /// What happens when the guest crashes.
    #[serde(default = "destroy")]
    pub on_crash: Action,
    /// What happens when the guest misses its watchdog; the default is `on_crash`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_watchdog: Option<Action>,
    /// Its disks, at most [`MAX_DISKS`]; no two have one vdev. A file of the host is still named by its path here.
    #[serde(default, deserialize_with = "disks", skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<DiskConfig>,
    /// Its network devices, at most [`MAX_VIFS`]; no two have one address. The numbers of the devices are their places in the
    /// list, from 0 on.
    #[serde(default, deserialize_with = "vifs", skip_serializing_if = "Vec::is_empty")]
    pub vif: Vec<VifConfig>,
}

const fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
const fn is_one(count: &u32) -> bool {
    *count == 1
}

const fn destroy() -> Action {
    Action::Destroy
}

const fn restart() -> Action {
    Action::Restart
}

/// Reads a value and checks it with `good`. The error `why` tells what the value must be.
fn checked<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    source: D,
    good: impl FnOnce(&T) -> bool,
    why: &'static str,
) -> Result<T, D::Error> {
    let value = T::deserialize(source)?;
    if good(&value) { Ok(value) } else { Err(D::Error::custom(why)) }
}

fn name<'de, D: Deserializer<'de>>(source: D) -> Result<String, D::Error> {
    let name = String::deserialize(source)?;
    check_name(&name).map_err(D::Error::custom).map(|()| name)
}

fn memory<'de, D: Deserializer<'de>>(source: D) -> Result<u64, D::Error> {
    checked(source, |mib| (1..=MAX_MEMORY).contains(mib), "a number of MiB from 1 on")
}

fn maxmem<'de, D: Deserializer<'de>>(source: D) -> Result<u64, D::Error> {
    checked(source, |mib| (1..=MAX_MEMORY).contains(mib), NOT_LESS_THAN_MEMORY)
}

fn count<'de, D: Deserializer<'de>>(source: D) -> Result<u32, D::Error> {
    checked(source, |count| (1..=MAX_COUNT).contains(count), "1 to 64 guests")
}

fn vcpus<'de, D: Deserializer<'de>>(source: D) -> Result<u32, D::Error> {
    checked(source, |vcpus| (1..=MAX_VCPUS).contains(vcpus), "1 to 32 vcpus")
}

fn file<'de, D: Deserializer<'de>>(source: D) -> Result<String, D::Error> {
    checked(source, |file: &String| !file.is_empty(), "the name of a file")
}

fn optional_file<'de, D: Deserializer<'de>>(source: D) -> Result<Option<String>, D::Error> {
    file(source).map(Some)
}

fn extra<'de, D: Deserializer<'de>>(source: D) -> Result<String, D::Error> {
    let fits = |extra: &String| extra.len() <= MAX_EXTRA && !extra.contains('\0');
    checked(source, fits, "at most 1023 bytes without a NUL")
}

fn disks<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<DiskConfig>, D::Error> {
    let texts = Vec::<String>::deserialize(source)?;
    if texts.len() > MAX_DISKS {
        return Err(D::Error::custom(format!("{} disks, and a guest has at most {MAX_DISKS}", texts.len())));
    }
    // The parser knows the line of the list, not of each text in it.
    let read = |(place, text): (usize, &String)| text.parse().map_err(|why| format!("disk {}: {why}", place + 1));
    let disks = texts.iter().enumerate().map(read).collect::<Result<Vec<DiskConfig>, _>>().map_err(D::Error::custom)?;
    // Two names never stand for one number.
    let twice = |(place, disk): &(usize, &DiskConfig)| disks.iter().take(*place).any(|other| other.vdev == disk.vdev);
    match disks.iter().enumerate().find(twice) {
        Some((_, disk)) => Err(D::Error::custom(format!("two disks are named {}", disk.vdev.name()))),
        None => Ok(disks),
    }
}

fn vifs<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<VifConfig>, D::Error> {
    let texts = Vec::<String>::deserialize(source)?;
    if texts.len() > MAX_VIFS {
        return Err(D::Error::custom(format!("{} vifs, and a guest has at most {MAX_VIFS}", texts.len())));
    }
    let read = |(place, text): (usize, &String)| text.parse().map_err(|why| format!("vif {}: {why}", place + 1));
    let vifs = texts.iter().enumerate().map(read).collect::<Result<Vec<VifConfig>, _>>().map_err(D::Error::custom)?;
    let twice = |(place, vif): &(usize, &VifConfig)| {
        vif.mac.is_some() && vifs.iter().take(*place).any(|other| other.mac == vif.mac)
    };
    match vifs.iter().enumerate().find(twice).and_then(|(_, vif)| vif.mac) {
        Some(mac) => Err(D::Error::custom(format!("two vifs have the address {mac}"))),
        None => Ok(vifs),
    }
}

const NOT_LESS_THAN_MEMORY: &str = "a number of MiB, and not less than `memory`";

/// What is wrong in a configuration, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The line, counted from 1; 0 if the error is about the file as a whole.
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

/// The rule for names, as an error message.
const NAME_RULE: &str = "1 to 64 letters, digits, `-`, `_` or `.`, not only digits, and without `-` at the beginning";
/// Names of the first domain, which no guest may have: ours, and the one in the store's tree.
const FIRST_DOMAIN: [&str; 2] = ["dom0", "Domain-0"];

/// Checks the name of a guest. A name of digits could be taken for a domain's number, one that begins with `-` for an
/// option.
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
    /// A guest with `memory` MiB and defaults for everything else.
    #[must_use]
    pub fn new(name: &str, memory: u64, kernel: &str) -> Self {
        Self {
            name: name.into(),
            count: one(),
            memory,
            maxmem: memory,
            vcpus: one(),
            kernel: kernel.into(),
            ramdisk: None,
            extra: String::new(),
            on_poweroff: destroy(),
            on_reboot: restart(),
            on_crash: destroy(),
            on_watchdog: None,
            disk: Vec::new(),
            vif: Vec::new(),
        }
    }

    /// Reads a configuration.
    ///
    /// # Errors
    /// The first error, with its line and key.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        if text.len() > MAX_TEXT {
            let why = format!("{} bytes, and a configuration has at most {MAX_TEXT}", text.len());
            return Err(ConfigError { line: 0, key: String::new(), why });
        }
        let mut config: Self = toml::from_str(text).map_err(|error| {
            // The parser may end its messages with a line break.
            let why = error.message().trim_end().replace('\n', ", ");
            ConfigError::at(text, error.span().map(|span| span.start), &why)
        })?;
        match config.maxmem {
            0 => config.maxmem = config.memory,
            most if most < config.memory => {
                return Err(ConfigError::at(text, place_of_maxmem(text), NOT_LESS_THAN_MEMORY));
            }
            _ => {}
        }
        Ok(config)
    }

    /// The configuration as a file that [`GuestConfig::parse`] reads.
    #[must_use]
    pub fn to_toml(&self) -> String {
        // Never fails: numbers, strings and enums can always be written as TOML.
        toml::to_string(self).unwrap_or_default()
    }
}

/// Where the file sets `maxmem`, in bytes from its start. All values of the file have been parsed before.
fn place_of_maxmem(text: &str) -> Option<usize> {
    #[derive(Deserialize)]
    struct Maxmem {
        maxmem: Spanned<IgnoredAny>,
    }
    toml::from_str(text).ok().map(|file: Maxmem| file.maxmem.span().start)
}

/// The key that a line sets; `None` if it sets no key.
fn key(line: &str) -> Option<&str> {
    let key = line.split_once('=')?.0.trim();
    let bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    (!key.is_empty() && key.chars().all(bare)).then_some(key)
}

impl ConfigError {
    /// Makes an error at byte `start` of the text. With `None`, or if a key is missing, the error is about the whole
    /// file.
    fn at(text: &str, start: Option<usize>, why: &str) -> Self {
        let whole = || Self { line: 0, key: String::new(), why: why.into() };
        let Some((before, _)) = start.and_then(|start| text.split_at_checked(start)) else {
            return whole();
        };
        if why.starts_with("missing field") {
            return whole();
        }
        let line = before.matches('\n').count() + 1;
        let key = text.lines().nth(line - 1).and_then(key).unwrap_or_default();
        Self { line, key: key.to_string(), why: why.into() }
    }
}
