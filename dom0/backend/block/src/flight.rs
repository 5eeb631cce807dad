//! Flights: requests that are being carried out, each with the stage that it has reached.

use alloc::boxed::Box;
use alloc::vec::Vec;

use disk::Piece;
use ring_protocol::block::journal::Entry;
use ring_protocol::block::{DIRECT_SEGMENTS, Direction, Segment, Status};

use crate::host::Handle;
use crate::limits::FLIGHTS;
use crate::queue::VbdId;

/// What is to be done next for a flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The flight has no request.
    Free,
    /// The request's descriptors are to be copied.
    Fetch,
    /// The place of the request's next sectors is to be found.
    Plan,
    /// The guest's pages for the next part are to be pinned.
    Pin,
    /// The next part is to be submitted to the device.
    Submit,
    /// The device has a part of the request.
    Device,
    /// The request waits for a flush that is not submitted yet.
    FlushNext,
    /// The request waits for the flush that the device has.
    FlushNow,
    /// The request is to be answered.
    End,
}

const STAGES: usize = Stage::End as usize + 1;

/// What a request asks for, as far as its stages depend on that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Transfer(Direction),
    Flush,
    Discard,
}

/// How far a durable write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durable {
    /// The request is no durable write.
    No,
    /// The writes that were answered before this one are to be flushed.
    Before,
    /// What this write has written is to be flushed.
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
    /// Moves on by at most `most` sectors within one page of the guest. Returns these sectors; `None` if no segment is left, or
    /// if `most` is 0.
    pub(crate) fn next(&mut self, segments: &[Segment], most: u32) -> Option<Span> {
        let segment = segments.get(self.segment)?;
        let left = segment.sectors().ok()?.checked_sub(self.sectors)?;
        let sectors = left.min(most);
        // At most a page, 4,096 bytes, so 16 bits are enough.
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
    /// The answer, as far as it is known. An error stays.
    pub(crate) status: Status,
    /// The next sector of the disk.
    pub(crate) sector: u64,
    /// How many sectors, from `sector` on, are not done yet.
    pub(crate) left: u64,
    /// The number of all sectors of the request, for the counters.
    pub(crate) sectors: u64,
    /// The number of segments of an indirect request.
    pub(crate) count: usize,
    /// How many pins the flight has taken of the budget: one for each segment, 0 for a disk in memory.
    pub(crate) pins: u32,
    /// The bytes that the vbd was charged for.
    pub(crate) charged: u32,
    /// The grant reference of the page with the descriptors of an indirect request.
    pub(crate) descriptors: u32,
    pub(crate) segments: Vec<Segment>,
    /// Where `sector` is among the segments.
    pub(crate) cursor: Cursor,
    /// The cursor after the part that is under way.
    pub(crate) beyond: Cursor,
    /// The part that the device has, or gets next: its first sector on the device, and its number of sectors.
    pub(crate) part: (u64, u64),
    /// The handles of the pages that are pinned for the part.
    pub(crate) handles: Vec<Handle>,
    /// The pinned memory of the part.
    pub(crate) pieces: Vec<Piece>,
    /// [`Queue::failures`](crate::Queue) when the request began.
    pub(crate) failures: u64,
    /// When the part was submitted to the device.
    pub(crate) since_ns: u64,
}

/// The index of a flight: a number below [`FLIGHTS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Index(u8);

impl Index {
    /// Takes the lowest six bits of a number.
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

/// A set of flights: one bit each.
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

/// All flights, and the set of flights in each stage.
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

    /// Returns the flights in this stage.
    pub(crate) fn at(&self, stage: Stage) -> Set {
        Set(self.sets.get(stage as usize).copied().unwrap_or_default())
    }

    /// Returns the flights that have a request.
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

    /// Moves a flight to [`Stage::End`], where it is answered with `status`, or with an earlier error if there is one.
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
