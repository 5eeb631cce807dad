//! Frames that belong to nobody, and what a frame goes through to belong to somebody.
//!
//! Free frames lie in blocks of `2^order`, aligned to their size, with a list for each order: whatever is taken or given
//! back costs a few steps per order, however large the machine is (P8). The first frame of a block says how large it is;
//! the lists are threaded through the first frames' link words, both ways, so that a block can be taken out of the middle.
//!
//! Some of the free frames are set aside: for each domain as many as the hypervisor may still have to keep on its behalf.
//! No domain gets those as memory, so what others use up makes no event channel or grant fail.

use super::state::{OwnerState, TypeState};
use super::table::{FrameTable, NO_PFN, bug, step};
use super::{Owner, Refused, Use};
use crate::addr::{DomainId, Frame, index, low32};
use crate::fault::{Fault, planted};
use crate::machine::{Cpus, Frames};
use core::ops::Range;
use core::sync::atomic::Ordering::SeqCst;

/// The largest block: 2^9 frames, a superpage's worth.
pub const MAX_ORDER: u32 = 9;
/// Sizes of blocks.
const ORDERS: usize = index(MAX_ORDER) + 1;
/// In a link: no frame.
const NIL: u32 = u32::MAX;

/// The free frames.
#[derive(Debug)]
pub(super) struct FreeList {
    /// By order, the first block.
    heads: [u32; ORDERS],
    count: u32,
    /// How many of them are set aside.
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
    /// Adds `count` frames of RAM from `first` on. Frames of a boot module may be added once it has been used up; frames
    /// that are free or somebody's stay so. Not yet zeroed.
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

    /// Says that `count` frames from `first` on are RAM. Those that were not added the hypervisor lives in: no domain gets
    /// them.
    pub fn reserve(&self, first: Frame, count: u32) {
        self.pool.with(|list| list.ram = list.ram.saturating_add(count));
        for (_, w) in self.rows(span(first, count)) {
            let _ = step(w.owner, |bits| match OwnerState::from_bits(bits).owner {
                Owner::NotRam => Ok((state(Owner::Hypervisor, 1).bits(), ())),
                _ => Err(()),
            });
        }
    }

    /// How many frames are free, those set aside among them.
    #[must_use]
    pub fn free_frames(&self) -> u32 {
        self.pool.with(|list| list.count)
    }

    /// How many free frames are not set aside: what domains can still be given.
    #[must_use]
    pub fn unpromised_frames(&self) -> u32 {
        self.pool.with(|list| list.unpromised())
    }

    /// How many frames are RAM: free, of a domain, or the hypervisor's.
    #[must_use]
    pub fn ram_frames(&self) -> u32 {
        self.pool.with(|list| list.ram)
    }

    /// Sets frames aside for what the hypervisor will keep on behalf of a domain that is being made.
    ///
    /// # Errors
    /// [`Refused::NoMemory`]: so many are not free, or they are set aside for others.
    pub fn promise(&self, id: DomainId, count: u32) -> Result<(), Refused> {
        let account = self.account(id).ok_or(Refused::NoMemory)?;
        self.pool.with(|list| {
            ensure!(count <= list.unpromised(), Refused::NoMemory);
            list.promised = list.promised.saturating_add(count);
            account.promised.fetch_add(count, SeqCst);
            Ok(())
        })
    }

    /// A domain is gone: what is left of its promise is for all.
    pub fn end_promise(&self, id: DomainId) {
        let Some(account) = self.account(id) else { return };
        self.pool.with(|list| list.promised = list.promised.saturating_sub(account.promised.swap(0, SeqCst)));
    }

    /// A zeroed frame for the hypervisor itself. Returned by [`FrameTable::retire`].
    ///
    /// # Errors
    /// [`Refused::NoMemory`].
    pub fn allocate(&self, m: &(impl Frames + Cpus)) -> Result<Frame, Refused> {
        let frame = self.pool.with(|list| self.take_spare(list, 0)).ok_or(Refused::NoMemory)?;
        self.prepare(m, frame, Owner::Hypervisor, NO_PFN);
        Ok(frame)
    }

    /// A zeroed frame for the hypervisor, out of those set aside for a domain. Returned by [`FrameTable::retire`].
    ///
    /// # Errors
    /// [`Refused::NoMemory`]: it has had all that were set aside.
    pub fn allocate_for(&self, m: &(impl Frames + Cpus), id: DomainId) -> Result<Frame, Refused> {
        self.take_promised(m, id, Owner::Hypervisor)
    }

    /// A zeroed frame of ours for the domain to map read-write, out of those set aside for it: shared info, grant tables.
    /// Returned by [`FrameTable::retire`].
    ///
    /// # Errors
    /// As [`FrameTable::allocate_for`].
    pub fn lend(&self, m: &(impl Frames + Cpus), id: DomainId) -> Result<Frame, Refused> {
        self.take_promised(m, id, Owner::Lent(id))
    }

    /// `2^order` zeroed frames in a row, aligned to their number, of the domain's own memory, which it knows as the pages
    /// from `pfn` on. It may own `limit` frames.
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

    /// Ends the hypervisor's own use of a frame from [`FrameTable::allocate`] or [`FrameTable::lend`]. A domain that still
    /// maps it keeps it from the pool until it lets go.
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
                self.drop_use(frame, id); // the permanent one
                self.drop_ref(frame, id);
            }
            Ok(_) => {
                self.stamp(&w);
                self.push_free(frame);
            }
            Err(()) => bug(frame, "retired but not ours"),
        }
    }

    /// A block that is not set aside.
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

    /// Makes a frame off the list its new owner's: nobody's translations lead to it (P4), and it holds zeros (P10).
    fn prepare(&self, m: &(impl Frames + Cpus), frame: Frame, owner: Owner, pfn: u64) {
        let Some(w) = self.words(frame) else { return };
        // Whoever knew the frame may be gone, so any CPU that runs guests may know it.
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

    /// Adds a free frame to a run of them, which goes to the pool first if this one lies elsewhere.
    pub(super) fn push_next(&self, run: Range<u32>, frame: u32) -> Range<u32> {
        let next = frame.wrapping_add(1);
        if frame == run.end {
            return run.start..next;
        }
        self.push_run(run);
        frame..next
    }

    /// Puts free frames in a row into the lists: as few blocks as there can be.
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

    /// Puts a block into the lists. Two free blocks that are the halves of a larger one become that.
    fn join(&self, list: &mut FreeList, mut first: u32, mut order: u32) {
        list.count = list.count.saturating_add(size(order));
        while order < MAX_ORDER && self.begins_block(first ^ size(order), order) {
            self.unlink(list, first ^ size(order), order);
            first &= !size(order);
            order = order.saturating_add(1);
        }
        self.insert(list, first, order);
    }

    /// Takes a block out of the lists, and gives back what a larger one has too much.
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

    /// Takes a block out of the list of its order: its frames are free, but nobody finds them any more.
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
        let block = Some(frame).filter(|frame| *frame != NIL); // at the end of a list there is nothing to look up
        if let Some(w) = block.and_then(|frame| self.words(Frame::from_u32(frame))) {
            let (next, before) = change(ends(w.link.load(SeqCst)));
            w.link.store(link(next, before), SeqCst);
        }
    }
}

/// Frames of a block.
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
