//! Two guests that write anything into rings, slots and packets, beside two that look at each packet they get, with an uplink
//! and a station, while any copy may fail: two million slots.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use common::far::{Device, Ear, STATION};
use common::front::How;
use common::{ALL, Front, Machine, RX_PAGES, frames, mac};
use net_backend::{Drop, Event, Limits, Mode, Switch, Takes, VifId};
use network::{FrameInfo, Mac, Offloads, Reset};
use ring_protocol::SharedPage;
use ring_protocol::net::{Extra, Gso, GsoProtocol, TxRequest, tx_flag};
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use test_random::Random;

const SLOTS: u64 = 2_000_000;
const RUNS: u64 = 8;
/// Copies of a turn at most: a visit's packets to all guests, and frames of the uplink to all guests.
const TURN_COPIES: u64 = 800;
const OUTSIDE: Mac = Mac([2, 0, 0, 0, 9, 9]);

struct Neighbour {
    front: Front,
    id: VifId,
    /// The packets on their way from the other neighbour.
    expected: VecDeque<u64>,
    arrived: u64,
}

struct World {
    random: Random,
    machine: Machine,
    switch: Switch<Machine>,
    device: Device,
    ear: Ear,
    hostile: [(Front, VifId); 2],
    neighbours: [Neighbour; 2],
    now: u64,
    stamp: u64,
    sent: u64,
    broken: u64,
    served: u64,
    refused: u64,
    most_copies: u64,
}

/// A packet of a neighbour: all of it follows from its stamp.
fn stamped(to: u16, from: u16, stamp: u64) -> (Vec<u8>, How) {
    let mut random = Random::seeded(stamp);
    let most = if random.below(4) == 0 { 40_000 } else { 1400 };
    let length = 20 + random.below(most);
    let mut payload = vec![0; length];
    payload.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]));
    payload[..8].copy_from_slice(&stamp.to_le_bytes());
    let gso = (length > 1446).then_some(Gso { protocol: GsoProtocol::Tcp4, bytes: 1446 });
    (frames::tcp4_blank(mac(to), mac(from), &payload), How { blank: true, validated: true, gso })
}

fn any_takes(random: &mut Random) -> Takes {
    let mut some = || random.below(3) > 0;
    Takes { scatter_gather: some(), tcp4: some(), tcp6: some(), checksum4: some(), checksum6: some() }
}

impl World {
    fn new(mut random: Random) -> Self {
        let machine = Machine::new(Random::seeded(random.next()), 4);
        let mut switch = machine.switch(1500);
        let (device, ear) = (Device::new(), Ear::default());
        let bridged = random.below(2) == 0;
        let offloads = random.below(2) == 0;
        device.0.borrow_mut().offloads = Offloads { checksum: offloads, tcp4: offloads, tcp6: false };
        switch.set_uplink(Box::new(device.clone()), if bridged { Mode::Bridged } else { Mode::Routed });
        ear.0.borrow_mut().echoes = true;
        ear.0.borrow_mut().routes = !bridged;
        switch.set_station(Box::new(ear.clone()));
        let hostile = [0, 1].map(|n| Self::reconnect(&machine, &mut switch, &mut random, n));
        let neighbours = [2, 3].map(|n| {
            let mut front = Front::new(n);
            let id = machine.connect(&mut switch, &front, ALL, Limits::default());
            front.post(256);
            Neighbour { front, id, expected: VecDeque::new(), arrived: 0 }
        });
        let (now, stamp, sent, broken, served, refused, most_copies) = (1, 0, 0, 0, 0, 0, 0);
        Self {
            random,
            machine,
            switch,
            device,
            ear,
            hostile,
            neighbours,
            now,
            stamp,
            sent,
            broken,
            served,
            refused,
            most_copies,
        }
    }

