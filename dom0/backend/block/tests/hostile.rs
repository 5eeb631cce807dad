//! Two guests that write anything into rings, slots and descriptors, beside two that look after their sectors, on a partition
//! and on an overlay in memory, while any call may fail: two million requests.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use block_backend::{Event, Limits, Pins, Queue, VbdId};
use common::device::Media;
use common::disks::{Layered, Partition, Patchwork, Pool};
use common::front::segment;
use common::neighbour::Neighbour;
use common::{Device, FIRST_FREE, Faults, Front, Machine};
use ring_protocol::SharedPage;
use ring_protocol::block::{Segment, Slot, operation};
use std::cell::RefCell;
use std::rc::Rc;
use test_random::Random;
use zerocopy::{FromBytes, IntoBytes};

const SECTORS: u64 = 256;
const REQUESTS: u64 = 2_000_000;
const RUNS: u64 = 20;
const SECOND: u64 = 1_000_000_000;

/// The frame between the memory of the patchwork and that of overlays.
const GUARD: usize = 63;

struct Hostile {
    front: Front,
    id: VbdId,
    /// What is to be dissolved with its disk.
    overlay: Option<Layered>,
}

struct World {
    random: Random,
    machine: Machine,
    media: Rc<RefCell<Media>>,
    queue: Queue<Machine>,
    budget: Rc<Pins>,
    hostile: [Hostile; 2],
    neighbours: [(Neighbour, VbdId); 2],
    pool: Pool,
    now: u64,
    sent: u64,
    broken: u64,
    lost_pins: u64,
}

impl World {
    fn new(mut random: Random) -> Self {
        let machine = Machine::new(Random::seeded(random.next()), 4);
        let media = Media::new(4 * SECTORS);
        let (mut queue, budget) = machine.queue(Some(Device::new(&machine, &media)));
        let free = (GUARD as u64 + 1..common::FRAMES as u64).collect();
        let pool = Pool { machine: machine.clone(), free: Rc::new(RefCell::new(free)) };
        let hostile = [0, 1].map(|n| Self::reconnect(&machine, &pool, &mut queue, &mut random, n));
        let neighbours = [2, 3].map(|n| {
            let neighbour = Neighbour::new(n, 1, SECTORS as usize);
            let disk: Box<dyn disk::Disk> = match n {
                2 => Partition::boxed(2 * SECTORS, SECTORS),
                _ => Box::new(Layered::new(3 * SECTORS, SECTORS, &pool, 1 << 30)),
            };
            let id = machine.connect(&mut queue, &neighbour.front, disk, Limits::default());
            (neighbour, id)
        });
        machine.0.borrow_mut().frames[GUARD].fill(0x63);
        let (now, sent, broken, lost_pins) = (1, 0, 0, 0);
        Self { random, machine, media, queue, budget, hostile, neighbours, pool, now, sent, broken, lost_pins }
    }

    /// A fresh ring for a hostile guest. The disk of the second lies partly or wholly in memory.
    fn reconnect(machine: &Machine, pool: &Pool, queue: &mut Queue<Machine>, random: &mut Random, n: u16) -> Hostile {
        let front = Front::new(n, 1 << random.below(5));
        if random.below(3) == 0 {
            front.page.shifting.set(random.next() | 1);
        }
        let overlay = (n == 1 && random.below(2) == 0).then(|| Layered::new(SECTORS, SECTORS, pool, 20 * 4096));
        let disk = match (n, &overlay) {
            (0, _) => Partition::boxed(0, SECTORS),
            (_, Some(overlay)) => Box::new(overlay.clone()),
            _ => Patchwork::boxed(SECTORS, SECTORS, FIRST_FREE, false),
        };
        let limits = match random.below(4) {
            0 => Limits { bytes_per_second: Some(50_000_000), requests_per_second: Some(20_000) },
            _ => Limits::default(),
        };
        let id = machine.connect(queue, &front, disk, limits);
        Hostile { front, id, overlay }
    }

    fn ids(&self) -> [VbdId; 4] {
        let [first, second] = self.hostile.each_ref().map(|hostile| hostile.id);
        let [third, fourth] = self.neighbours.each_ref().map(|(_, id)| *id);
        [first, second, third, fourth]
    }

    fn collect(&mut self) {
        self.neighbours.iter_mut().for_each(|(neighbour, _)| neighbour.collect(&self.machine));
        self.hostile.iter_mut().for_each(|hostile| drop(hostile.front.answers()));
    }

