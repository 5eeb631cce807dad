//! Hostile guests do the same with fast paths and without them, and find the same. `SEED=` repeats a run, `SIM_STEPS=` prolongs
//! it.

use sim::world::pair::{self, Totals};

fn wish(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

#[test]
fn hostile_guests_cannot_tell_fast_paths_from_slow_ones() {
    const RUN: u64 = 20_000;
    let (first, steps) = (wish("SEED", 1), wish("SIM_STEPS", 100_000));
    let mut totals = Totals::default();
    for seed in first..first + steps.div_ceil(RUN) {
        match pair::run(seed, RUN.min(steps)) {
            Ok(run) => totals.add(&run),
            Err(why) => panic!("{why}"),
        }
    }
    sim::tell(format_args!("{totals:?}"));
    assert!(totals.entered * 50 > totals.steps, "the entry code does a part of them");
    assert!(totals.short * 50 > totals.steps, "so do fast paths");
    assert!(totals.domains > 1, "domains are not alone");
    assert!(totals.switches * 300 > totals.steps, "vcpus take turns");
}
