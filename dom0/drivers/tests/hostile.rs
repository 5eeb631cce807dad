//! A disk that does what it must not. It may lose what it has, and it may answer wrongly; the driver does not panic, answers no
//! ticket twice, and after a reset works as if nothing had been.

mod common;
use common::disk::Model;
use common::rig::Rig;
use common::virtio::{EVENT_IDX, Faults, INDIRECT};
use disk::{Device, Outcome, Reset};
use drivers::blk::MEMORY_BYTES;
use drivers::hardware::DmaMemory;
use test_random::Random;

/// Lets the disk do one thing to the memory it shares with the driver. False if the queue may hold nonsense afterwards, so that
/// the disk must not serve it any more.
fn mischief(rig: &Rig, random: &mut Random) -> bool {
    let disk = &mut *rig.disk.0.borrow_mut();
    if !disk.is_set() {
        return true;
    }
    let number = |random: &mut Random| u32::try_from(random.next() >> 32).unwrap();
    match random.below(6) {
        // A head that is out of range, or in flight or not as it happens, with any length.
        0 => {
            let head = if random.one_in(2) { number(random) } else { number(random) % 256 };
            disk.put_used(0, &[(head, number(random))]);
            // The driver may now use the slot of a request that the disk still has.
            return false;
        }
        1 => {
            let index = u16::try_from(random.next() & 0xffff).unwrap();
            disk.set_used_index(0, index);
        }
        2 => disk.fail_with = Some(u8::try_from(random.next() & 0xff).unwrap()).filter(|status| *status != 0),
        3 => disk.status |= 64,
        // Anything anywhere: what the driver put there for the device, too.
        _ => {
            let memory = disk.memory[0].clone();
            for _ in 0..random.below(16) {
                let end = if random.one_in(2) { 8192 } else { MEMORY_BYTES };
                memory.store64(random.below(end / 8) * 8, random.next());
            }
            return false;
        }
    }
    true
}

/// Resets until the device works again, which may take many.
fn recover(rig: &mut Rig) {
    for _ in 0..100 {
        match rig.blk.reset() {
            Reset::Done => {
                assert!(rig.blk.completed().is_none(), "an answer from before the reset");
                rig.forget();
                return;
            }
            // A dead device is asked again, here, after it has become honest.
            Reset::Dead(_) => rig.disk.0.borrow_mut().faults = Faults::default(),
            Reset::Pending => {}
        }
    }
    panic!("it does not come back");
}

fn fuzz(model: Model, rounds: usize) {
    let mut random = Random::new();
    let mut rig = Rig::new(model, &random);
    rig.most = 16;
    let (mut answered, mut recovered, mut clean) = (0, 0, 0);
    recover(&mut rig);
    for round in 0..rounds {
        let slow_reset = random.below(4);
        // Lies count from a reset on: for the one at the end of this round.
        let registers = if random.one_in(8) { 40 } else { 0 };
        rig.disk.0.borrow_mut().faults = Faults { registers, slow_reset, ..Faults::default() };
        rig.disk.0.borrow_mut().fail_with = None;
        let mut sane = !rig.disk.0.borrow().lied && registers == 0;
        for _ in 0..random.below(60) {
            for _ in 0..random.below(4) {
                rig.submit(1, true);
            }
            rig.blk.kick();
            if sane {
                let mut disk = rig.disk.0.borrow_mut();
                disk.fetch();
                for _ in 0..random.below(8) {
                    disk.answer_one();
                }
            }
            if random.one_in(12) {
                sane &= mischief(&rig, &mut random);
            }
            // `take` refuses an answer for a ticket that has one.
            while let Some((_, outcome)) = rig.take() {
                answered += 1;
                let known = [Outcome::Good, Outcome::Failed, Outcome::Unsupported].contains(&outcome);
                assert!(known);
            }
            rig.blk.rearm();
            if rig.blk.needs_reset() {
                break;
            }
            let _ = rig.blk.identify();
        }
        recover(&mut rig);
        recovered += 1;
        // Some rounds end with an honest disk: all is as it should be.
        if round % 8 == 0 {
            rig.disk.0.borrow_mut().faults = Faults::default();
            rig.disk.0.borrow_mut().fail_with = None;
            recover(&mut rig);
            rig.look_again();
            for _ in 0..40 {
                rig.submit(1, true);
                rig.blk.kick();
                let mut disk = rig.disk.0.borrow_mut();
                disk.fetch();
                while disk.answer_one() {}
                drop(disk);
                while let Some((flight, outcome)) = rig.take() {
                    assert_eq!(outcome, Outcome::Good);
                    rig.check(&flight);
                    clean += 1;
                }
            }
            assert!(!rig.blk.needs_reset());
        }
    }
    println!("{answered} answers, {recovered} resets, {clean} operations of an honest disk");
    assert!(answered > rounds && clean > rounds);
}

