//! What shares a device: the vbds behind it, and a turn of work for them.

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

/// The number of a flush in its ticket; flights have lower ones.
pub(crate) const FLUSH: u32 = 64;
/// The number of the flush after a reset.
pub(crate) const PROOF: u32 = 65;
/// When to try again what we had no handles, or a device without work had no room for.
pub(crate) const RETRY_NS: u64 = 1_000_000;

/// Names a vbd to its queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VbdId(pub(crate) usize);

/// What a turn leaves to its owner.
#[must_use = "a queue that gets no turn stands still"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// There is more to do at once, after others have had their turns.
    pub again: bool,
    /// When the next turn is due though nothing happens.
    pub wake_ns: Option<u64>,
}

/// All vbds of one device, or those that lie in memory alone.
pub struct Queue<H: Host> {
    pub(crate) device: Option<Box<dyn Device>>,
    pub(crate) vbds: Vec<Option<Vbd<H>>>,
    pub(crate) flights: Flights,
    /// The vbd whose turn it is to begin requests.
    pub(crate) next: usize,
    /// The cost of what this turn has begun.
    pub(crate) spent: u32,
    /// The vbd whose turn it is to be looked at.
    looked: usize,
    pub(crate) budget: Rc<Pins>,
    pub(crate) scratch: Vec<Scratch<H::Memory>>,
    /// A frame of ours that holds zeroes.
    pub(crate) zeroes: u64,
    pub(crate) copies: Copies,
    pub(crate) pinning: PinBatch,
    /// Pins to be given back.
    pub(crate) loose: Vec<Handle>,
    /// The device is to be told of what was submitted.
    pub(crate) kick: bool,
    /// When the device was given the flush that it has.
    pub(crate) flushing: Option<u64>,
    /// How many flushes have failed, counted from 1.
    pub(crate) failures: u64,
    /// A journal may say that its guest is owed an error.
    pub(crate) notes: bool,
    pub(crate) health: Health,
    /// How often the device was reset: part of each ticket, so that what came before is not mistaken.
    pub(crate) resets: u32,
    pub(crate) last_reset_ns: Option<u64>,
    /// What the device had when it was reset.
    pub(crate) reissue: Set,
    /// The device is looked at then, whether something is late.
    pub(crate) watch_ns: Option<u64>,
    /// A late device was reported.
    pub(crate) late: bool,
    /// A device that is as late is reset.
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
    /// A queue without vbds, of a device or of memory alone. `budget` is shared by all queues. A page of `scratch` takes the
    /// descriptors of two requests; `zeroes` is the page-frame number of a frame of ours that holds zeroes. A device that is
    /// later than `late_limit_ns` is reset.
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

    /// Serves a front end that has just connected, from its ring as it is.
    ///
    /// # Errors
    /// Why it cannot be served.
    pub fn connect(&mut self, connection: Connection<H>, now_ns: u64) -> Result<VbdId, ConnectError> {
        Vbd::connect(connection, now_ns, None).map(|vbd| self.add(vbd))
    }

    /// Goes on serving a front end where an earlier back end died, by its journal.
    ///
    /// # Errors
    /// Why it cannot be served; a new connection may be.
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

    /// A vbd.
    #[must_use]
    pub fn vbd(&self, id: VbdId) -> Option<&Vbd<H>> {
        self.vbds.get(id.0)?.as_ref()
    }

    pub(crate) fn vbd_mut(&mut self, id: VbdId) -> Option<&mut Vbd<H>> {
        self.vbds.get_mut(id.0)?.as_mut()
    }

    /// The guest has sent an event: its ring is looked at in a turn from now on.
    pub fn attend(&mut self, id: VbdId) {
        if let Some(vbd) = self.vbd_mut(id).filter(|vbd| vbd.life == Life::Open) {
            vbd.attention = true;
        }
    }

    /// Ends a vbd: nothing is taken or answered any more. Turns go on until what the device has is done; then
    /// [`disconnected`](Self::disconnected) hands out what the vbd was made of.
    pub fn disconnect(&mut self, id: VbdId) {
        if let Some(vbd) = self.vbd_mut(id) {
            vbd.stop(Life::Closing);
            self.abandon(id);
        }
    }

    /// What is left of a vbd that was ended, once nothing of it is in flight or pinned. The page of its ring may be unmapped.
    pub fn disconnected(&mut self, id: VbdId) -> Option<Disconnected<H>> {
        let place = self.vbds.get_mut(id.0)?;
        place.take_if(|vbd| vbd.life == Life::Closing && vbd.in_flight == 0).map(Vbd::into_parts)
    }

    /// The next thing that a person, or the owner of a vbd, is to know.
    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(crate) fn report(&mut self, event: Event) {
        self.events.push_back(event);
    }

    /// Takes requests of one guest, has what may be carried out carried out, answers what is done.
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

    /// Takes from the next ring that asks for attention.
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
            // Its front end sleeps only when it was asked to send an event: see `rearm`.
            self.rearmed(VbdId(at));
            return;
        }
    }

    /// Asks for an event of a guest whose ring is empty.
    fn rearmed(&mut self, id: VbdId) {
        let Some(vbd) = self.vbd_mut(id).filter(|vbd| vbd.life == Life::Open && !vbd.attention) else { return };
        match vbd.rearm() {
            Ok(more) => vbd.attention = more,
            Err(error) => self.broken(id, error),
        }
    }

    fn rearm(&self) -> bool {
        self.vbds.iter().flatten().any(|vbd| vbd.attention)
    }

    fn broken(&mut self, id: VbdId, error: ring_protocol::ring::RingError) {
        if let Some(vbd) = self.vbd_mut(id) {
            vbd.stop(Life::Broken);
        }
        self.report(Event::Broken(id, error));
    }

    /// When to try again what waits for nothing that would wake us.
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
