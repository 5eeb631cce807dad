//! One vif: its rings, its limits, its counters.

use core::fmt;
use core::net::Ipv4Addr;

use device::Bucket;
use network::Mac;
use ring_protocol::SharedPage;
use ring_protocol::net::{Chain, RX_SLOT_BYTES, RxRequest, TX_SLOT_BYTES, TxRequest, TxResponse, status};
use ring_protocol::ring::{BackRing, Layout, RingError};
use zerocopy::IntoBytes;

use crate::connection::{ConnectError, Connection, Counters, Disconnected, Drop, VifId};
use crate::front::{Ports, Takes};
use crate::host::Host;
use crate::limits::{BACK_BUFFERS, FLOODS_PER_SECOND, PATIENCE_NS};

/// A sender waits for a receiver that is out of buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    /// The receiver.
    pub(crate) on: VifId,
    pub(crate) until_ns: u64,
}

/// A receiver was out of buffers, and has not yet posted as many as it must.
#[derive(Clone, Copy, Debug)]
struct Short {
    /// Senders wait until then. After that their packets are dropped.
    until_ns: u64,
    /// How many buffers the guest had posted, ever, when it was out of buffers.
    posted: u32,
    stalled: bool,
}

/// Whether a receiver takes a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Yes,
    /// The sender may wait until then.
    WaitUntil(u64),
    /// The packet is dropped.
    Stalled,
}

/// A network device of a guest.
pub struct Vif<H: Host> {
    pub(crate) id: VifId,
    pub(crate) domain: u16,
    ports: Ports,
    tx_page: H::Ring,
    rx_page: H::Ring,
    tx: BackRing,
    rx: BackRing,
    pub(crate) takes: Takes,
    pub(crate) mac: Mac,
    pub(crate) address: Option<Ipv4Addr>,
    /// The front end broke a ring, or wrote impossible slots: the vif does nothing any more.
    pub(crate) broken: bool,
    /// Whether the TX ring may have new requests.
    pub(crate) attention: bool,
    /// The last visit has left requests in the TX ring: guests of which this is not so are visited first.
    pub(crate) backlog: bool,
    pub(crate) wait: Option<Wait>,
    short: Option<Short>,
    /// How many buffers the first of the waiting senders needs. 0 if no sender waits for this vif.
    pub(crate) awaited: usize,
    pub(crate) rate: Option<Bucket>,
    pub(crate) floods: Bucket,
    /// Whether a response is not published yet, in the TX and in the RX ring.
    unpublished: (bool, bool),
    pub(crate) counters: Counters,
}

