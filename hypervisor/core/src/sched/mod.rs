//! Who runs next, on which CPU, and when a timer is due.
//!
//! Touches: the place of vcpus, the queues of CPUs, their timers.
//! Never touches: registers or memory of a guest.
//! Keeps: a vcpu that sleeps is never forgotten: who makes it runnable moves it from `Blocked` to `Queued` in one atomic
//! step, and `block` looks for events once more after it has moved to `Blocked`. A vcpu that waits is in one queue, once.

pub mod cpu;
pub mod deadlines;
pub mod life;
pub mod ops;
pub mod pick;
pub mod switch;

use crate::addr::{CpuId, CpuSet, MAX_CPUS};
use crate::fault::{Fault, planted};
use crate::prelude::*;
use crate::vcpu::polling;
use core::sync::atomic::AtomicU64;
use cpu::{Cpu, Turn};

pub use cpu::SLICE;

/// How long a step goes on with a list of calls, each of which may be as long as a step by itself, in nanoseconds.
const STEP: u64 = 100_000;

with_new! {
    /// The CPUs, and what they share. Each has a queue of its own, served round robin; one that has nothing to do takes
    /// from the others.
    pub struct Scheduler {
        cpus: [Cpu; MAX_CPUS] = [const { Cpu::new() }; MAX_CPUS],
        /// CPUs that take part.
        online: AtomicU64 = AtomicU64::new(0),
        /// CPUs that sleep, or are about to.
        idle: AtomicU64 = AtomicU64::new(0),
    }
}

impl Scheduler {
    /// This CPU takes part from now on.
    pub fn join<M: Machine>(&self, m: &M) {
        self.online.fetch_or(CpuSet::only(m.this_cpu()).0, SeqCst);
    }

    /// The CPUs that take part.
    #[must_use]
    pub fn online(&self) -> CpuSet {
        CpuSet(self.online.load(SeqCst))
    }

    /// A CPU. (A number that no CPU can have means CPU 0, so that nobody has to say what is done without a CPU.)
    #[must_use]
    pub fn cpu(&self, id: CpuId) -> &Cpu {
        let [first, ..] = &self.cpus;
        nth(&self.cpus, id.0).unwrap_or(first)
    }

    /// The CPU this code runs on.
    pub fn here<M: Machine>(&self, m: &M) -> &Cpu {
        self.cpu(m.this_cpu())
    }

    /// Has a vcpu wait: for the CPU it ran on last, or for a sleeping one if that CPU is busy. A vcpu that serves others is urgent: if
    /// it has just been woken its turn is the next.
    fn push<M: Machine>(&self, m: &M, vcpu: &Vcpu, woken: bool) {
        let last = vcpu.last_cpu();
        let mut sleeping = CpuSet(self.idle.load(SeqCst)).iter();
        let to = if CpuSet(self.idle.load(SeqCst)).has(last) { last } else { sleeping.next().unwrap_or(last) };
        let cpu = self.cpu(to);
        let turn = match woken {
            _ if !vcpu.serves.load(Relaxed) || !cpu.has_urgent_time(m.now()) => Turn::Last,
            true => Turn::Next,
            false => Turn::Soon,
        };
        cpu.push(vcpu.index(), turn);
        // One that sleeps wakes; one that runs a vcpu limits its slice.
        if to != m.this_cpu() {
            m.kick(to);
        }
    }

    /// Takes a vcpu that is to be no more out of its queue, and its deadlines from the CPU that keeps them: its index may name
    /// another one soon. `false` if it is on its way into a queue, or out of one.
    #[must_use]
    pub(crate) fn forget(&self, vcpu: &Vcpu) -> bool {
        let waits = vcpu.place() == Place::Queued;
        let found = self.cpus.iter().filter(|cpu| cpu.is_wanted()).any(|cpu| cpu.remove(vcpu.index()));
        if found {
            vcpu.moves(Place::Queued, Place::Off);
        }
        self.cpu(vcpu.last_cpu()).unwatch(vcpu.index());
        found || !waits
    }

    /// Makes a sleeping vcpu runnable.
    pub fn wake<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let twice = planted(Fault::QueueTwice) && vcpu.place() == Place::Blocked && {
            vcpu.moves(Place::Blocked, Place::Queued);
            true
        };
        if twice || vcpu.moves(Place::Blocked, Place::Queued) {
            vcpu.polling.store(polling::NO, SeqCst);
            vcpu.poll_deadline.store(u64::MAX, Relaxed);
            self.push(m, vcpu, true);
        }
    }

    /// Makes a vcpu that was kept off runnable.
    pub fn start<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        if vcpu.moves(Place::Off, Place::Queued) {
            self.push(m, vcpu, false);
        }
    }

    /// Makes the CPU that runs a vcpu look at what is wanted of it, if that is another CPU.
    pub fn nudge<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        if let Place::Running(cpu) = vcpu.place()
            && cpu != m.this_cpu()
        {
            m.kick(cpu);
        }
    }

    /// A vcpu on this CPU has a deadline: makes sure that it is kept.
    pub fn expect<M: Machine>(&self, m: &M, vcpu: &Vcpu, deadline: u64) {
        let here = self.here(m);
        here.watch(vcpu.index());
        here.arm_by(m, deadline);
    }

    /// Whether a vcpu waits for any CPU.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        self.online().iter().any(|cpu| self.cpu(cpu).is_wanted())
    }

    /// This CPU is about to sleep, or has woken.
    pub fn set_idle<M: Machine>(&self, m: &M, idle: bool) {
        let me = CpuSet::only(m.this_cpu()).0;
        if idle {
            self.idle.fetch_or(me, SeqCst);
        } else {
            self.idle.fetch_and(!me, SeqCst);
        }
    }

    /// When a step of a list of calls that begins now stops: after a while, or when the timer is due.
    pub(crate) fn step_end<M: Machine>(&self, m: &M) -> u64 {
        m.now().saturating_add(STEP).min(self.here(m).armed())
    }
}
