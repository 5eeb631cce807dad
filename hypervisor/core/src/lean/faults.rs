//! Faults of a stock kernel that are seen to at once: page faults that are its own, writes to its page tables, and the MSRs of
//! the segment bases.

use super::shape::shape;
use super::{Way, count, left, settle};
use crate::claim::Access;
use crate::claim::seen::Kind;
use crate::flags;
use crate::paging::Slot;
use crate::prelude::*;
use crate::trap::decode::{self, truncate};
use crate::trap::emulate::{finish_write, msr};
use crate::trap::table::gate;
use crate::trap::{self, PF, PF_FETCH, PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE};
use hypercall_abi::callback::Assist;
use hypercall_abi::selector;

/// A page fault of the guest's kernel.
#[inline(always)]
pub(super) fn page_fault<M: Machine>(ctx: &mut Ctx<'_, M>, error: u32) -> Option<Way> {
    if error & (PF_USER | PF_RESERVED) != PF_USER {
        return None;
    }
    let address = ctx.m.fault_address();
    let forbidden_write = error & (PF_WRITE | PF_PRESENT | PF_FETCH) == PF_WRITE | PF_PRESENT;
    if forbidden_write && ctx.domain.assisted(Assist::WritablePagetables) {
        return table_write(ctx, address);
    }
    let handler = gate(ctx, PF);
    left(ctx);
    trap::set_cr2(ctx, address);
    let bounced = trap::bounce(ctx, handler, Some(error & !PF_USER));
    super::arm(ctx);
    // A domain that has crashed does not run.
    Some(if bounced.is_ok() { Way::Short } else { Way::Noted })
}

/// The first bytes of the instruction at RIP of flat 64-bit code, if they lie in one page.
fn code<M: Machine>(ctx: &Ctx<'_, M>) -> Option<u64> {
    let rip = GuestVirt(ctx.own.regs.rip);
    if ctx.own.regs.cs != u64::from(selector::GUEST_CS) {
        return None;
    }
    let frame = ctx.view().ok()?.of_kind(Kind::Code).frame(rip, Access::Read).ok()?;
    let [low, high] = ctx.m.page(frame).get(rip.offset() / 8..)?.first_chunk::<2>()?;
    let (low, high, shift) = (low.load(Relaxed), high.load(Relaxed), 8 * low32(rip.0 & 7));
    Some(low >> shift | (high << 1) << (63 - shift))
}

/// The instruction at RIP, of so many bytes, has been carried out.
fn retire<M: Machine>(ctx: &mut Ctx<'_, M>, length: u64) -> Option<Way> {
    let regs = &mut ctx.own.regs;
    regs.rip = regs.rip.wrapping_add(length);
    regs.rflags &= !flags::RF;
    count(ctx);
    Some(Way::Exact)
}

/// A write to an own L1 table: what it changes is at the address of the fault, so that only the kind of the instruction and its
/// length are of interest.
fn table_write<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64) -> Option<Way> {
    let code = code(ctx)?;
    let (write, length) = match ctx.own.last_write {
        Some((last, write)) if last == code => write,
        _ => shape(code)?,
    };
    ctx.own.last_write = Some((code, (write, length)));
    let at = GuestVirt(address);
    let aligned = address & u64::from(write.size).wrapping_sub(1) == 0;
    // A wide write that begins in the page before has its fault at the beginning of this one.
    if ctx.own.regs.rflags & flags::TF != 0 || !aligned || (write.size > 1 && at.offset() == 0) {
        return None;
    }
    let (operand, accumulator) = (write.operand(&ctx.own.regs), ctx.own.regs.rax);
    let shift = 8 * low32(address & 7);
    let field = truncate(u64::MAX, write.size) << shift;
    let table = ctx.view().ok()?.of_kind(Kind::Table).frame(at, Access::Read).ok()?;
    let slot = Slot { table, index: at.offset() / 8 };
    let written = ctx.session(ctx.domain).ordinary_write(slot, |entry| {
        let old = (entry & field) >> shift;
        decode::apply(write.change, old, operand, accumulator, write.size).map(|new| entry & !field | new << shift)
    });
    settle(ctx);
    let (entry, stored) = written?;
    finish_write(&mut ctx.own.regs, &write, (entry & field) >> shift, stored);
    retire(ctx, length)
}

/// RDMSR and WRMSR of the segment bases.
pub(super) fn segment_base<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Way> {
    const RDMSR: u64 = 0x320f;
    const WRMSR: u64 = 0x300f;
    let code = code(ctx)? & 0xffff;
    let (entry, which) = (ctx.m.entry(), low32(ctx.own.regs.rcx));
    if ctx.own.regs.rflags & flags::TF != 0 {
        return None;
    }
    if code == RDMSR {
        let value = match which {
            msr::FS_BASE => ctx.m.fs_base(),
            msr::GS_BASE => ctx.m.gs_base(),
            msr::KERNEL_GS_BASE => entry.other_gs.load(Relaxed),
            _ => return None,
        };
        let regs = &mut ctx.own.regs;
        (regs.rax, regs.rdx) = (low32(value).into(), value >> 32);
        return retire(ctx, 2);
    }
    let value = ctx.own.regs.rdx << 32 | u64::from(low32(ctx.own.regs.rax));
    if code != WRMSR || !GuestVirt(value).is_canonical() {
        return None;
    }
    match which {
        msr::FS_BASE => ctx.m.set_fs_base(value),
        msr::GS_BASE => ctx.m.set_gs_base(value),
        msr::KERNEL_GS_BASE => entry.other_gs.store(value, Relaxed),
        _ => return None,
    }
    retire(ctx, 2)
}
