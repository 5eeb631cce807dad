//! The comparisons of both ways notice when a short one does something else. A process of its own: faults are planted in all
//! of it.

use hv_core::fault::{Fault, plant};
use sim::world::{pair, twins};

/// Plays with a seed, and answers what was noticed.
type Run<'a> = &'a dyn Fn(u64) -> Option<String>;

#[test]
fn the_comparison_notices_planted_differences() {
    let life = |seed| std::thread::Builder::new().stack_size(128 << 20).spawn(move || twins::run(seed, 6_000));
    // The audit that looks when a guest comes may be first to notice: it panics.
    let alone = |seed| life(seed).expect("a thread").join().map_or_else(|_| Some("the audit".into()), Result::err);
    let several = |seed| pair::run(seed, 6_000).err();
    let cases: [(Fault, Run<'_>); 8] = [
        (Fault::FastWithoutUse, &alone),
        (Fault::SeenOverLeaf, &alone),
        (Fault::FastOverEvents, &alone),
        (Fault::ArmAnyway, &alone),
        (Fault::FastWithoutUse, &several),
        (Fault::SeenOverLeaf, &several),
        (Fault::FastOverEvents, &several),
        (Fault::StayArmed, &several),
    ];
    let missed: Vec<Fault> = cases
        .into_iter()
        .filter(|(fault, run)| {
            plant(Some(*fault));
            let why = (1..=6).find_map(run);
            sim::tell(format_args!("{fault:?}: {:?}", why.as_deref().map(|why| why.get(..200).unwrap_or(why))));
            why.is_none()
        })
        .map(|(fault, _)| fault)
        .collect();
    plant(None);
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
