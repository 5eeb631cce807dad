//! Domains are made and unmade: `domctl`, and the same for the first domain at boot.
//!
//! Touches: the slots of domains and vcpus, and the frames that belong to the hypervisor for a domain's sake.
//! Never touches: a domain's own memory; whoever builds it fills it.
//! Keeps: P9 (every function here takes a [`ControlAuthority`] or is for boot alone), P11.

use super::context::{self, Taken};
use super::vcpu::{Place, Vcpu, VcpuState};
use super::{Domain, Life, MAX_DOMAIN_VCPUS, Papers, Powers};
use crate::addr::{DomainId, Frame, VcpuId};
use crate::dispatch::Progress;
use crate::lock::{Held, Nothing};
use crate::machine::Machine;
use crate::paging::BUDGET;
use crate::world::{ControlAuthority, Ctx, MAX_DOMAINS, World};
use core::sync::atomic::Ordering;
use hypercall_abi::domctl::{
    CreateDomain, DomainInfo, Domctl, DomctlOp, INTERFACE_VERSION, MaxMem, MaxVcpus, VcpuContextArg, info,
};
use hypercall_abi::event::Virq;
use hypercall_abi::shared::{offset, vcpu_info};
use hypercall_abi::tenon::{CrashReport, TenonOp};
use hypercall_abi::{Errno, domid};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The tick every vcpu starts with (ABI core 6.3).
const FIRST_PERIOD: u64 = 10_000_000;

/// A domain to be.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// What it may do.
    pub powers: Powers,
    /// How many vcpus it has.
    pub vcpus: u32,
    /// How many frames it may have.
    pub max_pages: u64,
    /// Its UUID.
    pub handle: [u8; 16],
}

impl World {
    /// Makes an empty domain, paused, with the lowest free id not used lately; for boot, and for [`domctl`].
    ///
    /// # Errors
    /// `Inval` for a number of vcpus no domain can have, `NoMem` without a free slot or frame; nothing is left behind.
    pub fn create<M: Machine>(&self, m: &M, held: &mut Held<Nothing>, spec: &Spec) -> Result<&Domain, Errno> {
        if spec.vcpus == 0 || usize::try_from(spec.vcpus).is_ok_and(|n| n > MAX_DOMAIN_VCPUS) {
            return Err(Errno::Inval);
        }
        let mut census = self.census.lock(held);
        let (next, held) = census.parts();
        let first = *next;
        let ids = (0..MAX_DOMAINS).map(|n| (first.wrapping_add(n)) % DomainId::FIRST_RESERVED);
        let free = |id: &u16| self.slot(DomainId(*id)).is_some_and(|domain| domain.life() == Life::Free);
        let id = DomainId(ids.into_iter().find(free).ok_or(Errno::NoMem)?);
        let domain = self.slot(id).ok_or(Errno::NoMem)?;
        domain.id.store(id.0, Ordering::Release);
        domain.space.begin(id, held);
        let shared = self.frames.lend(m, id).map_err(|_| Errno::NoMem)?;
        for vcpu in 0..MAX_DOMAIN_VCPUS {
            m.write(shared, vcpu * vcpu_info::SIZE + vcpu_info::UPCALL_MASK, &[1]);
        }
        write_wallclock(m, shared);
        domain.shared_info.store(u32::try_from(shared.number()).map_err(|_| Errno::NoMem)?, Ordering::Release);
        for number in 0..spec.vcpus {
            if let Err(errno) = self.add_vcpu(m, domain, VcpuId(number)) {
                self.release_frames(m, domain);
                return Err(errno);
            }
        }
        domain.powers.store(spec.powers.to_bits(), Ordering::Relaxed);
        domain.max_pages.store(spec.max_pages, Ordering::Relaxed);
        domain.pages.store(0, Ordering::Relaxed);
        domain.paused.store(true, Ordering::SeqCst);
        domain.shutdown.store(0, Ordering::SeqCst);
        domain.assists.store(0, Ordering::Relaxed);
        domain.cpu_time.store(0, Ordering::Relaxed);
        domain.entries.iter().for_each(|counter| counter.store(0, Ordering::Relaxed));
        let report = CrashReport { vcpu: 0, length: 0, text: [0; 128] };
        domain.papers.with(|papers| *papers = Papers { handle: spec.handle, report });
        domain.life.store(Life::Alive as u8, Ordering::Release);
        *next = (id.0 + 1) % DomainId::FIRST_RESERVED;
        Ok(domain)
    }

