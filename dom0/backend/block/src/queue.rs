//! A queue: the vbds that share a device, and a turn of work for them.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::fmt;

use disk::Device;

use crate::batch::{Copies, PinBatch};
use crate::connection::{ConnectError, Connection, Disconnected};
use crate::flight::{Flights, Set, Stage};
use crate::health::{Event, Health};
use crate::host::{Handle, Host, Scratch};
use crate::limits::{DATA_PINS, Pins};
use crate::vbd::{Life, Vbd};

/// The number in the ticket of a flush. Flights have lower numbers.
pub(crate) const FLUSH: u32 = 64;
/// The number in the ticket of the flush after a reset.
pub(crate) const PROOF: u32 = 65;
/// Nanoseconds until the next try, where no event announces that a try may succeed: no handles or pins were free, a device
/// refused an operation though it had none, or a device is being reset.
pub(crate) const RETRY_NS: u64 = 1_000_000;

/// Names a vbd to its queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VbdId(pub(crate) usize);

/// When the owner of a queue gives it the next turn.
#[must_use = "a queue that gets no turn stands still"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Whether work is left that waits for nothing: the next turn is due as soon as other tasks have had theirs.
    pub again: bool,
    /// When the next turn is due even without an event or an interrupt. `None`: never.
    pub wake_ns: Option<u64>,
}

/// All vbds of one device, or all vbds whose disks lie in memory alone.
pub struct Queue<H: Host> {
    pub(crate) device: Option<Box<dyn Device>>,
    pub(crate) vbds: Vec<Option<Vbd<H>>>,
    pub(crate) flights: Flights,
    /// The vbd whose turn it is to begin requests.
    pub(crate) next: usize,
    /// The cost of what this turn has begun.
    pub(crate) spent: u32,
    /// The vbd whose ring is looked at next.
    looked: usize,
    pub(crate) budget: Rc<Pins>,
    pub(crate) scratch: Vec<Scratch<H::Memory>>,
    /// The number ([`GrantCopy::page`](crate::GrantCopy::page)) of a frame of dom0 that holds zeroes.
    pub(crate) zeroes: u64,
    pub(crate) copies: Copies,
    pub(crate) pinning: PinBatch,
    /// Pins that this turn gives back at its end.
    pub(crate) loose: Vec<Handle>,
    /// Whether something was submitted since the last [`Device::kick`].
    pub(crate) kick: bool,
    /// When the flush that the device has was submitted. `None` if it has no flush.
    pub(crate) flushing: Option<u64>,
    /// 1 plus the number of times that unflushed writes may have been lost: a flush failed, or the device was lost.
    pub(crate) failures: u64,
    /// Whether a journal may have a note that its guest is owed an error.
    pub(crate) notes: bool,
    pub(crate) health: Health,
    /// How often the device was reset. Each ticket has this number, so that completions from before a reset are recognized.
    pub(crate) resets: u32,
    pub(crate) last_reset_ns: Option<u64>,
    /// The flights that the device had when it was reset.
    pub(crate) reissue: Set,
    /// When the device is next checked for late operations. `None` if the device has no operation.
    pub(crate) watch_ns: Option<u64>,
    /// Whether the device was reported as late.
    pub(crate) late: bool,
    /// A device with an operation this old is reset. `None`: an operation is waited for without limit.
    pub(crate) late_limit_ns: Option<u64>,
    events: VecDeque<Event>,
}

impl<H: Host> fmt::Debug for Queue<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Queue");
        shown.field("device", &self.device).field("vbds", &self.vbds).field("health", &self.health);
        shown.field("flights", &self.flights.busy().len()).finish_non_exhaustive()
    }
}

impl<H: Host> Queue<H> {
    /// Makes a queue without vbds. `device` is `None` for disks in memory alone. All queues share `budget`. A page of `scratch`
    /// takes the descriptors of two requests; `zeroes` is the number of a frame of dom0 that holds zeroes. The
    /// device is reset if it takes `late_limit_ns` for an operation; `None` sets no limit.
    #[must_use]
    pub fn new(
        device: Option<Box<dyn Device>>,
        budget: Rc<Pins>,
        scratch: Vec<Scratch<H::Memory>>,
        zeroes: u64,
        late_limit_ns: Option<u64>,
    ) -> Self {
        Self {
            device,
            vbds: Vec::new(),
            flights: Flights::new(),
            next: 0,
            spent: 0,
            looked: 0,
            budget,
            scratch,
            zeroes,
            copies: Copies::new(),
            pinning: PinBatch::new(),
            loose: Vec::with_capacity(DATA_PINS as usize),
            kick: false,
            flushing: None,
            failures: 1,
            notes: false,
            health: Health::Fine,
            resets: 0,
            last_reset_ns: None,
            reissue: Set::default(),
            watch_ns: None,
            late: false,
            late_limit_ns,
            events: VecDeque::new(),
        }
    }

    /// Begins to serve a front end that has just connected.
    ///
    /// # Errors
    /// Why the front end cannot be served.
    pub fn connect(&mut self, connection: Connection<H>, now_ns: u64) -> Result<VbdId, ConnectError> {
        Vbd::connect(connection, now_ns, None).map(|vbd| self.add(vbd))
    }

    /// Continues to serve a front end whose earlier back end died. The journal tells which requests that back end left
    /// unanswered.
    ///
    /// # Errors
    /// Why the connection cannot be continued. A new connection to the front end may still succeed.
    pub fn resume(&mut self, connection: Connection<H>, now_ns: u64) -> Result<VbdId, ConnectError> {
        Vbd::connect(connection, now_ns, Some(self.failures)).map(|vbd| self.add(vbd))
    }

