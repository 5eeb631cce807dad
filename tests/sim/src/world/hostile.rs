//! Plays the guests of a world, watches every step, and cleans up between two episodes.
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

use super::audit::{Audit, On, keeps};
use super::build::{self, at, page};
use super::calls::{Invented, Model, Pen};
use super::machine::{GDT_WINDOW, LDT_WINDOW, Race, WholeMachine};
use super::turns::{self, Gathered};
use super::{Context, Totals, crowd};
use crate::rng::Rng;
use hv_core::addr::{DomainId, Frame, GuestVirt};
use hv_core::call::Next;
use hv_core::claim;
use hv_core::domain::life::kept_frames;
use hv_core::domain::{Domain, Life, Powers, Spec};
use hv_core::fault::{self, Fault};
use hv_core::flags;
use hv_core::frame::Use;
use hv_core::frame::table::WORDS;
use hv_core::lean::{self, End};
use hv_core::lock::{Held, Nothing};
use hv_core::machine::{CpuState, Exit, Interrupt, Registers, mode};
use hv_core::sched::life::{self, Runner, Step};
use hv_core::vcpu::debug::DR6_CLEAR;
use hv_core::vcpu::{Place, Vcpu};
use hv_core::world::{Site, World};
use hypercall_abi::grant::{entry, map};
use hypercall_abi::{Errno, Hypercall};
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
/// Steps that may end before an interrupt that waits has come in: the one in which it came, and the next.
const DEAF: u64 = 2;

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
            let live = move || {
                let (mut held, mut player) = (Held::entering_ring_0(), Player { m, cpu, late, everybody });
                // A domain that may turn the machine off does not end the test.
                let lived =
                    m.play(cpu, || while life::live(&mut Site { m, world, held: &mut held }, &mut player).is_some() {});
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

    /// Makes a domain with every power, as boot does.
    pub(super) fn controller(&mut self, held: &mut Held<Nothing>) -> ControlFlow<()> {
        let powers = Powers::all();
        let vcpus = if self.mood == Mood::Crowded { crowd::VCPUS } else { 2 };
        let spec = Spec { powers, vcpus, max_pages: 0, handle: [7; 16] };
        let created = Site { m: self.m, world: self.world, held: &mut *held }.create(&spec).map(Domain::id);
        match created.map(|id| self.world.domain(id).expect("it lives")) {
            Ok(domain) => self.build(held, domain),
            Err(_) => {
                self.note("worlds given up for lack of memory");
                self.end()
            }
        }
    }

    fn build(&mut self, held: &mut Held<Nothing>, domain: &Domain) -> ControlFlow<()> {
        // With several CPUs, most domains use two from the beginning.
        let vcpus = match self.mood {
            Mood::Crowded => crowd::VCPUS,
            _ if self.m.cpu_count() > 1 && !self.rng.one_in(4) => 2,
            _ => 1,
        };
        match build::build(self.m, self.world, held, domain, vcpus) {
            Ok(pages) => {
                self.models.insert(domain.id().0, Model { pages, ..Model::default() });
                self.note("domains built");
            }
            Err(_) => {
                self.models.insert(domain.id().0, Model::default());
                self.note("domains that got too little memory");
            }
        }
        ControlFlow::Continue(())
    }

    fn alive(&self) -> impl Iterator<Item = &'static Domain> + use<> {
        self.world.domains.iter().filter(|domain| domain.life() != Life::Free)
    }

    /// Whether a domain has a vcpu that may run one day.
    fn able(&self, domain: &Domain) -> bool {
        let mut vcpus = self.world.vcpus_of(domain);
        domain.runs() && vcpus.any(|vcpu| vcpu.is_online() && vcpu.place() != Place::Off)
    }

    /// Domains that were made by a call get their memory; if nobody who controls others is left, a new one comes.
    pub(super) fn attend(&mut self, held: &mut Held<Nothing>) -> ControlFlow<()> {
        if self.mood == Mood::Crowded {
            self.forgotten()?;
            return self.gather_crowd(held);
        }
        let new: Vec<&Domain> = self
            .alive()
            .filter(|domain| domain.life() == Life::Alive && !self.models.contains_key(&domain.id().0))
            .collect();
        for domain in new {
            self.build(held, domain)?;
        }
        self.models.retain(|id, _| self.world.domains.iter().any(|d| d.life() != Life::Free && d.id().0 == *id));
        if let Mood::Reaping(id) = self.mood
            && let Some(reaper) = self.world.domain(id)
        {
            self.world.unpause(self.m, reaper);
        }
        let reaps = |domain: &Domain| match self.mood {
            Mood::Reaping(id) => domain.id() == id && self.able(domain),
            Mood::Hostile | Mood::Crowded | Mood::Paired => false,
        };
        if self.episode >= EPISODE && !self.alive().any(reaps) {
            self.make_room();
            self.controller(held)?;
            let newest = self.alive().filter(|domain| domain.may(Powers::CONTROL) && self.able(domain));
            let reaper = newest.max_by_key(|domain| domain.id());
            self.mood = reaper.map_or(Mood::Hostile, |reaper| Mood::Reaping(reaper.id()));
        } else if !self.controlled() {
            self.make_room();
            self.controller(held)?;
            self.note("controllers replaced");
        }
        self.set_aside();
        ControlFlow::Continue(())
    }

    /// Whether a domain controls others, or does when it is not kept paused any more.
    fn controlled(&self) -> bool {
        let controls = |domain: &&Domain| domain.life() == Life::Alive && domain.may(Powers::CONTROL);
        if !self.alive().filter(controls).any(|domain| self.able(domain)) {
            self.alive().filter(controls).for_each(|domain| self.world.unpause(self.m, domain));
        }
        self.alive().filter(controls).any(|domain| self.able(domain))
    }

    /// The guests may have all the memory: what was set aside is for a domain that must come.
    fn make_room(&mut self) {
        // No more than one domain needs: the next may have to come before anything has been returned.
        let left = self.audit.reserve.len().saturating_sub(CONTROLLER);
        self.audit.reserve.drain(left..).for_each(|frame| self.world.frames.retire(frame));
    }

    fn set_aside(&mut self) {
        while self.audit.reserve.len() < RESERVE && self.world.frames.unpromised_frames() > 0 {
            self.audit.reserve.extend(self.world.frames.allocate(self.m));
        }
    }

    /// A step has been taken.
    fn count_step(&mut self) {
        if self.m.busy() > 1 {
            self.note("steps while other CPUs were at work");
        }
        (self.steps, self.episode, self.stuck) = (self.steps + 1, self.episode + 1, 0);
        self.unaudited += 1;
        if self.steps >= self.wanted && self.mood == Mood::Hostile {
            self.episode = self.episode.max(EPISODE);
        }
    }

    /// The most steps that end between two audits of all: those after which not all CPUs come to rest, and those that others
    /// are in the middle of when all are to.
    fn most_unaudited(&self) -> u64 {
        let others = self.m.cpu_count() as u64 - 1;
        others + if others == 0 || self.gathers == 8 { 1 } else { UNAUDITED }
    }

    /// The audit, of all or, while others are in the middle of something, of what holds at any time.
    fn look(&mut self, all: bool) -> ControlFlow<()> {
        let found = if all {
            let (steps, most) = (std::mem::take(&mut self.unaudited), self.most_unaudited());
            if steps == 0 || steps > most {
                return self.fail(format!("{steps} steps between two audits of all, and 1 to {most} should be"));
            }
            self.totals.audits += 1;
            self.totals.worst = self.totals.worst.max(steps);
            let on: Vec<On> = self.cpus.iter().filter_map(|cpu| cpu.on).collect();
            self.audit.look(self.m, self.world, &on)
        } else {
            let on: Vec<On> = self.here().on.into_iter().collect();
            self.audit.glance(self.m, self.world, &on)
        };
        match found {
            Ok(()) => ControlFlow::Continue(()),
            Err(why) => self.fail(why),
        }
    }

    /// A call that goes on gets somewhere, and keeps no interrupt out.
    fn goes_on(&mut self, ctx: &Context<'_>, what: Step) -> Result<(), String> {
        let index = ctx.vcpu.index();
        match ctx.own.call.filter(|_| matches!(what, Step::Call(_))).map(|call| format!("{call:?}")) {
            Some(place) => {
                let (last, still) = self.places.entry(index).or_default();
                *still = if *last == place { *still + 1 } else { 0 };
                *last = place;
                if *still > if self.m.cpu_count() > 1 { STILL_WITH_OTHERS } else { STILL } {
                    return Err(format!("P8: {still} steps, and no further than {last}"));
                }
            }
            None if what != Step::Gone => _ = self.places.remove(&index),
            None => {}
        }
        let (typed, several) = (self.m.has_typed(), self.m.cpu_count() > 1);
        let here = self.here();
        here.deaf = if typed { here.deaf + 1 } else { 0 };
        if here.deaf > DEAF + 2 * u64::from(several) {
            return Err(format!("P8: an interrupt has waited for {} steps", here.deaf));
        }
        if self.rng.one_in(16) {
            self.m.type_key();
        }
        Ok(())
    }

    fn counted(&mut self, done: Invented, ok: bool) {
        let count = self.totals.calls.entry((done.call.name(), done.op)).or_default();
        *count = (count.0 + 1, count.1 + u64::from(ok));
    }

    /// All but the reaper are gone: nothing may be left of them.
    fn funeral(&mut self, ctx: &Context<'_>, reaper: DomainId) -> ControlFlow<()> {
        let owned = self.world.frames.owned(reaper);
        let kept = owned + keeps(ctx.world, ctx.domain) + self.audit.reserve.len() as u32;
        let free = self.world.frames.free_frames();
        if free + kept != self.free {
            return self.fail(format!("P11: {free} frames free and {kept} in use of {} at the beginning", self.free));
        }
        self.note("times everything was destroyed");
        (self.mood, self.episode) = (Mood::Hostile, 0);
        if self.steps >= self.wanted { self.end() } else { ControlFlow::Continue(()) }
    }

    /// P12, and that the CPU has loaded what the vcpu owns.
    fn fit_to_run(&mut self, ctx: &Context<'_>) -> Result<(), String> {
        let regs = &ctx.own.regs;
        if regs.cs & !0xffff != 0 || regs.cs & 3 != 3 || regs.ss & !0xffff != 0 || regs.ss & 3 != 3 {
            return Err(format!("P12: cs {:#x}, ss {:#x}", regs.cs, regs.ss));
        }
        if regs.rflags & !(flags::GUEST | flags::IF) != 0 || regs.rflags & (flags::IF | 2) != flags::IF | 2 {
            return Err(format!("P12: rflags {:#x}", regs.rflags));
        }
        let loaded = ctx.m.loaded().clone();
        if loaded.root.is_none() || loaded.root != ctx.own.root() {
            return Err(format!("P12: root {:?} is loaded, {:?} should be", loaded.root, ctx.own.root()));
        }
        let same = loaded.gdt == ctx.own.gdt
            && loaded.ldt == ctx.own.ldt_mapped
            && loaded.ldt_entries == ctx.own.ldt_entries
            && loaded.cr4 == ctx.own.cr4
            && loaded.xcr0 == ctx.own.xcr0
            && loaded.tsc_aux == ctx.own.tsc_aux
            && loaded.task_switched == ctx.own.task_switched;
        if !same {
            return Err(format!("F: {loaded:?} is loaded"));
        }
        let on =
            |dr7: u64| dr7 & 0xff & !(0..4).filter(|n| dr7 >> (16 + 4 * n) & 3 == 2).fold(0, |on, n| on | 3 << (2 * n));
        if on(ctx.own.debug[7]) != loaded.debug[7] & 0xff || loaded.debug[6] != DR6_CLEAR {
            return Err(format!("F: breakpoints {:x?} are loaded, not {:x?}", loaded.debug, ctx.own.debug));
        }
        if loaded.sysenter != (ctx.own.callbacks.sysenter.address != 0) {
            return Err(format!("F: SYSENTER is {}, the vcpu has {:?}", loaded.sysenter, ctx.own.callbacks.sysenter));
        }
        let shown = loaded.gdt.iter().chain(&loaded.ldt).flatten();
        for frame in shown {
            if !ctx.world.frames.holds_descriptors(*frame) {
                return Err(format!("P12: {frame:?} is shown to the CPU and holds no descriptors"));
            }
        }
        Ok(())
    }

    /// What the entry code of this CPU may do for the guest is what the rules would.
    fn entry_is_sound(&self, ctx: &Context<'_>) -> Result<(), String> {
        let (entry, own, frames) = (ctx.m.entry(), &*ctx.own, &ctx.world.frames);
        let value = |word: &AtomicU64| word.load(Relaxed);
        let kernel = match value(&entry.mode) {
            mode::LONG => return Ok(()),
            now => now == mode::KERNEL,
        };
        let root = |root: Option<Frame>| root.map_or(0, Frame::address);
        let known = [
            kernel.into(),
            value(&entry.kernel_cr3),
            value(&entry.user_cr3),
            value(&entry.syscall),
            value(&entry.info),
        ];
        let record = ctx.vcpu.record().map_or(0, |(frame, at)| frame.address() + at as u64);
        let right =
            [own.kernel_mode.into(), root(own.kernel_root), root(own.user_root), own.callbacks.syscall.address, record];
        if known != right || own.nmi_masked || own.areas_stale || !own.callbacks.syscall.masks_events {
            return Err(format!("P12: the entry code knows {known:x?}, and not {right:x?}"));
        }
        for (what, at, sp) in [("frame", &entry.frame, &entry.frame_sp), ("back", &entry.back, &entry.back_sp)] {
            let (page, sp) = (Frame::containing(value(at)), value(sp));
            let kind = page.and_then(|page| frames.info(page)).map(|info| info.kind);
            if !kind.is_some_and(|kind| kind.used_as == Use::Writable) {
                return Err(format!("P1: the entry code writes its {what} to {page:?}, which is {kind:?}"));
            }
            let path = own.kernel_root.and_then(|root| claim::walk(ctx.m, frames, root, GuestVirt(sp)));
            let there = path.filter(|path| path.writable && path.user).and_then(|path| path.frame());
            if there != page && ctx.m.cpu_count() == 1 {
                return Err(format!("P4: the entry code has its {what} in {page:?}, and the guest in {there:?}"));
            }
        }
        Ok(())
    }

    /// What ring 3 can do without asking: change its registers.
    fn registers(&mut self, regs: &mut Registers) {
        let rng = &mut self.rng;
        if !rng.one_in(300) {
            regs.rsp = at(page::STACK + 1) - 8 * rng.below(200) as u64;
        } else {
            regs.rsp = rng.word();
        }
        if rng.one_in(3) {
            regs.rip = at(page::CODE) + rng.below(0x700) as u64;
        }
        regs.rflags ^= rng.word() & 0xcd5; // arithmetic flags and DF
        for n in [0, 1, 2, 3, 6, 7, 8, 9, 12] {
            if rng.one_in(2) {
                *regs.general_mut(n) = rng.word() >> rng.below(64);
            }
        }
    }

    /// What a guest does to its own memory and what it shares.
    fn scribble(&mut self, ctx: &Context<'_>) {
        let domain = ctx.domain;
        match self.rng.below(6) {
            0 | 5 => {
                // It grants a page.
                let tables: Vec<Frame> = domain.grants.table_frames().collect();
                let others: Vec<u16> = self.alive().map(|d| d.id().0).collect();
                let pages = self.models.get(&domain.id().0).map(|model| model.pages.clone()).unwrap_or_default();
                let (Some(table), Some(to), Some(_)) = (tables.first(), self.rng.pick(&others), pages.first()) else {
                    return;
                };
                let n = if self.rng.one_in(8) { 0 } else { page::DATA };
                let frame = pages.get(n + self.rng.below(pages.len() - n)).map_or(0, |f| f.number());
                let read_only = if self.rng.one_in(4) { entry::READONLY } else { 0 };
                let flags = if self.rng.one_in(8) { self.rng.below(0x200) as u16 } else { entry::PERMIT_ACCESS };
                let word = u64::from(flags | read_only) | u64::from(to) << 16 | frame << 32;
                self.m.poke(*table, self.rng.below(24), word);
            }
            1 => {
                if let Some(shared) = domain.shared_info() {
                    // Pending, masked, upcalls: all of it is the guest's to change.
                    let at = self.rng.pick(&[0, 0, 1, 8, 0x100, 0x140, 0x180]).unwrap_or(0);
                    let value = self.rng.pick(&[0, 1, u64::MAX, 0x100]).unwrap_or(0);
                    self.m.poke(shared, at, value);
                }
            }
            2 => {
                // Upcalls are let in.
                if let Some(shared) = domain.shared_info() {
                    self.m.poke(shared, 0, 0);
                    (0x140..0x180).for_each(|at| self.m.poke(shared, at, 0));
                }
            }
            _ => {}
        }
    }

    /// A page as a table: what the guest prepares while it may write it, before it maps it read-only. Here the frame is
    /// written directly, if nothing but a read-only mapping leads to it.
    fn prepare_table(&mut self, ctx: &Context<'_>) {
        let Some(model) = self.models.get(&ctx.domain.id().0) else { return };
        let spare = self.rng.pick(&page::SPARE).unwrap_or(0);
        let (Some(frame), Some(target)) = (model.pages.get(spare), self.rng.pick(&model.pages)) else { return };
        let idle = |info: hv_core::frame::table::Info| {
            info.kind.count == 0
                && info.owner.allocated
                && info.owner.owner == hv_core::frame::Owner::Guest(ctx.domain.id())
        };
        if ctx.world.frames.info(*frame).is_some_and(idle) {
            // A real guest would map it writable for this; that it has not been since is what matters.
            let at = self.rng.below(512);
            let bits = self.rng.pick(&[0x25u64, 0x27, 0x67, 0x61, 0]).unwrap_or(0);
            self.m.poke(*frame, at, if bits == 0 { 0 } else { target.address() | bits });
        }
    }

    fn hypercall(&mut self, ctx: &mut Context<'_>) -> Exit {
        let model = self.models.get(&ctx.domain.id().0).cloned().unwrap_or_default();
        let mut pen = Pen { rng: &mut self.rng, ctx, model: &model };
        let invented = match self.mood {
            Mood::Reaping(id) if id == ctx.domain.id() => {
                let next = self.world.domains.iter().find(|d| d.life() != Life::Free && d.id() != id);
                match next {
                    Some(domain) => pen.destroy(domain.id().0),
                    None => {
                        return Exit::Interrupt(Interrupt::Other);
                    }
                }
            }
            _ => {
                let dead = |d: &&Domain| match d.life() {
                    Life::Free => false,
                    Life::Alive => d.shutdown_reason().is_some(),
                    Life::Dying => true,
                };
                let dead = self.world.domains.iter().find(dead).filter(|_| ctx.domain.may(Powers::CONTROL));
                match dead {
                    // Its memory is wanted where the reserve has been used.
                    Some(dead) if pen.rng.one_in(if self.audit.reserve.len() < RESERVE { 2 } else { 6 }) => {
                        pen.destroy(dead.id().0)
                    }
                    _ => {
                        // With several CPUs a domain that is paused may be on its way off one.
                        let pauses = self.m.cpu_count() > 1
                            && self.mood == Mood::Hostile
                            && ctx.domain.may(Powers::CONTROL)
                            && pen.rng.one_in(10);
                        let other = |d: &&Domain| d.life() == Life::Alive && d.id() != ctx.domain.id();
                        let others: Vec<u16> = self.world.domains.iter().filter(other).map(|d| d.id().0).collect();
                        match pen.rng.pick(&others) {
                            Some(other) if pauses => pen.pause(other),
                            _ if self.m.cpu_count() > 1 && pen.rng.one_in(5) => pen.retype(),
                            _ => pen.invent(),
                        }
                    }
                }
            }
        };
        let rsp = if invented.call == Hypercall::Iret && !pen.rng.one_in(30) { Some(pen.iret_frame()) } else { None };
        let number =
            if pen.rng.one_in(100) && self.mood == Mood::Hostile { pen.edge() } else { invented.call.number() };
        ctx.own.regs.rsp = rsp.unwrap_or(ctx.own.regs.rsp);
        self.call(ctx, invented, number)
    }

    /// A call, of this number.
    pub(super) fn call(&mut self, ctx: &mut Context<'_>, invented: Invented, number: u64) -> Exit {
        let regs = &mut ctx.own.regs;
        regs.rax = number;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = invented.args;
        if number == invented.call.number() {
            self.pending.insert(ctx.vcpu.index(), invented);
        } else {
            self.pending.remove(&ctx.vcpu.index());
        }
        let (id, vcpu) = (ctx.domain.id(), ctx.vcpu.number().0);
        self.say(format!("{id}v{vcpu} {}({}) {:x?}", invented.call.name(), invented.op, invented.args));
        let regs = &mut ctx.own.regs;
        (regs.rcx, regs.r11) = (regs.rip, regs.rflags);
        Exit::Syscall
    }

    fn fault(&mut self, ctx: &mut Context<'_>) -> Exit {
        let rng = &mut self.rng;
        let common = [14, 14, 14, 13, 13, 13, 6, 0x80, 1, 3, 7, 0, 4, 5, 8, 10, 11, 12, 16, 17, 19, 21];
        let vector = if rng.one_in(500) { rng.below(32) as u8 } else { rng.pick(&common).unwrap_or(14) };
        let user = 4; // guest kernel and guest user code are in ring 3
        let (mut error, mut address) = (0, 0);
        match vector {
            14 => {
                let windows = [GDT_WINDOW, LDT_WINDOW, LDT_WINDOW + 8, LDT_WINDOW + 0xfff8];
                (error, address) = match rng.below(8) {
                    0 | 1 => (0, rng.pick(&windows).unwrap_or(0)),
                    2 => (rng.below(8) as u32, rng.word()),
                    3..=5 => (7, at(page::L1) + 8 * (build::PAGES + rng.below(30)) as u64),
                    _ => (4 | rng.below(32) as u32 & !8, at(rng.below(64))),
                };
                // The CPU reads descriptors with rights of its own.
                error |= if windows.contains(&address) { 0 } else { user };
                if rng.one_in(2000) {
                    error |= 8;
                }
            }
            13 => error = if rng.one_in(3) { (rng.below(256) as u32) << 3 | 2 } else { 0 },
            8 | 10 | 11 | 12 | 17 | 21 => error = rng.below(0x1_0000) as u32,
            _ => {}
        }
        if rng.one_in(6) {
            let vector = 11 + rng.below(4) as u8;
            let address = if vector == 14 { GDT_WINDOW + 8 * rng.below(0x2000) as u64 } else { 0 };
            return Exit::ReturnFault { vector, error: if vector == 14 { 0 } else { error }, address };
        }
        self.code(ctx, address);
        if vector == 1 {
            self.step(ctx);
        }
        Exit::Fault { vector, error, address }
    }

    /// The guest steps to where somebody may have a breakpoint. DR6 is to name its own, and nobody else's.
    fn step(&mut self, ctx: &mut Context<'_>) {
        let to = build::BREAKPOINTS + self.rng.below(2) as u64;
        ctx.own.regs.rip = to;
        self.m.single_step(to);
        let own = (0..4).filter(|&n| ctx.own.debug[n] == to).fold(0, |bits, n| bits | 1 << n);
        self.here().stepped = Some(ctx.own.debug[6] | DR6_CLEAR | 1 << 14 | own);
        self.note("single steps");
    }

    /// Puts an instruction where the guest stands.
    fn code(&mut self, ctx: &mut Context<'_>, address: u64) {
        const CODE: [&[u8]; 44] = [
            &[0x0f, 0x31],
            &[0x0f, 0x01, 0xf9],
            &[0xfa],
            &[0xfb],
            &[0xec],
            &[0xed],
            &[0x66, 0xed],
            &[0xe4, 0x42],
            &[0xee],
            &[0xef],
            &[0x0f, 0x20, 0xc0],
            &[0x0f, 0x22, 0xc0],
            &[0x0f, 0x20, 0xd0],
            &[0x0f, 0x22, 0xd3],
            &[0x0f, 0x20, 0xd8],
            &[0x0f, 0x22, 0xd8],
            &[0x0f, 0x20, 0xe0],
            &[0x0f, 0x22, 0xe3],
            &[0x0f, 0x21, 0xf8],
            &[0x0f, 0x23, 0xfb],
            &[0x0f, 0x23, 0xc3],
            &[0x0f, 0x06],
            &[0x0f, 0x32],
            &[0x0f, 0x30],
            &[0x0f, 0x01, 0xd1],
            &[0x0f, 0x09],
            &[0x0f, 0xa2],
            &[0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2],
            &[0xcd, 0x20],
            &[0xcd, 0x81],
            &[0x48, 0x89, 0x18],
            &[0x48, 0x87, 0x18],
            &[0xf0, 0x48, 0x0f, 0xb1, 0x18],
            &[0x89, 0x18],
            &[0x88, 0x38],
            &[0x66, 0x89, 0x18],
            &[0x48, 0xc7, 0x00, 0, 0, 0, 0],
            &[0xf0, 0x48, 0x0f, 0xba, 0x28, 1],
            &[0xf0, 0x48, 0x0f, 0xba, 0x30, 63],
            &[0x48, 0x81, 0x08, 0x42, 0, 0, 0],
            &[0x48, 0x83, 0x20, 0xbf],
            &[0x64, 0x48, 0x89, 0x18],
            &[0x65, 0x48, 0x89, 0x04, 0xd8],
            &[0xc7, 0x40, 0x04, 0, 0, 0, 0],
        ];
        let mut bytes = self.rng.pick(&CODE).unwrap_or(&[0xfa]).to_vec();
        if self.rng.one_in(6) {
            let n = self.rng.below(bytes.len());
            bytes[n] = self.rng.below(256) as u8;
        }
        let near_the_end = self.rng.one_in(8);
        let to = if near_the_end { at(page::CODE + 1) - self.rng.below(16) as u64 } else { at(page::CODE) + 64 };
        let model = self.models.get(&ctx.domain.id().0).cloned().unwrap_or_default();
        let (rbx, rcx, rdx) = {
            let mut pen = Pen { rng: &mut self.rng, ctx, model: &model };
            pen.write(to, &bytes);
            let frame = model.pages.get(page::DATA).map_or(0, |f| f.address());
            let root = model.pages.first().map_or(0, |f| f.address());
            let choices = [frame | 0x27, frame | 0x25, 0, root, pen.edge(), 0x8005_0033, 7];
            let msrs =
                [0x10, 0x1b, 0x277, 0xc000_0080, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0xc000_0103, 0x4000_0000];
            let rbx = pen.rng.pick(&choices).unwrap_or(0);
            let rcx = if pen.rng.one_in(4) { pen.edge() } else { pen.rng.pick(&msrs).unwrap_or(0) };
            (rbx, rcx, pen.edge())
        };
        let regs = &mut ctx.own.regs;
        regs.rip = to;
        regs.rbx = rbx;
        regs.rax = if address != 0 { address } else { rbx };
        if self.rng.one_in(2) {
            (regs.rcx, regs.rdx) = (rcx, if self.rng.one_in(2) { 0 } else { rdx });
        }
        if self.rng.one_in(20) {
            regs.rflags |= flags::TF;
        }
        if self.rng.one_in(10) {
            // Whatever the descriptor makes of it: 32-bit code, entries of the guest's own tables, no code at all.
            regs.cs = self.rng.pick(&[0xe023, 0xe02b, 0x3, 0xb, 0xf, 0xfff3, 0xffff]).unwrap_or(0xe033);
        }
    }

    /// If the call of this vcpu is over, something is learned from it.
    pub(super) fn learn_if_done(&mut self, ctx: &Context<'_>) {
        if ctx.own.call.is_none()
            && let Some(done) = self.pending.remove(&ctx.vcpu.index())
        {
            self.learn(ctx, done);
        }
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

    /// What was learned from a call that is over.
    fn learn(&mut self, ctx: &Context<'_>, done: Invented) {
        let result = Errno::from_rax(ctx.own.regs.rax);
        let model = self.models.get(&ctx.domain.id().0).cloned().unwrap_or_default();
        let pen = Pen { rng: &mut self.rng, ctx, model: &model };
        let status: Option<u16> = done.status.and_then(|at| pen.read(at));
        // A reservation answers how many extents are done, those before its start included.
        let some = match (done.op, result) {
            ("IncreaseReservation" | "DecreaseReservation" | "PopulatePhysmap", Ok(n)) => n > done.args[0] >> 6,
            (_, result) => result.is_ok(),
        };
        let ok = some && done.status.is_none_or(|_| status == Some(0));
        if ok && done.call == Hypercall::GrantTableOp && done.op == "MapGrantRef" {
            let list = done.args[1];
            let mut maps = Vec::new();
            for n in 0..done.args[2].min(3) {
                let element: Option<hypercall_abi::grant::MapGrantRef> = pen.read(list.wrapping_add(n * 32));
                maps.extend(element.filter(|e| e.status == 0).map(|e| {
                    let host = if e.flags & map::HOST != 0 { e.host_addr } else { 0 };
                    (e.handle, host, if e.flags & map::DEVICE != 0 { e.dev_bus_addr } else { 0 })
                }));
            }
            if let Some(model) = self.models.get_mut(&ctx.domain.id().0) {
                model.handles.extend(maps);
                let excess = model.handles.len().saturating_sub(12);
                model.handles.drain(..excess);
            }
        }
        self.counted(done, ok);
    }
}

