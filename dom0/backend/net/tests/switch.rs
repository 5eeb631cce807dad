//! What a switch lets through, whom it makes wait, and what it counts.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "guests have small numbers")]
mod common;

use common::far::{Device, Ear, STATION};
use common::front::{Arrived, How};
use common::{ALL, Front, Machine, frames, mac, turns};
use net_backend::{BACK_BUFFERS, Broken, Connection, Counters, Drop, Event, Limits, Mode, PATIENCE_NS, Ports};
use net_backend::{ConnectError, Switch, Takes, Turn, VifId};
use network::{Checksum, FrameInfo, Mac, Offloads, Protocol, Reset, Segmentation};
use ring_protocol::SharedPage;
use ring_protocol::net::{Gso, GsoProtocol, TxRequest, tx_flag};
use std::net::Ipv4Addr;
use test_random::Random;

const SECOND: u64 = 1_000_000_000;

struct World {
    machine: Machine,
    switch: Switch<Machine>,
    fronts: Vec<Front>,
    ids: Vec<VifId>,
    now: u64,
}

impl World {
    /// Guests that take these things. All have all buffers posted.
    fn of(takes: &[Takes], limits: Limits) -> Self {
        Self::wide(takes, limits, 1500)
    }

    /// As above, on a switch with this MTU.
    fn wide(takes: &[Takes], limits: Limits, mtu: u16) -> Self {
        let machine = Machine::new(Random::seeded(1), takes.len());
        let mut switch = machine.switch(mtu);
        let mut fronts: Vec<Front> = (0..takes.len()).map(|n| Front::new(n as u16)).collect();
        let ids = fronts.iter().zip(takes).map(|(front, takes)| machine.connect(&mut switch, front, *takes, limits));
        let ids = ids.collect();
        fronts.iter_mut().for_each(|front| assert_eq!(front.post(256), 256));
        Self { machine, switch, fronts, ids, now: SECOND }
    }

    fn new(count: usize) -> Self {
        Self::of(&vec![ALL; count], Limits::default())
    }

    fn turns(&mut self) -> Turn {
        turns(&mut self.switch, &mut self.machine, self.now)
    }

    fn run(&mut self) -> Turn {
        self.ids.iter().for_each(|id| self.switch.attend(*id));
        let turn = self.turns();
        self.fronts.iter_mut().for_each(|front| assert!(front.collect_sent() <= 256));
        turn
    }

    fn send(&mut self, from: usize, frame: &[u8]) {
        assert!(self.send_if_room(from, frame));
    }

    fn send_if_room(&mut self, from: usize, frame: &[u8]) -> bool {
        self.fronts[from].send_small(&self.machine, frame)
    }

    fn arrived(&mut self, at: usize) -> Vec<Arrived> {
        self.fronts[at].collect(&self.machine)
    }

    fn bytes_at(&mut self, at: usize) -> Vec<Vec<u8>> {
        self.arrived(at).into_iter().map(|packet| packet.bytes).collect()
    }

    fn counters(&self, at: usize) -> Counters {
        self.switch.vif(self.ids[at]).unwrap().counters()
    }

    fn drops(&self, at: usize, reason: Drop) -> u64 {
        self.counters(at).drops.of(reason)
    }
}

fn between(to: usize, from: usize) -> Vec<u8> {
    frames::plain(mac(to as u16), mac(from as u16), &[from as u8; 60])
}

#[test]
fn a_frame_reaches_its_receiver_alone() {
    let mut world = World::new(3);
    world.send(0, &between(1, 0));
    assert_eq!(world.run(), Turn { again: false, again_ns: None });
    assert_eq!(world.bytes_at(1), [between(1, 0)]);
    assert!(world.arrived(2).is_empty() && world.arrived(0).is_empty());
    let (sender, receiver) = (world.counters(0), world.counters(1));
    assert_eq!((sender.sent_packets, sender.sent_bytes), (1, 74));
    assert_eq!((receiver.received_packets, receiver.received_bytes), (1, 74));
}

#[test]
fn a_broadcast_reaches_all_but_its_sender() {
    let mut world = World::new(4);
    let frame = frames::plain(Mac::BROADCAST, mac(1), &[5; 100]);
    world.send(1, &frame);
    let _ = world.run();
    assert_eq!([0, 1, 2, 3].map(|at| world.bytes_at(at).len()), [1, 0, 1, 1]);
    let reserved = frames::plain(Mac([1, 0x80, 0xc2, 0, 0, 3]), mac(1), &[5; 100]);
    world.send(1, &reserved);
    let _ = world.run();
    assert!(world.arrived(0).is_empty());
    assert_eq!(world.drops(1, Drop::Unknown), 1);
}

