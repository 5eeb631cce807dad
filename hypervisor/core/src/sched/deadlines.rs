//! Handles deadlines that have passed.

use crate::fault::{Fault, planted};
use crate::prelude::*;
use core::sync::atomic::AtomicU64;
use hypercall_abi::event::Virq;

impl World {
    /// Handles the deadlines that this CPU keeps and that have passed, and the periodic timer of the vcpu that runs here. Then
    /// sets this CPU's timer to the next deadline, or to `limit` if that is earlier. Also ends an interrupt storm: interrupts
    /// of devices, which this CPU holds back after too many of them have raised no port (`Cpu::useless_message`), are let in
    /// again.
    pub fn tick<M: Machine>(&self, m: &M, limit: u64) {
        let (here, now) = (self.sched.here(m), m.now());
        let mut next = limit;
        here.end_storm(m);
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

    /// Sets this CPU's timer for the deadlines and the periodic timer of a vcpu that begins a turn here. For the other vcpus
    /// whose deadlines this CPU keeps, the timer is set already.
    pub(super) fn keep<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let sooner = vcpu.earliest() < self.sched.here(m).armed() || vcpu.period.load(Relaxed) != 0;
        if sooner && !planted(Fault::ArriveUnkept) {
            self.tick(m, u64::MAX);
        }
    }

    /// Handles the deadlines of a vcpu, that of its poll and that of its one-shot timer, if they have passed.
    fn expire<M: Machine>(&self, m: &M, vcpu: &Vcpu, now: u64) {
        if take(&vcpu.poll_deadline, now) {
            self.sched.wake(m, vcpu);
        }
        if take(&vcpu.deadline, now) {
            self.raise_virq(m, vcpu, Virq::Timer);
        }
    }

    /// Raises the periodic timer of a running vcpu, if it is due. Returns when it is due next; `u64::MAX` if the vcpu has none.
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

/// Whether a deadline has passed. If so, it is removed, so that it is seen only once.
fn take(deadline: &AtomicU64, now: u64) -> bool {
    let at = deadline.load(Relaxed);
    at <= now && deadline.compare_exchange(at, u64::MAX, SeqCst, Relaxed).is_ok()
}
