//! Free frames, and how a frame gets an owner.
//!
//! Free frames lie in blocks of `2^order`, aligned to their size, with a list for each order. Allocating or freeing
//! costs a few steps per order, however large the machine is (P8). The owner's word of a block's first frame holds the
//! block's order. The link words of the first frames form the lists; they are linked both ways, so that a block can be
//! removed from the middle.
//!
//! Some of the free frames are set aside: for each domain, as many as the hypervisor may still need on its behalf. They
//! are never given to a domain as memory, so no event channel or grant fails because others used up the memory.

use super::state::{OwnerState, TypeState};
use super::table::{FrameTable, NO_PFN, bug, step};
use super::{Owner, Refused, Use};
use crate::addr::{DomainId, Frame, index, low32};
use crate::fault::{Fault, planted};
use crate::machine::{Cpus, Frames};
use core::ops::Range;
use core::sync::atomic::Ordering::SeqCst;

/// The order of the largest block: 2^9 frames, as many as a superpage.
pub const MAX_ORDER: u32 = 9;
/// Number of orders.
const ORDERS: usize = index(MAX_ORDER) + 1;
/// The value of a link to no frame.
const NIL: u32 = u32::MAX;

/// The free frames.
#[derive(Debug)]
pub(super) struct FreeList {
    /// For each order, the first block of its list.
    heads: [u32; ORDERS],
    count: u32,
    /// How many of the free frames are set aside.
    promised: u32,
    /// Frames of RAM, free or not.
    ram: u32,
}

impl FreeList {
    pub(super) const EMPTY: Self = Self { heads: [NIL; ORDERS], count: 0, promised: 0, ram: 0 };

    fn head(&self, order: u32) -> u32 {
        self.heads.get(index(order)).copied().unwrap_or(NIL)
    }

    fn set_head(&mut self, order: u32, block: u32) {
        if let Some(head) = self.heads.get_mut(index(order)) {
            *head = block;
        }
    }

    /// Free frames that are not set aside.
    fn unpromised(&self) -> u32 {
        self.count.saturating_sub(self.promised)
    }
}

impl FrameTable {
    /// Adds `count` frames of RAM from `first` on to the pool, not zeroed yet. Frames that are free or owned already
    /// are left as they are. A boot module's frames can be added once the module is used up.
    pub fn add(&self, first: Frame, count: u32) {
        let mut run = 0..0;
        for (number, w) in self.rows(span(first, count)) {
            let fresh = step(w.owner, |bits| {
                let OwnerState { owner, refs, .. } = OwnerState::from_bits(bits);
                ensure!(owner == Owner::NotRam || owner == Owner::Hypervisor && refs == 1, ());
                Ok::<_, ()>((OwnerState::FREE.bits(), ()))
            });
            if fresh.is_ok() {
                w.kind.store(TypeState::FRESH.bits(), SeqCst);
                run = self.push_next(run, number);
            }
        }
        self.push_run(run);
    }

    /// Records that `count` frames from `first` on are RAM. Those that are never added belong to the hypervisor: no
    /// domain gets them.
    pub fn reserve(&self, first: Frame, count: u32) {
        self.pool.with(|list| list.ram = list.ram.saturating_add(count));
        for (_, w) in self.rows(span(first, count)) {
            let _ = step(w.owner, |bits| match OwnerState::from_bits(bits).owner {
                Owner::NotRam => Ok((state(Owner::Hypervisor, 1).bits(), ())),
                _ => Err(()),
            });
        }
    }

    /// Number of free frames, including those set aside.
    #[must_use]
    pub fn free_frames(&self) -> u32 {
        self.pool.with(|list| list.count)
    }

    /// Number of free frames that are not set aside: the most that domains can still get.
    #[must_use]
    pub fn unpromised_frames(&self) -> u32 {
        self.pool.with(|list| list.unpromised())
    }

    /// Number of frames that are RAM: free, a domain's, or the hypervisor's.
    #[must_use]
    pub fn ram_frames(&self) -> u32 {
        self.pool.with(|list| list.ram)
    }

    /// Sets frames aside for what the hypervisor will keep on behalf of a domain that is being made.
    ///
    /// # Errors
    /// [`Refused::NoMemory`]: there are not `count` free frames that are not set aside already.
    pub fn promise(&self, id: DomainId, count: u32) -> Result<(), Refused> {
        let account = self.account(id).ok_or(Refused::NoMemory)?;
        self.pool.with(|list| {
            ensure!(count <= list.unpromised(), Refused::NoMemory);
            list.promised = list.promised.saturating_add(count);
            account.promised.fetch_add(count, SeqCst);
            Ok(())
        })
    }

    /// Returns to the pool what [`promise`](Self::promise) set aside and the domain has not used. The domain is gone.
    pub fn end_promise(&self, id: DomainId) {
        let Some(account) = self.account(id) else { return };
        self.pool.with(|list| list.promised = list.promised.saturating_sub(account.promised.swap(0, SeqCst)));
    }

