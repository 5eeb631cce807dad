//! A whole device, and an interval of a disk.

use crate::{Device, Discard, Disk, NoPlace, Place, SECTOR, Shape};
use core::fmt;

/// All of a device. It is plain data, so any number of vbds may each have a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole {
    shape: Shape,
}

impl Whole {
    /// Makes the disk that is all of `device`.
    #[must_use]
    pub fn of(device: &(impl Device + ?Sized)) -> Self {
        Self { shape: device.shape() }
    }

    /// Makes the disk that is all of a device of this shape.
    #[must_use]
    pub const fn with_shape(shape: Shape) -> Self {
        Self { shape }
    }
}

impl Disk for Whole {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        self.shape.judge(write, sector, u64::from(sectors))?;
        Ok((Place::Device { sector }, sectors))
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        self.shape.judge(true, sector, sectors)?;
        Ok(self.shape.discard.map(|_| (sector, sectors)))
    }
}

/// An interval of another disk. The interval may be read-only even if that disk is writable.
#[derive(Clone, Debug)]
pub struct Partition<D> {
    disk: D,
    first: u64,
    shape: Shape,
}

/// Why a disk has no such interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// The interval is empty, or reaches beyond the end of the disk.
    BeyondTheEnd,
    /// The interval begins or ends within a block of the disk.
    CutsBlocks,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BeyondTheEnd => "empty, or beyond the end of the disk",
            Self::CutsBlocks => "begins or ends within a block of the disk",
        })
    }
}

impl<D: Disk> Partition<D> {
    /// Makes a disk of `sectors` sectors of `disk` from `first` on. `read_only` makes it read-only, as does a read-only `disk`.
    ///
    /// # Errors
    /// Why the disk has no such interval.
    pub fn new(disk: D, first: u64, sectors: u64, read_only: bool) -> Result<Self, Unfit> {
        let whole = disk.shape();
        whole.judge(false, first, sectors).map_err(|_| Unfit::BeyondTheEnd)?;
        let block = u64::from(whole.block_bytes) / SECTOR as u64;
        if block == 0 || !first.is_multiple_of(block) || !sectors.is_multiple_of(block) {
            return Err(Unfit::CutsBlocks);
        }
        let discard = whole.discard.map(|discard| moved(discard, first));
        let shape = Shape { sectors, read_only: whole.read_only || read_only, discard, ..whole };
        Ok(Self { disk, first, shape })
    }
}

/// Returns the granularity and the alignment of discards as seen from sector `first`.
fn moved(discard: Discard, first: u64) -> Discard {
    let granularity = u64::from(discard.granularity).max(1);
    let before = (first % granularity) * (SECTOR as u64 % granularity) % granularity;
    let alignment = (u64::from(discard.alignment) % granularity + granularity - before) % granularity;
    Discard { alignment: u32::try_from(alignment).unwrap_or(0), ..discard }
}

impl<D: Disk> Disk for Partition<D> {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        self.shape.judge(write, sector, u64::from(sectors))?;
        self.disk.place(write, self.first + sector, sectors)
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        self.shape.judge(true, sector, sectors)?;
        self.disk.discard(self.first + sector, sectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(sectors: u64, block_bytes: u32, discard: Option<Discard>) -> Whole {
        let shape =
            Shape { sectors, block_bytes, physical_bytes: block_bytes, read_only: false, volatile: true, discard };
        Whole::with_shape(shape)
    }

    #[test]
    fn sectors_of_a_partition_are_counted_from_its_first() {
        let mut part = Partition::new(device(100, 512, None), 10, 20, false).unwrap();
        assert_eq!(part.shape().sectors, 20);
        assert_eq!(part.place(true, 3, 17), Ok((Place::Device { sector: 13 }, 17)));
        assert_eq!(part.place(true, 3, 18), Err(NoPlace::OutOfRange));
        assert_eq!(part.place(false, u64::MAX, 2), Err(NoPlace::OutOfRange));
        assert_eq!(part.discard(0, 20), Ok(None));
        let discard = Some(Discard { granularity: 4096, alignment: 512 });
        let mut part = Partition::new(device(100, 512, discard), 10, 20, false).unwrap();
        // Bytes 512, 4,608, 8,704 of the disk; the partition begins at 5,120.
        assert_eq!(part.shape().discard, Some(Discard { granularity: 4096, alignment: 8704 - 5120 }));
        assert_eq!(part.discard(1, 2), Ok(Some((11, 2))));
    }

    #[test]
    fn a_read_only_view_of_a_writable_disk_is_not_written() {
        let mut part = Partition::new(device(100, 512, None), 0, 100, true).unwrap();
        assert_eq!(part.place(true, 0, 1), Err(NoPlace::ReadOnly));
        assert_eq!(part.discard(0, 1), Err(NoPlace::ReadOnly));
        assert_eq!(part.place(false, 0, 1), Ok((Place::Device { sector: 0 }, 1)));
    }

    #[test]
    fn an_interval_that_the_disk_does_not_have_is_refused() {
        for (first, sectors) in [(90, 11), (100, 1), (5, 0), (u64::MAX, 2), (1, u64::MAX)] {
            let refused = Partition::new(device(100, 512, None), first, sectors, false).unwrap_err();
            assert_eq!(refused, Unfit::BeyondTheEnd, "{first}, {sectors}");
        }
        for (first, sectors) in [(4, 8), (8, 12)] {
            let refused = Partition::new(device(800, 4096, None), first, sectors, false).unwrap_err();
            assert_eq!(refused, Unfit::CutsBlocks, "{first}, {sectors}");
        }
    }
}
