//! The words of all frames, and the only loop that changes them.

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
/// The entry of the machine-to-physical table for frames that are not a domain's memory.
pub const NO_PFN: u64 = u64::MAX;
/// In a stamp: a domain other than the owner has used the frame, so any CPU may have translations to it.
const SHARED: u64 = 1 << 63;
/// In the link of a table: the bits for the next table in a list. The bits above record which groups of entries may
/// hold something.
const NEXT: u64 = 0xffff_ffff;
/// Number of entries of a table in a group.
pub const GROUP: usize = ENTRIES / 32;
/// How often a change of type is tried again because another CPU used the frame between the flush and the change.
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

/// All frames of the machine, their flush epochs, and the free frames.
#[derive(Debug)]
pub struct FrameTable {
    words: Once<&'static [[AtomicU64; WORDS]]>,
    pub(super) epochs: Epochs,
    pub(super) pool: Leaf<FreeList>,
    accounts: [FrameAccount; DomainId::SLOTS],
    looks: Looks,
    /// Whether fast paths are switched off.
    only_long: AtomicBool,
}

/// A domain's frames: how many it owns, the range in which all lie that it ever owned, and how many are set aside for
/// it.
#[derive(Debug)]
pub(super) struct FrameAccount {
    /// The number that is compared with the domain's limit. A frame counts until its last reference goes.
    count: AtomicU32,
    first: AtomicU32,
    last: AtomicU32,
    /// Free frames set aside for what the hypervisor keeps on the domain's behalf. Changed only under the pool's lock.
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

/// The two words of a frame as they were read. They may change at any time, unless the reader holds a lock or a use
/// that prevents it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Info {
    /// Type, uses, flags.
    pub kind: TypeState,
    /// Owner and references.
    pub owner: OwnerState,
}

/// For whom a frame is taken, and whose frame it must be.
#[derive(Clone, Copy, Debug)]
pub struct Taker {
    /// The domain that must own the frame, or to which it must be lent.
    pub from: DomainId,
    /// The domain on whose behalf the frame is taken.
    pub by: DomainId,
    /// CPUs that may hold translations of `from`. Used only if no other domain ever used the frame.
    pub cpus: CpuSet,
}

impl FrameTable {
    /// A table without frames, for a static.
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

    /// Gives the table its words: [`WORDS`] zeros for each frame below the limit. A frame counts as RAM only after
    /// [`FrameTable::add`] or [`FrameTable::reserve`]. Only the first call has an effect.
    pub fn init(&self, words: &'static [AtomicU64]) {
        self.words.call_once(|| words.as_chunks().0);
    }

    /// Switches the fast paths on or off. Calls have the same results either way.
    pub fn set_fast_paths(&self, on: bool) {
        self.only_long.store(!on, SeqCst);
    }

    /// Whether the fast paths are on.
    #[inline]
    pub(crate) fn has_fast_paths(&self) -> bool {
        !self.only_long.load(SeqCst)
    }

