//! A guest from a cloud image: a disk, raw or qcow2, with a system and its kernel. The kernel and its initial ramdisk are read
//! from the image here, on the host; dom0 and the hypervisor see no file system of a guest.
//!
//! The newest kernel is taken, as GRUB would. The guest has the whole image as `xvda`, and finds its partitions itself.

mod boot;
mod image;
mod qcow2;

use crate::disk::{self, Disk};
use crate::guest_file::{Described, FileDisk};
use crate::kernel_file::KernelFile;
use anyhow::{Context, Result, anyhow, ensure};
use image::Image;
use std::fs::{self, File};
use std::path::Path;
use tempfile::TempDir;
use toolstack::config::{GuestConfig, MAX_EXTRA};
use toolstack::disk::{DiskConfig, Format, Target};
use toolstack::vif::VifConfig;

/// The disk's name in the guest.
const DISK: &str = "xvda";
/// What messages begin with.
const AT: &str = "--cloud";

/// What a guest from an image should be.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    /// The image.
    pub image: &'a Path,
    /// What the domain is called.
    pub name: &'a str,
    /// Its memory in MiB.
    pub memory: u32,
    /// How many virtual CPUs it has.
    pub vcpus: u32,
    /// More words for its kernel's command line. `root=` replaces ours.
    pub extra: &'a str,
    /// The MiB of memory for what the guest writes, which is lost with the guest; `None`: the guest writes the image.
    pub overlay: Option<u32>,
}

/// A guest from an image.
#[derive(Debug)]
pub struct Guest {
    /// The guest.
    pub described: Described,
    /// Kernel and ramdisk are here, and disappear with this value.
    _folder: TempDir,
}

/// Makes a guest of an image.
///
/// # Errors
/// What is wrong with the image, in one line.
pub fn guest(wish: &Wish<'_>) -> Result<Guest> {
    make(wish).with_context(|| format!("{AT}: {}", wish.image.display()))
}

fn make(wish: &Wish<'_>) -> Result<Guest> {
    let format = disk::format(wish.image)?;
    let named = wish.extra.split_whitespace().any(|word| word.starts_with("root="));
    let found = boot::find(&Image::open(File::open(wish.image)?, format == Format::Qcow2)?, named)?;
    let folder = tempfile::Builder::new().prefix("tenon-cloud-").tempdir()?;
    let keep = |name: &str, content: &[u8]| -> Result<_> {
        let path = folder.path().join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    };
    let kernel = keep(&found.kernel.name, &found.kernel.content)?;
    let ramdisk = found.ramdisk.as_ref().map(|file| keep(&file.name, &file.content)).transpose()?;
    eprintln!("the kernel of {} is {}", wish.image.display(), found.kernel.name);
    let file =
        KernelFile::read(&kernel).map_err(|why| anyhow!("the kernel {}: {}", found.kernel.name, why.root_cause()))?;
    let memory_at = "--memory".to_owned();
    file.fits(wish.memory.into(), ramdisk.as_deref(), true).context("--memory")?;
    file.warn(&memory_at, wish.memory.into(), ramdisk.as_deref())?;
    let root = found.root.map(|part| format!(" root={} ro", part.device(DISK))).unwrap_or_default();
    let extra = format!("console=hvc0{root} {}", wish.extra).trim_end().to_owned();
    ensure!(extra.len() <= MAX_EXTRA, "a command line of {} bytes, and it can have {MAX_EXTRA}", extra.len());
    let mut disk: DiskConfig = format!("memory:1M,,{DISK},w").parse().map_err(|why| anyhow!("{why}"))?;
    disk.target = Target::File(wish.image.display().to_string());
    disk.format = format;
    disk.overlay = wish.overlay.map(|mib| u64::from(mib) << 20);
    let taken = Disk::of_guest(wish.image, &disk)?;
    let config = GuestConfig {
        vcpus: wish.vcpus,
        extra,
        disk: vec![disk],
        vif: vec![VifConfig::default()],
        ..GuestConfig::new(wish.name, wish.memory.into(), "")
    };
    let disks = vec![FileDisk { number: 0, at: AT.to_owned(), disk: taken }];
    let room = file.room;
    let described = Described { config, kernel, ramdisk, memory_at, room, stock: None, disks, images: Vec::new() };
    Ok(Guest { described, _folder: folder })
}

#[cfg(test)]
mod tests;
