//! Traps, callbacks, segment bases, debug registers, the way back from a trap (ABI core 3).

use crate::domain::crash::crash;
use crate::domain::debug;
use crate::domain::mode::toggle;
use crate::domain::vcpu::{Callbacks, Handler};
use crate::fault::{Fault, planted};
use crate::flags;
use crate::prelude::*;
use hypercall_abi::callback::{
    ASSIST_DISABLE, ASSIST_ENABLE, Assist, CALLBACK_MASKS_EVENTS, CallbackOp, CallbackRegister, CallbackType,
    CallbackUnregister, IRET_IN_SYSCALL, IretContext, SegmentBase, TRAP_MASKS_EVENTS, TrapInfo,
};
use hypercall_abi::physdev::{PhysdevOp, SetIobitmap, SetIopl};
use zerocopy::IntoBytes;

/// Gates taken over in a step.
const GATES: usize = 256;
/// An address that a handler or a base can have.
fn canonical(address: u64) -> Result<u64, Errno> {
    if GuestVirt(address).is_canonical() { Ok(address) } else { Err(Errno::Inval) }
}

/// Takes over some gates of a list that ends with address 0; NULL closes all gates (ABI core 10.4).
///
/// # Errors
/// `Inval` for an address no handler can have, `More` while the list goes on.
pub fn set_trap_table<M: Machine>(ctx: &mut Ctx<'_, M>, list: &mut u64) -> Answer {
    let frame = ctx.own.traps.ok_or(Errno::NoMem)?;
    if *list == 0 {
        ctx.m.zero(frame);
        return Ok(0);
    }
    for _ in 0..GATES {
        let gate: TrapInfo = ctx.read(*list)?;
        if gate.address == 0 {
            return Ok(0);
        }
        canonical(gate.address)?;
        ctx.m.write(frame, usize::from(gate.vector) * size_of::<TrapInfo>(), gate.as_bytes());
        *list = list.wrapping_add(size_of::<TrapInfo>() as u64);
    }
    Err(Halt::More)
}

/// Says where bounces from user mode find the kernel stack.
pub fn stack_switch<M: Machine>(ctx: &mut Ctx<'_, M>, ss: u64, sp: u64) -> u64 {
    (ctx.own.kernel_ss, ctx.own.kernel_sp) = (ss & 0xffff | 3, sp);
    0
}

/// Registers event, failsafe and system-call handlers the old way; an address no handler can have changes nothing.
pub fn set_callbacks<M: Machine>(ctx: &mut Ctx<'_, M>, addresses: [u64; 3]) -> u64 {
    let Callbacks { event, failsafe, syscall, .. } = &mut ctx.own.callbacks;
    for (handler, address) in [event, failsafe, syscall].into_iter().zip(addresses) {
        *handler = canonical(address).map_or(*handler, |address| Handler { address, masks_events: false });
    }
    0
}

/// `callback_op` (ABI core 3.4).
///
/// # Errors
/// `NoSys` for unknown commands and types, `Inval` for addresses no handler can have and for what cannot be unregistered.
pub fn callback_op<M: Machine>(ctx: &mut Ctx<'_, M>, command: u64, arg: u64) -> Result<u64, Errno> {
    match CallbackOp::from_number(command).ok_or(Errno::NoSys)? {
        CallbackOp::Register => {
            let call: CallbackRegister = ctx.read(arg)?;
            let masks_events = call.flags & CALLBACK_MASKS_EVENTS != 0;
            let handler = Handler { address: canonical(call.address)?, masks_events };
            let callbacks = &mut ctx.own.callbacks;
            match CallbackType::from_number(u64::from(call.kind)).ok_or(Errno::NoSys)? {
                CallbackType::Event => callbacks.event = handler,
                CallbackType::Failsafe => callbacks.failsafe = handler,
                CallbackType::Syscall => callbacks.syscall = handler,
                CallbackType::Syscall32 => callbacks.syscall32 = handler,
                CallbackType::Sysenter => {
                    callbacks.sysenter = handler;
                    ctx.m.allow_sysenter(handler.address != 0);
                }
                CallbackType::Nmi => set_nmi(ctx, call.address)?,
            }
        }
        CallbackOp::Unregister => {
            let call: CallbackUnregister = ctx.read(arg)?;
            let kind = CallbackType::from_number(u64::from(call.kind)).ok_or(Errno::NoSys)?;
            ensure!(kind == CallbackType::Nmi, Errno::Inval);
            set_nmi(ctx, 0)?;
        }
    }
    Ok(0)
}

/// Sets the gate of vector 2.
fn set_nmi<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64) -> Result<(), Errno> {
    const NMI: u8 = 2;
    let frame = ctx.own.traps.ok_or(Errno::NoMem)?;
    let gate = TrapInfo { vector: NMI, flags: TRAP_MASKS_EVENTS, address, ..Default::default() };
    ctx.m.write(frame, usize::from(NMI) * size_of::<TrapInfo>(), gate.as_bytes());
    Ok(())
}

/// `nmi_op`: 0 registers the handler whose address is at `arg`, 1 takes it away.
///
/// # Errors
/// `NoSys` for other commands.
pub fn nmi_op<M: Machine>(ctx: &mut Ctx<'_, M>, command: u64, arg: u64) -> Result<u64, Errno> {
    match command {
        0 => set_nmi(ctx, canonical(ctx.read::<[u64; 2]>(arg)?[0])?)?,
        1 => set_nmi(ctx, 0)?,
        _ => return Err(Errno::NoSys),
    }
    Ok(0)
}

