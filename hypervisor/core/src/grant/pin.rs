//! Pins: a grant in use. One word per entry of a table records the frame and how often it is in use, out of the granter's
//! reach (ABI io 1.4).

use super::{GrantRefused, Grants, HANDLES_PER_FRAME};
use crate::addr::{ENTRIES, FrameSlot};
use crate::frame;
use crate::prelude::*;
use core::sync::atomic::AtomicU64;
use hypercall_abi::grant::entry;

/// How often a pin is tried while the granter changes the entry under us.
const TRIES: u32 = 5;
/// Most uses of a kind.
const MAX_USES: u64 = 0xff;

/// The record of an entry in use: frame in bits 0..32, who uses it in 32..48, uses for reading in 48..56, for writing in
/// 56..64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Active(u64);

impl Active {
    const READ: u64 = 1 << 48;
    const WRITE: u64 = 1 << 56;

    fn frame(self) -> Frame {
        Frame::from_u32(low32(self.0))
    }

    fn readers(self) -> u64 {
        self.0 >> 48 & 0xff
    }

    fn writers(self) -> u64 {
        self.0 >> 56
    }

    fn idle(self) -> bool {
        self.0 >> 48 == 0
    }

    /// How many uses there are of a kind, and what one more adds.
    fn uses(self, writable: bool) -> (u64, u64) {
        if writable { (self.writers(), Self::WRITE) } else { (self.readers(), Self::READ) }
    }

    /// With one more use, if `user` may have it: an entry in use is for the one who uses it, whatever its granter writes.
    fn with(self, frame: Frame, user: DomainId, writable: bool) -> Option<Self> {
        let (uses, one) = self.uses(writable);
        let theirs = self.idle() || low16(self.0 >> 32) == user.0;
        let counts = self.0 >> 48 << 48;
        (theirs && uses < MAX_USES).then(|| Self(counts.wrapping_add(one) | u64::from(user.0) << 32 | frame.number()))
    }

    /// The same uses, of this frame.
    fn of(self, frame: Frame) -> Self {
        Self(self.0 & !u64::from(u32::MAX) | frame.number())
    }

    /// With one use of a frame less, if there is one: the domain may be another than the one that granted.
    fn without(self, frame: Frame, writable: bool) -> Option<Self> {
        let (uses, one) = self.uses(writable);
        (uses > 0 && self.frame() == frame).then(|| Self(self.0.wrapping_sub(one)))
    }
}

/// A grant in use by somebody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pin {
    pub(super) owner: DomainId,
    pub(super) gref: u32,
    pub(super) frame: Frame,
    pub(super) writable: bool,
}

impl<M: Machine> CpuCtx<'_, M> {
    /// Puts a grant of `owner` to use by `user`.
    #[inline(always)]
    pub(super) fn pin(
        &mut self,
        owner: &Domain,
        gref: u32,
        user: DomainId,
        writable: bool,
    ) -> Result<Pin, GrantRefused> {
        let frame = self.pin_frame(owner, gref, user, writable)?;
        Ok(Pin { owner: owner.id(), gref, frame, writable })
    }

    /// As [`CpuCtx::pin`]; returns the frame.
    fn pin_frame(&mut self, owner: &Domain, gref: u32, user: DomainId, writable: bool) -> Result<Frame, GrantRefused> {
        let _guard = owner.grants.lock.lock(self.held);
        let (word, record) = owner.grants.entry(self.m, gref).ok_or(GrantRefused::NoSuchGrant)?;
        let active = Active(record.load(Relaxed));
        let more = active.with(active.frame(), user, writable).ok_or(GrantRefused::NotGranted)?;
        let frame = mark_in_use(word, user, writable, active)?;
        if let Err(why) = self.world.frames.hold(self.m, frame, owner.id(), user, writable) {
            clear_marks(word, active);
            let none = matches!(why, frame::Refused::NoSuchFrame | frame::Refused::NotOwner);
            return Err(if none { GrantRefused::NoSuchPage } else { GrantRefused::NotGranted });
        }
        record.store(more.of(frame).0, Relaxed);
        Ok(frame)
    }

    /// Ends a use by `user`. The caller has flushed every translation it had given.
    #[inline]
    pub(super) fn unpin(&mut self, pin: Pin, user: DomainId) {
        // Of a granter that is gone only the frame is left.
        if let Some(owner) = self.world.slot(pin.owner).filter(|owner| owner.id() == pin.owner) {
            let _guard = owner.grants.lock.lock(self.held);
            if let Some((word, record)) = owner.grants.entry(self.m, pin.gref)
                && let Some(active) = Active(record.load(Relaxed)).without(pin.frame, pin.writable)
            {
                record.store(active.0, Relaxed);
                clear_marks(word, active);
            }
        }
        self.world.frames.let_go(pin.frame, user, pin.writable);
    }
}

