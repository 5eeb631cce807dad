//! The life of a CPU: pick a vcpu, let it run, see to what it wants, until the machine is turned off.

use hv_core::dispatch;
use hv_core::domain::vcpu::Vcpu;
use hv_core::machine::{Clock, CpuState, Exit, Interrupt};
use hv_core::sched::{SLICE, switch};
use hv_core::trap;
use hv_core::world::{Ctx, Next, Site};
use hv_machine::{Hardware, Return, Verdict};
use hypercall_abi::event::Virq;
use hypercall_abi::sched::ShutdownReason;

/// Runs domains until the one that may turns the machine off.
pub(crate) fn run(site: &mut Site<'_, Hardware>) -> ! {
    site.world.sched.join(site.m);
    loop {
        match site.world.pick(site.m) {
            Some(vcpu) => turn(site, vcpu),
            None => sleep(site),
        }
        if let Some(reason) = site.world.ended() {
            site.m.power_off(verdict(reason));
        }
    }
}

/// Nobody wants to run: waits for an interrupt.
fn sleep(site: &Site<'_, Hardware>) {
    let (hw, world) = (site.m, site.world);
    world.sched.set_idle(hw, true);
    world.tick(hw, u64::MAX);
    if !world.sched.has_waiting() && hw.idle() {
        world.raise_global(hw, Virq::Console);
    }
    world.sched.set_idle(hw, false);
}

/// One vcpu's turn on this CPU.
fn turn(site: &mut Site<'_, Hardware>, vcpu: &Vcpu) {
    let (hw, world) = (site.m, site.world);
    let Some(domain) = world.domain_of(vcpu) else { return };
    {
        let mut own = vcpu.own.take(site.held);
        let Some(fpu) = own.fpu else { return };
        let (held, next) = (&mut *site.held, Next::Stay);
        let mut ctx = Ctx { m: hw, world, domain, vcpu, own: &mut own, held, next, short: false };
        switch::arrive(&mut ctx);
        if core::mem::take(&mut ctx.own.fpu_fresh) {
            hw.reset_fpu(fpu);
        }
        let loaded = hw.switch_in(&ctx.own.segments, fpu);
        switch::settle(&mut ctx);
        if let Err(wanted) = loaded {
            trap::failsafe(&mut ctx, wanted);
        }
        stay(&mut ctx);
        switch::depart(&mut ctx);
        hw.switch_out(&mut ctx.own.segments, fpu);
        hw.load_root(hw.root());
        switch::gone(&mut ctx);
    }
    world.put_back(hw, vcpu);
}

/// Lets the vcpu run until it wants or has to leave.
fn stay(ctx: &mut Ctx<'_, Hardware>) {
    let (hw, world) = (ctx.m, ctx.world);
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
            if ctx.own.call.is_some() {
                dispatch::let_in(ctx);
                if world.sched.is_due(hw) {
                    tick(ctx, slice_end);
                }
            }
        } else {
            trap::prepare(ctx);
            if ctx.next == Next::Leave {
                break;
            }
            let exit = hw.run(&mut ctx.own.regs, if ctx.short { Return::Short } else { Return::Exact });
            trap::handle(ctx, exit);
            if exit == Exit::Interrupt(Interrupt::Timer) {
                tick(ctx, slice_end);
            }
        }
        if !ctx.domain.runs() {
            ctx.next = Next::Leave;
        }
    }
}

/// The timer's time has come: for deadlines, or for the end of the slice.
fn tick(ctx: &mut Ctx<'_, Hardware>, slice_end: u64) {
    let (hw, world) = (ctx.m, ctx.world);
    let limit = if world.sched.here(hw).is_wanted() { slice_end } else { u64::MAX };
    if limit <= hw.now() {
        ctx.next = Next::Leave;
    }
    world.tick(hw, if ctx.next == Next::Leave { u64::MAX } else { limit });
}

/// How the machine stops when the domain that may turn it off has shut down for this reason.
fn verdict(reason: u32) -> Verdict {
    match ShutdownReason::from_number(u64::from(reason)) {
        Some(ShutdownReason::Poweroff | ShutdownReason::Reboot) => Verdict::SUCCESS,
        _ => Verdict::of_domain(reason),
    }
}
