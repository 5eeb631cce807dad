//! Lists of calls that change page tables, or the stack and the roots of a kernel.
//!
//! Entries that have a fast path are carried out on it. Other changes of page tables, such as pins, are carried out by the
//! functions of the slow path, but within the loop of [`run`](super::run): most lists of a kernel have both.

use super::arm::point_at_stack;
use super::calls::{ROOTS, advance, new_roots, number, stack_switch, update_va_mapping};
use super::{Resume, again, count};
use crate::call::{Call, Multicall};
use crate::dispatch::{self, MULTICALL_STEP};
use crate::machine::Registers;
use crate::paging::ops;
use crate::prelude::*;
use hypercall_abi::mmu::{MmuextOp, MulticallEntry, pte};

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
            number::STACK_SWITCH => {
                stack_switch(ctx, args);
                Ok(0)
            }
            number::MMUEXT_OP if let Some(some) = new_roots(ctx, args) => {
                advance(&mut next, some, size_of::<MmuextOp>());
                if some == ROOTS { Ok(0) } else { Err(Halt::More) }
            }
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
            return finish(ctx, end.is_some(), value);
        }
        (list.at, list.left) = (list.at.wrapping_add(bytes_of::<MulticallEntry>()), list.left.wrapping_sub(1));
    }
    if list.left == 0 {
        return finish(ctx, end.is_some(), 0);
    }
    ctx.state.call = Some(Call { multicall: Some(list), ..call });
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

/// Ends the multicall with a result, and tells the entry code of the stack, or of all that the slow path may have changed.
fn finish<M: Machine>(ctx: &mut Ctx<'_, M>, all: bool, result: u64) -> Option<Resume> {
    ctx.state.regs.rax = result;
    if all {
        again(ctx)
    } else {
        point_at_stack(ctx)
    }
    count(ctx);
    Some(Resume::Sysret)
}
