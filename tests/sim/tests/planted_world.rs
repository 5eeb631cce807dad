//! The audit of the whole world notices planted faults too. A process of its own: faults are planted in all of it. Those
//! that take several CPUs, many retyped frames, or memory that has run out to show are left to `planted.rs`.

use hv_core::fault::{Fault, plant};
use sim::world::hostile;

/// Runs until the audit notices the fault that is planted, and answers why; the seeds are few and always the same.
fn noticed() -> Option<String> {
    let life =
        move |seed| std::thread::Builder::new().stack_size(64 << 20).spawn(move || hostile::run(seed, 1, 30_000));
    (1..=16).find_map(|seed| life(seed).expect("a thread").join().expect("panics are caught").err())
}

#[test]
fn the_audit_notices_planted_faults() {
    let faults = [
        Fault::SkipUseDrop,
        Fault::SkipWritableCheck,
        Fault::SkipOwnerCheck,
        Fault::SkipUnwind,
        Fault::WideFastPath,
        Fault::PinTwice,
        Fault::SkipHoleFill,
        Fault::FreeEarly,
        Fault::KeepForeign,
        Fault::ForgetOthers,
        Fault::StartOver,
        Fault::DeafCalls,
        Fault::CountEarly,
        Fault::KeepBreakpoints,
        Fault::ArriveUnkept,
        Fault::SeenOverRoot,
        Fault::SeenOverLeaf,
        Fault::KeepVector,
    ];
    let missed: Vec<Fault> = faults
        .into_iter()
        .filter(|fault| {
            plant(Some(*fault));
            let why = noticed();
            // Without what led to it.
            let why = why.as_deref().and_then(|why| why.split("; last:").next());
            sim::tell(format_args!("{fault:?}: {why:?}"));
            why.is_none()
        })
        .collect();
    plant(None);
    assert!(missed.is_empty(), "the audit missed {missed:?}");
}
