//! The fast paths: what stock kernels do all day, carried out at once when everything about it is ordinary. Each is a copy of a
//! slow path elsewhere, and ends with `None` before it has changed anything whenever it is not sure. Without this module the
//! guest would see the same.
//!
//! The fastest are in the entry code: system calls of user code, the way back from them, page faults of user code, a GS base.
//! [`mod@arm`] tells it what it may do by itself; [`calls`] and [`faults`] are asked when a guest has left for a rule after all.
//!
//! Touches: what the slow paths touch.
//! Keeps: what they keep.

pub mod arm;
mod calls;
mod faults;
pub mod shape;

pub use arm::{arm, left};

use crate::event::is_due;
use crate::machine::{entry, mode};
use crate::prelude::*;

/// How the guest goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resume {
    /// The slow path, for the rest of a call, which has been noted.
    Call,
    /// At once, with all registers.
    Exact,
    /// At once; RCX and R11 may be lost.
    Sysret,
}

/// What a run ended with, once fast paths have done what they could.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// An exit for the slow path.
    Exit,
    /// The rest of a call, which has been noted.
    Call,
}

/// Runs the guest, for as long as what it leaves for is ordinary. `enter` lets it run until it leaves and keeps what it left for
/// in [`crate::machine::Registers::error`]. Flushes are answered first: nothing waits or answers between [`arm()`] and the guest.
pub fn run<M: Machine>(ctx: &mut Ctx<'_, M>, mut enter: impl FnMut(&mut Ctx<'_, M>, Resume)) -> End {
    ctx.m.begin(&mut ctx.state.regs);
    arm(ctx);
    let mut way = if ctx.may_sysret { Resume::Sysret } else { Resume::Exact };
    let end = loop {
        enter(ctx, way);
        way = match handle(ctx) {
            Some(on @ (Resume::Exact | Resume::Sysret)) => on,
            Some(Resume::Call) => break End::Call,
            None => break End::Exit,
        };
    };
    left(ctx);
    end
}

/// Carries out what the guest has left for, if it is something ordinary; else the slow path begins with what the exit says.
#[inline(always)]
fn handle<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    const PAGE_FAULT: u32 = 14;
    const GENERAL_PROTECTION: u64 = 13 << 32;
    let (raw, mode) = (ctx.state.regs.error, ctx.m.entry().mode.load(Relaxed));
    let kind = low32(raw >> 32);
    // If the guest has unmasked upcalls by itself and one is pending, the slow path delivers it now.
    if mode != mode::KERNEL || is_due(ctx.m.record_head()) {
        return None;
    }
    ctx.state.kernel_mode = true; // the entry code may have brought it here
    match kind {
        entry::SYSCALL => calls::hypercall(ctx),
        PAGE_FAULT => faults::page_fault(ctx, low32(raw)),
        _ if raw == GENERAL_PROTECTION => faults::segment_base(ctx),
        _ => None,
    }
}

/// Counts an exit that took a fast path.
fn count<M: Machine>(ctx: &Ctx<'_, M>) {
    let ruled = &ctx.m.entry().ruled;
    ruled.store(ruled.load(Relaxed).wrapping_add(1), Relaxed);
}

/// After something that may have waited for a lock, and answered another CPU's flush meanwhile, or that may have changed where the
/// kernel's stack is: what the entry code knows must hold again.
#[inline]
fn settle<M: Machine>(ctx: &mut Ctx<'_, M>) {
    if !arm::holds(ctx) {
        again(ctx);
    }
}

/// The same where the only page table that may have changed is that of one entry, at this machine address.
#[inline(always)]
fn settle_at<M: Machine>(ctx: &mut Ctx<'_, M>, slot: u64) {
    if !arm::holds_but(ctx, slot) {
        again(ctx);
    }
}

#[cold]
fn again<M: Machine>(ctx: &mut Ctx<'_, M>) {
    left(ctx);
    arm(ctx);
}
