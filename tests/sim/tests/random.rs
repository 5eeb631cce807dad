//! Random guests, an audit after every call.

use sim::paging::{self, Totals, Ways};

/// Calls in all; a soak may ask for more.
fn wanted() -> u64 {
    std::env::var("SIM_CALLS").ok().and_then(|n| n.parse().ok()).unwrap_or(2_000_000)
}

/// Where the seeds start; a soak may move it.
fn first_seed() -> u64 {
    std::env::var("SIM_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

#[test]
fn random_guests_never_break_a_promise() {
    const CALLS: u64 = 10_000;
    let mut totals = Totals::default();
    let seeds = wanted().div_ceil(CALLS);
    for seed in first_seed()..first_seed() + seeds {
        match paging::run(seed, CALLS, Ways::Both) {
            Ok(run) => totals.add(&run),
            Err(why) => panic!("{why}"),
        }
    }
    sim::tell(&totals);
    let (tried, granted) = totals.families.iter().fold((0, 0), |sum, n| (sum.0 + n.0, sum.1 + n.1));
    assert!(granted * 100 >= tried * 30, "too few calls succeed for the test to mean much");
    for (name, (_, granted)) in paging::world::FAMILIES.iter().zip(totals.families) {
        assert!(granted * 100 >= tried, "{name}: less than 1 % of all calls are granted ones of this family");
    }
    assert!(totals.roots_pinned > 1000, "L4 tables are pinned");
    assert!(totals.resumed > 1000, "calls are interrupted and then answered");
    assert!(totals.abandoned > 10, "climbs are given up");
    assert!(totals.reused > 1000, "frames are tables, then writable, then tables again");
    assert!(totals.two_unfinished > 1000, "work of several domains is unfinished at once");
    assert!(totals.destroyed > 1000, "domains are destroyed");
    assert!(totals.flushes > 1000, "types change only with flushes");
}
