//! Modules of a stock kernel that guests need for their devices: the drivers and the usual file systems.
//!
//! The package of a Debian kernel has these modules, compressed or not. They are kept uncompressed, with the two lists that
//! `modprobe` reads: which modules a module needs, and by which other names the kernel requests a module.

use anyhow::{Context, Result, ensure};
use lzma_rust2::{Read, XzReader};
use object::{Object, ObjectSection};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules of a kernel that are kept together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Set {
    /// The modules that are taken, along with all modules that they need. If empty, all modules are taken, as the package has
    /// them and without lists.
    wanted: &'static [&'static str],
    /// Modules that are taken if the package has them.
    optional: &'static [&'static str],
    /// The folder of the cache with the modules. The number grows with the list of modules that are taken.
    pub(crate) folder: &'static str,
    /// Where the modules may be in a package, for [`crate::apt::extract_some`].
    pub(crate) patterns: &'static [&'static str],
}

/// What guests need.
pub(crate) const OF_GUESTS: Set = Set {
    wanted: &["xen_blkfront", "xen_netfront", "ext4", "vfat", "isofs"],
    // vfat and isofs request them when a file system is mounted.
    optional: &["nls_cp437", "nls_ascii", "nls_utf8"],
    folder: "modules.2",
    patterns: &[
        "./*lib/modules/*/modules.builtin",
        "./*lib/modules/*/kernel/arch/*",
        "./*lib/modules/*/kernel/crypto/*",
        "./*lib/modules/*/kernel/drivers/block/*",
        "./*lib/modules/*/kernel/drivers/cdrom/*",
        "./*lib/modules/*/kernel/drivers/net/xen-netfront.ko*",
        "./*lib/modules/*/kernel/fs/*",
        "./*lib/modules/*/kernel/lib/*",
    ],
};

/// What a guest may want whose system is on a disk, and makes the lists itself. A PV guest has no devices beside the split
/// ones, so most drivers are left out.
pub(crate) const OF_SYSTEMS: Set = Set {
    wanted: &[],
    optional: &[],
    folder: "system.2",
    patterns: &[
        "./*lib/modules/*/modules.builtin*",
        "./*lib/modules/*/modules.order",
        "./*lib/modules/*/kernel/arch/*",
        "./*lib/modules/*/kernel/crypto/*",
        "./*lib/modules/*/kernel/drivers/block/*",
        "./*lib/modules/*/kernel/drivers/cdrom/*",
        "./*lib/modules/*/kernel/drivers/md/*",
        "./*lib/modules/*/kernel/drivers/net/*.ko*",
        "./*lib/modules/*/kernel/drivers/xen/*",
        "./*lib/modules/*/kernel/fs/*",
        "./*lib/modules/*/kernel/lib/*",
        "./*lib/modules/*/kernel/net/*",
        "./*lib/modules/*/kernel/security/*",
    ],
};

/// What lays what a guest writes over a disk that is only read.
pub(crate) const OVERLAY: Set = Set {
    wanted: &["overlay"],
    optional: &[],
    folder: "overlay.1",
    patterns: &["./*lib/modules/*/modules.builtin", "./*lib/modules/*/kernel/fs/*"],
};

/// What a kernel that is alone on a machine needs for a system on a virtio disk on PCI.
pub(crate) const VIRTIO_DISK: Set = Set {
    wanted: &["virtio_pci", "virtio_blk", "ext4"],
    optional: &[],
    folder: "virtio-disk.1",
    patterns: &[
        "./*lib/modules/*/modules.builtin",
        "./*lib/modules/*/kernel/arch/*",
        "./*lib/modules/*/kernel/crypto/*",
        "./*lib/modules/*/kernel/drivers/block/*",
        "./*lib/modules/*/kernel/drivers/virtio/*",
        "./*lib/modules/*/kernel/fs/*",
        "./*lib/modules/*/kernel/lib/*",
    ],
};

/// What a kernel that is alone on a machine needs for a virtio network device on PCI.
pub(crate) const VIRTIO_NET: Set = Set {
    wanted: &["virtio_pci", "virtio_net"],
    optional: &[],
    folder: "virtio-net.1",
    patterns: &[
        "./*lib/modules/*/modules.builtin",
        "./*lib/modules/*/kernel/drivers/net/net_failover.ko*",
        "./*lib/modules/*/kernel/drivers/net/virtio_net.ko*",
        "./*lib/modules/*/kernel/drivers/virtio/*",
        "./*lib/modules/*/kernel/lib/*",
        "./*lib/modules/*/kernel/net/core/*",
    ],
};

/// The maximum number of bytes of an uncompressed module.
const LARGEST: u64 = 64 << 20;

/// The information in a module that is used here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Info {
    /// Modules that must be loaded before this one.
    depends: Vec<String>,
    /// Modules, or other names of modules, that should be loaded before this one.
    before: Vec<String>,
    /// Other names of the module.
    aliases: Vec<String>,
}

