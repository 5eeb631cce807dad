//! Stock kernels and the userland they start: fetched from the distribution once, kept in the cache.

use crate::{apt, built, cache, initramfs, kernel_file, modules, ssh};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use xshell::Shell;

/// One stock kernel we know how to fetch.
struct Stock {
    /// What it is called on the command line.
    name: &'static str,
    /// The suite whose `linux-image-amd64` names it.
    suite: &'static str,
}

/// The kernels that are booted as guests.
const STOCK: &[Stock] = &[
    Stock { name: "6.1", suite: "bookworm" },
    Stock { name: "6.12", suite: "trixie" },
    Stock { name: "7.2", suite: "testing" },
];

/// The kernel that `run` starts where none is named.
pub const DEFAULT: &str = "6.1";

/// The kernels that every test run boots, in both of their forms. The rest is for the soak: what is in `testing` moves.
pub const DAILY: [&str; 2] = ["6.1", "6.12"];

/// A kernel in the cache, in both of its forms.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The file as the distribution ships it.
    pub bzimage: PathBuf,
    /// The ELF file inside it, unpacked.
    pub vmlinux: PathBuf,
}

impl Kernel {
    /// The package it is from, and its version.
    ///
    /// # Errors
    /// The cache is damaged.
    pub fn version(&self) -> Result<String> {
        let file = self.bzimage.with_file_name("version");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Ok(text.trim_end().to_owned())
    }
}

/// The names of the kernels that can be fetched.
pub fn names() -> impl Iterator<Item = &'static str> {
    STOCK.iter().map(|stock| stock.name)
}

/// The stock kernel called `name`, fetched first if need be.
///
/// # Errors
/// An unknown name, or no way to fetch it.
pub fn stock(sh: &Shell, name: &str) -> Result<Kernel> {
    let Some(stock) = STOCK.iter().find(|stock| stock.name == name) else {
        bail!("no stock kernel {name}; there are: {}", names().collect::<Vec<_>>().join(", "));
    };
    let folder = cache::dir()?.join("kernel").join(name);
    let kernel = Kernel { bzimage: folder.join("bzImage"), vmlinux: folder.join("vmlinux") };
    if !folder.is_dir() {
        let _lock = cache::lock("kernel")?;
        if !folder.is_dir() {
            fetch(sh, stock, &folder).with_context(|| {
                format!("cannot fetch the stock kernel {name}; a kernel file can be named instead with --kernel")
            })?;
        }
    }
    Ok(kernel)
}

/// The names of all kernels: those that can be fetched, and those that are built here.
pub fn all_names() -> impl Iterator<Item = &'static str> {
    names().chain(built::NAMES)
}

/// The kernel called `name`, fetched or built first if need be.
///
/// # Errors
/// An unknown name, or no way to fetch or build it.
pub fn named(sh: &Shell, name: &str) -> Result<Kernel> {
    if built::NAMES.contains(&name) { built::named(sh, name) } else { stock(sh, name) }
}

/// Whether the stock kernel called `name` is in the cache.
///
/// # Errors
/// No cache folder can be named.
pub fn is_cached(name: &str) -> Result<bool> {
    Ok(cache::dir()?.join("kernel").join(name).is_dir())
}

fn fetch(sh: &Shell, stock: &Stock, folder: &Path) -> Result<()> {
    let scratch = cache::scratch()?;
    let lists = apt::Lists::update(sh, scratch.path(), &[stock.suite], apt::Installed::Nothing)?;
    let mut record = lists.record(sh, "linux-image-amd64")?;
    // The metapackage names the image, and from 6.13 on the image names the package with the kernel itself.
    for _ in 0..2 {
        let depends = record.field("Depends").unwrap_or_default();
        let mut names = depends.split(',').filter_map(|entry| entry.split_whitespace().next());
        match names.find(|name| name.starts_with("linux-image-") || name.starts_with("linux-binary-")) {
            Some(next) => record = lists.record(sh, next)?,
            None => break,
        }
    }
    let (package, version) = (record.field("Package")?, record.field("Version")?);
    ensure!(version.starts_with(&format!("{}.", stock.name)), "{} has moved on to the kernel {version}", stock.suite);
    let size = record.size()? / 1_000_000;
    eprintln!("fetching the stock kernel {} ({package} {version}, {size} MB, once)", stock.name);
    let deb = lists.fetch(sh, &record, scratch.path())?;
    let (root, staging) = (scratch.path().join("root"), scratch.path().join("kernel"));
    fs::create_dir_all(&root)?;
    fs::create_dir_all(&staging)?;
    let kernel = ["./boot/vmlinuz-*", "./usr/lib/modules/*/vmlinuz"];
    apt::extract_some(&deb, &root, &[&kernel[..], modules::OF_GUESTS.patterns].concat())?;
    let file = find(&root, "vmlinuz").with_context(|| format!("{package} holds no kernel"))?;
    let bzimage = fs::read(&file)?;
    let vmlinux =
        kernel_file::unpack(&bzimage).with_context(|| format!("the kernel in {package} cannot be unpacked"))?;
    fs::write(staging.join("bzImage"), &bzimage)?;
    fs::write(staging.join("vmlinux"), vmlinux)?;
    fs::write(staging.join("version"), format!("{package} {version}\n"))?;
    // From 6.13 on they are in a package of their own, which is fetched when a guest needs it.
    if package.starts_with("linux-image-") {
        for set in [modules::OF_GUESTS, modules::OVERLAY] {
            modules::take(&root, &staging.join(set.folder), set)
                .with_context(|| format!("the modules in {package}"))?;
        }
    }
    cache::publish(&staging, folder)
}

