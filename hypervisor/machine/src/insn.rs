//! Single instructions that Rust has no words for. Nothing here decides anything.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, _rdtsc};
use x86_64::VirtAddr;
use x86_64::instructions::port::Port;
use x86_64::registers::model_specific::Msr;
use x86_64::registers::xcontrol::XCr0;

/// Executes an instruction that may fault, between two others; the answer is whether it did not. `nested` goes on behind it.
macro_rules! attempt {
    ($before:literal, $instruction:literal, $after:literal, $($operand:tt)*) => {{
        let mut done = 0u32;
        core::arch::asm!(
            $before,
            concat!("2: ", $instruction),
            "mov {done:e}, 1",
            "3:",
            $after,
            ".pushsection hv_fixups, \"a\"",
            ".quad 2b, 3b",
            ".popsection",
            done = inout(reg) done,
            $($operand)*,
            options(nostack, preserves_flags),
        );
        done != 0
    }};
}
pub(crate) use attempt;

/// CPUID: EAX, EBX, ECX, EDX.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = __cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The highest leaf of the range that starts at `base`.
pub(crate) fn max_leaf(base: u32) -> u32 {
    cpuid(base, 0)[0]
}

/// The time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every CPU in 64-bit mode has RDTSC, and ring 0 may always execute it.
    unsafe { _rdtsc() }
}

/// Model-specific registers this crate uses.
pub(crate) mod msr {
    pub(crate) const APIC_BASE: u32 = 0x1b;
    pub(crate) const SYSENTER_CS: u32 = 0x174;
    pub(crate) const SYSENTER_ESP: u32 = 0x175;
    pub(crate) const SYSENTER_EIP: u32 = 0x176;
    pub(crate) const PAT: u32 = 0x277;
    pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
    pub(crate) const EFER: u32 = 0xc000_0080;
    pub(crate) const STAR: u32 = 0xc000_0081;
    pub(crate) const LSTAR: u32 = 0xc000_0082;
    pub(crate) const CSTAR: u32 = 0xc000_0083;
    pub(crate) const SFMASK: u32 = 0xc000_0084;
    pub(crate) const FS_BASE: u32 = 0xc000_0100;
    pub(crate) const GS_BASE: u32 = 0xc000_0101;
    /// While ring 0 runs: the GS base the guest has active.
    pub(crate) const GUEST_GS_BASE: u32 = 0xc000_0102;
    pub(crate) const TSC_AUX: u32 = 0xc000_0103;
    /// First register of the LAPIC in its MSR form.
    pub(crate) const X2APIC: u32 = 0x800;
}

/// Reads a model-specific register.
pub(crate) fn rdmsr(register: u32) -> u64 {
    // SAFETY: reading the registers in `msr` has no side effect; an absent one would be a reported ring-0 fault.
    unsafe { Msr::new(register).read() }
}

/// Writes a model-specific register.
///
/// # Safety
/// The value must keep ring 0's own state valid: entry points, GS base, paging attributes.
pub(crate) unsafe fn wrmsr(register: u32, value: u64) {
    // SAFETY: by this function's contract.
    unsafe { Msr::new(register).write(value) };
}

/// Loads a page-table root.
///
/// # Safety
/// The table must hold our sixteen slots.
pub(crate) unsafe fn write_cr3(root: u64) {
    // SAFETY: by this function's contract all code, stack and data stay mapped where they are.
    unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
}

/// Reads a byte from an I/O port.
pub(crate) fn in8(port: u16) -> u8 {
    // SAFETY: the ports used by this crate are those of the PC's fixed devices; no device there can write to memory.
    unsafe { Port::new(port).read() }
}

/// Writes a byte to an I/O port.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: as for `in8`.
    unsafe { Port::new(port).write(value) };
}

/// Writes a word to an I/O port.
pub(crate) fn out32(port: u16, value: u32) {
    // SAFETY: as for `in8`.
    unsafe { Port::new(port).write(value) };
}

/// Reads one, two or four bytes from an I/O port.
pub(crate) fn input(port: u16, size: u8) -> u32 {
    // SAFETY: as for `in8`, and PCI configuration, for a domain that may do to memory whatever its devices can.
    unsafe {
        match size {
            1 => Port::<u8>::new(port).read().into(),
            2 => Port::<u16>::new(port).read().into(),
            _ => Port::new(port).read(),
        }
    }
}

/// Writes as many to one.
pub(crate) fn output(port: u16, size: u8, value: u32) {
    let [low, high, ..] = value.to_le_bytes();
    // SAFETY: as for `input`.
    unsafe {
        match size {
            1 => Port::new(port).write(low),
            2 => Port::new(port).write(u16::from_le_bytes([low, high])),
            _ => Port::new(port).write(value),
        }
    }
}

/// Removes the translation of one address from this CPU's caches.
pub(crate) fn invlpg(address: u64) {
    x86_64::instructions::tlb::flush(VirtAddr::new_truncate(address));
}

/// Writes XCR0.
pub(crate) fn xsetbv(value: u64) {
    // SAFETY: the value is a subset of what CPUID offers, by the rules' check or our own choice; ring 0 keeps
    // nothing in the registers it governs.
    unsafe { XCr0::write_raw(value) };
}
