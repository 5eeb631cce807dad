//! Flushes. The device has one flush at a time. A failed flush concerns every guest with unflushed writes.
//!
//! A flush makes durable the writes that were answered before the flush was taken. Flushes of guests that are taken while the
//! device has a flush wait together for the device's next flush. A device reports lost writes once, and does not tell whose
//! they were. So after a failed flush each guest with unflushed writes gets an error for its next flush: the queue counts
//! failures, and a vbd remembers how many failures its guest was told of.
//!
//! Stock front ends do not flush again after a failed flush. So from then on the back end flushes each write before it answers
//! the write. Writes that were answered while the failed flush was under way would never be flushed; therefore the device gets
//! one more flush before the guest is told of the failure.

use disk::{Operation, Outcome, Ticket};
use ring_protocol::block::Status;

use crate::flight::{Durable, Index, Set, Stage, Work};
use crate::health::Health;
use crate::host::Host;
use crate::queue::{FLUSH, Queue, VbdId};
use crate::vbd::Vbd;

/// What a guest knows of the durability of its writes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Durability {
    /// The number of writes answered.
    written: u64,
    /// The value of `written` when the device was given its last flush.
    marked: u64,
    /// The number of writes, the oldest ones, that are durable.
    durable: u64,
    /// The queue's number of failures when the guest was last told of one, or when it last had nothing to lose.
    told: u64,
}

impl Durability {
    /// The durability of a guest whose back end has died: it may have unflushed writes. `owed`: the guest was owed an error.
    pub(crate) fn resumed(owed: bool, failures: u64) -> Self {
        // A queue counts failures from 1, so 0 differs from every count.
        Self { written: 1, marked: 0, durable: 0, told: if owed { 0 } else { failures } }
    }

    pub(crate) const fn has_unflushed(&self) -> bool {
        self.written != self.durable
    }

    /// Notes that a write is answered. The queue had counted `failures` when the write began. A later failure may have lost the
    /// write, even if the guest was told of that failure before this answer.
    pub(crate) fn wrote(&mut self, failures: u64) {
        let clean = self.written == self.durable;
        self.told = if clean { failures } else { failures.min(self.told) };
        self.written += 1;
    }

    fn mark(&mut self) {
        self.marked = self.written;
    }

    /// Returns whether unflushed writes may be lost without the guest having been told.
    pub(crate) fn owes(&self, failures: u64) -> bool {
        self.has_unflushed() && self.told != failures
    }

    /// Notes that a flush of the device has succeeded. That changes nothing for a guest that is owed an error.
    fn flushed(&mut self, failures: u64) {
        if !self.owes(failures) {
            self.durable = self.marked;
        }
    }
}

impl<H: Host> Queue<H> {
    /// Makes a flight wait for a flush. Where nothing needs a flush (disks that are not volatile), the flight goes on directly.
    pub(crate) fn flush(&mut self, index: Index) {
        let vbd = self.flights.get(index).vbd;
        let volatile = self.vbd(vbd).is_some_and(|vbd| vbd.shape.volatile);
        if volatile && self.device.is_some() {
            self.flights.go(index, Stage::FlushNext);
        } else {
            self.flushed(index, Status::Okay);
        }
    }

    /// Submits a flush if a flight waits for one and the device has none.
    pub(crate) fn submit_flush(&mut self, now_ns: u64) {
        let wanted = self.flights.at(Stage::FlushNext);
        if wanted.is_empty() || self.flushing.is_some() || !matches!(self.health, Health::Fine | Health::Dead) {
            return;
        }
        if self.health == Health::Dead {
            wanted.for_each(|index| self.flights.end(index, Status::Error));
            return;
        }
        let ticket = self.ticket(FLUSH);
        let Some(device) = &mut self.device else { return };
        if device.submit(ticket, Operation::Flush).is_err() {
            return;
        }
        self.kick = true;
        self.flushing = Some(now_ns);
        self.watch_from(now_ns);
        wanted.for_each(|index| self.flights.go(index, Stage::FlushNow));
        self.vbds.iter_mut().flatten().for_each(|vbd| vbd.durability.mark());
    }

    /// The flush of the device has ended.
    pub(crate) fn flush_ended(&mut self, outcome: Outcome) {
        self.flushing = None;
        let covered = self.flights.at(Stage::FlushNow);
        let good = outcome == Outcome::Good;
        if !good {
            self.failed_flush();
        }
        for index in covered {
            let owes = self.vbd(self.flights.get(index).vbd).is_some_and(|vbd| vbd.durability.owes(self.failures));
            let flight = self.flights.get_mut(index);
            // A flush that failed after a durable write began may have lost the write.
            let owes = owes || flight.durable == Durable::After && flight.failures != self.failures;
            match (good && !owes, flight.status) {
                (true, Status::Okay) => self.flushed(index, Status::Okay),
                // The guest is told of the failure after one more flush.
                (false, Status::Okay) => {
                    flight.status = Status::Error;
                    let id = flight.vbd;
                    self.flights.go(index, Stage::FlushNext);
                    if let Some(vbd) = self.vbd_mut(id) {
                        vbd.flush_failed();
                    }
                }
                _ => self.flights.end(index, Status::Error),
            }
        }
        self.told(Set(covered.0 & self.flights.at(Stage::End).0));
        if good {
            let failures = self.failures;
            self.vbds.iter_mut().flatten().for_each(|vbd| vbd.durability.flushed(failures));
        }
    }

    /// Notes that the guests of these flights are told of all failures so far.
    fn told(&mut self, covered: Set) {
        for index in covered {
            let (id, failures) = (self.flights.get(index).vbd, self.failures);
            if let Some(vbd) = self.vbd_mut(id) {
                vbd.durability.told = failures;
            }
        }
    }

    /// Counts and reports a failed flush.
    pub(crate) fn failed_flush(&mut self) {
        self.count_failure();
        self.report(crate::Event::FlushFailed);
    }

    /// Counts a failure: unflushed writes may be lost. The failure is noted in journals before any guest is answered.
    pub(crate) fn count_failure(&mut self) {
        self.failures += 1;
        self.notes = true;
        self.vbds.iter_mut().flatten().for_each(Vbd::note_failure);
    }

    /// Clears the notes in the journals of vbds that owe no error any more. The answers with the errors are in the journals.
    pub(crate) fn clear_notes(&mut self) {
        if !core::mem::take(&mut self.notes) {
            return;
        }
        for (at, vbd) in self.vbds.iter_mut().enumerate().filter_map(|(at, vbd)| Some((at, vbd.as_mut()?))) {
            if !vbd.is_noted() {
                continue;
            }
            let suspect = |index| {
                let flight = self.flights.get(index);
                flight.vbd == VbdId(at) && flight.failures != self.failures
            };
            if vbd.durability.owes(self.failures) || self.flights.busy().any(suspect) {
                self.notes = true;
            } else {
                vbd.clear_note();
            }
        }
    }

    /// Ends a flight after its flush, or goes on with a durable write whose data is still to be written.
    fn flushed(&mut self, index: Index, status: Status) {
        let flight = self.flights.get_mut(index);
        match (flight.work, flight.durable) {
            (Work::Transfer(_), Durable::Before) if status == Status::Okay => {
                flight.durable = Durable::After;
                self.flights.go(index, Stage::Plan);
            }
            _ => self.flights.end(index, status),
        }
    }

    /// Returns the ticket of an operation that is submitted now, with the number of resets so far.
    pub(crate) const fn ticket(&self, number: u32) -> Ticket {
        Ticket(self.resets << 8 | number)
    }
}
