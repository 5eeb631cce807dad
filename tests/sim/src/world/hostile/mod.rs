//! Plays the guests of a world, watches every step, and cleans up between two episodes.
//!
//! [`domains`] come, and go in the end; [`guest`] has what their guests do, [`player`] how a CPU runs them, and [`watch`] what
//! is checked.
//!
//! What is audited when: on one CPU everything, after each step ([`Audit::look`]). On several, a step of one CPU lies beside
//! those of others, and words can be recounted only where no CPU is in the middle of a step. So after a step, all other CPUs
//! go on to the ends of theirs and rest there, and then everything is audited. In three runs of hostile guests of four, and in
//! every second run of a crowd, that is so after each step: each audit follows at most one step of each CPU. In the others,
//! where steps are to overlap with several of another CPU, it is so after one or two steps of eight, and after [`UNAUDITED`]
//! without an audit at the latest. After the other steps is looked at what holds at any time ([`Audit::glance`]): what CPUs
//! remember, who runs where, and whether a domain has grown beyond its limit. How many steps lie between two audits of all
//! is checked at each: one at least, which the second follows at once. So there are as many steps with an audit of their own as
//! there are audits, and the tests count these ([`super::SHARES`]).

mod domains;
mod guest;
mod player;
mod watch;

use super::audit::{Audit, On};
use super::calls::{Invented, Model};
use super::machine::WholeMachine;
use super::{Totals, build};
use crate::rng::Rng;
use hv_core::addr::{DomainId, Frame};
use hv_core::domain::Life;
use hv_core::domain::life::kept_frames;
use hv_core::fault::{self, Fault};
use hv_core::frame::table::WORDS;
use hv_core::lock::{Held, Nothing};
use hv_core::sched::life;
use hv_core::world::{CpuCtx, World};
use player::Player;
use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard};

/// Frames of the machine: four domains have room besides what is kept from them, so that memory runs out now and then.
const FRAMES: usize = RESERVE + 4 * CONTROLLER + 40;
/// Frames that a controller needs.
const CONTROLLER: usize = build::PAGES + kept_frames(2) as usize;
/// Frames kept from the guests, for a new controller and the one after that.
const RESERVE: usize = 2 * CONTROLLER;
/// After so many steps without an audit of all, all CPUs come to rest for one.
const UNAUDITED: u64 = 8;
/// Steps of an episode; then everything is destroyed.
const EPISODE: u64 = 4_000;
/// Looks at memory and at words of the frame table that one step of a call may take (P8). A flush, a copy of a page or a
/// table of 512 entries are a few.
pub const LONGEST_STEP: u64 = 100_000;

/// Steps in which a call may stand still, because what its domain owes is paid first or its table is long (P8). All that a
/// domain has here can be looked at in fewer.
const STILL: u64 = 32;
/// The same where other CPUs are at work, for which the call may have to wait.
const STILL_WITH_OTHERS: u64 = 1_000;
/// Steps that may end before an interrupt that waits has come in: the call with which a vcpu leaves its CPU, that it leaves,
/// and a step of the unfinished call of the vcpu that comes.
const DEAF: u64 = 3;

/// What the guests are up to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mood {
    /// Anything.
    Hostile,
    /// This domain destroys all others, and then the episode is over.
    Reaping(DomainId),
    /// Nothing that guests should not do; see [`super::crowd`].
    Crowded,
    /// Anything, as another world does it; see [`super::pair`].
    Paired,
}

/// What is known of one CPU.
#[derive(Default)]
struct OneCpu {
    /// Looks at memory when its guest went on, or its last step ended.
    work: u64,
    /// Steps since a key was typed whose interrupt has not come in.
    deaf: u64,
    /// What DR6 is to be for the guest after a single step.
    stepped: Option<u64>,
    /// The vcpu it runs, as it was when the CPU came to rest.
    on: Option<On>,
}

/// What a crowd likes to do: it differs from run to run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tastes {
    /// Domains there are, if memory is left.
    pub(super) domains: usize,
    /// Mostly to change pages.
    pub(super) pages: bool,
    /// To change limits, and to fill them.
    pub(super) greedy: bool,
}

/// Everybody.
pub(super) struct Everybody {
    pub(super) m: &'static WholeMachine,
    pub(super) world: &'static World,
    pub(super) rng: Rng,
    pub(super) models: BTreeMap<u16, Model>,
    audit: Audit,
    totals: Totals,
    /// Calls on their way, by vcpu.
    pending: BTreeMap<u16, Invented>,
    last: VecDeque<String>,
    mood: Mood,
    pub(super) steps: u64,
    pub(super) wanted: u64,
    pub(super) tastes: Tastes,
    episode: u64,
    free: u32,
    /// After so many steps of eight all CPUs come to rest; after the others, steps may overlap with several of other CPUs.
    gathers: usize,
    /// Steps that have ended since the last audit of all.
    unaudited: u64,
    /// The CPU whose turn it is.
    cpu: usize,
    cpus: Vec<OneCpu>,
    /// Where each vcpu's unfinished call stands, and for how many steps it has.
    places: BTreeMap<u16, (String, u64)>,
    /// How often in a row nobody could run.
    pub(super) stuck: u32,
    failure: Option<String>,
}

/// Lets hostile guests take so many steps on so many CPUs, with the audits that the head of this file describes.
///
/// # Errors
/// What the audit found, with the seed, the number of CPUs, the step, and what happened last.
pub fn run(seed: u64, cpus: usize, steps: u64) -> Result<Totals, String> {
    play(seed, cpus, steps, Mood::Hostile)
}

