//! Guests that publish and write what no stock driver does, and a machine without memory.

use ring_protocol::net::status;

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::front::Front;
use crate::world::{World, test_frame, test_text};
use crate::{ALL, dhcp};

const ERROR: &str = "/local/domain/0/error/backend/vif/5/0/error";

#[test]
fn what_a_front_end_publishes_wrong_is_named_and_it_may_come_again() {
    let world = World::new();
    let mut guest = world.guest(5);
    world.attach(5, 0, "").unwrap();
    let mut front = Front::new(0);
    let cases = [
        ("tx-ring-ref", "x", "the value of its key tx-ring-ref is no number"),
        ("tx-ring-ref", "10000", "its TX ring cannot be mapped: Inval"),
        ("rx-ring-ref", "10000", "its RX ring cannot be mapped: Inval"),
        ("event-channel-tx", "99", "its port 99 cannot be bound: Inval"),
        ("event-channel-rx", "99", "its port 99 cannot be bound: Inval"),
        ("request-rx-copy", "0", "its key request-rx-copy is not 1, and packets are only copied"),
        ("multi-queue-num-queues", "4", "it has 4 queues, and one was offered"),
    ];
    for (n, (bad, value, reason)) in cases.into_iter().enumerate() {
        world.machine.rounds(10);
        assert_eq!(front.back_state(&mut guest), 2, "{n}");
        for (key, value) in front.keys(100) {
            guest.put(&front.path(key), &value);
        }
        guest.put(&front.path(bad), value);
        front.set_state(&mut guest, 4);
        world.machine.rounds(20);
        assert_eq!(front.back_state(&mut guest), 5, "{n}");
        assert_eq!(guest.get(ERROR).as_deref(), Some(reason));
        assert_eq!(world.machine.fake.held(), (1, 1), "only the store's page and port");
        front.set_state(&mut guest, 6);
        world.machine.rounds(10);
        guest.remove(&front.path("multi-queue-num-queues"));
        front.set_state(&mut guest, 1);
    }
    front.connect(&mut guest);
    assert_eq!(guest.get(ERROR), None, "the error is over");
    dhcp(&mut front, &guest);
    guest.remove("device/vif/0");
    world.machine.rounds(20);
    assert_eq!(world.machine.fake.held(), (1, 1));
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_directory_full_of_nodes_of_others_goes_in_pieces() {
    let world = World::new();
    let (mut guest, front) = world.connected(5, "");
    let folder = "/local/domain/5/device/vif/0";
    guest.open_to_all(folder);
    for domain in [6, 7] {
        let mut other = world.guest(domain);
        (0..520).for_each(|n| assert!(other.put(&format!("{folder}/{domain}-{}/{n}", n % 4), "")));
    }
    assert_eq!(front.back_state(&mut guest), 4);
    world.end(5);
    assert!(world.attach(5, 0, "").is_ok());
    world.machine.rounds(50);
    assert_eq!(world.only(5).state, "waits", "what was left of the old device does not end the new one");
    [5, 6, 7].into_iter().for_each(|domain| world.end(domain));
    world.assert_clean(&[5, 6, 7]);
}

#[test]
fn a_ring_that_contradicts_itself_is_not_served() {
    let world = World::new();
    let mut guest = world.guest(5);
    world.attach(5, 0, "bridge=a").unwrap();
    let front = Front::new(0);
    world.machine.rounds(10);
    // Answers to requests that were never made.
    ring_protocol::SharedPage::store_u32(&*world.machine.fake.page(5, 101), 8, 0x4000_0000);
    for (key, value) in front.keys(100) {
        guest.put(&front.path(key), &value);
    }
    front.set_state(&mut guest, 4);
    world.machine.rounds(20);
    assert_eq!((front.back_state(&mut guest), world.machine.fake.held()), (5, (1, 1)));
    let error = guest.get(ERROR).unwrap();
    assert_eq!(error, "its rings cannot be served: peer index 0x0 too far from 0x40000000");
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_hostile_ring_ends_its_vif_alone() {
    let world = World::new();
    let (guest6, mut six) = world.connected(6, "bridge=a");
    let (guest7, mut seven) = world.connected(7, "bridge=a");
    let (mut guest, mut front) = world.connected(5, "bridge=a");
    front.odd = true;
    type Attack = fn(&mut Front, &crate::front::Guest);
    let attacks: [(&str, Attack); 3] = [
        ("TX ring: ", |front, guest| front.break_ring(guest, true)),
        ("RX ring: ", |front, guest| front.break_ring(guest, false)),
        ("TX ring: a packet of more than 20 slots", Front::send_endless),
    ];
    for (reason, attack) in attacks {
        attack(&mut front, &guest);
        // The index of the RX ring is looked at once the pages known before are used up.
        for _ in 0..300 {
            six.send(&guest6, &test_frame(front.mac, six.mac, "hello"));
            world.machine.rounds(1);
            six.answers();
        }
        assert_eq!(front.back_state(&mut guest), 5, "{reason}");
        let error = guest.get(ERROR).unwrap();
        assert!(error.starts_with(reason), "{error}");
        assert_eq!(six.ask(&guest6, &test_frame(seven.mac, six.mac, "still here")), status::OKAY);
        world.machine.rounds(5);
        assert_eq!(seven.take(&guest7).iter().filter_map(|frame| test_text(frame)).collect::<Vec<_>>(), ["still here"]);
        six.answers();
        front.close(&mut guest);
        world.machine.rounds(20);
        assert_eq!(front.back_state(&mut guest), 6);
        front.set_state(&mut guest, 1);
        front.connect(&mut guest);
        assert_eq!(guest.get(ERROR), None);
        dhcp(&mut front, &guest);
    }
    (5..8).for_each(|domain| world.end(domain));
    world.assert_clean(&[5, 6, 7]);
}

#[test]
fn a_page_that_is_not_granted_costs_its_frame_alone() {
    let world = World::new();
    let (guest, mut front) = world.connected(5, "bridge=a");
    assert!(front.send_nothing(&guest));
    world.machine.rounds(5);
    assert_eq!(front.answers(), [status::ERROR]);
    assert_eq!(world.only(5).drops, [("bad-grant", 1)]);
    dhcp(&mut front, &guest);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn what_there_is_no_memory_for_is_refused_and_nothing_is_left() {
    let world = World::new();
    world.machine.fake.set_full(true);
    for network in ["", "bridge=a"] {
        assert_eq!(world.attach(5, 0, network).unwrap_err(), "not enough memory is left for it");
    }
    world.machine.fake.set_full(false);
    for left in 0..3 {
        world.machine.state.borrow_mut().buffers_left = Some(left);
        assert_eq!(world.attach(5, 0, "bridge=a").unwrap_err(), "not enough memory is left for the network");
        world.assert_clean(&[5]);
    }
    assert_eq!(world.networks(), [("nat".to_string(), 0)]);
    // The network `nat` has its memory already.
    let (guest, mut front) = world.connected(5, "");
    dhcp(&mut front, &guest);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_turn_waits_until_the_heap_has_room() {
    let world = World::new();
    let (guest, mut front) = world.connected(5, "bridge=a");
    world.machine.rounds(5);
    world.machine.fake.set_full(true);
    assert!(front.send(&guest, &test_frame(ALL, front.mac, "later")));
    world.machine.rounds(1);
    front.answers();
    assert!(front.send(&guest, &test_frame(ALL, front.mac, "later still")));
    world.machine.rounds(300);
    assert!(front.answers().is_empty());
    world.machine.fake.set_full(false);
    world.machine.rounds(150);
    assert!(!front.answers().is_empty());
    world.end(5);
    world.assert_clean(&[5]);
}
