//! Requests and responses in the same slots, with event indices (ABI io 4).
//!
//! The page (or the virtually contiguous pages) starts with four indices, then the slots:
//!
//! | offset | word | written by |
//! | --- | --- | --- |
//! | 0 | requests produced | front end |
//! | 4 | wake the back end when requests reach this | back end |
//! | 8 | responses produced | back end |
//! | 12 | wake the front end when responses reach this | front end |
//! | 64 | slots: a request, later overwritten by a response | both, in turn |
//!
//! With every index modulo 2^32: published responses <= prepared responses <= consumed requests
//! <= published requests, and the first and last of these lie at most one ring apart.
//!
//! A round at either end: `look` takes **one** checked snapshot of what the peer produced, `take`
//! copies entries out of that snapshot, `publish` makes answers visible and says whether to notify,
//! `rearm` asks to be woken and says whether something came meanwhile. The fences in `publish` and
//! `rearm` order "I stored my index" before "I looked at yours"; without them both sides can sleep
//! at once. What breaks the rules above breaks the ring for good: only a new connection heals it.

use core::cmp::min;
use core::fmt;

use crate::bytes::Window;
use crate::page::SharedPage;

const REQUESTS: usize = 0;
const REQUEST_EVENT: usize = 4;
const RESPONSES: usize = 8;
const RESPONSE_EVENT: usize = 12;
const SLOTS: usize = 64;

/// Why a ring is not, or no longer, served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The peer's index is further from ours than the ring is long.
    IndexJump {
        /// Our side of the window.
        from: u32,
        /// The peer's index.
        to: u32,
    },
    /// The peer's index is behind one it published before.
    WentBack {
        /// What it published before.
        seen: u32,
        /// What it publishes now.
        now: u32,
    },
    /// The mapping is too small for a single slot, or a slot has no bytes.
    NoSlots,
    /// Our own mistake: more responses than requests were consumed.
    NothingToAnswer,
    /// Our own mistake: an entry longer than a slot.
    EntryTooLong,
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IndexJump { from, to } => write!(f, "peer index {to:#x} too far from {from:#x}"),
            Self::WentBack { seen, now } => write!(f, "peer index went from {seen:#x} to {now:#x}"),
            Self::NoSlots => f.write_str("no room for a single slot"),
            Self::NothingToAnswer => f.write_str("response without a request"),
            Self::EntryTooLong => f.write_str("entry longer than a slot"),
        }
    }
}

/// How many slots a ring has, and how long they are. Both ends compute it from the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    entries: u32,
    entry_bytes: usize,
}

impl Layout {
    /// The layout of a ring of `ring_bytes` (a whole number of pages) with slots of `entry_bytes`,
    /// the longer of request and response.
    ///
    /// # Errors
    /// Not even one slot fits.
    pub fn new(ring_bytes: usize, entry_bytes: usize) -> Result<Self, RingError> {
        let room = ring_bytes.saturating_sub(SLOTS).checked_div(entry_bytes).unwrap_or(0);
        let fit = u32::try_from(room).unwrap_or(u32::MAX / 2);
        match fit.checked_ilog2() {
            Some(log) => Ok(Self { entries: 1 << log, entry_bytes }),
            None => Err(RingError::NoSlots),
        }
    }

    /// Number of slots, a power of two.
    #[must_use]
    pub const fn entries(&self) -> u32 {
        self.entries
    }

    /// Bytes a mapping must have to hold the ring.
    #[must_use]
    pub const fn ring_bytes(&self) -> usize {
        SLOTS + self.entries as usize * self.entry_bytes
    }

    const fn slot(&self, index: u32) -> usize {
        SLOTS + (index & (self.entries - 1)) as usize * self.entry_bytes
    }

    fn read<P: SharedPage>(&self, page: &P, index: u32, into: &mut [u8]) {
        let whole = min(into.len(), self.entry_bytes);
        page.read(self.slot(index), into.get_mut(..whole).unwrap_or_default());
    }

    fn write<P: SharedPage>(&self, page: &P, index: u32, from: &[u8]) -> Result<(), RingError> {
        if from.len() > self.entry_bytes {
            return Err(RingError::EntryTooLong);
        }
        page.write(self.slot(index), from);
        Ok(())
    }

