//! What a toolstack asks about domains: `domctl` and our own calls; and `vm_assist` (ABI core 3.12).
//!
//! Keeps: P9. Every function that reaches another domain takes a [`ControlAuthority`].

use super::{Life, Powers, Spec, ToolstackNotes};
use crate::prelude::*;
use crate::vcpu::context;
use crate::world::ControlAuthority;
use hypercall_abi::callback::{ASSIST_DISABLE, ASSIST_ENABLE, Assist};
use hypercall_abi::domctl::{
    CreateDomain, DomainInfo, Domctl, DomctlOp, INTERFACE_VERSION, IomemPermission, MaxMem, MaxVcpus, VcpuContextArg,
    info,
};
use hypercall_abi::tenon::{GRADUALLY, MORE, TenonOp};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Carries out one step of a `domctl`.
///
/// # Errors
/// `Perm` for those without authority, `Acces` for another interface version, `Srch` for a domain there is not, `NoSys`
/// for unknown commands.
pub fn domctl<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let authority = ctx.control()?;
    let arg = call.args[0];
    let mut call: Domctl = ctx.read(arg)?;
    ensure!(call.interface_version == INTERFACE_VERSION, Errno::Acces);
    match DomctlOp::from_number(u64::from(call.cmd)).ok_or(Errno::NoSys)? {
        DomctlOp::CreateDomain => {
            let wanted: CreateDomain = payload(&call)?;
            ensure!(wanted.flags == 0, Errno::Inval);
            // The reply is tried first: a domain whose id cannot be told would be lost.
            ctx.write(arg, &call)?;
            let id = Some(DomainId(call.domain)).filter(|id| id.0 != 0);
            let (powers, vcpus) = (Powers::default(), wanted.max_vcpus);
            let spec = Spec { id, powers, vcpus, max_pages: 0, handle: wanted.handle };
            call.domain = ctx.cpu_ctx().create(&spec)?.id().0;
            ctx.write(arg, &call)?;
        }
        DomctlOp::GetDomainInfo => {
            let domain = at_or_above(ctx, call.domain).ok_or(Errno::Srch)?;
            let info = describe(ctx, domain);
            call.domain = info.domain;
            fill(&mut call.payload, info.as_bytes());
            ctx.write(arg, &call)?;
        }
        DomctlOp::DestroyDomain => {
            let domain = other(ctx, authority, call.domain, true)?;
            let gradually = payload::<u64>(&call)? == GRADUALLY;
            let answer = ctx.cpu_ctx().destroy(domain, DomainId(call.domain));
            return if gradually && answer == Err(Halt::More) { Ok(MORE) } else { answer };
        }
        DomctlOp::PauseDomain => {
            let domain = other(ctx, authority, call.domain, false)?;
            domain.paused.store(true, SeqCst);
            ctx.world.vcpus_of(domain).for_each(|vcpu| ctx.world.sched.nudge(ctx.m, vcpu));
        }
        DomctlOp::UnpauseDomain => ctx.world.unpause(ctx.m, other(ctx, authority, call.domain, false)?),
        DomctlOp::MaxMem => {
            let MaxMem { max_memkb } = payload(&call)?;
            ctx.named(call.domain)?.max_pages.store(max_memkb / 4, Relaxed);
        }
        DomctlOp::MaxVcpus => {
            // A domain gets its vcpus when it is made; asking for the same number again is no change.
            let MaxVcpus { max } = payload(&call)?;
            ensure!(ctx.world.vcpus_of(ctx.named(call.domain)?).count() == index(max), Errno::Inval);
        }
        DomctlOp::IomemPermission => {
            let IomemPermission { first_frame, nr_frames, allow, .. } = payload(&call)?;
            let domain = ctx.named(call.domain)?;
            ensure!(allow == 1, Errno::OpNotSupp);
            let bounds = (u32::try_from(first_frame), u32::try_from(first_frame.saturating_add(nr_frames)));
            let (Ok(first), Ok(end)) = bounds else { return Err(Errno::Inval.into()) };
            ensure!(first < end, Errno::Inval);
            ensure!(ctx.domain.space.devices.has(&(first..end)), Errno::Perm);
            domain.space.devices.allow(first..end).map_err(|_| Errno::NoSpc)?;
        }
        DomctlOp::SetVcpuContext => {
            let (domain, vcpu, at) = stopped_vcpu(ctx, authority, &call)?;
            let mut state = vcpu.state.try_take().ok_or(Errno::Busy)?;
            let wanted = ctx.read(at)?;
            return context::set(&mut ctx.cpu_ctx(), domain, vcpu, &mut state, &wanted);
        }
        DomctlOp::GetVcpuContext => {
            let (domain, vcpu, at) = stopped_vcpu(ctx, authority, &call)?;
            let state = vcpu.state.try_take().ok_or(Errno::Busy)?;
            ensure!(state.initialised, Errno::NoData);
            let context = context::get(ctx.m, domain, vcpu, &state);
            ctx.write(at, &context)?;
        }
    }
    Ok(0)
}

