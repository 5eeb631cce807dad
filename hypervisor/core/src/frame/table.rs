//! The words of all frames, and the one loop that changes them.

use super::epoch::Epochs;
use super::pool::FreeList;
pub use super::state::{Left, Taken};
use super::state::{OwnerState, TakeError, TypeState};
use super::{Owner, Refused, Use};
use crate::addr::{CpuSet, DomainId, ENTRIES, Frame, index, low32};
use crate::fault::{Fault, Looks, between, planted};
use crate::lock::Leaf;
use crate::machine::{Cpus, Frames};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use spin::Once;

/// Words kept for each frame: type, owner, stamp, link.
pub const WORDS: usize = 4;
/// What the machine-to-physical table says of frames that are nobody's memory.
pub const NO_PFN: u64 = u64::MAX;
/// In a stamp: a domain other than the owner has used the frame, so any CPU may know it.
const SHARED: u64 = 1 << 63;
/// In the link of a table: the next one in a list; above it, which groups of its entries may hold something.
const NEXT: u64 = 0xffff_ffff;
/// Entries of a table in a group.
pub const GROUP: usize = ENTRIES / 32;
/// How often a type is tried again because another CPU used the frame between our flush and our step.
const TRIES: usize = 16;

/// The words of one frame.
#[derive(Clone, Copy)]
pub(super) struct Words<'a> {
    pub(super) kind: &'a AtomicU64,
    pub(super) owner: &'a AtomicU64,
    pub(super) stamp: &'a AtomicU64,
    pub(super) link: &'a AtomicU64,
}

impl<'a> Words<'a> {
    #[inline]
    pub(super) fn of([kind, owner, stamp, link]: &'a [AtomicU64; WORDS]) -> Self {
        Self { kind, owner, stamp, link }
    }
}

/// All frames of the machine, their flush epochs and the free ones among them.
#[derive(Debug)]
pub struct FrameTable {
    words: Once<&'static [[AtomicU64; WORDS]]>,
    pub(super) epochs: Epochs,
    pub(super) pool: Leaf<FreeList>,
    accounts: [FrameAccount; DomainId::SLOTS],
    looks: Looks,
    /// Fast paths are switched off.
    only_long: AtomicBool,
}

/// What a domain owns: how many frames, and between which two all that it ever owned lie. And what is set aside for it.
#[derive(Debug)]
pub(super) struct FrameAccount {
    /// The one number that its limit is compared with: a frame counts until its last reference goes.
    count: AtomicU32,
    first: AtomicU32,
    last: AtomicU32,
    /// Frames of the pool for what the hypervisor will keep on its behalf. Changes under the lock of the pool.
    pub(super) promised: AtomicU32,
}

impl FrameAccount {
    const fn new() -> Self {
        Self {
            count: AtomicU32::new(0),
            first: AtomicU32::new(u32::MAX),
            last: AtomicU32::new(0),
            promised: AtomicU32::new(0),
        }
    }
}

/// A look at a frame's two words; others may change them at once, except where a lock or a use held prevents it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Info {
    /// Type, uses, flags.
    pub kind: TypeState,
    /// Owner and references.
    pub owner: OwnerState,
}

/// Who takes a frame, and whose it must be.
#[derive(Clone, Copy, Debug)]
pub struct Taker {
    /// The domain the frame must belong (or be lent) to.
    pub from: DomainId,
    /// The domain on whose behalf it is taken.
    pub by: DomainId,
    /// CPUs that may hold translations of `from`; used only if nobody else ever mapped the frame.
    pub cpus: CpuSet,
}

