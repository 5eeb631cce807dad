//! The rules of a frame, as pure functions on values: which use may follow which, when a count may move, when a frame
//! may change hands. No memory, no loops; `table` applies them.

use crate::addr::DomainId;
use crate::fault::{Fault, planted};

/// Why an operation on memory was refused. `dispatch` turns it into an error number; logs print it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Refused {
    /// The number names no frame of this machine, or one that is not RAM where RAM is needed.
    NoSuchFrame,
    /// The frame belongs to somebody else, or is on its way to the pool.
    NotOwner,
    /// The frame is in use as something else.
    WrongType,
    /// The frame's use as a table is being built up or taken down by an unfinished operation.
    Unfinished,
    /// A count is full.
    TooManyUses,
    /// The entry has bits no guest may set, or physical-address bits this machine lacks.
    BadBits,
    /// Cacheability other than write-back, for RAM.
    CacheBits,
    /// A frame outside RAM that the domain has no authority to map.
    NotYourDevice,
    /// A slot of an L4 that belongs to the hypervisor.
    HoleSlot,
    /// The frame named as a page table is not a validated one.
    NotTable,
    /// The table is pinned already.
    AlreadyPinned,
    /// The table is not pinned.
    NotPinned,
    /// The entry kept changing under us.
    Raced,
    /// A descriptor of a forbidden kind.
    BadDescriptor,
    /// An address or number that its alignment or range forbids.
    Misaligned,
    /// No page table translates the address.
    NotMapped,
    /// The entry is not the one that was to be removed.
    Mismatch,
    /// The fault is not a write to one's own L1 table.
    NotTableWrite,
    /// The domain is being destroyed.
    Dying,
    /// No free frame.
    NoMemory,
    /// An operation this interface does not know.
    Unknown,
}

/// What a frame is used as. It changes only while unused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Use {
    /// Nothing that counts: not used yet, or only mapped read-only.
    None,
    /// Mapped writable, or written by the hypervisor for the guest.
    Writable,
    /// Page tables, by level.
    L1,
    /// Second level.
    L2,
    /// Third level.
    L3,
    /// Root.
    L4,
    /// Segment descriptors.
    Descriptors,
}

impl Use {
    const ALL: [Self; 7] = [Self::None, Self::Writable, Self::L1, Self::L2, Self::L3, Self::L4, Self::Descriptors];

    /// Use as a page table of this level.
    #[must_use]
    pub fn table(level: u8) -> Option<Self> {
        Self::ALL.get(usize::from(level).checked_add(1)?).copied().filter(|u| u.level() == Some(level))
    }

    /// The level, if this is a page table.
    #[must_use]
    pub fn level(self) -> Option<u8> {
        match self {
            Self::L1 | Self::L2 | Self::L3 | Self::L4 => (self as u8).checked_sub(Self::Writable as u8),
            _ => None,
        }
    }

    fn from_bits(bits: u64) -> Self {
        Self::ALL.get((bits & 7) as usize).copied().unwrap_or(Self::None)
    }
}

/// The first word of a frame: what it is used as, and how often.
///
/// Bits 0..=2 use, 3 pinned, 4 validated, 5 partial, 6..=31 turn, 32..=63 count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TypeState {
    /// What the uses are of. Kept when the last use is gone, because stale translations may know the frame as that.
    pub used_as: Use,
    /// One of the uses is a pin.
    pub pinned: bool,
    /// The contents satisfy the rules of the use.
    pub validated: bool,
    /// The contents are being validated or taken down; the one use there is belongs to that work.
    pub partial: bool,
    /// Moves when the count becomes 0, so that a frame used and dropped meanwhile is not mistaken for an idle one.
    pub turn: u32,
    /// How many entries, pins, roots and grants use it so.
    pub count: u32,
}

const TURN_MASK: u64 = 0x3ff_ffff;

impl TypeState {
    /// A frame just handed out.
    pub const FRESH: Self =
        Self { used_as: Use::None, pinned: false, validated: false, partial: false, turn: 0, count: 0 };

