//! Loads a vcpu into a CPU, and takes it out.

use crate::domain::crash::Crashed;
use crate::fault::{Fault, planted};
use crate::prelude::*;
use crate::trap;
use crate::vcpu::ops::load_debug;
use crate::vcpu::runstate::enter_state;
use hypercall_abi::vcpu::Runstate;

/// Loads the vcpu into this CPU: descriptor tables, control and debug registers and the root; then what depends on
/// these: FPU state and segment registers. From then on, time is charged to the vcpu.
///
/// # Errors
/// [`Crashed`]: the segment registers could not be loaded, and neither could the guest's failsafe callback be called.
pub fn arrive<M: Machine>(ctx: &mut Ctx<'_, M>) -> Result<(), Crashed> {
    let m = ctx.m;
    ctx.domain.end_poll(ctx.vcpu.number());
    move_in(ctx);
    m.load_gdt(ctx.state.gdt_pages());
    m.load_ldt(ctx.state.ldt_entries);
    if ctx.state.ldt_entries > 0 {
        for (page, frame) in (0u8..).zip(ctx.state.ldt_mapped) {
            if let Some(frame) = frame {
                m.map_ldt(page, frame);
            }
        }
    }
    m.set_guest_cr4(ctx.state.cr4);
    m.set_xcr0(ctx.state.xcr0);
    m.set_tsc_aux(ctx.state.tsc_aux);
    m.allow_sysenter(ctx.state.callbacks.sysenter.address != 0);
    load_debug(ctx);
    if let Some(root) = ctx.state.root() {
        m.load_root(root);
    }
    let loaded = load(ctx);
    m.set_task_switched(ctx.state.task_switched);
    enter_state(ctx, Runstate::Running);
    loaded.or_else(|wanted| trap::failsafe(ctx, wanted))
}

/// Makes this CPU one that is asked for flushes of the vcpu's domain, and no longer for flushes of the domain that ran here
/// before, whose root this CPU has left. So the walk cache has pages of one domain only, and stays valid while the CPU is idle.
fn move_in<M: Machine>(ctx: &Ctx<'_, M>) {
    let (me, slot) = (ctx.m.this_cpu(), ctx.domain.id().slot());
    let before = ctx.world.sched.here(ctx.m).home.swap(low16(slot as u64).wrapping_add(1), Relaxed).checked_sub(1);
    let asked = ctx.domain.space.cpus().has(me) || planted(Fault::LeaveEarly);
    if before.map(usize::from) == Some(slot) && asked {
        return; // the same domain ran here before, and this CPU has been asked for its flushes since then
    }
    if let Some(other) = before.and_then(|slot| nth(&ctx.world.domains, slot)) {
        other.space.leave(me);
    }
    if !planted(Fault::SeenByOthers) {
        ctx.m.forget();
    }
    ctx.domain.space.enter(&ctx.world.frames, me);
}

/// Loads FPU state and segment registers. On an error, returns the wanted selectors (DS, ES, FS, GS), some of which did not
/// load.
fn load<M: Machine>(ctx: &mut Ctx<'_, M>) -> Result<(), [u16; 4]> {
    let Some(fpu) = ctx.state.fpu else { return Ok(()) };
    if core::mem::take(&mut ctx.state.fpu_fresh) {
        ctx.m.reset_fpu(fpu);
    }
    ctx.m.switch_in(&ctx.state.segments, fpu)
}

/// Takes the vcpu out of this CPU. The CPU's TLB then has no translations of the vcpu's domain.
pub fn depart<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let state = match ctx.vcpu.place() {
        _ if !ctx.vcpu.online.load(SeqCst) => Runstate::Offline,
        Place::Blocked => Runstate::Blocked,
        _ if ctx.domain.runs() => Runstate::Runnable,
        _ => Runstate::Offline,
    };
    let began = ctx.state.runstate.state_entry_time;
    enter_state(ctx, state); // while the root is still loaded: this may write to the guest's memory
    let now = ctx.state.runstate.state_entry_time;
    ctx.vcpu.charge(now, now.saturating_sub(began));
    if let Some(fpu) = ctx.state.fpu {
        ctx.m.switch_out(&mut ctx.state.segments, fpu);
    }
    ctx.m.leave_root();
    ctx.m.load_gdt(&[]);
    ctx.m.load_ldt(0);
    if planted(Fault::LeaveEarly) {
        ctx.domain.space.leave(ctx.m.this_cpu());
    }
}
