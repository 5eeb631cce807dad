//! The scheduler's state of one CPU: the vcpus in its queue, the one that runs on it, its timer.

use crate::addr::{MAX_VCPUS, ones};
use crate::claim::walks::WalkCache;
use crate::lock::Leaf;
use crate::machine::Clock;
use crate::prelude::*;
use core::sync::atomic::{AtomicU16, AtomicU64};
use heapless::Deque;

with_new! {
    /// One CPU as the scheduler sees it. Vcpus are given by their index into the world's vcpus.
    pub struct Cpu {
        /// The vcpus that wait, in order. A vcpu is in at most one queue, and at most once.
        queue: Leaf<Deque<u16, MAX_VCPUS>> = Leaf::new(Deque::new()),
        /// How many vcpus wait.
        waiting: AtomicU16 = AtomicU16::new(0),
        /// The vcpu that runs, plus one; 0 if none runs.
        running: AtomicU16 = AtomicU16::new(0),
        /// The time to which the timer is set; `u64::MAX` if it is off.
        armed: AtomicU64 = AtomicU64::new(u64::MAX),
        /// The cache of page walks made on this CPU.
        pub walks: WalkCache = WalkCache::new(),
        /// The slot, plus one, of the domain whose pages `walks` has and for whose flushes this CPU is asked; 0 if
        /// there is none.
        pub(super) home: AtomicU16 = AtomicU16::new(0),
        /// The vcpus whose deadlines this CPU keeps, a bit each.
        watched: [AtomicU64; MAX_VCPUS / 64] = [const { AtomicU64::new(0) }; MAX_VCPUS / 64],
        /// Words of `watched` in which a bit was ever set.
        words: AtomicU64 = AtomicU64::new(0),
    }
}

impl Cpu {
    /// Puts a vcpu at the end of the queue.
    pub(super) fn push(&self, vcpu: u16) {
        // There is room for every vcpu, and no vcpu is in the queue twice.
        self.queue.with(|queue| queue.push_back(vcpu).is_ok());
        self.waiting.fetch_add(1, SeqCst);
    }

    /// Takes the vcpu that has waited longest out of the queue.
    pub(super) fn pop(&self) -> Option<u16> {
        if !self.is_wanted() {
            return None;
        }
        let vcpu = self.queue.with(Deque::pop_front)?;
        self.waiting.fetch_sub(1, SeqCst);
        Some(vcpu)
    }

    /// Removes a vcpu from any place in the queue; returns false if it is not in the queue.
    pub(super) fn remove(&self, vcpu: u16) -> bool {
        let gone = self.queue.with(|queue| {
            let before = queue.len();
            for _ in 0..before {
                if let Some(other) = queue.pop_front().filter(|other| *other != vcpu) {
                    let _ = queue.push_back(other); // there is room: it has just been taken out
                }
            }
            before - queue.len()
        });
        self.waiting.fetch_sub(u16::try_from(gone).unwrap_or(0), SeqCst);
        gone > 0
    }

    /// Whether a vcpu waits.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(SeqCst) != 0
    }

    /// The vcpu that runs on this CPU.
    pub(super) fn running(&self) -> Option<u16> {
        self.running.load(Relaxed).checked_sub(1)
    }

    /// Records which vcpu runs on this CPU.
    pub(super) fn set_running(&self, vcpu: Option<u16>) {
        self.running.store(vcpu.map_or(0, |vcpu| vcpu.saturating_add(1)), Relaxed);
    }

    /// Begins to keep the deadlines of a vcpu.
    pub(super) fn watch(&self, vcpu: u16) {
        if let Some(bits) = nth(&self.watched, vcpu / 64) {
            self.words.fetch_or(1 << (vcpu / 64), SeqCst);
            bits.fetch_or(1 << (vcpu % 64), SeqCst);
        }
    }

    /// Stops keeping the deadlines of a vcpu.
    pub(super) fn unwatch(&self, vcpu: u16) {
        if let Some(bits) = nth(&self.watched, vcpu / 64) {
            bits.fetch_and(!(1 << (vcpu % 64)), SeqCst);
        }
    }

    /// Calls `what` for each vcpu whose deadlines this CPU keeps.
    pub(crate) fn for_watched(&self, mut what: impl FnMut(u16)) {
        for word in ones(self.words.load(SeqCst)).map(u64::from).map(low16) {
            let bits = nth(&self.watched, word).map_or(0, |bits| bits.load(SeqCst));
            ones(bits).for_each(|bit| what(word * 64 + low16(bit.into())));
        }
    }

    /// Sets the timer; `u64::MAX` turns it off. Called on this CPU.
    pub(super) fn arm(&self, m: &impl Clock, deadline: u64) {
        self.armed.store(deadline, Relaxed);
        m.arm(deadline);
    }

    /// Makes sure that the timer fires at `deadline` at the latest. Called on this CPU.
    pub fn arm_by(&self, m: &impl Clock, deadline: u64) {
        if deadline < self.armed() {
            self.arm(m, deadline);
        }
    }

    /// The time to which the timer is set.
    pub(super) fn armed(&self) -> u64 {
        self.armed.load(Relaxed)
    }

    /// The vcpus that wait, in order, and how many are counted.
    #[cfg(feature = "planted-fault")]
    pub(crate) fn queue(&self) -> (Deque<u16, MAX_VCPUS>, u16) {
        (self.queue.with(|queue| queue.clone()), self.waiting.load(Relaxed))
    }
}
