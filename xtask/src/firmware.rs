//! UEFI firmware for emulated machines: the machine's own or one fetched into the cache. BIOS comes with QEMU.

use crate::{apt, cache};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use xshell::Shell;

/// Firmware in one file, as Debian's package `ovmf` has it.
const OVMF: &str = "usr/share/ovmf/OVMF.fd";

/// The UEFI firmware: a file for QEMU's `-bios`.
///
/// # Errors
/// No way to fetch it.
pub fn uefi(sh: &Shell) -> Result<PathBuf> {
    if let Some(found) = find()? {
        return Ok(found);
    }
    let _lock = cache::lock("ovmf")?;
    if let Some(found) = find()? {
        return Ok(found);
    }
    apt::provide(sh, "ovmf", &["ovmf"], "because an emulated machine with UEFI is asked for")
        .context("cannot fetch UEFI firmware; installing the package `ovmf` helps as well")?;
    find()?.with_context(|| format!("the package `ovmf` holds no {OVMF}"))
}

fn find() -> Result<Option<PathBuf>> {
    let cached = apt::provided("ovmf")?.into_iter().rev();
    let places = std::iter::once(Path::new("/").to_owned()).chain(cached);
    Ok(places.map(|root| root.join(OVMF)).find(|file| file.is_file()))
}
