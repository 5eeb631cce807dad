//! Disks for guests that come, ask, misbehave, and go at any moment.

#![allow(unreachable_pub, reason = "the modules of a test are its own")]
#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]

#[path = "../common/mod.rs"]
mod common;
mod device;
mod front;
mod machine;
mod orders;
mod targets;
mod world;

use common::front::FrontEnd;
use common::guest::Rounds;
use front::{Front, Guest};
use machine::NOT_GRANTED;
use ring_protocol::block::operation;
use services::block::vbd_bytes;
use world::{World, XVDA, XVDB};
use xenbus_backend::State;

#[test]
fn a_guest_connects_reads_and_writes() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(5, "serial:abc,,xvda,w,rate=1G,iops=1000000");
    assert_eq!(front.back(&mut guest, "sectors").unwrap(), "2048");
    assert_eq!(front.back(&mut guest, "mode").unwrap(), "w");
    assert_eq!(front.back(&mut guest, "params").unwrap(), "serial:abc");
    assert_eq!(front.write(&guest, 8, 7), 0);
    assert_eq!(world.media.borrow().bytes[8 * 512..10 * 512], [7; 1024]);
    assert_eq!(front.read(&guest, 8), Ok([7; 8]));
    assert_eq!(front.ask(&guest, operation::FLUSH, 0, 0), 0);
    assert_eq!(front.read(&guest, 2041), Err(-1), "beyond the end");
    assert_eq!(front.ask(&guest, operation::READ, 0, NOT_GRANTED), -1);
    let [listed] = &world.listed(5)[..] else { panic!("one disk") };
    assert_eq!((listed.device, &*listed.name, listed.state, listed.mode), (XVDA, "xvda", State::Connected, "w"));
    let counters = listed.counters;
    assert_eq!((counters.reads, counters.writes, counters.flushes, counters.refused), (1, 1, 1, 1));
    assert!(world.machine.fake.reserved() >= vbd_bytes());
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_ring_of_sixteen_pages_is_served() {
    let world = World::new();
    let mut guest = Guest::new(&world.machine, &world.store, 5);
    world.attach(5, "serial:abc,,xvda,w").unwrap();
    let mut front = Front::new(XVDA);
    front.pages = 16;
    front.connect(&mut guest);
    for n in 0..400 {
        assert!(front.send(&guest, operation::WRITE, n % 200 * 8, 10), "{n}");
    }
    world.machine.rounds(200);
    assert_eq!(front.answers(), [0; 400]);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn the_directories_belong_to_those_who_write_them() {
    let world = World::new();
    let mut guest = Guest::new(&world.machine, &world.store, 5);
    let mut other = Guest::new(&world.machine, &world.store, 6);
    world.attach(5, "serial:abc,,xvda,r").unwrap();
    let front = Front::new(XVDA);
    assert!(!guest.put(&front.path("backend"), "/elsewhere") && guest.put(&front.path("new"), ""));
    let back = "/local/domain/0/backend/vbd/5/51712";
    assert!(!guest.put(&format!("{back}/state"), "4"));
    assert_eq!(guest.get(&format!("{back}/mode")).unwrap(), "r");
    assert_eq!(other.get(&format!("{back}/mode")), None);
    assert_eq!(other.get("/local/domain/5/device/vbd/51712/state"), None);
    for (key, value) in [("online", "1"), ("frontend-id", "5"), ("dev", "xvda"), ("type", "phy"), ("removable", "0")] {
        assert_eq!(guest.get(&format!("{back}/{key}")).as_deref(), Some(value), "{key}");
    }
    assert_eq!(guest.get(&front.path("virtual-device")).unwrap(), "51712");
    world.end(5);
    world.end(6);
    world.assert_clean(&[5, 6]);
}

#[test]
fn a_front_end_closes_and_comes_again() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(6, "memory:64K,,xvda,w");
    assert_eq!(front.write(&guest, 0, 3), 0);
    for _ in 0..3 {
        front.set_state(&mut guest, 5);
        front.step(&mut guest);
        front.step(&mut guest);
        assert_eq!((front.state(&mut guest), front.back_state(&mut guest)), (6, 6));
        assert_eq!(front::left(&world.machine, &[6]), 0, "nothing is mapped while it is closed");
        front.set_state(&mut guest, 1);
        front.connect(&mut guest);
        assert_eq!(front.read(&guest, 0), Ok([3; 8]), "the disk keeps what was written");
    }
    assert_eq!(world.listed(6)[0].counters.reads, 3, "counters go on");
    // As blkfront is removed: without the state 5.
    front.close(&mut guest);
    world.machine.rounds(20);
    assert_eq!((front.back_state(&mut guest), front::left(&world.machine, &[6])), (6, 0));
    world.end(6);
    world.assert_clean(&[6]);
}

