//! A limit per second.

use core::cmp::max;

/// Nanoseconds of a second.
const SECOND_NS: u64 = 1_000_000_000;
/// A bucket holds at most what flows in during this time.
const BURST_NS: u64 = SECOND_NS / 10;

/// A token bucket, kept as a time: before that time nothing may be taken. A single taking may exceed what the bucket holds,
/// which moves the time into the future.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    per_second: u64,
    /// The time in nanoseconds, times `per_second`: one unit costs [`SECOND_NS`].
    due: u128,
}

impl Bucket {
    /// Makes a bucket that is empty at `now_ns`, and into which `per_second` units flow in a second. 0 counts as 1.
    #[must_use]
    pub fn new(per_second: u64, now_ns: u64) -> Self {
        let per_second = max(1, per_second);
        Self { per_second, due: u128::from(now_ns) * u128::from(per_second) }
    }

    /// Returns whether something may be taken at `now_ns`.
    #[must_use]
    pub fn is_ready(&self, now_ns: u64) -> bool {
        self.due <= self.at(now_ns)
    }

    /// Returns when something may be taken, in nanoseconds.
    #[must_use]
    pub fn ready_ns(&self) -> u64 {
        u64::try_from(self.due.div_ceil(u128::from(self.per_second))).unwrap_or(u64::MAX)
    }

    /// Takes `units`, whether something may be taken or not.
    pub fn take(&mut self, units: u64, now_ns: u64) {
        let full = self.at(now_ns.saturating_sub(BURST_NS));
        self.due = max(self.due, full).saturating_add(cost(units));
    }

    /// Puts back `units` that were taken and not used.
    pub fn give(&mut self, units: u64) {
        self.due = self.due.saturating_sub(cost(units));
    }

    fn at(&self, now_ns: u64) -> u128 {
        u128::from(now_ns) * u128::from(self.per_second)
    }
}

fn cost(units: u64) -> u128 {
    u128::from(units) * u128::from(SECOND_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_lets_pass_what_it_says_in_a_second() {
        for (per_second, units) in [(1_000, 64), (1, 1), (7, 3), (3_000_000_000, 1), (u64::MAX / 16, 1 << 40)] {
            let mut bucket = Bucket::new(per_second, 0);
            let (mut now, mut passed) = (0, 0_u128);
            for _ in 0..10_000 {
                now = max(now, bucket.ready_ns());
                assert!(bucket.is_ready(now) && (now == 0 || !bucket.is_ready(bucket.ready_ns() - 1)));
                bucket.take(units, now);
                passed += u128::from(units);
            }
            let end = bucket.ready_ns();
            let allowed = u128::from(end) * u128::from(per_second) / u128::from(SECOND_NS);
            assert!(
                (passed..=passed + u128::from(per_second) / 1_000 + 1).contains(&allowed),
                "{per_second}: {passed}"
            );
        }
    }

    #[test]
    fn silence_is_worth_a_tenth_of_a_second() {
        let mut bucket = Bucket::new(1_000, 0);
        let now = 3_600 * SECOND_NS;
        assert!(bucket.is_ready(now));
        bucket.take(1_100, now);
        assert_eq!(bucket.ready_ns(), now + SECOND_NS);
        bucket.give(1_000);
        assert_eq!(bucket.ready_ns(), now);
        bucket.take(u64::MAX, now);
        assert!(!bucket.is_ready(now));
    }

    #[test]
    fn what_is_given_back_is_worth_no_more_than_a_tenth_of_a_second() {
        let mut bucket = Bucket::new(1_000, 0);
        let now = 3_600 * SECOND_NS;
        bucket.give(u64::MAX);
        bucket.take(100, now);
        assert_eq!(bucket.ready_ns(), now);
        bucket.take(1_000, now);
        assert_eq!(bucket.ready_ns(), now + SECOND_NS);
    }
}