#[test]
fn spoofed_frames_are_counted_and_dropped() {
    let mut world = World::new(2);
    world.send(0, &frames::plain(mac(1), mac(7), &[0; 60]));
    let arp = |sender: Mac, address: [u8; 4]| {
        let body = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &sender.0, &address, &[0; 10]].concat();
        [&mac(1).0[..], &mac(0).0, &[8, 6], &body].concat()
    };
    world.send(0, &arp(mac(1), [10, 0, 0, 0]));
    world.send(0, &arp(mac(0), [10, 0, 0, 9]));
    let _ = world.run();
    assert_eq!(world.bytes_at(1), [arp(mac(0), [10, 0, 0, 9])]);
    assert_eq!(world.drops(0, Drop::Spoofed), 2);
    assert_eq!((world.fronts[0].okay, world.fronts[0].dropped), (1, 2));

    let limits = Limits { address: Some(Ipv4Addr::new(10, 0, 0, 0)), ..Limits::default() };
    let mut world = World::of(&[ALL; 2], limits);
    world.send(0, &arp(mac(0), [10, 0, 0, 9]));
    world.send(0, &arp(mac(0), [10, 0, 0, 0]));
    // The test's TCP has the source 10.0.0.0, as the last byte of the address.
    world.send(0, &frames::tcp4_blank(mac(1), mac(0), b"hello"));
    world.send(0, &frames::plain(mac(1), mac(0), &[0; 60]));
    let _ = world.run();
    assert_eq!((world.arrived(1).len(), world.drops(0, Drop::Spoofed)), (2, 2));
}

#[test]
fn floods_are_limited_and_let_others_pass() {
    let mut world = World::new(5);
    let flood = frames::plain(Mac::BROADCAST, mac(0), &[1; 60]);
    let (mut sent, mut heard) = (0, 0);
    let begin = world.now;
    while world.now < begin + SECOND {
        for _ in 0..60 {
            sent += usize::from(world.fronts[0].send_small(&world.machine, &flood));
        }
        world.send(2, &between(3, 2));
        let _ = world.run();
        for at in 1..5 {
            let arrived = world.bytes_at(at);
            heard += arrived.iter().filter(|frame| **frame == flood).count();
            assert!(at != 3 || arrived.contains(&between(3, 2)), "a frame is lost among floods");
            world.fronts[at].post(256);
        }
        world.now += 2_000_000;
    }
    assert!(sent > 20_000 && (10_000..12_000).contains(&heard), "{sent} sent, {heard} heard");
    assert_eq!(world.drops(0, Drop::Flood), (sent - heard / 4) as u64);
}

#[test]
fn a_rate_is_kept() {
    let limits = Limits { bytes_per_second: Some(1_000_000), ..Limits::default() };
    let mut world = World::of(&[ALL; 2], limits);
    let frame = frames::plain(mac(1), mac(0), &[1; 1486]);
    let (begin, mut received) = (world.now, 0);
    while world.now < begin + 5 * SECOND {
        while world.fronts[0].can_send(1) {
            world.fronts[0].send_stock(&world.machine, &frame, 1500, How::default());
        }
        let turn = world.run();
        received += world.arrived(1).iter().map(|packet| packet.bytes.len()).sum::<usize>();
        world.fronts[1].post(256);
        let next = turn.again_ns.expect("the rest of the ring waits for its rate");
        assert!(next > world.now);
        world.now = next;
    }
    assert!((5_000_000..5_300_000).contains(&received), "{received} bytes in five seconds");
    assert!(world.counters(0).rate_waits > 10);
}

#[test]
fn a_stalled_receiver_holds_its_senders_up_once() {
    let machine = Machine::new(Random::seeded(1), 3);
    let mut switch = machine.switch(1500);
    let mut fronts: Vec<Front> = (0..3).map(Front::new).collect();
    let ids = fronts.iter().map(|front| machine.connect(&mut switch, front, ALL, Limits::default())).collect();
    fronts[1].post(10);
    fronts[2].post(256);
    let mut world = World { machine, switch, fronts, ids, now: SECOND };
    for _ in 0..20 {
        world.send(0, &between(1, 0));
        world.send(0, &between(2, 0));
    }
    let turn = world.run();
    assert_eq!(turn, Turn { again: false, again_ns: Some(world.now + PATIENCE_NS) });
    assert_eq!((world.arrived(1).len(), world.arrived(2).len()), (10, 10), "the sender waits");
    assert_eq!(world.fronts[0].unanswered(), 20);
    // Events without buffers cost nobody anything.
    let calls = world.machine.0.borrow().calls;
    for _ in 0..100 {
        world.switch.attend(world.ids[1]);
        assert!(!world.turns().again);
    }
    assert_eq!(world.machine.0.borrow().calls, calls);
    // A few buffers let the sender go on at once, but the time goes on as well.
    world.now += PATIENCE_NS / 2;
    world.fronts[1].post(4);
    world.switch.attend(world.ids[1]);
    let turn = world.turns();
    assert_eq!(turn.again_ns, Some(SECOND + PATIENCE_NS));
    assert_eq!((world.arrived(1).len(), world.arrived(2).len()), (4, 4));
    // After that the receiver is stalled, and nobody waits for it.
    world.now = SECOND + PATIENCE_NS;
    assert_eq!(world.run(), Turn { again: false, again_ns: None });
    assert_eq!((world.arrived(1).len(), world.arrived(2).len()), (0, 6));
    assert_eq!((world.drops(1, Drop::Stalled), world.counters(1).stalls), (6, 1));
    assert_eq!((world.fronts[0].unanswered(), world.counters(0).full_waits), (0, 2));
    for round in 0..50 {
        world.send(0, &between(1, 0));
        world.send(0, &between(2, 0));
        assert_eq!(world.run(), Turn { again: false, again_ns: None });
        assert_eq!(world.arrived(2).len(), 1, "round {round}");
        world.fronts[2].post(256);
    }
    // Until it has posted as many as it must.
    world.fronts[1].post(BACK_BUFFERS as usize - 4 - 1);
    world.send(0, &between(1, 0));
    let _ = world.run();
    assert_eq!(world.arrived(1).len(), 0);
    world.fronts[1].post(1);
    world.send(0, &between(1, 0));
    let _ = world.run();
    assert_eq!(world.arrived(1).len(), 1);
}

