//! Lists of calls: [`switch`] to another process, and lists that change page tables ([`multicall`]).
//!
//! In the latter, entries that have a fast path are carried out on it. Other changes of page tables, such as pins, are carried
//! out by the functions of the slow path, but within the loop of [`run`](super::run): most lists of a kernel have both.

use super::arm::point_at_kernel_stack;
use super::calls::{ROOTS, advance, done, number, set_roots, stack_switch, update_va_mapping};
use super::{Resume, again, count};
use crate::addr::PAGE_BYTES;
use crate::call::{Call, Multicall};
use crate::claim::walks::Kind;
use crate::claim::{Access, view};
use crate::dispatch::{self, MULTICALL_STEP};
use crate::machine::{Page, Registers};
use crate::paging::ops;
use crate::prelude::*;
use core::hint::cold_path;
use core::sync::atomic::AtomicU64;
use hypercall_abi::mmu::{MmuextOp, MulticallEntry, pte};

/// The two calls by which our patches of Linux switch to another process: both roots, then the stack. The list and the
/// operations of its first call must lie in one page, which this CPU's cache has.
#[inline(always)]
pub(super) fn switch<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    let (m, Registers { rdi: at, rsi: length, .. }) = (ctx.m, ctx.state.regs);
    let root = ctx.state.kernel_root?;
    // Of this kind, so that it and stacks do not evict each other.
    let page = m.page(ctx.frame(root, GuestVirt(at), Kind::Table, Access::Write)?);
    let view = view(m, root, GuestVirt(at));
    let [op, first, list, count, told, domain, _, _, next, second, ss, sp, ..] = part::<16>(page, at)?;
    let [op, list, count, told, domain, next] = [op, list, count, told, domain, next].map(|word| word.load(Relaxed));
    let elsewhere = ((list ^ at) / PAGE_BYTES) | (list | at) & 7;
    if low32(length) != 2 || (op, next) != (number::MMUEXT_OP, number::STACK_SWITCH) || elsewhere != 0 {
        return None;
    }
    let operations = part::<6>(page, list)?.each_ref().map(|word| word.load(Relaxed));
    let some = set_roots(ctx, [list, count, told, domain], operations)?;
    // The page of the list may be another one under the new root, or if this CPU has answered a flush.
    let root = Frame::from_u32(low32(operations[1]));
    if some != ROOTS || self::view(m, root, GuestVirt(at)) != view {
        cold_path();
        let mut call = Call::new(number::MMUEXT_OP, [list, ROOTS, 0, domid::SELF.into(), 0, 0]);
        advance(&mut call, some, size_of::<MmuextOp>());
        return go_on(ctx, &call, Multicall { running: true, ..Multicall::new(at, 2) });
    }
    first.store(0, Relaxed);
    second.store(0, Relaxed);
    stack_switch(ctx, [ss.load(Relaxed), sp.load(Relaxed), 0, 0]);
    point_at_kernel_stack(ctx, root);
    done(ctx)
}

/// The `N` words from the one that an address lies in, in this page.
#[inline(always)]
fn part<const N: usize>(page: &Page, at: u64) -> Option<&[AtomicU64; N]> {
    page.get(GuestVirt(at).offset() / 8..)?.first_chunk()
}

/// Carries out a multicall, up to the first entry that neither has a fast path here nor changes page tables: with it, the slow
/// path goes on. It also goes on when a step has become long (P8).
#[inline(never)]
pub(super) fn multicall<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    const RESULT: u64 = long(core::mem::offset_of!(MulticallEntry, result));
    let Registers { rax: number, rdi: at, rsi, .. } = ctx.state.regs;
    let (mut list, mut call) = (Multicall::new(at, low32(rsi).into()), Call::new(number, [at, rsi, 0, 0, 0, 0]));
    let mut end = None; // set with the first entry that the slow path carries out
    for entry in 0..MULTICALL_STEP {
        if list.left == 0 || end.is_some_and(|end| ctx.m.now() >= end) {
            break;
        }
        let Ok(MulticallEntry { op, args, .. }) = ctx.read::<MulticallEntry>(list.at) else { break };
        let (mut next, [a, value, c, d, ..]) = (Call::new(op, args), args);
        let args = [a, value, c, d];
        let answer = match op {
            // A mapping that becomes writable is most often one of a page that was a table, which is not simple.
            number::UPDATE_VA_MAPPING if value & pte::WRITE == 0 && update_va_mapping(ctx, args).is_some() => Ok(0),
            number::MMU_UPDATE | number::UPDATE_VA_MAPPING | number::MMUEXT_OP => {
                end.get_or_insert_with(|| ctx.world.sched.step_end(ctx.m));
                on_slow_path(ctx, &mut next)
            }
            _ if entry == 0 => return None,
            _ => break,
        };
        call = next;
        let Ok(value) = dispatch::settle(ctx, &call, answer) else {
            list.running = true;
            break;
        };
        if ctx.write(list.at.wrapping_add(RESULT), &value).is_err() {
            let value = dispatch::settle(ctx, &call, Err(Errno::Fault.into())).unwrap_or_default();
            return finish(ctx, value);
        }
        (list.at, list.left) = (list.at.wrapping_add(bytes_of::<MulticallEntry>()), list.left.wrapping_sub(1));
    }
    if list.left == 0 {
        return finish(ctx, 0);
    }
    go_on(ctx, &call, list)
}

/// Leaves the rest of a list, whose entry `call` has begun, to the slow path.
fn go_on<M: Machine>(ctx: &mut Ctx<'_, M>, call: &Call, list: Multicall) -> Option<Resume> {
    ctx.state.call = Some(Call { multicall: Some(list), ..*call });
    count(ctx);
    Some(Resume::Call)
}

/// Carries out a step of a call that changes page tables.
fn on_slow_path<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let answer = match call.number {
        number::MMU_UPDATE => ops::mmu_update(ctx, call),
        number::UPDATE_VA_MAPPING => ops::update_va_mapping(ctx, call),
        _ => ops::mmuext_op(ctx, call),
    };
    ctx.end_visits();
    answer
}

/// Ends the multicall with a result, and tells the entry code of all that may have changed.
fn finish<M: Machine>(ctx: &mut Ctx<'_, M>, result: u64) -> Option<Resume> {
    ctx.state.regs.rax = result;
    again(ctx);
    count(ctx);
    Some(Resume::Sysret)
}
