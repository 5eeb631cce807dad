//! What several tests use.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use test_random::Random;

/// Mostly near `around`, sometimes anywhere: what finds off-by-one checks.
#[allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
pub fn index(random: &mut Random, around: u32) -> u32 {
    match random.below(4) {
        0 => random.next() as u32,
        1 => around.wrapping_add(random.below(12)),
        2 => around.wrapping_sub(random.below(12)),
        _ => around,
    }
}
