//! What a guest sees and what ring 0 keeps is the same with fast paths and without them.

use sim::world::twins;

/// Steps in all, and the first seed; a soak may ask for others.
fn wanted() -> (u64, u64) {
    let wish = |name, default| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default);
    (wish("SEED", 1), wish("SIM_STEPS", 60_000))
}

#[test]
fn fast_paths_change_nothing_but_their_length() {
    let thread = std::thread::Builder::new().stack_size(128 << 20);
    let (seed, steps) = wanted();
    let totals = thread.spawn(move || twins::run(seed, steps)).expect("a thread").join().expect("no panic");
    let totals = totals.unwrap_or_else(|why| panic!("{why}"));
    sim::tell(format_args!("{totals:?}"));
    assert!(totals.entered * 10 > totals.steps, "the entry code does a part of them");
    assert!(totals.short * 10 > totals.steps, "so do fast paths");
}
