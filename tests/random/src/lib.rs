//! Random numbers for tests. A seed determines them, so a run can be repeated.
//!
//! `SEED=5 cargo test NAME` repeats a run whose output says `SEED=5`.

#![forbid(unsafe_code)]
#![allow(clippy::missing_panics_doc, reason = "a test that asks for too much may panic")]

use std::time::{SystemTime, UNIX_EPOCH};

/// A generator of random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Takes the seed from the environment variable `SEED`, or else from the time. Prints the seed.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "a default value would not print")]
    pub fn new() -> Self {
        let seed = seed(std::env::var("SEED").ok().as_deref()).unwrap_or_else(|error| panic!("{error}"));
        println!("SEED={seed}");
        Self(seed)
    }

    /// Returns the generator of a seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns a generator of other numbers, which this generator's seed determines too.
    #[must_use]
    pub fn another(&self) -> Self {
        Self(self.0 ^ 1)
    }

    /// Returns the next number.
    #[allow(clippy::should_implement_trait, reason = "a generator has no end")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Returns a number below `bound`, which must be above 0.
    pub fn below<N: TryFrom<u64> + TryInto<u64>>(&mut self, bound: N) -> N {
        let bound: u64 = bound.try_into().unwrap_or(0);
        assert_ne!(bound, 0, "no number is below the bound");
        (self.next() % bound).try_into().unwrap_or_else(|_| unreachable!("a number below a bound of its type"))
    }

    /// Returns true with the chance 1 in `chance`.
    pub fn one_in(&mut self, chance: usize) -> bool {
        self.below(chance) == 0
    }

    /// Returns one of `from`, which must not be empty.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Returns a byte.
    pub fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    /// Returns `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }
}

/// Returns the seed that `SEED` gives, or one from the time where `SEED` is not set.
fn seed(given: Option<&str>) -> Result<u64, String> {
    let Some(text) = given else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| format!("the time: {error}"))?;
        return Ok(u64::from(now.subsec_nanos()) ^ now.as_secs() << 20);
    };
    text.parse().map_err(|_| format!("SEED={text}: not a whole number of 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_determines_the_numbers() {
        // The first numbers of SplitMix64 with the seed 1234567, as its published test vectors have them.
        let mut random = Random::seeded(1_234_567);
        let numbers = [0; 3].map(|_| random.next());
        assert_eq!(numbers, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
        assert_ne!(random.another().next(), random.next());
    }

    #[test]
    fn numbers_stay_below_their_bound() {
        let mut random = Random::seeded(1);
        let mut met = [0; 3];
        for _ in 0..300 {
            met[random.below(3)] += 1;
            assert!(random.below(200_u8) < 200);
            assert_eq!(random.below(1), 0);
        }
        assert!(met.iter().all(|&count| count > 50), "{met:?}");
        assert!([4, 5].contains(&random.pick(&[4, 5])));
        assert_eq!(random.bytes(40).len(), 40);
    }

    #[test]
    #[should_panic(expected = "no number is below the bound")]
    fn no_number_is_below_0() {
        Random::seeded(1).below(0);
    }

    #[test]
    fn what_is_no_seed_is_refused_by_name() {
        assert_eq!(seed(Some("17")), Ok(17));
        assert_eq!(seed(Some("0x17")), Err("SEED=0x17: not a whole number of 64 bits".into()));
        assert!(seed(None).is_ok());
    }
}
