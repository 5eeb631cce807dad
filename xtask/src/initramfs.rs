//! The initramfs of our guests: busybox, an init script, and nothing else.

use crate::cache;
use anyhow::{Context, Result};
use cpio::{NewcBuilder, newc};
use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

/// The first program of a guest. `tenon.oneshot` on the kernel's command line ends the guest at once.
const INIT: &str = include_str!("init.sh");

/// What the kernel starts when dom0 asks the guest to end. The first program is a shell and knows no such requests, so
/// they are carried out on the spot.
const ENDS: [(&str, &str); 2] = [
    ("sbin/poweroff", "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"),
    ("sbin/reboot", "#!/bin/busybox sh\nexec /bin/busybox reboot -f\n"),
];

/// Folders every init wants.
const FOLDERS: [&str; 9] = ["bin", "sbin", "dev", "proc", "sys", "root", "tmp", "run", "etc"];

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Builds the archive around `busybox`, or returns the one built earlier from the same parts.
pub(crate) fn build(busybox: &Path) -> Result<PathBuf> {
    let program = fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    let mut hasher = DefaultHasher::new();
    (INIT, ENDS, &program).hash(&mut hasher);
    let target = cache::dir()?.join("initramfs").join(format!("{:016x}.cpio", hasher.finish()));
    if target.is_file() {
        return Ok(target);
    }
    let scratch = cache::scratch()?;
    let staging = scratch.path().join("initramfs");
    fs::write(&staging, archive(&program)?)?;
    cache::publish(&staging, &target)?;
    Ok(target)
}

fn archive(busybox: &[u8]) -> Result<Vec<u8>> {
    let mut programs = vec![("bin/busybox", busybox), ("init", INIT.as_bytes())];
    programs.extend(ENDS.iter().map(|(name, script)| (*name, script.as_bytes())));
    of_programs(&programs)
}

/// An archive with the folders and the console every init wants, and these programs in their folders.
///
/// # Errors
/// A program of 4 GiB or more.
pub fn of_programs(programs: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut out = Cursor::new(Vec::new());
    let folders = programs.iter().filter_map(|(name, _)| Some(name.rsplit_once('/')?.0));
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
