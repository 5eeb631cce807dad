//! The rules of a frame, as pure functions on values: which use may follow which, when a count may change, when a frame
//! may get another owner. No memory, no loops; `table` applies the rules.

use crate::addr::{DomainId, low16, low32};
use crate::fault::{Fault, planted};

/// Why an operation on memory was refused. `dispatch` turns it into an error number; logs print it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Refused {
    /// The number names no frame of this machine, or one that is not RAM where RAM is needed.
    NoSuchFrame,
    /// The frame belongs to another domain, or is on its way to the pool.
    NotOwner,
    /// The frame is in use as something else.
    WrongType,
    /// The frame is being promoted to a table, or undone, by an unfinished operation.
    Unfinished,
    /// A count is full.
    TooManyUses,
    /// The entry has bits that no guest may set, or physical-address bits that this machine lacks.
    BadBits,
    /// Cacheability other than write-back, for RAM.
    CacheBits,
    /// A frame outside RAM that the domain may not map.
    NotYourDevice,
    /// A slot of an L4 that belongs to the hypervisor.
    HoleSlot,
    /// The frame named as a page table is not a validated table.
    NotTable,
    /// The table is pinned already.
    AlreadyPinned,
    /// The table is not pinned.
    NotPinned,
    /// The entry was changed again and again during the operation.
    Raced,
    /// A forbidden kind of descriptor.
    BadDescriptor,
    /// An address or number with a forbidden alignment or range.
    Misaligned,
    /// No page table translates the address.
    NotMapped,
    /// The entry is not the one that the caller wanted to remove.
    Mismatch,
    /// The fault is not a write to an own L1 table.
    NotTableWrite,
    /// The domain is being destroyed.
    Dying,
    /// There is no free frame.
    NoMemory,
    /// The domain owns as many frames as it may.
    OverLimit,
    /// An operation this interface does not know.
    Unknown,
}

/// What a frame is used as. This changes only while the frame has no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Use {
    /// Nothing that is counted: the frame was never used, or is only mapped read-only.
    None,
    /// Mapped writable, or written by the hypervisor on behalf of a guest.
    Writable,
    /// A page table of the first level.
    L1,
    /// A page table of the second level.
    L2,
    /// A page table of the third level.
    L3,
    /// A root table.
    L4,
    /// A page of segment descriptors.
    Descriptors,
}

impl Use {
    const ALL: [Self; 7] = [Self::None, Self::Writable, Self::L1, Self::L2, Self::L3, Self::L4, Self::Descriptors];

    /// The use as a page table of this level.
    #[must_use]
    pub fn table(level: u8) -> Option<Self> {
        Self::ALL.get(usize::from(level).checked_add(1)?).copied().filter(|u| u.level() == Some(level))
    }

    /// The level, if this is the use as a page table.
    #[must_use]
    pub fn level(self) -> Option<u8> {
        match self {
            Self::L1 | Self::L2 | Self::L3 | Self::L4 => (self as u8).checked_sub(Self::Writable as u8),
            _ => None,
        }
    }

    /// The use as the low bits of a word.
    const fn bits(self) -> u64 {
        self as u64
    }

    fn from_bits(bits: u64) -> Self {
        Self::ALL.get(usize::from(low16(bits & 7))).copied().unwrap_or(Self::None)
    }
}

/// The first word of a frame: what the frame is used as, and how often.
///
/// Bits 0..=2 use, 3 pinned, 4 validated, 5 partial, 6..=31 turn, 32..=63 count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TypeState {
    /// What the frame is used as. Kept when the last use is gone, because stale translations may still be those of this
    /// use.
    pub used_as: Use,
    /// Whether one of the uses is a pin.
    pub pinned: bool,
    /// Whether the contents satisfy the rules of the use.
    pub validated: bool,
    /// Whether the contents are being validated or undone. The frame then has one use, which belongs to that work.
    pub partial: bool,
    /// Changes whenever the count becomes 0, so that a frame that was used and dropped in between is not taken for one
    /// that stayed unused.
    pub turn: u32,
    /// How many uses there are: entries, pins, roots and grants.
    pub count: u32,
}

