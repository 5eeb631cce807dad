//! Frames that belong to nobody, and what a frame goes through to belong to somebody.
//!
//! The free list is threaded through the frames' link words, both ways, so that a block can be taken out of its middle.

use super::state::{OwnerState, TypeState};
use super::table::{FrameTable, NO_PFN, Words, bug, step};
use super::{Owner, Refused, Use};
use crate::addr::{DomainId, Frame};
use crate::fault::{Fault, planted};
use crate::machine::{Cpus, Frames};
use core::sync::atomic::Ordering::SeqCst;

/// In a link: no frame.
const NIL: u32 = u32::MAX;

/// The ends of the list of free frames.
#[derive(Debug)]
pub(super) struct FreeList {
    head: u32,
    count: u32,
    /// Frames of RAM, free or not.
    ram: u32,
}

impl FreeList {
    pub(super) const EMPTY: Self = Self { head: NIL, count: 0, ram: 0 };
}

impl FrameTable {
    /// Adds `count` frames of RAM from `first` on. Frames of a boot module may be added once it has been used up; frames
    /// that are free or somebody's stay so. Not yet zeroed.
    pub fn add(&self, first: Frame, count: u32) {
        for frame in frames(first, count) {
            let Some(w) = self.words(frame) else { return };
            let fresh = step(w.owner, |bits| match OwnerState::from_bits(bits) {
                OwnerState { owner: Owner::NotRam, .. } | OwnerState { owner: Owner::Hypervisor, refs: 1, .. } => {
                    Ok((state(Owner::Free, 0).bits(), ()))
                }
                _ => Err(()),
            });
            if fresh.is_ok() {
                self.push_free(frame);
            }
        }
    }

    /// Says that `count` frames from `first` on are RAM. Those that were not added the hypervisor lives in: no domain gets
    /// them.
    pub fn reserve(&self, first: Frame, count: u32) {
        self.pool.with(|list| list.ram = list.ram.saturating_add(count));
        for frame in frames(first, count) {
            let Some(w) = self.words(frame) else { return };
            let _ = step(w.owner, |bits| match OwnerState::from_bits(bits).owner {
                Owner::NotRam => Ok((state(Owner::Hypervisor, 1).bits(), ())),
                _ => Err(()),
            });
        }
    }

    /// How many frames are free.
    #[must_use]
    pub fn free_frames(&self) -> u32 {
        self.pool.with(|list| list.count)
    }

    /// How many frames are RAM: free, of a domain, or the hypervisor's.
    #[must_use]
    pub fn ram_frames(&self) -> u32 {
        self.pool.with(|list| list.ram)
    }

    /// A zeroed frame for the hypervisor itself. Returned by [`FrameTable::retire`].
    ///
    /// # Errors
    /// [`Refused::NoMemory`].
    pub fn allocate(&self, m: &(impl Frames + Cpus)) -> Result<Frame, Refused> {
        self.hand_out(m, Owner::Hypervisor, NO_PFN)
    }

    /// A zeroed frame of the domain's own memory, which it knows as page `pfn`. The caller has checked the domain's
    /// allowance ([`FrameTable::owned`]).
    ///
    /// # Errors
    /// [`Refused::NoMemory`].
    pub fn populate(&self, m: &(impl Frames + Cpus), id: DomainId, pfn: u64) -> Result<Frame, Refused> {
        self.hand_out(m, Owner::Guest(id), pfn)
    }

    /// A zeroed frame of ours for the domain to map read-write: shared info, grant tables. Returned by
    /// [`FrameTable::retire`].
    ///
    /// # Errors
    /// [`Refused::NoMemory`].
    pub fn lend(&self, m: &(impl Frames + Cpus), id: DomainId) -> Result<Frame, Refused> {
        self.hand_out(m, Owner::Lent(id), NO_PFN)
    }

