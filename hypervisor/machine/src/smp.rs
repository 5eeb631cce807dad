//! The CPUs as a group. Only the first is started so far; everything else is written for several.

use crate::acpi::Topology;
use crate::insn::{self, invlpg};
use crate::percpu::{self, CPUS, Cpu};
use crate::{Hardware, apic};
use core::mem::offset_of;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicU32, fence};
use hv_core::addr::{CpuId, CpuSet, index};
use hv_core::machine::{Cpus, Flush};

/// CPUs started.
static ONLINE: AtomicU32 = AtomicU32::new(0);

/// Names the CPUs of the machine and prepares the one we run on, which is number 0.
pub(crate) fn prepare(topology: &Topology) -> &'static Cpu {
    let [_, ebx, ..] = insn::cpuid(1, 0);
    let own = ebx >> 24;
    let others = topology.cpus.iter().copied().filter(|&id| id != own);
    for (cpu, apic_id) in CPUS.iter().zip(core::iter::once(own).chain(others)) {
        cpu.apic_id.store(apic_id, Relaxed);
    }
    hv_core::lock::while_waiting(|| flush_if_asked(percpu::this()));
    let cpu = percpu::prepare(0);
    cpu.online.store(true, Release);
    ONLINE.store(1, Release);
    cpu
}

/// Whether more than one CPU runs.
pub(crate) fn several() -> bool {
    ONLINE.load(Relaxed) > 1
}

/// Forgets every translation of a guest: they are never global.
fn flush_all(cpu: &Cpu) {
    forget(cpu);
    // SAFETY: loads the root that is in use.
    unsafe { insn::write_cr3(cpu.root.load(Relaxed)) };
}

/// What was found by walking tables holds no more.
fn forget(cpu: &Cpu) {
    cpu.flushes.store(cpu.flushes.load(Relaxed).wrapping_add(1), Relaxed); // this CPU alone writes it
}

/// Does what other CPUs have asked for, before a guest runs here again.
pub(crate) fn flush_if_asked(cpu: &Cpu) {
    cpu.asked.answer(|| flush_all(cpu));
}

/// Asks another CPU to flush: at once if it runs a guest; else when it waits for a lock or for a flush of its own, or comes
/// out of the rules. One that sleeps will, before it does anything else.
fn ask(cpu: &Cpu) {
    cpu.asked.ask();
    fence(SeqCst);
    if cpu.in_guest.load(SeqCst) {
        apic::send(cpu.apic_id.load(Relaxed), apic::FLUSH);
    }
}

/// A CPU that has been started.
fn online(cpu: CpuId) -> Option<&'static Cpu> {
    CPUS.get(index(cpu.0)).filter(|cpu| cpu.online.load(Acquire))
}

impl Cpus for Hardware {
    fn this_cpu(&self) -> CpuId {
        CpuId(percpu::this().id.load(Relaxed))
    }

    fn flush(&self, cpus: CpuSet, what: Flush) {
        let (this, own) = (percpu::this(), self.this_cpu());
        let others = || cpus.without(own).iter().filter_map(online);
        others().for_each(ask);
        if cpus.has(own) {
            match what {
                Flush::All => flush_all(this),
                Flush::Page(at) => invlpg(at.0),
            }
        }
        for cpu in others() {
            // A CPU inside the rules may be about to use a frame it has just walked to, so we wait for it. Every loop that
            // waits answers flushes, this one included: nobody waits for ever.
            let requests = cpu.asked.so_far();
            while !cpu.asked.has_answered(requests) && !cpu.idle.load(SeqCst) {
                flush_if_asked(this);
                core::hint::spin_loop();
            }
        }
    }

    fn flushes(&self) -> u64 {
        percpu::word::<{ offset_of!(Cpu, flushes) }>()
    }

    fn forget(&self) {
        forget(percpu::this());
    }

    fn kick(&self, cpu: CpuId) {
        if let Some(cpu) = online(cpu) {
            apic::send(cpu.apic_id.load(Relaxed), apic::KICK);
        }
    }
}
