//! `vcpu_op`: vcpus are set up, brought up and down, and told the time (ABI core 6, 7).

use crate::domain::context;
use crate::prelude::*;
use crate::sched::ops;
use crate::time;
use hypercall_abi::callback::Assist;
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::shared::{TimeInfo, vcpu_info};
use hypercall_abi::vcpu::{
    RUNSTATE_UPDATE, RegisterArea, RegisterVcpuInfo, Runstate, RunstateInfo, SetPeriodicTimer, SetSingleshotTimer,
    VcpuOp,
};
use zerocopy::{FromZeros, IntoBytes};

/// Carries out one `vcpu_op`.
///
/// # Errors
/// `NoEnt` for a vcpu there is not, `NoSys` for unknown commands, and those of ABI core 7.
pub fn vcpu_op<M: Machine>(ctx: &mut Ctx<'_, M>, command: u64, number: u64, arg: u64) -> Answer {
    let number = VcpuId(low32(number));
    let vcpu = ctx.world.vcpu(ctx.domain, number).ok_or(Errno::NoEnt)?;
    let own_timer = if number == ctx.vcpu.number() { Ok(()) } else { Err(Errno::Inval) };
    match VcpuOp::from_number(command).ok_or(Errno::NoSys)? {
        VcpuOp::Initialise => return context::initialise(ctx, vcpu, arg),
        VcpuOp::Up => up(ctx, vcpu)?,
        VcpuOp::Down => down(ctx, vcpu),
        VcpuOp::IsUp => return Ok(u64::from(vcpu.online.load(SeqCst))),
        VcpuOp::GetRunstateInfo => {
            let mut info = with_own(ctx, vcpu, |own| own.runstate)?;
            charge(&mut info, ctx.m.now());
            ctx.write(arg, &info)?;
        }
        VcpuOp::RegisterRunstateMemoryArea => {
            let area = area(ctx, arg)?;
            with_own(ctx, vcpu, |own| own.runstate_area = area)?;
            if number == ctx.vcpu.number() {
                write_areas(ctx);
            } else if let Some(at) = area {
                let info = with_own(ctx, vcpu, |own| own.runstate)?;
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
            with_own(ctx, vcpu, |own| own.time_area = area)?;
            if number == ctx.vcpu.number() {
                write_areas(ctx);
            }
        }
        VcpuOp::RegisterRunstatePhysArea | VcpuOp::RegisterVcpuTimePhysArea => return Err(Errno::NoSys.into()),
    }
    Ok(0)
}

/// The address in a [`RegisterArea`]; 0 takes the area away.
fn area<M: Machine>(ctx: &Ctx<'_, M>, arg: u64) -> Result<Option<GuestVirt>, Errno> {
    let RegisterArea { address } = ctx.read(arg)?;
    match GuestVirt(address) {
        GuestVirt(0) => Ok(None),
        at if at.is_guests() => Ok(Some(at)),
        _ => Err(Errno::Fault),
    }
}

/// Looks into a vcpu: the caller's own, or one that does not run just now.
fn with_own<M: Machine, R>(
    ctx: &mut Ctx<'_, M>,
    vcpu: &Vcpu,
    look: impl FnOnce(&mut VcpuState) -> R,
) -> Result<R, Errno> {
    if vcpu.number() == ctx.vcpu.number() {
        return Ok(look(ctx.own));
    }
    let mut own = vcpu.own.try_take().ok_or(Errno::Busy)?;
    Ok(look(&mut own))
}

fn up<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu) -> Result<(), Errno> {
    ensure!(with_own(ctx, vcpu, |own| own.initialised)?, Errno::Inval);
    if !vcpu.online.swap(true, SeqCst) {
        ctx.world.sched.start(ctx.m, vcpu);
    }
    Ok(())
}

fn down<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu) {
    vcpu.online.store(false, SeqCst);
    if vcpu.number() == ctx.vcpu.number() {
        ctx.next = Next::Leave;
    } else {
        vcpu.moves(Place::Blocked, Place::Off);
        ctx.world.sched.nudge(ctx.m, vcpu);
    }
    if !ctx.world.vcpus_of(ctx.domain).any(|other| other.online.load(SeqCst)) {
        ctx.world.shut_down(ctx.m, ctx.domain, ShutdownReason::Poweroff as u32);
    }
}

