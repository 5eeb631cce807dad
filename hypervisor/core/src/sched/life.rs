//! The life of a CPU: it takes a vcpu, lets it run, sees to what it wants, and takes the next, until the machine ends.
//!
//! Touches: nothing itself; it says in which order the rules are asked. Ring 0 and the simulated machines run these lines.

use super::switch;
use crate::machine::{Arrived, Exit, Interrupt};
use crate::prelude::*;
use crate::{dispatch, trap};
use core::ops::ControlFlow;

/// What a CPU does while no rule is asked: it runs a guest, or sleeps.
pub trait Runner<M: Machine> {
    /// Runs the guest in ring 3 with the registers of the vcpu, until it needs attention. `None`: fast paths have dealt with it,
    /// and any rest of a call is in [`VcpuState::call`] ([`crate::lean::run`]).
    fn run(&mut self, ctx: &mut Ctx<'_, M>) -> Option<Exit>;

    /// Sleeps until an interrupt; returns those that somebody waits for. `Break` ends the CPU's life.
    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, M>) -> ControlFlow<(), Arrived>;

    /// What has just happened on this CPU; `Break` ends its life. For machines that are watched: ring 0 is not.
    fn seen(&mut self, _ctx: &mut Ctx<'_, M>, _what: Step) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// What has just happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// An exit was handled.
    Exit(Exit),
    /// A step of a call was carried out, and this is what the vcpu does next.
    Call(Next),
    /// The vcpu has left its CPU, which runs nobody now.
    Gone,
}

/// Runs domains until one that may turn the machine off has shut down, and answers for what reason; or until the runner ends
/// it.
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

/// No vcpu wants to run: waits for an interrupt.
fn sleep<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, runner: &mut impl Runner<M>) -> ControlFlow<()> {
    let (m, world) = (cpu_ctx.m, cpu_ctx.world);
    world.sched.set_idle(m, true);
    // Who has a vcpu wait from here on sees that we sleep, and kicks.
    if !world.sched.has_waiting() {
        let arrived = runner.idle(cpu_ctx)?;
        world.arrived(m, &arrived);
    }
    world.tick(m, u64::MAX); // before we stop being idle, so that who wakes now waits for us
    world.sched.set_idle(m, false);
    ControlFlow::Continue(())
}

/// One vcpu's turn on this CPU.
fn turn<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, vcpu: &Vcpu, runner: &mut impl Runner<M>) -> ControlFlow<()> {
    let (m, world) = (cpu_ctx.m, cpu_ctx.world);
    let mut on = ControlFlow::Continue(());
    if let Some(domain) = world.domain_of(vcpu) {
        // A CPU that another has taken the vcpu from may not have left it yet.
        let mut state = vcpu.state.take(cpu_ctx.held);
        let mut ctx = Ctx::new(cpu_ctx, domain, vcpu, &mut state);
        if switch::arrive(&mut ctx).is_ok() {
            on = stay(&mut ctx, runner);
        }
        switch::depart(&mut ctx);
        let seen = runner.seen(&mut ctx, Step::Gone);
        on = if on.is_break() { on } else { seen };
    }
    world.put_back(m, vcpu);
    on
}

/// Lets the vcpu run until it wants or has to leave.
#[inline(never)] // what a turn begins and ends with would take registers from what is done at every exit
fn stay<M: Machine>(ctx: &mut Ctx<'_, M>, runner: &mut impl Runner<M>) -> ControlFlow<()> {
    let (m, world) = (ctx.m, ctx.world);
    let here = world.sched.here(m);
    let began = ctx.state.runstate.state_entry_time;
    let mut slice = u64::MAX;
    world.keep(m, ctx.vcpu);
    let mut next = Next::Stay;
    while next == Next::Stay {
        let now = here.slice();
        if now < slice {
            slice = now;
            here.arm_by(m, began.saturating_add(slice));
        }
        if ctx.state.call.is_some() {
            next = dispatch::step(ctx);
            runner.seen(ctx, Step::Call(next))?;
            if ctx.state.call.is_some() && next == Next::Stay {
                dispatch::let_in(ctx);
                next = tick(ctx, began); // a kick or the timer may be what came in
            }
        } else {
            if trap::prepare(ctx).is_err() {
                break;
            }
            if let Some(exit) = runner.run(ctx) {
                let _ = trap::handle(ctx, exit); // a domain that has crashed does not run
                runner.seen(ctx, Step::Exit(exit))?;
                // A kick may mean a tick that another vcpu has set for this one.
                if matches!(exit, Exit::Interrupt(Interrupt::Timer | Interrupt::Kick)) {
                    next = tick(ctx, began);
                }
            }
        }
        if !ctx.domain.runs() {
            break;
        }
    }
    if slice != u64::MAX {
        world.tick(m, u64::MAX); // the end of this slice is nobody else's deadline
        if ctx.vcpu.serves.load(Relaxed) {
            here.charge_urgent(m.now().saturating_sub(began));
        }
    }
    ControlFlow::Continue(())
}

/// The timer's time has come: for deadlines, or for the end of the slice, after which the vcpu leaves.
#[inline(never)]
fn tick<M: Machine>(ctx: &mut Ctx<'_, M>, began: u64) -> Next {
    let (m, world) = (ctx.m, ctx.world);
    let slice_end = began.saturating_add(world.sched.here(m).slice()); // never, if nobody waits
    let over = slice_end <= m.now();
    world.tick(m, if over { u64::MAX } else { slice_end });
    if over { Next::Leave } else { Next::Stay }
}
