//! The initramfs of our guests: busybox, an init script, and perhaps a kernel's modules for disks.

use crate::{cache, modules};
use anyhow::{Context, Result};
use cpio::{NewcBuilder, newc};
use flate2::Compression;
use flate2::write::GzEncoder;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

/// The first program of a guest. `tenon.oneshot` on the kernel's command line ends the guest at once.
const INIT: &str = include_str!("init.sh");

/// What the kernel starts by itself: when dom0 asks the guest to end, which is carried out on the spot, as the first program
/// is a shell and knows no such requests; and when the kernel wants a module.
const HELPERS: [(&str, &str); 3] = [
    ("sbin/poweroff", "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"),
    ("sbin/reboot", "#!/bin/busybox sh\nexec /bin/busybox reboot -f\n"),
    ("sbin/modprobe", "#!/bin/busybox sh\nexec /bin/busybox modprobe \"$@\"\n"),
];
/// What `mount` without a type tries in turn, where the kernel knows no file system with a disk yet.
const FILE_SYSTEMS: &str = "ext4\nvfat\niso9660\n*\n";
/// What busybox's DHCP client runs when it has an address, and when it has lost it.
const DHCP: &str = include_str!("dhcp.sh");

/// Folders every init wants.
const FOLDERS: [&str; 9] = ["bin", "sbin", "dev", "proc", "sys", "root", "tmp", "run", "etc"];

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Builds the archive around `busybox`, the modules in the folder `modules`, and other files by their names in the guest, or
/// returns the one built earlier from the same parts.
pub(crate) fn build(busybox: &Path, modules: Option<&Path>, others: &BTreeMap<String, Vec<u8>>) -> Result<PathBuf> {
    let program = fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    let mut more = modules.map(modules::files).transpose()?.unwrap_or_default();
    more.extend(others.iter().map(|(name, file)| (name.clone(), file.clone())));
    let mut hasher = DefaultHasher::new();
    (INIT, HELPERS, FILE_SYSTEMS, DHCP, &program, &more).hash(&mut hasher);
    let target = cache::dir()?.join("initramfs").join(format!("{:016x}.cpio", hasher.finish()));
    if cache::has(&target) {
        return Ok(target);
    }
    let scratch = cache::scratch()?;
    let staging = scratch.path().join("initramfs");
    fs::write(&staging, archive(&program, &more)?)?;
    cache::publish_by_content(&staging, &target)?;
    Ok(target)
}

/// What is more than busybox is an archive of its own, which a kernel unpacks after the other: compressed, as it is the larger
/// part.
fn archive(busybox: &[u8], more: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut files = vec![("bin/busybox", busybox), ("init", INIT.as_bytes())];
    files.extend(HELPERS.iter().map(|(name, script)| (*name, script.as_bytes())));
    files.push(("etc/filesystems", FILE_SYSTEMS.as_bytes()));
    files.push(("etc/dhcp.sh", DHCP.as_bytes()));
    let archive = of_programs(&files)?;
    if more.is_empty() {
        return Ok(archive);
    }
    let more: Vec<(&str, &[u8])> = more.iter().map(|(name, file)| (name.as_str(), file.as_slice())).collect();
    let mut packed = GzEncoder::new(archive, Compression::default());
    packed.write_all(&of_programs(&more)?)?;
    Ok(packed.finish()?)
}

/// An archive with the folders and the console every init wants, and these programs in their folders.
///
/// # Errors
/// A program of 4 GiB or more.
pub fn of_programs(programs: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut out = Cursor::new(Vec::new());
    let folders = programs.iter().flat_map(|(name, _)| name.match_indices('/').filter_map(|(at, _)| name.get(..at)));
    // A folder comes before those in it.
    let others: BTreeSet<&str> = folders.filter(|name| !FOLDERS.contains(name)).collect();
    for name in FOLDERS.into_iter().chain(others) {
        entry(&mut out, NewcBuilder::new(name).mode(DIRECTORY), &[])?;
    }
    // The kernel opens it for init before any file system is mounted.
    let console = NewcBuilder::new("dev/console").mode(CHARACTER_DEVICE).rdev_major(5).rdev_minor(1);
    entry(&mut out, console, &[])?;
    for (name, program) in programs {
        entry(&mut out, NewcBuilder::new(name).mode(PROGRAM), program)?;
    }
    newc::trailer(&mut out)?;
    Ok(out.into_inner())
}

fn entry(out: &mut Cursor<Vec<u8>>, header: NewcBuilder, data: &[u8]) -> Result<()> {
    let mut writer = header.write(out, u32::try_from(data.len()).context("a file too large for an initramfs")?);
    writer.write_all(data)?;
    writer.finish()?;
    Ok(())
}