/// The first file below `folder` whose name starts with `prefix`.
pub(crate) fn find(folder: &Path, prefix: &str) -> Option<PathBuf> {
    let entries: Vec<PathBuf> = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    let named = |path: &&PathBuf| {
        path.is_file() && path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(prefix.as_bytes()))
    };
    let here = entries.iter().find(named).cloned();
    here.or_else(|| entries.iter().filter(|path| path.is_dir()).find_map(|path| find(path, prefix)))
}

/// The standard initramfs of our guests: a static busybox and the script that starts it.
///
/// # Errors
/// No way to fetch busybox.
pub fn ramdisk(sh: &Shell) -> Result<PathBuf> {
    initramfs::build(&busybox(sh)?, None, &BTreeMap::new())
}

/// The initramfs of [`ramdisk`], with these files by their names in the initramfs.
///
/// # Errors
/// No way to fetch busybox.
pub fn ramdisk_with_files(sh: &Shell, files: &BTreeMap<String, Vec<u8>>) -> Result<PathBuf> {
    initramfs::build(&busybox(sh)?, None, files)
}

/// The initramfs of [`ramdisk`], with the modules that the stock kernel called `name` needs for disks and network devices.
///
/// # Errors
/// An unknown name, or no way to fetch its modules or busybox.
pub fn ramdisk_for_devices(sh: &Shell, name: &str) -> Result<PathBuf> {
    initramfs::build(&busybox(sh)?, Some(&modules(sh, name)?), &BTreeMap::new())
}

/// The initramfs of [`ramdisk_for_devices`] or, for a guest on a network, that of [`ramdisk_with_ssh`]. If what ssh needs
/// cannot be had, the guest has a network and no ssh.
///
/// # Errors
/// As [`ramdisk_for_devices`].
pub fn ramdisk_for(sh: &Shell, name: &str, network: bool) -> Result<PathBuf> {
    if !network {
        return ramdisk_for_devices(sh, name);
    }
    ramdisk_with_ssh(sh, name).or_else(|why| {
        eprintln!("warning: the guest cannot be reached by ssh: {why:#}");
        ramdisk_for_devices(sh, name)
    })
}

/// The initramfs of [`ramdisk_for_devices`], with a server for ssh that the key of [`ssh::Client`] opens.
///
/// # Errors
/// An unknown name, or no way to fetch its modules, busybox, or what ssh needs.
pub fn ramdisk_with_ssh(sh: &Shell, name: &str) -> Result<PathBuf> {
    initramfs::build(&busybox(sh)?, Some(&modules(sh, name)?), &ssh::server(sh)?)
}

/// The initramfs of [`ramdisk_with_ssh`] for the stock kernel called `name` alone on a machine, with a system on a virtio disk.
///
/// # Errors
/// As [`ramdisk_with_ssh`].
pub fn ramdisk_for_machine(sh: &Shell, name: &str) -> Result<PathBuf> {
    initramfs::build(&busybox(sh)?, Some(&module_set(sh, name, modules::VIRTIO_DISK)?), &ssh::server(sh)?)
}

/// The initramfs of [`ramdisk_for_devices`], with these programs by their names in the initramfs.
///
/// # Errors
/// As [`ramdisk_for_devices`].
pub fn ramdisk_with(sh: &Shell, name: &str, programs: &BTreeMap<String, Vec<u8>>) -> Result<PathBuf> {
    initramfs::build(&busybox(sh)?, Some(&modules(sh, name)?), programs)
}

/// The file of the module `module` of the stock kernel called `name`, such as `xen_blkfront`.
///
/// # Errors
/// An unknown name, or no way to fetch its modules; or there are none.
pub fn driver(sh: &Shell, name: &str, module: &str) -> Result<PathBuf> {
    let folder = modules(sh, name)?;
    let versions = fs::read_dir(&folder)?.collect::<Result<Vec<_>, _>>()?;
    let files = versions.iter().map(|version| version.path().join(format!("{module}.ko")));
    files.into_iter().find(|file| file.is_file()).with_context(|| format!("{} has no {module}.ko", folder.display()))
}

