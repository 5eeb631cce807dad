//! Hypercalls of a stock kernel that are finished at once.

use super::arm::{point_at_stack, stay_at_stack};
use super::{Way, count, settle, settle_at};
use crate::addr::CpuSet;
use crate::call::Call;
use crate::event::UpcallMask;
use crate::fault::{Fault, planted};
use crate::flags;
use crate::machine::{Flush, Registers, mode};
use crate::paging::ops::{BATCH, COUNT};
use crate::prelude::*;
use crate::sched::ops::set_timer;
use core::hint::cold_path;
use hypercall_abi::Hypercall;
use hypercall_abi::callback::{IRET_IN_SYSCALL, IretContext, SegmentBase};
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, uvmf};
use hypercall_abi::vcpu::{SetSingleshotTimer, VcpuOp};
use zerocopy::{FromZeros, IntoBytes};

const SELF: u64 = domid::SELF as u64;

/// Carries out the call in the registers of a guest's kernel.
#[inline(always)]
pub(super) fn hypercall<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    const MMU_UPDATE: u64 = Hypercall::MmuUpdate as u64;
    const STACK_SWITCH: u64 = Hypercall::StackSwitch as u64;
    const UPDATE_VA_MAPPING: u64 = Hypercall::UpdateVaMapping as u64;
    const IRET: u64 = Hypercall::Iret as u64;
    const SET_SEGMENT_BASE: u64 = Hypercall::SetSegmentBase as u64;
    const MMUEXT_OP: u64 = Hypercall::MmuextOp as u64;
    const VCPU_OP: u64 = Hypercall::VcpuOp as u64;
    if ctx.own.regs.rax == MMU_UPDATE {
        return mmu_update(ctx);
    }
    cold_path();
    match ctx.own.regs.rax {
        UPDATE_VA_MAPPING => update_va_mapping(ctx),
        IRET => iret(ctx),
        STACK_SWITCH => stack_switch(ctx),
        SET_SEGMENT_BASE => set_segment_base(ctx),
        MMUEXT_OP => new_roots(ctx),
        VCPU_OP => timer(ctx),
        _ => None,
    }
}

/// The call is done, with result 0.
fn done<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    ctx.own.regs.rax = 0;
    count(ctx);
    Some(Way::Short)
}

/// The first `done` elements, of `size` bytes each, of a call over a list are: the rest is noted.
fn rest<M: Machine>(ctx: &mut Ctx<'_, M>, done: u64, size: usize) -> Option<Way> {
    let Registers { rax, rdi, rsi, rdx, r10, r8, r9, .. } = ctx.own.regs;
    let list = rdi.wrapping_add(done.wrapping_mul(size as u64));
    let mut call = Call::new(rax, [list, (rsi & COUNT).wrapping_sub(done), rdx, r10, r8, r9]);
    call.done = done;
    ctx.own.call = Some(call);
    count(ctx);
    Some(Way::Noted)
}

/// Requests for the caller's tables and frames, with nobody to be told how many were done.
fn mmu_update<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    let Registers { rdi: list, rsi: count, rdx: told, r10: domains, .. } = ctx.own.regs;
    if domains != SELF || told != 0 {
        return None;
    }
    if count & COUNT != 1 {
        return several_updates(ctx, list, count & COUNT);
    }
    let request = ctx.read::<MmuUpdate>(list).ok()?;
    let did = ctx.ordinary()?.update(request);
    settle_at(ctx, request.ptr);
    did?;
    done(ctx)
}

#[inline(never)]
fn several_updates<M: Machine>(ctx: &mut Ctx<'_, M>, list: u64, count: u64) -> Option<Way> {
    let mut requests = [MmuUpdate::new_zeroed(); BATCH];
    let requests = requests.get_mut(..usize::try_from(count).ok()?)?;
    ctx.read_bytes(list, requests.as_mut_bytes()).ok()?;
    let did = ctx.ordinary()?.updates(requests);
    settle(ctx);
    match did as u64 {
        0 => None,
        all if all == count => done(ctx),
        some => rest(ctx, some, size_of::<MmuUpdate>()),
    }
}

/// An entry of the caller's, with no flush or that of the address here.
fn update_va_mapping<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    let Registers { rdi: at, rsi: value, rdx: how, .. } = ctx.own.regs;
    if how != 0 && how != uvmf::INVLPG {
        return None;
    }
    let (root, at) = (ctx.own.kernel_root?, GuestVirt(at));
    let updated = ctx.ordinary()?.update_va(root, at, value);
    settle(ctx);
    updated?;
    if how == uvmf::INVLPG && !at.in_hole() {
        ctx.m.flush(CpuSet::only(ctx.m.this_cpu()), Flush::Page(at));
    }
    done(ctx)
}

