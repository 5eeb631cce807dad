//! Every kind of message, with its answers and refusals (ABI io 3.2).

mod common;
use common::*;
use store::{DomainId, Duty};

#[test]
fn values_are_raw_and_acknowledgements_terminated() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    assert_eq!(world.ask(guest, WRITE, "data/a|va|ue"), ok());
    assert_eq!(world.ask(guest, READ, "data/a|"), value("va|ue"));
    assert_eq!(world.ask(guest, READ, "/local/domain/5/data/a|"), value("va|ue"));
    assert_eq!(world.ask(guest, WRITE, "data/a|"), ok());
    assert_eq!(world.ask(guest, READ, "data/a|"), value(""));
    assert_eq!(world.ask(guest, READ, "data/none|"), refused("ENOENT"));
}

#[test]
fn a_node_has_a_value_and_children() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.ask(guest, WRITE, "data/a/b/c|deep").unwrap();
    assert_eq!(world.ask(guest, READ, "data/a|"), value(""));
    assert_eq!(world.ask(guest, DIRECTORY, "data/a|"), value("b|"));
    assert_eq!(world.ask(guest, DIRECTORY, "data/a/b/c|"), value(""));
    assert_eq!(world.ask(guest, DIRECTORY, "data/x|"), refused("ENOENT"));
    world.ask(guest, MKDIR, "data/a/z|").unwrap();
    world.ask(guest, MKDIR, "data/a/a|").unwrap();
    assert_eq!(world.ask(guest, DIRECTORY, "data/a|"), value("a|b|z|"));
    assert_eq!(world.ask(guest, MKDIR, "data/a/b/c|"), ok());
    assert_eq!(world.ask(guest, READ, "data/a/b/c|"), value("deep"), "mkdir keeps the value");
}

#[test]
fn removal_takes_the_subtree_and_forgives_absence() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.ask(guest, WRITE, "data/a/b/c|1").unwrap();
    assert_eq!(world.ask(guest, RM, "data/a|"), ok());
    for gone in ["data/a|", "data/a/b|", "data/a/b/c|"] {
        assert_eq!(world.ask(guest, READ, gone), refused("ENOENT"));
    }
    assert_eq!(world.ask(guest, DIRECTORY, "data|"), value(""));
    assert_eq!(world.ask(guest, RM, "data/a|"), ok(), "absent, but its parent is there");
    assert_eq!(world.ask(guest, RM, "data/a/b|"), refused("ENOENT"));
    assert_eq!(world.ask(guest, RM, "/|"), refused("EINVAL"));
    assert_eq!(world.ask(world.dom0, RM, "/|"), refused("EINVAL"));
}

#[test]
fn permissions_are_shown_and_set() {
    let mut world = World::new(&[5, 6]);
    let guest = World::guest(5);
    assert_eq!(world.ask(guest, GET_PERMS, "data|"), value("n5|r0|"));
    assert_eq!(world.ask(guest, SET_PERMS, "data|r5|b6|"), ok());
    assert_eq!(world.ask(guest, GET_PERMS, "data|"), value("r5|b6|"));
    assert_eq!(world.ask(guest, SET_PERMS, "data|r6|"), refused("EPERM"));
    for bad in ["data|", "data|x5|", "data|r|", "data|r5", "data", "data|r5||", "data|r99999|"] {
        assert_eq!(world.ask(guest, SET_PERMS, bad), refused("EINVAL"), "{bad}");
    }
    assert_eq!(world.ask(guest, SET_PERMS, "data/none|n5|"), refused("ENOENT"));
}

#[test]
fn malformed_payloads_are_refused_and_the_connection_goes_on() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let one_path = [DIRECTORY, READ, GET_PERMS, MKDIR, RM];
    for kind in one_path {
        for bad in ["", "data", "data|x|", "|", "da ta|", "//|", "data/|", "@releaseDomainX", "a.b|"] {
            assert_eq!(world.ask(guest, kind, bad), refused("EINVAL"), "kind {kind}, {bad:?}");
        }
    }
    for (kind, bad) in [
        (WRITE, "data"),
        (WATCH, "data|"),
        (WATCH, "data|t|x|"),
        (WATCH, "data|t|1|2|"),
        (UNWATCH, "data|"),
        (END, ""),
        (END, "X|"),
        (GET_DOMAIN_PATH, "x|"),
        (GET_DOMAIN_PATH, "-1|"),
        (GET_DOMAIN_PATH, "65535|"),
        (DIRECTORY_PART, "data|"),
        (DIRECTORY_PART, "data|x|"),
    ] {
        assert_eq!(world.ask(guest, kind, bad), refused("EINVAL"), "kind {kind}, {bad:?}");
    }
    assert_eq!(world.ask(guest, READ, "@releaseDomain|"), refused("EINVAL"));
    assert_eq!(world.ask(guest, READ, "data|"), value(""));
}

