//! The journal: the requests that a back end has taken and not answered. If the back end dies, its successor reads the journal
//! and serves the ring without loss (ABI io 9.3).
//!
//! The journal lies in memory that can outlive the back end. It begins with four words; as many entries as the ring has slots
//! follow at byte 128. An entry holds the back end's private copy of a request. Entries come from a free list, so a request
//! keeps its entry even when the response to another request overwrites its slot in the ring.
//!
//! | offset in the journal | word |
//! | --- | --- |
//! | 0 | [`MAGIC`], written last when a journal begins |
//! | 4 | number of entries |
//! | 8 | index of the next request to be taken |
//! | 12 | a note for the next back end, zero at first |
//! | 128 | entries of 128 bytes |
//!
//! | offset in an entry | what |
//! | --- | --- |
//! | 0 | the request |
//! | 112 | the request's index in the ring |
//! | 116 | the index of the response |
//! | 120 | the entry's state: one word, so that it changes atomically |
//! | 124 | a checksum of the request and its index |
//!
//! Order of the stores: request, state `IN_FLIGHT`, index of the next request; then it is carried out; then the index of the
//! response, state `DONE` with the status, the response in the ring, the published index, state `FREE`. Each state is stored
//! with release ordering. So whenever the back end dies, a request that is `DONE` is not carried out again, and a request that
//! is `IN_FLIGHT` was not answered.

mod entry;

use core::fmt;

use zerocopy::{FromBytes, IntoBytes};

use super::{Head, Response, SLOT_BYTES, Slot, Status};
use crate::page::SharedPage;
use crate::ring::{BackRing, Layout, RingError};
use entry::{Entries, State};

pub use entry::Entry;

/// The first word of a journal: its kind and version.
pub const MAGIC: u32 = 0x314a_4b42;
/// The maximum number of entries of a journal: the slots of a ring of 16 pages.
pub const MAX_ENTRIES: u32 = 512;

const MAGIC_AT: usize = 0;
const ENTRIES_AT: usize = 4;
const CONSUMED_AT: usize = 8;
const NOTE_AT: usize = 12;
const ENTRY_BYTES: usize = 128;

/// The bytes at the beginning of a request that have its [`Head`].
const HEAD_BYTES: usize = 16;
const REQUEST_INDEX: usize = 112;
const RESPONSE_INDEX: usize = 116;
const STATE: usize = 120;
const CHECKSUM: usize = 124;

/// The maximum number of back ends that carry out a request. A request at which each back end dies would take the disks of all
/// guests away.
pub const TRIES: u8 = 2;

/// Returns the bytes of the journal of a ring of `entries` slots.
#[must_use]
pub const fn journal_bytes(entries: u32) -> usize {
    ENTRY_BYTES * (entries as usize + 1)
}

/// Why a journal cannot be used, or a ring with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalError {
    /// The memory is shorter than [`journal_bytes`], or the ring has more than [`MAX_ENTRIES`] slots.
    Size,
    /// The memory has no journal of this version for a ring of this size.
    Foreign,
    /// The journal contradicts itself or the ring: something else than a back end has written to it.
    Damaged,
    /// The ring is broken.
    Ring(RingError),
}

impl From<RingError> for JournalError {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

impl fmt::Display for JournalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size => f.write_str("the journal has another size than the ring asks for"),
            Self::Foreign => f.write_str("there is no journal of this ring"),
            Self::Damaged => f.write_str("the journal is damaged"),
            Self::Ring(error) => error.fmt(f),
        }
    }
}

/// The back end's side of a ring with a journal. The caller passes the pages of the ring and the memory of the journal to each
/// call, and must pass those of the first call each time.
#[derive(Clone, Debug)]
pub struct Ring {
    ring: BackRing,
    entries: u32,
    free: Entries,
    in_flight: Entries,
    done: Entries,
}

impl Ring {
    /// Connects to a ring without requests of an earlier back end, and begins a journal. Any earlier contents of the journal's
    /// memory are ignored.
    ///
    /// # Errors
    /// The indices of the ring contradict each other, the memory is too small, or the ring is too large.
    pub fn begin<P: SharedPage, M: SharedPage>(page: &P, journal: &M, layout: Layout) -> Result<Self, JournalError> {
        let mut new = Self::of(BackRing::attach(page, layout)?, journal, layout)?;
        journal.store_u32(MAGIC_AT, 0);
        for entry in new.all() {
            journal.store_u32(entry.at() + STATE, State::Free.word());
            new.free.insert(entry);
        }
        journal.store_u32(ENTRIES_AT, new.entries);
        journal.store_u32(CONSUMED_AT, new.ring.consumed());
        journal.store_u32(NOTE_AT, 0);
        journal.store_u32(MAGIC_AT, MAGIC);
        Ok(new)
    }