/// The structure at the start of a domctl's payload.
fn payload<T: FromBytes>(call: &Domctl) -> Result<T, Errno> {
    T::read_from_prefix(&call.payload).map(|(value, _)| value).map_err(|_| Errno::Inval)
}

/// A domain that is not the caller's own; `dying`: also one that is being destroyed.
fn other<'a, M: Machine>(
    ctx: &Ctx<'a, M>,
    _authority: ControlAuthority,
    id: u16,
    dying: bool,
) -> Result<&'a Domain, Errno> {
    ensure!(!ctx.is_own(id), Errno::Inval);
    ctx.visit();
    let domain = ctx.world.slot(DomainId(id)).filter(|domain| domain.id() == DomainId(id)).ok_or(Errno::Srch)?;
    let found = domain.life() == Life::Alive || dying && domain.life() == Life::Dying;
    if found { Ok(domain) } else { Err(Errno::Srch) }
}

fn stopped_vcpu<'a, M: Machine>(
    ctx: &Ctx<'a, M>,
    authority: ControlAuthority,
    call: &Domctl,
) -> Result<(&'a Domain, &'a Vcpu, u64), Errno> {
    let domain = other(ctx, authority, call.domain, false)?;
    let arg: VcpuContextArg = payload(call)?;
    let vcpu = ctx.world.vcpu(domain, VcpuId(arg.vcpu)).ok_or(Errno::Inval)?;
    Ok((domain, vcpu, arg.context))
}

/// The existing domain with the lowest id from `id` on.
fn at_or_above<'a, M: Machine>(ctx: &Ctx<'a, M>, id: u16) -> Option<&'a Domain> {
    let exists = |domain: &&Domain| domain.life() != Life::Free && domain.id().0 >= id;
    ctx.world.domains.iter().filter(exists).min_by_key(|domain| domain.id())
}

fn describe<M: Machine>(ctx: &Ctx<'_, M>, domain: &Domain) -> DomainInfo {
    let vcpus = || ctx.world.vcpus_of(domain);
    let mut flags = 0;
    let mut set = |flag, on: bool| flags |= if on { flag } else { 0 };
    set(info::DYING, domain.life() == Life::Dying);
    set(info::PAUSED, domain.paused.load(SeqCst));
    set(info::RUNNING, vcpus().any(|vcpu| matches!(vcpu.place(), Place::Running(_))));
    set(info::BLOCKED, vcpus().all(|vcpu| matches!(vcpu.place(), Place::Blocked | Place::Off)));
    if let Some(reason) = domain.shutdown_reason() {
        flags |= info::SHUTDOWN | (reason & 0xff) << info::SHUTDOWN_SHIFT;
    }
    DomainInfo {
        domain: domain.id().0,
        flags,
        tot_pages: ctx.world.frames.owned(domain.id()).into(),
        max_pages: domain.max_pages.load(Relaxed),
        shared_info_frame: domain.shared_info().map_or(0, Frame::number),
        cpu_time: domain.cpu_time.load(Relaxed),
        nr_online_vcpus: vcpus().map(|vcpu| u32::from(vcpu.online.load(Relaxed))).sum(),
        max_vcpu_id: vcpus().last().map_or(0, |vcpu| vcpu.number().0),
        handle: domain.notes.with(|notes| notes.handle),
        ..DomainInfo::new_zeroed()
    }
}

/// Our own calls.
///
/// # Errors
/// `NoSys` for unknown ones, `Perm` for those without authority, `Srch` for a domain there is not; and those of each.
pub fn tenon_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let [command, id, arg, ..] = call.args;
    let id = u16::try_from(id).map_err(|_| Errno::Srch);
    match TenonOp::from_number(command).ok_or(Errno::NoSys)? {
        TenonOp::CrashReport => ctx.write(arg, &notes_of(ctx, id)?.report)?,
        TenonOp::Refusals => ctx.write(arg, &notes_of(ctx, id)?.refusals)?,
        TenonOp::BindMessage => crate::event::message::bind(ctx, id?, arg)?,
        TenonOp::Wait => return crate::sched::ops::wait(ctx),
    }
    Ok(0)
}

/// What the toolstack reads about a domain.
fn notes_of<M: Machine>(ctx: &Ctx<'_, M>, id: Result<u16, Errno>) -> Result<ToolstackNotes, Errno> {
    ctx.control()?;
    Ok(ctx.named(id?)?.notes.with(|notes| *notes))
}

/// `vm_assist` (ABI core 3.12).
///
/// # Errors
/// `Inval` for unknown assists, `NoSys` for unknown commands.
pub fn vm_assist<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let assist = low32(call.args[1]).into();
    let bit = 1u64 << Assist::from_number(assist).ok_or(Errno::Inval)?.number();
    match low32(call.args[0]) {
        ASSIST_ENABLE => ctx.domain.assists.fetch_or(bit, Relaxed),
        ASSIST_DISABLE => ctx.domain.assists.fetch_and(!bit, Relaxed),
        _ => return Err(Errno::NoSys.into()),
    };
    // The entry code of other CPUs goes by the old assists until it is told anew.
    ctx.world.vcpus_of(ctx.domain).for_each(|vcpu| ctx.world.sched.nudge(ctx.m, vcpu));
    Ok(0)
}
