//! The parts of the project's own tool that the system tests use as well: QEMU, kernels, the boot bundle.

#![forbid(unsafe_code)]

pub mod apt;
mod bootstrap;
pub mod build;
pub mod built;
pub mod bundle;
pub mod cache;
pub mod cloud;
pub mod debian;
pub mod disk;
pub mod ext4;
pub mod firmware;
pub mod first;
pub mod grub;
pub mod guest_file;
pub mod initramfs;
mod iso9660;
pub mod kernel_file;
pub mod kernels;
pub mod machine;
mod modules;
pub mod oci;
pub mod qemu;
pub mod seed;
pub mod selftests;
pub mod ssh;
pub mod sysroot;
pub mod xen;

use std::path::Path;

/// The bare-metal target of every image.
pub const TARGET: &str = "x86_64-unknown-none";

/// The top folder of the checkout.
#[must_use]
pub fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// Parses a size in MiB: `256`, `256M` or `1G`.
///
/// # Errors
/// The text is no size, or a size below `least` MiB.
pub fn mebibytes(text: &str, least: u32) -> Result<u32, String> {
    let (number, unit) = match text.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let size = number.parse::<u32>().ok().and_then(|number| number.checked_mul(unit));
    let size = size.ok_or("a size is a number of MiB, or has a suffix: 256M, 1G")?;
    if size < least { Err(format!("at least {least}M")) } else { Ok(size) }
}