#[test]
fn unknown_kinds_are_answered() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    for kind in [15, 16, 20, 24, 25, 26, 27, 1000, u32::MAX] {
        assert_eq!(world.ask(guest, kind, "|"), refused("ENOSYS"), "kind {kind}");
    }
    assert_eq!(world.ask(guest, GET_FEATURE, "|"), value("7|"));
}

#[test]
fn replies_carry_the_request_s_numbers() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let tx = world.start(guest);
    let request = store::wire::message(READ, 0xdead_beef, tx, b"data\0");
    world.store.handle(guest, &request).unwrap();
    let reply = world.store.output(guest).to_vec();
    assert_eq!(reply, store::wire::message(READ, 0xdead_beef, tx, b""));
}

#[test]
fn privileged_requests_are_not_for_guests() {
    let mut world = World::new(&[5, 6]);
    let guest = World::guest(5);
    for (kind, payload) in [
        (CONTROL, "help|"),
        (INTRODUCE, "7|1|1|"),
        (RELEASE, "6|"),
        (RESUME, "6|"),
        (SET_TARGET, "5|6|"),
        (IS_INTRODUCED, "6|"),
    ] {
        assert_eq!(world.ask(guest, kind, payload), refused("EACCES"), "kind {kind}");
    }
    assert_eq!(world.ask(guest, GET_DOMAIN_PATH, "77|"), value("/local/domain/77|"));
}

#[test]
fn domains_come_and_go() {
    let mut world = World::new(&[]);
    let dom0 = world.dom0;
    assert_eq!(world.ask(dom0, IS_INTRODUCED, "7|"), value("F|"));
    assert_eq!(world.ask(dom0, INTRODUCE, "7|4660|3|"), ok());
    let attach = Duty::Attach { domain: DomainId(7), frame: 4660, port: 3 };
    assert_eq!(world.store.next_duty(), Some(attach));
    assert_eq!(world.ask(dom0, IS_INTRODUCED, "7|"), value("T|"));
    assert_eq!(world.ask(dom0, IS_INTRODUCED, "0|"), value("T|"));
    assert_eq!(world.ask(dom0, INTRODUCE, "0|1|1|"), refused("EINVAL"));
    for bad in ["7|x|1|", "7|1|", "7|1|99999999999|", "32752|1|1|"] {
        assert_eq!(world.ask(dom0, INTRODUCE, bad), refused("EINVAL"), "{bad}");
    }
    assert_eq!(world.ask(dom0, RESUME, "7|"), ok());
    assert_eq!(world.ask(dom0, RESUME, "8|"), refused("ENOENT"));
    assert_eq!(world.ask(dom0, RELEASE, "7|"), ok());
    assert_eq!(world.store.next_duty(), Some(Duty::Detach { domain: DomainId(7) }));
    assert_eq!(world.ask(dom0, RELEASE, "7|"), refused("ENOENT"));
    assert_eq!(world.ask(dom0, IS_INTRODUCED, "7|"), value("F|"));
    assert!(!world.store.accepts_input(World::guest(7)));
}

#[test]
fn a_second_introduction_drops_what_was_open() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.start(guest);
    world.ask(guest, WATCH, "data|t|").unwrap();
    world.ask(guest, WRITE, "data/a|kept").unwrap();
    world.store.handle(guest, &[1, 2, 3]).unwrap();
    assert_eq!(world.ask(world.dom0, INTRODUCE, "5|1|2|"), ok());
    assert!(matches!(world.store.next_duty(), Some(Duty::Attach { port: 2, .. })));
    assert_eq!(world.ask(guest, UNWATCH, "data|t|"), refused("ENOENT"));
    assert_eq!(world.ask_in(guest, 1, END, "T|"), refused("ENOENT"));
    assert_eq!(world.ask(guest, READ, "data/a|"), value("kept"));
}

