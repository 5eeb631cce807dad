//! Calls about vcpus: `vcpu_op`, and those about the CPU as the calling vcpu sees it (ABI core 3.11, 6, 7).

use super::runstate::{self, charge};
use super::{context, debug};
use crate::addr::canonical;
use crate::fault::{Fault, planted};
use crate::prelude::*;
use crate::sched::ops;
use crate::time;
use hypercall_abi::callback::SegmentBase;
use hypercall_abi::physdev::{PhysdevOp, SetIobitmap, SetIopl};
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::shared::vcpu_info;
use hypercall_abi::vcpu::{RegisterArea, RegisterVcpuInfo, SetPeriodicTimer, SetSingleshotTimer, VcpuOp};

/// Carries out one `vcpu_op`.
///
/// # Errors
/// `NoEnt` for a vcpu that does not exist, `NoSys` for unknown commands, and those of ABI core 7.
pub fn vcpu_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let [_, number, arg, ..] = call.args;
    let number = VcpuId(low32(number));
    let vcpu = ctx.world.vcpu(ctx.domain, number).ok_or(Errno::NoEnt)?;
    let own_timer = if number == ctx.vcpu.number() { Ok(()) } else { Err(Errno::Inval) };
    match VcpuOp::from_number(call.command()).ok_or(Errno::NoSys)? {
        VcpuOp::Initialise => return context::initialise(ctx, vcpu, arg),
        VcpuOp::Up => up(ctx, vcpu)?,
        VcpuOp::Down => return down(ctx, vcpu),
        VcpuOp::IsUp => return Ok(u64::from(vcpu.online.load(SeqCst))),
        VcpuOp::GetRunstateInfo => {
            let mut info = with_state(ctx, vcpu, |state| state.runstate)?;
            charge(&mut info, ctx.m.now());
            ctx.write(arg, &info)?;
        }
        VcpuOp::RegisterRunstateMemoryArea => {
            let area = area(ctx, arg)?;
            with_state(ctx, vcpu, |state| state.runstate_area = area)?;
            if number == ctx.vcpu.number() {
                runstate::write_areas(ctx);
            } else if let Some(at) = area {
                let info = with_state(ctx, vcpu, |state| state.runstate)?;
                let _ = ctx.write(at.0, &info);
            }
        }
        VcpuOp::SetPeriodicTimer => {
            let SetPeriodicTimer { period_ns } = ctx.read(arg)?;
            ops::start_tick(ctx, vcpu, period_ns)?;
        }
        VcpuOp::StopPeriodicTimer => vcpu.period.store(0, Relaxed),
        VcpuOp::SetSingleshotTimer => {
            own_timer?;
            let SetSingleshotTimer { timeout_abs_ns, .. } = ctx.read(arg)?;
            ops::start_timer(ctx, timeout_abs_ns);
        }
        VcpuOp::StopSingleshotTimer => {
            own_timer?;
            vcpu.deadline.store(u64::MAX, Relaxed);
        }
        VcpuOp::RegisterVcpuInfo => register_info(ctx, vcpu, arg)?,
        VcpuOp::SendNmi => {
            ensure!(arg == 0, Errno::Inval);
            vcpu.nmi.store(true, Release);
            ctx.world.sched.nudge(ctx.m, vcpu);
            ctx.world.sched.wake(ctx.m, vcpu);
        }
        VcpuOp::GetPhysid => return Err(Errno::Inval.into()),
        VcpuOp::RegisterVcpuTimeMemoryArea => {
            let area = area(ctx, arg)?;
            with_state(ctx, vcpu, |state| (state.time_area, state.time_stale) = (area, area.is_some()))?;
            if number == ctx.vcpu.number() {
                runstate::write_areas(ctx);
            }
        }
        VcpuOp::RegisterRunstatePhysArea | VcpuOp::RegisterVcpuTimePhysArea => return Err(Errno::NoSys.into()),
    }
    Ok(0)
}

/// Reads the address in a [`RegisterArea`]; 0 removes the area.
fn area<M: Machine>(ctx: &Ctx<'_, M>, arg: u64) -> Result<Option<GuestVirt>, Errno> {
    let RegisterArea { address } = ctx.read(arg)?;
    match GuestVirt(address) {
        GuestVirt(0) => Ok(None),
        at if at.is_guests() => Ok(Some(at)),
        _ => Err(Errno::Fault),
    }
}

