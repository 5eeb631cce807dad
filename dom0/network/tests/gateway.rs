//! A gateway between models of guests and of an outer network.

mod common;
use common::dhcp::{question, take_apart};
use common::world::{
    DNS, FAR, GATEWAY, GATEWAY_MAC, ROUTER, ROUTER_MAC, SECOND, Sent, UPLINK, UPLINK_MAC, World, arp, echo, from_far,
    settings, syn,
};
use common::{Fill, checksum, ethernet, fill, ipv4, is_right, mutate, tcp, udp};
use network::{
    Address, Addressing, CannotAttach, CannotForward, Checksum, FrameInfo, Gateway, Mac, PortId, Protocol, Reason,
    Responder, ResponderSettings, Segmentation, Station, Transported,
};
use std::collections::BTreeSet;
use test_random::Random;

/// Makes the answer to a port.
type Answer<'a> = Box<dyn Fn(u16) -> Vec<u8> + 'a>;

const PLAIN: FrameInfo = FrameInfo { checksum: Checksum::Unverified, segmentation: None };
const BLANK: FrameInfo = FrameInfo { checksum: Checksum::Blank, segmentation: None };

/// Returns the only frame that went to the uplink.
fn to_uplink(sent: &Sent) -> &[u8] {
    assert_eq!((sent.to_guests.len(), sent.to_uplink.len()), (0, 1));
    &sent.to_uplink[0].0
}

/// Returns the only frame that went to a guest, after checking which guest.
fn to_guest<'a>(sent: &'a Sent, world: &World, index: usize) -> &'a [u8] {
    assert_eq!((sent.to_guests.len(), sent.to_uplink.len()), (1, 0));
    assert_eq!(sent.to_guests[0].0, world.guests[index].port);
    &sent.to_guests[0].1
}

fn nothing(sent: &Sent) {
    assert_eq!((sent.to_guests.len(), sent.to_uplink.len()), (0, 0), "{sent:?}");
}

fn ports(frame: &[u8]) -> (u16, u16) {
    (u16::from_be_bytes([frame[34], frame[35]]), u16::from_be_bytes([frame[36], frame[37]]))
}

/// Checks a translated frame of IPv4 without options: Ethernet, addresses, checksums, and one hop fewer.
fn check(frame: &[u8], macs: [[u8; 6]; 2], from: [u8; 4], to: [u8; 4]) {
    assert_eq!([&frame[..6], &frame[6..12]], macs);
    assert_eq!((&frame[26..30], &frame[30..34], frame[22]), (&from[..], &to[..], 63));
    assert_eq!(checksum(&[&frame[14..34]]), 0);
    match frame[23] {
        1 => assert_eq!(checksum(&[&frame[34..]]), 0),
        protocol => assert!(is_right(&from, &to, protocol, &frame[34..])),
    }
}

#[test]
fn the_uplink_obtains_renews_and_loses_its_address() {
    let mut world = World::new(0, settings());
    // Nobody answers for an hour: it asks on, and less and less often.
    let (mut asked, mut waits) = (0, Vec::new());
    let mut last = world.now;
    while world.now < 3_600 * SECOND {
        let question = world.wait();
        assert_eq!(take_apart(&question).unwrap().options[&53], [1]);
        asked += 1;
        waits.push((world.now - last) / SECOND);
        last = world.now;
    }
    assert!((50..80).contains(&asked), "{asked} questions");
    assert_eq!(waits[..8], [0, 1, 2, 4, 8, 16, 32, 64]);
    assert!(waits.iter().all(|&wait| wait <= 65));

    // An offer that is not acknowledged is given up after four requests.
    let question = world.wait();
    let offered = world.serve(&question, 2, UPLINK, 3_600);
    assert_eq!(take_apart(to_uplink(&offered)).unwrap().options[&53], [3]);
    let mut kinds = Vec::new();
    for _ in 0..4 {
        let question = world.wait();
        kinds.push(take_apart(&question).unwrap().options[&53][0]);
        if kinds.last() == Some(&1) {
            // Refused at first, then obtained.
            let offered = world.serve(&question, 2, UPLINK, 3_600);
            nothing(&world.serve(to_uplink(&offered), 6, [0; 4], 0));
        }
    }
    assert_eq!(kinds, [3, 3, 3, 1]);
    world.connect(3_600);
    let address = world.gateway.uplink_address().unwrap();
    assert_eq!(address.network, Some("192.0.2.0/24".parse().unwrap()));
    assert_eq!((address.router, address.dns[0]), (Some(ROUTER.into()), Some(DNS.into())));

    // Renewal with the server at half of the lease.
    let start = world.now;
    let question = world.wait();
    assert_eq!(world.now - start, 1_800 * SECOND);
    let renewal = take_apart(&question).unwrap();
    assert_eq!((renewal.to_mac, renewal.to, renewal.from, renewal.client), (ROUTER_MAC, ROUTER, UPLINK, UPLINK));
    nothing(&world.serve(&question, 5, UPLINK, 3_600));
    let renewed = world.now;

    // Without an answer: with anybody from seven eighths on, and at the end the address is lost.
    let (mut to_all, mut questions) = (None, 0);
    let lost = loop {
        let (sent, next) = world.turn();
        if world.gateway.uplink_address().is_none() {
            break world.now - renewed;
        }
        for (frame, _) in sent.to_uplink {
            questions += 1;
            if take_apart(&frame).unwrap().to == [255; 4] {
                to_all.get_or_insert(world.now - renewed);
            }
        }
        world.now = next.unwrap();
    };
    assert_eq!(lost, 3_600 * SECOND);
    assert_eq!(to_all, Some(3_150 * SECOND));
    assert!(questions < 30, "{questions} questions");
}

#[test]
fn only_answers_to_its_own_question_move_the_client() {
    let mut world = World::new(0, settings());
    let (sent, _) = world.turn();
    let mut other = to_uplink(&sent).to_vec();
    // Another conversation: four bytes at 4 in the message. Its checksum is not looked at.
    other[46] ^= 1;
    fill(&[0; 4], &[255; 4], 17, &mut other[34..], Fill::Whole);
    nothing(&world.serve(&other, 2, UPLINK, 3_600));
    nothing(&world.serve(to_uplink(&sent), 5, UPLINK, 3_600));
    nothing(&world.serve(to_uplink(&sent), 2, [255; 4], 3_600));
    nothing(&world.serve(to_uplink(&sent), 2, [224, 0, 0, 1], 3_600));
    assert_eq!(world.gateway.uplink_address(), None);
    let offered = world.serve(to_uplink(&sent), 2, UPLINK, 3_600);
    // It acknowledges another address than it offered.
    nothing(&world.serve(to_uplink(&offered), 5, [192, 0, 2, 99], 3_600));
    assert_eq!(world.gateway.uplink_address(), None);
    world.serve(to_uplink(&offered), 5, UPLINK, 3_600);
    assert_eq!(world.gateway.uplink_address().unwrap().address.octets(), UPLINK);
}

