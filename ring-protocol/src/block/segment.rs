//! Segments, which are sectors within pages of the guest, and the extent of the disk that they are for.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{PAGE_SECTORS, Refused, SECTOR_BYTES};

/// A part of a guest's page that a request reads or writes. Its values are unchecked until [`judge`] has accepted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Segment {
    /// The grant reference of the page.
    pub reference: u32,
    /// The first sector in the page, 0 to 7.
    pub first: u8,
    /// The last sector in the page, from `first` to 7.
    pub last: u8,
    /// Ignored.
    pub padding: u16,
}

const _: () = assert!(size_of::<Segment>() == 8 && align_of::<Segment>() == 4);

impl Segment {
    /// Returns the number of sectors of the segment.
    ///
    /// # Errors
    /// [`Refused::BadSegment`]: the segment is no run of sectors within a page.
    pub fn sectors(self) -> Result<u32, Refused> {
        let Self { first, last, .. } = self;
        if first > last || u32::from(last) >= PAGE_SECTORS {
            return Err(Refused::BadSegment { first, last });
        }
        Ok(u32::from(last - first) + 1)
    }
}

/// Consecutive sectors of a disk: at least one, all within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first sector.
    pub sector: u64,
    /// The number of sectors.
    pub sectors: u64,
}

/// The properties of a disk that requests are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    sectors: u64,
    block_sectors: u32,
    read_only: bool,
    discard: bool,
}

impl Geometry {
    /// Describes a disk of `sectors` sectors in blocks of `block_bytes`, which is read-only or not, and takes sectors back
    /// (`discard`) or not.
    ///
    /// `None` unless blocks have 512, 1,024, 2,048 or 4,096 bytes: a segment lies within a page, and cannot have a larger
    /// block.
    #[must_use]
    pub fn new(sectors: u64, block_bytes: u32, read_only: bool, discard: bool) -> Option<Self> {
        let block_sectors = block_bytes / SECTOR_BYTES;
        let known = block_bytes.is_multiple_of(SECTOR_BYTES) && block_sectors.is_power_of_two();
        (known && block_sectors <= PAGE_SECTORS).then_some(Self { sectors, block_sectors, read_only, discard })
    }

    /// Returns whether the disk takes sectors back.
    pub(super) const fn discards(&self) -> bool {
        self.discard
    }

    /// Fails with [`Refused::ReadOnly`] if the disk is read-only.
    pub(super) const fn check_writable(&self) -> Result<(), Refused> {
        if self.read_only { Err(Refused::ReadOnly) } else { Ok(()) }
    }

    /// Checks the sectors of a request: there must be at least one, they must be on the disk, and be whole blocks.
    pub(super) fn extent(&self, sector: u64, sectors: u64) -> Result<Extent, Refused> {
        let block = u64::from(self.block_sectors);
        let end = sector.checked_add(sectors).ok_or(Refused::OutOfRange)?;
        if sectors == 0 {
            return Err(Refused::Empty);
        }
        if end > self.sectors {
            return Err(Refused::OutOfRange);
        }
        if !sector.is_multiple_of(block) || !sectors.is_multiple_of(block) {
            return Err(Refused::Unaligned);
        }
        Ok(Extent { sector, sectors })
    }
}

/// Checks the segments of a read or a write that begins at `sector`. Each segment must lie within a page and have whole blocks,
/// and the sectors must be on the disk. The number of segments is not limited here. Returns the sectors of the disk.
///
/// # Errors
/// The first rule that is broken.
pub fn judge(segments: &[Segment], sector: u64, geometry: &Geometry) -> Result<Extent, Refused> {
    let mut sum = 0;
    for segment in segments {
        let sectors = segment.sectors()?;
        if !sectors.is_multiple_of(geometry.block_sectors)
            || !u32::from(segment.first).is_multiple_of(geometry.block_sectors)
        {
            return Err(Refused::Unaligned);
        }
        sum += u64::from(sectors);
    }
    if sum == 0 {
        return Err(Refused::NoSegments);
    }
    geometry.extent(sector, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(first: u8, last: u8) -> Segment {
        Segment { reference: 1, first, last, padding: 0 }
    }

    fn disk(sectors: u64, block_bytes: u32) -> Geometry {
        Geometry::new(sectors, block_bytes, false, false).unwrap()
    }

    #[test]
    fn a_segment_is_a_run_of_sectors_within_a_page() {
        assert_eq!(segment(0, 7).sectors(), Ok(8));
        assert_eq!(segment(7, 7).sectors(), Ok(1));
        for (first, last) in [(1, 0), (0, 8), (8, 8), (255, 0), (0, 255), (255, 255)] {
            assert_eq!(segment(first, last).sectors(), Err(Refused::BadSegment { first, last }));
        }
    }

    #[test]
    fn segments_add_up_to_sectors_of_the_disk() {
        let disk = disk(100, 512);
        let whole = [segment(0, 7), segment(3, 4)];
        assert_eq!(judge(&whole, 90, &disk), Ok(Extent { sector: 90, sectors: 10 }));
        assert_eq!(judge(&whole, 91, &disk), Err(Refused::OutOfRange));
        assert_eq!(judge(&whole, u64::MAX, &disk), Err(Refused::OutOfRange));
        assert_eq!(judge(&whole, u64::MAX - 9, &disk), Err(Refused::OutOfRange));
        assert_eq!(judge(&[], 0, &disk), Err(Refused::NoSegments));
    }

    #[test]
    fn large_blocks_are_read_and_written_whole() {
        let disk = disk(64, 4096);
        assert_eq!(judge(&[segment(0, 7)], 8, &disk), Ok(Extent { sector: 8, sectors: 8 }));
        assert_eq!(judge(&[segment(0, 7)], 4, &disk), Err(Refused::Unaligned));
        assert_eq!(judge(&[segment(0, 3), segment(4, 7)], 8, &disk), Err(Refused::Unaligned));
        assert_eq!(judge(&[segment(1, 7)], 8, &disk), Err(Refused::Unaligned));
    }

    #[test]
    fn blocks_larger_than_a_page_are_no_disk_of_ours() {
        for bytes in [512, 1024, 2048, 4096] {
            assert!(Geometry::new(1, bytes, false, false).is_some());
        }
        for bytes in [0, 1, 511, 513, 1536, 8192, u32::MAX] {
            assert_eq!(Geometry::new(1, bytes, false, false), None);
        }
    }
}
