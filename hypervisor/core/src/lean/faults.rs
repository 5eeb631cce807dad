//! Faults of a stock kernel that a fast path handles: page faults that the guest gets, writes to its page tables, and
//! the MSRs of the segment bases.

use super::shape::{Effect, shape};
use super::{Resume, count, left, settle_at};
use crate::claim::Access;
use crate::claim::walks::Kind;
use crate::flags;
use crate::paging::Edit;
use crate::prelude::*;
use crate::trap::emulate::{finish_write, flags_of, msr};
use crate::trap::table::gate;
use crate::trap::{self, PF, PF_FETCH, PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE};
use hypercall_abi::selector;

/// Handles a page fault of the guest's kernel.
#[inline(always)]
pub(super) fn page_fault<M: Machine>(ctx: &mut Ctx<'_, M>, error: u32) -> Option<Resume> {
    const KINDS: u32 = PF_USER | PF_WRITE | PF_PRESENT | PF_FETCH | PF_RESERVED;
    const FORBIDDEN_WRITE: u32 = PF_USER | PF_WRITE | PF_PRESENT;
    let address = ctx.m.fault_address();
    if error & KINDS == FORBIDDEN_WRITE && ctx.writes_tables {
        return table_write(ctx, address);
    }
    if error & (PF_USER | PF_RESERVED) != PF_USER {
        return None;
    }
    let handler = gate(ctx, PF);
    left(ctx);
    trap::set_cr2(ctx, address);
    let bounced = trap::bounce(ctx, handler, Some(error & !PF_USER));
    super::arm(ctx);
    // `Call` sends a domain that has just crashed to the slow path.
    Some(if bounced.is_ok() { Resume::Sysret } else { Resume::Call })
}

/// Returns the first eight bytes of code at RIP, for flat 64-bit code whose bytes lie in one page.
#[inline(always)]
fn code<M: Machine>(ctx: &Ctx<'_, M>, root: Frame) -> Option<u64> {
    let rip = GuestVirt(ctx.state.regs.rip);
    if ctx.state.regs.cs != u64::from(selector::GUEST_CS) {
        return None;
    }
    let frame = ctx.frame(root, rip, Kind::Code, Access::Read)?;
    let [low, high] = ctx.m.page(frame).get(rip.offset() / 8..)?.first_chunk::<2>()?;
    let (low, high, shift) = (low.load(Relaxed), high.load(Relaxed), 8 * low32(rip.0 & 7));
    Some(low >> shift | (high << 1) << (63 - shift))
}

/// Ends the emulation of the instruction at RIP, of `length` bytes.
fn retire<M: Machine>(ctx: &mut Ctx<'_, M>, length: u64) -> Option<Resume> {
    let regs = &mut ctx.state.regs;
    regs.rip = regs.rip.wrapping_add(length);
    regs.rflags &= !flags::RF;
    count(ctx);
    Some(Resume::Exact)
}

/// Handles a write to an own L1 table. The faulting address tells which entry is written, so only the form and the
/// length of the instruction are needed.
fn table_write<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64) -> Option<Resume> {
    let root = ctx.state.kernel_root?;
    let code = code(ctx, root)?;
    if ctx.state.last_write.code != code {
        ctx.state.last_write = shape(code)?;
    }
    let shape = ctx.state.last_write;
    if ctx.state.regs.rflags & flags::TF != 0 {
        return None;
    }
    let edit = shape.edit(address, &ctx.state.regs)?;
    if edit.only.is_some() {
        return compare_exchange(ctx, address);
    }
    let (entry, _) = write(ctx, root, address, Edit { only: None, ..edit })?;
    let shape = ctx.state.last_write; // read again, so that it need not stay in registers
    match shape.effect {
        Effect::Store(_) => {}
        Effect::Exchange(place) => ctx.state.regs.set_word(place, entry),
        Effect::AndByte(bits) => {
            let result = entry >> (8 * (address & 7)) & bits & 0xff;
            ctx.state.regs.rflags = flags_of(ctx.state.regs.rflags, result, 1);
        }
        _ => finish(ctx, entry, true),
    }
    retire(ctx, shape.length)
}

#[cold]
fn compare_exchange<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64) -> Option<Resume> {
    let shape = ctx.state.last_write;
    let edit = shape.edit(address, &ctx.state.regs)?;
    let (entry, stored) = write(ctx, ctx.state.kernel_root?, address, edit)?;
    finish(ctx, entry, stored);
    retire(ctx, shape.length)
}

/// Changes the entry at an address on the fast path. Returns its old value, and whether a new one was stored.
#[inline(always)]
fn write<M: Machine>(ctx: &mut Ctx<'_, M>, root: Frame, address: u64, edit: Edit) -> Option<(u64, bool)> {
    let at = GuestVirt(address);
    let slot = ctx.frame(root, at, Kind::Table, Access::Read)?.address() | at.offset() as u64;
    let written = ctx.fast_path()?.edit(slot, edit);
    settle_at(ctx, slot);
    written
}

/// Sets registers and flags as the last recognized write leaves them.
#[inline(never)] // the callers do not need the whole shape
fn finish<M: Machine>(ctx: &mut Ctx<'_, M>, old: u64, stored: bool) {
    let VcpuState { regs, last_write, .. } = &mut *ctx.state;
    finish_write(regs, &last_write.write, old, stored);
}

/// Handles RDMSR and WRMSR of the segment bases.
pub(super) fn segment_base<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    const RDMSR: u64 = 0x320f;
    const WRMSR: u64 = 0x300f;
    let code = code(ctx, ctx.state.kernel_root?)? & 0xffff;
    let (entry, which) = (ctx.m.entry(), low32(ctx.state.regs.rcx));
    if ctx.state.regs.rflags & flags::TF != 0 {
        return None;
    }
    if code == RDMSR {
        let value = match which {
            msr::KERNEL_GS_BASE => entry.other_gs.load(Relaxed),
            msr::FS_BASE => ctx.m.fs_base(),
            msr::GS_BASE => ctx.m.gs_base(),
            _ => return None,
        };
        let regs = &mut ctx.state.regs;
        (regs.rax, regs.rdx) = (low32(value).into(), value >> 32);
        return retire(ctx, 2);
    }
    let value = ctx.state.regs.rdx << 32 | u64::from(low32(ctx.state.regs.rax));
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
