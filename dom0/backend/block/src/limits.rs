//! How much of what is shared a guest gets: places in the device, pins, bytes and requests per second.

use core::cell::Cell;
use core::cmp::max;

/// The most requests that are carried out at a time, by one queue.
pub const FLIGHTS: usize = 64;
/// The most requests taken from one ring before others have their turn.
pub const PER_TURN: usize = 32;
/// What a request costs beside its bytes.
pub(crate) const REQUEST_COST: u32 = 16 << 10;
/// How much each guest that waits may spend before the next one may.
pub(crate) const QUANTUM: u32 = 64 << 10;
/// What begins in one turn, by cost: about 1,024 pages are pinned or copied, then other tasks have their turns.
pub(crate) const TURN_COST: u32 = 4 << 20;
/// A guest counts as busy for as long after its last request was answered: it may be about to send the next one.
pub(crate) const BUSY_NS: u64 = 10_000_000;
/// The pins of all data of all disks; the hypervisor's other handles are for rings.
pub const DATA_PINS: u32 = 6144;
/// A guest may always have as many requests in flight.
const FLIGHTS_AT_LEAST: usize = 8;
/// A guest may always have as many pins, if there are any.
const PINS_AT_LEAST: u32 = 512;

/// The pins of all queues together. A queue takes them before it pins.
#[derive(Debug)]
pub struct Pins {
    limit: u32,
    used: Cell<u32>,
}

impl Pins {
    /// Pins that are all free. There are at least 512, enough for any request.
    #[must_use]
    pub const fn new(limit: u32) -> Self {
        Self { limit: if limit < PINS_AT_LEAST { PINS_AT_LEAST } else { limit }, used: Cell::new(0) }
    }

    /// How many are taken.
    #[must_use]
    pub fn used(&self) -> u32 {
        self.used.get()
    }

    /// Whether as many are free.
    pub(crate) fn has(&self, count: u32) -> bool {
        self.used.get().saturating_add(count) <= self.limit
    }

    pub(crate) fn take(&self, count: u32) {
        self.used.set(self.used.get().saturating_add(count));
    }

    /// Gives some back.
    pub(crate) fn give(&self, count: u32) {
        self.used.set(self.used.get().saturating_sub(count));
    }

    /// What one of `busy` guests may have.
    pub(crate) fn share(&self, busy: usize) -> u32 {
        max(PINS_AT_LEAST, self.limit / u32::try_from(max(1, busy)).unwrap_or(u32::MAX))
    }
}

/// How many requests one of `busy` guests may have in flight.
pub(crate) fn flights_share(busy: usize) -> usize {
    max(FLIGHTS_AT_LEAST, FLIGHTS / max(1, busy))
}

/// What a person allows a disk at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in a second.
    pub bytes_per_second: Option<u64>,
    /// Requests in a second.
    pub requests_per_second: Option<u64>,
}

/// Nanoseconds of a second.
const SECOND_NS: u64 = 1_000_000_000;
/// What was not used is kept for as long.
const BURST_NS: u64 = SECOND_NS / 10;

/// A bucket that time fills. What is taken may exceed what is in it; then it has to be filled again before more is taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    per_second: u64,
    /// Units times [`SECOND_NS`]; below zero: a debt.
    level: i128,
    filled_ns: u64,
}

impl Bucket {
    pub(crate) fn new(per_second: u64, now_ns: u64) -> Self {
        let per_second = max(1, per_second);
        Self { per_second, level: 0, filled_ns: now_ns }
    }

    /// When something may be taken, after the bucket was filled up to now.
    pub(crate) fn ready_ns(&mut self, now_ns: u64) -> u64 {
        let passed = now_ns.saturating_sub(self.filled_ns);
        self.filled_ns = max(now_ns, self.filled_ns);
        let rate = i128::from(self.per_second);
        let most = rate * i128::from(BURST_NS);
        self.level = most.min(self.level + rate * i128::from(passed));
        let debt = u64::try_from(-self.level).unwrap_or(0);
        now_ns.saturating_add(debt.div_ceil(self.per_second))
    }

    pub(crate) fn take(&mut self, units: u64) {
        self.level -= i128::from(units) * i128::from(SECOND_NS);
    }

    /// What was taken was more than was used.
    pub(crate) fn give(&mut self, units: u64) {
        self.level += i128::from(units) * i128::from(SECOND_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_pass_what_it_says_in_a_second() {
        let mut bucket = Bucket::new(1000, 0);
        let (mut now, mut passed) = (0, 0);
        while now < 10 * SECOND_NS {
            now = now.max(bucket.ready_ns(now));
            if bucket.ready_ns(now) <= now {
                bucket.take(64);
                passed += 64;
            }
        }
        assert!((9_900..=10_200).contains(&passed), "{passed}");
    }

    #[test]
    fn silence_is_worth_a_tenth_of_a_second() {
        let mut bucket = Bucket::new(1000, 0);
        let now = 3600 * SECOND_NS;
        assert_eq!(bucket.ready_ns(now), now);
        bucket.take(1100);
        assert_eq!(bucket.ready_ns(now), now + SECOND_NS);
        bucket.give(1000);
        assert_eq!(bucket.ready_ns(now), now);
    }

    #[test]
    fn one_guest_gets_all_and_many_get_what_they_need() {
        assert_eq!([1, 2, 8, 100].map(flights_share), [64, 32, 8, 8]);
        let pins = Pins::new(DATA_PINS);
        assert_eq!([1, 2, 12, 100].map(|busy| pins.share(busy)), [6144, 3072, 512, 512]);
        pins.take(6144);
        assert!(pins.has(0) && !pins.has(1));
        pins.give(256);
        assert!(pins.has(256) && !pins.has(257));
    }
}
