//! Changes of live tables: acquire the new target, write the entry, release the old target.

use super::entry::{self, Target};
use super::fast::Edit;
use super::promote::TRIES;
use super::{Outcome, Refused, Session, Stop, Sweep};
use crate::addr::{DomainId, ENTRIES, Frame, GuestVirt, HOLE_SLOTS, PAGE_SIZE, index, long};
use crate::claim;
use crate::fault::{Fault, planted};
use crate::frame::owned::OwnedFrames;
use crate::frame::table::NO_PFN;
use crate::frame::{Owner, Use};
use crate::machine::{Cpus, Frames};
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use hypercall_abi::mmu::{MmuUpdate, UpdateCommand};

/// One word of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// The frame.
    pub table: Frame,
    /// The index of the word, below 512.
    pub index: usize,
}

impl Slot {
    /// The slot at a machine address.
    ///
    /// # Errors
    /// [`Refused::Misaligned`], [`Refused::NoSuchFrame`].
    pub fn at(address: u64) -> Result<Self, Refused> {
        ensure!(address.is_multiple_of(8), Refused::Misaligned);
        let index = GuestVirt(address).offset() / 8;
        Ok(Self { table: Frame::containing(address).ok_or(Refused::NoSuchFrame)?, index })
    }

    /// The machine address of the slot.
    fn address(self) -> u64 {
        self.table.address() | long(self.index).wrapping_mul(8)
    }

    /// The word in the slot. The frame must be RAM.
    pub(super) fn word<M: Frames>(self, m: &M) -> Result<&AtomicU64, Refused> {
        m.page(self.table).get(self.index).ok_or(Refused::Misaligned)
    }
}

/// A guest's write to one of its own L1 tables through a read-only mapping, which faulted (ABI core 4.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableWrite {
    /// The slot at the faulting address.
    pub slot: Slot,
    /// The value of the slot when it was read.
    pub value: u64,
}

/// How a new entry replaces the old one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// Unconditionally.
    Store,
    /// Unconditionally, but keeping the accessed and dirty bits.
    KeepBits,
    /// Only if the old entry has exactly this value.
    Exchange(u64),
}

impl<'a, M: Frames + Cpus> Session<'a, M> {
    /// Carries out one request of mmu_update (ABI core 4.4). `address` has the command in its low three bits. `from` is
    /// the domain whose frames a new leaf may map; the caller has checked that this domain may map them.
    ///
    /// # Errors
    /// [`Stop::More`], or why the request is refused.
    pub fn mmu_update(&mut self, address: u64, value: u64, from: DomainId) -> Outcome<()> {
        self.mmu_updates(&[MmuUpdate { ptr: address, val: value }], from, &mut 0)
    }

    /// Carries out one request of mmu_update on the slow path: see [`Session::mmu_update`].
    fn extraordinary_update(&mut self, address: u64, value: u64, from: DomainId) -> Outcome<()> {
        let how = match UpdateCommand::from_number(address & 7).ok_or(Refused::Unknown)? {
            UpdateCommand::Normal | UpdateCommand::NoTranslate => How::Store,
            UpdateCommand::MachPhys => return self.set_m2p(address, value),
            UpdateCommand::PreserveAd => How::KeepBits,
        };
        self.ready()?;
        let slot = Slot::at(address & !7)?;
        let info = self.table.info(slot.table).ok_or(Refused::NoSuchFrame)?;
        if info.kind.count > 0 && info.kind.used_as.level().is_some() {
            return self.write_entry(slot, value, how, from).map(|_| ());
        }
        self.table.take_use(self.m, slot.table, Use::Writable, self.taker(self.id()))?;
        slot.word(self.m)?.store(value, SeqCst);
        self.table.drop_use(slot.table, self.id());
        Ok(())
    }

