//! What an unprivileged domain may use (ABI io 3.6), and that nobody else pays for it.

mod common;
use common::*;
use store::{DomainId, Quotas};

const FIVE: DomainId = DomainId(5);

#[test]
fn nodes_are_counted_per_owner_and_come_back() {
    let mut world = World::new(&[5, 6]);
    let guest = World::guest(5);
    let mut made = 0;
    let refusal = loop {
        match world.ask(guest, WRITE, &format!("data/dir-{}/{made}|x", made % 50)) {
            Ok(_) => made += 1,
            Err(name) => break name,
        }
    };
    assert_eq!((refusal.as_str(), world.store.usage(FIVE).nodes), ("ENOSPC", 1000));
    assert_eq!(world.ask(guest, WRITE, "data/dir-0/0|y"), ok(), "no new node");
    assert_eq!(world.ask(World::guest(6), WRITE, "data/x|1"), ok(), "not the neighbour's problem");
    assert_eq!(world.store.session(world.dom0).write("/local/domain/5/data/z", b""), Ok(()));
    assert_eq!(world.ask(guest, RM, "data/dir-0|"), ok());
    assert_eq!(world.ask(guest, WRITE, "data/again|y"), ok());
}

#[test]
fn a_node_is_only_so_large() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let most = 2048 - 8; // two permission entries
    assert_eq!(world.ask(guest, WRITE, &format!("data/a|{}", "x".repeat(most))), ok());
    let more = format!("data/a|{}", "x".repeat(most + 1));
    assert_eq!(world.ask(guest, WRITE, &more), refused("ENOSPC"));
    assert_eq!(world.ask(guest, READ, "data/a|").unwrap().len(), most);
    assert_eq!(world.ask(guest, MKDIR, "data/a/b|"), refused("ENOSPC"), "names count too");
    assert_eq!(world.store.session(world.dom0).write("/big", &[0; 4096]), Ok(()));
    let too_big = world.store.session(world.dom0).write("/big", &[0; 4097]);
    assert_eq!(too_big, Err(store::StoreError::TooBig), "it could not be read");
}

#[test]
fn permission_lists_are_only_so_long() {
    let mut world = World::new(&[5, 6, 7, 8, 9, 10]);
    let guest = World::guest(5);
    assert_eq!(world.ask(guest, SET_PERMS, "data|n5|r6|r7|r8|r9|"), ok());
    assert_eq!(world.ask(guest, SET_PERMS, "data|n5|r6|r7|r8|r9|r10|"), refused("ENOSPC"));
}

#[test]
fn paths_are_only_so_long() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let long = format!("data/{}", "x".repeat(2048 - 5));
    assert_eq!(world.ask(guest, READ, &format!("{long}|")), refused("ENOENT"));
    assert_eq!(world.ask(guest, READ, &format!("{long}x|")), refused("EINVAL"));
    assert_eq!(world.ask(guest, READ, &format!("/local/domain/5/{long}x|")), refused("EINVAL"));
    let elsewhere = format!("/{}|", "x".repeat(2048));
    assert_eq!(world.ask(guest, READ, &elsewhere), refused("EINVAL"));
    assert_eq!(world.ask(world.dom0, READ, &elsewhere), refused("ENOENT"));
}

#[test]
fn watches_and_transactions_are_only_so_many() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    for number in 0..128 {
        assert_eq!(world.ask(guest, WATCH, &format!("data|{number}|")), ok());
    }
    assert_eq!(world.ask(guest, WATCH, "data|more|"), refused("E2BIG"), "as xenstored");
    assert_eq!(world.ask(guest, UNWATCH, "data|7|"), ok());
    assert_eq!(world.ask(guest, WATCH, "data|more|"), ok());
    for _ in 0..10 {
        world.start(guest);
    }
    assert_eq!(world.ask(guest, START, "|"), refused("ENOSPC"));
    assert_eq!(world.ask_in(guest, 4, END, "F|"), ok());
    assert_eq!(world.start(guest), 4);
}

#[test]
fn a_transaction_touches_only_so_many_nodes() {
    let quotas = Quotas { transaction_nodes: 8, ..Quotas::default() };
    let mut world = World::with_quotas(&[5], quotas);
    let guest = World::guest(5);
    let tx = world.start(guest);
    let mut refusal = None;
    for number in 0..10 {
        if let Err(name) = world.ask_in(guest, tx, READ, &format!("data/{number}|")) {
            refusal = Some(name).filter(|name| name != "ENOENT").or(refusal);
        }
    }
    assert_eq!(refusal.as_deref(), Some("ENOSPC"));
    assert_eq!(world.ask_in(guest, tx, END, "T|"), refused("ENOSPC"));
}

#[test]
fn memory_is_bounded_whatever_it_is_used_for() {
    let quotas = Quotas { memory_bytes: 60_000, watches: 100_000, ..Quotas::default() };
    let mut world = World::with_quotas(&[5], quotas);
    let guest = World::guest(5);
    let value = "v".repeat(1500);
    let mut nodes = 0;
    while world.ask(guest, WRITE, &format!("data/n{nodes}|{value}")).is_ok() {
        nodes += 1;
    }
    assert!((20..40).contains(&nodes), "{nodes}");
    assert_eq!(world.ask(guest, WRITE, &format!("data/x|{value}")), refused("ENOMEM"));
    let mut watches = 0;
    while world.ask(guest, WATCH, &format!("data|{watches}{}|", "t".repeat(500))).is_ok() {
        watches += 1;
    }
    assert!(watches < 10, "{watches}");
    for number in 0..3 {
        assert_eq!(world.ask(guest, RM, &format!("data/n{number}|")), ok(), "however full it is");
    }
    let tx = world.start(guest);
    let more = (0..3).map(|n| world.ask_in(guest, tx, WRITE, &format!("data/tx{n}|{value}")));
    assert_eq!(more.collect::<Vec<_>>(), [ok(), refused("ENOMEM"), refused("ENOMEM")]);
    assert_eq!(world.ask_in(guest, tx, END, "T|"), refused("ENOMEM"));
}

#[test]
fn who_does_not_read_is_not_read() {
    let mut world = World::new(&[5, 6]);
    let guest = World::guest(5);
    world.ask(guest, WRITE, &format!("data/a|{}", "x".repeat(2000))).unwrap();
    let request = store::wire::message(READ, 1, 0, b"data/a\0");
    let mut sent = 0;
    while world.store.handle(guest, &request).unwrap().taken > 0 {
        sent += 1;
        assert!(sent < 100, "unbounded");
    }
    assert!(!world.store.accepts_input(guest));
    assert_eq!(sent, 8, "16 KiB of replies wait");
    assert_eq!(world.ask(World::guest(6), READ, "data|"), value(""), "others go on");
    assert_eq!(world.drain(guest).len(), sent);
    assert!(world.store.accepts_input(guest));
}

#[test]
fn depth_costs_neither_recursion_nor_other_domains() {
    let mut world = World::new(&[5]);
    let deep = format!("data{}|x", "/a".repeat(1000));
    assert_eq!(world.ask(World::guest(5), WRITE, &deep), refused("ENOMEM"));
    let deepest = "/a".repeat(1500);
    let mut session = world.store.session(world.dom0);
    session.write(&deepest, b"x").unwrap();
    session.remove_gradually("/a").unwrap();
    while world.store.work() {}
    assert!(world.store.session(world.dom0).read("/a").is_err());
}