    fn slot(&self, id: DomainId) -> Option<&Domain> {
        self.domains.get(usize::from(id.0 % MAX_DOMAINS))
    }

    /// Gives a domain one of the free vcpus. The caller holds the census.
    fn add_vcpu<M: Machine>(&self, m: &M, domain: &Domain, number: VcpuId) -> Result<(), Errno> {
        let (index, vcpu) =
            (0u16..).zip(&self.vcpus).find(|(_, vcpu)| vcpu.domain.load(Ordering::Acquire) == 0).ok_or(Errno::NoMem)?;
        let slot = domain.vcpus.get(usize::try_from(number.0).unwrap_or(usize::MAX)).ok_or(Errno::Inval)?;
        let traps = self.frames.allocate(m).map_err(|_| Errno::NoMem)?;
        let Ok(fpu) = self.frames.allocate(m) else {
            self.frames.retire(traps);
            return Err(Errno::NoMem);
        };
        {
            let mut own = vcpu.own.try_take().ok_or(Errno::Busy)?;
            *own = VcpuState { traps: Some(traps), fpu: Some(fpu), ..VcpuState::new() };
            own.runstate.state_entry_time = m.now();
        }
        let shared = domain.shared_info().ok_or(Errno::NoMem)?;
        vcpu.info.store(shared.address() + u64::from(number.0) * vcpu_info::SIZE as u64, Ordering::Release);
        vcpu.number.store(number.0, Ordering::Relaxed);
        vcpu.index.store(index, Ordering::Relaxed);
        vcpu.place.store(Place::Off as u8, Ordering::SeqCst);
        vcpu.online.store(false, Ordering::SeqCst);
        vcpu.nmi.store(false, Ordering::SeqCst);
        vcpu.deadline.store(u64::MAX, Ordering::Relaxed);
        vcpu.poll_deadline.store(u64::MAX, Ordering::Relaxed);
        vcpu.period.store(FIRST_PERIOD, Ordering::Relaxed);
        vcpu.next_tick.store(m.now(), Ordering::Relaxed);
        vcpu.virqs.iter().for_each(|port| port.store(0, Ordering::Relaxed));
        let position = self.domains.iter().position(|other| core::ptr::eq(other, domain)).ok_or(Errno::NoMem)?;
        vcpu.domain.store(u16::try_from(position + 1).map_err(|_| Errno::NoMem)?, Ordering::Release);
        slot.store(index + 1, Ordering::Release);
        self.sched.admit(index);
        self.write_time(m, vcpu);
        Ok(())
    }

    /// Returns what the hypervisor holds for a domain whose own memory is gone, and frees its slot.
    fn release_frames<M: Machine>(&self, m: &M, domain: &Domain) {
        for slot in &domain.vcpus {
            let Some(vcpu) = usize::from(slot.swap(0, Ordering::AcqRel)).checked_sub(1).and_then(|n| self.vcpus.get(n))
            else {
                continue;
            };
            if let Some(mut own) = vcpu.own.try_take() {
                for frame in [own.traps.take(), own.fpu.take()].into_iter().flatten() {
                    self.frames.retire(frame);
                }
                *own = VcpuState::new();
            }
            vcpu.info.store(0, Ordering::Release);
            vcpu.domain.store(0, Ordering::Release);
        }
        for slot in &domain.port_frames {
            match slot.swap(0, Ordering::AcqRel) {
                0 => {}
                number => self.frames.retire(Frame::from_u32(number)),
            }
        }
        domain.grants.release(self, m);
        if let Some(shared) = domain.shared_info() {
            domain.shared_info.store(0, Ordering::Release);
            self.frames.retire(shared);
        }
        domain.powers.store(0, Ordering::Relaxed);
        domain.life.store(Life::Free as u8, Ordering::Release);
    }

