//! How a CPU takes a vcpu to run, and puts it back.

use super::cpu::Cpu;
use crate::fault::{Fault, planted};
use crate::prelude::*;

impl World {
    /// Takes the next vcpu from this CPU's queue or, if no vcpu there may run, from another CPU's, and marks it as running
    /// here. Returns `None` if no queued vcpu may run.
    pub fn pick<M: Machine>(&self, m: &M) -> Option<&Vcpu> {
        let here = self.sched.here(m);
        let others = self.sched.online().without(m.this_cpu());
        self.pick_from(m, here).or_else(|| others.iter().find_map(|cpu| self.pick_from(m, self.sched.cpu(cpu))))
    }

    /// Takes from a queue the first vcpu that may run, and marks it as running here. The vcpus before it, which may not run,
    /// are removed from the queue.
    fn pick_from<M: Machine>(&self, m: &M, from: &Cpu) -> Option<&Vcpu> {
        loop {
            let Some(vcpu) = nth(&self.vcpus, from.pop()?) else { continue };
            if self.may_run(vcpu) && vcpu.moves(Place::Queued, Place::Running(m.this_cpu())) {
                self.arrives(m, vcpu);
                return Some(vcpu);
            }
            self.put_off(m, vcpu, Place::Queued);
        }
    }

    /// Moves a vcpu that may not run from the place `from` to `Off`. Then checks again, and starts the vcpu if it may run by
    /// now. Another CPU may have allowed it to run before it was `Off`; that CPU's `Scheduler::start` did nothing then,
    /// because it starts only a vcpu that is `Off`.
    pub(crate) fn put_off<M: Machine>(&self, m: &M, vcpu: &Vcpu, from: Place) {
        if vcpu.moves(from, Place::Off) && self.may_run(vcpu) && !planted(Fault::LeaveOff) {
            self.sched.start(m, vcpu);
        }
    }

    /// Records that a vcpu runs on this CPU from now on, and moves its deadlines here.
    fn arrives<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let (here, last, index) = (self.sched.here(m), vcpu.last_cpu(), vcpu.index());
        if vcpu.earliest() != u64::MAX {
            // This CPU begins to keep the deadlines before the vcpu's previous CPU stops (below), so that at least one of the
            // two keeps them at any time.
            here.watch(index);
        }
        if last != m.this_cpu() {
            self.sched.cpu(last).unwatch(index);
            vcpu.set_last_cpu(m.this_cpu());
        }
        here.set_running(Some(index));
    }

    /// Ends a vcpu's turn on this CPU: queues the vcpu again, or moves it to `Off` if it may not run any more. A vcpu that has
    /// gone to sleep is left alone, even if it has been woken and taken by another CPU meanwhile.
    pub fn put_back<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        self.sched.here(m).set_running(None);
        let running = Place::Running(m.this_cpu());
        if !self.may_run(vcpu) {
            self.put_off(m, vcpu, running);
        } else if vcpu.moves(running, Place::Queued) || planted(Fault::RunTwice) && vcpu.seizes() {
            self.sched.push(m, vcpu, false);
        }
    }

    /// Whether a vcpu may run: the vcpu is up, and its domain runs.
    fn may_run(&self, vcpu: &Vcpu) -> bool {
        vcpu.online.load(SeqCst) && self.domain_of(vcpu).is_some_and(Domain::runs)
    }
}
