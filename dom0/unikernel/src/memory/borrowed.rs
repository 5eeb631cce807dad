//! Memory borrowed from the hypervisor: taken for large allocations, and given back when they are freed.
//!
//! A domain that may raise its own limit starts small and borrows what it needs for a while, for instance to unpack a
//! kernel ([`lend_large`]). Borrowed pages lie in pieces of 2 MiB of addresses. Each piece has a page table of its own,
//! which is filled, then installed by one update; it is removed by one update, too.

use super::window::flush_tlb;
use super::{ENTRIES, LEAF, Memory, PAGE, entry_for, linear, read_entry, run_of, with};
use crate::sync::MaskMutex;
use crate::{control, hypercall};
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall_abi::memory::MemoryOp;
use hypercall_abi::mmu::{MmuUpdate, pte, uvmf};
use hypercall_abi::{Errno, domid};

/// The address at which borrowed pages begin.
const BASE: u64 = 0xffff_ffff_c800_0000;
/// Bytes of a piece: what one page table maps.
const PIECE: u64 = ENTRIES * PAGE;
/// How many pieces there are: 768 MiB.
const PIECES: u64 = SLOTS as u64;
const SLOTS: usize = 384;
/// Entries of a page table.
const TABLE: usize = 512;
/// The page number of the first borrowed page; larger than any from the builder.
const FIRST_PAGE: u64 = 1 << 30;
/// The limit in KiB that means no limit.
const NO_LIMIT: u64 = u64::MAX >> 1;

/// Whether [`lend_large`] has been called.
static ENABLED: AtomicBool = AtomicBool::new(false);
/// For each piece: how many pieces the loan that begins there has; 0 if no loan begins there.
static LOANS: MaskMutex<[u16; SLOTS]> = MaskMutex::new([0; SLOTS]);

/// From now on, borrows large allocations of the heap from the hypervisor, up to all memory of the machine.
///
/// # Errors
/// Why the hypervisor does not let this domain raise its own limit.
pub fn lend_large() -> Result<(), Errno> {
    control::set_max_memory(domid::SELF, NO_LIMIT)?;
    ENABLED.store(true, Ordering::Relaxed);
    Ok(())
}

/// Whether [`lend_large`] has been called.
pub(super) fn enabled() -> bool {
    ENABLED.load(Ordering::Relaxed)
}

/// Borrows at least `bytes` bytes of zeroed memory; returns its address, aligned to 2 MiB. `None` if the machine has
/// too little memory, or this domain has too few addresses or no page for a table.
pub(super) fn borrow(bytes: usize) -> Option<*mut u8> {
    let pages = u64::try_from(bytes).ok()?.div_ceil(PAGE).max(1);
    let pieces = pages.div_ceil(ENTRIES);
    let first = claim(pieces)?;
    for piece in 0..pieces {
        let count = (pages - piece * ENTRIES).min(ENTRIES);
        if fill(first + piece, count).is_none() {
            (first..first + piece).for_each(empty);
            release(first);
            return None;
        }
    }
    Some((BASE + first * PIECE) as *mut u8)
}

/// Gives back the loan that begins at `address`; returns false if no loan begins there.
///
/// # Safety
/// No reference leads to this memory any more.
pub(super) unsafe fn give_back(address: *mut u8) -> bool {
    let Some(offset) = (address.addr() as u64).checked_sub(BASE) else { return false };
    let first = offset / PIECE;
    let pieces = usize::try_from(first).ok().and_then(|i| LOANS.lock().get(i).copied()).unwrap_or(0);
    if pieces == 0 || !offset.is_multiple_of(PIECE) {
        return false;
    }
    (first..first + u64::from(pieces)).for_each(empty);
    release(first);
    true
}

/// Whether a frame is borrowed.
pub(super) fn is_borrowed(memory: &Memory, frame: u64) -> bool {
    let page = memory.page_hint(frame).and_then(|page| page.checked_sub(FIRST_PAGE));
    let Some(page) = page.filter(|page| *page < PIECES * ENTRIES) else { return false };
    let slot = memory.slot(BASE + page * PAGE, 1);
    slot.map(read_entry).is_some_and(|entry| entry & pte::PRESENT != 0 && (entry & pte::FRAME) / PAGE == frame)
}

