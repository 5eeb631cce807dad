//! Requests that are being carried out, and how far each of them is.

use alloc::boxed::Box;
use alloc::vec::Vec;

use disk::Piece;
use ring_protocol::block::journal::Entry;
use ring_protocol::block::{DIRECT_SEGMENTS, Direction, Segment, Status};

use crate::host::Handle;
use crate::limits::FLIGHTS;
use crate::queue::VbdId;

/// Where a request is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No request.
    Free,
    /// Its descriptors are to be copied.
    Fetch,
    /// The place of its next sectors is to be found.
    Plan,
    /// The pages of its next part are to be pinned.
    Pin,
    /// Its next part is to be given to the device.
    Submit,
    /// The device has it.
    Device,
    /// It waits for a flush that has not begun.
    FlushNext,
    /// It waits for the flush that the device has.
    FlushNow,
    /// All is done but the answer.
    End,
}

const STAGES: usize = Stage::End as usize + 1;

/// What a request asks for, as far as the way it goes depends on that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Transfer(Direction),
    Flush,
    Discard,
}

/// How far a durable write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durable {
    /// It is no durable write.
    No,
    /// What was answered before it is to be flushed.
    Before,
    /// What it has written is to be flushed.
    After,
}

/// How far the segments of a request have been used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    segment: usize,
    sectors: u32,
}

/// Bytes within a page of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) reference: u32,
    pub(crate) offset: u16,
    pub(crate) sectors: u32,
    pub(crate) bytes: u16,
}

impl Cursor {
    /// The next sectors, at most `most` of them, all in one page of the guest.
    pub(crate) fn next(&mut self, segments: &[Segment], most: u32) -> Option<Span> {
        let segment = segments.get(self.segment)?;
        let left = segment.sectors().ok()?.checked_sub(self.sectors)?;
        let sectors = left.min(most);
        // All of a page are 4096 bytes.
        let offset = (u16::from(segment.first) + u16::try_from(self.sectors).ok()?) << 9;
        let bytes = u16::try_from(sectors).ok()? << 9;
        if sectors == left {
            *self = Self { segment: self.segment + 1, sectors: 0 };
        } else {
            self.sectors += sectors;
        }
        (sectors > 0).then_some(Span { reference: segment.reference, offset, sectors, bytes })
    }
}

/// A request that is being carried out.
#[derive(Debug)]
pub(crate) struct Flight {
    stage: Stage,
    pub(crate) vbd: VbdId,
    pub(crate) entry: Entry,
    pub(crate) work: Work,
    pub(crate) durable: Durable,
    /// What it is answered with, as far as is known.
    pub(crate) status: Status,
    /// The next sector.
    pub(crate) sector: u64,
    /// How many sectors are still to be planned.
    pub(crate) left: u64,
    /// All its sectors, for the counters.
    pub(crate) sectors: u64,
    /// How many segments it has: as many pins are set aside for it.
    pub(crate) count: usize,
    pub(crate) pins: u32,
    /// What was charged for its bytes.
    pub(crate) charged: u32,
    /// The grant reference of its descriptors.
    pub(crate) descriptors: u32,
    pub(crate) segments: Vec<Segment>,
    pub(crate) cursor: Cursor,
    /// The same, after the part that is under way.
    pub(crate) beyond: Cursor,
    /// The part that the device has, or is to be given: its first sector there, and its length.
    pub(crate) part: (u64, u64),
    /// What is pinned of it, and where that is.
    pub(crate) handles: Vec<Handle>,
    pub(crate) pieces: Vec<Piece>,
    /// How many flushes had failed when it began.
    pub(crate) failures: u64,
    /// When the device was given its part.
    pub(crate) since_ns: u64,
}

/// A number below [`FLIGHTS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Index(u8);

impl Index {
    /// The lowest bits of a number.
    pub(crate) const fn of(number: u32) -> Self {
        let [lowest, ..] = number.to_le_bytes();
        Self(lowest % 64)
    }

    pub(crate) const fn number(self) -> u32 {
        self.0 as u32
    }

    pub(crate) const fn bit(self) -> u64 {
        1 << (self.0 % 64)
    }
}

