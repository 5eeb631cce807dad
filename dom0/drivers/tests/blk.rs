//! A driver and an honest disk: whatever the disk's limits, each sector is where it belongs, and nobody waits for a
//! notification or an interrupt that never comes.

mod common;
use common::disk::{BLK_SIZE, DISCARD, FLUSH, Model, RO, SEG_MAX, SIZE_MAX, State};
use common::rig::Rig;
use common::virtio::{EVENT_IDX, INDIRECT, VERSION_1};
use disk::{BusAddress, Device, Operation, Outcome, Piece, Reset, Shape, Ticket};
use drivers::blk::Identity;
use drivers::virtio::RESET_ASKED;
use test_random::Random;

/// So many operations with random orders of everything that may come in any order.
fn run(model: Model, operations: usize) {
    let random = Random::new();
    let mut rig = Rig::started(model, &random);
    rig.disk.0.borrow_mut().eager = true;
    let block = usize::try_from(model.block / 512).unwrap();
    let discards = model.features & DISCARD != 0;
    // The driver sleeps until it is interrupted; it begins awake.
    let mut awake = true;
    while rig.answered < operations {
        for _ in 0..rig.random.below(8) {
            if !rig.submit(block, discards) {
                assert!(rig.in_flight() > 0, "full of nothing");
            }
        }
        rig.blk.kick();
        // What is answered without the device sends no interrupt.
        awake |= model.features & FLUSH == 0;
        {
            let mut disk = rig.disk.0.borrow_mut();
            if disk.random.below(4) > 0 {
                disk.fetch();
            }
            for _ in 0..disk.random.below(10) {
                disk.answer_one();
            }
            awake |= core::mem::take(&mut disk.interrupts) > 0;
        }
        while core::mem::take(&mut awake) {
            while let Some((flight, outcome)) = rig.take() {
                assert_eq!(outcome, Outcome::Good, "{flight:?}");
                rig.check(&flight);
            }
            awake = rig.blk.rearm();
        }
        if rig.in_flight() > 0 && !rig.disk.0.borrow().is_busy() {
            // All answers have been taken, or there was an interrupt for them.
            assert!(rig.disk.0.borrow().interrupts > 0, "{} wait for nothing", rig.in_flight());
        }
    }
    assert!(!rig.blk.needs_reset());
    if model.features == Model::usual().features && model.queue == 256 && model.seg_max == 254 {
        let disk = rig.disk.0.borrow();
        assert!(disk.notified[0] < operations / 2 && disk.all_interrupts < operations / 2, "batches");
    }
}

#[test]
fn a_disk_like_qemus() {
    run(Model::usual(), 400_000);
}

#[test]
fn a_disk_without_event_indices() {
    run(Model { features: Model::usual().features & !EVENT_IDX, ..Model::usual() }, 100_000);
}

#[test]
fn a_disk_without_indirect_tables() {
    run(Model { features: Model::usual().features & !INDIRECT, ..Model::usual() }, 100_000);
    run(Model { features: Model::usual().features & !INDIRECT, queue: 16, ..Model::usual() }, 50_000);
}

#[test]
fn a_disk_that_takes_one_segment_at_a_time() {
    run(Model { features: Model::usual().features & !SEG_MAX, ..Model::usual() }, 50_000);
}

#[test]
fn a_disk_with_small_segments() {
    run(Model { features: Model::usual().features | SIZE_MAX, size_max: 1024, seg_max: 5, ..Model::usual() }, 100_000);
}

#[test]
fn a_disk_with_large_blocks() {
    run(Model { block: 4096, seg_max: 20, max_discard: 8, ..Model::usual() }, 100_000);
}

#[test]
fn a_disk_with_a_short_queue() {
    run(Model { queue: 4, ..Model::usual() }, 50_000);
}

#[test]
fn a_disk_that_can_only_read_and_write() {
    run(Model { features: VERSION_1, queue: 128, ..Model::usual() }, 50_000);
}

/// Lets the disk do all it was told of.
fn work(rig: &Rig) {
    let mut disk = rig.disk.0.borrow_mut();
    disk.fetch();
    while disk.answer_one() {}
}

fn answers(rig: &mut Rig) -> Vec<(u32, Outcome)> {
    core::iter::from_fn(|| rig.blk.completed()).map(|(ticket, outcome)| (ticket.0, outcome)).collect()
}

#[test]
fn nothing_is_done_before_the_first_reset_and_no_memory_is_touched_before_it_ends() {
    let random = Random::seeded(1);
    let mut rig = Rig::new(Model::usual(), &random);
    assert_eq!(rig.command(), 0x402, "answers, no line, no bus master");
    assert!(rig.blk.needs_reset());
    assert!(rig.blk.submit(Ticket(1), Operation::Flush).is_err());
    assert_eq!((rig.blk.completed(), rig.blk.rearm(), rig.blk.shape().sectors), (None, false, 0));
    rig.disk.0.borrow_mut().faults.slow_reset = 3;
    for _ in 0..3 {
        assert_eq!(rig.blk.reset(), Reset::Pending);
        assert_eq!(rig.command(), 0x402);
        assert!(rig.blk.submit(Ticket(1), Operation::Flush).is_err());
    }
    assert_eq!(rig.blk.reset(), Reset::Done);
    assert_eq!(rig.command(), 0x406);
    assert_eq!(
        rig.blk.shape(),
        Shape {
            sectors: 512,
            block_bytes: 512,
            physical_bytes: 512,
            read_only: false,
            volatile: true,
            discard: Some(disk::Discard { granularity: 512, alignment: 0 })
        }
    );
}