    /// Carries out requests of mmu_update in their order, up to the first that is refused or not done yet. Counts those
    /// that were carried out in `done`.
    ///
    /// # Errors
    /// As [`Session::mmu_update`].
    pub fn mmu_updates(&mut self, requests: &[MmuUpdate], from: DomainId, done: &mut usize) -> Outcome<()> {
        // Once the fast path has carried out nothing, it is not tried again for this list: the other requests are likely not
        // simple either, as in the lists of a toolstack.
        let mut promising = from == self.id();
        while let Some(rest) = requests.get(*done..).filter(|rest| !rest.is_empty()) {
            let did = if promising { self.own().map_or(0, |own| self.ordinary_updates(&own, rest)) } else { 0 };
            *done = done.saturating_add(did);
            promising = did > 0;
            let Some(MmuUpdate { ptr, val }) = requests.get(*done) else { break };
            self.extraordinary_update(*ptr, *val, from)?;
            *done = done.saturating_add(1);
        }
        Ok(())
    }

    /// Carries out requests of mmu_update on the fast path, up to the first that is not simple or that the budget does not
    /// allow; returns how many. Only for a call that names no other domain as the owner of the frames to map.
    #[inline]
    fn ordinary_updates(&mut self, own: &OwnedFrames<'a>, requests: &[MmuUpdate]) -> usize {
        let paid = requests.get(..requests.len().min(index(self.budget))).unwrap_or_default();
        let done = self.fast(own).map_or(0, |fast| fast.updates(paid));
        self.spend(done);
        done
    }

    fn set_m2p(&mut self, address: u64, pfn: u64) -> Outcome<()> {
        self.ready()?;
        let frame = Frame::containing(address).ok_or(Refused::NoSuchFrame)?;
        self.table.info(frame).ok_or(Refused::NoSuchFrame)?;
        let id = self.id();
        self.table.take_ref(frame, id, id)?; // so that no other domain gets the frame if another CPU gives it back
        let is_kept = || {
            let owner = self.table.info(frame).map(|info| info.owner);
            owner.is_some_and(|owner| owner.owner == Owner::Guest(id) && owner.allocated)
        };
        let kept = is_kept();
        if kept {
            self.m.set_m2p(frame, pfn);
            if !is_kept() {
                self.m.set_m2p(frame, NO_PFN);
            }
        }
        self.table.drop_ref(frame, id);
        if kept { Ok(()) } else { Err(Refused::NotOwner.into()) }
    }

    /// Returns the L1 slot that translates an address under a root. The slot must be in a table of this domain.
    ///
    /// # Errors
    /// [`Refused::NotMapped`], [`Refused::NotTable`].
    pub fn slot_of(&self, root: Frame, at: GuestVirt) -> Result<Slot, Refused> {
        let path = claim::walk(self.m, self.table, root, at).ok_or(Refused::NotMapped)?;
        match self.table.live_table(path.table, self.id()) {
            Some(1) => Ok(Slot { table: path.table, index: path.index }),
            _ => Err(Refused::NotTable),
        }
    }

    /// Does update_va_mapping (ABI core 4.5) without its flush.
    ///
    /// # Errors
    /// [`Stop::More`], or why the request is refused.
    pub fn update_va(&mut self, root: Frame, at: GuestVirt, value: u64, from: DomainId) -> Outcome<()> {
        if from == self.id() && self.own().and_then(|own| self.fast(&own)?.update_va(root, at, value)).is_some() {
            return Ok(());
        }
        self.ready()?;
        let slot = self.slot_of(root, at)?;
        self.write_entry(slot, value, How::Store, from).map(|_| ())
    }

    /// Stores a leaf for a frame of `from` into an L1 slot, for a grant or a foreign mapping. The entry holds its own
    /// reference like any leaf, in addition to the one that the grant takes (P6). If the guest overwrites the entry,
    /// only the entry's reference is dropped.
    ///
    /// # Errors
    /// [`Stop::More`], [`Refused::NotTable`] if the slot is not in an L1 table, and those of any update.
    pub fn map_leaf(&mut self, slot: Slot, raw: u64, from: DomainId) -> Outcome<()> {
        self.ready()?;
        self.need_l1(slot)?;
        self.write_entry(slot, raw, How::Store, from).map(|_| ())
    }

