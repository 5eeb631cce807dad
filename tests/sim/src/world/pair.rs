//! Hostile guests in two worlds, one with fast paths and one without: several domains and vcpus on one CPU, to whom the same
//! seed has the same happen. Wherever a guest is about to run, both worlds are to be the same.
//!
//! What may differ, because the fast paths are shorter, is kept out of the comparison or out of the world:
//!
//! - RCX and R11, where the guest has no use for them: both worlds go on with the same.
//! - How often a page was used as writable (`turn`): a batch holds a page once, and not once for each request.
//! - Time: it does not pass with work here, only with what guests do.
//! - Words that change under the rules' eyes: with fewer looks they change at others. `hostile` has them.
//! - A frame that lies over the record of upcalls: the entry code lets upcalls in before it reads the rest of the frame, the
//!   rules after that. Records are where no stack ends.
//! - Where a call is split into steps, hence which flush comes first, and what is read after it: a list of updates has one
//!   element if it changes an upper table, or the page or the mapping of the list itself.
//! - How often the CPU's timer is set anew, which the rules do between two steps of a call. Until then the timer may fire for a
//!   deadline that is gone. After a call that the fast path may split into other steps, both worlds set the timer anew.

use super::Context;
use super::build;
use super::hostile::{Everybody, Mood, everybody};
use super::machine::{self, WholeMachine};
use super::script::Actor;
use super::twins::{Act, compare_memory, enters};
use crate::rng::Rng;
use hv_core::addr::{DomainId, Frame, GuestVirt, Port};
use hv_core::claim::Access;
use hv_core::domain::Life;
use hv_core::frame::{Owner, Use};
use hv_core::lean::shape::Shape;
use hv_core::lean::{self, End};
use hv_core::lock::Held;
use hv_core::machine::{Arrived, CpuState, Cpus, Exit, Interrupt, Registers, mode};
use hv_core::sched::life::{self, Runner, Step};
use hv_core::vcpu::VcpuState;
use hv_core::world::{CpuCtx, World};
use hypercall_abi::mmu::{MmuUpdate, MulticallEntry};
use hypercall_abi::vcpu::{RegisterVcpuInfo, VcpuOp};
use hypercall_abi::{Hypercall, selector};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use zerocopy::IntoBytes;

/// Steps between two looks at what changes rarely.
const RARELY: u64 = 32;
/// Updates that the rules carry out in a step of a call.
const STEP: u64 = 32;
/// Steps of the rules without a guest that runs, after which the world is taken for one that never comes to an end.
const ENDLESS: u64 = 1_000_000;

/// What happened.
#[derive(Clone, Copy, Default, Debug)]
pub struct Totals {
    /// Times a guest was about to run, in both worlds, and they were compared.
    pub steps: u64,
    /// Exits with which the entry code did all by itself.
    pub entered: u64,
    /// Those that took a fast path in the rules.
    pub short: u64,
    /// Times another vcpu ran than before.
    pub switches: u64,
    /// Most domains at once.
    pub domains: usize,
    /// Domains that were built.
    pub built: u64,
}

impl Totals {
    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.entered += other.entered;
        self.short += other.short;
        self.switches += other.switches;
        self.domains = self.domains.max(other.domains);
        self.built += other.built;
    }
}

/// What a world shows of itself while it waits for the other one.
struct Look {
    m: &'static WholeMachine,
    world: &'static World,
    domain: DomainId,
    vcpu: u16,
    own: Box<VcpuState>,
    /// RCX and R11 may be lost.
    lost: bool,
    last: String,
}

/// How a world has come to where it is compared.
enum Came {
    /// A guest is about to run.
    ToGuest(Look),
    /// Its end, and what the entry code and fast paths have done.
    ToEnd(Result<Totals, String>),
}

/// What is to be done.
enum Go {
    /// Go on with these values of RCX and R11.
    On([u64; 2]),
    Stop,
}

