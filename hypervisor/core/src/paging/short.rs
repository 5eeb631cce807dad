//! The short ways over page tables: updates of one L1 entry that are as ordinary as they are frequent, the leaves of tables that
//! come and go, and what finds the entries of a sparse one.
//!
//! Ordinary is: the table is a live L1 table of the domain's own, and what its entry leads to, before and after, are frames of
//! the domain's own in a use they have already. Each way is a copy of one in `update` or `promote`; what is not ordinary ends
//! with `None` before anything has happened, and goes the long way. `tests/sim` carries out every call both ways and compares.

use super::Session;
use super::entry::{self, ACCESSED, DIRTY, PRESENT, WRITABLE};
use crate::addr::{ENTRIES, Frame, GuestVirt, PAGE_BYTES, index, low32};
use crate::claim;
use crate::fault::{Fault, planted};
use crate::frame::Use;
use crate::frame::own::{Mine, Own};
use crate::frame::table::GROUP;
use crate::machine::{Cpus, Frames, Page};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use hypercall_abi::mmu::{MmuUpdate, UpdateCommand};

/// The short ways over one domain's tables, under its paging lock.
pub(super) struct Short<'a, M> {
    m: &'a M,
    own: Own<'a>,
}

/// An entry of a live L1 table of the domain's own, and what it held when we looked.
#[derive(Clone, Copy)]
struct Place<'a> {
    table: Mine<'a>,
    index: usize,
    word: &'a AtomicU64,
    old: u64,
}

impl<'a, M: Frames + Cpus> Session<'a, M> {
    /// The short ways, if nothing else is to be done first.
    #[inline]
    pub(super) fn short(&self) -> Option<Short<'a, M>> {
        if self.state.dying.is_some() || !self.state.work.is_idle() {
            return None;
        }
        self.short_within()
    }

    /// The short ways, for a part of the work that is to be done first.
    #[inline]
    pub(super) fn short_within(&self) -> Option<Short<'a, M>> {
        Some(Short { m: self.m, own: Own::of(self.table, self.id())? })
    }
}

impl<'a, M: Frames + Cpus> Short<'a, M> {
    /// Carries out requests of mmu_update up to the first that is out of the ordinary, and says how many. Frames are the
    /// domain's own.
    pub(super) fn updates(&self, requests: &[MmuUpdate]) -> usize {
        let mut done = 0;
        while let Some(rest) = requests.get(done..).filter(|rest| !rest.is_empty()) {
            match self.some_updates(rest) {
                None | Some(0) => break,
                Some(some) => done = done.saturating_add(some),
            }
        }
        done
    }

    /// One request of mmu_update.
    #[inline(always)]
    pub(super) fn update(&self, request: MmuUpdate) -> Option<()> {
        let frame = Frame::containing(request.ptr)?;
        let (index, keep) = ordinary(frame, request.ptr)?;
        match self.own.find_l1(frame) {
            Some(table) => {
                let word = self.m.page(frame).get(index)?;
                self.replace(Place { table, index, word, old: word.load(SeqCst) }, request.val, keep)
            }
            None => self.updates_of_page(frame, &[request]).map(|_| ()),
        }
    }

    /// Those at the beginning of a list that are for one frame.
    fn some_updates(&self, requests: &[MmuUpdate]) -> Option<usize> {
        let first = requests.first()?;
        let frame = Frame::containing(first.ptr)?;
        ordinary(frame, first.ptr)?;
        match self.own.find_l1(frame) {
            Some(table) => self.updates_of_table(frame, table, requests),
            None => self.updates_of_page(frame, requests),
        }
    }

    fn updates_of_table(&self, frame: Frame, table: Mine<'a>, requests: &[MmuUpdate]) -> Option<usize> {
        let page = self.m.page(frame);
        let refused = requests.iter().position(|MmuUpdate { ptr, val }| {
            let Some((index, keep)) = ordinary(frame, *ptr) else { return true };
            let Some(word) = page.get(index) else { return true };
            self.replace(Place { table, index, word, old: word.load(SeqCst) }, *val, keep).is_none()
        });
        Some(refused.unwrap_or(requests.len()))
    }