    /// Reads a word.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self {
            used_as: Use::from_bits(bits),
            pinned: bits & 1 << 3 != 0,
            validated: bits & 1 << 4 != 0,
            partial: bits & 1 << 5 != 0,
            turn: ((bits >> 6) & TURN_MASK) as u32,
            count: (bits >> 32) as u32,
        }
    }

    /// As a word.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.used_as as u64
            | u64::from(self.pinned) << 3
            | u64::from(self.validated) << 4
            | u64::from(self.partial) << 5
            | (u64::from(self.turn) & TURN_MASK) << 6
            | u64::from(self.count) << 32
    }

    /// Takes one more use as `want`. `flushed` says that no CPU that may know the frame in its former use has a stale
    /// translation (P4); it is asked for only when the use changes.
    ///
    /// # Errors
    /// [`TakeError`]: somebody uses the frame differently, or the count is full, or a flush must come first.
    pub fn take(self, want: Use, flushed: bool) -> Result<(Self, Taken), TakeError> {
        if self.count == 0 {
            if self.used_as == want && self.validated {
                return Ok((Self { count: 1, ..self }, Taken::Ready));
            }
            if self.used_as != want && self.used_as != Use::None && !flushed && !planted(Fault::SkipFlush) {
                return Err(TakeError::FlushFirst);
            }
            let ready = want == Use::Writable;
            let next = Self { used_as: want, pinned: false, validated: ready, partial: !ready, count: 1, ..self };
            return Ok((next, if ready { Taken::Ready } else { Taken::Started }));
        }
        ensure!(self.used_as == want, Refused::WrongType);
        ensure!(self.validated && !self.partial || planted(Fault::IgnoreUnfinished), Refused::Unfinished);
        let count = self.count.checked_add(1).ok_or(Refused::TooManyUses)?;
        Ok((Self { count, ..self }, Taken::Ready))
    }

    /// Drops one use. The last use of a table is not dropped: it becomes the use of the work that takes the table down.
    /// `None`: there was no use to drop, which is our bug.
    #[must_use]
    pub fn drop_use(self) -> Option<(Self, Left)> {
        let count = self.count.checked_sub(1)?;
        if count > 0 {
            return Some((Self { count, ..self }, Left::Used));
        }
        match self.used_as.level() {
            Some(level) => {
                (!self.partial).then_some((Self { validated: false, partial: true, ..self }, Left::TakeDown(level)))
            }
            None => Some((self.unused(), Left::Unused)),
        }
    }

    /// The validation that [`Taken::Started`] asked for has succeeded.
    #[must_use]
    pub fn promoted(self) -> Option<Self> {
        (self.partial && self.count == 1).then_some(Self { partial: false, validated: true, ..self })
    }

    /// The frame has been taken down (or its validation was given up): its last use goes.
    #[must_use]
    pub fn demoted(self) -> Option<Self> {
        (self.partial && self.count == 1).then_some(Self { partial: false, validated: false, ..self.unused() })
    }

    /// Marks one of the uses as the pin.
    ///
    /// # Errors
    /// [`Refused::AlreadyPinned`], or [`Refused::NotTable`] for what is no validated table.
    pub fn pin(self) -> Result<Self, Refused> {
        match (self.pinned, self.validated && self.count > 0, self.used_as.level()) {
            (true, ..) if !planted(Fault::PinTwice) => Err(Refused::AlreadyPinned),
            (_, true, Some(_)) => Ok(Self { pinned: true, ..self }),
            _ => Err(Refused::NotTable),
        }
    }

    /// Takes the mark of the pin away; its use is still to be dropped.
    ///
    /// # Errors
    /// [`Refused::NotPinned`].
    pub fn unpin(self) -> Result<Self, Refused> {
        if self.pinned { Ok(Self { pinned: false, ..self }) } else { Err(Refused::NotPinned) }
    }

    /// The level, if the frame is a table that page walks may rely on.
    #[must_use]
    pub fn live_table(self) -> Option<u8> {
        if self.validated && !self.partial && self.count > 0 { self.used_as.level() } else { None }
    }

    /// Without its last use. Only writable pages have nothing to be validated when they are used so again.
    fn unused(self) -> Self {
        let turn = self.turn.wrapping_add(1) & 0x3ff_ffff;
        let validated = self.used_as == Use::Writable;
        Self { count: 0, pinned: false, partial: false, validated, turn, ..self }
    }
}