#[test]
fn whatever_the_disk_writes_it_is_reset_and_works() {
    fuzz(Model::usual(), 60_000);
}

#[test]
fn the_same_without_indirect_tables_and_event_indices() {
    fuzz(Model { features: Model::usual().features & !(INDIRECT | EVENT_IDX), queue: 64, ..Model::usual() }, 30_000);
}

#[test]
fn heads_that_come_back_twice_or_never_were_there_break_the_disk() {
    for head in [1, 255, 256, 65_536, u32::MAX, 0] {
        let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
        while rig.in_flight() == 0 {
            rig.submit(1, false);
        }
        rig.blk.kick();
        {
            let mut disk = rig.disk.0.borrow_mut();
            disk.fetch();
            disk.answer_one();
        }
        assert!(rig.take().is_some());
        // Head 0 has come back already, the others are none.
        rig.disk.0.borrow_mut().put_used(0, &[(head, 1)]);
        assert!(rig.take().is_none());
        assert!(rig.blk.needs_reset(), "{head}");
        assert_eq!(rig.blk.reset(), Reset::Done);
        assert!(!rig.blk.needs_reset());
    }
}

#[test]
fn a_head_that_comes_back_twice_breaks_the_disk_while_others_are_in_flight() {
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    while rig.in_flight() < 3 {
        rig.submit(1, false);
    }
    rig.blk.kick();
    rig.disk.0.borrow_mut().put_used(0, &[(1, 0)]);
    rig.disk.0.borrow_mut().put_used(0, &[(1, 0)]);
    assert!(rig.take().is_some() && rig.take().is_none() && rig.blk.needs_reset());
    assert_eq!(rig.in_flight(), 2, "the others wait for the reset");
}

#[test]
fn what_was_not_shown_cannot_come_back() {
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    while rig.in_flight() == 0 {
        rig.submit(1, false);
    }
    rig.disk.0.borrow_mut().put_used(0, &[(0, 0)]);
    assert!(rig.take().is_none() && rig.blk.needs_reset());
}

#[test]
fn a_length_is_not_believed_and_a_missing_status_is_a_failure() {
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    while rig.in_flight() == 0 {
        rig.submit(1, false);
    }
    rig.blk.kick();
    rig.disk.0.borrow_mut().put_used(0, &[(0, u32::MAX)]);
    let (_, outcome) = rig.take().unwrap();
    assert_eq!(outcome, Outcome::Failed);
    assert!(!rig.blk.needs_reset());
}

#[test]
fn a_device_is_asked_whether_it_needs_a_reset_only_when_it_owes_an_answer() {
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    rig.disk.0.borrow_mut().status |= 64;
    assert!(rig.take().is_none() && !rig.blk.needs_reset(), "nothing is asked of it");
    while rig.in_flight() == 0 {
        rig.submit(1, false);
    }
    assert!(!rig.blk.needs_reset(), "nobody has looked yet");
    assert!(rig.take().is_none() && rig.blk.needs_reset());
    assert_eq!(rig.blk.reset(), Reset::Done);
    assert!(rig.take().is_none() && !rig.blk.needs_reset());
}

#[test]
fn a_device_that_was_pulled_out_is_dead_and_answers_nothing() {
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    rig.submit(1, false);
    rig.disk.0.borrow_mut().faults.slow_reset = usize::MAX;
    rig.disk.0.borrow_mut().status = 0xff;
    assert!(rig.take().is_none() && rig.blk.needs_reset());
    let end = (0..20_000).find_map(|_| match rig.blk.reset() {
        Reset::Pending => None,
        end => Some(end),
    });
    assert_eq!(end, Some(Reset::Dead("does not answer a reset")));
    assert!(rig.take().is_none() && rig.blk.needs_reset() && !rig.blk.rearm());
}
