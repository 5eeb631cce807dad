//! The scheduler's state of one CPU: the vcpus in its queue, the one that runs on it, its timer.
//!
//! A vcpu *serves* others if its domain has devices (`Vcpu::serves`), because other domains wait for what it does. It is queued
//! as *urgent*, unless such vcpus have used up their time ([`Budget::SERVERS`]).
//!
//! A vcpu that uses little of the CPU is *boosted* when it is woken: it runs before all that are not. So is the vcpu that
//! serves others, as long as it is queued, when a boosted one sends it an event, because the sender will wait for the answer.
//! How long boosted vcpus run is limited for each vcpu ([`Budget::GUEST`]), and together with urgent ones for the CPU
//! ([`Budget::AHEAD`]).

use crate::addr::{MAX_VCPUS, ones};
use crate::claim::walks::WalkCache;
use crate::lock::Leaf;
use crate::machine::{Clock, Devices};
use crate::prelude::*;
use crate::sched::budget::Budget;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64};
use heapless::Deque;

/// How long a vcpu runs while others are queued on its CPU, in nanoseconds.
pub const SLICE: u64 = 10_000_000;
/// How long a vcpu runs while an urgent one is queued on its CPU, in nanoseconds. In this time a guest can send several
/// requests to dom0, which dom0 then finds together.
const URGENT_SLICE: u64 = 1_000_000;
/// How long a vcpu runs at least, in nanoseconds, although a boosted one is queued on its CPU. The rest of its slice follows
/// when no boosted one is queued. In this time dom0 can answer several guests.
pub(super) const BOOST_SLICE: u64 = 25_000;

/// How long a boosted vcpu that serves others runs while others are queued, in nanoseconds: dom0 finishes what it is doing and
/// carries a few packets. After that it goes on like one that is not boosted.
pub(super) const HANDED_SLICE: u64 = 100_000;

/// Marks an urgent vcpu in [`Cpu::queue`].
const URGENT: u16 = 1 << 15;
const _: () = assert!(MAX_VCPUS < URGENT as usize);
/// What an urgent vcpu, and what a boosted one, adds to [`Cpu::waiting`], in addition to the 1 that every vcpu adds.
const ONE_URGENT: u64 = 1 << 16;
const ONE_BOOSTED: u64 = 1 << 32;

/// Where a vcpu goes in the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// To the end.
    Last,
    /// To the end, as urgent: slices are [`URGENT_SLICE`] until its turn comes.
    Soon,
    /// To the beginning, as urgent.
    Next,
    /// To the beginning, as urgent or not: its slice is not over.
    Rest { urgent: bool },
    /// Before all that are not boosted.
    Boosted,
}

impl Turn {
    /// What a vcpu with this turn adds to [`Cpu::waiting`].
    const fn weight(self) -> u64 {
        match self {
            Self::Last | Self::Rest { urgent: false } => 1,
            Self::Soon | Self::Next | Self::Rest { urgent: true } => 1 + ONE_URGENT,
            Self::Boosted => 1 + ONE_BOOSTED,
        }
    }
}

/// The queued vcpus of a CPU.
#[derive(Clone, Debug)]
struct Queue {
    /// The boosted ones, the next one first.
    boosted: Deque<u16, MAX_VCPUS>,
    /// All others, the next one first. [`URGENT`] is added to the index of an urgent one.
    others: Deque<u16, MAX_VCPUS>,
}

impl Queue {
    fn push(&mut self, vcpu: u16, turn: Turn) {
        // This cannot fail: there is room for every vcpu, and no vcpu is in the queue twice.
        let _ = match turn {
            Turn::Last => self.others.push_back(vcpu),
            Turn::Soon => self.others.push_back(vcpu | URGENT),
            Turn::Next | Turn::Rest { urgent: true } => self.others.push_front(vcpu | URGENT),
            Turn::Rest { urgent: false } => self.others.push_front(vcpu),
            Turn::Boosted => self.boosted.push_back(vcpu),
        };
    }

    /// Takes the first vcpu out; returns it and its weight.
    fn pop(&mut self) -> Option<(u16, u64)> {
        let boosted = self.boosted.pop_front().map(|vcpu| (vcpu, 1 + ONE_BOOSTED));
        boosted.or_else(|| self.others.pop_front().map(|queued| (queued & !URGENT, weight(queued))))
    }

    /// Takes a vcpu out that is in any place; returns its weight.
    fn remove(&mut self, vcpu: u16) -> Option<u64> {
        let boosted = take(&mut self.boosted, vcpu).map(|_| 1 + ONE_BOOSTED);
        boosted.or_else(|| take(&mut self.others, vcpu).map(weight))
    }
}

/// What a vcpu that is not boosted adds to [`Cpu::waiting`]; `queued` is what the queue has for it.
const fn weight(queued: u16) -> u64 {
    if queued & URGENT == 0 { 1 } else { 1 + ONE_URGENT }
}

