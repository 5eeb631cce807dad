//! What each kind of request does, and how it is answered.

#![allow(clippy::cast_possible_truncation, reason = "small numbers become bytes")]
mod common;

use block_backend::{Event, LATE_NS, Limits, Queue, VbdId};
use common::device::{Media, SECTOR};
use common::disks::{Partition, Patchwork};
use common::front::{segment, whole};
use common::{Device, FIRST_FREE, Front, Machine, Random, turns};
use ring_protocol::SharedPage;
use ring_protocol::block::{Slot, operation};
use std::cell::RefCell;
use std::rc::Rc;

const SECOND: u64 = 1_000_000_000;

/// A device of 2,048 sectors with a partition of 1,024 for each of two guests.
struct Two {
    machine: Machine,
    media: Rc<RefCell<Media>>,
    queue: Queue<Machine>,
    fronts: [Front; 2],
    ids: [VbdId; 2],
    now: u64,
}

impl Two {
    fn new() -> Self {
        let machine = Machine::new(Random::seeded(1), 2);
        let media = Media::new(2048);
        let (mut queue, _) = machine.queue(Some(Device::new(&machine, &media)));
        let fronts = [0, 1].map(|domain| Front::new(domain, 1));
        let ids = [0, 1].map(|n| {
            let disk = Partition::boxed(n as u64 * 1024, 1024);
            machine.connect(&mut queue, &fronts[n], disk, Limits::default())
        });
        Self { machine, media, queue, fronts, ids, now: 1 }
    }

    fn run(&mut self) -> Vec<Event> {
        self.ids.iter().for_each(|id| self.queue.attend(*id));
        self.now += 1000;
        let (_, events) = turns(&mut self.queue, &mut self.machine, self.now);
        events
    }

    /// Runs, and answers the statuses of a guest, oldest request first.
    fn statuses(&mut self, guest: usize) -> Vec<i16> {
        self.run();
        let mut answers = self.fronts[guest].answers();
        answers.sort_unstable();
        answers.into_iter().map(|(_, status)| status).collect()
    }

    fn fill(&mut self, guest: usize, page: usize, byte: u8) {
        self.machine.0.borrow_mut().guests[guest][page].fill(byte);
    }

    fn page(&self, guest: usize, page: usize) -> Vec<u8> {
        self.machine.0.borrow().guests[guest][page].to_vec()
    }
}

#[test]
fn what_is_written_is_read_on_the_own_partition() {
    let mut two = Two::new();
    two.fill(1, 3, 0xab);
    two.fronts[1].write(8, &[whole(3), segment(3, 2, 4)]);
    assert_eq!(two.statuses(1), [0]);
    assert_eq!(two.media.borrow().read(1024 + 8 + 10), [0xab; SECTOR]);
    assert_eq!(two.media.borrow().read(8), [0; SECTOR]);
    two.fronts[1].read(18, &[segment(5, 1, 1), segment(5, 7, 7)]);
    assert_eq!(two.statuses(1), [0]);
    let page = two.page(1, 5);
    assert!(page[512..1024].iter().all(|byte| *byte == 0xab) && page[1024..].iter().all(|byte| *byte == 0));
    let counters = two.queue.vbd(two.ids[1]).unwrap().counters();
    assert_eq!((counters.reads, counters.sectors_read, counters.writes, counters.sectors_written), (1, 2, 1, 11));
    assert_eq!(two.machine.pins(), 0);
    assert_eq!(two.machine.0.borrow().notified[1], 2);
}

#[test]
fn each_refusal_has_its_status() {
    let mut two = Two::new();
    let front = &mut two.fronts[0];
    front.read(1020, &[whole(1)]);
    front.read(0, &[whole(95), whole(1)]);
    front.read(0, &[whole(500)]);
    front.send(|id| Slot::direct(operation::BARRIER, id, 0, &[whole(1)]));
    front.send(|id| Slot::direct(operation::RESERVED, id, 0, &[]));
    front.send(|id| Slot::direct(200, id, 0, &[]));
    front.send(|id| Slot::discard(id, 0, 0));
    front.write(0, &[whole(95)]);
    assert_eq!(two.statuses(0), [-1, -1, -1, -2, -2, -2, -1, 0]);
    let counters = two.queue.vbd(two.ids[0]).unwrap().counters();
    assert_eq!((counters.refused, counters.errors, counters.writes), (5, 2, 1));
    assert_eq!(two.machine.pins(), 0);
}

