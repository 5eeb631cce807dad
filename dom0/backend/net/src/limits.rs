//! How much a guest gets of a turn, of floods, and of its rate.

use core::cmp::max;

/// The maximum number of vifs of a switch.
pub const MAX_VIFS: usize = 256;
/// The maximum number of TX slots taken from one ring before other rings have their turn.
pub const PER_VISIT: usize = 64;
/// The maximum number of frames taken from the uplink in a turn.
pub const PER_TURN: usize = 64;
/// A sender waits for a receiver without buffers at most this long.
pub const PATIENCE_NS: u64 = 10_000_000;
/// A receiver that was out of buffers counts as back when it has posted this many.
pub const BACK_BUFFERS: u32 = 64;
/// A guest may send this many frames to groups in a second; each receiver counts.
pub(crate) const FLOODS_PER_SECOND: u64 = 10_000;
/// Nanoseconds until a device that is being reset is asked again.
pub(crate) const RESET_NS: u64 = 1_000_000;

/// Nanoseconds of a second.
const SECOND_NS: u64 = 1_000_000_000;
/// A bucket holds at most what flows in during this time.
const BURST_NS: u64 = SECOND_NS / 10;

/// A token bucket, kept as a time: before that time nothing may be taken. A single taking may exceed what the bucket holds, which
/// moves the time into the future.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    per_second: u64,
    due_ns: u64,
}

impl Bucket {
    pub(crate) fn new(per_second: u64, now_ns: u64) -> Self {
        Self { per_second: max(1, per_second), due_ns: now_ns }
    }

    /// Returns when something may be taken.
    pub(crate) const fn ready_ns(&self) -> u64 {
        self.due_ns
    }

    pub(crate) fn take(&mut self, units: u64, now_ns: u64) {
        let cost = units.saturating_mul(SECOND_NS) / self.per_second;
        self.due_ns = max(self.due_ns, now_ns.saturating_sub(BURST_NS)).saturating_add(cost);
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
            now = now.max(bucket.ready_ns());
            bucket.take(64, now);
            passed += 64;
        }
        assert!((9_900..=10_200).contains(&passed), "{passed}");
    }

    #[test]
    fn silence_is_worth_a_tenth_of_a_second() {
        let mut bucket = Bucket::new(1000, 0);
        let now = 3600 * SECOND_NS;
        bucket.take(1100, now);
        assert_eq!(bucket.ready_ns(), now + SECOND_NS);
        bucket.take(u64::MAX, now);
        assert!(bucket.ready_ns() > now);
    }
}