#[test]
fn the_sender_that_needs_least_is_woken_first() {
    let machine = Machine::new(Random::seeded(1), 3);
    let mut switch = machine.switch(1500);
    let mut fronts: Vec<Front> = (0..3).map(Front::new).collect();
    let ids = fronts.iter().map(|front| machine.connect(&mut switch, front, ALL, Limits::default())).collect();
    fronts[2].post(1);
    let mut world = World { machine, switch, fronts, ids, now: SECOND };
    let long = frames::tcp4_blank(mac(2), mac(1), &[8; 30_000]);
    world.send(0, &between(2, 0));
    let _ = world.run();
    world.send(0, &between(2, 0));
    let _ = world.run();
    assert!(world.fronts[1].send_stock(&world.machine, &long, 66, blank_segments(1448)));
    let _ = world.run();
    assert_eq!((world.arrived(2).len(), world.fronts[0].unanswered()), (1, 1));
    world.fronts[2].post(2);
    world.switch.attend(world.ids[2]);
    let _ = world.turns();
    assert_eq!(world.bytes_at(2), [between(2, 0)]);
    world.fronts[2].post(20);
    world.switch.attend(world.ids[2]);
    let _ = world.turns();
    assert_eq!(world.arrived(2)[0].bytes.len(), 30_054);
    let answered: Vec<_> = world.fronts.iter_mut().map(Front::collect_sent).collect();
    assert_eq!(answered, [1, 10, 0]);
}

#[test]
fn broadcasts_wait_for_nobody() {
    let machine = Machine::new(Random::seeded(1), 3);
    let mut switch = machine.switch(1500);
    let mut fronts: Vec<Front> = (0..3).map(Front::new).collect();
    let ids = fronts.iter().map(|front| machine.connect(&mut switch, front, ALL, Limits::default())).collect();
    fronts[2].post(256);
    let mut world = World { machine, switch, fronts, ids, now: SECOND };
    world.send(0, &frames::plain(Mac::BROADCAST, mac(0), &[1; 60]));
    assert_eq!(world.run(), Turn { again: false, again_ns: None });
    assert_eq!((world.arrived(2).len(), world.drops(1, Drop::NoRoom)), (1, 1));
}

#[test]
fn a_sender_that_cannot_be_read_costs_its_receiver_nothing() {
    let mut world = World::new(2);
    let good = frames::plain(mac(1), mac(0), &[3; 1000]);
    assert!(world.fronts[0].send_stock(&world.machine, &good, 1014, How::default()));
    // The first slot can be read, the second is no grant.
    world.machine.write(0, 300, 0, &good[..300]);
    let bad = TxRequest { reference: 300, offset: 0, flags: tx_flag::MORE_DATA, id: 0, size: 1014 };
    assert!(world.fronts[0].put(bad, false));
    assert!(world.fronts[0].put(TxRequest { reference: 9999, offset: 0, flags: 0, id: 0, size: 714 }, false));
    assert!(world.fronts[0].send_stock(&world.machine, &good, 500, How::default()));
    let _ = world.run();
    assert_eq!(world.bytes_at(1), [good.clone(), good]);
    assert_eq!((world.fronts[1].rx_errors, world.fronts[1].used), (0, 3));
    assert_eq!((world.fronts[0].okay, world.fronts[0].errors, world.drops(0, Drop::BadGrant)), (3, 2, 1));
}

#[test]
fn a_receiver_that_cannot_be_written_loses_the_packet_alone() {
    let mut world = World::new(2);
    let frame = frames::plain(mac(1), mac(0), &[3; 1000]);
    // Slots beyond the guest's writable pages.
    let mut front = Front::new(1);
    front.only_read_only();
    let id = world.ids[1];
    assert!(world.switch.disconnect(id).is_some() && world.switch.disconnect(id).is_none());
    assert!(world.switch.vif(id).is_none());
    world.ids[1] = world.machine.connect(&mut world.switch, &front, ALL, Limits::default());
    assert_ne!(world.ids[1], id, "another vif has another name");
    front.post(3);
    world.fronts[1] = front;
    assert!(world.fronts[0].send_stock(&world.machine, &frame, 500, How::default()));
    let _ = world.run();
    assert!(world.arrived(1).is_empty());
    assert_eq!((world.fronts[1].rx_errors, world.drops(1, Drop::BadBuffer)), (2, 1));
    assert_eq!((world.fronts[0].okay, world.drops(0, Drop::BadGrant)), (2, 0), "the sender did nothing wrong");
}