impl<H: Host> fmt::Debug for Vif<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Vif");
        shown.field("domain", &self.domain).field("mac", &self.mac).field("takes", &self.takes);
        shown.field("broken", &self.broken).field("attention", &self.attention).field("wait", &self.wait);
        shown.field("short", &self.short).field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl<H: Host> Vif<H> {
    pub(crate) fn connect(with: Connection<H>, id: VifId, now_ns: u64) -> Result<Self, ConnectError> {
        let Connection { domain, ports, tx, rx, takes, mac, limits } = with;
        let tx_layout = Layout::new(tx.len_bytes(), TX_SLOT_BYTES)?;
        let rx_layout = Layout::new(rx.len_bytes(), RX_SLOT_BYTES)?;
        Ok(Self {
            id,
            domain,
            ports,
            tx: BackRing::attach(&tx, tx_layout)?,
            rx: BackRing::attach(&rx, rx_layout)?,
            tx_page: tx,
            rx_page: rx,
            takes,
            mac,
            address: limits.address,
            broken: false,
            attention: true,
            backlog: false,
            wait: None,
            short: None,
            awaited: 0,
            rate: limits.bytes_per_second.map(|rate| Bucket::new(rate, now_ns)),
            floods: Bucket::new(FLOODS_PER_SECOND, now_ns),
            unpublished: (false, false),
            counters: Counters::default(),
        })
    }

    /// Returns what the vif has done so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Returns the guest.
    #[must_use]
    pub const fn domain(&self) -> u16 {
        self.domain
    }

    /// Returns the vif's address.
    #[must_use]
    pub const fn mac(&self) -> Mac {
        self.mac
    }

    /// Returns whether the vif has ended because of what its guest wrote.
    #[must_use]
    pub const fn is_broken(&self) -> bool {
        self.broken
    }

    pub(crate) fn dropped(&mut self, reason: Drop) {
        self.counters.drops.count(reason);
    }

    /// Takes a snapshot of the TX ring. Returns the number of requests.
    pub(crate) fn look(&mut self) -> Result<u32, RingError> {
        self.tx.look(&self.tx_page)
    }

    pub(crate) fn take(&mut self) -> Option<TxRequest> {
        let mut slot = TxRequest::default();
        self.tx.take(&self.tx_page, slot.as_mut_bytes()).map(|_| slot)
    }

    pub(crate) fn put_back(&mut self, slots: usize) {
        self.tx.put_back(u32::try_from(slots).unwrap_or(u32::MAX));
    }

    /// Asks for an event at the next request. Returns true if that request is in the ring already, and no event will come.
    pub(crate) fn rearm(&mut self) -> Result<bool, RingError> {
        self.tx.rearm(&self.tx_page, 1)
    }

    /// Answers the slots of a packet.
    pub(crate) fn answer(&mut self, chain: &Chain, slots: &[TxRequest], status: i16) {
        for (at, slot) in slots.iter().take(chain.slots).enumerate() {
            let status = if chain.is_extra(at) { status::NULL } else { status };
            // Each slot was taken, and is answered once, so this cannot fail.
            let answered = self.tx.respond(&self.tx_page, TxResponse { id: slot.id, status }.as_bytes());
            debug_assert!(answered.is_ok());
        }
        self.unpublished.0 = true;
    }

    /// Returns whether the guest has `slots` buffers for a packet. If it has not, senders wait, and later their packets are
    /// dropped.
    pub(crate) fn room(&mut self, slots: usize, now_ns: u64) -> Result<Room, RingError> {
        let slots = u32::try_from(slots).unwrap_or(u32::MAX);
        if self.short.is_none() && self.rx.left() >= slots {
            return Ok(Room::Yes);
        }
        let left = self.rx.look(&self.rx_page)?;
        let posted = self.rx.consumed().wrapping_add(left);
        self.short = self.short.filter(|short| posted.wrapping_sub(short.posted) < BACK_BUFFERS);
        match &mut self.short {
            Some(short) if short.stalled => Ok(Room::Stalled),
            _ if left >= slots => Ok(Room::Yes),
            None => {
                let until_ns = now_ns.saturating_add(PATIENCE_NS);
                self.short = Some(Short { until_ns, posted, stalled: false });
                Ok(Room::WaitUntil(until_ns))
            }
            Some(short) if now_ns < short.until_ns => Ok(Room::WaitUntil(short.until_ns)),
            Some(short) => {
                short.stalled = true;
                self.awaited = 0;
                self.counters.stalls += 1;
                Ok(Room::Stalled)
            }
        }
    }

    /// Returns whether the guest has `slots` buffers for a packet that waits for nobody.
    pub(crate) fn has_room(&mut self, slots: usize) -> Result<bool, RingError> {
        let slots = u32::try_from(slots).unwrap_or(u32::MAX);
        Ok(self.rx.left() >= slots || self.rx.look(&self.rx_page)? >= slots)
    }

    /// Asks for an event when `slots` buffers are posted, or as many as another sender waits for. Returns true if they are
    /// there already, and no event will come.
    pub(crate) fn await_buffers(&mut self, slots: usize) -> Result<bool, RingError> {
        let slots = if self.awaited > 0 { slots.min(self.awaited) } else { slots };
        self.awaited = slots;
        self.rx.rearm(&self.rx_page, u32::try_from(slots).unwrap_or(u32::MAX))
    }

    /// Takes a buffer. `None` if there was no room for it.
    pub(crate) fn take_buffer(&mut self) -> Option<RxRequest> {
        let mut slot = RxRequest::default();
        self.rx.take(&self.rx_page, slot.as_mut_bytes()).map(|_| slot)
    }

    /// Puts back buffers that were taken last.
    pub(crate) fn put_back_buffers(&mut self, slots: usize) {
        self.rx.put_back(u32::try_from(slots).unwrap_or(u32::MAX));
    }

    /// Answers the next buffer.
    pub(crate) fn fill(&mut self, slot: &[u8; RX_SLOT_BYTES]) {
        // Each buffer was taken, and is answered once, so this cannot fail.
        let answered = self.rx.respond(&self.rx_page, slot);
        debug_assert!(answered.is_ok());
        self.unpublished.1 = true;
    }

    /// Returns whether [`publish`](Self::publish) has something to do.
    pub(crate) fn has_unpublished(&self) -> bool {
        self.unpublished.0 || self.unpublished.1
    }

    /// Publishes responses, and notifies the guest if it asked for that.
    pub(crate) fn publish(&mut self, host: &mut H) {
        let (tx, rx) = core::mem::take(&mut self.unpublished);
        let tx = tx && self.tx.publish(&self.tx_page);
        let rx = rx && self.rx.publish(&self.rx_page);
        if rx {
            host.notify(self.ports.rx);
        }
        if tx && !(rx && self.ports.rx == self.ports.tx) {
            host.notify(self.ports.tx);
        }
    }

    pub(crate) fn into_parts(self) -> Disconnected<H> {
        Disconnected { tx: self.tx_page, rx: self.rx_page, counters: self.counters }
    }
}
