//! The frames outside RAM that a domain may map (P9).
//!
//! This is authority, given when a domain is made. The paging lock does not guard it: ranges are only added, each by
//! one atomic step.

use super::Refused;
use crate::addr::{Frame, low32};
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Ranges that a domain may have.
pub(super) const RANGES: usize = 16;

renewable! {
    /// The frames outside RAM that one domain may map.
    #[derive(Debug)]
    pub struct Devices {
        /// Ranges of frames: the first in the upper half of a word, the end in the lower; 0 is no range.
        ranges: [AtomicU64; RANGES] = [const { AtomicU64::new(0) }; RANGES],
    }
}

impl Devices {
    /// Lets the domain map frames outside RAM, with any cacheability. No domain can map RAM other than write-back
    /// (XSA-402).
    ///
    /// # Errors
    /// [`Refused::TooManyUses`]: [`RANGES`] are known already.
    pub fn allow(&self, frames: Range<u32>) -> Result<(), Refused> {
        let word = u64::from(frames.start) << 32 | u64::from(frames.end);
        let free = |slot: &&AtomicU64| slot.compare_exchange(0, word, SeqCst, SeqCst).is_ok();
        self.ranges.iter().find(free).map(|_| ()).ok_or(Refused::TooManyUses)
    }

    /// Whether the domain may map a frame outside RAM.
    pub(super) fn allows(&self, frame: Frame) -> bool {
        self.known().any(|range| range.contains(&frame.as_u32()))
    }

    /// Whether all of these frames lie in one of its ranges.
    pub(crate) fn has(&self, frames: &Range<u32>) -> bool {
        self.known().any(|range| range.start <= frames.start && frames.end <= range.end)
    }

    /// Its ranges, empty ones among them.
    pub fn known(&self) -> impl Iterator<Item = Range<u32>> {
        self.ranges.iter().map(|slot| slot.load(SeqCst)).map(|word| low32(word >> 32)..low32(word))
    }
}
