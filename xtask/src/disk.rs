//! Files of the host that become disks of the emulated machine.
//!
//! Each file is a virtio disk, known by its serial number. Files on the command line get the numbers `tenon0`, `tenon1` and so
//! on, in their order; a file that a guest's file names gets the number that [`serial`] makes of its path. QEMU completes a
//! flush when the file has all data, and reports errors to the emulated machine.

use crate::guest_file::Described;
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use toolstack::disk::{DiskConfig, Format as GuestFormat, Target};

/// What a description may consist of, for error messages.
const SYNTAX: &str = "a disk is FILE[,ro][,format=raw|qcow2]";
/// Bytes of a sector: the unit of a disk's size.
pub(crate) const SECTOR: u64 = 512;
/// The first bytes of a qcow2 file (QEMU's docs/interop/qcow2.txt).
const QCOW2: &[u8; 4] = b"QFI\xfb";
/// The number of bytes of a file's header that are read.
const HEADER: usize = 80;
/// The incompatible feature of a qcow2 file whose data is in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

/// How a file holds the sectors of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

/// A disk of the emulated machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    file: PathBuf,
    format: Format,
    read_only: bool,
    serial: String,
}

impl Disk {
    /// Parses `FILE[,ro][,format=raw|qcow2]`, and examines the file. Without a format, the file's header determines the format.
    /// [`Disk::read_all`] then sets the serial number.
    ///
    /// # Errors
    /// What is wrong with the description or the file.
    fn read(text: &str) -> Result<Self> {
        let (mut file, mut read_only, mut format) = (text, false, None);
        // The name of a file may contain commas, so options are taken from the end.
        while let Some((before, option)) = file.rsplit_once(',') {
            match option.split_once('=') {
                None if option == "ro" => read_only = true,
                None => break,
                Some(("format", "raw")) => format = Some(Format::Raw),
                Some(("format", "qcow2")) => format = Some(Format::Qcow2),
                Some(("cache", "unsafe")) => {
                    bail!("{text}: cache=unsafe forgets flushes, and with them what guests wrote")
                }
                Some(_) => bail!("{text}: no option {option}; {SYNTAX}"),
            }
            file = before;
        }
        ensure!(!file.is_empty(), "{text}: no file; {SYNTAX}");
        Self::open(Path::new(file), format, read_only, "give it read-only, as FILE,ro")
    }

