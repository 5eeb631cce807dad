//! Watches: when they fire, in which order, with which path, and for whom (ABI io 3.3).

mod common;
use common::*;
use store::{ConnectionId, DomainId, Quotas};

fn watch(world: &mut World, id: ConnectionId, what: &str) {
    assert_eq!(world.ask(id, WATCH, what), ok(), "{what}");
    world.drain(id);
}

#[test]
fn the_acknowledgement_comes_first_then_one_event() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let out = world.exchange(guest, WATCH, 0, b"device\0token\0");
    assert_eq!(out, [(WATCH, "OK|".into()), (WATCH_EVENT, "device|token|".into())]);
    let out = world.exchange(guest, WATCH, 0, b"/none/of/this\0t\0");
    assert_eq!(out[1].1, "/none/of/this|t|", "needs no node and no permission");
    let out = world.exchange(guest, WRITE, 0, b"device/a\x001");
    assert_eq!(out, [(WRITE, "OK|".into()), (WATCH_EVENT, "device/a|token|".into())]);
}

#[test]
fn paths_come_back_as_they_were_given() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    watch(&mut world, guest, "data|relative|");
    watch(&mut world, guest, "/local/domain/5/data|absolute|");
    world.ask(guest, WRITE, "/local/domain/5/data/x|1").unwrap();
    assert_eq!(world.events(guest), Vec::<String>::new(), "already fetched with the answer");
    let out = world.exchange(guest, WRITE, 0, b"/local/domain/5/data/x\x001");
    let events: Vec<_> = out[1..].iter().map(|(_, text)| text.as_str()).collect();
    assert_eq!(events, ["data/x|relative|", "/local/domain/5/data/x|absolute|"]);
}

#[test]
fn every_modification_fires_and_nothing_else() {
    let mut world = World::new(&[5]);
    let (guest, dom0) = (World::guest(5), world.dom0);
    watch(&mut world, guest, "data|t|");
    let mut fires = |request: u32, path: &str, expected: &[&str]| {
        world.ask(dom0, request, path).unwrap();
        assert_eq!(world.events(guest), expected, "{request} {path}");
    };
    let home = "/local/domain/5/data";
    fires(WRITE, &format!("{home}/a|1"), &["data/a|t"]);
    fires(WRITE, &format!("{home}/a|1"), &["data/a|t"]); // the same value again
    fires(READ, &format!("{home}/a|"), &[]);
    fires(MKDIR, &format!("{home}/a|"), &[]);
    fires(MKDIR, &format!("{home}/b/c|"), &["data/b/c|t"]);
    fires(SET_PERMS, &format!("{home}/b|n5|"), &["data/b|t"]);
    fires(RM, &format!("{home}/none|"), &[]);
    fires(RM, &format!("{home}/b|"), &["data/b|t"]);
    fires(WRITE, &format!("{home}|1"), &["data|t"]);
    fires(WRITE, "/local/domain/5/device/x|1", &[]);
    fires(WRITE, "/local/domain/5/database|1", &[]);
}

#[test]
fn a_removed_subtree_tells_watchers_inside_of_their_own_node() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    for path in ["a/b/c", "a/b/d", "a/e"] {
        world.ask(guest, WRITE, &format!("data/{path}|1")).unwrap();
    }
    for (path, token) in [("data", "up"), ("data/a/b", "in"), ("data/a/b/d", "leaf"), ("data/x", "no")] {
        watch(&mut world, guest, &format!("{path}|{token}|"));
    }
    world.send(guest, RM, 0, b"data/a\0");
    assert_eq!(world.events(guest), ["data/a|up", "data/a/b|in", "data/a/b/d|leaf"]);
}

#[test]
fn a_commit_fires_in_the_order_of_the_changes() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    watch(&mut world, guest, "data|t|");
    let tx = world.start(guest);
    for name in ["z", "a", "m", "z"] {
        world.ask_in(guest, tx, WRITE, &format!("data/{name}|1")).unwrap();
        assert_eq!(world.events(guest), Vec::<String>::new(), "not before the end");
    }
    world.send(guest, END, tx, b"T\0");
    assert_eq!(world.events(guest), ["data/z|t", "data/a|t", "data/m|t"]);
    let tx = world.start(guest);
    world.ask_in(guest, tx, WRITE, "data/q|1").unwrap();
    world.send(guest, END, tx, b"F\0");
    assert_eq!(world.events(guest), Vec::<String>::new());
}

