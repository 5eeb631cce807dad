//! Sets of frames as sorted ranges: what RAM there is and what of it is still free while we boot.

use core::ops::Range;
use heapless::Vec;

/// Ranges of frame numbers, disjoint. Memory maps of real machines have a dozen.
#[derive(Clone, Debug, Default)]
pub struct Ranges(Vec<Range<u64>, 64>);

impl Ranges {
    /// No range at all.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The ranges.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().cloned()
    }

    /// Whether a frame lies in one of them.
    #[must_use]
    pub fn has(&self, frame: u64) -> bool {
        self.iter().any(|range| range.contains(&frame))
    }

    /// How many frames they hold in all.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.iter().map(|range| range.end - range.start).sum()
    }

    /// The number after the highest frame; 0 if there is none.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.iter().map(|range| range.end).max().unwrap_or(0)
    }

    /// Adds a range. What it shares with ranges added before is taken once; a range too many is left out.
    pub(crate) fn add(&mut self, range: Range<u64>) {
        self.remove(range.clone());
        if !range.is_empty() {
            // A 65th range would be lost RAM, not an error.
            let _ = self.0.push(range);
        }
    }

    /// Takes a range out, wherever it overlaps.
    pub(crate) fn remove(&mut self, hole: Range<u64>) {
        if hole.is_empty() {
            return;
        }
        for range in core::mem::take(&mut self.0) {
            let (below, above) = (range.start..range.end.min(hole.start), range.start.max(hole.end)..range.end);
            for part in [below, above].into_iter().filter(|part| !part.is_empty()) {
                let _ = self.0.push(part);
            }
        }
    }

    /// Takes `count` adjacent frames, all below `limit`; the highest there are, so that the space below stays whole.
    pub(crate) fn take(&mut self, count: u64, limit: u64) -> Option<u64> {
        let last = |range: Range<u64>| range.end.min(limit).checked_sub(count).filter(|first| *first >= range.start);
        let best = self.iter().filter_map(last).max()?;
        self.remove(best..best + count);
        Some(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(ranges: &Ranges) -> std::vec::Vec<Range<u64>> {
        let mut list: std::vec::Vec<_> = ranges.iter().collect();
        list.sort_by_key(|range| range.start);
        list
    }

    #[test]
    fn removing_cuts_and_splits() {
        let mut ranges = Ranges::new();
        ranges.add(0..100);
        ranges.add(200..300);
        ranges.remove(50..60);
        ranges.remove(90..210);
        ranges.remove(400..500);
        ranges.remove(20..20);
        assert_eq!(list(&ranges), [0..50, 60..90, 210..300]);
        assert_eq!(ranges.frames(), 50 + 30 + 90);
        assert_eq!(ranges.limit(), 300);
    }

    #[test]
    fn overlapping_ranges_count_once() {
        let mut ranges = Ranges::new();
        ranges.add(0..10);
        ranges.add(5..15);
        assert_eq!(ranges.frames(), 15);
    }

    #[test]
    fn taking_respects_the_limit() {
        let mut ranges = Ranges::new();
        ranges.add(3..100);
        ranges.add(1000..2000);
        assert_eq!(ranges.take(10, 95), Some(85));
        assert_eq!(ranges.take(10, 100), Some(75));
        assert_eq!(ranges.take(80, 100), None);
        assert_eq!(ranges.take(512, u64::MAX), Some(1488));
        assert_eq!(list(&ranges), [3..75, 95..100, 1000..1488]);
    }
}
