//! The life of a CPU: it takes a vcpu, lets it run, sees to what it wants, and takes the next, until the machine ends.
//!
//! Touches: nothing itself; it says in which order the rules are asked. Ring 0 and the simulated machines run these lines.

use super::{SLICE, switch};
use crate::machine::{Exit, Interrupt};
use crate::prelude::*;
use crate::{dispatch, trap};
use core::ops::ControlFlow;
use hypercall_abi::event::Virq;

/// What a CPU does while no rule is asked: it runs a guest, or sleeps.
pub trait Runner<M: Machine> {
    /// Runs the guest in ring 3 with the registers of the vcpu, until it needs attention. `None`: fast paths have dealt with it,
    /// and any rest of a call is in [`VcpuState::call`] ([`crate::lean::run`]).
    fn run(&mut self, ctx: &mut Ctx<'_, M>) -> Option<Exit>;

    /// Sleeps until an interrupt; answers whether one was the console's. `Break` ends the CPU's life.
    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, M>) -> ControlFlow<(), bool>;

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
    if !world.sched.has_waiting() && runner.idle(cpu_ctx)? {
        world.raise_global(m, Virq::Console);
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
    let slice_end = ctx.state.runstate.state_entry_time.saturating_add(SLICE); // since it runs
    let mut limited = false;
    world.keep(m, ctx.vcpu);
    let mut next = Next::Stay;
    while next == Next::Stay {
        if !limited && here.is_wanted() {
            limited = true;
            here.arm_by(m, slice_end);
        }
        if ctx.state.call.is_some() {
            next = dispatch::step(ctx);
            runner.seen(ctx, Step::Call(next))?;
            if ctx.state.call.is_some() && next == Next::Stay {
                dispatch::let_in(ctx);
                next = tick(ctx, slice_end); // a kick or the timer may be what came in
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
                    next = tick(ctx, slice_end);
                }
            }
        }
        if !ctx.domain.runs() {
            break;
        }
    }
    if limited {
        world.tick(m, u64::MAX); // the end of this slice is nobody else's deadline
    }
    ControlFlow::Continue(())
}

/// The timer's time has come: for deadlines, or for the end of the slice, after which the vcpu leaves.
#[inline(never)]
fn tick<M: Machine>(ctx: &mut Ctx<'_, M>, slice_end: u64) -> Next {
    let (m, world) = (ctx.m, ctx.world);
    let limited = world.sched.here(m).is_wanted();
    let over = limited && slice_end <= m.now();
    world.tick(m, if limited && !over { slice_end } else { u64::MAX });
    if over { Next::Leave } else { Next::Stay }
}