#[test]
fn a_batch_is_pinned_and_unpinned_in_one_call_each() {
    let mut two = Two::new();
    for n in 0..32 {
        two.fronts[0].read(n * 8, &[whole(1 + n as u32)]);
    }
    assert_eq!(two.statuses(0), [0; 32]);
    let calls = two.machine.0.borrow().calls;
    assert_eq!(calls.pin, 1);
    assert_eq!(calls.copy, 0);
    assert!(two.machine.0.borrow().notified[0] <= calls.unpin);
}

#[test]
fn an_indirect_request_may_have_256_segments() {
    let mut two = Two::new();
    let segments: Vec<_> = (0..120).map(|n| segment(n % 80, 1, 5)).collect();
    for n in 0..80 {
        two.fill(0, n, n as u8);
    }
    let machine = two.machine.clone();
    two.fronts[0].indirect(&machine, operation::WRITE, 100, &segments, 90);
    assert_eq!(two.statuses(0), [0]);
    assert_eq!(two.media.borrow().read(100 + 5 * 79), [79; SECTOR]);
    // One page more often than the hypervisor lets it be used: the request fails, and leaves nothing pinned.
    two.fronts[0].indirect(&machine, operation::WRITE, 0, &[segment(7, 0, 0); 256], 90);
    assert_eq!(two.statuses(0), [-1]);
    two.fronts[0].indirect(&machine, operation::WRITE, 0, &[segment(7, 0, 0); 255], 90);
    assert_eq!(two.statuses(0), [0]);
    assert_eq!(two.machine.pins(), 0);
    // Descriptors that are not granted, or nonsense.
    two.fronts[0].send(|id| Slot::indirect(operation::READ, id, 0, 5, 1000));
    two.fronts[0].indirect(&machine, operation::READ, 0, &[segment(1, 5, 4)], 90);
    assert_eq!(two.statuses(0), [-1, -1]);
}

#[test]
fn memory_and_device_take_turns_within_a_request() {
    for memory_only in [false, true] {
        let mut machine = Machine::new(Random::seeded(2), 1);
        let media = Media::new(256);
        let device = (!memory_only).then(|| Device::new(&machine, &media));
        let (mut queue, _) = machine.queue(device);
        let mut front = Front::new(0, 1);
        let disk = Patchwork::boxed(0, 256, FIRST_FREE, memory_only);
        let id = machine.connect(&mut queue, &front, disk, Limits::default());
        let mut run = |front: &mut Front, machine: &mut Machine| {
            queue.attend(id);
            let _ = turns(&mut queue, machine, 0);
            front.answers()
        };
        front.read(0, &[whole(1)]);
        machine.0.borrow_mut().guests[0][1].fill(9);
        assert_eq!(run(&mut front, &mut machine), [(0, 0)]);
        assert!(machine.0.borrow().guests[0][1].iter().all(|byte| *byte == 0), "never written: zeroes");
        for page in 1..9 {
            machine.0.borrow_mut().guests[0][page].fill(page as u8);
        }
        let pages: Vec<_> = (1..9).map(whole).collect();
        front.write(33, &pages);
        assert_eq!(run(&mut front, &mut machine), [(1, 0)]);
        let pages: Vec<_> = (11..19).map(whole).collect();
        front.read(33, &pages);
        assert_eq!(run(&mut front, &mut machine), [(2, 0)]);
        let state = machine.0.borrow();
        for page in 1..9 {
            assert_eq!(state.guests[0][page], state.guests[0][page + 10], "{page}");
        }
    }
}

#[test]
fn flushes_join_the_next_and_are_one_in_the_device() {
    let mut two = Two::new();
    two.media.borrow_mut().credit = 0;
    two.fronts[0].flush();
    two.run();
    for _ in 0..5 {
        two.fronts[0].flush();
        two.fronts[1].flush();
    }
    two.run();
    two.media.borrow_mut().credit = u64::MAX;
    assert_eq!(two.statuses(0), [0; 6]);
    assert_eq!(two.statuses(1), [0; 5]);
    assert_eq!(two.media.borrow().flushes, 2);
}

#[test]
fn a_durable_write_is_flush_write_flush() {
    let mut two = Two::new();
    two.fill(0, 1, 5);
    two.fronts[0].send(|id| Slot::direct(operation::FLUSH, id, 0, &[whole(1)]));
    assert_eq!(two.statuses(0), [0]);
    assert_eq!(two.media.borrow().flushes, 2);
    assert_eq!(two.media.borrow().durable[7], [5; SECTOR]);
}

