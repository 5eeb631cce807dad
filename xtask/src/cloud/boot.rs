//! The kernel of an image: the newest one in `/boot`, on the root file system or on one of its own.

use super::image::{Image, Part};
use anyhow::{Context, Result, anyhow, bail, ensure};
use ext4_view::Ext4;
use std::cmp::Ordering;

/// No kernel or ramdisk has so many bytes.
const LARGEST: u64 = 1 << 30;

/// A file of an image.
pub(super) struct Read {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// What an image is booted with.
pub(super) struct Found {
    pub(super) kernel: Read,
    pub(super) ramdisk: Option<Read>,
    /// The part with the root file system, unless it is not looked for.
    pub(super) root: Option<Part>,
}

/// A kernel in one of the file systems.
struct Candidate {
    /// The index of the file system.
    system: usize,
    /// `/boot`, or `/` of a file system that is mounted there.
    folder: &'static str,
    version: String,
}

/// Finds the newest kernel, and the root file system unless it is `named` by the user.
///
/// # Errors
/// There is no kernel, or more than one root file system, or something cannot be read.
pub(super) fn find(image: &Image, named: bool) -> Result<Found> {
    let mut systems = Vec::new();
    for part in image.parts()? {
        if let Some(system) = image.file_system(&part)? {
            systems.push((part, system));
        }
    }
    ensure!(!systems.is_empty(), "has no ext4 file system");
    let mut newest: Option<Candidate> = None;
    for (index, (part, system)) in systems.iter().enumerate() {
        for folder in ["/boot", "/"] {
            for version in versions(system, folder).with_context(|| format!("{} cannot be read", part.name()))? {
                if newest.as_ref().is_none_or(|best| compare(&version, &best.version) == Ordering::Greater) {
                    newest = Some(Candidate { system: index, folder, version });
                }
            }
        }
    }
    let newest = newest.context("has no kernel /boot/vmlinuz-VERSION on an ext4 file system")?;
    let (part, system) = systems.get(newest.system).context("no file system")?;
    let kernel = read(system, newest.folder, &format!("vmlinuz-{}", newest.version))?;
    let ramdisk = ramdisk(system, newest.folder, &newest.version)?;
    let root = match newest.folder {
        _ if named => None,
        "/boot" => Some(part.clone()),
        _ => Some(other_root(&systems, newest.system)?),
    };
    Ok(Found { kernel, ramdisk, root })
}

/// The part with the root of a system whose `/boot` is another one.
fn other_root(systems: &[(Part, Ext4)], boot: usize) -> Result<Part> {
    let has_root = |system: &Ext4| system.exists("/etc/os-release").unwrap_or(false);
    let roots = systems.iter().enumerate().filter(|(index, (_, system))| *index != boot && has_root(system));
    let roots: Vec<&Part> = roots.map(|(_, (part, _))| part).collect();
    match roots.as_slice() {
        [root] => Ok((*root).clone()),
        [] => bail!("the root is on no ext4 file system: say which with --extra root=/dev/xvdaN"),
        _ => bail!("there are several roots: say which with --extra root=/dev/xvdaN"),
    }
}

/// The versions of the kernels in a folder. Those that a package manager has put aside do not count.
fn versions(system: &Ext4, folder: &str) -> Result<Vec<String>> {
    let is_folder = system.symlink_metadata(folder).is_ok_and(|metadata| metadata.is_dir());
    if !is_folder {
        return Ok(Vec::new());
    }
    let mut versions = Vec::new();
    for entry in system.read_dir(folder).map_err(|why| anyhow!("{why}"))? {
        let entry = entry.map_err(|why| anyhow!("{why}"))?;
        let regular = entry.file_type().is_ok_and(|kind| kind.is_regular_file());
        let name = entry.file_name().as_str().unwrap_or_default().to_owned();
        let aside = [".old", ".bak", ".dpkg-old", ".dpkg-new", ".dpkg-dist", ".dpkg-tmp", ".rpmsave", ".rpmnew"];
        match name.strip_prefix("vmlinuz-") {
            Some(version) if regular && !aside.iter().any(|end| version.ends_with(end)) => {
                versions.push(version.to_owned());
            }
            _ => {}
        }
    }
    Ok(versions)
}

/// The initial ramdisk for a version, as distributions call it.
fn ramdisk(system: &Ext4, folder: &str, version: &str) -> Result<Option<Read>> {
    let names = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initramfs-{version}"),
    ];
    let there = |name: &&String| system.exists(&*path(folder, name)).unwrap_or(false);
    names.iter().find(there).map(|name| read(system, folder, name)).transpose()
}

fn path(folder: &str, name: &str) -> String {
    format!("{}/{name}", folder.trim_end_matches('/'))
}

fn read(system: &Ext4, folder: &str, name: &str) -> Result<Read> {
    let path = path(folder, name);
    let told = |why: ext4_view::Ext4Error| anyhow!("{path} cannot be read: {why}");
    let bytes = system.metadata(&*path).map_err(told)?.len();
    ensure!(bytes <= LARGEST, "{path} has {bytes} bytes");
    Ok(Read { name: name.to_owned(), content: system.read(&*path).map_err(told)? })
}

/// Compares versions as `sort -V` does: runs of digits as numbers.
fn compare(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (parts(one), parts(other));
    loop {
        match (one.next(), other.next()) {
            (None, None) => return Ordering::Equal,
            (one, other) if one == other => {}
            (one, other) => return one.cmp(&other),
        }
    }
}

/// A run of other characters, and the digits behind it: without leading zeroes, longer numbers are greater.
type Run<'a> = (&'a str, usize, &'a str);

fn parts(version: &str) -> impl Iterator<Item = Run<'_>> {
    let mut rest = version;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let digits = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (word, after) = rest.split_at(digits);
        let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (number, after) = after.split_at(end);
        rest = after;
        let number = number.trim_start_matches('0');
        Some((word, number.len(), number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let mut versions = [
            "6.1.0-50-amd64",
            "6.1.0-9-amd64",
            "5.10.0-30-amd64",
            "6.12.0-1-amd64",
            "0-rescue-1f",
            "6.1.0-50-cloud-amd64",
            "virt",
        ];
        versions.sort_by(|one, other| compare(one, other));
        assert_eq!(
            versions,
            [
                "0-rescue-1f",
                "5.10.0-30-amd64",
                "6.1.0-9-amd64",
                "6.1.0-50-amd64",
                "6.1.0-50-cloud-amd64",
                "6.12.0-1-amd64",
                "virt",
            ]
        );
        assert_eq!(compare("6.01", "6.1"), Ordering::Equal);
    }
}
