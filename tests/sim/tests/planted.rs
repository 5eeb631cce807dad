//! The audit must notice when a rule is left out. One test, because a planted fault is planted in the whole process.

use hv_core::fault::{Fault, plant};
use sim::paging;

#[test]
fn the_audit_finds_every_planted_fault() {
    let faults = [
        Fault::SkipUseDrop,
        Fault::SkipWritableCheck,
        Fault::SkipFlush,
        Fault::IgnoreUnfinished,
        Fault::SkipOwnerCheck,
        Fault::SkipUnwind,
        Fault::WideFastPath,
        Fault::PinTwice,
        Fault::SkipHoleFill,
        Fault::FreeEarly,
        Fault::SkipScrub,
        Fault::KeepForeign,
        Fault::ForgetOthers,
        Fault::CountEarly,
        Fault::BreakPromises,
    ];
    let mut missed = Vec::new();
    for fault in faults {
        plant(Some(fault));
        let found = (1..=200).find_map(|seed| paging::run(seed, 2000).err());
        plant(None);
        match found {
            Some(why) => println!("{fault:?}: {why}"),
            None => missed.push(fault),
        }
    }
    sim::tell(format_args!("{} of {} planted faults noticed", faults.len() - missed.len(), faults.len()));
    assert!(missed.is_empty(), "not noticed: {missed:?}");
    for seed in 1..=4 {
        assert_eq!(paging::run(seed, 2000).err(), None, "without a fault there is nothing to notice");
    }
}