#[test]
fn twenty_guests_have_an_address_each_and_keep_it() {
    let mut world = World::connected(20);
    let addresses: BTreeSet<[u8; 4]> = world.guests.iter().map(|guest| guest.address).collect();
    assert_eq!(addresses.len(), 20);
    assert!(addresses.iter().all(|address| address[..3] == [10, 77, 0] && ![0, 1, 255].contains(&address[3])));
    for i in 0..20 {
        let (mac, own) = (world.guests[i].mac, world.guests[i].address);
        let sent = world.guest(i, &question(mac, 1, [0; 4], &[(61, b"any id")]), PLAIN);
        let offer = take_apart(to_guest(&sent, &world, i)).unwrap();
        assert_eq!((offer.operation, offer.yours, offer.mac, offer.to_mac, offer.to), (2, own, mac, mac, own));
        let option = |number: u8| offer.options[&number].as_slice();
        assert_eq!((option(53), option(54), option(61)), (&[2][..], &GATEWAY[..], &b"any id"[..]));
        assert_eq!((option(1), option(3), option(6)), (&[255, 255, 255, 0][..], &GATEWAY[..], &DNS[..]));
        assert_eq!((option(51), option(26)), (&3_600_u32.to_be_bytes()[..], &1_500_u16.to_be_bytes()[..]));
        assert_eq!((option(12), option(15)), (format!("guest{i}").as_bytes(), &b"test"[..]));
        let sent = world.guest(i, &question(mac, 3, [0; 4], &[(50, &own), (54, &GATEWAY)]), PLAIN);
        let ack = take_apart(to_guest(&sent, &world, i)).unwrap();
        assert_eq!((ack.options[&53][0], ack.yours), (5, own));
        // Renewal, and what a client asks that has an address by other means.
        let sent = world.guest(i, &question(mac, 3, own, &[]), PLAIN);
        let ack = take_apart(to_guest(&sent, &world, i)).unwrap();
        assert_eq!((ack.options[&53][0], ack.yours, ack.client, ack.to), (5, own, own, own));
        let sent = world.guest(i, &question(mac, 8, [10, 77, 0, 250], &[]), PLAIN);
        let ack = take_apart(to_guest(&sent, &world, i)).unwrap();
        assert_eq!((ack.options[&53][0], ack.yours, ack.options.contains_key(&51)), (5, [0; 4], false));
    }
    // A guest that comes again gets what it had, though others came meanwhile.
    let (port, mac, own) = (world.guests[4].port, Mac(world.guests[4].mac), world.guests[4].address);
    assert!(world.gateway.detach(port) && !world.gateway.detach(port));
    assert_eq!(world.gateway.guests().attach(port, mac, None, "again").unwrap().octets(), own);
}

#[test]
fn no_other_address_is_acknowledged() {
    let mut world = World::connected(2);
    let (mac, own, other) = (world.guests[0].mac, world.guests[0].address, world.guests[1].address);
    for (client, options) in [([0; 4], &[(50, &other[..])][..]), (other, &[]), ([0; 4], &[(50, &[192, 0, 2, 9][..])])] {
        let sent = world.guest(0, &question(mac, 3, client, options), PLAIN);
        let nak = take_apart(to_guest(&sent, &world, 0)).unwrap();
        assert_eq!((nak.options[&53][0], nak.yours, nak.to, nak.to_mac), (6, [0; 4], [255; 4], [0xff; 6]));
        assert!(!nak.options.contains_key(&51));
    }
    // Another server's offer was taken; release; decline; another client's address; no address at all.
    nothing(&world.guest(0, &question(mac, 3, [0; 4], &[(50, &own), (54, &[10, 77, 0, 2])]), PLAIN));
    nothing(&world.guest(0, &question(mac, 7, own, &[]), PLAIN));
    nothing(&world.guest(0, &question(mac, 4, [0; 4], &[(50, &own)]), PLAIN));
    nothing(&world.guest(0, &question(world.guests[1].mac, 1, [0; 4], &[]), PLAIN));
    nothing(&world.guest(0, &question(mac, 3, [0; 4], &[]), PLAIN));
    let mut relayed = question(mac, 1, [0; 4], &[]);
    relayed[42 + 24] = 10;
    nothing(&world.guest(0, &relayed, PLAIN));
    assert_eq!(world.gateway.counters().dropped(Reason::Dhcp), 6);
}

#[test]
fn ten_messages_are_answered_in_a_second() {
    let mut world = World::connected(2);
    let (mac, other) = (world.guests[0].mac, world.guests[1].mac);
    let answered = |world: &mut World| {
        (0..200).filter(|_| !world.guest(0, &question(mac, 1, [0; 4], &[]), PLAIN).to_guests.is_empty()).count()
    };
    assert_eq!(answered(&mut world), 10);
    assert_eq!(world.gateway.counters().dropped(Reason::Rate), 190);
    // The flood costs the other guest nothing.
    assert_eq!(world.guest(1, &question(other, 1, [0; 4], &[]), PLAIN).to_guests.len(), 1);
    world.now += SECOND;
    assert_eq!(answered(&mut world), 10);
}

#[test]
fn a_lease_is_short_while_no_dns_server_is_known() {
    let mut world = World::new(1, settings());
    let mac = world.guests[0].mac;
    let sent = world.guest(0, &question(mac, 1, [0; 4], &[]), PLAIN);
    let offer = take_apart(to_guest(&sent, &world, 0)).unwrap();
    assert_eq!(offer.options[&51], 60_u32.to_be_bytes());
    assert!(!offer.options.contains_key(&6));
}

#[test]
fn addresses_are_given_once() {
    let mut gateway = Gateway::new(settings()).unwrap();
    let mac = |i| Mac([0, 0x16, 0x3e, 0, 0, i]);
    let at = |last| Some([10, 77, 0, last].into());
    assert_eq!(gateway.guests().attach(PortId(1), mac(1), at(9), "a"), Ok([10, 77, 0, 9].into()));
    assert_eq!(gateway.guests().attach(PortId(1), mac(2), None, "b"), Err(CannotAttach::Port));
    assert_eq!(gateway.guests().attach(PortId(2), mac(1), None, "b"), Err(CannotAttach::Mac));
    for (address, refusal) in [
        (at(9), CannotAttach::AddressInUse([10, 77, 0, 9].into())),
        (at(1), CannotAttach::AddressInUse(GATEWAY.into())),
        (at(0), CannotAttach::NotInNetwork([10, 77, 0, 0].into())),
        (at(255), CannotAttach::NotInNetwork([10, 77, 0, 255].into())),
        (Some([10, 78, 0, 9].into()), CannotAttach::NotInNetwork([10, 78, 0, 9].into())),
    ] {
        assert_eq!(gateway.guests().attach(PortId(2), mac(2), address, "b"), Err(refusal));
    }
    // A network with room for six stations, one of which is the gateway.
    let mut small = settings();
    small.network = "10.77.0.0/29".parse().unwrap();
    let mut gateway = Gateway::new(small).unwrap();
    let given: BTreeSet<_> =
        (0..5).map(|i| gateway.guests().attach(PortId(i.into()), mac(i), None, "").unwrap().octets()[3]).collect();
    assert_eq!(given, BTreeSet::from([2, 3, 4, 5, 6]));
    assert_eq!(gateway.guests().attach(PortId(9), mac(9), None, ""), Err(CannotAttach::Full));
}

