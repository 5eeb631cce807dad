//! A driver and an honest network device: each frame arrives whole, in order and with what accompanies it, and nobody waits for
//! a notification or an interrupt that never comes.

mod common;
use common::net_rig::{NetRig, Sample};
use common::nic::{CSUM, GUEST_CSUM, GUEST_TSO, HOST_TSO, MAC, MRG_RXBUF, MTU, Model, State};
use common::virtio::{EVENT_IDX, VERSION_1};
use drivers::net::Dropped;
use drivers::virtio::RESET_ASKED;
use network::{Checksum, FrameInfo, Full, Mac, Offloads, Protocol, Reset, Segmentation, Uplink};
use std::collections::VecDeque;
use test_random::Random;

/// Sends and delivers so many frames in random order. `most` is the longest frame that is not cut.
fn run(model: Model, most: usize, frames: usize) {
    let mut random = Random::new();
    let mut rig = NetRig::started(model, &random);
    let has = |feature| model.features & feature == feature;
    let guest_segments = has(GUEST_CSUM | GUEST_TSO | MRG_RXBUF);
    let offloads = Offloads {
        checksum: has(CSUM),
        tcp4: has(CSUM | HOST_TSO) && model.queue >= 32,
        tcp6: has(CSUM | HOST_TSO) && model.queue >= 32,
    };
    assert_eq!(rig.net.offloads(), offloads);
    let (mut sending, mut arriving) = (VecDeque::new(), VecDeque::<Sample>::new());
    let (mut sent, mut arrived, mut full) = (0, 0, 0);
    let mut into = vec![0; 65_535];
    // The driver sleeps until it is interrupted; it begins awake.
    let mut awake = true;
    while sent + arrived < frames {
        for _ in 0..random.below(12) {
            let sample = Sample::any(&mut random, most, offloads.checksum, offloads.tcp4);
            match rig.net.send(&sample.frame, sample.info) {
                Ok(()) => sending.push_back(sample),
                Err(Full) => {
                    full += 1;
                    assert!(!sending.is_empty(), "full of nothing");
                    break;
                }
            }
        }
        rig.net.kick();
        let mut nic = rig.nic.0.borrow_mut();
        nic.send(random.below(11));
        for (header, frame) in nic.sent.drain(..) {
            let sample: Sample = sending.pop_front().expect("a frame that nobody sent");
            assert_eq!((header, &frame), (sample.header, &sample.frame));
            sent += 1;
        }
        for _ in 0..random.below(10) {
            let sample = Sample::any(&mut random, most, has(GUEST_CSUM), guest_segments);
            if nic.deliver(sample.header, &sample.frame) {
                arriving.push_back(sample);
            }
        }
        awake |= core::mem::take(&mut nic.interrupts) > 0;
        drop(nic);
        assert!(awake || arriving.is_empty(), "{} frames wait for nothing", arriving.len());
        // It may be busy with something else for a while.
        if random.one_in(3) {
            continue;
        }
        while core::mem::take(&mut awake) {
            while let Some((bytes, info)) = rig.net.receive(&mut into) {
                let sample = arriving.pop_front().expect("a frame that nobody delivered");
                assert_eq!((bytes, info), (sample.frame.len(), sample.info));
                assert_eq!(into[..bytes], sample.frame);
                arrived += 1;
            }
            awake = rig.net.rearm();
        }
        assert!(!rig.net.needs_reset());
    }
    println!("{sent} frames sent, {arrived} arrived; {full} times full; notified {:?}", rig.nic.0.borrow().notified);
    assert!(sent > frames / 8 && arrived > frames / 8 && full > 0);
    assert_eq!(rig.net.dropped(), Dropped::default());
    if has(EVENT_IDX) && most == 1518 && model.queue == 256 {
        let [received, kicked] = rig.nic.0.borrow().notified;
        assert!(kicked < sent && received < arrived, "batches");
    }
}

#[test]
fn a_device_like_qemus_on_its_user_network() {
    run(Model::usual(), 1518, 300_000);
}

#[test]
fn a_device_with_all_offloads() {
    run(Model::able(), 1518, 60_000);
}

#[test]
fn a_device_without_event_indices() {
    run(Model { features: Model::able().features & !EVENT_IDX, ..Model::able() }, 1518, 30_000);
}