    fn step(&mut self) {
        let n = self.random.below(2);
        let burst = 1 + self.random.below(40);
        for _ in 0..burst {
            let (random, hostile) = (&mut self.random, &mut self.hostile[n]);
            if hostile.front.put(|id| any_slot(random, id)).is_none() {
                break;
            }
            self.sent += 1;
        }
        let Hostile { front, id, .. } = &mut self.hostile[n];
        let _ = front.ring.publish(&front.page);
        self.queue.attend(*id);
        self.scribble(n);
        for (neighbour, id) in &mut self.neighbours {
            if self.random.below(4) > 0 {
                neighbour.ask(&self.machine, &mut self.random);
            }
            self.queue.attend(*id);
        }
        for _ in 0..1 + self.random.below(4) {
            self.turn();
        }
        self.collect();
        if self.random.below(1000) == 0 {
            self.break_ring(n);
        }
        if self.media.borrow().hangs && self.random.below(10) == 0 {
            self.now += (25 + self.random.below(60)) * SECOND;
            self.queue.reset(self.now);
        }
    }

    /// A hostile guest writes descriptors, and anything, into its pages.
    fn scribble(&mut self, n: usize) {
        let mut state = self.machine.0.borrow_mut();
        let page = &mut state.guests[n][80 + self.random.below(8)];
        for place in page.chunks_exact_mut(8).take(1 + self.random.below(256)) {
            place.copy_from_slice(any_segment(&mut self.random, 60).as_bytes());
        }
    }

    fn turn(&mut self) {
        self.now += self.random.below(200_000);
        let turn = self.queue.turn(&mut self.machine, self.now);
        while let Some(event) = self.queue.event() {
            assert!(!matches!(event, Event::Broken(..)), "an honest ring is broken");
        }
        // What is unanswered waits for the device, or for a clock that rings soon.
        let idle = self.ids().iter().all(|id| self.queue.vbd(*id).is_none_or(|vbd| vbd.unanswered() == 0));
        let soon = turn.wake_ns.is_some_and(|at| at <= self.now + SECOND);
        let held = !self.media.borrow().held.is_empty();
        assert!(turn.again || idle || soon || held, "it sleeps with work to do: {turn:?} {:?}", self.queue);
        if !turn.again
            && let Some(at) = turn.wake_ns
            && self.random.below(4) == 0
        {
            self.now = self.now.max(at);
        }
    }

    /// A hostile guest writes an index. Its vbd is disconnected and connected again.
    fn break_ring(&mut self, n: usize) {
        let Hostile { front, id, .. } = &mut self.hostile[n];
        let wild = self.random.next() as u32;
        let near = front.page.load_u32(0).wrapping_add(self.random.below(600));
        front.page.store_u32(0, if self.random.below(2) == 0 { wild } else { near });
        self.queue.attend(*id);
        let id = *id;
        for _ in 0..self.random.below(5) {
            self.now += 1000;
            let _ = self.queue.turn(&mut self.machine, self.now);
            while let Some(event) = self.queue.event() {
                self.broken += u64::from(matches!(event, Event::Broken(broken, _) if broken == id));
            }
        }
        self.machine.0.borrow_mut().handles = 8192;
        self.queue.disconnect(id);
        let left = self.drained(id);
        self.lost_pins += left.counters.lost_pins;
        if let Some(overlay) = &self.hostile[n].overlay {
            overlay.dissolve();
        }
        self.hostile[n] = Self::reconnect(&self.machine, &self.pool, &mut self.queue, &mut self.random, n as u16);
    }

    fn drained(&mut self, id: VbdId) -> block_backend::Disconnected<Machine> {
        for _ in 0..10_000 {
            if let Some(left) = self.queue.disconnected(id) {
                return left;
            }
            if self.media.borrow().hangs {
                self.now += 61 * SECOND;
                self.queue.reset(self.now);
            }
            self.now += 1_000_000;
            let _ = self.queue.turn(&mut self.machine, self.now);
            while self.queue.event().is_some() {}
        }
        panic!("a vbd does not drain: {:?}", self.queue);
    }

