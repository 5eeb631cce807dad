//! A copy of the entry code: what it does by itself, without the rules.

use super::super::machine::WholeMachine;
use super::Context;
use hv_core::addr::{Frame, GuestVirt};
use hv_core::flags;
use hv_core::machine::{CpuState, Entry, Exit, mode};
use hypercall_abi::callback::IRET_IN_SYSCALL;
use hypercall_abi::{Hypercall, selector};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// Flags with which the entry code does not use SYSRET.
const EXACT: u64 = 0x3_0100;

/// The value of a word that the entry code reads.
pub(super) fn value(word: &AtomicU64) -> u64 {
    word.load(Relaxed)
}

/// What the entry code does by itself; false if it leaves everything to the rules.
pub(in crate::world) fn enters(ctx: &mut Context<'_>, exit: Exit) -> bool {
    let m = ctx.m;
    let entry = m.entry();
    match (value(&entry.mode), exit) {
        (mode::USER, Exit::Syscall) => to_kernel(ctx, entry, None),
        (mode::USER, Exit::Fault { vector: 14, error, address }) if error & 12 == 4 => {
            to_kernel(ctx, entry, Some((error, address)))
        }
        (mode::KERNEL, Exit::Syscall) if ctx.state.regs.rax == Hypercall::Iret.number() => back_to_user(ctx, entry),
        (mode::KERNEL, Exit::Syscall) if ctx.state.regs.rax == Hypercall::SetSegmentBase.number() => {
            let base = ctx.state.regs.rsi;
            let own = ctx.state.regs.rdi & 0xffff_ffff == 1 && GuestVirt(base).is_canonical();
            let waits = ctx.world.upcall_due(m, ctx.vcpu);
            let plain = !waits && GuestVirt(ctx.state.regs.rip).is_canonical() && ctx.state.regs.rflags & EXACT == 0;
            if own && plain {
                entry.other_gs.store(base, Relaxed);
                ctx.state.regs.rax = 0;
            }
            own && plain
        }
        _ => false,
    }
}

/// A word that ring 0 sees at an address.
fn seen(at: u64) -> (Frame, usize) {
    (Frame::containing(at).expect("a frame"), (at % 4096 / 8) as usize)
}

fn swap_gs(m: &WholeMachine, entry: &Entry) {
    let active = m.gs_base();
    m.set_gs_base(value(&entry.other_gs));
    entry.other_gs.store(active, Relaxed);
}

/// User code's system call, or its page fault.
fn to_kernel(ctx: &mut Context<'_>, entry: &Entry, fault: Option<(u32, u64)>) -> bool {
    let (m, regs) = (ctx.m, &mut ctx.state.regs);
    let (record, head) = seen(value(&entry.info));
    let bytes = m.peek(record, head);
    if bytes & 0xff00 != 0 {
        return false;
    }
    m.poke(record, head, bytes | 0x100);
    let mut frame = vec![regs.rcx, regs.r11, regs.rip, regs.cs & 0xffff, regs.rflags, regs.rsp, regs.ss];
    let (mut to, mut sp, mut handler) = (value(&entry.frame), value(&entry.frame_sp), value(&entry.syscall));
    if let Some((error, address)) = fault {
        m.poke(record, head + 2, address);
        entry.cr2.store(address, Relaxed);
        frame.insert(2, error.into());
        (to, sp, handler) = (to - 8, sp - 8, value(&entry.fault));
    }
    for (n, word) in frame.iter().enumerate() {
        let (page, place) = seen(to + 8 * n as u64);
        m.poke(page, place, *word);
    }
    (regs.rip, regs.rsp) = (handler, sp);
    (regs.cs, regs.ss) = (selector::GUEST_CS.into(), selector::GUEST_SS.into());
    let direction = if fault.is_none() { flags::DF } else { 0 };
    regs.rflags &= !(flags::TF | flags::NT | flags::RF | flags::VM | flags::AC | direction);
    entry.mode.store(mode::KERNEL, Relaxed);
    m.load_root(Frame::containing(value(&entry.kernel_cr3)).expect("a root"));
    swap_gs(m, entry);
    true
}

/// The way back to user code.
fn back_to_user(ctx: &mut Context<'_>, entry: &Entry) -> bool {
    let (m, regs) = (ctx.m, &mut ctx.state.regs);
    let word = |n: u64| {
        let (page, place) = seen(value(&entry.back) + 8 * n);
        m.peek(page, place)
    };
    let (record, head) = seen(value(&entry.info));
    if regs.rsp != value(&entry.back_sp) || word(5) & 3 != 3 || word(6) & flags::IF == 0 {
        return false;
    }
    let bytes = m.peek(record, head) & !0xff00;
    m.poke(record, head, bytes);
    if bytes & 0xff != 0 {
        return false;
    }
    (regs.rax, regs.r11, regs.rcx, regs.rip) = (word(0), word(1), word(2), word(4));
    (regs.cs, regs.ss) = (word(5) & 0xffff | 3, word(8) & 0xffff | 3);
    (regs.rflags, regs.rsp) = (word(6) & flags::GUEST | 0x202, word(7));
    let flat = (regs.cs, regs.ss) == (selector::GUEST_CS.into(), selector::GUEST_SS.into());
    if word(3) & IRET_IN_SYSCALL != 0 && flat && GuestVirt(regs.rip).is_canonical() && regs.rflags & EXACT == 0 {
        (regs.rcx, regs.r11) = (regs.rip, regs.rflags); // by SYSRET
    }
    entry.mode.store(mode::USER, Relaxed);
    m.load_root(Frame::containing(value(&entry.user_cr3)).expect("a root"));
    swap_gs(m, entry);
    true
}