impl Everybody {
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

impl Everybody {
    /// What the guest on this CPU does next.
    pub(super) fn act(&mut self, ctx: &mut Context<'_>) -> Exit {
        if self.mood == Mood::Crowded {
            return self.crowd(ctx);
        }
        let paired = self.mood == Mood::Paired;
        if !paired {
            self.m.pass(1_000);
        }
        let reaping = matches!(self.mood, Mood::Reaping(_));
        if let Mood::Reaping(id) = self.mood
            && id != ctx.domain.id()
            && self.rng.one_in(4)
        {
            return Exit::Interrupt(Interrupt::Timer);
        }
        self.registers(&mut ctx.own.regs);
        // Another CPU of the guest is at work.
        let race = (!paired && self.rng.one_in(4)).then(|| Race {
            frames: &self.world.frames,
            over: self.models.get(&ctx.domain.id().0).map(|model| model.pages.clone()).unwrap_or_default(),
            rng: Rng::new(self.rng.word()),
            odds: 3 + self.rng.below(20),
        });
        self.m.set_race(race);
        if !reaping {
            self.scribble(ctx);
            if self.rng.one_in(8) {
                self.prepare_table(ctx);
            }
        }
        self.here().work = self.m.work_with(&self.world.frames);
        let line = |exit: Exit| format!("{}v{} {exit:x?}", ctx.domain.id(), ctx.vcpu.number().0);
        let mode = if ctx.own.kernel_mode { 0 } else { 1 };
        let sysenter = ctx.m.loaded().sysenter; // else it is a fault like others
        let exit = match (mode, self.rng.below(40)) {
            (_, 18..=22 | 32..=39) if sysenter => Exit::Sysenter,
            (_, 0) => Exit::Interrupt(Interrupt::Console),
            (_, 1) => {
                self.m.pass(300_000);
                Exit::Interrupt(Interrupt::Timer)
            }
            (_, 2) => Exit::Interrupt(Interrupt::Kick),
            (1, 3..=20) => Exit::Syscall,
            (1, 21) => Exit::Syscall32,
            (0, 3..=31) => return self.hypercall(ctx),
            _ if reaping => Exit::Interrupt(Interrupt::Other),
            _ => {
                let exit = self.fault(ctx);
                let text = format!("{}v{} {exit:x?} at {:#x}", ctx.domain.id(), ctx.vcpu.number().0, ctx.own.regs.rip);
                self.say(text);
                return exit;
            }
        };
        let text = line(exit);
        self.say(text);
        exit
    }