/// A run that begins in a mood.
pub(super) fn play(seed: u64, cpus: usize, steps: u64, mood: Mood) -> Result<Totals, String> {
    let (everybody, late) = everybody(seed, cpus, steps, mood);
    let (m, world) = (everybody.m, everybody.world);
    let everybody = Mutex::new(everybody);
    std::thread::scope(|scope| {
        for cpu in 0..cpus {
            let everybody = &everybody;
            let live =
                move || {
                    let (mut held, mut player) = (Held::entering_ring_0(), Player { m, cpu, late, everybody });
                    // A domain that may turn the machine off does not end the test.
                    let lived = m.play(cpu, || {
                        while life::live(&mut CpuCtx { m, world, held: &mut held }, &mut player).is_some() {}
                    });
                    // A panic of the rules is reported with what led to it.
                    if let Err(why) = lived {
                        _ = lock(everybody).fail(why);
                    }
                };
            std::thread::Builder::new().stack_size(8 << 20).spawn_scoped(scope, live).expect("a thread");
        }
        m.begin();
    });
    let mut everybody = everybody.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(why) = everybody.failure.take() else {
        everybody.totals.steps = everybody.steps;
        everybody.totals.turns = m.turns_taken();
        everybody.totals.worst = everybody.totals.worst.max(everybody.unaudited);
        return Ok(everybody.totals);
    };
    let last = everybody.last.iter().fold(String::new(), |all, line| all + "\n  " + line);
    Err(format!("seed {seed}, {cpus} CPUs, step {}: {why}; last:{last}", everybody.steps))
}

/// A world with its first domain; a guest goes on so long before its CPU answers that is to flush.
pub(super) fn everybody(seed: u64, cpus: usize, steps: u64, mood: Mood) -> (Everybody, usize) {
    let mut rng = Rng::new(seed);
    let m: &'static WholeMachine = Box::leak(Box::new(WholeMachine::with_cpus(FRAMES, cpus, seed)));
    let world: &'static World = Box::leak(Box::new(World::new()));
    let words: Vec<AtomicU64> = (0..FRAMES * WORDS).map(|_| AtomicU64::new(0)).collect();
    world.frames.init(words.leak());
    world.frames.reserve(Frame::from_u32(0), 1);
    world.frames.add(Frame::from_u32(1), FRAMES as u32 - 1);
    m.looks_at(world);
    m.impatient.store(fault::is_planted(Fault::AwaitNoFlush), Relaxed);
    if cpus > 1 {
        m.set_odds(rng.pick(&[3, 12, 50]).unwrap_or(12));
    }
    // Half of the crowds are there for what takes several steps of other CPUs in the middle of one.
    let crowded = mood == Mood::Crowded;
    let gathers = rng.pick(if crowded { &[8, 1, 8, 1] } else { &[8, 8, 8, 2] }).unwrap_or(8);
    let late = if cpus > 1 { rng.pick(&[2, 2, 8]).unwrap_or(2) } else { 2 };
    let tastes = Tastes { domains: 1 + rng.below(3), pages: rng.one_in(2), greedy: rng.one_in(3) };
    let mut everybody = Everybody {
        gathers,
        unaudited: 0,
        tastes,
        m,
        world,
        rng,
        models: BTreeMap::new(),
        audit: Audit::new(FRAMES),
        totals: Totals::default(),
        pending: BTreeMap::new(),
        last: VecDeque::new(),
        mood,
        steps: 0,
        wanted: steps,
        episode: 0,
        free: world.frames.free_frames(),
        cpu: 0,
        cpus: (0..cpus).map(|_| OneCpu::default()).collect(),
        places: BTreeMap::new(),
        stuck: 0,
        failure: None,
    };
    _ = everybody.controller(&mut Held::entering_ring_0());
    (everybody, late)
}

fn lock(everybody: &Mutex<Everybody>) -> MutexGuard<'_, Everybody> {
    everybody.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Everybody {
    fn note(&mut self, what: &'static str) {
        *self.totals.events.entry(what).or_default() += 1;
    }

    pub(super) fn say(&mut self, line: String) {
        if self.last.len() == 12 {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    fn fail(&mut self, why: String) -> ControlFlow<()> {
        let (cpu, stands) = (self.cpu, self.m.stands());
        self.failure.get_or_insert_with(|| format!("{why} (on CPU {cpu}; {stands})"));
        self.end()
    }

    pub(super) fn end(&self) -> ControlFlow<()> {
        self.m.stop();
        ControlFlow::Break(())
    }

    fn here(&mut self) -> &mut OneCpu {
        &mut self.cpus[self.cpu]
    }

    /// Whether there is a domain that gets its memory from outside.
    pub(super) fn is_new(&self) -> bool {
        self.alive().any(|domain| domain.life() == Life::Alive && !self.models.contains_key(&domain.id().0))
    }

    /// What went wrong.
    pub(super) fn take_failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    /// How often a thing of that name happened.
    pub(super) fn noted(&self, what: &str) -> u64 {
        self.totals.events.get(what).copied().unwrap_or(0)
    }

    /// What happened last.
    pub(super) fn last_line(&self) -> String {
        self.last.back().cloned().unwrap_or_default()
    }

    /// Nobody can run and no timer is set: does something about it, from outside.
    pub(super) fn stuck(&mut self, held: &mut Held<Nothing>) -> ControlFlow<()> {
        self.note("times nobody wanted to run");
        self.attend(held)?;
        for domain in self.alive().filter(|domain| domain.life() == Life::Alive) {
            self.world.unpause(self.m, domain);
            for vcpu in self.world.vcpus_of(domain) {
                self.world.sched.wake(self.m, vcpu);
            }
        }
        (self.episode, self.stuck) = (self.episode + 1, self.stuck + 1);
        match self.stuck {
            100.. => self.fail("nobody can run any more".into()),
            _ => ControlFlow::Continue(()),
        }
    }
}
