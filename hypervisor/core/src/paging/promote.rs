//! Turns a frame into a page table and back: one loop in two directions over at most four cursors.
//!
//! A promotion *climbs*: its cursor goes up through the entries of a table. An undoing *descends*. Each table on the stack of
//! cursors has one use that belongs to this work. The table's entries below the cursor's `next` hold references on what they
//! point to: they are counted. While promoting, an entry is counted once its target is ready; while undoing, the entry stops
//! counting first, then its target is dropped. A refusal only reverses the direction. If the budget ends, the stack of cursors
//! is all that is needed to continue.

#[cfg(feature = "planted-fault")]
use super::Sweep;
use super::entry::{self, Target};
use super::fast::{last_present, next_present};
use super::{Outcome, Refused, Session, Stop};
use crate::addr::{ENTRIES, Frame, HOLE_SLOTS, index, long, low32};
use crate::domain::MAX_DOMAIN_VCPUS;
use crate::fault::{Fault, planted};
use crate::frame::table::bug;
use crate::frame::{Left, Taken, Use};
use crate::machine::{Cpus, Frames};
use core::sync::atomic::Ordering::SeqCst;

/// The most outcomes of interrupted promotions that are kept until their requests are made again: two for each vcpu of the
/// domain and two for its toolstack, since the state of a new vcpu names two roots. With fewer, callers could push out each
/// other's outcomes for ever.
pub const WAITING: usize = 2 * (MAX_DOMAIN_VCPUS + 1);
/// How often an entry is tried again because the CPU set its accessed or dirty bit.
pub(super) const TRIES: usize = 8;

/// How far the promotion or undoing of one table has come.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    table: Frame,
    level: u8,
    /// The entries before this one are counted.
    next: usize,
    /// Whether the table is being promoted; otherwise it is being undone.
    up: bool,
}

/// The outcome of a promotion that was interrupted.
#[derive(Clone, Copy, Debug)]
struct Finished {
    table: Frame,
    level: u8,
    result: Result<(), Refused>,
}

/// A domain's unfinished work.
#[derive(Debug)]
pub(super) struct Work {
    stack: heapless::Vec<Cursor, 4>,
    /// The table (frame and level) that the promotion on the stack makes; `None` while a dropped table is undone.
    goal: Option<(Frame, u8)>,
    /// Why the promotion on the stack is being reversed; `None` if it is not.
    failed: Option<Refused>,
    /// The first of the dropped tables whose undoing has not begun; the others are linked through their frames' words.
    debts: Option<Frame>,
    /// Outcomes that are kept until their requests are made again, oldest first. A success holds one use of the table.
    finished: heapless::Vec<Finished, WAITING>,
}

impl Work {
    pub(super) const fn new() -> Self {
        Self { stack: heapless::Vec::new(), goal: None, failed: None, debts: None, finished: heapless::Vec::new() }
    }

    /// Whether there is no work left, and no outcome is kept.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.stack.is_empty() & self.debts.is_none() & self.finished.is_empty()
    }

    fn push(&mut self, table: Frame, level: u8, up: bool) {
        let next = if up { 0 } else { ENTRIES };
        if self.stack.push(Cursor { table, level, next, up }).is_err() {
            bug(table, "levels do not fall along the stack");
        }
    }
}

#[cfg(feature = "planted-fault")]
impl crate::audit::Spoil for Work {
    fn spoil(&mut self) {
        self.failed = Some(Refused::Raced);
        self.debts = Some(Frame::from_u32(1));
    }
}

/// What unfinished work holds, for an audit.
#[cfg(feature = "planted-fault")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Holding {
    /// One use of a table that is being promoted or undone, and references on the targets of its first `counted`
    /// entries.
    OnTheWay {
        /// The table.
        table: Frame,
        /// Its level.
        level: u8,
        /// How many entries hold references.
        counted: usize,
        /// Whether the table is being promoted.
        up: bool,
    },
    /// One use of a promoted table, which is kept until the request for it is made again.
    Waiting {
        /// The table.
        table: Frame,
        /// Its level.
        level: u8,
    },
}

#[cfg(feature = "planted-fault")]
impl<M: Frames + Cpus> Session<'_, M> {
    /// How far the destruction of this domain's memory has come.
    pub fn sweep(&self) -> Option<Sweep> {
        self.state.dying
    }

    /// Everything that this domain's unfinished work holds.
    pub fn holdings(&self) -> impl Iterator<Item = Holding> {
        let work = &self.state.work;
        let on_the_way =
            work.stack.iter().map(|c| Holding::OnTheWay { table: c.table, level: c.level, counted: c.next, up: c.up });
        let debts = core::iter::successors(work.debts, |f| self.table.link(*f)).filter_map(|table| {
            let level = self.table.info(table)?.kind.used_as.level()?;
            Some(Holding::OnTheWay { table, level, counted: ENTRIES, up: false })
        });
        let finished = work.finished.iter().filter(|f| f.result.is_ok());
        on_the_way.chain(debts).chain(finished.map(|f| Holding::Waiting { table: f.table, level: f.level }))
    }
}