    /// Nobody sleeps to whom an event is due.
    fn forgotten(&mut self) -> ControlFlow<()> {
        let sleeps = |vcpu: &&Vcpu| vcpu.place() == Place::Blocked && self.world.upcall_due(self.m, vcpu);
        let alive = self.alive().filter(|domain| domain.life() == Life::Alive);
        match alive.flat_map(|domain| self.world.vcpus_of(domain)).find(sleeps).map(Vcpu::index) {
            Some(index) => self.fail(format!("vcpu {index} sleeps, and an event is due")),
            None => ControlFlow::Continue(()),
        }
    }

    /// What a step has come to.
    fn judge(&mut self, ctx: &mut Context<'_>, what: Step) -> ControlFlow<()> {
        let looked = self.m.work_with(&self.world.frames) - self.here().work;
        if what == Step::Gone && self.rng.one_in(15) {
            // The selectors of the vcpu that comes next do not load.
            self.m.refuse([0x2b, 0, 0x47, 0xffff]);
        }
        if what == Step::Gone && ctx.domain.last_words().length > 0 {
            self.note("times a domain that had crashed left the CPU");
        }
        if let Step::Call(_) = what {
            let index = ctx.vcpu.index();
            let name = self.pending.get(&index).map_or("?", |pending| pending.call.name());
            self.totals.longest = self.totals.longest.max((looked, name));
            if looked > LONGEST_STEP {
                return self.fail(format!("P8: one step of {name} looked {looked} times at memory"));
            }
            if ctx.own.call.is_some() {
                self.note("steps that left a call unfinished");
            }
            self.learn_if_done(ctx);
        } else if let Step::Exit(exit) = what {
            let kind = match exit {
                Exit::Syscall => "exits by SYSCALL",
                Exit::Syscall32 => "exits by SYSCALL from compatibility code",
                Exit::Sysenter => "exits by SYSENTER",
                Exit::Fault { .. } => "exits by a fault",
                Exit::ReturnFault { .. } => "exits by a fault of the return",
                Exit::Interrupt(_) => "exits by an interrupt",
            };
            self.note(kind);
            // A call that is carried out at once.
            if exit == Exit::Syscall {
                self.learn_if_done(ctx);
            }
            if let Some(wanted) = self.here().stepped.take()
                && ctx.own.debug[6] != wanted
            {
                return self.fail(format!("P10: DR6 is {:#x}, not {wanted:#x}", ctx.own.debug[6]));
            }
            if matches!(exit, Exit::Fault { vector: 13 | 14 | 6, .. }) && ctx.own.trap.is_none() && ctx.domain.runs() {
                self.note("instructions carried out, or faults repaired");
            }
        }
        if let Err(why) = self.goes_on(ctx, what) {
            return self.fail(why);
        }
        if ctx.own.kernel_mode && ctx.own.regs.cs == 0xe008 {
            return self.fail("P12: a guest in ring 0".into());
        }
        self.count_step();
        ControlFlow::Continue(())
    }