#[test]
fn what_a_guest_does_not_take_is_finished_and_cut() {
    let plain = Takes { scatter_gather: true, ..Takes::default() };
    let mut world = World::of(&[ALL, plain, Takes::default()], Limits::default());
    let payload: Vec<u8> = (0..20_000).map(|n| (n % 251) as u8).collect();
    for to in [1, 2] {
        let frame = frames::tcp4_blank(mac(to), mac(0), &payload);
        let how = How { blank: true, gso: Some(Gso { protocol: GsoProtocol::Tcp4, bytes: 1400 }), ..How::default() };
        assert!(world.fronts[0].send_stock(&world.machine, &frame, 54, how));
        let short = frames::tcp4_blank(mac(to), mac(0), b"after");
        assert!(world.fronts[0].send_stock(&world.machine, &short, 100, How { blank: true, ..How::default() }));
        let _ = world.run();
        let arrived = world.arrived(to.into());
        assert_eq!(arrived.len(), 20_000_usize.div_ceil(1400) + 1);
        assert!(arrived.iter().all(|packet| !packet.blank && packet.gso.is_none() && packet.slots == 1));
        assert!(arrived.iter().all(|packet| frames::is_right_tcp4(&packet.bytes)));
        let together: Vec<u8> = arrived.iter().flat_map(|packet| packet.bytes[54..].to_vec()).collect();
        assert!(together == [&payload[..], b"after"].concat(), "the order is kept");
    }
    // A broadcast with a blank checksum reaches each in its way; a guest without slots of several parts gets no long packet.
    let mut group = frames::tcp4_blank(mac(1), mac(0), b"all");
    group[..6].fill(0xff);
    assert!(world.fronts[0].send_stock(&world.machine, &group, 100, How { blank: true, ..How::default() }));
    let _ = world.run();
    for at in [1, 2] {
        let arrived = world.arrived(at);
        assert!(arrived.len() == 1 && !arrived[0].blank && frames::is_right_tcp4(&arrived[0].bytes));
    }
}

fn blank_segments(bytes: u16) -> How {
    How { blank: true, gso: Some(Gso { protocol: GsoProtocol::Tcp4, bytes }), ..How::default() }
}

#[test]
fn a_bridged_uplink_has_all_other_addresses() {
    let mut world = World::new(2);
    let device = Device::new();
    world.switch.set_uplink(Box::new(device.clone()), Mode::Bridged);
    let outside = Mac([2, 0, 0, 0, 9, 9]);
    let payload = vec![9; 10_000];
    let long = frames::tcp4_blank(outside, mac(0), &payload);
    assert!(world.fronts[0].send_stock(&world.machine, &long, 66, blank_segments(1448)));
    let blank = frames::tcp4_blank(outside, mac(0), b"one");
    assert!(world.fronts[0].send_stock(&world.machine, &blank, 30, How { blank: true, ..How::default() }));
    world.send(0, &frames::plain(Mac::BROADCAST, mac(0), &[1; 60]));
    world.send(0, &between(1, 0));
    let _ = world.run();
    {
        let wire = device.0.borrow();
        assert_eq!((wire.sent.len(), wire.kicked), (7 + 1 + 1, 9));
        assert!(wire.sent[..8].iter().all(|(frame, info)| {
            frames::is_right_tcp4(frame) && *info == FrameInfo { checksum: Checksum::Verified, segmentation: None }
        }));
        let together: Vec<u8> = wire.sent[..7].iter().flat_map(|(frame, _)| frame[54..].to_vec()).collect();
        assert!(together == payload);
    }
    assert_eq!(world.bytes_at(1).len(), 2, "the broadcast and the frame of its own");
    // What arrives goes to its guest or to all, and never moves a guest's address.
    let info = FrameInfo { checksum: Checksum::Verified, segmentation: None };
    let come = [
        frames::plain(mac(0), outside, &[1; 1400]),
        frames::plain(Mac::BROADCAST, outside, &[2; 60]),
        frames::plain(mac(0), mac(1), &[3; 60]),
        frames::plain(Mac([2, 0, 0, 0, 7, 7]), outside, &[4; 60]),
        vec![0; 5],
    ];
    device.0.borrow_mut().coming.extend(come.iter().map(|frame| (frame.clone(), info)));
    world.switch.attend_uplink();
    let _ = world.turns();
    let arrived = world.arrived(0);
    assert!(arrived.iter().map(|packet| &packet.bytes).eq(&come[..2]) && arrived[0].validated);
    assert_eq!(world.bytes_at(1), [come[1].clone()]);
    let counters = world.switch.uplink_counters().unwrap();
    let drops = [Drop::Spoofed, Drop::Unknown, Drop::Malformed].map(|reason| counters.drops.of(reason));
    assert_eq!((counters.received_packets, drops), (5, [1, 1, 1]));
    assert_eq!(device.0.borrow().rearmed, 2);
}

#[test]
fn an_uplink_with_offloads_gets_frames_as_they_are() {
    let mut world = World::new(1);
    let device = Device::new();
    device.0.borrow_mut().offloads = Offloads { checksum: true, tcp4: true, tcp6: false };
    world.switch.set_uplink(Box::new(device.clone()), Mode::Bridged);
    let frame = frames::tcp4_blank(Mac([2, 0, 0, 0, 9, 9]), mac(0), &[8; 30_000]);
    for _ in 0..5 {
        assert!(world.fronts[0].send_stock(&world.machine, &frame, 66, blank_segments(1448)));
    }
    let _ = world.run();
    let segmentation = Some(Segmentation { protocol: Protocol::Tcp4, bytes: 1448 });
    let wire = device.0.borrow();
    assert_eq!(wire.sent.len(), 5);
    assert!(
        wire.sent.iter().all(|sent| *sent == (frame.clone(), FrameInfo { checksum: Checksum::Blank, segmentation }))
    );
}

#[test]
fn a_blank_checksum_that_nobody_can_finish_stays_on_the_machine() {
    for offloads in [Offloads::default(), Offloads { checksum: true, tcp4: true, tcp6: true }] {
        cannot_finish(offloads);
    }
}

