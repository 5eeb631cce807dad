//! Small volumes that are only read, in the format of CDs: ECMA-119 (ISO 9660) with the names of Joliet.
//!
//! ```text
//! sector 16  17      18          19 20       21 22       23          24         25 ...
//!        |   |       |           |           |           |           |          |
//!        ISO Joliet  terminator  ISO paths   Joliet      ISO root    Joliet     files
//!        volume descriptors      (LE, BE)    paths       folder      root
//! ```

use anyhow::{Context, Result, ensure};

/// Bytes of a sector.
const SECTOR: usize = 2048;
const PATHS: [usize; 2] = [19, 21];
const FOLDERS: [usize; 2] = [23, 24];
const FILES: usize = 25;
/// Bytes of a table with the path of the root folder alone.
const PATHS_BYTES: u32 = 10;
/// The time of all files: the volume depends on its content alone. 2000-01-01.
const TIME: [u8; 7] = [100, 1, 1, 0, 0, 0, 0];

/// Which names a part of the volume has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    /// Capital letters, as a reader without Joliet expects them.
    Iso,
    /// UCS-2, with capital and small letters.
    Joliet,
}

impl Names {
    const BOTH: [Self; 2] = [Self::Iso, Self::Joliet];

    /// The bytes of a file's name.
    fn file(self, name: &str) -> Vec<u8> {
        match self {
            Self::Iso if name.contains('.') => format!("{};1", name.to_ascii_uppercase()).into_bytes(),
            Self::Iso => format!("{}.;1", name.to_ascii_uppercase()).into_bytes(),
            Self::Joliet => ucs2(name),
        }
    }

    /// A text of a descriptor, filled up with spaces.
    fn text(self, text: &str, bytes: usize) -> Vec<u8> {
        let mut text: String = text.into();
        let per_letter = if self == Self::Joliet { 2 } else { 1 };
        while text.len() < bytes / per_letter {
            text.push(' ');
        }
        match self {
            Self::Iso => text.into_bytes(),
            Self::Joliet => ucs2(&text),
        }
    }
}

fn ucs2(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_be_bytes).collect()
}

/// A number in both byte orders.
fn both32(number: u32) -> [u8; 8] {
    let [little, big] = [number.to_le_bytes(), number.to_be_bytes()];
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&little);
    bytes[4..].copy_from_slice(&big);
    bytes
}

fn both16(number: u16) -> [u8; 4] {
    let [[a, b], [c, d]] = [number.to_le_bytes(), number.to_be_bytes()];
    [a, b, c, d]
}

/// Makes a volume of files in its one folder.
///
/// # Errors
/// Too many files for one sector of their names, or more than 4 GiB.
pub(crate) fn volume(label: &str, files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut places = Vec::new();
    let mut next = FILES;
    for (name, content) in files {
        places.push((*name, sector(next)?, u32::try_from(content.len()).context("a file of 4 GiB")?));
        next += content.len().div_ceil(SECTOR);
    }
    // Readers look a little beyond the end.
    let sectors = next.next_multiple_of(16) + 16;
    let mut volume = vec![0; sectors * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| volume[at * SECTOR..][..bytes.len()].copy_from_slice(bytes);
    for (number, names) in Names::BOTH.into_iter().enumerate() {
        put(16 + number, &descriptor(names, label, sector(sectors)?, PATHS[number], FOLDERS[number])?);
        let folder = sector(FOLDERS[number])?;
        let path = |folder: [u8; 4], parent: [u8; 2]| [&[1, 0][..], &folder, &parent, &[0, 0]].concat();
        put(PATHS[number], &path(folder.to_le_bytes(), [1, 0]));
        put(PATHS[number] + 1, &path(folder.to_be_bytes(), [0, 1]));
        put(FOLDERS[number], &self::folder(names, folder, &places)?);
    }
    put(18, b"\xffCD001\x01");
    for ((_, content), (_, sector, _)) in files.iter().zip(&places) {
        put(usize::try_from(*sector)?, content);
    }
    Ok(volume)
}

fn sector(number: usize) -> Result<u32> {
    u32::try_from(number).context("a volume of many sectors")
}

/// A volume descriptor (ECMA-119 8.4 and 8.5).
fn descriptor(names: Names, label: &str, sectors: u32, paths: usize, folder: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; SECTOR];
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    put(0, if names == Names::Iso { b"\x01CD001\x01" } else { b"\x02CD001\x01" });
    put(8, &names.text("LINUX", 32));
    put(40, &names.text(label, 32));
    put(80, &both32(sectors));
    if names == Names::Joliet {
        // The escape sequence of UCS-2, level 3.
        put(88, b"%/E");
    }
    put(120, &both16(1));
    put(124, &both16(1));
    put(128, &both16(u16::try_from(SECTOR)?));
    put(132, &both32(PATHS_BYTES));
    put(140, &sector(paths)?.to_le_bytes());
    put(148, &sector(paths + 1)?.to_be_bytes());
    put(156, &record(&[0], sector(folder)?, u32::try_from(SECTOR)?, true));
    for (at, length) in [(190, 128), (318, 128), (446, 128), (574, 128), (702, 37), (739, 37), (776, 37)] {
        let text = names.text("", length);
        put(at, &text);
    }
    for at in [813, 830, 847, 864] {
        put(at, b"0000000000000000\0");
    }
    put(881, &[1]);
    Ok(bytes)
}

