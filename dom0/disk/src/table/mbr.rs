//! The master boot record and the chain of extended boot records.
//!
//! A record has four entries of 16 bytes from byte 446 on: the kind is at byte 4 of an entry, the first block at 8, the number
//! of blocks at 12. An extended partition begins with a record, the first link of a chain. The first entry of a link is a
//! logical partition; its first block is counted from the link. The second entry leads to the next link, whose block is counted
//! from the beginning of the extended partition.

use super::{Flaw, Interval, LINKS, NoTable, Reader, Role, State, number32};

/// The byte at which the entries begin.
const ENTRIES: usize = 446;
/// The kind of an entry that protects a GPT: the disk has a GPT, which counts.
const PROTECTIVE: u8 = 0xee;
/// The kinds of extended partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A chain of extended boot records that is being followed.
#[derive(Debug)]
pub(super) struct Chain {
    /// The extended partition.
    within: Interval,
    /// The number for the next logical partition.
    number: u32,
}

/// An entry of a record. `first` and `blocks` count blocks.
struct Raw {
    kind: u8,
    first: u64,
    blocks: u64,
}

/// Returns the entries of a record. `None` if the bytes lack the signature of a record.
fn record(bytes: &[u8]) -> Option<[Raw; 4]> {
    let entry = |index: usize| {
        let at = ENTRIES + index * 16;
        let number = |at| u64::from(number32(bytes, at));
        let kind = bytes.get(at + 4).copied().unwrap_or(0);
        Raw { kind, first: number(at + 8), blocks: number(at + 12) }
    };
    (bytes.get(510..512)? == [0x55, 0xaa]).then(|| [0, 1, 2, 3].map(entry))
}

impl Reader {
    /// Takes the first block of the disk. Returns the next state.
    pub(super) fn first_block(&mut self, bytes: &[u8]) -> State {
        if bytes.is_empty() {
            return State::Done(Err(NoTable::Unreadable));
        }
        let Some(entries) = record(bytes) else { return State::Done(Err(NoTable::Missing)) };
        if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
            return self.begin_gpt();
        }
        let mut next = State::Done(Ok(()));
        for (number, entry) in (1..).zip(&entries).filter(|(_, entry)| entry.kind != 0) {
            let interval = self.interval(entry.first, entry.blocks);
            let extended = EXTENDED.contains(&entry.kind);
            self.table.note(number, interval, if extended { Role::Extended } else { Role::Plain });
            // Only the first extended partition whose first link is valid is followed.
            if extended && matches!(next, State::Done(_)) {
                next = self.follow(Chain { within: interval, number: 5 }, interval.first);
            }
        }
        next
    }

    /// Takes the link of the extended partition at `sector`. Returns the next state.
    pub(super) fn link(&mut self, chain: Chain, sector: u64, bytes: &[u8]) -> State {
        let Some([logical, next, ..]) = record(bytes) else { return self.end_of_chain() };
        let mut number = chain.number;
        if logical.kind != 0 {
            let from_here = self.interval(logical.first, logical.blocks);
            let interval = Interval { first: sector.saturating_add(from_here.first), ..from_here };
            if !chain.within.holds(interval) {
                return self.end_of_chain();
            }
            self.table.note(number, interval, Role::Logical);
            number += 1;
        }
        if next.kind == 0 {
            return State::Done(Ok(()));
        }
        let first = chain.within.first.saturating_add(self.interval(next.first, 0).first);
        self.follow(Chain { number, ..chain }, first)
    }

    /// Returns the state that wants the link at `first`. The chain ends instead if that link was seen before or lies outside
    /// the extended partition, or if the chain is too long.
    fn follow(&mut self, chain: Chain, first: u64) -> State {
        let here = self.table.usable.holds(chain.within) && chain.within.holds(Interval { first, sectors: self.unit });
        if !here || self.table.links.len() >= LINKS || self.table.links.contains(&first) {
            return self.end_of_chain();
        }
        self.table.links.push(first);
        State::Link(chain, first)
    }

    /// Ends a broken chain. Logical partitions found so far stay.
    fn end_of_chain(&mut self) -> State {
        self.table.flaw = Some(Flaw::Chain);
        State::Done(Ok(()))
    }
}
