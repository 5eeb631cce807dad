//! What a back end has taken and not answered, written down so that its death can be survived (ABI io 9.3).
//!
//! The journal lies in memory that may outlive the back end. It begins with four words, then come as many entries as the ring
//! has slots. An entry holds the private copy of a request, which is needed anyway; entries are handed out from a free list, so
//! a request keeps its entry although its slot in the ring may have been overwritten by the response to another.
//!
//! | offset in the journal | word |
//! | --- | --- |
//! | 0 | [`MAGIC`], written last when a journal begins |
//! | 4 | number of entries |
//! | 8 | index of the next request to be taken |
//! | 12 | a note of the back end to the next one, zero at first |
//! | 128 | entries of 128 bytes |
//!
//! | offset in an entry | what |
//! | --- | --- |
//! | 0 | the request |
//! | 112 | its index in the ring |
//! | 116 | the index of its response |
//! | 120 | its state: one word, so that it changes at once |
//! | 124 | a checksum of the request and its index |
//!
//! Order of the stores: request, state `IN_FLIGHT`, index of the next request; then it is carried out; then the index of the
//! response, state `DONE` with the status, the response in the ring, the published index, state `FREE`. Each state is stored
//! with release ordering. So at any moment what is `DONE` is not carried out again, and what is `IN_FLIGHT` was not answered.

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
/// The most entries of a journal: the slots of a ring of 16 pages.
pub const MAX_ENTRIES: u32 = 512;

const MAGIC_AT: usize = 0;
const ENTRIES_AT: usize = 4;
const CONSUMED_AT: usize = 8;
const NOTE_AT: usize = 12;
const ENTRY_BYTES: usize = 128;

/// What of a request its [`Head`] is read from.
const HEAD_BYTES: usize = 16;
const REQUEST_INDEX: usize = 112;
const RESPONSE_INDEX: usize = 116;
const STATE: usize = 120;
const CHECKSUM: usize = 124;

/// How often a request is carried out at most. A back end that dies at it again and again would take every guest's disk with it.
pub const TRIES: u8 = 2;

/// Bytes that the journal of a ring takes.
#[must_use]
pub const fn journal_bytes(entries: u32) -> usize {
    ENTRY_BYTES * (entries as usize + 1)
}

/// Why a journal cannot be used, or a ring with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalError {
    /// The memory is shorter than [`journal_bytes`], or the ring has more than [`MAX_ENTRIES`] slots.
    Size,
    /// There is no journal, one of another version, or one of another ring.
    Foreign,
    /// What is in the journal contradicts itself: it was not written by a back end alone.
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

/// The back end of a ring with its journal. The page of the ring and the memory of the journal are given to each call; they must
/// be the same ones each time.
#[derive(Clone, Debug)]
pub struct Ring {
    ring: BackRing,
    entries: u32,
    free: Entries,
    in_flight: Entries,
    done: Entries,
}

impl Ring {
    /// Connects to a ring that no back end has served, and begins a journal. The memory may hold anything before.
    ///
    /// # Errors
    /// Its indices contradict each other, or the memory is too small.
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

