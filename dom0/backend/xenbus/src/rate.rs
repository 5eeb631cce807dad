//! Limits how often a front end can make the back end publish again.

/// Publications allowed in each [`PERIOD_NS`].
const AT_MOST: usize = 10;
const PERIOD_NS: u64 = 60_000_000_000;

/// The times of the last publications.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rate {
    /// A ring of times; once it is full, the oldest one is at `next`.
    at: [Option<u64>; AT_MOST],
    next: usize,
}

impl Rate {
    /// The earliest time for the next publication, by the clock of [`note`](Self::note).
    pub(crate) fn allowed_ns(&self) -> u64 {
        let oldest = self.at.get(self.next).copied().flatten();
        oldest.map_or(0, |at| at.saturating_add(PERIOD_NS))
    }

    /// Records a publication.
    pub(crate) fn note(&mut self, now_ns: u64) {
        if let Some(oldest) = self.at.get_mut(self.next) {
            *oldest = Some(now_ns);
        }
        self.next = (self.next + 1) % AT_MOST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_in_any_minute() {
        let mut rate = Rate::default();
        for n in 0..10 {
            assert_eq!(rate.allowed_ns(), 0);
            rate.note(n);
        }
        for n in 0..30 {
            let allowed = rate.allowed_ns();
            assert_eq!(allowed, n % 10 + (n / 10 + 1) * PERIOD_NS, "{n}");
            rate.note(allowed);
        }
    }
}
