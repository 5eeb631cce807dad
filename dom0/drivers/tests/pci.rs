//! Finding functions and their registers.

mod common;
use common::bus::{Bus, Space};
use drivers::hardware::ConfigurationPorts;
use drivers::pci::{Address, BadBar, Bar, Function, Scan};
use drivers::virtio::{Kind, Layout, NotTaken};
use std::cell::Cell;

const PLACE: Address = Address::new(0, 3, 0);

fn device(number: u16) -> Space {
    Space::new(0x8086, number, [2, 0, 0], 0)
}

fn many(mut space: Space) -> Space {
    space.words[3] |= 0x80 << 16;
    space
}

fn found(bus: &Bus) -> Vec<String> {
    Scan::new(bus).map(|found| format!("{} {:x}", found.address, found.device)).collect()
}

#[test]
fn bridges_are_followed_once_and_functions_found_where_there_are_many() {
    let at = Address::new;
    let bus = Bus::with([
        (at(0, 0, 0), device(1)),
        // Not seen: function 0 does not say that there are more.
        (at(0, 0, 1), device(2)),
        (at(0, 1, 0), many(device(3))),
        (at(0, 1, 5), device(4)),
        (at(0, 2, 0), Space::bridge(7)),
        (at(0, 3, 1), device(5)),
        // Back to where it came from, and to itself.
        (at(7, 0, 0), many(Space::bridge(0))),
        (at(7, 0, 1), Space::bridge(7)),
        (at(7, 31, 0), Space::bridge(255)),
        (at(255, 31, 0), many(device(6))),
        (at(255, 31, 7), device(7)),
        (at(9, 0, 0), device(8)),
    ]);
    let expected =
        ["00:00.0 1", "00:01.0 3", "00:01.5 4", "00:02.0 1234", "07:00.0 1234", "07:00.1 1234", "07:1f.0 1234"];
    let last = ["ff:1f.0 6", "ff:1f.7 7"];
    assert_eq!(found(&bus), [&expected[..], &last[..]].concat());
    assert!(found(&Bus::default()).is_empty());
}

/// Counts what is read of a bus.
#[derive(Debug, Default)]
struct Counting(Bus, Cell<usize>);

impl ConfigurationPorts for Counting {
    fn read(&self, function: Address, register: u8) -> u32 {
        self.1.set(self.1.get() + 1);
        self.0.read(function, register)
    }

    fn write(&self, _: Address, _: u8, _: u32) {
        panic!("a scan writes");
    }
}

/// Each read is two accesses that the hypervisor carries out, and every boot pays for them.
#[test]
fn a_scan_reads_an_absent_function_once() {
    let bus = Counting::default();
    assert_eq!((Scan::new(&bus).count(), bus.1.get()), (0, 32));
    let bus = Counting(Bus::with([(PLACE, device(1))]), Cell::new(0));
    assert_eq!((Scan::new(&bus).count(), bus.1.get()), (1, 34));
}

fn layout(space: Space) -> Result<Layout, NotTaken> {
    let bus = Bus::with([(PLACE, space)]);
    let found = Scan::new(&bus).next().unwrap();
    let kind = Kind::of(&found).unwrap();
    Layout::find(&Function::new(bus, PLACE), kind, &[0..0xa_0000, 0x10_0000..0x8000_0000])
}

#[test]
fn a_modern_disk_is_known_by_its_capabilities() {
    let layout = layout(Space::virtio_disk()).unwrap();
    assert_eq!(layout.kind, Kind::BLOCK);
    let text = format!("{layout:?}");
    assert!(text.contains(&format!("common: Region {{ address: {}, bytes: 4096 }}", 0xfe00_0000u32)), "{text}");
    assert!(text.contains(&format!("table: Region {{ address: {}, bytes: 32 }}", 0xfebd_5000u32)), "{text}");
    assert!(text.contains("notify_step: 4"), "{text}");
}

