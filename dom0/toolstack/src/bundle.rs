//! The boot bundle: a `newc` cpio archive with a configuration `guests/<name>/config` for each guest to be started, and
//! the kernels and ramdisks they name.

use alloc::string::{String, ToString};
use core::fmt;

use hypercall_abi::bundle::entries;

use crate::config::{ConfigError, GuestConfig};

/// The entry with commands to be carried out when the guests have been made, separated by `;`.
pub const EXEC: &str = "dom0.exec";
/// What begins a line of an answer to those commands: no text of a guest can, for control characters in it are escaped.
pub const ANSWER: char = '\x1e';

/// An archive in memory.
#[derive(Clone, Copy)]
pub struct Bundle<'a>(&'a [u8]);

/// What is wrong with a guest of the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BundleError {
    /// The configuration, by the name of its entry, is no text.
    NotText(String),
    /// It is wrong.
    Config(String, ConfigError),
    /// It names an entry, as its kernel or ramdisk, that the bundle lacks.
    Missing {
        /// The guest.
        name: String,
        /// The entry.
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
    /// Wraps the archive. Its entries end at the first one that is damaged.
    #[must_use]
    pub const fn new(archive: &'a [u8]) -> Self {
        Self(archive)
    }

    /// Its size in bytes.
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

    /// The kernel and the ramdisk (empty for none) that a configuration names.
    ///
    /// # Errors
    /// The bundle lacks one.
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
