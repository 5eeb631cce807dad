//! A container image as a guest: a disk that is made of the image's layers, and a second, small one, which says what process
//! the guest starts and on which the guest says how the process ended (see [`container_init`]).
//!
//! ```text
//! layout   folder or archive: index, manifest, configuration, layers; every digest is checked
//! layer    unpacked into scratch files
//! tree     layers applied in memory: whiteouts, links, owners
//! archive  the tree as one tar, unpacked by root or by the root of a user namespace; mke2fs makes a file system of it
//! config   user, environment, program
//! ```
//!
//! The disk is kept in the cache by the manifest's digest, and is only read: what the process writes is kept in the guest's
//! memory.

mod archive;
mod config;
mod layer;
mod layout;
#[cfg(test)]
mod tests;
mod tree;

use crate::debian::User;
use crate::{build, cache, ext4, kernels};
use anyhow::{Context, Result, bail, ensure};
use container_init::{End, Process};
use layout::{Descriptor, Digest, Layout, Manifest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tempfile::TempDir;
use toolstack::config::{Action, GuestConfig};
use toolstack::vif::VifConfig;
use tree::Tree;
use xshell::{Shell, cmd};

/// The version of what is made of an image: the number grows when another disk is made of the same image.
const VERSION: u32 = 1;
const DISK: &str = "disk.img";
const WISHES: &str = "process.json";
const EXCHANGE: &str = "exchange.img";
const GUEST: &str = "guest.toml";
/// The kernel of these guests.
const KERNEL: &str = kernels::DEFAULT;
/// The first program of these guests.
const INIT: &str = "container-init";
/// What the guest's kernel starts when dom0 asks the guest to end: the process ends first.
const POWEROFF: &str = "#!/bin/busybox sh\nexec /bin/busybox kill -TERM 1\n";
const REBOOT: &str = "#!/bin/busybox sh\n: > /run/reboot\nexec /bin/busybox kill -TERM 1\n";

/// Unpacks an archive from standard input into the folder `$1`. Then makes a file system of `$4` files of the folder in the
/// file `$3` by the program `$2`, and removes the folder. Nobody writes the file system, so it needs no journal.
const UNPACK: &str = r#"trap 'rm -rf --one-file-system "$1"' EXIT
tar --extract --preserve-permissions --numeric-owner --absolute-names --xattrs --xattrs-include='*' --directory "$1"
"$2" -q -F -t ext4 -b 4096 -m 0 -O ^has_journal -N "$4" -d "$1" "$3""#;

/// A guest that is wanted of an image.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// The layout: a folder or an archive, perhaps followed by `:NAME`.
    pub image: &'a Path,
    /// Words that replace the image's command.
    pub command: &'a [String],
    /// The guest's name.
    pub name: &'a str,
    /// MiB of the guest's memory.
    pub memory: u32,
    /// How many vcpus it has.
    pub vcpus: u32,
    /// The kernel's command line.
    pub extra: String,
    /// Its network device, if it has one.
    pub vif: Option<VifConfig>,
    /// MiB of its memory for what the process writes; `None` for half of the memory.
    pub written: Option<u32>,
}

/// A guest that runs the process of an image. Its files, but for the image's disk, are removed when this is dropped.
#[derive(Debug)]
pub struct Container {
    folder: TempDir,
}

/// What the cache keeps beside a disk.
#[derive(Deserialize, Serialize)]
struct Made {
    wishes: config::Wishes,
    user: config::User,
}