    /// What is done while all CPUs rest: the audit, and what somebody outside does.
    fn inspect(&mut self, ctx: &Context<'_>, what: Step) -> ControlFlow<()> {
        self.look(true)?;
        if let Mood::Reaping(id) = self.mood
            && id == ctx.domain.id()
            && self.alive().all(|domain| domain.id() == id)
        {
            self.funeral(ctx, id)?;
        }
        if what != Step::Gone {
            // Nobody holds a lock but for what a vcpu owns.
            self.attend(&mut Held::entering_ring_0())?;
        }
        ControlFlow::Continue(())
    }
}

/// Plays the guests on one CPU.
struct Player<'a> {
    m: &'static WholeMachine,
    cpu: usize,
    /// A guest goes on so long before its CPU answers that is to flush.
    late: usize,
    everybody: &'a Mutex<Everybody>,
}

impl Player<'_> {
    /// What is known of everybody. Only while no rule is asked, and nobody else goes on.
    fn all(&self) -> MutexGuard<'_, Everybody> {
        let mut all = lock(self.everybody);
        all.cpu = self.cpu;
        all
    }
}

impl Player<'_> {
    /// The guest runs until it leaves.
    fn leave(&mut self, ctx: &mut Context<'_>) -> Exit {
        let _outside = turns::outside();
        let several = self.m.cpu_count() > 1;
        {
            let mut all = self.all();
            if let Err(why) = all.fit_to_run(ctx).and_then(|()| all.entry_is_sound(ctx)) {
                _ = all.fail(why);
            }
            all.here().on = Some(On::of(ctx, true));
            if self.m.take_typed() {
                return Exit::Interrupt(Interrupt::Console); // before its first instruction
            }
        }
        loop {
            let (wanders, goes_on, answers) =
                self.m.dice(|rng| (rng.one_in(3), several && rng.one_in(2), rng.one_in(self.late)));
            if wanders {
                self.m.dice(|rng| self.m.wander(&ctx.world.frames, rng));
            }
            if !goes_on {
                break;
            }
            self.m.rest();
            if answers && self.m.is_asked() {
                return Exit::Interrupt(Interrupt::Other); // others wait that long
            }
            if self.m.is_stopped() {
                return Exit::Interrupt(Interrupt::Other);
            }
        }
        if self.m.take_kick() {
            return Exit::Interrupt(Interrupt::Kick);
        }
        if several && self.m.is_due() {
            return Exit::Interrupt(Interrupt::Timer);
        }
        self.all().act(ctx)
    }
}

