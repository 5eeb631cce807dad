//! Handles deadlines that have passed.

use super::cpu::Cpu;
use crate::fault::{Fault, planted};
use crate::prelude::*;
use core::sync::atomic::AtomicU64;
use hypercall_abi::event::Virq;

impl World {
    /// Handles each deadline that this CPU keeps and that has passed, and the periodic timer of the vcpu that runs here. Then
    /// sets this CPU's timer to the next time at which one of these is due, or to `limit`, whichever is earlier. Also ends an
    /// interrupt storm: this CPU holds messages of devices back after too many of them have raised no port
    /// (`Cpu::useless_message`), and lets messages in again here.
    pub fn tick<M: Machine>(&self, m: &M, limit: u64) {
        let (here, now) = (self.sched.here(m), m.now());
        here.end_storm(m);
        if here.due() <= now {
            self.expire_watched(m, here, now);
        }
        let mut next = limit.min(here.due());
        if let Some(vcpu) = here.running().and_then(|index| nth(&self.vcpus, index)) {
            next = next.min(self.periodic(m, vcpu, now));
        }
        here.arm(m, next);
    }

    /// Handles each deadline that this CPU keeps and that has passed, and determines the next one.
    fn expire_watched<M: Machine>(&self, m: &M, here: &Cpu, now: u64) {
        let mut next = u64::MAX;
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
        here.set_due(next);
    }

    /// Makes sure that this CPU's timer fires in time for the deadlines and the periodic timer of a vcpu that begins a turn
    /// here. For the other vcpus whose deadlines this CPU keeps, the timer is set already.
    pub(super) fn keep<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let sooner = vcpu.earliest() < self.sched.here(m).armed() || vcpu.period.load(Relaxed) != 0;
        if sooner && !planted(Fault::ArriveUnkept) {
            self.tick(m, u64::MAX);
        }
    }

    /// Handles two deadlines of a vcpu, each if it has passed: the end of the vcpu's poll, and the vcpu's one-shot timer.
    fn expire<M: Machine>(&self, m: &M, vcpu: &Vcpu, now: u64) {
        if take(&vcpu.poll_deadline, now) {
            self.sched.wake(m, vcpu);
        }
        if take(&vcpu.deadline, now) {
            self.raise_virq(m, vcpu, Virq::Timer);
        }
    }

    /// Raises VIRQ_TIMER if the periodic timer of a running vcpu is due. Returns when the periodic timer is due next;
    /// `u64::MAX` if the vcpu has no periodic timer.
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

/// Whether a deadline has passed. If so, removes the deadline, so that only one caller gets `true`.
fn take(deadline: &AtomicU64, now: u64) -> bool {
    let at = deadline.load(Relaxed);
    at <= now && deadline.compare_exchange(at, u64::MAX, SeqCst, Relaxed).is_ok()
}
