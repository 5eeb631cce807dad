//! Hypercalls of a stock kernel that are finished at once, on a fast path.

use super::arm::{point_at_stack, stay_at_stack};
use super::{Resume, count, multicall, settle, settle_at};
use crate::addr::CpuSet;
use crate::call::Call;
use crate::event::UpcallMask;
use crate::fault::{Fault, planted};
use crate::flags;
use crate::machine::{Flush, Registers, mode};
use crate::paging::ops::{BATCH, COUNT};
use crate::prelude::*;
use crate::sched::ops::set_timer;
use crate::vcpu;
use core::hint::cold_path;
use hypercall_abi::callback::{IRET_IN_SYSCALL, IretContext};
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, uvmf};
use hypercall_abi::vcpu::{SetSingleshotTimer, VcpuOp};
use zerocopy::{FromZeros, IntoBytes};

/// Roots of a vcpu.
pub(super) const ROOTS: u64 = 2;
const SELF: u64 = domid::SELF as u64;
/// The maximum number of requests of a list that the fast path of `mmu_update` carries out: as many as our patches of Linux put
/// into one call, and some ten thousand instructions.
const MOST_UPDATES: u64 = 256;

/// Numbers of the calls that have fast paths.
pub(super) mod number {
    use hypercall_abi::Hypercall;

    pub(crate) const MMU_UPDATE: u64 = Hypercall::MmuUpdate as u64;
    pub(crate) const STACK_SWITCH: u64 = Hypercall::StackSwitch as u64;
    pub(crate) const MULTICALL: u64 = Hypercall::Multicall as u64;
    pub(crate) const UPDATE_VA_MAPPING: u64 = Hypercall::UpdateVaMapping as u64;
    pub(crate) const IRET: u64 = Hypercall::Iret as u64;
    pub(crate) const SET_SEGMENT_BASE: u64 = Hypercall::SetSegmentBase as u64;
    pub(crate) const MMUEXT_OP: u64 = Hypercall::MmuextOp as u64;
    pub(crate) const VCPU_OP: u64 = Hypercall::VcpuOp as u64;
}

/// Carries out the call in the registers of the guest's kernel.
#[inline(always)]
pub(super) fn hypercall<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    if ctx.state.regs.rax == number::MMU_UPDATE {
        return mmu_update(ctx);
    }
    cold_path();
    if ctx.state.regs.rax == number::MULTICALL {
        return multicall::switch(ctx).or_else(|| multicall::multicall(ctx));
    }
    let Registers { rax: number, rdi, rsi, rdx, r10, .. } = ctx.state.regs;
    let args = [rdi, rsi, rdx, r10];
    match number {
        number::STACK_SWITCH => {
            stack_switch(ctx, args);
            point_at_stack(ctx);
            done(ctx)
        }
        number::MMUEXT_OP if rsi & COUNT != 1 => match new_roots(ctx, args)? {
            ROOTS => {
                stay_at_stack(ctx, ctx.state.kernel_root?);
                done(ctx)
            }
            some => rest(ctx, some, size_of::<MmuextOp>()),
        },
        number::IRET => iret(ctx),
        number::VCPU_OP => timer(ctx),
        _ => other(ctx, number, args),
    }
}

/// Carries out a call that is not as frequent.
#[inline(never)]
fn other<M: Machine>(ctx: &mut Ctx<'_, M>, number: u64, args: [u64; 4]) -> Option<Resume> {
    let did = match number {
        number::UPDATE_VA_MAPPING => update_va_mapping(ctx, args),
        number::SET_SEGMENT_BASE => vcpu::ops::set_segment_base(ctx, &mut new_call(number, args)).ok().map(|_| ()),
        number::MMUEXT_OP => flush_here(ctx, args),
        _ => None,
    };
    settle(ctx);
    did?;
    done(ctx)
}

/// A call with these arguments, of which nothing has been done.
fn new_call(number: u64, [a, b, c, d]: [u64; 4]) -> Call {
    Call::new(number, [a, b, c, d, 0, 0])
}

/// Ends the call with result 0.
#[inline(always)]
pub(super) fn done<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    ctx.state.regs.rax = 0;
    count(ctx);
    Some(Resume::Sysret)
}

