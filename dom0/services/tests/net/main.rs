//! Network devices for guests that come, exchange frames, misbehave, and go at any moment.

#![allow(unreachable_pub, reason = "the modules of a test are its own")]
#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../../../network/tests/common/mod.rs"]
mod frames;
mod front;
mod hostile;
mod machine;
mod networks;
mod orders;
mod uplink;
mod wire;
mod world;

use common::front::FrontEnd;
use common::guest::Rounds;
use frames::dhcp::{question, take_apart};
use front::Front;
use network::Mac;
use ring_protocol::net::status;
use services::net::vif_bytes;
use world::{World, test_frame, test_text};

const ALL: [u8; 6] = [0xff; 6];

/// Asks for an address as a stock client does, and returns the address.
fn dhcp(front: &mut Front, guest: &front::Guest) -> [u8; 4] {
    let asked = |front: &mut Front, kind, options: &[(u8, &[u8])]| {
        let frames = front.exchange(guest, &question(front.mac, kind, [0; 4], options));
        // The questions of other guests are heard as well.
        let of_server = frames.iter().filter(|frame| frame.get(34..36) == Some(&[0, 67]));
        let mut answers = of_server.filter_map(|frame| take_apart(frame));
        let answer = answers.next().expect("the question is answered");
        assert!(answers.next().is_none() && answer.mac == front.mac);
        answer
    };
    let offer = asked(front, 1, &[]);
    assert_eq!(offer.options[&53], [2]);
    let given = asked(front, 3, &[(50, &offer.yours), (54, &offer.options[&54])]);
    assert_eq!((&given.options[&53][..], given.yours), (&[5][..], offer.yours));
    given.yours
}

