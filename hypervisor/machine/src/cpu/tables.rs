//! Descriptor tables: our page of the GDT, the interrupt table, and selectors that may not load.

use crate::insn::attempt;
use crate::memory::{address_of, image_address};
use crate::percpu::{self, Cpu, Tss};
use crate::{Hardware, entry};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use hv_core::addr::{Frame, GuestVirt};
use hv_core::machine::Frames;
use hypercall_abi::selector::{GUEST_CS, GUEST_CS32, GUEST_SS, HYPERVISOR_CS, HYPERVISOR_DS, LDT, TSS};
use x86_64::VirtAddr;
use x86_64::instructions::tables::{lgdt, lidt, load_tss};
use x86_64::registers::segmentation::{CS, DS, ES, FS, GS, SS, Segment, SegmentSelector};
use x86_64::structures::DescriptorTablePointer;

/// Bytes of a GDT whose last page is ours, minus one.
const GDT_LIMIT: u16 = 0xefff;

/// The flat segments: selector and descriptor.
const SEGMENTS: [(u16, u64); 5] = [
    (HYPERVISOR_CS, 0x00af_9b00_0000_ffff),
    (HYPERVISOR_DS, 0x00cf_9300_0000_ffff),
    (GUEST_CS32, 0x00cf_fb00_0000_ffff),
    (GUEST_SS, 0x00cf_f300_0000_ffff),
    (GUEST_CS, 0x00af_fb00_0000_ffff),
];

/// The interrupt table, one for all CPUs.
#[repr(C, align(4096))]
struct Gates([[AtomicU64; 2]; 256]);
#[unsafe(link_section = ".bss.entry_tables")]
static GATES: Gates = Gates([const { [const { AtomicU64::new(0) }; 2] }; 256]);

/// The word of our descriptor page for a selector.
fn descriptor(cpu: &Cpu, selector: u16) -> &'static AtomicU64 {
    &cpu.descriptors()[usize::from(selector & 0xff8) / 8]
}

/// Writes a 16-byte system descriptor of `kind` (0x89 free TSS, 0x82 LDT).
fn set_system(cpu: &Cpu, selector: u16, kind: u64, base: u64, limit: u64) {
    let low =
        limit & 0xffff | (base & 0xff_ffff) << 16 | kind << 40 | (limit >> 16 & 0xf) << 48 | (base >> 24 & 0xff) << 56;
    descriptor(cpu, selector).store(low, Relaxed);
    descriptor(cpu, selector + 8).store(base >> 32, Relaxed);
}

/// Fills this CPU's tables and loads them with all segment registers.
pub(super) fn load(cpu: &'static Cpu) {
    for (selector, value) in SEGMENTS {
        descriptor(cpu, selector).store(value, Relaxed);
    }
    set_system(cpu, TSS, 0x89, cpu.tss.base(), u64::from(Tss::BYTES) - 1);
    set_gates();
    let null = SegmentSelector::NULL;
    // SAFETY: the GDT window shows our page with the descriptors just written, zeros elsewhere; the gates lead to
    // the entry code; the task segment and its stacks are this CPU's own. The flat segments are what they were, and
    // nothing uses the others, GS included, until `cpu::init` has set the base.
    unsafe {
        lgdt(&DescriptorTablePointer { limit: GDT_LIMIT, base: VirtAddr::new_truncate(cpu.gdt()) });
        lidt(&DescriptorTablePointer { limit: 0xfff, base: VirtAddr::new_truncate(address_of(&raw const GATES)) });
        SS::set_reg(SegmentSelector(HYPERVISOR_DS));
        DS::set_reg(null);
        ES::set_reg(null);
        FS::set_reg(null);
        GS::set_reg(null);
        load_tss(SegmentSelector(TSS));
        CS::set_reg(SegmentSelector(HYPERVISOR_CS));
    }
    load_ldt(cpu, 0);
}

/// One gate per vector. INT3, INTO and INT 0x80 may be used by ring 3 (ABI core 3.2); four have stacks of their own.
fn set_gates() {
    let vectors = address_of(&raw const entry::entry_vectors);
    for (vector, gate) in (0u64..).zip(&GATES.0) {
        let (target, stack) = match vector {
            1 => (address_of(&raw const entry::entry_debug), percpu::IST_DEBUG),
            2 => (address_of(&raw const entry::entry_nmi), percpu::IST_NMI),
            14 => (address_of(&raw const entry::entry_page_fault), 0),
            8 => (address_of(&raw const entry::entry_double_fault), percpu::IST_DOUBLE_FAULT),
            18 => (address_of(&raw const entry::entry_machine_check), percpu::IST_MACHINE_CHECK),
            _ => (vectors + vector * 16, 0),
        };
        let ring: u64 = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
        let flags = 0x8e | ring << 5;
        let low = target & 0xffff
            | u64::from(HYPERVISOR_CS) << 16
            | u64::from(stack) << 32
            | flags << 40
            | (target >> 16 & 0xffff) << 48;
        gate[0].store(low, Relaxed);
        gate[1].store(target >> 32, Relaxed);
    }
}

/// Sets the LDT to `entries` descriptors in this CPU's window.
pub(super) fn load_ldt(cpu: &Cpu, entries: u32) {
    let selector = if entries == 0 { 0 } else { LDT };
    let limit = (u64::from(entries) * 8).wrapping_sub(1) & 0xf_ffff;
    set_system(cpu, LDT, 0x82, cpu.ldt(), limit);
    // SAFETY: the descriptor is a valid LDT over a window that only guest descriptors are ever mapped into.
    unsafe { asm!("lldt {0:x}", in(reg) selector, options(nostack, preserves_flags)) };
}

/// Turns the placeholder at the entry into CLAC, so that a guest's AC flag does not switch SMAP off.
pub(super) fn enable_clac() {
    let text = image_address(&raw const entry::entry_clac);
    if let Some(frame) = Frame::containing(text) {
        // Through the direct map: text itself is not writable.
        Hardware(()).write(frame, GuestVirt(text).offset(), &[0x0f, 0x01, 0xca]);
    }
}

/// Loads DS, ES, FS or the guest's GS (0..=3), with the base the descriptor has; null if the selector does not load.
pub(super) fn load_segment(which: usize, selector: u16) -> bool {
    let load = |selector: u16| {
        // SAFETY: ring 0 uses none of DS, ES and FS, and the guest's GS only between the two SWAPGS, where nothing but
        // `nested` may run, on the fault of the marked instruction, and on that path it does not use GS. The fault is
        // ended by the fix-up.
        unsafe {
            match which {
                0 => attempt!("", "mov ds, {from:x}", "", from = in(reg) selector),
                1 => attempt!("", "mov es, {from:x}", "", from = in(reg) selector),
                2 => attempt!("", "mov fs, {from:x}", "", from = in(reg) selector),
                _ => attempt!("swapgs", "mov gs, {from:x}", "swapgs", from = in(reg) selector),
            }
        }
    };
    load(selector) || {
        load(0);
        false
    }
}

/// The selectors of DS, ES, FS, GS.
pub(super) fn selectors() -> [u16; 4] {
    [DS::get_reg(), ES::get_reg(), FS::get_reg(), GS::get_reg()].map(|selector| selector.0)
}
