//! The CPUs of a machine take turns: each is played by a thread of its own, and one of them goes on at a time. Who goes on is
//! drawn, so that a seed reproduces a run.
//!
//! The turn passes where other CPUs can see what a CPU does: while it runs a guest, sleeps, waits for a lock or for flushes,
//! and, with some odds, before every look of the rules at shared words.

use super::machine::WholeMachine;
use crate::rng::Rng;
use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::thread::Thread;

/// How often all CPUs may wait in a row before that is taken for a deadlock.
const HOPELESS: u64 = 100;
/// How often a CPU waits for a lock after the run has been stopped.
const PATIENCE: u64 = 10_000;

/// Where a CPU stands while another goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum At {
    /// In the middle of the rules.
    Rules,
    /// It waits for a lock, or for others to flush.
    Waiting,
    /// Its guest runs.
    Guest,
    /// It has carried out a step.
    Seen,
    /// It sleeps.
    Asleep,
    /// It has come to its end.
    Gone,
}

/// What one CPU has to do with turns.
#[derive(Debug)]
pub(super) struct Stand {
    at: AtomicU32,
    /// What `progress` was when it found that it has to wait on.
    polled: AtomicU64,
    /// Looks until the next chance for others.
    patience: AtomicU64,
    thread: OnceLock<Thread>,
}

impl Stand {
    pub(super) const fn new() -> Self {
        Self {
            at: AtomicU32::new(At::Rules as u32),
            polled: AtomicU64::new(0),
            patience: AtomicU64::new(0),
            thread: OnceLock::new(),
        }
    }

    pub(super) fn is(&self, at: At) -> bool {
        self.at.load(SeqCst) == at as u32
    }

    /// A CPU that no thread plays: a story says what it does.
    pub(super) fn told() -> Self {
        let stand = Self::new();
        stand.set(At::Asleep);
        stand
    }

    fn set(&self, at: At) {
        self.at.store(at as u32, SeqCst);
    }
}

/// Whose turn it is, and how the next is drawn.
#[derive(Debug)]
pub(super) struct Turns {
    turn: AtomicU32,
    /// Counts what may end somebody's waiting.
    progress: AtomicU64,
    /// How often a CPU found all others waiting.
    hopeless: AtomicU64,
    /// One more than the CPU that has all others come to rest; 0 if none.
    gatherer: AtomicU32,
    /// The run is over.
    stopped: AtomicBool,
    /// How often the turn has passed.
    taken: AtomicU64,
    /// One look in so many gives others a chance.
    pub(super) odds: AtomicU64,
}

impl Turns {
    pub(super) const fn new() -> Self {
        Self {
            turn: AtomicU32::new(u32::MAX),
            progress: AtomicU64::new(1),
            hopeless: AtomicU64::new(0),
            gatherer: AtomicU32::new(0),
            stopped: AtomicBool::new(false),
            taken: AtomicU64::new(0),
            odds: AtomicU64::new(64),
        }
    }
}

/// Which CPU this thread plays.
#[derive(Clone, Copy)]
struct Me {
    machine: Option<&'static WholeMachine>,
    cpu: usize,
    /// The rules are at work, rather than what plays guests and audits.
    in_rules: bool,
}

thread_local! {
    static ME: Cell<Me> = const { Cell::new(Me { machine: None, cpu: 0, in_rules: false }) };
}

/// Number of the CPU this thread plays.
pub(super) fn this_cpu() -> usize {
    ME.with(Cell::get).cpu
}

/// While it lives, nobody comes between what this thread does, except where it lets others on.
#[must_use]
pub struct Outside(bool);

/// The rules do not work from here on.
pub fn outside() -> Outside {
    let me = ME.with(Cell::get);
    ME.with(|cell| cell.set(Me { in_rules: false, ..me }));
    Outside(me.in_rules)
}

impl Drop for Outside {
    fn drop(&mut self) {
        ME.with(|cell| cell.set(Me { in_rules: self.0, ..cell.get() }));
    }
}

/// Does something as another CPU would: this thread has its number meanwhile.
pub fn as_cpu<R>(cpu: usize, work: impl FnOnce() -> R) -> R {
    let me = ME.with(Cell::get);
    ME.with(|cell| cell.set(Me { cpu, ..me }));
    let result = work();
    ME.with(|cell| cell.set(me));
    result
}

/// What a thread panics with that waits when the run is over.
#[derive(Debug)]
pub struct Stopped;

/// Who has had the others come to rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gathered {
    /// We have: all others rest until [`WholeMachine::scatter`].
    ByUs,
    /// Another has, and looked at what we had done.
    ByAnother,
}

