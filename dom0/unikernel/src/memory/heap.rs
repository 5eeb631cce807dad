//! The heap: `talc` over pages that are taken as needed. If memory can be borrowed, large allocations are borrowed one
//! by one until they are freed, so that they neither leave gaps in the heap nor enlarge it for good.
//!
//! A failed allocation ends the domain. So code that allocates on behalf of others computes the most it may need, has
//! the heap grown by as much before ([`reserve`]), and checks before each turn for a large enough free block
//! ([`can_allocate`]).

use super::{PAGE, Pages, borrowed, free_pages};
use crate::sync::{MaskMutex, RawMaskLock};
use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering};
use talc::TalcLock;
use talc::base::Talc;
use talc::base::binning::Binning;
use talc::source::Source;

/// The fewest pages that the heap takes at a time: enough for the allocator's own records.
const STEP: u64 = 64;
/// The most bytes that the allocator uses for records in a new piece of memory.
const OVERHEAD: usize = 16 * 1024;
/// Allocations of this size or more are borrowed one by one.
const LARGE: usize = 256 * 1024;
/// Alignment of borrowed memory.
const BORROWED_ALIGN: usize = 2 << 20;
/// Bytes borrowed at a time for small allocations when there are too few own pages.
const BORROWED_STEP: usize = 1 << 20;
/// Own pages that the heap leaves free for page tables, if it can borrow.
const KEPT: u64 = 512;

/// The bytes reserved by [`reserve`], and the bytes the heap was given for them.
static PROMISES: MaskMutex<Promises> = MaskMutex::new(Promises { promised: 0, set_aside: 0 });

/// The bytes of the free block that [`can_allocate`] found last; 0 after an allocation.
static FOUND: AtomicUsize = AtomicUsize::new(0);

struct Promises {
    promised: usize,
    set_aside: usize,
}

/// A reservation of heap, until it is dropped. The holder decides what to use it for.
#[derive(Debug)]
#[must_use = "what is dropped is promised to the next one"]
pub struct Reserved(usize);

/// Reserves `bytes` of heap in addition to all other reservations; `None` if the domain can get no more memory. The
/// heap gets new memory for this, whatever it has free, and keeps the memory when the reservation ends.
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

/// The bytes reserved now.
#[must_use]
pub fn reserved() -> usize {
    PROMISES.lock().promised
}

impl Drop for Reserved {
    fn drop(&mut self) {
        PROMISES.lock().promised -= self.0;
    }
}

/// Whether the heap has, or can get, a free block of `bytes`. If so, all allocations up to the next check succeed if
/// they use less than `bytes` of heap together, even if nothing is freed in between.
#[must_use]
pub fn can_allocate(bytes: usize) -> bool {
    let Ok(layout) = Layout::from_size_align(bytes.max(1), 1) else { return false };
    if layout.size() <= FOUND.load(Ordering::Relaxed) {
        return true;
    }
    // SAFETY: the size is not zero, and the block is freed with the layout with which it was allocated.
    unsafe {
        let at = HEAP.0.alloc(layout);
        if !at.is_null() {
            HEAP.0.dealloc(at, layout);
            FOUND.store(layout.size(), Ordering::Relaxed);
        }
        !at.is_null()
    }
}

/// Gets memory that the heap keeps for ever: at least `bytes` in addition to the allocator's records.
fn piece(bytes: usize) -> Option<(*mut u8, usize)> {
    let bytes = bytes.checked_add(OVERHEAD)?;
    let needed = u64::try_from(bytes).ok()?.div_ceil(PAGE);
    if borrowed::enabled() && free_pages() < needed.max(STEP) + KEPT {
        let size = bytes.max(BORROWED_STEP).next_multiple_of(4096);
        // The allocator puts a record at the start, so no allocation has this address and `dealloc` never gives it
        // back.
        return Some((borrowed::borrow(size)?, size));
    }
    let pages = Pages::allocate(needed.max(STEP)).or_else(|| Pages::allocate(needed))?;
    let size = usize::try_from(pages.count() * PAGE).ok()?;
    Some((pages.leak() as *mut u8, size))
}

/// The source from which `talc` gets more memory.
#[derive(Debug)]
struct Grow;

// SAFETY: taking pages does not allocate from the heap.
unsafe impl Source for Grow {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        let (base, size) = piece(layout.size() + layout.align()).ok_or(())?;
        // SAFETY: a piece is ours, mapped, and belongs to the heap for ever.
        unsafe { talc.claim(base, size) }.map(drop).ok_or(())
    }
}

/// The allocator: borrows large allocations, and takes all others from `talc`.
struct Heap(TalcLock<RawMaskLock, Grow>);

fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= BORROWED_ALIGN && borrowed::enabled()
}

// SAFETY: memory comes from `talc`, or is borrowed: then it is mapped, used by nobody else, and at least as large and
// as aligned as requested. Size and address tell `dealloc` where an allocation came from. `talc` never hands out the
// first address of a piece that it borrowed: see `piece`.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        FOUND.store(0, Ordering::Relaxed);
        if is_large(layout) {
            return borrowed::borrow(layout.size()).unwrap_or(core::ptr::null_mut());
        }
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        FOUND.store(0, Ordering::Relaxed);
        if is_large(layout) {
            // The hypervisor has zeroed this memory.
            return borrowed::borrow(layout.size()).unwrap_or(core::ptr::null_mut());
        }
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        FOUND.store(0, Ordering::Relaxed);
        if layout.size().max(size) < LARGE || !borrowed::enabled() {
            // SAFETY: the caller's promise, passed on; small allocations came from `talc`, and so did all before
            // borrowing was enabled.
            return unsafe { self.0.realloc(at, layout, size) };
        }
        // SAFETY: the caller promises that the size is not zero, and that it does not overflow when rounded up to the
        // alignment.
        let new = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both are at least that large, and the new one is used by nobody else.
            unsafe {
                new.copy_from_nonoverlapping(at, layout.size().min(size));
                self.dealloc(at, layout);
            }
        }
        new
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller uses it no longer; what was not borrowed came from `talc`.
        unsafe {
            if layout.size() < LARGE || !borrowed::give_back(at) {
                self.0.dealloc(at, layout);
            }
        }
    }
}

#[cfg_attr(not(test), global_allocator)]
static HEAP: Heap = Heap(TalcLock::new(Grow));

/// A heap like ours over memory of the host that does not grow. Tests find out with it how much memory is enough.
#[cfg(test)]
pub(super) struct Arena(TalcLock<RawMaskLock, talc::source::Manual>, MaskMutex<(usize, usize)>);

#[cfg(test)]
impl Arena {
    pub(super) const fn new() -> Self {
        Self(TalcLock::new(talc::source::Manual), MaskMutex::new((0, 0)))
    }

    /// Starts over with `bytes` of new memory. All allocations must have been freed; the old memory is leaked.
    pub(super) fn renew(&self, bytes: usize) {
        let memory = vec![0u8; bytes + OVERHEAD].leak();
        let mut talc = self.0.lock();
        *talc = Talc::new(talc::source::Manual);
        // SAFETY: nobody else uses this memory.
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
    /// As [`GlobalAlloc::alloc`].
    pub(super) unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.alloc(layout) }
    }

    /// As [`GlobalAlloc::dealloc`].
    ///
    /// # Safety
    /// As [`GlobalAlloc::dealloc`].
    pub(super) unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.0.dealloc(at, layout) }
    }
}