    /// Goes on unmaking a domain; `More` until it is gone.
    fn destroy<M: Machine>(&self, m: &M, held: &mut Held<Nothing>, domain: &Domain) -> Progress {
        domain.life.store(Life::Dying as u8, Ordering::SeqCst);
        for number in domain.vcpu_numbers() {
            let Some(vcpu) = self.vcpu(domain, number) else {
                continue;
            };
            vcpu.online.store(false, Ordering::SeqCst);
            vcpu.moves(Place::Blocked, Place::Off);
            self.sched.forget(vcpu);
            self.sched.nudge(m, vcpu);
            // A vcpu that runs elsewhere leaves its CPU first.
            let Some(mut own) = vcpu.own.try_take() else {
                return Progress::More;
            };
            if vcpu.place() == Place::Running {
                return Progress::More;
            }
            self.drop_uses(m, held, domain, vcpu, &mut own);
        }
        {
            let _guard = self.ports.lock(held);
            self.close_all(m, domain);
        }
        if domain.grants.unmap_all(self, m, held, domain) == Progress::More {
            return Progress::More;
        }
        if domain.space.open(m, &self.frames, BUDGET, held).tear_down().is_err() {
            return Progress::More;
        }
        domain.pages.store(0, Ordering::Relaxed);
        self.release_frames(m, domain);
        self.raise_global(m, Virq::DomExc);
        Progress::Done(0)
    }

    /// Drops every use of a frame that a vcpu stands for.
    fn drop_uses<M: Machine>(
        &self,
        m: &M,
        held: &mut Held<Nothing>,
        domain: &Domain,
        vcpu: &Vcpu,
        own: &mut VcpuState,
    ) {
        let uses = Taken { gdt: own.gdt, roots: [own.kernel_root.take(), own.user_root.take()] };
        own.gdt = [None; 14];
        uses.give_back(self, m, held, domain);
        for frame in core::mem::take(&mut own.ldt_mapped).into_iter().flatten() {
            self.frames.drop_use(frame);
        }
        let at = vcpu.info.load(Ordering::Acquire);
        let Some(shared) = domain.shared_info() else { return };
        if let Some(frame) = Frame::containing(at).filter(|frame| at != 0 && *frame != shared) {
            vcpu.info.store(shared.address() + u64::from(vcpu.number().0) * vcpu_info::SIZE as u64, Ordering::Release);
            self.frames.drop_use(frame);
        }
    }
}

fn write_wallclock<M: Machine>(m: &M, shared: Frame) {
    let (seconds, nanoseconds) = m.wallclock();
    let (low, high) = (seconds & 0xffff_ffff, seconds >> 32);
    m.write(shared, offset::WC_VERSION, &2u32.to_le_bytes());
    m.write(shared, offset::WC_SEC, &u32::try_from(low).unwrap_or(0).to_le_bytes());
    m.write(shared, offset::WC_NSEC, &nanoseconds.to_le_bytes());
    m.write(shared, offset::WC_SEC_HI, &u32::try_from(high).unwrap_or(0).to_le_bytes());
}

/// The structure at the start of a domctl's payload.
fn payload<T: FromBytes>(call: &Domctl) -> Result<T, Errno> {
    T::read_from_prefix(&call.payload).map(|(value, _)| value).map_err(|_| Errno::Inval)
}

