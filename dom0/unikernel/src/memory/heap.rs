//! The heap: `talc` over pages taken as needed. Where memory can be borrowed, what is large is borrowed for as long as it
//! lives, so that it leaves neither gaps nor a heap that stays large.

use super::{PAGE, Pages, borrowed, free_pages};
use crate::sync::RawMaskLock;
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

/// Gives the heap pages of the domain.
#[derive(Debug)]
struct Grow;

// SAFETY: taking pages uses no heap.
unsafe impl Source for Grow {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        let bytes = layout.size() + layout.align() + OVERHEAD;
        let needed = u64::try_from(bytes).map_err(drop)?.div_ceil(PAGE);
        if borrowed::enabled() && free_pages() < needed.max(STEP) + KEPT {
            let size = bytes.max(BORROWED_STEP).next_multiple_of(4096);
            let base = borrowed::borrow(size).ok_or(())?;
            // SAFETY: borrowed for the heap alone, mapped, and kept for ever: no allocation begins where it does, for
            // the heap's own records lie there, so `dealloc` never gives it back.
            return unsafe { talc.claim(base, size) }.map(drop).ok_or(());
        }
        let pages = Pages::allocate(needed.max(STEP)).or_else(|| Pages::allocate(needed));
        let pages = pages.ok_or(())?;
        let size = usize::try_from(pages.count() * PAGE).map_err(drop)?;
        let base = pages.leak() as *mut u8;
        // SAFETY: the pages are ours, mapped, and belong to the heap for ever.
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
#[cfg_attr(test, expect(dead_code, reason = "host tests use the host's heap"))]
static HEAP: Heap = Heap(TalcLock::new(Grow));
