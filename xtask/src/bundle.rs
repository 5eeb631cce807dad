//! The boot bundle: the one module the hypervisor is started with, a `newc` cpio archive.
//!
//! The hypervisor reads the entries of the first domain, dom0's toolstack those of the guests:
//!
//! | entry | content |
//! | --- | --- |
//! | `dom0` | dom0, planned: see [`hypercall_abi::first`]; its ramdisk is the whole bundle |
//! | `dom0.cmdline` | its command line, which is in the plan as well |
//! | `dom0.exec` | commands for dom0, separated by `;` (optional) |
//! | `dom0.forwards` | connections from outside that lead to guests, one a line (optional) |
//! | `guests/<name>/config` | what the guest should be, as [`GuestConfig::to_toml`] writes it |
//! | `guests/<name>/kernel` | the guest's kernel, bzImage, ELF or gzip'ed ELF |
//! | `guests/<name>/ramdisk` | its initial ramdisk (optional) |
//! | `disks/<serial>` | a disk that is only read, of one guest or more: whole sectors, see [`crate::disk::serial`] |
//! | `first`, `first.ramdisk` | instead of `dom0`: another kernel as the first domain, planned, and its ramdisk (optional) |
//!
//! `kernel` and `ramdisk` in a configuration name entries of the bundle. Entries are regular files; there are no
//! directories, and the order means nothing.

use crate::disk::SECTOR;
use crate::first::{self, Role};
use crate::guest_file::Described;
use anyhow::{Context, Result};
use cpio::{NewcBuilder, newc};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::{fs, io};
use toolstack::bundle::{EXEC, FORWARDS};
use toolstack::config::GuestConfig;
use toolstack::forward::Forward;
use toolstack::vif::VifConfig;

const REGULAR_FILE: u32 = 0o100_644;

/// A bundle being put together.
#[derive(Clone, Debug, Default)]
pub struct Bundle {
    entries: Vec<(String, Content)>,
}

#[derive(Clone, Debug)]
enum Content {
    Text(String),
    File(PathBuf),
    /// A file that is filled up with zeros to whole sectors.
    Disk(PathBuf),
    /// The first domain, to be planned when the archive is written.
    First {
        kernel: PathBuf,
        cmdline: String,
        /// `None`: [`FIRST_MEMORY`], or for dom0 what [`DOM0_SPARE`] says.
        memory_mib: Option<u64>,
        role: Role,
    },
}

/// The first domain's memory in MiB unless [`Bundle::first_memory`] says otherwise.
const FIRST_MEMORY: u64 = 256;
/// What dom0 starts with in MiB beside the bundle, which is its ramdisk. It takes more from the hypervisor when it needs
/// more, for instance to unpack a kernel, and gives that back.
pub const DOM0_SPARE: u64 = 8;

/// A guest that dom0 starts.
#[derive(Clone, Debug)]
pub struct Guest {
    /// What the domain is called.
    pub name: String,
    /// Its memory in MiB.
    pub memory: u32,
    /// How many virtual CPUs it has.
    pub vcpus: u32,
    /// The kernel file.
    pub kernel: PathBuf,
    /// The initial ramdisk, if it has one.
    pub ramdisk: Option<PathBuf>,
    /// The kernel's command line.
    pub extra: String,
    /// Its network devices.
    pub vif: Vec<VifConfig>,
}

impl Bundle {
    /// A bundle whose first domain is dom0.
    #[must_use]
    pub fn dom0(elf: &Path, cmdline: &str) -> Self {
        Self::default().with_first("dom0", elf, cmdline, Role::Dom0).with_text("dom0.cmdline", cmdline)
    }

    /// A bundle whose first domain is a kernel of its own.
    #[must_use]
    pub fn first(kernel: &Path, ramdisk: Option<&Path>, cmdline: &str) -> Self {
        let bundle = Self::default().with_first("first", kernel, cmdline, Role::Guest);
        match ramdisk {
            Some(ramdisk) => bundle.with_file("first.ramdisk", ramdisk),
            None => bundle,
        }
    }

