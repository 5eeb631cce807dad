//! The CPU's own state: what is set once, and what the rules change for each vcpu.

pub(crate) mod fpu;
mod tables;

use crate::insn::{self, msr};
use crate::memory::{self, DATA, address_of};
use crate::percpu::{self, Cpu, LDT_PAGES, OWN_PAGE, zeros_entry};
use crate::{Hardware, entry};
use core::arch::asm;
use core::iter::repeat;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use hv_core::addr::Frame;
use hv_core::machine::{CpuState, Entry, Segments};
use hv_core::vcpu::debug::{DR6_CLEAR, DR7_CLEAR};
use hypercall_abi::selector::{GUEST_CS32, HYPERVISOR_CS};
use x86_64::registers::control::{Cr2, Cr4, Cr4Flags};
use x86_64::registers::debug::{DebugAddressRegister, Dr0, Dr1, Dr2, Dr3, Dr6, Dr7};

/// The order of memory types that guests are told (ABI core 3.14).
const PAT: u64 = 0x0000_0501_0007_0406;
/// EFER: SYSCALL, long mode, no-execute.
const EFER: u64 = 0xd01;
/// What SYSCALL clears: AC, VM, RF, NT, IOPL, DF, IF, TF and the arithmetic flags.
const SFMASK: u64 = 0x7_7fd5;
/// SYSCALL loads 0xe008 and 0xe010, SYSRET 0xe033 and 0xe02b (ABI core 1.6).
const STAR: u64 = (GUEST_CS32 as u64) << 48 | (HYPERVISOR_CS as u64) << 32;
/// CR4 bits a guest may choose. OSXSAVE is on wherever it exists, whatever the guest chose: it makes CPUID honest.
const GUEST_CR4: Cr4Flags = Cr4Flags::TIMESTAMP_DISABLE.union(Cr4Flags::DEBUGGING_EXTENSIONS).union(Cr4Flags::FSGSBASE);

/// The CR4 bits for what this machine's CPUs have of the features we use; they are all alike.
static FEATURES: AtomicU64 = AtomicU64::new(0);

fn features() -> Cr4Flags {
    Cr4Flags::from_bits_truncate(FEATURES.load(Relaxed))
}

fn find_features() -> Cr4Flags {
    let [_, ebx7, ecx7, _] = if insn::max_leaf(0) >= 7 { insn::cpuid(7, 0) } else { [0; 4] };
    let found = [
        (insn::cpuid(1, 0)[2], 26, Cr4Flags::OSXSAVE),
        (ebx7, 0, Cr4Flags::FSGSBASE),
        (ebx7, 7, Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION),
        (ebx7, 20, Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION),
        (ecx7, 2, Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION),
    ];
    found.into_iter().filter(|(word, bit, _)| word >> bit & 1 != 0).map(|(.., flag)| flag).collect()
}

/// Makes the CPU it runs on the one `cpu` describes: tables, registers, features. The final page tables are in use.
pub(crate) fn init(cpu: &'static Cpu) {
    FEATURES.store(find_features().bits(), Relaxed);
    if features().contains(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION) {
        tables::enable_clac();
    }
    tables::load(cpu);
    let address = |symbol: *const u8| address_of(symbol);
    let stack = cpu.tss.ist[usize::from(percpu::IST_DEBUG) - 1].load(Relaxed);
    let registers = [
        (msr::GS_BASE, address_of(&raw const *cpu)),
        (msr::GUEST_GS_BASE, 0),
        (msr::FS_BASE, 0),
        (msr::EFER, EFER),
        (msr::STAR, STAR),
        (msr::LSTAR, address(&raw const entry::entry_syscall)),
        (msr::CSTAR, address(&raw const entry::entry_syscall32)),
        (msr::SFMASK, SFMASK),
        (msr::SYSENTER_CS, 0), // until a vcpu has a handler
        (msr::SYSENTER_ESP, stack),
        (msr::SYSENTER_EIP, address(&raw const entry::entry_sysenter)),
        (msr::PAT, PAT),
    ];
    for (register, value) in registers {
        // SAFETY: GS base is this CPU's `Cpu`; the entry points are the entry code; EFER keeps what is on; the PAT
        // keeps write-back (0) and uncached (3) where our tables use them.
        unsafe { insn::wrmsr(register, value) };
    }
    let cr4 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION
        | Cr4Flags::PAGE_GLOBAL
        | Cr4Flags::MACHINE_CHECK_EXCEPTION
        | Cr4Flags::OSFXSR
        | Cr4Flags::OSXMMEXCPT_ENABLE
        | features().difference(Cr4Flags::FSGSBASE); // that is the guest's to turn on
    write_cr4(cpu, cr4.bits());
    // What firmware left there would show in a guest's DR6.
    (0..4).for_each(|register| write_debug(register, 0));
    write_debug(7, DR7_CLEAR);
    _ = Hardware(()).take_debug_status();
    cpu.root.store(memory::root().address(), Relaxed);
    fpu::init(cpu);
}

