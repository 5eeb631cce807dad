//! The CPUs that may hold a domain's translations, and the flush that a session owes them.

use super::{Session, Space};
use crate::addr::{CpuId, CpuSet};
use crate::frame::FrameTable;
use crate::machine::{Cpus, Frames};
use core::sync::atomic::Ordering::SeqCst;

impl Space {
    /// Records that a CPU is about to load a root of this domain. Called before the load.
    pub fn enter(&self, table: &FrameTable, cpu: CpuId) {
        table.epochs().runs_guest(cpu);
        self.cpus.fetch_or(CpuSet::only(cpu).0, SeqCst);
    }

    /// Records that a CPU holds no translations of this domain any more: it has loaded another root, which flushed its
    /// TLB.
    pub fn leave(&self, cpu: CpuId) {
        self.cpus.fetch_and(!CpuSet::only(cpu).0, SeqCst);
    }

    /// The CPUs that may hold translations of this domain.
    #[must_use]
    pub fn cpus(&self) -> CpuSet {
        CpuSet(self.cpus.load(SeqCst))
    }
}

impl<M: Frames + Cpus> Session<'_, M> {
    /// Called after every write to a table above level 1. A later mode that keeps copies of roots will update the
    /// copies of an L4 here; now an L4 is treated like any upper table.
    pub(super) fn upper_written(&mut self, was_present: bool) {
        // CPUs cache upper entries; the guest is promised that the call flushed them (ABI core 4.4).
        self.flush |= was_present;
    }

    /// Does the flush that the session owes now, rather than at its end.
    pub fn settle(&mut self) {
        if core::mem::take(&mut self.flush) {
            self.table.epochs().flush(self.m, self.space.cpus());
        }
    }
}

impl<M: Frames + Cpus> Drop for Session<'_, M> {
    fn drop(&mut self) {
        self.settle();
    }
}
