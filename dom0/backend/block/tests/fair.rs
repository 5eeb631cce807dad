//! What a guest gets beside others that want all: places in the device, bytes, pins; and what a person allows it.

#![allow(clippy::cast_possible_truncation, reason = "small numbers become bytes")]
mod common;

use block_backend::{DATA_PINS, FLIGHTS, Limits, Pins, Queue, VbdId};
use common::device::Media;
use common::disks::{Partition, Patchwork};
use common::front::whole;
use common::{Device, FIRST_FREE, Front, Machine, turns};
use ring_protocol::block::operation;
use std::cell::RefCell;
use std::rc::Rc;
use test_random::Random;

const SECTORS: u64 = 4096;

/// Guests on one device that carries out its operations in order, and only as many as a test lets it.
struct Shared {
    machine: Machine,
    media: Rc<RefCell<Media>>,
    queue: Queue<Machine>,
    budget: Rc<Pins>,
    guests: Vec<(Front, VbdId)>,
    /// Bytes answered, and requests.
    served: Vec<(u64, u64)>,
    sizes: Vec<usize>,
    now: u64,
}

impl Shared {
    /// Guests that keep their rings full of requests of so many pages.
    fn new(sizes: &[usize]) -> Self {
        let machine = Machine::new(Random::seeded(1), sizes.len());
        let media = Media::new(SECTORS);
        (media.borrow_mut().ordered, media.borrow_mut().credit) = (true, 0);
        let (mut queue, budget) = machine.queue(Some(Device::new(&machine, &media)));
        let guests = (0..sizes.len()).map(|n| {
            let front = Front::new(n as u16, 16);
            let id = machine.connect(&mut queue, &front, Partition::boxed(0, SECTORS), Limits::default());
            (front, id)
        });
        let guests: Vec<_> = guests.collect();
        let served = vec![(0, 0); sizes.len()];
        Self { machine, media, queue, budget, guests, served, sizes: sizes.to_vec(), now: 0 }
    }

    fn fill(&mut self, n: usize, at_most: usize) {
        let segments: Vec<_> = (0..self.sizes[n]).map(|page| whole(page as u32 % 88)).collect();
        let (front, id) = &mut self.guests[n];
        while front.waiting.len() < at_most
            && front.indirect(&self.machine, operation::READ, 0, &segments, 90).is_some()
        {}
        self.queue.attend(*id);
    }

    /// The device completes one operation. Answers how many each guest has been answered.
    fn tick(&mut self) {
        self.media.borrow_mut().credit = 1;
        self.now += 100_000;
        let _ = turns(&mut self.queue, &mut self.machine, self.now);
        for (n, (front, _)) in self.guests.iter_mut().enumerate() {
            for (_, status) in front.answers() {
                assert_eq!(status, 0);
                self.served[n].0 += self.sizes[n] as u64 * 4096;
                self.served[n].1 += 1;
            }
        }
        assert!(self.budget.used() <= DATA_PINS && self.machine.pins() <= DATA_PINS as usize);
        assert!(self.media.borrow().most_held <= FLIGHTS);
    }
}

#[test]
fn one_small_request_at_a_time_waits_for_half_a_device() {
    let mut shared = Shared::new(&[32, 1]);
    shared.fill(0, 512);
    for _ in 0..100 {
        shared.tick();
    }
    assert_eq!(shared.media.borrow().most_held, FLIGHTS, "alone it may have all");
    let mut longest = 0;
    for round in 0..50 {
        let (before, mut waited) = (shared.served[1].1, 0);
        while shared.served[1].1 == before {
            shared.fill(0, 512);
            shared.fill(1, 1);
            shared.tick();
            waited += 1;
        }
        // The first finds the device full.
        longest = if round == 0 { 0 } else { waited.max(longest) };
    }
    assert!(longest <= FLIGHTS / 2 + 2, "it waited for {longest} operations");
}

