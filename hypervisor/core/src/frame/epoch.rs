//! When each CPU last flushed: the records behind P4.
//!
//! One clock counts flushes. A frame gets the clock as its stamp when a use of it ends, after the entry is gone. A CPU
//! whose last complete flush drew its ticket after that has no translation to the frame any more.

use crate::addr::{CpuId, CpuSet};
use crate::fault::{Fault, planted};
use crate::machine::{Cpus, Flush};
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// The clock of flushes, and the time of each CPU's last flush.
#[derive(Debug)]
pub struct Epochs {
    clock: AtomicU64,
    /// CPUs that have run a guest; the others have no guest's translations.
    guests: AtomicU64,
    flushed: [AtomicU64; 64],
}

/// The time at which a flush began.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Ticket(u64);

impl Epochs {
    /// A clock at 1; a stamp of 0 is older than any flush.
    #[must_use]
    pub const fn new() -> Self {
        Self { clock: AtomicU64::new(1), guests: AtomicU64::new(0), flushed: [const { AtomicU64::new(0) }; 64] }
    }

    /// The time for a stamp. To be read after the entry is gone.
    pub(super) fn now(&self) -> u64 {
        self.clock.load(SeqCst)
    }

    /// Draws the ticket of a flush that is about to begin, by whatever means: [`Cpus::flush`] or the load of a root.
    pub fn begin(&self) -> Ticket {
        Ticket(self.clock.fetch_add(1, SeqCst).wrapping_add(1))
    }

    /// Records that the flush with this `ticket` is complete on these CPUs.
    pub fn done(&self, cpus: CpuSet, ticket: Ticket) {
        for flushed in cpus.iter().filter_map(|cpu| self.last(cpu)) {
            flushed.fetch_max(ticket.0, SeqCst);
        }
    }

    fn last(&self, cpu: CpuId) -> Option<&AtomicU64> {
        self.flushed.get(usize::try_from(cpu.0).ok()?)
    }

    /// Records that a CPU is about to run a guest. Called before the guest's root is loaded.
    pub fn runs_guest(&self, cpu: CpuId) {
        self.guests.fetch_or(CpuSet::only(cpu).0, SeqCst);
    }

    /// All CPUs that may hold translations of any guest.
    #[must_use]
    pub fn all(&self) -> CpuSet {
        CpuSet(self.guests.load(SeqCst))
    }

    /// Returns those of `cpus` that have not flushed since `stamp`.
    #[must_use]
    pub fn stale(&self, cpus: CpuSet, stamp: u64) -> CpuSet {
        let fresh = |cpu: &CpuId| self.last(*cpu).is_some_and(|flushed| flushed.load(SeqCst) > stamp);
        cpus.iter().filter(fresh).fold(cpus, CpuSet::without)
    }

    /// Flushes all translations of these CPUs.
    pub fn flush(&self, m: &impl Cpus, cpus: CpuSet) {
        if !cpus.is_empty() {
            let ticket = self.begin();
            m.flush(cpus, Flush::All);
            self.done(cpus, if planted(Fault::LateTicket) { self.begin() } else { ticket });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting(core::cell::Cell<u64>);
    impl Cpus for Counting {
        fn this_cpu(&self) -> CpuId {
            CpuId(0)
        }
        fn flush(&self, cpus: CpuSet, _: Flush) {
            self.0.set(self.0.get() | cpus.0);
        }
        fn flushes(&self) -> u64 {
            0
        }
        fn forget(&self) {}
        fn kick(&self, _: CpuId) {}
    }

    #[test]
    fn only_a_flush_that_began_later_counts() {
        let e = Epochs::new();
        let m = Counting(core::cell::Cell::new(0));
        e.runs_guest(CpuId(0));
        e.runs_guest(CpuId(63));
        assert_eq!(e.all(), CpuSet(1 << 63 | 1));
        let early = e.begin();
        let stamp = e.now();
        e.done(e.all(), early);
        assert_eq!(e.stale(e.all(), stamp), e.all(), "the flush began before the use ended");
        e.flush(&m, CpuSet(1));
        assert_eq!((m.0.get(), e.stale(e.all(), stamp)), (1, CpuSet(1 << 63)));
        assert!(e.stale(CpuSet(1), stamp).is_empty());
        assert_eq!(e.stale(CpuSet(1), e.now()), CpuSet(1));
    }
}
