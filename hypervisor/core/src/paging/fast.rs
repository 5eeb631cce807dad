//! The fast paths over page tables:
//!
//! 1. They carry out updates of L1 entries, and requests of mmu_update that store words into pages which are no tables.
//! 2. When a table is promoted, they take the references and uses that its entries need. When the promotion is undone, they
//!    drop what the entries hold.
//! 3. They replace one root of a vcpu by another.
//! 4. They find the present entry of a table that is nearest to a given index. Towards higher indices they test 16 entries at a
//!    time. Towards lower indices they skip groups of 16 whose bit in the table's link word is clear (see `frame::table`): no
//!    entry of such a group is present.
//!
//! A case is simple only if these things hold; some functions ask for more:
//! - The frames concerned are the domain's own memory.
//! - A frame that gets a new use as a table of some level is a live table of this level already.
//! - A frame that gets a new use as writable is used as writable already, was last used as writable, or was never used.
//! - When a use of a table is dropped, the table has other uses left.
//! - A new leaf asks for no cacheability other than write-back.
//!
//! Each fast path does what a path in `update` or `promote` does. If a case is not simple, or if a CPU has set the accessed or
//! dirty bit of an entry since the entry was read, the fast path returns `None` (or stops at that case, if it handles several),
//! and the caller takes the slow path. By then the fast path holds no reference or use for that case. It may have stored the
//! bits that the hypervisor forces in every leaf, or set the bit of a group in the table's link word; the slow path would do
//! both too. It may also have taken a use of a frame as writable and dropped it again. This changes three records of the frame:
//! its last use, its stamp, and how many times its uses fell to 0. `tests/sim` makes every call both ways and compares.

use super::entry::{self, ACCESSED, DIRTY, PRESENT, Target, WRITABLE};
use super::{Session, Space, State};
use crate::addr::{ENTRIES, Frame, GuestVirt, HOLE_SLOTS, PAGE_BYTES, PAGE_SHIFT, index, low32};
use crate::claim;
use crate::fault::{Fault, planted};
use crate::frame::Use;
use crate::frame::owned::{OwnedFrame, OwnedFrames};
use crate::frame::table::GROUP;
use crate::lock::{Above, Domain, Guard, Held, Level};
use crate::machine::{Cpus, Frames, Page};
use core::ops::{Deref, Range};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use hypercall_abi::mmu::{MmuUpdate, UpdateCommand};

/// The fast paths over one domain's tables. The caller holds the domain's paging lock.
pub(crate) struct FastPath<'s, 'a, M> {
    m: &'a M,
    own: &'s OwnedFrames<'a>,
}

/// A [`FastPath`] together with the guard of the paging lock.
pub(crate) struct LockedFastPath<'s, 'a, M> {
    fast: FastPath<'s, 'a, M>,
    _lock: Guard<'s, Domain, State>,
}

impl<'s, 'a, M> Deref for LockedFastPath<'s, 'a, M> {
    type Target = FastPath<'s, 'a, M>;
    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.fast
    }
}

impl Space {
    /// Takes the paging lock for fast paths; `None` if the domain has unfinished work or is being destroyed. Unlike a
    /// [`Session`], a fast path does no flush at its end, because it writes no table above level 1. As everywhere, a frame is
    /// stamped when its last use goes, and CPUs flush before the frame gets another kind of use (P4).
    #[inline(always)]
    pub(crate) fn fast_path<'s, 'a, M, H: Level>(
        &'s self,
        m: &'a M,
        own: &'s OwnedFrames<'a>,
        held: &'s mut Held<H>,
    ) -> Option<LockedFastPath<'s, 'a, M>>
    where
        Domain: Above<H>,
    {
        let lock = self.state.lock(held);
        lock.is_free().then_some(LockedFastPath { fast: FastPath { m, own }, _lock: lock })
    }
}

impl State {
    /// Whether there is no unfinished work, and the domain is not being destroyed.
    #[inline(always)]
    fn is_free(&self) -> bool {
        self.dying.is_none() & self.work.is_idle()
    }
}

