//! Deadlines that have come.

use crate::fault::{Fault, planted};
use crate::prelude::*;
use core::sync::atomic::AtomicU64;
use hypercall_abi::event::Virq;

impl World {
    /// Raises what is due on this CPU and sets its timer to the next deadline, at most `limit`.
    pub fn tick<M: Machine>(&self, m: &M, limit: u64) {
        let (here, now) = (self.sched.here(m), m.now());
        let mut next = limit;
        here.for_watched(|index| {
            let Some(vcpu) = nth(&self.vcpus, index) else { return };
            if vcpu.earliest() <= now {
                self.expire(m, vcpu, now);
            }
            match vcpu.earliest() {
                u64::MAX => here.unwatch(index),
                deadline => next = next.min(deadline),
            }
        });
        if let Some(vcpu) = here.running().and_then(|index| nth(&self.vcpus, index)) {
            next = next.min(self.periodic(m, vcpu, now));
        }
        here.arm(m, next);
    }

    /// A vcpu has come to this CPU: its deadlines are kept from now on, and its tick. For those of other vcpus the timer is set
    /// already.
    pub(super) fn keep<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let sooner = vcpu.earliest() < self.sched.here(m).armed() || vcpu.period.load(Relaxed) != 0;
        if sooner && !planted(Fault::ArriveUnkept) {
            self.tick(m, u64::MAX);
        }
    }

    /// The deadlines of a vcpu that have come: of a poll, of its one-shot timer.
    fn expire<M: Machine>(&self, m: &M, vcpu: &Vcpu, now: u64) {
        if take(&vcpu.poll_deadline, now) {
            self.sched.wake(m, vcpu);
        }
        if take(&vcpu.deadline, now) {
            self.raise_virq(m, vcpu, Virq::Timer);
        }
    }

    /// Ticks the periodic timer of a vcpu that runs, if it is time; returns when it will be again.
    fn periodic<M: Machine>(&self, m: &M, vcpu: &Vcpu, now: u64) -> u64 {
        let period = vcpu.period.load(Relaxed);
        if period == 0 {
            return u64::MAX;
        }
        if vcpu.next_tick.load(Relaxed) <= now {
            vcpu.next_tick.store(now.saturating_add(period), Relaxed);
            self.raise_virq(m, vcpu, Virq::Timer);
        }
        vcpu.next_tick.load(Relaxed)
    }
}

/// Whether a deadline has come; it is taken away then, so that it comes once.
fn take(deadline: &AtomicU64, now: u64) -> bool {
    let at = deadline.load(Relaxed);
    at <= now && deadline.compare_exchange(at, u64::MAX, SeqCst, Relaxed).is_ok()
}
