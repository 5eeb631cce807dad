//! The audit notices faults that take several CPUs to show, and that one CPU alone does not show. A process of its own:
//! faults are planted in all of it.

use hv_core::fault::{Fault, plant};
use sim::world::{crowd, meanwhile};

/// Plays a crowd on so many CPUs; the seeds are always the same. What the audit noticed first.
fn noticed(cpus: usize, seeds: u64, steps: u64) -> Option<String> {
    let life =
        move |seed| std::thread::Builder::new().stack_size(64 << 20).spawn(move || crowd::run(seed, cpus, steps));
    (1..=seeds).find_map(|seed| life(seed).expect("a thread").join().expect("panics are caught").err())
}

#[test]
fn the_audit_notices_faults_of_several_cpus() {
    let faults = [
        (Fault::AwaitNoFlush, 2),
        (Fault::QueueTwice, 4),
        (Fault::RunTwice, 4),
        (Fault::SleepBlindly, 2),
        (Fault::WaitBlindly, 2),
        (Fault::LeaveOff, 4),
        (Fault::UnmakeTogether, 2),
        (Fault::CountApart, 4),
    ];
    let mut missed = Vec::new();
    for (fault, cpus) in faults {
        plant(Some(fault));
        let (alone, several) = (noticed(1, 1, 6_000), noticed(cpus, 400, 10_000));
        // Without what led to it.
        let why = several.as_deref().and_then(|why| why.split("; last:").next());
        sim::tell(format_args!("{fault:?}: {why:?}"));
        if alone.is_some() || why.is_none() {
            missed.push((fault, alone));
        }
    }
    // Those that take one moment among many are told as stories.
    let stories: [(Fault, fn()); 6] = [
        (Fault::LateTicket, meanwhile::a_use_that_ends_during_a_flush),
        (Fault::KeepFrame, meanwhile::a_list_that_becomes_a_table_during_a_flush),
        (Fault::UnmakeVisited, meanwhile::a_domain_that_dies_during_a_flush),
        (Fault::DropEarly, meanwhile::a_page_that_is_looked_at_while_its_entry_changes),
        (Fault::StampLate, meanwhile::a_page_that_becomes_a_table_while_its_last_use_ends),
        (Fault::ArmThenAnswer, meanwhile::a_stack_that_becomes_a_table_before_a_system_call),
    ];
    for (fault, story) in stories {
        plant(Some(fault));
        let told = std::panic::catch_unwind(story);
        let why = told.as_ref().err().and_then(|panic| panic.downcast_ref::<String>());
        sim::tell(format_args!("{fault:?}: {why:?}"));
        if told.is_ok() {
            missed.push((fault, None));
        }
    }
    plant(None);
    assert!(missed.is_empty(), "missed, or noticed on one CPU: {missed:?}");
}