    /// Makes the disk of the file at the path `file`, which the guest's description `config` names. The disk is read-only
    /// unless the description makes the guest write the file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn of_guest(file: &Path, config: &DiskConfig) -> Result<Self> {
        let format = match config.format {
            GuestFormat::Raw => Format::Raw,
            GuestFormat::Qcow2 => Format::Qcow2,
        };
        let read_only = !config.writes_target();
        let disk = Self::open(file, Some(format), read_only, "its access can be `r`")?;
        Ok(Self { serial: serial(&fs::canonicalize(file)?), ..disk })
    }

    /// Makes a disk without a serial number. `otherwise` is a hint for the error message about a file that cannot be written.
    fn open(file: &Path, format: Option<Format>, read_only: bool, otherwise: &str) -> Result<Self> {
        let format = examine(file, format).with_context(|| file.display().to_string())?;
        let writable = read_only || OpenOptions::new().write(true).open(file).is_ok();
        ensure!(writable, "{}: cannot be written; {otherwise}", file.display());
        Ok(Self { file: file.to_owned(), format, read_only, serial: String::new() })
    }

    /// Makes all disks that the command line gives to a machine.
    ///
    /// # Errors
    /// As [`Disk::read`]; or a file is given twice, and not read-only both times.
    pub fn read_all(texts: &[String]) -> Result<Vec<Self>> {
        let mut disks: Vec<(Self, PathBuf)> = Vec::new();
        for (number, text) in texts.iter().enumerate() {
            let disk = Self { serial: format!("tenon{number}"), ..Self::read(text)? };
            let real = fs::canonicalize(&disk.file).with_context(|| text.clone())?;
            let shared = |(other, file): &(Self, PathBuf)| *file == real && !(other.read_only && disk.read_only);
            ensure!(!disks.iter().any(shared), "{text}: the file is given twice, and not read-only both times");
            disks.push((disk, real));
        }
        Ok(disks.into_iter().map(|(disk, _)| disk).collect())
    }

    /// Adds the files that guests name to the disks of a machine. A file that several guests name is one disk, which is
    /// writable if one of these guests writes it. The guests' descriptions are changed to name the disks by their serial
    /// numbers.
    ///
    /// # Errors
    /// A file is also given on the command line, or two guests have it in different formats, or two files have the same serial
    /// number. The error names the place in the guest's file.
    pub fn add(disks: &mut Vec<Self>, guests: &mut [Described]) -> Result<()> {
        let given = disks.len();
        for guest in guests {
            for wanted in std::mem::take(&mut guest.disks) {
                let real = fs::canonicalize(&wanted.disk.file).with_context(|| wanted.at.clone())?;
                let known = |disk: &Self| fs::canonicalize(&disk.file).is_ok_and(|file| file == real);
                let (at, shown) = (&wanted.at, wanted.disk.file.display());
                let number = disks.iter().position(known);
                ensure!(number.is_none_or(|number| number >= given), "{at}: {shown} is given with --disk, too");
                match number.and_then(|number| disks.get_mut(number)) {
                    Some(disk) => {
                        ensure!(disk.format == wanted.disk.format, "{at}: {shown} has another format before");
                        disk.read_only &= wanted.disk.read_only;
                    }
                    None => {
                        let twice = disks.iter().find(|disk| disk.serial == wanted.disk.serial);
                        ensure!(twice.is_none(), "{at}: {shown} has by chance the serial number of another: rename it");
                        disks.push(wanted.disk.clone());
                    }
                }
                if let Some(config) = guest.config.disk.get_mut(wanted.number) {
                    (config.target, config.format) = (Target::Serial(wanted.disk.serial), GuestFormat::Raw);
                }
            }
        }
        Ok(())
    }

    /// Returns the path of the disk's file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Returns the arguments that give QEMU this disk as number `number`.
    #[must_use]
    pub fn arguments(&self, number: usize) -> [String; 4] {
        let name = format!("tenon{number}");
        let driver = match self.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        let read_only = if self.read_only { "on" } else { "off" };
        // In QEMU's syntax, a comma in a value is written twice.
        let file = self.file.as_os_str().to_string_lossy().replace(',', ",,");
        let both = format!("read-only={read_only},discard=unmap");
        [
            "-blockdev".into(),
            format!("driver={driver},node-name={name},{both},file.driver=file,file.discard=unmap,file.filename={file}"),
            "-device".into(),
            format!("virtio-blk-pci,drive={name},serial={},werror=report,rerror=report", self.serial),
        ]
    }
}

/// Returns the serial number for the file at `path`, which must be absolute: the beginning of the file's name, and a hash of
/// the path. The number has at most the 20 bytes of a virtio serial number.
#[must_use]
pub fn serial(path: &Path) -> String {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).take(8).collect();
    let hash = hash(path.as_os_str().as_encoded_bytes());
    format!("{}-{:011x}", if name.is_empty() { "disk" } else { &name }, hash >> 20)
}

/// Returns a number that is made of bytes, and does not change from build to build: FNV-1a.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Returns the format of a file that a guest can have as a disk.
///
/// # Errors
/// What is wrong with the file.
pub(crate) fn format(file: &Path) -> Result<GuestFormat> {
    let (_, header) = look(file)?;
    let qcow2 = header.starts_with(QCOW2);
    let format = if qcow2 { Format::Qcow2 } else { Format::Raw };
    examine(file, Some(format))?;
    Ok(if qcow2 { GuestFormat::Qcow2 } else { GuestFormat::Raw })
}

