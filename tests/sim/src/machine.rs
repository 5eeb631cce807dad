//! A machine for the rules to run on: pages in a vector, and CPUs that remember translations.

use crate::rng::Rng;
use hv_core::addr::{CpuId, CpuSet, ENTRIES, Frame, GuestVirt, HOLE_SLOTS, PAGE_SIZE};
use hv_core::frame::Use;
use hv_core::machine::{Cpus, Flush, Frames, Page};
use std::cell::{Cell, Ref, RefCell};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// What the hypervisor's slots of every L4 hold here.
pub const HOLE_MARK: u64 = 0x7e40_0000_0000_0000;

/// A translation some CPU may still use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cached {
    /// The CPU.
    pub cpu: CpuId,
    /// The frame it believes in.
    pub frame: Frame,
    /// Which owner the frame had then: counts the times it was handed out.
    pub turn: u32,
    /// As what.
    pub seen: Seen,
}

/// What a CPU took a frame for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// A page, perhaps writable.
    Page {
        /// Writable.
        writable: bool,
    },
    /// A page table of a level.
    Table(u8),
}

impl Seen {
    /// Whether a CPU that remembers a frame so does harm to one that is used like this now.
    #[must_use]
    pub fn harms(self, used_as: Use) -> bool {
        match self {
            Self::Page { writable: false } => false,
            Self::Page { writable: true } => used_as != Use::Writable,
            Self::Table(level) => Some(used_as) != Use::table(level),
        }
    }
}

/// Pages, the machine-to-physical table and translation caches.
pub struct SimMachine {
    pages: Vec<Box<Page>>,
    m2p: Vec<Cell<u64>>,
    /// The CPU the rules run on.
    pub cpu: Cell<u32>,
    /// What CPUs may remember.
    pub cached: RefCell<Vec<Cached>>,
    /// Complete flushes of one CPU so far.
    pub flushes: Cell<u64>,
    touched: Vec<Cell<bool>>,
    words: RefCell<Vec<Vec<(usize, u64)>>>,
}

impl SimMachine {
    /// A machine of so many frames, all zero.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self {
            pages: (0..frames).map(|_| Box::new([const { AtomicU64::new(0) }; ENTRIES])).collect(),
            m2p: (0..frames).map(|_| Cell::new(u64::MAX)).collect(),
            cpu: Cell::new(0),
            cached: RefCell::default(),
            flushes: Cell::new(0),
            touched: (0..frames).map(|_| Cell::new(false)).collect(),
            words: RefCell::new(vec![Vec::new(); frames]),
        }
    }

    /// The words of a frame that are not zero. Read again only if the frame was touched since, which every way to its
    /// memory notes.
    pub fn words(&self, frame: Frame) -> Ref<'_, [(usize, u64)]> {
        let at = frame.index();
        if self.touched[at].replace(false) {
            let list = &mut self.words.borrow_mut()[at];
            list.clear();
            list.extend(self.pages[at].iter().map(|w| w.load(SeqCst)).enumerate().filter(|&(_, w)| w != 0));
        }
        Ref::map(self.words.borrow(), |lists| lists[at].as_slice())
    }

    /// Has every frame read again.
    pub fn touch_all(&self) {
        self.touched.iter().for_each(|t| t.set(true));
    }

    /// Walks from a root the way a CPU does, through random present entries: remembers all it saw, sets accessed bits, and
    /// the dirty bit for a write.
    pub fn wander(&self, cpu: CpuId, root: Frame, turn_of: impl Fn(Frame) -> u32, rng: &mut Rng) {
        let mut table = root;
        let mut writable = true;
        for level in (1..=4u8).rev() {
            self.remember(Cached { cpu, frame: table, turn: turn_of(table), seen: Seen::Table(level) });
            let candidates: Vec<usize> = self
                .words(table)
                .iter()
                .filter(|(at, word)| word & 1 != 0 && !(level == 4 && HOLE_SLOTS.contains(at)))
                .map(|&(at, _)| at)
                .collect();
            let Some(at) = rng.pick(&candidates) else { return };
            let word = &self.page(table)[at];
            let entry = word.fetch_or(1 << 5, SeqCst);
            writable &= entry & 2 != 0;
            table = Frame::containing(entry & 0x000f_ffff_ffff_f000).expect("live entries lead to frames");
            if level == 1 {
                if table.index() >= self.pages.len() {
                    return; // a device
                }
                if writable && rng.one_in(2) {
                    word.fetch_or(1 << 6, SeqCst);
                }
                self.remember(Cached { cpu, frame: table, turn: turn_of(table), seen: Seen::Page { writable } });
            }
        }
    }

    fn remember(&self, what: Cached) {
        let mut cached = self.cached.borrow_mut();
        if !cached.contains(&what) {
            cached.push(what);
        }
    }

    /// A CPU loads a root: it forgets everything.
    pub fn forget(&self, cpu: CpuId) {
        self.cached.borrow_mut().retain(|c| c.cpu != cpu);
    }
}