    fn reconnect(machine: &Machine, switch: &mut Switch<Machine>, random: &mut Random, n: u16) -> (Front, VifId) {
        let mut front = Front::new(n);
        front.hostile = true;
        if random.below(4) == 0 {
            front.tx_page.shifting.set(random.next() | 1);
            front.rx_page.shifting.set(random.next() | 1);
        }
        let limits = match random.below(4) {
            0 => Limits { bytes_per_second: Some(50_000_000), address: None },
            1 => Limits { bytes_per_second: None, address: Some(Ipv4Addr::new(10, 0, 0, n as u8)) },
            _ => Limits::default(),
        };
        let id = machine.connect(switch, &front, any_takes(random), limits);
        if random.below(2) == 0 {
            front.only_read_only();
        }
        (front, id)
    }

    /// A hostile guest writes headers, and anything, into its pages, also those it has sent.
    fn scribble(&mut self, n: u16) {
        let random = &mut self.random;
        for _ in 0..4 {
            let to = match random.below(8) {
                0 => Mac::BROADCAST,
                1 => STATION,
                2 => OUTSIDE,
                3 => mac(1 - n),
                _ => mac(2 + random.below(2)),
            };
            let from = if random.below(10) == 0 { mac(random.below(4)) } else { mac(n) };
            let mut frame = frames::tcp4_blank(to, from, &[0x66; 300]);
            if random.below(3) == 0 {
                let at = random.below(60);
                frame[at] = random.next() as u8;
            }
            let page = RX_PAGES + random.below(32);
            self.machine.write(n, page as u32, 0, &frame);
        }
    }

    /// Sends slots that are nearly a packet.
    fn send_hostile(&mut self, n: usize) {
        let (random, front) = (&mut self.random, &mut self.hostile[n].0);
        let data = match random.below(12) {
            0 => 15 + random.below(5),
            1 if random.below(20) == 0 => 21 + random.below(4),
            _ => 1 + random.below(4),
        };
        let gso = random.below(6) == 0;
        if !front.can_send(data as usize + 2) {
            return;
        }
        // Without segments, a frame is to fit the switch.
        let most = if gso || random.below(10) == 0 { 3000 } else { 1440 / data };
        let sizes: Vec<u16> = (0..data).map(|_| 1 + random.below(most)).collect();
        let total = sizes.iter().map(|size| u64::from(*size)).sum::<u64>() + 60;
        for (at, size) in sizes.iter().enumerate() {
            let reference =
                if random.below(50) == 0 { random.next() as u32 } else { (RX_PAGES as u64 + random.below(32)) as u32 };
            let offset = if at == 0 || random.below(2) == 0 { 0 } else { random.below(1200) };
            let mut flags = if at + 1 < sizes.len() { tx_flag::MORE_DATA } else { 0 };
            flags |= random.below(4);
            let size = if at == 0 { total.min(65_535) as u16 } else { *size };
            if at == 0 && gso {
                flags |= tx_flag::EXTRA_INFO;
            }
            let mut slot = TxRequest { reference, offset, flags, id: 0, size };
            match random.below(60) {
                0 => slot.size = random.next() as u16,
                1 => slot.offset = random.next() as u16,
                2 if random.below(10) == 0 => slot.flags = random.next() as u16,
                _ => {}
            }
            front.put(slot, false);
            self.sent += 1;
            if at == 0 && gso {
                let bytes = if random.below(4) == 0 { random.next() as u16 } else { 48 + random.below(1400) };
                let mut extra = Extra::gso(Gso { protocol: GsoProtocol::Tcp4, bytes });
                if random.below(10) == 0 {
                    extra.protocol = random.below(4);
                    extra.kind = random.below(6);
                }
                front.put(TxRequest::of_extra(extra), true);
                self.sent += 1;
            }
        }
    }