#[test]
fn the_gateway_answers_for_itself_and_nobody_else() {
    let mut world = World::connected(2);
    let (mac, own, other) = (world.guests[0].mac, world.guests[0].address, world.guests[1].address);
    let sent = world.guest(0, &arp(1, mac, own, GATEWAY), PLAIN);
    let answer = to_guest(&sent, &world, 0);
    assert_eq!((&answer[..6], &answer[6..12], &answer[20..22]), (&mac[..], &GATEWAY_MAC[..], &[0, 2][..]));
    assert_eq!((&answer[22..28], &answer[28..32], &answer[38..42]), (&GATEWAY_MAC[..], &GATEWAY[..], &own[..]));
    nothing(&world.guest(0, &arp(1, mac, own, other), PLAIN));
    nothing(&world.guest(0, &arp(1, mac, other, GATEWAY), PLAIN));
    nothing(&world.guest(0, &arp(1, GATEWAY_MAC, own, GATEWAY), PLAIN));

    let ping = world.guest_frame(0, 1, GATEWAY, &echo(8, 5, b"data of an echo"));
    let sent = world.guest(0, &ping, PLAIN);
    let pong = to_guest(&sent, &world, 0);
    assert_eq!(
        ([&pong[..6], &pong[6..12]], &pong[26..30], &pong[30..34]),
        ([&mac[..], &GATEWAY_MAC], &GATEWAY[..], &own[..])
    );
    assert_eq!((checksum(&[&pong[14..34]]), &pong[34..]), (0, &echo(0, 5, b"data of an echo")[..]));
    let answered = (0..500).filter(|_| !world.guest(0, &ping, PLAIN).to_guests.is_empty()).count();
    assert!(answered < 101, "{answered} echoes");
    // Nothing else of the gateway's is reached.
    nothing(&world.guest(0, &world.guest_frame(0, 6, GATEWAY, &syn((1, 22))), PLAIN));
    nothing(&world.guest(0, &world.guest_frame(0, 17, GATEWAY, &udp((1, 53), b"?")), PLAIN));

    // On the uplink: ARP and echo.
    let sent = world.uplink(&arp(1, ROUTER_MAC, ROUTER, UPLINK), PLAIN);
    assert_eq!(to_uplink(&sent)[22..32], [&UPLINK_MAC[..], &UPLINK[..]].concat());
    nothing(&world.uplink(&arp(1, ROUTER_MAC, ROUTER, [192, 0, 2, 16]), PLAIN));
    let sent = world.uplink(&from_far(1, FAR, &echo(8, 1, b"hello")), PLAIN);
    assert_eq!(to_uplink(&sent)[30..34], FAR);
    nothing(&world.uplink(&from_far(6, FAR, &syn((1, 22))), PLAIN));
}

#[test]
fn flows_are_translated_both_ways() {
    let mut world = World::connected(3);
    let mut random = Random::new();
    for round in 0..2_000_u16 {
        let index = random.below(3);
        let (mac, own) = (world.guests[index].mac, world.guests[index].address);
        let far = [198, 51, 100, random.byte()];
        let count = random.below(300);
        let (data, back) = (random.bytes(count), random.bytes(count / 2));
        let (inner, remote) = (1_024 + round, 1 + random.below(60_000));
        let (protocol, out, answer): (u8, Vec<u8>, Answer<'_>) = match random.below(3) {
            0 => (
                6,
                tcp((inner, remote), 1, 2, &[1; 4], &data),
                Box::new(|outer| tcp((remote, outer), 9, 0x12, &[], &back)),
            ),
            1 => (17, udp((inner, remote), &data), Box::new(|outer| udp((remote, outer), &back))),
            _ => (1, echo(8, inner, &data), Box::new(|outer| echo(0, outer, &back))),
        };
        // With and without a finished checksum.
        let how = if protocol != 1 && random.below(2) == 0 { Fill::Blank } else { Fill::Whole };
        let mut frame = world.guest_frame(index, protocol, far, &out);
        if how == Fill::Blank {
            fill(&own, &far, protocol, &mut frame[34..], Fill::Blank);
        }
        let info = if how == Fill::Blank { BLANK } else { PLAIN };
        let sent = world.guest(index, &frame, info);
        let mut there = to_uplink(&sent).to_vec();
        assert_eq!(sent.to_uplink[0].1, info);
        if how == Fill::Blank {
            // What the field holds is the pseudo header's sum: finished by slow code, all is right.
            let mut expected = there.clone();
            fill(&UPLINK, &far, protocol, &mut expected[34..], Fill::Blank);
            let at = if protocol == 6 { 50 } else { 40 };
            let value = |frame: &[u8]| u16::from_be_bytes([frame[at], frame[at + 1]]) % 0xffff;
            assert_eq!(value(&there), value(&expected));
            fill(&UPLINK, &far, protocol, &mut there[34..], Fill::Whole);
        }
        check(&there, [ROUTER_MAC, UPLINK_MAC], UPLINK, far);
        let outer = if protocol == 1 { u16::from_be_bytes([there[38], there[39]]) } else { ports(&there).0 };
        assert!(outer >= 32_768);
        assert!(there.ends_with(&data));

        let reply = from_far(protocol, far, &answer(outer));
        let sent = world.uplink(&reply, PLAIN);
        let here = to_guest(&sent, &world, index);
        check(here, [mac, GATEWAY_MAC], far, own);
        let reached = if protocol == 1 { u16::from_be_bytes([here[38], here[39]]) } else { ports(here).1 };
        assert_eq!(reached, inner);
        assert!(here.ends_with(&back));

        // Not from another station or port, nor with another protocol.
        nothing(&world.uplink(&from_far(protocol, [198, 51, 101, 1], &answer(outer)), PLAIN));
        if protocol != 1 {
            let other =
                if protocol == 6 { tcp((remote ^ 1, outer), 9, 0x12, &[], b"") } else { udp((remote ^ 1, outer), b"") };
            nothing(&world.uplink(&from_far(protocol, far, &other), PLAIN));
        }
    }
}

#[test]
fn a_flow_keeps_its_port_and_flows_do_not_share_one() {
    let mut world = World::connected(2);
    let mut seen = BTreeSet::new();
    for index in 0..2 {
        for remote in 1..200 {
            let frame = world.guest_frame(index, 17, FAR, &udp((5_000, remote), b""));
            let first = ports(to_uplink(&world.guest(index, &frame, PLAIN))).0;
            let second = ports(to_uplink(&world.guest(index, &frame, PLAIN))).0;
            assert_eq!(first, second);
            assert!(seen.insert(first));
        }
    }
}

#[test]
fn what_is_to_be_cut_passes_and_is_cut_to_fit() {
    let mut world = World::connected(1);
    world.guest(0, &world.guest_frame(0, 6, FAR, &syn((7, 80))), PLAIN);
    let own = world.guests[0].address;
    let mut frame = world.guest_frame(0, 6, FAR, &tcp((7, 80), 2, 0x18, &[1; 12], &[9; 20_000]));
    fill(&own, &FAR, 6, &mut frame[34..], Fill::Blank);
    let info = |bytes| FrameInfo {
        checksum: Checksum::Blank,
        segmentation: Some(Segmentation { protocol: Protocol::Tcp4, bytes }),
    };
    assert_eq!(world.guest(0, &frame, info(1_448)).to_uplink[0].1, info(1_448));
    assert_eq!(world.guest(0, &frame, info(8_948)).to_uplink[0].1, info(1_448));
    // Not to be cut, and too long: the guest is told, as its packet may not be cut on the way.
    let mut may_not = world.guest_frame(0, 17, FAR, &udp((7, 80), &[0; 2_000]));
    nothing(&world.guest(0, &may_not, PLAIN));
    may_not[20] = 0x40;
    let sent = world.guest(0, &may_not, PLAIN);
    let told = to_guest(&sent, &world, 0);
    assert_eq!((&told[34..36], &told[40..42]), (&[3, 4][..], &1_500_u16.to_be_bytes()[..]));
    assert_eq!((checksum(&[&told[34..]]), &told[42..]), (0, &may_not[14..42]));
    assert_eq!(world.gateway.counters().dropped(Reason::TooLong), 2);
}