fn cannot_finish(offloads: Offloads) {
    let mut world = World::new(2);
    let device = Device::new();
    device.0.borrow_mut().offloads = offloads;
    world.switch.set_uplink(Box::new(device.clone()), Mode::Bridged);
    let outside = frames::plain(Mac([2, 0, 0, 0, 9, 9]), mac(0), &[8; 100]);
    assert!(world.fronts[0].send_stock(&world.machine, &outside, 200, How { blank: true, ..How::default() }));
    assert!(world.fronts[0].send_stock(&world.machine, &between(1, 0), 200, How { blank: true, ..How::default() }));
    let _ = world.run();
    assert!(device.0.borrow().sent.is_empty());
    assert_eq!((world.arrived(1).len(), world.drops(0, Drop::Malformed)), (1, 1), "between guests nobody cares");
    // Segments of something that is not TCP, and of a packet that is shorter than its frame.
    let mut udp = frames::tcp4_blank(Mac([2, 0, 0, 0, 9, 9]), mac(0), &[8; 5000]);
    let (mut short, good) = (udp.clone(), udp.clone());
    udp[23] = 17;
    short.extend([0; 10]);
    for frame in [&udp, &short, &good] {
        assert!(world.fronts[0].send_stock(&world.machine, frame, 66, blank_segments(1460)));
    }
    let _ = world.run();
    let sent = if offloads.tcp4 { 1 } else { 4 };
    assert_eq!((world.drops(0, Drop::Malformed), device.0.borrow().sent.len()), (3, sent), "the last is well");
    // An uplink with shorter frames than the switch.
    let narrow = Device::new();
    (narrow.0.borrow_mut().offloads, narrow.0.borrow_mut().mtu) = (offloads, 1400);
    world.switch.set_uplink(Box::new(narrow.clone()), Mode::Bridged);
    assert!(world.fronts[0].send_stock(&world.machine, &good, 66, blank_segments(1361)));
    assert!(world.fronts[0].send_stock(&world.machine, &good, 66, blank_segments(1360)));
    let _ = world.run();
    assert_eq!(narrow.0.borrow().sent.len(), sent);
    assert_eq!(world.switch.uplink_counters().unwrap().drops.total(), 1);
}

#[test]
fn frames_too_long_for_the_uplink_stay_on_the_machine() {
    for offloads in [Offloads::default(), Offloads { checksum: true, tcp4: true, tcp6: true }] {
        let mut world = World::wide(&[ALL; 2], Limits::default(), 9000);
        let device = Device::new();
        device.0.borrow_mut().offloads = offloads;
        world.switch.set_uplink(Box::new(device.clone()), Mode::Bridged);
        let outside = Mac([2, 0, 0, 0, 9, 9]);
        let frames = [(outside, 1500), (outside, 1501), (outside, 9000), (mac(1), 9000), (mac(1), 9100)];
        for (to, bytes) in frames {
            let frame = frames::plain(to, mac(0), &vec![7; bytes]);
            assert!(world.fronts[0].send_stock(&world.machine, &frame, 200, How::default()));
        }
        // A broadcast reaches the guests all the same.
        let all = frames::plain(Mac::BROADCAST, mac(0), &[7; 2000]);
        assert!(world.fronts[0].send_stock(&world.machine, &all, 200, How::default()));
        let _ = world.run();
        let sent: Vec<usize> = device.0.borrow().sent.iter().map(|(frame, _)| frame.len()).collect();
        assert_eq!(sent, [1514]);
        let arrived: Vec<usize> = world.bytes_at(1).iter().map(Vec::len).collect();
        assert_eq!(arrived, [9014, 2014]);
        assert_eq!(world.switch.uplink_counters().unwrap().drops.of(Drop::Oversize), 3);
        assert_eq!(world.drops(0, Drop::Oversize), 4, "three to the uplink, and one that no guest may send");
    }
}

#[test]
fn a_full_or_dead_uplink_holds_nobody_up() {
    let mut world = World::new(2);
    let device = Device::new();
    device.0.borrow_mut().room = 3;
    world.switch.set_uplink(Box::new(device.clone()), Mode::Bridged);
    let outside = frames::plain(Mac([2, 0, 0, 0, 9, 9]), mac(0), &[8; 100]);
    for _ in 0..5 {
        world.send(0, &outside);
        world.send(0, &between(1, 0));
    }
    assert_eq!(world.run(), Turn { again: false, again_ns: None });
    assert_eq!((device.0.borrow().sent.len(), world.arrived(1).len()), (3, 5));
    assert_eq!((world.drops(0, Drop::UplinkFull), world.fronts[0].dropped), (2, 2));
    // A reset takes as long as it takes, and meanwhile nothing is sent.
    device.0.borrow_mut().needs_reset = true;
    device.0.borrow_mut().resets.extend([Reset::Pending, Reset::Pending, Reset::Done]);
    world.send(0, &outside);
    let turn = world.run();
    assert!(!turn.again && turn.again_ns.is_some());
    for _ in 0..2 {
        world.now += 10_000_000;
        let _ = world.turns();
    }
    device.0.borrow_mut().room = 10;
    world.send(0, &outside);
    let _ = world.run();
    assert_eq!((device.0.borrow().sent.len(), world.switch.uplink_counters().unwrap().resets), (4, 1));
    device.0.borrow_mut().needs_reset = true;
    device.0.borrow_mut().resets.push_back(Reset::Dead("it does not answer"));
    let _ = world.run();
    assert_eq!(world.switch.event(), Some(Event::UplinkDead("it does not answer")));
    world.send(0, &outside);
    assert_eq!(world.run(), Turn { again: false, again_ns: None });
    assert_eq!(world.drops(0, Drop::UplinkFull), 4);
}