    /// Removes the leaf for `frame` that [`Session::map_leaf`] stored in `slot`. The session flushes the translation when it
    /// settles. With `by`, the entry in the slot `by` is moved to `slot`, with the references it holds.
    ///
    /// # Errors
    /// [`Refused::Mismatch`] if `slot` points to another frame by now or has other rights, or if `by` is the same as `slot`;
    /// and those of any update.
    pub fn unmap_leaf(&mut self, slot: Slot, frame: Frame, writable: bool, by: Option<Slot>) -> Outcome<()> {
        self.ready()?;
        self.need_l1(slot)?;
        let word = slot.word(self.m)?;
        ensure!(entry::target(word.load(SeqCst), 1) == (Target::Leaf { frame, writable }), Refused::Mismatch);
        let moved = match by {
            Some(by) => {
                self.need_l1(by)?;
                ensure!(by != slot, Refused::Mismatch);
                by.word(self.m)?.swap(0, SeqCst)
            }
            None => 0,
        };
        // The CPU may have set A or D; nothing else changes the entry, under the domain's lock. The moved entry needs
        // no new `note_entry`: the group was noted for the leaf that it replaces.
        self.release(word.swap(moved, SeqCst), 1);
        self.flush = true;
        Ok(())
    }

    fn need_l1(&self, slot: Slot) -> Result<(), Refused> {
        if self.table.live_table(slot.table, self.id()) == Some(1) { Ok(()) } else { Err(Refused::NotTable) }
    }

    /// Finds the slot that a faulting write to address `at` was for. The write must be to one of the domain's own L1 tables,
    /// through a read-only mapping.
    ///
    /// # Errors
    /// [`Stop::More`], or [`Refused::NotTableWrite`]: the guest then gets the fault.
    pub fn find_table_write(&mut self, root: Frame, at: GuestVirt) -> Outcome<TableWrite> {
        self.ready()?;
        let path = claim::walk(self.m, self.table, root, at).ok_or(Refused::NotTableWrite)?;
        let table = path.frame().filter(|_| path.entry & entry::WRITABLE == 0).ok_or(Refused::NotTableWrite)?;
        ensure!(self.table.live_table(table, self.id()) == Some(1), Refused::NotTableWrite);
        let slot = Slot { table, index: at.offset() / 8 };
        Ok(TableWrite { slot, value: slot.word(self.m)?.load(SeqCst) })
    }

    /// Carries out a write that [`Session::find_table_write`] found: of the whole word, unconditionally or only in
    /// place of `expected`. Returns `Some` with the slot's value if that differs from `expected`; the slot is then
    /// unchanged.
    ///
    /// # Errors
    /// [`Stop::More`], or why the new entry is refused: the guest then gets the fault.
    pub fn write_table(&mut self, slot: Slot, expected: Option<u64>, new: u64) -> Outcome<Option<u64>> {
        if let (Some(expected), Some(own)) = (expected, self.own())
            && let edit = (Edit { only: Some(expected), ..Edit::to(new) })
            && self.fast(&own).and_then(|fast| fast.edit(slot.address(), edit)) == Some((expected, true))
        {
            return Ok(None);
        }
        self.ready()?;
        self.need_l1(slot)?;
        self.write_entry(slot, new, expected.map_or(How::Store, How::Exchange), self.id())
    }