impl Runner<WholeMachine> for Player<'_> {
    fn run(&mut self, ctx: &mut Context<'_>) -> Option<Exit> {
        let mut exit = None;
        let end = lean::run(ctx, |ctx, _| {
            let goes_on = match exit {
                None => ControlFlow::Continue(()),
                Some(exit) => {
                    self.all().note("exits that took a short way");
                    self.seen(ctx, Step::Exit(exit))
                }
            };
            let now = match goes_on {
                ControlFlow::Continue(()) if ctx.domain.runs() => {
                    self.m.answer_late();
                    self.leave(ctx)
                }
                // It is about to be told to leave, and interrupts come in all the same.
                _ if self.m.take_typed() => Exit::Interrupt(Interrupt::Console),
                _ => Exit::Interrupt(Interrupt::Other),
            };
            self.m.keep_exit(&mut ctx.own.regs, now);
            exit = Some(now);
        });
        exit.filter(|_| end == End::Exit)
    }

    fn seen(&mut self, ctx: &mut Context<'_>, what: Step) -> ControlFlow<()> {
        let _outside = turns::outside();
        let everyone = {
            let mut all = self.all();
            if self.m.is_stopped() {
                return all.end();
            }
            let judged = all.judge(ctx, what);
            let stays = what != Step::Gone && what != Step::Call(Next::Leave) && ctx.domain.runs();
            let ticks = matches!(what, Step::Exit(Exit::Interrupt(_)));
            all.here().on = Some(On { ticks, ..On::of(ctx, stays) });
            judged?;
            let drawn = all.rng.below(8) < all.gathers;
            let everyone = self.m.cpu_count() == 1 || drawn || all.unaudited >= UNAUDITED || self.m.gathers();
            all.totals.followed += u64::from(everyone);
            everyone
        };
        let looked = if everyone && self.m.gather() == Gathered::ByUs {
            let looked = self.all().inspect(ctx, what);
            self.m.scatter();
            looked
        } else {
            self.all().look(false)
        };
        // Others may take steps before this CPU goes on with what follows from its own: a vcpu that leaves is not gone yet.
        while self.m.cpu_count() > 1 && self.m.dice(|rng| rng.one_in(3)) {
            self.m.linger();
        }
        let mut all = self.all();
        if what == Step::Gone {
            all.here().on = None;
        }
        all.here().work = self.m.work_with(&ctx.world.frames);
        if self.m.is_stopped() { all.end() } else { looked }
    }

    fn idle(&mut self, site: &mut Site<'_, WholeMachine>) -> ControlFlow<(), bool> {
        let _outside = turns::outside();
        let interrupt = match self.m.idle() {
            Some(interrupt) => interrupt,
            None => {
                self.all().stuck(site.held)?;
                Interrupt::Kick
            }
        };
        if self.m.is_stopped() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(interrupt == Interrupt::Console)
        }
    }
}