    /// Allocates a zeroed frame for the hypervisor itself. Freed by [`FrameTable::retire`].
    ///
    /// # Errors
    /// [`Refused::NoMemory`].
    pub fn allocate(&self, m: &(impl Frames + Cpus)) -> Result<Frame, Refused> {
        let frame = self.pool.with(|list| self.take_spare(list, 0)).ok_or(Refused::NoMemory)?;
        self.prepare(m, frame, Owner::Hypervisor, NO_PFN);
        Ok(frame)
    }

    /// Allocates a zeroed frame for the hypervisor, out of those set aside for a domain. Freed by
    /// [`FrameTable::retire`].
    ///
    /// # Errors
    /// [`Refused::NoMemory`]: all frames set aside for the domain are used.
    pub fn allocate_for(&self, m: &(impl Frames + Cpus), id: DomainId) -> Result<Frame, Refused> {
        self.take_promised(m, id, Owner::Hypervisor)
    }

    /// Allocates a zeroed frame of the hypervisor that the domain may map read-write (shared info, grant tables), out
    /// of those set aside for the domain. Freed by [`FrameTable::retire`].
    ///
    /// # Errors
    /// As [`FrameTable::allocate_for`].
    pub fn lend(&self, m: &(impl Frames + Cpus), id: DomainId) -> Result<Frame, Refused> {
        self.take_promised(m, id, Owner::Lent(id))
    }

    /// Allocates `2^order` contiguous zeroed frames, aligned to their number, as the domain's own memory. The domain
    /// knows them as its pages from `pfn` on, and may own at most `limit` frames.
    ///
    /// # Errors
    /// [`Refused::OverLimit`], [`Refused::NoMemory`].
    pub fn populate(
        &self,
        m: &(impl Frames + Cpus),
        id: DomainId,
        order: u32,
        pfn: u64,
        limit: u64,
    ) -> Result<Frame, Refused> {
        ensure!(order <= MAX_ORDER, Refused::NoMemory);
        let count = size(order);
        self.count_owned(id, count, limit)?;
        let Some(first) = self.pool.with(|list| self.take_spare(list, order)) else {
            self.uncount_owned(id, count);
            return Err(Refused::NoMemory);
        };
        for (n, number) in (0..).zip(span(first, count)) {
            self.prepare(
                m,
                Frame::from_u32(number),
                Owner::Guest(id),
                if pfn == NO_PFN { pfn } else { pfn.wrapping_add(n) },
            );
        }
        Ok(first)
    }

    /// Frees a frame from [`FrameTable::allocate`] or [`FrameTable::lend`]. If a domain still maps it, the frame goes
    /// to the pool when the domain unmaps it.
    pub fn retire(&self, frame: Frame) {
        let Some(w) = self.words(frame) else { return bug(frame, "retired but not RAM") };
        let was = step(w.owner, |bits| {
            let was = OwnerState::from_bits(bits);
            match was.owner {
                Owner::Hypervisor | Owner::Lent(_) if was.allocated => Ok((was.orphaned().bits(), was.owner)),
                _ => Err(()),
            }
        });
        match was {
            Ok(Owner::Lent(id)) => {
                self.drop_use(frame, id); // the permanent use
                self.drop_ref(frame, id);
            }
            Ok(_) => {
                self.stamp(&w);
                self.push_free(frame);
            }
            Err(()) => bug(frame, "retired but not ours"),
        }
    }

    /// Takes a block out of the free frames that are not set aside.
    fn take_spare(&self, list: &mut FreeList, order: u32) -> Option<Frame> {
        let spare = if planted(Fault::BreakPromises) { list.count } else { list.unpromised() };
        if size(order) <= spare { self.take(list, order) } else { None }
    }

    fn take_promised(&self, m: &(impl Frames + Cpus), id: DomainId, owner: Owner) -> Result<Frame, Refused> {
        let account = self.account(id).ok_or(Refused::NoMemory)?;
        let frame = self.pool.with(|list| {
            let left = account.promised.load(SeqCst).checked_sub(1)?;
            let frame = self.take(list, 0)?;
            account.promised.store(left, SeqCst);
            list.promised = list.promised.saturating_sub(1);
            Some(frame)
        });
        let frame = frame.ok_or(Refused::NoMemory)?;
        self.prepare(m, frame, owner, NO_PFN);
        Ok(frame)
    }

    /// Prepares a frame that was taken off the list for its new owner: no translation leads to it (P4), and it is
    /// zeroed (P10).
    fn prepare(&self, m: &(impl Frames + Cpus), frame: Frame, owner: Owner, pfn: u64) {
        let Some(w) = self.words(frame) else { return };
        // The frame's former domain may be gone, so any CPU that runs guests may have translations to it.
        let stale = self.epochs.stale(self.epochs.all(), w.stamp.load(SeqCst) & (u64::MAX >> 1));
        if !planted(Fault::SkipFlush) {
            self.epochs.flush(m, stale);
        }
        if !planted(Fault::SkipScrub) {
            m.zero(frame); // after the flush, or a stale translation could still write
        }
        let lent = matches!(owner, Owner::Lent(_));
        let kind = if lent {
            TypeState { used_as: Use::Writable, validated: true, count: 1, ..TypeState::FRESH }
        } else {
            TypeState::FRESH
        };
        w.stamp.store(0, SeqCst);
        w.kind.store(kind.bits(), SeqCst);
        m.set_m2p(frame, pfn);
        if let Owner::Guest(id) = owner {
            self.widen_span(id, frame);
        }
        w.owner.store(state(owner, if lent { 2 } else { 1 }).bits(), SeqCst);
    }

