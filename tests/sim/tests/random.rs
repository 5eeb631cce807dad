//! Random guests of the page-table rules, on 1, 2 and 4 CPUs as their seeds say, and an audit of everything after every
//! call: it recounts all uses and references from the tables and the books. A frame that nobody has touched since is not
//! read again, except at each 512th audit, which reads all. `SIM_SEED=` moves the seeds, `SIM_CALLS=` prolongs the run.

use sim::paging::{self, Totals, Ways};
use sim::wish;

#[test]
fn random_guests_never_break_a_promise() {
    const CALLS: u64 = 10_000;
    let (first, calls) = (wish("SIM_SEED", 1), wish("SIM_CALLS", 2_000_000));
    let mut totals = Totals::default();
    let runs = sim::live_each(first..first + calls.div_ceil(CALLS), |seed| paging::run(seed, CALLS, Ways::Both));
    runs.unwrap_or_else(|why| panic!("{why}")).iter().for_each(|run| totals.add(run));
    sim::tell(&totals);
    assert!(totals.calls >= calls && totals.audits >= totals.calls, "an audit follows each call");
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