    fn write_entry(&mut self, slot: Slot, new: u64, how: How, from: DomainId) -> Outcome<Option<u64>> {
        let level = self.table.live_table(slot.table, self.id()).ok_or(Refused::NotTable)?;
        ensure!(level < 4 || !HOLE_SLOTS.contains(&slot.index), Refused::HoleSlot);
        let new = entry::parse(new, level)?;
        let word = slot.word(self.m)?;
        let mut old = word.load(SeqCst);
        // Checked before anything is taken, so that an exchange that must fail does nothing.
        if let How::Exchange(expected) = how
            && expected != old
        {
            return Ok(Some(old));
        }
        let wide = if planted(Fault::WideFastPath) { entry::WRITABLE } else { 0 };
        let harmless = entry::holds_the_same(old, new.raw ^ (old ^ new.raw) & wide);
        if new.target != Target::Nothing {
            self.table.note_entry(slot.table, slot.index, Fault::SkipNoteOfUpdate);
        }
        if !harmless {
            self.take(&new, level, from)?;
        }
        for _ in 0..TRIES {
            let kept = if how == How::KeepBits && new.target != Target::Nothing {
                old & (entry::ACCESSED | entry::DIRTY)
            } else {
                0
            };
            match word.compare_exchange(old, new.raw | kept, SeqCst, SeqCst) {
                Ok(_) => {
                    if level > 1 {
                        self.upper_written(old & entry::PRESENT != 0);
                    }
                    if !harmless && !planted(Fault::SkipUseDrop) {
                        self.release(old, level);
                    }
                    return Ok(None);
                }
                // Under the domain's lock only page walks of CPUs write here, and only A and D: the entry's target is the same.
                Err(now) => old = now,
            }
            if matches!(how, How::Exchange(expected) if expected != old) {
                break;
            }
        }
        if !harmless {
            self.release(new.raw, level);
        }
        if matches!(how, How::Exchange(_)) { Ok(Some(old)) } else { Err(Refused::Raced.into()) }
    }

    fn take(&mut self, new: &entry::Entry, level: u8, from: DomainId) -> Outcome<()> {
        match new.target {
            Target::Nothing => Ok(()),
            Target::Leaf { .. } => Ok(self.take_leaf(new, from)?),
            Target::Table(frame) => self.take_table(frame, level.saturating_sub(1)),
        }
    }

    fn release_table(&mut self, frame: Frame) {
        self.drop_table(frame);
        let _ = self.run(); // what the budget does not allow stays a debt
    }

    /// Pins a frame of this domain as a table of a level (ABI core 4.6).
    ///
    /// # Errors
    /// [`Stop::More`], [`Refused::AlreadyPinned`], or why the frame cannot be such a table.
    pub fn pin(&mut self, frame: Frame, level: u8) -> Outcome<()> {
        self.ready()?;
        let info = self.table.info(frame).ok_or(Refused::NoSuchFrame)?;
        let pinned = info.owner.owner == Owner::Guest(self.id()) && info.kind.pinned;
        ensure!(!pinned || planted(Fault::PinTwice), Refused::AlreadyPinned);
        self.take_table(frame, level)?;
        Ok(self.table.pin(frame).inspect_err(|_| self.release_table(frame))?)
    }

    /// Removes the pin of a frame.
    ///
    /// # Errors
    /// [`Stop::More`], [`Refused::NotOwner`], [`Refused::NotPinned`].
    pub fn unpin(&mut self, frame: Frame) -> Outcome<()> {
        self.ready()?;
        self.table.unpin(frame, self.id())?;
        self.release_table(frame);
        Ok(())
    }

    /// Replaces a root that a vcpu holds. `load` is called between taking the new root and dropping the old one. It
    /// must load the new root if this CPU has the old one loaded, because a CPU must not run on a table that is being
    /// undone.
    ///
    /// # Errors
    /// [`Stop::More`], or why the frame cannot be an L4 table; `load` has not been called then.
    pub fn switch_root(&mut self, old: Option<Frame>, new: Option<Frame>, load: impl FnOnce()) -> Outcome<()> {
        self.ready()?;
        if old == new {
            load();
            return Ok(());
        }
        if let Some(new) = new {
            self.take_table(new, 4)?;
        }
        load();
        if let Some(old) = old {
            self.release_table(old);
        }
        Ok(())
    }

