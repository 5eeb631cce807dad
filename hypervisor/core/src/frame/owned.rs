//! The fast paths over a frame's words: for a domain's own memory in a use that it already has. They apply the rules of
//! [`state`] to words that are looked up only once, and leave all other cases to [`table`].
//!
//! Touches: the words of frames.
//! Keeps: P2 and P4, as [`table`] does. A fast path that returns `None` has changed nothing: the caller uses [`table`].
//!
//! [`state`]: super::state
//! [`table`]: super::table

use super::Use;
use super::state::{ONE, OwnerState, TypeState};
use super::table::{FrameTable, WORDS, Words, step};
use crate::addr::{DomainId, Frame, PAGE_SHIFT, long};
use crate::fault::{Fault, planted};
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use hypercall_abi::mmu::pte::FRAME;

/// A domain's own frames, as the fast paths see them.
#[derive(Debug)]
pub(crate) struct OwnedFrames<'a> {
    table: &'a FrameTable,
    rows: &'a [[AtomicU64; WORDS]],
    id: DomainId,
    /// The owner's bits in the words of these frames: see [`OwnerState::word_of`].
    word: u64,
}

/// A frame that was the domain's own memory when it was looked up.
#[derive(Clone, Copy)]
pub(crate) struct OwnedFrame<'a> {
    index: usize,
    row: &'a [AtomicU64; WORDS],
}

impl<'a> OwnedFrame<'a> {
    #[inline]
    fn words(self) -> Words<'a> {
        Words::of(self.row)
    }
}

impl<'a> OwnedFrames<'a> {
    /// The frames of this domain; `None` if fast paths are switched off.
    #[inline]
    pub(crate) fn of(table: &'a FrameTable, id: DomainId) -> Option<Self> {
        let (rows, word) = (table.all_rows(), OwnerState::word_of(id)?);
        table.has_fast_paths().then_some(Self { table, rows, id, word })
    }

    /// Like [`OwnedFrames::of`], but without any frame if fast paths are switched off.
    pub(crate) fn or_none(table: &'a FrameTable, id: DomainId) -> Self {
        Self::of(table, id).unwrap_or(Self { table, rows: &[], id, word: 0 })
    }

