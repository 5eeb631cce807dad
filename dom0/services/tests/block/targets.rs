//! What disks are made of: partitions, files of the bundle, memory, overlays; late and lost devices.

use std::rc::Rc;

use services::block::Image;

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::device::Device;
use crate::front::Front;
use crate::world::{SECTORS, World, XVDA};

/// Writes an MBR: partition 1 of 128 sectors from sector 64 on, partition 2 of 256 sectors behind it.
pub fn mbr(disk: &mut [u8]) {
    for (index, first, sectors) in [(0, 64u32, 128u32), (1, 192, 256)] {
        let entry = &mut disk[446 + 16 * index..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
}

#[test]
fn each_guest_has_its_partition_and_second_writers_are_refused_by_name() {
    let world = World::new();
    mbr(&mut world.media.borrow_mut().bytes);
    let (mut five, mut first) = world.connected(5, "serial:abc,,xvda,w,part=1");
    let (six, mut second) = world.connected(6, "serial:abc,,xvda,w,part=2");
    assert_eq!(first.back(&mut five, "sectors").unwrap(), "128");
    assert_eq!((first.write(&five, 0, 1), second.write(&six, 0, 2)), (0, 0));
    assert_eq!(first.write(&five, 128, 1), -1);
    {
        let media = world.media.borrow();
        assert_eq!((media.bytes[64 * 512], media.bytes[192 * 512]), (1, 2));
    }
    assert_eq!(world.attach(7, "serial:abc,,xvda,w,part=1").unwrap_err(), "abc is in use: guest5 writes it");
    assert_eq!(world.attach(7, "serial:abc,,xvda,r").unwrap_err(), "abc is in use: guest5 writes it");
    assert_eq!(
        world.attach(7, "serial:abc,,xvda,w,part=3").unwrap_err(),
        "partition 3 of abc: there is no such partition"
    );
    world.attach(7, "serial:abc,,xvda,!,part=1").unwrap();
    for domain in [5, 6, 7] {
        world.end(domain);
    }
    world.attach(7, "serial:abc,,xvda,w").unwrap();
    world.end(7);
    world.assert_clean(&[5, 6, 7]);
}

#[test]
fn what_there_is_not_is_named() {
    let world = World::new();
    world.disks.add_image("odd", Image { page: 7, offset: 0, bytes: &[0; 1000] });
    world.disks.add_image("off", Image { page: 7, offset: 100, bytes: &[0; 1024] });
    for (text, why) in [
        ("bundle:odd,,xvda", "odd has 1000 bytes, and a disk has whole sectors of 512 bytes"),
        ("bundle:off,,xvda", "off does not begin at a multiple of 512 bytes"),
        ("serial:abd,,xvda,w", "no disk has the serial number abd"),
        ("bundle:none,,xvda", "the boot bundle has no file none"),
        ("serial:abc,,xvda,w,part=1", "abc: the disk has no partition table"),
        ("memory:8K,,xvda,w,part=1", "empty memory has no partitions"),
        ("memory:8K,,xvda,w,overlay=4K", "empty memory needs no overlay"),
        ("/a.img,,xvda,w", "/a.img is a file of the host, which no guest of this machine can have"),
    ] {
        assert_eq!(world.attach(5, text).unwrap_err(), why, "{text}");
    }
    world.media.borrow_mut().read_only = true;
    assert_eq!(world.attach(5, "serial:abc,,xvda,w").unwrap_err(), "the disk abc is read-only");
    world.attach(5, "serial:abc,,xvda,r").unwrap();
    world.end(5);
    world.assert_clean(&[5]);
}

/// Ten guests share a base of the bundle, each with what it writes for itself.
#[test]
fn ten_guests_share_a_base_under_overlays() {
    let world = World::new();
    let mut bytes = vec![9; SECTORS * 512];
    mbr(&mut bytes);
    let bytes: &'static [u8] = bytes.leak();
    let page = world.machine.image(bytes);
    world.disks.add_image("base", Image { page, offset: 0, bytes });
    let base = world.machine.frames();
    let domains: Vec<u16> = (5..15).collect();
    let text = "bundle:base,,xvda,w,part=2,overlay=16K";
    let mut guests: Vec<_> = domains.iter().map(|domain| world.connected(*domain, text)).collect();
    let per_guest = (world.machine.frames() - base) / 10;
    assert!(per_guest * 4096 + services::block::vbd_bytes() < 1 << 20, "a guest takes {per_guest} pages");
    for (guest, front) in &mut guests {
        assert_eq!(front.write(guest, 8, guest.domain as u8), 0);
    }
    for (guest, front) in &mut guests {
        assert_eq!(front.read(guest, 8), Ok([guest.domain as u8; 8]));
        assert_eq!(front.read(guest, 16), Ok([9; 8]));
        let taken: Vec<_> = (0..8).map(|n| front.write(guest, n * 8, 1)).collect();
        assert!(taken.contains(&-1), "the limit holds: {taken:?}");
        let (written, held) =
            (taken.iter().filter(|status| **status == 0).count(), world.disks.list(guest.domain)[0].overlay_bytes);
        assert!(held >= written as u64 * 4096 && held <= 16 << 10, "{held} bytes hold {written} pages");
    }
    for domain in &domains {
        world.end(*domain);
    }
    assert_eq!(world.machine.disk_frames(), 0);
    assert_eq!(world.machine.frames(), base);
}

/// The interrupt of a device that nobody serves stays bound: the device may raise it at any time.
#[test]
fn a_device_that_is_not_served_keeps_its_interrupt() {
    let world = World::new();
    let device = || Box::new(Device(Rc::clone(&world.media)));
    let kept = Rc::new(());
    let twice = world.disks.add_device("abc", device(), 901, Rc::clone(&kept)).unwrap_err();
    assert_eq!((twice.as_str(), Rc::strong_count(&kept)), ("there are two disks with the serial number abc", 2));
    world.machine.state.borrow_mut().full = true;
    let full = world.disks.add_device("abd", device(), 901, Rc::clone(&kept)).unwrap_err();
    let why = "the disk abd: not enough memory is left to serve it";
    assert_eq!((full.as_str(), Rc::strong_count(&kept), world.disks.has_device("abd")), (why, 3, false));
}

/// However large a disk in memory is, its pages are taken and given back in pieces.
#[test]
fn large_disks_in_memory_keep_nobody_waiting() {
    let world = World::new();
    let bytes: &'static [u8] = vec![9; 8 << 20].leak();
    world.disks.add_image("base", Image { page: world.machine.image(bytes), offset: 0, bytes });
    let (five, mut front) = world.connected(5, "memory:8M,,xvda,w");
    let (six, mut other) = world.connected(6, "bundle:base,,xvda,w,overlay=16M");
    assert_eq!((world.machine.disk_frames(), front.write(&five, 16_000, 1)), (2048, 0));
    let taken = (0..1024).filter(|page| other.write(&six, page * 8, 2) == 0).count();
    assert_eq!((taken, world.machine.disk_frames()), (1024, 2048 + 1024));
    for domain in [5, 6] {
        let mut died = std::pin::pin!(world.disks.domain_died(domain));
        let mut left = world.machine.disk_frames();
        while world.machine.run_for(1, died.as_mut()).is_none() {
            let now = world.machine.disk_frames();
            assert!(left - now <= 512, "{} pages in a round", left - now);
            left = now;
        }
        world.end(domain);
    }
    assert_eq!(world.machine.disk_frames(), 0);
    // What was taken for a disk that does not fit is given back.
    world.machine.state.borrow_mut().most_disk_frames = Some(1500);
    assert_eq!(world.attach(5, "memory:8M,,xvda,w").unwrap_err(), "there are not 8388608 bytes of memory left");
    assert_eq!(world.machine.disk_frames(), 0);
}

#[test]
fn overlays_over_a_device_share_it_with_readers() {
    let world = World::new();
    world.media.borrow_mut().bytes.fill(9);
    let (five, mut front) = world.connected(5, "serial:abc,,xvda,w,overlay=64K");
    let (six, mut other) = world.connected(6, "serial:abc,,xvda,r");
    assert_eq!((front.write(&five, 0, 1), other.write(&six, 0, 1)), (0, -1));
    assert_eq!((front.read(&five, 0), other.read(&six, 0)), (Ok([1; 8]), Ok([9; 8])));
    assert_eq!(front.read(&five, 1), Ok([1, 1, 1, 1, 1, 1, 1, 9]));
    assert_eq!(world.attach(7, "serial:abc,,xvda,w").unwrap_err(), "abc is in use: guest5 reads it");
    world.end(5);
    world.end(6);
    world.assert_clean(&[5, 6]);
}

#[test]
fn a_late_device_is_waited_for_and_reset_where_a_disk_says_so() {
    let world = World::new();
    let (guest, mut front) = world.connected(5, "serial:abc,,xvda,w");
    world.media.borrow_mut().hangs = true;
    front.send(&guest, 1, 0, 10);
    world.machine.rounds(45_000);
    assert!(front.answers().is_empty(), "a late device is waited for");
    let died = world.disks.domain_died(5);
    assert_eq!(world.machine.run_for(100, died), None, "the device may still read the page");
    world.media.borrow_mut().hangs = false;
    world.end(5);
    world.assert_clean(&[5]);
    let (guest, mut front) = world.connected(5, "serial:abc,,xvda,w,late=2");
    world.media.borrow_mut().hangs = true;
    front.send(&guest, 1, 0, 10);
    world.machine.rounds(3_000);
    assert_eq!((front.answers(), world.media.borrow().resets), (vec![0], 1));
    world.media.borrow_mut().hangs = true;
    front.send(&guest, 1, 0, 10);
    world.machine.rounds(3);
    world.disks.reset("abc").unwrap();
    world.machine.rounds(10);
    assert_eq!(front.answers().len(), 1);
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_table_that_is_late_is_given_up_and_its_memory_is_kept_as_long_as_needed() {
    let world = World::new();
    mbr(&mut world.media.borrow_mut().bytes);
    let frames = world.machine.frames();
    world.media.borrow_mut().hangs = true;
    let why = world.attach(5, "serial:abc,,xvda,w,part=1").unwrap_err();
    assert_eq!(why, "abc: the device does not answer");
    assert_eq!(world.machine.frames(), frames + 1, "the device may still write it");
    assert_eq!(world.attach(5, "serial:abc,,xvda,w,part=1").unwrap_err(), "abc: the device does not answer");
    world.media.borrow_mut().hangs = false;
    world.machine.rounds(5);
    world.attach(5, "serial:abc,,xvda,w,part=1").unwrap();
    world.end(5);
    world.assert_clean(&[5]);
}

#[test]
fn a_lost_device_is_lost_for_all_its_guests() {
    let world = World::new();
    mbr(&mut world.media.borrow_mut().bytes);
    let (mut five, mut first) = world.connected(5, "serial:abc,,xvda,w,part=1");
    let (mut six, second) = world.connected(6, "serial:abc,,xvda,w,part=2");
    {
        let mut media = world.media.borrow_mut();
        (media.hangs, media.dead) = (true, true);
    }
    first.send(&five, 0, 0, 10);
    world.machine.rounds(3);
    world.disks.reset("abc").unwrap();
    world.machine.rounds(20);
    assert_eq!(first.answers(), [-1]);
    assert_eq!((first.back_state(&mut five), second.back_state(&mut six)), (5, 5));
    assert_eq!(world.listed(5)[0].counters.lost_pins, 1);
    assert_eq!(world.attach(7, "serial:abc,,xvda,r").unwrap_err(), "the disk abc is lost");
    first.step(&mut five);
    world.machine.rounds(10);
    first.set_state(&mut five, 1);
    for _ in 0..10 {
        Front::step(&mut first, &mut five);
    }
    assert_eq!(
        five.get(&format!("/local/domain/0/error/backend/vbd/5/{XVDA}/error")).as_deref(),
        Some("the disk is lost")
    );
    world.machine.run(world.disks.domain_died(5));
    world.machine.run(world.disks.domain_died(6));
    assert!(world.machine.state.borrow().rings.values().all(|count| *count == 0));
}
