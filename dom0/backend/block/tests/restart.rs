//! A back end that dies in the middle of anything, and the next one that goes on by the journals: each request is answered
//! once, and every sector holds what its guest was told.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use block_backend::{Connection, Limits, Queue, VbdId};
use common::death::{alive, until_death};
use common::device::Media;
use common::disks::Partition;
use common::front::whole;
use common::neighbour::Neighbour;
use common::{Device, Faults, Front, Machine, Memory};
use ring_protocol::WordPage;
use std::cell::RefCell;
use std::rc::Rc;
use test_random::Random;

const SECTORS: u64 = 96;

struct World {
    machine: Machine,
    media: Rc<RefCell<Media>>,
    guests: Vec<(Neighbour, Memory)>,
    now: u64,
}

impl World {
    fn new(random: &mut Random, forgets: bool) -> Self {
        let machine = Machine::new(Random::seeded(random.next()), 2);
        let media = Media::new(2 * SECTORS);
        media.borrow_mut().failing_flushes_forget = forgets;
        let guests = (0..2).map(|n| {
            let mut guest = Neighbour::new(n, 1 + n as usize, SECTORS as usize);
            (guest.durable_writes, guest.only_writes) = (!forgets, forgets);
            guest.gives_up_flushes = random.below(2) == 0;
            (guest, Memory::Heap(Rc::new(WordPage::new())))
        });
        Self { machine, media, guests: guests.collect(), now: 0 }
    }

    fn connection(&self, n: usize) -> Connection<Machine> {
        let (guest, journal) = &self.guests[n];
        let disk = Partition::boxed(n as u64 * SECTORS, SECTORS);
        let mut with = self.machine.connection(&guest.front, disk, Limits::default());
        with.journal = journal.clone();
        with
    }

    /// A back end that begins, or goes on where the last one died.
    fn back_end(&self, first: bool) -> (Queue<Machine>, Vec<VbdId>) {
        let (mut queue, _) = self.machine.queue(Some(Device::new(&self.machine, &self.media)));
        let ids = (0..2).map(|n| {
            let with = self.connection(n);
            let id = if first { queue.connect(with, self.now) } else { queue.resume(with, self.now) };
            id.expect("it can be served")
        });
        let ids = ids.collect();
        (queue, ids)
    }

    fn work(&mut self, (queue, ids): &mut (Queue<Machine>, Vec<VbdId>), steps: u64, random: &mut Random) {
        for _ in 0..steps {
            for (guest, _) in &mut self.guests {
                alive(|| guest.ask(&self.machine, random));
            }
            self.serve(queue, ids);
        }
    }

    fn serve(&mut self, queue: &mut Queue<Machine>, ids: &[VbdId]) {
        ids.iter().for_each(|id| queue.attend(*id));
        self.now += 1_000_000;
        let _ = queue.turn(&mut self.machine, self.now);
        while queue.event().is_some() {}
        alive(|| self.guests.iter_mut().for_each(|(guest, _)| guest.collect(&self.machine)));
    }

    /// What comes between two back ends: the device is reset, then the pins that are found are given back.
    fn bury(&mut self, random: &mut Random) {
        let mut device = Device::new(&self.machine, &self.media);
        while disk::Device::reset(&mut device) == disk::Reset::Pending {}
        self.machine.forget_pins();
        if random.below(4) == 0 {
            self.guests.iter_mut().for_each(|(guest, _)| guest.collect(&self.machine));
        }
    }
}

/// A machine whose back ends die. Answers how many, and how many requests were done.
fn live_and_die(random: &mut Random, faults: Faults, forgets: bool) -> (u64, u64) {
    let mut deaths = 0;
    let mut world = World::new(random, forgets);
    world.machine.faults(faults);
    let mut back = Some(world.back_end(true));
    for _ in 0..10 {
        let left = random.below(3000);
        back = until_death(left, || {
            let mut back = back.take().unwrap_or_else(|| world.back_end(false));
            world.work(&mut back, 40, random);
            back
        });
        if back.is_none() {
            deaths += 1;
            world.bury(random);
        }
    }
    let mut back = back.take().unwrap_or_else(|| world.back_end(false));
    world.machine.faults(Faults { device: faults.device, ..Faults::default() });
    for round in 0.. {
        world.serve(&mut back.0, &back.1);
        if world.guests.iter().all(|(guest, _)| guest.is_idle()) {
            break;
        }
        assert!(round < 10_000, "not all is answered: {:?}", back.0);
    }
    assert_eq!(world.machine.pins(), 0);
    let mut media = world.media.borrow_mut();
    media.cut(random);
    for (n, (guest, _)) in world.guests.iter().enumerate() {
        assert_eq!(guest.lost(|sector| media.durable[(n as u64 * SECTORS + sector) as usize]), None);
    }
    (deaths, world.guests.iter().map(|(guest, _)| guest.done).sum())
}

#[test]
fn back_ends_die_and_guests_do_not_notice() {
    let mut random = Random::new();
    let (mut deaths, mut done) = (0, 0);
    for _ in 0..400 {
        let some = if random.below(2) == 0 { 20 } else { 0 };
        let faults = Faults { full: some, copy: some / 4, handles: some, ..Faults::default() };
        let (died, served) = live_and_die(&mut random, faults, false);
        (deaths, done) = (deaths + died, done + served);
    }
    println!("{deaths} deaths, {done} requests done");
    assert!(deaths > 500 && done > 20_000, "the test is lopsided");
}

#[test]
fn an_error_that_is_owed_is_told_by_the_next_back_end() {
    let mut random = Random::new();
    let deaths: u64 =
        (0..1_000).map(|_| live_and_die(&mut random, Faults { device: 150, ..Faults::default() }, true).0).sum();
    assert!(deaths > 1_000, "the test is lopsided");
}

#[test]
fn a_request_at_which_back_ends_die_is_given_up() {
    let machine = Machine::new(Random::seeded(1), 1);
    let media = Media::new(SECTORS);
    let mut front = Front::new(0, 1);
    let journal = Memory::Heap(Rc::new(WordPage::new()));
    front.read(0, &[whole(1)]);
    for life in 0..4 {
        let (mut queue, _) = machine.queue(Some(Device::new(&machine, &media)));
        let mut with = machine.connection(&front, Partition::boxed(0, SECTORS), Limits::default());
        with.journal = journal.clone();
        let _ = if life == 0 { queue.connect(with, 0) } else { queue.resume(with, 0) }.expect("it can be served");
        media.borrow_mut().credit = 0;
        let _ = queue.turn(&mut machine.clone(), 0);
        let answers = front.answers();
        match life {
            0 | 1 => assert_eq!(answers, []),
            2 => assert_eq!(answers, [(0, -1)], "two have died at it"),
            _ => assert_eq!(answers, []),
        }
        machine.forget_pins();
        media.borrow_mut().held.clear();
    }
}
