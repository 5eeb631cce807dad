//! A network device that does what it must not. It may lose frames and deliver wrong ones; the driver does not panic, gives it
//! no buffer twice, and after a reset works as if nothing had been.

mod common;
use common::net_rig::{NetRig, Sample};
use common::nic::{MRG_RXBUF, Model};
use common::virtio::{EVENT_IDX, Faults};
use drivers::hardware::DmaMemory;
use network::{Checksum, Reset, Uplink};
use test_random::Random;

/// Lets the device do one thing to the memory it shares with the driver. False if the queues may hold nonsense afterwards, so
/// that the device must not serve them any more; `sane`: they hold none yet.
fn mischief(rig: &NetRig, random: &mut Random, sane: bool) -> bool {
    let nic = &mut *rig.nic.0.borrow_mut();
    if !nic.is_set() {
        return true;
    }
    let number = |random: &mut Random| u32::try_from(random.next() >> 32).unwrap();
    let queue = random.below(2);
    match random.below(6) {
        // A head that is out of range, or with the device or not as it happens, with any length.
        0 => {
            let head = if random.one_in(2) { number(random) } else { number(random) % 256 };
            let bytes = if random.one_in(2) { number(random) } else { number(random) % 5000 };
            nic.put_used(queue, &[(head, bytes)]);
            return false;
        }
        1 => {
            let index = u16::try_from(random.next() & 0xffff).unwrap();
            nic.set_used_index(queue, index);
            return false;
        }
        2 => nic.status |= 64,
        // A frame with any header.
        3 if sane => {
            let mut sample = Sample::any(random, 1518, true, true);
            for _ in 0..1 + random.below(4) {
                let (at, value) = (random.below(10), u8::try_from(random.next() & 255).unwrap());
                sample.header[at] = if random.one_in(2) { value } else { value & 7 };
            }
            nic.deliver(sample.header, &sample.frame);
        }
        // Anything anywhere: what the driver put there for the device, too.
        _ => {
            let memory = &rig.memory[queue];
            for _ in 0..random.below(16) {
                let end = if random.one_in(2) { 8192 } else { memory.bytes() };
                memory.store64(random.below(end / 8) * 8, random.next());
            }
            return false;
        }
    }
    true
}

/// Resets until the device works again, which may take many.
fn recover(rig: &mut NetRig, into: &mut [u8]) {
    for _ in 0..100 {
        match rig.net.reset() {
            Reset::Done => {
                assert!(rig.net.receive(into).is_none(), "a frame from before the reset");
                return;
            }
            // A dead device is asked again, here, after it has become honest.
            Reset::Dead(_) => rig.nic.0.borrow_mut().faults = Faults::default(),
            Reset::Pending => {}
        }
    }
    panic!("it does not come back");
}

