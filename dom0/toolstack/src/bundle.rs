//! The boot bundle: a `newc` cpio archive with a configuration `guests/<name>/config` for each guest to be started, and
//! the kernels and ramdisks that these configurations name.

use alloc::string::{String, ToString};
use core::fmt;

use hypercall_abi::bundle::entries;

use crate::config::{ConfigError, GuestConfig};
use crate::forward::Forward;

/// The entry with the commands of `--exec`, separated by `;`. dom0 carries them out once the guests have been made.
pub const EXEC: &str = "dom0.exec";
/// The first character of each line of an answer to these commands. Guests cannot forge it: control characters in their
/// texts are escaped.
pub const ANSWER: char = '\x1e';

/// The entry with the connections from outside that lead to guests: a [`Forward`] a line.
pub const FORWARDS: &str = "dom0.forwards";

/// What the names of entries begin with that are disks of guests: `bundle:disks/base` is the entry `disks/base`. The content of
/// such an entry begins at a multiple of 512 bytes of the archive, and has whole sectors of 512 bytes.
pub const DISKS: &str = "disks/";

/// An archive in memory.
#[derive(Clone, Copy)]
pub struct Bundle<'a>(&'a [u8]);

/// What is wrong with a guest of the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BundleError {
    /// The configuration in this entry is not UTF-8.
    NotText(String),
    /// The configuration in this entry has an error.
    Config(String, ConfigError),
    /// The guest's configuration names a kernel or ramdisk that is not in the bundle.
    Missing {
        /// The guest.
        name: String,
        /// The entry that is missing.
        entry: String,
    },
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotText(entry) => write!(f, "{entry}: not UTF-8 text"),
            Self::Config(entry, why) => write!(f, "{entry}: {why}"),
            Self::Missing { name, entry } => write!(f, "guest {name}: the boot bundle has no entry `{entry}`"),
        }
    }
}

impl core::error::Error for BundleError {}

impl<'a> Bundle<'a> {
    /// Wraps the archive. The archive ends where an entry is damaged.
    #[must_use]
    pub const fn new(archive: &'a [u8]) -> Self {
        Self(archive)
    }

    /// The bundle's size in bytes.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.0.len()
    }

    /// The content of an entry.
    #[must_use]
    pub fn entry(&self, name: &str) -> Option<&'a [u8]> {
        entries(self.0).find(|(it, _)| *it == name).map(|(_, content)| content)
    }

    /// The configuration of every guest, in the order of the archive.
    pub fn guests(&self) -> impl Iterator<Item = Result<GuestConfig, BundleError>> + use<'a> {
        entries(self.0)
            .filter(|(name, _)| name.strip_prefix("guests/").is_some_and(|name| name.ends_with("/config")))
            .map(|(name, content)| {
                let text = core::str::from_utf8(content).map_err(|_| BundleError::NotText(name.to_string()))?;
                GuestConfig::parse(text).map_err(|why| BundleError::Config(name.to_string(), why))
            })
    }

    /// The connections from outside that lead to guests, or what is wrong with one.
    pub fn forwards(&self) -> impl Iterator<Item = Result<Forward, String>> + use<'a> {
        let text = core::str::from_utf8(self.entry(FORWARDS).unwrap_or_default()).unwrap_or("not UTF-8 text");
        text.lines().map(str::parse)
    }

    /// The name and the content of every entry that is a disk.
    pub fn disks(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        entries(self.0).filter(|(name, _)| name.starts_with(DISKS))
    }

    /// Returns the kernel and the ramdisk (empty if none) that a configuration names.
    ///
    /// # Errors
    /// The bundle lacks the kernel or the ramdisk.
    pub fn images(&self, config: &GuestConfig) -> Result<(&'a [u8], &'a [u8]), BundleError> {
        let find = |entry: &str| {
            self.entry(entry)
                .ok_or_else(|| BundleError::Missing { name: config.name.clone(), entry: entry.to_string() })
        };
        let kernel = find(&config.kernel)?;
        let ramdisk = config.ramdisk.as_deref().map(find).transpose()?;
        Ok((kernel, ramdisk.unwrap_or_default()))
    }
}
