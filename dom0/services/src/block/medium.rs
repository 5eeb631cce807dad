//! What a guest's disk is made of: pages of dom0's memory, and intervals of devices that it holds.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;

use disk::{Claim, Disk, Holders, Memory, NoPlace, Overlay, Partition, Place, Shape, Whole};

use super::host::BlockHost;

/// The number of pages that are taken or given back before other tasks run.
const PIECE: usize = 512;
/// Sectors of an overlay that have at most [`PIECE`] pages.
const PIECE_SECTORS: u64 = PIECE as u64 * 8;

/// Who holds which interval of which device, by the name of the guest.
pub(super) type Held = Rc<RefCell<Holders<String>>>;

/// An interval of a device that is held until this value is dropped.
pub(super) struct Hold {
    holders: Held,
    claim: Option<Claim>,
}

impl Hold {
    pub(super) const fn new(holders: Held, claim: Claim) -> Self {
        Self { holders, claim: Some(claim) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            self.holders.borrow_mut().release(claim);
        }
    }
}

/// A disk without an overlay, or below one.
#[derive(Debug)]
pub(super) enum Base {
    Device(Partition<Whole>),
    Image(Partition<Memory>),
    /// Pages of dom0, with the shape that the guest sees.
    Pages(Memory, Shape),
}

impl Disk for Base {
    fn shape(&self) -> Shape {
        match self {
            Self::Device(disk) => disk.shape(),
            Self::Image(disk) => disk.shape(),
            Self::Pages(_, shape) => *shape,
        }
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        match self {
            Self::Device(disk) => disk.place(write, sector, sectors),
            Self::Image(disk) => disk.place(write, sector, sectors),
            Self::Pages(memory, shape) => {
                shape.judge(write, sector, sectors.into())?;
                memory.place(write, sector, sectors)
            }
        }
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        match self {
            Self::Device(disk) => disk.discard(sector, sectors),
            Self::Image(disk) => disk.discard(sector, sectors),
            Self::Pages(_, shape) => shape.judge(true, sector, sectors).map(|()| None),
        }
    }
}

/// The pages of overlays.
pub(super) struct Pages<H>(H);

impl<H> fmt::Debug for Pages<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pages")
    }
}

impl<H: BlockHost> disk::Pages for Pages<H> {
    fn take(&mut self) -> Option<u64> {
        self.0.take_page()
    }

    fn give_back(&mut self, page: u64) {
        self.0.give_back_page(page);
    }
}

enum Body<H: BlockHost> {
    Plain(Base),
    Overlay(Overlay<Base, Pages<H>>),
}

/// A guest's disk. Dropping it gives back the pages that it has.
pub(super) struct Medium<H: BlockHost> {
    host: H,
    body: Option<Body<H>>,
}

impl<H: BlockHost> Medium<H> {
    pub(super) const fn plain(host: H, base: Base) -> Self {
        Self { host, body: Some(Body::Plain(base)) }
    }

    /// Makes an overlay of at most `limit` bytes over `base`.
    pub(super) fn overlay(host: H, base: Base, limit: u64) -> Result<Self, NoPlace> {
        let overlay = Overlay::new(base, Pages(host.clone()), limit)?;
        Ok(Self { host, body: Some(Body::Overlay(overlay)) })
    }

    /// Makes a disk of `bytes` bytes of zeroed memory, without an incomplete sector at the end. `None` if there is not enough
    /// memory.
    pub(super) async fn memory(host: &H, bytes: u64, read_only: bool) -> Option<Self> {
        let count = usize::try_from(bytes.div_ceil(4096)).ok()?;
        let mut pages = Vec::new();
        pages.try_reserve_exact(count).ok()?;
        let memory = Memory::of_pages(pages);
        let shape = Shape { sectors: bytes / 512, read_only, ..memory.shape() };
        // If the future is dropped, the medium is too, and gives the pages back.
        let mut medium = Self::plain(host.clone(), Base::Pages(memory, shape));
        for number in 0..count {
            if number > 0 && number.is_multiple_of(PIECE) {
                host.yield_now().await;
            }
            let Some(page) = host.take_page() else {
                Self::empty(&RefCell::new(medium), host).await;
                return None;
            };
            if let Some(Body::Plain(Base::Pages(memory, _))) = &mut medium.body {
                let mut pages = core::mem::replace(memory, Memory::of_pages(Vec::new())).into_pages();
                pages.push(page);
                *memory = Memory::of_pages(pages);
            }
        }
        Some(medium)
    }

