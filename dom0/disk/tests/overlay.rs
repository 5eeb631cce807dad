//! An overlay against a model of it: what was written is read, what was given back is zero, the rest is the disk below.

use disk::{Disk, Memory, NoPlace, Overlay, Pages, Partition, Place, Shape, Whole};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use test_random::Random;

/// Pages with their contents: one word per sector, which tells what was written there last.
#[derive(Clone, Debug, Default)]
struct Heap(Rc<RefCell<State>>);

#[derive(Debug, Default)]
struct State {
    pages: BTreeMap<u64, [u64; 8]>,
    next: u64,
    refuse: bool,
}

impl Pages for Heap {
    fn take(&mut self) -> Option<u64> {
        let mut state = self.0.borrow_mut();
        if state.refuse {
            return None;
        }
        // The first page is number 0, which is a page like any other.
        let page = state.next;
        state.next += 1;
        state.pages.insert(page, [0; 8]);
        Some(page)
    }

    fn give_back(&mut self, page: u64) {
        self.0.borrow_mut().pages.remove(&page).expect("a page is given back twice");
    }
}

impl Heap {
    fn used(&self) -> u64 {
        self.0.borrow().pages.len() as u64
    }

    fn slot<T>(&self, page: u64, offset: u16, i: u64, f: impl FnOnce(&mut u64) -> T) -> T {
        let at = u64::from(offset) / 512 + i;
        f(&mut self.0.borrow_mut().pages.get_mut(&page).expect("no such page")[usize::try_from(at).unwrap()])
    }
}

/// Returns the contents of sector `n` of the disk below.
fn below(sector: u64) -> u64 {
    sector << 32 | 0xbbbb
}

/// Reads through the places of an overlay over a device.
fn read(disk: &mut impl Disk, heap: &Heap, mut sector: u64, mut count: u64) -> Vec<u64> {
    let mut out = Vec::new();
    while count > 0 {
        let (place, run) = disk.place(false, sector, u32::try_from(count).unwrap()).unwrap();
        assert!(run >= 1 && u64::from(run) <= count);
        for i in 0..u64::from(run) {
            out.push(match place {
                Place::Memory { page, offset } => heap.slot(page, offset, i, |word| *word),
                Place::Device { sector } => below(sector + i),
                Place::Zeroes => 0,
            });
        }
        (sector, count) = (sector + u64::from(run), count - u64::from(run));
    }
    out
}

fn device(sectors: u64) -> Whole {
    Whole::with_shape(Shape {
        sectors,
        block_bytes: 512,
        physical_bytes: 512,
        read_only: true,
        volatile: true,
        discard: None,
    })
}

#[test]
fn any_order_of_writes_and_discards_reads_as_the_model_says() {
    let mut random = Random::new();
    for round in 0..30u64 {
        let sectors = 1 + random.below(60_000);
        let limit = if round % 3 == 0 { 200_000 } else { 1 << 30 };
        let heap = Heap::default();
        let mut disk = Overlay::new(device(sectors), heap.clone(), limit).unwrap();
        let mut model: Vec<u64> = (0..sectors).map(below).collect();
        let mut touched = vec![false; usize::try_from(sectors).unwrap()];
        let near = random.below(sectors);
        for step in 0..4000u64 {
            let start = if random.below(2) == 0 { random.below(sectors) } else { near };
            let count = (1 + random.below(40)).min(sectors - start);
            let range = usize::try_from(start).unwrap()..usize::try_from(start + count).unwrap();
            heap.0.borrow_mut().refuse = random.below(20) == 0;
            match random.below(8) {
                0 => {
                    let count = if random.below(8) == 0 { sectors - start } else { count };
                    assert_eq!(disk.discard(start, count), Ok(None));
                    for at in usize::try_from(start).unwrap()..usize::try_from(start + count).unwrap() {
                        model[at] = if touched[at] { 0 } else { model[at] };
                    }
                }
                1..4 => {
                    let (mut at, mut left) = (start, count);
                    while left > 0 {
                        let Ok((place, run)) = disk.place(true, at, u32::try_from(left).unwrap()) else { break };
                        let Place::Memory { page, offset } = place else { panic!("written to {place:?}") };
                        for i in 0..u64::from(run) {
                            let value = step << 32 | (at + i);
                            heap.slot(page, offset, i, |word| *word = value);
                            let index = usize::try_from(at + i).unwrap();
                            (model[index], touched[index]) = (value, true);
                        }
                        (at, left) = (at + u64::from(run), left - u64::from(run));
                    }
                }
                _ => assert_eq!(read(&mut disk, &heap, start, count), model[range]),
            }
            assert!(disk.held_bytes() <= limit);
            assert!(disk.held_bytes() >= heap.used() * 4096);
        }
        assert_eq!(read(&mut disk, &heap, 0, sectors), model);
        disk.discard(0, sectors).unwrap();
        assert_eq!(heap.used(), 0, "all is given back, so no page is held");
        heap.0.borrow_mut().refuse = false;
        let _ = disk.place(true, 0, 1);
        disk.dissolve();
        assert_eq!(heap.used(), 0);
    }
}

