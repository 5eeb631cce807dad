//! A guest's address is a claim. It is checked by a walk of the guest's own page tables; what it names is copied in or
//! out through the direct map.
//!
//! Touches: memory, by frame. Never touches: a guest virtual address as a pointer; counts; locks.
//! Keeps: P7 (a bad address is an [`AccessFault`]), and of P1 that nothing is written through a read-only mapping.
//!
//! Nothing here waits, or answers a flush request, between the walk and the use of a frame. So the frame cannot get
//! another owner in between, because whoever takes it away must first have this CPU flush (P4). The accessed and dirty
//! bits are not set. Pages that were found are cached ([`walks`]).

pub mod walks;

use crate::addr::{ENTRIES, Frame, GuestVirt, PAGE_SIZE, long};
use crate::fault::{Fault, planted};
use crate::frame::FrameTable;
use crate::machine::{Cpus, Frames};
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::Release, Ordering::SeqCst};
use hypercall_abi::mmu::pte::{FRAME, PAT_OR_PSE, PRESENT, USER, WRITE};
use walks::{Kind, WalkCache};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How a guest's memory is to be accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To read it.
    Read,
    /// To write it.
    Write,
}

/// The claim is wrong: this is the page fault that the guest itself would have had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AccessFault {
    /// The faulting address, for CR2.
    pub address: GuestVirt,
    /// Whether the page is present, but does not allow the access.
    pub present: bool,
    /// Whether the access was a write.
    pub write: bool,
}

impl AccessFault {
    /// The error code of the page fault, for user mode.
    #[must_use]
    pub fn error(self) -> u32 {
        u32::from(self.present) | u32::from(self.write) << 1 | 1 << 2
    }
}

/// The end of a walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Path {
    /// The L1 table.
    pub table: Frame,
    /// The index of the slot in the table.
    pub index: usize,
    /// The entry in the slot.
    pub entry: u64,
    /// Whether all four levels allow writing.
    pub writable: bool,
    /// Whether all four levels allow ring 3.
    pub user: bool,
}

impl Path {
    /// The machine address of the slot.
    #[must_use]
    pub fn slot(&self) -> u64 {
        self.table.address() | (self.index as u64 * 8)
    }

    /// The frame that the entry points to, if the entry is present.
    #[must_use]
    pub fn frame(&self) -> Option<Frame> {
        Frame::containing(self.entry & FRAME).filter(|_| self.entry & PRESENT != 0)
    }
}

/// Walks from a root to the L1 slot for an address; the entry in the slot need not be present. `None` if a higher entry
/// is not present or points to no table, or if the address does not belong to guests.
#[must_use]
pub fn walk(m: &impl Frames, table: &FrameTable, root: Frame, at: GuestVirt) -> Option<Path> {
    if !at.is_guests() || !table.is_ram(root) {
        return None;
    }
    let (mut path, mut rights) = (Path { table: root, index: 0, entry: 0, writable: true, user: true }, u64::MAX);
    for level in [4, 3, 2, 1] {
        path.index = at.slot(level);
        path.entry = m.page(path.table).get(path.index)?.load(SeqCst);
        rights &= path.entry;
        if level > 1 {
            if path.entry & PAT_OR_PSE != 0 {
                return None;
            }
            path.table = path.frame()?; // a table, hence RAM (P3)
        }
    }
    (path.writable, path.user) = (rights & WRITE != 0, rights & USER != 0);
    Some(path)
}

/// What tells that a page at this address is still the same: how often this CPU has flushed, and the root table's entry.
#[inline(always)]
pub(crate) fn view(m: &(impl Frames + Cpus), root: Frame, at: GuestVirt) -> (u64, u64) {
    (walks::life(m), if planted(Fault::SeenOverRoot) { 0 } else { walks::entry_above(m, root, at) })
}

/// A guest's memory, as one root table maps it.
#[derive(Debug)]
pub struct GuestMemory<'m, M> {
    m: &'m M,
    table: &'m FrameTable,
    root: Frame,
    kind: Kind,
    walks: Option<&'m WalkCache>,
}

impl<'m, M: Frames + Cpus> GuestMemory<'m, M> {
    /// Memory as mapped by the tables from `root` on. `root` must be a validated L4 table of which somebody holds a
    /// use.
    #[must_use]
    pub fn new(m: &'m M, table: &'m FrameTable, root: Frame) -> Self {
        Self { m, table, root, kind: Kind::Data, walks: None }
    }

    /// This memory, with this CPU's cache of walks, for pages of `kind`.
    #[inline(always)]
    pub(crate) fn remembering(self, walks: &'m WalkCache, kind: Kind) -> Self {
        Self { kind, walks: Some(walks), ..self }
    }

    /// This memory, for pages of another kind.
    #[inline(always)]
    pub(crate) fn of_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// Returns the frame at an address. It is valid only until this CPU waits for something or releases a lock.
    ///
    /// # Errors
    /// [`AccessFault`]: the page is not mapped, not for ring 3, not for writing, or not RAM.
    #[inline(always)]
    pub fn frame(&self, at: GuestVirt, access: Access) -> Result<Frame, AccessFault> {
        let write = access == Access::Write;
        match self.recall(at, access) {
            Some(frame) => Ok(frame),
            None => self.find(at, write).map_err(|present| AccessFault { address: at, present, write }),
        }
    }

    /// Like [`GuestMemory::frame`], but only looks in this CPU's cache of walks.
    #[inline(always)]
    pub(crate) fn recall(&self, at: GuestVirt, access: Access) -> Option<Frame> {
        let write = access == Access::Write;
        let frame = self.walks?.recall(self.m, self.root, at, self.kind, write)?;
        #[cfg(feature = "planted-fault")]
        self.doubt(at, frame, write);
        Some(frame)
    }

