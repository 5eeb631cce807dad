//! The heap: `talc` over pages taken as needed.

use super::{PAGE, Pages};
use crate::sync::RawMaskLock;
use core::alloc::Layout;
use talc::TalcLock;
use talc::base::Talc;
use talc::base::binning::Binning;
use talc::source::Source;

/// Least pages the heap takes at a time: large enough for the allocator's own records.
const STEP: u64 = 64;
/// What a fresh piece of heap spends on records, generously.
const OVERHEAD: usize = 16 * 1024;

/// Gives the heap pages of the domain.
#[derive(Debug)]
struct Grow;

// SAFETY: taking pages uses no heap.
unsafe impl Source for Grow {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        let bytes = layout.size() + layout.align() + OVERHEAD;
        let needed = u64::try_from(bytes).map_err(drop)?.div_ceil(PAGE);
        let pages = Pages::allocate(needed.max(STEP)).or_else(|| Pages::allocate(needed));
        let pages = pages.ok_or(())?;
        let size = usize::try_from(pages.count() * PAGE).map_err(drop)?;
        let base = pages.leak() as *mut u8;
        // SAFETY: the pages are ours, mapped, and belong to the heap for ever.
        unsafe { talc.claim(base, size) }.map(drop).ok_or(())
    }
}

#[cfg_attr(not(test), global_allocator)]
#[cfg_attr(test, expect(dead_code, reason = "host tests use the host's heap"))]
static HEAP: TalcLock<RawMaskLock, Grow> = TalcLock::new(Grow);