impl Container {
    /// Makes the guest, and first the disk of its image if that is not in the cache.
    ///
    /// # Errors
    /// What is wrong with the image, what it asks for and a guest cannot give, or why no disk can be made.
    pub fn make(sh: &Shell, wanted: &Wanted<'_>) -> Result<Self> {
        let Wanted { image, command, name, memory, written, .. } = *wanted;
        ensure!(
            written.is_none_or(|mib| mib < memory),
            "--overlay: {} MiB of a guest with {memory} MiB",
            written.unwrap_or(0)
        );
        let cached = disk_of(sh, image).with_context(|| format!("--oci {}", image.display()))?;
        let Made { wishes, user } = serde_json::from_slice(&fs::read(cached.join(WISHES))?)?;
        let process = wishes.process(&user, name, command).with_context(|| format!("--oci {}", image.display()))?;
        wishes.notes(name).iter().for_each(|note| eprintln!("note: {note}"));
        let ramdisk = ramdisk(sh)?;
        // Paths in a description start in its folder.
        let folder = cache::scratch()?;
        let process = Process { written_mib: written, ..process };
        fs::write(folder.path().join(EXCHANGE), process.to_disk()?)?;
        let cached = cached.file_name().and_then(|name| name.to_str()).context("a folder without a name")?;
        let disks = [format!("../oci/{cached}/{DISK},,xvda,r"), format!("{EXCHANGE},,xvdb,w")];
        let config = GuestConfig {
            vcpus: wanted.vcpus,
            ramdisk: Some(ramdisk.to_str().context("a path that is no text")?.to_owned()),
            extra: wanted.extra.clone(),
            on_reboot: Action::Restart,
            disk: disks.iter().map(|disk| disk.parse()).collect::<Result<_, _>>().map_err(anyhow::Error::msg)?,
            vif: wanted.vif.clone().into_iter().collect(),
            ..GuestConfig::new(name, memory.into(), KERNEL)
        };
        fs::write(folder.path().join(GUEST), config.to_toml())?;
        Ok(Self { folder })
    }

    /// The file that describes the guest.
    #[must_use]
    pub fn guest(&self) -> PathBuf {
        self.folder.path().join(GUEST)
    }

    /// How the process ended, once the guest has.
    ///
    /// # Errors
    /// The guest has not told, or wrote something else.
    pub fn end(&self) -> Result<End> {
        let disk = fs::read(self.folder.path().join(EXCHANGE))?;
        End::of_disk(&disk)
            .context("the guest told something else than an end")?
            .context("the guest told no end of its process")
    }
}

/// The initramfs of these guests, built first if need be.
fn ramdisk(sh: &Shell) -> Result<PathBuf> {
    let static_program = ["-C", "target-feature=+crt-static", "-C", "strip=symbols"];
    cmd!(sh, "cargo rustc --quiet --release --package {INIT} --bin {INIT} -- {static_program...}").quiet().run()?;
    let program = fs::read(build::target_dir(sh)?.join("release").join(INIT))?;
    let mut files = BTreeMap::from([(format!("bin/{INIT}"), program)]);
    for (place, module) in kernels::overlay_modules(sh, KERNEL)?.iter().enumerate() {
        files.insert(format!("lib/container/{place:02}.ko"), fs::read(module)?);
    }
    for (name, script) in [("sbin/poweroff", POWEROFF), ("sbin/reboot", REBOOT)] {
        files.insert(name.to_owned(), script.as_bytes().to_vec());
    }
    kernels::ramdisk_with(sh, KERNEL, &files)
}

/// Opens a layout. The last `:NAME` names an image in it, unless there is a file with the whole name.
fn open(image: &Path) -> Result<(Digest, Manifest, Layout)> {
    let text = image.to_string_lossy();
    let (path, name) = match text.rsplit_once(':') {
        Some((path, name)) if !image.exists() => (Path::new(path), Some(name)),
        _ => (image, None),
    };
    let layout = Layout::open(path)?;
    let (digest, manifest) = layout.manifest(name)?;
    Ok((digest, manifest, layout))
}