/// Moves a vcpu's record to a place of the guest's choice, once (ABI core 10.2).
fn register_info<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu, arg: u64) -> Result<(), Errno> {
    let call: RegisterVcpuInfo = ctx.read(arg)?;
    let offset = usize::try_from(call.offset).map_err(|_| Errno::NxIo)?;
    ensure!(offset.is_multiple_of(8) && offset <= PAGE_SIZE - vcpu_info::SIZE, Errno::NxIo);
    let frame = Frame::new(call.mfn).ok_or(Errno::Inval)?;
    // The page of the records nobody has moved, by which moved ones are told apart.
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
    vcpu.info.store(frame.address() | offset as u64, Release);
    ctx.world.write_time(ctx.m, vcpu);
    // An event that came while the record moved set its bits in the old place: the guest is made to look at all ports.
    ctx.m.write(frame, offset + vcpu_info::PENDING_SEL, &u64::MAX.to_le_bytes());
    ctx.m.write(frame, offset + vcpu_info::UPCALL_PENDING, &[1]);
    Ok(())
}

impl World {
    /// Writes a vcpu's time record under the version protocol (ABI core 6.1).
    pub fn write_time<M: Machine>(&self, m: &M, vcpu: &Vcpu) {
        let Some((frame, at)) = vcpu.record() else { return };
        let offset = at + vcpu_info::TIME;
        let mut old = TimeInfo::new_zeroed();
        m.read(frame, offset, old.as_mut_bytes());
        let record = time::next_record(m, &old);
        m.write(frame, offset, record.as_bytes());
        m.write(frame, offset, &record.version.wrapping_add(1).to_le_bytes());
    }
}

/// Adds the time since the state was entered to what has been spent in it; returns that time.
fn charge(info: &mut RunstateInfo, now: u64) -> u64 {
    let spent = now.saturating_sub(info.state_entry_time);
    if let Some(total) = info.time.get_mut(info.state as usize) {
        *total = total.saturating_add(spent);
    }
    spent
}

/// Notes that a vcpu enters a state.
pub fn enter_state<M: Machine>(ctx: &mut Ctx<'_, M>, state: Runstate) {
    let now = ctx.m.now();
    let info = &mut ctx.own.runstate;
    let spent = charge(info, now);
    if info.state == Runstate::Running as u32 {
        ctx.domain.cpu_time.fetch_add(spent, Relaxed);
    }
    (info.state, info.state_entry_time) = (state as u32, now);
    if state == Runstate::Running || ctx.domain.assisted(Assist::RunstateUpdateFlag) {
        write_areas(ctx);
    }
}

/// Writes the areas the guest reads, or notes that they wait: in user mode its kernel addresses mean nothing.
pub fn write_areas<M: Machine>(ctx: &mut Ctx<'_, M>) {
    ctx.own.areas_stale = !ctx.own.kernel_mode;
    if !ctx.own.kernel_mode {
        return;
    }
    if let Some(at) = ctx.own.runstate_area {
        let info = ctx.own.runstate;
        // A guest that unmaps its own area reads nothing; that is its affair.
        let _ = if ctx.domain.assisted(Assist::RunstateUpdateFlag) {
            let begun = RunstateInfo { state_entry_time: info.state_entry_time | RUNSTATE_UPDATE, ..info };
            ctx.write(at.0, &begun).and_then(|()| ctx.write(at.0.wrapping_add(8), &info.state_entry_time))
        } else {
            ctx.write(at.0, &info)
        };
    }
    if let Some(at) = ctx.own.time_area
        && let Ok(old) = ctx.read::<TimeInfo>(at.0)
    {
        let record = time::next_record(ctx.m, &old);
        let _ = ctx.write(at.0, &record).and_then(|()| ctx.write(at.0, &record.version.wrapping_add(1)));
    }
}
