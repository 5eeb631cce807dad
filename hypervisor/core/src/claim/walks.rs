//! A cache of the page walks that a CPU has made.
//!
//! Touches: page-table entries, to read them.
//! Keeps: P4, as a TLB does.

use super::Path;
use crate::addr::{Frame, GuestVirt, PAGE_SHIFT, index, low32};
use crate::fault::{Fault, planted};
use crate::machine::{Cpus, Frames};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use hypercall_abi::mmu::pte::{ACCESSED, DIRTY};

/// What a page is accessed for. Pages of one kind do not evict those of another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// For stacks and arguments.
    Data = 0,
    /// For instructions.
    Code = 32,
    /// For page tables, through their owner's mappings.
    Table = 64,
}

/// How often this CPU has flushed, or has dropped another domain's pages. An entry of the cache with another count is
/// invalid.
#[inline(always)]
pub(super) fn life<M: Cpus>(m: &M) -> u64 {
    if planted(Fault::SeenOverFlush) { 0 } else { m.flushes() }
}

/// Number of cached pages of one kind.
const PAGES: usize = 32;
const _: () = assert!(Kind::Code as usize == PAGES && Kind::Table as usize == 2 * PAGES);

/// The pages that a CPU found by walking tables. Like the entries of a TLB, they stay valid until the CPU flushes.
///
/// No table or page on the walk can have got another owner or type, because such a change first makes this CPU flush
/// (P4). A change of a table above the last level flushes, too. Without a flush, only the root may be another one and
/// the leaf may have changed; so both are compared at each use. This CPU answers flush requests only when it waits for
/// something or returns to the guest, never between the look-up and the use of a page.
///
/// All cached pages belong to one domain. Until a vcpu of another domain runs here, this CPU is asked for all flushes
/// of that domain, even while it is idle.
#[derive(Debug)]
pub struct WalkCache {
    /// The page of the guest kernel's stack, as cached when the entry code was last told of this stack.
    stack: CachedPage,
    pages: [CachedPage; 3 * PAGES],
}

/// A page number that stands for no page.
const NONE: u64 = u64::MAX;

with_new! {
    /// A cached page. Aligned so that its address is computed by a shift.
    #[derive(Debug)]
    #[repr(align(64))]
    pub struct CachedPage {
        /// The page's number; [`NONE`] if the entry is empty.
        page: AtomicU64 = AtomicU64::new(NONE),
        /// [`life`] as it was before the walk.
        life: AtomicU64 = AtomicU64::new(0),
        /// Machine address of the leaf's slot; bit 0 tells whether all levels allow writing.
        slot: AtomicU64 = AtomicU64::new(0),
        /// The leaf entry.
        leaf: AtomicU64 = AtomicU64::new(0),
        /// The root table of the walk.
        root: AtomicU64 = AtomicU64::new(0),
        /// The entry of the root table.
        upper: AtomicU64 = AtomicU64::new(0),
    }
}

impl WalkCache {
    /// An empty cache.
    #[must_use]
    pub const fn new() -> Self {
        Self { stack: CachedPage::new(), pages: [const { CachedPage::new() }; 3 * PAGES] }
    }

    /// The place of a page in the cache. Pages of code and of tables have consecutive numbers, so they are placed by
    /// the low bits. The numbers of stacks, of a kernel's data and of per-CPU data differ in few bits, so these are
    /// placed by a hash.
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

    /// Returns the frame of a page, if the cache has what a walk from this root would find.
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

    /// Records the page of the guest kernel's stack. A walk for `at` has just put it in the cache.
    #[inline(always)]
    pub(crate) fn stand_on(&self, at: GuestVirt) {
        let Some(found) = self.place(at, Kind::Data) else { return };
        let CachedPage { life, slot, leaf, upper, .. } = &self.stack;
        life.store(found.life.load(Relaxed), Relaxed);
        slot.store(found.slot.load(Relaxed), Relaxed);
        leaf.store(found.leaf.load(Relaxed), Relaxed);
        upper.store(found.upper.load(Relaxed), Relaxed);
    }

    /// Whether the kernel's stack is still the same frame, if only leaf entries have changed without a flush.
    #[inline(always)]
    pub(crate) fn stands<M: Frames + Cpus>(&self, m: &M) -> bool {
        self.stack.life.load(Relaxed) == life(m) && self.stack.same_leaf(m).is_some()
    }

    /// Like [`WalkCache::stands`], but under another root, for a stack at address `at`.
    #[inline(always)]
    pub(crate) fn stands_under<M: Frames + Cpus>(&self, m: &M, root: Frame, at: GuestVirt) -> bool {
        self.stands(m) && entry_above(m, root, at) == self.stack.upper.load(Relaxed)
    }

    /// Whether the kernel's stack is still the same frame, if only the entry at machine address `at` may have changed.
    /// The low three bits of `at` have no meaning.
    #[inline(always)]
    pub(crate) fn stands_beside<M: Cpus>(&self, m: &M, at: u64) -> bool {
        self.stack.life.load(Relaxed) == life(m) && (self.stack.slot.load(Relaxed) ^ at) & !7 != 0
    }

    /// Puts a page into the cache: `path` is the walk's result, `life` was read before the walk.
    #[inline(always)]
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

/// The root table's entry for an address.
#[inline(always)]
pub(super) fn entry_above<M: Frames>(m: &M, root: Frame, at: GuestVirt) -> u64 {
    m.word(root.address() | (at.slot(4) as u64 * 8)).load(SeqCst)
}

impl CachedPage {
    #[inline(always)]
    fn is_writable(&self) -> bool {
        self.slot.load(Relaxed) & 1 != 0
    }

    /// The cached leaf entry, if the entry in the table is still the same.
    #[inline(always)]
    fn same_leaf<M: Frames>(&self, m: &M) -> Option<u64> {
        let (then, now) = (self.leaf.load(Relaxed), m.word(self.slot.load(Relaxed)).load(SeqCst));
        ((then ^ now) & !(ACCESSED | DIRTY) == 0 || planted(Fault::SeenOverLeaf)).then_some(then)
    }

    /// Whether a walk from `root` reaches the cached page: `root` is the root of the walk (whose entries do not change
    /// without a flush), or its entry for the address is the same.
    #[inline(always)]
    fn is_below<M: Frames>(&self, m: &M, root: Frame, at: GuestVirt) -> bool {
        self.root.load(Relaxed) == root.number()
            || entry_above(m, root, at) == self.upper.load(Relaxed)
            || planted(Fault::SeenOverRoot)
    }
}