impl<M: Frames + Cpus> Session<'_, M> {
    /// Continues unfinished work until the budget ends.
    ///
    /// # Errors
    /// [`Stop::More`] if work is left.
    pub fn run(&mut self) -> Outcome<()> {
        while let Some(mut top) = self.top() {
            self.skip_absent(&mut top);
            self.budget = self.budget.checked_sub(1).ok_or(Stop::More)?;
            match top {
                Cursor { up: true, next: ENTRIES, .. } => self.arrive_up(top),
                Cursor { up: true, .. } => self.climb(top),
                Cursor { up: false, next: 0, .. } => self.arrive_down(top),
                Cursor { up: false, .. } => self.descend(top),
            }
        }
        Ok(())
    }

    /// Returns the cursor at which the work continues. If there is none, the next debt becomes work.
    fn top(&mut self) -> Option<Cursor> {
        if self.state.work.stack.is_empty() {
            let table = self.state.work.debts?;
            self.state.work.debts = self.table.link(table);
            let level = self.table.info(table)?.kind.used_as.level()?;
            self.state.work.push(table, level, false);
        }
        self.state.work.stack.last().copied()
    }

    /// Moves past entries that are not present, as most are, until the budget ends.
    fn skip_absent(&mut self, top: &mut Cursor) {
        let (page, most) = (self.m.page(top.table), index(self.budget));
        let next = if top.up {
            next_present(page, top.next, top.next.saturating_add(most).min(ENTRIES))
        } else {
            last_present(page, top.next, top.next.saturating_sub(most), self.table.filled(top.table))
        };
        if next != top.next {
            self.spend(next.abs_diff(top.next));
            top.next = next;
            self.move_to(next);
        }
    }

    /// Takes `entries` from the budget. The budget is at least as large.
    pub(super) fn spend(&mut self, entries: usize) {
        self.budget = self.budget.saturating_sub(u32::try_from(entries).unwrap_or(u32::MAX));
    }

    fn climb(&mut self, top: Cursor) {
        if top.level == 4 && HOLE_SLOTS.contains(&top.next) {
            return self.move_to(HOLE_SLOTS.end);
        }
        if let Some(own) = self.own() {
            // The budget for the first entry has been taken already.
            let end = top.next.saturating_add(index(self.budget)).saturating_add(1).min(ENTRIES);
            let next = self.fast_within(&own).climb(top.table, top.level, top.next..end);
            if next > top.next {
                self.spend(next.saturating_sub(top.next).saturating_sub(1));
                return self.move_to(next);
            }
        }
        self.table.note_entry(top.table, top.next, Fault::SkipNoteOfClimb);
        match self.take_in_place(top) {
            Ok(Taken::Ready) => self.move_to(top.next.saturating_add(1)),
            Ok(Taken::Started) => {} // a new cursor promotes the lower table first; then this entry is counted
            Err(why) => {
                self.state.work.failed = Some(why);
                self.turn();
            }
        }
    }

    /// Checks the entry under the cursor, and takes a reference on what it points to.
    fn take_in_place(&mut self, top: Cursor) -> Result<Taken, Refused> {
        let word = self.m.page(top.table).get(top.next).ok_or(Refused::Misaligned)?;
        for _ in 0..TRIES {
            let raw = word.load(SeqCst);
            let entry = entry::parse(raw, top.level)?;
            // The guest cannot write the frame any more, but a CPU that has stale upper entries may still set A and D in this
            // entry.
            if entry.raw != raw && word.compare_exchange(raw, entry.raw, SeqCst, SeqCst).is_err() {
                continue;
            }
            return match entry.target {
                Target::Nothing => Ok(Taken::Ready),
                Target::Leaf { .. } => self.take_leaf(&entry, self.id()).map(|()| Taken::Ready),
                Target::Table(frame) => {
                    let level = top.level.saturating_sub(1);
                    let taken = self.take_typed(frame, level)?;
                    if taken == Taken::Started {
                        self.state.work.push(frame, level, true);
                    }
                    Ok(taken)
                }
            };
        }
        Err(Refused::Raced)
    }

    fn descend(&mut self, top: Cursor) {
        let at = top.next.saturating_sub(1);
        if top.level == 4 && HOLE_SLOTS.contains(&at) {
            return self.move_to(HOLE_SLOTS.start);
        }
        if planted(Fault::SkipUnwind) && self.state.work.failed.is_some() {
            return self.move_to(at);
        }
        if top.level == 1 {
            return self.drop_leaves(top);
        }
        let end = top.next.saturating_sub(index(self.budget)).saturating_sub(1);
        let filled = self.table.filled(top.table);
        let entries = end..top.next;
        let next =
            self.own().map_or(top.next, |own| self.fast_within(&own).descend(top.table, top.level, entries, filled));
        if next < top.next {
            self.spend(top.next.saturating_sub(next).saturating_sub(1));
            return self.move_to(next);
        }
        self.move_to(at);
        if let Some(word) = self.m.page(top.table).get(at)
            && let Some((table, level)) = self.drop_target(word.load(SeqCst), top.level)
        {
            self.state.work.push(table, level, false);
        }
    }

    /// Drops the targets of the last entries of an L1 table: of as many as the budget allows. One entry is paid for already.
    fn drop_leaves(&mut self, top: Cursor) {
        let count = top.next.min((index(self.budget)).saturating_add(1));
        let (page, filled, own) = (self.m.page(top.table), self.table.filled(top.table), self.own());
        let fast = own.as_ref().map(|own| self.fast_within(own));
        let (mut at, end) = (top.next, top.next.saturating_sub(count));
        while let Some(last) = at.checked_sub(1).filter(|_| at > end) {
            let raw = page.get(last).map_or(0, |word| word.load(SeqCst));
            if fast.as_ref().and_then(|fast| fast.drop_leaf(raw)).is_none() {
                self.drop_target(raw, 1);
            }
            at = last_present(page, last, end, filled);
        }
        self.move_to(end);
        self.spend(count.saturating_sub(1));
    }

    /// Ends a promotion: all entries are counted, and the frame is a table now.
    fn arrive_up(&mut self, top: Cursor) {
        if top.level == 4 && !planted(Fault::SkipHoleFill) {
            for (n, word) in self.m.page(top.table).iter().skip(HOLE_SLOTS.start).take(HOLE_SLOTS.len()).enumerate() {
                word.store(self.m.hole_entry(n), SeqCst);
            }
        }
        self.table.promoted(top.table);
        self.state.work.stack.pop();
        match self.state.work.stack.last_mut() {
            Some(parent) => parent.next = parent.next.saturating_add(1),
            None => self.finish(Ok(())),
        }
    }

    /// Ends the undoing of a table: no entry is counted, and the frame stops being a table.
    fn arrive_down(&mut self, top: Cursor) {
        self.table.demoted(top.table, self.id());
        self.state.work.stack.pop();
        match self.state.work.stack.last_mut() {
            Some(parent) => parent.up = false, // a promotion is reversed, as that of its lower table failed; an undoing goes on
            None => {
                if let Some(why) = self.state.work.failed.take() {
                    self.finish(Err(why));
                }
            }
        }
    }

    fn finish(&mut self, result: Result<(), Refused>) {
        if let Some((table, level)) = self.state.work.goal.take() {
            self.keep(Finished { table, level, result });
        }
    }

    /// Keeps an outcome until its request is made again. If too many are kept, drops the oldest one.
    fn keep(&mut self, outcome: Finished) {
        if self.state.work.finished.is_full() {
            self.forget_oldest();
        }
        let _ = self.state.work.finished.push(outcome); // there is room now
    }

    /// Keeps a use of a root that a request took before it had to start over: made again, the request finds the root ready.
    pub(crate) fn set_aside(&mut self, table: Frame) {
        if self.state.dying.is_none() {
            self.keep(Finished { table, level: 4, result: Ok(()) });
        }
    }

    /// Drops the oldest outcome that no request has collected; returns false if there is none.
    pub(super) fn forget_oldest(&mut self) -> bool {
        if self.state.work.finished.is_empty() {
            return false;
        }
        let oldest = self.state.work.finished.remove(0);
        if oldest.result.is_ok() {
            self.drop_table(oldest.table);
        }
        true
    }

    /// Whether a table is being promoted.
    pub(super) fn climbing(&self) -> bool {
        self.state.work.goal.is_some()
    }

    /// Reverses the promotion under way, if there is one, because the domain is dying.
    pub(super) fn abandon_climb(&mut self) {
        if self.state.work.stack.last().is_some_and(|top| top.up) {
            self.state.work.failed = Some(Refused::Dying);
            self.turn();
        }
    }

    fn turn(&mut self) {
        if let Some(top) = self.state.work.stack.last_mut() {
            top.up = false;
        }
    }

    fn move_to(&mut self, next: usize) {
        if let Some(top) = self.state.work.stack.last_mut() {
            top.next = next;
        }
    }

    fn take_typed(&mut self, frame: Frame, level: u8) -> Result<Taken, Refused> {
        let want = Use::table(level).ok_or(Refused::BadBits)?;
        if self.own().and_then(|own| self.fast_within(&own).take_table(frame, want)).is_some() {
            return Ok(Taken::Ready);
        }
        let taken = self.table.take_use(self.m, frame, want, self.taker(self.id()))?;
        if taken == Taken::Started {
            self.table.begin_table(frame);
        }
        Ok(taken)
    }

    /// Takes one use of a frame of this domain as a table of this level; promotes the frame if it is not such a table
    /// yet.
    pub(super) fn take_table(&mut self, frame: Frame, level: u8) -> Outcome<()> {
        if let Some(outcome) = self.collect(frame, level) {
            return outcome;
        }
        match self.take_typed(frame, level)? {
            Taken::Ready => Ok(()),
            Taken::Started => {
                self.state.work.goal = Some((frame, level));
                self.state.work.push(frame, level, true);
                self.run()?;
                self.collect(frame, level).unwrap_or(Err(Stop::More))
            }
        }
    }

    fn collect(&mut self, frame: Frame, level: u8) -> Option<Outcome<()>> {
        let finished = &mut self.state.work.finished;
        let at = finished.iter().position(|f| f.table == frame && f.level == level)?;
        Some(finished.remove(at).result.map_err(Stop::Refused))
    }

    /// Takes what a leaf needs: a reference on its frame, and a use as writable if the leaf may be written. Frames outside RAM
    /// have no counts; the domain must be allowed to map them.
    pub(super) fn take_leaf(&self, entry: &entry::Entry, from: crate::addr::DomainId) -> Result<(), Refused> {
        let Target::Leaf { frame, writable } = entry.target else { return Ok(()) };
        if !self.table.is_ram(frame) {
            ensure!(self.space.devices.allows(frame), Refused::NotYourDevice);
            return Ok(());
        }
        ensure!(!entry.uncached, Refused::CacheBits);
        if writable && !planted(Fault::SkipWritableCheck) {
            return self.table.take_use(self.m, frame, Use::Writable, self.taker(from)).map(|_| ());
        }
        self.table.take_ref(frame, from, self.id())
    }

    /// Drops the target of an entry. If this was the last use of a table, returns that table and its level: the caller undoes
    /// it.
    fn drop_target(&mut self, raw: u64, level: u8) -> Option<(Frame, u8)> {
        match entry::target(raw, level) {
            Target::Leaf { frame, .. } if !self.table.is_ram(frame) => {}
            Target::Leaf { frame, writable: true } if !planted(Fault::SkipWritableCheck) => {
                self.table.drop_use(frame, self.id());
            }
            Target::Leaf { frame, .. } => self.table.drop_ref(frame, self.id()),
            Target::Table(frame) => {
                if let Left::TakeDown(level) = self.drop_use_of_table(frame) {
                    return Some((frame, level));
                }
            }
            Target::Nothing => {}
        }
        None
    }

    /// Drops those targets of an L1 table that are not the domain's own frames; its own frames go with the domain.
    pub(super) fn drop_foreign(&mut self, table: Frame) {
        let (words, id) = (self.m.page(table), self.id());
        self.budget = self.budget.saturating_sub(low32(long(words.len())));
        for word in words {
            let raw = word.load(SeqCst);
            if let Target::Leaf { frame, .. } = entry::target(raw, 1)
                && !self.table.is_own(frame, id)
                && !planted(Fault::KeepForeign)
            {
                self.drop_target(raw, 1);
            }
        }
    }

    /// Drops the target of an entry that has been removed. What the budget does not allow becomes a debt.
    pub(super) fn release(&mut self, old: u64, level: u8) {
        if let Some((table, _)) = self.drop_target(old, level) {
            self.owe(table);
            let _ = self.run();
        }
    }

    /// Drops one use of a table. If it was the last one, undoing the table becomes a debt.
    pub(super) fn drop_table(&mut self, table: Frame) {
        if let Left::TakeDown(_) = self.drop_use_of_table(table) {
            self.owe(table);
        }
    }

    fn drop_use_of_table(&self, table: Frame) -> Left {
        match self.own().and_then(|own| self.fast_within(&own).drop_table(table)) {
            Some(()) => Left::Used,
            None => self.table.drop_use(table, self.id()),
        }
    }

    fn owe(&mut self, table: Frame) {
        self.table.set_link(table, self.state.work.debts);
        self.state.work.debts = Some(table);
    }
}
