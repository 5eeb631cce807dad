//! A vcpu comes to a CPU and leaves it.

use crate::calls::{cpu, vcpu};
use crate::prelude::*;
use hypercall_abi::vcpu::Runstate;

/// Loads what the rules know of the vcpu's CPU state: descriptor tables, control and debug registers, root. Segment
/// registers and the FPU follow, since they need these.
pub fn arrive<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let m = ctx.m;
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
    cpu::load_debug(ctx);
    if let Some(root) = ctx.own.root() {
        m.load_root(root);
    }
}

/// Everything is loaded: the guest's task-switched bit counts, and time is charged to it.
pub fn settle<M: Machine>(ctx: &mut Ctx<'_, M>) {
    ctx.m.set_task_switched(ctx.own.task_switched);
    vcpu::enter_state(ctx, Runstate::Running);
}

/// The vcpu is about to leave its CPU; its root is still loaded.
pub fn depart<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let state = match ctx.vcpu.place() {
        _ if !ctx.vcpu.online.load(SeqCst) => Runstate::Offline,
        Place::Blocked => Runstate::Blocked,
        _ if ctx.domain.runs() => Runstate::Runnable,
        _ => Runstate::Offline,
    };
    vcpu::enter_state(ctx, state);
}

/// The CPU has loaded a root of its own: nothing here remembers the vcpu's domain any more.
pub fn gone<M: Machine>(ctx: &mut Ctx<'_, M>) {
    ctx.m.load_gdt(&[None; 14]);
    ctx.m.load_ldt(0);
    ctx.domain.space.leave(ctx.m.this_cpu());
}
