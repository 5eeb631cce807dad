//! The contents of a slot, and the parser of requests.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::{
    DESCRIPTOR_PAGES, DIRECT_SEGMENTS, DISCARD_SECURE, Extent, Geometry, INDIRECT_SEGMENTS, Refused, SLOT_BYTES,
    Segment, judge, operation,
};

/// A copy of a slot. The fields have different meanings in a read or write, in a discard, and in an indirect request:
///
/// | offset | read, write, barrier, flush | discard | indirect |
/// | --- | --- | --- | --- |
/// | 0 | operation | operation | operation |
/// | 1 | number of segments | flag | the operation that is done indirectly |
/// | 2 | handle, ignored | handle, ignored | number of segments |
/// | 8 | id | id | id |
/// | 16 | first sector | first sector | first sector |
/// | 24 | 11 segments | number of sectors | handle, ignored |
/// | 28 | | | 8 references of descriptor pages |
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Slot {
    operation: u8,
    small: u8,
    word: u16,
    padding: u32,
    id: u64,
    sector: u64,
    body: [u64; DIRECT_SEGMENTS],
}

const _: () = assert!(size_of::<Slot>() == SLOT_BYTES);
const _: () = assert!(size_of::<Indirect>() <= DIRECT_SEGMENTS * 8);

/// The body of an indirect request, which other requests use for segments.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Indirect {
    handle: u16,
    padding: u16,
    references: [u32; DESCRIPTOR_PAGES],
}

/// The part of a request that its response repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The front end's name for the request.
    pub id: u64,
    /// The operation; for an indirect request, the operation that is done indirectly.
    pub operation: u8,
}

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk into the guest's pages.
    Read,
    /// From the guest's pages to the disk.
    Write,
}

/// A valid request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A read or a write with its segments in the slot: see [`Slot::segments`].
    Direct {
        /// Read or write.
        direction: Direction,
        /// The sectors of the disk.
        extent: Extent,
        /// The number of segments, at least one.
        segments: usize,
        /// A durable write: first the writes that were answered before are made durable, then this one is done and made
        /// durable.
        durable: bool,
    },
    /// A read or a write with its segments in a descriptor page, which is still to be copied and given to [`judge`].
    Indirect {
        /// Read or write.
        direction: Direction,
        /// The first sector of the disk.
        sector: u64,
        /// The number of segments, from 1 to [`INDIRECT_SEGMENTS`].
        segments: usize,
        /// The grant reference of the descriptor page. The segments begin at byte 0 of the page.
        descriptors: u32,
    },
    /// Make durable the writes that were answered before.
    Flush,
    /// Give sectors back.
    Discard(Extent),
}

impl Slot {
    /// Returns a slot of zeroes, to be copied into through [`IntoBytes::as_mut_bytes`].
    #[must_use]
    pub fn empty() -> Self {
        Self::new_zeroed()
    }

    /// Makes the slot that a front end writes for a read, a write or a flush. Segments beyond [`DIRECT_SEGMENTS`] are left out,
    /// but counted.
    #[must_use]
    pub fn direct(operation: u8, id: u64, sector: u64, segments: &[Segment]) -> Self {
        let mut slot = Self { operation, id, sector, ..Self::empty() };
        slot.small = u8::try_from(segments.len()).unwrap_or(u8::MAX);
        let room: &mut [Segment; DIRECT_SEGMENTS] = zerocopy::transmute_mut!(&mut slot.body);
        for (place, segment) in room.iter_mut().zip(segments) {
            *place = *segment;
        }
        slot
    }

    /// Makes the slot that a front end writes for an indirect read or write.
    #[must_use]
    pub fn indirect(operation: u8, id: u64, sector: u64, segments: u16, descriptors: u32) -> Self {
        let mut slot =
            Self { operation: operation::INDIRECT, small: operation, word: segments, id, sector, ..Self::empty() };
        let mut references = [0; DESCRIPTOR_PAGES];
        let [first, ..] = &mut references;
        *first = descriptors;
        let indirect = Indirect { handle: 0, padding: 0, references };
        for (to, from) in slot.body.as_mut_bytes().iter_mut().zip(indirect.as_bytes()) {
            *to = *from;
        }
        slot
    }

    /// Makes the slot that a front end writes for a discard.
    #[must_use]
    pub fn discard(id: u64, sector: u64, sectors: u64) -> Self {
        let mut slot = Self { operation: operation::DISCARD, id, sector, ..Self::empty() };
        let [first, ..] = &mut slot.body;
        *first = sectors;
        slot
    }

