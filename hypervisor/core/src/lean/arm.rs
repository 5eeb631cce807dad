//! Tells the entry code what it may do by itself.
//!
//! Touches: [`Entry`] of this CPU.
//! Keeps: P4 and P12. The mode differs from [`mode::SLOW`] only while `Entry` has everything that `trap::bounce`,
//! `return_from_trap` and `toggle` look at: the handlers mask events, no NMI is masked, no area waits for kernel mode,
//! no I/O privilege level is kept for the guest, and the kernel's stack is a page that the guest may write. The page of
//! the vcpu_info record is held for writing as long as the domain exists; another vcpu cannot move the record while
//! this one is up. In [`mode::ROOTLESS`] all this holds as well, but the entry code does nothing: Linux has no root of user
//! mode while it takes the tables of a process down.
//!
//! [`Entry`]: crate::machine::Entry

use crate::claim::Access;
use crate::claim::walks::Kind;
use crate::fault::{Fault, planted};
use crate::machine::mode;
use crate::prelude::*;
use crate::trap::PF;
use crate::trap::table::gate;
use hypercall_abi::callback::Assist;

/// Bytes that a system call pushes on the kernel's stack.
const PUSHED: u64 = 56;
/// Bytes that the return to user code pops. Linux keeps them right below the top of the stack.
const POPPED: u64 = 72;

/// Tells the entry code what it may do. Called when this CPU has answered all flush requests; from here to the guest
/// nothing waits.
#[inline(always)]
pub fn arm<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let entry = ctx.m.entry();
    entry.mode.store(mode::SLOW, Relaxed);
    entry.cr2.store(ctx.state.cr2, Relaxed);
    ctx.writes_tables = ctx.domain.assisted(Assist::WritablePagetables);
    if prepare(ctx).is_some() {
        point_at_stack(ctx);
    }
}

/// Does all of [`arm`] except for the stack.
#[inline(always)]
fn prepare<M: Machine>(ctx: &Ctx<'_, M>) -> Option<()> {
    let (state, entry, syscall) = (&*ctx.state, ctx.m.entry(), ctx.state.callbacks.syscall);
    let plain = syscall.masks_events
        && !state.nmi_masked
        && !state.areas_stale
        && ctx.m.has_gs_instructions()
        && !ctx.domain.assisted(Assist::ArchitecturalIopl)
        && ctx.world.frames.has_fast_paths();
    let fault = gate(ctx, PF);
    let handlers = [syscall.address, fault.address];
    if !(plain && fault.masks_events || planted(Fault::ArmAnyway))
        || !handlers.iter().all(|at| *at != 0 && GuestVirt(*at).is_canonical())
    {
        return None;
    }
    let (frame, at) = ctx.vcpu.record()?;
    entry.info.store(ctx.m.direct(frame) + at as u64, Relaxed);
    entry.syscall.store(syscall.address, Relaxed);
    entry.fault.store(fault.address, Relaxed);
    entry.kernel_cr3.store(state.kernel_root?.address(), Relaxed);
    (state.kernel_mode || state.user_root.is_some()).then_some(())?;
    entry.user_cr3.store(state.user_root.map_or(0, Frame::address), Relaxed);
    GuestVirt(entry.other_gs.load(Relaxed)).is_canonical().then_some(())
}

/// Tells the entry code where the kernel's stack is. This is the last step of [`arm`], and is enough if only the stack
/// or both roots have changed since. Without a usable stack the entry code does nothing by itself.
#[inline(always)]
pub(super) fn point_at_stack<M: Machine>(ctx: &Ctx<'_, M>) {
    let mode = match (find_frames(ctx, ctx.state.kernel_root), ctx.state.kernel_mode) {
        (None, _) => mode::SLOW,
        (Some(()), false) => mode::USER,
        (Some(()), true) if ctx.state.user_root.is_some() => mode::KERNEL,
        (Some(()), true) => mode::ROOTLESS,
    };
    ctx.m.entry().mode.store(mode, Relaxed);
}

/// Like [`point_at_stack`], in kernel mode with this root, and with a root of user mode.
#[inline(always)]
pub(super) fn point_at_kernel_stack<M: Machine>(ctx: &Ctx<'_, M>, root: Frame) {
    let mode = if find_frames(ctx, Some(root)).is_some() { mode::KERNEL } else { mode::SLOW };
    ctx.m.entry().mode.store(mode, Relaxed);
}

/// Like [`point_at_stack`], if only the root has changed, under which the stack may be in another frame.
#[inline(always)]
pub(super) fn stay_at_stack<M: Machine>(ctx: &Ctx<'_, M>, root: Frame) {
    let entry = ctx.m.entry();
    if ctx.walks.stands_under(ctx.m, root, GuestVirt(entry.back_sp.load(Relaxed))) {
        entry.mode.store(mode::KERNEL, Relaxed);
    } else {
        point_at_stack(ctx);
    }
}

/// Finds the frames on the kernel's stack: that of system calls and page faults, and that of the return, in one page.
#[inline(always)]
fn find_frames<M: Machine>(ctx: &Ctx<'_, M>, root: Option<Frame>) -> Option<()> {
    let (sp, entry) = (ctx.state.kernel_sp, ctx.m.entry());
    let (frame, back) = ((sp & !15).wrapping_sub(PUSHED), sp.wrapping_sub(POPPED));
    if sp & 7 != 0 || (back ^ sp.wrapping_sub(8)) / PAGE_SIZE as u64 != 0 {
        return None;
    }
    let page = ctx.m.direct(ctx.frame(root?, GuestVirt(back), Kind::Data, Access::Write)?);
    entry.frame_sp.store(frame, Relaxed);
    entry.frame.store(page + GuestVirt(frame).offset() as u64, Relaxed);
    entry.back_sp.store(back, Relaxed);
    entry.back.store(page + GuestVirt(back).offset() as u64, Relaxed);
    ctx.walks.stand_on(GuestVirt(back));
    Some(())
}

/// Whether what the entry code knows is still right, if only page tables may have changed since [`arm`].
#[inline]
pub(super) fn holds<M: Machine>(ctx: &Ctx<'_, M>) -> bool {
    ctx.walks.stands(ctx.m) || planted(Fault::StayArmed)
}

/// Like [`holds`], if only the page-table entry at machine address `slot` may have changed.
#[inline(always)]
pub(super) fn holds_but<M: Machine>(ctx: &Ctx<'_, M>, slot: u64) -> bool {
    ctx.walks.stands_beside(ctx.m, slot) || planted(Fault::StayArmed)
}

/// Takes over from the entry code what it has done, and stops it from doing more. Called when the hypervisor has the
/// CPU again.
#[inline(always)]
pub fn left<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let entry = ctx.m.entry();
    match entry.mode.load(Relaxed) {
        mode::USER => ctx.state.kernel_mode = false,
        mode::KERNEL | mode::ROOTLESS => ctx.state.kernel_mode = true,
        _ => {}
    }
    entry.mode.store(mode::SLOW, Relaxed);
    ctx.state.cr2 = entry.cr2.load(Relaxed);
    let (users, ruled) = (entry.from_user.load(Relaxed), entry.ruled.load(Relaxed));
    if users | ruled != 0 {
        entry.from_user.store(0, Relaxed);
        entry.ruled.store(0, Relaxed);
        // Each system call or fault from user code that the entry code handled was followed by one call to return.
        let [from_user, rules] = &ctx.domain.entries;
        from_user.fetch_add(users, Relaxed);
        rules.fetch_add(users.wrapping_add(ruled), Relaxed);
    }
}