#[test]
fn a_device_without_merged_buffers_joins_no_segments() {
    run(Model { features: Model::able().features & !MRG_RXBUF, ..Model::able() }, 1518, 30_000);
}

#[test]
fn devices_with_large_frames() {
    for features in [Model::able().features | MTU, (Model::able().features | MTU) & !MRG_RXBUF] {
        run(Model { features, mtu: 9000, ..Model::able() }, 9018, 20_000);
    }
}

#[test]
fn a_device_with_short_queues() {
    run(Model { queue: 4, ..Model::able() }, 1518, 20_000);
    run(Model { queue: 1, features: Model::usual().features & !MRG_RXBUF, ..Model::usual() }, 1518, 5_000);
}

#[test]
fn a_device_that_can_only_send_and_receive() {
    run(Model { features: VERSION_1 | MAC, ..Model::usual() }, 1518, 30_000);
}

#[test]
fn nothing_is_done_before_the_first_reset_and_no_memory_is_touched_before_it_ends() {
    let mut rig = NetRig::new(Model::usual(), &Random::seeded(1));
    let mut into = vec![0; 65_535];
    assert_eq!(rig.command(), 0x402, "answers, no line, no bus master");
    assert!(rig.net.needs_reset() && !rig.net.rearm() && !rig.net.has_link());
    assert_eq!(rig.net.send(&[0; 60], FrameInfo::default()), Err(Full));
    assert_eq!((rig.net.receive(&mut into), rig.net.mac()), (None, Mac([0; 6])));
    rig.nic.0.borrow_mut().faults.slow_reset = 3;
    for _ in 0..3 {
        assert_eq!(rig.net.reset(), Reset::Pending);
        assert_eq!(rig.command(), 0x402);
        assert_eq!(rig.net.send(&[0; 60], FrameInfo::default()), Err(Full));
    }
    assert_eq!(rig.net.reset(), Reset::Done);
    assert_eq!((rig.command(), rig.net.has_link(), rig.net.mtu()), (0x406, true, 1500));
    assert_eq!(rig.net.mac().to_string(), "52:54:00:12:34:56");
}

#[test]
fn a_device_that_cannot_be_used_is_dead_with_a_reason() {
    let reason = |change: fn(&mut State)| {
        // It has worked once.
        let mut rig = NetRig::started(Model::usual(), &Random::seeded(1));
        change(&mut rig.nic.0.borrow_mut());
        let ends = (0..RESET_ASKED + 2).map(|_| rig.net.reset());
        let end = ends.into_iter().find(|end| *end != Reset::Pending);
        let Some(Reset::Dead(why)) = end else { panic!("{end:?}") };
        assert!(rig.net.needs_reset() && !rig.net.rearm());
        (why, rig.command())
    };
    let legacy = reason(|nic| nic.model.features &= !VERSION_1);
    assert_eq!(legacy, ("does not offer version 1 of virtio", 0x402));
    assert_eq!(reason(|nic| nic.model.features &= !MAC), ("does not state its address", 0x402));
    let group = reason(|nic| nic.model.mac[0] = 1);
    assert_eq!(group, ("states an address that is not of a single station", 0x402));
    let small = reason(|nic| nic.model.features |= MTU);
    assert_eq!(small, ("states an MTU below 68 bytes", 0x402));
    assert_eq!(reason(|nic| nic.model.queue = 0), ("has no queue that a received frame fits into", 0x402));
    // This one may still be at work: its bus master stays as it is, for turning it off would not end that.
    let stuck = reason(|nic| nic.faults.slow_reset = usize::MAX);
    assert_eq!(stuck, ("does not answer a reset", 0x406));
}