/// Plays so many steps in both worlds.
///
/// # Errors
/// The first difference, with the seed, the step, and what the guest had done.
pub fn run(seed: u64, steps: u64) -> Result<Totals, String> {
    let worlds = [true, false].map(|short| {
        let (came, comes) = channel();
        let (says, hears) = channel();
        let life = move || live(seed, steps, short, &came, hears);
        let thread = std::thread::Builder::new().stack_size(64 << 20).spawn(life).expect("a thread");
        (comes, says, thread)
    });
    let mut totals = Totals::default();
    let (mut wrong, mut on) = (None, u16::MAX);
    let ends = loop {
        let [one, other] = [0, 1].map(|n| worlds[n].0.recv());
        let (one, other) = match (one, other) {
            (Ok(Came::ToGuest(one)), Ok(Came::ToGuest(other))) => (one, other),
            (Ok(Came::ToEnd(one)), Ok(Came::ToEnd(other))) => break [one, other],
            (one, other) => {
                // One of them has come to its end, and says why; the other is to come to its.
                let mut ends = Vec::new();
                for (came, (comes, says, _)) in [one, other].into_iter().zip(&worlds) {
                    let mut came = came;
                    while let Ok(Came::ToGuest(_)) = came {
                        _ = says.send(Go::Stop);
                        came = comes.recv();
                    }
                    ends.push(match came {
                        Ok(Came::ToEnd(end)) => end.map(|_| ()).err(),
                        _ => Some("a thread has gone".into()),
                    });
                }
                return Err(format!("seed {seed} step {}: one world has come to its end: {ends:?}", totals.steps));
            }
        };
        totals.steps += 1;
        totals.switches += u64::from(on != one.vcpu);
        let rarely = on != one.vcpu || totals.steps % RARELY == 0;
        on = one.vcpu;
        totals.domains = totals.domains.max(one.world.domains.iter().filter(|d| d.life() == Life::Alive).count());
        if let Err(why) = compare(&one, &other, rarely) {
            wrong.get_or_insert_with(|| format!("seed {seed} step {}: after {}: {why}", totals.steps, one.last));
        }
        let kept = [other.own.regs.rcx, other.own.regs.r11];
        for (_, says, _) in &worlds {
            _ = says.send(if wrong.is_some() { Go::Stop } else { Go::On(kept) });
        }
    };
    for (_, _, thread) in worlds {
        _ = thread.join();
    }
    if let Some(why) = wrong {
        return Err(why);
    }
    let [one, other] = ends;
    let (one, other) = (one?, other?);
    assert_eq!((other.entered, other.short), (0, 0), "fast paths are off");
    Ok(Totals { entered: one.entered, short: one.short, built: one.built, ..totals })
}

/// Compares the worlds.
fn compare(one: &Look, other: &Look, rarely: bool) -> Result<(), String> {
    if (one.domain, one.vcpu) != (other.domain, other.vcpu) {
        return Err(format!(
            "vcpu {} of {} is about to run, but {} of {}",
            one.vcpu, one.domain, other.vcpu, other.domain
        ));
    }
    let lost = one.lost || other.lost;
    let own = |look: &Look| text(&look.own, lost);
    if own(one) != own(other) {
        return Err(format!("{}\n, but {}", own(one), own(other)));
    }
    let cpu = |look: &Look| {
        let m = look.m;
        let gs = m.entry().other_gs.load(Relaxed);
        format!("{:?} gs {gs:#x} flushes {} timer {}", *m.loaded(), m.flushes(), m.armed())
    };
    if cpu(one) != cpu(other) {
        return Err(format!("{}, but {}", cpu(one), cpu(other)));
    }
    if rarely {
        let all = |look: &Look| everything(look);
        let (one, other) = (all(one), all(other));
        if let Some((mine, others)) = one.iter().zip(&other).find(|(mine, others)| mine != others) {
            return Err(format!("{mine}\n, but {others}"));
        }
    }
    compare_memory((one.m, &one.world.frames), (other.m, &other.world.frames))
}

/// A vcpu's state, without what is nobody's business.
fn text(own: &VcpuState, lost: bool) -> String {
    let mut own = VcpuState { last_write: Shape::NONE, regs: Registers { error: 0, scratch: 0, ..own.regs }, ..*own };
    if lost {
        (own.regs.rcx, own.regs.r11) = (0, 0);
    }
    format!("{own:x?}")
}

/// All domains, their ports, and all vcpus that are not on the CPU.
fn everything(look: &Look) -> Vec<String> {
    let (m, world) = (look.m, look.world);
    let mut all = Vec::new();
    for domain in world.domains.iter().filter(|domain| domain.life() != Life::Free) {
        let id = domain.id();
        let ports: Vec<_> = (1..64).map(|port| (port, world.port(m, domain, Port(port)))).collect();
        let about = (domain.life(), domain.shutdown_reason(), world.frames.owned(id), domain.runs());
        all.push(format!("{id}: {about:?} {ports:?}"));
        for vcpu in world.vcpus_of(domain) {
            let own = vcpu.state.try_take().map(|own| text(&own, false));
            all.push(format!("{id}v{} {:?} {own:?}", vcpu.number().0, vcpu.place()));
        }
    }
    all
}

