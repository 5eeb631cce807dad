//! What a CPU has loaded for its vcpu.

use super::{GDT_WINDOW, LDT_WINDOW, WholeMachine, lock};
use hv_core::addr::{Frame, GuestVirt};
use hv_core::machine::{CpuState, Entry, Frames, Segments};
use hv_core::vcpu::debug::DR6_CLEAR;
use std::sync::atomic::Ordering::Relaxed;

fn canonical(address: u64) {
    assert!(GuestVirt(address).is_canonical(), "P12: a base of {address:#x}");
}

impl CpuState for WholeMachine {
    fn load_root(&self, root: Frame) {
        lock(&self.here().cached).clear();
        self.loaded().root = Some(root);
    }
    fn leave_root(&self) {
        lock(&self.here().cached).clear();
        self.loaded().root = None;
    }
    fn fs_base(&self) -> u64 {
        self.loaded().fs_base
    }
    fn set_fs_base(&self, base: u64) {
        canonical(base);
        self.loaded().fs_base = base;
    }
    fn entry(&self) -> &Entry {
        &self.here().entry
    }
    fn record_head(&self) -> u64 {
        let head = self.entry().info.load(Relaxed);
        Frame::containing(head).map_or(0, |frame| self.peek(frame, (head % 4096 / 8) as usize))
    }
    fn has_gs_instructions(&self) -> bool {
        self.loaded().cr4 >> 16 & 1 != 0
    }
    fn fault_address(&self) -> u64 {
        self.here().fault_address.load(Relaxed)
    }
    fn gs_base(&self) -> u64 {
        self.loaded().gs_base
    }
    fn set_gs_base(&self, base: u64) {
        canonical(base);
        self.loaded().gs_base = base;
    }
    fn load_gs(&self, selector: u16) -> Option<u64> {
        // Selectors below 0x40 load, as if their descriptors were good.
        (selector < 0x40).then_some(u64::from(selector) << 12)
    }
    fn data_selectors(&self) -> [u16; 4] {
        self.loaded().selectors
    }
    fn set_task_switched(&self, on: bool) {
        self.loaded().task_switched = on;
    }
    fn set_guest_cr4(&self, bits: u64) {
        self.loaded().cr4 = bits;
    }
    fn set_xcr0(&self, value: u64) {
        assert!(value & 1 == 1 && value & !7 == 0 && value != 5, "XCR0 of {value:#x} would fault");
        self.loaded().xcr0 = value;
    }
    fn set_breakpoints(&self, addresses: [u64; 4]) {
        for address in addresses {
            assert!(GuestVirt(address).is_guests(), "XSA-444: a breakpoint at {address:#x}");
        }
        self.loaded().debug[..4].copy_from_slice(&addresses);
    }
    fn set_debug_control(&self, dr7: u64) {
        assert!(dr7 & 0xffff_ffff_0000_f800 == 0 && dr7 & 0x400 != 0, "DR7 of {dr7:#x}");
        let ports = (0..4).filter(|n| dr7 >> (2 * n) & 3 != 0 && dr7 >> (16 + 4 * n) & 3 == 2);
        assert_eq!(ports.count(), 0, "a breakpoint on ring 0's ports: {dr7:#x}");
        self.loaded().debug[7] = dr7;
    }
    fn take_debug_status(&self) -> u64 {
        std::mem::replace(&mut self.loaded().debug[6], DR6_CLEAR)
    }
    fn allow_sysenter(&self, on: bool) {
        self.loaded().sysenter = on;
    }
    fn load_gdt(&self, frames: &[Option<Frame>]) {
        let mut gdt = [None; 14];
        gdt[..frames.len()].copy_from_slice(frames);
        self.loaded().gdt = gdt;
    }
    fn load_ldt(&self, entries: u32) {
        assert!(entries <= 8192);
        let mut cpu = self.loaded();
        (cpu.ldt_entries, cpu.ldt) = (entries, [None; 16]);
    }
    fn map_ldt(&self, page: u8, frame: Frame) {
        self.loaded().ldt[usize::from(page)] = Some(frame);
    }
    fn ldt_offset(&self, address: u64) -> Option<u32> {
        (LDT_WINDOW..LDT_WINDOW + (16 << 12)).contains(&address).then(|| (address - LDT_WINDOW) as u32)
    }
    fn gdt_offset(&self, address: u64) -> Option<u32> {
        (GDT_WINDOW..GDT_WINDOW + (16 << 12)).contains(&address).then(|| (address - GDT_WINDOW) as u32)
    }
    fn reset_fpu(&self, fpu: Frame) {
        self.zero(fpu);
    }
    fn switch_in(&self, segments: &Segments, _: Frame) -> Result<(), [u16; 4]> {
        self.set_fs_base(segments.fs_base);
        self.set_gs_base(segments.gs_base);
        self.entry().other_gs.store(segments.other_gs, Relaxed);
        lock(&self.here().refused).take().map_or(Ok(()), Err)
    }
    fn switch_out(&self, segments: &mut Segments, _: Frame) {
        (segments.fs_base, segments.gs_base) = (self.fs_base(), self.gs_base());
        segments.other_gs = self.entry().other_gs.load(Relaxed);
    }
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        lock(&self.cpuid)(leaf, subleaf)
    }
    fn set_tsc_aux(&self, value: u32) {
        self.loaded().tsc_aux = value;
    }
}
