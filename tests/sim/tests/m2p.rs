//! The machine-to-physical entry of a frame is its owner's to set: none is written after the frame has gone to another.

use hv_core::addr::{CpuId, CpuSet, DomainId, Frame};
use hv_core::frame::FrameTable;
use hv_core::frame::table::{NO_PFN, WORDS};
use hv_core::lock::Held;
use hv_core::machine::{Cpus, Flush, Frames, Page};
use hv_core::paging::Space;
use sim::machine::SimMachine;
use std::cell::RefCell;
use std::sync::atomic::AtomicU64;

const US: DomainId = DomainId(1);
const THEM: DomainId = DomainId(2);
const OTHERS: DomainId = DomainId(3);

/// A machine on which another CPU does something just before an entry is written.
struct Hooked {
    m: SimMachine,
    before: RefCell<Option<Box<dyn FnOnce()>>>,
}

impl Frames for Hooked {
    fn frame_limit(&self) -> u64 {
        self.m.frame_limit()
    }
    fn page(&self, frame: Frame) -> &Page {
        self.m.page(frame)
    }
    fn read(&self, frame: Frame, offset: usize, to: &mut [u8]) {
        self.m.read(frame, offset, to);
    }
    fn write(&self, frame: Frame, offset: usize, from: &[u8]) {
        self.m.write(frame, offset, from);
    }
    fn zero(&self, frame: Frame) {
        self.m.zero(frame);
    }
    fn copy(&self, from: (Frame, usize), to: (Frame, usize), length: usize) {
        self.m.copy(from, to, length);
    }
    fn direct(&self, frame: Frame) -> u64 {
        self.m.direct(frame)
    }
    fn set_m2p(&self, frame: Frame, pfn: u64) {
        let before = self.before.borrow_mut().take();
        if let Some(work) = before {
            work();
        }
        self.m.set_m2p(frame, pfn);
    }
    fn hole_entry(&self, index: usize) -> u64 {
        self.m.hole_entry(index)
    }
}

impl Cpus for Hooked {
    fn this_cpu(&self) -> CpuId {
        CpuId(0)
    }
    fn flush(&self, cpus: CpuSet, what: Flush) {
        self.m.flush(cpus, what);
    }
    fn flushes(&self) -> u64 {
        self.m.flushes()
    }
    fn forget(&self) {
        Cpus::forget(&self.m);
    }
    fn kick(&self, _: CpuId) {}
}

/// A machine with three frames, and a table of them.
fn machine() -> (&'static Hooked, &'static FrameTable) {
    let table: &FrameTable = Box::leak(Box::new(FrameTable::new()));
    let words: Vec<AtomicU64> = (0..3 * WORDS).map(|_| AtomicU64::new(0)).collect();
    table.init(words.leak());
    table.add(Frame::from_u32(0), 3);
    (Box::leak(Box::new(Hooked { m: SimMachine::new(3), before: RefCell::new(None) })), table)
}

/// Every frame of theirs says what they were told.
fn is_right(m: &Hooked, table: &FrameTable, pfn: u64) {
    for frame in (0..3).map(Frame::from_u32) {
        let owner = table.info(frame).unwrap().owner;
        let wanted = if owner.allocated { pfn } else { NO_PFN };
        assert_eq!(m.m.m2p(frame), wanted, "{frame:?} of {owner:?}");
    }
}

#[test]
fn a_dead_domains_frame_keeps_what_its_next_owner_says() {
    let (m, table) = machine();
    let frame = table.populate(m, US, 0, 1, 9).unwrap();
    table.hold(m, frame, US, THEM, false).unwrap();
    // The last of the others lets go while the frame leaves its domain, and the frame is somebody's at once, if it can be.
    *m.before.borrow_mut() = Some(Box::new(move || {
        table.let_go(frame, THEM, false);
        while table.populate(m, OTHERS, 0, 7, 9).is_ok() {}
    }));
    let space = Space::of(US);
    while space.open(m, table, 16, &mut Held::entering_ring_0()).tear_down().is_err() {}
    while table.populate(m, OTHERS, 0, 7, 9).is_ok() {}
    is_right(m, table, 7);
}

#[test]
fn a_frame_given_back_keeps_what_its_next_owner_says() {
    let (m, table) = machine();
    let frame = table.populate(m, US, 0, 1, 9).unwrap();
    let space = Space::of(US);
    // One vcpu says which page the frame is, another gives it back.
    *m.before.borrow_mut() = Some(Box::new(move || {
        table.give_back(m, frame, US).unwrap();
        while table.populate(m, OTHERS, 0, 7, 9).is_ok() {}
    }));
    let request = frame.address() | 1;
    let _ = space.open(m, table, 16, &mut Held::entering_ring_0()).mmu_update(request, 5, US);
    while table.populate(m, OTHERS, 0, 7, 9).is_ok() {}
    is_right(m, table, 7);
}
