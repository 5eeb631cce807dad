//! One disk of one guest: its ring, its journal, and its waiting requests.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::cmp::max;
use core::fmt;

use device::Bucket;
use disk::{Disk, Shape};
use ring_protocol::SharedPage;
use ring_protocol::block::journal::{Entry, JournalError, Ring};
use ring_protocol::block::{Direction, Geometry, Request, SLOT_BYTES, Status};
use ring_protocol::ring::{Layout, RingError};

use crate::connection::{ConnectError, Connection, Counters, Disconnected};
use crate::flight::{Durable, Flight, Work};
use crate::flush::Durability;
use crate::host::Host;
use crate::limits::{BUSY_NS, PER_TURN};
use crate::waiting::Waiting;

/// Noted in the journal while a failed flush may have lost writes and the guest was not told of the failure.
const OWES_ERROR: u32 = 1;
/// Noted in the journal once each write is flushed before its answer.
const WRITE_THROUGH: u32 = 2;

/// Whether a vbd takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Open,
    /// The front end broke the ring. No request is answered any more.
    Broken,
    /// The vbd ends when nothing is in flight. No request is answered any more.
    Closing,
}

/// A disk of a guest.
pub struct Vbd<H: Host> {
    pub(crate) domain: u16,
    port: u32,
    ring: H::Ring,
    journal: H::Memory,
    slots: Ring,
    pub(crate) disk: Box<dyn Disk>,
    pub(crate) shape: Shape,
    pub(crate) geometry: Geometry,
    pub(crate) life: Life,
    /// Whether the ring may have new requests: the guest has sent an event, the vbd is new, or a turn left requests in the
    /// ring.
    pub(crate) attention: bool,
    /// Whether an answer is not published yet.
    answered: bool,
    /// Whether the front end is notified without having asked: it may have missed an event of an earlier back end (ABI io 4.4).
    greet: bool,
    pub(crate) waiting: VecDeque<Waiting>,
    /// The cost that the vbd may still spend before it is the next vbd's turn.
    pub(crate) deficit: u32,
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
    pub(crate) in_flight: usize,
    pub(crate) pins: u32,
    /// When the vbd was last seen with an unanswered request.
    active_ns: Option<u64>,
    pub(crate) durability: Durability,
    /// Whether the journal has the note [`OWES_ERROR`].
    noted: bool,
    /// A flush has failed. Stock front ends do not flush again after that, so each write is flushed before its answer.
    pub(crate) write_through: bool,
    pub(crate) counters: Counters,
}

impl<H: Host> fmt::Debug for Vbd<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Vbd");
        shown.field("domain", &self.domain).field("port", &self.port).field("disk", &self.disk);
        shown.field("life", &self.life).field("in_flight", &self.in_flight).field("counters", &self.counters);
        shown.finish_non_exhaustive()
    }
}

impl<H: Host> Vbd<H> {
    /// Begins to serve a front end. With `resumed`, continues after an earlier back end that died; the number is the queue's
    /// count of failures.
    pub(crate) fn connect(with: Connection<H>, now_ns: u64, resumed: Option<u64>) -> Result<Self, ConnectError> {
        let Connection { domain, port, ring, journal, disk, limits } = with;
        let shape = disk.shape();
        let geometry = Geometry::new(shape.sectors, shape.block_bytes, shape.read_only, shape.discard.is_some())
            .ok_or(ConnectError::BlockBytes(shape.block_bytes))?;
        let layout = Layout::new(ring.len_bytes(), SLOT_BYTES).map_err(JournalError::from)?;
        let slots = if resumed.is_some() {
            Ring::recover(&ring, &journal, layout)?
        } else {
            Ring::begin(&ring, &journal, layout)?
        };
        let mut waiting = VecDeque::new();
        waiting.try_reserve_exact(layout.entries() as usize).map_err(|_| ConnectError::NoMemory)?;
        let bucket = |per_second: Option<u64>| per_second.map(|per_second| Bucket::new(per_second, now_ns));
        let mut vbd = Self {
            domain,
            port,
            ring,
            journal,
            slots,
            disk,
            shape,
            geometry,
            life: Life::Open,
            attention: true,
            answered: resumed.is_some(),
            greet: resumed.is_some(),
            waiting,
            deficit: 0,
            bytes: bucket(limits.bytes_per_second),
            requests: bucket(limits.requests_per_second),
            in_flight: 0,
            pins: 0,
            active_ns: None,
            durability: Durability::default(),
            noted: false,
            write_through: false,
            counters: Counters::default(),
        };
        if let Some(failures) = resumed {
            vbd.resume(failures);
        }
        Ok(vbd)
    }

