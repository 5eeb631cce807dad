//! Who runs next, and when a timer is due.
//!
//! Touches: the place of vcpus, one queue, the timer of the CPU.
//! Never touches: registers or memory of a guest.
//! Keeps: a vcpu that sleeps is never forgotten: whoever makes it runnable moves it from `Blocked` to `Queued` in one
//! atomic step, and `block` looks for events once more after it has moved to `Blocked`.

pub mod ops;
pub mod switch;

use crate::addr::{CpuId, CpuSet};
use crate::domain::vcpu::{Place, Vcpu, polling};
use crate::lock::Leaf;
use crate::machine::Machine;
use crate::world::{MAX_VCPUS, World};
use core::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use heapless::Deque;
use hypercall_abi::event::Virq;

/// How long a vcpu runs while another waits, in nanoseconds.
pub const SLICE: u64 = 10_000_000;

/// The run queue: round robin.
pub struct Scheduler {
    queue: Leaf<Deque<u16, MAX_VCPUS>>,
    /// How many are in it.
    waiting: AtomicU16,
    /// CPUs that sleep.
    idle: AtomicU64,
    /// One more than the highest vcpu index in use: bounds the search for deadlines.
    top: AtomicU16,
    /// The time the timer is set to.
    armed: AtomicU64,
}

impl Scheduler {
    /// Nobody wants to run.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            queue: Leaf::new(Deque::new()),
            waiting: AtomicU16::new(0),
            idle: AtomicU64::new(0),
            top: AtomicU16::new(0),
            armed: AtomicU64::new(u64::MAX),
        }
    }

    #[cfg(feature = "planted-fault")]
    pub(crate) fn queue(&self) -> (Deque<u16, MAX_VCPUS>, u16) {
        (self.queue.with(|queue| queue.clone()), self.waiting.load(Ordering::Relaxed))
    }

    /// A vcpu with this index exists from now on.
    pub(crate) fn admit(&self, index: u16) {
        self.top.fetch_max(index.saturating_add(1), Ordering::Relaxed);
    }

    fn push<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let index = vcpu.index.load(Ordering::Relaxed);
        // The queue has room for every vcpu, and each is in it at most once.
        self.queue.with(|queue| queue.push_back(index).is_ok());
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let sleeping = CpuSet(self.idle.load(Ordering::SeqCst)).without(m.this_cpu());
        if !sleeping.is_empty() {
            m.kick(CpuId(sleeping.0.trailing_zeros()));
        }
    }

    /// Takes a vcpu that is to be no more out of the queue: its index may name another one soon.
    pub(crate) fn forget(&self, vcpu: &Vcpu) {
        let index = vcpu.index.load(Ordering::Relaxed);
        let gone = self.queue.with(|queue| {
            let before = queue.len();
            for _ in 0..before {
                if let Some(other) = queue.pop_front().filter(|other| *other != index) {
                    let _ = queue.push_back(other); // there is room: it has just been taken out
                }
            }
            before - queue.len()
        });
        self.waiting.fetch_sub(u16::try_from(gone).unwrap_or(0), Ordering::Relaxed);
        vcpu.moves(Place::Queued, Place::Off);
    }

    /// Makes a sleeping vcpu runnable.
    pub fn wake<M: Machine>(&self, m: &M, _world: &World, vcpu: &Vcpu) {
        if vcpu.moves(Place::Blocked, Place::Queued) {
            vcpu.polling.store(polling::NO, Ordering::SeqCst);
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
        let cpu = CpuId(vcpu.cpu.load(Ordering::Relaxed));
        if cpu != m.this_cpu() {
            m.kick(cpu);
        }
    }

    /// Takes the next vcpu off the queue and marks it running. Those that may not run any more are dropped from it.
    pub fn pick<'a, M: Machine>(&self, m: &M, world: &'a World) -> Option<&'a Vcpu> {
        loop {
            let index = self.queue.with(Deque::pop_front)?;
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            let Some(vcpu) = world.vcpus.get(usize::from(index)) else {
                continue;
            };
            let wanted =
                world.domain_of(vcpu).is_some_and(crate::domain::Domain::runs) && vcpu.online.load(Ordering::SeqCst);
            if wanted && vcpu.moves(Place::Queued, Place::Running) {
                vcpu.cpu.store(m.this_cpu().0, Ordering::Relaxed);
                return Some(vcpu);
            }
            vcpu.moves(Place::Queued, Place::Off);
        }
    }

    /// Puts a vcpu that ran back: to the end of the queue, or off if it may not run any more. One that has blocked is left
    /// alone.
    pub fn put_back<M: Machine>(&self, m: &M, world: &World, vcpu: &Vcpu) {
        let wanted =
            world.domain_of(vcpu).is_some_and(crate::domain::Domain::runs) && vcpu.online.load(Ordering::SeqCst);
        if !wanted {
            vcpu.moves(Place::Running, Place::Off);
        } else if vcpu.moves(Place::Running, Place::Queued) {
            self.push(m, vcpu);
        }
    }

    /// Whether somebody waits for a CPU.
    pub fn has_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) != 0
    }

    /// This CPU is about to sleep, or has woken.
    pub fn set_idle<M: Machine>(&self, m: &M, idle: bool) {
        let me = CpuSet::only(m.this_cpu()).0;
        if idle {
            self.idle.fetch_or(me, Ordering::SeqCst);
        } else {
            self.idle.fetch_and(!me, Ordering::SeqCst);
        }
    }

    /// A deadline was set: makes sure that the timer fires by then.
    pub fn expect<M: Machine>(&self, m: &M, deadline: u64) {
        if deadline < self.armed.load(Ordering::Relaxed) {
            self.armed.store(deadline, Ordering::Relaxed);
            m.arm(deadline);
        }
    }

    /// Whether the time the timer is set to has come, interrupt or not.
    pub fn is_due<M: Machine>(&self, m: &M) -> bool {
        m.now() >= self.armed.load(Ordering::Relaxed)
    }

    /// Raises what is due and sets the timer to the next deadline, at most `slice_end`.
    pub fn tick<M: Machine>(&self, m: &M, world: &World, slice_end: u64) {
        let now = m.now();
        let mut next = slice_end;
        for vcpu in world.vcpus.iter().take(usize::from(self.top.load(Ordering::Relaxed))) {
            if vcpu.domain.load(Ordering::Acquire) == 0 {
                continue;
            }
            let running = vcpu.place() == Place::Running;
            if vcpu.next_deadline(running) <= now {
                expire(m, world, vcpu, now, running);
            }
            next = next.min(vcpu.next_deadline(running));
        }
        self.armed.store(next, Ordering::Relaxed);
        m.arm(next);
    }
}

impl Default for Scheduler {
    fn default() -> Self {
        Self::new()
    }
}

fn expire<M: Machine>(m: &M, world: &World, vcpu: &Vcpu, now: u64, running: bool) {
    if vcpu.poll_deadline.load(Ordering::Relaxed) <= now {
        vcpu.poll_deadline.store(u64::MAX, Ordering::Relaxed);
        world.sched.wake(m, world, vcpu);
    }
    let mut ring = false;
    if vcpu.deadline.load(Ordering::Relaxed) <= now {
        vcpu.deadline.store(u64::MAX, Ordering::Relaxed);
        ring = true;
    }
    let period = vcpu.period.load(Ordering::Relaxed);
    if running && period != 0 && vcpu.next_tick.load(Ordering::Relaxed) <= now {
        vcpu.next_tick.store(now.saturating_add(period), Ordering::Relaxed);
        ring = true;
    }
    if ring {
        world.raise_virq(m, vcpu, Virq::Timer);
    }
}
