//! A disk in frames of dom0: an image in the boot bundle, or pages set aside for the disk.

use crate::{Disk, NoPlace, Place, SECTOR, Shape};
use alloc::vec::Vec;
use core::fmt;

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// Bytes of a sector.
const BYTES: u64 = SECTOR as u64;

/// A disk whose sectors follow each other in pages.
#[derive(Debug)]
pub struct Memory {
    pages: Pages,
    shape: Shape,
}

#[derive(Debug)]
enum Pages {
    /// Pages with successive numbers. Sector 0 begins at this byte, counted from the beginning of page 0.
    Run(u64),
    /// The numbers of the pages, in the order of the sectors.
    List(Vec<u64>),
}

/// An image does not begin at a multiple of 512 bytes, so one of its sectors might lie in two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misplaced;

impl fmt::Display for Misplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("does not begin at a multiple of 512 bytes")
    }
}

impl Memory {
    /// Makes a read-only disk of `bytes` bytes from byte `offset` of `page` on, in pages with successive numbers. An incomplete
    /// sector at the end is left out.
    ///
    /// # Errors
    /// [`Misplaced`]: `offset` is no multiple of 512.
    pub const fn image(page: u64, offset: u64, bytes: u64) -> Result<Self, Misplaced> {
        if !offset.is_multiple_of(BYTES) {
            return Err(Misplaced);
        }
        let pages = Pages::Run(page.saturating_mul(PAGE).saturating_add(offset));
        Ok(Self { pages, shape: shape(bytes / BYTES, true) })
    }

    /// Makes a writable disk in the pages with these numbers: eight sectors a page.
    #[must_use]
    pub const fn of_pages(pages: Vec<u64>) -> Self {
        let sectors = pages.len() as u64 * (PAGE / BYTES);
        Self { pages: Pages::List(pages), shape: shape(sectors, false) }
    }

    /// Returns the pages of a disk from [`Memory::of_pages`], so that they can be freed. Empty for an image.
    #[must_use]
    pub fn into_pages(self) -> Vec<u64> {
        match self.pages {
            Pages::Run(_) => Vec::new(),
            Pages::List(pages) => pages,
        }
    }
}

const fn shape(sectors: u64, read_only: bool) -> Shape {
    Shape { sectors, block_bytes: 512, physical_bytes: 512, read_only, volatile: false, discard: None }
}

impl Disk for Memory {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        self.shape.judge(write, sector, u64::from(sectors))?;
        let start = if let Pages::Run(start) = &self.pages { *start } else { 0 };
        let byte = sector.checked_mul(BYTES).and_then(|byte| byte.checked_add(start)).ok_or(NoPlace::OutOfRange)?;
        let index = byte / PAGE;
        let page = match &self.pages {
            Pages::Run(_) => index,
            Pages::List(pages) => {
                let page = usize::try_from(index).ok().and_then(|index| pages.get(index));
                page.copied().ok_or(NoPlace::OutOfRange)?
            }
        };
        let within = byte % PAGE;
        let here = u32::try_from((PAGE - within) / BYTES).unwrap_or(1);
        let offset = u16::try_from(within).unwrap_or(0);
        Ok((Place::Memory { page, offset }, sectors.min(here)))
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        self.shape.judge(true, sector, sectors)?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_may_begin_within_a_page_and_ends_with_its_last_whole_sector() {
        let mut disk = Memory::image(7, 3 * 512, 9 * 512 + 100).unwrap();
        assert_eq!(disk.shape().sectors, 9);
        assert_eq!(disk.place(false, 0, 9), Ok((Place::Memory { page: 7, offset: 1536 }, 5)));
        assert_eq!(disk.place(false, 5, 4), Ok((Place::Memory { page: 8, offset: 0 }, 4)));
        assert_eq!(disk.place(false, 5, 5), Err(NoPlace::OutOfRange));
        assert_eq!(disk.place(false, u64::MAX, 1), Err(NoPlace::OutOfRange));
        assert_eq!(disk.place(false, 0, 0), Err(NoPlace::OutOfRange));
        assert_eq!(disk.place(true, 0, 1), Err(NoPlace::ReadOnly));
        assert_eq!(disk.discard(0, 1), Err(NoPlace::ReadOnly));
        assert_eq!(Memory::image(7, 100, 512).unwrap_err(), Misplaced);
    }

    #[test]
    fn a_list_of_pages_is_a_disk_that_is_written() {
        let mut disk = Memory::of_pages([40, 7].to_vec());
        assert_eq!(disk.shape().sectors, 16);
        assert_eq!(disk.place(true, 6, 10), Ok((Place::Memory { page: 40, offset: 3072 }, 2)));
        assert_eq!(disk.place(true, 8, 8), Ok((Place::Memory { page: 7, offset: 0 }, 8)));
        assert_eq!(disk.discard(0, 16), Ok(None));
        assert_eq!(disk.into_pages(), [40, 7]);
    }
}
