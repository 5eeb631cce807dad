//! The main loop of a CPU: it takes a vcpu, runs it, handles its calls, faults and interrupts, and takes the next one, until
//! the machine is turned off.
//!
//! Touches: nothing itself; it only determines in which order other modules do their work. Ring 0 and the simulated machines
//! run the same loop.

use super::cpu::{BOOST_SLICE, HANDED_SLICE, Slice};
use super::switch;
use crate::machine::{Arrived, Exit, Interrupt};
use crate::prelude::*;
use crate::{dispatch, trap};
use core::ops::ControlFlow;

/// What the loop needs of its machine: to run a guest, and to sleep.
pub trait Runner<M: Machine> {
    /// Runs the guest in ring 3 with the registers of the vcpu, until it exits for a reason that is not handled on a fast path
    /// ([`crate::lean::run`]); returns this reason. Returns `None` if there is no such exit, but fast paths have left the rest
    /// of a call in [`VcpuState::call`].
    fn run(&mut self, ctx: &mut Ctx<'_, M>) -> Option<Exit>;

    /// Sleeps until an interrupt comes. Returns the interrupts that are to be raised as events; `Break` ends the loop.
    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, M>) -> ControlFlow<(), Arrived>;

    /// Told of each step that has just been done on this CPU; `Break` ends the loop. Simulated machines are watched in this
    /// way; ring 0 does nothing here.
    fn seen(&mut self, _ctx: &mut Ctx<'_, M>, _what: Step) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// A step of the loop, for [`Runner::seen`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// An exit was handled.
    Exit(Exit),
    /// A step of a call was carried out. The vcpu then stays or leaves, as this says.
    Call(Next),
    /// The vcpu has left its CPU, on which no vcpu runs now.
    Gone,
}

/// Runs vcpus on this CPU until a domain that may turn the machine off has shut down, and returns the reason of that shutdown.
/// Returns `None` if the runner has ended the loop before.
pub fn live<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, runner: &mut impl Runner<M>) -> Option<u32> {
    cpu_ctx.world.sched.join(cpu_ctx.m);
    loop {
        let on = match cpu_ctx.world.pick(cpu_ctx.m) {
            Some(vcpu) => turn(cpu_ctx, vcpu, runner),
            None => sleep(cpu_ctx, runner),
        };
        let end = cpu_ctx.world.end();
        if on.is_break() || end.is_some() {
            return end;
        }
    }
}

/// Sleeps until an interrupt comes, because no vcpu is to run here.
fn sleep<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, runner: &mut impl Runner<M>) -> ControlFlow<()> {
    let (m, world) = (cpu_ctx.m, cpu_ctx.world);
    world.sched.set_idle(m, true);
    // A CPU that queues a vcpu from here on sees that this CPU is idle, and kicks it.
    if !world.sched.has_waiting() {
        let arrived = runner.idle(cpu_ctx)?;
        world.arrived(m, &arrived);
    }
    world.tick(m, u64::MAX); // while this CPU still counts as idle, so that vcpus which the tick wakes are queued here
    world.sched.set_idle(m, false);
    ControlFlow::Continue(())
}

/// One vcpu's turn on this CPU.
fn turn<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, vcpu: &Vcpu, runner: &mut impl Runner<M>) -> ControlFlow<()> {
    let (m, world) = (cpu_ctx.m, cpu_ctx.world);
    let mut on = ControlFlow::Continue(());
    if let Some(domain) = world.domain_of(vcpu) {
        // This waits if the CPU on which the vcpu slept and was woken has not finished leaving it.
        let mut state = vcpu.state.take(cpu_ctx.held);
        let mut ctx = Ctx::new(cpu_ctx, domain, vcpu, &mut state);
        if switch::arrive(&mut ctx).is_ok() {
            on = stay(&mut ctx, runner);
        } else {
            // It does not run, so no interrupt has come in; the next vcpu may not run either.
            dispatch::let_in(&ctx);
            world.tick(m, u64::MAX);
        }
        switch::depart(&mut ctx);
        let seen = runner.seen(&mut ctx, Step::Gone);
        on = if on.is_break() { on } else { seen };
    }
    world.put_back(m, vcpu);
    on
}

