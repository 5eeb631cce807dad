//! Requests of other CPUs to one CPU to flush, and its answers: the machine's part of P4.
//!
//! Touches: two words for each CPU.
//! Keeps: of P4, that only a flush that began after a request answers the request.

use core::sync::atomic::{AtomicU32, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, Ordering::SeqCst};

/// Requests to flush, for one CPU.
#[derive(Debug, Default)]
pub struct Asked {
    /// The number of requests so far.
    asked: AtomicU32,
    /// The number of requests at the time when the last complete flush began.
    answered: AtomicU32,
}

impl Asked {
    /// A CPU without requests.
    #[must_use]
    pub const fn new() -> Self {
        Self { asked: AtomicU32::new(0), answered: AtomicU32::new(0) }
    }

    /// Requests a flush. Called by another CPU.
    pub fn ask(&self) {
        self.asked.fetch_add(1, SeqCst);
    }

    /// The number of requests so far, for [`has_answered`](Self::has_answered).
    #[must_use]
    pub fn so_far(&self) -> u32 {
        self.asked.load(SeqCst)
    }

    /// Whether a flush that began after the first `requests` requests is complete.
    #[must_use]
    pub fn has_answered(&self, requests: u32) -> bool {
        self.answered.load(SeqCst).wrapping_sub(requests).cast_signed() >= 0
    }

    /// Whether there are requests without an answer.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.asked.load(SeqCst) != self.answered.load(SeqCst)
    }

    /// Runs `flush` if there are requests. Called by the CPU itself. Requests that arrive during the flush are left for
    /// the next call, because the flush may have begun before them.
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