    fn with_first(mut self, name: &str, kernel: &Path, cmdline: &str, role: Role) -> Self {
        let (kernel, cmdline) = (kernel.to_owned(), cmdline.to_owned());
        self.entries.push((name.to_owned(), Content::First { kernel, cmdline, memory_mib: None, role }));
        self
    }

    /// Leads connections from outside to guests.
    #[must_use]
    pub fn forwards(self, forwards: &[Forward]) -> Self {
        if forwards.is_empty() {
            return self;
        }
        let text: String = forwards.iter().map(|forward| format!("{forward}\n")).collect();
        self.with_text(FORWARDS, &text)
    }

    /// Gives the first domain so many MiB.
    #[must_use]
    pub fn first_memory(mut self, mib: u64) -> Self {
        for (_, content) in &mut self.entries {
            if let Content::First { memory_mib, .. } = content {
                *memory_mib = Some(mib);
            }
        }
        self
    }

    /// Adds a guest for dom0 to start.
    #[must_use]
    pub fn guest(self, guest: &Guest) -> Self {
        let config = GuestConfig {
            vcpus: guest.vcpus,
            extra: guest.extra.clone(),
            vif: guest.vif.clone(),
            ..GuestConfig::new(&guest.name, guest.memory.into(), "")
        };
        self.with_guest(config, &guest.kernel, guest.ramdisk.as_deref())
    }

    /// Adds a guest that a file describes.
    #[must_use]
    pub fn described(self, guest: &Described) -> Self {
        let mut bundle = self.with_guest(guest.config.clone(), &guest.kernel, guest.ramdisk.as_deref());
        for (name, file) in &guest.images {
            // Guests may share a disk.
            if bundle.entries.iter().all(|(known, _)| known != name) {
                bundle.entries.push((name.clone(), Content::Disk(file.clone())));
            }
        }
        bundle
    }

    /// Adds a guest with a configuration of its own. The names of its kernel and ramdisk are set here. Guests that have the
    /// same file share an entry.
    #[must_use]
    pub fn with_guest(self, mut config: GuestConfig, kernel: &Path, ramdisk: Option<&Path>) -> Self {
        let folder = format!("guests/{}", config.name);
        let mut bundle = self;
        config.kernel = bundle.share(format!("{folder}/kernel"), kernel);
        config.ramdisk = ramdisk.map(|ramdisk| bundle.share(format!("{folder}/ramdisk"), ramdisk));
        bundle.with_text(&format!("{folder}/config"), &config.to_toml())
    }

    /// Returns the name of an entry with the content of a file. If there is none yet, an entry of the name `name` is added.
    fn share(&mut self, name: String, file: &Path) -> String {
        let same = |content: &Content| matches!(content, Content::File(known) if known == file);
        if let Some((known, _)) = self.entries.iter().find(|(_, content)| same(content)) {
            return known.clone();
        }
        self.entries.push((name.clone(), Content::File(file.to_owned())));
        name
    }

    /// Adds commands, separated by `;`, that dom0 carries out when it has made the guests.
    #[must_use]
    pub fn exec(self, commands: &str) -> Self {
        self.with_text(EXEC, commands)
    }

    /// Adds an entry with the content of a file.
    #[must_use]
    pub fn with_file(mut self, name: &str, file: &Path) -> Self {
        self.entries.push((name.to_owned(), Content::File(file.to_owned())));
        self
    }

    /// Adds an entry with the given text.
    #[must_use]
    pub fn with_text(mut self, name: &str, text: &str) -> Self {
        self.entries.push((name.to_owned(), Content::Text(text.to_owned())));
        self
    }

