//! How a vcpu spends its time, and the areas in which its guest reads that (ABI core 6, 7).
//!
//! Touches: the vcpu's runstate, and the areas through the guest's addresses.
//! Never touches: who runs next.

use crate::prelude::*;
use crate::time;
use hypercall_abi::callback::Assist;
use hypercall_abi::shared::TimeInfo;
use hypercall_abi::vcpu::{RUNSTATE_UPDATE, Runstate, RunstateInfo};

/// Notes that a vcpu enters a state.
pub fn enter_state<M: Machine>(ctx: &mut Ctx<'_, M>, state: Runstate) {
    let now = ctx.m.now();
    let info = &mut ctx.own.runstate;
    let spent = charge(info, now);
    if info.state == Runstate::Running.code() {
        ctx.domain.cpu_time.fetch_add(spent, Relaxed);
    }
    (info.state, info.state_entry_time) = (state.code(), now);
    if state == Runstate::Running || ctx.domain.assisted(Assist::RunstateUpdateFlag) {
        write_areas(ctx);
    }
}

/// Adds the time since the state was entered to what has been spent in it; returns that time.
pub(super) fn charge(info: &mut RunstateInfo, now: u64) -> u64 {
    let spent = now.saturating_sub(info.state_entry_time);
    if let Some(total) = info.time.get_mut(index(info.state)) {
        *total = total.saturating_add(spent);
    }
    spent
}

/// Writes the areas the guest reads, or notes that they wait: in user mode its kernel addresses mean nothing.
pub fn write_areas<M: Machine>(ctx: &mut Ctx<'_, M>) {
    ctx.own.areas_stale = !ctx.own.kernel_mode;
    if !ctx.own.kernel_mode {
        return;
    }
    if let Some(at) = ctx.own.runstate_area {
        let info = ctx.own.runstate;
        // A guest that unmaps its own area reads nothing; that is its affair.
        let _ = if ctx.domain.assisted(Assist::RunstateUpdateFlag) {
            let begun = RunstateInfo { state_entry_time: info.state_entry_time | RUNSTATE_UPDATE, ..info };
            ctx.write(at.0, &begun).and_then(|()| ctx.write(at.0.wrapping_add(8), &info.state_entry_time))
        } else {
            ctx.write(at.0, &info)
        };
    }
    if let Some(at) = ctx.own.time_area
        && let Ok(old) = ctx.read::<TimeInfo>(at.0)
    {
        let record = time::next_record(ctx.m, &old);
        // The version shares its word with nothing.
        let done = [record.version.wrapping_add(1), record.pad0];
        let _ = ctx.write(at.0, &record).and_then(|()| ctx.write(at.0, &done));
    }
}