    /// The table of all frames.
    #[inline]
    pub(crate) fn table(&self) -> &'a FrameTable {
        self.table
    }

    /// Looks up a frame; `None` if it is not the domain's own memory.
    #[inline(always)]
    pub(crate) fn find(&self, frame: Frame) -> Option<OwnedFrame<'a>> {
        self.at(frame.index())
    }

    /// Looks up the frame that an entry points to; `None` if it is not the domain's own memory.
    #[inline(always)]
    pub(crate) fn led_to(&self, entry: u64) -> Option<OwnedFrame<'a>> {
        self.at(usize::try_from((entry & FRAME) >> PAGE_SHIFT).ok()?)
    }

    /// Like [`OwnedFrames::led_to`], but does not check the owner: [`OwnedFrames::hold`] does.
    #[inline(always)]
    pub(crate) fn led_anywhere(&self, entry: u64) -> Option<OwnedFrame<'a>> {
        self.anyones(usize::try_from((entry & FRAME) >> PAGE_SHIFT).ok()?)
    }

    /// Looks up the frame with this index, but does not check the owner: [`OwnedFrames::hold_as`] does.
    #[inline(always)]
    pub(crate) fn anyones(&self, index: usize) -> Option<OwnedFrame<'a>> {
        Some(OwnedFrame { index, row: self.rows.get(index)? })
    }

    #[inline(always)]
    fn at(&self, index: usize) -> Option<OwnedFrame<'a>> {
        let mine = OwnedFrame { index, row: self.rows.get(index)? };
        let own = OwnerState::is_owned(mine.words().owner.load(SeqCst), self.word) || planted(Fault::FastWithoutOwner);
        own.then_some(mine)
    }

    /// Looks up a frame; `None` if it is not a live L1 table of the domain's own.
    #[inline(always)]
    pub(crate) fn find_l1(&self, frame: Frame) -> Option<OwnedFrame<'a>> {
        self.find(frame).filter(|mine| TypeState::is_l1(mine.words().kind.load(SeqCst)))
    }

    /// Takes what a leaf for this frame needs: a reference, and if the leaf may be written a use as writable.
    #[inline(always)]
    pub(crate) fn hold(&self, mine: OwnedFrame<'a>, writable: bool) -> Option<()> {
        if writable { self.hold_as(mine, Use::Writable) } else { self.take_ref(mine) }
    }

    /// Drops what [`OwnedFrames::hold`] took.
    #[inline(always)]
    pub(crate) fn let_go(&self, mine: OwnedFrame<'a>, writable: bool) {
        if writable {
            self.drop_writable(mine);
        }
        self.drop_ref(mine);
    }

    /// Takes a use and its reference, if the frame already has this use and its contents are valid for it.
    #[inline(always)]
    pub(crate) fn hold_as(&self, mine: OwnedFrame<'a>, want: Use) -> Option<()> {
        self.take_ref(mine)?;
        self.take_use(mine, want).or_else(|| {
            self.drop_ref(mine);
            None
        })
    }

    /// Whether a table has more than one use. The answer stays true under the paging lock.
    #[inline(always)]
    pub(crate) fn has_other_uses(&self, mine: OwnedFrame<'a>) -> bool {
        TypeState::drop_one(mine.words().kind.load(SeqCst)).is_some()
    }

    /// Drops a use and its reference, if [`OwnedFrames::has_other_uses`] is true under the same lock.
    #[inline(always)]
    pub(crate) fn drop_one_of_several(&self, mine: OwnedFrame<'a>) {
        mine.words().kind.fetch_sub(ONE, SeqCst);
        mine.words().owner.fetch_sub(ONE, SeqCst);
    }

    #[inline(always)]
    fn take_ref(&self, mine: OwnedFrame<'a>) -> Option<()> {
        step(mine.words().owner, |bits| Ok::<_, ()>((OwnerState::take_own(bits, self.word).ok_or(())?, ()))).ok()
    }

    #[inline(always)]
    fn drop_ref(&self, mine: OwnedFrame<'a>) {
        if step(mine.words().owner, |bits| Ok((OwnerState::drop_own(bits).ok_or(())?, ()))) == Err(()) {
            self.drop_last(mine);
        }
    }

    #[cold]
    fn drop_last(&self, mine: OwnedFrame<'a>) {
        if let Some(frame) = Frame::new(long(mine.index)) {
            self.table.drop_ref(frame, self.id);
        }
    }

    /// Takes a use without a reference. The caller holds a reference.
    #[inline(always)]
    pub(crate) fn take_use(&self, mine: OwnedFrame<'a>, want: Use) -> Option<()> {
        step(mine.words().kind, |bits| Ok::<_, ()>((TypeState::again(bits, want).ok_or(())?, ()))).ok()
    }

    /// Drops a use as writable, without its reference.
    #[inline(always)]
    pub(crate) fn drop_writable(&self, mine: OwnedFrame<'a>) {
        if step(mine.words().kind, |bits| Ok((TypeState::drop_one(bits).ok_or(())?, ()))) == Err(()) {
            self.drop_last_writable(mine);
        }
    }

    #[cold]
    fn drop_last_writable(&self, mine: OwnedFrame<'a>) {
        let _ = self.table.step_down(&mine.words()); // cannot fail: the caller has a use
    }

    /// Records that an entry of a table is present, or is about to be.
    #[inline(always)]
    pub(crate) fn note_entry(mine: OwnedFrame<'a>, index: usize) {
        FrameTable::note(&mine.words(), index, Fault::SkipNoteOfFastUpdate);
    }
}
