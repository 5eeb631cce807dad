//! TCP segments out of a frame that stands for several.
//!
//! Touches: the frame and the buffer, which the caller passes.
//! Guarantees: each segment's headers are right by themselves, its checksums among them; the payloads of the segments, one
//! after the other, are the frame's; there are at most as many segments as [`MIN_SEGMENT`] bytes go into the payload.

use crate::bytes::{array, be16, be32, put, put16};
use crate::checksum::{add, sum};
use crate::headers::{Headers, Ipv4, Ipv6, Kind, L4, Transport, protocol};
use crate::{Protocol, Segmentation};
use core::fmt;

/// The minimum payload of a segment, in bytes.
pub const MIN_SEGMENT: u16 = 48;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Why a frame cannot be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotCut {
    /// The frame does not carry TCP over the stated version of IP.
    Protocol,
    /// The frame is a fragment already.
    Fragment,
    /// A routing header names further destinations, so the pseudo header is another.
    Routed,
    /// The frame begins or breaks off a connection: such a segment stands alone.
    Flags,
    /// The IP packet and the frame differ in length, or the headers are another frame's.
    Length,
    /// The stated size of segments is below [`MIN_SEGMENT`] or above what the frame has.
    Size,
    /// A segment does not fit the buffer.
    Buffer,
}

impl fmt::Display for CannotCut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Protocol => "the frame to be cut does not carry the stated kind of TCP",
            Self::Fragment => "the frame to be cut is a fragment",
            Self::Routed => "the frame to be cut has a routing header with further destinations",
            Self::Flags => "the frame to be cut begins or breaks off a connection",
            Self::Length => "the frame to be cut and its packet differ in length",
            Self::Size => "the size of segments is below 48 bytes or above the frame's length",
            Self::Buffer => "a segment does not fit the buffer",
        })
    }
}

/// The segments of a frame, one after the other.
#[derive(Debug)]
pub struct Cut<'a> {
    /// The payload that is left.
    payload: &'a [u8],
    /// The headers, and room for a payload after them.
    buffer: &'a mut [u8],
    size: usize,
    /// Offset of the IP header.
    ip: usize,
    version: Protocol,
    tcp: usize,
    /// Offset of the payload.
    data: usize,
    /// The sum of the pseudo header without the length.
    pseudo: u16,
    id: u16,
    sequence: u32,
    flags: u8,
    first: bool,
    ended: bool,
}

impl<'a> Cut<'a> {
    /// Begins to cut `frame` into segments, each of which is made in `buffer`.
    ///
    /// # Errors
    /// Says why the frame cannot be cut.
    pub fn new(frame: &'a [u8], headers: &Headers, how: Segmentation, buffer: &'a mut [u8]) -> Result<Self, CannotCut> {
        let (ip, end, fragment, transport, addresses) = match (headers.kind, how.protocol) {
            (Kind::Ipv4(Ipv4 { at, end, fragment, transport, .. }), Protocol::Tcp4) => {
                (at, end, fragment, transport, at + 12..at + 20)
            }
            (Kind::Ipv6(Ipv6 { routed: true, .. }), Protocol::Tcp6) => return Err(CannotCut::Routed),
            (Kind::Ipv6(Ipv6 { at, end, fragment, transport, .. }), Protocol::Tcp6) => {
                (at, end, fragment, transport, at + 8..at + 40)
            }
            _ => return Err(CannotCut::Protocol),
        };
        if fragment.is_some() {
            return Err(CannotCut::Fragment);
        }
        let Some(Transport { protocol: L4::Tcp { header, .. }, at: tcp, .. }) = transport else {
            return Err(CannotCut::Protocol);
        };
        if end != frame.len() || headers.length != frame.len() {
            return Err(CannotCut::Length);
        }
        let size = usize::from(how.bytes);
        if how.bytes < MIN_SEGMENT || size > frame.len() {
            return Err(CannotCut::Size);
        }
        let data = tcp + header;
        let (head, payload) = frame.split_at_checked(data).ok_or(CannotCut::Length)?;
        let read = || Some((be16(head, ip + 4)?, be32(head, tcp + 4)?, *head.get(tcp + 13)?, head.get(addresses)?));
        let (id, sequence, flags, addresses) = read().ok_or(CannotCut::Length)?;
        if flags & (SYN | RST) != 0 {
            return Err(CannotCut::Flags);
        }
        let pseudo = sum(addresses, u16::from(protocol::TCP));
        if buffer.len() < data + size.min(payload.len()) {
            return Err(CannotCut::Buffer);
        }
        buffer.get_mut(..data).ok_or(CannotCut::Buffer)?.copy_from_slice(head);
        Ok(Self {
            payload,
            buffer,
            size,
            ip,
            version: how.protocol,
            tcp,
            data,
            pseudo,
            id,
            sequence,
            flags,
            first: true,
            ended: false,
        })
    }

    /// Returns how many segments are left.
    #[must_use]
    pub fn left(&self) -> usize {
        if self.ended { 0 } else { self.payload.len().div_ceil(self.size).max(1) }
    }

    /// Makes the next segment. Returns the frame; `None` if there is no further one.
    pub fn next_segment(&mut self) -> Option<&[u8]> {
        if self.ended {
            return None;
        }
        let (now, left) = self.payload.split_at_checked(self.size).unwrap_or((self.payload, &[]));
        let last = left.is_empty();
        let end = self.data + now.len();
        let frame = self.buffer.get_mut(..end)?;
        frame.get_mut(self.data..)?.copy_from_slice(now);
        match self.version {
            Protocol::Tcp4 => {
                put16(frame, self.ip + 2, u16::try_from(end - self.ip).ok()?)?;
                put16(frame, self.ip + 4, self.id)?;
                put16(frame, self.ip + 10, 0)?;
                let checksum = !sum(frame.get(self.ip..self.ip + header_bytes(frame, self.ip)?)?, 0);
                put16(frame, self.ip + 10, checksum)?;
            }
            Protocol::Tcp6 => put16(frame, self.ip + 4, u16::try_from(end - self.ip - 40).ok()?)?,
        }
        let mut flags = self.flags;
        if !last {
            flags &= !(FIN | PSH);
        }
        if !self.first {
            flags &= !CWR;
        }
        put(frame, self.tcp + 4, self.sequence.to_be_bytes())?;
        put(frame, self.tcp + 13, [flags])?;
        put16(frame, self.tcp + 16, 0)?;
        let pseudo = add(self.pseudo, u16::try_from(end - self.tcp).ok()?);
        let checksum = !sum(frame.get(self.tcp..)?, pseudo);
        put16(frame, self.tcp + 16, checksum)?;
        self.sequence = self.sequence.wrapping_add(u32::try_from(now.len()).ok()?);
        self.id = self.id.wrapping_add(1);
        (self.payload, self.first, self.ended) = (left, false, last);
        self.buffer.get(..end)
    }
}

/// Returns the bytes of the IPv4 header at `at`.
fn header_bytes(frame: &[u8], at: usize) -> Option<usize> {
    array::<1>(frame, at).map(|[first]| usize::from(first & 0xf) * 4)
}