/// Takes a vcpu out of a list; returns what the list had for it.
fn take(list: &mut Deque<u16, MAX_VCPUS>, vcpu: u16) -> Option<u16> {
    let mut gone = None;
    for _ in 0..list.len() {
        match list.pop_front() {
            Some(queued) if queued & !URGENT == vcpu => gone = Some(queued),
            Some(other) => _ = list.push_back(other), // there is room: `other` was just taken out
            None => {}
        }
    }
    gone
}

/// How many messages of devices may raise no port between two calls of `World::tick`. The next such message begins a *storm*:
/// messages are held back until the next tick.
const STORM: u32 = 64;
/// The longest that messages are held back in a storm, in nanoseconds.
const STORM_PAUSE: u64 = 1_000_000;

with_new! {
    /// One CPU as the scheduler sees it. Numbers of vcpus are their indices in `World::vcpus`.
    pub struct Cpu {
        /// The queued vcpus. A vcpu is in the queue of at most one CPU, and at most once.
        queue: Leaf<Queue> = Leaf::new(Queue { boosted: Deque::new(), others: Deque::new() }),
        /// How many vcpus are queued and, 16 and 32 bits further up, how many of these are urgent and boosted.
        waiting: AtomicU64 = AtomicU64::new(0),
        /// The [`Budget::SERVERS`] of this CPU.
        servers: AtomicU64 = AtomicU64::new(0),
        /// The [`Budget::AHEAD`] of this CPU.
        ahead: AtomicU64 = AtomicU64::new(0),
        /// The vcpu that runs, plus one; 0 if none runs.
        running: AtomicU16 = AtomicU16::new(0),
        /// Whether the vcpu that runs was queued as boosted.
        boosted: AtomicBool = AtomicBool::new(false),
        /// The time to which the timer is set; `u64::MAX` if it is off.
        armed: AtomicU64 = AtomicU64::new(u64::MAX),
        /// No deadline of a vcpu in `watched` is earlier than this.
        due: AtomicU64 = AtomicU64::new(u64::MAX),
        /// Device messages since the last tick that raised no port.
        useless: AtomicU32 = AtomicU32::new(0),
        /// The cache of page walks made on this CPU.
        pub walks: WalkCache = WalkCache::new(),
        /// The slot, plus one, of the domain that ran on this CPU last; 0 if none has run. `walks` has pages of this domain
        /// alone, and this CPU is asked for the domain's flushes.
        pub(super) home: AtomicU16 = AtomicU16::new(0),
        /// The vcpus whose deadlines this CPU watches: it sets its timer for them. One bit for each vcpu.
        watched: [AtomicU64; MAX_VCPUS / 64] = [const { AtomicU64::new(0) }; MAX_VCPUS / 64],
        /// One bit for each word of `watched`: whether any bit of the word was ever set.
        words: AtomicU64 = AtomicU64::new(0),
    }
}

impl Cpu {
    /// Puts a vcpu into the queue.
    pub(super) fn push(&self, vcpu: u16, turn: Turn) {
        self.queue.with(|queue| queue.push(vcpu, turn));
        self.waiting.fetch_add(turn.weight(), SeqCst);
    }

    /// Takes the first vcpu out of the queue, and returns whether it is boosted; `None` if the queue is empty.
    pub(super) fn pop(&self) -> Option<(u16, bool)> {
        if !self.is_wanted() {
            return None;
        }
        let (vcpu, weight) = self.queue.with(Queue::pop)?;
        self.waiting.fetch_sub(weight, SeqCst);
        Some((vcpu, weight >= ONE_BOOSTED))
    }

    /// Removes a vcpu from any place in the queue; returns false if it is not in the queue.
    pub(super) fn remove(&self, vcpu: u16) -> bool {
        let gone = self.queue.with(|queue| queue.remove(vcpu));
        gone.inspect(|weight| _ = self.waiting.fetch_sub(*weight, SeqCst)).is_some()
    }

    /// Boosts a vcpu that is in the queue; returns false if it is not in the queue.
    pub(super) fn promote(&self, vcpu: u16) -> bool {
        let gone = self.queue.with(|queue| {
            let gone = queue.remove(vcpu);
            gone.inspect(|_| queue.push(vcpu, Turn::Boosted))
        });
        let Some(weight) = gone else { return false };
        self.waiting.fetch_add(Turn::Boosted.weight(), SeqCst);
        self.waiting.fetch_sub(weight, SeqCst);
        true
    }

    /// What decides how long the running vcpu may run. It changes when vcpus are queued or leave the queue.
    pub(super) fn waiting(&self) -> u64 {
        self.waiting.load(SeqCst)
    }

