//! Devices that are late, are reset, or are lost.
//!
//! Disks of clouds stall for minutes, and stock front ends wait for ever. So a late device is reported and waited for. A reset
//! begins by a command of the administrator, by a limit, or because the device asks for it. After the reset, the device no
//! longer accesses memory that it was given before. A volatile device is flushed; then all operations that it had are issued
//! again, with their pages still pinned. That is safe, since none of them was answered (ABI io 5.6). If that flush fails, or if
//! the reset began within a minute of the reset before, the requests of these operations are answered with errors instead.

use core::fmt;

use disk::{Operation, Outcome, Reset};
use ring_protocol::block::Status;
use ring_protocol::ring::RingError;

use crate::flight::{Set, Stage};
use crate::host::Host;
use crate::queue::{PROOF, Queue, VbdId};

/// An operation that takes this long is reported as late.
pub const LATE_NS: u64 = 30_000_000_000;
/// A reset within this time of the reset before is a second one: the operations of the device fail.
const AGAIN_NS: u64 = 60_000_000_000;

/// How a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Fine,
    /// The device is being reset; `second` if that is the second reset within a minute.
    Resetting {
        second: bool,
    },
    /// The device was reset, and has a flush before it gets any other operation.
    Proving,
    Dead,
}

impl Health {
    pub(crate) const fn is_resetting(self) -> bool {
        matches!(self, Self::Resetting { .. })
    }
}

/// What happened to a queue: for the log, or for the owner of a vbd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The device has taken [`LATE_NS`] for an operation, and is waited for.
    Late {
        /// The number of operations that the device has.
        operations: usize,
        /// Nanoseconds that the oldest of these operations has taken so far.
        waited_ns: u64,
    },
    /// A device that was late has completed its late operations.
    Answers,
    /// The device is being reset.
    Resetting {
        /// The number of requests that wait for operations of the device.
        operations: usize,
    },
    /// The device was reset, and takes operations again.
    Reset {
        /// How many requests that the device had fail. 0 if all are issued again.
        failed: usize,
    },
    /// The device does not come back, for this reason.
    Lost(&'static str),
    /// A flush failed. The next flush of each guest with unflushed writes fails, too.
    FlushFailed,
    /// A front end broke its ring, and is not served any more. The owner should tell the front end, and disconnect the vbd.
    Broken(VbdId, RingError),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Late { operations, waited_ns } => {
                let seconds = waited_ns / 1_000_000_000;
                write!(f, "has not answered for {seconds} s, {operations} operations wait for it")
            }
            Self::Answers => f.write_str("answers again"),
            Self::Resetting { operations } => write!(f, "is reset, with {operations} operations under way"),
            Self::Reset { failed: 0 } => f.write_str("was reset and goes on"),
            Self::Reset { failed } => write!(f, "was reset and goes on, {failed} requests have failed"),
            Self::Lost(reason) => write!(f, "does not come back: {reason}"),
            Self::FlushFailed => f.write_str("could not make writes durable"),
            Self::Broken(_, error) => write!(f, "the guest broke its ring: {error}"),
        }
    }
}

impl<H: Host> Queue<H> {
    /// Resets the device, by a command of the administrator. Does nothing if the device is being reset or is lost.
    pub fn reset(&mut self, now_ns: u64) {
        if matches!(self.health, Health::Fine | Health::Proving) && self.device.is_some() {
            self.begin_reset(now_ns);
        }
    }

    /// Sets how long an operation may take until the device is reset. `None`: the device is waited for without limit. Until the
    /// device is next checked for late operations, the limit before still holds.
    pub const fn limit_lateness(&mut self, late_limit_ns: Option<u64>) {
        self.late_limit_ns = late_limit_ns;
    }

