//! Who runs next, and when a timer is due.
//!
//! Touches: the place of vcpus, one queue, the timer of the CPU.
//! Never touches: registers or memory of a guest.
//! Keeps: a vcpu that sleeps is never forgotten: whoever makes it runnable moves it from `Blocked` to `Queued` in one
//! atomic step, and `block` looks for events once more after it has moved to `Blocked`.

pub mod ops;
pub mod switch;

use crate::addr::{CpuId, CpuSet};
use crate::domain::vcpu::polling;
use crate::domain::with_new;
use crate::lock::Leaf;
use crate::prelude::*;
use crate::world::MAX_VCPUS;
use core::sync::atomic::{AtomicU16, AtomicU64};
use heapless::Deque;
use hypercall_abi::event::Virq;

/// How long a vcpu runs while another waits, in nanoseconds.
pub const SLICE: u64 = 10_000_000;
/// How long a step goes on with a list of calls, each of which may be as long as a step by itself, in nanoseconds.
const STEP: u64 = 100_000;

with_new! {
    /// The run queue: round robin.
    pub struct Scheduler {
        queue: Leaf<Deque<u16, MAX_VCPUS>> = Leaf::new(Deque::new()),
        /// How many are in it.
        waiting: AtomicU16 = AtomicU16::new(0),
        /// CPUs that sleep.
        idle: AtomicU64 = AtomicU64::new(0),
        /// One more than the highest vcpu index in use: bounds the search for deadlines.
        top: AtomicU16 = AtomicU16::new(0),
        /// The time the timer is set to.
        armed: AtomicU64 = AtomicU64::new(u64::MAX),
    }
}

impl Scheduler {
    #[cfg(feature = "planted-fault")]
    pub(crate) fn queue(&self) -> (Deque<u16, MAX_VCPUS>, u16) {
        (self.queue.with(|queue| queue.clone()), self.waiting.load(Relaxed))
    }

    /// A vcpu with this index exists from now on.
    pub(crate) fn admit(&self, index: u16) {
        self.top.fetch_max(index.saturating_add(1), Relaxed);
    }

    fn push<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let index = vcpu.index.load(Relaxed);
        // The queue has room for every vcpu, and each is in it at most once.
        self.queue.with(|queue| queue.push_back(index).is_ok());
        self.waiting.fetch_add(1, Relaxed);
        let sleeping = CpuSet(self.idle.load(SeqCst)).without(m.this_cpu());
        if !sleeping.is_empty() {
            m.kick(CpuId(sleeping.0.trailing_zeros()));
        }
    }

    /// Takes a vcpu that is to be no more out of the queue: its index may name another one soon.
    pub(crate) fn forget(&self, vcpu: &Vcpu) {
        let index = vcpu.index.load(Relaxed);
        let gone = self.queue.with(|queue| {
            let before = queue.len();
            for _ in 0..before {
                if let Some(other) = queue.pop_front().filter(|other| *other != index) {
                    let _ = queue.push_back(other); // there is room: it has just been taken out
                }
            }
            before - queue.len()
        });
        self.waiting.fetch_sub(u16::try_from(gone).unwrap_or(0), Relaxed);
        vcpu.moves(Place::Queued, Place::Off);
    }

    /// Makes a sleeping vcpu runnable.
    pub fn wake<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        if vcpu.moves(Place::Blocked, Place::Queued) {
            vcpu.polling.store(polling::NO, SeqCst);
            vcpu.poll_deadline.store(u64::MAX, Relaxed);
            self.push(m, vcpu);
        }
    }

    /// Makes a vcpu that was kept off runnable.
    pub fn start<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        if vcpu.moves(Place::Off, Place::Queued) {
            self.push(m, vcpu);
        }
    }

    /// Makes the CPU that runs a vcpu look at its events, if that is another CPU.
    pub fn nudge<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let cpu = CpuId(vcpu.cpu.load(Relaxed));
        if cpu != m.this_cpu() {
            m.kick(cpu);
        }
    }

    /// Takes the next vcpu off the queue and marks it running. Those that may not run any more are dropped from it.
    pub fn pick<'a, M: Machine>(&self, m: &M, world: &'a World) -> Option<&'a Vcpu> {
        loop {
            let index = self.queue.with(Deque::pop_front)?;
            self.waiting.fetch_sub(1, Relaxed);
            let Some(vcpu) = nth(&world.vcpus, index) else { continue };
            if wanted(world, vcpu) && vcpu.moves(Place::Queued, Place::Running) {
                vcpu.cpu.store(m.this_cpu().0, Relaxed);
                return Some(vcpu);
            }
            vcpu.moves(Place::Queued, Place::Off);
        }
    }

    /// Puts a vcpu that ran back: to the end of the queue, or off if it may not run any more. One that has blocked is left
    /// alone.
    pub fn put_back<M: Machine>(&self, m: &M, world: &World, vcpu: &Vcpu) {
        if !wanted(world, vcpu) {
            vcpu.moves(Place::Running, Place::Off);
        } else if vcpu.moves(Place::Running, Place::Queued) {
            self.push(m, vcpu);
        }
    }

    /// Whether somebody waits for a CPU.
    pub fn has_waiting(&self) -> bool {
        self.waiting.load(Relaxed) != 0
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

    /// A deadline was set: makes sure that the timer fires by then.
    pub fn expect<M: Machine>(&self, m: &M, deadline: u64) {
        if deadline < self.armed.load(Relaxed) {
            self.armed.store(deadline, Relaxed);
            m.arm(deadline);
        }
    }

    /// Whether the time the timer is set to has come, interrupt or not.
    pub fn is_due<M: Machine>(&self, m: &M) -> bool {
        m.now() >= self.armed.load(Relaxed)
    }

    /// When a step of a list of calls that begins now stops: after a while, or when the timer is due.
    pub(crate) fn step_end<M: Machine>(&self, m: &M) -> u64 {
        m.now().saturating_add(STEP).min(self.armed.load(Relaxed))
    }

    /// Raises what is due and sets the timer to the next deadline, at most `slice_end`.
    pub fn tick<M: Machine>(&self, m: &M, world: &World, slice_end: u64) {
        let now = m.now();
        let mut next = slice_end;
        for vcpu in world.vcpus.iter().take(usize::from(self.top.load(Relaxed))) {
            if vcpu.domain.load(Acquire) == 0 {
                continue;
            }
            let running = vcpu.place() == Place::Running;
            if vcpu.next_deadline(running) <= now {
                expire(m, world, vcpu, now, running);
            }
            next = next.min(vcpu.next_deadline(running));
        }
        self.armed.store(next, Relaxed);
        m.arm(next);
    }
}

/// Whether a vcpu may run at all.
fn wanted(world: &World, vcpu: &Vcpu) -> bool {
    vcpu.online.load(SeqCst) && world.domain_of(vcpu).is_some_and(Domain::runs)
}

fn expire<M: Machine>(m: &M, world: &World, vcpu: &Vcpu, now: u64, running: bool) {
    if vcpu.poll_deadline.load(Relaxed) <= now {
        vcpu.poll_deadline.store(u64::MAX, Relaxed);
        world.sched.wake(m, vcpu);
    }
    let mut ring = vcpu.deadline.load(Relaxed) <= now;
    if ring {
        vcpu.deadline.store(u64::MAX, Relaxed);
    }
    let period = vcpu.period.load(Relaxed);
    if running && period != 0 && vcpu.next_tick.load(Relaxed) <= now {
        vcpu.next_tick.store(now.saturating_add(period), Relaxed);
        ring = true;
    }
    if ring {
        world.raise_virq(m, vcpu, Virq::Timer);
    }
}
