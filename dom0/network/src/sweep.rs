//! When flows that have been idle for too long are looked for, and where.

use crate::bucket::SECOND;
use crate::guests::Guests;

/// How many flows are looked at in a step.
const AT_ONCE: u16 = 256;
/// Nanoseconds from step to step at least.
const STEP_NS: u64 = SECOND;

/// The search for idle flows. A round goes through the flows of all guests, in steps. It begins when a flow may have been idle
/// for long enough.
#[derive(Debug)]
pub(crate) struct Sweep {
    /// Where the next step begins: the guest, by its place in the order, and the flow.
    at: (usize, u16),
    /// No flow ends before this; `u64::MAX` if there is no flow.
    due_ns: u64,
    /// No flow that this round has passed ends before this, and none that had a packet since the round began.
    passed_ns: u64,
    /// When the next step may be.
    step_ns: u64,
}

impl Sweep {
    pub(crate) const fn new() -> Self {
        Self { at: (0, 0), due_ns: u64::MAX, passed_ns: u64::MAX, step_ns: 0 }
    }

    /// Notes when a flow ends unless it has another packet.
    pub(crate) fn note(&mut self, ends_ns: u64) {
        self.due_ns = self.due_ns.min(ends_ns);
        self.passed_ns = self.passed_ns.min(ends_ns);
    }

    /// Begins anew with the first guest: the guests have other places in the order.
    pub(crate) const fn restart(&mut self) {
        self.at = (0, 0);
    }

    /// Returns when the next step is due. `None` if no flow can end.
    pub(crate) fn next_ns(&self) -> Option<u64> {
        (self.due_ns != u64::MAX).then(|| self.due_ns.max(self.step_ns))
    }

    /// Does a step if one is due: ends flows that have been idle for too long, and tells their outer ports.
    pub(crate) fn step(&mut self, guests: &mut Guests, secret: u64, now_ns: u64, ended: impl FnMut(u16)) {
        if self.next_ns().is_none_or(|due_ns| due_ns > now_ns) {
            return;
        }
        self.step_ns = now_ns + STEP_NS;
        if self.at == (0, 0) {
            self.passed_ns = u64::MAX;
        }
        self.skip(guests);
        let (place, from) = self.at;
        let guest = guests.iter_mut().nth(place);
        let swept = guest.map(|guest| guest.flows.sweep(from, AT_ONCE, now_ns, secret, ended));
        if let Some(next_ns) = swept {
            self.passed_ns = self.passed_ns.min(next_ns);
            self.at = (place, from + AT_ONCE);
            self.skip(guests);
        }
        if self.at.0 >= guests.count() {
            (self.at, self.due_ns) = ((0, 0), self.passed_ns);
        }
    }

    /// Goes on to the next guest that has flows which the round has not passed.
    fn skip(&mut self, guests: &mut Guests) {
        let (place, from) = self.at;
        let mut later = guests.iter_mut().enumerate().skip(place);
        let next = later.find(|(at, guest)| guest.flows.end() > if *at == place { from.into() } else { 0 });
        match next {
            Some((at, _)) if at == place => {}
            Some((at, _)) => self.at = (at, 0),
            None => self.at = (usize::MAX, 0),
        }
    }
}
