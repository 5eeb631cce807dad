//! Which networks there are, which device each has, and which addresses are refused.

use services::net::MAX_NETWORKS;

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::dhcp;
use crate::frames::world::UPLINK_MAC;
use crate::front::Front;
use crate::wire::Device;
use crate::world::World;

fn text(address: [u8; 4]) -> String {
    address.map(|part| part.to_string()).join(".")
}

fn rows(world: &World) -> Vec<(String, &'static str, Option<String>, Option<String>)> {
    let rows = world.networks.networks();
    rows.into_iter().map(|row| (row.name, row.kind, row.address, row.uplink)).collect()
}

#[test]
fn an_address_is_given_once_on_a_network() {
    let world = World::new();
    let (guest, mut front) = world.connected(5, "mac=00:16:3e:01:02:03");
    let address = text(dhcp(&mut front, &guest));
    let same_mac = world.attach(6, 0, "mac=00:16:3e:01:02:03").unwrap_err();
    assert_eq!(same_mac, "guest5 has the address 00:16:3e:01:02:03 on the network nat");
    let same_ip = world.attach(6, 0, &format!("ip={address}")).unwrap_err();
    assert_eq!(same_ip, format!("guest5 has the address {address} on the network nat"));
    world.attach(7, 0, "bridge=a,ip=10.77.1.9").unwrap();
    let same_ip = world.attach(6, 0, "bridge=a,ip=10.77.1.9").unwrap_err();
    assert_eq!(same_ip, "guest7 has the address 10.77.1.9 on the network a", "though it is not connected");
    assert!(world.listed(6).is_empty());
    // Another network has addresses of its own.
    world.attach(6, 0, "bridge=b,mac=00:16:3e:01:02:03,ip=10.77.2.9").unwrap();
    (5..8).for_each(|domain| world.end(domain));
    world.attach(6, 0, "mac=00:16:3e:01:02:03").unwrap();
    world.end(6);
    world.assert_clean(&[5, 6, 7]);
}

