//! What comes from the machine's network device, and what goes there.

use ring_protocol::net::status;

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::frames::world::{ROUTER, ROUTER_MAC, UPLINK, UPLINK_MAC};
use crate::frames::{Fill, ethernet, fill, ipv4, tcp, udp};
use crate::front::{Front, Guest};
use crate::world::{GATEWAY_MAC, INTERRUPT, World, test_frame, test_text};
use crate::{ALL, dhcp};

/// A connection from outside comes to a port. Returns the port of the guest at which it arrives.
fn knock(world: &World, fronts: &mut [(&Guest, &mut Front)], protocol: u8, port: u16) -> Vec<(usize, u16)> {
    let mut segment = if protocol == 6 { tcp((4_000, port), 1, 2, &[], &[]) } else { udp((4_000, port), b"hello") };
    fill(&ROUTER, &UPLINK, protocol, &mut segment, Fill::Whole);
    let packet = ipv4(ROUTER, UPLINK, protocol, 0, 0, &[], &segment);
    world.wire.0.borrow_mut().coming.push_back(ethernet(UPLINK_MAC, ROUTER_MAC, 0x800, &packet));
    world.machine.fake.raise_port(INTERRUPT);
    world.machine.rounds(10);
    let mut arrived = Vec::new();
    for (n, (guest, front)) in fronts.iter_mut().enumerate() {
        for frame in front.take(guest).iter().filter(|frame| frame[12..14] == [8, 0] && frame[23] == protocol) {
            arrived.push((n, u16::from_be_bytes([frame[36], frame[37]])));
        }
    }
    arrived
}

#[test]
fn forwards_lead_to_the_first_nat_vif_of_the_guest() {
    let world = World::new();
    for forward in ["2222:guest5:22", "udp:53:guest5:5353", "80:guest6:8080"] {
        world.networks.add_forward(forward.parse().unwrap());
    }
    let mut guest = world.guest(5);
    // A vif on another network does not count.
    let mut other = world.plugged(&mut guest, 0, "bridge=a");
    let mut first = world.plugged(&mut guest, 1, "");
    let mut second = world.plugged(&mut guest, 2, "");
    let (guest7, mut seven) = world.connected(7, "");
    world.serve_uplink();
    for _ in 0..2 {
        let mut fronts = [(&guest, &mut other), (&guest, &mut first), (&guest, &mut second), (&guest7, &mut seven)];
        assert_eq!(knock(&world, &mut fronts, 6, 2222), [(1, 22)]);
        assert_eq!(knock(&world, &mut fronts, 17, 53), [(1, 5353)]);
        assert_eq!(knock(&world, &mut fronts, 6, 53), [], "TCP is not forwarded there");
        assert_eq!(knock(&world, &mut fronts, 6, 80), [], "the guest is not there");
        // The front end closes, and connects again.
        first.close(&mut guest);
        world.machine.rounds(20);
        // Another vif of the guest connects again meanwhile, which changes nothing.
        second.close(&mut guest);
        world.machine.rounds(20);
        second.set_state(&mut guest, 1);
        second.connect(&mut guest);
        let mut fronts = [(&guest, &mut second), (&guest7, &mut seven)];
        assert_eq!(knock(&world, &mut fronts, 6, 2222), []);
        first.set_state(&mut guest, 1);
        first.connect(&mut guest);
    }
    // The forwards go with their vif, and to the next one that is attached.
    world.machine.run(world.networks.detach(5, 1, true)).unwrap();
    assert_eq!(knock(&world, &mut [(&guest, &mut second)], 6, 2222), []);
    let mut third = world.plugged(&mut guest, 3, "");
    assert_eq!(knock(&world, &mut [(&guest, &mut second), (&guest, &mut third)], 6, 2222), [(1, 22)]);
    world.end(5);
    world.end(7);
    world.assert_clean(&[5, 7]);
}

