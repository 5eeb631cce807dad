//! What belongs to one CPU: the vcpus that wait for it, the one that runs on it, its timer.

use crate::addr::{MAX_VCPUS, ones};
use crate::claim::walks::WalkCache;
use crate::lock::Leaf;
use crate::machine::Clock;
use crate::prelude::*;
use core::sync::atomic::{AtomicU16, AtomicU64};
use heapless::Deque;

with_new! {
    /// One CPU as the scheduler sees it. Vcpus are named by their index into the world's.
    pub struct Cpu {
        /// Vcpus that wait, in order. Each vcpu waits in one queue at most, and at most once.
        queue: Leaf<Deque<u16, MAX_VCPUS>> = Leaf::new(Deque::new()),
        /// How many wait.
        waiting: AtomicU16 = AtomicU16::new(0),
        /// The vcpu that runs, plus one; 0 if none does.
        running: AtomicU16 = AtomicU16::new(0),
        /// The time the timer is set to, `u64::MAX` if it is off.
        armed: AtomicU64 = AtomicU64::new(u64::MAX),
        /// What it has found by walking tables.
        pub walks: WalkCache = WalkCache::new(),
        /// The slot of the domain whose tables those were, plus one; 0 if there was none. It is asked for flushes of that one.
        pub(super) home: AtomicU16 = AtomicU16::new(0),
        /// Vcpus whose deadlines this CPU keeps, a bit each.
        watched: [AtomicU64; MAX_VCPUS / 64] = [const { AtomicU64::new(0) }; MAX_VCPUS / 64],
        /// Words of `watched` that have ever had a bit set.
        words: AtomicU64 = AtomicU64::new(0),
    }
}

impl Cpu {
    /// Has a vcpu wait.
    pub(super) fn push(&self, vcpu: u16) {
        // There is room for every vcpu, and each is there at most once.
        self.queue.with(|queue| queue.push_back(vcpu).is_ok());
        self.waiting.fetch_add(1, SeqCst);
    }

    /// Takes out the vcpu that has waited longest.
    pub(super) fn pop(&self) -> Option<u16> {
        if !self.is_wanted() {
            return None;
        }
        let vcpu = self.queue.with(Deque::pop_front)?;
        self.waiting.fetch_sub(1, SeqCst);
        Some(vcpu)
    }

    /// Takes a vcpu out, wherever in the queue it is; false if it is not.
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

    /// The vcpu that runs.
    pub(super) fn running(&self) -> Option<u16> {
        self.running.load(Relaxed).checked_sub(1)
    }

    /// Notes which vcpu runs.
    pub(super) fn set_running(&self, vcpu: Option<u16>) {
        self.running.store(vcpu.map_or(0, |vcpu| vcpu.saturating_add(1)), Relaxed);
    }

    /// Keeps the deadlines of a vcpu from now on.
    pub(super) fn watch(&self, vcpu: u16) {
        if let Some(bits) = nth(&self.watched, vcpu / 64) {
            self.words.fetch_or(1 << (vcpu / 64), SeqCst);
            bits.fetch_or(1 << (vcpu % 64), SeqCst);
        }
    }

    /// Does not keep the deadlines of a vcpu any more.
    pub(super) fn unwatch(&self, vcpu: u16) {
        if let Some(bits) = nth(&self.watched, vcpu / 64) {
            bits.fetch_and(!(1 << (vcpu % 64)), SeqCst);
        }
    }

    /// Does something with each of the vcpus whose deadlines it keeps.
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

    /// Makes sure that the timer fires by then. Called on this CPU.
    pub fn arm_by(&self, m: &impl Clock, deadline: u64) {
        if deadline < self.armed() {
            self.arm(m, deadline);
        }
    }

    /// The time the timer is set to.
    pub(super) fn armed(&self) -> u64 {
        self.armed.load(Relaxed)
    }

    /// The vcpus that wait, in order, and how many are counted.
    #[cfg(feature = "planted-fault")]
    pub(crate) fn queue(&self) -> (Deque<u16, MAX_VCPUS>, u16) {
        (self.queue.with(|queue| queue.clone()), self.waiting.load(Relaxed))
    }
}