fn live(seed: u64, steps: u64, short: bool, came: &Sender<Came>, hears: Receiver<Go>) {
    let (everybody, _) = everybody(seed, 1, steps, Mood::Paired);
    let (m, world) = (everybody.m, everybody.world);
    world.frames.set_fast_paths(short);
    m.steady.store(true, Relaxed);
    let (rng, totals) = (Rng::new(seed ^ 0x7a11), Totals::default());
    let mut twin = Twin { m, everybody, rng, totals, idle: 0, split: false, came: came.clone(), hears };
    let mut held = Held::entering_ring_0();
    let lived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        while life::live(&mut CpuCtx { m, world, held: &mut held }, &mut twin).is_some() {}
    }));
    let panic = lived.err().map(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
    });
    let failure = panic.map(|text| format!("P7: a panic: {text}")).or_else(|| twin.everybody.take_failure());
    twin.totals.built = twin.everybody.noted("domains built");
    _ = came.send(Came::ToEnd(failure.map_or(Ok(twin.totals), Err)));
}

/// Plays the guests of one of the worlds.
struct Twin {
    m: &'static WholeMachine,
    everybody: Everybody,
    rng: Rng,
    totals: Totals,
    /// Steps since a guest ran.
    idle: u64,
    /// The last call may have had other steps in the other world.
    split: bool,
    came: Sender<Came>,
    hears: Receiver<Go>,
}

impl Twin {
    /// The guest runs until it leaves: first the worlds are compared.
    fn leave(&mut self, ctx: &mut Context<'_>) -> Exit {
        if std::mem::take(&mut self.split) {
            self.everybody.world.tick(self.m, u64::MAX); // the end of a slice comes with the next kick
        }
        let entry = ctx.m.entry();
        // What the entry code has done is taken over, as the rules will.
        match entry.mode.load(Relaxed) {
            mode::USER => ctx.state.kernel_mode = false,
            mode::KERNEL => ctx.state.kernel_mode = true,
            _ => {}
        }
        ctx.state.cr2 = entry.cr2.load(Relaxed);
        (self.idle, self.everybody.stuck) = (0, 0);
        let look = Look {
            m: self.m,
            world: self.everybody.world,
            domain: ctx.domain.id(),
            vcpu: ctx.vcpu.index(),
            own: Box::new(*ctx.state),
            lost: ctx.may_sysret,
            last: self.everybody.last_line(),
        };
        _ = self.came.send(Came::ToGuest(look));
        match self.hears.recv() {
            Ok(Go::On([rcx, r11])) => (ctx.state.regs.rcx, ctx.state.regs.r11) = (rcx, r11),
            Ok(Go::Stop) | Err(_) => {
                self.m.stop();
                return Exit::Interrupt(Interrupt::Other);
            }
        }
        self.totals.steps += 1;
        if self.totals.steps >= self.everybody.wanted {
            self.m.stop();
            return Exit::Interrupt(Interrupt::Other);
        }
        if self.everybody.is_new() || self.rng.one_in(16) {
            // Whoever does something from outside has the CPU look up.
            _ = self.everybody.attend(&mut Held::entering_ring_0());
            return Exit::Interrupt(Interrupt::Kick);
        }
        self.m.pass(if self.rng.one_in(30) { 5_000_000 } else { 1_000 });
        if self.m.is_due() {
            return Exit::Interrupt(Interrupt::Timer);
        }
        self.everybody.learn_if_done(ctx);
        let exit = self.act(ctx);
        let regs = &mut ctx.state.regs;
        if exit == Exit::Syscall {
            // It comes from flat code.
            (regs.cs, regs.ss) = (selector::GUEST_CS.into(), selector::GUEST_SS.into());
            (regs.rcx, regs.r11) = (regs.rip, regs.rflags);
            if ctx.state.kernel_mode {
                keep_apart(ctx);
                let Registers { rax, rsi: count, .. } = ctx.state.regs;
                self.split = rax == Hypercall::Multicall.number()
                    || rax == Hypercall::MmuUpdate.number() && count & 0x7fff_ffff > STEP;
            }
        }
        exit
    }

    fn act(&mut self, ctx: &mut Context<'_>) -> Exit {
        let pages = self.everybody.models.get(&ctx.domain.id().0).map(|model| model.pages.clone()).unwrap_or_default();
        if pages.len() < build::PAGES || self.rng.one_in(4) {
            return self.everybody.act(ctx);
        }
        let guest = Actor { id: ctx.domain.id(), pages };
        let act = Act::invent(&mut self.rng, ctx, &guest);
        // What it writes, it may write.
        let mine = |frame: Frame| {
            let info = ctx.world.frames.info(frame);
            info.is_some_and(|info| {
                info.kind.used_as == Use::Writable && info.kind.count > 0 && info.owner.owner == Owner::Guest(guest.id)
            }) || ctx.vcpu.record().is_some_and(|(record, _)| record == frame)
        };
        for (frame, word, value) in act.written.iter().filter(|(frame, ..)| mine(*frame)) {
            ctx.m.poke(*frame, *word, *value);
        }
        ctx.state.regs = act.regs;
        self.everybody.say(format!("{}v{} {:x?} rax {:x}", guest.id, ctx.vcpu.number().0, act.exit, act.regs.rax));
        act.exit
    }
}

