//! How a domain is made and destroyed.
//!
//! Touches: the slots of domains, and through each subsystem the domain's state there.
//! Never touches: a domain's own memory; the domain's builder fills it.
//! Keeps: P10 (a slot gets its initial values again, all of them), P11 (subsystems end in the reverse order of their
//! beginning).

use super::visit::Moment;
use super::{Life, MAX_DOMAIN_VCPUS, PORT_FRAMES, Spec};
use crate::addr::FrameSlot;
use crate::fault::{Fault, planted};
use crate::grant::{self, Grants};
use crate::prelude::*;
use crate::renew::Renew;
use crate::world::{DomainBuilder, MAX_DOMAINS};
use crate::{event, vcpu};
use hypercall_abi::event::Virq;
use hypercall_abi::shared::{WallClock, offset, vcpu_info};
use zerocopy::IntoBytes;

/// The parts of a domain's state. For a new part, the compiler asks how it begins, how it ends, and (in `audit.rs`) how
/// it is shown as plain values.
#[derive(Clone, Copy)]
pub(crate) enum Subsystem {
    /// Frames that the hypervisor keeps on the domain's behalf.
    Kept,
    /// The domain's vcpus; their state is listed in `Part::ALL` of `vcpu/context.rs`.
    Vcpus,
    /// The domain's memory, which it gets by `memory_op`.
    Memory,
    /// The domain's grant table, and the grants of others that it has mapped.
    Grants,
    /// The domain's ports, which it gets by `event_channel_op`.
    Ports,
    /// Scheduling: the right of the domain's vcpus to run, and their timers. They run once the domain is unpaused.
    Runs,
}