fn fuzz(model: Model, rounds: usize) {
    let mut random = Random::new();
    let mut rig = NetRig::new(model, &random);
    let mut into = vec![0; 65_535];
    let (mut steps, mut frames, mut broken, mut clean) = (0usize, 0, 0, 0);
    recover(&mut rig, &mut into);
    for round in 0..rounds {
        let slow_reset = random.below(4);
        // Lies count from a reset on: for the one at the end of this round.
        let registers = if random.one_in(8) { 40 } else { 0 };
        rig.nic.0.borrow_mut().faults = Faults { registers, slow_reset, ..Faults::default() };
        let mut sane = !rig.nic.0.borrow().lied && registers == 0;
        for _ in 0..random.below(100) {
            steps += 1;
            for _ in 0..random.below(3) {
                let sample = Sample::any(&mut random, 1518, true, random_segments(round));
                let _ = rig.net.send(&sample.frame, sample.info);
            }
            rig.net.kick();
            if sane {
                let mut nic = rig.nic.0.borrow_mut();
                nic.send(3);
                nic.sent.clear();
                for _ in 0..random.below(3) {
                    let sample = Sample::any(&mut random, 1518, true, random_segments(round));
                    nic.deliver(sample.header, &sample.frame);
                }
            }
            if random.one_in(12) {
                sane &= mischief(&rig, &mut random, sane);
            }
            // What one call of the device's puts there is bounded by its buffers.
            for taken in 0.. {
                assert!(taken <= 256, "the driver does not come to an end");
                let Some((bytes, info)) = rig.net.receive(&mut into) else { break };
                frames += 1;
                assert!((14..=65_535).contains(&bytes));
                let segment = info.segmentation.map(|segmentation| usize::from(segmentation.bytes));
                assert!(segment.is_none_or(|segment| (48..=bytes).contains(&segment)));
                assert!(segment.is_none() || info.checksum == Checksum::Blank);
            }
            rig.net.rearm();
            if rig.net.needs_reset() {
                broken += 1;
                break;
            }
        }
        recover(&mut rig, &mut into);
        // Some rounds end with an honest device: all is as it should be.
        if round % 8 == 0 {
            rig.nic.0.borrow_mut().faults = Faults::default();
            recover(&mut rig, &mut into);
            rig.nic.0.borrow_mut().sent.clear();
            for _ in 0..40 {
                let sample = Sample::any(&mut random, 1518, false, false);
                rig.net.send(&sample.frame, sample.info).unwrap();
                rig.net.kick();
                let mut nic = rig.nic.0.borrow_mut();
                nic.send(1);
                let (_, frame) = nic.sent.pop().expect("it is sent at once");
                assert_eq!(frame, sample.frame);
                assert!(nic.deliver(sample.header, &sample.frame));
                drop(nic);
                let (bytes, info) = rig.net.receive(&mut into).expect("it has arrived");
                assert_eq!((&into[..bytes], info), (&sample.frame[..], sample.info));
                clean += 1;
            }
            assert!(rig.net.receive(&mut into).is_none() && !rig.net.needs_reset());
        }
    }
    println!("{steps} steps, {frames} frames, {broken} times broken, {clean} frames of an honest device");
    assert!(frames > rounds && broken > rounds / 8 && clean > rounds);
}

/// Whether a round has long frames, which cost time.
fn random_segments(round: usize) -> bool {
    round.is_multiple_of(16)
}

#[test]
fn whatever_the_device_writes_it_is_reset_and_works() {
    fuzz(Model::able(), 60_000);
}

#[test]
fn the_same_without_merged_buffers_and_event_indices() {
    fuzz(Model { features: Model::able().features & !(MRG_RXBUF | EVENT_IDX), queue: 64, ..Model::able() }, 30_000);
}

#[test]
fn heads_that_come_back_twice_or_never_were_there_break_the_device() {
    let mut into = vec![0; 65_535];
    // A receive queue has heads 0 to 63; none of a send queue's is with the device after head 127.
    for (queue, head) in [(0, 64), (0, 65_536), (0, u32::MAX), (1, 0), (1, 1), (1, 128), (1, u32::MAX)] {
        let mut rig = NetRig::started(Model::able(), &Random::seeded(1));
        let plain = Sample::plain(&mut Random::seeded(2), 60);
        rig.net.send(&plain.frame, plain.info).unwrap();
        rig.net.kick();
        rig.nic.0.borrow_mut().send(1);
        rig.nic.0.borrow_mut().put_used(queue, &[(head, 60)]);
        // What was sent is looked at when pages run out.
        let full = (0..200).any(|_| rig.net.send(&plain.frame, plain.info).is_err());
        assert!(full && rig.net.receive(&mut into).is_none());
        assert!(rig.net.needs_reset(), "queue {queue}, head {head}");
        assert_eq!(rig.net.reset(), Reset::Done);
        assert!(rig.net.receive(&mut into).is_none() && !rig.net.needs_reset());
    }
}