    /// Queues the requests that an earlier back end took and did not answer. A request that may have killed two back ends
    /// (poisonous) is answered with an error instead.
    fn resume(&mut self, failures: u64) {
        let note = self.slots.note(&self.journal);
        self.noted = note & OWES_ERROR != 0;
        self.write_through = note & WRITE_THROUGH != 0;
        self.durability = Durability::resumed(self.noted, failures);
        let resumed: Vec<_> = self.slots.resumed(&self.journal).collect();
        for (entry, slot, poisonous) in resumed {
            match slot.request(&self.geometry) {
                Ok(request) if !poisonous => self.waiting.push_back(Waiting::new(entry, slot, request)),
                Ok(Request::Flush) => {
                    self.flush_failed();
                    self.fail(entry, Status::FlushFailed);
                }
                Ok(_) => self.fail(entry, Status::Error),
                Err(refused) => self.refuse(entry, refused.status()),
            }
        }
    }

    /// Returns what the vbd has done so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Returns the guest.
    #[must_use]
    pub const fn domain(&self) -> u16 {
        self.domain
    }

    /// Returns the number of requests that were taken and not answered.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.waiting.len() + self.in_flight
    }

    /// Returns whether the vbd has an unanswered request, or had one less than [`BUSY_NS`] ago.
    pub(crate) fn is_busy(&mut self, now_ns: u64) -> bool {
        if self.unanswered() > 0 {
            self.active_ns = Some(now_ns);
        }
        self.active_ns.is_some_and(|active_ns| now_ns.saturating_sub(active_ns) < BUSY_NS)
    }

    /// Takes up to [`PER_TURN`] requests. Returns whether requests are left in the ring.
    pub(crate) fn take(&mut self) -> Result<bool, RingError> {
        let there = self.slots.look(&self.ring)?;
        for _ in 0..PER_TURN {
            let Some((entry, slot)) = self.slots.take(&self.ring, &self.journal) else { return Ok(false) };
            match slot.request(&self.geometry) {
                Ok(request) => self.waiting.push_back(Waiting::new(entry, slot, request)),
                Err(refused) => self.refuse(entry, refused.status()),
            }
        }
        Ok(there as usize > PER_TURN)
    }

    /// Asks for an event at the next request. Returns true if that request is in the ring already, and no event will come.
    pub(crate) fn rearm(&mut self) -> Result<bool, RingError> {
        self.slots.rearm(&self.ring)
    }

    fn refuse(&mut self, entry: Entry, status: Status) {
        self.counters.refused += 1;
        self.answer(entry, status);
    }

    fn fail(&mut self, entry: Entry, status: Status) {
        self.counters.errors += 1;
        self.answer(entry, status);
    }

    fn answer(&mut self, entry: Entry, status: Status) {
        if self.life != Life::Open {
            return;
        }
        // An entry that is in flight is answered once, so this cannot fail.
        self.answered |= self.slots.answer(&self.ring, &self.journal, entry, status).is_ok();
    }

    /// Counts and answers the request of a flight. Its pins were given back before.
    pub(crate) fn land(&mut self, flight: &Flight) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.pins = self.pins.saturating_sub(flight.pins);
        let mut status = flight.status;
        if status == Status::Error && flight.flushes() {
            self.flush_failed();
            status = if flight.work == Work::Flush { Status::FlushFailed } else { status };
        }
        let counters = &mut self.counters;
        match (status, flight.work) {
            (Status::Okay, Work::Transfer(direction)) => {
                let (count, sectors) = match direction {
                    Direction::Read => (&mut counters.reads, &mut counters.sectors_read),
                    Direction::Write => (&mut counters.writes, &mut counters.sectors_written),
                };
                *count += 1;
                *sectors += flight.sectors;
                if direction == Direction::Write && flight.durable != Durable::After {
                    self.durability.wrote(flight.failures);
                }
            }
            (Status::Okay, Work::Flush) => counters.flushes += 1,
            (Status::Okay, Work::Discard) => counters.discards += 1,
            (Status::Unsupported, _) => counters.refused += 1,
            (Status::Error | Status::FlushFailed, _) => counters.errors += 1,
        }
        self.answer(flight.entry, status);
    }

    /// Publishes answers, and notifies the guest if it asked for that.
    pub(crate) fn publish(&mut self, host: &mut H) {
        if !core::mem::take(&mut self.answered) {
            return;
        }
        let asked = self.slots.publish(&self.ring, &self.journal);
        if core::mem::take(&mut self.greet) || asked {
            host.notify(self.domain, self.port);
        }
    }

    /// Returns when the limits of this disk allow the next request.
    pub(crate) fn ready_ns(&self, now_ns: u64) -> u64 {
        let buckets = [&self.bytes, &self.requests].into_iter().flatten();
        buckets.filter(|bucket| !bucket.is_ready(now_ns)).map(Bucket::ready_ns).fold(now_ns, max)
    }

    pub(crate) fn charge(&mut self, waiting: &Waiting, now_ns: u64) {
        self.deficit = self.deficit.saturating_sub(waiting.cost());
        if let Some(bytes) = &mut self.bytes {
            bytes.take(waiting.bytes.into(), now_ns);
        }
        if let Some(requests) = &mut self.requests {
            requests.take(1, now_ns);
        }
    }

    /// Pays back `unused` bytes: the vbd was charged for more bytes than the request moves.
    pub(crate) fn refund(&mut self, unused: u32) {
        self.deficit = self.deficit.saturating_add(unused);
        if let Some(bytes) = &mut self.bytes {
            bytes.give(unused.into());
        }
    }

    /// Notes a failure in the journal, if the vbd has unflushed writes or requests in flight, which may be lost.
    pub(crate) fn note_failure(&mut self) {
        if self.in_flight > 0 || self.durability.has_unflushed() {
            self.noted = true;
            self.leave_note();
        }
    }

    /// Returns whether the journal has the note [`OWES_ERROR`].
    pub(crate) const fn is_noted(&self) -> bool {
        self.noted
    }

    /// Removes the note [`OWES_ERROR`] from the journal.
    pub(crate) fn clear_note(&mut self) {
        self.noted = false;
        self.leave_note();
    }

    /// The guest is about to learn that a flush has failed: from now on each write is flushed before its answer.
    pub(crate) fn flush_failed(&mut self) {
        if !self.write_through {
            self.write_through = true;
            self.leave_note();
        }
    }

    fn leave_note(&self) {
        let owes = if self.noted { OWES_ERROR } else { 0 };
        let through = if self.write_through { WRITE_THROUGH } else { 0 };
        self.slots.leave_note(&self.journal, owes | through);
    }

    /// Stops taking and answering requests.
    pub(crate) fn stop(&mut self, life: Life) {
        if self.life != Life::Closing {
            self.life = life;
        }
        self.waiting.clear();
        self.attention = false;
    }

    pub(crate) fn into_parts(self) -> Disconnected<H> {
        Disconnected { ring: self.ring, journal: self.journal, disk: self.disk, counters: self.counters }
    }
}
