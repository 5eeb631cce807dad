//! Which guest handler gets which fault, and the frame we push for it (ABI core 3.2-3.8).
//!
//! Touches: the vcpu's registers, its kernel stack, its trap table.
//! Never touches: a page-table entry; a fault that is a page-table write goes to `paging`, an instruction to `emulate`.
//! Keeps: P12. After a bounce the selectors are the flat ones, IF is set, IOPL is 0.

pub mod config;
pub mod decode;
pub mod emulate;
pub mod ops;
pub mod table;

use crate::domain::crash::{Crashed, crash};
use crate::event::UpcallMask;
use crate::flags;
use crate::machine::{Exit, Interrupt, Registers};
use crate::prelude::*;
use crate::vcpu::debug::DR6_CLEAR;
use crate::vcpu::descriptors::map_ldt_page;
use crate::vcpu::mode::toggle;
use crate::vcpu::{Handler, Trap};
use hypercall_abi::Hypercall;
use hypercall_abi::callback::Assist;
use hypercall_abi::event::Virq;
use hypercall_abi::selector;
use hypercall_abi::shared::vcpu_info;
use ops::return_from_trap;
use table::gate;

const UD: u8 = 6;
const NM: u8 = 7;
const GP: u8 = 13;
pub(crate) const PF: u8 = 14;
/// Page fault: the entry was present, the access a write, by user mode, a reserved bit was set, an instruction fetch.
pub(crate) const PF_PRESENT: u32 = 1;
pub(crate) const PF_WRITE: u32 = 2;
pub(crate) const PF_USER: u32 = 4;
pub(crate) const PF_RESERVED: u32 = 8;
pub(crate) const PF_FETCH: u32 = 16;

/// What a run ended with is handled: a hypercall is noted for `dispatch`, a fault repaired or delivered.
///
/// # Errors
/// [`Crashed`]: the guest could not be helped.
pub fn handle<M: Machine>(ctx: &mut Ctx<'_, M>, exit: Exit) -> Result<(), Crashed> {
    ctx.may_sysret = false;
    if !ctx.state.kernel_mode {
        count(ctx, 0);
    }
    match exit {
        Exit::Syscall if ctx.state.kernel_mode => {
            count(ctx, 1);
            // ABI core 1.7.
            let Registers { rax, rdi, rsi, rdx, r10, r8, r9, .. } = ctx.state.regs;
            // Half of all calls, and they have no answer: the fast path to what `dispatch` does with them.
            if rax == Hypercall::Iret.number() {
                return return_from_trap(ctx);
            }
            ctx.state.call = Some(Call::new(rax, [rdi, rsi, rdx, r10, r8, r9]));
        }
        Exit::Syscall => return system_call(ctx, ctx.state.callbacks.syscall),
        Exit::Syscall32 => return system_call(ctx, ctx.state.callbacks.syscall32),
        Exit::Sysenter => return sysenter(ctx),
        Exit::Fault { vector, error, address } => return fault(ctx, vector, error, address),
        // Going back failed: the guest had a bad CS, SS or RIP. It gets the exception where it wanted to go.
        Exit::ReturnFault { vector: PF, error, address } => return page_fault(ctx, error, address),
        Exit::ReturnFault { vector, error, .. } => ctx.state.raise(vector, Some(error)),
        Exit::Interrupt(Interrupt::Console) => ctx.world.raise_global(ctx.m, Virq::Console),
        Exit::Interrupt(Interrupt::Message(vector)) => ctx.world.message(ctx.m, vector),
        Exit::Interrupt(_) => {}
    }
    Ok(())
}

fn count<M: Machine>(ctx: &Ctx<'_, M>, which: usize) {
    nth(&ctx.domain.entries, which).map(|counter| counter.fetch_add(1, Relaxed));
}

fn system_call<M: Machine>(ctx: &mut Ctx<'_, M>, handler: Handler) -> Result<(), Crashed> {
    if handler.address == 0 {
        ctx.state.regs.rip = ctx.state.regs.rip.wrapping_sub(2);
        ctx.state.raise(UD, None);
        return Ok(());
    }
    bounce(ctx, handler, None)?;
    ctx.state.regs.rflags &= !flags::DF;
    Ok(())
}

fn sysenter<M: Machine>(ctx: &mut Ctx<'_, M>) -> Result<(), Crashed> {
    let handler = ctx.state.callbacks.sysenter;
    if handler.address == 0 {
        ctx.state.raise(GP, Some(0));
        return Ok(());
    }
    let regs = &mut ctx.state.regs;
    (regs.rip, regs.rsp, regs.cs, regs.ss) = (0, 0, 3, u64::from(selector::GUEST_SS));
    bounce(ctx, handler, None)
}