    /// Writes the archive to a temporary file that disappears with the returned value.
    ///
    /// # Errors
    /// A part that cannot be read or is 4 GiB or larger, or no room for the archive.
    pub fn write(&self) -> Result<tempfile::NamedTempFile> {
        let file = tempfile::Builder::new().prefix("tenon-bundle-").suffix(".cpio").tempfile()?;
        let mut out = BufWriter::new(file.reopen()?);
        self.archive(&mut out).context("cannot write the boot bundle")?;
        out.flush().context("cannot write the boot bundle")?;
        Ok(file)
    }

    /// The size of all files in MiB; one that cannot be read is found when it is written.
    #[must_use]
    pub fn files_mib(&self) -> u64 {
        let size = |content: &Content| match content {
            Content::File(path) | Content::Disk(path) => fs::metadata(path).map_or(0, |metadata| metadata.len()),
            Content::Text(_) | Content::First { .. } => 0,
        };
        self.entries.iter().map(|(_, content)| size(content)).sum::<u64>().div_ceil(1 << 20)
    }

    fn archive(&self, out: impl Write) -> Result<()> {
        let out = &mut Counting { out, bytes: 0 };
        for (name, content) in &self.entries {
            if matches!(content, Content::Disk(_)) {
                align(out, name)?;
            }
            let header = NewcBuilder::new(name).mode(REGULAR_FILE);
            match content {
                Content::Text(text) => {
                    let mut entry = header.write(&mut *out, size(name, text.len() as u64)?);
                    entry.write_all(text.as_bytes())?;
                    entry.finish()?;
                }
                Content::First { kernel, cmdline, memory_mib, role } => {
                    let memory = memory_mib.unwrap_or(match role {
                        Role::Dom0 => DOM0_SPARE + self.files_mib(),
                        Role::Guest => FIRST_MEMORY,
                    });
                    let planned = first::image(kernel, memory, cmdline, *role)?;
                    let mut entry = header.write(&mut *out, size(name, planned.len() as u64)?);
                    entry.write_all(&planned)?;
                    entry.finish()?;
                }
                Content::File(path) | Content::Disk(path) => {
                    let at = || format!("cannot read {} for {name}", path.display());
                    let length = fs::metadata(path).with_context(at)?.len();
                    let sectors = matches!(content, Content::Disk(_));
                    let whole = if sectors { length.next_multiple_of(SECTOR) } else { length };
                    let mut entry = header.write(&mut *out, size(name, whole)?);
                    let rest = io::repeat(0).take(whole - length);
                    let file = File::open(path).with_context(at)?.take(length);
                    io::copy(&mut file.chain(rest), &mut entry).with_context(at)?;
                    entry.finish()?;
                }
            }
        }
        newc::trailer(out)?;
        Ok(())
    }
}

/// Counts the bytes that are written.
struct Counting<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Bytes of an entry with this name before its content, which begins at a multiple of four.
fn head(name: &str) -> u64 {
    (110 + name.len() as u64 + 1).next_multiple_of(4)
}

/// Writes an entry that nobody reads, so that the content of the next entry, `name`, begins at a multiple of a sector.
fn align(out: &mut Counting<impl Write>, name: &str) -> Result<()> {
    const FILLER: &str = "filler";
    let before = out.bytes + head(FILLER) + head(name);
    let zeroes = before.next_multiple_of(SECTOR) - before;
    let mut entry = NewcBuilder::new(FILLER).mode(REGULAR_FILE).write(out, size(FILLER, zeroes)?);
    io::copy(&mut io::repeat(0).take(zeroes), &mut entry)?;
    entry.finish()?;
    Ok(())
}

