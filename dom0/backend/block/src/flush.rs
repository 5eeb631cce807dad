//! Flushes: the device has one at a time, and a failed one concerns every guest with unflushed writes.
//!
//! A flush makes durable what was answered before it was taken. Flushes that are taken while the device has one wait for the
//! next one, together. A device reports lost writes once, and does not say whose they were. So after a failed flush each guest
//! with unflushed writes gets an error for its next flush: the queue counts failures, and a vbd remembers how many of them its
//! guest knows.
//!
//! Stock front ends do not flush again after a flush that failed: from then on each write is flushed before it is answered. What
//! was answered while the failed flush was under way would never be flushed, so the device is given one more flush before the
//! guest learns of the failure.

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
    /// Writes answered.
    written: u64,
    /// As many of them when the device was given its last flush.
    marked: u64,
    /// As many of them are durable.
    durable: u64,
    /// Failures that the guest has been told of, or that happened before it had something to lose.
    told: u64,
}

impl Durability {
    /// What is known of a guest whose back end has died: it may have unflushed writes, and perhaps is owed an error.
    pub(crate) fn resumed(owed: bool, failures: u64) -> Self {
        // No queue knows of fewer failures than one.
        Self { written: 1, marked: 0, durable: 0, told: if owed { 0 } else { failures } }
    }

    pub(crate) const fn has_unflushed(&self) -> bool {
        self.written != self.durable
    }

    /// A write is answered that began after so many failures. A later one may have lost it, also if the guest was told of that
    /// before this answer.
    pub(crate) fn wrote(&mut self, failures: u64) {
        let clean = self.written == self.durable;
        self.told = if clean { failures } else { failures.min(self.told) };
        self.written += 1;
    }

    fn mark(&mut self) {
        self.marked = self.written;
    }

    /// Whether writes may be lost that the guest does not know of.
    pub(crate) fn owes(&self, failures: u64) -> bool {
        self.has_unflushed() && self.told != failures
    }

    /// A flush of the device has succeeded. A guest that is owed an error is still owed it.
    fn flushed(&mut self, failures: u64) {
        if !self.owes(failures) {
            self.durable = self.marked;
        }
    }
}

impl<H: Host> Queue<H> {
    /// A flight comes to where everything that was answered before it is flushed.
    pub(crate) fn flush(&mut self, index: Index) {
        let vbd = self.flights.get(index).vbd;
        let volatile = self.vbd(vbd).is_some_and(|vbd| vbd.shape.volatile);
        if volatile && self.device.is_some() {
            self.flights.go(index, Stage::FlushNext);
        } else {
            self.flushed(index, Status::Okay);
        }
    }

    /// Gives the device a flush, if one is wanted and it has none.
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
            // A flush that failed since the write began may have lost the write.
            let owes = owes || flight.durable == Durable::After && flight.failures != self.failures;
            match (good && !owes, flight.status) {
                (true, Status::Okay) => self.flushed(index, Status::Okay),
                // The guest is told after one more flush.
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

    /// The guests of these flights have been told of all failures.
    fn told(&mut self, covered: Set) {
        for index in covered {
            let (id, failures) = (self.flights.get(index).vbd, self.failures);
            if let Some(vbd) = self.vbd_mut(id) {
                vbd.durability.told = failures;
            }
        }
    }

    /// Unflushed writes may be lost.
    pub(crate) fn failed_flush(&mut self) {
        self.count_failure();
        self.report(crate::Event::FlushFailed);
    }

    /// Writes may be lost. Journals say so before anybody is answered.
    pub(crate) fn count_failure(&mut self) {
        self.failures += 1;
        self.notes = true;
        self.vbds.iter_mut().flatten().for_each(Vbd::note_failure);
    }

    /// Takes back the notes of vbds that owe no error any more; their guests' answers are in the journals.
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

    /// The ticket of an operation that began since the last reset.
    pub(crate) const fn ticket(&self, number: u32) -> Ticket {
        Ticket(self.resets << 8 | number)
    }
}