impl Info {
    /// Reads the section `.modinfo` of a module: texts `KEY=VALUE`, each followed by a NUL.
    fn read(module: &[u8]) -> Result<Self> {
        let file = object::File::parse(module)?;
        let section = file.section_by_name(".modinfo").context("no section .modinfo")?;
        Ok(Self::parse(section.data()?))
    }

    fn parse(section: &[u8]) -> Self {
        let mut info = Self::default();
        for text in section.split(|byte| *byte == 0).filter_map(|text| std::str::from_utf8(text).ok()) {
            match text.split_once('=') {
                Some(("depends", names)) => {
                    info.depends = names.split(',').filter(|name| !name.is_empty()).map(canonical).collect();
                }
                Some(("softdep", names)) => {
                    let before = names.split_whitespace().skip_while(|word| *word != "pre:").skip(1);
                    info.before = before.take_while(|word| *word != "post:").map(str::to_owned).collect();
                }
                Some(("alias", name)) => info.aliases.push(name.to_owned()),
                _ => {}
            }
        }
        info
    }
}

/// Returns a module's name as the kernel writes it: with underscores.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// Takes the modules of a set out of the unpacked package below `root`. Writes them and their lists into the folder
/// `target/RELEASE`, where RELEASE is the kernel's release.
///
/// # Errors
/// The package lacks a module, or a module is damaged.
pub(crate) fn take(root: &Path, target: &Path, set: Set) -> Result<()> {
    let tree = release(root).context("the package holds no modules")?;
    let name = tree.file_name().context("modules without a release")?;
    if set.wanted.is_empty() {
        fs::create_dir_all(target)?;
        return Ok(fs::rename(&tree, target.join(name))?);
    }
    let builtin = fs::read_to_string(tree.join("modules.builtin")).unwrap_or_default();
    let builtin: BTreeSet<String> = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
    let mut files = BTreeMap::new();
    list(&tree, &mut files)?;
    let mut aliases = BTreeMap::<String, Vec<String>>::new();
    let mut infos = BTreeMap::new();
    for (name, path) in &files {
        let module = unpack(path).with_context(|| format!("the module {}", path.display()))?;
        let info = Info::read(&module).with_context(|| format!("the module {}", path.display()))?;
        for alias in &info.aliases {
            aliases.entry(alias.clone()).or_default().push(name.clone());
        }
        infos.insert(name.clone(), info);
    }
    let optional = set.optional.iter().filter(|name| files.contains_key(**name));
    let mut open: Vec<String> = set.wanted.iter().chain(optional).map(|name| (*name).to_owned()).collect();
    let mut taken = BTreeSet::new();
    while let Some(name) = open.pop() {
        if builtin.contains(&name) || !taken.insert(name.clone()) {
            continue;
        }
        let info = infos.get(&name).with_context(|| format!("the package lacks the module {name}"))?;
        open.extend(info.depends.iter().cloned());
        let named = |before: &String| match aliases.get(before) {
            Some(names) => names.clone(),
            None => vec![canonical(before)],
        };
        open.extend(info.before.iter().flat_map(named).filter(|name| files.contains_key(name)));
    }
    let folder = target.join(name);
    fs::create_dir_all(&folder)?;
    for name in &taken {
        fs::write(folder.join(format!("{name}.ko")), unpack(&files[name])?)?;
    }
    let (dependencies, names) = lists(&taken, &infos);
    fs::write(folder.join("modules.dep"), dependencies)?;
    fs::write(folder.join("modules.alias"), names)?;
    Ok(())
}

/// Returns the two lists of `modprobe`: the modules that each module needs, and the other names of modules.
fn lists(taken: &BTreeSet<String>, infos: &BTreeMap<String, Info>) -> (String, String) {
    let (mut dependencies, mut names) = (String::new(), String::new());
    for name in taken {
        let Some(info) = infos.get(name) else { continue };
        let (mut needed, mut open) = (Vec::new(), info.depends.clone());
        // In the list of a module, each needed module stands before those that it needs itself.
        while let Some(next) = open.pop() {
            if taken.contains(&next) {
                needed.retain(|known| *known != next);
                open.extend(infos.get(&next).into_iter().flat_map(|info| info.depends.clone()));
                needed.push(next);
            }
        }
        let needed: String = needed.iter().map(|name| format!(" {name}.ko")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(dependencies, "{name}.ko:{needed}");
        for alias in &info.aliases {
            let _ = writeln!(names, "alias {alias} {name}");
        }
    }
    (dependencies, names)
}

/// Returns the files of all modules in the folder `modules` of a set, in an order in which they can be loaded.
///
/// # Errors
/// The folder or its list cannot be read.
pub(crate) fn in_order(modules: &Path) -> Result<Vec<PathBuf>> {
    let release = fs::read_dir(modules)?.next().context("no release")??.path();
    let file = release.join("modules.dep");
    let list = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(order(&list).iter().map(|name| release.join(name)).collect())
}

/// Returns the modules in a list of `modprobe`'s, each behind those that it needs.
fn order(list: &str) -> Vec<&str> {
    let mut lines: Vec<Vec<&str>> = list
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, needed)| std::iter::once(name).chain(needed.split_whitespace()).collect())
        .collect();
    // A module needs more modules than any module that it needs.
    lines.sort_by_key(Vec::len);
    lines.iter().filter_map(|line| line.first().copied()).collect()
}