#[test]
fn many_guests_share_by_bytes() {
    let sizes: Vec<usize> = (0..16).map(|n| if n % 2 == 0 { 32 } else { 1 }).collect();
    let mut shared = Shared::new(&sizes);
    for _ in 0..30_000 {
        (0..16).for_each(|n| shared.fill(n, 16));
        shared.tick();
    }
    let costs: Vec<u64> = shared.served.iter().map(|(bytes, requests)| bytes + requests * 16384).collect();
    let (least, most) = (costs.iter().min().unwrap(), costs.iter().max().unwrap());
    assert!(*least * 10 > *most * 8, "{costs:?}");
}

#[test]
fn pins_are_shared_too() {
    // 64 requests of 256 segments would take 16,384 pins.
    let mut shared = Shared::new(&[256, 256, 1]);
    let mut longest = 0;
    for round in 0..30 {
        let (before, mut waited) = (shared.served[2].1, 0);
        while shared.served[2].1 == before {
            shared.fill(0, 100);
            shared.fill(1, 100);
            shared.fill(2, 1);
            shared.tick();
            waited += 1;
        }
        longest = if round < 2 { 0 } else { waited.max(longest) };
    }
    // Each of the large ones has 2,048 pins: 8 requests.
    assert!(longest <= 20, "it waited for {longest} operations");
}

#[test]
fn a_turn_ends_though_memory_is_never_busy() {
    let mut machine = Machine::new(Random::seeded(6), 1);
    let (mut queue, _) = machine.queue(None);
    let mut front = Front::new(0, 16);
    let disk = Patchwork::boxed(0, 256, FIRST_FREE, true);
    let id = machine.connect(&mut queue, &front, disk, Limits::default());
    let segments: Vec<_> = (0..32).map(|page| whole(page % 80)).collect();
    while front.waiting.len() < 200 && front.indirect(&machine, operation::WRITE, 0, &segments, 90).is_some() {}
    queue.attend(id);
    let mut rounds = 0;
    while !front.waiting.is_empty() {
        assert!(queue.turn(&mut machine, 0).again || front.waiting.len() <= 32);
        let answered = front.answers().len();
        assert!(answered <= 30, "{answered} requests of 128 KiB in a turn");
        rounds += 1;
    }
    assert!((7..40).contains(&rounds), "{rounds}");
}

#[test]
fn few_handles_make_requests_wait_and_not_fail() {
    let mut shared = Shared::new(&[30, 30, 30]);
    shared.machine.0.borrow_mut().handles = 40;
    for n in 0..3 {
        shared.fill(n, 64);
    }
    for _ in 0..3 * 64 {
        shared.tick();
    }
    assert_eq!(shared.served.iter().map(|(_, requests)| *requests).collect::<Vec<_>>(), [64; 3]);
}

#[test]
fn a_disk_passes_as_many_bytes_and_requests_as_it_may() {
    let mut machine = Machine::new(Random::seeded(5), 2);
    let media = Media::new(SECTORS);
    let (mut queue, _) = machine.queue(Some(Device::new(&machine, &media)));
    let limits = [
        Limits { bytes_per_second: Some(1_000_000), requests_per_second: None },
        Limits { bytes_per_second: None, requests_per_second: Some(200) },
    ];
    let mut guests = [0, 1].map(|n| {
        let front = Front::new(n, 1);
        let id = machine.connect(&mut queue, &front, Partition::boxed(0, SECTORS), limits[usize::from(n)]);
        (front, id, 0u64)
    });
    let (mut now, mut idle) = (0, 0);
    while now < 10_000_000_000 {
        for (front, id, answered) in &mut guests {
            *answered += front.answers().len() as u64;
            while front.read(0, &[whole(1), whole(2)]).is_some() {}
            queue.attend(*id);
        }
        let (turn, _) = turns(&mut queue, &mut machine, now);
        let wake = turn.wake_ns.expect("it waits for the clock");
        idle += u64::from(wake > now);
        now = wake.max(now + 10_000);
    }
    let [bytes, requests] = guests.map(|(_, _, answered)| answered);
    assert!((1180..=1270).contains(&bytes), "{bytes} requests of 8 KiB in 10 s");
    assert!((1990..=2040).contains(&requests), "{requests} requests in 10 s");
    assert!(idle > 1000, "it sleeps in between");
}