/// Writes CR4 and remembers it.
fn write_cr4(cpu: &Cpu, value: u64) {
    // SAFETY: `value` is what `init` chose (features the CPU has) plus or minus bits of GUEST_CR4, none of which
    // matters to ring 0; paging stays as it is.
    unsafe { Cr4::write_raw(value) };
    cpu.cr4.store(value, Relaxed);
}

/// Writes debug register 0..=3 or 7.
fn write_debug(register: u8, value: u64) {
    // The rules keep breakpoints out of the hypervisor's slots, off ports, and GD clear, so none of these can stop ring 0
    // anywhere but where `entry_debug` expects it.
    match register {
        0 => Dr0::write(value),
        1 => Dr1::write(value),
        2 => Dr2::write(value),
        3 => Dr3::write(value),
        _ => Dr7::write_raw(value),
    }
}

impl CpuState for Hardware {
    fn load_root(&self, root: Frame) {
        percpu::this().root.store(root.address(), Relaxed);
        // SAFETY: the rules load only validated L4 tables or our own root, and both hold our sixteen slots (P3).
        unsafe { insn::write_cr3(root.address()) };
    }

    fn leave_root(&self) {
        self.load_root(memory::root());
    }

    fn fs_base(&self) -> u64 {
        insn::rdmsr(msr::FS_BASE)
    }

    fn set_fs_base(&self, base: u64) {
        // SAFETY: ring 0 does not use FS; the address is canonical by this method's contract.
        unsafe { insn::wrmsr(msr::FS_BASE, base) };
    }

    fn entry(&self) -> &Entry {
        &percpu::this().entry
    }

    #[inline]
    fn record_head(&self) -> u64 {
        let head = percpu::word::<{ offset_of!(Cpu, entry.info) }>();
        // SAFETY: `percpu::prepare` put a word of ours there, and what the rules put there is the address of an aligned word in
        // the direct map (`Frames::direct`), which stays mapped for ever; all words of guests are atomic.
        unsafe { (*(head as *const AtomicU64)).load(SeqCst) }
    }

    fn has_gs_instructions(&self) -> bool {
        percpu::this().cr4.load(Relaxed) & Cr4Flags::FSGSBASE.bits() != 0
    }

    fn fault_address(&self) -> u64 {
        Cr2::read_raw() // nothing can have overwritten it since: ring 0 takes no page fault it survives
    }

    fn gs_base(&self) -> u64 {
        insn::rdmsr(msr::GUEST_GS_BASE)
    }

    fn set_gs_base(&self, base: u64) {
        // SAFETY: the guest's GS base waits in this register while ring 0 runs; canonical by contract.
        unsafe { insn::wrmsr(msr::GUEST_GS_BASE, base) };
    }

    fn load_gs(&self, selector: u16) -> Option<u64> {
        const GS: usize = 3;
        tables::load_segment(GS, selector).then(|| self.gs_base())
    }

    fn data_selectors(&self) -> [u16; 4] {
        tables::selectors()
    }

    fn set_task_switched(&self, on: bool) {
        fpu::set_task_switched(on);
    }

    fn set_guest_cr4(&self, bits: u64) {
        let cpu = percpu::this();
        let allowed = GUEST_CR4.difference(Cr4Flags::FSGSBASE) | features() & Cr4Flags::FSGSBASE;
        let old = cpu.cr4.load(Relaxed);
        let new = old & !GUEST_CR4.bits() | bits & allowed.bits();
        if new != old {
            write_cr4(cpu, new);
        }
    }

    fn set_xcr0(&self, value: u64) {
        let cpu = percpu::this();
        cpu.guest_xcr0.store(value, Relaxed);
        fpu::use_xcr0(cpu, value);
    }

    fn set_breakpoints(&self, addresses: [u64; 4]) {
        for (register, (known, address)) in (0u8..).zip(percpu::this().breakpoints.iter().zip(addresses)) {
            if known.load(Relaxed) != address {
                known.store(address, Relaxed);
                write_debug(register, address);
            }
        }
    }