/// Some flights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Set(pub(crate) u64);

const _: () = assert!(FLIGHTS == 64, "a set has a bit for each flight");

impl Set {
    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub(crate) const fn has(self, index: Index) -> bool {
        self.0 & index.bit() != 0
    }

    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Iterator for Set {
    type Item = Index;

    fn next(&mut self) -> Option<Index> {
        let index = (self.0 != 0).then(|| Index::of(self.0.trailing_zeros()))?;
        self.0 &= !index.bit();
        Some(index)
    }
}

/// All flights, and which are in each stage.
#[derive(Debug)]
pub(crate) struct Flights {
    all: Box<[Flight; FLIGHTS]>,
    sets: [u64; STAGES],
}

impl Flights {
    pub(crate) fn new() -> Self {
        let free = |_| Flight {
            stage: Stage::Free,
            vbd: VbdId::default(),
            entry: Entry::default(),
            work: Work::Flush,
            durable: Durable::No,
            status: Status::Okay,
            sector: 0,
            left: 0,
            sectors: 0,
            count: 0,
            pins: 0,
            charged: 0,
            descriptors: 0,
            segments: Vec::with_capacity(DIRECT_SEGMENTS),
            cursor: Cursor::default(),
            beyond: Cursor::default(),
            part: (0, 0),
            handles: Vec::new(),
            pieces: Vec::new(),
            failures: 0,
            since_ns: 0,
        };
        let mut sets = [0; STAGES];
        let [all_free, ..] = &mut sets;
        *all_free = u64::MAX;
        Self { all: Box::new(core::array::from_fn(free)), sets }
    }

    #[allow(clippy::indexing_slicing, reason = "an index is below the length of the array by its type")]
    pub(crate) fn get(&self, index: Index) -> &Flight {
        &self.all[usize::from(index.0) % FLIGHTS]
    }

    #[allow(clippy::indexing_slicing, reason = "an index is below the length of the array by its type")]
    pub(crate) fn get_mut(&mut self, index: Index) -> &mut Flight {
        &mut self.all[usize::from(index.0) % FLIGHTS]
    }

    /// Those in this stage.
    pub(crate) fn at(&self, stage: Stage) -> Set {
        Set(self.sets.get(stage as usize).copied().unwrap_or_default())
    }

    /// Those that have a request.
    pub(crate) fn busy(&self) -> Set {
        Set(!self.at(Stage::Free).0)
    }

    pub(crate) fn go(&mut self, index: Index, stage: Stage) {
        let flight = self.get_mut(index);
        let before = core::mem::replace(&mut flight.stage, stage);
        if let Some(set) = self.sets.get_mut(before as usize) {
            *set &= !index.bit();
        }
        if let Some(set) = self.sets.get_mut(stage as usize) {
            *set |= index.bit();
        }
    }

    /// A request is over but for its answer. What failed before stays failed.
    pub(crate) fn end(&mut self, index: Index, status: Status) {
        let flight = self.get_mut(index);
        if flight.status == Status::Okay {
            flight.status = status;
        }
        self.go(index, Stage::End);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_hands_out_every_sector_once() {
        let segments = [(0, 7), (3, 4), (7, 7)];
        let segments = segments.map(|(first, last)| Segment { reference: u32::from(first), first, last, padding: 0 });
        let mut cursor = Cursor::default();
        let spans: Vec<_> = core::iter::from_fn(|| cursor.next(&segments, 5)).collect();
        let found: Vec<_> = spans.iter().map(|span| (span.reference, span.offset / 512, span.bytes / 512)).collect();
        assert_eq!(found, [(0, 0, 5), (0, 5, 3), (3, 3, 2), (7, 7, 1)]);
    }

    #[test]
    fn a_flight_is_in_one_stage() {
        let mut flights = Flights::new();
        let index = Index::of(63);
        for stage in [Stage::Plan, Stage::Device, Stage::End, Stage::End] {
            flights.go(index, stage);
            assert_eq!(flights.at(stage), Set(1 << 63));
            assert_eq!(flights.busy().len(), 1);
        }
    }
}