/// The root folder: itself, its parent, and the files in the order of their names.
fn folder(names: Names, at: u32, files: &[(&str, u32, u32)]) -> Result<Vec<u8>> {
    let bytes = u32::try_from(SECTOR)?;
    let mut all = [record(&[0], at, bytes, true), record(&[1], at, bytes, true)].concat();
    let mut files: Vec<_> = files.iter().map(|(name, at, bytes)| (names.file(name), *at, *bytes)).collect();
    files.sort();
    for (name, at, bytes) in files {
        all.extend(record(&name, at, bytes, false));
    }
    ensure!(all.len() <= SECTOR, "too many files for a small volume");
    Ok(all)
}

/// A record of a folder (ECMA-119 9.1).
fn record(name: &[u8], sector: u32, bytes: u32, folder: bool) -> Vec<u8> {
    let length = (33 + name.len()).next_multiple_of(2);
    let mut record = vec![0; length];
    record[0] = u8::try_from(length).unwrap_or(u8::MAX);
    record[2..10].copy_from_slice(&both32(sector));
    record[10..18].copy_from_slice(&both32(bytes));
    record[18..25].copy_from_slice(&TIME);
    record[25] = if folder { 2 } else { 0 };
    record[28..32].copy_from_slice(&both16(1));
    record[32] = u8::try_from(name.len()).unwrap_or(u8::MAX);
    record[33..33 + name.len()].copy_from_slice(name);
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_lie_where_their_records_say() {
        let long = vec![7; 5000];
        let volume = volume("CIDATA", &[("user-data", &long), ("meta-data", b"x"), ("empty", b"")]).unwrap();
        assert_eq!(&volume[16 * SECTOR..][..7], b"\x01CD001\x01");
        assert_eq!(&volume[16 * SECTOR + 40..][..32], b"CIDATA                          ");
        assert_eq!(&volume[17 * SECTOR + 40..][..12], b"\0C\0I\0D\0A\0T\0A");
        assert_eq!(&volume[18 * SECTOR..][..7], b"\xffCD001\x01");
        for (folder, name) in [(23, b"USER-DATA.;1".to_vec()), (24, ucs2("user-data"))] {
            let folder = &volume[folder * SECTOR..][..SECTOR];
            let at = folder.windows(name.len()).position(|bytes| bytes == name).unwrap();
            let number = |at: usize| u32::from_le_bytes(folder[at..at + 4].try_into().unwrap()) as usize;
            let (sector, bytes) = (number(at - 31), number(at - 23));
            assert_eq!(&volume[sector * SECTOR..][..bytes], long);
        }
        assert_eq!(volume.len() % SECTOR, 0);
    }

    #[test]
    fn a_folder_is_one_sector() {
        let names: Vec<String> = (0..100).map(|number| format!("file-{number}")).collect();
        let files: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, &b""[..])).collect();
        assert!(volume("X", &files).unwrap_err().to_string().contains("too many files"));
    }
}
