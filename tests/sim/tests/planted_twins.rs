//! The comparison of both ways notices when a short one does something else. A process of its own: faults are planted in all
//! of it.

use hv_core::fault::{Fault, plant};
use sim::world::twins;

#[test]
fn the_comparison_notices_planted_differences() {
    let faults = [Fault::ShortWithoutUse, Fault::SeenOverLeaf, Fault::ShortOfEvents, Fault::ArmAnyway];
    let life = |seed| std::thread::Builder::new().stack_size(128 << 20).spawn(move || twins::run(seed, 6_000));
    // The audit that looks when a guest comes may be first to notice: it panics.
    let run = |seed| life(seed).expect("a thread").join().map_or_else(|_| Some("the audit".into()), Result::err);
    let missed: Vec<Fault> = faults
        .into_iter()
        .filter(|fault| {
            plant(Some(*fault));
            let why = (1..=6).find_map(run);
            sim::tell(format_args!("{fault:?}: {:?}", why.as_deref().map(|why| why.get(..200).unwrap_or(why))));
            why.is_none()
        })
        .collect();
    plant(None);
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
