//! The audit must notice when a rule is left out. One test, because a planted fault is planted in the whole process.

use hv_core::fault::{Fault, plant};
use sim::paging::{self, Ways};

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
        Fault::SkipStamp,
        Fault::SkipNoteOfUpdate,
        Fault::SkipNoteOfClimb,
    ];
    let short =
        [Fault::FastWithoutOwner, Fault::FastWithoutUse, Fault::SkipNoteOfFastUpdate, Fault::SkipNoteOfFastClimb];
    let (mut missed, count) = (Vec::new(), faults.len() + short.len());
    let all = faults.map(|fault| (fault, Ways::Long)).into_iter().chain(short.map(|fault| (fault, Ways::Both)));
    for (fault, ways) in all {
        plant(Some(fault));
        let found = (1..=200).find_map(|seed| paging::run(seed, 2000, ways).err());
        plant(None);
        match found {
            Some(why) => println!("{fault:?}: {why}"),
            None => missed.push(fault),
        }
    }
    sim::tell(format_args!("{} of {count} planted faults noticed", count - missed.len()));
    assert!(missed.is_empty(), "not noticed: {missed:?}");
    for seed in 1..=4 {
        assert_eq!(paging::run(seed, 2000, Ways::Both).err(), None, "without a fault there is nothing to notice");
    }
}