fn claim(pieces: u64) -> Option<u64> {
    let mut loans = LOANS.lock();
    let mut taken = [false; SLOTS];
    for (first, count) in loans.iter().enumerate() {
        taken.iter_mut().skip(first).take(usize::from(*count)).for_each(|taken| *taken = true);
    }
    let is_free = |piece: u64| usize::try_from(piece).ok().and_then(|i| taken.get(i)) == Some(&false);
    let first = run_of(0..PIECES, pieces, is_free)?;
    *loans.get_mut(usize::try_from(first).ok()?)? = u16::try_from(pieces).ok()?;
    Some(first)
}

fn release(first: u64) {
    let loan = usize::try_from(first).ok().and_then(|i| LOANS.lock().get_mut(i).map(core::mem::take));
    debug_assert!(loan.is_some_and(|pieces| pieces > 0), "a loan is given back twice");
}

/// Allocates `count` frames, and maps them as a piece.
fn fill(piece: u64, count: u64) -> Option<()> {
    let mut frames = [0; TABLE];
    let frames = frames.get_mut(..usize::try_from(count).ok()?)?;
    let page = FIRST_PAGE + piece * ENTRIES;
    let got = control::populate(domid::SELF, page, frames).unwrap_or(0);
    let table = with(|memory| memory.take(1)).flatten();
    let hung = table.filter(|_| got == frames.len()).map(|table| {
        let entries = frames.iter().map(|frame| entry_for(*frame, LEAF | pte::NX));
        for (slot, entry) in (0..ENTRIES).zip(entries.chain(core::iter::repeat(0))) {
            // SAFETY: `table` is a page of ours that nobody else uses, still mapped writable.
            unsafe { ((linear(table) + slot * 8) as *mut u64).write_volatile(entry) };
        }
        with(|memory| memory.hang_in(table, BASE + piece * PIECE, 2)).unwrap_or(Err(Errno::NoMem))
    });
    if let Some(Ok(())) = hung {
        return Some(());
    }
    if let Some(table) = table {
        put_table_back(table);
    }
    return_frames(frames.get_mut(..got)?);
    None
}

/// Unmaps a piece, and gives its frames back.
fn empty(piece: u64) {
    let va = BASE + piece * PIECE;
    let (mut frames, mut count) = ([0; TABLE], 0);
    let taken_out = with(|memory| {
        let slot = memory.slot(va, 2)?;
        let table = memory.page((read_entry(slot) & pte::FRAME) / PAGE)?;
        let present = (0..ENTRIES).map(|i| read_entry(linear(table) + i * 8)).filter(|entry| entry & pte::PRESENT != 0);
        for (slot, entry) in frames.iter_mut().zip(present) {
            *slot = (entry & pte::FRAME) / PAGE;
            count += 1;
        }
        let ptr = memory.machine_address(slot)?;
        // SAFETY: no reference leads to this memory any more.
        unsafe { hypercall::mmu_update(&[MmuUpdate { ptr, val: 0 }], domid::SELF) }.ok()?;
        Some(table)
    });
    flush_tlb();
    match taken_out.flatten() {
        Some(table) => {
            put_table_back(table);
            return_frames(frames.get_mut(..count).unwrap_or_default());
        }
        None => debug_assert!(false, "borrowed memory cannot be unmapped"),
    }
}

/// Makes the page of a table that is not installed (any more) writable, and frees the page.
fn put_table_back(table: u64) {
    with(|memory| {
        let Some(frame) = memory.frame(table) else { return };
        // SAFETY: the address still maps the same page of ours.
        let writable = unsafe { hypercall::update_va_mapping(linear(table), entry_for(frame, LEAF), uvmf::INVLPG) };
        // If this fails the page stays a table and is lost, but nothing else is.
        if writable.is_ok() {
            memory.release(table, 1);
        }
    });
}

fn return_frames(frames: &mut [u64]) {
    // SAFETY: the frames are not mapped anywhere.
    let returned = unsafe { hypercall::reservation(MemoryOp::DecreaseReservation, frames, domid::SELF) };
    debug_assert_eq!(returned, Ok(frames.len() as u64), "frames cannot be given back");
}
