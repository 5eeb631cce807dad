//! One disk of one guest: its ring, its journal, and what waits.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use disk::{Disk, Shape};
use ring_protocol::SharedPage;
use ring_protocol::block::journal::{Entry, JournalError, Ring};
use ring_protocol::block::{Extent, Geometry, Request, SLOT_BYTES, Slot, Status};
use ring_protocol::ring::{Layout, RingError};

use crate::flight::{Flight, Work};
use crate::flush::Durability;
use crate::host::Host;
use crate::limits::{BUSY_NS, Bucket, Limits, PER_TURN, REQUEST_COST};

/// What a vbd is made of.
#[derive(Debug)]
pub struct Connection<H: Host> {
    /// The guest.
    pub domain: u16,
    /// Our end of its event channel.
    pub port: u32,
    /// Its ring, of 1 to 16 pages.
    pub ring: H::Ring,
    /// Memory for the journal: [`journal_bytes`](ring_protocol::block::journal::journal_bytes) of the ring's slots.
    pub journal: H::Memory,
    /// The disk.
    pub disk: Box<dyn Disk>,
    /// What it may use at most.
    pub limits: Limits,
}

/// Why a vbd is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// The ring or the journal.
    Journal(JournalError),
    /// The disk has blocks that a front end cannot read one by one: 512, 1,024, 2,048 and 4,096 bytes are served.
    BlockBytes(u32),
}

impl From<JournalError> for ConnectError {
    fn from(error: JournalError) -> Self {
        Self::Journal(error)
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Journal(error) => error.fmt(f),
            Self::BlockBytes(bytes) => write!(f, "the disk has blocks of {bytes} bytes"),
        }
    }
}

/// What a vbd has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded, durable ones among them.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards that succeeded.
    pub discards: u64,
    /// Sectors of those reads.
    pub sectors_read: u64,
    /// Sectors of those writes.
    pub sectors_written: u64,
    /// Requests that failed: a bad grant, or the device.
    pub errors: u64,
    /// Requests that broke a rule, or asked for what we do not do.
    pub refused: u64,
    /// Pins that are never given back, because a device that is lost may still write there.
    pub lost_pins: u64,
}

/// What a vbd leaves.
#[derive(Debug)]
pub struct Disconnected<H: Host> {
    /// To be unmapped.
    pub ring: H::Ring,
    /// To be used again.
    pub journal: H::Memory,
    /// The disk.
    pub disk: Box<dyn Disk>,
    /// What it did.
    pub counters: Counters,
}

/// Whether a vbd takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Open,
    /// Its front end broke the ring. It is not answered any more.
    Broken,
    /// It ends when nothing is in flight. It is not answered any more.
    Closing,
}

/// A request that waits to be carried out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub(crate) entry: Entry,
    pub(crate) slot: Slot,
    pub(crate) request: Request,
    /// Its bytes at most.
    pub(crate) bytes: u32,
    /// Its segments: as many pins it may need.
    pub(crate) segments: u32,
}

impl Waiting {
    fn new(entry: Entry, slot: Slot, request: Request) -> Self {
        let (bytes, segments) = match request {
            Request::Direct { extent, segments, .. } => {
                (u32::try_from(extent.sectors << 9).unwrap_or(u32::MAX), segments)
            }
            // Until the descriptors have been read: whole pages.
            Request::Indirect { segments, .. } => (u32::try_from(segments << 12).unwrap_or(u32::MAX), segments),
            Request::Flush | Request::Discard(Extent { .. }) => (0, 0),
        };
        Self { entry, slot, request, bytes, segments: u32::try_from(segments).unwrap_or(u32::MAX) }
    }