#[test]
fn forwards_lead_to_a_guest() {
    let mut world = World::connected(3);
    let web = world.guests[1].port;
    world.gateway.forward(Transported::Tcp, 2_222, web, 22).unwrap();
    assert_eq!(world.gateway.forward(Transported::Tcp, 2_222, world.guests[0].port, 22), Err(CannotForward::Outer));
    assert_eq!(world.gateway.forward(Transported::Tcp, 2_223, web, 22), Err(CannotForward::Inner));
    assert_eq!(world.gateway.forward(Transported::Udp, 68, web, 22), Err(CannotForward::Port));
    assert_eq!(world.gateway.forward(Transported::Tcp, 1, PortId(99), 22), Err(CannotForward::Guest));
    let (mac, own) = (world.guests[1].mac, world.guests[1].address);
    for port in [1_000, 1_001] {
        let sent = world.uplink(&from_far(6, FAR, &syn((port, 2_222))), PLAIN);
        let there = to_guest(&sent, &world, 1);
        check(there, [mac, GATEWAY_MAC], FAR, own);
        assert_eq!(ports(there), (port, 22));
        let answer = world.guest_frame(1, 6, FAR, &tcp((22, port), 5, 0x12, &[], b""));
        let sent = world.guest(1, &answer, PLAIN);
        check(to_uplink(&sent), [ROUTER_MAC, UPLINK_MAC], UPLINK, FAR);
        assert_eq!(ports(to_uplink(&sent)), (2_222, port));
    }
    // Connections from outside cost no flow. UDP has no such forward.
    assert_eq!(world.gateway.flows(web), Some(0));
    nothing(&world.uplink(&from_far(17, FAR, &udp((1, 2_222), b"")), PLAIN));
    world.gateway.detach(web);
    nothing(&world.uplink(&from_far(6, FAR, &syn((1, 2_222))), PLAIN));
}

#[test]
fn a_port_of_a_flow_is_not_forwarded_to_another_guest() {
    let mut world = World::connected(2);
    let question = world.guest_frame(0, 17, FAR, &udp((5_000, 53), b"question"));
    let outer = ports(to_uplink(&world.guest(0, &question, PLAIN))).0;
    let other = world.guests[1].port;
    assert_eq!(world.gateway.forward(Transported::Udp, outer, other, 53), Err(CannotForward::Flow));
    to_guest(&world.uplink(&from_far(17, FAR, &udp((53, outer), b"answer")), PLAIN), &world, 0);
    world.gateway.detach(world.guests[0].port);
    assert_eq!(world.gateway.forward(Transported::Udp, outer, other, 53), Ok(()));
}

#[test]
fn a_port_that_is_kept_for_a_forward_is_no_flow_s() {
    let mut world = World::connected(1);
    let kept = 60_000..60_256;
    kept.clone().for_each(|port| world.gateway.keep_port(port).unwrap());
    assert_eq!((world.gateway.keep_port(60_000), world.gateway.keep_port(1)), (Ok(()), Err(CannotForward::Full)));
    for i in 0..10_000_u16 {
        let frame = world.guest_frame(0, 17, FAR, &udp((1_000 + i, 53), b""));
        let outer = ports(to_uplink(&world.guest(0, &frame, PLAIN))).0;
        assert!(!kept.contains(&outer), "{outer}");
    }
    assert_eq!(world.gateway.forward(Transported::Udp, 60_100, world.guests[0].port, 53), Ok(()));
}

/// Cuts a datagram into parts of 1,000 bytes.
fn parts(macs: [[u8; 6]; 2], from: [u8; 4], to: [u8; 4], id: u16, datagram: &[u8]) -> Vec<Vec<u8>> {
    let (count, mut parts) = (datagram.len().div_ceil(1_000), Vec::new());
    for (i, part) in datagram.chunks(1_000).enumerate() {
        let more = if i + 1 < count { 0x2000 } else { 0 };
        let field = u16::try_from(i * 125).unwrap() | more;
        parts.push(ethernet(macs[0], macs[1], 0x800, &ipv4(from, to, 17, id, field, &[], part)));
    }
    parts
}

#[test]
fn the_parts_of_a_packet_follow_the_first() {
    let mut world = World::connected(2);
    let mut random = Random::new();
    let payload = random.bytes(2_700);
    for index in 0..2 {
        let (mac, own) = (world.guests[index].mac, world.guests[index].address);
        let mut datagram = udp((5_000, 53), &payload);
        fill(&own, &FAR, 17, &mut datagram, Fill::Whole);
        // Both guests number their packets alike.
        let out = parts([GATEWAY_MAC, mac], own, FAR, 4_321, &datagram);
        // A later part alone goes nowhere.
        nothing(&world.guest(index, &out[1], PLAIN));
        let (mut there, mut ids) = (Vec::new(), BTreeSet::new());
        for part in &out {
            let sent = world.guest(index, part, PLAIN);
            let part = to_uplink(&sent);
            assert_eq!((checksum(&[&part[14..34]]), &part[26..30]), (0, &UPLINK[..]));
            ids.insert([part[18], part[19]]);
            there.extend(&part[34..]);
        }
        assert_eq!(ids.len(), 1, "all parts have the same number");
        assert!(is_right(&UPLINK, &FAR, 17, &there) && there[8..] == payload);

        let outer = u16::from_be_bytes([there[0], there[1]]);
        let mut datagram = udp((53, outer), &payload);
        fill(&FAR, &UPLINK, 17, &mut datagram, Fill::Whole);
        let back = parts([UPLINK_MAC, ROUTER_MAC], FAR, UPLINK, 99 + u16::try_from(index).unwrap(), &datagram);
        nothing(&world.uplink(&back[2], PLAIN));
        let mut here = Vec::new();
        for part in &back {
            let sent = world.uplink(part, PLAIN);
            here.extend(&to_guest(&sent, &world, index)[34..]);
        }
        assert!(is_right(&FAR, &own, 17, &here) && here[8..] == payload);
    }
    // A guest that begins many packets displaces its own, not the other's.
    let (mac, own) = (world.guests[0].mac, world.guests[0].address);
    let first_of = |world: &mut World, id: u16| {
        let parts = parts([GATEWAY_MAC, mac], own, FAR, id, &udp((5_000, 53), &payload));
        to_uplink(&world.guest(0, &parts[0], PLAIN));
        parts
    };
    let displaced = first_of(&mut world, 1);
    let kept: Vec<_> = (2..18).map(|id| first_of(&mut world, id)).collect();
    nothing(&world.guest(0, &displaced[1], PLAIN));
    kept.iter().for_each(|parts| drop(to_uplink(&world.guest(0, &parts[1], PLAIN)).to_vec()));
    let (mac, own) = (world.guests[1].mac, world.guests[1].address);
    let others = parts([GATEWAY_MAC, mac], own, FAR, 4_321, &udp((5_000, 53), &payload));
    to_uplink(&world.guest(1, &others[1], PLAIN));
    // For thirty seconds.
    world.now += 31 * SECOND;
    nothing(&world.guest(1, &others[1], PLAIN));
}

#[test]
fn parts_from_outside_follow_the_last_first_part_of_their_number() {
    let mut world = World::connected(2);
    let outer = [0, 1].map(|index| {
        let frame = world.guest_frame(index, 17, FAR, &udp((5_000, 53), b""));
        ports(to_uplink(&world.guest(index, &frame, PLAIN))).0
    });
    let payload = [7; 1_500];
    // The peer, or somebody in its name, uses a number twice within thirty seconds.
    let answer = |index: usize| parts([UPLINK_MAC, ROUTER_MAC], FAR, UPLINK, 99, &udp((53, outer[index]), &payload));
    for index in [0, 1] {
        for part in &answer(index) {
            to_guest(&world.uplink(part, PLAIN), &world, index);
        }
    }
}

