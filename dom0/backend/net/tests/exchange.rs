//! Guests exchange packets of all shapes, and each arrives whole, once, in order, and within what a stock front end takes.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use common::front::How;
use common::{ALL, Front, Machine, frames, turns};
use net_backend::{Limits, Switch, VifId};
use ring_protocol::net::{Gso, GsoProtocol, MAX_SLOTS};
use test_random::Random;

struct World {
    machine: Machine,
    switch: Switch<Machine>,
    fronts: Vec<Front>,
    ids: Vec<VifId>,
}

impl World {
    fn new(count: u16, mtu: u16) -> Self {
        let machine = Machine::new(Random::new(), count.into());
        let mut switch = machine.switch(mtu);
        let mut fronts: Vec<Front> = (0..count).map(Front::new).collect();
        let ids = fronts.iter().map(|front| machine.connect(&mut switch, front, ALL, Limits::default())).collect();
        fronts.iter_mut().for_each(|front| assert!(front.post(256) <= 256));
        Self { machine, switch, fronts, ids }
    }

    fn run(&mut self, now_ns: u64) {
        self.ids.iter().for_each(|id| self.switch.attend(*id));
        let _ = turns(&mut self.switch, &mut self.machine, now_ns);
        self.fronts.iter_mut().for_each(|front| assert!(front.collect_sent() <= 256));
    }
}

/// Cuts `total` bytes into parts of random lengths that a packet may have.
fn any_parts(random: &mut Random, total: usize) -> Vec<(usize, usize)> {
    let (mut parts, mut left) = (Vec::new(), total);
    while left > 0 {
        let slots_left = MAX_SLOTS - parts.len();
        // What is left must fit the slots that are left.
        let least = left.saturating_sub((slots_left - 1) * 4096).max(if parts.is_empty() { 14 } else { 1 });
        let most = left.min(4096);
        let length = match random.below(3) {
            0 => least,
            1 => most,
            _ => least + random.below(most - least + 1),
        };
        parts.push((random.below(4096 - length + 1), length));
        left -= length;
    }
    parts
}

#[test]
fn packets_of_all_shapes_arrive_as_they_were_sent() {
    let mut world = World::new(3, 9000);
    let mut random = Random::new();
    let mut sent = vec![Vec::new(); 3];
    for round in 0..3000 {
        let from = random.below(3);
        let to = (from + 1 + random.below(2)) % 3;
        let gso = random.below(2) == 0;
        let length = 60 + random.below(if gso { 65_400 } else { 8_900 });
        let (to_mac, from_mac) = (world.fronts[to].mac, world.fronts[from].mac);
        let frame = match gso {
            true => frames::tcp4_blank(to_mac, from_mac, &vec![round as u8; length - 54]),
            false => frames::any(to_mac, from_mac, length, &mut random),
        };
        let parts = any_parts(&mut random, frame.len());
        let how = How {
            blank: gso || random.below(2) == 0,
            validated: random.below(2) == 0,
            gso: gso.then_some(Gso { protocol: GsoProtocol::Tcp4, bytes: 48 }),
        };
        assert!(world.fronts[from].send(&world.machine, &frame, &parts, how));
        sent[to].push((frame, how.blank, how.gso.map(|gso| (gso.bytes, gso.protocol as u8))));
        if random.below(4) == 0 {
            world.run(round);
            for (front, sent) in world.fronts.iter_mut().zip(&mut sent) {
                let arrived = front.collect(&world.machine);
                let arrived: Vec<_> = arrived.into_iter().map(|it| (it.bytes, it.blank, it.gso)).collect();
                // Packets of different senders have no order among each other.
                let from = |mac: usize| move |frame: &&(Vec<u8>, _, _)| frame.0[11] == mac as u8;
                for mac in 0..3 {
                    let [sent, arrived] =
                        [&*sent, &arrived].map(|all| all.iter().filter(from(mac)).collect::<Vec<_>>());
                    assert!(sent == arrived, "{} packets were sent and {} arrived", sent.len(), arrived.len());
                }
                sent.clear();
                front.post(256);
            }
        }
    }
    let errors: u64 = world.fronts.iter().map(|front| front.errors + front.dropped).sum();
    assert_eq!(errors, 0);
}

#[test]
fn a_routing_guest_s_packets_of_eighteen_slots_arrive() {
    for linear in [66, 200, 256, 257, 1000, 4000] {
        let mut world = World::new(2, 1500);
        // 17 pages, but for the limit of a packet's length: pages of 3,700 bytes.
        let mut parts = vec![(50, linear)];
        parts.extend([(300, 3600); 17]);
        let total = linear + 17 * 3600;
        let frame = frames::tcp4_blank(world.fronts[1].mac, world.fronts[0].mac, &vec![7; total - 54]);
        let how = How { blank: true, gso: Some(Gso { protocol: GsoProtocol::Tcp4, bytes: 1448 }), ..How::default() };
        assert!(world.fronts[0].send(&world.machine, &frame, &parts, how));
        world.run(0);
        let arrived = world.fronts[1].collect(&world.machine);
        assert_eq!(arrived.len(), 1, "{linear} linear bytes");
        assert!(arrived[0].bytes == frame);
        let slots = if linear <= 256 { 18 } else { total.div_ceil(4096) };
        assert_eq!(arrived[0].slots, slots, "{linear} linear bytes");
    }
}

#[test]
fn a_segment_between_guests_costs_one_copy_a_slot_and_two_calls() {
    let mut world = World::new(2, 1500);
    let frame = frames::tcp4_blank(world.fronts[1].mac, world.fronts[0].mac, &[1; 65_000]);
    let how = How { blank: true, gso: Some(Gso { protocol: GsoProtocol::Tcp4, bytes: 1448 }), ..How::default() };
    for _ in 0..3 {
        assert!(world.fronts[0].send_stock(&world.machine, &frame, 66, how));
    }
    world.run(0);
    let state = world.machine.0.borrow();
    // 16 pages and 66 bytes: two copies into scratch memory, then one from there and one for each page.
    assert_eq!((state.calls, state.copies), (2, 3 * (2 + 1 + 16)));
    assert_eq!(state.notified, [1, 0, 0, 1], "the sender's TX and the receiver's RX");
    drop(state);
    assert_eq!(world.fronts[1].collect(&world.machine).len(), 3);
}