    /// Returns whether the device is lost for good.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.health == Health::Dead
    }

    /// Checks for late operations, and begins or continues a reset.
    pub(crate) fn look_after(&mut self, now_ns: u64) {
        let Some(device) = &mut self.device else { return };
        match self.health {
            Health::Fine | Health::Proving if device.needs_reset() => self.begin_reset(now_ns),
            Health::Fine => self.watch(now_ns),
            Health::Proving => {
                self.prove(now_ns);
                self.watch(now_ns);
            }
            Health::Resetting { second } => self.go_on_resetting(second, now_ns),
            Health::Dead => {}
        }
    }

    /// Notes that an operation was submitted: the device is checked for late operations when this one would be late.
    pub(crate) fn watch_from(&mut self, now_ns: u64) {
        let due = now_ns.saturating_add(self.late_limit_ns.unwrap_or(LATE_NS).min(LATE_NS));
        self.watch_ns.get_or_insert(due);
    }

    fn watch(&mut self, now_ns: u64) {
        if !self.late && self.watch_ns.is_none_or(|due| now_ns < due) {
            return;
        }
        let held = self.flights.at(Stage::Device);
        let oldest = held.map(|index| self.flights.get(index).since_ns).chain(self.flushing).min();
        let waited_ns = oldest.map_or(0, |since| now_ns.saturating_sub(since));
        let late = waited_ns >= LATE_NS;
        if late && !self.late {
            let operations = held.len() + usize::from(self.flushing.is_some());
            self.report(Event::Late { operations, waited_ns });
        }
        if self.late && !late {
            self.report(Event::Answers);
        }
        self.late = late;
        let limits = [Some(LATE_NS).filter(|_| !late), self.late_limit_ns];
        self.watch_ns =
            oldest.and_then(|since| limits.into_iter().flatten().map(|limit| since.saturating_add(limit)).min());
        if oldest.is_some() && self.late_limit_ns.is_some_and(|limit| waited_ns >= limit) {
            self.begin_reset(now_ns);
        }
    }

    fn begin_reset(&mut self, now_ns: u64) {
        let second = self.last_reset_ns.is_some_and(|last| now_ns.saturating_sub(last) < AGAIN_NS);
        self.health = Health::Resetting { second };
        self.last_reset_ns = Some(now_ns);
        self.resets = self.resets.wrapping_add(1);
        let (held, flushed) = (self.flights.at(Stage::Device), self.flights.at(Stage::FlushNow));
        self.reissue = self.reissue.with(held).with(flushed);
        held.for_each(|index| self.flights.go(index, Stage::Submit));
        flushed.for_each(|index| self.flights.go(index, Stage::FlushNext));
        (self.flushing, self.watch_ns, self.late) = (None, None, false);
        self.report(Event::Resetting { operations: self.reissue.len() });
        self.go_on_resetting(second, now_ns);
    }

    fn go_on_resetting(&mut self, second: bool, now_ns: u64) {
        let Some(device) = &mut self.device else { return };
        match device.reset() {
            Reset::Pending => {}
            Reset::Done if second => self.fine(true),
            Reset::Done if device.shape().volatile => {
                self.health = Health::Proving;
                self.prove(now_ns);
            }
            Reset::Done => self.fine(false),
            Reset::Dead(reason) => self.lose(reason),
        }
    }

    /// Submits the flush after a reset.
    fn prove(&mut self, now_ns: u64) {
        let ticket = self.ticket(PROOF);
        let Some(device) = self.device.as_mut().filter(|_| self.flushing.is_none()) else { return };
        if device.submit(ticket, Operation::Flush).is_ok() {
            self.kick = true;
            self.flushing = Some(now_ns);
            self.watch_from(now_ns);
        }
    }

    /// The flush after a reset has ended.
    pub(crate) fn proved(&mut self, outcome: Outcome) {
        self.flushing = None;
        if outcome != Outcome::Good {
            self.failed_flush();
        }
        self.fine(outcome != Outcome::Good);
    }

    /// Ends a reset. The operations that the device had are issued again, or (`failed`) end with errors.
    fn fine(&mut self, failed: bool) {
        self.health = Health::Fine;
        let held = core::mem::take(&mut self.reissue);
        if failed {
            for index in held {
                self.let_go(index);
                self.flights.end(index, Status::Error);
            }
        }
        self.report(Event::Reset { failed: if failed { held.len() } else { 0 } });
    }

    /// The device does not come back. It may still write into pages that it was given, so their pins are never given back.
    fn lose(&mut self, reason: &'static str) {
        self.health = Health::Dead;
        for index in core::mem::take(&mut self.reissue) {
            let flight = self.flights.get_mut(index);
            let lost = core::mem::take(&mut flight.handles).len();
            // These pins stay taken from the budget for ever.
            flight.pins = flight.pins.saturating_sub(u32::try_from(lost).unwrap_or(u32::MAX));
            if let Some(vbd) = self.vbds.get_mut(flight.vbd.0).and_then(Option::as_mut) {
                vbd.counters.lost_pins += lost as u64;
            }
            self.flights.end(index, Status::Error);
        }
        self.count_failure();
        self.report(Event::Lost(reason));
    }

    /// Ends those flights of a vbd that do not wait for the device.
    pub(crate) fn abandon(&mut self, id: VbdId) {
        let held = [Stage::Device, Stage::FlushNow, Stage::End, Stage::Free].map(|stage| self.flights.at(stage));
        let held = held.into_iter().fold(self.reissue, Set::with);
        for index in Set(!held.0) {
            if self.flights.get(index).vbd == id {
                self.let_go(index);
                self.flights.end(index, Status::Error);
            }
        }
    }
}