/// What a successful [`TypeState::take`] leaves to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taken {
    /// Nothing.
    Ready,
    /// The contents must be validated; then [`TypeState::promoted`] or [`TypeState::demoted`].
    Started,
}

/// What a [`TypeState::drop_use`] leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Left {
    /// Other uses.
    Used,
    /// No use.
    Unused,
    /// A table of this level, to be taken down by the caller; then [`TypeState::demoted`].
    TakeDown(u8),
}

/// Why a use was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TakeError {
    /// Stale translations of the former use must be flushed first.
    FlushFirst,
    /// Not at all.
    Refused(Refused),
}

impl From<Refused> for TakeError {
    fn from(why: Refused) -> Self {
        Self::Refused(why)
    }
}

/// Whose a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// No RAM: a hole or a device.
    NotRam,
    /// The pool's.
    Free,
    /// The hypervisor's alone.
    Hypervisor,
    /// A domain's own memory.
    Guest(DomainId),
    /// The hypervisor's, for a domain to map read-write: shared info, grant tables. Its permanent use as writable keeps
    /// it from becoming a table; the domain never frees it.
    Lent(DomainId),
    /// Left behind by a destroyed domain because somebody else still maps it; goes to the pool with the last reference.
    Orphan,
}

/// The second word of a frame: whose it is, and how many references hold it.
///
/// Bits 0..=15 domain, 16..=18 kind, 19 allocated, 32..=63 references.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OwnerState {
    /// Whose.
    pub owner: Owner,
    /// The owner has not given it back: one of the references is the ownership itself.
    pub allocated: bool,
    /// Mappings of any kind, typed uses, and the ownership.
    pub refs: u32,
}