/// How a write changes an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Edit {
    /// Bits that keep their values.
    pub(crate) keep: u64,
    /// Bits that are set.
    pub(crate) set: u64,
    /// The value that the entry must have: if the entry has another value, nothing is stored. `None`: any value.
    pub(crate) only: Option<u64>,
}

impl Edit {
    /// Replaces the whole entry by `set`.
    pub(crate) fn to(set: u64) -> Self {
        Self { keep: 0, set, only: None }
    }
}

/// An entry of a live L1 table of the domain's own, and the value it had when it was read.
#[derive(Clone, Copy)]
struct TableSlot<'a> {
    table: OwnedFrame<'a>,
    /// The entry's machine address; the low three bits have no meaning.
    at: u64,
    word: &'a AtomicU64,
    old: u64,
}

impl TableSlot<'_> {
    /// Stores a new value. If the CPU has set A or D since the entry was read, this fails, and the slow path tries again.
    #[inline(always)]
    fn swap(self, new: u64) -> Option<()> {
        self.word.compare_exchange(self.old, new, SeqCst, SeqCst).ok().map(|_| ())
    }
}

impl<'a, M: Frames + Cpus> Session<'a, M> {
    /// The fast paths over the domain's frames `own`; `None` if the domain has unfinished work or is being destroyed.
    #[inline(always)]
    pub(super) fn fast<'s>(&self, own: &'s OwnedFrames<'a>) -> Option<FastPath<'s, 'a, M>> {
        self.state.is_free().then_some(self.fast_within(own))
    }

    /// Like [`Session::fast`], but does not check for unfinished work or for a domain that is being destroyed. To be
    /// used by the unfinished work itself, and to take or drop uses of tables while there is such work.
    #[inline(always)]
    pub(super) fn fast_within<'s>(&self, own: &'s OwnedFrames<'a>) -> FastPath<'s, 'a, M> {
        FastPath { m: self.m, own }
    }

    /// The domain's own frames; `None` if fast paths are switched off.
    #[inline]
    pub(super) fn own(&self) -> Option<OwnedFrames<'a>> {
        OwnedFrames::of(self.table, self.id())
    }
}

