//! The master boot record and the chain of extended boot records.
//!
//! A record has four entries of 16 bytes from byte 446 on: the kind at 4, the first block at 8, the number of blocks at 12. An
//! extended partition begins with a record of its own, whose first entry is a logical partition, counted from that record, and
//! whose second one leads to the next record, counted from the beginning of the extended partition.

use super::{Flaw, Interval, LINKS, NoTable, Reader, Role, State, number32};

/// Where the entries begin.
const ENTRIES: usize = 446;
/// The kind of the entry that says: there is a GPT.
const PROTECTIVE: u8 = 0xee;
/// The kinds of extended partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A chain of extended boot records that is being followed.
#[derive(Debug)]
pub(super) struct Chain {
    /// The extended partition.
    within: Interval,
    /// The number of the next logical partition.
    number: u32,
}

/// An entry of a record; all numbers count blocks.
struct Raw {
    kind: u8,
    first: u64,
    blocks: u64,
}

/// The entries of a record; `None` if it is not one.
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
    /// Goes on from the first block of the disk.
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
            // Of several extended partitions, the first counts.
            if extended && matches!(next, State::Done(_)) {
                next = self.follow(Chain { within: interval, number: 5 }, interval.first);
            }
        }
        next
    }

    /// Goes on from a link of the extended partition.
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

    /// Reads the link at `first`, if it is a new one inside the extended partition.
    fn follow(&mut self, chain: Chain, first: u64) -> State {
        let here = self.table.usable.holds(chain.within) && chain.within.holds(Interval { first, sectors: self.unit });
        if !here || self.table.links.len() >= LINKS || self.table.links.contains(&first) {
            return self.end_of_chain();
        }
        self.table.links.push(first);
        State::Link(chain, first)
    }

    /// The logical partitions found so far are all there are.
    fn end_of_chain(&mut self) -> State {
        self.table.flaw = Some(Flaw::Chain);
        State::Done(Ok(()))
    }
}
