//! Which vcpu runs next, on which CPU, and when a timer is due.
//!
//! Touches: each vcpu's [`Place`] (off, blocked, queued or running), the queues and timers of CPUs.
//! Never touches: registers or memory of a guest, except in [`switch`], which loads vcpus into CPUs and takes vcpus out of
//! CPUs, and in [`ops`], which carries out hypercalls and so reads their arguments. Two modules reach guests through others:
//! [`deadlines`] lets the module `event` raise events, and [`life`] lets a `Runner` run guests.
//! Keeps: no event is lost on a vcpu that sleeps. The CPU that wakes a vcpu moves the vcpu from `Blocked` to `Queued` in one
//! atomic step. `block` first moves the vcpu to `Blocked`, and then looks for events once more. A vcpu is in at most one queue,
//! and at most once.

pub(crate) mod budget;
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

/// The time limit of one step of a multicall or of a list of `mmuext_op`, in nanoseconds. A step is the part of a call that is
/// carried out without a break. Between two steps interrupts are let in, and another vcpu may get the CPU. The clock is read
/// only between two entries of the list, so this limit does not cut short an entry that has begun. But an entry that takes long
/// may end the step of its own accord, with `Halt::More`.
const STEP: u64 = 100_000;

with_new! {
    /// The CPUs. Each has its own queue. For *boosted*, *urgent* and *serves* see [`cpu`]. Boosted vcpus come first, in the
    /// order in which they were queued. Of the others, two kinds enter at the front: an urgent vcpu that is woken, and a
    /// preempted vcpu, to finish its slice. All remaining ones enter at the end, and so does a preempted vcpu that ran boosted
    /// and serves, unless it is urgent. A CPU that finds no vcpu to run in its own queue takes one from the queue of another
    /// CPU.
    pub struct Scheduler {
        cpus: [Cpu; MAX_CPUS] = [const { Cpu::new() }; MAX_CPUS],
        /// The CPUs that run vcpus.
        online: AtomicU64 = AtomicU64::new(0),
        /// The CPUs that sleep, or are about to sleep.
        idle: AtomicU64 = AtomicU64::new(0),
    }
}

/// Why a vcpu is queued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Queued {
    /// It slept and was woken.
    Woken,
    /// Its slice is over, or it yielded; or it was `Off`, and is allowed to run now.
    Started,
    /// It was preempted before its slice was over, because a boosted vcpu was queued there or because its own boost ended.
    /// `boosted`: whether it was boosted while it ran.
    Preempted { boosted: bool },
}

impl Scheduler {
    /// Records that this CPU runs vcpus from now on.
    pub fn join<M: Machine>(&self, m: &M) {
        self.online.fetch_or(CpuSet::only(m.this_cpu()).0, SeqCst);
    }

    /// The CPUs that run vcpus.
    #[must_use]
    pub fn online(&self) -> CpuSet {
        CpuSet(self.online.load(SeqCst))
    }

    /// The CPU with number `id`; CPU 0 for a number that no CPU can have, so that callers need not handle that case.
    #[must_use]
    pub fn cpu(&self, id: CpuId) -> &Cpu {
        let [first, ..] = &self.cpus;
        nth(&self.cpus, id.0).unwrap_or(first)
    }

    /// The CPU this code runs on.
    pub fn here<M: Machine>(&self, m: &M) -> &Cpu {
        self.cpu(m.this_cpu())
    }

    /// Puts a vcpu into the queue of the CPU it ran on last, if that CPU is idle or no CPU is idle; otherwise into the queue of
    /// an idle CPU. Kicks the chosen CPU, unless this code runs on that CPU.
    fn push<M: Machine>(&self, m: &M, vcpu: &Vcpu, from: Queued) {
        let last = vcpu.last_cpu();
        let mut sleeping = CpuSet(self.idle.load(SeqCst)).iter();
        let to = if CpuSet(self.idle.load(SeqCst)).has(last) { last } else { sleeping.next().unwrap_or(last) };
        let cpu = self.cpu(to);
        cpu.push(vcpu.index(), self.turn(m, vcpu, cpu, from));
        // If the chosen CPU sleeps, the kick wakes the CPU. If the chosen CPU runs a vcpu, the kick makes the CPU limit that
        // vcpu's slice.
        if to != m.this_cpu() {
            m.kick(to);
        }
    }

