//! Vcpus that sleep and are woken go before those that use much of the CPU, and nobody starves: whatever wakes whom.
//!
//! Guests compute without end, sleep as soon as they have run for so long, and are woken as soon as they sleep or now and then;
//! dom0 works without end as well, or on what it is sent. A fault that is planted leaves the limits out, and is noticed.

use hv_core::addr::{Port, VcpuId};
use hv_core::domain::Domain;
use hv_core::fault::{Fault, plant};
use hv_core::lock::Held;
use hv_core::machine::{Arrived, Exit, Interrupt};
use hv_core::sched::SLICE;
use hv_core::sched::life::{self, Runner, Step};
use hv_core::vcpu::{Place, Vcpu};
use hv_core::world::{CpuCtx, World};
use hypercall_abi::Hypercall;
use hypercall_abi::sched::SchedOp;
use hypercall_abi::shared::offset;
use sim::world::Context;
use sim::world::machine::{self, WholeMachine};
use sim::world::script::{Actor, Stage};
use sim::world::turns;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Nanoseconds of a step of a guest.
const STEP: u64 = 5_000;
/// How long a run takes on one CPU, and on several, whose turns take longer to play; on the clock of the machine.
const RUN: [u64; 2] = [2_000_000_000, 500_000_000];

/// What a domain does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Does {
    /// It never sleeps.
    Compute,
    /// It yields after so many steps, and never sleeps.
    Yield(u64),
    /// It sleeps when it has run for so many steps, and is woken when it has slept for so many nanoseconds. If `asks`, it sends
    /// dom0 an event before it sleeps.
    Sleep { steps: u64, pause: u64, asks: bool },
}

/// A domain, and what was seen of it.
struct Player {
    domain: &'static Domain,
    vcpu: &'static Vcpu,
    does: Does,
    /// Nanoseconds that it has run, in all and since it was last away from its CPU.
    ran: u64,
    turn: u64,
    /// When it was last to have the CPU soon: it was woken, has run, or is asked for something. `None` while it sleeps.
    since: Option<u64>,
    slept_at: u64,
    /// The longest time from then until it ran.
    longest: u64,
    /// When it was asked for something that it has not looked for yet, and the longest time until it ran then.
    asked: Option<u64>,
    answered: u64,
}

/// Who runs, for all CPUs.
struct Players {
    all: Vec<Player>,
    until: u64,
}

/// A CPU that plays.
struct Cpu<'a>(&'a Mutex<Players>);

impl Cpu<'_> {
    fn players(&self) -> MutexGuard<'_, Players> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Player {
    /// Notes that it runs now, or that the run ends.
    fn look(&mut self, now: u64) {
        self.longest = self.longest.max(now - self.since.unwrap_or(now));
        self.answered = self.answered.max(now - self.asked.take().unwrap_or(now));
    }
}

impl Players {
    /// Wakes those who have slept for long enough.
    fn wake(&mut self, m: &WholeMachine, world: &World) {
        let now = m.time();
        for player in &mut self.all {
            if let Does::Sleep { pause, .. } = player.does
                && player.vcpu.place() == Place::Blocked
                && player.slept_at.saturating_add(pause) <= now
            {
                player.since = Some(now);
                world.sched.wake(m, player.vcpu);
            }
        }
    }

    /// Ends the run when its time is over.
    fn goes_on(&self, m: &WholeMachine) -> ControlFlow<()> {
        if m.time() <= self.until && !m.is_stopped() {
            return ControlFlow::Continue(());
        }
        m.stop();
        ControlFlow::Break(())
    }

    /// A step of a domain: what it does next, and whether it asks dom0 for something.
    fn step(&mut self, ctx: &Context<'_>) -> (Exit, bool) {
        let now = ctx.m.time();
        let place = self.all.iter().position(|player| player.domain.id() == ctx.domain.id()).expect("a player");
        let player = &mut self.all[place];
        player.look(now);
        ctx.m.pass(STEP);
        (player.ran, player.turn, player.since) = (player.ran + STEP, player.turn + STEP, Some(ctx.m.time()));
        match player.does {
            Does::Yield(steps) if player.turn >= steps * STEP => player.turn = 0,
            Does::Sleep { steps, asks, .. } if player.turn >= steps * STEP => {
                (player.turn, player.since, player.slept_at) = (0, None, ctx.m.time());
                return (Exit::Syscall, asks);
            }
            _ => return (Exit::Interrupt(Interrupt::Other), false),
        }
        (Exit::Syscall, false)
    }
}