/// Returns the absolute path of a file that becomes a disk of the boot bundle.
///
/// # Errors
/// There is no such file, or the file is empty or has the format qcow2.
pub(crate) fn bundled(file: &Path) -> Result<PathBuf> {
    let examine = || -> Result<PathBuf> {
        let (metadata, header) = look(file)?;
        ensure!(metadata.len() > 0, "is empty");
        ensure!(!header.starts_with(QCOW2), "has the header of qcow2, and a disk in the bundle is raw");
        Ok(fs::canonicalize(file)?)
    };
    examine().with_context(|| file.display().to_string())
}

/// Returns the metadata and the first bytes of a regular file.
fn look(path: &Path) -> Result<(fs::Metadata, Vec<u8>)> {
    let metadata = fs::metadata(path).context("no such file")?;
    ensure!(!metadata.is_dir(), "is a directory");
    ensure!(metadata.is_file(), "is not a regular file");
    let mut header = Vec::new();
    File::open(path)?.take(HEADER as u64).read_to_end(&mut header)?;
    Ok((metadata, header))
}

/// Checks a file. Returns its format.
fn examine(path: &Path, wanted: Option<Format>) -> Result<Format> {
    let (metadata, header) = look(path)?;
    if !header.starts_with(QCOW2) {
        ensure!(wanted != Some(Format::Qcow2), "has no header of qcow2");
        let bytes = metadata.len();
        ensure!(
            bytes > 0 && bytes.is_multiple_of(SECTOR),
            "has {bytes} bytes; a raw disk is whole sectors of {SECTOR}, one at least"
        );
        return Ok(Format::Raw);
    }
    ensure!(wanted != Some(Format::Raw), "has the header of qcow2, and is not raw: say format=qcow2");
    let word = |at: usize| header.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
    let (version, bytes) = (word(4) >> 32, word(24));
    ensure!(matches!(version, 2 | 3), "has version {version} of qcow2; there are 2 and 3");
    ensure!(bytes > 0 && bytes.is_multiple_of(SECTOR), "holds {bytes} bytes, which are no whole sectors of {SECTOR}");
    // A guest may have written such a header itself, on a raw disk, to read files of this machine.
    let elsewhere = word(8) != 0 || version == 3 && word(72) & EXTERNAL_DATA != 0;
    ensure!(
        !elsewhere || wanted.is_some(),
        "has the header of qcow2, and names another file for its data: say format=qcow2 if that is meant"
    );
    Ok(Format::Qcow2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn qcow2(version: u32, backing: u64, bytes: u64) -> Vec<u8> {
        let mut header = vec![0; 512];
        header[..4].copy_from_slice(QCOW2);
        header[4..8].copy_from_slice(&version.to_be_bytes());
        header[8..16].copy_from_slice(&backing.to_be_bytes());
        header[24..32].copy_from_slice(&bytes.to_be_bytes());
        header
    }

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut external = qcow2(3, 0, 1 << 20);
        external[79] = 4;
        for (name, bytes) in [
            ("raw.img", vec![0; 1024]),
            ("with,comma.img", vec![0; 512]),
            ("odd.img", vec![0; 1000]),
            ("empty.img", Vec::new()),
            ("a.qcow2", qcow2(3, 0, 1 << 20)),
            ("old.qcow2", qcow2(1, 0, 1 << 20)),
            ("odd.qcow2", qcow2(2, 0, 1000)),
            ("short.qcow2", QCOW2.to_vec()),
            ("backed.qcow2", qcow2(2, 104, 1 << 20)),
            ("external.qcow2", external),
        ] {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        fs::create_dir(folder.path().join("folder")).unwrap();
        folder
    }

    #[test]
    fn a_disk_is_known_by_its_header_or_its_format() {
        let folder = folder();
        let read = |text: &str| {
            let disk = Disk::read(&format!("{}/{text}", folder.path().display())).unwrap();
            assert!(disk.file.is_file());
            (disk.format, disk.read_only)
        };
        assert_eq!(read("raw.img"), (Format::Raw, false));
        assert_eq!(read("raw.img,format=raw,ro"), (Format::Raw, true));
        assert_eq!(read("with,comma.img,ro"), (Format::Raw, true));
        assert_eq!(read("a.qcow2,ro"), (Format::Qcow2, true));
        assert_eq!(read("backed.qcow2,format=qcow2"), (Format::Qcow2, false));
    }

    #[test]
    fn bad_disks_are_refused_by_name() {
        let folder = folder();
        let refusal = |text: &str| {
            let error = Disk::read(&format!("{}/{text}", folder.path().display())).unwrap_err();
            format!("{error:#}").replace(&format!("{}/", folder.path().display()), "")
        };
        for (text, why) in [
            ("none.img", "none.img: no such file"),
            ("raw.img,rw", "raw.img,rw: no such file"),
            ("folder", "folder: is a directory"),
            ("odd.img,ro", "odd.img: has 1000 bytes"),
            ("empty.img", "empty.img: has 0 bytes"),
            ("a.qcow2,format=raw", "a.qcow2: has the header of qcow2, and is not raw"),
            ("raw.img,format=qcow2", "raw.img: has no header of qcow2"),
            ("old.qcow2", "old.qcow2: has version 1 of qcow2"),
            ("odd.qcow2", "odd.qcow2: holds 1000 bytes"),
            ("short.qcow2", "short.qcow2: has version 0 of qcow2"),
            ("backed.qcow2", "backed.qcow2: has the header of qcow2, and names another file"),
            ("external.qcow2", "external.qcow2: has the header of qcow2, and names another file"),
            ("raw.img,cache=unsafe", "raw.img,cache=unsafe: cache=unsafe forgets flushes"),
            ("raw.img,format=vmdk", "raw.img,format=vmdk: no option format=vmdk; a disk is FILE[,ro]"),
        ] {
            let refusal = refusal(text);
            assert!(refusal.starts_with(why), "{refusal} is not: {why}");
        }
        assert!(Disk::read(",ro").unwrap_err().to_string().contains("no file"));
    }

    #[test]
    fn a_file_is_written_as_one_disk() {
        let folder = folder();
        let all = |options: [&str; 2]| {
            let texts = options.map(|option| format!("{}/raw.img{option}", folder.path().display()));
            Disk::read_all(&texts).map(|disks| disks.len()).map_err(|error| error.to_string())
        };
        assert_eq!(all([",ro", ",ro"]), Ok(2));
        for options in [["", ""], [",ro", ""], ["", ",ro"]] {
            assert!(all(options).unwrap_err().contains("given twice"));
        }
    }

    #[test]
    fn serial_numbers_stay_and_fit() {
        let serial = |path: &str| serial(Path::new(path));
        assert_eq!(serial("/images/root.img"), "root-2c579397c9b");
        assert_ne!(serial("/images/root.img"), serial("/other/root.img"));
        assert!(serial("/a/a very long name of an image.qcow2").len() == 20 && serial("/.").starts_with("disk-"));
    }

    #[test]
    fn a_file_that_cannot_be_written_is_no_disk_to_write() {
        let folder = folder();
        let path = folder.path().join("raw.img");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        // Root writes it all the same.
        if OpenOptions::new().write(true).open(&path).is_err() {
            let why = Disk::read(&path.to_string_lossy()).unwrap_err().to_string();
            assert!(why.contains("cannot be written; give it read-only"), "{why}");
        }
        assert!(Disk::read(&format!("{},ro", path.display())).is_ok());
    }

    #[test]
    fn qemu_learns_the_file_and_the_serial_number() {
        let disk = Disk { file: "a,b.img".into(), format: Format::Raw, read_only: true, serial: "x-1".into() };
        let [_, blockdev, _, device] = disk.arguments(7);
        assert!(blockdev.starts_with("driver=raw,node-name=tenon7,read-only=on,"), "{blockdev}");
        assert!(blockdev.ends_with(",file.filename=a,,b.img") && !blockdev.contains("cache"), "{blockdev}");
        assert!(device.starts_with("virtio-blk-pci,drive=tenon7,serial=x-1,"), "{device}");
    }
}