/// Marks a shared entry as in use, if it allows this user this use, and says which frame it is for. An entry in use keeps
/// the frame it had, whatever its granter writes meanwhile.
fn mark_in_use(word: &AtomicU64, user: DomainId, writable: bool, active: Active) -> Result<Frame, GrantRefused> {
    for _ in 0..TRIES {
        let seen = word.load(Acquire);
        let (flags, grantee, frame) = (low16(seen), low16(seen >> 16), low32(seen >> 32));
        let allowed = flags & entry::TYPE == entry::PERMIT_ACCESS
            && flags & entry::SUB_PAGE == 0
            && grantee == user.0
            && !(writable && flags & entry::READONLY != 0);
        ensure!(allowed, GrantRefused::NotGranted);
        let marks = entry::READING | if writable { entry::WRITING } else { 0 };
        let marked = seen | u64::from(marks);
        if word.compare_exchange(seen, marked, AcqRel, Acquire).is_ok() {
            return Ok(if active.idle() { Frame::from_u32(frame) } else { active.frame() });
        }
    }
    Err(GrantRefused::NotGranted)
}

/// Takes the marks away that no use stands behind any more.
fn clear_marks(word: &AtomicU64, active: Active) {
    let writing = if active.writers() == 0 { entry::WRITING } else { 0 };
    let reading = if active.idle() { entry::READING } else { 0 };
    if writing | reading != 0 {
        word.fetch_and(!u64::from(writing | reading), AcqRel);
    }
}

/// A handle: what a domain has mapped. Two words: bits 0..6 of the first are flags, its upper half is the reference; the
/// second holds owner and frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Handle {
    pub(super) pin: Pin,
    pub(super) host: bool,
    pub(super) device: bool,
    /// The CPU mapping was named by the machine address of its entry, and is again when it is unmapped.
    pub(super) by_entry: bool,
}

impl Handle {
    const USED: u64 = 1;
    const WRITABLE: u64 = 2;
    const HOST: u64 = 4;
    const DEVICE: u64 = 8;
    /// In place of the others: the handle is about to change.
    const CLAIMED: u64 = 16;
    const BY_ENTRY: u64 = 32;

    pub(super) fn to_words(self) -> [u64; 2] {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let flags = Self::USED
            | bit(self.pin.writable, Self::WRITABLE)
            | bit(self.host, Self::HOST)
            | bit(self.device, Self::DEVICE)
            | bit(self.by_entry, Self::BY_ENTRY);
        [flags | u64::from(self.pin.gref) << 32, u64::from(self.pin.owner.0) | self.pin.frame.number() << 32]
    }

    pub(super) fn from_words([first, second]: [u64; 2]) -> Option<Self> {
        let flag = |bit| first & bit != 0;
        let frame = Frame::from_u32(low32(second >> 32));
        let pin =
            Pin { owner: DomainId(low16(second)), gref: low32(first >> 32), frame, writable: flag(Self::WRITABLE) };
        let [host, device, by_entry] = [Self::HOST, Self::DEVICE, Self::BY_ENTRY].map(flag);
        flag(Self::USED).then_some(Self { pin, host, device, by_entry })
    }
}