/// Returns the folder of a release, below `root/lib/modules` or `root/usr/lib/modules`. `None` if there is no such folder.
fn release(root: &Path) -> Option<PathBuf> {
    let found = |folder: &str| {
        let mut entries = fs::read_dir(root.join(folder)).ok()?.flatten().map(|entry| entry.path());
        entries.find(|path| path.join("kernel").is_dir())
    };
    ["lib/modules", "usr/lib/modules"].into_iter().find_map(found)
}

/// Finds all modules below a folder, by name.
fn list(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// Returns the name of the module in a file `NAME.ko` or `NAME.ko.xz`. `None` for any other file.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    Some(canonical(file.strip_suffix(".xz").unwrap_or(file).strip_suffix(".ko")?))
}

/// Returns the uncompressed module in a file: a program that cannot decompress modules can load it.
fn unpack(path: &Path) -> Result<Vec<u8>> {
    let file = fs::read(path)?;
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(file);
    }
    let (mut reader, mut module) = (XzReader::new(&file[..], false), Vec::new());
    let mut piece = vec![0; 64 << 10];
    loop {
        let count = reader.read(&mut piece).map_err(|why| anyhow::anyhow!("damaged: {why:?}"))?;
        if count == 0 {
            return Ok(module);
        }
        module.extend_from_slice(&piece[..count]);
        ensure!(module.len() as u64 <= LARGEST, "unpacks to more than {LARGEST} bytes");
    }
}

/// Returns the files for the modules in the folder `modules` that an initramfs carries: each with its name in the initramfs and
/// its bytes.
///
/// # Errors
/// A file cannot be read.
pub(crate) fn files(modules: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for release in fs::read_dir(modules).with_context(|| format!("cannot read {}", modules.display()))? {
        let release = release?;
        for file in fs::read_dir(release.path())? {
            let file = file?;
            let (release, name) = (release.file_name(), file.file_name());
            let name = format!("lib/modules/{}/{}", release.to_string_lossy(), name.to_string_lossy());
            files.push((name, fs::read(file.path())?));
        }
    }
    // The file system lists a folder in any order.
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_what_it_needs() {
        let info = Info::parse(
            b"license=GPL\0softdep=pre: crypto-crc32c post: x\0alias=fs-ext4\0alias=ext3\0depends=jbd2,xen-a\0",
        );
        assert_eq!(info.depends, ["jbd2", "xen_a"]);
        assert_eq!((info.before, info.aliases), (vec!["crypto-crc32c".into()], vec!["fs-ext4".into(), "ext3".into()]));
        assert_eq!(Info::parse(b"depends=\0"), Info::default());
    }

    #[test]
    fn names_are_the_kernels() {
        let name = |path: &str| module_name(Path::new(path));
        assert_eq!(name("kernel/xen-blkfront.ko.xz").as_deref(), Some("xen_blkfront"));
        assert_eq!(name("ext4.ko").as_deref(), Some("ext4"));
        assert_eq!((name("modules.order"), name("a.ko.gz")), (None, None));
    }

    #[test]
    fn modprobe_reads_what_stands_before_what() {
        let info = |depends: &[&str]| Info {
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
            aliases: vec!["fs-x".into()],
            ..Info::default()
        };
        let infos: BTreeMap<_, _> =
            [("a", info(&["b", "c"])), ("b", info(&["c"])), ("c", info(&["builtin"])), ("d", info(&[]))]
                .map(|(name, info)| (name.to_owned(), info))
                .into();
        let taken = ["a", "b", "c"].map(str::to_owned).into();
        let (dependencies, names) = lists(&taken, &infos);
        assert_eq!(dependencies, "a.ko: b.ko c.ko\nb.ko: c.ko\nc.ko:\n");
        assert_eq!(names, "alias fs-x a\nalias fs-x b\nalias fs-x c\n");
        assert_eq!(order(&dependencies), ["c.ko", "b.ko", "a.ko"]);
    }

    #[test]
    fn a_package_without_modules_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let why = |folder: &Path| take(folder, &folder.join("out"), OF_GUESTS).unwrap_err().to_string();
        assert_eq!(why(folder.path()), "the package holds no modules");
        fs::create_dir_all(folder.path().join("usr/lib/modules/6.99/kernel/fs")).unwrap();
        assert!(why(folder.path()).starts_with("the package lacks the module "));
    }
}