/// Stores the rest of a call over a list, of which the first `done` elements (of `size` bytes each) have been carried
/// out.
fn rest<M: Machine>(ctx: &mut Ctx<'_, M>, done: u64, size: usize) -> Option<Resume> {
    let Registers { rax, rdi, rsi, rdx, r10, .. } = ctx.state.regs;
    let mut call = new_call(rax, [rdi, rsi, rdx, r10]);
    advance(&mut call, done, size);
    ctx.state.call = Some(call);
    count(ctx);
    Some(Resume::Call)
}

/// Moves a call over a list on by `done` elements of `size` bytes each.
pub(super) fn advance(call: &mut Call, done: u64, size: usize) {
    let [list, count, ..] = &mut call.args;
    *list = list.wrapping_add(done.wrapping_mul(size as u64));
    *count = (*count & COUNT).wrapping_sub(done);
    call.done = done;
}

/// `mmu_update` of the caller's own tables with its own frames, without a pointer for the number of requests done.
fn mmu_update<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    let Registers { rdi: list, rsi: count, rdx: told, r10: domains, .. } = ctx.state.regs;
    if domains != SELF || told != 0 {
        return None;
    }
    if count & COUNT != 1 {
        return several_updates(ctx, list, count & COUNT);
    }
    let request = ctx.read::<MmuUpdate>(list).ok()?;
    let did = ctx.fast_path()?.update(request);
    settle_at(ctx, request.ptr);
    did?;
    done(ctx)
}

/// A list of any length, of which the first [`MOST_UPDATES`] requests at most are carried out here.
#[inline(never)]
fn several_updates<M: Machine>(ctx: &mut Ctx<'_, M>, list: u64, count: u64) -> Option<Resume> {
    let mut room = [MmuUpdate::new_zeroed(); BATCH];
    let mut all = 0;
    while all < count.min(MOST_UPDATES) {
        let some = usize::try_from(count.wrapping_sub(all)).map_or(BATCH, |left| left.min(BATCH));
        let Some(requests) = room.get_mut(..some) else { break };
        let at = list.wrapping_add(all.wrapping_mul(size_of::<MmuUpdate>() as u64));
        let did = match (ctx.read_bytes(at, requests.as_mut_bytes()), ctx.fast_path()) {
            (Ok(()), Some(fast)) => fast.updates(requests),
            _ => break,
        };
        all = all.wrapping_add(did as u64);
        if did < some {
            break;
        }
    }
    settle(ctx);
    match all {
        0 => None,
        _ if all == count => done(ctx),
        _ => rest(ctx, all, size_of::<MmuUpdate>()),
    }
}

/// `update_va_mapping` with a frame of the caller's own, and no flush or one of this address on this CPU.
pub(super) fn update_va_mapping<M: Machine>(ctx: &mut Ctx<'_, M>, [at, value, how, _]: [u64; 4]) -> Option<()> {
    if how != 0 && how != uvmf::INVLPG {
        return None;
    }
    let (root, at) = (ctx.state.kernel_root?, GuestVirt(at));
    ctx.fast_path()?.update_va(root, at, value)?;
    if how == uvmf::INVLPG && !at.in_hole() {
        ctx.m.flush(CpuSet::only(ctx.m.this_cpu()), Flush::Page(at));
    }
    Some(())
}

/// `stack_switch`, by which a kernel sets its stack for the next process. The caller tells the entry code of it.
#[inline(always)]
pub(super) fn stack_switch<M: Machine>(ctx: &mut Ctx<'_, M>, [ss, sp, ..]: [u64; 4]) {
    (ctx.state.kernel_ss, ctx.state.kernel_sp) = (ss & 0xffff | 3, sp);
}

/// The `vcpu_op` that sets the caller's own one-shot timer to a time in the future.
fn timer<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    const SET: u64 = VcpuOp::SetSingleshotTimer as u64;
    let Registers { rdi: command, rsi: vcpu, rdx: arg, .. } = ctx.state.regs;
    if command != SET || VcpuId(low32(vcpu)) != ctx.vcpu.number() {
        return None;
    }
    let SetSingleshotTimer { timeout_abs_ns: deadline, .. } = ctx.read(arg).ok()?;
    (deadline > ctx.m.now()).then_some(())?;
    set_timer(ctx, deadline);
    done(ctx)
}