/// Lists of updates that change how they are split into steps, or themselves, get one element, and records other places.
fn keep_apart(ctx: &mut Context<'_>) {
    const MOST: u64 = 64;
    let regs = ctx.state.regs;
    match Hypercall::from_number(regs.rax) {
        Some(Hypercall::MmuUpdate) if !is_plain(ctx, regs.rdi, regs.rsi, regs.rdx) => ctx.state.regs.rsi = 1,
        Some(Hypercall::VcpuOp) if regs.rdi == VcpuOp::RegisterVcpuInfo.number() => {
            if let Ok(mut record) = ctx.read::<RegisterVcpuInfo>(regs.rdx)
                && record.offset & 0x700 == 0x700
            {
                record.offset &= 0x38;
                _ = ctx.write_bytes(regs.rdx, record.as_bytes());
            }
        }
        Some(Hypercall::Multicall) => {
            for n in 0..regs.rsi.min(MOST) {
                let at = regs.rdi.wrapping_add(n * size_of::<MulticallEntry>() as u64);
                let Ok(mut entry) = ctx.read::<MulticallEntry>(at) else { return };
                match Hypercall::from_number(entry.op) {
                    Some(Hypercall::MmuUpdate) if !is_plain(ctx, entry.args[0], entry.args[1], entry.args[2]) => {
                        entry.args[1] = 1;
                    }
                    Some(Hypercall::Multicall) => entry.op = Hypercall::XenVersion.number(),
                    _ => continue,
                }
                _ = ctx.write_bytes(at, entry.as_bytes());
            }
        }
        _ => {}
    }
}

/// Whether a list of updates is for L1 tables, and neither for its own page nor for how that is mapped.
fn is_plain(ctx: &Context<'_>, list: u64, count: u64, told: u64) -> bool {
    const MOST: u64 = 512;
    let count = count & 0x7fff_ffff;
    let Ok(view) = ctx.memory() else { return true };
    let ends = [0, 255, 256, 511, 512].map(|n| list.wrapping_add(16 * count.min(n)));
    let pages = ends.into_iter().chain([told]).map(|at| view.frame(GuestVirt(at), Access::Read).ok());
    let pages: Vec<_> = pages.collect();
    count <= 1
        || (0..count.min(MOST)).all(|n| {
            let Ok(update) = ctx.read::<MmuUpdate>(list.wrapping_add(16 * n)) else { return true };
            let frame = Frame::containing(update.ptr);
            let kind = frame.and_then(|frame| ctx.world.frames.info(frame)).map(|info| info.kind);
            let level = kind.and_then(|kind| kind.live_table());
            let slot = update.ptr % 4096 / 8;
            !pages.contains(&frame) && level.is_none_or(|level| level == 1 && slot >= build::PAGES as u64)
        })
}

impl Runner<WholeMachine> for Twin {
    fn run(&mut self, ctx: &mut Context<'_>) -> Option<Exit> {
        let mut exit = None;
        let end = lean::run(ctx, |ctx, _| {
            self.totals.short += u64::from(exit.is_some());
            let now = loop {
                let now = self.leave(ctx);
                if !enters(ctx, now) {
                    break now;
                }
                self.totals.entered += 1;
            };
            ctx.m.keep_exit(&mut ctx.state.regs, now);
            exit = Some(now);
        });
        exit.filter(|_| end == End::Exit)
    }

    fn seen(&mut self, _: &mut Context<'_>, _: Step) -> ControlFlow<()> {
        self.idle += 1;
        if self.m.is_stopped() || self.idle > ENDLESS {
            return self.everybody.end();
        }
        ControlFlow::Continue(())
    }

    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, WholeMachine>) -> ControlFlow<(), Arrived> {
        if self.m.is_stopped() {
            return ControlFlow::Break(());
        }
        match self.m.idle() {
            Some(interrupt) => ControlFlow::Continue(machine::arrived(interrupt)),
            None => {
                self.everybody.stuck(cpu_ctx.held)?;
                ControlFlow::Continue(Arrived::default())
            }
        }
    }
}