    fn add(&mut self, vbd: Vbd<H>) -> VbdId {
        self.notes |= vbd.is_noted();
        let free = self.vbds.iter().position(Option::is_none).unwrap_or(self.vbds.len());
        match self.vbds.get_mut(free) {
            Some(place) => *place = Some(vbd),
            None => self.vbds.push(Some(vbd)),
        }
        VbdId(free)
    }

    /// Returns a vbd. `None` if the vbd has ended.
    #[must_use]
    pub fn vbd(&self, id: VbdId) -> Option<&Vbd<H>> {
        self.vbds.get(id.0)?.as_ref()
    }

    pub(crate) fn vbd_mut(&mut self, id: VbdId) -> Option<&mut Vbd<H>> {
        self.vbds.get_mut(id.0)?.as_mut()
    }

    /// Notes that the guest has sent an event: a later turn looks at its ring.
    pub fn attend(&mut self, id: VbdId) {
        if let Some(vbd) = self.vbd_mut(id).filter(|vbd| vbd.life == Life::Open) {
            vbd.attention = true;
        }
    }

    /// Ends a vbd: no request is taken or answered any more. The owner gives the queue turns until the device has completed the
    /// vbd's operations; then [`disconnected`](Self::disconnected) returns the parts of the vbd.
    pub fn disconnect(&mut self, id: VbdId) {
        if let Some(vbd) = self.vbd_mut(id) {
            vbd.stop(Life::Closing);
            self.abandon(id);
        }
    }

    /// Returns the parts of a vbd after [`disconnect`](Self::disconnect), and forgets the vbd. `None` while requests of it are
    /// in flight. Except on a lost device, no page of the guest is pinned for it any more.
    pub fn disconnected(&mut self, id: VbdId) -> Option<Disconnected<H>> {
        let place = self.vbds.get_mut(id.0)?;
        place.take_if(|vbd| vbd.life == Life::Closing && vbd.in_flight == 0).map(Vbd::into_parts)
    }

    /// Returns the next event for the log, or for the owner of a vbd. `None` if there is no other.
    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(crate) fn report(&mut self, event: Event) {
        self.events.push_back(event);
    }

    /// Takes requests from one ring, begins and advances requests of all vbds, and answers those that have ended.
    pub fn turn(&mut self, host: &mut H, now_ns: u64) -> Turn {
        self.complete();
        self.look_after(now_ns);
        self.take();
        let ready_ns = self.start(now_ns);
        self.advance(host, now_ns);
        let landed = self.finish(host);
        let more_rings = self.rearm();
        let more_done = self.device.as_mut().is_some_and(|device| device.rearm());
        let waits = self.vbds.iter().flatten().any(|vbd| !vbd.waiting.is_empty());
        let unplanned = !self.flights.at(Stage::Plan).is_empty();
        let begun_less = waits && (landed || self.has_spent_all());
        let again = more_rings || more_done || unplanned || begun_less;
        let wakes = [ready_ns, self.retry_ns(now_ns), self.watch_ns];
        Turn { again, wake_ns: wakes.into_iter().flatten().min() }
    }

    /// Takes requests from the next ring that needs attention.
    fn take(&mut self) {
        let count = self.vbds.len();
        for step in 0..count {
            let at = (self.looked + step) % count;
            let Some(vbd) = self.vbds.get_mut(at).and_then(Option::as_mut).filter(|vbd| vbd.attention) else {
                continue;
            };
            self.looked = at + 1;
            match vbd.take() {
                Ok(more) => vbd.attention = more,
                Err(error) => self.broken(VbdId(at), error),
            }
            // The queue may sleep only if each front end with an empty ring was asked to send an event: see `rearm`.
            self.rearmed(VbdId(at));
            return;
        }
    }

    /// Asks a guest for an event if its ring is empty.
    fn rearmed(&mut self, id: VbdId) {
        let Some(vbd) = self.vbd_mut(id).filter(|vbd| vbd.life == Life::Open && !vbd.attention) else { return };
        match vbd.rearm() {
            Ok(more) => vbd.attention = more,
            Err(error) => self.broken(id, error),
        }
    }

    /// Returns whether a ring still needs attention. Guests with other rings were asked for an event.
    fn rearm(&self) -> bool {
        self.vbds.iter().flatten().any(|vbd| vbd.attention)
    }

    fn broken(&mut self, id: VbdId, error: ring_protocol::ring::RingError) {
        if let Some(vbd) = self.vbd_mut(id) {
            vbd.stop(Life::Broken);
        }
        self.report(Event::Broken(id, error));
    }

    /// Returns when the next turn is due for flights that no event will wake. `None` if there are no such flights.
    fn retry_ns(&self, now_ns: u64) -> Option<u64> {
        let flights = &self.flights;
        let idle = flights.at(Stage::Device).is_empty() && self.flushing.is_none();
        let unsubmitted = flights.at(Stage::Submit).with(flights.at(Stage::FlushNext));
        let stuck = idle && self.health == Health::Fine && !unsubmitted.is_empty();
        let starved = flights.at(Stage::Pin).with(flights.at(Stage::Fetch));
        let unproved = self.health == Health::Proving && self.flushing.is_none();
        let waits = stuck || unproved || !starved.is_empty() || self.health.is_resetting();
        waits.then(|| now_ns.saturating_add(RETRY_NS))
    }
}
