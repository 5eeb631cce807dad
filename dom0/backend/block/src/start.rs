//! Whose requests begin next: deficit round robin over the vbds, by cost, within each vbd's share of flights and pins.
//!
//! Each waiting vbd may spend a quantum; then it is the next vbd's turn. A vbd keeps what it did not spend, so a request that
//! costs more than a quantum begins after some rounds. A vbd that has nothing to begin keeps at most one quantum.

use ring_protocol::block::{Direction, Request, Status};

use crate::flight::{Cursor, Durable, Flight, Stage, Work};
use crate::health::Health;
use crate::host::Host;
use crate::limits::{QUANTUM, TURN_COST, flights_share};
use crate::queue::{Queue, RETRY_NS, VbdId};
use crate::waiting::Waiting;

/// What the first waiting request of a vbd waits for.
enum Head {
    /// Nothing: the request may begin.
    May,
    /// The vbd's next quantum.
    Deficit,
    /// The vbd itself: it has used up its share of flights or pins, or the rate that its limits allow. Or nothing waits.
    Itself,
    /// What all vbds share: free flights, free pins, the time of a turn.
    All,
}

impl<H: Host> Queue<H> {
    /// Begins the requests that may begin. Returns when the next turn may begin another: when a limit of a disk allows that, or
    /// after [`RETRY_NS`] if other queues have all pins. `None` if no request waits for the clock.
    pub(crate) fn start(&mut self, now_ns: u64) -> Option<u64> {
        let busy = self.vbds.iter_mut().flatten().filter_map(|vbd| vbd.is_busy(now_ns).then_some(())).count();
        self.spent = 0;
        if self.vbds.iter().flatten().all(|vbd| vbd.waiting.is_empty()) {
            return None;
        }
        let mut wake_ns: Option<u64> = None;
        let count = self.vbds.len();
        loop {
            let mut poor = false;
            for _ in 0..count {
                let id = VbdId(self.next % count);
                loop {
                    match self.head(id, busy, now_ns, &mut wake_ns) {
                        Head::May => self.begin(id, now_ns),
                        Head::Deficit => {
                            poor = true;
                            break;
                        }
                        Head::Itself => {
                            self.forfeit(id);
                            break;
                        }
                        // The next turn goes on with this vbd and its deficit. With no flight here, other queues have all pins.
                        Head::All if self.flights.busy().is_empty() => return Some(now_ns.saturating_add(RETRY_NS)),
                        Head::All => return wake_ns,
                    }
                }
                self.next = id.0 + 1;
            }
            if !poor {
                return wake_ns;
            }
            self.pay();
        }
    }

    fn head(&mut self, id: VbdId, busy: usize, now_ns: u64, wake_ns: &mut Option<u64>) -> Head {
        let on_device = self.pins();
        let Some(vbd) = self.vbds.get_mut(id.0).and_then(Option::as_mut) else { return Head::Itself };
        let Some(waiting) = vbd.waiting.front() else { return Head::Itself };
        let (cost, pins) = (waiting.cost(), if on_device { waiting.segments } else { 0 });
        if vbd.in_flight >= flights_share(busy) || (pins > 0 && vbd.pins.saturating_add(pins) > self.budget.share(busy))
        {
            return Head::Itself;
        }
        let ready_ns = vbd.ready_ns(now_ns);
        if ready_ns > now_ns {
            *wake_ns = Some(wake_ns.map_or(ready_ns, |wake_ns| wake_ns.min(ready_ns)));
            return Head::Itself;
        }
        if cost > vbd.deficit {
            return Head::Deficit;
        }
        if self.has_spent_all() {
            return Head::All;
        }
        let free = !self.flights.at(Stage::Free).is_empty() && self.budget.has(pins);
        if free { Head::May } else { Head::All }
    }

    /// Returns whether this turn has begun as much as it has time for.
    pub(crate) const fn has_spent_all(&self) -> bool {
        self.spent >= TURN_COST
    }

    /// Returns whether requests of this queue need pins.
    fn pins(&self) -> bool {
        self.device.is_some() && self.health != Health::Dead
    }

    /// A vbd that waits for itself saves up at most one quantum. An idle vbd gets a quantum, so its next request need not wait.
    fn forfeit(&mut self, id: VbdId) {
        if let Some(vbd) = self.vbd_mut(id) {
            vbd.deficit = if vbd.waiting.is_empty() { QUANTUM } else { vbd.deficit.min(QUANTUM) };
        }
    }

    fn pay(&mut self) {
        for vbd in self.vbds.iter_mut().flatten() {
            if vbd.waiting.front().is_some_and(|waiting| waiting.cost() > vbd.deficit) {
                vbd.deficit = vbd.deficit.saturating_add(QUANTUM);
            }
        }
    }

    /// Makes a flight of the first waiting request of a vbd.
    fn begin(&mut self, id: VbdId, now_ns: u64) {
        let on_device = self.pins();
        let Some(index) = self.flights.at(Stage::Free).next() else { return };
        let Some(vbd) = self.vbds.get_mut(id.0).and_then(Option::as_mut) else { return };
        let Some(waiting) = vbd.waiting.pop_front() else { return };
        let pins = if on_device { waiting.segments } else { 0 };
        self.budget.take(pins);
        vbd.charge(&waiting, now_ns);
        self.spent = self.spent.saturating_add(waiting.cost());
        vbd.in_flight += 1;
        vbd.pins += pins;
        let flight = self.flights.get_mut(index);
        (flight.vbd, flight.pins, flight.failures) = (id, pins, self.failures);
        let stage = flight.prepare(&waiting);
        self.flights.go(index, stage);
        match waiting.request {
            Request::Flush => self.flush(index),
            Request::Direct { durable: true, .. } => self.flush(index),
            Request::Direct { .. } | Request::Indirect { .. } | Request::Discard(_) => {}
        }
    }
}

impl Flight {
    /// Fills this flight with a request. Returns the request's first stage.
    fn prepare(&mut self, waiting: &Waiting) -> Stage {
        self.entry = waiting.entry;
        (self.status, self.durable, self.cursor) = (Status::Okay, Durable::No, Cursor::default());
        (self.charged, self.left, self.sectors) = (waiting.bytes, 0, 0);
        self.segments.clear();
        self.handles.clear();
        self.pieces.clear();
        match waiting.request {
            Request::Direct { direction, extent, segments, durable } => {
                self.work = Work::Transfer(direction);
                self.durable = if durable { Durable::Before } else { Durable::No };
                (self.sector, self.left, self.sectors) = (extent.sector, extent.sectors, extent.sectors);
                self.segments.extend_from_slice(waiting.slot.segments(segments));
                Stage::Plan
            }
            Request::Indirect { direction, sector, segments, descriptors } => {
                self.work = Work::Transfer(direction);
                (self.sector, self.count, self.descriptors) = (sector, segments, descriptors);
                Stage::Fetch
            }
            Request::Flush => {
                self.work = Work::Flush;
                Stage::FlushNext
            }
            Request::Discard(extent) => {
                self.work = Work::Discard;
                (self.sector, self.left, self.sectors) = (extent.sector, extent.sectors, extent.sectors);
                Stage::Plan
            }
        }
    }

    /// Returns whether the request flushes: a flush, or a durable write.
    pub(crate) fn flushes(&self) -> bool {
        self.work == Work::Flush || self.durable != Durable::No
    }

    /// Returns whether the request reads the disk, so that data goes into the guest's pages.
    pub(crate) fn reads(&self) -> bool {
        self.work == Work::Transfer(Direction::Read)
    }
}