#[test]
fn a_disk_is_detached_and_attached_again() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(5, "serial:abc,,xvda,w");
    let detach = world.disks.detach(5, XVDA, false);
    let stepping = async {
        for _ in 0..5 {
            front.step(&mut guest);
        }
    };
    assert_eq!(world.machine.run_for(1, detach), None, "it is waited for");
    world.machine.run(stepping);
    world.machine.rounds(20);
    assert!(world.listed(5).is_empty());
    assert_eq!(world.machine.run(world.disks.detach(5, XVDA, false)).unwrap_err(), "the guest has no disk 51712");
    world.attach(5, "serial:abc,,xvda,w").unwrap();
    let mut front = Front::new(XVDA);
    front.connect(&mut guest);
    assert_eq!(front.write(&guest, 0, 1), 0);
    assert_eq!(world.attach(5, "memory:4K,,xvda,w").unwrap_err(), "the guest has a disk xvda already");
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_disk_in_use_is_named_and_removed_by_force() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(5, "serial:abc,,xvda,w");
    let why = world.machine.run(world.disks.detach(5, XVDA, false)).unwrap_err();
    assert_eq!(why, "guest5 uses the disk xvda");
    assert!(world.listed(5)[0].in_use);
    let again = world.machine.run_for(3, world.disks.detach(5, XVDA, false));
    assert_eq!(again, Some(Err("guest5 uses the disk xvda".into())));
    assert_eq!((front.back(&mut guest, "online").unwrap(), front.back_state(&mut guest)), ("0".into(), 5));
    world.machine.run(world.disks.detach(5, XVDA, true)).unwrap();
    assert_eq!((front.state(&mut guest), front.back_state(&mut guest)), (0, 0));
    assert!(front.send(&guest, operation::READ, 0, 10));
    world.machine.rounds(10);
    assert!(front.answers().is_empty());
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn what_a_front_end_publishes_wrong_is_named_and_it_may_come_again() {
    let world = World::new();
    let mut guest = Guest::new(&world.machine, &world.store, 5);
    world.attach(5, "serial:abc,,xvda,w").unwrap();
    let mut front = Front::new(XVDA);
    let error = "/local/domain/0/error/backend/vbd/5/51712/error";
    let cases = [
        ("ring-ref", "x", "the value of its key ring-ref is no number"),
        ("ring-ref", "1000", "its ring cannot be mapped: Inval"),
        ("event-channel", "99", "its port cannot be bound: Inval"),
        ("ring-page-order", "9", "its ring-page-order 9 is above 4"),
        ("multi-queue-num-queues", "4", "it has 4 queues, and one was offered"),
    ];
    for (n, (key, value, reason)) in cases.into_iter().enumerate() {
        world.machine.rounds(10);
        assert_eq!(front.back_state(&mut guest), 2, "{n}");
        for (key, value) in [("ring-ref", "100"), ("event-channel", "21"), (key, value)] {
            guest.put(&front.path(key), value);
        }
        front.set_state(&mut guest, 3);
        world.machine.rounds(20);
        assert_eq!(front.back_state(&mut guest), 5, "{n}");
        assert_eq!(guest.get(error).as_deref(), Some(reason));
        assert_eq!(world.machine.fake.held(), (1, 1), "only the store's page and port");
        front.set_state(&mut guest, 6);
        world.machine.rounds(10);
        guest.remove(&front.path("ring-page-order"));
        guest.remove(&front.path("multi-queue-num-queues"));
        front.set_state(&mut guest, 1);
    }
    front.connect(&mut guest);
    assert_eq!(guest.get(error), None, "the error is over");
    front.break_ring(&guest);
    world.machine.rounds(20);
    assert_eq!(front.back_state(&mut guest), 5);
    assert!(guest.get(error).unwrap().starts_with("its ring is broken"));
    guest.remove(&format!("device/vbd/{XVDA}"));
    world.machine.rounds(20);
    assert_eq!(front::left(&world.machine, &[5]), 0);
    world.end(5);
    world.assert_clean(&[5]);
}