impl<'a, M: Frames + Cpus> FastPath<'_, 'a, M> {
    /// Carries out requests of mmu_update in order, and stops before the first that is not simple. Returns how many requests
    /// were carried out. Only for a call that names no other domain as the owner of the frames to map; the caller has checked
    /// this. A request whose new entry points to a frame that is not the domain's own is not simple.
    pub(crate) fn updates(&self, requests: &[MmuUpdate]) -> usize {
        let mut done = 0;
        while let Some(rest) = requests.get(done..).filter(|rest| !rest.is_empty()) {
            match self.some_updates(rest) {
                None | Some(0) => break,
                Some(some) => done = done.saturating_add(some),
            }
        }
        done
    }

    /// Carries out one request of mmu_update, as [`FastPath::updates`] does; `None` if the request is not simple.
    #[inline(always)]
    pub(crate) fn update(&self, request: MmuUpdate) -> Option<()> {
        let frame = Frame::from_u32(low32(request.ptr >> PAGE_SHIFT));
        let (_, keep) = ordinary(frame, request.ptr)?;
        match self.own.find_l1(frame) {
            Some(table) => self.replace(self.place(table, request.ptr), request.val, keep),
            None => self.updates_of_page(frame, &[request]).map(|_| ()),
        }
    }

    /// Carries out the first request and those after it, and stops before one that is for another frame or not simple. Returns
    /// how many requests were carried out; `None` or 0 if the first one was not simple.
    fn some_updates(&self, requests: &[MmuUpdate]) -> Option<usize> {
        let first = requests.first()?;
        let frame = Frame::containing(first.ptr)?;
        ordinary(frame, first.ptr)?;
        match self.own.find_l1(frame) {
            Some(table) if first.val & PRESENT == 0 => Some(self.updates_of_table::<true>(frame, table, requests)),
            Some(table) => Some(self.updates_of_table::<false>(frame, table, requests)),
            None => self.updates_of_page(frame, requests),
        }
    }

    /// Carries out requests for `frame`. Stops before the first that is for another frame or not simple and, if `CLEARS`,
    /// before the first that does not clear an entry. Returns how many were carried out.
    #[inline(never)]
    fn updates_of_table<const CLEARS: bool>(&self, frame: Frame, table: OwnedFrame<'a>, list: &[MmuUpdate]) -> usize {
        let page = self.m.page(frame);
        let mut rest = list.iter();
        let refused = rest.any(|MmuUpdate { ptr, val }| {
            let Some((index, keep)) = ordinary(frame, *ptr) else { return true };
            let Some(word) = page.get(index) else { return true };
            let (place, new) = (TableSlot { table, at: *ptr, word, old: word.load(SeqCst) }, *val);
            // Most requests in long lists clear entries, or only change the right to write.
            let done = if CLEARS && new & PRESENT != 0 {
                None
            } else if CLEARS {
                self.lead_elsewhere(place, new, || place.swap(new))
            } else if entry::changes_right_of_ordinary(place.old, new) {
                let new = new | place.old & keep;
                self.change_right(new, || place.swap(new))
            } else {
                self.replace_out_of_line(table, *ptr, new, keep)
            };
            done.is_none()
        });
        let left = rest.len().saturating_add(usize::from(refused));
        list.len().saturating_sub(left)
    }

    /// Carries out requests for `frame`, up to the first that is for another frame or not simple: stores the requests' values
    /// into the page. `frame` is known not to be a live L1 table. `None` if `frame` is not the domain's own memory, or is no
    /// simple case for a use as writable: it is an L2, L3 or L4 table or a descriptor page, or its latest use was as one of
    /// these or as an L1 table. During the stores, this function holds a use of the page as writable, so the page cannot become
    /// a table.
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

    /// Does update_va_mapping without its flush. Only for a call that names no other domain as the owner of the frame to map.
    /// `None` if the case is not simple, for example if the new entry points to a frame that is not the domain's own.
    pub(crate) fn update_va(&self, root: Frame, at: GuestVirt, value: u64) -> Option<()> {
        let path = claim::walk(self.m, self.own.table(), root, at)?;
        let place = self.find_place(path.slot())?;
        self.replace(place, value, 0)
    }

    /// Changes the entry at a machine address. Returns the entry's old value, and whether a new value was stored.
    #[inline(always)]
    pub(crate) fn edit(&self, at: u64, edit: Edit) -> Option<(u64, bool)> {
        let place = self.find_place(at)?;
        if edit.only.is_some_and(|only| only != place.old) {
            return Some((place.old, false));
        }
        self.replace(place, place.old & edit.keep | edit.set, 0)?;
        Some((place.old, true))
    }

    #[inline(always)]
    fn find_place(&self, at: u64) -> Option<TableSlot<'a>> {
        Some(self.place(self.own.find_l1(Frame::containing(at)?)?, at))
    }

    #[inline(always)]
    fn place(&self, table: OwnedFrame<'a>, at: u64) -> TableSlot<'a> {
        let word = self.m.word(at);
        TableSlot { table, at, word, old: word.load(SeqCst) }
    }

    #[inline(never)]
    fn replace_out_of_line(&self, table: OwnedFrame<'a>, at: u64, new: u64, keep: u64) -> Option<()> {
        self.replace(self.place(table, at), new, keep)
    }

    /// Replaces an entry by `new`. If `new` is present, those bits of `keep` that are set in the old entry are set in the new
    /// entry too. What the old entry held is dropped after the store.
    #[inline(always)]
    fn replace(&self, place: TableSlot<'a>, new: u64, keep: u64) -> Option<()> {
        let old = place.old;
        let new = entry::ordinary_leaf(new)?;
        let new = if new & PRESENT == 0 { new } else { new | old & keep };
        let swap = || place.swap(new);
        if entry::changes_right(old, new) {
            return self.change_right(new, swap);
        }
        if entry::holds_the_same(old, new) {
            return swap();
        }
        self.lead_elsewhere(place, new, swap)
    }

    /// Replaces an entry by `new`, which points to the same frame as the entry did, and differs in the right to write. The
    /// reference stays; only the use as writable is taken or dropped.
    #[inline(always)]
    fn change_right(&self, new: u64, swap: impl Fn() -> Option<()>) -> Option<()> {
        let mine = self.own.led_to(new)?;
        if new & WRITABLE == 0 {
            let early = planted(Fault::DropEarly).then(|| self.own.drop_writable(mine));
            swap()?;
            early.unwrap_or_else(|| self.own.drop_writable(mine));
            return Some(());
        }
        if !planted(Fault::FastWithoutUse) {
            self.own.take_use(mine, Use::Writable)?;
        }
        swap().or_else(|| {
            self.own.drop_writable(mine);
            None
        })
    }

    #[inline(always)]
    fn lead_elsewhere(&self, place: TableSlot<'a>, new: u64, swap: impl Fn() -> Option<()>) -> Option<()> {
        if place.old & PRESENT == 0 {
            return self.lead_to(place, new, swap);
        }
        let was = self.own.led_to(place.old)?;
        self.lead_to(place, new, swap)?;
        self.own.let_go(was, place.old & WRITABLE != 0);
        Some(())
    }

    #[inline(always)]
    fn lead_to(&self, place: TableSlot<'a>, new: u64, swap: impl Fn() -> Option<()>) -> Option<()> {
        if new & PRESENT == 0 {
            return swap();
        }
        let (mine, writable) = (self.own.led_anywhere(new)?, new & WRITABLE != 0);
        self.own.hold(mine, writable)?;
        OwnedFrames::note_entry(place.table, index(low32(place.at >> 3)) % ENTRIES);
        swap().or_else(|| {
            self.own.let_go(mine, writable);
            None
        })
    }

    /// A part of a promotion: takes what the entries `entries` of table `frame` need, up to the first entry that is not simple.
    /// A present entry in one of the hypervisor's own slots of an L4 table is not simple. Returns the index of the entry that
    /// is not simple, or `entries.end`.
    pub(super) fn climb(&self, frame: Frame, level: u8, entries: Range<usize>) -> usize {
        let (page, mut at, end, mut noted) = (self.m.page(frame), entries.start, entries.end, ENTRIES);
        while at < end
            && let Some(word) = page.get(at)
        {
            let raw = word.load(SeqCst);
            if raw & PRESENT == 0 {
                at = next_present(page, at, end);
                continue;
            }
            if level == 4 && HOLE_SLOTS.contains(&at) {
                break;
            }
            if noted != at / GROUP {
                noted = at / GROUP;
                self.own.table().note_entry(frame, at, Fault::SkipNoteOfFastClimb);
            }
            let taken = if level == 1 { self.take_leaf(word, raw) } else { self.take_lower(raw, level) };
            if taken.is_none() {
                break;
            }
            at = at.saturating_add(1);
        }
        at
    }

    /// `raw` is an entry of a table of `level`. Takes a use of the frame to which the entry points, as a table of the level
    /// below. `None` if the frame is not the domain's own or not such a table yet, if `raw` has forbidden bits, or if the
    /// hypervisor must force bits of `raw`.
    fn take_lower(&self, raw: u64, level: u8) -> Option<()> {
        let entry = entry::parse(raw, level).ok().filter(|entry| entry.raw == raw)?;
        let Target::Table(frame) = entry.target else { return None };
        self.take_table(frame, Use::table(level.saturating_sub(1))?)
    }

    /// A part of the undoing of a promotion, for tables above level 1. Goes through the entries `entries` of `table` from the
    /// last to the first. For each present entry, drops one use of the lower table to which the entry points. Stops at an entry
    /// that is not simple: usually, the use is the lower table's last, and the lower table must be undone too. Returns the
    /// index of that entry plus one, or `entries.start` if all entries were simple. The last of `entries` must be present, as
    /// `Session::skip_absent` has made sure; otherwise this stops at once. `filled` is as for [`last_present`].
    pub(super) fn descend(&self, table: Frame, level: u8, entries: Range<usize>, filled: u32) -> usize {
        let (page, mut at, end) = (self.m.page(table), entries.end, entries.start);
        while let Some(last) = at.checked_sub(1).filter(|_| at > end) {
            let raw = page.get(last).map_or(0, |word| word.load(SeqCst));
            let Target::Table(frame) = entry::target(raw, level) else { break };
            if (level == 4 && HOLE_SLOTS.contains(&last)) || self.drop_table(frame).is_none() {
                break;
            }
            at = last_present(page, last, end, filled);
        }
        at
    }

    /// Stores into a leaf the bits that the hypervisor forces (see [`entry::ordinary_leaf`]), then takes what the leaf needs.
    fn take_leaf(&self, word: &AtomicU64, raw: u64) -> Option<()> {
        let leaf = entry::ordinary_leaf(raw)?;
        // If the CPU has set A or D since the entry was read, the exchange fails, and the slow path tries again.
        if leaf != raw && word.compare_exchange(raw, leaf, SeqCst, SeqCst).is_err() {
            return None;
        }
        self.own.hold(self.own.led_anywhere(leaf)?, leaf & WRITABLE != 0)
    }

    /// Drops what a leaf holds. `None` if the leaf is not present, or the leaf's frame is not the domain's own.
    pub(super) fn drop_leaf(&self, raw: u64) -> Option<()> {
        if raw & PRESENT == 0 {
            return None;
        }
        self.own.let_go(self.own.led_to(raw)?, raw & WRITABLE != 0);
        Some(())
    }

    /// Does what [`Session::switch_root`] does. `None` if the two roots are the same, one is not the domain's own, the old root
    /// has no other use, or the new root is not yet an L4 table.
    #[inline(always)]
    pub(crate) fn switch_root(&self, old: Frame, new: Frame, load: impl FnOnce()) -> Option<()> {
        let was = self.own.anyones(old.index())?; // no check of the owner: a vcpu's root belongs to the vcpu's domain
        if old == new || !self.own.has_other_uses(was) {
            return None;
        }
        self.own.hold_as(self.own.anyones(new.index())?, Use::L4)?;
        load();
        self.own.drop_one_of_several(was);
        Some(())
    }

    /// Takes one use of a frame as the table `want`, if the frame is such a table already.
    pub(super) fn take_table(&self, frame: Frame, want: Use) -> Option<()> {
        self.own.hold_as(self.own.find(frame)?, want)
    }

    /// Drops one use of a table; `None` if the use is the table's last, or the frame is not the domain's own.
    pub(super) fn drop_table(&self, frame: Frame) -> Option<()> {
        let mine = self.own.find(frame)?;
        self.own.has_other_uses(mine).then(|| self.own.drop_one_of_several(mine))
    }
}

/// Decodes the `ptr` of a request: returns the index of the entry, and the bits of the old entry to keep. `None` if the request
/// is for a frame other than `frame`, or of a kind other than NORMAL and PRESERVE_AD.
#[inline(always)]
fn ordinary(frame: Frame, ptr: u64) -> Option<(usize, u64)> {
    const NORMAL: u64 = UpdateCommand::Normal.number();
    const PRESERVE_AD: u64 = UpdateCommand::PreserveAd.number();
    const SLOTS: u64 = PAGE_BYTES - 8;
    let at = ptr ^ frame.address();
    let slot = index(low32(at >> 3)) % ENTRIES;
    match at & !SLOTS {
        NORMAL => Some((slot, 0)),
        PRESERVE_AD => Some((slot, ACCESSED | DIRTY)),
        _ => None,
    }
}

/// Returns the first index, at or after `from`, whose entry is present; `end` if there is none before `end`.
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

/// Searches backwards from `before` down to `end`: returns the index after the last present entry in `end..before`, or `end` if
/// there is none. `filled` has a bit for each group that may have present entries
/// ([`filled`](crate::frame::FrameTable::filled)).
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
