//! The boot bundle's form: a `newc` cpio archive, the one module a loader hands over.

const MAGIC: &[u8] = b"070701";
/// The header: the magic and thirteen numbers of eight hexadecimal digits.
const HEADER: usize = MAGIC.len() + 13 * 8;
const TRAILER: &[u8] = b"TRAILER!!!";

/// Names and contents of the entries. They end at the trailer, or at the first one that is damaged.
pub fn entries(archive: &[u8]) -> impl Iterator<Item = (&str, &[u8])> {
    let mut at = 0_usize;
    core::iter::from_fn(move || {
        let header = archive.get(at..)?.get(..HEADER)?;
        let number = |index: usize| {
            let digits = header.get(MAGIC.len() + index * 8..)?.get(..8)?;
            usize::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok()
        };
        let (length, name_length) = (number(6)?, number(11)?);
        let name = at.checked_add(HEADER)?;
        let name_end = name.checked_add(name_length)?;
        // Content and the next header begin at multiples of four.
        let content = name_end.checked_next_multiple_of(4)?;
        let end = content.checked_add(length)?;
        let name = archive.get(name..name_end)?.strip_suffix(b"\0")?;
        if !header.starts_with(MAGIC) || name == TRAILER {
            return None;
        }
        let entry = (core::str::from_utf8(name).ok()?, archive.get(content..end)?);
        at = end.checked_next_multiple_of(4)?;
        Some(entry)
    })
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::format;
    use std::vec::Vec;

    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, content) in files.iter().chain(&[("TRAILER!!!", &b""[..]), ("behind", b"the trailer")]) {
            let mut numbers = [0; 13];
            (numbers[6], numbers[11]) = (content.len(), name.len() + 1);
            out.extend_from_slice(MAGIC);
            numbers.iter().for_each(|number| out.extend_from_slice(format!("{number:08x}").as_bytes()));
            out.extend_from_slice(name.as_bytes());
            out.push(0);
            out.resize(out.len().next_multiple_of(4), 0);
            out.extend_from_slice(content);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    const FILES: [(&str, &[u8]); 3] = [("dom0", b"kernel"), ("", b""), ("guests/web/config", b"12345")];

    #[test]
    fn entries_come_in_order_up_to_the_trailer() {
        let bytes = archive(&FILES);
        assert_eq!(entries(&bytes).collect::<Vec<_>>(), FILES);
    }

    #[test]
    fn a_cut_archive_has_the_entries_that_are_whole() {
        let bytes = archive(&FILES);
        for length in 0..bytes.len() {
            let found: Vec<_> = entries(&bytes[..length]).collect();
            assert!(FILES.starts_with(&found), "{length}");
        }
        assert_eq!(entries(b"no archive").count(), 0);
    }

    #[test]
    fn a_damaged_header_ends_the_entries() {
        let bytes = archive(&FILES);
        for at in 0..HEADER {
            for byte in [0, b'f', b'z', 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = byte;
                // Some numbers mean nothing to us; none leads outside the archive.
                assert!(entries(&damaged).count() <= FILES.len());
            }
        }
        let mut damaged = bytes;
        damaged[0] = b'1';
        assert_eq!(entries(&damaged).count(), 0);
    }
}