    pub(crate) const fn cost(&self) -> u32 {
        self.bytes.saturating_add(REQUEST_COST)
    }
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
    /// The guest has sent an event since its ring was last found empty.
    pub(crate) attention: bool,
    /// Something was answered and not published.
    answered: bool,
    /// Its front end may have missed an event of an earlier back end (ABI io 4.4).
    greet: bool,
    pub(crate) waiting: VecDeque<Waiting>,
    /// What it may still spend before others have their turn.
    pub(crate) deficit: u32,
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
    pub(crate) in_flight: usize,
    pub(crate) pins: u32,
    /// When it was last seen to have something unanswered.
    active_ns: Option<u64>,
    pub(crate) durability: Durability,
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
    pub(crate) fn connect(with: Connection<H>, now_ns: u64, recover: bool) -> Result<Self, ConnectError> {
        let Connection { domain, port, ring, journal, disk, limits } = with;
        let shape = disk.shape();
        let geometry = Geometry::new(shape.sectors, shape.block_bytes, shape.read_only, shape.discard.is_some())
            .ok_or(ConnectError::BlockBytes(shape.block_bytes))?;
        let layout = Layout::new(ring.len_bytes(), SLOT_BYTES).map_err(JournalError::from)?;
        let slots =
            if recover { Ring::recover(&ring, &journal, layout)? } else { Ring::begin(&ring, &journal, layout)? };
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
            answered: recover,
            greet: recover,
            waiting: VecDeque::with_capacity(layout.entries() as usize),
            deficit: 0,
            bytes: bucket(limits.bytes_per_second),
            requests: bucket(limits.requests_per_second),
            in_flight: 0,
            pins: 0,
            active_ns: None,
            durability: Durability::default(),
            counters: Counters::default(),
        };
        if recover {
            vbd.resume();
        }
        Ok(vbd)
    }

    /// Queues what an earlier back end took and did not answer, or answers what killed it twice.
    fn resume(&mut self) {
        let resumed: Vec<_> = self.slots.resumed(&self.journal).collect();
        for (entry, slot, poisonous) in resumed {
            match slot.request(&self.geometry) {
                Ok(request) if !poisonous => self.waiting.push_back(Waiting::new(entry, slot, request)),
                Ok(_) => self.fail(entry, Status::Error),
                Err(refused) => self.refuse(entry, refused.status()),
            }
        }
    }

    /// What it has done.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// The guest.
    #[must_use]
    pub const fn domain(&self) -> u16 {
        self.domain
    }

    /// Requests that were taken and not answered.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.waiting.len() + self.in_flight
    }

    /// Whether it has, or had until just now, something unanswered.
    pub(crate) fn is_busy(&mut self, now_ns: u64) -> bool {
        if self.unanswered() > 0 {
            self.active_ns = Some(now_ns);
        }
        self.active_ns.is_some_and(|active_ns| now_ns.saturating_sub(active_ns) < BUSY_NS)
    }

    /// Takes up to [`PER_TURN`] requests. True: more are there.
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

    /// Asks for an event at the next request. True: it is there already.
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

    /// Answers a flight, whose pins are given back.
    pub(crate) fn land(&mut self, flight: &Flight) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.pins = self.pins.saturating_sub(flight.pins);
        let counters = &mut self.counters;
        match (flight.status, flight.work) {
            (Status::Okay, Work::Transfer(direction)) => {
                use ring_protocol::block::Direction::{Read, Write};
                let (count, sectors) = match direction {
                    Read => (&mut counters.reads, &mut counters.sectors_read),
                    Write => (&mut counters.writes, &mut counters.sectors_written),
                };
                *count += 1;
                *sectors += flight.sectors;
                if direction == Write {
                    self.durability.wrote(flight.failures);
                }
            }
            (Status::Okay, Work::Flush) => counters.flushes += 1,
            (Status::Okay, Work::Discard) => counters.discards += 1,
            (Status::Unsupported, _) => counters.refused += 1,
            (Status::Error, _) => counters.errors += 1,
        }
        self.answer(flight.entry, flight.status);
    }

    /// Publishes what was answered, and notifies the guest if it asked for that.
    pub(crate) fn publish(&mut self, host: &mut H) {
        if !core::mem::take(&mut self.answered) {
            return;
        }
        let asked = self.slots.publish(&self.ring, &self.journal);
        if core::mem::take(&mut self.greet) || asked {
            host.notify(self.domain, self.port);
        }
    }

    /// When the next request may be carried out, as far as it is up to the limits of this disk.
    pub(crate) fn ready_ns(&mut self, now_ns: u64) -> u64 {
        let buckets = [&mut self.bytes, &mut self.requests].into_iter().flatten();
        buckets.map(|bucket| bucket.ready_ns(now_ns)).max().unwrap_or(now_ns)
    }

    pub(crate) fn charge(&mut self, waiting: &Waiting) {
        self.deficit = self.deficit.saturating_sub(waiting.cost());
        if let Some(bytes) = &mut self.bytes {
            bytes.take(waiting.bytes.into());
        }
        if let Some(requests) = &mut self.requests {
            requests.take(1);
        }
    }

    /// It was charged for more bytes than it moves.
    pub(crate) fn refund(&mut self, unused: u32) {
        self.deficit = self.deficit.saturating_add(unused);
        if let Some(bytes) = &mut self.bytes {
            bytes.give(unused.into());
        }
    }

    /// Stops to take and to answer.
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