#[test]
fn a_disk_is_asked_for_its_serial_number_beside_other_work() {
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    rig.blk.submit(Ticket(7), Operation::Flush).unwrap();
    assert_eq!(rig.blk.identify(), Identity::Pending);
    assert_eq!(rig.blk.identify(), Identity::Pending);
    work(&rig);
    let Identity::Known(serial) = rig.blk.identify() else { panic!("no serial number") };
    assert_eq!(serial.bytes(), b"tenon-disk-0");
    assert_eq!(answers(&mut rig), [(7, Outcome::Good)]);
    // It is known after a reset as well, and asked for again if it was lost in one.
    assert_eq!(rig.blk.reset(), Reset::Done);
    assert_eq!(rig.blk.identify(), Identity::Known(serial));
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    assert_eq!(rig.blk.identify(), Identity::Pending);
    assert_eq!(rig.blk.reset(), Reset::Done);
    assert_eq!(rig.blk.identify(), Identity::Pending);
    rig.disk.0.borrow_mut().fail_with = Some(2);
    work(&rig);
    assert_eq!(rig.blk.identify(), Identity::Unknown);
}

#[test]
fn what_a_disk_cannot_do_is_answered_without_it() {
    let mut rig = Rig::started(Model { features: VERSION_1 | RO, ..Model::usual() }, &Random::seeded(1));
    assert!(rig.blk.shape().read_only && !rig.blk.shape().volatile);
    let piece = |bytes| [Piece { address: BusAddress::of_pinned(0x8000_0000), bytes }];
    fn submit(rig: &mut Rig, ticket: u32, operation: Operation<'_>) {
        rig.blk.submit(Ticket(ticket), operation).unwrap();
    }
    submit(&mut rig, 1, Operation::Flush);
    submit(&mut rig, 2, Operation::Discard { sector: 0, sectors: 1 });
    submit(&mut rig, 3, Operation::Write { sector: 0, pieces: &piece(512) });
    submit(&mut rig, 4, Operation::Read { sector: 512, pieces: &piece(512) });
    submit(&mut rig, 5, Operation::Read { sector: u64::MAX, pieces: &piece(512) });
    submit(&mut rig, 6, Operation::Read { sector: 0, pieces: &piece(511) });
    submit(&mut rig, 7, Operation::Read { sector: 0, pieces: &[] });
    submit(&mut rig, 8, Operation::Read { sector: 0, pieces: &[piece(512)[0]; 257] });
    rig.blk.kick();
    assert_eq!(rig.disk.0.borrow().notified[0], 0);
    let expected = [(1, Outcome::Good), (2, Outcome::Unsupported)];
    let failed = (3..=8).map(|ticket| (ticket, Outcome::Failed));
    assert_eq!(answers(&mut rig), expected.into_iter().chain(failed).collect::<Vec<_>>());
}

#[test]
fn a_failed_part_fails_its_operation_alone() {
    let model = Model { seg_max: 2, ..Model::usual() };
    for (status, outcome) in
        [(1, Outcome::Failed), (2, Outcome::Unsupported), (255, Outcome::Failed), (9, Outcome::Failed)]
    {
        let mut rig = Rig::started(model, &Random::seeded(1));
        let pieces = rig.pieces(0, 200);
        rig.blk.submit(Ticket(1), Operation::Write { sector: 0, pieces: &pieces }).unwrap();
        rig.blk.submit(Ticket(2), Operation::Discard { sector: 0, sectors: 500 }).unwrap();
        rig.blk.kick();
        {
            let mut disk = rig.disk.0.borrow_mut();
            disk.fail_with = Some(status);
            disk.fetch();
            disk.answer_one();
            disk.answer_one();
            disk.fail_with = None;
        }
        let mut all = Vec::new();
        for _ in 0..600 {
            all.extend(answers(&mut rig));
            work(&rig);
        }
        all.sort_unstable_by_key(|(ticket, _)| *ticket);
        assert_eq!(all.len(), 2);
        assert!(all.iter().any(|(_, it)| *it == outcome), "{all:?}");
    }
}