#[test]
fn an_event_waiting_is_not_queued_twice_but_different_ones_are() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    watch(&mut world, guest, "data|t|");
    for _ in 0..1000 {
        world.store.session(world.dom0).write("/local/domain/5/data/a", b"1").unwrap();
        world.store.session(world.dom0).write("/local/domain/5/data/b", b"1").unwrap();
    }
    assert_eq!(world.events(guest), ["data/a|t", "data/b|t"]);
}

#[test]
fn registration_is_by_path_and_token() {
    let mut world = World::new(&[5, 6]);
    let guest = World::guest(5);
    watch(&mut world, guest, "data|t|");
    assert_eq!(world.ask(guest, WATCH, "data|t|"), refused("EEXIST"));
    watch(&mut world, guest, "data|u|");
    watch(&mut world, World::guest(6), "/local/domain/5/data|t|");
    assert_eq!(world.ask(guest, UNWATCH, "data|v|"), refused("ENOENT"));
    assert_eq!(world.ask(guest, UNWATCH, "device|t|"), refused("ENOENT"));
    assert_eq!(world.ask(guest, UNWATCH, "data|t|"), ok());
    assert_eq!(world.ask(guest, UNWATCH, "data|t|"), refused("ENOENT"));
    world.send(guest, WRITE, 0, b"data/x\x001");
    assert_eq!(world.events(guest), ["data/x|u"]);
}

#[test]
fn a_depth_limits_how_far_a_watch_sees() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    for (depth, token) in [("0", "zero"), ("1", "one"), ("9", "nine")] {
        watch(&mut world, guest, &format!("data|{token}|{depth}|"));
    }
    world.send(guest, WRITE, 0, b"data/a/b\x001");
    assert_eq!(world.events(guest), ["data/a/b|nine"]);
    world.send(guest, WRITE, 0, b"data/a\x001");
    assert_eq!(world.events(guest), ["data/a|one", "data/a|nine"]);
    world.send(guest, WRITE, 0, b"data\x001");
    assert_eq!(world.events(guest), ["data|zero", "data|one", "data|nine"]);
}

/// Rows: permissions of the directory and of the node; who hears of a write to the node.
#[test]
fn events_pass_the_permissions_of_their_receiver() {
    for (directory, node, hears) in [
        ("n0", "n0", false),
        ("n0", "n0,r5", true),
        ("n0,r5", "n0", true),
        ("n0,w5", "n0,w5", false),
        ("n5", "n0", true),
        ("n0", "r0", true),
        ("n0", "r0,n5", false),
    ] {
        let mut world = World::new(&[5]);
        let guest = World::guest(5);
        let mut session = world.store.session(world.dom0);
        session.write("/dir/node", b"").unwrap();
        session.set_permissions("/dir", directory).unwrap();
        session.set_permissions("/dir/node", node).unwrap();
        watch(&mut world, guest, "/|top|");
        watch(&mut world, guest, "/dir/node|t|");
        world.store.session(world.dom0).write("/dir/node", b"x").unwrap();
        let expected: &[&str] = if hears { &["/dir/node|t", "/dir/node|top"] } else { &[] };
        assert_eq!(world.events(guest), expected, "{directory} / {node}");
        // Losing the right is still told, having none is not.
        world.store.session(world.dom0).set_permissions("/dir/node", "n0").unwrap();
        assert_eq!(world.events(guest), expected, "taking away, {directory} / {node}");
        let still = directory.contains("r5") || directory == "n5";
        world.store.session(world.dom0).remove("/dir/node").unwrap();
        assert_eq!(!world.events(guest).is_empty(), still, "removing, {directory} / {node}");
    }
}

#[test]
fn creation_in_an_unreadable_place_is_not_told() {
    let mut world = World::new(&[5, 6]);
    let guest = World::guest(5);
    watch(&mut world, guest, "/local/domain/6|spy|");
    world.ask(World::guest(6), WRITE, "data/secret-name|1").unwrap();
    assert_eq!(world.events(guest), Vec::<String>::new(), "XSA-115");
}