#[test]
fn reset_watches_drops_watches_and_transactions() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let tx = world.start(guest);
    world.ask(guest, WATCH, "data|t|").unwrap();
    assert_eq!(world.ask(guest, RESET_WATCHES, "|"), ok());
    assert_eq!(world.ask(guest, RESET_WATCHES, "|"), ok(), "idempotent");
    assert_eq!(world.ask(guest, UNWATCH, "data|t|"), refused("ENOENT"));
    assert_eq!(world.ask_in(guest, tx, END, "T|"), refused("ENOENT"));
}

#[test]
fn long_listings_come_in_parts() {
    let mut world = World::new(&[]);
    let dom0 = world.dom0;
    let mut expected = String::new();
    for number in 0..700 {
        let name = format!("name-{number:05}");
        world.store.session(dom0).write(&format!("/many/{name}"), b"").unwrap();
        expected += &format!("{name}|");
    }
    assert_eq!(world.ask(dom0, DIRECTORY, "/many|"), refused("E2BIG"));
    let mut all = String::new();
    let mut generations = std::collections::BTreeSet::new();
    loop {
        let part = world.ask(dom0, DIRECTORY_PART, &format!("/many|{}|", all.len())).unwrap();
        assert!(part.len() <= 4096);
        let (generation, names) = part.split_once('|').unwrap();
        generations.insert(generation.to_owned());
        if let Some(names) = names.strip_suffix("||") {
            all = format!("{all}{names}|");
            break;
        }
        assert!(names.ends_with('|') && !names.is_empty());
        all += names;
    }
    assert_eq!(all, expected);
    assert_eq!(generations.len(), 1);
    let part = world.ask(dom0, DIRECTORY_PART, "/many|999999|").unwrap();
    assert!(part.ends_with("||"), "behind the end: an empty list");
}

#[test]
fn control_speaks_to_the_server() {
    let mut world = World::new(&[5]);
    assert_eq!(world.ask(world.dom0, CONTROL, "check|"), value("OK|"));
    assert_eq!(world.ask(world.dom0, CONTROL, "help|"), value("check help|"));
    assert_eq!(world.ask(world.dom0, CONTROL, "frobnicate|"), refused("EINVAL"));
    assert_eq!(world.ask(world.dom0, CONTROL, ""), refused("EINVAL"));
}

#[test]
fn a_payload_too_long_ends_the_connection() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.ask(guest, WATCH, "data|t|").unwrap();
    let header = store::wire::Header { kind: READ, request: 1, transaction: 0, length: 4097 };
    assert!(world.store.handle(guest, &header.encode()).is_err());
    assert_eq!(world.ask(guest, UNWATCH, "data|t|"), refused("ENOENT"), "nothing is left of it");
}

#[test]
fn local_calls_do_the_same() {
    let mut world = World::new(&[5]);
    let mut session = world.store.session(world.dom0);
    session.write("/tool/a", b"1").unwrap();
    assert_eq!(session.read_text("/tool/a").unwrap(), "1");
    assert_eq!(session.list("/tool").unwrap(), ["a"]);
    session.set_permissions("/tool/a", "n0,r5").unwrap();
    assert_eq!(session.permissions("/tool/a").unwrap().encode(), b"n0\0r5\0");
    let failed: Result<(), _> = session.transaction(|t| {
        t.write("/tool/b", b"2")?;
        t.remove("/tool/a")?;
        t.read("/tool/none").map(drop)
    });
    assert_eq!(failed, Err(store::StoreError::NotFound));
    assert_eq!(session.list("/tool").unwrap(), ["a"], "all or nothing");
    session.remove("/tool").unwrap();
    assert_eq!(session.read("/tool"), Err(store::StoreError::NotFound));
    assert_eq!(session.introduce(DomainId(0), 1, 1), Err(store::StoreError::Invalid));
    let mut guest = world.store.session(World::guest(5));
    assert_eq!(guest.release(DomainId(5)), Err(store::StoreError::Access));
    assert_eq!(guest.write("/tool/x", b""), Err(store::StoreError::Access));
}