/// Calls `look` on a vcpu's state: the caller's own, or that of a vcpu that does not run now.
fn with_state<M: Machine, R>(
    ctx: &mut Ctx<'_, M>,
    vcpu: &Vcpu,
    look: impl FnOnce(&mut VcpuState) -> R,
) -> Result<R, Errno> {
    if vcpu.number() == ctx.vcpu.number() {
        return Ok(look(ctx.state));
    }
    let mut state = vcpu.state.try_take().ok_or(Errno::Busy)?;
    Ok(look(&mut state))
}

fn up<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu) -> Result<(), Errno> {
    ensure!(with_state(ctx, vcpu, |state| state.initialised)?, Errno::Inval);
    if !vcpu.online.swap(true, SeqCst) {
        ctx.world.sched.start(ctx.m, vcpu);
    }
    Ok(())
}

fn down<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu) -> Answer {
    vcpu.online.store(false, SeqCst);
    let own = vcpu.number() == ctx.vcpu.number();
    if !own {
        ctx.world.put_off(ctx.m, vcpu, Place::Blocked);
        ctx.world.sched.nudge(ctx.m, vcpu);
    }
    if !ctx.world.vcpus_of(ctx.domain).any(|other| other.online.load(SeqCst)) {
        ctx.world.shut_down(ctx.m, ctx.domain, ShutdownReason::Poweroff.code());
    }
    if own { Err(Halt::Leave) } else { Ok(0) }
}

/// Moves a vcpu's record to a place that the guest chose. This can be done once (ABI core 10.2).
fn register_info<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu, arg: u64) -> Result<(), Errno> {
    // As in Xen, only the vcpu itself can move its record while it is up. The entry code relies on that.
    let own = vcpu.number() == ctx.vcpu.number();
    ensure!(own || (!vcpu.online.load(SeqCst) && vcpu.state.try_take().is_some()), Errno::Inval);
    let call: RegisterVcpuInfo = ctx.read(arg)?;
    let offset = usize::try_from(call.offset).map_err(|_| Errno::NxIo)?;
    ensure!(offset.is_multiple_of(8) && offset <= PAGE_SIZE - vcpu_info::SIZE, Errno::NxIo);
    let frame = Frame::new(call.mfn).ok_or(Errno::Inval)?;
    // A record in the shared-info page counts as one that was never moved, so it cannot be moved there.
    ensure!(Some(frame) != ctx.domain.shared_info(), Errno::Acces);
    let old = vcpu.record();
    ensure!(old.is_none_or(|(at, _)| Some(at) == ctx.domain.shared_info()), Errno::Busy);
    let id = ctx.domain.id();
    ctx.world.frames.take_writable(ctx.m, frame, id, id).map_err(|_| Errno::Acces)?;
    let mut record = [0u8; vcpu_info::SIZE];
    match old {
        Some((frame, at)) => ctx.m.read(frame, at, &mut record),
        None => record[vcpu_info::UPCALL_MASK] = 1,
    }
    ctx.m.write(frame, offset, &record);
    let before = old.map_or(0, |(frame, at)| frame.address() | long(at));
    let moved = vcpu.info.compare_exchange(before, frame.address() | long(offset), SeqCst, SeqCst);
    if moved.is_err() {
        ctx.world.frames.drop_use(frame, id); // another vcpu has just moved the record
        return Err(Errno::Busy);
    }
    time::write_record(ctx.m, vcpu);
    // An event that came during the move set its bits in the old place, so the guest is made to check all ports.
    ctx.m.write(frame, offset + vcpu_info::PENDING_SEL, &u64::MAX.to_le_bytes());
    ctx.m.write(frame, offset + vcpu_info::UPCALL_PENDING, &[1]);
    Ok(())
}

/// `stack_switch`: sets the kernel stack for traps from user mode.
pub fn stack_switch<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let [ss, sp, ..] = call.args;
    (ctx.state.kernel_ss, ctx.state.kernel_sp) = (ss & 0xffff | 3, sp);
    Ok(0)
}

