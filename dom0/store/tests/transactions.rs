//! Optimistic transactions (ABI io 3.4).

mod common;
use common::*;
use store::Quotas;

#[test]
fn changes_are_private_until_the_end() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.ask(guest, WRITE, "data/a|old").unwrap();
    let tx = world.start(guest);
    world.ask_in(guest, tx, WRITE, "data/a|new").unwrap();
    world.ask_in(guest, tx, WRITE, "data/b/c|made").unwrap();
    assert_eq!(world.ask_in(guest, tx, READ, "data/a|"), value("new"));
    assert_eq!(world.ask_in(guest, tx, DIRECTORY, "data|"), value("a|b|"));
    assert_eq!(world.ask(guest, READ, "data/a|"), value("old"));
    assert_eq!(world.ask(guest, DIRECTORY, "data|"), value("a|"));
    assert_eq!(world.ask_in(guest, tx, END, "T|"), ok());
    assert_eq!(world.ask(guest, READ, "data/a|"), value("new"));
    assert_eq!(world.ask(guest, READ, "data/b/c|"), value("made"));
}

#[test]
fn dropping_leaves_no_trace_and_ends_the_number() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let tx = world.start(guest);
    world.ask_in(guest, tx, WRITE, "data/a|x").unwrap();
    world.ask_in(guest, tx, RM, "data|").unwrap();
    assert_eq!(world.ask_in(guest, tx, END, "F|"), ok());
    assert_eq!(world.ask(guest, DIRECTORY, "data|"), value(""));
    for kind in [READ, WRITE, WATCH, END, START] {
        assert_eq!(world.ask_in(guest, tx, kind, "data|t|"), refused("ENOENT"), "kind {kind}");
    }
}

#[test]
fn numbers_are_per_connection_small_and_used_again() {
    let mut world = World::new(&[5, 6]);
    let (five, six) = (World::guest(5), World::guest(6));
    assert_eq!([world.start(five), world.start(five), world.start(six)], [1, 2, 1]);
    assert_eq!(world.ask_in(six, 2, END, "T|"), refused("ENOENT"), "another's number");
    assert_eq!(world.ask_in(five, 1, END, "T|"), ok());
    assert_eq!(world.start(five), 1);
    assert_eq!(world.ask_in(five, 1, START, "|"), refused("EBUSY"));
    assert_eq!(world.ask(five, END, "T|"), refused("EINVAL"), "no transaction to end");
}

/// What the transaction does, what somebody else does meanwhile, and whether they conflict.
#[test]
fn everything_touched_is_checked() {
    type Step = (u32, &'static str);
    let cases: [(&[Step], &[Step], bool); 16] = [
        (&[(READ, "data/a|")], &[(WRITE, "data/a|2")], true),
        (&[(READ, "data/a|")], &[(WRITE, "data/a|1")], true),
        (&[(READ, "data/a|")], &[(WRITE, "data/b|2")], false),
        (&[(READ, "data/a|")], &[(RM, "data/a|")], true),
        (&[(READ, "data/a|")], &[(SET_PERMS, "data/a|r5|")], true),
        (&[(GET_PERMS, "data/a|")], &[(WRITE, "data/a|2")], true),
        (&[(READ, "data/none|")], &[(WRITE, "data/none|2")], true),
        (&[(DIRECTORY, "data|")], &[(WRITE, "data/new|2")], true),
        (&[(DIRECTORY, "data|")], &[(WRITE, "data/a|2")], false),
        (&[(WRITE, "data/a|3")], &[(WRITE, "data/a|2")], true),
        (&[(WRITE, "data/x|3")], &[(WRITE, "data/y|2")], true),
        (&[(WRITE, "data/a/x|3")], &[(WRITE, "data/b/y|2")], false),
        (&[(RM, "data/a|")], &[(WRITE, "data/a/deep|2")], true),
        (&[(RM, "data/b|")], &[(WRITE, "data/a|2")], false),
        (&[(READ, "data/a|")], &[(RM, "data/a|"), (WRITE, "data/a|1")], true),
        (&[(MKDIR, "data/a|")], &[(WRITE, "data/a|2")], true),
    ];
    for (inside, outside, conflict) in cases {
        let mut world = World::new(&[5]);
        let guest = World::guest(5);
        world.ask(guest, WRITE, "data/a|1").unwrap();
        world.ask(guest, WRITE, "data/b|1").unwrap();
        let tx = world.start(guest);
        for (kind, payload) in inside {
            let _ = world.ask_in(guest, tx, *kind, payload);
        }
        for (kind, payload) in outside {
            world.ask(guest, *kind, payload).unwrap();
        }
        let expected = if conflict { refused("EAGAIN") } else { ok() };
        assert_eq!(world.ask_in(guest, tx, END, "T|"), expected, "{inside:?} / {outside:?}");
    }
}

#[test]
fn of_two_that_collide_one_wins_and_the_other_may_try_again() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.ask(guest, WRITE, "data/n|0").unwrap();
    let increment = |world: &mut World, tx: u32| {
        let old: u32 = world.ask_in(guest, tx, READ, "data/n|").unwrap().parse().unwrap();
        world.ask_in(guest, tx, WRITE, &format!("data/n|{}", old + 1)).unwrap();
    };
    let (first, second) = (world.start(guest), world.start(guest));
    increment(&mut world, first);
    increment(&mut world, second);
    assert_eq!(world.ask_in(guest, second, END, "T|"), ok());
    assert_eq!(world.ask_in(guest, first, END, "T|"), refused("EAGAIN"));
    let retry = world.start(guest);
    increment(&mut world, retry);
    assert_eq!(world.ask_in(guest, retry, END, "T|"), ok());
    assert_eq!(world.ask(guest, READ, "data/n|"), value("2"));
}

