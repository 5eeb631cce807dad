//! What each kind of request does, and how it is answered.

#![allow(clippy::cast_possible_truncation, reason = "small numbers become bytes")]
mod common;

use block_backend::{Event, Limits};
use common::device::{Media, SECTOR};
use common::disks::{Partition, Patchwork};
use common::front::{segment, whole};
use common::two::Two;
use common::{Device, FIRST_FREE, Front, Machine, turns};
use ring_protocol::SharedPage;
use ring_protocol::block::{Slot, operation};
use test_random::Random;

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
    assert_eq!(two.statuses(0), [-5]);
    two.fronts[1].flush();
    assert_eq!(two.statuses(1), [-5], "its writes may be lost too");
    for guest in [0, 1] {
        two.fronts[guest].flush();
        assert_eq!(two.statuses(guest), [0], "it was told");
    }
    // Who has nothing to lose is not told of it.
    two.fronts[0].write(0, &[whole(1)]);
    two.statuses(0);
    two.media.borrow_mut().failing_flushes = 1;
    two.fronts[0].flush();
    assert_eq!(two.statuses(0), [-5]);
    two.fronts[1].flush();
    assert_eq!(two.statuses(1), [0]);
    two.fronts[1].write(0, &[whole(1)]);
    assert_eq!(two.statuses(1), [0]);
    two.fronts[1].flush();
    assert_eq!(two.statuses(1), [0]);
}

/// A stock front end does not flush again after it was told: what it writes must be durable all the same.
#[test]
fn after_a_failed_flush_each_write_is_flushed() {
    let mut two = Two::new();
    two.fronts[0].write(0, &[whole(1)]);
    assert_eq!((two.statuses(0), two.media.borrow().flushes), (vec![0], 0));
    two.media.borrow_mut().failing_flushes = 1;
    two.fronts[0].flush();
    // What was answered meanwhile is flushed before the guest learns of it.
    assert_eq!((two.statuses(0), two.media.borrow().flushes), (vec![-5], 2));
    for (n, byte) in [(3, 6), (4, 7)] {
        two.fill(0, 1, byte);
        let machine = two.machine.clone();
        match byte {
            6 => two.fronts[0].write(0, &[whole(1)]),
            _ => two.fronts[0].indirect(&machine, operation::WRITE, 0, &[whole(1)], 70),
        };
        assert_eq!((two.statuses(0), two.media.borrow().flushes), (vec![0], n));
        assert_eq!(two.media.borrow().durable[7], [byte; SECTOR]);
    }
    two.fronts[0].read(0, &[whole(1)]);
    two.fronts[1].write(0, &[whole(1)]);
    assert_eq!((two.statuses(0), two.statuses(1), two.media.borrow().flushes), (vec![0], vec![0], 4));
    // A write whose flush fails has failed.
    two.media.borrow_mut().failing_flushes = 1;
    two.fronts[0].write(0, &[whole(1)]);
    assert_eq!(two.statuses(0), [-1]);
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
    // It ends without an answer.
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

#[test]
fn a_front_end_that_sends_only_when_it_is_asked_to_is_heard() {
    let mut two = Two::new();
    let (mut random, mut sent) = (Random::seeded(9), 0);
    for _ in 0..2_000 {
        let front = &mut two.fronts[0];
        for _ in 0..random.below(60) {
            let sector = random.below(100);
            if front.put(|id| Slot::direct(operation::READ, id, sector, &[whole(1)])).is_none() {
                break;
            }
        }
        if front.ring.publish(&front.page) {
            two.queue.attend(two.ids[0]);
            sent += 1;
        }
        two.now += 1_000_000;
        let _ = turns(&mut two.queue, &mut two.machine, two.now);
        two.fronts[0].answers();
        assert!(two.fronts[0].waiting.is_empty(), "a request was not heard of");
    }
    assert!(sent > 1_000);
}