    /// Gives back all pages, and lets other tasks run after each piece. The disk must not be read any more.
    pub(super) async fn empty(medium: &RefCell<Self>, host: &H) {
        let mut sector = 0;
        while medium.borrow_mut().give_back(&mut sector) {
            host.yield_now().await;
        }
    }

    /// Gives back a piece of the pages. For an overlay, the piece begins at `sector`, which then moves on. Returns whether
    /// pages may be left.
    fn give_back(&mut self, sector: &mut u64) -> bool {
        match self.body.as_mut() {
            Some(Body::Plain(Base::Pages(memory, _))) => {
                let mut pages = core::mem::replace(memory, Memory::of_pages(Vec::new())).into_pages();
                let rest = pages.len().saturating_sub(PIECE);
                pages.drain(rest..).for_each(|page| self.host.give_back_page(page));
                *memory = Memory::of_pages(pages);
                rest > 0
            }
            Some(Body::Overlay(overlay)) => {
                let sectors = overlay.shape().sectors;
                let piece = PIECE_SECTORS.min(sectors.saturating_sub(*sector));
                // A discard is refused only if the overlay has no sectors, and so nothing to give back.
                let _ = overlay.discard(*sector, piece);
                *sector += piece;
                *sector < sectors
            }
            Some(Body::Plain(_)) | None => false,
        }
    }

    fn disk(&self) -> Option<&dyn Disk> {
        match self.body.as_ref()? {
            Body::Plain(base) => Some(base),
            Body::Overlay(overlay) => Some(overlay),
        }
    }

    fn disk_mut(&mut self) -> Option<&mut dyn Disk> {
        match self.body.as_mut()? {
            Body::Plain(base) => Some(base),
            Body::Overlay(overlay) => Some(overlay),
        }
    }

    /// Returns the bytes of memory that an overlay holds; 0 without an overlay.
    pub(super) fn overlay_bytes(&self) -> u64 {
        match &self.body {
            Some(Body::Overlay(overlay)) => overlay.held_bytes(),
            Some(Body::Plain(_)) | None => 0,
        }
    }

    /// Returns what the guest's disk can do.
    pub(super) fn shape(&self) -> Shape {
        let nothing = Shape {
            sectors: 0,
            block_bytes: 512,
            physical_bytes: 512,
            read_only: true,
            volatile: false,
            discard: None,
        };
        self.disk().map_or(nothing, Disk::shape)
    }
}

impl<H: BlockHost> Drop for Medium<H> {
    fn drop(&mut self) {
        match self.body.take() {
            Some(Body::Plain(Base::Pages(memory, _))) => {
                memory.into_pages().into_iter().for_each(|page| self.host.give_back_page(page));
            }
            Some(Body::Overlay(overlay)) => overlay.dissolve(),
            Some(Body::Plain(_)) | None => {}
        }
    }
}

impl<H: BlockHost> fmt::Debug for Medium<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Medium").field("shape", &self.shape()).finish_non_exhaustive()
    }
}

/// A queue's access to a medium while the guest is connected. Later connections see what was written.
pub(super) struct View<H: BlockHost>(Rc<RefCell<Medium<H>>>);

impl<H: BlockHost> fmt::Debug for View<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.borrow().fmt(f)
    }
}

impl<H: BlockHost> View<H> {
    pub(super) fn boxed(medium: &Rc<RefCell<Medium<H>>>) -> Box<dyn Disk> {
        Box::new(Self(Rc::clone(medium)))
    }
}

impl<H: BlockHost> Disk for View<H> {
    fn shape(&self) -> Shape {
        self.0.borrow().shape()
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        self.0.borrow_mut().disk_mut().ok_or(NoPlace::OutOfRange)?.place(write, sector, sectors)
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        self.0.borrow_mut().disk_mut().ok_or(NoPlace::OutOfRange)?.discard(sector, sectors)
    }
}
