//! Devices that are late, are reset, are lost.

#![allow(clippy::cast_possible_truncation, reason = "small numbers become bytes")]
mod common;

use block_backend::{Event, LATE_NS};
use common::device::SECTOR;
use common::front::{segment, whole};
use common::turns;
use common::two::Two;
use ring_protocol::block::operation;

const SECOND: u64 = 1_000_000_000;

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
    assert_eq!(two.statuses(0), [-1, -5]);
    assert_eq!(two.machine.pins(), 2);
    assert_eq!(two.queue.vbd(two.ids[0]).unwrap().counters().lost_pins, 2);
    two.fronts[0].read(0, &[whole(1)]);
    two.fronts[1].flush();
    assert_eq!((two.statuses(0), two.statuses(1)), (vec![-1], vec![-5]));
    assert_eq!(two.machine.pins(), 2);
    two.queue.disconnect(two.ids[0]);
    two.run();
    assert!(two.queue.disconnected(two.ids[0]).is_some_and(|left| left.counters.lost_pins == 2));
}

#[test]
fn a_guest_whose_share_of_pins_is_lost_is_still_answered() {
    let mut two = Two::new();
    two.media.borrow_mut().hangs = true;
    let (machine, segments) = (two.machine.clone(), (0..256).map(|n| segment(n % 80, 0, 0)).collect::<Vec<_>>());
    for _ in 0..24 {
        two.fronts[0].indirect(&machine, operation::READ, 0, &segments, 90);
    }
    two.run();
    assert_eq!(two.machine.pins(), 6144);
    two.machine.0.borrow_mut().faults.dead = 1000;
    two.queue.reset(two.now);
    through_reset(&mut two);
    assert_eq!(two.statuses(0), [-1; 24]);
    // Beside another its share is half of what it has lost.
    two.fronts[0].read(0, &[whole(1)]);
    two.fronts[1].read(0, &[whole(1)]);
    two.run();
    assert_eq!((two.statuses(0), two.statuses(1)), (vec![-1], vec![-1]));
}

#[test]
fn a_device_without_room_after_its_reset_is_asked_again() {
    let mut two = Two::new();
    two.media.borrow_mut().hangs = true;
    two.fronts[0].read(0, &[whole(1)]);
    two.run();
    two.machine.0.borrow_mut().faults.full = 1000;
    two.queue.reset(two.now);
    for _ in 0..10 {
        two.now += 1_000_000;
        let (turn, _) = turns(&mut two.queue, &mut two.machine, two.now);
        assert_eq!(turn.wake_ns, Some(two.now + 1_000_000));
    }
    two.machine.0.borrow_mut().faults.full = 0;
    assert_eq!(two.statuses(0), [0]);
}