    /// Connects where an earlier back end died: what it had answered is published, and what it had taken and not answered is in
    /// flight again, see [`resumed`](Self::resumed). Publish, then notify once in any case.
    ///
    /// # Errors
    /// The journal cannot be trusted; only a new connection helps.
    pub fn recover<P: SharedPage, M: SharedPage>(page: &P, journal: &M, layout: Layout) -> Result<Self, JournalError> {
        // The ring as its page shows it: nothing taken beyond what is published.
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

    /// Puts an entry where it belongs after a death.
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
            // Not taken yet when its back end died: it still is in the ring. Others may be old: answers to later requests went
            // into their slots.
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

    /// How many responses had been staged and not published. They lie one after the other from `published` on.
    fn staged<M: SharedPage>(&self, journal: &M, published: u32) -> Result<u32, JournalError> {
        let (mut count, mut end) = (0u32, 0);
        for entry in self.done.clone() {
            count += 1;
            end = end.max(journal.load_u32(entry.at() + RESPONSE_INDEX).wrapping_sub(published).wrapping_add(1));
        }
        if count == end { Ok(count) } else { Err(JournalError::Damaged) }
    }

    /// Writes those responses again, in their order.
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

    /// Takes a new snapshot of the requests; says how many wait.
    ///
    /// # Errors
    /// As [`BackRing::look`].
    pub fn look<P: SharedPage>(&mut self, page: &P) -> Result<u32, RingError> {
        self.ring.look(page)
    }

    /// Takes the next request of the last snapshot: copies it once, into an entry. `None`: nothing is left.
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

    /// Answers a request that is in flight; the front end sees it after [`publish`](Self::publish). Nothing of the guest may be
    /// pinned for it any more.
    ///
    /// # Errors
    /// Our own mistake: the entry is not in flight.
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

    /// Publishes all answers; then their entries are free.
    #[must_use = "a front end that asked for it must be notified"]
    pub fn publish<P: SharedPage, M: SharedPage>(&mut self, page: &P, journal: &M) -> bool {
        let notify = self.ring.publish(page);
        for entry in core::mem::take(&mut self.done) {
            journal.store_u32(entry.at() + STATE, State::Free.word());
            self.free.insert(entry);
        }
        notify
    }

    /// Asks to be woken at the next request. True: it is there already.
    ///
    /// # Errors
    /// As [`BackRing::rearm`].
    pub fn rearm<P: SharedPage>(&mut self, page: &P) -> Result<bool, RingError> {
        self.ring.rearm(page, 1)
    }

    /// Leaves a word to the back end that goes on when this one dies.
    pub fn leave_note<M: SharedPage>(&self, journal: &M, note: u32) {
        journal.store_u32(NOTE_AT, note);
    }

    /// The word that was left last.
    #[must_use]
    pub fn note<M: SharedPage>(&self, journal: &M) -> u32 {
        journal.load_u32(NOTE_AT)
    }

    /// Requests taken and not answered.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.ring.in_flight()
    }

    /// After [`recover`](Self::recover): what is to be carried out again, and whether that has been tried too often ([`TRIES`]):
    /// such a request is answered with an error.
    pub fn resumed<'a, M: SharedPage>(&self, journal: &'a M) -> impl Iterator<Item = (Entry, Slot, bool)> + use<'a, M> {
        self.in_flight.clone().map(move |entry| {
            let state = State::of(journal.load_u32(entry.at() + STATE));
            let poisonous = !matches!(state, Some(State::InFlight { tries }) if tries <= TRIES);
            (entry, copy(journal, entry), poisonous)
        })
    }
}

/// The request in an entry.
fn copy<M: SharedPage>(journal: &M, entry: Entry) -> Slot {
    let mut bytes = [0; SLOT_BYTES];
    journal.read(entry.at(), &mut bytes);
    Slot::read_from_bytes(&bytes).unwrap_or_else(|_| Slot::empty())
}

/// What the response to the request in an entry repeats.
fn head<M: SharedPage>(journal: &M, entry: Entry) -> Head {
    let mut slot = Slot::empty();
    let (beginning, _) = slot.as_mut_bytes().split_at_mut(HEAD_BYTES);
    journal.read(entry.at(), beginning);
    slot.head()
}

/// Tells an entry from one that was scribbled over. It is no protection against intent.
fn checksum(slot: &Slot, index: u32) -> u32 {
    let words = slot.as_bytes().as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    let start = u64::from(index ^ MAGIC);
    let sum = words.fold(start, |sum, word| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
    let [a, b, c, d, e, f, g, h] = sum.to_le_bytes();
    u32::from_le_bytes([a ^ e, b ^ f, c ^ g, d ^ h])
}