impl Grants {
    /// The shared entry of a reference, and our record of it.
    fn entry<'m, M: Machine>(&self, m: &'m M, gref: u32) -> Option<(&'m AtomicU64, &'m AtomicU64)> {
        let (frame, slot) = (index(gref) / ENTRIES, index(gref) % ENTRIES);
        let word = |list: &[FrameSlot]| m.page(list.get(frame)?.get()?).get(slot);
        Some((word(&self.table)?, word(&self.active)?))
    }

    /// The words of a handle.
    fn handle_words<'m, M: Machine>(&self, m: &'m M, handle: u32) -> Option<&'m [AtomicU64; 2]> {
        let frame = nth(&self.handles, handle / HANDLES_PER_FRAME)?.get()?;
        nth(m.page(frame).as_chunks().0, handle % HANDLES_PER_FRAME)
    }

    /// Takes a handle for a change that only the one who took it may make, and ends with [`Claimed::set`].
    pub(super) fn claim_handle<'m, M: Machine>(&'m self, m: &'m M, number: u32) -> Option<(Handle, Claimed<'m>)> {
        let words @ [first, second] = self.handle_words(m, number)?;
        let seen = first.load(Acquire);
        let held = Handle::from_words([seen, second.load(Acquire)])?;
        first.compare_exchange(seen, Handle::CLAIMED, AcqRel, Acquire).ok()?;
        Some((held, Claimed { grants: self, words, number }))
    }

    /// Claims the handle from which a search for a free one would begin, if it is free. Takes no lock: the frames of handles
    /// stay where they are for as long as the domain lives.
    pub(super) fn next_free<'m, M: Machine>(&'m self, m: &'m M) -> Option<Claimed<'m>> {
        let number = self.free.load(SeqCst);
        let claimed = self.claim_free(m, number)?;
        // Unless one before it was given up meanwhile.
        let _ = self.free.compare_exchange(number, number + 1, SeqCst, SeqCst);
        Some(claimed)
    }

    /// Takes a handle that nobody has.
    pub(super) fn claim_free<'m, M: Machine>(&'m self, m: &'m M, number: u32) -> Option<Claimed<'m>> {
        let words @ [first, _] = self.handle_words(m, number)?;
        first.compare_exchange(0, Handle::CLAIMED, AcqRel, Acquire).ok()?;
        Some(Claimed { grants: self, words, number })
    }
}

/// A handle that only the holder of this value may change.
#[must_use = "the handle stays claimed until it is set"]
pub(super) struct Claimed<'m> {
    grants: &'m Grants,
    words: &'m [AtomicU64; 2],
    number: u32,
}

impl Claimed<'_> {
    /// The number of the handle.
    pub(super) const fn number(&self) -> u32 {
        self.number
    }

    /// Sets what the handle stands for; `None` frees it.
    #[inline]
    pub(super) fn set(self, value: Option<Handle>) {
        let [first, second] = self.words;
        let [used, of] = value.map_or([0, 0], Handle::to_words);
        // The first word last: it says that the second counts.
        second.store(of, Release);
        first.store(used, Release);
        if value.is_none() {
            self.grants.free.fetch_min(self.number, SeqCst);
        }
    }
}

