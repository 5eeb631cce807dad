//! Where a guest wants its traps and events delivered, and its way back from them (ABI core 3).

use super::table::set_gate;
use crate::addr::canonical;
use crate::domain::crash::{Crashed, crash};
use crate::event::UpcallMask;
use crate::flags;
use crate::prelude::*;
use crate::vcpu::mode::toggle;
use crate::vcpu::{Callbacks, Handler};
use hypercall_abi::callback::{
    Assist, CALLBACK_MASKS_EVENTS, CallbackOp, CallbackRegister, CallbackType, CallbackUnregister, IRET_IN_SYSCALL,
    IretContext, TRAP_MASKS_EVENTS, TrapInfo,
};

/// Gates taken over in a step.
const GATES: usize = 256;

/// Takes over some gates of a list that ends with address 0; NULL closes all gates (ABI core 10.4).
///
/// # Errors
/// `Inval` for an address no handler can have, `More` while the list goes on.
pub fn set_trap_table<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let list = &mut call.args[0];
    let frame = ctx.state.traps.ok_or(Errno::NoMem)?;
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
        set_gate(ctx.m, frame, &gate);
        *list = list.wrapping_add(bytes_of::<TrapInfo>());
    }
    Err(Halt::More)
}

/// Registers event, failsafe and system-call handlers the old way; an address no handler can have changes nothing.
pub fn set_callbacks<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let Callbacks { event, failsafe, syscall, .. } = &mut ctx.state.callbacks;
    for (handler, address) in [event, failsafe, syscall].into_iter().zip(call.args) {
        *handler = canonical(address).map_or(*handler, |address| Handler { address, masks_events: false });
    }
    Ok(0)
}

/// `callback_op` (ABI core 3.4).
///
/// # Errors
/// `NoSys` for unknown commands and types, `Inval` for addresses no handler can have and for what cannot be unregistered.
pub fn callback_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let (command, arg) = (call.command(), call.args[1]);
    match CallbackOp::from_number(command).ok_or(Errno::NoSys)? {
        CallbackOp::Register => {
            let call: CallbackRegister = ctx.read(arg)?;
            let masks_events = call.flags & CALLBACK_MASKS_EVENTS != 0;
            let handler = Handler { address: canonical(call.address)?, masks_events };
            let callbacks = &mut ctx.state.callbacks;
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
    let frame = ctx.state.traps.ok_or(Errno::NoMem)?;
    let gate = TrapInfo { vector: NMI, flags: TRAP_MASKS_EVENTS, address, ..Default::default() };
    set_gate(ctx.m, frame, &gate);
    Ok(())
}

/// `nmi_op`: 0 registers the handler whose address is at `arg`, 1 takes it away.
///
/// # Errors
/// `NoSys` for other commands.
pub fn nmi_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    match call.command() {
        0 => set_nmi(ctx, canonical(ctx.read::<[u64; 2]>(call.args[1])?[0])?)?,
        1 => set_nmi(ctx, 0)?,
        _ => return Err(Errno::NoSys.into()),
    }
    Ok(0)
}

/// `iret`, where it is an entry of a list: alone it takes the fast path, [`return_from_trap`].
///
/// # Errors
/// `Gone`: the registers are those of the frame.
pub fn iret<M: Machine>(ctx: &mut Ctx<'_, M>, _call: &mut Call) -> Answer {
    let _ = return_from_trap(ctx); // a domain that has crashed does not run
    Err(Halt::Gone)
}

/// The way back from a trap: registers from the frame on the guest's stack (ABI core 3.7).
///
/// # Errors
/// [`Crashed`]: the stack, or the page table of user mode, is not there.
pub fn return_from_trap<M: Machine>(ctx: &mut Ctx<'_, M>) -> Result<(), Crashed> {
    let sp = ctx.state.regs.rsp;
    let Ok(frame) = ctx.read::<IretContext>(sp) else {
        return Err(crash(ctx, format_args!("iret with a bad stack at {sp:#x}")));
    };
    if frame.cs & 3 == 3 && !toggle(ctx) {
        return Err(crash(ctx, format_args!("iret to user mode without a user page table")));
    }
    if ctx.domain.assisted(Assist::ArchitecturalIopl) {
        ctx.state.iopl = flags::iopl(frame.rflags);
    }
    let regs = &mut ctx.state.regs;
    (regs.rip, regs.rsp, regs.rax) = (frame.rip, frame.rsp, frame.rax);
    (regs.cs, regs.ss) = (frame.cs & 0xffff | 3, frame.ss & 0xffff | 3);
    regs.rflags = frame.rflags & flags::GUEST | flags::IF | 2;
    ctx.may_sysret = frame.flags & IRET_IN_SYSCALL != 0;
    if !ctx.may_sysret {
        (regs.rcx, regs.r11) = (frame.rcx, frame.r11);
    }
    ctx.state.nmi_masked = false;
    UpcallMask::of(ctx.m, ctx.vcpu).set(frame.rflags & flags::IF == 0);
    Ok(())
}