    fn set_debug_control(&self, dr7: u64) {
        let known = &percpu::this().debug_control;
        if known.load(Relaxed) != dr7 {
            known.store(dr7, Relaxed);
            write_debug(7, dr7);
        }
    }

    fn take_debug_status(&self) -> u64 {
        let status = Dr6::read_raw();
        // SAFETY: a status register.
        unsafe { asm!("mov dr6, {}", in(reg) DR6_CLEAR, options(nomem, nostack, preserves_flags)) };
        status
    }

    fn allow_sysenter(&self, on: bool) {
        let selector = if on { u32::from(HYPERVISOR_CS) } else { 0 };
        if percpu::this().sysenter_cs.swap(selector, Relaxed) != selector {
            // SAFETY: our code segment, or none, with which SYSENTER is a general-protection fault.
            unsafe { insn::wrmsr(msr::SYSENTER_CS, selector.into()) };
        }
    }

    fn load_gdt(&self, frames: &[Option<Frame>]) {
        let cpu = percpu::this();
        let pages = frames.len() as u64;
        let mapped = cpu.gdt_mapped.swap(pages, Relaxed);
        for (index, frame) in (0..OWN_PAGE.min(pages.max(mapped))).zip(frames.iter().chain(repeat(&None))) {
            // Writable: the CPU sets the accessed bit of a descriptor it loads.
            let entry = frame.map_or_else(zeros_entry, |frame| frame.address() | DATA.bits());
            if cpu.window(index).swap(entry, Relaxed) != entry {
                insn::invlpg(cpu.gdt() + index * 4096);
            }
        }
    }

    fn load_ldt(&self, entries: u32) {
        let cpu = percpu::this();
        let mapped = cpu.ldt_mapped.swap(0, Relaxed);
        for page in (0..LDT_PAGES).take_while(|_| mapped != 0).filter(|page| mapped & 1 << page != 0) {
            cpu.ldt_window(page).store(0, Relaxed);
            insn::invlpg(cpu.ldt() + page * 4096);
        }
        if cpu.ldt_entries.swap(entries, Relaxed) != entries {
            tables::load_ldt(cpu, entries);
        }
    }

    fn map_ldt(&self, page: u8, frame: Frame) {
        let (cpu, page) = (percpu::this(), u64::from(page) % LDT_PAGES);
        cpu.ldt_window(page).store(frame.address() | DATA.bits(), Relaxed);
        insn::invlpg(cpu.ldt() + page * 4096);
        cpu.ldt_mapped.fetch_or(1 << page, Relaxed);
    }

    fn ldt_offset(&self, address: u64) -> Option<u32> {
        Some(u16::try_from(address.checked_sub(percpu::this().ldt())?).ok()?.into())
    }

    fn gdt_offset(&self, address: u64) -> Option<u32> {
        Some(u16::try_from(address.checked_sub(percpu::this().gdt())?).ok()?.into())
    }

    fn reset_fpu(&self, fpu: Frame) {
        fpu::reset(self, fpu);
    }

    fn switch_in(&self, segments: &Segments, fpu: Frame) -> Result<(), [u16; 4]> {
        fpu::load(self, fpu);
        let mut loaded = true;
        for (which, &selector) in segments.selectors.iter().enumerate() {
            loaded &= tables::load_segment(which, selector);
        }
        self.set_fs_base(segments.fs_base);
        self.set_gs_base(segments.gs_base);
        self.entry().other_gs.store(segments.other_gs, Relaxed);
        if loaded { Ok(()) } else { Err(segments.selectors) }
    }

    fn switch_out(&self, segments: &mut Segments, fpu: Frame) {
        segments.selectors = tables::selectors();
        segments.fs_base = self.fs_base();
        segments.gs_base = self.gs_base();
        segments.other_gs = self.entry().other_gs.load(Relaxed);
        fpu::save(fpu);
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        insn::cpuid(leaf, subleaf)
    }

    fn set_tsc_aux(&self, value: u32) {
        let cpu = percpu::this();
        let exists = || insn::cpuid(0x8000_0001, 0)[3] & 1 << 27 != 0; // with RDTSCP
        if cpu.tsc_aux.swap(value, Relaxed) != value && exists() {
            // SAFETY: only RDTSCP and RDPID read it, and ring 0 executes neither.
            unsafe { insn::wrmsr(msr::TSC_AUX, value.into()) };
        }
    }
}
