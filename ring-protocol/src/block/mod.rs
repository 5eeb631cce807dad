//! Block devices: what a request, a segment and a response look like, and which of them are served (ABI io 5).
//!
//! ```text
//! slot of the ring --copied once--> Slot --Slot::request--> Request, or Refused, which has the status of the answer
//!                                          descriptor page --copied once--> [Segment] --judge--> Extent
//! ```
//!
//! Requests are parsed from copies that the guest cannot change; only the [`journal`] accesses shared memory. A sector has 512
//! bytes, also on disks with larger blocks. A 32-bit front end (`x86_32-abi`) lays its slots out differently;
//! [`check_protocol`] refuses such a front end.

pub mod journal;
mod request;
mod segment;

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use request::{Direction, Head, Request, Slot};
pub use segment::{Extent, Geometry, Segment, judge};

/// Bytes of a slot of the ring, for the protocol [`PROTOCOL`].
pub const SLOT_BYTES: usize = 112;
/// Bytes of a page of a guest.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a sector.
pub const SECTOR_BYTES: u32 = 512;
/// Sectors of a page. A segment lies within one page.
pub const PAGE_SECTORS: u32 = 8;
/// The maximum number of segments in a slot.
pub const DIRECT_SEGMENTS: usize = 11;
/// The maximum number of segments of an indirect request: the value of `feature-max-indirect-segments`.
pub const INDIRECT_SEGMENTS: usize = 256;
/// The number of references of descriptor pages in an indirect slot.
pub const DESCRIPTOR_PAGES: usize = 8;
/// The maximum number of pages of a ring. The key `max-ring-page-order` has its logarithm.
pub const RING_PAGES: usize = 1 << MAX_RING_PAGE_ORDER;
/// The binary logarithm of [`RING_PAGES`].
pub const MAX_RING_PAGE_ORDER: usize = 4;

// One descriptor page holds all segments of a request, so only the first reference of an indirect slot is used.
const _: () = assert!(INDIRECT_SEGMENTS * size_of::<Segment>() <= PAGE_BYTES);

/// Operations, as they stand in the first byte of a slot.
pub mod operation {
    /// Read sectors.
    pub const READ: u8 = 0;
    /// Write sectors.
    pub const WRITE: u8 = 1;
    /// Write sectors after all earlier requests and before all later requests. Not served: `feature-barrier` is 0.
    pub const BARRIER: u8 = 2;
    /// Make durable the writes that were answered before. With segments: then also write the segments durably.
    pub const FLUSH: u8 = 3;
    /// Reserved for packet commands. Not served.
    pub const RESERVED: u8 = 4;
    /// Give sectors back.
    pub const DISCARD: u8 = 5;
    /// Read or write with segments in descriptor pages.
    pub const INDIRECT: u8 = 6;
}

/// The flag of a discard after which the old bytes can never be read. Not served: `discard-secure` is 0.
pub const DISCARD_SECURE: u8 = 1;

/// How a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub enum Status {
    /// Done.
    Okay = 0,
    /// A bad request, a bad grant, or an error of the device.
    Error = -1,
    /// This back end, or this disk, does not support the operation. Stock front ends then stop using the operation, so a flush
    /// never gets this answer.
    Unsupported = -2,
    /// A flush without segments has failed. Stock front ends report this number to their callers as an error; -1 and -2 as
    /// answer to a flush would mean to them that the disk needs no flushes.
    FlushFailed = -5,
}

impl Status {
    /// All statuses.
    pub const ALL: [Self; 4] = [Self::Okay, Self::Error, Self::Unsupported, Self::FlushFailed];
}

/// Why a request is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// An unknown operation, of this number.
    UnknownOperation(u8),
    /// A barrier.
    Barrier,
    /// A discard on a disk that takes no sectors back.
    NoDiscard,
    /// A secure discard.
    SecureDiscard,
    /// An indirect request whose operation is neither a read nor a write.
    IndirectOperation(u8),
    /// A read or a write without segments.
    NoSegments,
    /// More segments than a slot holds, or than `feature-max-indirect-segments` allows.
    TooManySegments(u16),
    /// A segment that ends before it begins, or beyond its page.
    BadSegment {
        /// The segment's first sector.
        first: u8,
        /// The segment's last sector.
        last: u8,
    },
    /// A segment, a first sector or a length that does not fit the blocks of the disk.
    Unaligned,
    /// A discard of 0 sectors.
    Empty,
    /// Sectors beyond the end of the disk.
    OutOfRange,
    /// A write or a discard on a read-only disk.
    ReadOnly,
}