#[test]
fn an_address_of_dom0_is_given_to_nobody() {
    let world = World::new();
    for (bridge, mac) in [("nat", "02:16:3e:00:00:00"), ("a", "02:16:3e:00:00:01")] {
        let refusal = world.attach(5, 0, &format!("bridge={bridge},mac={mac}")).unwrap_err();
        assert_eq!(refusal, format!("dom0 has the address {mac} on the network {bridge}"));
        assert!(world.listed(5).is_empty());
    }
    // On another network it is free.
    world.attach(5, 0, "bridge=a,mac=02:16:3e:00:00:00").unwrap();
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_device_with_short_packets_is_told() {
    let world = World::bare();
    let short = Device::default();
    short.0.borrow_mut().mtu = Some(500);
    world.networks.add_device("eth0", Box::new(short.clone()), 500_000, ());
    let refusal = world.attach(5, 0, "").unwrap_err();
    assert_eq!(refusal, "the network nat: packets of 500 bytes are too short: IPv4 needs 576");
    assert!(world.listed(5).is_empty() && rows(&world).is_empty());
    // The network `uplink` has no gateway, and the device is still there for it.
    world.attach(5, 0, "bridge=uplink").unwrap();
    assert_eq!(rows(&world)[0].0, "uplink");
}

#[test]
fn an_address_is_kept_for_the_guest_that_was_promised_it() {
    let world = World::new();
    let (guest5, mut five) = world.connected(5, "");
    let first = dhcp(&mut five, &guest5);
    world.end(5);
    world.attach(6, 0, &format!("ip={}", text(first))).unwrap();
    // The guest 5 connects before the guest 6.
    let (guest5, mut five) = world.connected(5, "");
    assert_ne!(dhcp(&mut five, &guest5), first);
    let mut guest6 = world.guest(6);
    let mut six = Front::new(0);
    six.connect(&mut guest6);
    assert_eq!(dhcp(&mut six, &guest6), first);
    world.end(5);
    world.end(6);
    let (guest5, mut five) = world.connected(5, "");
    assert_eq!(dhcp(&mut five, &guest5), first, "the address is kept no longer");
    world.end(5);
    world.assert_clean(&[5, 6]);
}

#[test]
fn a_network_without_a_free_address_connects_nobody() {
    let world = World::new();
    // All addresses but one are promised.
    for n in 2..=253_u16 {
        world.attach(100 + n, 0, &format!("bridge=a,ip=10.77.1.{n}")).unwrap();
    }
    let (guest5, mut five) = world.connected(5, "bridge=a");
    assert_eq!(dhcp(&mut five, &guest5), [10, 77, 1, 254]);
    let mut guest6 = world.guest(6);
    let held = world.machine.fake.held();
    world.attach(6, 0, "bridge=a").unwrap();
    let mut six = Front::new(0);
    (0..5).for_each(|_| six.step(&mut guest6));
    world.machine.rounds(10);
    let error = guest6.get("/local/domain/0/error/backend/vif/6/0/error").unwrap();
    assert_eq!((&*error, world.machine.fake.held()), ("no address is free", held));
    world.end(5);
    six.set_state(&mut guest6, 1);
    six.connect(&mut guest6);
    assert_eq!(dhcp(&mut six, &guest6), [10, 77, 1, 254]);
    world.end(6);
    (2..=253).for_each(|n| world.machine.run(world.networks.domain_died(100 + n)));
    world.assert_clean(&[5, 6, 102]);
}

#[test]
fn an_address_of_no_guest_is_refused() {
    let world = World::new();
    for (ip, reason) in [
        ("192.168.0.1", "192.168.0.1 is no address for a guest of the network 10.77.0.0/24"),
        ("10.77.0.1", "10.77.0.1 is dom0's own address on the network"),
        ("10.77.0.255", "10.77.0.255 is no address for a guest of the network 10.77.0.0/24"),
    ] {
        assert_eq!(world.attach(5, 0, &format!("ip={ip}")).unwrap_err(), reason);
    }
    world.assert_clean(&[5]);
    let bare = World::bare();
    let why = bare.attach(5, 0, "bridge=a,ip=10.77.0.9").unwrap_err();
    assert_eq!(why, "10.77.0.9 is no address for a guest of the network 10.77.1.0/24");
    bare.assert_clean(&[5]);
}

#[test]
fn nat_and_uplink_take_devices_in_their_order() {
    let world = World::bare();
    let none = "the machine has no network device that another network does not use";
    assert_eq!(world.attach(5, 0, "bridge=uplink").unwrap_err(), none);
    world.assert_clean(&[5]);
    let second = Device::default();
    world.networks.add_device("eth0", Box::new(world.wire.clone()), 500_000, ());
    world.networks.add_device("eth1", Box::new(second.clone()), 500_001, ());
    world.attach(5, 0, "bridge=uplink").unwrap();
    world.attach(5, 1, "").unwrap();
    world.attach(5, 2, "bridge=a").unwrap();
    let some = |text: &str| Some(text.to_string());
    assert_eq!(
        rows(&world),
        [
            ("uplink".into(), "bridged", None, some("eth0")),
            ("nat".into(), "translated", some("10.77.0.1/24"), some("eth1")),
            ("a".into(), "isolated", some("10.77.1.1/24"), None),
        ]
    );
    let before = world.networks().len();
    world.end(5);
    assert_eq!((before, world.networks()), (3, vec![("uplink".into(), 0), ("nat".into(), 0)]));
    let asks = |device: &Device| device.0.borrow().sent.iter().any(|frame| frame[6..12] == UPLINK_MAC);
    assert!(asks(&second) && !asks(&world.wire), "the gateway asks for an address at its device alone");
}

#[test]
fn a_device_goes_back_if_there_is_no_memory_for_its_network() {
    let world = World::bare();
    world.networks.add_device("eth0", Box::new(world.wire.clone()), 500_000, ());
    world.networks.add_device("eth1", Box::new(Device::default()), 500_001, ());
    world.machine.state.borrow_mut().buffers_left = Some(2);
    assert_eq!(world.attach(5, 0, "bridge=uplink").unwrap_err(), "not enough memory is left for the network");
    world.assert_clean(&[5]);
    world.machine.state.borrow_mut().buffers_left = None;
    world.attach(5, 0, "").unwrap();
    assert_eq!(rows(&world)[0].3.as_deref(), Some("eth0"));
    world.end(5);
}

#[test]
fn nat_without_a_device_gives_out_addresses() {
    let world = World::bare();
    let (guest, mut front) = world.connected(5, "");
    assert_eq!(dhcp(&mut front, &guest)[..3], [10, 77, 0]);
    assert_eq!(rows(&world), [("nat".into(), "translated", Some("10.77.0.1/24".into()), None)]);
    world.end(5);
}

#[test]
fn there_are_so_many_networks_and_no_more() {
    let world = World::new();
    for n in 1..MAX_NETWORKS as u16 {
        world.attach(10 + n, 0, &format!("bridge=net{n}")).unwrap();
    }
    let why = world.attach(5, 0, "bridge=more").unwrap_err();
    assert_eq!(why, "there are 16 networks already");
    world.attach(5, 0, "bridge=net3").unwrap();
    assert_eq!(world.networks().len(), MAX_NETWORKS);
    // The network goes with its last device, and the next one gets its number.
    world.end(5);
    assert_eq!(world.networks().len(), MAX_NETWORKS);
    world.end(13);
    assert_eq!(world.networks().len(), MAX_NETWORKS - 1);
    let (guest, mut front) = world.connected(5, "bridge=more");
    assert_eq!(dhcp(&mut front, &guest)[..3], [10, 77, 3]);
    world.machine.run(world.networks.detach(5, 0, true)).unwrap();
    assert_eq!(world.networks().len(), MAX_NETWORKS - 1);
    (5..40).for_each(|domain| world.machine.run(world.networks.domain_died(domain)));
    assert_eq!(world.networks(), [("nat".to_string(), 0)]);
    world.end(5);
    world.assert_clean(&[5]);
}