#[test]
fn a_station_hears_guests_and_answers_them() {
    let mut world = World::new(2);
    let ear = Ear::default();
    ear.0.borrow_mut().echoes = true;
    world.switch.set_station(Box::new(ear.clone()));
    let long = frames::tcp4_blank(STATION, mac(0), &[4; 40_000]);
    assert!(world.fronts[0].send_stock(&world.machine, &long, 66, blank_segments(1448)));
    world.send(0, &frames::plain(STATION, mac(0), &[5; 60]));
    world.send(1, &frames::plain(Mac::BROADCAST, mac(1), &[6; 60]));
    let _ = world.run();
    let heard = ear.0.borrow();
    let ports = [world.ids[0].port(), world.ids[0].port(), world.ids[1].port()];
    assert!(heard.from_guests.iter().map(|(port, ..)| *port).eq(ports));
    assert!(heard.from_guests[0].1 == long);
    assert_eq!(heard.from_guests[0].2.segmentation, Some(Segmentation { protocol: Protocol::Tcp4, bytes: 1448 }));
    drop(heard);
    let arrived = world.arrived(0);
    assert_eq!(arrived.len(), 3, "two answers and the broadcast");
    assert!(arrived[0].bytes[12..] == long[12..] && arrived[0].gso == Some((1448, 1)) && arrived[0].blank);
    assert_eq!(world.arrived(1).len(), 1);
    // The station's address is nobody else's.
    let mut front = Front::new(1);
    front.mac = STATION;
    let (tx, rx) = (front.tx_page.clone(), front.rx_page.clone());
    let ports = Ports { tx: 0, rx: 0 };
    let limits = Limits::default();
    let connection = Connection { domain: 1, ports, tx, rx, takes: ALL, mac: STATION, limits };
    assert_eq!(world.switch.connect(connection, 0).unwrap_err(), ConnectError::MacInUse(STATION));
}

#[test]
fn only_the_station_talks_to_a_routed_uplink() {
    let mut world = World::new(2);
    let (device, ear) = (Device::new(), Ear::default());
    ear.0.borrow_mut().routes = true;
    ear.0.borrow_mut().forwards_to = Some(world.ids[1].port());
    ear.0.borrow_mut().next_ns = Some(world.now + SECOND);
    world.switch.set_uplink(Box::new(device.clone()), Mode::Routed);
    world.switch.set_station(Box::new(ear.clone()));
    world.send(0, &frames::plain(Mac([2, 0, 0, 0, 9, 9]), mac(0), &[8; 100]));
    let routed = frames::tcp4_blank(STATION, mac(0), &[4; 4000]);
    assert!(world.fronts[0].send_stock(&world.machine, &routed, 66, blank_segments(1000)));
    let turn = world.run();
    assert_eq!(turn.again_ns, Some(world.now + SECOND));
    assert_eq!((device.0.borrow().sent.len(), world.drops(0, Drop::Unknown)), (4, 1));
    assert!(device.0.borrow().sent.iter().all(|(frame, _)| frames::is_right_tcp4(frame)));
    let frame = frames::plain(Mac([2, 0, 0, 0, 0, 0xfe]), Mac([2, 0, 0, 0, 9, 9]), &[1; 1400]);
    device.0.borrow_mut().coming.extend(vec![(frame.clone(), FrameInfo::default()); 100]);
    world.switch.attend_uplink();
    let _ = world.turns();
    assert_eq!((ear.0.borrow().from_uplink.len(), world.bytes_at(1)), (100, vec![frame; 100]));
    // A frame may change when the station is to be called.
    ear.0.borrow_mut().next_ns = Some(world.now + SECOND / 2);
    device.0.borrow_mut().coming.push_back((vec![0; 60], FrameInfo::default()));
    world.switch.attend_uplink();
    assert_eq!(world.turns().again_ns, Some(world.now + SECOND / 2));
    let before = ear.0.borrow().turns;
    assert_eq!(world.turns().again_ns, Some(world.now + SECOND / 2));
    assert_eq!(ear.0.borrow().turns, before, "the station is not called before its time");
    world.now += SECOND / 2;
    assert_eq!(world.turns(), Turn { again: false, again_ns: None });
    world.switch.attend_station();
    let _ = world.turns();
    assert_eq!(ear.0.borrow().turns, before + 2);
}

