//! What a CPU remembers of the walks it has made.
//!
//! Touches: page-table entries, to read them.
//! Keeps: P4, as a TLB does.

use super::Path;
use crate::addr::{Frame, GuestVirt, PAGE_SHIFT, index, low32};
use crate::fault::{Fault, planted};
use crate::machine::{Cpus, Frames};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use hypercall_abi::mmu::pte::{ACCESSED, DIRTY};

/// What a page is looked up for. Pages of one kind do not push out those of another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Stacks and arguments.
    Data = 0,
    /// Instructions.
    Code = 32,
    /// Page tables, as their owner maps them.
    Table = 64,
}

/// How often this CPU has flushed, or forgotten another domain's pages: a page noted under another count is not trusted.
#[inline(always)]
pub(super) fn life<M: Cpus>(m: &M) -> u64 {
    if planted(Fault::SeenOverFlush) { 0 } else { m.flushes() }
}

/// Pages of one kind that are remembered.
const PAGES: usize = 32;
const _: () = assert!(Kind::Code as usize == PAGES && Kind::Table as usize == 2 * PAGES);

/// The pages that a CPU has found by walking tables, remembered as its TLB remembers them: until it flushes.
///
/// Nothing that the walk has passed can have changed hands or type since, for whoever changes either has this CPU flush first
/// (P4); and where a table above the last level is changed, what changes it flushes too. Without a flush only the root may have
/// become another, and the leaf may have changed, so both are compared at each use. A flush is answered where this CPU waits
/// for something or leaves the rules, never between the look and the use of the page.
///
/// All are pages of one domain, for whose flushes this CPU is asked until a vcpu of another domain comes, also while it sleeps.
#[derive(Debug)]
pub struct WalkCache {
    /// The page of the kernel's stack, as it was found when the entry code was told.
    stack: CachedPage,
    pages: [CachedPage; 3 * PAGES],
}

/// The number of no page.
const NONE: u64 = u64::MAX;

with_new! {
    /// A page that was found. Aligned so that one is found by a shift.
    #[derive(Debug)]
    #[repr(align(64))]
    pub struct CachedPage {
        /// Its number; [`NONE`] if none was.
        page: AtomicU64 = AtomicU64::new(NONE),
        /// [`life`] before the walk.
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

impl WalkCache {
    /// Nothing was found yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { stack: CachedPage::new(), pages: [const { CachedPage::new() }; 3 * PAGES] }
    }

    /// Where a page is remembered. Pages of code and of tables lie side by side. Stacks, a kernel's data and that of each CPU have
    /// numbers that differ in few bits, so data is placed by a hash of the whole number.
    #[inline(always)]
    fn place(&self, at: GuestVirt, kind: Kind) -> Option<&CachedPage> {
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 over the golden ratio
        let page = at.0 >> PAGE_SHIFT;
        let place = match kind {
            Kind::Data => page.wrapping_mul(SPREAD) >> (u64::BITS - PAGES.ilog2()),
            Kind::Code | Kind::Table => page % PAGES as u64,
        };
        self.pages.get(index(low32(place)) + kind as usize)
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
        let known = found.page.load(Relaxed) == at.0 >> PAGE_SHIFT && (!write || found.is_writable());
        if !known || found.life.load(Relaxed) != life(m) {
            return None;
        }
        let leaf = found.same_leaf(m).filter(|_| found.is_below(m, root, at))?;
        Some(Frame::from_u32(low32(leaf >> PAGE_SHIFT))) // RAM, so the frame's number has no more bits
    }

    /// The kernel's stack is in this page, which has just been found.
    #[inline(always)]
    pub(crate) fn stand_on(&self, at: GuestVirt) {
        let Some(found) = self.place(at, Kind::Data) else { return };
        let CachedPage { life, slot, leaf, upper, .. } = &self.stack;
        life.store(found.life.load(Relaxed), Relaxed);
        slot.store(found.slot.load(Relaxed), Relaxed);
        leaf.store(found.leaf.load(Relaxed), Relaxed);
        upper.store(found.upper.load(Relaxed), Relaxed);
    }

    /// Whether the kernel's stack is where it was if nothing but leaves has changed without a flush.
    #[inline(always)]
    pub(crate) fn stands<M: Frames + Cpus>(&self, m: &M) -> bool {
        self.stack.life.load(Relaxed) == life(m) && self.stack.same_leaf(m).is_some()
    }

    /// The same under another root, for a stack at this address.
    #[inline(always)]
    pub(crate) fn stands_under<M: Frames + Cpus>(&self, m: &M, root: Frame, at: GuestVirt) -> bool {
        self.stands(m) && entry_above(m, root, at) == self.stack.upper.load(Relaxed)
    }

    /// Whether it is where it was if nothing but the entry at a machine address may have changed, its low three bits left aside.
    #[inline(always)]
    pub(crate) fn stands_beside<M: Cpus>(&self, m: &M, at: u64) -> bool {
        self.stack.life.load(Relaxed) == life(m) && (self.stack.slot.load(Relaxed) ^ at) & !7 != 0
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
        let Some(found) = self.place(at, kind) else { return };
        found.page.store(at.0 >> PAGE_SHIFT, Relaxed);
        found.life.store(life, Relaxed);
        found.slot.store(path.slot() | u64::from(path.writable), Relaxed);
        found.leaf.store(path.entry, Relaxed);
        found.root.store(root.number(), Relaxed);
        found.upper.store(entry_above(m, root, at), Relaxed);
    }
}

/// The entry of a root that an address goes through.
#[inline(always)]
fn entry_above<M: Frames>(m: &M, root: Frame, at: GuestVirt) -> u64 {
    m.word(root.address() | (at.slot(4) as u64 * 8)).load(SeqCst)
}

impl CachedPage {
    #[inline(always)]
    fn is_writable(&self) -> bool {
        self.slot.load(Relaxed) & 1 != 0
    }

    /// The leaf, unless it is another now.
    #[inline(always)]
    fn same_leaf<M: Frames>(&self, m: &M) -> Option<u64> {
        let (then, now) = (self.leaf.load(Relaxed), m.word(self.slot.load(Relaxed)).load(SeqCst));
        ((then ^ now) & !(ACCESSED | DIRTY) == 0 || planted(Fault::SeenOverLeaf)).then_some(then)
    }

    /// Whether this root leads there: it is the root of the walk, whose entries do not change without a flush, or its entry says
    /// what that root's said.
    #[inline(always)]
    fn is_below<M: Frames>(&self, m: &M, root: Frame, at: GuestVirt) -> bool {
        self.root.load(Relaxed) == root.number()
            || entry_above(m, root, at) == self.upper.load(Relaxed)
            || planted(Fault::SeenOverRoot)
    }
}
