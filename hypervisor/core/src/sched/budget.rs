//! CPU time that vcpus may use out of turn.

use crate::fault::{Fault, planted};
use crate::prelude::*;
use core::sync::atomic::AtomicU64;

/// A budget of CPU time. It fills with a share of the time that passes, and is charged with the time that vcpus run. What is in
/// it is kept as one word, the time at which it will be full, which begins as 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Eighths of the time that passes.
    eighths: u64,
    /// What a full budget has, in nanoseconds.
    most: u64,
}

impl Budget {
    /// Of a guest's vcpu: the time that it may run before it counts as one that uses much of the CPU, which is not boosted.
    pub(crate) const GUEST: Self = Self { eighths: 2, most: 20_000_000 };
    /// Of a CPU, for vcpus that serve others. Without a limit, a guest that floods dom0 with requests would take the CPU from
    /// all other guests.
    pub(crate) const SERVERS: Self = Self { eighths: 4, most: 5_000_000 };
    /// Of a CPU, for vcpus that serve others and boosted ones together. All others have an eighth of the time at least.
    pub(crate) const AHEAD: Self = Self { eighths: 7, most: 10_000_000 };

    /// How long it takes until an empty budget is full, in nanoseconds.
    const fn fills_in(self) -> u64 {
        self.most * 8 / self.eighths
    }

    /// The nanoseconds in the budget; 0 if more was used than there was.
    #[inline]
    pub(crate) fn left(self, full_at: &AtomicU64, now: u64) -> u64 {
        let filling = full_at.load(Relaxed).saturating_sub(now);
        self.fills_in().saturating_sub(filling) * self.eighths / 8
    }

    /// Whether anything is in the budget.
    #[inline]
    pub(crate) fn has_any(self, full_at: &AtomicU64, now: u64) -> bool {
        full_at.load(Relaxed).saturating_sub(now) < self.fills_in()
    }

    /// Whether at least half of what a full budget has is there.
    #[inline]
    pub(crate) fn is_half_full(self, full_at: &AtomicU64, now: u64) -> bool {
        full_at.load(Relaxed).saturating_sub(now) <= self.fills_in() / 2
    }

    /// Takes nanoseconds out of the budget, also those that are not there. Called by one CPU at a time.
    #[inline]
    pub(crate) fn charge(self, full_at: &AtomicU64, now: u64, ran: u64) {
        if !planted(Fault::BoostForFree) {
            full_at.store(full_at.load(Relaxed).max(now).saturating_add(ran.saturating_mul(8) / self.eighths), Relaxed);
        }
    }

    /// Takes nanoseconds out of the budget, as far as they are there.
    #[inline]
    pub(crate) fn use_up(self, full_at: &AtomicU64, now: u64, ran: u64) {
        if !planted(Fault::BoostForFree) {
            let full = full_at.load(Relaxed).max(now).saturating_add(ran.saturating_mul(8) / self.eighths);
            full_at.store(full.min(now.saturating_add(self.fills_in())), Relaxed);
        }
    }
}