/// The `mmuext_op` by which Linux flushes what this CPU knows of one address, or of all.
fn flush_here<M: Machine>(ctx: &mut Ctx<'_, M>, [list, count, told, domain]: [u64; 4]) -> Option<()> {
    if domain != SELF || told != 0 || count & COUNT != 1 {
        return None;
    }
    let (op, here) = (ctx.read::<MmuextOp>(list).ok()?, CpuSet::only(ctx.m.this_cpu()));
    match MmuextCommand::from_number(op.cmd.into())? {
        MmuextCommand::TlbFlushLocal => ctx.world.frames.epochs().flush(ctx.m, here),
        MmuextCommand::InvlpgLocal if GuestVirt(op.arg1).in_hole() => {}
        MmuextCommand::InvlpgLocal => ctx.m.flush(here, Flush::Page(GuestVirt(op.arg1))),
        _ => return None,
    }
    Some(())
}

/// The `mmuext_op` by which Linux changes both roots for the next process. The caller then tells the entry code of the
/// stack, which may be in another frame. Returns how many of the [`ROOTS`] are changed.
#[inline(always)]
pub(super) fn new_roots<M: Machine>(ctx: &mut Ctx<'_, M>, args: [u64; 4]) -> Option<u64> {
    let [list, ..] = args;
    let operations = ctx.read(list).ok()?;
    set_roots(ctx, args, operations)
}

/// Does [`new_roots`] with the words of both operations.
#[inline(always)]
pub(super) fn set_roots<M: Machine>(ctx: &mut Ctx<'_, M>, args: [u64; 4], operations: [u64; 6]) -> Option<u64> {
    const KERNEL: u32 = MmuextCommand::NewBaseptr as u32;
    const USER: u32 = MmuextCommand::NewUserBaseptr as u32;
    let ([_, count, told, domain], [first, kernel, _, second, user, _]) = (args, operations);
    if domain != SELF || told != 0 || count & COUNT != ROOTS || ctx.state.ldt_entries > 0 {
        return None;
    }
    if (low32(first), low32(second)) != (KERNEL, USER) {
        return None;
    }
    let (kernel, user) = (Frame::new(kernel)?, Frame::new(user).filter(|_| user != 0)?);
    let (m, old) = (ctx.m, (ctx.state.kernel_root?, ctx.state.user_root?));
    let fast = ctx.fast_path()?;
    fast.switch_root(old.0, kernel, || m.load_root(kernel))?;
    let also = fast.switch_root(old.1, user, || {});
    drop(fast);
    ctx.state.kernel_root = Some(kernel);
    let entry = ctx.m.entry();
    entry.mode.store(mode::SLOW, Relaxed); // until the entry code has both roots, and the stack
    entry.kernel_cr3.store(kernel.address(), Relaxed);
    if also.is_none() {
        return Some(1);
    }
    ctx.state.user_root = Some(user);
    entry.user_cr3.store(user.address(), Relaxed);
    Some(ROOTS)
}

/// The return from a trap of kernel code to kernel code.
fn iret<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    let frame = ctx.read::<IretContext>(ctx.state.regs.rsp).ok()?;
    let (mask, masked) = (UpcallMask::of(ctx.m, ctx.vcpu), frame.rflags & flags::IF == 0);
    if frame.cs & 3 == 3 || (!masked && mask.is_awaited() && !planted(Fault::FastOverEvents)) {
        return None;
    }
    mask.set(masked);
    if !masked && mask.is_awaited() && !planted(Fault::FastOverEvents) {
        return None; // an event just arrived: the slow path unmasks again, and delivers it
    }
    let regs = &mut ctx.state.regs;
    (regs.rip, regs.rsp, regs.rax) = (frame.rip, frame.rsp, frame.rax);
    (regs.cs, regs.ss) = (frame.cs & 0xffff | 3, frame.ss & 0xffff | 3);
    regs.rflags = frame.rflags & flags::GUEST | flags::IF | 2;
    count(ctx);
    if frame.flags & IRET_IN_SYSCALL != 0 {
        return Some(Resume::Sysret);
    }
    let regs = &mut ctx.state.regs;
    (regs.rcx, regs.r11) = (frame.rcx, frame.r11);
    Some(Resume::Exact)
}
