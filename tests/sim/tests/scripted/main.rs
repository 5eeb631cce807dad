//! Stories about page tables, one rule each.

mod frames;
mod pauses;
mod tables;

use hv_core::addr::{DomainId, Frame};
use hv_core::frame::table::WORDS;
use hv_core::frame::{FrameTable, Refused, Use};
use hv_core::lock::Held;
use hv_core::machine::Frames;
use hv_core::paging::entry::{PRESENT, USER, WRITABLE};
use hv_core::paging::{BUDGET, Outcome, Session, Slot, Space, Stop};
use sim::machine::SimMachine;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

const FRAMES: u32 = 128;
const RAM: u32 = 120;
const US: DomainId = DomainId(1);
const THEM: DomainId = DomainId(2);
const RW: u64 = PRESENT | WRITABLE | USER;
const RO: u64 = PRESENT | USER;

struct Bench {
    m: SimMachine,
    table: Box<FrameTable>,
    space: Space,
    other: Space,
}

impl Bench {
    fn new() -> Self {
        let table = Box::new(FrameTable::new());
        let words: Vec<AtomicU64> = (0..FRAMES as usize * WORDS).map(|_| AtomicU64::new(0)).collect();
        table.init(words.leak());
        table.add(Frame::from_u32(0), RAM);
        Self { m: SimMachine::new(RAM as usize), table, space: Space::of(US), other: Space::of(THEM) }
    }

    fn page(&self) -> Frame {
        self.table.populate(&self.m, US, 0, 7, u64::MAX).expect("memory")
    }

    fn theirs(&self) -> Frame {
        self.table.populate(&self.m, THEM, 0, 7, u64::MAX).expect("memory")
    }

    fn put(&self, table: Frame, slot: usize, entry: u64) {
        self.m.page(table)[slot].store(entry, SeqCst);
    }

    fn at(&self, table: Frame, slot: usize) -> u64 {
        self.m.page(table)[slot].load(SeqCst)
    }

    fn with<R>(&self, budget: u32, work: impl FnOnce(&mut Session<'_, SimMachine>) -> R) -> R {
        work(&mut self.space.open(&self.m, &self.table, budget, &mut Held::entering_ring_0()))
    }

    fn does(&self, work: impl FnOnce(&mut Session<'_, SimMachine>) -> Outcome<()>) -> Outcome<()> {
        self.with(BUDGET, work)
    }

    /// Root, L3, L2, L1 and a page, connected by their slots 0 and not yet tables.
    fn tree(&self) -> [Frame; 5] {
        let tree = [self.page(), self.page(), self.page(), self.page(), self.page()];
        for pair in tree.windows(2) {
            self.put(pair[0], 0, pair[1].address() | RW);
        }
        tree
    }

    fn info(&self, frame: Frame) -> (Use, u32, u32) {
        let info = self.table.info(frame).expect("RAM");
        (info.kind.used_as, info.kind.count, info.owner.refs)
    }
}

fn slot(table: Frame, index: usize) -> Slot {
    Slot { table, index }
}

fn entry_at(table: Frame, index: usize) -> u64 {
    table.address() + 8 * index as u64
}

fn refused(why: Refused) -> Outcome<()> {
    Err(Stop::Refused(why))
}

/// Repeats a call as a guest does, and says how often.
fn until_done(
    b: &Bench,
    budget: u32,
    mut call: impl FnMut(&mut Session<'_, SimMachine>) -> Outcome<()>,
) -> (u32, Outcome<()>) {
    for calls in 1..10_000 {
        let outcome = b.with(budget, &mut call);
        if outcome != Err(Stop::More) {
            return (calls, outcome);
        }
    }
    panic!("never done");
}
