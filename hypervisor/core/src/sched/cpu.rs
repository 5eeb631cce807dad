//! The scheduler's state of one CPU: the vcpus in its queue, the one that runs on it, its timer.

use crate::addr::{MAX_VCPUS, ones};
use crate::claim::walks::WalkCache;
use crate::lock::Leaf;
use crate::machine::{Clock, Devices};
use crate::prelude::*;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use heapless::Deque;

/// How long a vcpu runs while another waits, in nanoseconds.
pub const SLICE: u64 = 10_000_000;
/// How long a vcpu runs while an urgent one waits, in nanoseconds. A guest that sends requests to dom0 goes on for so long,
/// and dom0 then finds several requests at once.
const URGENT_SLICE: u64 = 1_000_000;
/// Nanoseconds that urgent vcpus may run beyond half of the CPU's time before they wait like others. Without this limit a
/// guest that floods dom0 with requests would take the CPU from all others.
const URGENT_DEBT: u64 = 5_000_000;

/// Marks an urgent vcpu in [`Cpu::queue`].
const URGENT: u16 = 1 << 15;
const _: () = assert!(MAX_VCPUS < URGENT as usize);
/// What an urgent vcpu adds to [`Cpu::waiting`] beside 1.
const ONE_URGENT: u32 = 1 << 16;

/// Where a vcpu goes in the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// To the end.
    Last,
    /// To the end, as an urgent one: slices are [`URGENT_SLICE`] until its turn comes.
    Soon,
    /// To the beginning, as an urgent one.
    Next,
}

/// The number of messages of devices, between two ticks, that may raise no port before messages are held back.
const STORM: u32 = 64;
/// How long messages are held back at most, in nanoseconds.
const STORM_PAUSE: u64 = 1_000_000;

with_new! {
    /// One CPU as the scheduler sees it. Vcpus are given by their index into the world's vcpus.
    pub struct Cpu {
        /// The vcpus that wait, in order. [`URGENT`] is added to the index of an urgent one. A vcpu is in at most one queue,
        /// and at most once.
        queue: Leaf<Deque<u16, MAX_VCPUS>> = Leaf::new(Deque::new()),
        /// How many vcpus wait, and in the upper half how many of these are urgent.
        waiting: AtomicU32 = AtomicU32::new(0),
        /// Nanoseconds that urgent vcpus have run while others waited, less half of the time that has passed since.
        urgent_debt: AtomicU64 = AtomicU64::new(0),
        /// When `urgent_debt` was computed last.
        debt_at: AtomicU64 = AtomicU64::new(0),
        /// The vcpu that runs, plus one; 0 if none runs.
        running: AtomicU16 = AtomicU16::new(0),
        /// The time to which the timer is set; `u64::MAX` if it is off.
        armed: AtomicU64 = AtomicU64::new(u64::MAX),
        /// Device messages since the last tick that raised no port.
        useless: AtomicU32 = AtomicU32::new(0),
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
    /// Puts a vcpu into the queue.
    pub(super) fn push(&self, vcpu: u16, turn: Turn) {
        // There is room for every vcpu, and no vcpu is in the queue twice.
        self.queue.with(|queue| match turn {
            Turn::Last => queue.push_back(vcpu).is_ok(),
            Turn::Soon => queue.push_back(vcpu | URGENT).is_ok(),
            Turn::Next => queue.push_front(vcpu | URGENT).is_ok(),
        });
        self.waiting.fetch_add(if turn == Turn::Last { 1 } else { ONE_URGENT + 1 }, SeqCst);
    }

    /// Takes the first vcpu out of the queue.
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
                    Some(other) => _ = queue.push_back(other), // there is room: it has just been taken out
                    None => {}
                }
            }
            gone
        });
        gone.inspect(|queued| self.taken(*queued)).is_some()
    }

    /// A vcpu waits no more.
    fn taken(&self, queued: u16) {
        self.waiting.fetch_sub(if queued & URGENT == 0 { 1 } else { ONE_URGENT + 1 }, SeqCst);
    }

    /// How long the vcpu that runs may run in all, by who waits; `u64::MAX` if nobody does.
    pub(super) fn slice(&self) -> u64 {
        match self.waiting.load(SeqCst) {
            0 => u64::MAX,
            1..ONE_URGENT => SLICE,
            _ => URGENT_SLICE,
        }
    }

    /// Whether urgent vcpus may go before others now: they have not used up their half of the CPU.
    pub(super) fn has_urgent_time(&self, now: u64) -> bool {
        let passed = now.saturating_sub(self.debt_at.swap(now, Relaxed));
        let debt = self.urgent_debt.load(Relaxed).saturating_sub(passed / 2);
        self.urgent_debt.store(debt, Relaxed);
        debt < URGENT_DEBT
    }

    /// Charges urgent vcpus for `ran` nanoseconds that one of them ran while others waited.
    pub(super) fn charge_urgent(&self, ran: u64) {
        self.urgent_debt.fetch_add(ran, Relaxed);
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

    /// Counts a message that raised no port. After [`STORM`] of them, messages are held back until the next tick: a guest that
    /// is interrupted again at each return would never execute an instruction. Called on this CPU.
    pub(crate) fn useless_message(&self, m: &(impl Clock + Devices)) {
        if self.useless.fetch_add(1, Relaxed) == STORM {
            m.hold_messages(true);
            self.arm_by(m, m.now().saturating_add(STORM_PAUSE));
        }
    }

    /// Lets messages in again if they were held back. Called on this CPU.
    pub(super) fn end_storm(&self, m: &impl Devices) {
        if self.useless.load(Relaxed) != 0 && self.useless.swap(0, Relaxed) > STORM {
            m.hold_messages(false);
        }
    }

    /// The vcpus that wait, in order, and how many are counted. `None` if as many urgent ones are not counted.
    #[cfg(feature = "planted-fault")]
    pub(crate) fn queue(&self) -> Option<(Deque<u16, MAX_VCPUS>, u16)> {
        let mut queue = self.queue.with(|queue| queue.clone());
        let (waiting, urgent) =
            (self.waiting.load(Relaxed), queue.iter().filter(|queued| **queued & URGENT != 0).count());
        queue.iter_mut().for_each(|queued| *queued &= !URGENT);
        (index(waiting / ONE_URGENT) == urgent).then_some((queue, low16(waiting.into())))
    }
}