impl FrameTable {
    /// A table of no frames, to be a static.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            words: Once::new(),
            epochs: Epochs::new(),
            pool: Leaf::new(FreeList::EMPTY),
            accounts: [const { FrameAccount::new() }; DomainId::SLOTS],
            looks: Looks::new(),
            only_long: AtomicBool::new(false),
        }
    }

    /// Gives the table its words: [`WORDS`] zeros for each frame below the limit. No frame is RAM until
    /// [`FrameTable::add`] says so. Only the first call counts.
    pub fn init(&self, words: &'static [AtomicU64]) {
        self.words.call_once(|| words.as_chunks().0);
    }

    /// Switches the fast paths off, or on: what follows from a call is the same with them and without.
    pub fn set_fast_paths(&self, on: bool) {
        self.only_long.store(!on, SeqCst);
    }

    /// Whether there are fast paths.
    #[inline]
    pub(crate) fn has_fast_paths(&self) -> bool {
        !self.only_long.load(SeqCst)
    }

    /// The words of all frames.
    #[inline]
    pub(super) fn all_rows(&self) -> &'static [[AtomicU64; WORDS]] {
        self.words.get().copied().unwrap_or_default()
    }

    /// The number of the highest frame the table knows, plus one.
    #[must_use]
    pub fn limit(&self) -> u32 {
        u32::try_from(self.words.get().map_or(0, |w| w.len())).unwrap_or(u32::MAX)
    }

    /// The clock of flushes.
    #[must_use]
    pub fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    pub(super) fn account(&self, id: DomainId) -> Option<&FrameAccount> {
        self.accounts.get(id.slot())
    }

    /// How many frames a domain owns: those it gave back while they were in use count until nobody uses them any more.
    #[must_use]
    pub fn owned(&self, id: DomainId) -> u32 {
        self.account(id).map_or(0, |account| account.count.load(SeqCst))
    }

    /// All frames that a domain owns are among these.
    pub(crate) fn span(&self, id: DomainId) -> Range<u32> {
        self.account(id).map_or(0..0, |e| e.first.load(SeqCst)..e.last.load(SeqCst).saturating_add(1))
    }

    /// A domain that owns nothing any more is forgotten: its slot is for another.
    pub(crate) fn forget(&self, id: DomainId) {
        let Some(account) = self.account(id) else { return };
        account.first.store(u32::MAX, SeqCst);
        account.last.store(0, SeqCst);
    }

    /// Counts frames that a domain is about to own, unless that makes more than `limit`.
    pub(super) fn count_owned(&self, id: DomainId, frames: u32, limit: u64) -> Result<(), Refused> {
        let account = self.account(id).ok_or(Refused::NoMemory)?;
        let more = |owned: u32| owned.checked_add(frames).filter(|owned| u64::from(*owned) <= limit);
        account.count.fetch_update(SeqCst, SeqCst, more).map(|_| ()).map_err(|_| Refused::OverLimit)
    }

    /// A domain gets this frame.
    pub(super) fn widen_span(&self, id: DomainId, frame: Frame) {
        let Some(account) = self.account(id) else { return };
        account.first.fetch_min(frame.as_u32(), SeqCst);
        account.last.fetch_max(frame.as_u32(), SeqCst);
    }

    pub(super) fn uncount_owned(&self, id: DomainId, frames: u32) {
        if let Some(account) = self.account(id) {
            account.count.fetch_sub(frames, SeqCst);
        }
    }

    pub(super) fn words(&self, frame: Frame) -> Option<Words<'_>> {
        let words = self.words.get()?.get(frame.index())?;
        self.looks.count();
        Some(Words::of(words))
    }

    /// The words of frames in a row, with their numbers.
    pub(super) fn rows(&self, span: Range<u32>) -> impl Iterator<Item = (u32, Words<'_>)> {
        let rows = self.words.get().and_then(|words| words.get(index(span.start)..index(span.end)));
        span.zip(rows.unwrap_or_default().iter().inspect(|_| self.looks.count()).map(Words::of))
    }

    /// The frame's state now; `None` above the limit.
    #[must_use]
    pub fn info(&self, frame: Frame) -> Option<Info> {
        let w = self.words(frame)?;
        Some(Info {
            kind: TypeState::from_bits(w.kind.load(SeqCst)),
            owner: OwnerState::from_bits(w.owner.load(SeqCst)),
        })
    }

    /// Whether the frame is RAM. Does not change after boot.
    #[must_use]
    pub fn is_ram(&self, frame: Frame) -> bool {
        self.words(frame).is_some_and(|w| OwnerState::from_bits(w.owner.load(SeqCst)).owner != Owner::NotRam)
    }

    /// The level of a validated page table that belongs to `owner`.
    #[must_use]
    pub fn live_table(&self, frame: Frame, owner: DomainId) -> Option<u8> {
        self.info(frame).filter(|i| i.owner.owner == Owner::Guest(owner))?.kind.live_table()
    }

    /// Takes a reference: the frame keeps its owner and contents until it is dropped.
    ///
    /// # Errors
    /// [`Refused::NoSuchFrame`], [`Refused::NotOwner`], [`Refused::TooManyUses`].
    pub fn take_ref(&self, frame: Frame, from: DomainId, by: DomainId) -> Result<(), Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        step(w.owner, |bits| OwnerState::take(bits, from, by).map(|next| (next, ())))?;
        if from != by {
            w.stamp.fetch_or(SHARED, SeqCst);
        }
        Ok(())
    }

    /// Drops a reference taken by that domain. With the last one the frame goes to the pool.
    pub fn drop_ref(&self, frame: Frame, by: DomainId) {
        let Some(w) = self.words(frame) else { return bug(frame, "reference to no frame") };
        let dropped = step(w.owner, |bits| {
            let next = OwnerState::drop_ref(bits, by).ok_or(())?;
            if OwnerState::is_unused(next) {
                self.stamp(&w); // before the count says that nobody knows the frame
            }
            Ok::<_, ()>((next, next))
        });
        match dropped {
            Ok(next) if OwnerState::is_unused(next) => {
                if let Owner::Guest(id) = OwnerState::from_bits(next).owner
                    && !planted(Fault::CountEarly)
                {
                    self.uncount_owned(id, 1);
                }
                self.push_free(frame);
            }
            Ok(_) => {}
            Err(()) => bug(frame, "reference dropped twice"),
        }
    }

    /// Takes a reference and a use of that kind, flushing first if the frame was something else (P4). On
    /// [`Taken::Started`] the caller validates the contents and then calls [`FrameTable::promoted`] or
    /// [`FrameTable::demoted`].
    ///
    /// # Errors
    /// As [`FrameTable::take_ref`], and [`Refused::WrongType`], [`Refused::Unfinished`], [`Refused::Raced`].
    pub fn take_use(&self, m: &impl Cpus, frame: Frame, want: Use, taker: Taker) -> Result<Taken, Refused> {
        self.take_ref(frame, taker.from, taker.by)?;
        let taken = self.take_type(m, frame, want, taker.cpus);
        if taken.is_err() {
            self.drop_ref(frame, taker.by);
        }
        taken
    }

    fn take_type(&self, m: &impl Cpus, frame: Frame, want: Use, cpus: CpuSet) -> Result<Taken, Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        for _ in 0..TRIES {
            let mut stale = CpuSet::default();
            let taken = step(w.kind, |bits| {
                let taken = TypeState::take(bits, want, false);
                if taken == Err(TakeError::FlushFirst) {
                    // Asked for the word as it is in this round: a use in between moves its turn and its stamp.
                    let stamp = w.stamp.load(SeqCst);
                    let known_to = if stamp & SHARED == 0 { cpus } else { self.epochs.all() };
                    stale = self.epochs.stale(known_to, stamp & !SHARED);
                    return TypeState::take(bits, want, stale.is_empty());
                }
                taken
            });
            match taken {
                Ok(taken) => return Ok(taken),
                Err(TakeError::Refused(why)) => return Err(why),
                Err(TakeError::FlushFirst) => self.epochs.flush(m, stale),
            }
        }
        Err(Refused::Raced)
    }

    /// Drops a use and its reference, taken by that domain. A table's last use stays with the caller, who takes the table
    /// down and then calls [`FrameTable::demoted`].
    pub fn drop_use(&self, frame: Frame, by: DomainId) -> Left {
        let Some(w) = self.words(frame) else {
            bug(frame, "use of no frame");
            return Left::Used;
        };
        match self.step_down(&w) {
            Ok(Left::TakeDown(level)) => Left::TakeDown(level),
            Ok(left) => {
                self.drop_ref(frame, by);
                left
            }
            Err(()) => {
                bug(frame, "use dropped twice");
                Left::Used
            }
        }
    }

    /// Drops one use alone.
    #[inline]
    pub(super) fn step_down(&self, w: &Words<'_>) -> Result<Left, ()> {
        step(w.kind, |bits| {
            let (next, left) = TypeState::drop_use(bits).ok_or(())?;
            if left == Left::Unused && !planted(Fault::SkipStamp) && !planted(Fault::StampLate) {
                self.stamp(w); // before the count says that nobody uses it
            }
            Ok((next, left))
        })
        .inspect(|left| {
            if *left == Left::Unused && planted(Fault::StampLate) {
                self.stamp(w);
            }
        })
    }

    /// The contents of a frame whose use was [`Taken::Started`] are valid.
    pub fn promoted(&self, frame: Frame) {
        self.change_type(frame, TypeState::promoted);
    }

    /// The last use of a table, its owner's, ends: its entries hold nothing any more.
    pub fn demoted(&self, frame: Frame, owner: DomainId) {
        if let Some(w) = self.words(frame) {
            self.stamp(&w);
        }
        self.change_type(frame, TypeState::demoted);
        self.drop_ref(frame, owner);
    }

    fn change_type(&self, frame: Frame, rule: impl Fn(TypeState) -> Option<TypeState>) {
        let done = self.words(frame).is_some_and(|w| {
            step(w.kind, |bits| Ok::<_, ()>((rule(TypeState::from_bits(bits)).ok_or(())?.bits(), ()))).is_ok()
        });
        if !done {
            bug(frame, "not being promoted or demoted");
        }
    }

    /// Marks a use the caller took as the frame's pin.
    ///
    /// # Errors
    /// [`Refused::AlreadyPinned`], [`Refused::NotTable`].
    pub fn pin(&self, frame: Frame) -> Result<(), Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        step(w.kind, |bits| Ok((TypeState::from_bits(bits).pin()?.bits(), ())))
    }

    /// Takes the mark of the pin from a frame of `owner`; the caller drops the use.
    ///
    /// # Errors
    /// [`Refused::NotOwner`], [`Refused::NotPinned`].
    pub fn unpin(&self, frame: Frame, owner: DomainId) -> Result<(), Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        ensure!(OwnerState::from_bits(w.owner.load(SeqCst)).owner == Owner::Guest(owner), Refused::NotOwner);
        step(w.kind, |bits| Ok((TypeState::from_bits(bits).unpin()?.bits(), ())))
    }

    /// Takes a use as writable for the hypervisor to write on a domain's behalf or for a device or grant to hold. Needs
    /// no lock. Ended by [`FrameTable::drop_use`].
    ///
    /// # Errors
    /// As [`FrameTable::take_use`].
    pub fn take_writable(&self, m: &impl Cpus, frame: Frame, from: DomainId, by: DomainId) -> Result<(), Refused> {
        self.take_use(m, frame, Use::Writable, Taker { from, by, cpus: self.epochs.all() }).map(|_| ())
    }

    /// Takes what a mapping of a frame needs: a use as writable, or a reference. Ended by [`FrameTable::let_go`].
    ///
    /// # Errors
    /// As [`FrameTable::take_use`].
    pub fn hold(&self, m: &impl Cpus, frame: Frame, from: DomainId, by: DomainId, write: bool) -> Result<(), Refused> {
        if write { self.take_writable(m, frame, from, by) } else { self.take_ref(frame, from, by) }
    }

    /// Ends what [`FrameTable::hold`] took.
    pub fn let_go(&self, frame: Frame, by: DomainId, write: bool) {
        if write { _ = self.drop_use(frame, by) } else { self.drop_ref(frame, by) }
    }

    /// The owner gives a frame back. It goes to the pool when nobody uses it any more, at once if nobody does; until then
    /// the owner owns it.
    ///
    /// # Errors
    /// [`Refused::NoSuchFrame`], [`Refused::NotOwner`].
    pub fn give_back(&self, m: &impl Frames, frame: Frame, id: DomainId) -> Result<(), Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        let seen = OwnerState::from_bits(w.owner.load(SeqCst)).owner;
        step(w.owner, |bits| Ok((OwnerState::give_back(bits, id)?, ())))
            .map_err(|why| if seen == Owner::NotRam { Refused::NoSuchFrame } else { why })?;
        m.set_m2p(frame, NO_PFN);
        if planted(Fault::FreeEarly) {
            self.uncount_owned(id, 1);
            self.push_free(frame);
            return Ok(());
        }
        if planted(Fault::CountEarly) {
            self.uncount_owned(id, 1);
        }
        self.drop_ref(frame, id);
        Ok(())
    }

    /// A destroyed domain leaves those frames of a span that are its own. They go to the pool whatever it used them for,
    /// except those that others still use: they are nobody's until those let go.
    pub(crate) fn reclaim(&self, m: &impl Frames, span: Range<u32>, id: DomainId) {
        let (mut left, mut run) = (0u32, span.start..span.start);
        for (number, w) in self.rows(span) {
            let Some(refs) = self.leave(m, Frame::from_u32(number), &w, id) else { continue };
            left = left.wrapping_add(1);
            if refs == 0 {
                run = self.push_next(run, number);
            }
        }
        self.push_run(run);
        self.uncount_owned(id, left);
    }

    /// Makes a frame leave its domain, and says how many references of others it still has. Without any it is free, though
    /// not in the pool yet.
    fn leave(&self, m: &impl Frames, frame: Frame, w: &Words<'_>, id: DomainId) -> Option<u32> {
        let before = w.owner.load(SeqCst);
        if !OwnerState::is_of(before, id) {
            return None;
        }
        if OwnerState::is_allocated(before) {
            m.set_m2p(frame, NO_PFN); // before the step, after which it may be another's as soon as others let go
        }
        let refs = step(w.owner, |bits| {
            // Without references it is on its way to the pool already.
            ensure!((bits == before || OwnerState::is_of(bits, id)) && !OwnerState::is_unused(bits), ());
            if OwnerState::is_used_by_owner_alone(bits) {
                return Ok((OwnerState::FREE.bits(), 0));
            }
            let left = OwnerState::from_bits(bits).left();
            let next = if left.refs == 0 { OwnerState::FREE } else { left };
            Ok::<_, ()>((next.bits(), left.refs))
        });
        let refs = refs.ok()?;
        self.stamp(w); // after the step: others may have let go just before it
        if refs == 0 {
            w.kind.store(TypeState::FRESH.bits(), SeqCst);
        }
        Some(refs)
    }

    /// The first frame of a span that is a live L1 table of the domain's own.
    pub(crate) fn next_l1(&self, span: Range<u32>, id: DomainId) -> Option<Frame> {
        let is_l1 =
            |w: &Words<'_>| TypeState::is_l1(w.kind.load(SeqCst)) && OwnerState::is_of(w.owner.load(SeqCst), id);
        self.rows(span).find(|(_, w)| is_l1(w)).map(|(number, _)| Frame::from_u32(number))
    }

    /// Whether a frame is the domain's own memory.
    pub(crate) fn is_own(&self, frame: Frame, id: DomainId) -> bool {
        self.words(frame).is_some_and(|w| OwnerState::is_of(w.owner.load(SeqCst), id))
    }

    /// The frame that a frame's owner linked to it with [`FrameTable::set_link`].
    pub(crate) fn link(&self, frame: Frame) -> Option<Frame> {
        Frame::new((self.words(frame)?.link.load(SeqCst) & NEXT).checked_sub(1)?)
    }

    /// Links a frame to another, or to none. Whoever holds a frame's last use may keep it in a list so.
    pub(crate) fn set_link(&self, frame: Frame, next: Option<Frame>) {
        if let Some(w) = self.words(frame) {
            let next = next.map_or(0, |f| f.number().wrapping_add(1));
            w.link.store(w.link.load(SeqCst) & !NEXT | next, SeqCst);
        }
    }

    /// A frame is about to become a table: none of its entries counts yet. From here on [`FrameTable::filled`] holds of it.
    pub(crate) fn begin_table(&self, frame: Frame) {
        if let Some(w) = self.words(frame) {
            w.link.store(0, SeqCst);
        }
    }

    /// An entry of a table is, or is about to be, present. Called before the entry is written or counted; `skip` is the fault of
    /// a caller that does not.
    pub(crate) fn note_entry(&self, table: Frame, index: usize, skip: Fault) {
        if let Some(w) = self.words(table) {
            Self::note(&w, index, skip);
        }
    }

    #[inline]
    pub(super) fn note(w: &Words<'_>, index: usize, skip: Fault) {
        let group = (1 << ((index / GROUP) & 31)) << 32;
        if w.link.load(SeqCst) & group == 0 && !planted(skip) {
            w.link.fetch_or(group, SeqCst);
        }
    }

    /// The groups of [`GROUP`] entries of a table in which one may be present, a bit each; in all others none is.
    #[must_use]
    pub fn filled(&self, table: Frame) -> u32 {
        self.words(table).map_or(u32::MAX, |w| low32(w.link.load(SeqCst) >> 32))
    }

    #[inline]
    pub(super) fn stamp(&self, w: &Words<'_>) {
        let now = self.epochs.now();
        // One that is as new stays.
        let _ = step(w.stamp, |bits| if bits & !SHARED >= now { Err(()) } else { Ok((bits & SHARED | now, ())) });
    }
}