/// Returns the folder of the cache with an image's disk, which is made now if it is not there.
fn disk_of(sh: &Shell, image: &Path) -> Result<PathBuf> {
    let (digest, manifest, layout) = open(image)?;
    let folder = cache::dir()?.join("oci").join(format!("{}-{VERSION}", digest.digits()));
    if cache::has(&folder) {
        return Ok(folder);
    }
    let _lock = cache::lock("oci")?;
    if cache::has(&folder) {
        return Ok(folder);
    }
    let unpacker = User::find()?;
    let scratch = cache::scratch()?;
    let staging = scratch.path().join("made");
    fs::create_dir(&staging)?;
    let (tree, mut layers, wishes) = read(&layout, &manifest, scratch.path())?;
    let user = wishes.user(|path| config::read(&tree, &layers, path))?;
    file_system(sh, unpacker, &tree, &mut layers, scratch.path(), &staging.join(DISK))?;
    fs::write(staging.join(WISHES), serde_json::to_vec(&Made { wishes, user })?)?;
    cache::publish_by_content(&staging, &folder)?;
    Ok(folder)
}

/// Unpacks the layers of an image into files of the folder `scratch`, and applies them.
fn read(layout: &Layout, manifest: &Manifest, scratch: &Path) -> Result<(Tree, Vec<File>, config::Wishes)> {
    let configuration: config::Configuration = layout.document(&manifest.config)?;
    let wishes = configuration.wishes()?;
    let (layers, digests) = (&manifest.layers, &configuration.rootfs.diff_ids);
    ensure!(layers.len() == digests.len(), "{} layers, and digests of {}", layers.len(), digests.len());
    let (mut tree, mut files, mut left) = (Tree::default(), Vec::new(), layer::MAX_BYTES);
    for (number, (descriptor, digest)) in layers.iter().zip(digests).enumerate() {
        let target = scratch.join(format!("layer-{number}"));
        left -= layer::unpack(layout, descriptor, &Digest::parse(digest)?, left, &target)?;
        let file = File::open(&target)?;
        let at = |descriptor: &Descriptor| format!("the layer {}", descriptor.digest());
        tree.apply(number, BufReader::new(&file)).with_context(|| at(descriptor))?;
        files.push(file);
    }
    Ok((tree, files, wishes))
}

/// Makes a file system of the files of an image in the file `image`.
fn file_system(
    sh: &Shell,
    unpacker: User,
    tree: &Tree,
    layers: &mut [File],
    scratch: &Path,
    image: &Path,
) -> Result<()> {
    let without_devices = unpacker == User::Namespace;
    let needs = archive::needs(tree, without_devices)?;
    if needs.devices > 0 {
        eprintln!("note: {} device files are left out: {} cannot make them", needs.devices, unpacker.name());
    }
    let mib = needs.bytes >> 20;
    eprintln!("making the file system of {} files and {mib} MiB as {} (once)", needs.files, unpacker.name());
    let inodes = needs.files + needs.files / 8 + 1024;
    // Tables of inodes, bitmaps and descriptors; what is not used takes no room in the file.
    let bytes = needs.bytes + needs.bytes / 16 + inodes * 256 + (64 << 20);
    File::create(image)?.set_len(bytes.next_multiple_of(1 << 20))?;
    let (root, log) = (scratch.join("root"), scratch.join("log"));
    fs::create_dir(&root)?;
    let tools = ext4::Tools::find(sh)?;
    let mut command = unpacker.command("sh");
    command.args(["-euc", UNPACK, "sh"]).arg(&root).arg(tools.maker()?).arg(image).arg(inodes.to_string());
    // tar shall not translate names.
    command.envs(tools.environment()).env("LC_ALL", "C").stdin(Stdio::piped()).stderr(File::create(&log)?);
    let mut child = command.spawn().context("cannot start sh")?;
    let input = child.stdin.take().context("sh without input")?;
    let written = archive::Writer::new(tree, layers, without_devices, std::io::BufWriter::new(input)).write();
    let status = child.wait()?;
    if !status.success() {
        let mut text = String::new();
        File::open(&log)?.take(1 << 20).read_to_string(&mut text)?;
        bail!("cannot make the file system: {}", text.lines().next().unwrap_or("no reason was told"));
    }
    written.context("cannot write the image's files")?;
    tools.check(image).context("the new file system")
}