#[test]
fn guests_with_many_packets_in_parts_displace_none_of_another() {
    let mut world = World::connected(5);
    let part = |world: &mut World, index: usize, id: u16, number: usize| {
        let guest = &world.guests[index];
        let parts = parts([GATEWAY_MAC, guest.mac], guest.address, FAR, id, &udp((5_000, 53), &[0; 1_500]));
        world.guest(index, &parts[number], PLAIN)
    };
    let flood = |world: &mut World, from: u16| {
        (from..from + 20).for_each(|id| (1..5).for_each(|index| drop(part(world, index, id, 0).to_uplink)));
    };
    flood(&mut world, 0);
    to_uplink(&part(&mut world, 0, 1, 0));
    flood(&mut world, 100);
    to_uplink(&part(&mut world, 0, 1, 1));
}

#[test]
fn many_guests_with_many_flows_leave_ports_to_others() {
    let mut world = World::connected(40);
    let begin = |world: &mut World, index: usize, port: u16| {
        let frame = world.guest_frame(index, 17, FAR, &udp((port, 53), b""));
        world.guest(index, &frame, PLAIN).to_uplink.len()
    };
    for port in 1_000..2_024 {
        (1..40).for_each(|index| assert!(begin(&mut world, index, port) <= 1));
    }
    let flows = |world: &World, index: usize| world.gateway.flows(world.guests[index].port).unwrap();
    let begun: usize = (0..300).map(|port| begin(&mut world, 0, 1_000 + port)).sum();
    assert_eq!((begun, flows(&world, 0)), (300, 301));
    // With fewer guests, a guest has more.
    (2..40).for_each(|index| assert!(world.gateway.detach(world.guests[index].port)));
    (0..1_100).for_each(|port| assert_eq!(begin(&mut world, 0, 3_000 + port), 1));
    assert_eq!(flows(&world, 0), 1_024);
}

#[test]
fn a_guest_has_a_thousand_flows_and_displaces_its_own_oldest() {
    let mut world = World::connected(2);
    let other = world.guest_frame(1, 17, FAR, &udp((1, 1), b""));
    let others_port = ports(to_uplink(&world.guest(1, &other, PLAIN))).0;
    let mut outer = Vec::new();
    for i in 0..3_000_u16 {
        let frame = world.guest_frame(0, 17, FAR, &udp((1_000 + i, 53), b""));
        outer.push(ports(to_uplink(&world.guest(0, &frame, PLAIN))).0);
        assert!(world.gateway.flows(world.guests[0].port).unwrap() <= 1_024);
    }
    let alive =
        |world: &mut World, port| !world.uplink(&from_far(17, FAR, &udp((53, port), b"")), PLAIN).to_guests.is_empty();
    let living: Vec<bool> = outer.iter().map(|&port| alive(&mut world, port)).collect();
    // Ports are used again, so an old flow's port may lead to a newer flow.
    assert!(living[3_000 - 1_024..].iter().all(|&alive| alive));
    assert!(living.iter().filter(|&&alive| alive).count() < 1_024 + 200);
    assert!(!world.uplink(&from_far(17, FAR, &udp((1, others_port), b"")), PLAIN).to_guests.is_empty());
    // A guest that leaves takes its flows along.
    world.gateway.detach(world.guests[0].port);
    assert!(outer.iter().all(|&port| !alive(&mut world, port)));
}

#[test]
fn idle_flows_end() {
    let mut world = World::connected(1);
    let port = world.guests[0].port;
    let back = |world: &mut World, segment: &[u8], protocol| {
        !world.uplink(&from_far(protocol, FAR, segment), PLAIN).to_guests.is_empty()
    };
    // A question stays for a minute, an answered one for three.
    let asking = world.guest_frame(0, 17, FAR, &udp((1_000, 53), b""));
    let outer = ports(to_uplink(&world.guest(0, &asking, PLAIN))).0;
    world.now += 59 * SECOND;
    assert!(back(&mut world, &udp((53, outer), b""), 17));
    world.now += 179 * SECOND;
    assert!(back(&mut world, &udp((53, outer), b""), 17));
    world.now += 181 * SECOND;
    assert!(!back(&mut world, &udp((53, outer), b""), 17));
    // By now the router has to be asked for again.
    world.guest(0, &asking, PLAIN);
    world.uplink(&arp(2, ROUTER_MAC, ROUTER, UPLINK), PLAIN);
    // An open connection stays for two hours; one that both have closed, for a minute.
    let outer = ports(to_uplink(&world.guest(0, &world.guest_frame(0, 6, FAR, &syn((1_000, 80))), PLAIN))).0;
    assert!(back(&mut world, &tcp((80, outer), 1, 0x12, &[], b""), 6));
    world.now += 7_400 * SECOND;
    assert!(back(&mut world, &tcp((80, outer), 1, 0x11, &[], b""), 6));
    world.guest(0, &world.guest_frame(0, 6, FAR, &tcp((1_000, 80), 2, 0x11, &[], b"")), PLAIN);
    world.now += 59 * SECOND;
    assert!(back(&mut world, &tcp((80, outer), 1, 0x10, &[], b""), 6));
    world.now += 61 * SECOND;
    assert!(!back(&mut world, &tcp((80, outer), 1, 0x10, &[], b""), 6));
    // In the middle of a connection that is not known, nothing passes.
    nothing(&world.guest(0, &world.guest_frame(0, 6, FAR, &tcp((1_001, 80), 2, 0x10, &[], b"x")), PLAIN));
    // The ended ones are swept away.
    for _ in 0..20 {
        world.turn();
        world.now += SECOND;
    }
    assert_eq!(world.gateway.flows(port), Some(0));
}

/// A gateway is called when something is due and at no other time: to renew its lease, to ask for a neighbour, to end flows.
#[test]
fn a_gateway_is_called_only_when_something_is_due() {
    let mut world = World::connected(3);
    // How often it is called in so many seconds.
    let calls = |world: &mut World, seconds: u64| {
        let until = world.now + seconds * SECOND;
        let mut called = 0;
        while let (_, Some(next)) = world.turn()
            && next <= until
        {
            assert!(next > world.now, "it is called at once, and without end");
            world.now = next;
            called += 1;
        }
        world.now = until;
        called
    };
    // What the connection has left behind.
    calls(&mut world, 600);
    assert_eq!(world.guests.iter().filter_map(|guest| world.gateway.flows(guest.port)).sum::<usize>(), 0);
    assert_eq!(calls(&mut world, 600), 0, "nothing happens, and no flow is there");
    // Flows end when they have been idle for a minute, all of them, though nobody sends anything.
    let port = |world: &World, guest: usize| world.guests[guest].port;
    for guest in [0, 2] {
        for n in 0..600 {
            world.guest(guest, &world.guest_frame(guest, 17, FAR, &udp((1_000 + n, 53), b"")), PLAIN);
        }
    }
    calls(&mut world, 59);
    assert_eq!(world.gateway.flows(port(&world, 0)), Some(600));
    assert!(calls(&mut world, 12) <= 7, "three steps for each guest");
    assert_eq!([0, 2].map(|guest| world.gateway.flows(port(&world, guest))), [Some(0); 2]);
    // One that goes on keeps the gateway busy once a minute, and ends a minute after its end.
    for _ in 0..30 {
        world.guest(1, &world.guest_frame(1, 17, FAR, &udp((1_000, 53), b"")), PLAIN);
        world.uplink(&arp(2, ROUTER_MAC, ROUTER, UPLINK), PLAIN);
        assert!(calls(&mut world, 10) <= 1);
        assert_eq!(world.gateway.flows(port(&world, 1)), Some(1));
    }
    assert!(calls(&mut world, 61) <= 2);
    assert_eq!(world.gateway.flows(port(&world, 1)), Some(0));
}

