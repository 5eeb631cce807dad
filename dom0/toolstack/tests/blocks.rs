//! How a domain's memory is written by blocks: each byte where it belongs, and blocks used again.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use guest_image::MachineFrame;
use hypercall_abi::Errno;
use toolstack::blocks::{Blocks, View};

thread_local! {
    /// What was written: the first byte of each write, by domain, frame and offset.
    static WRITTEN: RefCell<BTreeMap<(u16, u64, usize), u8>> = RefCell::default();
    static SHOWN: Cell<usize> = const { Cell::new(0) };
    static REFUSES: Cell<bool> = const { Cell::new(false) };
}

struct Fake {
    domain: u16,
    frames: Vec<u64>,
}

impl View for Fake {
    fn reserve(count: u64) -> Result<Self, Errno> {
        assert_eq!(count, 64);
        Ok(Self { domain: 0, frames: Vec::new() })
    }

    fn show(&mut self, domain: u16, frames: &[u64]) -> Result<(), Errno> {
        self.frames.clear();
        if REFUSES.get() {
            return Err(Errno::Perm);
        }
        SHOWN.set(SHOWN.get() + 1);
        (self.domain, self.frames) = (domain, frames.to_vec());
        Ok(())
    }

    fn write(&self, index: u64, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        let frame = *self.frames.get(usize::try_from(index).unwrap()).ok_or(Errno::Inval)?;
        WRITTEN.with_borrow_mut(|written| written.insert((self.domain, frame, offset), bytes[0]));
        Ok(())
    }
}

fn written(domain: u16, frame: u64, offset: usize) -> Option<u8> {
    WRITTEN.with_borrow(|written| written.get(&(domain, frame, offset)).copied())
}

#[test]
fn pages_and_frames_are_written_where_they_are() {
    let frames: Vec<_> = (0..1000).map(|page| MachineFrame(5000 + page)).collect();
    let mut blocks = Blocks::<Fake>::new(3);
    for (page, byte) in [(0, 1), (63, 2), (64, 3), (999, 4), (1, 5)] {
        blocks.fill(&frames, page, 8, &[byte]).unwrap();
        assert_eq!(written(3, 5000 + page, 8), Some(byte));
    }
    // Three blocks hold these pages.
    assert_eq!(SHOWN.get(), 3);
    blocks.write(77, 16, &[6]).unwrap();
    assert_eq!((written(3, 77, 16), SHOWN.get()), (Some(6), 4));
    assert_eq!(blocks.fill(&frames, 1000, 0, &[7]), Err(Errno::Inval));
    assert_eq!(blocks.fill(&frames, 1 << 40, 0, &[7]), Err(Errno::Inval));
}

#[test]
fn the_block_not_used_for_the_longest_time_makes_room() {
    let frames: Vec<_> = (0..1000).map(MachineFrame).collect();
    let mut blocks = Blocks::<Fake>::new(3);
    let mut fill = |block: u64| blocks.fill(&frames, block * 64, 0, &[1]).map(|()| SHOWN.get());
    assert_eq!([0, 1, 2, 3].map(|block| fill(block).unwrap()), [1, 2, 3, 4]);
    // 0 is used again, so 4 takes the place of 1.
    assert_eq!([0, 4, 0, 2, 3, 4].map(|block| fill(block).unwrap()), [4, 5, 5, 5, 5, 5]);
    assert_eq!(fill(1), Ok(6));
}

#[test]
fn what_is_refused_is_not_taken_for_shown() {
    let frames: Vec<_> = (0..64).map(MachineFrame).collect();
    let mut blocks = Blocks::<Fake>::new(3);
    blocks.fill(&frames, 0, 0, &[1]).unwrap();
    REFUSES.set(true);
    assert_eq!(blocks.write(9, 0, &[2]), Err(Errno::Perm));
    assert_eq!(blocks.write(9, 0, &[2]), Err(Errno::Perm));
    REFUSES.set(false);
    blocks.write(9, 0, &[2]).unwrap();
    assert_eq!(written(3, 9, 0), Some(2));
}
