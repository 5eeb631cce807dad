//! What a new domain finds in the slots of dead ones: nothing.
//!
//! One test in a program of its own, since planted faults hold for the whole process.

use hv_core::domain::{Powers, Spec};
use hv_core::fault::{Fault, INHERITED, plant};
use sim::world::script::tell;
use std::collections::BTreeSet;
use std::sync::mpsc;

type Fields = Vec<(&'static str, u64)>;

/// All that a new domain is made of; `soiled`: its slots are as the worst of domains could have left them.
fn born(soiled: bool) -> Fields {
    let (tell_fields, fields) = mpsc::channel();
    tell(200, move |stage| {
        if soiled {
            stage.world.soil();
        }
        let spec = Spec { id: None, powers: Powers::CONSOLE_WRITE, vcpus: 2, max_pages: 7, handle: [9; 16] };
        let world = stage.world;
        let domain = stage.cpu_ctx().create(&spec).expect("room for a domain");
        let mut seen = Fields::new();
        world.look(domain, &mut |name, value| seen.push((name, value)));
        tell_fields.send(seen).expect("somebody listens");
    });
    fields.recv().expect("the story was told")
}

/// The fields that two domains do not have in common.
fn differences(one: &Fields, other: &Fields) -> BTreeSet<&'static str> {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).filter(|(one, other)| one != other).map(|(one, _)| one.0).collect()
}

#[test]
fn a_new_domain_inherits_nothing_from_a_dead_one() {
    let fresh = born(false);
    assert!(fresh.len() > 150, "only {} fields are looked at", fresh.len());
    assert_eq!(differences(&fresh, &born(true)), BTreeSet::new());
    plant(Some(Fault::InheritField));
    assert_eq!(differences(&fresh, &born(true)), BTreeSet::from([INHERITED]), "the planted fault is found");
    plant(None);
}
