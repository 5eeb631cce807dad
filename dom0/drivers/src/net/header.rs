//! The header that accompanies each frame (V 5.1.6), and what the frame must be for the header to make sense.

use super::config::{Limits, feature};
use network::{Checksum, FrameInfo, Headers, Kind, L4, MIN_FRAME, Protocol, Segmentation};

/// Bytes of the header.
pub(super) const BYTES: usize = 12;
/// In the flags: the checksum is not computed; it has been verified.
const NEEDS_CHECKSUM: u8 = 1;
const VERIFIED: u8 = 2;
/// How a frame is cut.
const NOT: u8 = 0;
const TCP4: u8 = 1;
const TCP6: u8 = 4;
/// The least payload of a segment.
const LEAST_SEGMENT: u16 = 48;

/// The header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    flags: u8,
    cut: u8,
    /// Bytes before the payload.
    headers: u16,
    /// Bytes of payload in a segment.
    segment: u16,
    /// Where the bytes begin that are summed up, and where among these the checksum is.
    start: u16,
    field: u16,
    /// How many receive buffers the frame has.
    pub(super) buffers: u16,
}

impl Header {
    pub(super) const fn from_bytes(bytes: [u8; BYTES]) -> Self {
        let [flags, cut, a, b, c, d, e, f, g, h, i, j] = bytes;
        Self {
            flags,
            cut,
            headers: u16::from_le_bytes([a, b]),
            segment: u16::from_le_bytes([c, d]),
            start: u16::from_le_bytes([e, f]),
            field: u16::from_le_bytes([g, h]),
            buffers: u16::from_le_bytes([i, j]),
        }
    }

    pub(super) const fn to_bytes(self) -> [u8; BYTES] {
        let [a, b] = self.headers.to_le_bytes();
        let [c, d] = self.segment.to_le_bytes();
        let [e, f] = self.start.to_le_bytes();
        let [g, h] = self.field.to_le_bytes();
        let [i, j] = self.buffers.to_le_bytes();
        [self.flags, self.cut, a, b, c, d, e, f, g, h, i, j]
    }
}

/// Why a frame is dropped: its header and its bytes contradict each other, or the device did not offer what the frame needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// Returns the header for a frame to be sent.
///
/// # Errors
/// [`Malformed`]: the frame is too short; or the device cannot do what `info` asks for, with this frame or at all.
pub(super) fn outgoing(frame: &[u8], info: FrameInfo, limits: &Limits) -> Result<Header, Malformed> {
    if frame.len() < MIN_FRAME {
        return Err(Malformed);
    }
    let blank = info.checksum == Checksum::Blank;
    if !blank && info.segmentation.is_none() {
        return Ok(Header::default());
    }
    let transport = Transport::of(frame).filter(|_| blank && limits.has(feature::CSUM)).ok_or(Malformed)?;
    let mut header =
        Header { flags: NEEDS_CHECKSUM, start: transport.start, field: transport.field, ..Header::default() };
    if let Some(Segmentation { protocol, bytes }) = info.segmentation {
        let (cut, feature) = match protocol {
            Protocol::Tcp4 => (TCP4, feature::HOST_TSO4),
            Protocol::Tcp6 => (TCP6, feature::HOST_TSO6),
        };
        if transport.segments != Some(protocol) || !is_segment(bytes, frame) || !limits.has(feature) {
            return Err(Malformed);
        }
        (header.cut, header.segment, header.headers) = (cut, bytes, transport.payload);
    }
    Ok(header)
}

