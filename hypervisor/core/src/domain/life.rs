//! How a domain begins and ends.
//!
//! Touches: the slots of domains and vcpus, and the frames that belong to the hypervisor for a domain's sake.
//! Never touches: a domain's own memory; whoever builds it fills it.
//! Keeps: P11.

use super::visit::Moment;
use super::{Journal, Life, MAX_DOMAIN_VCPUS, PORT_FRAMES, Papers, Powers};
use crate::addr::FrameSlot;
use crate::grant::Grants;
use crate::prelude::*;
use crate::time;
use crate::vcpu::context::Taken;
use crate::vcpu::polling;
use crate::world::MAX_DOMAINS;
use hypercall_abi::event::Virq;
use hypercall_abi::shared::{WallClock, offset, vcpu_info};
use zerocopy::IntoBytes;

/// The tick every vcpu starts with (ABI core 6.3).
const FIRST_PERIOD: u64 = 10_000_000;

/// How many frames the hypervisor may have to keep on behalf of a domain, all of which are set aside when it is made: its
/// shared_info page, ports and grants, and a page of gates and one of FPU state for each vcpu.
#[must_use]
pub const fn kept_frames(vcpus: u32) -> u32 {
    1 + low32(PORT_FRAMES as u64) + Grants::FRAMES + 2 * vcpus
}

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

impl<'a, M: Machine> Site<'a, M> {
    /// Makes an empty domain, paused, with the lowest free id not used lately; for boot, and for `domctl`.
    ///
    /// # Errors
    /// `Inval` for a number of vcpus no domain can have, `NoMem` without a free slot or vcpu, or if [`kept_frames`] are not
    /// free; nothing is left behind.
    pub fn create(&mut self, spec: &Spec) -> Result<&'a Domain, Errno> {
        let (m, world) = (self.m, self.world);
        ensure!((1..=MAX_DOMAIN_VCPUS).contains(&(spec.vcpus as usize)), Errno::Inval);
        let mut census = world.census.lock(self.held);
        let (next, held) = census.parts();
        let mut ids = (0..MAX_DOMAINS).map(|n| DomainId(next.wrapping_add(n) % DomainId::FIRST_RESERVED));
        let free = |id: &DomainId| world.slot(*id).is_some_and(|domain| domain.life() == Life::Free);
        let id = ids.find(free).ok_or(Errno::NoMem)?;
        let domain = world.slot(id).ok_or(Errno::NoMem)?;
        domain.id.store(id.0, Release);
        domain.space.begin(id, held);
        world.frames.promise(id, kept_frames(spec.vcpus))?;
        let shared = world.frames.lend(m, id).inspect_err(|_| world.release_frames(domain))?;
        for vcpu in 0..MAX_DOMAIN_VCPUS {
            m.write(shared, vcpu * vcpu_info::SIZE + vcpu_info::UPCALL_MASK, &[1]);
        }
        write_wallclock(m, shared);
        domain.shared_info.set(shared);
        world.fill_table(m, domain, 1).inspect_err(|_| world.release_frames(domain))?;
        for number in 0..spec.vcpus {
            world.add_vcpu(m, domain, VcpuId(number)).inspect_err(|_| world.release_frames(domain))?;
        }
        domain.powers.store(spec.powers.bits(), Relaxed);
        domain.max_pages.store(spec.max_pages, Relaxed);
        domain.paused.store(true, SeqCst);
        domain.shutdown.store(0, SeqCst);
        domain.pollers.store(0, SeqCst);
        domain.assists.store(0, Relaxed);
        domain.cpu_time.store(0, Relaxed);
        domain.entries.iter().for_each(|counter| counter.store(0, Relaxed));
        domain.papers.with(|papers| *papers = Papers::new(spec.handle));
        domain.journal.with(|journal| *journal = Journal::new());
        domain.life.store(Life::Alive as u8, Release);
        *next = (id.0 + 1) % DomainId::FIRST_RESERVED;
        Ok(domain)
    }

    /// Goes on destroying a domain; `More` until it is gone. One CPU does so at a time.
    ///
    /// # Errors
    /// `Srch` if another has destroyed it.
    pub(super) fn destroy(&mut self, domain: &Domain, id: DomainId) -> Answer {
        ensure!(!domain.unmaking.swap(true, SeqCst), Halt::More);
        let exists = domain.id() == id && domain.life() != Life::Free;
        let answer = if exists { self.unmake(domain) } else { Err(Errno::Srch.into()) };
        domain.unmaking.store(false, SeqCst);
        answer
    }

    fn unmake(&mut self, domain: &Domain) -> Answer {
        let (m, world) = (self.m, self.world);
        if domain.life.swap(Life::Dying as u8, SeqCst) == Life::Alive as u8 {
            domain.dies.store(world.visits.now().0, Relaxed);
        }
        // Who has found it alive is done with it first.
        let dies = Moment(domain.dies.load(Relaxed));
        ensure!(!world.visits.any_since_before(dies, world.sched.online(), m.this_cpu()), Halt::More);
        for vcpu in world.vcpus_of(domain) {
            vcpu.online.store(false, SeqCst);
            vcpu.moves(Place::Blocked, Place::Off);
            ensure!(world.sched.forget(vcpu), Halt::More);
            world.sched.nudge(m, vcpu);
            // A vcpu that runs elsewhere leaves its CPU first.
            let mut own = vcpu.own.try_take().ok_or(Halt::More)?;
            ensure!(!matches!(vcpu.place(), Place::Running(_)), Halt::More);
            self.drop_uses(domain, vcpu, &mut own);
        }
        {
            let _guard = world.ports.lock(self.held);
            world.close_all(m, domain);
            domain.port_frames.iter().filter_map(FrameSlot::take).for_each(|frame| world.frames.retire(frame));
        }
        self.unmap_grants(domain)?;
        self.session(domain).tear_down()?;
        domain.end_log();
        world.release_frames(domain);
        world.raise_global(m, Virq::DomExc);
        Ok(0)
    }

    /// Drops every use of a frame that a vcpu stands for.
    fn drop_uses(&mut self, domain: &Domain, vcpu: &Vcpu, own: &mut VcpuState) {
        use core::mem::take;
        let roots = [own.kernel_root.take(), own.user_root.take()];
        Taken { gdt: take(&mut own.gdt), roots, ldt: take(&mut own.ldt_mapped) }.give_back(self, domain);
        let Some(shared) = domain.shared_info() else { return };
        if let Some((frame, _)) = vcpu.record().filter(|(frame, _)| *frame != shared) {
            vcpu.info.store(shared_record(shared, vcpu.number()), Release);
            self.world.frames.drop_use(frame, domain.id());
        }
    }
}