    /// Returns the part that the response repeats. Every slot has one, also that of an invalid request.
    #[must_use]
    pub const fn head(&self) -> Head {
        let operation = if self.operation == operation::INDIRECT { self.small } else { self.operation };
        Head { id: self.id, operation }
    }

    /// Returns the first `count` segments of a direct request; all [`DIRECT_SEGMENTS`] if `count` is larger.
    #[must_use]
    pub fn segments(&self, count: usize) -> &[Segment] {
        let all: &[Segment; DIRECT_SEGMENTS] = zerocopy::transmute_ref!(&self.body);
        all.get(..count).unwrap_or(all)
    }

    /// Parses the slot as a request to a disk.
    ///
    /// # Errors
    /// Why the request is not served.
    pub fn request(&self, disk: &Geometry) -> Result<Request, Refused> {
        match self.operation {
            operation::READ => self.parse_direct(Direction::Read, false, disk),
            operation::WRITE => self.parse_direct(Direction::Write, false, disk),
            operation::BARRIER => Err(Refused::Barrier),
            operation::FLUSH if self.small == 0 => Ok(Request::Flush),
            operation::FLUSH => self.parse_direct(Direction::Write, true, disk),
            operation::DISCARD => self.parse_discard(disk),
            operation::INDIRECT => self.parse_indirect(disk),
            unknown => Err(Refused::UnknownOperation(unknown)),
        }
    }

    fn parse_direct(&self, direction: Direction, durable: bool, disk: &Geometry) -> Result<Request, Refused> {
        let segments = usize::from(self.small);
        if segments > DIRECT_SEGMENTS {
            return Err(Refused::TooManySegments(self.small.into()));
        }
        check(direction, disk)?;
        let extent = judge(self.segments(segments), self.sector, disk)?;
        Ok(Request::Direct { direction, extent, segments, durable })
    }

    fn parse_indirect(&self, disk: &Geometry) -> Result<Request, Refused> {
        let direction = match self.small {
            operation::READ => Direction::Read,
            operation::WRITE => Direction::Write,
            other => return Err(Refused::IndirectOperation(other)),
        };
        let segments = usize::from(self.word);
        if segments == 0 {
            return Err(Refused::NoSegments);
        }
        if segments > INDIRECT_SEGMENTS {
            return Err(Refused::TooManySegments(self.word));
        }
        check(direction, disk)?;
        let indirect = Indirect::read_from_prefix(self.body.as_bytes()).map(|(indirect, _)| indirect);
        let [descriptors, ..] = indirect.map_or([0; DESCRIPTOR_PAGES], |indirect| indirect.references);
        Ok(Request::Indirect { direction, sector: self.sector, segments, descriptors })
    }

    fn parse_discard(&self, disk: &Geometry) -> Result<Request, Refused> {
        if !disk.discards() {
            return Err(Refused::NoDiscard);
        }
        if self.small & DISCARD_SECURE != 0 {
            return Err(Refused::SecureDiscard);
        }
        disk.check_writable()?;
        let [sectors, ..] = self.body;
        disk.extent(self.sector, sectors).map(Request::Discard)
    }
}

