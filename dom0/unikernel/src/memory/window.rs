//! Windows: addresses at which frames of the hypervisor or of other domains are mapped.

use super::{Memory, PAGE, entry_for, run_of, with};
use crate::hypercall;
use crate::sync::MaskMutex;
use hypercall_abi::mmu::{MmuUpdate, pte};
use hypercall_abi::{Errno, domid};

/// The address at which windows begin.
const BASE: u64 = 0xffff_ffff_c000_0000;
/// Pages that all windows can have together.
const PAGES: u64 = 16 * 1024;
/// Entries written by one hypercall.
const BATCH: usize = 64;
/// Flags of an entry for reading.
const READABLE: u64 = pte::PRESENT | pte::ACCESSED | pte::NX;

static USED: MaskMutex<[u64; 256]> = MaskMutex::new([0; 256]);

/// Contiguous addresses that map given frames. Dropping a window unmaps the frames.
#[derive(Debug)]
pub struct Window {
    first: u64,
    count: u64,
}

impl Window {
    /// Maps frames of `owner` (a domain, or [`domid::SELF`] for pages the hypervisor shares with us).
    ///
    /// # Errors
    /// `NoMem` if there are not enough addresses; otherwise the hypervisor's error.
    pub fn map(frames: &[u64], owner: u16, writable: bool) -> Result<Self, Errno> {
        let window = Self::reserve(frames.len() as u64)?;
        let write = if writable { pte::WRITE | pte::DIRTY } else { 0 };
        let entries = frames.iter().map(|&frame| entry_for(frame, READABLE | write));
        window.write(entries, owner)?;
        Ok(window)
    }

    /// Maps the window's first pages to other frames of `owner`, writable; `None` unmaps a page. Old translations may
    /// stay in the TLB until [`flush_tlb`].
    pub(super) fn remap(&mut self, frames: impl Iterator<Item = Option<u64>>, owner: u16) -> Result<(), Errno> {
        let flags = READABLE | pte::WRITE | pte::DIRTY;
        let entries = frames.map(|frame| frame.map_or(0, |frame| entry_for(frame, flags)));
        self.write(entries, owner)
    }

    /// Maps `count` frames in a row that are not RAM: registers of a device, read and written past the caches.
    ///
    /// # Errors
    /// As [`Window::map`].
    pub(crate) fn map_registers(first: u64, count: u64) -> Result<Self, Errno> {
        let window = Self::reserve(count)?;
        let flags = READABLE | pte::WRITE | pte::DIRTY | pte::PCD | pte::PWT;
        window.write((first..).map(|frame| entry_for(frame, flags)), domid::SELF)?;
        Ok(window)
    }

    /// Reserves addresses and makes page tables for them, without mapping anything.
    ///
    /// # Errors
    /// `NoMem` if there are not enough addresses.
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

    /// The number of pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// A pointer to the first byte.
    #[must_use]
    pub fn pointer(&self) -> *mut u8 {
        self.address() as *mut u8
    }

    /// Never unmaps the window; returns a pointer to its first byte.
    #[must_use]
    pub fn leak(self) -> *mut u8 {
        let pointer = self.pointer();
        core::mem::forget(self);
        pointer
    }

    fn address_of(&self, i: u64) -> u64 {
        BASE + (self.first + i) * PAGE
    }

    /// Writes the entries of the window's first pages.
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

fn l1_slot(memory: &Memory, va: u64) -> Option<u64> {
    memory.machine_address(memory.slot(va, 1)?)
}

fn flush(batch: &[MmuUpdate], owner: u16) -> Result<(), Errno> {
    if batch.is_empty() {
        return Ok(());
    }
    // SAFETY: the entries belong to a window that nobody uses: it is not handed out yet, or is borrowed mutably, or
    // dropped.
    unsafe { hypercall::mmu_update(batch, owner) }.map(drop)
}

/// Flushes the whole TLB.
pub(super) fn flush_tlb() {
    let op = hypercall_abi::mmu::MmuextOp {
        cmd: hypercall_abi::mmu::MmuextCommand::TlbFlushAll as u32,
        ..Default::default()
    };
    // SAFETY: a TLB flush changes no mapping.
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