/// Makes a part of a new domain, which nobody can see yet.
type Begin<M> = fn(&mut DomainBuilder<'_, M>) -> Result<(), Errno>;
/// Ends a part of a domain. Called until it no longer returns `More`; also called after a failed beginning.
type End<M> = fn(&mut CpuCtx<'_, M>, &Domain) -> Result<(), Halt>;

impl Subsystem {
    /// All parts, in the order in which they begin; they end in the reverse order.
    pub(crate) const ALL: [Self; 6] = [Self::Kept, Self::Vcpus, Self::Memory, Self::Grants, Self::Ports, Self::Runs];

    fn ways<M: Machine>(self) -> (Begin<M>, End<M>) {
        match self {
            Self::Kept => (set_aside, return_frames),
            Self::Vcpus => (vcpu::life::begin, vcpu::life::end),
            Self::Memory => (|_| Ok(()), |cpu_ctx, domain| Ok(cpu_ctx.session(domain).tear_down()?)),
            Self::Grants => (grant::ops::begin, |cpu_ctx, domain| cpu_ctx.unmap_grants(domain)),
            Self::Ports => (|_| Ok(()), event::ops::end),
            Self::Runs => (|_| Ok(()), vcpu::life::stop),
        }
    }
}

/// How many frames the hypervisor may have to keep on behalf of a domain. All are set aside when the domain is made:
/// for the shared_info page, ports and grants, and for each vcpu a page for the trap table and one for FPU state.
#[must_use]
pub const fn kept_frames(vcpus: u32) -> u32 {
    1 + low32(long(PORT_FRAMES)) + Grants::FRAMES + 2 * vcpus
}

impl<'a, M: Machine> CpuCtx<'a, M> {
    /// Makes an empty domain, paused. It gets the id that `spec` asks for, or else the first free one after the one given
    /// last. For boot, and for `domctl`.
    ///
    /// # Errors
    /// `Inval` for a number of vcpus or an id that no domain can have, `Exist` if the slot of the wanted id is taken,
    /// `NoMem` without a free slot or vcpu, or if there are not enough free frames for [`kept_frames`]; nothing is left
    /// behind.
    pub fn create(&mut self, spec: &Spec) -> Result<&'a Domain, Errno> {
        let (m, world) = (self.m, self.world);
        ensure!((1..=MAX_DOMAIN_VCPUS).contains(&index(spec.vcpus)), Errno::Inval);
        ensure!(spec.id.is_none_or(|id| id.0 < DomainId::FIRST_RESERVED), Errno::Inval);
        let mut census = world.census.lock(self.held);
        let (next, held) = census.parts();
        let any = (0..MAX_DOMAINS).map(|n| DomainId(next.wrapping_add(n) % DomainId::FIRST_RESERVED));
        let mut ids =
            spec.id.into_iter().chain(any.filter(|id| spec.id.is_none() && id.slot() >= DomainId::BY_REQUEST));
        let free = |id| {
            let domain = world.slot(id).filter(|domain| domain.life() == Life::Free)?;
            Some((id, domain, domain.work.try_take()?))
        };
        let none = if spec.id.is_some() { Errno::Exist } else { Errno::NoMem };
        let (id, domain, _work) = ids.find_map(free).ok_or(none)?;
        domain.renew(Domain::new, held);
        domain.id.store(id.0, Release);
        domain.space.belongs_to(id);
        domain.powers.store(spec.powers.bits(), Relaxed);
        domain.max_pages.store(spec.max_pages, Relaxed);
        domain.notes.with(|notes| notes.handle = spec.handle);
        let mut builder = DomainBuilder { m, world, domain, spec, held };
        let begun = Subsystem::ALL.iter().try_for_each(|subsystem| subsystem.ways().0(&mut builder));
        domain.enter(if begun.is_ok() { Life::Alive } else { Life::Dying });
        if let Err(why) = begun {
            drop(census);
            // Without all of its parts, the domain ends at once. It has no memory yet, so one step is enough.
            let _ = self.end(domain);
            return Err(why);
        }
        if spec.id.is_none() {
            *next = (id.0 + 1) % DomainId::FIRST_RESERVED;
        }
        Ok(domain)
    }

    /// Does one step of destroying a domain; returns `More` until the domain is gone. Only one CPU does this at a time.
    ///
    /// # Errors
    /// `Srch` if another CPU has destroyed the domain.
    pub(super) fn destroy(&mut self, domain: &Domain, id: DomainId) -> Answer {
        let (m, world) = (self.m, self.world);
        let work = domain.work.try_take();
        ensure!(work.is_some() || planted(Fault::UnmakeTogether), Halt::More);
        ensure!(domain.id() == id && domain.life() != Life::Free, Errno::Srch);
        if domain.enter(Life::Dying) == Life::Alive {
            domain.dies.store(world.visits.now().0, Relaxed);
        }
        // Steps on other CPUs that found the domain alive must have ended first.
        let dies = Moment(domain.dies.load(Relaxed));
        let visited = world.visits.any_since_before(dies, world.sched.online(), m.this_cpu());
        ensure!(!visited || planted(Fault::UnmakeVisited), Halt::More);
        self.end(domain)?;
        world.raise_global(m, Virq::DomExc);
        Ok(0)
    }

    /// Ends all parts of a domain, step by step; then frees its slot.
    fn end(&mut self, domain: &Domain) -> Result<(), Halt> {
        Subsystem::ALL.iter().rev().try_for_each(|subsystem| subsystem.ways().1(self, domain))?;
        domain.end_log();
        domain.powers.store(0, Relaxed);
        domain.enter(Life::Free);
        Ok(())
    }
}

/// Sets aside the frames that the hypervisor may have to keep for a domain, and lends the domain its shared_info page.
fn set_aside<M: Machine>(builder: &mut DomainBuilder<'_, M>) -> Result<(), Errno> {
    let DomainBuilder { m, world, domain, spec, .. } = builder;
    world.frames.promise(domain.id(), kept_frames(spec.vcpus))?;
    let shared = world.frames.lend(*m, domain.id())?;
    for vcpu in 0..MAX_DOMAIN_VCPUS {
        m.write(shared, vcpu * vcpu_info::SIZE + vcpu_info::UPCALL_MASK, &[1]);
    }
    let (seconds, nsec) = m.wallclock();
    let clock = WallClock { version: 2, sec: low32(seconds), nsec, sec_hi: low32(seconds >> 32) };
    m.write(shared, offset::WALLCLOCK, clock.as_bytes());
    domain.shared_info.set(shared);
    Ok(())
}

/// Frees the frames that the hypervisor kept for a domain whose own memory is gone.
fn return_frames<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, domain: &Domain) -> Result<(), Halt> {
    let slots = domain.grants.frames().chain([&domain.shared_info]);
    slots.filter_map(FrameSlot::take).for_each(|frame| cpu_ctx.world.frames.retire(frame));
    cpu_ctx.world.frames.end_promise(domain.id());
    Ok(())
}

impl World {
    /// Lets a domain run that was paused by the toolstack.
    pub fn unpause<M: Machine>(&self, m: &M, domain: &Domain) {
        domain.paused.store(false, SeqCst);
        for vcpu in self.vcpus_of(domain).filter(|vcpu| vcpu.online.load(SeqCst)) {
            self.sched.start(m, vcpu);
        }
    }
}