#[cfg(feature = "planted-fault")]
impl Grants {
    /// Frames lent to the domain as its table.
    pub fn table_frames(&self) -> impl Iterator<Item = Frame> + '_ {
        crate::audit::frames(&self.table)
    }

    /// Frames with a word per reference.
    pub fn active_frames(&self) -> impl Iterator<Item = Frame> + '_ {
        crate::audit::frames(&self.active)
    }

    /// The handle from which a search for a free one begins.
    pub fn first_free(&self) -> u32 {
        self.free.load(SeqCst)
    }

    /// Frames with two words per handle.
    pub fn handle_frames(&self) -> impl Iterator<Item = Frame> + '_ {
        crate::audit::frames(&self.handles)
    }

    /// What the words of a handle say, if it is in use.
    #[must_use]
    pub fn read_handle(words: [u64; 2]) -> Option<crate::audit::Held> {
        let Handle { pin: Pin { owner, gref, frame, writable }, host, .. } = Handle::from_words(words)?;
        Some(crate::audit::Held { owner, gref, frame, writable, host })
    }

    /// What the word of a reference says: the frame, uses for reading, uses for writing.
    #[must_use]
    pub fn read_active(word: u64) -> (Frame, u64, u64) {
        let active = Active(word);
        (active.frame(), active.readers(), active.writers())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: DomainId = DomainId(7);

    fn shared(flags: u16, domid: u16, frame: u32) -> AtomicU64 {
        AtomicU64::new(u64::from(flags) | u64::from(domid) << 16 | u64::from(frame) << 32)
    }

    #[test]
    fn only_the_grantee_and_only_as_granted() {
        let idle = Active(0);
        let ok = shared(entry::PERMIT_ACCESS, 7, 0x99);
        assert_eq!(mark_in_use(&ok, USER, true, idle), Ok(Frame::from_u32(0x99)));
        assert_eq!(ok.load(Relaxed) & 0xffff, u64::from(entry::PERMIT_ACCESS | entry::READING | entry::WRITING));
        for (flags, domid, writable) in [
            (entry::INVALID, 7, false),
            (entry::ACCEPT_TRANSFER, 7, false),
            (entry::PERMIT_ACCESS, 8, false),
            (entry::PERMIT_ACCESS | entry::READONLY, 7, true),
            (entry::PERMIT_ACCESS | entry::SUB_PAGE, 7, false),
        ] {
            assert_eq!(mark_in_use(&shared(flags, domid, 1), USER, writable, idle), Err(GrantRefused::NotGranted));
        }
    }

    #[test]
    fn an_entry_in_use_keeps_its_frame() {
        let moved = shared(entry::PERMIT_ACCESS, 7, 0x100);
        assert_eq!(mark_in_use(&moved, USER, false, Active(0x99 | 7 << 32 | Active::READ)), Ok(Frame::from_u32(0x99)));
    }

    #[test]
    fn an_entry_in_use_is_for_its_user_and_counts_no_further_than_it_can() {
        let (frame, other) = (Frame::from_u32(0x99), DomainId(8));
        let mut active = Active(0).with(frame, USER, true).unwrap();
        assert_eq!((active.frame(), active.readers(), active.writers()), (frame, 0, 1));
        assert_eq!(active.with(frame, other, false), None);
        for _ in 0..MAX_USES {
            active = active.with(frame, USER, false).unwrap();
        }
        assert_eq!((active.with(frame, USER, false), active.writers()), (None, 1));
        let written = active.without(frame, true).unwrap();
        assert_eq!(written.without(frame, true), None, "no use is ended twice");
        assert_eq!(active.without(Frame::from_u32(0x98), true), None, "nor one of another frame");
        assert_eq!(Active(0).without(frame, false), None);
    }

    #[test]
    fn marks_go_with_the_last_use_of_their_kind() {
        let word = shared(entry::PERMIT_ACCESS | entry::READING | entry::WRITING, 7, 1);
        clear_marks(&word, Active(1 | Active::READ));
        assert_eq!(word.load(Relaxed) & 0xffff, u64::from(entry::PERMIT_ACCESS | entry::READING));
        clear_marks(&word, Active(1));
        assert_eq!(word.load(Relaxed) & 0xffff, u64::from(entry::PERMIT_ACCESS));
    }

    #[test]
    fn handles_survive_their_words() {
        let pin = Pin { owner: DomainId(0x7fef), gref: 511, frame: Frame::from_u32(u32::MAX), writable: true };
        for (host, device) in [(true, false), (false, true), (true, true)] {
            let handle = Handle { pin, host, device, by_entry: host };
            assert_eq!(Handle::from_words(handle.to_words()), Some(handle));
        }
        assert_eq!(Handle::from_words([0, 0]), None);
    }
}