const TURN_MASK: u64 = 0x3ff_ffff;
/// The unit of `turn` in a type's word.
const TURN: u64 = 1 << 6;
const TURNS: u64 = TURN_MASK * TURN;
/// Bits of a type's word: everything about the kind of use.
const KIND: u64 = 7 | VALIDATED | 1 << 5;
const VALIDATED: u64 = 1 << 4;
const PINNED: u64 = 1 << 3;
/// In both words: the unit of the count of uses or references.
pub(super) const ONE: u64 = 1 << 32;
/// In both words: from this value on, the count is full.
const LAST: u64 = u64::MAX << 32;

impl TypeState {
    /// The state of a frame that was just allocated.
    pub const FRESH: Self =
        Self { used_as: Use::None, pinned: false, validated: false, partial: false, turn: 0, count: 0 };

    /// Decodes a word.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self {
            used_as: Use::from_bits(bits),
            pinned: bits & 1 << 3 != 0,
            validated: bits & 1 << 4 != 0,
            partial: bits & 1 << 5 != 0,
            turn: low32(bits >> 6 & TURN_MASK),
            count: low32(bits >> 32),
        }
    }

    /// Encodes a word.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.used_as.bits()
            | u64::from(self.pinned) << 3
            | u64::from(self.validated) << 4
            | u64::from(self.partial) << 5
            | (u64::from(self.turn) & TURN_MASK) << 6
            | u64::from(self.count) << 32
    }

    /// Takes one more use as `want`. `flushed` tells that no CPU has a stale translation from the former use (P4); it
    /// only matters if the use changes.
    ///
    /// # Errors
    /// [`TakeError`]: the frame has another use, the count is full, or a flush must come first.
    pub fn take(bits: u64, want: Use, flushed: bool) -> Result<(u64, Taken), TakeError> {
        let another = bits.checked_add(ONE).ok_or(Refused::TooManyUses);
        if bits & KIND == want.bits() | VALIDATED {
            return Ok((another?, Taken::Ready));
        }
        let was = Self::from_bits(bits);
        if was.count > 0 {
            ensure!(was.used_as == want, Refused::WrongType);
            ensure!(planted(Fault::IgnoreUnfinished), Refused::Unfinished);
            return Ok((another?, Taken::Ready));
        }
        if was.used_as != want && was.used_as != Use::None && !flushed && !planted(Fault::SkipFlush) {
            return Err(TakeError::FlushFirst);
        }
        let ready = want == Use::Writable;
        let next = Self { used_as: want, pinned: false, validated: ready, partial: !ready, count: 1, ..was };
        Ok((next.bits(), if ready { Taken::Ready } else { Taken::Started }))
    }

    /// Takes one more use in the simple cases of [`TypeState::take`]: the last use was the same and the contents are
    /// valid for it, or the frame was never used and is now used as writable. `None` in all other cases: call `take`.
    #[inline]
    #[must_use]
    pub fn again(bits: u64, want: Use) -> Option<u64> {
        if bits & KIND == want.bits() | VALIDATED {
            return bits.checked_add(ONE);
        }
        let first = want == Use::Writable && bits & (KIND | PINNED) == 0 && bits < ONE;
        first.then_some(bits | Use::Writable.bits() | VALIDATED | ONE)
    }

    /// Drops one use that is not the last.
    #[inline]
    #[must_use]
    pub fn drop_one(bits: u64) -> Option<u64> {
        if bits >= 2 * ONE { Some(bits.wrapping_sub(ONE)) } else { None }
    }

    /// Drops one use. The last use of a table is not dropped: it passes to the caller, who undoes the table.
    /// `None` if there was no use to drop, which is a bug of the hypervisor.
    #[inline]
    #[must_use]
    pub fn drop_use(bits: u64) -> Option<(u64, Left)> {
        if let Some(next) = Self::drop_one(bits) {
            return Some((next, Left::Used));
        }
        if bits >= ONE && bits & KIND == Use::Writable.bits() | VALIDATED {
            // The frequent case of what follows below: the count becomes 0, the turn changes, and there is no pin.
            return Some((bits & KIND | bits.wrapping_add(TURN) & TURNS, Left::Unused));
        }
        let was = Self::from_bits(bits);
        match was.used_as.level() {
            _ if was.count == 0 => None,
            Some(_) if was.partial => None,
            Some(level) => Some((Self { validated: false, partial: true, ..was }.bits(), Left::TakeDown(level))),
            None => Some((was.unused().bits(), Left::Unused)),
        }
    }

    /// Ends the validation that [`Taken::Started`] asked for, with success.
    #[must_use]
    pub fn promoted(self) -> Option<Self> {
        (self.partial && self.count == 1).then_some(Self { partial: false, validated: true, ..self })
    }

    /// Ends the undoing of a table, or a validation that failed: the last use goes.
    #[must_use]
    pub fn demoted(self) -> Option<Self> {
        (self.partial && self.count == 1).then_some(Self { partial: false, validated: false, ..self.unused() })
    }

    /// Marks one of the uses as the pin.
    ///
    /// # Errors
    /// [`Refused::AlreadyPinned`], or [`Refused::NotTable`] if the frame is not a validated table.
    pub fn pin(self) -> Result<Self, Refused> {
        match (self.pinned, self.validated && self.count > 0, self.used_as.level()) {
            (true, ..) if !planted(Fault::PinTwice) => Err(Refused::AlreadyPinned),
            (_, true, Some(_)) => Ok(Self { pinned: true, ..self }),
            _ => Err(Refused::NotTable),
        }
    }

    /// Removes the mark of the pin. The caller still has to drop the pin's use.
    ///
    /// # Errors
    /// [`Refused::NotPinned`].
    pub fn unpin(self) -> Result<Self, Refused> {
        if self.pinned { Ok(Self { pinned: false, ..self }) } else { Err(Refused::NotPinned) }
    }

    /// Whether the word is that of a live L1 table: the same as `live_table() == Some(1)`, since a valid table has
    /// uses.
    #[inline]
    #[must_use]
    pub fn is_l1(bits: u64) -> bool {
        bits & KIND == Use::L1.bits() | VALIDATED
    }

    /// The level, if the frame is a table that page walks may follow.
    #[must_use]
    pub fn live_table(self) -> Option<u8> {
        if self.validated && !self.partial && self.count > 0 { self.used_as.level() } else { None }
    }

    /// The state after the last use is gone. Only a writable page needs no validation when it is used the same way
    /// again.
    fn unused(self) -> Self {
        let turn = self.turn.wrapping_add(1) & 0x3ff_ffff;
        let validated = self.used_as == Use::Writable;
        Self { count: 0, pinned: false, partial: false, validated, turn, ..self }
    }
}