    /// At which position a vcpu enters a CPU's queue.
    fn turn<M: Machine>(&self, m: &M, vcpu: &Vcpu, cpu: &Cpu, from: Queued) -> Turn {
        let (serves, now) = (vcpu.serves.load(Relaxed), m.now());
        // A vcpu that serves others is a candidate for a boost only if a boosted vcpu wakes it. One that does not serve is a
        // candidate if it is woken with enough budget, or if it was boosted, gave up its CPU early, and has budget left.
        let boosted = match from {
            Queued::Woken if serves => self.here(m).is_boosted(),
            Queued::Woken => vcpu.may_be_boosted(now),
            Queued::Preempted { boosted: true } => !serves && vcpu.boost_left(now) > 0,
            _ => false,
        };
        if boosted && cpu.has_boost_time(now) {
            return Turn::Boosted;
        }
        let urgent = serves && cpu.has_urgent_time(now);
        match from {
            Queued::Preempted { boosted: true } if serves && !urgent => Turn::Last,
            Queued::Preempted { .. } => Turn::Rest { urgent },
            Queued::Woken if urgent => Turn::Next,
            Queued::Started if urgent => Turn::Soon,
            _ => Turn::Last,
        }
    }

    /// Called when this CPU raises an event for `vcpu`. Boosts `vcpu` if it is queued and serves others, and the vcpu that runs
    /// here is boosted. Usually that one has sent the event; this is not checked.
    pub(crate) fn hand_over<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        if vcpu.serves.load(Relaxed) && self.here(m).is_boosted() && vcpu.place() == Place::Queued {
            let _ = self.cpus.iter().filter(|cpu| cpu.is_wanted()).any(|cpu| cpu.promote(vcpu.index()));
        }
    }

    /// Removes a vcpu of a dying domain from the queue that the vcpu is in, and from the CPU that watches the vcpu's deadlines,
    /// because the vcpu's index may soon belong to another vcpu. Returns `false` if the vcpu is `Queued` but in no queue:
    /// another CPU is about to put the vcpu into a queue, or has just taken the vcpu out. The caller tries again then.
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

    /// Wakes a vcpu if it sleeps: ends the vcpu's poll, and queues the vcpu.
    pub fn wake<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let twice = planted(Fault::QueueTwice) && vcpu.place() == Place::Blocked && {
            vcpu.moves(Place::Blocked, Place::Queued);
            true
        };
        if twice || vcpu.moves(Place::Blocked, Place::Queued) {
            vcpu.polling.store(polling::NO, SeqCst);
            vcpu.poll_deadline.store(u64::MAX, Relaxed);
            self.push(m, vcpu, Queued::Woken);
        }
    }

    /// Queues a vcpu if its place is `Off`.
    pub fn start<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        if vcpu.moves(Place::Off, Place::Queued) {
            self.push(m, vcpu, Queued::Started);
        }
    }

    /// If another CPU runs `vcpu`, kicks that CPU, which then looks at what has changed for the vcpu.
    pub fn nudge<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        if let Place::Running(cpu) = vcpu.place()
            && cpu != m.this_cpu()
        {
            m.kick(cpu);
        }
    }

    /// Makes this CPU, which runs `vcpu`, watch a deadline of the vcpu: the CPU sets its timer for it.
    pub fn expect<M: Machine>(&self, m: &M, vcpu: &Vcpu, deadline: u64) {
        let here = self.here(m);
        here.watch(vcpu.index(), deadline);
        here.arm_by(m, deadline);
    }

    /// Whether any CPU has a queued vcpu.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        self.online().iter().any(|cpu| self.cpu(cpu).is_wanted())
    }

    /// Records that this CPU is about to sleep (`idle`), or has woken.
    pub fn set_idle<M: Machine>(&self, m: &M, idle: bool) {
        let me = CpuSet::only(m.this_cpu()).0;
        if idle {
            self.idle.fetch_or(me, SeqCst);
        } else {
            self.idle.fetch_and(!me, SeqCst);
        }
    }

    /// Returns the deadline of a step that begins now: [`STEP`] from now, or the time to which this CPU's timer is set,
    /// whichever is earlier. After the deadline, the step begins no further entry of its list.
    pub(crate) fn step_end<M: Machine>(&self, m: &M) -> u64 {
        m.now().saturating_add(STEP).min(self.here(m).armed())
    }
}