/// The one loop: applies a rule to a word until nobody came between.
#[inline(always)]
pub(super) fn step<T, E>(word: &AtomicU64, mut rule: impl FnMut(u64) -> Result<(u64, T), E>) -> Result<T, E> {
    let mut old = word.load(SeqCst);
    loop {
        let (new, result) = rule(old)?;
        between();
        match word.compare_exchange_weak(old, new, SeqCst, SeqCst) {
            Ok(_) => return Ok(result),
            Err(now) => old = now,
        }
    }
}

/// A promise of ours is broken. The frame stays as it is, which leaks it and harms nobody; `tests/sim` fails.
pub(crate) fn bug(frame: Frame, what: &str) {
    log::error!("{frame:?}: {what}");
}

#[cfg(feature = "planted-fault")]
impl FrameTable {
    /// How often the words of a frame have been looked up.
    #[must_use]
    pub fn looks(&self) -> u64 {
        self.looks.so_far()
    }

    /// The level, if the frame is a page table, whoever's.
    pub(crate) fn live_level(&self, frame: Frame) -> Option<u8> {
        self.info(frame)?.kind.live_table()
    }

    /// When a use of a frame ended last, and whether a domain other than its owner has used it.
    #[must_use]
    pub fn stamped(&self, frame: Frame) -> Option<u64> {
        Some(self.words(frame)?.stamp.load(SeqCst))
    }

    /// How many frames are set aside for a domain.
    #[must_use]
    pub fn promised(&self, id: DomainId) -> u32 {
        self.account(id).map_or(0, |account| account.promised.load(SeqCst))
    }
}