/// What this thread is about to look at others may change: they may go on first.
pub(super) fn between() {
    let me = ME.with(Cell::get);
    if let (Some(machine), true) = (me.machine, me.in_rules) {
        machine.chance();
    }
    super::meanwhile::come_between();
}

/// Has simulated CPUs take turns in this process.
pub(super) fn prepare() {
    hv_core::lock::while_waiting(|| match ME.with(Cell::get).machine {
        Some(machine) => machine.waits(),
        None => std::thread::yield_now(),
    });
    hv_core::fault::between_steps(between);
}

impl WholeMachine {
    /// Plays a CPU on this thread, when it is its turn. `life` is what the CPU does; it ends with the run, or with a panic.
    ///
    /// # Errors
    /// What a panic said.
    pub fn play(&'static self, cpu: usize, life: impl FnOnce()) -> Result<(), String> {
        ME.with(|cell| cell.set(Me { machine: Some(self), cpu, in_rules: true }));
        let first = self.stand(cpu).thread.set(std::thread::current());
        assert!(first.is_ok(), "each CPU has one thread");
        self.await_turn(cpu);
        let lived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(life));
        if lived.is_err() {
            self.stop();
        }
        ME.with(|cell| cell.set(Me { in_rules: false, ..cell.get() }));
        self.stand(cpu).set(At::Gone);
        self.progressed();
        if let Some(next) = (0..self.cpu_count()).find(|other| !self.stand(*other).is(At::Gone)) {
            self.give(next);
        }
        lived.or_else(|panic| match panic.downcast_ref::<Stopped>() {
            Some(Stopped) => Ok(()),
            None => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                Err(format!("P7: a panic: {}", text.unwrap_or_default()))
            }
        })
    }

    /// Lets CPU 0 begin, once all threads have come.
    pub fn begin(&self) {
        while (0..self.cpu_count()).any(|cpu| self.stand(cpu).thread.get().is_none()) {
            std::thread::yield_now();
        }
        self.give(0);
    }

    /// The run is over: all CPUs come to their ends as soon as they can.
    pub fn stop(&self) {
        self.turns().stopped.store(true, SeqCst);
        self.turns().gatherer.store(0, SeqCst);
    }

    /// Whether the run is over.
    pub fn is_stopped(&self) -> bool {
        self.turns().stopped.load(SeqCst)
    }

    /// How often the turn has passed from one CPU to another.
    pub fn turns_taken(&self) -> u64 {
        self.turns().taken.load(SeqCst)
    }

    fn give(&self, to: usize) {
        self.turns().turn.store(to as u32, SeqCst);
        if let Some(thread) = self.stand(to).thread.get() {
            thread.unpark();
        }
    }

    fn await_turn(&self, me: usize) {
        while self.turns().turn.load(SeqCst) != me as u32 {
            std::thread::park();
        }
    }

    /// What another CPU waits for may have come.
    pub(super) fn progressed(&self) {
        self.turns().hopeless.store(0, SeqCst);
        self.turns().progress.fetch_add(1, SeqCst);
    }

    /// Lets others on as the dice say; false if nobody else could go on.
    pub(super) fn hand_on(&self, at: At) -> bool {
        let me = this_cpu();
        if self.cpu_count() == 1 {
            return false;
        }
        let here = self.stand(me);
        here.set(at);
        if at == At::Waiting {
            here.polled.store(self.turns().progress.load(SeqCst), SeqCst);
        } else {
            self.progressed();
        }
        let next = self.next(me, at);
        if let Some(next) = next.filter(|next| *next != me) {
            self.rests();
            self.turns().taken.fetch_add(1, SeqCst);
            self.give(next);
            self.await_turn(me);
            self.goes_on();
        }
        if at != At::Waiting {
            here.set(At::Rules);
        }
        next.is_some_and(|next| next != me)
    }

    /// Who goes on: one of those that can.
    fn next(&self, me: usize, at: At) -> Option<usize> {
        let gatherer = self.gatherer();
        let progress = self.turns().progress.load(SeqCst);
        let can = |cpu: &usize| {
            let stand = self.stand(*cpu);
            if *cpu == me {
                return matches!(at, At::Guest) && gatherer.is_none();
            }
            let rested = gatherer.is_none();
            stand.is(At::Rules)
                || stand.is(At::Waiting) && stand.polled.load(SeqCst) < progress
                || rested && (stand.is(At::Guest) || stand.is(At::Seen))
                || rested && stand.is(At::Asleep) && self.wakes(*cpu)
        };
        let able: Vec<usize> = (0..self.cpu_count()).filter(can).collect();
        self.dice(|rng| rng.pick(&able)).or(gatherer.filter(|_| at != At::Rules))
    }

    /// The CPU that has all others come to rest.
    fn gatherer(&self) -> Option<usize> {
        self.turns().gatherer.load(SeqCst).checked_sub(1).map(|cpu| cpu as usize)
    }

    /// The rules are about to look at what others may change: now and then others go on first.
    pub(super) fn chance(&self) {
        let here = self.stand(this_cpu());
        if self.cpu_count() == 1 || std::thread::panicking() {
            return;
        }
        here.set(At::Rules);
        self.progressed(); // it may have let go of a lock since it looked last
        match here.patience.load(SeqCst).checked_sub(1) {
            Some(left) => here.patience.store(left, SeqCst),
            None => {
                let odds = self.turns().odds.load(SeqCst) as usize;
                here.patience.store(self.dice(|rng| rng.below(2 * odds)) as u64, SeqCst);
                self.hand_on(At::Rules);
            }
        }
    }

    /// This CPU waits for a lock: others go on, and it answers them.
    fn waits(&self) {
        assert!(self.cpu_count() > 1, "the only CPU waits for a lock");
        self.answer(this_cpu());
        self.hold_on();
    }

    /// Others go on, because this CPU waits for them.
    pub(super) fn hold_on(&self) {
        let others = self.hand_on(At::Waiting);
        let count = if others { 0 } else { self.turns().hopeless.fetch_add(1, SeqCst) };
        let limit = if self.is_stopped() { PATIENCE } else { HOPELESS };
        if count > limit && !std::thread::panicking() {
            if self.is_stopped() {
                std::panic::resume_unwind(Box::new(Stopped));
            }
            panic!("CPU {} waits for ever: {}", this_cpu(), self.stands());
        }
    }

    /// The guest of this CPU runs: others go on.
    pub fn rest(&self) {
        self.hand_on(At::Guest);
    }

    /// Has all other CPUs come to rest: in a guest, asleep, after a step, or waiting for a vcpu that one of those has.
    pub fn gather(&self) -> Gathered {
        if self.cpu_count() == 1 {
            return Gathered::ByUs;
        }
        if self.gatherer().is_some() {
            self.hand_on(At::Seen);
            return Gathered::ByAnother;
        }
        self.turns().gatherer.store(this_cpu() as u32 + 1, SeqCst);
        self.hand_on(At::Seen);
        Gathered::ByUs
    }

    /// This CPU has carried out a step: others go on.
    pub fn linger(&self) {
        self.hand_on(At::Seen);
    }

    /// Whether all CPUs are to come to rest.
    #[must_use]
    pub fn gathers(&self) -> bool {
        self.gatherer().is_some()
    }

    /// Whether a CPU waits in the middle of the rules.
    #[must_use]
    pub fn somebody_waits(&self) -> bool {
        self.cpu_count() > 1 && (0..self.cpu_count()).any(|cpu| self.stand(cpu).is(At::Waiting))
    }

    /// How many CPUs do not sleep.
    pub fn busy(&self) -> usize {
        (0..self.cpu_count()).filter(|cpu| !self.stand(*cpu).is(At::Asleep) && !self.stand(*cpu).is(At::Gone)).count()
    }

    /// Where all CPUs stand.
    pub fn stands(&self) -> String {
        const NAMES: [&str; 6] = ["in the rules", "waiting", "in a guest", "after a step", "asleep", "gone"];
        let name = |cpu| NAMES.get(self.stand(cpu).at.load(SeqCst) as usize).unwrap_or(&"?");
        (0..self.cpu_count()).map(|cpu| format!("CPU {cpu} {}", name(cpu))).collect::<Vec<_>>().join(", ")
    }

    /// Others may go on.
    pub fn scatter(&self) {
        self.turns().gatherer.store(0, SeqCst);
    }

    /// Whether a flush can be carried out for a CPU: it sleeps, or rests because all are to come to rest, or all end.
    pub(super) fn may_be_answered_for(&self, cpu: usize) -> bool {
        let stand = self.stand(cpu);
        let over = self.is_stopped() || std::thread::panicking();
        let rests = self.gatherer().is_some() && !stand.is(At::Rules);
        rests || over || stand.is(At::Asleep) || stand.is(At::Gone)
    }

    /// A random number, or several.
    pub(super) fn dice<R>(&self, draw: impl FnOnce(&mut Rng) -> R) -> R {
        draw(&mut super::machine::lock(&self.rng))
    }
}