impl Runner<WholeMachine> for Cpu<'_> {
    fn run(&mut self, ctx: &mut Context<'_>) -> Option<Exit> {
        let _outside = turns::outside();
        if ctx.m.cpu_count() > 1 {
            ctx.m.rest();
            if ctx.m.is_stopped() || ctx.m.take_kick() {
                return Some(Exit::Interrupt(Interrupt::Kick));
            }
        }
        let (exit, asks) = self.players().step(ctx);
        self.players().wake(ctx.m, ctx.world);
        if asks {
            let mut players = self.players();
            let dom0 = players.all[0].domain;
            players.all[0].asked.get_or_insert(ctx.m.time());
            drop(players);
            let shared = dom0.shared_info().expect("it has one");
            (0..8).for_each(|word| ctx.m.poke(shared, offset::EVTCHN_PENDING / 8 + word, 0));
            ctx.world.raise(ctx.m, dom0, Port(5));
        }
        let sleeps = exit == Exit::Syscall
            && self
                .players()
                .all
                .iter()
                .any(|player| player.domain.id() == ctx.domain.id() && matches!(player.does, Does::Sleep { .. }));
        if exit == Exit::Syscall {
            let op = if sleeps { SchedOp::Block } else { SchedOp::Yield };
            (ctx.state.regs.rax, ctx.state.regs.rdi) = (Hypercall::SchedOp.number(), op.number());
            return Some(exit);
        }
        Some(if ctx.m.is_due() { Exit::Interrupt(Interrupt::Timer) } else { exit })
    }

    fn seen(&mut self, ctx: &mut Context<'_>, _: Step) -> ControlFlow<()> {
        let _outside = turns::outside();
        self.players().goes_on(ctx.m)
    }

    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, WholeMachine>) -> ControlFlow<(), Arrived> {
        let outside = turns::outside();
        cpu_ctx.m.pass(STEP);
        self.players().wake(cpu_ctx.m, cpu_ctx.world);
        self.players().goes_on(cpu_ctx.m)?;
        if cpu_ctx.m.cpu_count() > 1 {
            cpu_ctx.m.linger();
        }
        drop(outside);
        ControlFlow::Continue(machine::arrived(Interrupt::Kick))
    }
}

/// What was seen of a domain: its share of the time; how long it waited at most when it was woken or queued, and when it was
/// asked for something, in nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Seen {
    share: f64,
    longest: u64,
    answered: u64,
}

/// Lets domains do these things on so many CPUs; the first is dom0.
fn play(cpus: usize, does: &[Does]) -> Vec<Seen> {
    let machine = match cpus {
        1 => WholeMachine::new,
        2 => |frames| WholeMachine::with_cpus(frames, 2, 1),
        _ => |frames| WholeMachine::with_cpus(frames, 4, 1),
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(64 << 20);
        let seen = thread.spawn_scoped(scope, || {
            let mut stage = Stage::new(300, machine);
            let actors: Vec<Actor> = (0..does.len()).map(|place| stage.enter(place == 0)).collect();
            on_stage(&stage, &actors, does)
        });
        seen.expect("a thread").join().expect("no CPU panics")
    })
}

fn on_stage(stage: &Stage, actors: &[Actor], does: &[Does]) -> Vec<Seen> {
    let (m, world) = (stage.m, stage.world);
    let start = m.time();
    let player = |(actor, does): (&Actor, &Does)| {
        let domain = stage.domain(actor);
        let vcpu = world.vcpu(domain, VcpuId(0)).expect("it has one");
        let since = (!matches!(does, Does::Sleep { .. })).then_some(start);
        let (does, ran, turn, slept_at, longest, asked, answered) = (*does, 0, 0, 0, 0, None, 0);
        Player { domain, vcpu, does, ran, turn, since, slept_at, longest, asked, answered }
    };
    let all: Vec<Player> = actors.iter().zip(does).map(player).collect();
    all.iter().for_each(|player| world.unpause(m, player.domain));
    let players = Mutex::new(Players { all, until: start + RUN[usize::from(m.cpu_count() > 1)] });
    std::thread::scope(|scope| {
        for cpu in 0..m.cpu_count() {
            let players = &players;
            let live = move || {
                let mut held = Held::entering_ring_0();
                let lived =
                    m.play(cpu, || _ = life::live(&mut CpuCtx { m, world, held: &mut held }, &mut Cpu(players)));
                lived.expect("no CPU panics");
            };
            std::thread::Builder::new().stack_size(8 << 20).spawn_scoped(scope, live).expect("a thread");
        }
        m.begin();
    });
    let mut all = players.into_inner().unwrap_or_else(PoisonError::into_inner).all;
    all.iter_mut().for_each(|player| player.look(m.time()));
    let share = |player: &Player| player.ran as f64 / (m.time() - start) as f64;
    let seen = |player: &Player| Seen { share: share(player), longest: player.longest, answered: player.answered };
    all.iter().map(seen).collect()
}