    /// Connects to a ring whose earlier back end died. Responses that it had not published are staged again; requests that it
    /// had taken and not answered are in flight again, see [`resumed`](Self::resumed). The caller must then call
    /// [`publish`](Self::publish), and notify the front end once whatever that returns.
    ///
    /// # Errors
    /// The journal or the ring cannot be used. Only a new connection helps.
    pub fn recover<P: SharedPage, M: SharedPage>(page: &P, journal: &M, layout: Layout) -> Result<Self, JournalError> {
        // The ring as its pages show it. These do not tell which requests were taken beyond the published responses.
        let shown = BackRing::attach(page, layout)?;
        let mut new = Self::of(shown, journal, layout)?;
        let head = [MAGIC_AT, ENTRIES_AT].map(|at| journal.load_u32(at));
        if head != [MAGIC, new.entries] {
            return Err(JournalError::Foreign);
        }
        let (published, consumed) = (new.ring.answered(), journal.load_u32(CONSUMED_AT));
        for entry in new.all() {
            new.sort(journal, entry, published, consumed)?;
        }
        let answered = new.staged(journal, published)?;
        new.ring = BackRing::attach_at(page, layout, consumed, published)?;
        new.stage_again(page, journal, answered)?;
        Ok(new)
    }

    fn of<M: SharedPage>(ring: BackRing, journal: &M, layout: Layout) -> Result<Self, JournalError> {
        let entries = layout.entries();
        if entries > MAX_ENTRIES || journal.len_bytes() < journal_bytes(entries) {
            return Err(JournalError::Size);
        }
        let [free, in_flight, done] = <[Entries; 3]>::default();
        Ok(Self { ring, entries, free, in_flight, done })
    }

    fn all(&self) -> impl Iterator<Item = Entry> + use<> {
        (0..self.entries).filter_map(|n| u16::try_from(n).ok().map(Entry))
    }

    /// Puts an entry into its set, after the death of a back end.
    fn sort<M: SharedPage>(
        &mut self,
        journal: &M,
        entry: Entry,
        published: u32,
        consumed: u32,
    ) -> Result<(), JournalError> {
        let [index, response, state] =
            [REQUEST_INDEX, RESPONSE_INDEX, STATE].map(|field| journal.load_u32(entry.at() + field));
        let state = State::of(state).ok_or(JournalError::Damaged)?;
        let before = |index: u32, end: u32| end.wrapping_sub(index).wrapping_sub(1) < self.entries;
        let (is_free, is_held) = match state {
            State::Free => (true, false),
            // If the index is `consumed`, the back end died before it had taken the request, which is still in the ring. Only
            // that request is read from the ring again: responses may have overwritten the slots of earlier ones.
            State::InFlight { .. } => (index == consumed, true),
            State::Done { .. } => (before(response, published), response.wrapping_sub(published) < self.entries),
        };
        if is_free {
            journal.store_u32(entry.at() + STATE, State::Free.word());
            self.free.insert(entry);
            return Ok(());
        }
        if !is_held || journal.load_u32(entry.at() + CHECKSUM) != checksum(&copy(journal, entry), index) {
            return Err(JournalError::Damaged);
        }
        match state {
            State::InFlight { tries } => {
                let again = State::InFlight { tries: tries.saturating_add(1) };
                journal.store_u32(entry.at() + STATE, again.word());
                self.in_flight.insert(entry);
            }
            _ => self.done.insert(entry),
        }
        Ok(())
    }

    /// Returns how many responses were staged and not published. Their indices must follow each other from `published` on.
    fn staged<M: SharedPage>(&self, journal: &M, published: u32) -> Result<u32, JournalError> {
        let (mut count, mut end) = (0u32, 0);
        for entry in self.done.clone() {
            count += 1;
            end = end.max(journal.load_u32(entry.at() + RESPONSE_INDEX).wrapping_sub(published).wrapping_add(1));
        }
        if count == end { Ok(count) } else { Err(JournalError::Damaged) }
    }

    /// Writes the `answered` staged responses into the ring again, in the order of their indices.
    fn stage_again<P: SharedPage, M: SharedPage>(
        &mut self,
        page: &P,
        journal: &M,
        answered: u32,
    ) -> Result<(), JournalError> {
        for _ in 0..answered {
            let next = self.ring.answered();
            let found = self.done.clone().find(|entry| journal.load_u32(entry.at() + RESPONSE_INDEX) == next);
            let entry = found.ok_or(JournalError::Damaged)?;
            match State::of(journal.load_u32(entry.at() + STATE)) {
                Some(State::Done { status }) => self.respond(page, journal, entry, status)?,
                _ => return Err(JournalError::Damaged),
            }
        }
        Ok(())
    }

    /// Takes a new snapshot of the front end's request index. Returns how many requests wait.
    ///
    /// # Errors
    /// As [`BackRing::look`].
    pub fn look<P: SharedPage>(&mut self, page: &P) -> Result<u32, RingError> {
        self.ring.look(page)
    }