impl SimMachine {
    /// The entry of the machine-to-physical table for a frame.
    #[must_use]
    pub fn m2p(&self, frame: Frame) -> u64 {
        self.m2p[frame.index()].get()
    }
}

/// Copies bytes from a page to another, or within one.
pub(crate) fn copy_bytes<'a>(
    (from, from_at): (Frame, usize),
    (to, to_at): (Frame, usize),
    length: usize,
    page: impl Fn(Frame) -> &'a Page,
) {
    assert!(from_at + length <= PAGE_SIZE && to_at + length <= PAGE_SIZE, "a copy beyond its frames");
    for n in 0..length {
        let byte = page(from)[(from_at + n) / 8].load(SeqCst).to_le_bytes()[(from_at + n) % 8];
        let word = &page(to)[(to_at + n) / 8];
        let mut bytes = word.load(SeqCst).to_le_bytes();
        bytes[(to_at + n) % 8] = byte;
        word.store(u64::from_le_bytes(bytes), SeqCst);
    }
}

impl Frames for SimMachine {
    fn frame_limit(&self) -> u64 {
        self.pages.len() as u64
    }
    fn page(&self, frame: Frame) -> &Page {
        self.touched[frame.index()].set(true);
        &self.pages[frame.index()]
    }
    fn read(&self, frame: Frame, offset: usize, to: &mut [u8]) {
        let page = self.page(frame);
        for (n, byte) in to.iter_mut().enumerate() {
            let at = offset + n;
            *byte = page[at / 8].load(SeqCst).to_le_bytes()[at % 8];
        }
    }
    fn write(&self, frame: Frame, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= PAGE_SIZE);
        let page = self.page(frame);
        for (n, byte) in from.iter().enumerate() {
            let at = offset + n;
            let mut bytes = page[at / 8].load(SeqCst).to_le_bytes();
            bytes[at % 8] = *byte;
            page[at / 8].store(u64::from_le_bytes(bytes), SeqCst);
        }
    }
    fn zero(&self, frame: Frame) {
        self.page(frame).iter().for_each(|w| w.store(0, SeqCst));
    }
    fn copy(&self, from: (Frame, usize), to: (Frame, usize), length: usize) {
        copy_bytes(from, to, length, |frame| self.page(frame));
    }
    fn set_m2p(&self, frame: Frame, pfn: u64) {
        self.m2p[frame.index()].set(pfn);
    }
    fn direct(&self, frame: Frame) -> u64 {
        frame.address()
    }
    fn hole_entry(&self, index: usize) -> u64 {
        HOLE_MARK | index as u64
    }
}

impl Cpus for SimMachine {
    fn this_cpu(&self) -> CpuId {
        CpuId(self.cpu.get())
    }
    fn flush(&self, cpus: CpuSet, what: Flush) {
        // A flush of one page may be taken for none: the rules must not rely on it for P4.
        if what == Flush::All {
            self.flushes.set(self.flushes.get() + u64::from(cpus.0.count_ones()));
            self.cached.borrow_mut().retain(|c| !cpus.has(c.cpu));
        }
    }
    fn flushes(&self) -> u64 {
        self.flushes.get()
    }
    fn forget(&self) {
        self.flushes.set(self.flushes.get() + 1);
    }
    fn kick(&self, _: CpuId) {}
}

/// The address that these slots of the four levels translate, highest first.
#[must_use]
pub fn address(slots: [usize; 4]) -> GuestVirt {
    let low = slots.iter().fold(0u64, |a, &s| a << 9 | s as u64) << 12;
    GuestVirt(if low >> 47 & 1 == 1 { low | 0xffff << 48 } else { low })
}