fn size(name: &str, length: u64) -> Result<u32> {
    u32::try_from(length).with_context(|| format!("{name} has {length} bytes, and an archive entry less than 4 GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn read_back(bundle: &Bundle) -> BTreeMap<String, Vec<u8>> {
        let mut file = bundle.write().unwrap().reopen().unwrap();
        let mut found = BTreeMap::new();
        loop {
            let mut reader = newc::Reader::new(file).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let name = reader.entry().name().to_owned();
            let mut data = Vec::new();
            reader.read_to_end(&mut data).unwrap();
            found.insert(name, data);
            file = reader.finish().unwrap();
        }
    }

    #[test]
    fn a_guest_has_kernel_ramdisk_and_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let [dom0, kernel, ramdisk] = ["dom0", "kernel", "ramdisk"].map(|name| dir.path().join(name));
        for (path, text) in [(&dom0, "D"), (&kernel, "KERNEL"), (&ramdisk, "ramdisk of a guest")] {
            fs::write(path, text).unwrap();
        }
        let bundle = Bundle::default().with_file("dom0", &dom0).with_text("dom0.cmdline", "verbose");
        let guest = Guest {
            name: "web".into(),
            memory: 128,
            vcpus: 1,
            kernel,
            ramdisk: Some(ramdisk),
            extra: "quiet \"a b\"".into(),
            vif: Vec::new(),
        };
        let entries = read_back(&bundle.guest(&guest));
        assert_eq!(entries["dom0"], b"D");
        assert_eq!(entries["dom0.cmdline"], b"verbose");
        assert_eq!(entries["guests/web/kernel"], b"KERNEL");
        assert_eq!(entries["guests/web/ramdisk"], b"ramdisk of a guest");
        let config = GuestConfig::parse(&String::from_utf8_lossy(&entries["guests/web/config"])).unwrap();
        assert_eq!((config.name.as_str(), config.memory, config.maxmem, config.vcpus), ("web", 128, 128, 1));
        assert_eq!(
            (config.kernel.as_str(), config.ramdisk.as_deref()),
            ("guests/web/kernel", Some("guests/web/ramdisk"))
        );
        assert_eq!(config.extra, guest.extra);
        assert_eq!(entries.len(), 5);
    }

    /// Whatever a file may say arrives at dom0 as it was.
    #[test]
    fn a_described_guest_is_read_back_by_dom0() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        fs::write(&kernel, "KERNEL").unwrap();
        let text = "name = 'web'\nmemory = 64\nmaxmem = 96\nvcpus = 2\nkernel = 'kernel'\nextra = \"a\\tb \\\"c\\\\\"\n\
                    on_poweroff = 'restart'\non_reboot = 'preserve'\non_crash = 'restart'\non_watchdog = 'preserve'\n";
        let config = GuestConfig::parse(text).unwrap();
        let image = dir.path().join("image");
        fs::write(&image, [7; 700]).unwrap();
        let described = Described {
            config: config.clone(),
            kernel,
            ramdisk: None,
            memory_at: String::new(),
            room: 0,
            stock: None,
            disks: Vec::new(),
            images: vec![("disks/image-1".into(), image)],
        };
        // Two guests may have the image.
        let bundle = Bundle::default().described(&described).described(&described).exec("list; info");
        assert_eq!(bundle.entries.iter().filter(|(name, _)| name == "disks/image-1").count(), 1);
        let mut archive = Vec::new();
        bundle.archive(&mut archive).unwrap();
        let place = archive.windows(700).position(|bytes| bytes == [7; 700]).unwrap();
        assert_eq!(place % 512, 0, "a disk begins with a sector of the archive");
        let entries = read_back(&bundle);
        assert_eq!(entries["dom0.exec"], b"list; info");
        assert_eq!(entries["disks/image-1"], [&[7; 700][..], &[0; 324]].concat());
        let text = String::from_utf8_lossy(&entries["guests/web/config"]);
        let read = GuestConfig::parse(&text).unwrap();
        assert_eq!(read, GuestConfig { kernel: "guests/web/kernel".into(), ..config });
    }

    #[test]
    fn a_missing_part_is_named() {
        let error = Bundle::first(Path::new("no/such/kernel"), None, "").write().unwrap_err();
        assert!(format!("{error:#}").contains("no/such/kernel"), "{error:#}");
    }
}
