//! Pages, which guests change while the rules look at them, and what CPUs remember of them.

use super::{WholeMachine, lock};
use crate::machine::copy_bytes;
use crate::machine::{Cached, HOLE_MARK, Seen};
use crate::rng::Rng;
use crate::world::turns::{self, this_cpu};
use hv_core::addr::{CpuId, ENTRIES, Frame, HOLE_SLOTS, PAGE_SIZE};
use hv_core::frame::{FrameTable, Owner, Use};
use hv_core::machine::{Frames, Page};
use std::sync::atomic::Ordering::Relaxed;

/// What one look at a word costs.
const WORD_NS: u64 = 5;

/// Changes guest memory while the rules look at it, as another CPU of the guest could.
pub struct Race {
    /// The words of all frames: only what a guest can write is changed.
    pub frames: &'static FrameTable,
    /// Which frames.
    pub over: Vec<Frame>,
    /// How, and how often: one look in so many.
    pub rng: Rng,
    /// One look in so many.
    pub odds: usize,
}

/// Whose a frame is, as a number; 0 if it is nobody's, so that no harm comes of remembering it.
pub(in crate::world) fn owner_number(frames: &FrameTable, frame: Frame) -> u32 {
    match frames.info(frame).map(|info| info.owner.owner) {
        Some(Owner::Guest(id)) => 1 << 16 | u32::from(id.0),
        Some(Owner::Lent(id)) => 2 << 16 | u32::from(id.0),
        Some(Owner::Hypervisor) => 3 << 16,
        _ => 0,
    }
}

impl WholeMachine {
    /// Lets somebody interfere from now on with what this CPU looks at, or nobody; gives back who did.
    pub fn set_race(&self, race: Option<Race>) -> Option<Race> {
        self.here().racing.store(race.is_some(), Relaxed);
        std::mem::replace(&mut lock(&self.here().race), race)
    }

    fn looked(&self, frame: Frame, words: u64) {
        turns::between();
        let work = &self.here().work;
        work.store(work.load(Relaxed) + words, Relaxed); // one thread at a time
        self.pass(if self.steady.load(Relaxed) { 0 } else { words * WORD_NS });
        self.touched[frame.index()].store(true, Relaxed);
    }

    /// Changes a word of a frame a guest can write, if the dice say so.
    fn interfere(&self, frame: Frame) {
        if !self.here().racing.load(Relaxed) {
            return;
        }
        let mut race = lock(&self.here().race);
        let Some(race) = race.as_mut() else { return };
        if !race.rng.one_in(race.odds) || !race.over.contains(&frame) {
            return;
        }
        if race.frames.info(frame).is_some_and(|i| i.kind.used_as == Use::Writable && i.kind.count > 0) {
            let at = race.rng.below(ENTRIES);
            let old = self.pages[frame.index()][at].load(Relaxed);
            let new = match race.rng.below(4) {
                0 => 0,
                1 => u64::MAX,
                2 => old ^ 1 << race.rng.below(64),
                _ => race.rng.word(),
            };
            self.pages[frame.index()][at].store(new, Relaxed);
        }
    }

    /// The rules write bytes to memory that is somebody's, and no table.
    fn must_be_memory(&self, frame: Frame) {
        let Some(info) = self.world.get().and_then(|world| world.frames.info(frame)) else { return };
        let table = info.kind.live_table();
        assert!(table.is_none(), "P1: {frame:?} is written, and is a table of level {table:?}");
        assert!(info.owner.owner != Owner::Free, "P4: {frame:?} is written, and is nobody's");
    }

    /// Calls a look at the words of a frame that are not zero.
    pub fn words<R>(&self, frame: Frame, look: impl FnOnce(&[(usize, u64)]) -> R) -> R {
        let at = frame.index();
        let mut words = lock(&self.words);
        if self.touched[at].swap(false, Relaxed) {
            let list = &mut words[at];
            list.clear();
            list.extend(self.pages[at].iter().map(|w| w.load(Relaxed)).enumerate().filter(|&(_, w)| w != 0));
        }
        look(&words[at])
    }

    /// A word as it is, without a look of the rules.
    #[must_use]
    pub fn peek(&self, frame: Frame, at: usize) -> u64 {
        self.pages[frame.index()][at].load(Relaxed)
    }

    /// The guest changes a word of its memory.
    pub fn poke(&self, frame: Frame, at: usize, value: u64) {
        self.touched[frame.index()].store(true, Relaxed);
        self.pages[frame.index()][at].store(value, Relaxed);
    }