#[test]
fn sectors_never_written_are_one_run_however_many() {
    let heap = Heap::default();
    let mut disk = Overlay::new(device(1 << 31), heap, 1 << 20).unwrap();
    assert_eq!(disk.place(false, 3, 1 << 30), Ok((Place::Device { sector: 3 }, 1 << 30)));
    disk.place(true, 1 << 20, 1).unwrap();
    assert_eq!(disk.place(false, 3, 1 << 30), Ok((Place::Device { sector: 3 }, (1 << 20) - 3)));
    disk.discard(0, 1 << 31).unwrap();
    assert_eq!(disk.place(false, 1 << 20, 9), Ok((Place::Zeroes, 1)));
    assert_eq!(disk.place(false, (1 << 20) + 1, 9), Ok((Place::Device { sector: (1 << 20) + 1 }, 9)));
}

#[test]
fn a_limit_holds_and_what_was_written_stays() {
    let heap = Heap::default();
    let mut disk = Overlay::new(device(1 << 21), heap.clone(), 64 * 1024).unwrap();
    let mut written = 0;
    // One sector in each 256 KiB: tables take as much as they can.
    let refused = (0..1 << 12).find_map(|i| {
        let placed = disk.place(true, i * 512, 1);
        written += u64::from(placed.is_ok());
        placed.err()
    });
    assert_eq!(refused, Some(NoPlace::NoRoom));
    assert!(disk.held_bytes() <= 64 * 1024 && written >= 12, "{written}");
    assert_eq!(heap.used(), written);
    // A sector that has a place is written again, although no room is left.
    assert!(disk.place(true, 0, 8).is_ok());
    // After a discard, the room of the page serves other sectors.
    disk.discard(0, 8).unwrap();
    assert!(disk.place(true, 8, 1).is_ok());
}

#[test]
fn overlays_lie_over_images_and_partitions() {
    let heap = Heap::default();
    let image = Memory::image(100, 512, 4096).unwrap();
    let mut disk = Overlay::new(image, heap.clone(), 1 << 20).unwrap();
    assert!(!disk.shape().read_only && disk.shape().discard.is_some());
    assert_eq!(disk.place(false, 0, 8), Ok((Place::Memory { page: 100, offset: 512 }, 7)));
    disk.place(true, 2, 1).unwrap();
    assert_eq!(disk.place(false, 0, 8), Ok((Place::Memory { page: 100, offset: 512 }, 2)));
    assert_eq!(disk.place(false, 2, 6), Ok((Place::Memory { page: 0, offset: 1024 }, 1)));
    assert_eq!(disk.place(true, 7, 2), Err(NoPlace::OutOfRange));
    let part = Partition::new(device(1000), 100, 50, false).unwrap();
    let mut disk: Box<dyn Disk> = Box::new(Overlay::new(part, heap, 1 << 20).unwrap());
    assert_eq!(disk.place(false, 49, 1), Ok((Place::Device { sector: 149 }, 1)));
    assert_eq!(disk.place(false, 49, 2), Err(NoPlace::OutOfRange));
}
