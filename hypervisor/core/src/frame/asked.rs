//! What other CPUs have asked a CPU to flush, and what it has answered: the machine's part of P4.
//!
//! Touches: two words for each CPU.
//! Keeps: of P4 that a request counts as answered only by a flush that began after it.

use core::sync::atomic::{AtomicU32, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, Ordering::SeqCst};

/// Requests to one CPU.
#[derive(Debug, Default)]
pub struct Asked {
    /// How many there have been.
    asked: AtomicU32,
    /// How many there were when the last flush began that is over.
    answered: AtomicU32,
}

impl Asked {
    /// Nobody has asked.
    #[must_use]
    pub const fn new() -> Self {
        Self { asked: AtomicU32::new(0), answered: AtomicU32::new(0) }
    }

    /// Another CPU asks for a flush.
    pub fn ask(&self) {
        self.asked.fetch_add(1, SeqCst);
    }

    /// How many requests there have been: to wait until they are answered.
    #[must_use]
    pub fn so_far(&self) -> u32 {
        self.asked.load(SeqCst)
    }

    /// Whether a flush is over that began after so many requests.
    #[must_use]
    pub fn has_answered(&self, requests: u32) -> bool {
        self.answered.load(SeqCst).wrapping_sub(requests).cast_signed() >= 0
    }

    /// Whether requests wait for an answer.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.asked.load(SeqCst) != self.answered.load(SeqCst)
    }

    /// This CPU flushes, if it was asked. A request that comes meanwhile is left for the next time: the flush may have begun
    /// before it.
    #[inline]
    pub fn answer(&self, flush: impl FnOnce()) {
        let requests = self.asked.load(Acquire);
        if requests != self.answered.load(Relaxed) {
            flush();
            self.answered.store(requests, Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_comes_during_a_flush_is_not_answered_by_it() {
        let asked = Asked::new();
        asked.answer(|| panic!("nobody has asked"));
        asked.ask();
        let first = asked.so_far();
        assert!(!asked.has_answered(first));
        asked.answer(|| asked.ask());
        let second = asked.so_far();
        assert!(asked.has_answered(first) && !asked.has_answered(second));
        let mut flushed = false;
        asked.answer(|| flushed = true);
        assert!(flushed && asked.has_answered(second));
    }

    #[test]
    fn the_count_may_wrap() {
        let asked = Asked { asked: AtomicU32::new(u32::MAX), answered: AtomicU32::new(u32::MAX) };
        asked.ask();
        assert!(!asked.has_answered(asked.so_far()));
        asked.answer(|| {});
        assert!(asked.has_answered(asked.so_far()));
    }
}
