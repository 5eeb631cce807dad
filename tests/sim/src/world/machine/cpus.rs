//! CPUs: what one begins with, and how they flush and kick each other.

use super::super::turns::{Stand, this_cpu};
use super::{Loaded, OneCpu, WholeMachine, lock};
use hv_core::addr::{CpuId, CpuSet};
use hv_core::frame::asked::Asked;
use hv_core::machine::{Cpus, Entry, Flush};
use hv_core::vcpu::debug::DR6_CLEAR;
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};

impl OneCpu {
    pub(super) fn new() -> Self {
        let loaded = Loaded {
            root: None,
            fs_base: 0,
            gs_base: 0,
            task_switched: false,
            cr4: 0,
            xcr0: 1,
            debug: [0, 0, 0, 0, 0, 0, DR6_CLEAR, 0x400],
            sysenter: false,
            selectors: [0; 4],
            gdt: [None; 14],
            ldt_entries: 0,
            ldt: [None; 16],
            tsc_aux: 0,
        };
        Self {
            stand: Stand::new(),
            loaded: Mutex::new(loaded),
            cached: Mutex::default(),
            entry: Entry::new(),
            fault_address: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            armed: AtomicU64::new(u64::MAX),
            work: AtomicU64::new(0),
            looks: [const { AtomicU64::new(0) }; 2],
            race: Mutex::new(None),
            racing: AtomicBool::new(false),
            refused: Mutex::new(None),
            typed: AtomicBool::new(false),
            sent: [const { AtomicU64::new(0) }; 3],
            held: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            asked: Asked::new(),
            asked_all: AtomicBool::new(false),
        }
    }
}

impl Cpus for WholeMachine {
    fn this_cpu(&self) -> CpuId {
        CpuId(this_cpu() as u32)
    }
    fn flush(&self, cpus: CpuSet, what: Flush) {
        let me = this_cpu();
        let others = || (0..self.cpus.len()).filter(|cpu| *cpu != me && cpus.has(CpuId(*cpu as u32)));
        for cpu in others() {
            let it = &self.cpus[cpu];
            // A flush of one page may be taken for none: the rules must not rely on it for P4.
            it.asked_all.fetch_or(what == Flush::All, SeqCst);
            it.asked.ask();
        }
        self.progressed(); // they have something to answer
        if what == Flush::All && cpus.has(self.this_cpu()) {
            self.here().flushes.fetch_add(1, Relaxed);
            lock(&self.here().cached).clear();
        }
        for cpu in others() {
            let asked = &self.cpus[cpu].asked;
            let requests = asked.so_far();
            while !asked.has_answered(requests) && !self.impatient.load(Relaxed) {
                if self.may_be_answered_for(cpu) {
                    self.answer(cpu);
                } else {
                    self.answer(me);
                    self.hold_on();
                }
            }
        }
        self.another_goes_on();
    }
    fn flushes(&self) -> u64 {
        self.here().flushes.load(Relaxed)
    }
    fn forget(&self) {
        self.here().flushes.fetch_add(1, Relaxed);
    }
    fn kick(&self, cpu: CpuId) {
        assert_ne!(cpu, self.this_cpu(), "nobody kicks the CPU it is on");
        self.cpus[cpu.0 as usize].kicked.store(true, Relaxed);
    }
}
