//! Whose requests begin next: deficit round robin over the vbds, by cost, within each guest's share of flights and pins.
//!
//! Each vbd that waits may spend a quantum; then it is the next one's turn. What it did not spend it keeps, so requests larger
//! than a quantum begin too; a vbd with nothing to begin keeps one quantum at most.

use ring_protocol::block::{Direction, Request, Status};

use crate::flight::{Cursor, Durable, Flight, Stage, Work};
use crate::health::Health;
use crate::host::Host;
use crate::limits::{QUANTUM, TURN_COST, flights_share};
use crate::queue::{Queue, RETRY_NS, VbdId};
use crate::waiting::Waiting;

/// What the first request of a vbd waits for.
enum Head {
    /// Nothing.
    May,
    /// The next quantum.
    Deficit,
    /// A flight or pins of its own, or the clock. Or the vbd has no request.
    Itself,
    /// What is shared by all: flights, pins, the time of a turn.
    All,
}

impl<H: Host> Queue<H> {
    /// Begins what may begin. Answers when a limit of a disk lets more begin.
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
                        Head::May => self.begin(id),
                        Head::Deficit => {
                            poor = true;
                            break;
                        }
                        Head::Itself => {
                            self.forfeit(id);
                            break;
                        }
                        // It goes on here, with what it may still spend. Other queues may have all pins.
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

    /// Whether as much was begun as a turn has time for.
    pub(crate) const fn has_spent_all(&self) -> bool {
        self.spent >= TURN_COST
    }

    /// Whether requests need pins.
    fn pins(&self) -> bool {
        self.device.is_some() && self.health != Health::Dead
    }

    /// A vbd that waits for itself does not save up. One that comes with a new request may begin it at once.
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

    /// Makes a flight of the first request of a vbd.
    fn begin(&mut self, id: VbdId) {
        let on_device = self.pins();
        let Some(index) = self.flights.at(Stage::Free).next() else { return };
        let Some(vbd) = self.vbds.get_mut(id.0).and_then(Option::as_mut) else { return };
        let Some(waiting) = vbd.waiting.pop_front() else { return };
        let pins = if on_device { waiting.segments } else { 0 };
        self.budget.take(pins);
        vbd.charge(&waiting);
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
    /// Becomes this request. Answers its first stage.
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

    /// Whether it is a flush, alone or with a write.
    pub(crate) fn flushes(&self) -> bool {
        self.work == Work::Flush || self.durable != Durable::No
    }

    /// The device writes into the guest's pages.
    pub(crate) fn reads(&self) -> bool {
        self.work == Work::Transfer(Direction::Read)
    }
}
