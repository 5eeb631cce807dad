//! A crowd of well-behaved guests on several CPUs. `SEED=`, `CPUS=` and `STEPS=` repeat or prolong a run.

use sim::wish;
use sim::world::{SHARES, Share, Totals, crowd};

#[test]
fn a_crowd_forgets_nobody() {
    let only = wish("CPUS", 0);
    SHARES.into_iter().filter(|share| [0, share.cpus as u64].contains(&only)).for_each(forgets_nobody);
}

fn forgets_nobody(share: Share) {
    const RUN: u64 = 10_000;
    const STEPS: u64 = 120_000;
    let (first, steps) = (wish("SEED", 1), wish("STEPS", STEPS));
    let seeds = first..first + steps.div_ceil(RUN);
    let runs = sim::live_each(seeds, |seed| crowd::run(seed, share.cpus, RUN.min(steps)));
    let totals: Totals = runs.unwrap_or_else(|why| panic!("{why}")).into_iter().collect();
    println!("{totals}");
    sim::tell(format_args!("a crowd on {} CPUs: {}", share.cpus, totals.sum()));
    assert!(steps < STEPS || totals.audits >= share.crowd, "{} audits on {} CPUs", totals.audits, share.cpus);
}
