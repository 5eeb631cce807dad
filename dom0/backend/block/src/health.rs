//! A device that is late, that is reset, that is lost.
//!
//! Disks of clouds stall for minutes, and stock front ends wait for ever. So a late device is reported and waited for. A reset
//! begins by the verb, by a limit, or because the device asks for it. When it has ended, the device touches nothing it was given
//! before: it is flushed, then all it had is issued again, with the pages still pinned. That is safe, since none of it was
//! answered (ABI io 5.6). If resets do not help (two within a minute), or that flush fails, all it had is answered with an error.

use core::fmt;

use disk::{Operation, Outcome, Reset};
use ring_protocol::block::Status;
use ring_protocol::ring::RingError;

use crate::flight::{Set, Stage};
use crate::host::Host;
use crate::queue::{PROOF, Queue, VbdId};

/// An operation that takes as long is reported.
pub const LATE_NS: u64 = 30_000_000_000;
/// Two resets within this time: the device does not recover.
const AGAIN_NS: u64 = 60_000_000_000;

/// How a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Fine,
    /// It is being reset; `second` within a minute.
    Resetting {
        second: bool,
    },
    /// It was reset, and is flushed before it is given anything else.
    Proving,
    Dead,
}

impl Health {
    pub(crate) const fn is_resetting(self) -> bool {
        matches!(self, Self::Resetting { .. })
    }
}

/// What a person, or the owner of a vbd, is to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The device has not done something for long; it is waited for.
    Late {
        /// Operations that it has.
        operations: usize,
        /// How long the oldest of them has taken so far.
        waited_ns: u64,
    },
    /// A device that was late has done what was late.
    Answers,
    /// The device is being reset.
    Resetting {
        /// How many of its operations are issued again.
        operations: usize,
    },
    /// The device was reset, and goes on. Requests that it had were answered with errors if there are any `failed`.
    Reset {
        /// How many.
        failed: usize,
    },
    /// The device does not come back, for this reason.
    Lost(&'static str),
    /// A flush failed. The next flush of each guest with unflushed writes fails too.
    FlushFailed,
    /// A front end broke its ring. It is not served any more: let it know, and disconnect.
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
    /// Resets the device, because a person says so.
    pub fn reset(&mut self, now_ns: u64) {
        if matches!(self.health, Health::Fine | Health::Proving) && self.device.is_some() {
            self.begin_reset(now_ns);
        }
    }

    /// Has a device that is as late reset, from the next operation on; `None`: it is waited for.
    pub const fn limit_lateness(&mut self, late_limit_ns: Option<u64>) {
        self.late_limit_ns = late_limit_ns;
    }

    /// Whether the device is lost for good.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.health == Health::Dead
    }

    /// Looks after the device.
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

    /// The device was given something: it is looked at before that is late.
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

    /// Gives the device that was reset its flush.
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

    /// The device goes on. What it had is issued again, or it has `failed`.
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

    /// The device does not come back. It may still write into the pages that it was given: their pins are never given back.
    fn lose(&mut self, reason: &'static str) {
        self.health = Health::Dead;
        for index in core::mem::take(&mut self.reissue) {
            let flight = self.flights.get_mut(index);
            let lost = core::mem::take(&mut flight.handles).len();
            // The handles are used for ever.
            flight.pins = flight.pins.saturating_sub(u32::try_from(lost).unwrap_or(u32::MAX));
            if let Some(vbd) = self.vbds.get_mut(flight.vbd.0).and_then(Option::as_mut) {
                vbd.counters.lost_pins += lost as u64;
            }
            self.flights.end(index, Status::Error);
        }
        self.count_failure();
        self.report(Event::Lost(reason));
    }

    /// What of a vbd that ends is not in the device ends at once.
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