/// Carries out one step of a `domctl`.
///
/// # Errors
/// `Perm` for those without authority, `Acces` for another interface version, `Srch` for a domain there is not, `NoSys`
/// for unknown commands.
pub fn domctl<M: Machine>(ctx: &mut Ctx<'_, M>, arg: u64) -> Result<Progress, Errno> {
    let authority = ctx.control()?;
    let mut call: Domctl = ctx.read(arg)?;
    if call.interface_version != INTERFACE_VERSION {
        return Err(Errno::Acces);
    }
    let command = DomctlOp::from_number(u64::from(call.cmd)).ok_or(Errno::NoSys)?;
    match command {
        DomctlOp::CreateDomain => {
            let wanted: CreateDomain = payload(&call)?;
            if wanted.flags != 0 {
                return Err(Errno::Inval);
            }
            // The reply is tried first: a domain whose id cannot be told would be lost.
            ctx.write(arg, &call)?;
            let spec = Spec { powers: Powers::default(), vcpus: wanted.max_vcpus, max_pages: 0, handle: wanted.handle };
            call.domain = ctx.world.create(ctx.m, ctx.held, &spec)?.id().0;
            ctx.write(arg, &call)?;
        }
        DomctlOp::GetDomainInfo => {
            let domain = at_or_above(ctx, call.domain).ok_or(Errno::Srch)?;
            let info = describe(ctx, domain);
            call.domain = info.domain;
            let (bytes, reply) = (info.as_bytes(), &mut call.payload);
            reply.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
            ctx.write(arg, &call)?;
        }
        DomctlOp::DestroyDomain => {
            let domain = other(ctx, authority, call.domain, true)?;
            return Ok(ctx.world.destroy(ctx.m, ctx.held, domain));
        }
        DomctlOp::PauseDomain => {
            let domain = other(ctx, authority, call.domain, false)?;
            domain.paused.store(true, Ordering::SeqCst);
            for vcpu in domain.vcpu_numbers().filter_map(|number| ctx.world.vcpu(domain, number)) {
                ctx.world.sched.nudge(ctx.m, vcpu);
            }
        }
        DomctlOp::UnpauseDomain => {
            let domain = other(ctx, authority, call.domain, false)?;
            ctx.world.unpause(ctx.m, domain);
        }
        DomctlOp::MaxMem => {
            let MaxMem { max_memkb } = payload(&call)?;
            ctx.named(call.domain)?.max_pages.store(max_memkb / 4, Ordering::Relaxed);
        }
        DomctlOp::MaxVcpus => {
            // A domain gets its vcpus when it is made; asking for the same number again is no change.
            let MaxVcpus { max } = payload(&call)?;
            if ctx.named(call.domain)?.vcpu_numbers().count() != usize::try_from(max).unwrap_or(usize::MAX) {
                return Err(Errno::Inval);
            }
        }
        DomctlOp::SetVcpuContext => {
            let (domain, vcpu, at) = stopped_vcpu(ctx, authority, &call)?;
            let mut own = vcpu.own.try_take().ok_or(Errno::Busy)?;
            let wanted = ctx.read(at)?;
            return context::set(ctx.world, ctx.m, ctx.held, domain, vcpu, &mut own, &wanted);
        }
        DomctlOp::GetVcpuContext => {
            let (_, vcpu, at) = stopped_vcpu(ctx, authority, &call)?;
            let masked = ctx.world.upcall_mask(ctx.m, vcpu);
            let context = context::get(ctx.m, &*vcpu.own.try_take().ok_or(Errno::Busy)?, masked);
            ctx.write(at, &context)?;
        }
    }
    Ok(Progress::Done(0))
}

/// A domain that is not the caller's own; `dying`: also one that is being destroyed.
fn other<'a, M: Machine>(
    ctx: &Ctx<'a, M>,
    _authority: ControlAuthority,
    id: u16,
    dying: bool,
) -> Result<&'a Domain, Errno> {
    if id == domid::SELF || id == ctx.domain.id().0 {
        return Err(Errno::Inval);
    }
    let domain = ctx.world.slot(DomainId(id)).filter(|domain| domain.id() == DomainId(id)).ok_or(Errno::Srch)?;
    match domain.life() {
        Life::Alive => Ok(domain),
        Life::Dying if dying => Ok(domain),
        _ => Err(Errno::Srch),
    }
}