/// A guest that goes while flows are looked for leaves no flow of another one behind.
#[test]
fn a_guest_that_goes_does_not_keep_flows_of_others() {
    let mut world = World::connected(3);
    world.turn();
    for guest in 0..3 {
        for n in 0..600 {
            world.guest(guest, &world.guest_frame(guest, 17, FAR, &udp((1_000 + n, 53), b"")), PLAIN);
        }
    }
    world.now += 61 * SECOND;
    for _ in 0..4 {
        world.turn();
        world.now += SECOND;
    }
    let last = world.guests[2].port;
    assert_eq!(world.gateway.flows(last), Some(600), "the search has come to the second guest");
    assert!(world.gateway.detach(world.guests[0].port));
    let until = world.now + 20 * SECOND;
    while let Some(next) = world.turn().1.filter(|next| *next < until) {
        world.now = next;
    }
    assert_eq!(world.gateway.flows(last), Some(0));
}

/// Returns an ICMP error about a packet: it is longer than 1,280 bytes.
fn about(quoted: &[u8]) -> Vec<u8> {
    let mut message = [&[3, 4, 0, 0, 0, 0, 5, 0][..], quoted].concat();
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

#[test]
fn errors_about_flows_reach_the_guest() {
    let mut world = World::connected(2);
    let (mac, own) = (world.guests[1].mac, world.guests[1].address);
    for (protocol, segment) in [(6, syn((999, 80))), (17, udp((999, 80), b"")), (1, echo(8, 999, b""))] {
        let sent = world.guest(1, &world.guest_frame(1, protocol, FAR, &segment), PLAIN);
        let there = to_uplink(&sent).to_vec();
        let sent = world.uplink(&from_far(1, [203, 0, 113, 9], &about(&there[14..42])), PLAIN);
        let here = to_guest(&sent, &world, 1);
        check(here, [mac, GATEWAY_MAC], [203, 0, 113, 9], own);
        assert_eq!(here[34..36], [3, 4]);
        assert_eq!(here[38..42], [0, 0, 5, 0], "the longest packet stays");
        let quoted = &here[42..];
        assert_eq!((checksum(&[&quoted[..20]]), &quoted[12..16], &quoted[16..20]), (0, &own[..], &FAR[..]));
        let at = if protocol == 1 { 24 } else { 20 };
        assert_eq!(quoted[at..at + 2], 999_u16.to_be_bytes());

        // About no flow; with a wrong checksum; about another's packet.
        let mut other = there[14..42].to_vec();
        other[19] ^= 1;
        nothing(&world.uplink(&from_far(1, FAR, &about(&other)), PLAIN));
        let mut wrong = about(&there[14..42]);
        wrong[2] ^= 1;
        nothing(&world.uplink(&from_far(1, FAR, &wrong), PLAIN));
        let mut other = there[14..42].to_vec();
        other[15] ^= 1;
        nothing(&world.uplink(&from_far(1, FAR, &about(&other)), PLAIN));
    }
    // Time exceeded is the gateway's own to say.
    let mut last = world.guest_frame(1, 17, FAR, &udp((1, 33_434), b""));
    last[22] = 1;
    let sent = world.guest(1, &last, PLAIN);
    let told = to_guest(&sent, &world, 1);
    assert_eq!((&told[26..30], &told[34..36], checksum(&[&told[34..]])), (&GATEWAY[..], &[11, 0][..], 0));
}

#[test]
fn errors_of_guests_reach_the_peer() {
    let mut world = World::connected(2);
    world.gateway.forward(Transported::Udp, 5_353, world.guests[1].port, 53).unwrap();
    let outer = ports(to_uplink(&world.guest(1, &world.guest_frame(1, 17, FAR, &udp((999, 80), b"")), PLAIN))).0;
    // A forward is for every port of the peer's, a flow for one.
    for (outer, inner, bytes) in [(outer, 999, &[12, 16, 21, 23][..]), (5_353, 53, &[12, 16, 23])] {
        let packet = from_far(17, FAR, &udp((80, outer), b"to a closed port"));
        let sent = world.uplink(&packet, PLAIN);
        let received = to_guest(&sent, &world, 1).to_vec();
        assert_eq!(ports(&received).1, inner);
        let sent = world.guest(1, &world.guest_frame(1, 1, FAR, &about(&received[14..])), PLAIN);
        let there = to_uplink(&sent);
        check(there, [ROUTER_MAC, UPLINK_MAC], UPLINK, FAR);
        assert_eq!(there[34..36], [3, 4]);
        // What is quoted is what the peer had sent, apart from the hop.
        let mut expected = packet[14..].to_vec();
        expected[8] -= 1;
        let quoted = &there[42..];
        assert_eq!(
            (checksum(&[&quoted[..20]]), &quoted[..10], &quoted[12..24]),
            (0, &expected[..10], &expected[12..24])
        );
        // To another station; about another's packet; about no flow; by another guest.
        nothing(&world.guest(1, &world.guest_frame(1, 1, [198, 51, 100, 8], &about(&received[14..])), PLAIN));
        for at in bytes {
            let mut other = received[14..].to_vec();
            other[*at] ^= 1;
            nothing(&world.guest(1, &world.guest_frame(1, 1, FAR, &about(&other)), PLAIN));
        }
        nothing(&world.guest(0, &world.guest_frame(0, 1, FAR, &about(&received[14..])), PLAIN));
    }
}

#[test]
fn what_is_not_routed_is_dropped_with_its_reason() {
    let mut world = World::connected(2);
    let own = world.guests[0].address;
    let mut expect = |frame: Vec<u8>, info, reason: Reason| {
        let before = world.gateway.counters().dropped(reason);
        let sent = world.guest(0, &frame, info);
        assert!(sent.to_uplink.is_empty(), "{reason}");
        assert_eq!(world.gateway.counters().dropped(reason), before + 1, "{reason}: {frame:02x?}");
    };
    let mac = Mac::of_guest("guest0", 0).0;
    let packet = |from, to, protocol, options: &[u8], payload: &[u8]| {
        ethernet(GATEWAY_MAC, mac, 0x800, &ipv4(from, to, protocol, 1, 0, options, payload))
    };
    let datagram = udp((1, 2), b"");
    expect(packet([10, 77, 0, 200], FAR, 17, &[], &datagram), PLAIN, Reason::Source);
    for to in [
        [10, 77, 0, 3],
        [10, 77, 0, 255],
        [169, 254, 169, 254],
        [224, 0, 0, 1],
        [127, 0, 0, 1],
        [0, 0, 0, 1],
        [255; 4],
        UPLINK,
        [192, 0, 2, 255],
    ] {
        expect(packet(own, to, 17, &[], &datagram), PLAIN, Reason::Destination);
    }
    expect(packet(own, FAR, 47, &[], &[0; 20]), PLAIN, Reason::Protocol);
    expect(packet(own, FAR, 1, &[], &echo(13, 1, b"")), PLAIN, Reason::Protocol);
    expect(packet(own, FAR, 17, &[1; 4], &datagram), PLAIN, Reason::Options);
    expect(packet(own, FAR, 1, &[], &echo(8, 1, b"")), BLANK, Reason::Checksum);
    expect(ethernet(GATEWAY_MAC, mac, 0x86dd, &[0x60; 60]), PLAIN, Reason::Malformed);
    expect(ethernet([0x33, 0x33, 0, 0, 0, 1], mac, 0x88cc, &[0; 40]), PLAIN, Reason::NotForUs);
    let mut tagged = packet(own, FAR, 17, &[], &datagram);
    tagged.splice(12..12, [0x81, 0, 0, 5]);
    expect(tagged, PLAIN, Reason::NotForUs);
    let mut unconnected = World::new(1, settings());
    nothing(&unconnected.guest(0, &packet(unconnected.guests[0].address, FAR, 17, &[], &datagram), PLAIN));
    assert_eq!(unconnected.gateway.counters().dropped(Reason::NoUplink), 1);
    assert_eq!(unconnected.gateway.counters().total(), 1);
}

#[test]
fn a_frame_waits_for_its_neighbour() {
    let given = Address {
        address: UPLINK.into(),
        network: Some("192.0.2.0/24".parse().unwrap()),
        router: Some(ROUTER.into()),
        dns: [None; 4],
    };
    let mut settings = settings();
    settings.addressing = Addressing::Static(given);
    let mut world = World::new(1, settings);
    assert_eq!(world.gateway.uplink_address(), Some(given));
    let near = [192, 0, 2, 40];
    let frame = world.guest_frame(0, 17, near, &udp((1, 2), b"near"));
    let sent = world.guest(0, &frame, PLAIN);
    assert_eq!(to_uplink(&sent)[38..42], near);
    // A second frame has no room; a second question is not due.
    nothing(&world.guest(0, &frame, PLAIN));
    assert_eq!(world.gateway.counters().dropped(Reason::Neighbour), 1);
    // Another station's answer is not the neighbour's.
    nothing(&world.uplink(&arp(2, [2, 0, 0, 0, 0, 8], [192, 0, 2, 41], UPLINK), PLAIN));
    let sent = world.uplink(&arp(2, [2, 0, 0, 0, 0, 9], near, UPLINK), PLAIN);
    check(to_uplink(&sent), [[2, 0, 0, 0, 0, 9], UPLINK_MAC], UPLINK, near);
    to_uplink(&world.guest(0, &frame, PLAIN));
    // After a while the neighbour is asked again, and its old answer serves meanwhile.
    world.now += 100 * SECOND;
    assert_eq!(world.guest(0, &frame, PLAIN).to_uplink.len(), 2);
    assert_eq!(world.guest(0, &frame, PLAIN).to_uplink.len(), 1);

    // Who does not answer is asked three times, and the frame is dropped.
    let silent = world.guest_frame(0, 17, [192, 0, 2, 50], &udp((1, 2), b"silent"));
    let mut asked = world.guest(0, &silent, PLAIN).to_uplink.len();
    let before = world.gateway.counters().dropped(Reason::Neighbour);
    for _ in 0..10 {
        world.now += SECOND;
        asked += world.turn().0.to_uplink.len();
    }
    assert_eq!((asked, world.gateway.counters().dropped(Reason::Neighbour)), (3, before + 1));

    // A guest that looks for everybody displaces no router, and asks ten times a second at most.
    let far = world.guest_frame(0, 17, FAR, &udp((1, 2), b"far"));
    world.guest(0, &far, PLAIN);
    world.uplink(&arp(2, ROUTER_MAC, ROUTER, UPLINK), PLAIN);
    let mut asked = 0;
    for i in 60..250 {
        asked += world.guest(0, &world.guest_frame(0, 17, [192, 0, 2, i], &udp((1, 2), b"")), PLAIN).to_uplink.len();
    }
    assert!(asked <= 10, "{asked}");
    for _ in 0..100 {
        world.now += SECOND;
        for i in 60..120 {
            world.guest(0, &world.guest_frame(0, 17, [192, 0, 2, i], &udp((1, 2), b"")), PLAIN);
        }
    }
    // Nor does such a guest keep the router from being asked again.
    let sent = world.guest(0, &far, PLAIN);
    assert_eq!((sent.to_uplink.len(), &sent.to_uplink[0].0[38..42]), (2, &ROUTER[..]));
    assert_eq!(sent.to_uplink[1].0[..6], ROUTER_MAC);
}

#[test]
fn a_guest_that_looks_for_everybody_leaves_questions_to_others() {
    let mut world = World::connected(2);
    let look = |world: &mut World, index: usize, number: u8| {
        let frame = world.guest_frame(index, 17, [192, 0, 2, number], &udp((1, 2), b""));
        world.guest(index, &frame, PLAIN)
    };
    for second in 0..5 {
        (50..250).for_each(|number| drop(look(&mut world, 0, number)));
        let asked = look(&mut world, 1, 30 + second);
        assert_eq!(to_uplink(&asked)[38..42], [192, 0, 2, 30 + second]);
        (50..250).for_each(|number| drop(look(&mut world, 0, number)));
        let answer = arp(2, [2, 0, 0, 0, 0, 9], [192, 0, 2, 30 + second], UPLINK);
        to_uplink(&world.uplink(&answer, PLAIN));
        world.now += SECOND;
    }
}

#[test]
fn a_new_uplink_address_ends_the_flows_of_the_old() {
    let mut world = World::connected(1);
    let frame = world.guest_frame(0, 17, FAR, &udp((1, 2), b""));
    let outer = ports(to_uplink(&world.guest(0, &frame, PLAIN))).0;
    world.now += 1_800 * SECOND;
    let (sent, _) = world.turn();
    world.serve(&sent.to_uplink[0].0, 6, [0; 4], 0);
    assert_eq!(world.gateway.uplink_address(), None);
    assert_eq!(world.gateway.flows(world.guests[0].port), Some(0));
    world.now += 2 * SECOND;
    world.connect(3_600);
    nothing(&world.uplink(&from_far(17, FAR, &udp((2, outer), b"")), PLAIN));
}

#[test]
fn a_responder_hands_out_addresses_and_nothing_else() {
    let mut responder = Responder::new(ResponderSettings {
        mac: Mac(GATEWAY_MAC),
        address: [10, 9, 0, 2].into(),
        network: "10.9.0.0/16".parse().unwrap(),
        router: None,
        dns: [Some(DNS.into()), None, None, None],
        lease_seconds: 600,
        mtu: 9_000,
        domain: String::new(),
    });
    let mac = [0, 0x16, 0x3e, 1, 1, 1];
    let own = responder.guests().attach(PortId(3), Mac(mac), None, "db").unwrap().octets();
    let mut send = |port, mut frame: Vec<u8>| {
        let mut sent = Sent::default();
        responder.receive_guest(PortId(port), &mut frame, PLAIN, SECOND, &mut sent);
        assert!(sent.to_uplink.is_empty());
        sent.to_guests
    };
    let sent = send(3, question(mac, 1, [0; 4], &[]));
    let offer = take_apart(&sent[0].1).unwrap();
    assert_eq!((sent[0].0, offer.yours), (PortId(3), own));
    assert_eq!((offer.options.contains_key(&3), &offer.options[&26][..]), (false, &9_000_u16.to_be_bytes()[..]));
    assert!(send(4, question(mac, 1, [0; 4], &[])).is_empty());
    assert!(send(3, arp(1, mac, own, [10, 9, 0, 2])).is_empty());
    assert_eq!(responder.counters().dropped(Reason::Unattached), 1);
    assert!(responder.detach(PortId(3)));
}

#[test]
fn no_dhcp_frame_makes_the_gateway_panic_or_answer_another() {
    let mut random = Random::new();
    let mut world = World::connected(4);
    let seeds: Vec<Vec<u8>> = (0..4)
        .flat_map(|i| {
            let (mac, own) = (world.guests[i].mac, world.guests[i].address);
            [
                question(mac, 1, [0; 4], &[(61, &[1, 2, 3]), (55, &[1, 3, 6]), (57, &[5, 0xdc])]),
                question(mac, 3, [0; 4], &[(50, &own), (54, &GATEWAY), (12, b"name")]),
                question(mac, 8, own, &[]),
            ]
        })
        .collect();
    let (mut offers, mut naks) = (0_u32, 0_u32);
    for _ in 0..2_000_000 {
        let seed = random.below(seeds.len());
        // Mostly by the vif whose address is in the frame, and mutated mostly among the options.
        let index = if random.below(10) == 0 { random.below(4) } else { seed / 3 };
        let mut frame = seeds[seed].clone();
        if random.below(3) == 0 {
            mutate(&mut random, &mut frame);
        } else {
            let at = 42 + 236 + random.below(frame.len() - 42 - 236);
            frame[at] = random.byte();
        }
        world.now += 7 * SECOND / 100;
        let sent = world.guest(index, &frame, PLAIN);
        for (port, frame, _) in &sent.to_guests {
            assert_eq!(*port, world.guests[index].port);
            let Some(answer) = take_apart(frame) else { continue };
            assert_eq!(answer.mac, world.guests[index].mac);
            let kind = answer.options[&53][0];
            assert!(answer.yours == world.guests[index].address || answer.yours == [0; 4]);
            offers += u32::from(kind == 2);
            naks += u32::from(kind == 6);
        }
        // What DHCP did not take may be a packet like any other: it passes as the guest's own, or not at all.
        assert!(sent.to_uplink.iter().all(|(frame, _)| frame[12..14] == [8, 6] || frame[26..30] == UPLINK));
    }
    println!("{offers} offers, {naks} refusals");
    assert!(offers > 100_000 && naks > 1_000);
}

#[test]
fn no_frame_makes_the_translator_panic_or_pass_what_is_not_its_own() {
    let mut random = Random::new();
    let mut world = World::connected(3);
    world.gateway.forward(Transported::Tcp, 2_222, world.guests[2].port, 22).unwrap();
    let outer = ports(to_uplink(&world.guest(0, &world.guest_frame(0, 17, FAR, &udp((1_000, 53), b"")), PLAIN))).0;
    let quoted =
        world.guest(0, &world.guest_frame(0, 6, FAR, &syn((1_000, 80))), PLAIN).to_uplink[0].0[14..42].to_vec();
    let error = about(&quoted);
    let inside: Vec<Vec<u8>> = (0..3)
        .flat_map(|i| {
            let (mac, own) = (world.guests[i].mac, world.guests[i].address);
            [
                world.guest_frame(i, 6, FAR, &syn((1_000, 80))),
                world.guest_frame(i, 6, FAR, &tcp((1_000, 80), 9, 0x19, &[1; 12], &[7; 200])),
                world.guest_frame(i, 17, FAR, &udp((1_000, 53), &[1; 40])),
                world.guest_frame(i, 1, FAR, &echo(8, 3, &[1; 40])),
                world.guest_frame(i, 1, GATEWAY, &echo(8, 3, &[1; 40])),
                ethernet(GATEWAY_MAC, mac, 0x800, &ipv4(own, FAR, 17, 5, 0x2000, &[], &udp((1, 2), &[0; 48]))),
                ethernet(GATEWAY_MAC, mac, 0x800, &ipv4(own, FAR, 17, 5, 0x0007, &[], &[0; 48])),
                arp(1, mac, own, GATEWAY),
                world.guest_frame(i, 1, FAR, &about(&ipv4(FAR, own, 17, 3, 0, &[], &udp((53, 1_000), b"")))),
            ]
        })
        .collect();
    let outside = [
        from_far(17, FAR, &udp((53, outer), &[2; 60])),
        from_far(6, FAR, &tcp((80, outer), 9, 0x12, &[], &[7; 60])),
        from_far(6, FAR, &syn((9, 2_222))),
        from_far(1, FAR, &error),
        from_far(1, FAR, &echo(0, outer, &[3; 30])),
        from_far(1, FAR, &echo(8, 1, &[3; 30])),
        ethernet(UPLINK_MAC, ROUTER_MAC, 0x800, &ipv4(FAR, UPLINK, 17, 5, 0x2000, &[], &udp((53, outer), &[0; 48]))),
        ethernet(UPLINK_MAC, ROUTER_MAC, 0x800, &ipv4(FAR, UPLINK, 17, 5, 0x0007, &[], &[0; 48])),
        arp(2, ROUTER_MAC, ROUTER, UPLINK),
    ];
    let (mut out, mut back) = (0_u32, 0_u32);
    for round in 0..1_000_000_u32 {
        let info = FrameInfo {
            checksum: [Checksum::Unverified, Checksum::Verified, Checksum::Blank][random.below(3)],
            segmentation: (random.below(8) == 0).then_some(Segmentation {
                protocol: if random.below(2) == 0 { Protocol::Tcp4 } else { Protocol::Tcp6 },
                bytes: random.below(2_000),
            }),
        };
        world.now += SECOND / 1_000;
        if random.below(2) == 0 {
            let seed = random.below(inside.len());
            let index = if random.below(10) == 0 { random.below(3) } else { seed / 9 };
            let mut frame = inside[seed].clone();
            mutate(&mut random, &mut frame);
            let sent = world.guest(index, &frame, info);
            assert!(sent.to_guests.iter().all(|(port, ..)| *port == world.guests[index].port));
            for (frame, _) in sent.to_uplink {
                assert_eq!(frame[6..12], UPLINK_MAC);
                assert!(frame[12..14] == [8, 6] || frame[26..30] == UPLINK);
                out += 1;
            }
        } else {
            let mut frame = outside[random.below(outside.len())].clone();
            mutate(&mut random, &mut frame);
            let sent = world.uplink(&frame, info);
            for (port, frame, _) in sent.to_guests {
                let guest = world.guests.iter().find(|guest| guest.port == port).unwrap();
                assert_eq!((&frame[..6], &frame[30..34]), (&guest.mac[..], &guest.address[..]));
                back += 1;
            }
        }
        if round % 1_000 == 0 {
            world.turn();
            assert!(world.guests.iter().all(|guest| world.gateway.flows(guest.port).unwrap() <= 1_024));
        }
    }
    println!("{out} to the uplink, {back} to guests");
    assert!(out > 50_000 && back > 20_000);
}

#[test]
fn an_address_that_is_kept_is_chosen_for_nobody() {
    let mut gateway = Gateway::new(settings()).unwrap();
    let mac = Mac::of_guest("guest", 0);
    let first = gateway.guests().attach(PortId(1), mac, None, "guest").unwrap();
    assert!(gateway.detach(PortId(1)));
    gateway.guests().keep(first).unwrap();
    assert_ne!(gateway.guests().attach(PortId(1), mac, None, "guest"), Ok(first));
    let other = Mac::of_guest("other", 0);
    assert_eq!(gateway.guests().attach(PortId(2), other, Some(first), "other"), Ok(first));
    assert!(gateway.detach(PortId(1)) && gateway.detach(PortId(2)));
    gateway.guests().release(first);
    gateway.guests().release(first);
    assert_eq!(gateway.guests().attach(PortId(1), mac, None, "guest"), Ok(first));
}
