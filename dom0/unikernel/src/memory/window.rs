//! Windows: addresses at which frames of the hypervisor or of other domains appear.

use super::{Memory, PAGE, entry_for, run_of, with};
use crate::hypercall;
use crate::sync::MaskMutex;
use hypercall_abi::mmu::{MmuUpdate, pte};
use hypercall_abi::{Errno, domid};

/// Where windows are.
const BASE: u64 = 0xffff_ffff_c000_0000;
/// How many pages they can have in all.
const PAGES: u64 = 16 * 1024;
/// Entries written by one call.
pub(crate) const BATCH: usize = 64;

static USED: MaskMutex<[u64; 256]> = MaskMutex::new([0; 256]);

/// Addresses in a row that lead to given frames; they are unmapped when this is dropped.
#[derive(Debug)]
pub struct Window {
    first: u64,
    count: u64,
}

impl Window {
    /// Maps frames of `owner` (a domain, or [`domid::SELF`] for pages the hypervisor shares with us).
    ///
    /// # Errors
    /// `NoMem` if there is no room; otherwise why the hypervisor refused.
    pub fn map(frames: &[u64], owner: u16, writable: bool) -> Result<Self, Errno> {
        let window = Self::reserve(frames.len() as u64)?;
        let write = if writable { pte::WRITE | pte::DIRTY } else { 0 };
        let flags = pte::PRESENT | pte::ACCESSED | pte::NX | write;
        let entries = frames.iter().map(|&frame| entry_for(frame, flags));
        window.write(entries, owner)?;
        Ok(window)
    }

    /// Reserves addresses, with page tables for them, and maps nothing.
    ///
    /// # Errors
    /// `NoMem` if there is no room.
    pub fn reserve(count: u64) -> Result<Self, Errno> {
        let first = claim(count).ok_or(Errno::NoMem)?;
        let window = Self { first, count };
        for i in 0..count {
            with(|memory| memory.make_tables(window.address_of(i), 1)).ok_or(Errno::NoMem)??;
        }
        Ok(window)
    }

    /// The first address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address_of(0)
    }

    /// Pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The first byte.
    #[must_use]
    pub fn pointer(&self) -> *mut u8 {
        self.address() as *mut u8
    }

    /// Keeps the window for ever.
    #[must_use]
    pub fn leak(self) -> *mut u8 {
        let pointer = self.pointer();
        core::mem::forget(self);
        pointer
    }

    fn address_of(&self, i: u64) -> u64 {
        BASE + (self.first + i) * PAGE
    }

    /// Writes the entries of the first pages.
    fn write(&self, entries: impl Iterator<Item = u64>, owner: u16) -> Result<(), Errno> {
        let mut batch = [MmuUpdate::default(); BATCH];
        let mut used = 0;
        for (i, val) in (0..self.count).zip(entries) {
            let slot = with(|memory| l1_slot(memory, self.address_of(i))).flatten();
            let ptr = slot.ok_or(Errno::Inval)?;
            batch[used] = MmuUpdate { ptr, val };
            used += 1;
            if used == BATCH {
                flush(&batch, owner)?;
                used = 0;
            }
        }
        flush(&batch[..used], owner)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let cleared = self.write(core::iter::repeat(0), domid::SELF);
        debug_assert!(cleared.is_ok(), "unmapping is refused: {cleared:?}");
        flush_tlb();
        let mut used = USED.lock();
        mark(&mut used, self.first, self.count, false);
    }
}

/// As many addresses as one call can map, each for any frame of any domain in turn.
#[derive(Debug)]
pub(crate) struct Slots {
    window: Window,
    /// Machine addresses of the entries.
    entries: [u64; BATCH],
}

impl Slots {
    pub(crate) fn new() -> Result<Self, Errno> {
        let window = Window::reserve(BATCH as u64)?;
        let mut entries = [0; BATCH];
        for (i, entry) in (0..).zip(&mut entries) {
            *entry = with(|memory| l1_slot(memory, window.address_of(i))).flatten().ok_or(Errno::Inval)?;
        }
        Ok(Self { window, entries })
    }

    /// Maps a frame in a slot that is empty.
    pub(crate) fn map(&mut self, slot: usize, owner: u16, frame: u64) -> Result<(), Errno> {
        let ptr = *self.entries.get(slot).ok_or(Errno::Inval)?;
        let flags = pte::PRESENT | pte::WRITE | pte::ACCESSED | pte::DIRTY | pte::NX;
        let val = entry_for(frame, flags);
        flush(&[MmuUpdate { ptr, val }], owner)
    }

    /// Writes into the page mapped in a slot.
    pub(crate) fn write(&mut self, slot: usize, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        let page = usize::try_from(PAGE).map_err(|_| Errno::Inval)?;
        let end = offset.checked_add(bytes.len()).filter(|end| *end <= page);
        if end.is_none() || slot >= BATCH {
            return Err(Errno::Inval);
        }
        let to = self.window.pointer().wrapping_add(slot * page + offset);
        // SAFETY: the callers write only slots they have mapped; the bytes stay inside the page, which is not ours, so
        // no reference of ours leads there.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Unmaps the first `count` slots.
    pub(crate) fn clear(&mut self, count: usize) {
        let mut batch = [MmuUpdate::default(); BATCH];
        for (update, ptr) in batch.iter_mut().zip(self.entries) {
            update.ptr = ptr;
        }
        let batch = batch.get(..count).unwrap_or(&batch);
        let cleared = flush(batch, domid::SELF);
        debug_assert!(cleared.is_ok(), "unmapping is refused: {cleared:?}");
        flush_tlb();
    }
}

fn l1_slot(memory: &Memory, va: u64) -> Option<u64> {
    memory.machine_address(memory.slot(va, 1)?)
}

fn flush(batch: &[MmuUpdate], owner: u16) -> Result<(), Errno> {
    if batch.is_empty() {
        return Ok(());
    }
    // SAFETY: the slots belong to a window, which nobody refers to before it is handed out or after it is dropped.
    unsafe { hypercall::mmu_update(batch, owner) }.map(drop)
}

fn flush_tlb() {
    let op = hypercall_abi::mmu::MmuextOp {
        cmd: hypercall_abi::mmu::MmuextCommand::TlbFlushAll as u32,
        ..Default::default()
    };
    // SAFETY: forgetting translations changes no mapping.
    let _ = unsafe { hypercall::mmuext_op(&[op], domid::SELF) };
}

fn claim(count: u64) -> Option<u64> {
    let mut used = USED.lock();
    let first = run_of(0..PAGES, count, |page| !is_marked(&used, page))?;
    mark(&mut used, first, count, true);
    Some(first)
}

fn is_marked(used: &[u64; 256], page: u64) -> bool {
    let word = usize::try_from(page / 64).ok().and_then(|i| used.get(i));
    word.is_none_or(|word| word & (1 << (page % 64)) != 0)
}

fn mark(used: &mut [u64; 256], first: u64, count: u64, mark: bool) {
    for page in first..first + count {
        let index = usize::try_from(page / 64).ok();
        if let Some(word) = index.and_then(|i| used.get_mut(i)) {
            let bit = 1 << (page % 64);
            *word = if mark { *word | bit } else { *word & !bit };
        }
    }
}