#[test]
fn a_transaction_that_hit_a_quota_is_doomed() {
    let quotas = Quotas { nodes: 6, ..Quotas::default() };
    let mut world = World::with_quotas(&[5], quotas);
    let guest = World::guest(5);
    let tx = world.start(guest);
    world.ask_in(guest, tx, WRITE, "data/ok|1").unwrap();
    assert_eq!(world.ask_in(guest, tx, WRITE, "data/1/2/3/4/5|x"), refused("ENOSPC"));
    assert_eq!(world.ask_in(guest, tx, READ, "data/ok|"), value("1"), "it goes on");
    assert_eq!(world.ask_in(guest, tx, END, "T|"), refused("ENOSPC"));
    assert_eq!(world.ask(guest, DIRECTORY, "data|"), value(""), "nothing of it happened");
    assert_eq!(world.ask(guest, WRITE, "data/1/2/3/4/5|x"), refused("ENOSPC"));
    assert_eq!(world.ask(guest, DIRECTORY, "data|"), value(""), "nor half of a single request");
}

#[test]
fn quotas_hold_across_transactions_of_one_domain() {
    let quotas = Quotas { nodes: 6, ..Quotas::default() };
    let mut world = World::with_quotas(&[5], quotas);
    let guest = World::guest(5);
    world.ask(guest, MKDIR, "data/a|").unwrap();
    world.ask(guest, MKDIR, "data/b|").unwrap();
    let (first, second) = (world.start(guest), world.start(guest));
    world.ask_in(guest, first, WRITE, "data/a/1/2|x").unwrap();
    world.ask_in(guest, second, WRITE, "data/b/1/2|x").unwrap();
    assert_eq!(world.ask_in(guest, first, END, "T|"), ok());
    assert_eq!(world.ask_in(guest, second, END, "T|"), refused("ENOSPC"));
    assert_eq!(world.store.usage(store::DomainId(5)).nodes, 6);
}

#[test]
fn removal_and_creation_inside_one_transaction() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.ask(guest, WRITE, "data/a/b|1").unwrap();
    let tx = world.start(guest);
    world.ask_in(guest, tx, RM, "data/a|").unwrap();
    assert_eq!(world.ask_in(guest, tx, READ, "data/a/b|"), refused("ENOENT"));
    world.ask_in(guest, tx, WRITE, "data/a|fresh").unwrap();
    assert_eq!(world.ask_in(guest, tx, DIRECTORY, "data/a|"), value(""));
    assert_eq!(world.ask_in(guest, tx, END, "T|"), ok());
    assert_eq!(world.ask(guest, READ, "data/a|"), value("fresh"));
    assert_eq!(world.ask(guest, READ, "data/a/b|"), refused("ENOENT"));
}

#[test]
fn a_local_transaction_never_conflicts_and_makes_others_conflict() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let tx = world.start(guest);
    world.ask_in(guest, tx, READ, "data/a|").unwrap_err();
    let counted = world.store.session(world.dom0).transaction(|t| {
        t.write("/local/domain/5/data/a", b"x")?;
        t.list("/local/domain/5/data")
    });
    assert_eq!(counted.unwrap(), ["a"]);
    assert_eq!(world.ask_in(guest, tx, END, "T|"), refused("EAGAIN"));
}

#[test]
fn what_was_absent_stays_absent_inside() {
    let mut world = World::new(&[]);
    // A privileged caller, who touches no ancestor to learn that a node is absent.
    let dom0 = world.dom0;
    let tx = world.start(dom0);
    assert_eq!(world.ask_in(dom0, tx, READ, "/a|"), refused("ENOENT"));
    world.ask(dom0, WRITE, "/a|outside").unwrap();
    assert_eq!(world.ask_in(dom0, tx, READ, "/a|"), refused("ENOENT"));
    world.ask(dom0, RM, "/a|").unwrap();
    world.ask_in(dom0, tx, WRITE, "/a|inside").unwrap();
    assert_eq!(world.ask_in(dom0, tx, END, "T|"), ok());
    assert_eq!(world.ask(dom0, READ, "/a|"), value("inside"));
    let tx = world.start(dom0);
    assert_eq!(world.ask_in(dom0, tx, READ, "/b|"), refused("ENOENT"));
    world.ask(dom0, WRITE, "/b|outside").unwrap();
    world.ask_in(dom0, tx, WRITE, "/b|inside").unwrap();
    world.ask(dom0, RM, "/b|").unwrap();
    assert_eq!(world.ask_in(dom0, tx, END, "T|"), refused("EAGAIN"), "the root changed twice");
    assert_eq!(world.ask(dom0, READ, "/b|"), refused("ENOENT"));
}

#[test]
fn what_was_read_stays_so_inside() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.ask(guest, WRITE, "data/a|old").unwrap();
    let tx = world.start(guest);
    assert_eq!(world.ask_in(guest, tx, READ, "data/a|"), value("old"));
    world.ask(guest, WRITE, "data/a|new").unwrap();
    assert_eq!(world.ask_in(guest, tx, READ, "data/a|"), value("old"));
    assert_eq!(world.ask_in(guest, tx, END, "T|"), refused("EAGAIN"));
}

#[test]
fn rights_given_to_a_domain_that_died_meanwhile_are_not_committed() {
    let mut world = World::new(&[5, 6]);
    let guest = World::guest(5);
    let tx = world.start(guest);
    world.ask_in(guest, tx, SET_PERMS, "data|n5|b6|").unwrap();
    world.ask(world.dom0, RELEASE, "6|").unwrap();
    world.introduce(6);
    assert_eq!(world.ask_in(guest, tx, END, "T|"), refused("EAGAIN"));
    assert_eq!(world.ask(guest, GET_PERMS, "data|"), value("n5|r0|"));
}
