//! The time that a vcpu spends in each runstate, and the areas in which its guest reads them (ABI core 6, 7).
//!
//! Touches: the vcpu's runstate, and the areas through the guest's addresses.
//! Never touches: which vcpu runs next.

use crate::claim::store;
use crate::prelude::*;
use crate::time;
use hypercall_abi::callback::Assist;
use hypercall_abi::shared::TimeInfo;
use hypercall_abi::vcpu::{RUNSTATE_UPDATE, Runstate, RunstateInfo};

/// Records that a vcpu enters a runstate.
pub fn enter_state<M: Machine>(ctx: &mut Ctx<'_, M>, state: Runstate) {
    let now = ctx.m.now();
    let info = &mut ctx.state.runstate;
    let spent = charge(info, now);
    if info.state == Runstate::Running.code() {
        ctx.domain.cpu_time.fetch_add(spent, Relaxed);
    }
    (info.state, info.state_entry_time) = (state.code(), now);
    if state == Runstate::Running || ctx.domain.assisted(Assist::RunstateUpdateFlag) {
        write_areas(ctx);
    }
}

/// Adds the time since the state was entered to the time spent in this state; returns the added time.
pub(super) fn charge(info: &mut RunstateInfo, now: u64) -> u64 {
    let spent = now.saturating_sub(info.state_entry_time);
    if let Some(total) = info.time.get_mut(index(info.state)) {
        *total = total.saturating_add(spent);
    }
    spent
}

/// Writes the areas that the guest reads. In user mode the kernel's addresses are not mapped, so the write is put off
/// until kernel mode.
pub fn write_areas<M: Machine>(ctx: &mut Ctx<'_, M>) {
    ctx.state.areas_stale = !ctx.state.kernel_mode;
    if !ctx.state.kernel_mode {
        return;
    }
    // A guest that unmaps its own area does not get the copy; that is its own affair.
    let _ = ctx.state.runstate_area.map(|at| write_runstate(ctx, at));
    if ctx.state.time_stale {
        write_time(ctx);
    }
}

/// Writes the runstate. If the guest has enabled the assist, a bit of the entry time tells it that the write is going
/// on: the bit is set before anything else changes, and cleared last.
fn write_runstate<M: Machine>(ctx: &Ctx<'_, M>, at: GuestVirt) -> Result<(), Errno> {
    const ENTRY: usize = core::mem::offset_of!(RunstateInfo, state_entry_time);
    let info = ctx.state.runstate;
    if !ctx.domain.assisted(Assist::RunstateUpdateFlag) {
        return ctx.write(at.0, &info);
    }
    let entered = info.state_entry_time;
    let begun = RunstateInfo { state_entry_time: entered | RUNSTATE_UPDATE, ..info };
    if let Some(words) = ctx.memory()?.recall_words::<RunstateInfo>(at) {
        let entry = words.get(ENTRY / 8..).unwrap_or_default();
        store(entry, &begun.state_entry_time);
        store(words, &begun);
        store(entry, &entered);
        return Ok(());
    }
    let entry = at.plus(long(ENTRY)).0;
    ctx.write(entry, &begun.state_entry_time)?;
    ctx.write(at.0, &begun)?;
    ctx.write(entry, &entered)
}

/// Writes the second copy of the time record, which the guest reads in place of the one in `vcpu_info`. The record
/// stays the same as long as the vcpu runs on this CPU, so one write is enough.
fn write_time<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let Some(at) = ctx.state.time_area else { return };
    let Ok(old) = ctx.read::<TimeInfo>(at.0) else { return };
    let record = time::next_record(ctx.m, &old);
    // The word that holds the version holds nothing else.
    let done = [record.version.wrapping_add(1), record.pad0];
    let written = ctx.write(at.0, &record).and_then(|()| ctx.write(at.0, &done));
    ctx.state.time_stale = written.is_err();
}
