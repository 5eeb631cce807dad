//! A limit per second, and random numbers.

/// Nanoseconds of a second.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Allows so many acts in a second, and as many at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    per_second: u64,
    /// Until when acts are paid for. One act costs a second's share.
    paid_ns: u64,
}

impl Bucket {
    pub(crate) const fn new(per_second: u64) -> Self {
        Self { per_second, paid_ns: 0 }
    }

    /// Takes one act. Returns false if there were too many.
    pub(crate) fn take(&mut self, now_ns: u64) -> bool {
        let next = self.paid_ns.max(now_ns) + SECOND / self.per_second;
        if next > now_ns + SECOND {
            return false;
        }
        self.paid_ns = next;
        true
    }
}

/// Numbers that others cannot guess as long as they do not know the seed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Returns a number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u32) -> u32 {
        u32::try_from(self.next() % u64::from(limit)).unwrap_or(0)
    }
}

/// Spreads every bit of a word over all bits.
pub(crate) const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
