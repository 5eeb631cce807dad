//! Power cuts: writes that were answered may be lost until a flush is answered, and not one after that.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use block_backend::Limits;
use common::device::Media;
use common::disks::Partition;
use common::neighbour::Neighbour;
use common::{Device, Faults, Machine};
use test_random::Random;

const SECTORS: u64 = 96;

/// What is wrong with the device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nothing that it does not say.
    None,
    /// It answers flushes and does nothing.
    IgnoresFlushes,
    /// A flush that fails loses writes of both guests, and the next one succeeds.
    Forgets,
}

/// Two guests at work until the power is cut. Answers what they lost though a flush had promised it, and how much was flushed.
fn until_a_cut(random: &mut Random, fault: Fault) -> (Option<String>, u64) {
    let mut machine = Machine::new(Random::seeded(random.next()), 2);
    let media = Media::new(2 * SECTORS);
    media.borrow_mut().ignores_flushes = fault == Fault::IgnoresFlushes;
    media.borrow_mut().failing_flushes_forget = fault == Fault::Forgets;
    let (mut queue, _) = machine.queue(Some(Device::new(&machine, &media)));
    let mut guests = [0, 1].map(|n| {
        let mut guest = Neighbour::new(n, 1, SECTORS as usize);
        guest.durable_writes = fault != Fault::Forgets;
        guest.gives_up_flushes = random.below(2) == 0;
        guest.only_writes = fault == Fault::Forgets;
        let disk = Partition::boxed(u64::from(n) * SECTORS, SECTORS);
        let id = machine.connect(&mut queue, &guest.front, disk, Limits::default());
        (guest, id)
    });
    let mut now = 0;
    for _ in 0..200 + random.below(600) {
        if random.below(50) == 0 {
            let some = if random.below(2) == 0 { random.below(30) } else { 0 };
            machine.faults(Faults { device: some, full: some, copy: some, hang: some / 8, ..Faults::default() });
        }
        for (guest, id) in &mut guests {
            guest.ask(&machine, random);
            queue.attend(*id);
        }
        now += 1_000_000;
        let _ = queue.turn(&mut machine, now);
        while queue.event().is_some() {}
        guests.iter_mut().for_each(|(guest, _)| guest.collect(&machine));
        if media.borrow().hangs && random.below(10) == 0 {
            now += 61_000_000_000;
            queue.reset(now);
        }
    }
    let mut media = media.borrow_mut();
    media.cut(random);
    let lost = guests
        .iter()
        .enumerate()
        .find_map(|(n, (guest, _))| guest.lost(|sector| media.durable[(n as u64 * SECTORS + sector) as usize]));
    (lost, media.flushes)
}

#[test]
fn no_answered_flush_is_lost() {
    let mut random = Random::new();
    let mut flushes = 0;
    for _ in 0..1_000 {
        let (lost, flushed) = until_a_cut(&mut random, Fault::None);
        assert_eq!(lost, None);
        flushes += flushed;
    }
    assert!(flushes > 10_000, "only {flushes} flushes: the test is lopsided");
}

#[test]
fn a_device_that_ignores_flushes_is_found_out() {
    let mut random = Random::new();
    let found = (0..100).filter(|_| until_a_cut(&mut random, Fault::IgnoresFlushes).0.is_some()).count();
    assert!(found > 90, "found in {found} of 100 power cuts");
}

#[test]
fn what_a_failed_flush_lost_was_told_to_whose_it_was() {
    let mut random = Random::new();
    for _ in 0..1_000 {
        assert_eq!(until_a_cut(&mut random, Fault::Forgets).0, None);
    }
}
