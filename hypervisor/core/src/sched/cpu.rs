//! The scheduler's state of one CPU: the vcpus in its queue, the one that runs on it, its timer.
//!
//! A vcpu *serves* others if its domain has devices (`Vcpu::serves`), because other domains wait for what it does. It is queued
//! as *urgent*, unless such vcpus have used up their time (`Cpu::has_urgent_time`).

use crate::addr::{MAX_VCPUS, ones};
use crate::claim::walks::WalkCache;
use crate::lock::Leaf;
use crate::machine::{Clock, Devices};
use crate::prelude::*;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use heapless::Deque;

/// How long a vcpu runs while others are queued on its CPU, in nanoseconds.
pub const SLICE: u64 = 10_000_000;
/// How long a vcpu runs while an urgent one is queued on its CPU, in nanoseconds. In this time a guest can send several
/// requests to dom0, which dom0 then finds together.
const URGENT_SLICE: u64 = 1_000_000;
/// How long vcpus that serve others may run beyond half of the CPU's time before they are queued like all others, in
/// nanoseconds. Without this limit, a guest that floods dom0 with requests would take the CPU from all other guests.
const URGENT_DEBT: u64 = 5_000_000;

/// Marks an urgent vcpu in [`Cpu::queue`].
const URGENT: u16 = 1 << 15;
const _: () = assert!(MAX_VCPUS < URGENT as usize);
/// What an urgent vcpu adds to [`Cpu::waiting`], in addition to the 1 that every vcpu adds.
const ONE_URGENT: u32 = 1 << 16;

/// Where a vcpu goes in the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// To the end.
    Last,
    /// To the end, as urgent: slices are [`URGENT_SLICE`] until its turn comes.
    Soon,
    /// To the beginning, as urgent.
    Next,
}

/// How many messages of devices may raise no port between two calls of `World::tick`. The next such message begins a *storm*:
/// messages are held back until the next tick.
const STORM: u32 = 64;
/// The longest that messages are held back in a storm, in nanoseconds.
const STORM_PAUSE: u64 = 1_000_000;

with_new! {
    /// One CPU as the scheduler sees it. Numbers of vcpus are their indices in `World::vcpus`.
    pub struct Cpu {
        /// The queued vcpus, the next one first. [`URGENT`] is added to the index of an urgent one. A vcpu is in the queue of
        /// at most one CPU, and at most once.
        queue: Leaf<Deque<u16, MAX_VCPUS>> = Leaf::new(Deque::new()),
        /// How many vcpus are queued and, in the upper half, how many of these are urgent.
        waiting: AtomicU32 = AtomicU32::new(0),
        /// Nanoseconds that vcpus which serve others have run while others were queued, less half of the time that has passed
        /// up to `debt_at`; at least 0.
        urgent_debt: AtomicU64 = AtomicU64::new(0),
        /// When `urgent_debt` was last reduced by half of the time that had passed.
        debt_at: AtomicU64 = AtomicU64::new(0),
        /// The vcpu that runs, plus one; 0 if none runs.
        running: AtomicU16 = AtomicU16::new(0),
        /// The time to which the timer is set; `u64::MAX` if it is off.
        armed: AtomicU64 = AtomicU64::new(u64::MAX),
        /// Device messages since the last tick that raised no port.
        useless: AtomicU32 = AtomicU32::new(0),
        /// The cache of page walks made on this CPU.
        pub walks: WalkCache = WalkCache::new(),
        /// The slot, plus one, of the domain that ran on this CPU last; 0 if none has run. `walks` has pages of this domain
        /// alone, and this CPU is asked for the domain's flushes.
        pub(super) home: AtomicU16 = AtomicU16::new(0),
        /// The vcpus whose deadlines this CPU keeps: it sets its timer for them. One bit for each vcpu.
        watched: [AtomicU64; MAX_VCPUS / 64] = [const { AtomicU64::new(0) }; MAX_VCPUS / 64],
        /// One bit for each word of `watched`: whether any bit of the word was ever set.
        words: AtomicU64 = AtomicU64::new(0),
    }
}

impl Cpu {
    /// Puts a vcpu into the queue.
    pub(super) fn push(&self, vcpu: u16, turn: Turn) {
        // This cannot fail: there is room for every vcpu, and no vcpu is in the queue twice.
        self.queue.with(|queue| match turn {
            Turn::Last => queue.push_back(vcpu).is_ok(),
            Turn::Soon => queue.push_back(vcpu | URGENT).is_ok(),
            Turn::Next => queue.push_front(vcpu | URGENT).is_ok(),
        });
        self.waiting.fetch_add(if turn == Turn::Last { 1 } else { ONE_URGENT + 1 }, SeqCst);
    }