    /// Takes the next request of the last snapshot, and copies it once, into an entry. `None` if no request of the snapshot is
    /// left.
    pub fn take<P: SharedPage, M: SharedPage>(&mut self, page: &P, journal: &M) -> Option<(Entry, Slot)> {
        let entry = self.free.first()?;
        let mut slot = Slot::empty();
        let index = self.ring.take(page, slot.as_mut_bytes())?;
        journal.write(entry.at(), slot.as_bytes());
        journal.store_u32(entry.at() + REQUEST_INDEX, index);
        journal.store_u32(entry.at() + CHECKSUM, checksum(&slot, index));
        journal.store_u32(entry.at() + STATE, State::InFlight { tries: 1 }.word());
        journal.store_u32(CONSUMED_AT, index.wrapping_add(1));
        self.free.remove(entry);
        self.in_flight.insert(entry);
        Some((entry, slot))
    }

    /// Answers a request that is in flight. The front end sees the answer after [`publish`](Self::publish). The caller must
    /// have ended all pins for the request.
    ///
    /// # Errors
    /// The entry is not in flight, which is a mistake of the caller.
    pub fn answer<P: SharedPage, M: SharedPage>(
        &mut self,
        page: &P,
        journal: &M,
        entry: Entry,
        status: Status,
    ) -> Result<(), RingError> {
        if !self.in_flight.remove(entry) {
            return Err(RingError::NothingToAnswer);
        }
        journal.store_u32(entry.at() + RESPONSE_INDEX, self.ring.answered());
        journal.store_u32(entry.at() + STATE, State::Done { status }.word());
        self.done.insert(entry);
        self.respond(page, journal, entry, status)
    }

    fn respond<P: SharedPage, M: SharedPage>(
        &mut self,
        page: &P,
        journal: &M,
        entry: Entry,
        status: Status,
    ) -> Result<(), RingError> {
        let head = head(journal, entry);
        self.ring.respond(page, Response::new(head, status).as_bytes()).map(|_| ())
    }

    /// Publishes all answers and frees their entries. Returns whether the front end must be notified.
    #[must_use = "a front end that asked for it must be notified"]
    pub fn publish<P: SharedPage, M: SharedPage>(&mut self, page: &P, journal: &M) -> bool {
        let notify = self.ring.publish(page);
        for entry in core::mem::take(&mut self.done) {
            journal.store_u32(entry.at() + STATE, State::Free.word());
            self.free.insert(entry);
        }
        notify
    }

    /// Asks for an event at the next request. Returns true if that request is in the ring already.
    ///
    /// # Errors
    /// As [`BackRing::rearm`].
    pub fn rearm<P: SharedPage>(&mut self, page: &P) -> Result<bool, RingError> {
        self.ring.rearm(page, 1)
    }

    /// Writes a note for the back end that continues if this one dies.
    pub fn leave_note<M: SharedPage>(&self, journal: &M, note: u32) {
        journal.store_u32(NOTE_AT, note);
    }

    /// Returns the last note; 0 if no note was written.
    #[must_use]
    pub fn note<M: SharedPage>(&self, journal: &M) -> u32 {
        journal.load_u32(NOTE_AT)
    }

    /// Returns the number of requests that were taken and not answered.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.ring.in_flight()
    }

    /// After [`recover`](Self::recover), returns the requests in flight. True marks a request that [`TRIES`] back ends have
    /// tried already: the caller answers it with an error. All other requests are carried out again.
    pub fn resumed<'a, M: SharedPage>(&self, journal: &'a M) -> impl Iterator<Item = (Entry, Slot, bool)> + use<'a, M> {
        self.in_flight.clone().map(move |entry| {
            let state = State::of(journal.load_u32(entry.at() + STATE));
            let poisonous = !matches!(state, Some(State::InFlight { tries }) if tries <= TRIES);
            (entry, copy(journal, entry), poisonous)
        })
    }
}

/// Returns the request in an entry.
fn copy<M: SharedPage>(journal: &M, entry: Entry) -> Slot {
    let mut bytes = [0; SLOT_BYTES];
    journal.read(entry.at(), &mut bytes);
    Slot::read_from_bytes(&bytes).unwrap_or_else(|_| Slot::empty())
}

/// Returns the part of the request in an entry that its response repeats.
fn head<M: SharedPage>(journal: &M, entry: Entry) -> Head {
    let mut slot = Slot::empty();
    let (beginning, _) = slot.as_mut_bytes().split_at_mut(HEAD_BYTES);
    journal.read(entry.at(), beginning);
    slot.head()
}

/// Returns the checksum of an entry. It detects accidental damage, not forgery.
fn checksum(slot: &Slot, index: u32) -> u32 {
    let words = slot.as_bytes().as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    let start = u64::from(index ^ MAGIC);
    let sum = words.fold(start, |sum, word| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
    let [a, b, c, d, e, f, g, h] = sum.to_le_bytes();
    u32::from_le_bytes([a ^ e, b ^ f, c ^ g, d ^ h])
}
