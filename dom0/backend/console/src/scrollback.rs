//! The last bytes a guest printed, numbered from the first byte it ever printed.

use alloc::collections::{TryReserveError, VecDeque};

/// The last bytes of a stream, up to a limit; older ones are dropped.
#[derive(Clone, Debug)]
pub struct Scrollback {
    bytes: VecDeque<u8>,
    limit: usize,
    end: u64,
}

/// The bytes from a position on, in two parts, and how many bytes at that position are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Since<'a> {
    /// Bytes that were dropped: those between the position and the first byte returned.
    pub missed: u64,
    /// The first part.
    pub first: &'a [u8],
    /// The second part.
    pub second: &'a [u8],
    /// The position to continue at.
    pub next: u64,
}

impl Scrollback {
    /// Keeps at most `limit` bytes. All memory is allocated here; [`push`](Self::push) allocates nothing.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(limit: usize) -> Result<Self, TryReserveError> {
        let mut bytes = VecDeque::new();
        bytes.try_reserve_exact(limit)?;
        Ok(Self { bytes, limit, end: 0 })
    }

    /// Appends bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.end = self.end.saturating_add(count(bytes.len()));
        let kept = bytes.get(bytes.len().saturating_sub(self.limit)..).unwrap_or_default();
        let excess = (self.bytes.len() + kept.len()).saturating_sub(self.limit);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
    }

    /// Number of bytes ever pushed: the position after the newest.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Position of the oldest byte kept, which is also the number of bytes dropped.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.end.saturating_sub(count(self.bytes.len()))
    }

    /// Returns the bytes from `position` on. A reader begins at 0, or at [`start`](Self::start), and continues at
    /// [`next`](Since::next).
    #[must_use]
    pub fn since(&self, position: u64) -> Since<'_> {
        let start = self.start();
        let from = position.clamp(start, self.end);
        let skip = usize::try_from(from - start).unwrap_or(usize::MAX);
        let (first, second) = self.bytes.as_slices();
        let in_second = skip.saturating_sub(first.len());
        Since {
            missed: from.saturating_sub(position),
            first: first.get(skip..).unwrap_or_default(),
            second: second.get(in_second..).unwrap_or_default(),
            next: self.end,
        }
    }
}

fn count(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn read(scrollback: &Scrollback, position: u64) -> (u64, Vec<u8>) {
        let since = scrollback.since(position);
        assert_eq!(since.next, scrollback.end());
        (since.missed, [since.first, since.second].concat())
    }

    #[test]
    fn the_newest_bytes_stay_and_readers_learn_what_they_missed() {
        let mut scrollback = Scrollback::new(4).unwrap();
        scrollback.push(b"abc");
        assert_eq!(read(&scrollback, 0), (0, b"abc".to_vec()));
        assert_eq!(read(&scrollback, 2), (0, b"c".to_vec()));
        assert_eq!(read(&scrollback, 3), (0, b"".to_vec()));
        scrollback.push(b"de");
        assert_eq!(read(&scrollback, 0), (1, b"bcde".to_vec()));
        scrollback.push(b"0123456789");
        assert_eq!(read(&scrollback, 4), (7, b"6789".to_vec()));
        assert_eq!((scrollback.start(), scrollback.end()), (11, 15));
        assert_eq!(read(&scrollback, 99), (0, b"".to_vec()), "a position from the future");
    }

    #[test]
    fn every_position_agrees_with_the_whole_stream() {
        let mut scrollback = Scrollback::new(7).unwrap();
        let mut stream = Vec::new();
        for byte in 0..40u8 {
            let piece: Vec<u8> = (0..byte % 5).map(|more| byte + more).collect();
            scrollback.push(&piece);
            stream.extend(&piece);
            for position in 0..=stream.len() {
                let first_kept = stream.len().saturating_sub(7).max(position);
                let missed = first_kept - position;
                let expected = (count(missed), stream[first_kept..].to_vec());
                assert_eq!(read(&scrollback, count(position)), expected);
            }
        }
    }

    #[test]
    fn no_room_is_fine() {
        let mut scrollback = Scrollback::new(0).unwrap();
        scrollback.push(b"abc");
        assert_eq!(read(&scrollback, 0), (3, b"".to_vec()));
    }
}