fn check(direction: Direction, disk: &Geometry) -> Result<(), Refused> {
    match direction {
        Direction::Read => Ok(()),
        Direction::Write => disk.check_writable(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use operation::{BARRIER, DISCARD, FLUSH, INDIRECT, READ, RESERVED, WRITE};

    const DISK: (u64, u32) = (1000, 512);

    fn disk() -> Geometry {
        Geometry::new(DISK.0, DISK.1, false, true).unwrap()
    }

    fn whole(reference: u32) -> Segment {
        Segment { reference, first: 0, last: 7, padding: 0 }
    }

    #[test]
    fn the_offsets_are_the_abi_s() {
        let mut bytes = [0; SLOT_BYTES];
        (bytes[0], bytes[1], bytes[8], bytes[16]) = (WRITE, 2, 77, 40);
        (bytes[24], bytes[28], bytes[29]) = (9, 1, 2);
        (bytes[32], bytes[36], bytes[37]) = (10, 0, 7);
        let slot = Slot::read_from_bytes(&bytes).unwrap();
        let extent = Extent { sector: 40, sectors: 10 };
        let write = Request::Direct { direction: Direction::Write, extent, segments: 2, durable: false };
        assert_eq!(slot.request(&disk()), Ok(write));
        assert_eq!(slot.segments(2), [Segment { reference: 9, first: 1, last: 2, padding: 0 }, whole(10)]);
        assert_eq!(slot.head(), Head { id: 77, operation: WRITE });

        (bytes[0], bytes[1], bytes[2], bytes[3]) = (INDIRECT, READ, 0, 1);
        (bytes[28], bytes[29]) = (5, 0);
        let slot = Slot::read_from_bytes(&bytes).unwrap();
        let read = Request::Indirect { direction: Direction::Read, sector: 40, segments: 256, descriptors: 5 };
        assert_eq!(slot.request(&disk()), Ok(read));
        assert_eq!(slot.head(), Head { id: 77, operation: READ }, "an indirect read is answered as a read");

        bytes = [0; SLOT_BYTES];
        (bytes[0], bytes[16], bytes[24]) = (DISCARD, 8, 16);
        let slot = Slot::read_from_bytes(&bytes).unwrap();
        assert_eq!(slot.request(&disk()), Ok(Request::Discard(Extent { sector: 8, sectors: 16 })));
    }

    #[test]
    fn what_is_built_is_what_is_read() {
        let segments = [whole(3), whole(4)];
        let slot = Slot::direct(FLUSH, 1, 16, &segments);
        let extent = Extent { sector: 16, sectors: 16 };
        let durable = Request::Direct { direction: Direction::Write, extent, segments: 2, durable: true };
        assert_eq!(slot.request(&disk()), Ok(durable));
        assert_eq!(Slot::direct(FLUSH, 1, u64::MAX, &[]).request(&disk()), Ok(Request::Flush));
        let indirect = Slot::indirect(WRITE, 2, 3, 40, 99).request(&disk());
        let expected = Request::Indirect { direction: Direction::Write, sector: 3, segments: 40, descriptors: 99 };
        assert_eq!(indirect, Ok(expected));
    }

    #[test]
    fn each_rule_has_its_refusal() {
        let judged = |slot: Slot| slot.request(&disk()).unwrap_err();
        assert_eq!(judged(Slot::direct(BARRIER, 0, 0, &[whole(1)])), Refused::Barrier);
        for unknown in [RESERVED, 7, 255] {
            assert_eq!(judged(Slot::direct(unknown, 0, 0, &[whole(1)])), Refused::UnknownOperation(unknown));
        }
        assert_eq!(judged(Slot::direct(READ, 0, 0, &[])), Refused::NoSegments);
        assert_eq!(judged(Slot::direct(READ, 0, 0, &[whole(1); 12])), Refused::TooManySegments(12));
        assert_eq!(judged(Slot::direct(FLUSH, 0, 0, &[whole(1); 12])), Refused::TooManySegments(12));
        assert_eq!(judged(Slot::direct(READ, 0, 993, &[whole(1)])), Refused::OutOfRange);
        assert_eq!(judged(Slot::indirect(READ, 0, 0, 0, 1)), Refused::NoSegments);
        assert_eq!(judged(Slot::indirect(READ, 0, 0, 257, 1)), Refused::TooManySegments(257));
        assert_eq!(judged(Slot::indirect(FLUSH, 0, 0, 1, 1)), Refused::IndirectOperation(FLUSH));
        assert_eq!(judged(Slot::indirect(INDIRECT, 0, 0, 1, 1)), Refused::IndirectOperation(INDIRECT));
        assert_eq!(judged(Slot::discard(0, 0, 0)), Refused::Empty);
        assert_eq!(judged(Slot::discard(0, 1, u64::MAX)), Refused::OutOfRange);
        let secure = Slot { small: DISCARD_SECURE, ..Slot::discard(0, 0, 8) };
        assert_eq!(judged(secure), Refused::SecureDiscard);
    }

    #[test]
    fn a_read_only_disk_is_not_changed() {
        let disk = Geometry::new(1000, 512, true, true).unwrap();
        for operation in [WRITE, FLUSH] {
            assert_eq!(Slot::direct(operation, 0, 0, &[whole(1)]).request(&disk), Err(Refused::ReadOnly));
        }
        assert_eq!(Slot::indirect(WRITE, 0, 0, 1, 1).request(&disk), Err(Refused::ReadOnly));
        assert_eq!(Slot::discard(0, 0, 8).request(&disk), Err(Refused::ReadOnly));
        assert!(Slot::direct(READ, 0, 0, &[whole(1)]).request(&disk).is_ok());
        assert_eq!(Slot::direct(FLUSH, 0, 0, &[]).request(&disk), Ok(Request::Flush));
        let without = Geometry::new(1000, 512, false, false).unwrap();
        assert_eq!(Slot::discard(0, 0, 8).request(&without), Err(Refused::NoDiscard));
    }
}
