//! Block devices: what a request, a segment and a response look like, and which of them are served (ABI io 5).
//!
//! ```text
//! slot of the ring --copied once--> Slot --Slot::request--> Request, or Refused with the status it is answered with
//!                                          descriptor page --copied once--> [Segment] --judge--> Extent
//! ```
//!
//! Everything here is a pure function of bytes that were copied out of the guest's reach. A sector has 512 bytes, also on
//! disks with larger blocks. A front end of another width (`x86_32-abi`) lays its slots out differently; [`check_protocol`] refuses it.

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
/// Sectors of a page: a segment lies within one.
pub const PAGE_SECTORS: u32 = 8;
/// The most segments in a slot.
pub const DIRECT_SEGMENTS: usize = 11;
/// The most segments of an indirect request: what `feature-max-indirect-segments` says.
pub const INDIRECT_SEGMENTS: usize = 256;
/// References of descriptor pages in an indirect slot.
pub const DESCRIPTOR_PAGES: usize = 8;
/// The most pages of a ring, as `max-ring-page-order` says by its logarithm.
pub const RING_PAGES: usize = 1 << MAX_RING_PAGE_ORDER;
/// The logarithm of [`RING_PAGES`].
pub const MAX_RING_PAGE_ORDER: usize = 4;

// One descriptor page holds all segments of a request, so the other references of a slot are never looked at.
const _: () = assert!(INDIRECT_SEGMENTS * size_of::<Segment>() <= PAGE_BYTES);

/// Operations, as they stand in the first byte of a slot.
pub mod operation {
    /// Read sectors.
    pub const READ: u8 = 0;
    /// Write sectors.
    pub const WRITE: u8 = 1;
    /// Write sectors between all that came before and all that comes after. Not served: `feature-barrier` is 0.
    pub const BARRIER: u8 = 2;
    /// Make durable what was answered before. With segments: and write these, durably too.
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
    /// This back end, or this disk, does not know the operation. Stock front ends stop using it, so a flush is never answered so.
    Unsupported = -2,
    /// A flush without segments has failed. Stock front ends tell their callers of any number but -1 and -2, by which they
    /// understand that there is no need to flush.
    FlushFailed = -5,
}

impl Status {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Okay, Self::Error, Self::Unsupported, Self::FlushFailed];
}

/// Why a request is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// An operation we do not know.
    UnknownOperation(u8),
    /// A barrier.
    Barrier,
    /// A discard for a disk without.
    NoDiscard,
    /// A discard that is to be secure.
    SecureDiscard,
    /// An indirect request whose operation is neither a read nor a write.
    IndirectOperation(u8),
    /// A read or a write without segments.
    NoSegments,
    /// More segments than the slot holds, or than we announced.
    TooManySegments(u16),
    /// A segment that ends before it begins, or beyond its page.
    BadSegment {
        /// Its first sector.
        first: u8,
        /// Its last sector.
        last: u8,
    },
    /// A segment, a sector or a length that is not whole blocks of the disk.
    Unaligned,
    /// A discard of nothing.
    Empty,
    /// Sectors beyond the end of the disk.
    OutOfRange,
    /// A write or a discard on a read-only disk.
    ReadOnly,
}

impl Refused {
    /// What the request is answered with.
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
    /// The request's.
    pub id: u64,
    /// The request's, but of an indirect request the operation that is done indirectly (ABI io 5.1).
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
    /// The answer to the request with this head.
    #[must_use]
    pub const fn new(head: Head, status: Status) -> Self {
        Self { id: head.id, operation: head.operation, padding: 0, status: status as i16, padding2: 0 }
    }
}

/// The protocol that this crate speaks, as front ends name it in their key `protocol`.
pub const PROTOCOL: &str = "x86_64-abi";

/// The protocol of 32-bit guests, whose slots are laid out differently.
const PROTOCOL_32: &str = "x86_32-abi";

/// Why a front end's protocol is not spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadProtocol {
    /// The front end is a 32-bit kernel.
    Narrow,
    /// Nothing we know.
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

/// Judges the value of a front end's key `protocol`. A front end without the key speaks ours.
///
/// # Errors
/// It speaks another.
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