    /// Whether vcpus that serve others are urgent now.
    pub(super) fn has_urgent_time(&self, now: u64) -> bool {
        Budget::SERVERS.has_any(&self.servers, now) && Budget::AHEAD.has_any(&self.ahead, now)
    }

    /// Whether vcpus may be boosted now.
    pub(super) fn has_boost_time(&self, now: u64) -> bool {
        Budget::AHEAD.has_any(&self.ahead, now)
    }

    /// Charges `ran` nanoseconds of a turn that was out of turn: of a vcpu that `serves` others, or was boosted. Called if
    /// others were queued meanwhile.
    pub(super) fn charge(&self, now: u64, ran: u64, serves: bool) {
        Budget::AHEAD.charge(&self.ahead, now, ran);
        if serves {
            Budget::SERVERS.charge(&self.servers, now, ran);
        }
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

    /// Records which vcpu runs on this CPU, and whether it is boosted.
    pub(super) fn set_running(&self, vcpu: Option<u16>, boosted: bool) {
        self.running.store(vcpu.map_or(0, |vcpu| vcpu.saturating_add(1)), Relaxed);
        self.boosted.store(boosted, Relaxed);
    }

    /// Whether the vcpu that runs on this CPU is boosted.
    pub(super) fn is_boosted(&self) -> bool {
        self.boosted.load(Relaxed)
    }

    /// Makes this CPU watch the deadlines of a vcpu, the first of which is `deadline`. Called on this CPU.
    pub(super) fn watch(&self, vcpu: u16, deadline: u64) {
        self.due.store(self.due().min(deadline), Relaxed);
        if let Some(bits) = nth(&self.watched, vcpu / 64) {
            self.words.fetch_or(1 << (vcpu / 64), SeqCst);
            bits.fetch_or(1 << (vcpu % 64), SeqCst);
        }
    }

    /// Makes this CPU no longer watch the deadlines of a vcpu.
    pub(super) fn unwatch(&self, vcpu: u16) {
        if let Some(bits) = nth(&self.watched, vcpu / 64) {
            bits.fetch_and(!(1 << (vcpu % 64)), SeqCst);
        }
    }

    /// No deadline that this CPU watches is earlier than this.
    pub(crate) fn due(&self) -> u64 {
        self.due.load(Relaxed)
    }

    /// Records that no deadline that this CPU watches is earlier than `due`. Called on this CPU.
    pub(super) fn set_due(&self, due: u64) {
        self.due.store(due, Relaxed);
    }

    /// Calls `what` for each vcpu whose deadlines this CPU watches.
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
    /// urgent or boosted ones than are in the queue.
    #[cfg(feature = "planted-fault")]
    pub(crate) fn queue(&self) -> Option<(Deque<u16, MAX_VCPUS>, u16)> {
        let (queue, waiting) = (self.queue.with(|queue| queue.clone()), self.waiting.load(Relaxed));
        let (boosted, urgent) =
            (queue.boosted.len(), queue.others.iter().filter(|queued| **queued & URGENT != 0).count());
        let counted = [waiting / ONE_BOOSTED, waiting % ONE_BOOSTED / ONE_URGENT];
        let mut all = queue.boosted;
        all.extend(queue.others.iter().map(|queued| queued & !URGENT));
        (counted == [boosted, urgent].map(long)).then_some((all, low16(waiting)))
    }
}

/// How long a vcpu may run that is on a CPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slice {
    /// When it came to the CPU.
    pub(super) began: u64,
    /// How long it had run of its slice before, in nanoseconds.
    pub(super) used: u64,
    /// How long it may run at most, in nanoseconds, however much of its slice is left.
    pub(super) most: u64,
    /// Whether it serves others and is boosted. Then it does not begin a slice of its own.
    pub(super) handed: bool,
}

impl Slice {
    /// When the slice ends for good if so many wait (see [`Cpu::waiting`]); `u64::MAX` if none does.
    fn end(&self, waiting: u64) -> u64 {
        let slice = match waiting % ONE_BOOSTED {
            0 => return u64::MAX,
            1..ONE_URGENT => SLICE,
            _ => URGENT_SLICE,
        };
        self.began.saturating_add(slice.saturating_sub(self.used).min(self.most))
    }

    /// When the vcpu leaves the CPU: at the end of the slice, or earlier for a boosted one.
    pub(super) fn leave(&self, waiting: u64) -> u64 {
        let soon = if waiting < ONE_BOOSTED { u64::MAX } else { self.began.saturating_add(BOOST_SLICE) };
        self.end(waiting).min(soon)
    }

    /// How much of the slice is used when the vcpu leaves now for a boosted one, or because a boost has ended. 0 if the slice
    /// is over.
    pub(super) fn used(&self, waiting: u64, now: u64) -> u64 {
        match self.end(waiting) <= now {
            _ if self.handed => 1,
            true => 0,
            false => self.used.saturating_add(now.saturating_sub(self.began)),
        }
    }
}