#[test]
fn ports_of_forwards_are_no_guest_s_own() {
    const PORTS: std::ops::Range<u16> = 40_000..40_256;
    // The network is there before the forwards, or is made after them.
    for world in [World::new(), World::bare()] {
        // Their guest is not there yet.
        PORTS.for_each(|port| world.networks.add_forward(format!("udp:{port}:guest6:{port}").parse().unwrap()));
        if world.networks().is_empty() {
            world.networks.add_device("eth0", Box::new(world.wire.clone()), INTERRUPT, ());
        }
        let (guest, mut front) = world.connected(5, "");
        world.serve_uplink();
        let own = world.only(5).ip.unwrap().parse::<std::net::Ipv4Addr>().unwrap().octets();
        let arp = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &ROUTER_MAC, &ROUTER, &UPLINK_MAC, &UPLINK].concat();
        let mut begun = 0;
        for port in 1_000..2_500 {
            let packet = ipv4(own, ROUTER, 17, 0, 0, &[], &udp((port, 53), b"question"));
            front.ask(&guest, &ethernet(GATEWAY_MAC, front.mac, 0x800, &packet));
            if port == 1_000 {
                world.wire.0.borrow_mut().coming.push_back(ethernet(UPLINK_MAC, ROUTER_MAC, 0x806, &arp));
                world.machine.fake.raise_port(INTERRUPT);
                world.machine.rounds(10);
            }
            for frame in world.wire.0.borrow_mut().sent.drain(..).filter(|frame| frame[23] == 17 && frame[37] == 53) {
                let outer = u16::from_be_bytes([frame[34], frame[35]]);
                assert!(!PORTS.contains(&outer), "{outer}");
                begun += 1;
            }
        }
        assert_eq!(begun, 1_500);
        world.end(5);
    }
}

#[test]
fn guests_of_the_network_uplink_are_on_the_outer_network() {
    let world = World::bare();
    world.networks.add_device("eth0", Box::new(world.wire.clone()), INTERRUPT, ());
    let (guest, mut front) = world.connected(5, "bridge=uplink");
    assert_eq!(front.ask(&guest, &test_frame(ALL, front.mac, "to all")), status::OKAY);
    world.machine.rounds(5);
    assert_eq!(world.wire.0.borrow().sent, [test_frame(ALL, front.mac, "to all")], "and nothing else");
    world.wire.0.borrow_mut().coming.push_back(test_frame(front.mac, ROUTER_MAC, "for the guest"));
    world.wire.0.borrow_mut().coming.push_back(test_frame([2, 9, 9, 9, 9, 9], ROUTER_MAC, "for nobody here"));
    world.machine.fake.raise_port(INTERRUPT);
    world.machine.rounds(5);
    let frames = front.take(&guest);
    assert_eq!(frames.iter().filter_map(|frame| test_text(frame)).collect::<Vec<_>>(), ["for the guest"]);
    assert_eq!(world.only(5).ip, None, "dom0 gives out no addresses there");
    let device = || world.networks.networks()[0].device.clone().unwrap();
    let shown = device();
    assert_eq!((shown.sent, shown.received, shown.resets, shown.link), (1, 2, 0, true));
    assert_eq!(shown.sent_bytes, test_frame(ALL, front.mac, "to all").len() as u64);
    world.wire.0.borrow_mut().unplugged = true;
    assert!(!device().link);
    world.end(5);
}

#[test]
fn a_network_goes_on_without_its_device() {
    let world = World::new();
    let (guest5, mut five) = world.connected(5, "");
    let (guest6, mut six) = world.connected(6, "");
    let wire = || world.wire.0.borrow_mut();
    (wire().needs_reset, wire().dead) = (true, Some("it does not answer"));
    world.machine.fake.raise_port(INTERRUPT);
    world.machine.rounds(10);
    wire().sent.clear();
    dhcp(&mut five, &guest5);
    assert_eq!(five.ask(&guest5, &test_frame(six.mac, five.mac, "hello")), status::OKAY);
    world.machine.rounds(5);
    let heard: Vec<_> = six.take(&guest6).iter().filter_map(|frame| test_text(frame)).collect();
    assert_eq!(heard, ["hello"]);
    world.machine.rounds(5_000);
    assert!(wire().sent.is_empty(), "nothing is sent to a lost device");
    let shown = world.networks.networks()[0].device.clone().unwrap();
    assert_eq!((shown.resets, shown.link), (1, false), "the link of a lost device is down");
    world.end(5);
    world.end(6);
    world.assert_clean(&[5, 6]);
}
