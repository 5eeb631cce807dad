//! The fast paths: what stock kernels do all the time, carried out at once in the simple cases. Each fast path does
//! what a slow path elsewhere does. In any case that it does not handle, it returns `None` before it has changed
//! anything. Without this module the guest would see the same.
//!
//! The fastest paths are in the assembly of the entry code: system calls of user code, the return from them, page
//! faults of user code, and changes of a GS base. [`mod@arm`] tells the entry code what it may do by itself; [`calls`],
//! [`multicall`] and [`faults`] handle the exits that the entry code does not.
//!
//! Touches: what the slow paths touch.
//! Keeps: what the slow paths keep.

pub mod arm;
mod calls;
mod faults;
mod multicall;
pub mod shape;

pub use arm::{arm, left};

use crate::event::is_due;
use crate::machine::{entry, mode};
use crate::prelude::*;

/// How the guest is resumed after an exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resume {
    /// At once, with all registers restored.
    Exact,
    /// At once by SYSRET, which overwrites RCX and R11.
    Sysret,
    /// On the slow path, which carries out the rest of a call, stored in `VcpuState::call`.
    Call,
}

/// Why [`run`] ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// An exit that needs the slow path.
    Exit,
    /// The rest of a call, stored in `VcpuState::call`, needs the slow path.
    Call,
}

/// Runs the guest until an exit needs the slow path. `enter` runs the guest until its next exit, and leaves the exit's
/// reason in [`crate::machine::Registers::error`]. Flush requests are answered first: nothing waits or answers them
/// between [`arm()`] and the guest.
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

/// Handles an exit on a fast path; `None` if the exit needs the slow path, which then begins with the exit's reason.
#[inline(always)]
fn handle<M: Machine>(ctx: &mut Ctx<'_, M>) -> Option<Resume> {
    const PAGE_FAULT: u32 = 14;
    const GENERAL_PROTECTION: u64 = 13 << 32;
    let (raw, mode) = (ctx.state.regs.error, ctx.m.entry().mode.load(Relaxed));
    let kind = low32(raw >> 32);
    // If the guest has unmasked upcalls without a call and an event is pending, the slow path delivers it now.
    if mode < mode::KERNEL || is_due(ctx.m.record_head()) {
        return None;
    }
    ctx.state.kernel_mode = true; // the entry code may have changed the mode
    match kind {
        entry::SYSCALL => calls::hypercall(ctx),
        PAGE_FAULT => faults::page_fault(ctx, low32(raw)),
        _ if raw == GENERAL_PROTECTION => faults::segment_base(ctx),
        _ => None,
    }
}

/// Counts an exit that a fast path handled.
fn count<M: Machine>(ctx: &Ctx<'_, M>) {
    let ruled = &ctx.m.entry().ruled;
    ruled.store(ruled.load(Relaxed).wrapping_add(1), Relaxed);
}

/// Makes sure that what the entry code knows is right. Called after anything that may have waited for a lock (and
/// meanwhile answered another CPU's flush), or that may have changed the page of the kernel's stack.
#[inline]
fn settle<M: Machine>(ctx: &mut Ctx<'_, M>) {
    if !arm::holds(ctx) {
        again(ctx);
    }
}

/// Like [`settle`], if of all page tables only the entry at machine address `slot` may have changed.
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