    /// One window of at most a ring's length from `from` to `to`.
    fn window(&self, from: u32, to: u32) -> Result<Window, RingError> {
        Window::new(from, to, self.entries).map_err(|_| RingError::IndexJump { from, to })
    }
}

/// What the peer produced and we consume: one snapshot at a time.
#[derive(Clone, Debug)]
struct Incoming {
    /// Our index: entries before it were taken.
    cons: u32,
    /// The peer's index as last seen and checked.
    seen: u32,
    broken: Option<RingError>,
}

impl Incoming {
    const fn at(cons: u32) -> Self {
        Self { cons, seen: cons, broken: None }
    }

    /// Checks a new snapshot of the peer's index. `base` is the oldest entry whose slot is still
    /// busy: `base <= cons <= seen`, and distances from it order the rest.
    fn look(&mut self, base: u32, now: u32, window: Result<Window, RingError>) -> Result<u32, RingError> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        let seen = self.seen;
        let checked = window.and_then(|window| {
            let went_back = window.pending() < seen.wrapping_sub(base);
            if went_back { Err(RingError::WentBack { seen, now }) } else { Ok(()) }
        });
        match checked {
            Ok(()) => self.seen = now,
            Err(why) => self.broken = Some(why),
        }
        checked.map(|()| now.wrapping_sub(self.cons))
    }

    /// The next entry of the snapshot.
    const fn next(&mut self) -> Option<u32> {
        if self.broken.is_some() || self.cons == self.seen {
            return None;
        }
        let index = self.cons;
        self.cons = index.wrapping_add(1);
        Some(index)
    }
}

/// What we produce: prepared entries, some of them published.
#[derive(Clone, Debug)]
struct Outgoing {
    prepared: u32,
    published: u32,
}

impl Outgoing {
    const fn at(index: u32) -> Self {
        Self { prepared: index, published: index }
    }

    /// Publishes what is prepared; true when the peer asked to be woken within that step.
    fn publish<P: SharedPage>(&mut self, page: &P, index_at: usize, event_at: usize) -> bool {
        let (old, new) = (self.published, self.prepared);
        if old == new {
            return false;
        }
        page.store_u32(index_at, new);
        self.published = new;
        page.fence();
        let event = page.load_u32(event_at);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }
}

/// The back end of a ring: takes requests, gives responses.
#[derive(Clone, Debug)]
pub struct BackRing {
    layout: Layout,
    requests: Incoming,
    responses: Outgoing,
}

impl BackRing {
    /// Connects to a ring as the page shows it: everything not answered is to be done (ABI io 4.4).
    /// Process at once, then notify once whatever `publish` says.
    ///
    /// # Errors
    /// The indices in the page contradict each other.
    pub fn attach<P: SharedPage>(page: &P, layout: Layout) -> Result<Self, RingError> {
        let answered = page.load_u32(RESPONSES);
        Self::attach_at(page, layout, answered, answered)
    }

    /// Connects with knowledge of an earlier back end: requests before `consumed` were taken by it,
    /// responses before `answered` are already written into their slots (ABI io 9.3). What the page
    /// does not show yet goes out with the next `publish`.
    ///
    /// # Errors
    /// These numbers and the indices in the page contradict each other.
    pub fn attach_at<P: SharedPage>(page: &P, layout: Layout, consumed: u32, answered: u32) -> Result<Self, RingError> {
        let published = page.load_u32(RESPONSES);
        let requested = page.load_u32(REQUESTS);
        let all = layout.window(published, requested)?.pending();
        let taken = layout.window(published, consumed)?.pending();
        let done = layout.window(published, answered)?.pending();
        if taken > all {
            return Err(RingError::IndexJump { from: consumed, to: requested });
        }
        if done > taken {
            return Err(RingError::NothingToAnswer);
        }
        let responses = Outgoing { prepared: answered, published };
        Ok(Self { layout, requests: Incoming::at(consumed), responses })
    }

    /// Takes a new snapshot of the requests; says how many wait.
    ///
    /// # Errors
    /// The front end's index is impossible; the ring stays broken from here on.
    pub fn look<P: SharedPage>(&mut self, page: &P) -> Result<u32, RingError> {
        let now = page.load_u32(REQUESTS);
        // From the oldest unanswered request on, not from the oldest untaken: a slot is free for a
        // new request only when its response is out.
        let base = self.responses.prepared;
        self.requests.look(base, now, self.layout.window(base, now))
    }

