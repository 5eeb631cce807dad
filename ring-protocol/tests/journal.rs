//! A back end killed at every store: what it answered is not carried out again, what it took and did not answer is.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use ring_protocol::block::journal::{Entry, JournalError, Ring, TRIES, journal_bytes};
use ring_protocol::block::{Response, Slot, Status, operation};
use ring_protocol::ring::{FrontRing, Layout, RingError};
use ring_protocol::{SharedPage, WordPage};
use test_random::Random;
use zerocopy::{FromBytes, IntoBytes};

const SLOTS: u32 = 4;
const WORDS: usize = 256;

/// How many stores the back end may still make. From then on it is dead, and its stores get lost.
#[derive(Clone, Default)]
struct Life(Rc<Cell<u64>>);

impl Life {
    fn store(&self) -> bool {
        let left = self.0.get();
        self.0.set(left.saturating_sub(1));
        left > 0
    }
    fn is_over(&self) -> bool {
        self.0.get() == 0
    }
}

/// Memory as the back end sees it; the death may come between any two words.
struct Mortal<'a> {
    memory: &'a WordPage<WORDS>,
    life: Life,
}

impl SharedPage for Mortal<'_> {
    fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.memory.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        if self.life.store() {
            self.memory.store_u32(offset, value);
        }
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.memory.read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        for (at, word) in from.chunks(4).enumerate() {
            if self.life.store() {
                self.memory.write(offset + 4 * at, word);
            }
        }
    }
}

fn layout() -> Layout {
    Layout::new(64 + SLOTS as usize * 112, 112).unwrap()
}

/// The guest, the two memories that outlive a back end, and what has been carried out.
struct World {
    ring: WordPage<WORDS>,
    journal: WordPage<WORDS>,
    front: FrontRing,
    next_id: u64,
    /// Requests without an answer that the front end has seen.
    waiting: BTreeMap<u64, ()>,
    /// How often each request was carried out.
    carried_out: BTreeMap<u64, u32>,
}

impl World {
    fn new() -> Self {
        let (ring, journal) = (WordPage::new(), WordPage::new());
        let front = FrontRing::init(&ring, layout());
        Self { ring, journal, front, next_id: 0, waiting: BTreeMap::new(), carried_out: BTreeMap::new() }
    }

    fn submit(&mut self, count: u64) {
        for _ in 0..count {
            let slot = Slot::direct(operation::FLUSH, self.next_id, 0, &[]);
            if self.front.submit(&self.ring, slot.as_bytes()).unwrap().is_none() {
                break;
            }
            self.waiting.insert(self.next_id, ());
            self.next_id += 1;
        }
        let _ = self.front.publish(&self.ring);
    }

    fn collect(&mut self) {
        self.front.look(&self.ring).unwrap();
        let mut bytes = [0; 16];
        while self.front.take(&self.ring, &mut bytes).is_some() {
            let response = Response::read_from_bytes(&bytes).unwrap();
            assert_eq!((response.operation, response.status), (operation::FLUSH, 0));
            self.waiting.remove(&response.id).expect("a second answer, or one to nothing");
            assert!(self.carried_out[&response.id] > 0, "answered but never carried out");
        }
    }

    fn carry_out(&mut self, slot: &Slot) {
        let id = slot.head().id;
        assert!(self.waiting.contains_key(&id), "{id} was answered, and is carried out again");
        *self.carried_out.entry(id).or_default() += 1;
    }

    fn mortal<'a>(memory: &'a WordPage<WORDS>, life: &Life) -> Mortal<'a> {
        Mortal { memory, life: life.clone() }
    }
}

/// What is known only to a living back end.
struct Back {
    ring: Ring,
    taken: Vec<(Entry, Slot)>,
}

/// A back end of `lifetime` stores at work, front end in between. True: it lived through `steps`.
fn live(world: &mut World, random: &mut Random, lifetime: u64, steps: u32, first: bool) -> bool {
    let life = Life::default();
    life.0.set(lifetime);
    let begun = {
        let (page, journal) = (World::mortal(&world.ring, &life), World::mortal(&world.journal, &life));
        if first { Ring::begin(&page, &journal, layout()) } else { Ring::recover(&page, &journal, layout()) }
    };
    let ring = begun.expect("a journal that cannot be used");
    let taken: Vec<_> = ring.resumed(&world.journal).map(|(entry, slot, _)| (entry, slot)).collect();
    let mut back = Back { ring, taken };
    for (_, slot) in back.taken.clone() {
        if !life.is_over() {
            world.carry_out(&slot);
        }
    }
    for _ in 0..steps {
        if life.is_over() {
            return false;
        }
        step(world, &mut back, random, &life);
    }
    finish(world, &mut back, &life);
    !life.is_over()
}

