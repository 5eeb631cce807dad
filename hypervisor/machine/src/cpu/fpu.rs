//! Moving a vcpu's FPU state and segments off a CPU and onto it.
//!
//! The FPU is saved and loaded whole, with every component the CPU has and a frame can hold, whatever the vcpu's XCR0
//! says: SSE registers are usable without their XCR0 bit, and nothing of one vcpu may show in another (P10).

use crate::Hardware;
use crate::insn::{self, attempt};
use crate::memory::page;
use crate::percpu::{self, Cpu};
use core::arch::asm;
use core::arch::x86_64::{_fxsave64, _xsave64};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use hv_core::addr::{Frame, PAGE_SIZE, index};
use hv_core::machine::Frames;
use x86_64::registers::control::{Cr0, Cr0Flags};

/// The components we can switch: x87, SSE, AVX, AVX-512; 0 without XSAVE.
static COMPONENTS: AtomicU64 = AtomicU64::new(0);

/// Components offered to nobody stay off: MPX, PKRU, AMX.
const WANTED: u64 = 0xe7;

/// Finds out what there is and turns it on.
pub(super) fn init(cpu: &Cpu) {
    set_task_switched(false);
    if cpu.cr4.load(Relaxed) & 1 << 18 == 0 {
        return;
    }
    let [low, ..] = insn::cpuid(0xd, 0);
    let all = u64::from(low) & WANTED;
    let fits = |components: u64| {
        insn::xsetbv(components);
        index(insn::cpuid(0xd, 0)[1]) <= PAGE_SIZE
    };
    let chosen = [all, all & 7, all & 3, 1].into_iter().find(|&components| fits(components));
    COMPONENTS.store(chosen.unwrap_or(1), Relaxed);
    cpu.xcr0.store(chosen.unwrap_or(1), Relaxed);
    cpu.guest_xcr0.store(1, Relaxed);
}

/// Bytes of the area where FXSAVE and the legacy part of XSAVE put things.
const CONTROL_WORD: usize = 0;
const MXCSR: usize = 24;
const HEADER: usize = 512;

/// Puts the power-on state into a save area: FCW 0x0040, empty tags, MXCSR 0x1f80 (ABI core 1.5). The first 512 bytes are
/// FXSAVE's; the word at 512 has a bit for each component whose content counts (1 x87, 2 SSE).
pub(super) fn reset(hw: &Hardware, area: Frame) {
    hw.zero(area);
    hw.write(area, CONTROL_WORD, &0x0040u16.to_le_bytes());
    hw.write(area, MXCSR, &0x1f80u32.to_le_bytes());
    hw.write(area, HEADER, &1u64.to_le_bytes());
}

/// Saves the FPU of the vcpu that ran here: all components, whatever its XCR0.
pub(super) fn save(area: Frame) {
    let cpu = percpu::this();
    set_task_switched(false);
    let to = page(area).as_ptr().cast_mut().cast();
    match COMPONENTS.load(Relaxed) {
        // SAFETY: the area is a whole frame for this vcpu's FPU alone, aligned; FXSAVE writes 512 bytes of it.
        0 => unsafe { _fxsave64(to) },
        components => {
            use_xcr0(cpu, components);
            // SAFETY: as above; `init` has chosen components that fit into a frame.
            unsafe { _xsave64(to, u64::MAX) };
        }
    }
}

/// Loads what [`save`] saved, or the power-on state if the CPU refuses it, and the XCR0 given to [`CpuState::set_xcr0`].
///
/// [`CpuState::set_xcr0`]: hv_core::machine::CpuState::set_xcr0
pub(super) fn load(hw: &Hardware, area: Frame) {
    let cpu = percpu::this();
    set_task_switched(false);
    use_xcr0(cpu, COMPONENTS.load(Relaxed));
    if !restore(area) {
        reset(hw, area);
        restore(area);
    }
    use_xcr0(cpu, cpu.guest_xcr0.load(Relaxed));
}

/// Loads the FPU from a save area; false if the CPU refuses its content.
fn restore(area: Frame) -> bool {
    let from = page(area).as_ptr();
    // SAFETY: the area is a whole, aligned frame; ring 0 is compiled without FPU instructions, so its registers
    // are the guest's alone; the fault that bad content causes is ended by the fix-up.
    unsafe {
        match COMPONENTS.load(Relaxed) {
            0 => attempt!("", "fxrstor64 [{from}]", "", from = in(reg) from),
            _ => attempt!("", "xrstor64 [{from}]", "", from = in(reg) from, in("eax") u32::MAX, in("edx") u32::MAX),
        }
    }
}

/// Makes XCR0 `value`, where there is one.
pub(super) fn use_xcr0(cpu: &Cpu, value: u64) {
    if COMPONENTS.load(Relaxed) != 0 && cpu.xcr0.swap(value, Relaxed) != value {
        insn::xsetbv(value);
    }
}

/// Sets or clears CR0.TS.
pub(super) fn set_task_switched(on: bool) {
    // SAFETY: ring 0 uses no FPU instruction, besides those above, which clear TS first.
    unsafe {
        match on {
            false => asm!("clts", options(nomem, nostack, preserves_flags)),
            true => Cr0::update(|cr0| cr0.insert(Cr0Flags::TASK_SWITCHED)),
        }
    }
}