    /// The words of all frames.
    #[inline]
    pub(super) fn all_rows(&self) -> &'static [[AtomicU64; WORDS]] {
        self.words.get().copied().unwrap_or_default()
    }

    /// One more than the highest frame number that the table has words for.
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

    /// How many frames a domain owns. A frame that it gave back counts until nobody uses it any more.
    #[must_use]
    pub fn owned(&self, id: DomainId) -> u32 {
        self.account(id).map_or(0, |account| account.count.load(SeqCst))
    }

    /// A range that contains all frames the domain owns.
    pub(crate) fn span(&self, id: DomainId) -> Range<u32> {
        self.account(id).map_or(0..0, |e| e.first.load(SeqCst)..e.last.load(SeqCst).saturating_add(1))
    }

    /// Resets the range of a domain that owns nothing any more, so that its slot can be reused.
    pub(crate) fn forget(&self, id: DomainId) {
        let Some(account) = self.account(id) else { return };
        account.first.store(u32::MAX, SeqCst);
        account.last.store(0, SeqCst);
    }

    /// Adds frames that a domain is about to own to its count, unless the sum exceeds `limit`.
    pub(super) fn count_owned(&self, id: DomainId, frames: u32, limit: u64) -> Result<(), Refused> {
        let account = self.account(id).ok_or(Refused::NoMemory)?;
        let more = |owned: u32| owned.checked_add(frames).filter(|owned| u64::from(*owned) <= limit);
        account.count.fetch_update(SeqCst, SeqCst, more).map(|_| ()).map_err(|_| Refused::OverLimit)
    }

    /// Widens the domain's range to include `frame`.
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

    /// The words of contiguous frames, with the frames' numbers.
    pub(super) fn rows(&self, span: Range<u32>) -> impl Iterator<Item = (u32, Words<'_>)> {
        let rows = self.words.get().and_then(|words| words.get(index(span.start)..index(span.end)));
        span.zip(rows.unwrap_or_default().iter().inspect(|_| self.looks.count()).map(Words::of))
    }

    /// Reads the frame's state; `None` above the limit.
    #[must_use]
    pub fn info(&self, frame: Frame) -> Option<Info> {
        let w = self.words(frame)?;
        Some(Info {
            kind: TypeState::from_bits(w.kind.load(SeqCst)),
            owner: OwnerState::from_bits(w.owner.load(SeqCst)),
        })
    }

    /// Whether the frame is RAM. This does not change after boot.
    #[must_use]
    pub fn is_ram(&self, frame: Frame) -> bool {
        self.words(frame).is_some_and(|w| OwnerState::from_bits(w.owner.load(SeqCst)).owner != Owner::NotRam)
    }

    /// The level of the frame, if it is a validated page table of `owner`.
    #[must_use]
    pub fn live_table(&self, frame: Frame, owner: DomainId) -> Option<u8> {
        self.info(frame).filter(|i| i.owner.owner == Owner::Guest(owner))?.kind.live_table()
    }

    /// Takes a reference. The frame keeps its owner and contents until the reference is dropped.
    ///
    /// # Errors
    /// [`Refused::NoSuchFrame`], [`Refused::NotOwner`], [`Refused::TooManyUses`].
    pub fn take_ref(&self, frame: Frame, from: DomainId, by: DomainId) -> Result<(), Refused> {
        self.words(frame).ok_or(Refused::NoSuchFrame).and_then(|w| Self::take_ref_of(&w, from, by))
    }

    /// As [`FrameTable::take_ref`], for the frame with these words.
    #[inline(always)]
    fn take_ref_of(w: &Words<'_>, from: DomainId, by: DomainId) -> Result<(), Refused> {
        step(w.owner, |bits| OwnerState::take(bits, from, by).map(|next| (next, ())))?;
        if from != by {
            w.stamp.fetch_or(SHARED, SeqCst);
        }
        Ok(())
    }

    /// Drops a reference that was taken on behalf of `by`. With the last reference the frame goes to the pool.
    pub fn drop_ref(&self, frame: Frame, by: DomainId) {
        match self.words(frame) {
            Some(w) => self.drop_ref_of(frame, &w, by),
            None => bug(frame, "reference to no frame"),
        }
    }

    /// As [`FrameTable::drop_ref`], for the frame with these words.
    #[inline(always)]
    fn drop_ref_of(&self, frame: Frame, w: &Words<'_>, by: DomainId) {
        let dropped = step(w.owner, |bits| {
            let next = OwnerState::drop_ref(bits, by).ok_or(())?;
            if OwnerState::is_unused(next) {
                self.stamp(w); // before the count becomes 0
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

    /// Takes a reference and a use as `want`. If the use changes, stale translations are flushed first (P4). On
    /// [`Taken::Started`] the caller validates the contents and then calls [`FrameTable::promoted`] or
    /// [`FrameTable::demoted`].
    ///
    /// # Errors
    /// As [`FrameTable::take_ref`], and [`Refused::WrongType`], [`Refused::Unfinished`], [`Refused::Raced`].
    pub fn take_use(&self, m: &impl Cpus, frame: Frame, want: Use, taker: Taker) -> Result<Taken, Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        Self::take_ref_of(&w, taker.from, taker.by)?;
        let taken = self.take_type(m, &w, want, taker.cpus);
        if taken.is_err() {
            self.drop_ref(frame, taker.by);
        }
        taken
    }

    #[inline(always)]
    fn take_type(&self, m: &impl Cpus, w: &Words<'_>, want: Use, cpus: CpuSet) -> Result<Taken, Refused> {
        for _ in 0..TRIES {
            let mut stale = CpuSet::default();
            let taken = step(w.kind, |bits| {
                let taken = TypeState::take(bits, want, false);
                if taken == Err(TakeError::FlushFirst) {
                    // Computed for the word as it is in this round: a use in between changes its turn and its stamp.
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

    /// Drops a use and its reference, taken on behalf of `by`. The last use of a table passes to the caller, who undoes
    /// the table and then calls [`FrameTable::demoted`].
    pub fn drop_use(&self, frame: Frame, by: DomainId) -> Left {
        let Some(w) = self.words(frame) else {
            bug(frame, "use of no frame");
            return Left::Used;
        };
        match self.step_down(&w) {
            Ok(Left::TakeDown(level)) => Left::TakeDown(level),
            Ok(left) => {
                self.drop_ref_of(frame, &w, by);
                left
            }
            Err(()) => {
                bug(frame, "use dropped twice");
                Left::Used
            }
        }
    }

    /// Drops one use, without its reference.
    #[inline]
    pub(super) fn step_down(&self, w: &Words<'_>) -> Result<Left, ()> {
        step(w.kind, |bits| {
            let (next, left) = TypeState::drop_use(bits).ok_or(())?;
            if left == Left::Unused && !planted(Fault::SkipStamp) && !planted(Fault::StampLate) {
                self.stamp(w); // before the count becomes 0
            }
            Ok((next, left))
        })
        .inspect(|left| {
            if *left == Left::Unused && planted(Fault::StampLate) {
                self.stamp(w);
            }
        })
    }

    /// Tells that the contents are valid, after [`Taken::Started`].
    pub fn promoted(&self, frame: Frame) {
        self.change_type(frame, TypeState::promoted);
    }

    /// Ends the last use of a table of `owner`, whose entries hold no references any more.
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

    /// Marks a use that the caller has taken as the frame's pin.
    ///
    /// # Errors
    /// [`Refused::AlreadyPinned`], [`Refused::NotTable`].
    pub fn pin(&self, frame: Frame) -> Result<(), Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        step(w.kind, |bits| Ok((TypeState::from_bits(bits).pin()?.bits(), ())))
    }

    /// Removes the pin's mark from a frame of `owner`. The caller drops the pin's use.
    ///
    /// # Errors
    /// [`Refused::NotOwner`], [`Refused::NotPinned`].
    pub fn unpin(&self, frame: Frame, owner: DomainId) -> Result<(), Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        ensure!(OwnerState::from_bits(w.owner.load(SeqCst)).owner == Owner::Guest(owner), Refused::NotOwner);
        step(w.kind, |bits| Ok((TypeState::from_bits(bits).unpin()?.bits(), ())))
    }

    /// Takes a use as writable, for a write of the hypervisor on a domain's behalf, for a device or for a grant. Needs
    /// no lock. Ended by [`FrameTable::drop_use`].
    ///
    /// # Errors
    /// As [`FrameTable::take_use`].
    pub fn take_writable(&self, m: &impl Cpus, frame: Frame, from: DomainId, by: DomainId) -> Result<(), Refused> {
        self.take_use(m, frame, Use::Writable, Taker { from, by, cpus: self.epochs.all() }).map(|_| ())
    }

    /// Takes what a mapping of a frame needs: a use as writable, or only a reference. Ended by [`FrameTable::let_go`].
    ///
    /// # Errors
    /// As [`FrameTable::take_use`].
    #[inline(always)]
    pub fn hold(&self, m: &impl Cpus, frame: Frame, from: DomainId, by: DomainId, write: bool) -> Result<(), Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        Self::take_ref_of(&w, from, by)?;
        let again = |bits| TypeState::again(bits, Use::Writable).map(|next| (next, ())).ok_or(());
        if write && step(w.kind, again).is_err() { self.change_to_writable(m, frame, by) } else { Ok(()) }
    }

    /// Takes a use as writable that [`TypeState::again`] does not. The caller has taken the reference, which is dropped on
    /// an error.
    #[cold]
    fn change_to_writable(&self, m: &impl Cpus, frame: Frame, by: DomainId) -> Result<(), Refused> {
        let w = self.words(frame).ok_or(Refused::NoSuchFrame)?;
        let taken = self.take_type(m, &w, Use::Writable, self.epochs.all());
        taken.map(|_| ()).inspect_err(|_| self.drop_ref(frame, by))
    }

    /// Drops what [`FrameTable::hold`] took.
    #[inline(always)]
    pub fn let_go(&self, frame: Frame, by: DomainId, write: bool) {
        let drop_one = |bits| TypeState::drop_one(bits).map(|next| (next, ())).ok_or(());
        match self.words(frame) {
            Some(w) if !write || step(w.kind, drop_one).is_ok() => self.drop_ref_of(frame, &w, by),
            _ => _ = self.drop_use(frame, by), // the last use
        }
    }

    /// Gives a frame back, for its owner. It goes to the pool when nobody uses it any more, which may be at once. Until
    /// then it belongs to the owner.
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

    /// Takes those frames in `span` that are its own memory away from a destroyed domain. They go to the pool whatever
    /// the domain used them for. Frames that others still use have no owner until the others drop them.
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

    /// Takes a frame away from its domain. Returns how many references of others the frame still has. If there are none
    /// it is marked free, but is not in the pool yet.
    fn leave(&self, m: &impl Frames, frame: Frame, w: &Words<'_>, id: DomainId) -> Option<u32> {
        let before = w.owner.load(SeqCst);
        if !OwnerState::is_of(before, id) {
            return None;
        }
        if OwnerState::is_allocated(before) {
            m.set_m2p(frame, NO_PFN); // before the step: after it, the frame may soon have another owner
        }
        let refs = step(w.owner, |bits| {
            // A frame without references is on its way to the pool already.
            ensure!((bits == before || OwnerState::is_of(bits, id)) && !OwnerState::is_unused(bits), ());
            if OwnerState::is_used_by_owner_alone(bits) {
                return Ok((OwnerState::FREE.bits(), 0));
            }
            let left = OwnerState::from_bits(bits).left();
            let next = if left.refs == 0 { OwnerState::FREE } else { left };
            Ok::<_, ()>((next.bits(), left.refs))
        });
        let refs = refs.ok()?;
        self.stamp(w); // after the step: others may have dropped a use just before it
        if refs == 0 {
            w.kind.store(TypeState::FRESH.bits(), SeqCst);
        }
        Some(refs)
    }

    /// Returns the first frame of `span` that is a live L1 table of the domain's own.
    pub(crate) fn next_l1(&self, span: Range<u32>, id: DomainId) -> Option<Frame> {
        let is_l1 =
            |w: &Words<'_>| TypeState::is_l1(w.kind.load(SeqCst)) && OwnerState::is_of(w.owner.load(SeqCst), id);
        self.rows(span).find(|(_, w)| is_l1(w)).map(|(number, _)| Frame::from_u32(number))
    }

    /// Whether a frame is the domain's own memory.
    pub(crate) fn is_own(&self, frame: Frame, id: DomainId) -> bool {
        self.words(frame).is_some_and(|w| OwnerState::is_of(w.owner.load(SeqCst), id))
    }

    /// The frame that was linked to this one with [`FrameTable::set_link`].
    pub(crate) fn link(&self, frame: Frame) -> Option<Frame> {
        Frame::new((self.words(frame)?.link.load(SeqCst) & NEXT).checked_sub(1)?)
    }

    /// Links a frame to another one, or to none. Only the holder of a frame's last use may do this, to keep it in a
    /// list.
    pub(crate) fn set_link(&self, frame: Frame, next: Option<Frame>) {
        if let Some(w) = self.words(frame) {
            let next = next.map_or(0, |f| f.number().wrapping_add(1));
            w.link.store(w.link.load(SeqCst) & !NEXT | next, SeqCst);
        }
    }

    /// Prepares a frame that is about to become a table: none of its entries counts yet. From now on
    /// [`FrameTable::filled`] is right for it.
    pub(crate) fn begin_table(&self, frame: Frame) {
        if let Some(w) = self.words(frame) {
            w.link.store(0, SeqCst);
        }
    }

    /// Records that an entry of a table is present, or is about to be. Called before the entry is written or counted.
    /// `skip` is the planted fault in which this caller omits the record.
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

    /// One bit for each group of [`GROUP`] entries of a table. A clear bit means that no entry of the group is present.
    #[must_use]
    pub fn filled(&self, table: Frame) -> u32 {
        self.words(table).map_or(u32::MAX, |w| low32(w.link.load(SeqCst) >> 32))
    }

    #[inline]
    pub(super) fn stamp(&self, w: &Words<'_>) {
        let now = self.epochs.now();
        // A stamp that is at least as new stays.
        let _ = step(w.stamp, |bits| if bits & !SHARED >= now { Err(()) } else { Ok((bits & SHARED | now, ())) });
    }
}

/// The only loop: applies a rule to a word, again and again until no other CPU changed the word in between.
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

/// Reports that the hypervisor broke one of its promises. The frame stays as it is: it leaks, which harms nobody;
/// `tests/sim` fails.
#[cold]
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

    /// The level of the frame, if it is a page table of any domain.
    pub(crate) fn live_level(&self, frame: Frame) -> Option<u8> {
        self.info(frame)?.kind.live_table()
    }

    /// The stamp of a frame: when a use of it last ended, and whether another domain than its owner has used it.
    #[must_use]
    pub fn stamped(&self, frame: Frame) -> Option<u64> {
        Some(self.words(frame)?.stamp.load(SeqCst))
    }

    /// Number of frames set aside for a domain.
    #[must_use]
    pub fn promised(&self, id: DomainId) -> u32 {
        self.account(id).map_or(0, |account| account.promised.load(SeqCst))
    }
}