fn step(world: &mut World, back: &mut Back, random: &mut Random, life: &Life) {
    match random.below(5) {
        0 => world.submit(random.below(4)),
        1 => world.collect(),
        2 => take(world, back, life),
        3 if !back.taken.is_empty() => {
            let (entry, _) = back.taken.swap_remove(random.below(back.taken.len()));
            let (page, journal) = (World::mortal(&world.ring, life), World::mortal(&world.journal, life));
            back.ring.answer(&page, &journal, entry, Status::Okay).unwrap();
        }
        _ => drop(back.ring.publish(&World::mortal(&world.ring, life), &World::mortal(&world.journal, life))),
    }
}

fn take(world: &mut World, back: &mut Back, life: &Life) {
    back.ring.look(&world.ring).unwrap();
    loop {
        let next = back.ring.take(&World::mortal(&world.ring, life), &World::mortal(&world.journal, life));
        let Some((entry, slot)) = next else { return };
        if life.is_over() {
            return;
        }
        world.carry_out(&slot);
        back.taken.push((entry, slot));
    }
}

/// Answers all that is left.
fn finish(world: &mut World, back: &mut Back, life: &Life) {
    for round in 0.. {
        if world.waiting.is_empty() || life.is_over() {
            return;
        }
        assert!(round < 100, "never answered: {:?}", world.waiting.keys());
        take(world, back, life);
        for (entry, _) in back.taken.drain(..) {
            let (page, journal) = (World::mortal(&world.ring, life), World::mortal(&world.journal, life));
            back.ring.answer(&page, &journal, entry, Status::Okay).unwrap();
        }
        let _ = back.ring.publish(&World::mortal(&world.ring, life), &World::mortal(&world.journal, life));
        world.collect();
    }
}

#[test]
fn a_death_at_any_store_loses_and_repeats_no_answer() {
    let mut random = Random::new();
    let seed = random.next();
    let beginning = 2 * u64::from(SLOTS) + 3;
    let mut deaths = 0;
    for lifetime in beginning.. {
        let mut world = World::new();
        if live(&mut world, &mut Random::seeded(seed), lifetime, 200, true) {
            break;
        }
        deaths += 1;
        // A few more die at once, some of them while they recover; the last one lives.
        for _ in 0..random.below(3) {
            let lifetime = random.below(60);
            live(&mut world, &mut random, lifetime, 20, false);
            deaths += 1;
        }
        assert!(live(&mut world, &mut random, u64::MAX, 20, false));
        assert!(world.waiting.is_empty());
    }
    assert!(deaths > 500, "only {deaths} deaths: the test is too short");
}

#[test]
fn random_deaths_at_length() {
    let mut random = Random::new();
    for _ in 0..2_000 {
        let mut world = World::new();
        live(&mut world, &mut random, 10_000, 10, true);
        for _ in 0..8 {
            let lifetime = random.below(400);
            live(&mut world, &mut random, lifetime, 30, false);
        }
        assert!(live(&mut world, &mut random, u64::MAX, 30, false));
        assert!(world.waiting.is_empty());
    }
}

#[test]
fn a_request_that_kills_twice_is_known() {
    let mut world = World::new();
    let Ok(mut ring) = Ring::begin(&world.ring, &world.journal, layout()) else { panic!("a fresh ring") };
    world.submit(1);
    ring.look(&world.ring).unwrap();
    let (entry, slot) = ring.take(&world.ring, &world.journal).unwrap();
    for death in 1..=3 {
        let ring = Ring::recover(&world.ring, &world.journal, layout()).unwrap();
        let resumed: Vec<_> = ring.resumed(&world.journal).collect();
        assert_eq!(resumed, [(entry, slot, death >= TRIES)]);
    }
}

#[test]
fn a_journal_that_was_scribbled_over_is_not_believed() {
    let recover = |world: &World| Ring::recover(&world.ring, &world.journal, layout()).map(|_| ());
    let mut world = World::new();
    assert_eq!(recover(&world), Err(JournalError::Foreign), "there is none yet");
    let mut ring = Ring::begin(&world.ring, &world.journal, layout()).unwrap();
    world.submit(2);
    ring.look(&world.ring).unwrap();
    let (entry, _) = ring.take(&world.ring, &world.journal).unwrap();
    ring.answer(&world.ring, &world.journal, entry, Status::Okay).unwrap();
    assert_eq!(
        ring.answer(&world.ring, &world.journal, entry, Status::Okay),
        Err(RingError::NothingToAnswer),
        "no request is answered twice"
    );
    let (second, _) = ring.take(&world.ring, &world.journal).unwrap();
    assert_eq!(recover(&world), Ok(()));
    let at = 128 * (second.number() + 1);
    for word in [0, 2, 27, 28, 30, 31] {
        let before = world.journal.load_u32(at + 4 * word);
        world.journal.store_u32(at + 4 * word, before ^ 0x0400_0000);
        assert_eq!(recover(&world), Err(JournalError::Damaged), "word {word}");
        world.journal.store_u32(at + 4 * word, before);
    }
    let larger = Layout::new(64 + 8 * 112, 112).unwrap();
    assert_eq!(Ring::recover(&world.ring, &world.journal, larger).map(|_| ()), Err(JournalError::Size));
    assert_eq!(journal_bytes(32), 33 * 128);
}