#[test]
fn a_disk_without_a_cache_answers_flushes_at_once() {
    let mut machine = Machine::new(Random::seeded(3), 1);
    let media = Media::new(64);
    media.borrow_mut().volatile = false;
    let (mut queue, _) = machine.queue(Some(Device::new(&machine, &media)));
    let mut front = Front::new(0, 1);
    let disk = Box::new(Partition { first: 0, sectors: 64, volatile: false, read_only: true });
    let id = machine.connect(&mut queue, &front, disk, Limits::default());
    front.flush();
    front.write(0, &[whole(1)]);
    front.send(|id| Slot::discard(id, 0, 8));
    front.read(0, &[whole(1)]);
    queue.attend(id);
    let _ = turns(&mut queue, &mut machine, 0);
    let mut answers = front.answers();
    answers.sort_unstable();
    // Read only: the write fails, and there is no discard.
    assert_eq!(answers.iter().map(|(_, status)| *status).collect::<Vec<_>>(), [0, -1, -1, 0]);
    assert_eq!(media.borrow().flushes, 0);
}

#[test]
fn a_failed_flush_is_told_to_all_with_unflushed_writes_once() {
    let mut two = Two::new();
    two.fronts[0].write(0, &[whole(1)]);
    two.fronts[1].write(0, &[whole(1)]);
    assert_eq!((two.statuses(0), two.statuses(1)), (vec![0], vec![0]));
    two.media.borrow_mut().failing_flushes = 1;
    two.fronts[0].flush();
    assert_eq!(two.statuses(0), [-1]);
    two.fronts[1].flush();
    assert_eq!(two.statuses(1), [-1], "its writes may be lost too");
    for guest in [0, 1] {
        two.fronts[guest].flush();
        assert_eq!(two.statuses(guest), [0], "it was told");
    }
    // Who has nothing to lose is not told of it.
    two.fronts[0].write(0, &[whole(1)]);
    two.statuses(0);
    two.media.borrow_mut().failing_flushes = 1;
    two.fronts[0].flush();
    assert_eq!(two.statuses(0), [-1]);
    two.fronts[1].flush();
    assert_eq!(two.statuses(1), [0]);
    two.fronts[1].write(0, &[whole(1)]);
    assert_eq!(two.statuses(1), [0]);
    two.fronts[1].flush();
    assert_eq!(two.statuses(1), [0]);
}

#[test]
fn a_late_device_is_reported_once_and_waited_for() {
    let mut two = Two::new();
    two.media.borrow_mut().hangs = true;
    two.fronts[0].read(0, &[whole(1)]);
    assert_eq!(two.run(), []);
    two.now += LATE_NS - 2000;
    assert_eq!(two.run(), []);
    two.now += SECOND;
    let late = two.run();
    assert!(matches!(late[..], [Event::Late { operations: 1, waited_ns }] if waited_ns >= LATE_NS), "{late:?}");
    two.now += 3600 * SECOND;
    assert_eq!(two.run(), []);
    two.media.borrow_mut().hangs = false;
    assert_eq!(two.run(), [Event::Answers]);
    assert_eq!(two.statuses(0), [0]);
}

/// Turns until a reset is over.
fn through_reset(two: &mut Two) -> Vec<Event> {
    (0..20).flat_map(|_| two.run()).collect()
}

#[test]
fn after_a_reset_what_is_unanswered_is_issued_again() {
    let mut two = Two::new();
    two.fill(0, 1, 0x77);
    two.media.borrow_mut().hangs = true;
    two.fronts[0].write(0, &[whole(1)]);
    two.fronts[0].flush();
    two.fronts[1].read(0, &[whole(1)]);
    two.run();
    assert_eq!(two.machine.pins(), 2);
    two.queue.reset(two.now);
    let events = through_reset(&mut two);
    assert_eq!(events, [Event::Resetting { operations: 3 }, Event::Reset { failed: 0 }]);
    assert_eq!((two.statuses(0), two.statuses(1)), (vec![0, 0], vec![0]));
    assert_eq!(two.media.borrow().read(7), [0x77; SECTOR]);
    assert_eq!(two.media.borrow().flushes, 2, "one after the reset, one that was asked for");
    assert_eq!(two.machine.pins(), 0);
}

#[test]
fn a_second_reset_within_a_minute_fails_what_the_device_has() {
    let mut two = Two::new();
    two.media.borrow_mut().asks_for_reset = true;
    two.fronts[0].read(0, &[whole(1)]);
    through_reset(&mut two);
    assert_eq!(two.statuses(0), [0]);
    two.media.borrow_mut().hangs = true;
    two.fronts[0].read(0, &[whole(1)]);
    two.run();
    two.now += 50 * SECOND;
    two.media.borrow_mut().asks_for_reset = true;
    let events = through_reset(&mut two);
    assert!(events.contains(&Event::Reset { failed: 1 }), "{events:?}");
    assert_eq!(two.statuses(0), [-1]);
    two.now += 61 * SECOND;
    two.media.borrow_mut().asks_for_reset = true;
    two.fronts[0].read(0, &[whole(1)]);
    through_reset(&mut two);
    assert_eq!(two.statuses(0), [0], "a minute later it is worth another try");
    assert_eq!(two.machine.pins(), 0);
}