/// The files of the modules that the stock kernel called `name` needs for a virtio network device when it is alone on a
/// machine, in an order in which they can be loaded.
///
/// # Errors
/// An unknown name, or no way to fetch its modules.
pub fn drivers_of_virtio_net(sh: &Shell, name: &str) -> Result<Vec<PathBuf>> {
    modules::in_order(&module_set(sh, name, modules::VIRTIO_NET)?)
}

/// The files of the modules that the stock kernel called `name` needs for overlayfs, in an order in which they can be loaded.
pub(crate) fn overlay_modules(sh: &Shell, name: &str) -> Result<Vec<PathBuf>> {
    modules::in_order(&module_set(sh, name, modules::OVERLAY)?)
}

/// The modules of the stock kernel called `name` that guests need.
fn modules(sh: &Shell, name: &str) -> Result<PathBuf> {
    module_set(sh, name, modules::OF_GUESTS)
}

/// The name of the folder with [`all_modules`], which is another for another choice of modules.
pub(crate) const SYSTEM_MODULES: &str = modules::OF_SYSTEMS.folder;

/// The folder with all modules of the stock kernel called `name` that a guest with a disk of its own may want, in
/// `RELEASE/kernel`.
///
/// # Errors
/// An unknown name, or no way to fetch its modules.
pub(crate) fn all_modules(sh: &Shell, name: &str) -> Result<PathBuf> {
    module_set(sh, name, modules::OF_SYSTEMS)
}

/// The folder with modules of the stock kernel called `name`, fetched first if need be: a kernel in the cache may be from a
/// time when they were not kept.
fn module_set(sh: &Shell, name: &str, set: modules::Set) -> Result<PathBuf> {
    let kernel = stock(sh, name)?;
    let folder = kernel.bzimage.with_file_name(set.folder);
    if !folder.is_dir() {
        let _lock = cache::lock("kernel")?;
        if !folder.is_dir() {
            fetch_modules(sh, name, &kernel.version()?, &folder, set)
                .with_context(|| format!("cannot fetch the modules of the stock kernel {name}"))?;
        }
    }
    Ok(folder)
}

fn fetch_modules(sh: &Shell, name: &str, version: &str, folder: &Path, set: modules::Set) -> Result<()> {
    let stock = STOCK.iter().find(|stock| stock.name == name).context("no such stock kernel")?;
    let scratch = cache::scratch()?;
    let lists = apt::Lists::update(sh, scratch.path(), &[stock.suite], apt::Installed::Nothing)?;
    let package = version.replace("linux-binary-", "linux-modules-").replace(' ', "=");
    let record = lists.record(sh, &package).with_context(|| {
        let kernel = folder.with_file_name("").display().to_string();
        format!("{} has a newer kernel than {version}: remove {kernel} to have it fetched", stock.suite)
    })?;
    eprintln!("fetching the modules of the stock kernel {name} ({package}, {} MB, once)", record.size()? / 1_000_000);
    let deb = lists.fetch(sh, &record, scratch.path())?;
    let (root, staging) = (scratch.path().join("root"), scratch.path().join("modules"));
    fs::create_dir_all(&root)?;
    apt::extract_some(&deb, &root, set.patterns)?;
    modules::take(&root, &staging, set).with_context(|| format!("the modules in {package}"))?;
    cache::publish(&staging, folder)
}

/// The static busybox of our guests, fetched first if need be.
///
/// # Errors
/// No way to fetch it.
pub fn busybox(sh: &Shell) -> Result<PathBuf> {
    let busybox = cache::dir()?.join("busybox").join("busybox");
    if !busybox.is_file() {
        let _lock = cache::lock("busybox")?;
        if !busybox.is_file() {
            fetch_busybox(sh, &busybox).context("cannot fetch busybox; an initramfs can be named with --ramdisk")?;
        }
    }
    Ok(busybox)
}

fn fetch_busybox(sh: &Shell, target: &Path) -> Result<()> {
    let scratch = cache::scratch()?;
    let lists = apt::Lists::update(sh, scratch.path(), &["bookworm"], apt::Installed::Nothing)?;
    let record = lists.record(sh, "busybox-static")?;
    eprintln!("fetching busybox {} for the guests' initramfs (1 MB, once)", record.field("Version")?);
    let deb = lists.fetch(sh, &record, scratch.path())?;
    let root = scratch.path().join("root");
    apt::extract(sh, &deb, &root)?;
    let file = find(&root.join("bin"), "busybox").or_else(|| find(&root.join("usr/bin"), "busybox"));
    cache::publish(&file.context("busybox-static holds no busybox")?, target)
}