#[test]
fn what_is_not_taken_is_refused_by_name() {
    // Without capabilities: a legacy device.
    let legacy = Space::new(0x1af4, 0x1001, [1, 0, 0], 0);
    assert_eq!(layout(legacy), Err(NotTaken::LegacyOnly));
    let changed = |change: fn(&mut Space)| {
        let mut space = Space::virtio_disk();
        change(&mut space);
        layout(space)
    };
    let bar = |index, why| Err(NotTaken::Bar(index, why));
    // The number of the MSI-X capability changed.
    assert_eq!(changed(|space| space.words[16] &= !0xff), Err(NotTaken::NoMessages));
    assert_eq!(changed(|space| space.bar64(4, 0, 16384)), bar(4, BadBar::NotPlaced));
    assert_eq!(changed(|space| space.bar64(4, 0x7000_0000, 16384)), bar(4, BadBar::InRam));
    assert_eq!(changed(|space| space.bar64(4, 1 << 44, 16384)), bar(4, BadBar::TooHigh));
    assert_eq!(changed(|space| space.words[8] |= 1), bar(4, BadBar::Ports));
    assert_eq!(changed(|space| space.words[8] |= 2), bar(4, BadBar::Missing));
    assert_eq!(changed(|space| space.bar32(1, 0, 0)), bar(1, BadBar::Missing));
    // Registers behind the end of their BAR.
    assert_eq!(changed(|space| space.bar64(4, 0xfe00_0000, 8192)), Err(NotTaken::Registers("notification")));
    // A table of 2,048 messages in a page.
    assert_eq!(changed(|space| space.words[16] |= 0x7ff << 16), Err(NotTaken::Registers("interrupt")));
    assert_eq!(format!("{}", NotTaken::Bar(4, BadBar::InRam)), "BAR 4 lies in RAM");
}

#[test]
fn lists_that_lead_back_or_away_end() {
    for (link, next) in [(16, 0x40), (16, 0x3c), (16, 0xfc), (17, 0x40)] {
        let mut space = Space::virtio_disk();
        space.words[link] = space.words[link] & !0xff00 | next << 8;
        let bus = Bus::with([(PLACE, space)]);
        assert!(Function::new(bus, PLACE).capabilities().count() <= 48);
    }
}

#[test]
fn measuring_a_bar_leaves_it_as_it_was() {
    let mut space = Space::virtio_disk();
    space.words[1] |= 7;
    space.bar64(2, 0x123_4560_0000, 1 << 21);
    let bus = Bus::with([(PLACE, space.clone())]);
    let function = Function::new(bus.clone(), PLACE);
    assert_eq!(function.bar(2, &[]), Ok(Bar { address: 0x123_4560_0000, bytes: 1 << 21 }));
    assert_eq!(function.bar(1, &[]), Ok(Bar { address: 0xfebd_5000, bytes: 4096 }));
    assert_eq!(function.bar(6, &[]), Err(BadBar::Missing));
    assert_eq!(bus.0.borrow()[&PLACE].words, space.words);
}

#[test]
fn random_configuration_space_is_survived() {
    let mut random = test_random::Random::new();
    let mut taken = 0;
    for _ in 0..20_000 {
        let mut space = Space::virtio_disk();
        for _ in 0..random.below(6) {
            let word = random.below(64);
            let bit = 1 << random.below(32);
            space.words[word] =
                if random.one_in(8) { u32::try_from(random.next() >> 32).unwrap() } else { space.words[word] ^ bit };
        }
        // Which buses there are stays bounded whatever a bridge says.
        let bus = Bus::with([(PLACE, space)]);
        assert!(Scan::new(&bus).count() <= 256);
        bus.0.borrow_mut().get_mut(&PLACE).unwrap().words[3] &= !0x7f_0000;
        taken += usize::from(Layout::find(&Function::new(bus, PLACE), Kind::BLOCK, &[]).is_ok());
    }
    assert!(taken > 1000, "{taken}");
}