    /// `2^order` zeroed frames in a row, aligned to their number. Searches the whole table: for boot and rare requests.
    ///
    /// # Errors
    /// [`Refused::NoMemory`].
    pub fn allocate_run(&self, m: &(impl Frames + Cpus), owner: Owner, order: u32, pfn: u64) -> Result<Frame, Refused> {
        let size = 1u32.checked_shl(order).ok_or(Refused::NoMemory)?;
        let first = self.pool.with(|list| {
            let run = (0..self.limit()).step_by(size as usize).find(|&start| {
                frames(Frame::from_u32(start), size).all(|f| self.info(f).is_some_and(|i| i.owner.owner == Owner::Free))
                    && start.checked_add(size).is_some_and(|end| end <= self.limit())
            })?;
            frames(Frame::from_u32(run), size).for_each(|f| self.unlink(list, f));
            Some(Frame::from_u32(run))
        });
        let first = first.ok_or(Refused::NoMemory)?;
        for (n, frame) in (0..).zip(frames(first, size)) {
            self.prepare(m, frame, owner, if pfn == NO_PFN { pfn } else { pfn.wrapping_add(n) });
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

    fn hand_out(&self, m: &(impl Frames + Cpus), owner: Owner, pfn: u64) -> Result<Frame, Refused> {
        let frame = self.pool.with(|list| {
            let frame = Some(list.head).filter(|&head| head != NIL).map(Frame::from_u32)?;
            self.unlink(list, frame);
            Some(frame)
        });
        let frame = frame.ok_or(Refused::NoMemory)?;
        self.prepare(m, frame, owner, pfn);
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
            self.count_owned(id, frame);
        }
        w.owner.store(state(owner, if lent { 2 } else { 1 }).bits(), SeqCst);
    }

    pub(super) fn push_free(&self, frame: Frame) {
        let Some(w) = self.words(frame) else { return };
        self.pool.with(|list| self.push(list, frame, &w));
    }

    pub(super) fn push(&self, list: &mut FreeList, frame: Frame, w: &Words<'_>) {
        w.kind.store(TypeState::FRESH.bits(), SeqCst);
        w.owner.store(state(Owner::Free, 0).bits(), SeqCst);
        w.link.store(link(list.head, NIL), SeqCst);
        self.relink(list.head, |(next, _)| (next, frame.as_u32()));
        list.head = frame.as_u32();
        list.count = list.count.saturating_add(1);
    }

    /// Takes a frame out of the list and marks it the hypervisor's, so that no search finds it again.
    fn unlink(&self, list: &mut FreeList, frame: Frame) {
        let Some(w) = self.words(frame) else { return };
        let (next, before) = ends(w.link.load(SeqCst));
        if before == NIL {
            list.head = next;
        }
        self.relink(before, |(_, b)| (next, b));
        self.relink(next, |(n, _)| (n, before));
        list.count = list.count.saturating_sub(1);
        w.owner.store(state(Owner::Hypervisor, 1).bits(), SeqCst);
    }

    fn relink(&self, frame: u32, change: impl Fn((u32, u32)) -> (u32, u32)) {
        if let Some(w) = self.words(Frame::from_u32(frame)).filter(|_| frame != NIL) {
            let (next, before) = change(ends(w.link.load(SeqCst)));
            w.link.store(link(next, before), SeqCst);
        }
    }
}

fn state(owner: Owner, refs: u32) -> OwnerState {
    OwnerState { owner, allocated: refs > 0, others: 0, refs }
}

fn frames(first: Frame, count: u32) -> impl Iterator<Item = Frame> {
    (0..count).map_while(move |n| first.as_u32().checked_add(n)).map(Frame::from_u32)
}

fn link(next: u32, before: u32) -> u64 {
    u64::from(next) | u64::from(before) << 32
}

fn ends(link: u64) -> (u32, u32) {
    ((link & 0xffff_ffff) as u32, (link >> 32) as u32)
}
