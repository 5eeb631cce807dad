//! The life of a CPU, in the order of `hypervisor/src/run.rs`: whoever changes one changes the other. What differs is
//! that a guest is a function, that every step is looked at, and that a life ends.

use super::machine::WholeMachine;
use hv_core::dispatch;
use hv_core::domain::vcpu::Vcpu;
use hv_core::lock::{Held, Nothing};
use hv_core::machine::{Clock, CpuState, Exit, Frames, Interrupt};
use hv_core::sched::{SLICE, switch};
use hv_core::trap;
use hv_core::world::{Ctx, Next, World};
use hypercall_abi::event::Virq;
use std::ops::ControlFlow;

/// A vcpu on the simulated CPU.
pub type Context<'a> = Ctx<'a, WholeMachine>;

/// Plays all guests, and watches.
pub trait Guests {
    /// A guest runs: it may change its registers as ring 3 can, and its memory; says why it stopped.
    fn run(&mut self, ctx: &mut Context<'_>) -> Exit;
    /// What happened has been handled, or a call has been carried out a step further. `Break` ends the life.
    fn after(&mut self, ctx: &Context<'_>, what: Step) -> ControlFlow<()>;
    /// The selectors of the vcpu that comes to the CPU do not load.
    fn bad_selectors(&mut self) -> Option<[u16; 4]>;
    /// Nobody can run and no timer is set: does something about it, from outside.
    fn stuck(&mut self, held: &mut Held<Nothing>) -> ControlFlow<()>;
}

/// What has just happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// An exit was handled.
    Exit(Exit),
    /// A step of a call.
    Call,
    /// The vcpu has left its CPU, which runs nobody now.
    Gone,
}

/// Runs domains until a guest ends it.
pub fn run(hw: &'static WholeMachine, world: &'static World, held: &mut Held<Nothing>, guests: &mut impl Guests) {
    world.sched.join(hw);
    loop {
        let on = match world.pick(hw) {
            Some(vcpu) => turn(hw, world, held, vcpu, guests),
            None => sleep(hw, world, held, guests),
        };
        if on.is_break() {
            return;
        }
    }
}

fn sleep(
    hw: &'static WholeMachine,
    world: &'static World,
    held: &mut Held<Nothing>,
    guests: &mut impl Guests,
) -> ControlFlow<()> {
    world.sched.set_idle(hw, true);
    world.tick(hw, u64::MAX);
    let mut on = ControlFlow::Continue(());
    if !world.sched.has_waiting() {
        match hw.idle() {
            Interrupt::Console => world.raise_global(hw, Virq::Console),
            Interrupt::Kick => on = guests.stuck(held),
            Interrupt::Timer | Interrupt::Other => {}
        }
    }
    world.sched.set_idle(hw, false);
    on
}

fn turn(
    hw: &'static WholeMachine,
    world: &'static World,
    held: &mut Held<Nothing>,
    vcpu: &Vcpu,
    guests: &mut impl Guests,
) -> ControlFlow<()> {
    let Some(domain) = world.domain_of(vcpu) else { return ControlFlow::Continue(()) };
    let on;
    {
        let mut own = vcpu.own.take(held);
        let Some(fpu) = own.fpu else { return ControlFlow::Continue(()) };
        let mut ctx = Ctx { m: hw, world, domain, vcpu, own: &mut own, held, next: Next::Stay, short: false };
        switch::arrive(&mut ctx);
        if core::mem::take(&mut ctx.own.fpu_fresh) {
            hw.zero(fpu); // reset_fpu
        }
        let loaded = guests.bad_selectors(); // switch_in
        hw.set_fs_base(ctx.own.segments.fs_base);
        hw.set_gs_base(ctx.own.segments.gs_base);
        switch::settle(&mut ctx);
        if let Some(wanted) = loaded {
            trap::failsafe(&mut ctx, wanted);
        }
        on = stay(hw, world, &mut ctx, guests);
        switch::depart(&mut ctx);
        (ctx.own.segments.fs_base, ctx.own.segments.gs_base) = (hw.fs_base(), hw.gs_base()); // switch_out
        hw.loaded().root = None;
        hw.cached.lock().expect("one thread").clear(); // load_root(hw.root())
        switch::gone(&mut ctx);
        _ = guests.after(&ctx, Step::Gone);
    }
    world.put_back(hw, vcpu);
    on
}

fn stay(
    hw: &'static WholeMachine,
    world: &'static World,
    ctx: &mut Context<'_>,
    guests: &mut impl Guests,
) -> ControlFlow<()> {
    let slice_end = hw.now().saturating_add(SLICE);
    let mut limited = false;
    world.tick(hw, u64::MAX);
    while ctx.next == Next::Stay {
        if !limited && world.sched.here(hw).is_wanted() {
            limited = true;
            world.sched.here(hw).arm_by(hw, slice_end);
        }
        if ctx.own.call.is_some() {
            dispatch::step(ctx);
            guests.after(ctx, Step::Call)?;
            if ctx.own.call.is_some() {
                dispatch::let_in(ctx);
                if world.sched.is_due(hw) {
                    tick(hw, world, ctx, slice_end);
                }
            }
        } else {
            trap::prepare(ctx);
            if ctx.next == Next::Leave {
                break;
            }
            let exit = guests.run(ctx);
            trap::handle(ctx, exit);
            guests.after(ctx, Step::Exit(exit))?;
            if exit == Exit::Interrupt(Interrupt::Timer) {
                tick(hw, world, ctx, slice_end);
            }
        }
        if !ctx.domain.runs() {
            ctx.next = Next::Leave;
        }
    }
    ControlFlow::Continue(())
}

fn tick(hw: &'static WholeMachine, world: &'static World, ctx: &mut Context<'_>, slice_end: u64) {
    let limit = if world.sched.here(hw).is_wanted() { slice_end } else { u64::MAX };
    if limit <= hw.now() {
        ctx.next = Next::Leave;
    }
    world.tick(hw, if ctx.next == Next::Leave { u64::MAX } else { limit });
}