    /// Copies the next request of the last snapshot, once; its index, or nothing left in it.
    pub fn take<P: SharedPage>(&mut self, page: &P, into: &mut [u8]) -> Option<u32> {
        let index = self.requests.next()?;
        self.layout.read(page, index, into);
        Some(index)
    }

    /// Puts the last `count` taken requests back, but none that is answered: the next [`take`](Self::take) copies them again,
    /// and the caller judges the new copies.
    pub fn put_back(&mut self, count: u32) {
        self.requests.cons = self.requests.cons.wrapping_sub(min(count, self.in_flight()));
    }

    /// Returns how many requests of the last snapshot are left to be taken.
    #[must_use]
    pub const fn left(&self) -> u32 {
        self.requests.seen.wrapping_sub(self.requests.cons)
    }

    /// Writes one response into the next slot; the front end sees it after [`publish`](Self::publish).
    ///
    /// # Errors
    /// Every consumed request is answered, or the entry is longer than a slot.
    pub fn respond<P: SharedPage>(&mut self, page: &P, response: &[u8]) -> Result<u32, RingError> {
        let index = self.responses.prepared;
        if index == self.requests.cons {
            return Err(RingError::NothingToAnswer);
        }
        self.layout.write(page, index, response)?;
        self.responses.prepared = index.wrapping_add(1);
        Ok(index)
    }

    /// Publishes all written responses.
    #[must_use = "a front end that asked for it must be notified"]
    pub fn publish<P: SharedPage>(&mut self, page: &P) -> bool {
        self.responses.publish(page, RESPONSES, RESPONSE_EVENT)
    }

    /// Asks to be woken once `after` (at least 1) requests beyond those taken are there. False: sleep.
    /// True: they are there already, go on.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn rearm<P: SharedPage>(&mut self, page: &P, after: u32) -> Result<bool, RingError> {
        let after = after.max(1);
        page.store_u32(REQUEST_EVENT, self.requests.cons.wrapping_add(after));
        page.fence();
        Ok(self.look(page)? >= after)
    }

    /// Requests taken and not answered yet.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.requests.cons.wrapping_sub(self.responses.prepared)
    }

    /// Index of the next request to be taken: what a journal must remember.
    #[must_use]
    pub const fn consumed(&self) -> u32 {
        self.requests.cons
    }

    /// Index of the next response to be written: what a journal must remember.
    #[must_use]
    pub const fn answered(&self) -> u32 {
        self.responses.prepared
    }
}

/// The front end of a ring: gives requests, takes responses.
#[derive(Clone, Debug)]
pub struct FrontRing {
    layout: Layout,
    requests: Outgoing,
    responses: Incoming,
}

impl FrontRing {
    /// Prepares a ring nobody else has mapped yet. The caller hands over a zeroed page.
    pub fn init<P: SharedPage>(page: &P, layout: Layout) -> Self {
        page.store_u32(REQUESTS, 0);
        page.store_u32(RESPONSES, 0);
        page.store_u32(REQUEST_EVENT, 1);
        page.store_u32(RESPONSE_EVENT, 1);
        Self { layout, requests: Outgoing::at(0), responses: Incoming::at(0) }
    }

    /// How many requests can be submitted now.
    #[must_use]
    pub const fn room(&self) -> u32 {
        self.layout.entries - self.requests.prepared.wrapping_sub(self.responses.cons)
    }

    /// Writes one request into the next slot; its index, or nothing when the ring is full.
    ///
    /// # Errors
    /// The entry is longer than a slot.
    pub fn submit<P: SharedPage>(&mut self, page: &P, request: &[u8]) -> Result<Option<u32>, RingError> {
        if self.room() == 0 {
            return Ok(None);
        }
        let index = self.requests.prepared;
        self.layout.write(page, index, request)?;
        self.requests.prepared = index.wrapping_add(1);
        Ok(Some(index))
    }

    /// Publishes all written requests.
    #[must_use = "a back end that asked for it must be notified"]
    pub fn publish<P: SharedPage>(&mut self, page: &P) -> bool {
        self.requests.publish(page, REQUESTS, REQUEST_EVENT)
    }

