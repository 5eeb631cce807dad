//! Requests that take more than one session.

use super::{Bench, RAM, RO, RW, US, entry_at, refused, until_done};
use hv_core::addr::Frame;
use hv_core::domain::MAX_DOMAIN_VCPUS;
use hv_core::frame::{Refused, Use};
use hv_core::paging::{Stop, WAITING};

#[test]
fn a_long_promotion_is_answered_once() {
    let b = Bench::new();
    let [root, .., l1, page] = b.tree();
    let (calls, outcome) = until_done(&b, 100, |s| s.pin(root, 4));
    assert_eq!(outcome, Ok(()));
    assert!((19..=24).contains(&calls), "about 2000 entries at 100 a call: {calls}");
    assert_eq!((b.info(root), b.info(page)), ((Use::L4, 1, 2), (Use::Writable, 1, 2)));
    let (calls, outcome) = until_done(&b, 100, |s| s.unpin(root));
    assert_eq!((calls, outcome), (1, Ok(())), "taking down has no answer: it is a debt");
    assert_eq!(b.info(l1).1, 1, "which is not paid yet");
    let (calls, outcome) = until_done(&b, 100, |s| s.mmu_update(entry_at(page, 0), 1, US));
    assert_eq!(outcome, Ok(()));
    assert!(calls > 15, "but before anything else: {calls}");
    assert_eq!((b.info(l1).1, b.info(page)), (0, (Use::Writable, 0, 1)));
}

#[test]
fn a_long_refusal_is_told_once_and_then_forgotten() {
    let b = Bench::new();
    let [root, l3, l2, l1, page] = b.tree();
    b.put(l1, 511, Frame::from_u32(RAM + 1).address() | RO);
    let (calls, outcome) = until_done(&b, 100, |s| s.pin(root, 4));
    assert_eq!(outcome, refused(Refused::NotYourDevice));
    assert!(calls > 5);
    for f in [root, l3, l2, l1, page] {
        assert_eq!((b.info(f).1, b.info(f).2), (0, 1), "nothing is held");
    }
    b.put(l1, 511, 0);
    assert_eq!(until_done(&b, 100, |s| s.pin(root, 4)).1, Ok(()), "it is judged anew");
}

#[test]
fn an_interrupted_request_survives_others_in_between() {
    let b = Bench::new();
    let [root, ..] = b.tree();
    let (l1, page) = (b.page(), b.page());
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    assert_eq!(b.with(600, |s| s.pin(root, 4)), Err(Stop::More));
    // Another vcpu of the domain has to finish that first, whatever it wants.
    let (calls, outcome) = until_done(&b, 600, |s| s.mmu_update(entry_at(l1, 0), page.address() | RW, US));
    assert_eq!(outcome, Ok(()));
    assert!(calls > 1);
    assert_eq!(b.info(root), (Use::L4, 1, 2), "one use waits with the domain");
    assert!(!b.table.info(root).unwrap().kind.pinned);
    assert_eq!(b.with(2, |s| s.pin(root, 4)), Ok(()), "ready at once");
    assert_eq!(b.info(root), (Use::L4, 1, 2));
}

#[test]
fn outcomes_nobody_comes_for_are_let_go() {
    let b = Bench::new();
    const MORE: usize = WAITING + 2;
    let tables: Vec<Frame> = (0..MORE).map(|_| b.page()).collect();
    for &f in &tables {
        assert_eq!(b.with(300, |s| s.pin(f, 1)), Err(Stop::More)); // never asked again
        assert_eq!(b.does(|s| s.unpin(f)), refused(Refused::NotPinned)); // but finished
    }
    let held: Vec<u32> = tables.iter().map(|f| b.info(*f).1).collect();
    let mut kept = [1; MORE];
    (kept[0], kept[1]) = (0, 0);
    assert_eq!(held, kept, "the oldest went");
    assert_eq!(until_done(&b, 4096, |s| s.tear_down()).1, Ok(()));
    assert_eq!(b.table.owned(US), 0);
}

/// As many callers as a domain has vcpus, each with a request that takes more than one session: whoever comes finishes
/// what the one before began. Outcomes that were let go before their request came again were worked out anew, for ever.
#[test]
fn as_many_callers_as_vcpus_are_all_answered() {
    let b = Bench::new();
    let mut waiting: Vec<Frame> = (0..MAX_DOMAIN_VCPUS).map(|_| b.page()).collect();
    let rounds = (1..=10).find(|_| {
        waiting.retain(|table| match b.with(300, |s| s.pin(*table, 1)) {
            Ok(()) => false,
            Err(Stop::More) => true,
            Err(why) => panic!("{why:?}"),
        });
        waiting.is_empty()
    });
    assert_eq!(rounds, Some(3), "{} have no answer after 10 rounds", waiting.len());
}