/// What the caller has to do after a successful [`TypeState::take`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taken {
    /// Nothing: the use is ready.
    Ready,
    /// Validate the contents, then call [`TypeState::promoted`] or [`TypeState::demoted`].
    Started,
}

/// What is left after [`TypeState::drop_use`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Left {
    /// Other uses.
    Used,
    /// No use.
    Unused,
    /// A table of this level without uses: the caller undoes it, then calls [`TypeState::demoted`].
    TakeDown(u8),
}

/// Why a use was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TakeError {
    /// Stale translations of the former use must be flushed first.
    FlushFirst,
    /// The use is refused.
    Refused(Refused),
}

impl From<Refused> for TakeError {
    fn from(why: Refused) -> Self {
        Self::Refused(why)
    }
}

/// The owner of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// No owner, because the frame is not RAM: a hole or a device.
    NotRam,
    /// The pool of free frames.
    Free,
    /// The hypervisor, for itself alone.
    Hypervisor,
    /// A domain: the frame is its own memory.
    Guest(DomainId),
    /// The hypervisor, for a domain that may map it read-write: shared info, grant tables. A permanent use as writable
    /// keeps the frame from becoming a table. The domain cannot free it.
    Lent(DomainId),
    /// No owner any more: its domain was destroyed while others used the frame. It goes to the pool with the last
    /// reference.
    Orphan,
}

/// The second word of a frame: its owner, and how many references there are.
///
/// Bits 0..=14 domain, 15..=17 kind, 18 allocated, 19..=31 references of others, 32..=63 references. In place of the
/// domain, a free frame has 0, or one more than the order of the free block that begins with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OwnerState {
    /// The owner.
    pub owner: Owner,
    /// Whether the owner has not given the frame back. One of the references then stands for the ownership.
    pub allocated: bool,
    /// How many of the references belong to other domains than the owner. These outlive the owner.
    pub others: u16,
    /// The number of references: mappings of any kind, uses, and the ownership.
    pub refs: u32,
}

/// In an owner's word: the frame is free.
const FREE: u64 = 1 << 15;
/// In an owner's word: the frame is a domain's own memory.
const GUEST: u64 = 3 << 15;
/// In an owner's word: the bits for the domain, or for the order of a free block.
const DETAIL: u64 = 0x7fff;
const ALLOCATED: u64 = 1 << 18;
/// In an owner's word: the unit of the references of others.
const OTHER: u64 = 1 << 19;
const OTHERS: u64 = ONE - OTHER;