    /// Drops a root that a vcpu held and that no CPU has loaded. The tables below it are undone until the budget ends;
    /// the rest becomes a debt. If the domain's memory is being destroyed, this does nothing.
    pub fn drop_root(&mut self, root: Frame) {
        if self.state.dying.is_some() {
            return;
        }
        self.drop_table(root);
        if !self.climbing() {
            let _ = self.run(); // a promotion under way is not continued: `tear_down` may abandon it
        }
    }

    /// Zeroes a page of `from` (CLEAR_PAGE, ABI core 4.6).
    ///
    /// # Errors
    /// Those of a frame that is not `from`'s or that must not be written.
    pub fn clear_page(&mut self, frame: Frame, from: DomainId) -> Outcome<()> {
        self.ready()?;
        self.table.take_use(self.m, frame, Use::Writable, self.taker(from))?;
        self.m.zero(frame);
        self.table.drop_use(frame, self.id());
        Ok(())
    }

    /// Copies a page of `from` to another (COPY_PAGE, ABI core 4.6).
    ///
    /// # Errors
    /// Those of a source that is not `from`'s, or of a target that must not be written.
    pub fn copy_page(&mut self, source: Frame, target: Frame, from: DomainId) -> Outcome<()> {
        self.ready()?;
        self.table.take_ref(source, from, self.id())?;
        let taken = self.table.take_use(self.m, target, Use::Writable, self.taker(from));
        if taken.is_ok() {
            self.m.copy((source, 0), (target, 0), PAGE_SIZE);
            self.table.drop_use(target, self.id());
        }
        self.table.drop_ref(source, self.id());
        Ok(taken.map(|_| ())?)
    }

    /// Destroys the domain's memory: abandons unfinished work, drops the references of its page tables on frames of
    /// others, and makes every frame leave the domain (P11). References of the domain on its own frames are not dropped
    /// one by one: they go with the frames. The caller has made sure that no CPU has a root of the domain loaded any
    /// more, and that its roots, its descriptor pages and all other uses of its frames are dropped. A frame that other
    /// domains still use goes to the pool once they drop it. From the first call on, all other operations are refused.
    ///
    /// # Errors
    /// [`Stop::More`]: call again.
    pub fn tear_down(&mut self) -> Outcome<()> {
        let span = self.table.span(self.id());
        if self.state.dying.is_none() {
            self.abandon_climb();
            self.state.dying = Some(Sweep::Tables(span.start));
        }
        self.run()?;
        while self.forget_oldest() {
            self.run()?;
        }
        while let Some(Sweep::Tables(from)) = self.state.dying {
            let end = self.pay(from, span.end)?;
            let table = self.table.next_l1(from..end, self.id()).inspect(|table| self.drop_foreign(*table));
            let next = table.map_or(end, |table| table.as_u32().saturating_add(1));
            self.state.dying = Some(if next < span.end { Sweep::Tables(next) } else { Sweep::Frames(span.start) });
        }
        while let Some(Sweep::Frames(from)) = self.state.dying
            && self.table.owned(self.id()) > 0
        {
            let end = self.pay(from, span.end)?;
            self.table.reclaim(self.m, from..end, self.id());
            self.state.dying = Some(Sweep::Frames(if end < span.end { end } else { span.start }));
        }
        self.table.forget(self.id());
        Ok(())
    }

    /// Takes from the budget what it costs to look at the frames `from..end`, or at as many of them as the budget allows.
    /// Returns the end of the frames that are paid for.
    fn pay(&mut self, from: u32, end: u32) -> Outcome<u32> {
        let end = end.min(from.saturating_add(self.budget));
        self.budget = self.budget.checked_sub(end.saturating_sub(from).max(1)).ok_or(Stop::More)?;
        Ok(end)
    }
}

const _: () = assert!(ENTRIES * 8 == PAGE_SIZE);