    fn step(&mut self) {
        let n = self.random.below(2);
        let packets = if self.random.below(10) == 0 { 100 } else { 1 + self.random.below(20) };
        for _ in 0..packets {
            self.send_hostile(n);
        }
        let (front, id) = &mut self.hostile[n];
        let _ = front.tx.publish(&front.tx_page);
        front.post(self.random.below(100));
        self.switch.attend(*id);
        self.scribble(n as u16);
        for from in 0..2 {
            if self.random.below(2) == 0 {
                self.send_stamped(from);
            }
            self.switch.attend(self.neighbours[from].id);
        }
        if self.random.below(4) == 0 {
            let to = [Mac::BROADCAST, mac(0), mac(1), mac(9)][self.random.below(4)];
            let frame = frames::tcp4_blank(to, OUTSIDE, &[0x77; 500]);
            self.device.0.borrow_mut().coming.push_back((frame, FrameInfo::default()));
            self.switch.attend_uplink();
        }
        for _ in 0..1 + self.random.below(5) {
            self.turn();
            if self.random.below(2) == 0 {
                self.scribble(n as u16);
            }
        }
        self.collect();
        if self.random.below(400) == 0 {
            self.break_ring(n);
        }
        if self.random.below(2000) == 0 {
            self.device.0.borrow_mut().needs_reset = true;
            self.device.0.borrow_mut().resets.push_back(Reset::Pending);
        }
    }

    fn send_stamped(&mut self, from: usize) {
        let to = 1 - from;
        let (frame, how) = stamped(2 + to as u16, 2 + from as u16, self.stamp);
        if self.neighbours[from].front.can_send(20) {
            let linear = 54 + self.random.below(300);
            assert!(self.neighbours[from].front.send_stock(&self.machine, &frame, linear, how));
            self.neighbours[to].expected.push_back(self.stamp);
            self.stamp += 1;
        }
    }

    fn turn(&mut self) {
        self.now += self.random.below(200_000);
        let before = self.machine.0.borrow().copies;
        let turn = self.switch.turn(&mut self.machine, self.now);
        let copies = self.machine.0.borrow().copies - before;
        self.most_copies = self.most_copies.max(copies);
        assert!(copies <= TURN_COPIES, "{copies} copies in a turn");
        if !turn.again && self.random.below(8) == 0 {
            self.now = self.now.max(turn.again_ns.unwrap_or(0));
        }
        while let Some(event) = self.switch.event() {
            let Event::Broken(id, _) = event else { panic!("{event:?}") };
            let n = self.hostile.iter().position(|(_, hostile)| *hostile == id).expect("an honest ring is broken");
            self.broken += 1;
            self.renew(n);
        }
        self.device.0.borrow_mut().sent.clear();
        self.ear.0.borrow_mut().from_guests.clear();
        self.ear.0.borrow_mut().from_uplink.clear();
    }

    fn renew(&mut self, n: usize) {
        let left = self.switch.disconnect(self.hostile[n].1).unwrap();
        self.served += left.counters.sent_packets;
        self.refused += left.counters.drops.total();
        self.hostile[n] = Self::reconnect(&self.machine, &mut self.switch, &mut self.random, n as u16);
    }

    /// A hostile guest writes an index.
    fn break_ring(&mut self, n: usize) {
        let front = &self.hostile[n].0;
        let page = [&front.tx_page, &front.rx_page][self.random.below(2)];
        let near = page.load_u32(0).wrapping_add(self.random.below(600));
        page.store_u32(0, if self.random.below(2) == 0 { self.random.next() as u32 } else { near });
        let id = self.hostile[n].1;
        self.switch.attend(id);
        (0..3).for_each(|_| self.turn());
        if self.hostile[n].1 == id {
            self.renew(n);
        }
    }

