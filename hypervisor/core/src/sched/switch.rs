//! A vcpu comes to a CPU and leaves it.

use crate::domain::crash::Crashed;
use crate::prelude::*;
use crate::trap;
use crate::vcpu::ops::load_debug;
use crate::vcpu::runstate::enter_state;
use hypercall_abi::vcpu::Runstate;

/// Loads the vcpu into this CPU: descriptor tables, control and debug registers, root; then what needs these, its FPU state
/// and segment registers. Time is charged to it from then on.
///
/// # Errors
/// [`Crashed`]: its segment registers do not load, and it could not be told.
pub fn arrive<M: Machine>(ctx: &mut Ctx<'_, M>) -> Result<(), Crashed> {
    let m = ctx.m;
    ctx.seen.forget();
    ctx.domain.end_poll(ctx.vcpu.number());
    ctx.domain.space.enter(&ctx.world.frames, m.this_cpu());
    m.load_gdt(&ctx.own.gdt);
    m.load_ldt(ctx.own.ldt_entries);
    for (page, frame) in (0u8..).zip(ctx.own.ldt_mapped) {
        if let Some(frame) = frame {
            m.map_ldt(page, frame);
        }
    }
    m.set_guest_cr4(ctx.own.cr4);
    m.set_xcr0(ctx.own.xcr0);
    m.set_tsc_aux(ctx.own.tsc_aux);
    m.allow_sysenter(ctx.own.callbacks.sysenter.address != 0);
    load_debug(ctx);
    if let Some(root) = ctx.own.root() {
        m.load_root(root);
    }
    let loaded = load(ctx);
    m.set_task_switched(ctx.own.task_switched);
    enter_state(ctx, Runstate::Running);
    loaded.or_else(|wanted| trap::failsafe(ctx, wanted))
}

/// Loads FPU state and segment registers.
fn load<M: Machine>(ctx: &mut Ctx<'_, M>) -> Result<(), [u16; 4]> {
    let Some(fpu) = ctx.own.fpu else { return Ok(()) };
    if core::mem::take(&mut ctx.own.fpu_fresh) {
        ctx.m.reset_fpu(fpu);
    }
    ctx.m.switch_in(&ctx.own.segments, fpu)
}

/// Takes the vcpu out of this CPU, which afterwards remembers nothing of its domain.
pub fn depart<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let state = match ctx.vcpu.place() {
        _ if !ctx.vcpu.online.load(SeqCst) => Runstate::Offline,
        Place::Blocked => Runstate::Blocked,
        _ if ctx.domain.runs() => Runstate::Runnable,
        _ => Runstate::Offline,
    };
    enter_state(ctx, state); // its root is still loaded
    if let Some(fpu) = ctx.own.fpu {
        ctx.m.switch_out(&mut ctx.own.segments, fpu);
    }
    ctx.m.leave_root();
    ctx.m.load_gdt(&[None; 14]);
    ctx.m.load_ldt(0);
    ctx.domain.space.leave(ctx.m.this_cpu());
}