#[test]
fn an_operation_of_many_pieces_is_taken_by_an_idle_disk_however_little_it_takes_at_once() {
    let least = Model { features: VERSION_1 | BLK_SIZE | FLUSH, queue: 4, ..Model::usual() };
    let mut rig = Rig::started(least, &Random::seeded(1));
    let pieces: Vec<Piece> =
        (0..256).map(|i| Piece { address: BusAddress::of_pinned(0x8000_0000 + i * 1024), bytes: 512 }).collect();
    rig.blk.submit(Ticket(1), Operation::Read { sector: 0, pieces: &pieces }).unwrap();
    assert!(rig.blk.submit(Ticket(2), Operation::Flush).is_err(), "one waits already");
    rig.blk.kick();
    let mut turns = 0;
    while answers(&mut rig).is_empty() {
        work(&rig);
        turns += 1;
        assert!(turns < 1000);
    }
    rig.blk.submit(Ticket(2), Operation::Flush).unwrap();
}

#[test]
fn a_device_that_cannot_be_used_is_dead_with_a_reason() {
    let usual = Model::usual();
    let reason = |change: fn(&mut State)| {
        // It has worked once.
        let mut rig = Rig::started(usual, &Random::seeded(1));
        assert_eq!(rig.command(), 0x406);
        change(&mut rig.disk.0.borrow_mut());
        let ends = (0..RESET_ASKED + 2).map(|_| rig.blk.reset());
        let end = ends.into_iter().find(|end| *end != Reset::Pending);
        let Some(Reset::Dead(why)) = end else { panic!("{end:?}") };
        (why, rig.command())
    };
    let legacy = reason(|disk| disk.model.features &= !VERSION_1);
    assert_eq!(legacy, ("does not offer version 1 of virtio", 0x402));
    let no_queue = reason(|disk| disk.model.queue = 0);
    assert_eq!(no_queue, ("has no queue that a request fits into", 0x402));
    let odd = reason(|disk| disk.model.block = 1000);
    assert_eq!(odd, ("has blocks of a size that is none", 0x402));
    let restless = reason(|disk| disk.faults.restless = true);
    assert_eq!(restless, ("changes its configuration all the time", 0x402));
    // This one may still be at work: its bus master stays as it is, for turning it off would not end that.
    let stuck = reason(|disk| disk.faults.slow_reset = usize::MAX);
    assert_eq!(stuck, ("does not answer a reset", 0x406));
}

#[test]
fn nothing_more_is_asked_for_an_operation_that_has_failed() {
    let mut rig = Rig::started(Model { queue: 8, seg_max: 2, ..Model::usual() }, &Random::seeded(1));
    let pieces: Vec<Piece> =
        (0..256).map(|i| Piece { address: BusAddress::of_pinned(0x8000_0000 + i * 1024), bytes: 512 }).collect();
    for operation in [Operation::Read { sector: 0, pieces: &pieces }, Operation::Discard { sector: 0, sectors: 512 }] {
        let before = rig.disk.0.borrow().answered();
        rig.disk.0.borrow_mut().fail_with = Some(1);
        rig.blk.submit(Ticket(1), operation).unwrap();
        rig.blk.kick();
        let mut all = Vec::new();
        while all.is_empty() {
            work(&rig);
            all = answers(&mut rig);
        }
        assert_eq!(all, [(1, Outcome::Failed)]);
        assert!(rig.disk.0.borrow().answered().wrapping_sub(before) <= 8);
        assert!(!rig.disk.0.borrow().is_busy());
    }
}

#[test]
fn a_disk_that_was_stopped_gives_its_memory_back_and_can_be_started_again() {
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    rig.blk.submit(Ticket(1), Operation::Flush).unwrap();
    rig.blk.kick();
    rig.disk.0.borrow_mut().faults.slow_reset = 1;
    assert_eq!((rig.blk.stop(), rig.command()), (Reset::Pending, 0x406));
    assert_eq!((rig.blk.stop(), rig.command()), (Reset::Done, 0x402));
    assert!(rig.blk.needs_reset() && rig.blk.completed().is_none());
    rig.disk.0.borrow_mut().faults.slow_reset = 0;
    assert_eq!((rig.blk.reset(), rig.command()), (Reset::Done, 0x406));
    rig.blk.submit(Ticket(2), Operation::Flush).unwrap();
    rig.blk.kick();
    work(&rig);
    assert_eq!(rig.disk.0.borrow().interrupts, 1);
    assert_eq!(answers(&mut rig), [(2, Outcome::Good)]);
    assert_eq!(rig.blk.stop(), Reset::Done);
    assert!(rig.blk.into_memory().is_some());
    let rig = Rig::started(Model::usual(), &Random::seeded(1));
    assert!(rig.blk.into_memory().is_none(), "the device has it");
}

#[test]
fn a_masked_interrupt_is_not_sent() {
    let mut rig = Rig::started(Model::usual(), &Random::seeded(1));
    rig.blk.mask_interrupt(true);
    rig.blk.submit(Ticket(1), Operation::Flush).unwrap();
    rig.blk.kick();
    work(&rig);
    assert_eq!(rig.disk.0.borrow().interrupts, 0);
    assert_eq!(answers(&mut rig), [(1, Outcome::Good)]);
    rig.blk.mask_interrupt(false);
    assert!(!rig.blk.rearm());
    rig.blk.submit(Ticket(1), Operation::Flush).unwrap();
    rig.blk.kick();
    work(&rig);
    assert_eq!(rig.disk.0.borrow().interrupts, 1);
}
