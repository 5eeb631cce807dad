//! The boot bundle: a `newc` archive with `guests/<name>/{config,kernel,ramdisk}`.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use cpio_reader::iter_files;
use toolstack::config::GuestConfig;

/// A guest of the bundle with its files.
#[derive(Clone)]
pub(crate) struct Recipe {
    pub(crate) config: GuestConfig,
    pub(crate) kernel: &'static [u8],
    pub(crate) ramdisk: &'static [u8],
}

/// What is wrong with an entry of the bundle.
pub(crate) struct BadEntry {
    entry: String,
    why: String,
}

impl fmt::Display for BadEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boot bundle: {}: {}", self.entry, self.why)
    }
}

fn find(bundle: &'static [u8], name: &str) -> Option<&'static [u8]> {
    iter_files(bundle).find(|file| file.name() == name).map(|file| file.file())
}

/// Every guest of the bundle, in its order.
pub(crate) fn recipes(bundle: &'static [u8]) -> Vec<Result<Recipe, BadEntry>> {
    let is_config = |name: &str| name.starts_with("guests/") && name.ends_with("/config");
    let configs = iter_files(bundle).filter(|file| is_config(file.name()));
    configs.map(|file| recipe(bundle, file.name(), file.file())).collect()
}

fn recipe(bundle: &'static [u8], entry: &str, config: &[u8]) -> Result<Recipe, BadEntry> {
    let bad = |why: String| BadEntry { entry: entry.to_string(), why };
    let text = core::str::from_utf8(config).map_err(|e| bad(e.to_string()))?;
    let config = GuestConfig::parse(text).map_err(|e| bad(e.to_string()))?;
    let file = |key: &str, name: &str| {
        find(bundle, name).ok_or_else(|| bad(alloc::format!("{key}: the bundle has no entry {name}")))
    };
    let kernel = file("kernel", &config.kernel)?;
    let ramdisk = match &config.ramdisk {
        Some(name) => file("ramdisk", name)?,
        None => &[],
    };
    Ok(Recipe { config, kernel, ramdisk })
}