#[test]
fn what_the_device_does_not_do_is_dropped_and_counted() {
    let (mut random, mut into) = (Random::seeded(1), vec![0; 65_535]);
    let mut rig = NetRig::started(Model::usual(), &random);
    let blank = Sample::tcp(&mut random, 100, false, 0);
    let segments = Sample::tcp(&mut random, 10_000, false, 1000);
    for sample in [&blank, &segments] {
        assert_eq!(rig.net.send(&sample.frame, sample.info), Ok(()));
    }
    assert_eq!(rig.net.send(&[0; 13], FrameInfo::default()), Ok(()));
    rig.net.kick();
    assert_eq!((rig.net.dropped().sent, rig.nic.0.borrow().notified[1]), (3, 0));
    assert_eq!(rig.net.send(&[0; 1519], FrameInfo::default()), Err(Full), "longer than the device takes");
    let plain = Sample::plain(&mut random, 60);
    {
        let mut nic = rig.nic.0.borrow_mut();
        for (header, frame) in
            [(blank.header, &blank.frame), (segments.header, &segments.frame), ([0; 12], &vec![0; 13])]
        {
            assert!(nic.deliver(header, frame));
        }
        assert!(nic.deliver([0; 12], &vec![1; 70_000]), "it fits the buffers");
        assert!(nic.deliver([0; 12], &plain.frame));
    }
    assert_eq!(rig.net.receive(&mut into), Some((60, FrameInfo::default())), "the frame after these");
    assert_eq!((rig.net.receive(&mut into), rig.net.dropped()), (None, Dropped { received: 4, sent: 3 }));
    assert!(!rig.net.needs_reset());
}

#[test]
fn a_verified_checksum_is_believed_of_a_device_that_verifies() {
    let mut into = vec![0; 65_535];
    for (model, checksum) in [(Model::able(), Checksum::Verified), (Model::usual(), Checksum::Unverified)] {
        let mut rig = NetRig::started(model, &Random::seeded(1));
        let mut header = [0; 12];
        header[0] = 2;
        assert!(rig.nic.0.borrow_mut().deliver(header, &[7; 60]));
        assert_eq!(rig.net.receive(&mut into), Some((60, FrameInfo { checksum, segmentation: None })));
    }
}

#[test]
fn a_frame_whose_buffers_come_one_by_one_is_taken_when_it_is_whole() {
    let (mut random, mut into) = (Random::seeded(1), vec![0; 65_535]);
    let mut rig = NetRig::started(Model::able(), &random);
    let sample = Sample::tcp(&mut random, 9000, true, 1400);
    {
        let mut nic = rig.nic.0.borrow_mut();
        assert!(nic.deliver(sample.header, &sample.frame));
        nic.set_used_index(0, 2);
    }
    assert_eq!(rig.net.receive(&mut into), None);
    assert!(!rig.net.needs_reset() && !rig.net.rearm());
    rig.nic.0.borrow_mut().set_used_index(0, 3);
    assert!(rig.net.rearm());
    let segmentation = Some(Segmentation { protocol: Protocol::Tcp6, bytes: 1400 });
    let info = FrameInfo { checksum: Checksum::Blank, segmentation };
    assert_eq!(rig.net.receive(&mut into), Some((9000, info)));
    assert_eq!(into[..9000], sample.frame);
}

#[test]
fn a_device_that_was_stopped_gives_its_memory_back_and_can_be_started_again() {
    let (mut rig, mut into) = (NetRig::started(Model::usual(), &Random::seeded(1)), vec![0; 65_535]);
    assert!(rig.nic.0.borrow_mut().deliver([0; 12], &[1; 60]));
    rig.nic.0.borrow_mut().faults.slow_reset = 1;
    assert_eq!((rig.net.stop(), rig.command()), (Reset::Pending, 0x406));
    assert_eq!((rig.net.stop(), rig.command()), (Reset::Done, 0x402));
    assert!(rig.net.needs_reset() && rig.net.receive(&mut into).is_none());
    rig.nic.0.borrow_mut().faults.slow_reset = 0;
    assert_eq!((rig.net.reset(), rig.command()), (Reset::Done, 0x406));
    assert_eq!(rig.net.receive(&mut into), None, "frames of before are lost");
    assert!(!rig.net.rearm());
    rig.nic.0.borrow_mut().interrupts = 0;
    assert!(rig.nic.0.borrow_mut().deliver([0; 12], &[2; 61]));
    assert_eq!(rig.nic.0.borrow().interrupts, 1);
    assert_eq!(rig.net.receive(&mut into).map(|(bytes, _)| bytes), Some(61));
    assert_eq!(rig.net.stop(), Reset::Done);
    assert!(rig.net.into_memory().is_some());
    let rig = NetRig::started(Model::usual(), &Random::seeded(1));
    assert!(rig.net.into_memory().is_none(), "the device has it");
}