#[test]
fn a_buffer_that_comes_back_twice_breaks_the_device() {
    let (mut rig, mut into) = (NetRig::started(Model::able(), &Random::seeded(1)), vec![0; 65_535]);
    assert!(rig.nic.0.borrow_mut().deliver([0; 12], &[1; 60]));
    rig.nic.0.borrow_mut().put_used(0, &[(0, 72)]);
    assert!(rig.net.receive(&mut into).is_some(), "the first time");
    // Its buffer is available again, but the device was not shown that.
    assert!(rig.net.receive(&mut into).is_some());
    let mut rig = NetRig::started(Model::able(), &Random::seeded(1));
    let mut two = [0; 12];
    two[10] = 2;
    rig.memory[0].write_bytes(8192, &two);
    for _ in 0..2 {
        rig.nic.0.borrow_mut().put_used(0, &[(0, 72)]);
    }
    assert!(rig.net.receive(&mut into).is_none() && rig.net.needs_reset(), "in one frame");
}

#[test]
fn lengths_and_numbers_of_buffers_that_cannot_be_break_the_device() {
    let mut into = vec![0; 65_535];
    for (bytes, buffers, breaks) in [
        (60, 1, false),
        (4096, 1, false),
        (4097, 1, true),
        (11, 1, true),
        (0, 1, true),
        (u32::MAX, 1, true),
        (60, 0, true),
        (60, 64, false),
        (60, 65, true),
        (60, u16::MAX, true),
    ] {
        let mut rig = NetRig::started(Model::able(), &Random::seeded(1));
        let mut header = [0; 12];
        header[10..].copy_from_slice(&buffers.to_le_bytes());
        rig.memory[0].write_bytes(8192, &header);
        rig.nic.0.borrow_mut().put_used(0, &[(0, bytes)]);
        assert_eq!(rig.net.receive(&mut into).is_some(), !breaks && buffers == 1);
        assert_eq!(rig.net.needs_reset(), breaks, "{bytes} bytes, {buffers} buffers");
    }
}

#[test]
fn what_was_not_shown_cannot_come_back() {
    let (mut rig, mut into) = (NetRig::started(Model::able(), &Random::seeded(1)), vec![0; 65_535]);
    rig.nic.0.borrow_mut().set_used_index(0, 65);
    assert!(rig.net.receive(&mut into).is_none() && rig.net.needs_reset());
}

#[test]
fn a_device_is_asked_whether_it_needs_a_reset_only_after_a_look_in_vain() {
    let (mut rig, mut into) = (NetRig::started(Model::able(), &Random::seeded(1)), vec![0; 65_535]);
    assert!(rig.nic.0.borrow_mut().deliver([0; 12], &[1; 60]));
    rig.nic.0.borrow_mut().status |= 64;
    assert!(!rig.net.needs_reset(), "nobody has looked yet");
    assert!(rig.net.receive(&mut into).is_some() && !rig.net.needs_reset());
    assert!(rig.net.receive(&mut into).is_none() && !rig.net.needs_reset(), "there was a frame");
    assert!(rig.net.receive(&mut into).is_none() && rig.net.needs_reset());
    assert_eq!(rig.net.reset(), Reset::Done);
    assert!(rig.net.receive(&mut into).is_none() && !rig.net.needs_reset());
}

#[test]
fn a_device_that_was_pulled_out_is_dead() {
    let (mut rig, mut into) = (NetRig::started(Model::usual(), &Random::seeded(1)), vec![0; 65_535]);
    rig.nic.0.borrow_mut().faults.slow_reset = usize::MAX;
    rig.nic.0.borrow_mut().status = 0xff;
    assert!(rig.net.receive(&mut into).is_none() && rig.net.needs_reset());
    let end = (0..20_000).find_map(|_| match rig.net.reset() {
        Reset::Pending => None,
        end => Some(end),
    });
    assert_eq!(end, Some(Reset::Dead("does not answer a reset")));
    assert!(rig.net.receive(&mut into).is_none() && rig.net.needs_reset() && !rig.net.rearm());
}
