//! The boot bundle's form: a `newc` cpio archive, the one module a loader hands over.

/// Bytes of a header: a magic and thirteen numbers of eight hexadecimal digits.
const HEADER: usize = 110;

/// Names and contents of the entries. They end at the trailer, or at the first one that is damaged.
pub fn entries(archive: &[u8]) -> impl Iterator<Item = (&str, &[u8])> {
    let mut rest = archive;
    core::iter::from_fn(move || {
        let number = |at: usize| usize::from_str_radix(core::str::from_utf8(rest.get(at..at + 8)?).ok()?, 16).ok();
        // The lengths of content and name; the numbers are too small for their sums to overflow.
        let (length, name) = (number(54)?, number(94)?);
        // Content and the next header begin at multiples of four.
        let content = (HEADER + name).next_multiple_of(4);
        let name = rest.get(HEADER..HEADER + name)?.strip_suffix(b"\0")?;
        if !rest.starts_with(b"070701") || name == b"TRAILER!!!" {
            return None;
        }
        let entry = (core::str::from_utf8(name).ok()?, rest.get(content..content + length)?);
        rest = rest.get((content + length).next_multiple_of(4)..)?;
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
            out.extend_from_slice(b"070701");
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