/// A life of a disk, cut off after each number of rounds.
#[test]
fn a_domain_dies_at_every_step() {
    let world = World::new();
    for cut in 0..60 {
        let mut guest = Guest::new(&world.machine, &world.store, 5);
        let mut front = Front::new(XVDA);
        let config = world::config("serial:abc,,xvda,w,part=1");
        table_on(&world);
        let attached = world.machine.run_for(cut, world.disks.attach(5, "five", &config));
        if attached.is_some() {
            for n in 0..cut {
                front.step(&mut guest);
                front.send(&guest, operation::WRITE, u64::from(n as u32) % 8 * 8, 10);
                front.send(&guest, operation::READ, 0, 11);
                if n == 20 {
                    front.set_state(&mut guest, 5);
                }
                if n == 25 && front.back_state(&mut guest) == 6 {
                    front.set_state(&mut guest, 1);
                }
            }
            front.send(&guest, operation::WRITE, 0, 12);
        }
        drop(guest);
        world.end(5);
        world.machine.rounds(5);
        assert!(world.media.borrow().is_idle());
        world.assert_clean(&[5]);
    }
}

/// An MBR with partition 1 from sector 64 on, of 128 sectors, and partition 2 behind it.
fn table_on(world: &World) {
    let mut media = world.media.borrow_mut();
    targets::mbr(&mut media.bytes);
}

#[test]
fn a_domain_that_dies_while_its_disk_is_opened_gets_none() {
    let world = World::new();
    world.media.borrow_mut().hangs = true;
    table_on(&world);
    let config = world::config("serial:abc,,xvda,w,part=1");
    let attach = world.disks.attach(5, "five", &config);
    let die = async {
        world.machine.run(world.disks.domain_died(5));
        world.media.borrow_mut().hangs = false;
    };
    let both = async {
        let mut attach = std::pin::pin!(attach);
        std::future::poll_fn(|context| {
            assert!(attach.as_mut().poll(context).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        die.await;
        attach.await
    };
    assert_eq!(world.machine.run(both).unwrap_err(), "five has ended");
    world.assert_clean(&[5]);
}

#[test]
fn nobody_waits_for_the_disks_of_others_and_what_is_full_is_refused() {
    let world = World::new();
    world.machine.fake.set_full(true);
    assert_eq!(world.attach(5, "serial:abc,,xvda,w").unwrap_err(), "not enough memory is left for the disk xvda");
    world.machine.fake.set_full(false);
    world.machine.state.borrow_mut().full = true;
    assert_eq!(world.attach(5, "serial:abc,,xvda,w").unwrap_err(), "not enough memory is left for the disk xvda");
    assert_eq!(world.attach(5, "memory:8192,,xvda,w").unwrap_err(), "there are not 8192 bytes of memory left");
    world.machine.state.borrow_mut().full = false;
    world.assert_clean(&[5]);
    let (_guest, _front) = world.connected(5, "serial:abc,,xvda,w");
    world.attach(5, "memory:8K,,xvdb,w").unwrap();
    assert_eq!(world.listed(5).iter().map(|disk| disk.device).collect::<Vec<_>>(), [XVDA, XVDB]);
    world.machine.run(world.disks.detach(5, XVDB, false)).unwrap();
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_turn_waits_until_the_heap_has_room() {
    let world = World::new();
    let (guest, mut front) = world.connected(5, "serial:abc,,xvda,w");
    world.machine.rounds(5);
    world.machine.fake.set_full(true);
    assert!(front.send(&guest, operation::FLUSH, 0, 0));
    world.machine.rounds(300);
    assert!(front.answers().is_empty());
    world.machine.fake.set_full(false);
    world.machine.rounds(150);
    assert_eq!(front.answers(), [0]);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn dropping_the_disks_says_nothing() {
    let world = World::new();
    let (mut guest, mut front) = world.connected(5, "serial:abc,,xvda,w");
    world.media.borrow_mut().hangs = true;
    front.send(&guest, operation::WRITE, 0, 10);
    world.machine.rounds(5);
    let pins = world.machine.state.borrow().pins.len();
    let World { machine, disks, .. } = world;
    drop(disks);
    machine.rounds(5);
    assert_eq!((machine.state.borrow().pins.len(), pins), (1, 1), "the device may still read the page");
    assert_eq!((front.state(&mut guest), front.back_state(&mut guest)), (4, 4));
    assert!(front.answers().is_empty());
}

#[test]
fn a_disk_takes_no_more_than_it_says() {
    assert_eq!(vbd_bytes().div_ceil(1024), 96);
    assert_eq!(block_backend::journal_bytes(16).div_ceil(4096) * 4, 68);
}
