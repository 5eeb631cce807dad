//! A crowd of well-behaved guests on several CPUs. `SEED=`, `CPUS=` and `STEPS=` repeat or prolong a run.

use sim::world::{Totals, crowd};

fn wish(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

#[test]
fn a_crowd_forgets_nobody() {
    const RUN: u64 = 10_000;
    let (first, steps, only) = (wish("SEED", 1), wish("STEPS", 80_000), wish("CPUS", 0));
    for cpus in [1, 2, 4].into_iter().filter(|cpus| [0, *cpus].contains(&only)) {
        let mut totals = Totals::default();
        for seed in first..first + steps.div_ceil(RUN) {
            let life = move || crowd::run(seed, usize::try_from(cpus).expect("few"), RUN.min(steps));
            // The world is made on the stack before it is put in its place.
            let one = std::thread::Builder::new().stack_size(64 << 20).spawn(life);
            match one.expect("a thread").join().expect("the panics of the rules are caught") {
                Ok(run) => totals.add(&run),
                Err(why) => panic!("{why}"),
            }
        }
        println!("{cpus} CPUs:\n{totals}");
    }
}