#[test]
fn a_guest_connects_and_gets_an_address_from_the_gateway() {
    let world = World::new();
    let mut guest = world.guest(5);
    let reserved = world.machine.fake.reserved();
    let mut front = world.plugged(&mut guest, 0, "");
    assert_eq!(world.machine.fake.reserved() - reserved, vif_bytes());
    for (key, value) in [
        ("bridge", "nat"),
        ("type", "vif"),
        ("handle", "0"),
        ("online", "1"),
        ("frontend-id", "5"),
        ("feature-rx-copy", "1"),
    ] {
        assert_eq!(front.back(&mut guest, key).as_deref(), Some(value), "{key}");
    }
    assert_eq!(front.mac, Mac::of_guest("guest5", 0).0);
    assert_eq!(guest.get(&front.path("mac")).unwrap(), Mac(front.mac).to_string());
    assert_eq!(guest.get(&front.path("mtu")).unwrap(), "1500");
    let address = dhcp(&mut front, &guest);
    assert_eq!(address[..3], [10, 77, 0]);
    let listed = world.only(5);
    assert_eq!(listed.ip, Some(address.map(|part| part.to_string()).join(".")));
    assert_eq!((listed.device, &*listed.bridge, listed.state), (0, "nat", "connected"));
    assert_eq!((listed.sent, listed.received, listed.drops, listed.flows), (2, 2, vec![], Some(0)));
    // Who has 10.77.0.1?
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend([&front.mac[..], &address, &[0; 6], &[10, 77, 0, 1]].concat());
    let answers = front.exchange(&guest, &frames::ethernet(ALL, front.mac, 0x806, &arp));
    assert_eq!(answers.len(), 1);
    assert_eq!((&answers[0][20..22], &answers[0][28..32]), (&[0, 2][..], &[10, 77, 0, 1][..]));
    assert!(world.machine.fake.notified(5) > 0);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn guests_of_one_network_exchange_frames_and_others_do_not() {
    let world = World::new();
    let (guest5, mut five) = world.connected(5, "bridge=a");
    let (guest6, mut six) = world.connected(6, "bridge=a");
    let (guest7, mut seven) = world.connected(7, "bridge=b");
    let (guest8, mut eight) = world.connected(8, "");
    assert_eq!(five.ask(&guest5, &test_frame(six.mac, five.mac, "to six")), status::OKAY);
    assert_eq!(five.ask(&guest5, &test_frame(ALL, five.mac, "to all")), status::OKAY);
    for foreign in [seven.mac, eight.mac] {
        five.ask(&guest5, &test_frame(foreign, five.mac, "to another network"));
    }
    world.machine.rounds(10);
    let heard: Vec<_> = six.take(&guest6).iter().filter_map(|frame| test_text(frame)).collect();
    assert_eq!(heard, ["to six", "to all"]);
    assert!(seven.take(&guest7).is_empty() && eight.take(&guest8).is_empty() && five.take(&guest5).is_empty());
    assert!(six.send(&guest6, &test_frame(five.mac, six.mac, "back")));
    world.machine.rounds(10);
    assert_eq!(test_text(&five.take(&guest5)[0]).unwrap(), "back");
    assert_eq!((world.only(5).drops, world.only(6).sent, world.only(7).received), (vec![("unknown", 2)], 1, 0));
    let addresses = [dhcp(&mut five, &guest5), dhcp(&mut six, &guest6), dhcp(&mut seven, &guest7)];
    assert_eq!(addresses.map(|address| address[2]), [1, 1, 2]);
    assert_ne!(addresses[0], addresses[1]);
    (5..9).for_each(|domain| world.end(domain));
    world.assert_clean(&[5, 6, 7, 8]);
}

#[test]
fn the_directories_belong_to_those_who_write_them() {
    let world = World::new();
    let (mut guest, mut other) = (world.guest(5), world.guest(6));
    world.attach(5, 0, "ip=10.77.0.9").unwrap();
    let front = Front::new(0);
    assert!(!guest.put(&front.path("backend"), "/elsewhere") && !guest.put(&front.path("mac"), "1"));
    assert!(guest.put(&front.path("new"), ""));
    let back = "/local/domain/0/backend/vif/5/0";
    assert!(!guest.put(&format!("{back}/state"), "4") && !guest.put(&format!("{back}/ip"), "10.77.0.8"));
    assert_eq!(guest.get(&format!("{back}/ip")).unwrap(), "10.77.0.9");
    assert_eq!(other.get(&format!("{back}/ip")), None);
    assert_eq!(other.get("/local/domain/5/device/vif/0/state"), None);
    world.end(5);
    world.end(6);
    world.assert_clean(&[5, 6]);
}

#[test]
fn one_channel_may_serve_both_rings() {
    let world = World::new();
    let mut guest = world.guest(5);
    world.attach(5, 3, "").unwrap();
    let mut front = Front::new(3);
    front.one_channel = true;
    front.connect(&mut guest);
    assert_eq!(world.machine.fake.held(), (3, 2), "two rings and one port, and those of the store");
    dhcp(&mut front, &guest);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_frame_that_was_sent_before_the_back_end_connected_is_carried() {
    let world = World::new();
    let (guest6, mut six) = world.connected(6, "bridge=a");
    let mut guest = world.guest(5);
    world.attach(5, 0, "bridge=a").unwrap();
    let mut front = Front::new(0);
    front.early = test_frame(six.mac, Mac::of_guest("guest5", 0).0, "early");
    front.connect(&mut guest);
    world.machine.rounds(5);
    assert_eq!((front.answers(), six.take(&guest6).len()), (vec![status::OKAY], 1));
    world.end(5);
    world.end(6);
    world.assert_clean(&[5, 6]);
}

#[test]
fn a_sender_goes_on_once_the_receiver_has_pages() {
    let world = World::new();
    let (guest6, mut six) = world.connected(6, "bridge=a");
    let (guest, mut front) = world.connected(5, "bridge=a");
    let frame = test_frame(six.mac, front.mac, "hello");
    for n in 0..256 {
        assert_eq!(front.ask(&guest, &frame), status::OKAY, "{n}");
    }
    (0..10).for_each(|_| assert!(front.send(&guest, &frame)));
    // Less than the ten milliseconds that a sender waits at most.
    world.machine.rounds(3);
    assert!(front.answers().is_empty());
    assert_eq!(six.take(&guest6).len(), 256);
    world.machine.rounds(3);
    assert_eq!((front.answers(), six.take(&guest6).len()), (vec![status::OKAY; 10], 10));
    world.end(5);
    world.end(6);
    world.assert_clean(&[5, 6]);
}

#[test]
fn a_guest_uses_the_addresses_that_it_was_given() {
    let world = World::new();
    let (guest, mut front) = world.connected(5, "mac=00:16:3e:01:02:03,ip=10.77.0.9");
    assert_eq!(front.mac, [0, 0x16, 0x3e, 1, 2, 3]);
    assert_eq!(dhcp(&mut front, &guest), [10, 77, 0, 9]);
    let udp = frames::udp((9, 9), b"hello");
    let packet = |from| frames::ipv4(from, [10, 77, 0, 7], 17, 0, 0, &[], &udp);
    let ip = |from| frames::ethernet(ALL, front.mac, 0x800, &packet(from));
    let (mine, stolen) = (ip([10, 77, 0, 9]), ip([10, 77, 0, 8]));
    front.ask(&guest, &mine);
    assert_eq!(world.only(5).drops, []);
    front.ask(&guest, &stolen);
    front.ask(&guest, &test_frame(ALL, [2, 0, 0, 0, 0, 9], "the source is not the vif's"));
    assert_eq!(world.only(5).drops, [("spoofed", 2)]);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_guest_sends_at_its_rate() {
    let world = World::new();
    let (guest6, mut six) = world.connected(6, "bridge=a");
    let (guest, mut front) = world.connected(5, "bridge=a,rate=100KB/s");
    let frame = frames::ethernet(six.mac, front.mac, world::TEST, &[0; 986]);
    let mut passed = 0;
    for _ in 0..10_000 {
        front.send(&guest, &frame);
        world.machine.round();
        passed += front.answers().len();
        assert_eq!(six.answers().len(), 0);
        six.take(&guest6);
    }
    // What is taken in one visit may exceed the rate, which is made up for later.
    assert!((980..=1_080).contains(&passed), "{passed} frames of 1,000 bytes in ten seconds");
    assert_eq!(world.only(6).received, passed as u64);
    world.end(5);
    world.end(6);
    world.assert_clean(&[5, 6]);
}

#[test]
fn a_front_end_closes_and_comes_again() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(6, "");
    let address = dhcp(&mut front, &guest);
    for n in 1..4 {
        front.set_state(&mut guest, 5);
        front.step(&mut guest);
        front.step(&mut guest);
        world.machine.rounds(10);
        assert_eq!((front.state(&mut guest), front.back_state(&mut guest)), (6, 6));
        assert_eq!(world.machine.fake.held(), (1, 1), "nothing is mapped while the vif is closed");
        assert_eq!((world.only(6).state, world.only(6).sent), ("closed", 2 * n), "counters stay");
        front.set_state(&mut guest, 1);
        front.connect(&mut guest);
        assert_eq!(dhcp(&mut front, &guest), address, "the address stays");
    }
    assert_eq!((world.only(6).sent, world.only(6).received), (8, 8), "counters go on");
    // As netfront is removed: without the state 5.
    front.close(&mut guest);
    world.machine.rounds(20);
    assert_eq!((front.back_state(&mut guest), world.machine.fake.held()), (6, (1, 1)));
    world.end(6);
    world.assert_clean(&[6]);
}

#[test]
fn a_vif_is_detached_and_attached_again() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(5, "");
    assert_eq!(world.attach(5, 0, "bridge=a").unwrap_err(), "the guest has a vif 0 already");
    let detach = world.networks.detach(5, 0, false);
    assert_eq!(world.machine.run_for(1, detach), None, "it is waited for");
    for _ in 0..5 {
        front.step(&mut guest);
    }
    world.machine.rounds(20);
    assert!(world.listed(5).is_empty());
    assert_eq!(world.machine.run(world.networks.detach(5, 0, false)).unwrap_err(), "the guest has no vif 0");
    let mut front = world.plugged(&mut guest, 0, "bridge=a");
    assert_eq!(dhcp(&mut front, &guest)[..3], [10, 77, 1]);
    // A vif that is not connected goes at once.
    world.attach(5, 1, "bridge=a").unwrap();
    world.machine.run_for(20, world.networks.detach(5, 1, false)).unwrap().unwrap();
    assert_eq!(world.only(5).device, 0);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_vif_in_use_is_named_and_removed_by_force() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(5, "");
    let why = world.machine.run(world.networks.detach(5, 0, false)).unwrap_err();
    assert_eq!((&*why, world.only(5).state), ("guest5 uses the vif 0", "in use"));
    let again = world.machine.run_for(3, world.networks.detach(5, 0, false));
    assert_eq!(again, Some(Err("guest5 uses the vif 0".into())));
    assert_eq!((front.back(&mut guest, "online").unwrap(), front.back_state(&mut guest)), ("0".into(), 5));
    world.machine.run(world.networks.detach(5, 0, true)).unwrap();
    assert_eq!((front.state(&mut guest), front.back_state(&mut guest)), (0, 0));
    assert!(front.send(&guest, &test_frame(ALL, front.mac, "nobody hears")));
    world.machine.rounds(10);
    assert!(front.answers().is_empty());
    assert_eq!(world.machine.fake.held(), (1, 1));
    world.end(5);
    world.assert_clean(&[5]);
}

/// A life of a vif, cut off after each number of steps.
#[test]
fn a_domain_dies_at_every_step() {
    let world = World::new();
    let (guest6, mut six) = world.connected(6, "bridge=a");
    for cut in 0..60 {
        let mut guest = world.guest(5);
        world.attach(5, 0, if cut % 2 == 0 { "bridge=a" } else { "" }).unwrap();
        let mut front = Front::new(0);
        for n in 0..cut {
            front.step(&mut guest);
            front.send(&guest, &test_frame(six.mac, front.mac, "alive"));
            six.send(&guest6, &test_frame(front.mac, six.mac, "are you there?"));
            match n {
                20 => front.set_state(&mut guest, 5),
                25 => front.set_state(&mut guest, 1),
                30 => drop(world.machine.run_for(1, world.networks.detach(5, 0, false))),
                _ => {}
            }
        }
        drop(guest);
        world.end(5);
        assert_eq!(world.machine.fake.held(), (3, 3), "domain 6 has its vif and the store");
        six.answers();
        six.take(&guest6);
    }
    world.end(6);
    world.assert_clean(&[5, 6]);
}

#[test]
fn dropping_the_networks_says_nothing() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(5, "");
    dhcp(&mut front, &guest);
    let notified = world.machine.fake.notified(5);
    let World { machine, networks, .. } = world;
    assert!(front.send(&guest, &test_frame(ALL, front.mac, "too late")));
    drop(networks);
    machine.rounds(5);
    assert_eq!((machine.fake.notified(5), machine.fake.held()), (notified, (1, 1)));
    assert_eq!(machine.state.borrow().buffers, 0);
    assert!(front.answers().is_empty());
    assert_eq!((front.state(&mut guest), front.back_state(&mut guest)), (4, 4));
}

#[test]
fn a_vif_takes_no_more_than_it_says() {
    assert_eq!(vif_bytes().div_ceil(1024), 64);
}