    pub(super) fn push_free(&self, frame: Frame) {
        let Some(w) = self.words(frame) else { return };
        w.kind.store(TypeState::FRESH.bits(), SeqCst);
        w.owner.store(OwnerState::FREE.bits(), SeqCst);
        self.pool.with(|list| self.join(list, frame.as_u32(), 0));
    }

    /// Appends a free frame to a run of contiguous ones. If the frame is not contiguous, the run goes to the pool
    /// first.
    pub(super) fn push_next(&self, run: Range<u32>, frame: u32) -> Range<u32> {
        let next = frame.wrapping_add(1);
        if frame == run.end {
            return run.start..next;
        }
        self.push_run(run);
        frame..next
    }

    /// Puts contiguous free frames into the lists, in as few blocks as possible.
    pub(super) fn push_run(&self, run: Range<u32>) {
        self.pool.with(|list| {
            let mut first = run.start;
            while let Some(largest) = run.end.saturating_sub(first).checked_ilog2() {
                let order = largest.min(first.trailing_zeros()).min(MAX_ORDER);
                self.join(list, first, order);
                first = first.saturating_add(size(order));
            }
        });
    }

    /// Puts a block into the lists. It is joined with its other half, if that is free, and so on.
    fn join(&self, list: &mut FreeList, mut first: u32, mut order: u32) {
        list.count = list.count.saturating_add(size(order));
        while order < MAX_ORDER && self.begins_block(first ^ size(order), order) {
            self.unlink(list, first ^ size(order), order);
            first &= !size(order);
            order = order.saturating_add(1);
        }
        self.insert(list, first, order);
    }

    /// Takes a block out of the lists. If only a larger block is free, the rest of that block goes back.
    fn take(&self, list: &mut FreeList, wanted: u32) -> Option<Frame> {
        let found = (wanted..=MAX_ORDER).find(|order| list.head(*order) != NIL)?;
        let first = list.head(found);
        self.unlink(list, first, found);
        for order in (wanted..found).rev() {
            self.insert(list, first | size(order), order);
        }
        list.count = list.count.saturating_sub(size(wanted));
        Some(Frame::from_u32(first))
    }

    fn begins_block(&self, first: u32, order: u32) -> bool {
        self.words(Frame::from_u32(first)).is_some_and(|w| OwnerState::is_block(w.owner.load(SeqCst), order))
    }

    /// Puts a block at the front of the list of its order.
    fn insert(&self, list: &mut FreeList, first: u32, order: u32) {
        let Some(w) = self.words(Frame::from_u32(first)) else { return };
        w.owner.store(OwnerState::block(order), SeqCst);
        w.link.store(link(list.head(order), NIL), SeqCst);
        self.relink(list.head(order), |(next, _)| (next, first));
        list.set_head(order, first);
    }

    /// Takes a block out of the list of its order. Its frames are still marked free, but in no list.
    fn unlink(&self, list: &mut FreeList, first: u32, order: u32) {
        let Some(w) = self.words(Frame::from_u32(first)) else { return };
        let (next, before) = ends(w.link.load(SeqCst));
        if before == NIL {
            list.set_head(order, next);
        }
        self.relink(before, |(_, b)| (next, b));
        self.relink(next, |(n, _)| (n, before));
        w.owner.store(OwnerState::FREE.bits(), SeqCst);
    }

    fn relink(&self, frame: u32, change: impl Fn((u32, u32)) -> (u32, u32)) {
        let block = Some(frame).filter(|frame| *frame != NIL); // `NIL` has no words
        if let Some(w) = block.and_then(|frame| self.words(Frame::from_u32(frame))) {
            let (next, before) = change(ends(w.link.load(SeqCst)));
            w.link.store(link(next, before), SeqCst);
        }
    }
}

/// Number of frames in a block.
fn size(order: u32) -> u32 {
    1u32.wrapping_shl(order)
}

fn state(owner: Owner, refs: u32) -> OwnerState {
    OwnerState { owner, allocated: refs > 0, others: 0, refs }
}

fn span(first: Frame, count: u32) -> Range<u32> {
    first.as_u32()..first.as_u32().saturating_add(count)
}

fn link(next: u32, before: u32) -> u64 {
    u64::from(next) | u64::from(before) << 32
}

fn ends(link: u64) -> (u32, u32) {
    (low32(link), low32(link >> 32))
}