#[test]
fn domains_coming_and_going_are_told() {
    let mut world = World::new(&[5]);
    let (guest, dom0) = (World::guest(5), world.dom0);
    for name in ["@introduceDomain", "@releaseDomain"] {
        watch(&mut world, dom0, &format!("{name}|t|"));
        watch(&mut world, dom0, &format!("{name}|deep|1|"));
        watch(&mut world, guest, &format!("{name}|t|"));
    }
    world.introduce(9);
    assert_eq!(world.events(dom0), ["@introduceDomain|t", "@introduceDomain/9|deep"]);
    world.store.domain_shut_down(DomainId(9));
    assert_eq!(world.events(dom0), ["@releaseDomain|t", "@releaseDomain/9|deep"]);
    world.store.domain_shut_down(DomainId(9));
    assert_eq!(world.events(dom0), Vec::<String>::new(), "once");
    world.ask(dom0, RESUME, "9|").unwrap();
    world.store.domain_shut_down(DomainId(9));
    assert_eq!(world.events(dom0).len(), 2, "again after a resumption");
    world.send(dom0, RELEASE, 0, b"9\0");
    assert_eq!(world.events(dom0), ["@releaseDomain|t", "@releaseDomain/9|deep"]);
    assert_eq!(world.events(guest), Vec::<String>::new(), "only for who may read the name");
    world.store.session(dom0).set_permissions("@releaseDomain", "n0,r5").unwrap();
    world.drain(guest);
    world.introduce(9);
    world.store.domain_shut_down(DomainId(9));
    assert_eq!(world.events(guest), ["@releaseDomain|t"]);
    world.store.domain_shut_down(DomainId(77));
}

#[test]
fn a_dying_domain_s_nodes_are_missed_by_their_watchers() {
    let mut world = World::new(&[5]);
    let dom0 = world.dom0;
    world.ask(World::guest(5), WRITE, "device/vbd/state|4").unwrap();
    watch(&mut world, dom0, "/local/domain/5/device/vbd/state|be|");
    watch(&mut world, dom0, "@releaseDomain|t|");
    world.store.session(dom0).release(DomainId(5)).unwrap();
    let expected = ["/local/domain/5/device/vbd/state|be", "@releaseDomain|t"];
    assert_eq!(world.events(dom0), expected);
}

#[test]
fn the_longest_event_fits_into_a_message() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let longest_token = "t".repeat(store::watch::TOKEN_MAX);
    assert_eq!(world.ask(guest, WATCH, &format!("/|{longest_token}x|")), refused("E2BIG"));
    watch(&mut world, guest, &format!("/|{longest_token}|"));
    let path = format!("/{}", "p".repeat(store::path::ABSOLUTE_MAX - 1));
    world.store.session(world.dom0).write(&path, b"").unwrap();
    world.store.session(world.dom0).set_permissions(&path, "n0,r5").unwrap();
    assert_eq!(world.events(guest), [format!("{path}|{longest_token}")]);
}

#[test]
fn a_client_that_does_not_read_loses_detail_but_not_the_news() {
    let quotas = Quotas { events: 8, ..Quotas::default() };
    let mut world = World::with_quotas(&[5], quotas);
    let guest = World::guest(5);
    watch(&mut world, guest, "data|t|");
    for number in 0..1000 {
        let path = format!("/local/domain/5/data/{number}");
        world.store.session(world.dom0).write(&path, b"").unwrap();
        world.store.session(world.dom0).remove(&path).unwrap();
    }
    let events = world.events(guest);
    assert_eq!(events.len(), 9);
    assert_eq!((&events[0][..], &events[8][..]), ("data/0|t", "data|t"));
}

#[test]
fn local_sessions_hear_by_calls() {
    let mut world = World::new(&[5]);
    let mut session = world.store.session(world.dom0);
    session.watch("/local/domain/5/device", b"be").unwrap();
    assert_eq!(session.watch("/local/domain/5/device", b"be"), Err(store::StoreError::Exists));
    assert_eq!(&*session.next_event().unwrap().token, b"be");
    assert!(!session.has_events());
    world.ask(World::guest(5), WRITE, "device/x|1").unwrap();
    let mut session = world.store.session(world.dom0);
    assert!(session.has_events());
    assert_eq!(session.next_event().unwrap().path, "/local/domain/5/device/x");
    assert_eq!(session.next_event(), None);
    session.unwatch("/local/domain/5/device", b"be").unwrap();
    world.ask(World::guest(5), WRITE, "device/x|2").unwrap();
    assert_eq!(world.store.session(world.dom0).next_event(), None);
    let dom0 = world.dom0;
    world.store.close_local(dom0);
    assert_eq!(world.store.session(dom0).read("/"), Err(store::StoreError::NotFound));
}
