//! UEFI firmware for emulated machines: the machine's own or one fetched into the cache. BIOS comes with QEMU.

use crate::apt::Programs;
use anyhow::Result;
use std::path::PathBuf;
use xshell::Shell;

/// Firmware in one file, as Debian's package `ovmf` has it.
const OVMF: &str = "usr/share/ovmf/OVMF.fd";

const NEEDED: Programs = Programs {
    kind: "ovmf",
    packages: &["ovmf"],
    why: "because an emulated machine with UEFI is asked for",
    complete: |root| root.join(OVMF).is_file(),
};

/// The UEFI firmware: a file for QEMU's `-bios`.
///
/// # Errors
/// No way to fetch it.
pub fn uefi(sh: &Shell) -> Result<PathBuf> {
    NEEDED.find(sh).map(|root| root.join(OVMF))
}