#[test]
fn a_guest_that_breaks_a_rule_ends_its_own_vif() {
    let mut world = World::new(3);
    world.fronts[0].tx_page.store_u32(0, 1000);
    world.send(1, &between(2, 1));
    let _ = world.run();
    assert!(matches!(world.switch.event(), Some(Event::Broken(id, Broken::TxRing(_))) if id == world.ids[0]));
    assert!(world.switch.vif(world.ids[0]).unwrap().is_broken());
    assert_eq!(world.bytes_at(2).len(), 1);
    // Frames for the vif are dropped.
    world.send(1, &between(0, 1));
    assert_eq!(world.run(), Turn { again: false, again_ns: None });
    // A chain without an end.
    for _ in 0..30 {
        let slot = TxRequest { reference: 300, offset: 0, flags: tx_flag::MORE_DATA, id: 0, size: 100 };
        assert!(world.fronts[1].put(slot, false));
    }
    let front = &mut world.fronts[1];
    let _ = front.tx.publish(&front.tx_page);
    let _ = world.run();
    let event = world.switch.event();
    assert!(matches!(event, Some(Event::Broken(id, Broken::Slots(_))) if id == world.ids[1]), "{event:?}");
    // A ring of buffers that cannot be.
    world.fronts[2].rx_page.store_u32(0, 5000);
    let id = world.ids[0];
    assert!(world.switch.disconnect(id).is_some());
    world.fronts[0] = Front::new(0);
    world.ids[0] = world.machine.connect(&mut world.switch, &world.fronts[0], ALL, Limits::default());
    for _ in 0..300 {
        if !world.fronts[0].send_small(&world.machine, &between(2, 0)) {
            let _ = world.run();
        }
    }
    let _ = world.run();
    let event = world.switch.event();
    assert!(matches!(event, Some(Event::Broken(id, Broken::RxRing(_))) if id == world.ids[2]), "{event:?}");
    assert_eq!(world.fronts[0].unanswered(), 0);
}

#[test]
fn a_guest_whose_ring_breaks_during_its_visit_waits_for_nobody() {
    let unfinished = Takes { checksum4: false, ..ALL };
    let mut world = World::of(&[ALL, ALL, unfinished], Limits::default());
    let ear = Ear::default();
    ear.0.borrow_mut().echoes = true;
    world.switch.set_station(Box::new(ear));
    // Guest 1 has no buffer left.
    for _ in 0..256 {
        world.send(2, &between(1, 2));
        let _ = world.run();
    }
    // Guest 0 breaks its RX ring, which the station's answer finds out before guest 1 is to be waited for: the packet between
    // them has to be finished, and what was sent before goes first.
    world.fronts[0].rx_page.store_u32(0, 5000);
    world.send(0, &frames::plain(STATION, mac(0), &[1; 60]));
    let blank = frames::tcp4_blank(mac(2), mac(0), &[2; 100]);
    let how = How { blank: true, ..How::default() };
    assert!(world.fronts[0].send_stock(&world.machine, &blank, blank.len(), how));
    world.send(0, &between(1, 0));
    let _ = world.run();
    let Some(Event::Broken(id, Broken::RxRing(_))) = world.switch.event() else { panic!("the ring is not broken") };
    assert_eq!((id, world.bytes_at(2).len()), (world.ids[0], 1));
    // The vif stays until its owner disconnects it, which may take its guest for ever.
    world.now += PATIENCE_NS;
    assert_eq!(world.turns(), Turn { again: false, again_ns: None });
}

#[test]
fn a_turn_carries_few_frames_of_the_uplink_to_a_crowd() {
    let mut world = World::new(40);
    let _ = world.run();
    let device = Device::new();
    world.switch.set_uplink(Box::new(device.clone()), Mode::Bridged);
    let flood = frames::plain(Mac::BROADCAST, Mac([2, 0, 0, 0, 9, 9]), &[3; 100]);
    device.0.borrow_mut().coming.extend((0..64).map(|_| (flood.clone(), FrameInfo::default())));
    let mut turns = 0;
    loop {
        let before = world.machine.0.borrow().copies;
        let turn = world.switch.turn(&mut world.machine, world.now);
        let copies = world.machine.0.borrow().copies - before;
        assert!(copies <= 256 + 40, "{copies} copies in a turn");
        turns += 1;
        if !turn.again {
            break;
        }
    }
    assert!((9..20).contains(&turns), "{turns} turns");
    assert!((0..40).all(|at| world.bytes_at(at).len() == 64));
}

#[test]
fn a_visit_is_bounded_and_guests_take_turns() {
    let mut world = World::new(3);
    for _ in 0..200 {
        world.send(0, &between(2, 0));
        world.send(1, &between(2, 1));
    }
    world.ids.clone().iter().for_each(|id| world.switch.attend(*id));
    let mut from = Vec::new();
    for _ in 0..4 {
        let turn = world.switch.turn(&mut world.machine, world.now);
        assert!(turn.again);
        let senders: Vec<u8> = world.bytes_at(2).iter().map(|frame| frame[11]).collect();
        world.fronts[2].post(256);
        assert!(senders.len() == 64 && senders.iter().all(|sender| *sender == senders[0]), "{senders:?}");
        from.push(senders[0]);
        // The third guest has nothing to send; its visit is a turn too.
        if from == [0, 1] {
            let _ = world.switch.turn(&mut world.machine, world.now);
        }
    }
    assert_eq!(from, [0, 1, 0, 1]);
}

