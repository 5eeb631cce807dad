//! How much a guest gets of flights, pins, and the time of a turn; and the limits of a disk, in bytes and requests per second.

use core::cell::Cell;
use core::cmp::max;

/// The maximum number of requests that one queue carries out at a time.
pub const FLIGHTS: usize = 64;
/// The maximum number of requests taken from one ring before other rings have their turn.
pub const PER_TURN: usize = 32;
/// The cost of a request beside its bytes. The unit of cost is the byte.
pub(crate) const REQUEST_COST: u32 = 16 << 10;
/// The cost that each waiting vbd may spend before it is the next vbd's turn.
pub(crate) const QUANTUM: u32 = 64 << 10;
/// The cost after which a turn begins no more requests: about 1,024 pages are pinned or copied, then other tasks run.
pub(crate) const TURN_COST: u32 = 4 << 20;
/// A vbd counts as busy for this long after it last had an unanswered request: its guest may be about to send the next one.
pub(crate) const BUSY_NS: u64 = 10_000_000;
/// The maximum number of pins for the data of all disks. The hypervisor's other handles are for rings.
pub const DATA_PINS: u32 = 6144;
/// The least share of a vbd in the flights of its queue.
const FLIGHTS_AT_LEAST: usize = 8;
/// The least share of a vbd in the pins of all queues, and the least limit of all pins.
const PINS_AT_LEAST: u32 = 512;

/// The number of pins that all queues have together. A queue takes pins from here before it pins pages.
#[derive(Debug)]
pub struct Pins {
    limit: u32,
    used: Cell<u32>,
}

impl Pins {
    /// Makes `limit` free pins, but at least 512, which is enough for any request.
    #[must_use]
    pub const fn new(limit: u32) -> Self {
        Self { limit: if limit < PINS_AT_LEAST { PINS_AT_LEAST } else { limit }, used: Cell::new(0) }
    }

    /// Returns how many pins are taken.
    #[must_use]
    pub fn used(&self) -> u32 {
        self.used.get()
    }

    /// Returns whether `count` pins are free.
    pub(crate) fn has(&self, count: u32) -> bool {
        self.used.get().saturating_add(count) <= self.limit
    }

    pub(crate) fn take(&self, count: u32) {
        self.used.set(self.used.get().saturating_add(count));
    }

    /// Gives `count` pins back.
    pub(crate) fn give(&self, count: u32) {
        self.used.set(self.used.get().saturating_sub(count));
    }

    /// Returns how many pins each of `busy` vbds may have.
    pub(crate) fn share(&self, busy: usize) -> u32 {
        max(PINS_AT_LEAST, self.limit / u32::try_from(max(1, busy)).unwrap_or(u32::MAX))
    }
}

/// Returns how many requests each of `busy` vbds may have in flight.
pub(crate) fn flights_share(busy: usize) -> usize {
    max(FLIGHTS_AT_LEAST, FLIGHTS / max(1, busy))
}

/// The limits that the configuration sets to a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes per second. `None`: no limit.
    pub bytes_per_second: Option<u64>,
    /// Requests per second. `None`: no limit.
    pub requests_per_second: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

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