fn stopped_vcpu<'a, M: Machine>(
    ctx: &Ctx<'a, M>,
    authority: ControlAuthority,
    call: &Domctl,
) -> Result<(&'a Domain, &'a Vcpu, u64), Errno> {
    let domain = other(ctx, authority, call.domain, false)?;
    let arg: VcpuContextArg = payload(call)?;
    let vcpu = ctx.world.vcpu(domain, VcpuId(arg.vcpu)).ok_or(Errno::NoEnt)?;
    Ok((domain, vcpu, arg.context))
}

/// The existing domain with the lowest id from `id` on.
fn at_or_above<'a, M: Machine>(ctx: &Ctx<'a, M>, id: u16) -> Option<&'a Domain> {
    let exists = |domain: &&Domain| domain.life() != Life::Free && domain.id().0 >= id;
    ctx.world.domains.iter().filter(exists).min_by_key(|domain| domain.id())
}

fn describe<M: Machine>(ctx: &Ctx<'_, M>, domain: &Domain) -> DomainInfo {
    let vcpus = || domain.vcpu_numbers().filter_map(|number| ctx.world.vcpu(domain, number));
    let mut flags = 0;
    let mut set = |flag, on: bool| flags |= if on { flag } else { 0 };
    set(info::DYING, domain.life() == Life::Dying);
    set(info::PAUSED, domain.paused.load(Ordering::SeqCst));
    set(info::RUNNING, vcpus().any(|vcpu| vcpu.place() == Place::Running));
    set(info::BLOCKED, vcpus().all(|vcpu| matches!(vcpu.place(), Place::Blocked | Place::Off)));
    if let Some(reason) = domain.shutdown_reason() {
        flags |= info::SHUTDOWN | (reason & 0xff) << info::SHUTDOWN_SHIFT;
    }
    DomainInfo {
        domain: domain.id().0,
        flags,
        tot_pages: domain.pages.load(Ordering::Relaxed),
        max_pages: domain.max_pages.load(Ordering::Relaxed),
        shared_info_frame: domain.shared_info().map_or(0, Frame::number),
        cpu_time: domain.cpu_time.load(Ordering::Relaxed),
        nr_online_vcpus: u32::try_from(vcpus().filter(|vcpu| vcpu.online.load(Ordering::Relaxed)).count()).unwrap_or(0),
        max_vcpu_id: u32::try_from(vcpus().count().saturating_sub(1)).unwrap_or(0),
        handle: domain.papers.with(|papers| papers.handle),
        ..DomainInfo::new_zeroed()
    }
}

impl World {
    /// Lets a domain run.
    pub fn unpause<M: Machine>(&self, m: &M, domain: &Domain) {
        domain.paused.store(false, Ordering::SeqCst);
        for vcpu in domain.vcpu_numbers().filter_map(|number| self.vcpu(domain, number)) {
            if vcpu.online.load(Ordering::SeqCst) {
                self.sched.start(m, vcpu);
            }
        }
    }
}

/// Our own calls.
///
/// # Errors
/// `Perm` for those without authority, `NoSys` for unknown ones, `Srch` for a domain there is not.
pub fn tenon_op<M: Machine>(ctx: &mut Ctx<'_, M>, command: u64, id: u64, arg: u64) -> Result<u64, Errno> {
    ctx.control()?;
    match TenonOp::from_number(command).ok_or(Errno::NoSys)? {
        TenonOp::CrashReport => {
            let id = u16::try_from(id).map_err(|_| Errno::Srch)?;
            let report = ctx.named(id)?.papers.with(|papers| papers.report);
            ctx.write(arg, &report)?;
        }
    }
    Ok(0)
}
