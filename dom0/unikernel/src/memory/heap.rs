//! The heap: `talc` over pages taken as needed. Where memory can be borrowed, what is large is borrowed for as long as it
//! lives, so that it leaves neither gaps nor a heap that stays large.
//!
//! An allocation that fails ends the domain. So who allocates for others knows beforehand what it may come to, has the heap
//! grown by as much ([`reserve`]), and looks before each turn whether the heap has as much in a row ([`can_allocate`]).

use super::{PAGE, Pages, borrowed, free_pages};
use crate::sync::{MaskMutex, RawMaskLock};
use core::alloc::{GlobalAlloc, Layout};
use talc::TalcLock;
use talc::base::Talc;
use talc::base::binning::Binning;
use talc::source::Source;

/// Least pages the heap takes at a time: large enough for the allocator's own records.
const STEP: u64 = 64;
/// What a fresh piece of heap spends on records, generously.
const OVERHEAD: usize = 16 * 1024;
/// From so many bytes on an allocation is borrowed for itself.
const LARGE: usize = 256 * 1024;
/// Alignment of borrowed memory.
const BORROWED_ALIGN: usize = 2 << 20;
/// Bytes borrowed for small allocations when our own pages come to an end.
const BORROWED_STEP: usize = 1 << 20;
/// Pages of our own that the heap leaves for page tables, if it can borrow.
const KEPT: u64 = 512;

/// Bytes that have been promised, and what the heap was given for that.
static PROMISES: MaskMutex<Promises> = MaskMutex::new(Promises { promised: 0, set_aside: 0 });

struct Promises {
    promised: usize,
    set_aside: usize,
}

/// Heap for somebody in particular, until this is dropped. What it is used for is up to the holder.
#[derive(Debug)]
#[must_use = "what is dropped is promised to the next one"]
pub struct Reserved(usize);

/// Has the heap hold so many bytes that nobody else has been promised; `None` if the domain can get no more memory. They
/// come from the machine, not from what the heap has at hand, and stay with the heap when they are promised no longer.
#[must_use]
pub fn reserve(bytes: usize) -> Option<Reserved> {
    let mut promises = PROMISES.lock();
    let missing = (promises.promised + bytes).saturating_sub(promises.set_aside);
    if missing > 0 {
        let (base, size) = piece(missing)?;
        // SAFETY: a piece is ours, mapped, and belongs to the heap for ever.
        unsafe { HEAP.0.lock().claim(base, size) }?;
        promises.set_aside += size;
    }
    promises.promised += bytes;
    Some(Reserved(bytes))
}

/// Bytes that are promised.
#[must_use]
pub fn reserved() -> usize {
    PROMISES.lock().promised
}

impl Drop for Reserved {
    fn drop(&mut self) {
        PROMISES.lock().promised -= self.0;
    }
}

/// Whether the heap has, or can get, so many bytes in a row. Then allocations that come to less in all, each counted with
/// what it costs the heap, succeed, whatever is freed between them.
#[must_use]
pub fn can_allocate(bytes: usize) -> bool {
    let Ok(layout) = Layout::from_size_align(bytes.max(1), 1) else { return false };
    // SAFETY: the size is not zero, and what was allocated is freed as it was allocated.
    unsafe {
        let at = HEAP.0.alloc(layout);
        if !at.is_null() {
            HEAP.0.dealloc(at, layout);
        }
        !at.is_null()
    }
}

/// Memory for the heap to keep for ever, of at least so many bytes beside the heap's own records.
fn piece(bytes: usize) -> Option<(*mut u8, usize)> {
    let bytes = bytes.checked_add(OVERHEAD)?;
    let needed = u64::try_from(bytes).ok()?.div_ceil(PAGE);
    if borrowed::enabled() && free_pages() < needed.max(STEP) + KEPT {
        let size = bytes.max(BORROWED_STEP).next_multiple_of(4096);
        // No allocation begins where it does, for the heap's records lie there, so `dealloc` never gives it back.
        return Some((borrowed::borrow(size)?, size));
    }
    let pages = Pages::allocate(needed.max(STEP)).or_else(|| Pages::allocate(needed))?;
    let size = usize::try_from(pages.count() * PAGE).ok()?;
    Some((pages.leak() as *mut u8, size))
}

/// Gives the heap pages of the domain.
#[derive(Debug)]
struct Grow;

// SAFETY: taking pages uses no heap.
unsafe impl Source for Grow {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        let (base, size) = piece(layout.size() + layout.align()).ok_or(())?;
        // SAFETY: a piece is ours, mapped, and belongs to the heap for ever.
        unsafe { talc.claim(base, size) }.map(drop).ok_or(())
    }
}

/// What is large apart, all else together.
struct Heap(TalcLock<RawMaskLock, Grow>);

fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= BORROWED_ALIGN && borrowed::enabled()
}

// SAFETY: memory comes from `talc`, or is borrowed: then it is mapped, ours alone, at least as large and as aligned as
// asked for, and it is told by its address and size to whom it goes back. `talc` never hands out the address at which a
// piece begins that it borrowed itself: see `Grow`.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return borrowed::borrow(layout.size()).unwrap_or(core::ptr::null_mut());
        }
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            // The hypervisor has zeroed it.
            return borrowed::borrow(layout.size()).unwrap_or(core::ptr::null_mut());
        }
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if layout.size().max(size) < LARGE || !borrowed::enabled() {
            // SAFETY: the caller's promise, passed on; what is small came from `talc`, and what came before anything
            // could be borrowed as well.
            return unsafe { self.0.realloc(at, layout, size) };
        }
        // SAFETY: the caller promises a size that is not zero and that rounded up to the alignment does not overflow.
        let new = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both are at least that large, and the new one is nobody else's.
            unsafe {
                new.copy_from_nonoverlapping(at, layout.size().min(size));
                self.dealloc(at, layout);
            }
        }
        new
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller lets go of it; what was not borrowed came from `talc`.
        unsafe {
            if layout.size() < LARGE || !borrowed::give_back(at) {
                self.0.dealloc(at, layout);
            }
        }
    }
}

#[cfg_attr(not(test), global_allocator)]
static HEAP: Heap = Heap(TalcLock::new(Grow));

/// A heap like ours over memory of the host that does not grow, to try what it is enough for.
#[cfg(test)]
pub(super) struct Arena(TalcLock<RawMaskLock, talc::source::Manual>, MaskMutex<(usize, usize)>);

#[cfg(test)]
impl Arena {
    pub(super) const fn new() -> Self {
        Self(TalcLock::new(talc::source::Manual), MaskMutex::new((0, 0)))
    }

    /// Begins anew with `bytes`; what was allocated before has been freed. Memory of earlier beginnings is lost.
    pub(super) fn renew(&self, bytes: usize) {
        let memory = vec![0u8; bytes + OVERHEAD].leak();
        let mut talc = self.0.lock();
        *talc = Talc::new(talc::source::Manual);
        // SAFETY: nobody else knows of the memory.
        assert!(unsafe { talc.claim(memory.as_mut_ptr(), memory.len()) }.is_some());
        *self.1.lock() = (memory.as_ptr().addr(), memory.len());
    }

    pub(super) fn contains(&self, at: *mut u8) -> bool {
        let (base, length) = *self.1.lock();
        (base..base + length).contains(&at.addr())
    }

    /// As [`GlobalAlloc::alloc`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.alloc(layout) }
    }

    /// As [`GlobalAlloc::dealloc`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.dealloc(at, layout) }
    }
}