    /// All is well again: everything is answered, and nothing is left. Answers how many hostile requests were carried out.
    fn settle(&mut self) -> u64 {
        self.machine.faults(Faults::default());
        self.machine.0.borrow_mut().handles = 8192;
        self.now += 100 * SECOND;
        if self.media.borrow().hangs {
            self.queue.reset(self.now);
        }
        for round in 0.. {
            self.ids().into_iter().for_each(|id| self.queue.attend(id));
            self.turn();
            self.now += 10_000_000;
            self.collect();
            let waits = self.hostile.iter().any(|hostile| !hostile.front.waiting.is_empty());
            if !waits && self.neighbours.iter().all(|(neighbour, _)| neighbour.is_idle()) {
                break;
            }
            assert!(round < 20_000, "not all is answered: {:?}", self.queue);
        }
        let counters = self.ids().map(|id| self.queue.vbd(id).unwrap().counters());
        let lost: u64 = self.lost_pins + counters.iter().map(|counters| counters.lost_pins).sum::<u64>();
        assert_eq!((self.machine.pins() as u64, u64::from(self.budget.used())), (lost, lost), "pins are left");
        assert!(lost == 0 || self.queue.is_lost());
        assert!(self.machine.0.borrow().frames[GUARD].iter().all(|byte| *byte == 0x63), "a frame of somebody else's");
        let [first, second, ..] = counters;
        [first, second].iter().map(|c| c.reads + c.writes + c.flushes + c.discards).sum()
    }
}

fn any_segment(random: &mut Random, known: u32) -> Segment {
    let reference = if random.below(200) == 0 { random.next() as u32 } else { random.below(known) };
    match random.below(100) {
        0 => Segment { reference, first: random.next() as u8, last: random.next() as u8, padding: 1 },
        _ => {
            let first = random.below(8);
            segment(reference, first, first + random.below(8 - first))
        }
    }
}

fn any_slot(random: &mut Random, id: u64) -> Slot {
    let sector = random.below(SECTORS + 8);
    let op = [operation::READ, operation::WRITE][random.below(2)];
    let segments: Vec<Segment> = (0..1 + random.below(4)).map(|_| any_segment(random, 90)).collect();
    let slot = match random.below(16) {
        0 => Slot::direct(operation::FLUSH, id, 0, &[]),
        1 => Slot::direct(operation::FLUSH, id, sector, &segments),
        2 => Slot::discard(id, sector, random.below(20)),
        3 => Slot::direct(random.next() as u8, id, sector, &segments),
        4 | 5 => Slot::indirect(op, id, sector, random.below(40), 80 + random.below(8)),
        6 if random.below(8) == 0 => Slot::indirect(op, id, sector, random.below(300), random.below(120)),
        _ => Slot::direct(op, id, sector, &segments),
    };
    let mut bytes: [u8; 112] = slot.as_bytes().try_into().unwrap();
    if random.below(4) == 0 {
        for _ in 0..1 + random.below(3) {
            let at = random.below(112);
            bytes[if (8..16).contains(&at) { 0 } else { at }] = random.next() as u8;
        }
    }
    Slot::read_from_bytes(&bytes).unwrap()
}

fn any_faults(random: &mut Random, deadly: bool) -> Faults {
    let mut some = |most: u64| if random.below(3) == 0 { random.below(most) } else { 0 };
    let [copy, pin, handles, device, full] = [50, 30, 30, 100, 300].map(&mut some);
    let (hang, needs_reset) = (some(3), some(3));
    let dead = if deadly { 200 } else { 0 };
    Faults { copy, pin, handles, device, full, hang, needs_reset, dead }
}

#[test]
fn every_mutated_request_has_one_answer_and_nothing_is_left() {
    let mut random = Random::new();
    let (mut sent, mut served, mut broken, mut done, mut failed, mut resets) = (0, 0, 0, 0, 0, 0);
    for run in 0..RUNS {
        let mut world = World::new(Random::seeded(random.next()));
        while world.sent < REQUESTS / RUNS {
            if world.random.below(200) == 0 {
                let faults = any_faults(&mut world.random, run % 5 == 4);
                world.machine.faults(faults);
                // Handles for all, for a few requests, or for not even the longest.
                let handles = [8192, 8192, 300, 40][world.random.below(4)];
                world.machine.0.borrow_mut().handles = handles;
            }
            world.step();
        }
        served += world.settle();
        sent += world.sent;
        broken += world.broken;
        for (neighbour, _) in &world.neighbours {
            (done, failed) = (done + neighbour.done, failed + neighbour.failed);
        }
        resets += world.media.borrow().resets;
    }
    println!("{sent} hostile requests, at least {served} carried out; rings broken: {broken}; resets: {resets}");
    println!("the neighbours: {done} done, {failed} failed");
    assert!(sent >= REQUESTS && served > 50_000 && broken > 30, "the test is lopsided");
    assert!(done > 50_000 && failed > 1_000 && resets > 50, "the test is lopsided");
}