/// Six guests have full rings, whose packets go to the eighth guest. The seventh sends a packet as often as it can: it is
/// visited in the next turn, but in one of five turns a guest with a full ring is, each of them in turn.
#[test]
fn a_guest_that_sends_little_waits_for_no_flood_and_keeps_none_waiting() {
    let mut world = World::new(8);
    let fill = |world: &mut World| {
        for from in 0..6 {
            while world.send_if_room(from, &between(7, from)) {}
            let _ = world.fronts[from].collect_sent();
            world.switch.attend(world.ids[from]);
        }
    };
    fill(&mut world);
    let turn = |world: &mut World| {
        let _ = world.switch.turn(&mut world.machine, world.now);
        world.fronts[7].post(256);
        let senders: Vec<u8> = world.bytes_at(7).iter().map(|frame| frame[11]).collect();
        assert!(!senders.is_empty() && senders.iter().all(|sender| *sender == senders[0]), "{senders:?}");
        senders[0]
    };
    // The first visits tell which guests have more to send than a visit takes.
    for _ in 0..16 {
        let _ = world.switch.turn(&mut world.machine, world.now);
        world.fronts[7].post(256);
        let _ = world.bytes_at(7);
    }
    let mut visits = [0; 7];
    for _ in 0..300 {
        fill(&mut world);
        let _ = world.fronts[6].collect_sent();
        world.send(6, &between(7, 6));
        world.switch.attend(world.ids[6]);
        let mut waited = 0;
        loop {
            let from = turn(&mut world);
            visits[usize::from(from)] += 1;
            if from == 6 {
                break;
            }
            waited += 1;
            assert!(waited <= 1, "a packet waits for {waited} visits to floods");
        }
    }
    let [floods @ .., little] = visits;
    assert_eq!(little, 300);
    assert!(floods.iter().all(|visits| (12..=13).contains(visits)), "{floods:?}");
}

#[test]
fn a_bad_broadcast_in_a_crowd_does_not_hold_back_what_was_sent_before() {
    let mut world = World::new(130);
    let device = Device::new();
    world.switch.set_uplink(Box::new(device.clone()), Mode::Bridged);
    let outside = frames::plain(Mac([2, 0, 0, 0, 9, 9]), mac(0), &[8; 1000]);
    let group = frames::plain(Mac::BROADCAST, mac(0), &[9; 600]);
    assert!(world.fronts[0].send_stock(&world.machine, &outside, 2000, How::default()));
    assert!(world.fronts[0].send_stock(&world.machine, &group, 300, How::default()));
    // The third packet begins well, but is no grant after that. Its copies do not fit the batch together with those before.
    world.machine.write(0, 300, 0, &group[..300]);
    let first = TxRequest { reference: 300, offset: 0, flags: tx_flag::MORE_DATA, id: 0, size: 614 };
    assert!(world.fronts[0].put(first, false));
    assert!(world.fronts[0].put(TxRequest { reference: 9999, offset: 0, flags: 0, id: 0, size: 314 }, false));
    assert!(world.fronts[0].send_stock(&world.machine, &outside, 500, How::default()));
    let _ = world.run();
    assert_eq!((world.fronts[0].errors, world.drops(0, Drop::BadGrant)), (2, 1));
    let sent: Vec<Vec<u8>> = device.0.borrow().sent.iter().map(|(frame, _)| frame.clone()).collect();
    assert_eq!(sent, [outside.clone(), group.clone(), outside]);
    for at in 1..130 {
        assert_eq!((world.bytes_at(at), world.fronts[at].rx_errors), (vec![group.clone()], 0));
    }
}

#[test]
fn tiny_segments_buy_no_long_turns() {
    let plain = Takes { scatter_gather: true, ..Takes::default() };
    let mut world = World::of(&[ALL, plain], Limits::default());
    let payload: Vec<u8> = (0..4000).map(|n| (n % 251) as u8).collect();
    let frame = frames::tcp4_blank(mac(1), mac(0), &payload);
    for _ in 0..60 {
        assert!(world.fronts[0].send_stock(&world.machine, &frame, 4054, blank_segments(48)));
    }
    world.ids.clone().iter().for_each(|id| world.switch.attend(*id));
    let (mut again, mut turns, mut arrived) = (true, 0, 0);
    while again {
        let before = world.machine.0.borrow().copies;
        again = world.switch.turn(&mut world.machine, world.now).again;
        let copies = world.machine.0.borrow().copies - before;
        assert!(copies < 1000, "{copies} copies in a turn");
        let packets = world.arrived(1);
        assert!(packets.iter().all(|packet| frames::is_right_tcp4(&packet.bytes)));
        arrived += packets.len();
        world.fronts[1].post(256);
        turns += 1;
        world.switch.attend(world.ids[1]);
        again |= world.fronts[0].collect_sent() > 0;
    }
    assert_eq!(arrived, 60 * 4000_usize.div_ceil(48));
    assert!(turns >= 20, "{turns} turns");
}

#[test]
fn addresses_are_unique_and_sensible() {
    let machine = Machine::new(Random::seeded(1), 2);
    let mut switch = machine.switch(1500);
    let connection = |mac| {
        let front = Front::new(0);
        let ports = Ports { tx: 0, rx: 0 };
        let (tx, rx) = (front.tx_page.clone(), front.rx_page.clone());
        Connection { domain: 0, ports, tx, rx, takes: ALL, mac, limits: Limits::default() }
    };
    for bad in [Mac([0; 6]), Mac::BROADCAST, Mac([1, 0, 0, 0, 0, 0])] {
        assert_eq!(switch.connect(connection(bad), 0).unwrap_err(), ConnectError::NoStation(bad));
    }
    let id = switch.connect(connection(mac(1)), 0).unwrap();
    assert_eq!(switch.connect(connection(mac(1)), 0).unwrap_err(), ConnectError::MacInUse(mac(1)));
    assert!(switch.disconnect(id).is_some());
    assert!(switch.connect(connection(mac(1)), 0).is_ok());
    for n in 2..=256 {
        assert!(switch.connect(connection(mac(n)), 0).is_ok());
    }
    assert_eq!(switch.connect(connection(mac(300)), 0).unwrap_err(), ConnectError::TooMany);
}