fn fault<M: Machine>(ctx: &mut Ctx<'_, M>, vector: u8, error: u32, address: u64) -> Result<(), Crashed> {
    match vector {
        PF => return page_fault(ctx, error, address),
        GP => general_protection(ctx, error),
        UD if emulate::forced_cpuid(ctx) => {}
        NM => {
            ctx.m.set_task_switched(false);
            ctx.state.task_switched = false;
            ctx.state.raise(vector, None);
        }
        1 => {
            ctx.state.debug[6] |= ctx.m.take_debug_status() | DR6_CLEAR;
            ctx.state.raise(vector, None);
        }
        // The gate of INT 0x80 exists in hardware; without a handler it is as if it did not.
        0x80 if gate(ctx, 0x80).address == 0 => {
            ctx.state.regs.rip = ctx.state.regs.rip.wrapping_sub(2);
            ctx.state.raise(GP, Some(0x402));
        }
        8 | 10 | 11 | 12 | 17 | 21 => ctx.state.raise(vector, Some(error)),
        0 | 3 | 4 | 5 | UD | 16 | 19 | 0x80 => ctx.state.raise(vector, None),
        _ => return Err(crash(ctx, format_args!("exception {vector} (error {error:#x}) that no guest can cause"))),
    }
    Ok(())
}

fn general_protection<M: Machine>(ctx: &mut Ctx<'_, M>, error: u32) {
    const INSTRUCTION_GATE: u32 = 2; // bit 1: the selector index is a vector
    if error & 3 == INSTRUCTION_GATE
        && let Ok(vector) = u8::try_from(error >> 3)
        && emulate::software_interrupt(ctx, vector)
    {
        return;
    }
    if error == 0 && emulate::instruction(ctx) {
        return;
    }
    // What a process does its own kernel hears of.
    if ctx.state.kernel_mode {
        emulate::note_refused(ctx);
    }
    ctx.state.raise(GP, Some(error));
}

fn page_fault<M: Machine>(ctx: &mut Ctx<'_, M>, error: u32, address: u64) -> Result<(), Crashed> {
    if error & PF_RESERVED != 0 {
        return Err(crash(ctx, format_args!("reserved bits in a page table at {address:#x}")));
    }
    // The CPU itself reads descriptors, with ring 0's rights; what ring 3 finds in the windows is an ordinary fault.
    let fetch = error & PF_USER == 0;
    if let Some(offset) = ctx.m.ldt_offset(address).filter(|_| fetch) {
        if !map_ldt_page(ctx, offset) {
            deliver_page_fault(ctx, error, ctx.state.ldt_base.plus(u64::from(offset)).0);
        }
        return Ok(());
    }
    if let Some(offset) = ctx.m.gdt_offset(address).filter(|_| fetch) {
        ctx.state.raise(GP, Some(offset & 0xfff8));
        return Ok(());
    }
    let forbidden_write = error & (PF_WRITE | PF_PRESENT | PF_FETCH) == PF_WRITE | PF_PRESENT;
    let emulated = ctx.state.kernel_mode && ctx.domain.assisted(Assist::WritablePagetables);
    if forbidden_write && emulated && emulate::table_write(ctx, address) {
        count(ctx, 1);
    } else {
        deliver_page_fault(ctx, error, address);
    }
    Ok(())
}

/// Has the guest take a page fault at `address`.
pub fn deliver_page_fault<M: Machine>(ctx: &mut Ctx<'_, M>, error: u32, address: u64) {
    set_cr2(ctx, address);
    let user = if ctx.state.kernel_mode { 0 } else { PF_USER };
    ctx.state.raise(PF, Some(error & !PF_USER | user));
}

/// Sets the guest's CR2, also where it reads it without asking.
pub fn set_cr2<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64) {
    ctx.state.cr2 = address;
    let record = ctx.vcpu.record();
    if let Some(word) = record.and_then(|(frame, at)| ctx.m.page(frame).get((at + vcpu_info::CR2) / 8)) {
        word.store(address, Relaxed);
    }
}

/// Delivers what waits, in the ABI's order: exception, NMI, event. Called before every entry into the guest.
///
/// # Errors
/// [`Crashed`]: there is no handler for it, or no stack.
pub fn prepare<M: Machine>(ctx: &mut Ctx<'_, M>) -> Result<(), Crashed> {
    if let Some(trap) = ctx.state.trap {
        ctx.state.trap = None;
        exception(ctx, trap)?;
    }
    if ctx.vcpu.nmi.load(Relaxed) && ctx.vcpu.nmi.swap(false, AcqRel) {
        ctx.state.nmi_pending = true;
    }
    if ctx.state.nmi_pending && !ctx.state.nmi_masked {
        ctx.state.nmi_pending = false;
        let handler = gate(ctx, 2);
        if handler.address != 0 {
            ctx.state.nmi_masked = true;
            bounce(ctx, handler, None)?;
        }
    }
    if ctx.world.upcall_due(ctx.m, ctx.vcpu) && ctx.state.callbacks.event.address != 0 {
        bounce(ctx, Handler { masks_events: true, ..ctx.state.callbacks.event }, None)?;
    }
    Ok(())
}