    /// Walks from the loaded root, or from a table it remembers, through random present entries, as the CPU does for a guest:
    /// remembers what it saw, sets accessed bits, and the dirty bit for a write. `frames` says whose each frame is.
    pub fn wander(&self, frames: &FrameTable, rng: &mut Rng) {
        let Some(root) = self.loaded().root else { return };
        let level_of = |c: &Cached| if let Seen::Table(level) = c.seen { Some((c.frame, level)) } else { None };
        let tables: Vec<(Frame, u8)> = lock(&self.here().cached).iter().filter_map(level_of).collect();
        let remembered = if self.cpu_count() > 1 && rng.one_in(3) { rng.pick(&tables) } else { None };
        let (mut table, first) = remembered.unwrap_or((root, 4));
        let mut writable = true;
        for level in (1..=first).rev() {
            self.remember(frames, table, Seen::Table(level));
            let live = |&(at, word): &(usize, u64)| word & 1 != 0 && !(level == 4 && HOLE_SLOTS.contains(&at));
            let candidates: Vec<usize> =
                self.words(table, |words| words.iter().filter(|w| live(w)).map(|w| w.0).collect());
            let Some(mut at) = rng.pick(&candidates) else { return };
            // Pages that become tables and pages again are looked at most.
            if level == 1 && self.cpu_count() > 1 && rng.one_in(2) {
                at = rng.pick(&[5, 6, 7, 8]).filter(|at| candidates.contains(at)).unwrap_or(at);
            }
            let old = self.peek(table, at);
            self.poke(table, at, old | 1 << 5 | if level == 1 && old & 2 != 0 { 1 << 6 } else { 0 });
            writable &= old & 2 != 0;
            let Some(next) = Frame::containing(old & 0x000f_ffff_ffff_f000) else { return };
            if next.index() >= self.pages.len() {
                return;
            }
            table = next;
        }
        self.remember(frames, table, Seen::Page { writable });
    }

    /// This CPU remembers that it took a frame for something.
    pub fn remember(&self, frames: &FrameTable, frame: Frame, seen: Seen) {
        let turn = owner_number(frames, frame);
        let what = Cached { cpu: CpuId(this_cpu() as u32), frame, turn, seen };
        let mut cached = lock(&self.here().cached);
        if !cached.contains(&what) {
            cached.push(what);
        }
    }

    /// The entry of the machine-to-physical table for a frame.
    #[must_use]
    pub fn m2p(&self, frame: Frame) -> u64 {
        self.m2p[frame.index()].load(Relaxed)
    }
}

impl Frames for WholeMachine {
    fn frame_limit(&self) -> u64 {
        self.pages.len() as u64
    }
    fn page(&self, frame: Frame) -> &Page {
        self.interfere(frame);
        self.looked(frame, 1);
        &self.pages[frame.index()]
    }
    fn read(&self, frame: Frame, offset: usize, to: &mut [u8]) {
        assert!(offset + to.len() <= PAGE_SIZE, "a read beyond the frame");
        self.looked(frame, 1 + to.len() as u64 / 8);
        let page = &self.pages[frame.index()];
        for (n, byte) in to.iter_mut().enumerate() {
            let at = offset + n;
            *byte = page[at / 8].load(Relaxed).to_le_bytes()[at % 8];
        }
        self.interfere(frame);
    }
    fn write(&self, frame: Frame, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= PAGE_SIZE, "a write beyond the frame");
        self.must_be_memory(frame);
        self.looked(frame, 1 + from.len() as u64 / 8);
        let page = &self.pages[frame.index()];
        for (n, byte) in from.iter().enumerate() {
            let at = offset + n;
            let mut bytes = page[at / 8].load(Relaxed).to_le_bytes();
            bytes[at % 8] = *byte;
            page[at / 8].store(u64::from_le_bytes(bytes), Relaxed);
        }
    }
    fn zero(&self, frame: Frame) {
        self.looked(frame, 64); // whole lines
        self.pages[frame.index()].iter().for_each(|word| word.store(0, Relaxed));
    }
    fn copy(&self, from: (Frame, usize), to: (Frame, usize), length: usize) {
        self.must_be_memory(to.0);
        self.looked(to.0, 1 + length as u64 / 4);
        copy_bytes(from, to, length, |frame| &self.pages[frame.index()]);
        self.interfere(from.0);
    }
    fn set_m2p(&self, frame: Frame, pfn: u64) {
        self.m2p[frame.index()].store(pfn, Relaxed);
    }
    fn direct(&self, frame: Frame) -> u64 {
        frame.address()
    }
    fn hole_entry(&self, index: usize) -> u64 {
        HOLE_MARK | index as u64
    }
}