/// The kernel's stack of the next process.
fn stack_switch<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    let Registers { rdi: ss, rsi: sp, .. } = ctx.own.regs;
    (ctx.own.kernel_ss, ctx.own.kernel_sp) = (ss & 0xffff | 3, sp);
    point_at_stack(ctx);
    done(ctx)
}

fn set_segment_base<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    let Registers { rdi: which, rsi: base, .. } = ctx.own.regs;
    GuestVirt(base).is_canonical().then_some(())?;
    match SegmentBase::from_number(u64::from(low32(which)))? {
        SegmentBase::Fs => ctx.m.set_fs_base(base),
        SegmentBase::GsUser => ctx.m.entry().other_gs.store(base, Relaxed),
        _ => return None,
    }
    done(ctx)
}

/// The caller's one-shot timer, for a time to come.
fn timer<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    const SET: u64 = VcpuOp::SetSingleshotTimer as u64;
    let Registers { rdi: command, rsi: vcpu, rdx: arg, .. } = ctx.own.regs;
    if command != SET || VcpuId(low32(vcpu)) != ctx.vcpu.number() {
        return None;
    }
    let SetSingleshotTimer { timeout_abs_ns: deadline, .. } = ctx.read(arg).ok()?;
    (deadline > ctx.m.now()).then_some(())?;
    set_timer(ctx, deadline);
    done(ctx)
}

/// Both roots of the next process, as Linux changes them.
fn new_roots<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    const KERNEL: u32 = MmuextCommand::NewBaseptr as u32;
    const USER: u32 = MmuextCommand::NewUserBaseptr as u32;
    let Registers { rdi: list, rsi: count, rdx: told, r10: domain, .. } = ctx.own.regs;
    if domain != SELF || told != 0 || count & COUNT != 2 || ctx.own.ldt_entries > 0 {
        return None;
    }
    let [first, second] = ctx.read::<[MmuextOp; 2]>(list).ok()?;
    if (first.cmd, second.cmd) != (KERNEL, USER) {
        return None;
    }
    let (kernel, user) = (Frame::new(first.arg1)?, Frame::new(second.arg1).filter(|_| second.arg1 != 0)?);
    let (m, old) = (ctx.m, (ctx.own.kernel_root?, ctx.own.user_root?));
    let short = ctx.ordinary()?;
    short.switch_root(old.0, kernel, || m.load_root(kernel))?;
    let also = short.switch_root(old.1, user, || {});
    drop(short);
    ctx.own.kernel_root = Some(kernel);
    let entry = ctx.m.entry();
    entry.mode.store(mode::LONG, Relaxed); // until it knows both
    entry.kernel_cr3.store(kernel.address(), Relaxed);
    if also.is_none() {
        return rest(ctx, 1, size_of::<MmuextOp>());
    }
    ctx.own.user_root = Some(user);
    entry.user_cr3.store(user.address(), Relaxed);
    stay_at_stack(ctx, kernel);
    done(ctx)
}

/// The way back from a trap of kernel code to kernel code.
fn iret<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    let frame = ctx.read::<IretContext>(ctx.own.regs.rsp).ok()?;
    let (mask, masked) = (UpcallMask::of(ctx.m, ctx.vcpu), frame.rflags & flags::IF == 0);
    if frame.cs & 3 == 3 || (!masked && mask.is_awaited() && !planted(Fault::ShortOfEvents)) {
        return None;
    }
    mask.set(masked);
    if !masked && mask.is_awaited() && !planted(Fault::ShortOfEvents) {
        return None; // it came meanwhile: the long way unmasks once more, and delivers it
    }
    let regs = &mut ctx.own.regs;
    (regs.rip, regs.rsp, regs.rax) = (frame.rip, frame.rsp, frame.rax);
    (regs.cs, regs.ss) = (frame.cs & 0xffff | 3, frame.ss & 0xffff | 3);
    regs.rflags = frame.rflags & flags::GUEST | flags::IF | 2;
    count(ctx);
    if frame.flags & IRET_IN_SYSCALL != 0 {
        return Some(Way::Short);
    }
    let regs = &mut ctx.own.regs;
    (regs.rcx, regs.r11) = (frame.rcx, frame.r11);
    Some(Way::Exact)
}