/// Returns what a header says of a frame that has arrived.
///
/// # Errors
/// [`Malformed`]: the frame is too short, the device did not offer what the header says, or the frame is not as the header
/// says.
pub(super) fn incoming(header: &Header, frame: &[u8], limits: &Limits) -> Result<FrameInfo, Malformed> {
    if frame.len() < MIN_FRAME {
        return Err(Malformed);
    }
    let judged = limits.has(feature::GUEST_CSUM);
    let blank = header.flags & NEEDS_CHECKSUM != 0;
    let checksum = match header.flags {
        _ if blank => Checksum::Blank,
        flags if judged && flags & VERIFIED != 0 => Checksum::Verified,
        _ => Checksum::Unverified,
    };
    if !blank {
        // Segments that are joined have no checksum (V 5.1.6.4.1).
        let whole = FrameInfo { checksum, segmentation: None };
        return if header.cut == NOT { Ok(whole) } else { Err(Malformed) };
    }
    let transport = Transport::of(frame).filter(|_| judged).ok_or(Malformed)?;
    if (header.start, header.field) != (transport.start, transport.field) {
        return Err(Malformed);
    }
    let (protocol, feature) = match header.cut {
        NOT => return Ok(FrameInfo { checksum, segmentation: None }),
        TCP4 => (Protocol::Tcp4, feature::GUEST_TSO4),
        TCP6 => (Protocol::Tcp6, feature::GUEST_TSO6),
        _ => return Err(Malformed),
    };
    if transport.segments != Some(protocol) || !is_segment(header.segment, frame) || !limits.has(feature) {
        return Err(Malformed);
    }
    Ok(FrameInfo { checksum, segmentation: Some(Segmentation { protocol, bytes: header.segment }) })
}

fn is_segment(bytes: u16, frame: &[u8]) -> bool {
    bytes >= LEAST_SEGMENT && usize::from(bytes) <= frame.len()
}

/// Where the TCP or UDP header of a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Transport {
    /// The offset of the header.
    start: u16,
    /// The offset of the checksum in the header.
    field: u16,
    /// The offset of the end of the header.
    payload: u16,
    /// As what the frame can be cut. `None` for UDP.
    segments: Option<Protocol>,
}

impl Transport {
    /// Finds the header. `None` if the frame is no whole TCP or UDP packet.
    fn of(frame: &[u8]) -> Option<Self> {
        let headers = Headers::parse(frame, frame.len()).ok()?;
        let (transport, None) = headers.transport()? else { return None };
        let protocol = if matches!(headers.kind, Kind::Ipv4(_)) { Protocol::Tcp4 } else { Protocol::Tcp6 };
        let (bytes, segments) = match transport.protocol {
            L4::Tcp { header, .. } => (header, Some(protocol)),
            L4::Udp { .. } => (8, None),
            L4::Icmp { .. } | L4::Icmp6 { .. } => return None,
        };
        let short = |offset: usize| u16::try_from(offset).ok();
        let (start, field) = (short(transport.at)?, short(transport.checksum_at() - transport.at)?);
        Some(Self { start, field, payload: short(transport.at + bytes)?, segments })
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{Limits, UNKNOWN};
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    const ALL: Limits = Limits { features: u64::MAX, ..UNKNOWN };
    const BLANK: FrameInfo = FrameInfo { checksum: Checksum::Blank, segmentation: None };

    /// A frame with 200 bytes of payload.
    fn frame(tag: bool, six: bool, number: u8) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(if tag { &[0x81, 0, 0, 7][..] } else { &[] });
        frame.extend(if six { [0x86, 0xdd] } else { [0x08, 0x00] });
        let mut packet = [0; 40];
        if six {
            (packet[0], packet[5], packet[6]) = (0x60, 200, number);
            frame.extend(packet);
        } else {
            (packet[0], packet[3], packet[9]) = (0x46, 224, number);
            frame.extend(&packet[..24]);
        }
        let mut transport = [0; 200];
        // The length of UDP, or the header's of TCP.
        transport[5] = 200;
        transport[12] = 0x80;
        frame.extend(transport);
        frame
    }

    fn cut(protocol: Protocol, bytes: u16) -> FrameInfo {
        FrameInfo { segmentation: Some(Segmentation { protocol, bytes }), ..BLANK }
    }

    #[test]
    fn a_header_is_read_as_it_is_written() {
        let header =
            Header { flags: 1, cut: 4, headers: 0x102, segment: 0x304, start: 0x506, field: 0x708, buffers: 0x90a };
        assert_eq!(header.to_bytes(), [1, 4, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9]);
        assert_eq!(Header::from_bytes(header.to_bytes()), header);
    }