    /// Takes a new snapshot of the responses; says how many wait.
    ///
    /// # Errors
    /// More responses than requests were published, or fewer than before; the ring stays broken.
    pub fn look<P: SharedPage>(&mut self, page: &P) -> Result<u32, RingError> {
        let now = page.load_u32(RESPONSES);
        let from = self.responses.cons;
        let asked = self.requests.published.wrapping_sub(from);
        let window = self.layout.window(from, now).and_then(|window| {
            let unasked = window.pending() > asked;
            if unasked { Err(RingError::IndexJump { from, to: now }) } else { Ok(window) }
        });
        self.responses.look(from, now, window)
    }

    /// Copies the next response of the last snapshot, once; its index, or nothing left in it.
    pub fn take<P: SharedPage>(&mut self, page: &P, into: &mut [u8]) -> Option<u32> {
        let index = self.responses.next()?;
        self.layout.read(page, index, into);
        Some(index)
    }

    /// Asks to be woken once `after` (at least 1) more responses are there. False: sleep.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn rearm<P: SharedPage>(&mut self, page: &P, after: u32) -> Result<bool, RingError> {
        let after = after.max(1);
        page.store_u32(RESPONSE_EVENT, self.responses.cons.wrapping_add(after));
        page.fence();
        Ok(self.look(page)? >= after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::WordPage;

    fn four_slots() -> (WordPage, Layout) {
        (WordPage::new(), Layout::new(64 + 4 * 12, 12).unwrap())
    }

    #[test]
    fn the_known_rings_have_the_known_number_of_slots() {
        let slots = |pages: usize, entry| Layout::new(pages * 4096, entry).unwrap().entries();
        assert_eq!([1, 2, 4, 8, 16].map(|pages| slots(pages, 112)), [32, 64, 128, 256, 512]);
        assert_eq!([12, 8, 16].map(|entry| slots(1, entry)), [256, 256, 128]);
        for (bytes, entry) in [(0, 8), (64, 8), (4096, 0), (100, 112)] {
            assert_eq!(Layout::new(bytes, entry), Err(RingError::NoSlots));
        }
    }

    #[test]
    fn a_request_comes_back_as_a_response_in_its_slot() {
        let (page, layout) = four_slots();
        let mut front = FrontRing::init(&page, layout);
        let mut back = BackRing::attach(&page, layout).unwrap();
        assert_eq!(front.submit(&page, b"first").unwrap(), Some(0));
        assert!(front.publish(&page), "the first push always notifies");
        assert_eq!(back.look(&page), Ok(1));
        let mut entry = [0; 12];
        assert_eq!(back.take(&page, &mut entry), Some(0));
        assert_eq!(&entry[..5], b"first");
        assert_eq!(back.take(&page, &mut entry), None);
        assert_eq!(back.in_flight(), 1);
        back.respond(&page, b"done!").unwrap();
        assert!(back.publish(&page));
        assert_eq!(front.look(&page), Ok(1));
        assert_eq!(front.take(&page, &mut entry), Some(0));
        assert_eq!(&entry[..5], b"done!");
    }

    #[test]
    fn nobody_is_notified_who_did_not_ask() {
        let (page, layout) = four_slots();
        let mut front = FrontRing::init(&page, layout);
        let mut back = BackRing::attach(&page, layout).unwrap();
        front.submit(&page, b"a").unwrap();
        assert!(front.publish(&page));
        assert!(!front.publish(&page), "nothing new");
        front.submit(&page, b"b").unwrap();
        assert!(!front.publish(&page), "the back end is awake");
        back.look(&page).unwrap();
        while back.take(&page, &mut [0]).is_some() {}
        assert_eq!(back.rearm(&page, 2), Ok(false));
        front.submit(&page, b"c").unwrap();
        assert!(!front.publish(&page), "the back end waits for two");
        front.submit(&page, b"d").unwrap();
        assert!(front.publish(&page));
        assert_eq!(back.rearm(&page, 1), Ok(true));
    }

    #[test]
    fn responses_need_requests_and_slots_are_not_overrun() {
        let (page, layout) = four_slots();
        let mut front = FrontRing::init(&page, layout);
        let mut back = BackRing::attach(&page, layout).unwrap();
        assert_eq!(back.respond(&page, b""), Err(RingError::NothingToAnswer));
        assert_eq!(front.submit(&page, &[0; 13]), Err(RingError::EntryTooLong));
        for _ in 0..4 {
            assert!(front.submit(&page, b"r").unwrap().is_some());
        }
        assert_eq!(front.submit(&page, b"r"), Ok(None));
        let _ = front.publish(&page);
        assert_eq!(back.look(&page), Ok(4));
        // A fifth request while none is answered would lie in a slot still in use.
        page.store_u32(0, 5);
        while back.take(&page, &mut [0]).is_some() {}
        assert_eq!(back.look(&page), Err(RingError::IndexJump { from: 0, to: 5 }));
        page.store_u32(0, 4);
        assert!(back.look(&page).is_err(), "broken for good");
    }

    #[test]
    fn requests_that_are_put_back_are_taken_again() {
        let (page, layout) = four_slots();
        let mut front = FrontRing::init(&page, layout);
        let mut back = BackRing::attach(&page, layout).unwrap();
        for request in [b"a", b"b", b"c"] {
            front.submit(&page, request).unwrap();
        }
        let _ = front.publish(&page);
        assert_eq!((back.look(&page), back.left()), (Ok(3), 3));
        let mut byte = [0];
        while back.take(&page, &mut byte).is_some() {}
        back.respond(&page, b"A").unwrap();
        back.put_back(1);
        assert_eq!((back.take(&page, &mut byte), byte, back.left()), (Some(2), *b"c", 0));
        back.put_back(9);
        assert_eq!((back.consumed(), back.in_flight(), back.left()), (1, 0, 2), "an answered request stays answered");
        assert_eq!((back.take(&page, &mut byte), byte), (Some(1), *b"b"));
    }

    #[test]
    fn an_index_that_goes_back_breaks_the_ring() {
        let (page, layout) = four_slots();
        let mut back = BackRing::attach(&page, layout).unwrap();
        page.store_u32(0, 3);
        assert_eq!(back.look(&page), Ok(3));
        back.take(&page, &mut [0]);
        // Even behind what was consumed.
        page.store_u32(0, 0);
        assert_eq!(back.look(&page), Err(RingError::WentBack { seen: 3, now: 0 }));
        assert_eq!(back.take(&page, &mut [0]), None);

        let mut front = FrontRing::init(&page, layout);
        page.store_u32(8, 1);
        assert_eq!(front.look(&page), Err(RingError::IndexJump { from: 0, to: 1 }));
    }

    #[test]
    fn a_second_back_end_finds_what_the_first_left() {
        let (page, layout) = four_slots();
        let mut front = FrontRing::init(&page, layout);
        let mut first = BackRing::attach(&page, layout).unwrap();
        for request in [b"a", b"b", b"c"] {
            front.submit(&page, request).unwrap();
        }
        let _ = front.publish(&page);
        first.look(&page).unwrap();
        let mut byte = [0];
        first.take(&page, &mut byte);
        first.take(&page, &mut byte);
        first.respond(&page, b"A").unwrap();
        let _ = first.publish(&page);

        let mut naive = BackRing::attach(&page, layout).unwrap();
        assert_eq!(naive.look(&page), Ok(2));
        let consumed = first.consumed();
        let mut exact = BackRing::attach_at(&page, layout, consumed, first.answered()).unwrap();
        assert_eq!((exact.in_flight(), exact.look(&page)), (1, Ok(1)));
        assert_eq!(exact.take(&page, &mut byte), Some(2));
        assert_eq!(&byte, b"c");

        assert!(BackRing::attach_at(&page, layout, 4, 1).is_err(), "never requested");
        assert!(BackRing::attach_at(&page, layout, 1, 2).is_err(), "never consumed");
        page.store_u32(0, 9);
        assert!(BackRing::attach(&page, layout).is_err());
    }

    #[test]
    fn a_staged_response_goes_out_with_the_next_publish() {
        let (page, layout) = four_slots();
        let mut front = FrontRing::init(&page, layout);
        front.submit(&page, b"a").unwrap();
        let _ = front.publish(&page);
        // The first back end died between writing the response and publishing it.
        let mut second = BackRing::attach_at(&page, layout, 1, 1).unwrap();
        assert_eq!(front.look(&page), Ok(0));
        assert!(second.publish(&page));
        assert_eq!(front.look(&page), Ok(1));
    }
}