    fn collect(&mut self) {
        for (front, _) in &mut self.hostile {
            front.collect_sent();
            front.collect(&self.machine);
        }
        for n in 0..2 {
            let neighbour = &mut self.neighbours[n];
            neighbour.front.collect_sent();
            for packet in neighbour.front.collect(&self.machine) {
                let from = u16::from(packet.bytes[11]);
                if packet.bytes[6..12] != mac(3 - n as u16).0 {
                    let others = [mac(0), mac(1), STATION, OUTSIDE];
                    assert!(others.iter().any(|mac| mac.0 == packet.bytes[6..12]), "somebody else's address");
                    continue;
                }
                let stamp = u64::from_le_bytes(packet.bytes[54..62].try_into().unwrap());
                // Packets before this one were dropped: a copy has failed, or there was no room.
                while neighbour.expected.front().is_some_and(|next| *next < stamp) {
                    neighbour.expected.pop_front();
                }
                assert_eq!(neighbour.expected.pop_front(), Some(stamp), "a packet twice, or out of order");
                let (frame, how) = stamped(2 + n as u16, from, stamp);
                assert!(packet.bytes == frame && packet.blank, "a packet is changed");
                assert_eq!(packet.gso.is_some(), how.gso.is_some());
                neighbour.arrived += 1;
            }
            neighbour.front.post(256);
        }
    }

    /// All is well again: everything is answered, and the neighbours lose nothing.
    fn settle(&mut self) {
        self.machine.0.borrow_mut().faults = 0;
        // The hostile guests are gone.
        for n in 0..2 {
            self.renew(n);
        }
        for round in 0.. {
            self.neighbours.iter().for_each(|neighbour| self.switch.attend(neighbour.id));
            self.turn();
            self.now += 10_000_000;
            self.collect();
            if self.neighbours.iter().all(|neighbour| neighbour.front.unanswered() == 0) {
                break;
            }
            assert!(round < 1000, "not all is answered: {:?}", self.switch);
        }
        self.neighbours.iter_mut().for_each(|neighbour| neighbour.expected.clear());
        for _ in 0..200 {
            self.send_stamped(0);
            self.send_stamped(1);
            self.neighbours.iter().for_each(|neighbour| self.switch.attend(neighbour.id));
            (0..8).for_each(|_| self.turn());
            self.collect();
            assert!(self.neighbours.iter().all(|neighbour| neighbour.expected.is_empty()), "a packet is lost");
        }
    }
}

#[test]
fn every_mutated_slot_has_one_answer_and_neighbours_keep_their_bytes() {
    let mut random = Random::new();
    let (mut sent, mut served, mut refused, mut broken, mut arrived, mut most) = (0, 0, 0, 0, 0, 0);
    let mut drops = [0; Drop::ALL.len()];
    for _ in 0..RUNS {
        let mut world = World::new(Random::seeded(random.next()));
        while world.sent < SLOTS / RUNS {
            if world.random.below(200) == 0 {
                let faults = if world.random.below(2) == 0 { 0 } else { world.random.below(60) };
                world.machine.0.borrow_mut().faults = faults;
            }
            world.step();
        }
        for (_, vif) in world.switch.vifs() {
            drops.iter_mut().zip(Drop::ALL).for_each(|(count, reason)| *count += vif.counters().drops.of(reason));
        }
        world.settle();
        sent += world.sent;
        served += world.served;
        refused += world.refused;
        broken += world.broken;
        most = most.max(world.most_copies);
        arrived += world.neighbours.iter().map(|neighbour| neighbour.arrived).sum::<u64>();
    }
    println!("{sent} hostile slots, {served} packets of them served, {refused} dropped; vifs broken: {broken}");
    println!("{arrived} packets between neighbours; at most {most} copies in a turn");
    let names: Vec<_> =
        drops.iter().zip(Drop::ALL).map(|(count, reason)| format!("{} {count}", reason.name())).collect();
    println!("drops of the last vifs: {}", names.join(", "));
    assert!(sent >= SLOTS && served > 100_000 && refused > 100_000 && broken > 100, "the test is lopsided");
    assert!(arrived > 20_000 && most > 100, "the test is lopsided");
}