    #[test]
    fn what_is_sent_is_understood_when_it_arrives() {
        for (tag, six) in [(false, false), (false, true), (true, false), (true, true)] {
            let start = 14 + if tag { 4 } else { 0 } + if six { 40 } else { 24 };
            let (own, other) = if six { (Protocol::Tcp6, Protocol::Tcp4) } else { (Protocol::Tcp4, Protocol::Tcp6) };
            let tcp = frame(tag, six, 6);
            let header = outgoing(&tcp, cut(own, 100), &ALL).unwrap();
            assert_eq!((header.start, header.field, header.headers, header.segment), (start, 16, start + 32, 100));
            assert_eq!(incoming(&header, &tcp, &ALL), Ok(cut(own, 100)));
            for wrong in [cut(other, 100), cut(own, 47), cut(own, 300), cut(own, 0)] {
                assert_eq!(outgoing(&tcp, wrong, &ALL), Err(Malformed));
            }
            let udp = frame(tag, six, 17);
            let header = outgoing(&udp, BLANK, &ALL).unwrap();
            assert_eq!((header.start, header.field, header.cut), (start, 6, NOT));
            assert_eq!(incoming(&header, &udp, &ALL), Ok(BLANK));
            assert_eq!(outgoing(&udp, cut(own, 100), &ALL), Err(Malformed));
            assert_eq!(outgoing(&frame(tag, six, 1), BLANK, &ALL), Err(Malformed));
        }
    }

    #[test]
    fn what_a_device_did_not_offer_is_neither_asked_for_nor_taken() {
        let tcp = frame(false, false, 6);
        let header = outgoing(&tcp, cut(Protocol::Tcp4, 100), &ALL).unwrap();
        let without = |feature: u64| Limits { features: !feature, ..UNKNOWN };
        for feature in [feature::CSUM, feature::HOST_TSO4] {
            assert_eq!(outgoing(&tcp, cut(Protocol::Tcp4, 100), &without(feature)), Err(Malformed));
        }
        assert_eq!(outgoing(&tcp, BLANK, &without(feature::CSUM)), Err(Malformed));
        assert!(outgoing(&tcp, BLANK, &without(feature::HOST_TSO4)).is_ok());
        assert_eq!(outgoing(&tcp, FrameInfo::default(), &UNKNOWN), Ok(Header::default()));
        let unsummed = FrameInfo { checksum: Checksum::Verified, ..cut(Protocol::Tcp4, 100) };
        assert_eq!(outgoing(&tcp, unsummed, &ALL), Err(Malformed));
        for feature in [feature::GUEST_CSUM, feature::GUEST_TSO4] {
            assert_eq!(incoming(&header, &tcp, &without(feature)), Err(Malformed));
        }
        let verified = Header { flags: VERIFIED, ..Header::default() };
        let checksum = |limits| incoming(&verified, &tcp, limits).map(|info| info.checksum);
        assert_eq!(checksum(&ALL), Ok(Checksum::Verified));
        assert_eq!(checksum(&without(feature::GUEST_CSUM)), Ok(Checksum::Unverified));
    }

    #[test]
    fn a_header_that_contradicts_its_frame_is_refused() {
        let tcp = frame(false, false, 6);
        let right = outgoing(&tcp, cut(Protocol::Tcp4, 100), &ALL).unwrap();
        for wrong in [
            Header { start: right.start + 1, ..right },
            Header { field: 6, ..right },
            Header { segment: 47, ..right },
            Header { segment: 239, ..right },
            Header { cut: TCP6, ..right },
            Header { cut: 3, ..right },
            Header { cut: TCP4 | 0x80, ..right },
            Header { flags: 0, ..right },
            Header { flags: VERIFIED, ..right },
        ] {
            assert_eq!(incoming(&wrong, &tcp, &ALL), Err(Malformed), "{wrong:?}");
        }
        assert!(incoming(&Header { segment: 238, ..right }, &tcp, &ALL).is_ok(), "the length of the frame");
        let change = |at: usize, value: u8| {
            let mut changed = tcp.clone();
            changed[at] = value;
            incoming(&right, &changed, &ALL)
        };
        for (at, value) in [(12, 9), (14, 0x56), (14, 0x44), (20, 0x20), (21, 1), (23, 17), (50, 0x40), (50, 0xf0)] {
            // A TCP header of 60 bytes fits the frame, but this header was made for one of 32.
            let fits = (at, value) == (50, 0xf0);
            assert_eq!(change(at, value).is_ok(), fits, "{at} {value}");
        }
        for length in 0..tcp.len() {
            let short = &tcp[..length];
            assert_eq!(incoming(&right, short, &ALL), Err(Malformed), "{length}");
            assert_eq!(incoming(&Header::default(), short, &ALL).is_ok(), length >= MIN_FRAME);
            assert_eq!(outgoing(short, BLANK, &ALL), Err(Malformed), "{length}");
        }
    }
}