impl OwnerState {
    /// The state of a free frame that does not begin a block.
    pub const FREE: Self = Self { owner: Owner::Free, allocated: false, others: 0, refs: 0 };

    /// Decodes a word.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        let domain = DomainId(low16(bits & DETAIL));
        let owner = match (bits >> 15) & 7 {
            1 => Owner::Free,
            2 => Owner::Hypervisor,
            3 => Owner::Guest(domain),
            4 => Owner::Lent(domain),
            5 => Owner::Orphan,
            _ => Owner::NotRam,
        };
        let others = low16((bits & OTHERS) >> 19);
        Self { owner, allocated: bits & ALLOCATED != 0, others, refs: low32(bits >> 32) }
    }

    /// Encodes a word.
    #[must_use]
    pub fn bits(self) -> u64 {
        let (kind, domain) = match self.owner {
            Owner::NotRam => (0, 0),
            Owner::Free => (1, 0),
            Owner::Hypervisor => (2, 0),
            Owner::Guest(id) => (3, id.0),
            Owner::Lent(id) => (4, id.0),
            Owner::Orphan => (5, 0),
        };
        let allocated = if self.allocated { ALLOCATED } else { 0 };
        u64::from(domain) | kind << 15 | allocated | u64::from(self.others) << 19 | u64::from(self.refs) << 32
    }

    /// The word of a free frame that begins a block of `2^order` free frames.
    #[must_use]
    pub fn block(order: u32) -> u64 {
        FREE | u64::from(order).wrapping_add(1) & DETAIL
    }

    /// Whether the word is that of a frame that begins a free block of this order.
    #[must_use]
    pub fn is_block(bits: u64, order: u32) -> bool {
        bits == Self::block(order)
    }

    /// Whether the word is that of a frame of this domain's own memory.
    #[inline]
    #[must_use]
    pub fn is_of(bits: u64, id: DomainId) -> bool {
        bits & 0x3_8000 == GUEST && bits & DETAIL == u64::from(id.0)
    }

    /// The owner's bits in the words of a domain's own memory, for [`OwnerState::is_owned`]; `None` if `id` does not
    /// fit.
    #[inline]
    #[must_use]
    pub fn word_of(id: DomainId) -> Option<u64> {
        let id = u64::from(id.0);
        (id & !DETAIL == 0).then_some(GUEST | id)
    }

    /// Like [`OwnerState::is_of`], with one comparison: `own` comes from [`OwnerState::word_of`].
    #[inline]
    #[must_use]
    pub fn is_owned(bits: u64, own: u64) -> bool {
        bits & 0x3_ffff == own
    }

    /// Whether the word is that of a frame that its owner has not given back.
    #[inline]
    #[must_use]
    pub fn is_allocated(bits: u64) -> bool {
        bits & ALLOCATED != 0
    }

    /// Whether the word is that of a frame to which no domain but the owner has references.
    #[inline]
    #[must_use]
    pub fn is_used_by_owner_alone(bits: u64) -> bool {
        bits & OTHERS == 0
    }

    /// Whether the word is that of a frame without references.
    #[must_use]
    pub fn is_unused(bits: u64) -> bool {
        bits < ONE
    }

    /// Takes one more reference on behalf of `by`. The frame must be `from`'s own memory, or lent to `from`.
    ///
    /// # Errors
    /// [`Refused::NotOwner`] (also for a frame on its way to the pool), [`Refused::TooManyUses`].
    #[inline]
    pub fn take(bits: u64, from: DomainId, by: DomainId) -> Result<u64, Refused> {
        let theirs = Self::is_of(bits, from) || Self::from_bits(bits).owner == Owner::Lent(from);
        if (!theirs || Self::is_unused(bits)) && !planted(Fault::SkipOwnerCheck) {
            let no_ram = Self::from_bits(bits).owner == Owner::NotRam;
            return Err(if no_ram { Refused::NoSuchFrame } else { Refused::NotOwner });
        }
        let (other, full) = if from == by { (0, false) } else { (OTHER, bits & OTHERS == OTHERS) };
        ensure!(bits < LAST && !full, Refused::TooManyUses);
        Ok(bits.wrapping_add(ONE | other))
    }

    /// Drops one reference that was taken on behalf of `by`. `None` if there was none, which is a bug of the
    /// hypervisor.
    #[must_use]
    pub fn drop_ref(bits: u64, by: DomainId) -> Option<u64> {
        // Once the owner is gone, references of others are no longer counted apart.
        let by_other = !Self::is_of(bits, by)
            && matches!(Self::from_bits(bits).owner, Owner::Guest(id) | Owner::Lent(id) if id != by);
        let other = if by_other { OTHER } else { 0 };
        (bits >= ONE && bits & OTHERS >= other).then(|| bits.wrapping_sub(ONE | other))
    }

    /// Takes one more reference of the owner on its own memory; `own` comes from [`OwnerState::word_of`]. `None` in all
    /// other cases: call [`OwnerState::take`].
    #[inline]
    #[must_use]
    pub fn take_own(bits: u64, own: u64) -> Option<u64> {
        if Self::is_owned(bits, own) && (ONE..LAST).contains(&bits) { Some(bits.wrapping_add(ONE)) } else { None }
    }

    /// Drops one reference of the owner on its own memory, if it is not the last. `None` if it is: call
    /// [`OwnerState::drop_ref`].
    #[inline]
    #[must_use]
    pub fn drop_own(bits: u64) -> Option<u64> {
        if bits >= 2 * ONE { Some(bits.wrapping_sub(ONE)) } else { None }
    }

    /// Marks that the owner gives the frame back. The caller still has to drop the owner's reference.
    ///
    /// # Errors
    /// [`Refused::NotOwner`] for a frame that is not `id`'s own memory or was given back before.
    pub fn give_back(bits: u64, id: DomainId) -> Result<u64, Refused> {
        let theirs = Self::is_of(bits, id) && !Self::is_unused(bits) && bits & ALLOCATED != 0;
        if theirs { Ok(bits & !ALLOCATED) } else { Err(Refused::NotOwner) }
    }

    /// The state after the hypervisor has taken back a frame that it used or lent: nobody can take new references,
    /// existing ones keep the frame. The caller still has to drop the hypervisor's reference.
    #[must_use]
    pub fn orphaned(self) -> Self {
        Self { owner: Owner::Orphan, allocated: false, others: 0, ..self }
    }

    /// The state after the owner was destroyed: its references are gone with it; those of others keep the frame.
    #[must_use]
    pub fn left(self) -> Self {
        let others = if planted(Fault::ForgetOthers) { 0 } else { self.others };
        Self { refs: others.into(), ..self.orphaned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USES: [Use; 7] = Use::ALL;

    fn take(s: TypeState, want: Use, flushed: bool) -> Result<(TypeState, Taken), TakeError> {
        TypeState::take(s.bits(), want, flushed).map(|(next, taken)| (TypeState::from_bits(next), taken))
    }

    fn drop_use(s: TypeState) -> Option<(TypeState, Left)> {
        TypeState::drop_use(s.bits()).map(|(next, left)| (TypeState::from_bits(next), left))
    }

    /// Every possible state, with small counts and the highest one.
    fn states() -> impl Iterator<Item = TypeState> {
        let all = USES.into_iter().flat_map(|used_as| {
            (0..8u8).flat_map(move |flags| {
                [0, 1, 2, u32::MAX].map(|count| TypeState {
                    used_as,
                    pinned: flags & 1 != 0,
                    validated: flags & 2 != 0,
                    partial: flags & 4 != 0,
                    turn: 5,
                    count,
                })
            })
        });
        all.filter(|s| !(s.validated && s.partial))
    }

    #[test]
    fn words_keep_what_they_are_given() {
        for s in states() {
            assert_eq!(TypeState::from_bits(s.bits()), s);
        }
        for owner in [Owner::NotRam, Owner::Free, Owner::Hypervisor, Owner::Orphan, Owner::Guest(DomainId(0x7fef))] {
            for allocated in [false, true] {
                let s = OwnerState { owner, allocated, others: 0x1001, refs: 0x8000_0001 };
                assert_eq!(OwnerState::from_bits(s.bits()), s);
            }
        }
        assert_eq!(TypeState::from_bits(0), TypeState::FRESH);
        assert_eq!(OwnerState::from_bits(0).owner, Owner::NotRam);
    }

    #[test]
    fn a_use_never_changes_while_there_is_one() {
        for s in states().filter(|s| s.count > 0) {
            for want in USES {
                for flushed in [false, true] {
                    if let Ok((next, taken)) = take(s, want, flushed) {
                        assert_eq!(next, TypeState { count: s.count + 1, ..s });
                        assert!(s.used_as == want && s.validated && !s.partial && taken == Taken::Ready);
                    }
                }
            }
        }
    }

    #[test]
    fn what_needs_no_question_is_as_taken() {
        let mut without_question = 0;
        for s in states() {
            for want in USES.into_iter().filter(|want| *want != Use::None) {
                if let Some(next) = TypeState::again(s.bits(), want) {
                    assert_eq!(TypeState::take(s.bits(), want, false), Ok((next, Taken::Ready)), "{s:?} as {want:?}");
                    without_question += 1;
                }
            }
        }
        assert!(without_question > 10);
    }

    #[test]
    fn a_changed_use_needs_a_flush_and_validation() {
        for s in states().filter(|s| s.count == 0) {
            for want in USES {
                match take(s, want, false) {
                    Err(TakeError::FlushFirst) => {
                        assert!(s.used_as != want && s.used_as != Use::None);
                        let (next, taken) = take(s, want, true).unwrap();
                        assert_eq!(taken == Taken::Ready, want == Use::Writable);
                        assert_eq!((next.used_as, next.count), (want, 1));
                    }
                    Err(other) => panic!("{s:?} {want:?} {other:?}"),
                    Ok((next, Taken::Ready)) => {
                        assert!(next.used_as == want && (want == Use::Writable || s.validated));
                    }
                    Ok((next, Taken::Started)) => {
                        assert!(next.partial && !next.validated && next.used_as == want)
                    }
                }
            }
        }
    }

    #[test]
    fn take_and_drop_are_inverse_and_full_counts_refuse() {
        for s in states() {
            for want in USES {
                if let Ok((next, Taken::Ready)) = take(s, want, true) {
                    let (back, left) = drop_use(next).unwrap();
                    match left {
                        Left::Used => assert_eq!(back, s),
                        Left::Unused => {
                            assert_eq!((back.count, back.used_as, back.turn), (0, want, 6))
                        }
                        Left::TakeDown(level) => {
                            assert_eq!(want.level(), Some(level));
                            assert!(back.partial && !back.validated && back.count == 1);
                            assert!(take(back, want, true).is_err(), "a table going down gains no uses");
                            assert_eq!(back.demoted().unwrap().count, 0);
                        }
                    }
                }
            }
            if s.count == u32::MAX {
                assert!(USES.iter().all(|&want| take(s, want, true).is_err()));
            }
            assert_eq!(drop_use(s).is_none(), s.count == 0 || s.count == 1 && s.partial && s.used_as.level().is_some());
        }
    }

    #[test]
    fn an_idle_frame_used_meanwhile_is_told_apart() {
        let (used, _) = take(TypeState::FRESH, Use::Writable, true).unwrap();
        let (idle, _) = drop_use(used).unwrap();
        let (idle_again, _) = drop_use(take(idle, Use::Writable, true).unwrap().0).unwrap();
        assert_ne!(idle.bits(), idle_again.bits());
    }

    #[test]
    fn pins_are_single_and_only_on_live_tables() {
        for s in states() {
            if let Ok(p) = s.pin() {
                assert!(s.live_table().is_some() || s.partial);
                assert_eq!(p.pin(), Err(Refused::AlreadyPinned));
                assert_eq!(p.unpin(), Ok(s));
            }
            assert_eq!(s.unpin().is_ok(), s.pinned);
        }
    }

    #[test]
    fn live_l1_tables_are_found() {
        for s in states().filter(is_sound) {
            assert_eq!(TypeState::is_l1(s.bits()), s.live_table() == Some(1), "{s:?}");
        }
    }

    /// Whether a state can occur: a valid table has uses.
    fn is_sound(s: &TypeState) -> bool {
        !(s.validated && s.used_as.level().is_some()) || s.count > 0
    }

    #[test]
    fn no_rule_leaves_a_valid_table_without_uses() {
        for s in states().filter(is_sound) {
            let takes = USES
                .into_iter()
                .flat_map(|want| [false, true].map(|flushed| take(s, want, flushed).map(|(next, _)| next).ok()));
            let again = USES.into_iter().map(|want| TypeState::again(s.bits(), want).map(TypeState::from_bits));
            let ends = [drop_use(s).map(|(next, _)| next), TypeState::drop_one(s.bits()).map(TypeState::from_bits)];
            let others = [s.promoted(), s.demoted(), s.pin().ok(), s.unpin().ok()];
            for next in takes.chain(again).chain(ends).chain(others).flatten() {
                assert!(is_sound(&next), "{s:?} becomes {next:?}");
            }
        }
    }

    const US: DomainId = DomainId(1);
    const THEM: DomainId = DomainId(0x7fef);

    fn of(owner: Owner, others: u16, refs: u32) -> u64 {
        OwnerState { owner, allocated: true, others, refs }.bits()
    }

    #[test]
    fn references_follow_the_owner() {
        let one = of(Owner::Guest(US), 0, 1);
        assert!(OwnerState::is_of(one, US) && !OwnerState::is_of(one, THEM));
        for owner in [Owner::NotRam, Owner::Free, Owner::Hypervisor, Owner::Guest(US), Owner::Lent(US), Owner::Orphan] {
            let none =
                (DomainId::FIRST_RESERVED..=u16::MAX).find(|id| OwnerState::is_of(of(owner, 0, 1), DomainId(*id)));
            assert_eq!(none, None, "no id that is too large is taken for {owner:?}");
        }
        assert_eq!(OwnerState::take(one, THEM, US), Err(Refused::NotOwner));
        assert_eq!(OwnerState::take(one, US, US), Ok(of(Owner::Guest(US), 0, 2)));
        assert_eq!(OwnerState::drop_ref(of(Owner::Guest(US), 0, 2), US), Some(one));
        assert_eq!(OwnerState::take(of(Owner::Guest(US), 0, u32::MAX), US, US), Err(Refused::TooManyUses));
        let none = of(Owner::Guest(US), 0, 0);
        assert!(OwnerState::is_unused(none) && !OwnerState::is_unused(one));
        assert_eq!(OwnerState::take(none, US, US), Err(Refused::NotOwner));
        assert_eq!(OwnerState::drop_ref(none, US), None);
        let given = OwnerState::give_back(one, US).unwrap();
        assert_eq!(OwnerState::from_bits(given), OwnerState { allocated: false, ..OwnerState::from_bits(one) });
        assert_eq!(OwnerState::give_back(given, US), Err(Refused::NotOwner));
        assert_eq!(OwnerState::give_back(one, THEM), Err(Refused::NotOwner));
        let lent = of(Owner::Lent(US), 0, 1);
        assert!(!OwnerState::is_of(lent, US) && OwnerState::give_back(lent, US).is_err());
        assert_eq!(OwnerState::take(lent, US, US), Ok(of(Owner::Lent(US), 0, 2)));
        for owner in [Owner::Free, Owner::Hypervisor, Owner::Orphan, Owner::NotRam] {
            assert!(OwnerState::take(of(owner, 0, 1), DomainId(0), DomainId(0)).is_err());
            assert_eq!(OwnerState::drop_ref(of(owner, 0, 1), THEM), Some(of(owner, 0, 0)));
        }
    }

    #[test]
    fn references_of_others_outlive_the_owner() {
        for owner in [Owner::Guest(US), Owner::Lent(US)] {
            let shared = OwnerState::take(of(owner, 0, 2), US, THEM).unwrap();
            assert_eq!(shared, of(owner, 1, 3));
            assert_eq!(OwnerState::drop_ref(shared, THEM), Some(of(owner, 0, 2)));
            assert_eq!(OwnerState::drop_ref(shared, US), Some(of(owner, 1, 2)));
            assert_eq!(OwnerState::drop_ref(of(owner, 0, 2), THEM), None, "they hold none");
            let full = of(owner, 0x1fff, 9000);
            assert_eq!(OwnerState::take(full, US, THEM), Err(Refused::TooManyUses));
            assert_eq!(OwnerState::take(full, US, US), Ok(of(owner, 0x1fff, 9001)));
            let left = OwnerState::from_bits(shared).left();
            assert_eq!(left, OwnerState { owner: Owner::Orphan, allocated: false, others: 0, refs: 1 });
        }
    }

    #[test]
    fn a_free_block_says_how_large_it_is() {
        let inside = OwnerState::FREE;
        for order in 0..=9 {
            let bits = OwnerState::block(order);
            assert_eq!(OwnerState::from_bits(bits), inside, "free, and nobody's");
            assert!((0..=9).all(|other| OwnerState::is_block(bits, other) == (order == other)));
            assert!(!OwnerState::is_block(inside.bits(), order), "not the first of its block");
        }
    }
}
