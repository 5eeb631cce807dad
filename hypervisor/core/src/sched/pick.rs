//! How a CPU takes a vcpu to run, and puts the vcpu back.

use super::Queued;
use super::cpu::Cpu;
use crate::fault::{Fault, planted};
use crate::prelude::*;

impl World {
    /// Takes from this CPU's queue the first vcpu that may run. If no vcpu there may run, looks in the queues of other CPUs.
    /// Marks the vcpu as running here. Returns `None` if no queued vcpu may run.
    pub fn pick<M: Machine>(&self, m: &M) -> Option<&Vcpu> {
        let here = self.sched.here(m);
        let others = self.sched.online().without(m.this_cpu());
        self.pick_from(m, here).or_else(|| others.iter().find_map(|cpu| self.pick_from(m, self.sched.cpu(cpu))))
    }

    /// Takes from a queue the first vcpu that may run (`may_run`), and marks this vcpu as running here. The vcpus before it in
    /// the queue are removed and moved to `Off`. `None` if no vcpu in the queue may run.
    fn pick_from<M: Machine>(&self, m: &M, from: &Cpu) -> Option<&Vcpu> {
        loop {
            let (index, boosted) = from.pop()?;
            let Some(vcpu) = nth(&self.vcpus, index) else { continue };
            if self.may_run(vcpu) && vcpu.moves(Place::Queued, Place::Running(m.this_cpu())) {
                self.arrives(m, vcpu, boosted);
                return Some(vcpu);
            }
            self.put_off(m, vcpu, Place::Queued);
        }
    }

    /// Moves a vcpu from the place `from` to `Off`, because it may not run. Then checks again, and queues the vcpu if it may
    /// run by now. Perhaps another CPU unpaused it, or brought it up, just before it was `Off`: that CPU's `Scheduler::start`
    /// did nothing, because `start` queues only a vcpu that is `Off`.
    pub(crate) fn put_off<M: Machine>(&self, m: &M, vcpu: &Vcpu, from: Place) {
        if vcpu.moves(from, Place::Off) && self.may_run(vcpu) && !planted(Fault::LeaveOff) {
            self.sched.start(m, vcpu);
        }
    }

    /// Records that a vcpu runs on this CPU from now on, and moves the vcpu's deadlines to this CPU.
    fn arrives<M: Machine>(&self, m: &M, vcpu: &Vcpu, boosted: bool) {
        let (here, last, index) = (self.sched.here(m), vcpu.last_cpu(), vcpu.index());
        // A vcpu's deadlines are watched by the CPU on which the vcpu ran last.
        if last != m.this_cpu() {
            // This CPU begins to watch the deadlines before the vcpu's previous CPU ceases to, so that at least one of the two
            // CPUs watches them at any time.
            if vcpu.earliest() != u64::MAX {
                here.watch(index, vcpu.earliest());
            }
            self.sched.cpu(last).unwatch(index);
            vcpu.set_last_cpu(m.this_cpu());
        }
        here.set_running(Some(index), boosted);
    }

    /// Ends a vcpu's turn on this CPU: queues the vcpu again, or moves the vcpu to `Off` if it may not run any more. A vcpu
    /// that has gone to sleep is left alone: by now, another CPU has perhaps woken the vcpu, or even runs it.
    pub fn put_back<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let here = self.sched.here(m);
        let boosted = here.is_boosted();
        here.set_running(None, false);
        let running = Place::Running(m.this_cpu());
        if !self.may_run(vcpu) {
            self.put_off(m, vcpu, running);
        } else if vcpu.moves(running, Place::Queued) || planted(Fault::RunTwice) && vcpu.seizes() {
            let preempted = vcpu.used.load(Relaxed) > 0;
            self.sched.push(m, vcpu, if preempted { Queued::Preempted { boosted } } else { Queued::Started });
        }
    }

    /// Whether a vcpu may run: the guest has brought it up (`online`), and its domain is not paused, shut down or dying
    /// ([`Domain::runs`]).
    fn may_run(&self, vcpu: &Vcpu) -> bool {
        vcpu.online.load(SeqCst) && self.domain_of(vcpu).is_some_and(Domain::runs)
    }
}