/// `fpu_taskswitch` (ABI core 3.11): sets or clears the guest's CR0.TS.
pub fn fpu_taskswitch<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    set_task_switched(ctx, call.command() != 0);
    Ok(0)
}

/// Sets or clears the guest's CR0.TS.
pub(crate) fn set_task_switched<M: Machine>(ctx: &mut Ctx<'_, M>, set: bool) {
    ctx.state.task_switched = set;
    ctx.m.set_task_switched(set);
}

/// `set_debugreg` (ABI core 3.11): sets a debug register of the caller.
///
/// # Errors
/// Those of [`debug::accept`].
pub fn set_debugreg<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    write_debug(ctx, call.command(), call.args[1])?;
    Ok(0)
}

/// `get_debugreg`: reads a debug register of the caller.
///
/// # Errors
/// `NoDev` for a register that does not exist.
pub fn get_debugreg<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    Ok(read_debug(ctx, call.command())?)
}

/// Sets a debug register.
///
/// # Errors
/// Those of [`debug::accept`].
pub(crate) fn write_debug<M: Machine>(ctx: &mut Ctx<'_, M>, register: u64, value: u64) -> Result<(), Errno> {
    let (index, value) = debug::accept(ctx.state.cr4, register, value)?;
    *ctx.state.debug.get_mut(index).ok_or(Errno::NoDev)? = value;
    load_debug(ctx);
    Ok(())
}

/// Loads the debug registers into the CPU. The addresses are loaded even if no breakpoint is enabled: a single step
/// compares them anyway, and another vcpu's addresses would show in DR6.
pub fn load_debug<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let [addresses @ .., _, _, _, dr7] = ctx.state.debug;
    if !planted(Fault::KeepBreakpoints) || dr7 & debug::ENABLED != 0 {
        ctx.m.set_breakpoints(addresses);
    }
    ctx.m.set_debug_control(debug::loaded(dr7));
}

/// Reads a debug register.
///
/// # Errors
/// `NoDev` for a register that does not exist.
pub(crate) fn read_debug<M: Machine>(ctx: &Ctx<'_, M>, register: u64) -> Result<u64, Errno> {
    let index = debug::index(ctx.state.cr4, register)?;
    ctx.state.debug.get(index).copied().ok_or(Errno::NoDev)
}

/// `set_segment_base` (ABI core 3.11): sets the base of FS or of a GS.
///
/// # Errors
/// `Inval` for an address that is not canonical, and for an unknown base.
pub fn set_segment_base<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let base = call.args[1];
    match SegmentBase::from_number(call.command()).ok_or(Errno::Inval)? {
        SegmentBase::Fs => ctx.m.set_fs_base(canonical(base)?),
        SegmentBase::GsUser => ctx.m.entry().other_gs.store(canonical(base)?, Relaxed),
        SegmentBase::GsKernel => ctx.m.set_gs_base(canonical(base)?),
        SegmentBase::GsUserSelector => {
            let null = base & 0xfffc == 0;
            let selector = low16(if null { base } else { base | 3 });
            let active = ctx.m.gs_base();
            ctx.m.entry().other_gs.store(ctx.m.load_gs(selector).unwrap_or(0), Relaxed);
            ctx.m.set_gs_base(active);
        }
    }
    Ok(0)
}

/// `physdev_op`: the commands for guests without devices (ABI core 8.2).
///
/// # Errors
/// `NoSys` for all commands about real devices, `Inval` for an IOPL above 3.
pub fn physdev_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let (command, arg) = (call.command(), call.args[1]);
    match PhysdevOp::from_number(command).ok_or(Errno::NoSys)? {
        PhysdevOp::SetIopl => {
            let SetIopl { iopl } = ctx.read(arg)?;
            ctx.state.iopl = u8::try_from(iopl).ok().filter(|level| *level <= 3).ok_or(Errno::Inval)?;
        }
        PhysdevOp::SetIobitmap => {
            let SetIobitmap { bitmap, nr_ports, .. } = ctx.read(arg)?;
            ensure!(nr_ports <= 0x1_0000 && GuestVirt(bitmap).is_guests(), Errno::Inval);
            ctx.state.iobitmap = (GuestVirt(bitmap), nr_ports);
        }
        PhysdevOp::IrqEoi => return Err(Errno::NoSys.into()),
    }
    Ok(0)
}
