//! The GUID partition table (UEFI 2.10, section 5.3).

use super::{MOST_ENTRIES, Reader, number32, number64};

/// Bytes of an entry. The specification allows larger entries, but no tool makes them.
const ENTRY: u32 = 128;

/// Which of the two copies of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copy {
    /// After the first block.
    First,
    /// At the end of the disk.
    Second,
}

/// A header that [`Header::parse`] has checked. Its addresses count blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The first block of the entries.
    pub(super) entries: u64,
    /// The first and the last block that partitions may have.
    pub(super) usable: (u64, u64),
    /// The number of entries, used or not.
    count: u32,
    /// The checksum of all entries.
    checksum: u32,
}

impl Header {
    /// Parses the header read from `block` of a disk of `blocks` blocks, each of `unit` sectors. `None` if the header is
    /// damaged, contradicts itself or the disk, or has more entries than are allowed.
    pub(super) fn parse(bytes: &[u8], block: u64, blocks: u64, unit: u64) -> Option<Self> {
        let length = usize::try_from(number32(bytes, 12)).ok()?;
        let signed = bytes.get(..length).filter(|_| length >= 92)?;
        // The checksum is computed with its own field, bytes 16 to 19, as zeroes.
        let checksum = Crc::new().over(signed.get(..16)?).over(&[0; 4]).over(signed.get(20..)?).value();
        let header = Self {
            entries: number64(signed, 72),
            usable: (number64(signed, 40), number64(signed, 48)),
            count: number32(signed, 80),
            checksum: number32(signed, 88),
        };
        let (first, last) = header.usable;
        let end = header.entries.checked_add(header.entries_bytes().div_ceil(unit * 512))?;
        let good = signed.starts_with(b"EFI PART")
            && checksum == number32(signed, 16)
            && number64(signed, 24) == block
            && first <= last
            && first >= 2
            && last < blocks
            && (1..=MOST_ENTRIES).contains(&header.count)
            && number32(signed, 84) == ENTRY
            && header.entries >= 2
            && end <= blocks
            // The entries lie outside the usable blocks, so the owner of a partition cannot write them.
            && (end <= first || last < header.entries);
        good.then_some(header)
    }

    /// Returns the bytes of all entries.
    pub(super) fn entries_bytes(&self) -> u64 {
        u64::from(self.count) * u64::from(ENTRY)
    }

    /// Returns the used entries: the number of each, and its first and last block. `None` if the checksum is wrong or `bytes`
    /// is too short.
    pub(super) fn entries<'a>(&self, bytes: &'a [u8]) -> Option<impl Iterator<Item = (u32, (u64, u64))> + use<'a>> {
        let bytes = bytes.get(..usize::try_from(self.entries_bytes()).ok()?)?;
        let entries = bytes.chunks_exact(usize::try_from(ENTRY).ok()?).zip(1..);
        // An entry whose type is all zeroes is not used.
        let used = entries.filter(|(entry, _)| entry.iter().take(16).any(|byte| *byte != 0));
        let parsed = used.map(|(entry, number)| (number, (number64(entry, 32), number64(entry, 40))));
        (Crc::new().over(bytes).value() == self.checksum).then_some(parsed)
    }
}

impl Reader {
    /// Notes that the table is a GPT. Returns the state that wants the header of the first copy.
    pub(super) fn begin_gpt(&mut self) -> super::State {
        self.table.kind = super::Kind::Gpt;
        super::State::Header(Copy::First)
    }
}

/// The checksum of UEFI (CRC-32 of ISO 3309: reflected, polynomial 0x04c11db7).
#[derive(Clone, Copy)]
struct Crc(u32);

impl Crc {
    const fn new() -> Self {
        Self(!0)
    }

    fn over(self, bytes: &[u8]) -> Self {
        let step = |crc: u32| if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0xedb8_8320 };
        let one = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc));
        Self(bytes.iter().fold(self.0, one))
    }

    const fn value(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_the_standard() {
        assert_eq!(Crc::new().over(b"123456789").value(), 0xcbf4_3926);
        assert_eq!(Crc::new().over(b"1234").over(b"56789").value(), 0xcbf4_3926);
    }
}