fn exception<M: Machine>(ctx: &mut Ctx<'_, M>, trap: Trap) -> Result<(), Crashed> {
    let handler = gate(ctx, trap.vector);
    if handler.address != 0 {
        return bounce(ctx, handler, trap.error);
    }
    let (vector, error, rip, cr2) = (trap.vector, trap.error.unwrap_or(0), ctx.state.regs.rip, ctx.state.cr2);
    Err(crash(ctx, format_args!("no handler for exception {vector} (error {error:#x}) at {rip:#x}, cr2 {cr2:#x}")))
}

/// Enters the guest kernel at `handler`, with the frame of ABI core 3.3 on its stack.
///
/// # Errors
/// [`Crashed`]: it has no stack to push the frame on.
pub fn bounce<M: Machine>(ctx: &mut Ctx<'_, M>, handler: Handler, error: Option<u32>) -> Result<(), Crashed> {
    let mask = UpcallMask::of(ctx.m, ctx.vcpu);
    let masked = mask.is_set();
    let from_kernel = ctx.state.kernel_mode;
    if !from_kernel && !toggle(ctx) {
        return Err(crash(ctx, format_args!("a user fault without a kernel page table")));
    }
    let regs = ctx.state.regs;
    let (base, cs) = if from_kernel { (regs.rsp, regs.cs & 0xfffc) } else { (ctx.state.kernel_sp, regs.cs & 0xffff) };
    let mut rflags = regs.rflags & !(flags::IF | flags::IOPL);
    if !masked {
        rflags |= flags::IF;
    }
    if ctx.domain.assisted(Assist::ArchitecturalIopl) {
        rflags |= u64::from(ctx.state.iopl) << 12;
    }
    let cs_word = cs | u64::from(masked) << 32;
    let sp = (base & !15).wrapping_sub(if error.is_some() { 64 } else { 56 });
    let pushed = match error.map(u64::from) {
        Some(error) => ctx.write(sp, &[regs.rcx, regs.r11, error, regs.rip, cs_word, rflags, regs.rsp, regs.ss]),
        None => ctx.write(sp, &[regs.rcx, regs.r11, regs.rip, cs_word, rflags, regs.rsp, regs.ss]),
    };
    if pushed.is_err() {
        let (rip, address) = (regs.rip, handler.address);
        return Err(crash(ctx, format_args!("no stack at {sp:#x} for the handler {address:#x}; stopped at {rip:#x}")));
    }
    if handler.masks_events {
        mask.set(true);
    }
    let regs = &mut ctx.state.regs;
    (regs.rip, regs.rsp) = (handler.address, sp);
    (regs.cs, regs.ss) = (u64::from(selector::GUEST_CS), u64::from(selector::GUEST_SS));
    regs.rflags &= !(flags::AC | flags::VM | flags::RF | flags::NT | flags::TF);
    ctx.may_sysret = true; // the handler takes RCX and R11 from its frame
    Ok(())
}

/// Delivers the failsafe callback: segment registers held `wanted`, which did not load (ABI core 3.5).
///
/// # Errors
/// [`Crashed`]: it has no stack for the frame.
pub fn failsafe<M: Machine>(ctx: &mut Ctx<'_, M>, wanted: [u16; 4]) -> Result<(), Crashed> {
    let handler = ctx.state.callbacks.failsafe;
    if handler.address == 0 {
        return Ok(()); // before the guest has one, null selectors are all it can have meant
    }
    bounce(ctx, handler, None)?;
    // The four selectors stand between R11 and RIP: the frame just pushed moves down by four words.
    let sp = ctx.state.regs.rsp;
    let Ok([rcx, r11]) = ctx.read::<[u64; 2]>(sp) else { return Ok(()) };
    let [ds, es, fs, gs] = wanted.map(u64::from);
    let sp = sp.wrapping_sub(32);
    if ctx.write(sp, &[rcx, r11, ds, es, fs, gs]).is_err() {
        return Err(crash(ctx, format_args!("no stack at {sp:#x} for the failsafe callback")));
    }
    ctx.state.regs.rsp = sp;
    Ok(())
}