impl Refused {
    /// Returns the status of the answer to the request.
    #[must_use]
    pub const fn status(self) -> Status {
        match self {
            Self::UnknownOperation(_) | Self::Barrier | Self::NoDiscard | Self::SecureDiscard => Status::Unsupported,
            Self::IndirectOperation(_)
            | Self::NoSegments
            | Self::TooManySegments(_)
            | Self::BadSegment { .. }
            | Self::Unaligned
            | Self::Empty
            | Self::OutOfRange
            | Self::ReadOnly => Status::Error,
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownOperation(number) => write!(f, "unknown operation {number}"),
            Self::Barrier => f.write_str("barriers are not served"),
            Self::NoDiscard => f.write_str("the disk does not take sectors back"),
            Self::SecureDiscard => f.write_str("a secure discard is not served"),
            Self::IndirectOperation(number) => write!(f, "indirect operation {number} is neither read nor write"),
            Self::NoSegments => f.write_str("no segments"),
            Self::TooManySegments(count) => write!(f, "{count} segments are too many"),
            Self::BadSegment { first, last } => write!(f, "segment of sectors {first} to {last} of a page"),
            Self::Unaligned => f.write_str("not in whole blocks of the disk"),
            Self::Empty => f.write_str("a discard of no sectors"),
            Self::OutOfRange => f.write_str("beyond the end of the disk"),
            Self::ReadOnly => f.write_str("the disk is read-only"),
        }
    }
}

/// A response, as it stands in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Response {
    /// The id of the request.
    pub id: u64,
    /// The operation of the request; for an indirect request, the operation that is done indirectly (ABI io 5.1).
    pub operation: u8,
    /// Zero.
    pub padding: u8,
    /// A [`Status`].
    pub status: i16,
    /// Zero.
    pub padding2: u32,
}

const _: () = assert!(size_of::<Response>() == 16);

impl Response {
    /// Makes the answer to the request with this head.
    #[must_use]
    pub const fn new(head: Head, status: Status) -> Self {
        Self { id: head.id, operation: head.operation, padding: 0, status: status as i16, padding2: 0 }
    }
}

/// The protocol that this crate speaks, as front ends name it in their key `protocol`.
pub const PROTOCOL: &str = "x86_64-abi";

/// The protocol of 32-bit guests, whose slots are laid out differently.
const PROTOCOL_32: &str = "x86_32-abi";

/// Why a front end's protocol is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadProtocol {
    /// The front end is a 32-bit kernel.
    Narrow,
    /// The name is unknown.
    Unknown,
}

impl fmt::Display for BadProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Narrow => "its protocol is x86_32-abi, and 32-bit guests are not served",
            Self::Unknown => "its protocol is unknown",
        })
    }
}

/// Checks the value of a front end's key `protocol`. `None`: the front end has no such key, which means [`PROTOCOL`].
///
/// # Errors
/// The front end uses another protocol.
pub fn check_protocol(value: Option<&[u8]>) -> Result<(), BadProtocol> {
    match value {
        None => Ok(()),
        Some(name) if name == PROTOCOL.as_bytes() => Ok(()),
        Some(name) if name == PROTOCOL_32.as_bytes() => Err(BadProtocol::Narrow),
        Some(_) => Err(BadProtocol::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_has_the_abi_s_bytes() {
        let response = Response::new(Head { id: 0x0102_0304_0506_0708, operation: 1 }, Status::Unsupported);
        assert_eq!(response.as_bytes(), [8, 7, 6, 5, 4, 3, 2, 1, 1, 0, 0xfe, 0xff, 0, 0, 0, 0]);
    }

    #[test]
    fn thirty_two_bit_front_ends_are_refused_by_name() {
        assert_eq!(check_protocol(None), Ok(()));
        assert_eq!(check_protocol(Some(b"x86_64-abi")), Ok(()));
        assert_eq!(check_protocol(Some(b"x86_32-abi")), Err(BadProtocol::Narrow));
        for value in [&b""[..], b"x86_64-abi ", b"arm-abi", b"\xff"] {
            assert_eq!(check_protocol(Some(value)), Err(BadProtocol::Unknown));
        }
    }

    #[test]
    fn what_a_stock_front_end_would_turn_off_is_not_said_of_mistakes() {
        assert_eq!(Refused::UnknownOperation(9).status(), Status::Unsupported);
        assert_eq!(Refused::NoDiscard.status(), Status::Unsupported);
        assert_eq!(Refused::ReadOnly.status(), Status::Error);
        assert_eq!(Refused::TooManySegments(12).status(), Status::Error);
    }
}
