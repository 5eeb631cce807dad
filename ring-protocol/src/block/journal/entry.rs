//! The entries of a journal, their states, and sets of them.

use super::{ENTRY_BYTES, MAX_ENTRIES};
use crate::block::Status;

/// An entry of a journal, which holds a request until it is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry(pub(super) u16);

impl Entry {
    /// Returns the entry's number, below the number of entries.
    #[must_use]
    pub const fn number(self) -> usize {
        self.0 as usize
    }

    /// Returns the offset of the entry in the journal.
    pub(super) const fn at(self) -> usize {
        ENTRY_BYTES * (self.0 as usize + 1)
    }
}

/// The state of an entry, as one word: kind, tries, status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    InFlight { tries: u8 },
    Done { status: Status },
}

impl State {
    pub(super) const fn word(self) -> u32 {
        match self {
            Self::Free => 0,
            Self::InFlight { tries } => u32::from_le_bytes([1, tries, 0, 0]),
            Self::Done { status } => {
                let [low, high] = (status as i16).to_le_bytes();
                u32::from_le_bytes([2, 0, low, high])
            }
        }
    }

    pub(super) fn of(word: u32) -> Option<Self> {
        match word.to_le_bytes() {
            [0, 0, 0, 0] => Some(Self::Free),
            [1, tries, 0, 0] => Some(Self::InFlight { tries }),
            [2, 0, low, high] => {
                let number = i16::from_le_bytes([low, high]);
                let status = Status::ALL.into_iter().find(|status| *status as i16 == number);
                status.map(|status| Self::Done { status })
            }
            _ => None,
        }
    }
}

/// A set of entries of a journal. As an iterator, it removes and returns them in the order of their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entries([u64; MAX_ENTRIES as usize / 64]);

impl Entries {
    pub(super) fn insert(&mut self, entry: Entry) {
        if let Some(word) = self.0.get_mut(entry.number() / 64) {
            *word |= 1 << (entry.0 % 64);
        }
    }

    /// Removes an entry. Returns whether it was in the set.
    pub(super) fn remove(&mut self, entry: Entry) -> bool {
        let Some(word) = self.0.get_mut(entry.number() / 64) else { return false };
        let bit = 1 << (entry.0 % 64);
        let had = *word & bit != 0;
        *word &= !bit;
        had
    }

    pub(super) fn first(&self) -> Option<Entry> {
        let (at, word) = self.0.iter().enumerate().find(|(_, word)| **word != 0)?;
        u16::try_from(at * 64 + word.trailing_zeros() as usize).ok().map(Entry)
    }
}

impl Iterator for Entries {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        let first = self.first()?;
        self.remove(first);
        Some(first)
    }
}
