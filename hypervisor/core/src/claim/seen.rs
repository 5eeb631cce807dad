//! What a CPU remembers of the walks it has made.
//!
//! Touches: page-table entries, to read them.
//! Keeps: P4, as a TLB does.

use super::Path;
use crate::addr::{ENTRIES, Frame, GuestVirt, PAGE_SHIFT, low32};
use crate::fault::{Fault, planted};
use crate::machine::{Cpus, Frames};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use hypercall_abi::mmu::pte::{ACCESSED, DIRTY, FRAME};

/// What a page is looked up for. Pages of one kind do not push out those of another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Stacks and arguments.
    Data = 0,
    /// Instructions.
    Code = 16,
    /// Page tables, as their owner maps them.
    Table = 32,
}

/// Pages of one kind that are remembered.
const PAGES: usize = 16;
const _: () = assert!(Kind::Code as usize == PAGES && Kind::Table as usize == 2 * PAGES);

/// The pages that a CPU has found by walking tables, remembered as its TLB remembers them: until it flushes.
///
/// Nothing that the walk has passed can have changed hands or type since, for whoever changes either has this CPU flush first
/// (P4); and where a table above the last level is changed, what changes it flushes too. Only the entry of the root and the leaf
/// may have become others meanwhile, without a flush, so both are compared at each use. A flush is answered where this CPU waits
/// for something or leaves the rules, never between the look and the use of the page.
#[derive(Debug)]
pub struct Seen {
    /// Vcpus that have come to this CPU so far.
    arrivals: AtomicU64,
    pages: [Found; 3 * PAGES],
}

with_new! {
    /// A page that was found.
    #[derive(Debug)]
    pub struct Found {
        /// Its number, plus one; 0 if none was.
        page: AtomicU64 = AtomicU64::new(0),
        /// [`Seen::life`] before the walk.
        life: AtomicU64 = AtomicU64::new(0),
        /// Machine address of the leaf; bit 0 says whether all levels allow writing.
        slot: AtomicU64 = AtomicU64::new(0),
        /// The leaf.
        leaf: AtomicU64 = AtomicU64::new(0),
        /// The root.
        root: AtomicU64 = AtomicU64::new(0),
        /// Its entry.
        upper: AtomicU64 = AtomicU64::new(0),
    }
}

impl Seen {
    /// Nothing was found yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { arrivals: AtomicU64::new(0), pages: [const { Found::new() }; 3 * PAGES] }
    }

    /// Another vcpu comes: nothing it knows was found.
    pub(crate) fn forget(&self) {
        if !planted(Fault::SeenByOthers) {
            self.arrivals.fetch_add(1, Relaxed);
        }
    }

    /// Moves when this CPU flushes, and when another vcpu comes: both only count up, so their sum stays only if both do.
    #[inline(always)]
    pub(super) fn life<M: Cpus>(&self, m: &M) -> u64 {
        let flushes = if planted(Fault::SeenOverFlush) { 0 } else { m.flushes() };
        self.arrivals.load(Relaxed).wrapping_add(flushes)
    }

    /// Where a page is remembered. Linux has the tops of its stacks eight pages apart.
    #[inline(always)]
    fn place(&self, at: GuestVirt, kind: Kind) -> Option<&Found> {
        let page = (at.0 >> PAGE_SHIFT) as usize;
        self.pages.get((page ^ (page / 8)) % PAGES + kind as usize)
    }

    /// The frame of a page, if it was found and is what a walk from this root would find.
    #[inline(always)]
    pub(super) fn recall<M: Frames + Cpus>(
        &self,
        m: &M,
        root: Frame,
        at: GuestVirt,
        kind: Kind,
        write: bool,
    ) -> Option<Frame> {
        let found = self.place(at, kind)?;
        let slot = found.slot.load(Relaxed);
        let known = found.page.load(Relaxed) == (at.0 >> PAGE_SHIFT) + 1 && slot & 1 >= u64::from(write);
        if !known || found.life.load(Relaxed) != self.life(m) {
            return None;
        }
        let then = found.leaf.load(Relaxed);
        let changed = (then ^ word(m, slot)?) & !(ACCESSED | DIRTY) != 0 && !planted(Fault::SeenOverLeaf);
        if changed || !found.is_below(m, root, at) {
            return None;
        }
        Some(Frame::from_u32(low32((then & FRAME) >> PAGE_SHIFT)))
    }

    /// Whether a page that its owner may write is still what was found, if nothing but leaves has changed without a flush.
    #[inline(always)]
    pub(crate) fn holds<M: Frames + Cpus>(&self, m: &M, at: GuestVirt) -> bool {
        self.place(at, Kind::Data).is_some_and(|found| {
            let slot = found.slot.load(Relaxed);
            found.page.load(Relaxed) == (at.0 >> PAGE_SHIFT) + 1
                && slot & 1 != 0
                && found.life.load(Relaxed) == self.life(m)
                && word(m, slot).is_some_and(|leaf| (leaf ^ found.leaf.load(Relaxed)) & !(ACCESSED | DIRTY) == 0)
        })
    }

    /// Remembers where a walk from a root has led, and in which life it began.
    pub(super) fn note<M: Frames + Cpus>(
        &self,
        m: &M,
        root: Frame,
        at: GuestVirt,
        (kind, life): (Kind, u64),
        path: &Path,
    ) {
        let above = root.address() | (at.slot(4) as u64 * 8);
        let (Some(found), Some(upper)) = (self.place(at, kind), word(m, above)) else { return };
        found.page.store((at.0 >> PAGE_SHIFT) + 1, Relaxed);
        found.life.store(life, Relaxed);
        found.slot.store(path.table.address() | (path.index as u64 * 8) | u64::from(path.writable), Relaxed);
        found.leaf.store(path.entry, Relaxed);
        found.root.store(root.number(), Relaxed);
        found.upper.store(upper, Relaxed);
    }
}

impl Found {
    /// Whether a root leads there: as the one that did, an entry of which does not change without a flush, or as its entry says
    /// what the entry said that did.
    #[inline(always)]
    fn is_below<M: Frames>(&self, m: &M, root: Frame, at: GuestVirt) -> bool {
        self.root.load(Relaxed) == root.number()
            || word(m, root.address() | (at.slot(4) as u64 * 8)) == Some(self.upper.load(Relaxed))
            || planted(Fault::SeenOverRoot)
    }
}

/// The word of a table at a machine address, whatever its low three bits.
#[inline(always)]
fn word<M: Frames>(m: &M, at: u64) -> Option<u64> {
    let page = m.page(Frame::from_u32(low32(at >> PAGE_SHIFT)));
    Some(page.get((at / 8 % ENTRIES as u64) as usize)?.load(SeqCst))
}
