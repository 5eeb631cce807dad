//! Protects a domain that a step of a call looks at and that is not the caller's. Until the step ends, that domain is
//! not destroyed: its slot is not reused, and the frames that the hypervisor keeps for it stay.
//!
//! Touches: a word for each CPU. Never touches: a domain.

use crate::addr::{CpuId, CpuSet, MAX_CPUS};
use crate::prelude::*;
use core::sync::atomic::AtomicU64;

with_new! {
    /// Which CPUs look at domains other than their caller's, and since when.
    pub struct Visits {
        clock: AtomicU64 = AtomicU64::new(1),
        /// For each CPU: when the first visit of its step began; 0 if there is no visit.
        since: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS],
    }
}

/// A time on the clock of visits. Visits that begin later see what was done before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Moment(pub(crate) u64);

impl Visits {
    /// Records that a CPU is about to look for a domain.
    pub(crate) fn begin(&self, cpu: CpuId) {
        if let Some(since) = nth(&self.since, cpu.0).filter(|since| since.load(Relaxed) == 0) {
            since.store(self.clock.load(SeqCst), SeqCst);
        }
    }

    /// Records that a step has ended: its CPU no longer uses any domain that it looked for.
    pub(crate) fn end(&self, cpu: CpuId) {
        if let Some(since) = nth(&self.since, cpu.0) {
            since.store(0, Release);
        }
    }

    /// Returns a new moment, after all earlier ones.
    pub(crate) fn now(&self) -> Moment {
        Moment(self.clock.fetch_add(1, SeqCst).wrapping_add(1))
    }

    /// Whether there are visits on other CPUs than `this` that began before `moment` and have not ended.
    pub(crate) fn any_since_before(&self, moment: Moment, cpus: CpuSet, this: CpuId) -> bool {
        let since = |cpu: CpuId| nth(&self.since, cpu.0).map_or(0, |since| since.load(SeqCst));
        cpus.without(this).iter().any(|cpu| (1..moment.0).contains(&since(cpu)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_visits_that_began_before_are_waited_for() {
        let (visits, cpus) = (Visits::new(), CpuSet(7));
        visits.begin(CpuId(1));
        let dies = visits.now();
        visits.begin(CpuId(2));
        assert!(visits.any_since_before(dies, cpus, CpuId(0)));
        assert!(!visits.any_since_before(dies, cpus, CpuId(1)), "not for one's own");
        visits.begin(CpuId(1));
        assert!(visits.any_since_before(dies, cpus, CpuId(0)), "a step has one beginning");
        visits.end(CpuId(1));
        assert!(!visits.any_since_before(dies, cpus, CpuId(0)));
    }
}