/// Where in its domain's shared_info page a vcpu's record begins, as a machine address.
fn shared_record(shared: Frame, vcpu: VcpuId) -> u64 {
    shared.address() + u64::from(vcpu.0) * vcpu_info::SIZE as u64
}

impl World {
    /// Gives a domain one of the free vcpus. The caller holds the census.
    fn add_vcpu<M: Machine>(&self, m: &M, domain: &Domain, number: VcpuId) -> Result<(), Errno> {
        let mut vcpus = (0u16..).zip(&self.vcpus);
        let (index, vcpu) = vcpus.find(|(_, vcpu)| vcpu.domain.load(Acquire) == 0).ok_or(Errno::NoMem)?;
        let slot = nth(&domain.vcpus, number.0).ok_or(Errno::Inval)?;
        let shared = domain.shared_info().ok_or(Errno::NoMem)?;
        let position = self.domains.iter().position(|other| core::ptr::eq(other, domain)).ok_or(Errno::NoMem)?;
        let mut own = vcpu.own.try_take().ok_or(Errno::Busy)?;
        let traps = self.frames.allocate_for(m, domain.id())?;
        let fpu = self.frames.allocate_for(m, domain.id()).inspect_err(|_| self.frames.retire(traps))?;
        *own = VcpuState { traps: Some(traps), fpu: Some(fpu), ..VcpuState::new() };
        own.runstate.state_entry_time = m.now();
        vcpu.info.store(shared_record(shared, number), Release);
        vcpu.number.store(number.0, Relaxed);
        vcpu.index.store(index, Relaxed);
        vcpu.place.store(Place::Off.word(), SeqCst);
        vcpu.online.store(false, SeqCst);
        vcpu.nmi.store(false, SeqCst);
        vcpu.polling.store(polling::NO, SeqCst);
        vcpu.deadline.store(u64::MAX, Relaxed);
        vcpu.poll_deadline.store(u64::MAX, Relaxed);
        vcpu.period.store(FIRST_PERIOD, Relaxed);
        vcpu.next_tick.store(m.now(), Relaxed);
        vcpu.virqs.iter().for_each(|port| port.store(0, Relaxed));
        vcpu.domain.store(low16(position as u64 + 1), Release);
        slot.store(index + 1, Release);
        time::write_record(m, vcpu);
        Ok(())
    }

    /// Returns what the hypervisor holds for a domain whose own memory is gone, and frees its slot.
    fn release_frames(&self, domain: &Domain) {
        for slot in &domain.vcpus {
            let index = slot.swap(0, AcqRel).checked_sub(1);
            let Some(vcpu) = index.and_then(|index| nth(&self.vcpus, index)) else { continue };
            if let Some(mut own) = vcpu.own.try_take() {
                let own = core::mem::take(&mut *own);
                [own.traps, own.fpu].into_iter().flatten().for_each(|frame| self.frames.retire(frame));
            }
            vcpu.info.store(0, Release);
            vcpu.domain.store(0, Release);
        }
        let slots = domain.port_frames.iter().chain(domain.grants.frames()).chain([&domain.shared_info]);
        slots.filter_map(FrameSlot::take).for_each(|frame| self.frames.retire(frame));
        self.frames.end_promise(domain.id());
        domain.powers.store(0, Relaxed);
        domain.life.store(Life::Free as u8, Release);
    }

    /// Lets a domain run.
    pub fn unpause<M: Machine>(&self, m: &M, domain: &Domain) {
        domain.paused.store(false, SeqCst);
        for vcpu in self.vcpus_of(domain).filter(|vcpu| vcpu.online.load(SeqCst)) {
            self.sched.start(m, vcpu);
        }
    }
}

fn write_wallclock<M: Machine>(m: &M, shared: Frame) {
    let (seconds, nanoseconds) = m.wallclock();
    let clock = WallClock { version: 2, sec: low32(seconds), nsec: nanoseconds, sec_hi: low32(seconds >> 32) };
    m.write(shared, offset::WALLCLOCK, clock.as_bytes());
}