    /// Into a page that is no table, which is held as writable meanwhile.
    fn updates_of_page(&self, frame: Frame, requests: &[MmuUpdate]) -> Option<usize> {
        let mine = self.own.find(frame)?;
        self.own.hold(mine, true)?;
        let page = self.m.page(frame);
        let done = requests.iter().map_while(|MmuUpdate { ptr, val }| {
            let (index, _) = ordinary(frame, *ptr)?;
            page.get(index)?.store(*val, SeqCst);
            Some(())
        });
        let done = done.count();
        self.own.let_go(mine, true);
        Some(done)
    }

    /// update_va_mapping without its flush, for a frame of the domain's own.
    pub(super) fn update_va(&self, root: Frame, at: GuestVirt, value: u64) -> Option<()> {
        let path = claim::walk(self.m, self.own.table(), root, at)?;
        let place = self.place(path.table, path.index)?;
        self.replace(place, value, 0)
    }

    /// Replaces an entry by what `change` makes of it: what it held, and whether something was stored.
    #[inline]
    pub(super) fn change(
        &self,
        table: Frame,
        index: usize,
        change: impl Fn(u64) -> Option<u64>,
    ) -> Option<(u64, bool)> {
        let place = self.place(table, index)?;
        let Some(new) = change(place.old) else { return Some((place.old, false)) };
        self.replace(place, new, 0)?;
        Some((place.old, true))
    }

    #[inline]
    fn place(&self, table: Frame, index: usize) -> Option<Place<'a>> {
        let (mine, word) = (self.own.find_l1(table)?, self.m.page(table).get(index)?);
        Some(Place { table: mine, index, word, old: word.load(SeqCst) })
    }

    /// Has an entry say something else, keeping those bits of it. What it led to is let go after it is gone.
    #[inline(always)]
    fn replace(&self, place: Place<'a>, new: u64, keep: u64) -> Option<()> {
        let Place { word, old, .. } = place;
        let new = entry::ordinary_leaf(new)?;
        let new = if new & PRESENT == 0 { new } else { new | old & keep };
        // The CPU may set A and D meanwhile: then the long way tries again.
        let swap = || word.compare_exchange(old, new, SeqCst, SeqCst).ok().map(|_| ());
        if entry::changes_right(old, new) {
            return self.change_right(new, swap);
        }
        if entry::holds_the_same(old, new) {
            return swap();
        }
        self.lead_elsewhere(place, new, swap)
    }

    /// The entry leads where it led, and keeps its reference; only its use as writable comes or goes.
    #[inline(always)]
    fn change_right(&self, new: u64, swap: impl Fn() -> Option<()>) -> Option<()> {
        let mine = self.own.led_to(new)?;
        if new & WRITABLE == 0 {
            let early = planted(Fault::DropEarly).then(|| self.own.drop_writable(mine));
            swap()?;
            early.unwrap_or_else(|| self.own.drop_writable(mine));
            return Some(());
        }
        if !planted(Fault::ShortWithoutUse) {
            self.own.take_use(mine, Use::Writable)?;
        }
        swap().or_else(|| {
            self.own.drop_writable(mine);
            None
        })
    }

    #[inline(always)]
    fn lead_elsewhere(&self, place: Place<'a>, new: u64, swap: impl Fn() -> Option<()>) -> Option<()> {
        let was = if place.old & PRESENT == 0 { None } else { Some(self.own.led_to(place.old)?) };
        if new & PRESENT == 0 {
            swap()?;
        } else {
            let (mine, writable) = (self.own.led_to(new)?, new & WRITABLE != 0);
            Own::note_entry(place.table, place.index);
            self.own.hold(mine, writable)?;
            if swap().is_none() {
                self.own.let_go(mine, writable);
                return None;
            }
        }
        if let Some(mine) = was {
            self.own.let_go(mine, place.old & WRITABLE != 0);
        }
        Some(())
    }

    /// Takes what the leaves of a table on its way up lead to, from an entry on, as long as they are ordinary; says where that
    /// ends.
    pub(super) fn climb(&self, frame: Frame, from: usize, end: usize) -> usize {
        let (page, mut at, mut noted) = (self.m.page(frame), from, ENTRIES);
        while at < end
            && let Some(word) = page.get(at)
        {
            let raw = word.load(SeqCst);
            if raw & PRESENT == 0 {
                at = next_present(page, at, end);
                continue;
            }
            if noted != at / GROUP {
                noted = at / GROUP;
                self.own.table().note_entry(frame, at, Fault::SkipNoteOfShortClimb);
            }
            if self.take_leaf(word, raw).is_none() {
                break;
            }
            at = at.saturating_add(1);
        }
        at
    }

    /// Takes what a leaf leads to, after it has the bits we force.
    fn take_leaf(&self, word: &AtomicU64, raw: u64) -> Option<()> {
        let leaf = entry::ordinary_leaf(raw)?;
        // The CPU may set A and D meanwhile: then the long way tries again.
        if leaf != raw && word.compare_exchange(raw, leaf, SeqCst, SeqCst).is_err() {
            return None;
        }
        self.own.hold(self.own.led_to(leaf)?, leaf & WRITABLE != 0)
    }

    /// Drops what a leaf led to.
    pub(super) fn drop_leaf(&self, raw: u64) -> Option<()> {
        if raw & PRESENT == 0 {
            return None;
        }
        self.own.let_go(self.own.led_to(raw)?, raw & WRITABLE != 0);
        Some(())
    }

    /// Takes one use of a frame as a table that it is already.
    pub(super) fn take_table(&self, frame: Frame, want: Use) -> Option<()> {
        self.own.hold_as(self.own.find(frame)?, want)
    }

    /// Drops one use of a table that has others.
    pub(super) fn drop_table(&self, frame: Frame) -> Option<()> {
        self.own.let_go_table(self.own.find(frame)?)
    }
}

