//! Limits how many lines a guest can cause dom0 to write on the operator's console.

/// Lines that may be written in a burst.
const AT_ONCE: u64 = 5;
/// Nanoseconds after which one more line may be written, up to a full burst.
const EACH_NS: u64 = 60_000_000_000;

/// The limit for the lines about one guest that the guest itself can cause.
#[derive(Clone, Copy, Debug, Default)]
pub struct LineLimit {
    /// Lines written, less one for each [`EACH_NS`] since.
    written: u64,
    /// When `written` last decreased, in nanoseconds.
    since: u64,
    /// Lines suppressed since the last line that was written.
    suppressed: u64,
}

impl LineLimit {
    /// Returns whether a line may be written at time `now` (in nanoseconds): `Some` with the number of lines suppressed
    /// since the last one written, or `None`.
    #[must_use]
    pub const fn admit(&mut self, now: u64) -> Option<u64> {
        let forgotten = now.saturating_sub(self.since) / EACH_NS;
        self.written = self.written.saturating_sub(forgotten);
        self.since = if self.written == 0 { now } else { self.since + forgotten * EACH_NS };
        if self.written >= AT_ONCE {
            self.suppressed += 1;
            return None;
        }
        self.written += 1;
        Some(core::mem::replace(&mut self.suppressed, 0))
    }

    /// How many lines have been suppressed since the last one written.
    #[must_use]
    pub const fn suppressed(&self) -> u64 {
        self.suppressed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handful_at_once_then_one_a_minute() {
        let mut limit = LineLimit::default();
        let start = 7 * EACH_NS;
        let written = (0..2000).filter(|n| limit.admit(start + n).is_some()).count();
        assert_eq!((written, limit.suppressed()), (5, 1995));
        assert_eq!(limit.admit(start + EACH_NS - 1), None);
        assert_eq!(limit.admit(start + EACH_NS), Some(1996));
        assert_eq!((limit.admit(start + EACH_NS), limit.suppressed()), (None, 1));
        assert_eq!(limit.admit(start + 1000 * EACH_NS), Some(1));
        let more = (0..100).filter(|_| limit.admit(start + 1000 * EACH_NS).is_some()).count();
        assert_eq!(more, 4, "what was not used is not saved up");
    }
}