const fn sleeps(steps: u64, pause: u64) -> Does {
    Does::Sleep { steps, pause, asks: false }
}

/// Shares of the guests that compute beside these sleepers and a dom0 that never rests, and the longest that one of them waits.
fn beside(cpus: usize, sleepers: &[Does]) -> (f64, u64) {
    let does = [&[Does::Yield(200), Does::Compute, Does::Compute][..], sleepers].concat();
    let seen = play(cpus, &does);
    sim::tell(format_args!("{cpus} CPUs, {sleepers:?}: {seen:?}"));
    (seen[1].share + seen[2].share, seen[1].longest.max(seen[2].longest))
}

/// Hostile sleepers of several kinds: of short and of long turns, woken as soon as they sleep, and more of them than a CPU has
/// time for.
const HOSTILE: [&[Does]; 5] = [
    &[sleeps(1, 0)],
    &[sleeps(1, 0), sleeps(1, 0), sleeps(1, 0)],
    &[sleeps(4, 0), sleeps(40, 100_000), sleeps(400, 0)],
    &[Does::Sleep { steps: 1, pause: 0, asks: true }, Does::Sleep { steps: 3, pause: 20_000, asks: true }],
    &[sleeps(900, 3_000_000), sleeps(900, 3_000_000), sleeps(900, 3_000_000)],
];

/// One test, because a planted fault is planted in the whole process.
#[test]
fn who_sleeps_goes_first_and_nobody_starves() {
    // The least share of those who compute, and how long one of them waits at most: the budget of the CPU, filled by an eighth
    // of the time less than it is used, and a turn of each other one.
    let fair = |(share, longest): (f64, u64)| share >= 0.12 && longest <= 80_000_000 + 6 * SLICE;
    // All CPUs share a clock, and each does its share of the steps.
    for cpus in [1, 2, 4] {
        for sleepers in HOSTILE {
            let (share, longest) = beside(cpus, sleepers);
            assert!(fair((share * cpus as f64, longest)), "{cpus} CPUs, {sleepers:?}: {share} {longest}");
        }
    }
    plant(Some(Fault::BoostForFree));
    let noticed = HOSTILE.iter().filter(|sleepers| !fair(beside(1, sleepers))).count();
    plant(None);
    assert!(noticed > 0, "boosts that cost nothing are not noticed");

    // One that sleeps most of the time is there at once, beside two that compute and a dom0 that works without end.
    let light = [Does::Yield(200), Does::Compute, Does::Compute, sleeps(2, 1_000_000)];
    let seen = play(1, &light);
    sim::tell(format_args!("light: {seen:?}"));
    assert!(seen[3].longest <= 30_000 + STEP, "{seen:?}");
    // So is dom0 when such a one asks it for something, however late its turn would be.
    let light = Does::Sleep { steps: 2, pause: 1_000_000, asks: true };
    for dom0 in [Does::Yield(200), sleeps(2, u64::MAX), Does::Compute] {
        let seen = play(1, &[dom0, Does::Compute, Does::Compute, light]);
        sim::tell(format_args!("{dom0:?} is asked: {seen:?}"));
        assert!(seen[0].answered <= 2 * STEP, "{dom0:?}: {seen:?}");
        assert!(seen[3].longest <= 30_000 + STEP, "{dom0:?}: {seen:?}");
        // Being asked often costs it no time, and gives it no more than half.
        assert!(
            seen[0].share <= 0.6 && (seen[0].share >= 0.3 || matches!(dom0, Does::Sleep { .. })),
            "{dom0:?}: {seen:?}"
        );
    }
    // Being interrupted by sleepers changes nothing between those who compute.
    let seen = play(1, &[sleeps(1, u64::MAX), Does::Compute, Does::Compute, Does::Compute, sleeps(3, 1_700_000)]);
    sim::tell(format_args!("shares: {seen:?}"));
    let shares = [1, 2, 3].map(|place: usize| seen[place].share);
    assert!(shares.iter().all(|share| (share / shares[0] - 1.0).abs() < 0.05), "{shares:?}");
}