impl OwnerState {
    /// Reads a word.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        let domain = DomainId((bits & 0xffff) as u16);
        let owner = match (bits >> 16) & 7 {
            1 => Owner::Free,
            2 => Owner::Hypervisor,
            3 => Owner::Guest(domain),
            4 => Owner::Lent(domain),
            5 => Owner::Orphan,
            _ => Owner::NotRam,
        };
        Self { owner, allocated: bits & 1 << 19 != 0, refs: (bits >> 32) as u32 }
    }

    /// As a word.
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
        u64::from(domain) | kind << 16 | u64::from(self.allocated) << 19 | u64::from(self.refs) << 32
    }

    /// Whether a word says that the frame is a domain's own memory: for searches through many.
    #[must_use]
    pub fn is_of(bits: u64, id: DomainId) -> bool {
        let wanted = Self { owner: Owner::Guest(id), allocated: false, refs: 0 };
        bits & 0x7_ffff == wanted.bits()
    }

    /// Takes one more reference to a frame that must be `from`'s: its own memory or lent to it.
    ///
    /// # Errors
    /// [`Refused::NotOwner`] (also for a frame on its way to the pool), [`Refused::TooManyUses`].
    pub fn take(self, from: DomainId) -> Result<Self, Refused> {
        let theirs = matches!(self.owner, Owner::Guest(id) | Owner::Lent(id) if id == from);
        if (!theirs || self.refs == 0) && !planted(Fault::SkipOwnerCheck) {
            return Err(if self.owner == Owner::NotRam { Refused::NoSuchFrame } else { Refused::NotOwner });
        }
        Ok(Self { refs: self.refs.checked_add(1).ok_or(Refused::TooManyUses)?, ..self })
    }

    /// Drops one reference; `None`: there was none, which is our bug.
    #[must_use]
    pub fn drop_ref(self) -> Option<Self> {
        Some(Self { refs: self.refs.checked_sub(1)?, ..self })
    }

    /// The owner gives the frame back. Its reference is still to be dropped.
    ///
    /// # Errors
    /// [`Refused::NotOwner`] for a frame that is not `id`'s own memory or was given back before.
    pub fn give_back(self, id: DomainId) -> Result<Self, Refused> {
        if self.owner == Owner::Guest(id) && self.allocated && self.refs > 0 {
            Ok(Self { allocated: false, ..self })
        } else {
            Err(Refused::NotOwner)
        }
    }

    /// The owner is gone for good: nobody can take new references; those there are keep the frame. If the owner had not
    /// given it back, one reference is still to be dropped.
    #[must_use]
    pub fn orphaned(self) -> Self {
        Self { owner: Owner::Orphan, allocated: false, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USES: [Use; 7] = Use::ALL;

    /// Every state that can be, with small counts and the fullest one.
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
                let s = OwnerState { owner, allocated, refs: 0x8000_0001 };
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
                    if let Ok((next, taken)) = s.take(want, flushed) {
                        assert_eq!(next, TypeState { count: s.count + 1, ..s });
                        assert!(s.used_as == want && s.validated && !s.partial && taken == Taken::Ready);
                    }
                }
            }
        }
    }

    #[test]
    fn a_changed_use_needs_a_flush_and_validation() {
        for s in states().filter(|s| s.count == 0) {
            for want in USES {
                match s.take(want, false) {
                    Err(TakeError::FlushFirst) => {
                        assert!(s.used_as != want && s.used_as != Use::None);
                        let (next, taken) = s.take(want, true).unwrap();
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
                if let Ok((next, Taken::Ready)) = s.take(want, true) {
                    let (back, left) = next.drop_use().unwrap();
                    match left {
                        Left::Used => assert_eq!(back, s),
                        Left::Unused => {
                            assert_eq!((back.count, back.used_as, back.turn), (0, want, 6))
                        }
                        Left::TakeDown(level) => {
                            assert_eq!(want.level(), Some(level));
                            assert!(back.partial && !back.validated && back.count == 1);
                            assert!(back.take(want, true).is_err(), "a table going down gains no uses");
                            assert_eq!(back.demoted().unwrap().count, 0);
                        }
                    }
                }
            }
            if s.count == u32::MAX {
                assert!(USES.iter().all(|&want| s.take(want, true).is_err()));
            }
            assert_eq!(
                s.drop_use().is_none(),
                s.count == 0 || s.count == 1 && s.partial && s.used_as.level().is_some()
            );
        }
    }

    #[test]
    fn an_idle_frame_used_meanwhile_is_told_apart() {
        let (used, _) = TypeState::FRESH.take(Use::Writable, true).unwrap();
        let (idle, _) = used.drop_use().unwrap();
        let (idle_again, _) = idle.take(Use::Writable, true).unwrap().0.drop_use().unwrap();
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
    fn references_follow_the_owner() {
        let (us, them) = (DomainId(1), DomainId(2));
        let s = OwnerState { owner: Owner::Guest(us), allocated: true, refs: 1 };
        assert_eq!(s.take(them), Err(Refused::NotOwner));
        assert_eq!(s.take(us).unwrap().drop_ref(), Some(s));
        assert_eq!(OwnerState { refs: u32::MAX, ..s }.take(us), Err(Refused::TooManyUses));
        assert_eq!(OwnerState { refs: 0, ..s }.take(us), Err(Refused::NotOwner));
        assert_eq!(OwnerState { refs: 0, ..s }.drop_ref(), None);
        let given = s.give_back(us).unwrap();
        assert_eq!(given.give_back(us), Err(Refused::NotOwner));
        assert_eq!(s.give_back(them), Err(Refused::NotOwner));
        let lent = OwnerState { owner: Owner::Lent(us), ..s };
        assert!(lent.take(us).is_ok() && lent.give_back(us).is_err());
        assert_eq!(s.orphaned().take(us), Err(Refused::NotOwner));
        for owner in [Owner::Free, Owner::Hypervisor, Owner::Orphan, Owner::NotRam] {
            assert!(OwnerState { owner, ..s }.take(DomainId(0)).is_err());
        }
    }
}