/// The entry of a frame that a request is for, if it is one for that frame and of an ordinary kind, and the bits to keep.
#[inline(always)]
fn ordinary(frame: Frame, ptr: u64) -> Option<(usize, u64)> {
    const NORMAL: u64 = UpdateCommand::Normal.number();
    const PRESERVE_AD: u64 = UpdateCommand::PreserveAd.number();
    const SLOTS: u64 = PAGE_BYTES - 8;
    let at = ptr ^ frame.address();
    match at & !SLOTS {
        NORMAL => Some((index(low32(at >> 3)), 0)),
        PRESERVE_AD => Some((index(low32(at >> 3)), ACCESSED | DIRTY)),
        _ => None,
    }
}

/// The first entry from one on that is present; `end` if there is none before that.
pub(super) fn next_present(page: &Page, from: usize, end: usize) -> usize {
    let mut at = from;
    while at < end {
        if at.is_multiple_of(GROUP)
            && let Some(group) = page.get(at..end).and_then(<[AtomicU64]>::first_chunk::<GROUP>)
            && group.iter().fold(0, |any, word| any | word.load(Relaxed)) & PRESENT == 0
        {
            at = at.saturating_add(GROUP);
        } else if is_present(page, at) {
            return at;
        } else {
            at = at.saturating_add(1);
        }
    }
    end
}

/// One more than the last entry before one that is present; `end` if there is none from there on. `filled` says in which
/// groups there may be one ([`FrameTable::filled`]).
pub(super) fn last_present(page: &Page, before: usize, end: usize, filled: u32) -> usize {
    let mut at = before;
    while let Some(last) = at.checked_sub(1).filter(|_| at > end) {
        let group = last / GROUP;
        if filled >> (group & 31) & 1 == 0 {
            at = group.saturating_mul(GROUP);
        } else if is_present(page, last) {
            return at;
        } else {
            at = last;
        }
    }
    end
}

#[inline]
fn is_present(page: &Page, at: usize) -> bool {
    page.get(at).is_some_and(|word| word.load(SeqCst) & PRESENT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::ENTRIES;

    #[test]
    fn entries_are_found_wherever_they_are() {
        let page = [const { AtomicU64::new(2) }; ENTRIES];
        let there = [0, 1, 15, 16, 47, 48, 300, 511];
        let mut filled = 0;
        for at in there {
            page[at].store(3, SeqCst);
            filled |= 1 << (at / GROUP);
        }
        for from in 0..=ENTRIES {
            for end in [from, from + 1, from + 17, from + 200, ENTRIES] {
                let end = end.min(ENTRIES);
                let first = there.iter().find(|at| (from..end).contains(at)).copied();
                assert_eq!(next_present(&page, from, end), first.unwrap_or(end), "from {from} to {end}");
                let last = there.iter().rev().find(|at| (from..end).contains(at)).map(|at| at + 1);
                for filled in [filled, u32::MAX] {
                    assert_eq!(last_present(&page, end, from, filled), last.unwrap_or(from), "from {end} to {from}");
                }
            }
        }
    }
}
