//! Files of this machine that become disks of the emulated one.
//!
//! Each is a virtio disk, known by its serial number: `tenon0`, `tenon1` and so on, in the order in which the disks are given. QEMU
//! keeps a flush until the file has everything, and reports errors to whoever asked.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};

/// What a description may consist of, for error messages.
const SYNTAX: &str = "a disk is FILE[,ro][,format=raw|qcow2]";
/// Bytes of a sector: the unit of a disk's size.
const SECTOR: u64 = 512;
/// The first bytes of a qcow2 file (QEMU's docs/interop/qcow2.txt).
const QCOW2: &[u8; 4] = b"QFI\xfb";
/// Bytes of the header that are looked at.
const HEADER: usize = 80;
/// In the incompatible features of a qcow2 file: the data is in another file.
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
}

impl Disk {
    /// Reads `FILE[,ro][,format=raw|qcow2]`, and looks at the file. Without a format, the file's header says which it is.
    ///
    /// # Errors
    /// What is wrong with the description or the file.
    pub fn read(text: &str) -> Result<Self> {
        let (mut file, mut read_only, mut format) = (text, false, None);
        // A name may have commas of its own: options are taken from the end.
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
        let (file, shown) = (PathBuf::from(file), file);
        let format = examine(&file, format).with_context(|| shown.to_owned())?;
        let writable = read_only || OpenOptions::new().write(true).open(&file).is_ok();
        ensure!(writable, "{shown}: cannot be written; {shown},ro is a disk that nobody writes");
        Ok(Self { file, format, read_only })
    }

    /// Reads all disks of a machine.
    ///
    /// # Errors
    /// As [`Disk::read`]; or a file that one of them writes is given twice.
    pub fn read_all(texts: &[String]) -> Result<Vec<Self>> {
        let mut disks: Vec<(Self, PathBuf)> = Vec::new();
        for text in texts {
            let disk = Self::read(text)?;
            let real = fs::canonicalize(&disk.file).with_context(|| text.clone())?;
            let shared = |(other, file): &(Self, PathBuf)| *file == real && !(other.read_only && disk.read_only);
            ensure!(!disks.iter().any(shared), "{text}: the file is given twice, and not read-only both times");
            disks.push((disk, real));
        }
        Ok(disks.into_iter().map(|(disk, _)| disk).collect())
    }

    /// The arguments for QEMU that make this the disk of this number.
    #[must_use]
    pub fn arguments(&self, number: usize) -> [String; 4] {
        let name = format!("tenon{number}");
        let driver = match self.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        let read_only = if self.read_only { "on" } else { "off" };
        // A comma in an option's value is written twice.
        let file = self.file.as_os_str().to_string_lossy().replace(',', ",,");
        let both = format!("read-only={read_only},discard=unmap");
        [
            "-blockdev".into(),
            format!("driver={driver},node-name={name},{both},file.driver=file,file.discard=unmap,file.filename={file}"),
            "-device".into(),
            format!("virtio-blk-pci,drive={name},serial={name},werror=report,rerror=report"),
        ]
    }
}

/// The format of a file, which is as it should be.
fn examine(path: &Path, wanted: Option<Format>) -> Result<Format> {
    let metadata = fs::metadata(path).context("no such file")?;
    ensure!(!metadata.is_dir(), "is a directory");
    ensure!(metadata.is_file(), "is not a regular file");
    let mut header = Vec::new();
    File::open(path)?.take(HEADER as u64).read_to_end(&mut header)?;
    if !header.starts_with(QCOW2) {
        ensure!(wanted != Some(Format::Qcow2), "has no header of qcow2");
        let bytes = metadata.len();
        ensure!(
            bytes > 0 && bytes.is_multiple_of(SECTOR),
            "has {bytes} bytes; a raw disk is whole sectors of {SECTOR}, one at least"
        );
        return Ok(Format::Raw);
    }
    ensure!(wanted != Some(Format::Raw), "has the header of qcow2, and is not raw");
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
    fn a_file_that_cannot_be_written_is_no_disk_to_write() {
        let folder = folder();
        let path = folder.path().join("raw.img");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        // Root writes it all the same.
        if OpenOptions::new().write(true).open(&path).is_err() {
            let why = Disk::read(&path.to_string_lossy()).unwrap_err().to_string();
            assert!(why.contains("cannot be written"), "{why}");
        }
        assert!(Disk::read(&format!("{},ro", path.display())).is_ok());
    }

    #[test]
    fn qemu_learns_the_file_and_the_serial_number() {
        let disk = Disk { file: "a,b.img".into(), format: Format::Raw, read_only: true };
        let [_, blockdev, _, device] = disk.arguments(7);
        assert!(blockdev.starts_with("driver=raw,node-name=tenon7,read-only=on,"), "{blockdev}");
        assert!(blockdev.ends_with(",file.filename=a,,b.img") && !blockdev.contains("cache"), "{blockdev}");
        assert!(device.starts_with("virtio-blk-pci,drive=tenon7,serial=tenon7,"), "{device}");
    }
}