/// Sets or clears the guest's CR0.TS.
pub fn fpu_taskswitch<M: Machine>(ctx: &mut Ctx<'_, M>, set: u64) -> u64 {
    ctx.own.task_switched = set != 0;
    ctx.m.set_task_switched(set != 0);
    0
}

/// Sets a debug register (ABI core 3.11).
///
/// # Errors
/// Those of [`debug::accept`].
pub fn write_debug<M: Machine>(ctx: &mut Ctx<'_, M>, register: u64, value: u64) -> Result<u64, Errno> {
    let (index, value) = debug::accept(ctx.own.cr4, register, value)?;
    *ctx.own.debug.get_mut(index).ok_or(Errno::NoDev)? = value;
    load_debug(ctx);
    Ok(0)
}

/// Loads the debug registers, the addresses also if no breakpoint is on: a single step is compared with them all the same,
/// and what another vcpu left there would show in DR6.
pub fn load_debug<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let [addresses @ .., _, _, _, dr7] = ctx.own.debug;
    if !planted(Fault::KeepBreakpoints) || dr7 & debug::ENABLED != 0 {
        ctx.m.set_breakpoints(addresses);
    }
    ctx.m.set_debug_control(debug::loaded(dr7));
}

/// Reads a debug register.
///
/// # Errors
/// `NoDev` for registers there are not.
pub fn read_debug<M: Machine>(ctx: &Ctx<'_, M>, register: u64) -> Result<u64, Errno> {
    let index = debug::index(ctx.own.cr4, register)?;
    ctx.own.debug.get(index).copied().ok_or(Errno::NoDev)
}

/// `set_segment_base` (ABI core 3.11).
///
/// # Errors
/// `Inval` for bases no segment can have and for unknown bases.
pub fn set_segment_base<M: Machine>(ctx: &mut Ctx<'_, M>, which: u64, base: u64) -> Result<u64, Errno> {
    let which = SegmentBase::from_number(which).ok_or(Errno::Inval)?;
    match which {
        SegmentBase::Fs => ctx.m.set_fs_base(canonical(base)?),
        SegmentBase::GsUser => ctx.own.gs_user = canonical(base)?,
        SegmentBase::GsKernel => ctx.m.set_gs_base(canonical(base)?),
        SegmentBase::GsUserSelector => {
            let null = base & 0xfffc == 0;
            let selector = low16(if null { base } else { base | 3 });
            let active = ctx.m.gs_base();
            ctx.own.gs_user = ctx.m.load_gs(selector).unwrap_or(0);
            ctx.m.set_gs_base(active);
        }
    }
    Ok(0)
}

/// `vm_assist` (ABI core 3.12).
///
/// # Errors
/// `Inval` for unknown assists, `NoSys` for unknown commands.
pub fn vm_assist<M: Machine>(ctx: &mut Ctx<'_, M>, command: u64, assist: u64) -> Result<u64, Errno> {
    let bit = 1u64 << Assist::from_number(assist).ok_or(Errno::Inval)?.number();
    match u32::try_from(command) {
        Ok(ASSIST_ENABLE) => ctx.domain.assists.fetch_or(bit, Relaxed),
        Ok(ASSIST_DISABLE) => ctx.domain.assists.fetch_and(!bit, Relaxed),
        _ => return Err(Errno::NoSys),
    };
    Ok(0)
}

/// The way back from a trap: registers from the frame on the guest's stack (ABI core 3.7).
pub fn iret<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let sp = ctx.own.regs.rsp;
    let Ok(frame) = ctx.read::<IretContext>(sp) else {
        return crash(ctx, format_args!("iret with a bad stack at {sp:#x}"));
    };
    if frame.cs & 3 == 3 && !toggle(ctx) {
        return crash(ctx, format_args!("iret to user mode without a user page table"));
    }
    if ctx.domain.assisted(Assist::ArchitecturalIopl) {
        ctx.own.iopl = (frame.rflags >> 12 & 3) as u8;
    }
    let regs = &mut ctx.own.regs;
    (regs.rip, regs.rsp, regs.rax) = (frame.rip, frame.rsp, frame.rax);
    (regs.cs, regs.ss) = (frame.cs & 0xffff | 3, frame.ss & 0xffff | 3);
    regs.rflags = frame.rflags & flags::GUEST | flags::IF | 2;
    ctx.short = frame.flags & IRET_IN_SYSCALL != 0;
    if !ctx.short {
        (regs.rcx, regs.r11) = (frame.rcx, frame.r11);
    }
    ctx.own.nmi_masked = false;
    ctx.world.set_upcall_mask(ctx.m, ctx.vcpu, frame.rflags & flags::IF == 0);
}

/// `physdev_op`: what a guest without devices may ask (ABI core 8.2).
///
/// # Errors
/// `NoSys` for everything about real devices, `Inval` for an IOPL above 3.
pub fn physdev_op<M: Machine>(ctx: &mut Ctx<'_, M>, command: u64, arg: u64) -> Result<u64, Errno> {
    match PhysdevOp::from_number(command).ok_or(Errno::NoSys)? {
        PhysdevOp::SetIopl => {
            let SetIopl { iopl } = ctx.read(arg)?;
            ctx.own.iopl = u8::try_from(iopl).ok().filter(|level| *level <= 3).ok_or(Errno::Inval)?;
        }
        PhysdevOp::SetIobitmap => {
            let SetIobitmap { bitmap, nr_ports, .. } = ctx.read(arg)?;
            ensure!(nr_ports <= 0x1_0000 && GuestVirt(bitmap).is_guests(), Errno::Inval);
            ctx.own.iobitmap = (GuestVirt(bitmap), nr_ports);
        }
        PhysdevOp::IrqEoi => return Err(Errno::NoSys),
    }
    Ok(0)
}