    /// Reports a page that stayed in the cache too long. With several CPUs, another CPU may have changed an upper entry
    /// and not flushed yet; in that case only a harmful use is reported.
    #[cfg(feature = "planted-fault")]
    fn doubt(&self, at: GuestVirt, frame: Frame, write: bool) {
        let alone = self.table.epochs().all().iter().count() <= 1;
        let same = walk(self.m, self.table, self.root, at).and_then(|path| path.frame()) == Some(frame);
        let harmed = write && self.table.live_level(frame).is_some();
        if harmed || (alone && !same) {
            crate::frame::table::bug(frame, "a page was remembered too long");
        }
    }

    /// Returns the frame at an address; else whether a page is present that does not allow the access.
    #[cold]
    #[inline(never)]
    fn find(&self, at: GuestVirt, write: bool) -> Result<Frame, bool> {
        let life = walks::life(self.m); // before the walk, so that a flush during the walk counts
        let path = walk(self.m, self.table, self.root, at).ok_or(false)?;
        let frame = path.frame().ok_or(false)?;
        ensure!(path.user && (path.writable || !write) && self.table.is_ram(frame), true);
        if let Some(walks) = self.walks.filter(|_| self.table.has_fast_paths()) {
            walks.note(self.m, self.root, at, (self.kind, life), &path);
        }
        Ok(frame)
    }

    /// Copies bytes from the guest.
    ///
    /// # Errors
    /// [`AccessFault`] at the first byte that cannot be read; the bytes before it are in `to`.
    pub fn read_bytes(&self, at: GuestVirt, to: &mut [u8]) -> Result<(), AccessFault> {
        let (mut at, mut rest) = (at, to);
        while !rest.is_empty() {
            let frame = self.frame(at, Access::Read)?;
            let here = rest.len().min(PAGE_SIZE.saturating_sub(at.offset()));
            let Some((now, later)) = rest.split_at_mut_checked(here) else { break };
            self.m.read(frame, at.offset(), now);
            (at, rest) = (at.plus(long(here)), later);
        }
        Ok(())
    }

    /// Copies bytes to the guest.
    ///
    /// # Errors
    /// [`AccessFault`] at the first byte that cannot be written; the bytes before it are written.
    pub fn write_bytes(&self, at: GuestVirt, from: &[u8]) -> Result<(), AccessFault> {
        let (mut at, mut rest) = (at, from);
        while !rest.is_empty() {
            let frame = self.frame(at, Access::Write)?;
            let here = rest.len().min(PAGE_SIZE.saturating_sub(at.offset()));
            let Some((now, later)) = rest.split_at_checked(here) else { break };
            self.m.write(frame, at.offset(), now);
            (at, rest) = (at.plus(long(here)), later);
        }
        Ok(())
    }

    /// Copies a value from the guest, once, so that the value that is checked is the one that is used.
    ///
    /// # Errors
    /// As [`GuestMemory::read_bytes`].
    pub fn read<T: FromBytes + IntoBytes>(&self, at: GuestVirt) -> Result<T, AccessFault> {
        let mut value = T::new_zeroed();
        self.read_bytes(at, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Like [`GuestMemory::read`], but only for a value of whole words in one page of this CPU's cache.
    #[inline(always)]
    pub(crate) fn read_recalled<T: FromBytes + IntoBytes>(&self, at: GuestVirt) -> Option<T> {
        let place = words::<T>(at)?;
        let (page, mut value) = (self.m.page(self.recall(at, Access::Read)?), T::new_zeroed());
        let (to, from) = (value.as_mut_bytes().as_chunks_mut().0, page.get(place)?);
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.load(Relaxed).to_le_bytes());
        Some(value)
    }

    /// Copies a value to the guest.
    ///
    /// # Errors
    /// As [`GuestMemory::write_bytes`].
    pub fn write<T: IntoBytes + Immutable>(&self, at: GuestVirt, value: &T) -> Result<(), AccessFault> {
        let Some(place) = words::<T>(at) else { return self.write_bytes(at, value.as_bytes()) };
        store(self.m.page(self.frame(at, Access::Write)?).get(place).unwrap_or_default(), value);
        Ok(())
    }

    /// Like [`GuestMemory::write`], but only for a value of whole words in one page of this CPU's cache.
    #[inline(always)]
    pub(crate) fn write_recalled<T: IntoBytes + Immutable>(&self, at: GuestVirt, value: &T) -> Option<()> {
        store(self.recall_words::<T>(at)?, value);
        Some(())
    }

    /// The words at which a value is to be written, if this CPU's cache has their page. They are valid as long as
    /// nothing waits.
    #[inline(always)]
    pub(crate) fn recall_words<T>(&self, at: GuestVirt) -> Option<&'m [AtomicU64]> {
        let place = words::<T>(at)?;
        self.m.page(self.recall(at, Access::Write)?).get(place)
    }
}

/// Writes a value to the words it consists of, in their order.
#[inline(always)]
pub(crate) fn store<T: IntoBytes + Immutable>(to: &[AtomicU64], value: &T) {
    let from = value.as_bytes().as_chunks().0;
    from.iter().zip(to).for_each(|(from, to)| to.store(u64::from_le_bytes(*from), Release));
}

/// The words of its page that a value at `at` consists of, if it consists of whole words of one page, as most values
/// do.
fn words<T>(at: GuestVirt) -> Option<Range<usize>> {
    let (first, count) = (at.offset() / 8, size_of::<T>() / 8);
    let whole = at.0.is_multiple_of(8) && size_of::<T>().is_multiple_of(8) && first + count <= ENTRIES;
    whole.then_some(first..first + count)
}