/// Runs the vcpu until its turn ends: it gives up the CPU, its slice is over, or its domain is no longer to run.
#[inline(never)] // inlined into `turn`, the loop would share registers with code that runs once in a turn
fn stay<M: Machine>(ctx: &mut Ctx<'_, M>, runner: &mut impl Runner<M>) -> ControlFlow<()> {
    let (m, world) = (ctx.m, ctx.world);
    let here = world.sched.here(m);
    let (serves, boosted) = (ctx.vcpu.serves.load(Relaxed), here.is_boosted());
    let began = ctx.state.runstate.state_entry_time;
    let (used, handed) = (ctx.vcpu.used.swap(0, Relaxed), boosted && serves);
    let mut slice = Slice { began, used, most: u64::MAX, handed };
    let (mut waiting, mut leave, mut contended) = (0, u64::MAX, began);
    world.keep(m, ctx.vcpu);
    let mut next = Next::Stay;
    while next == Next::Stay {
        let wait = here.waiting();
        if wait != waiting {
            if leave == u64::MAX && (serves || boosted) {
                contended = m.now();
                slice.most = match (boosted, serves) {
                    (false, _) => u64::MAX,
                    (true, false) => ctx.vcpu.boost_left(began).max(BOOST_SLICE),
                    (true, true) => HANDED_SLICE,
                };
            }
            waiting = wait;
            let sooner = slice.leave(waiting);
            if sooner < leave {
                leave = sooner;
                here.arm_by(m, leave);
            }
        }
        if ctx.state.call.is_some() {
            next = dispatch::step(ctx);
            runner.seen(ctx, Step::Call(next))?;
            if ctx.state.call.is_some() {
                // Also if the vcpu leaves: it may come back at once, to the next step.
                dispatch::let_in(ctx);
                let due = tick(ctx, &slice); // what came in may have been a kick or the timer
                next = if next == Next::Stay { due } else { next };
            }
        } else {
            if trap::prepare(ctx).is_err() {
                break;
            }
            if let Some(exit) = runner.run(ctx) {
                let _ = trap::handle(ctx, exit); // an error means that the domain has crashed: `runs` is false below
                runner.seen(ctx, Step::Exit(exit))?;
                // The kick may come from a vcpu that has started this one's periodic timer.
                if matches!(exit, Exit::Interrupt(Interrupt::Timer | Interrupt::Kick)) {
                    next = tick(ctx, &slice);
                }
            }
        }
        if !ctx.domain.runs() {
            break;
        }
    }
    if leave != u64::MAX {
        world.tick(m, u64::MAX); // sets the timer anew, which may be set to the end of this slice
        if serves || boosted {
            let now = m.now();
            here.charge(now, now.saturating_sub(contended), serves);
        }
    }
    ControlFlow::Continue(())
}

/// Handles the deadlines that have passed, and sets the timer anew. Returns `Leave` if the vcpu is to leave the CPU, because
/// its slice is over or a boosted vcpu waits. In the latter case, notes how much of the slice the vcpu has used.
#[inline(never)]
fn tick<M: Machine>(ctx: &mut Ctx<'_, M>, slice: &Slice) -> Next {
    let (m, world) = (ctx.m, ctx.world);
    let (waiting, now) = (world.sched.here(m).waiting(), m.now());
    let leave = slice.leave(waiting); // never, if no vcpu is queued here
    let over = leave <= now;
    if over {
        ctx.vcpu.used.store(slice.used(waiting, now), Relaxed);
    }
    world.tick(m, if over { u64::MAX } else { leave });
    if over { Next::Leave } else { Next::Stay }
}
