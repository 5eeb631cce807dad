//! How the vcpus of a domain are made and destroyed.

use super::context::VcpuUses;
use crate::domain::Powers;
use crate::prelude::*;
use crate::renew::Renew;
use crate::time;
use crate::world::DomainBuilder;
use core::mem::take;
use hypercall_abi::shared::vcpu_info;

/// The period of the timer with which every vcpu starts, in nanoseconds (ABI core 6.3).
const FIRST_PERIOD: u64 = 10_000_000;

/// Gives a new domain, which nobody can see yet, its vcpus.
///
/// # Errors
/// `NoMem` if too few vcpus are free.
pub(crate) fn begin<M: Machine>(builder: &mut DomainBuilder<'_, M>) -> Result<(), Errno> {
    (0..builder.spec.vcpus).try_for_each(|number| add(builder, VcpuId(number)))
}

/// Gives a domain one of the free vcpus.
fn add<M: Machine>(builder: &mut DomainBuilder<'_, M>, number: VcpuId) -> Result<(), Errno> {
    let DomainBuilder { m, world, domain, .. } = *builder;
    let mut vcpus = (0u16..).zip(&world.vcpus);
    let (index, vcpu) = vcpus.find(|(_, vcpu)| vcpu.domain.load(Acquire) == 0).ok_or(Errno::NoMem)?;
    let slot = nth(&domain.vcpus, number.0).ok_or(Errno::Inval)?;
    let shared = domain.shared_info().ok_or(Errno::NoMem)?;
    let position = world.domains.iter().position(|other| core::ptr::eq(other, domain)).ok_or(Errno::NoMem)?;
    let mut state = vcpu.state.try_take().ok_or(Errno::Busy)?;
    let traps = world.frames.allocate_for(m, domain.id())?;
    let fpu = world.frames.allocate_for(m, domain.id()).inspect_err(|_| world.frames.retire(traps))?;
    *state = VcpuState { traps: Some(traps), fpu: Some(fpu), ..VcpuState::new() };
    state.runstate.state_entry_time = m.now();
    vcpu.renew(Vcpu::new, builder.held);
    vcpu.info.store(shared_record(shared, number), Release);
    vcpu.number.store(number.0, Relaxed);
    vcpu.serves.store(builder.spec.powers.contains(Powers::DEVICES), Relaxed);
    vcpu.index.store(index, Relaxed);
    vcpu.period.store(FIRST_PERIOD, Relaxed);
    vcpu.next_tick.store(m.now(), Relaxed);
    vcpu.domain.store(low16(long(position) + 1), Release);
    slot.store(index + 1, Release);
    time::write_record(m, vcpu);
    Ok(())
}

/// Machine address of a vcpu's record in its domain's shared_info page.
fn shared_record(shared: Frame, vcpu: VcpuId) -> u64 {
    shared.address() + u64::from(vcpu.0) * long(vcpu_info::SIZE)
}

/// Makes the vcpus of a dying domain leave their CPUs, and drops all uses of frames that they hold.
///
/// # Errors
/// `More` until the last one has left its CPU.
pub(crate) fn stop<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, domain: &Domain) -> Result<(), Halt> {
    let (m, world) = (cpu_ctx.m, cpu_ctx.world);
    for vcpu in world.vcpus_of(domain) {
        vcpu.online.store(false, SeqCst);
        vcpu.moves(Place::Blocked, Place::Off);
        ensure!(world.sched.forget(vcpu), Halt::More);
        world.sched.nudge(m, vcpu);
        // A vcpu that runs elsewhere leaves its CPU first.
        let mut state = vcpu.state.try_take().ok_or(Halt::More)?;
        ensure!(!matches!(vcpu.place(), Place::Running(_)), Halt::More);
        let roots = [state.kernel_root.take(), state.user_root.take()];
        VcpuUses { gdt: take(&mut state.gdt), roots, ldt: take(&mut state.ldt_mapped) }.give_back(cpu_ctx, domain);
        let Some(shared) = domain.shared_info() else { continue };
        if let Some((frame, _)) = vcpu.record().filter(|(frame, _)| *frame != shared) {
            vcpu.info.store(shared_record(shared, vcpu.number()), Release);
            world.frames.drop_use(frame, domain.id());
        }
    }
    Ok(())
}

/// Frees the vcpus of a domain that has no memory any more.
pub(crate) fn end<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, domain: &Domain) -> Result<(), Halt> {
    let world = cpu_ctx.world;
    for slot in &domain.vcpus {
        let index = slot.swap(0, AcqRel).checked_sub(1);
        let Some(vcpu) = index.and_then(|index| nth(&world.vcpus, index)) else { continue };
        if let Some(mut state) = vcpu.state.try_take() {
            [state.traps.take(), state.fpu.take()].into_iter().flatten().for_each(|frame| world.frames.retire(frame));
        }
        vcpu.info.store(0, Release);
        vcpu.domain.store(0, Release);
    }
    Ok(())
}