#[test]
fn a_failed_flush_after_a_reset_fails_what_the_device_has() {
    let mut two = Two::new();
    two.media.borrow_mut().hangs = true;
    two.fronts[0].read(0, &[whole(1)]);
    two.run();
    two.media.borrow_mut().failing_flushes = 1;
    two.queue.reset(two.now);
    let events = through_reset(&mut two);
    assert!(events.ends_with(&[Event::FlushFailed, Event::Reset { failed: 1 }]), "{events:?}");
    assert_eq!(two.statuses(0), [-1]);
    assert_eq!(two.machine.pins(), 0);
}

#[test]
fn a_lost_device_keeps_its_pins_and_all_else_fails() {
    let mut two = Two::new();
    two.media.borrow_mut().hangs = true;
    two.fronts[0].read(0, &[whole(1), whole(2)]);
    two.fronts[0].flush();
    two.run();
    two.machine.0.borrow_mut().faults.dead = 1000;
    two.queue.reset(two.now);
    let events = through_reset(&mut two);
    assert!(matches!(events[..], [Event::Resetting { .. }, Event::Lost(_)]), "{events:?}");
    assert_eq!(two.statuses(0), [-1, -1]);
    assert_eq!(two.machine.pins(), 2);
    assert_eq!(two.queue.vbd(two.ids[0]).unwrap().counters().lost_pins, 2);
    two.fronts[0].read(0, &[whole(1)]);
    two.fronts[1].flush();
    assert_eq!((two.statuses(0), two.statuses(1)), (vec![-1], vec![-1]));
    assert_eq!(two.machine.pins(), 2);
    two.queue.disconnect(two.ids[0]);
    two.run();
    assert!(two.queue.disconnected(two.ids[0]).is_some_and(|left| left.counters.lost_pins == 2));
}

#[test]
fn to_disconnect_waits_for_the_device_and_says_nothing() {
    let mut two = Two::new();
    two.media.borrow_mut().credit = 0;
    two.fronts[0].read(0, &[whole(1)]);
    two.run();
    two.fronts[0].read(0, &[whole(2)]);
    two.queue.disconnect(two.ids[0]);
    two.run();
    assert!(two.queue.disconnected(two.ids[0]).is_none());
    assert_eq!(two.machine.pins(), 1);
    two.media.borrow_mut().credit = 5;
    two.run();
    let left = two.queue.disconnected(two.ids[0]).expect("drained");
    assert_eq!((two.machine.pins(), left.ring.pages), (0, 1));
    assert_eq!(two.fronts[0].answers(), []);
    assert!(two.queue.vbd(two.ids[0]).is_none());
}

#[test]
fn a_broken_ring_is_reported_and_not_served() {
    let mut two = Two::new();
    two.fronts[0].page.words.store_u32(0, 1000);
    let events = two.run();
    assert!(matches!(events[..], [Event::Broken(id, _)] if id == two.ids[0]), "{events:?}");
    two.fronts[0].page.words.store_u32(0, 1);
    assert_eq!(two.run(), []);
    two.fronts[1].read(0, &[whole(1)]);
    assert_eq!(two.statuses(1), [0]);
}

#[test]
fn a_new_back_end_answers_what_the_old_one_took() {
    let mut two = Two::new();
    two.media.borrow_mut().credit = 0;
    two.fill(0, 1, 0x31);
    two.fronts[0].write(0, &[whole(1)]);
    two.fronts[0].flush();
    let id = two.ids[0];
    two.run();
    // It dies: the device is reset by whoever comes next, the pins are found by the hypervisor.
    two.queue.disconnect(id);
    two.media.borrow_mut().credit = u64::MAX;
    two.run();
    two.media.borrow_mut().cut(&mut Random::seeded(4));
    let left = two.queue.disconnected(id).expect("drained");
    assert_eq!(two.fronts[0].answers(), []);
    let disk = Partition::boxed(0, 1024);
    let mut with = two.machine.connection(&two.fronts[0], disk, Limits::default());
    with.journal = left.journal;
    two.ids[0] = two.queue.resume(with, two.now).expect("the journal is good");
    assert_eq!(two.statuses(0), [0, 0]);
    assert!(two.machine.0.borrow().notified[0] > 0);
}