    /// Takes the first vcpu out of the queue; `None` if the queue is empty.
    pub(super) fn pop(&self) -> Option<u16> {
        if !self.is_wanted() {
            return None;
        }
        let queued = self.queue.with(Deque::pop_front)?;
        self.taken(queued);
        Some(queued & !URGENT)
    }

    /// Removes a vcpu from any place in the queue; returns false if it is not in the queue.
    pub(super) fn remove(&self, vcpu: u16) -> bool {
        let gone = self.queue.with(|queue| {
            let mut gone = None;
            for _ in 0..queue.len() {
                match queue.pop_front() {
                    Some(queued) if queued & !URGENT == vcpu => gone = Some(queued),
                    Some(other) => _ = queue.push_back(other), // there is room: `other` was just taken out
                    None => {}
                }
            }
            gone
        });
        gone.inspect(|queued| self.taken(*queued)).is_some()
    }

    /// Counts one queued vcpu less. `queued` is what the queue had for it: its index, with or without [`URGENT`].
    fn taken(&self, queued: u16) {
        self.waiting.fetch_sub(if queued & URGENT == 0 { 1 } else { ONE_URGENT + 1 }, SeqCst);
    }

    /// How long the running vcpu may run from the start of its turn. This depends on the vcpus that are queued now; `u64::MAX`
    /// if none is.
    pub(super) fn slice(&self) -> u64 {
        match self.waiting.load(SeqCst) {
            0 => u64::MAX,
            1..ONE_URGENT => SLICE,
            _ => URGENT_SLICE,
        }
    }

    /// Whether vcpus that serve others are urgent now: they are unless they have run [`URGENT_DEBT`] beyond half of the time.
    pub(super) fn has_urgent_time(&self, now: u64) -> bool {
        let passed = now.saturating_sub(self.debt_at.swap(now, Relaxed));
        let debt = self.urgent_debt.load(Relaxed).saturating_sub(passed / 2);
        self.urgent_debt.store(debt, Relaxed);
        debt < URGENT_DEBT
    }

    /// Adds to the debt the `ran` nanoseconds of a turn of a vcpu that serves others. Called if others were queued meanwhile.
    pub(super) fn charge_urgent(&self, ran: u64) {
        self.urgent_debt.fetch_add(ran, Relaxed);
    }

    /// Whether any vcpu is queued on this CPU.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(SeqCst) != 0
    }

    /// The vcpu that runs on this CPU; `None` if none runs.
    pub(super) fn running(&self) -> Option<u16> {
        self.running.load(Relaxed).checked_sub(1)
    }

    /// Records which vcpu runs on this CPU.
    pub(super) fn set_running(&self, vcpu: Option<u16>) {
        self.running.store(vcpu.map_or(0, |vcpu| vcpu.saturating_add(1)), Relaxed);
    }

    /// Makes this CPU keep the deadlines of a vcpu.
    pub(super) fn watch(&self, vcpu: u16) {
        if let Some(bits) = nth(&self.watched, vcpu / 64) {
            self.words.fetch_or(1 << (vcpu / 64), SeqCst);
            bits.fetch_or(1 << (vcpu % 64), SeqCst);
        }
    }

    /// Makes this CPU no longer keep the deadlines of a vcpu.
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

    /// Counts a message of a device that raised no port. If there were [`STORM`] already since the last tick, messages are held
    /// back until the next one: a guest that is interrupted again at each return would never execute an instruction. Called on
    /// this CPU.
    pub(crate) fn useless_message(&self, m: &(impl Clock + Devices)) {
        if self.useless.fetch_add(1, Relaxed) == STORM {
            m.hold_messages(true);
            self.arm_by(m, m.now().saturating_add(STORM_PAUSE));
        }
    }

    /// Begins to count useless messages anew, and lets messages in again if they were held back. Called on this CPU.
    pub(super) fn end_storm(&self, m: &impl Devices) {
        if self.useless.load(Relaxed) != 0 && self.useless.swap(0, Relaxed) > STORM {
            m.hold_messages(false);
        }
    }

    /// For an audit: the queued vcpus, in order, and how many `waiting` counts. `None` if `waiting` counts another number of
    /// urgent ones than are in the queue.
    #[cfg(feature = "planted-fault")]
    pub(crate) fn queue(&self) -> Option<(Deque<u16, MAX_VCPUS>, u16)> {
        let mut queue = self.queue.with(|queue| queue.clone());
        let (waiting, urgent) =
            (self.waiting.load(Relaxed), queue.iter().filter(|queued| **queued & URGENT != 0).count());
        queue.iter_mut().for_each(|queued| *queued &= !URGENT);
        (index(waiting / ONE_URGENT) == urgent).then_some((queue, low16(waiting.into())))
    }
}
