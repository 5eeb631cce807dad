//! What the headers of a frame say: addresses, and where things are.
//!
//! Touches: the first bytes of a frame, which the caller passes.
//! Guarantees: every offset in [`Headers`] lies within the frame's length, and headers come in their order; at most
//! [`MAX_EXTENSIONS`] extension headers are followed; nothing is read twice.

use crate::bytes::{array, be16, byte};
use crate::{MIN_FRAME, Mac};
use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};

/// As many first bytes of a frame hold the headers of ordinary frames.
pub const HEADER_BYTES: usize = 256;

/// The maximum number of IPv6 extension headers that are followed.
const MAX_EXTENSIONS: usize = 8;

/// The EtherTypes that are known here.
pub(crate) mod ether_type {
    pub(crate) const IPV4: u16 = 0x0800;
    pub(crate) const ARP: u16 = 0x0806;
    pub(crate) const VLAN: u16 = 0x8100;
    pub(crate) const IPV6: u16 = 0x86dd;
}

/// The numbers of IP's protocols that are known here.
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ICMP6: u8 = 58;
}

/// The headers of a frame. Offsets and lengths are in bytes, offsets from the frame's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Where the frame goes.
    pub destination: Mac,
    /// Who sent it.
    pub source: Mac,
    /// The VLAN tag: priority and number. `None` if the frame has no tag.
    pub vlan: Option<u16>,
    /// What the frame carries.
    pub kind: Kind,
    /// The frame's length.
    pub length: usize,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A question or answer about an IPv4 address.
    Arp(Arp),
    /// An IPv4 packet, or a fragment of one.
    Ipv4(Ipv4),
    /// An IPv6 packet, or a fragment of one.
    Ipv6(Ipv6),
    /// Headers that contradict the frame's length or each other. A switch may pass on such a frame, and nobody may change it.
    Malformed(Malformed),
    /// Another EtherType.
    Other(u16),
}

/// An ARP packet about IPv4 on Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 asks, 2 answers.
    pub operation: u16,
    /// The sender's Ethernet address, as the packet states it.
    pub sender_mac: Mac,
    /// The sender's address. 0.0.0.0 probes whether the target is in use.
    pub sender: Ipv4Addr,
    /// The address that is asked for.
    pub target: Ipv4Addr,
}

/// An IPv4 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// Who sent the packet.
    pub source: Ipv4Addr,
    /// Where the packet goes.
    pub destination: Ipv4Addr,
    /// The number of the protocol above.
    pub protocol: u8,
    /// Offset of the header.
    pub at: usize,
    /// Bytes of the header with its options.
    pub header: usize,
    /// Offset of the packet's end. The frame may be longer.
    pub end: usize,
    /// Which part of a packet this is. `None` if the packet is whole.
    pub fragment: Option<Fragment>,
    /// The header above. `None` if the protocol is not known here, or if this is a fragment other than the first.
    pub transport: Option<Transport>,
}

/// An IPv6 header and its extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6 {
    /// Who sent the packet.
    pub source: Ipv6Addr,
    /// Where the packet goes next.
    pub destination: Ipv6Addr,
    /// The number of the protocol above the extension headers.
    pub protocol: u8,
    /// Offset of the header.
    pub at: usize,
    /// Bytes of the header with its extension headers.
    pub header: usize,
    /// Offset of the packet's end. The frame may be longer.
    pub end: usize,
    /// Which part of a packet this is. `None` if the packet is whole.
    pub fragment: Option<Fragment>,
    /// Whether a routing header names further destinations: the pseudo header has the last of them.
    pub routed: bool,
    /// The header above. `None` if the protocol is not known here, or if this is a fragment other than the first.
    pub transport: Option<Transport>,
}

/// A part of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The packet's number, the same in all of its fragments.
    pub id: u32,
    /// Where in the packet's payload this part begins, in bytes.
    pub offset: u16,
    /// Whether further parts follow.
    pub more: bool,
}

/// The header of TCP, UDP or ICMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    /// Which protocol, and what tells its flows apart.
    pub protocol: L4,
    /// Offset of the header.
    pub at: usize,
    /// Offset of the end of what the checksum covers.
    pub end: usize,
}

/// A protocol above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP.
    Tcp {
        /// The sender's port.
        source: u16,
        /// The receiver's port.
        destination: u16,
        /// Bytes of the header with its options.
        header: usize,
    },
    /// UDP.
    Udp {
        /// The sender's port.
        source: u16,
        /// The receiver's port.
        destination: u16,
    },
    /// ICMP for IPv4.
    Icmp {
        /// The type of the message.
        kind: u8,
    },
    /// ICMP for IPv6.
    Icmp6 {
        /// The type of the message.
        kind: u8,
    },
}

impl Transport {
    /// Returns the offset of the checksum.
    #[must_use]
    pub const fn checksum_at(&self) -> usize {
        self.at
            + match self.protocol {
                L4::Tcp { .. } => 16,
                L4::Udp { .. } => 6,
                L4::Icmp { .. } | L4::Icmp6 { .. } => 2,
            }
    }
}

/// How headers contradict the frame's length or each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The frame is shorter than an Ethernet header.
    Frame,
    /// The VLAN tag is cut off.
    Vlan,
    /// The ARP packet is cut off, or is not about IPv4 on Ethernet.
    Arp,
    /// The IPv4 header is cut off, or states another version or an impossible length.
    Ipv4Header,
    /// The IPv4 packet is longer than the frame or shorter than its header.
    Ipv4Length,
    /// The IPv6 header is cut off, or states another version.
    Ipv6Header,
    /// The IPv6 packet is longer than the frame.
    Ipv6Length,
    /// The extension headers are too many, or end beyond the first bytes of the frame.
    Extensions,
    /// A fragment ends beyond the longest packet.
    Fragment,
    /// The TCP header is cut off or states an impossible length.
    Tcp,
    /// The UDP header is cut off or states an impossible length.
    Udp,
    /// The ICMP header is cut off.
    Icmp,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Frame => "the frame is shorter than an Ethernet header",
            Self::Vlan => "the VLAN tag is cut off",
            Self::Arp => "the ARP packet is cut off or is not about IPv4 on Ethernet",
            Self::Ipv4Header => "the IPv4 header is cut off or has a wrong version or length",
            Self::Ipv4Length => "the IPv4 packet does not fit the frame",
            Self::Ipv6Header => "the IPv6 header is cut off or has a wrong version",
            Self::Ipv6Length => "the IPv6 packet does not fit the frame",
            Self::Extensions => "the IPv6 extension headers are too many or too long",
            Self::Fragment => "the fragment ends beyond the longest packet",
            Self::Tcp => "the TCP header is cut off or has a wrong length",
            Self::Udp => "the UDP header is cut off or has a wrong length",
            Self::Icmp => "the ICMP header is cut off",
        })
    }
}

impl Headers {
    /// Parses the headers of a frame of `length` bytes. `first_bytes` is the frame's beginning, of [`HEADER_BYTES`] or more
    /// where the frame has as many. Headers that contradict each other are no error but [`Kind::Malformed`].
    ///
    /// # Errors
    /// [`Malformed::Frame`]: the frame is shorter than an Ethernet header.
    pub fn parse(first_bytes: &[u8], length: usize) -> Result<Self, Malformed> {
        if let Some(headers) = plain_tcp(first_bytes, length) {
            return Ok(headers);
        }
        let bytes = first_bytes.get(..length).unwrap_or(first_bytes);
        let ethernet: &[u8; MIN_FRAME] = bytes.first_chunk().ok_or(Malformed::Frame)?;
        let &[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = ethernet;
        let (mut ether_type, mut at, mut vlan) = (u16::from_be_bytes([t0, t1]), MIN_FRAME, None);
        let kind = if ether_type == ether_type::VLAN {
            vlan = be16(bytes, at);
            match be16(bytes, at + 2) {
                Some(inner) => {
                    (ether_type, at) = (inner, at + 4);
                    None
                }
                None => Some(Kind::Malformed(Malformed::Vlan)),
            }
        } else {
            None
        };
        let kind = kind.unwrap_or_else(|| parse_kind(bytes, length, at, ether_type).unwrap_or_else(Kind::Malformed));
        Ok(Self {
            destination: Mac([d0, d1, d2, d3, d4, d5]),
            source: Mac([s0, s1, s2, s3, s4, s5]),
            vlan,
            kind,
            length,
        })
    }

    /// Returns the header above IP, and which part of a packet the frame carries. `None` if the frame carries no header above
    /// IP that is known here.
    #[must_use]
    pub const fn transport(&self) -> Option<(Transport, Option<Fragment>)> {
        match self.kind {
            Kind::Ipv4(Ipv4 { transport: Some(transport), fragment, .. })
            | Kind::Ipv6(Ipv6 { transport: Some(transport), fragment, .. }) => Some((transport, fragment)),
            _ => None,
        }
    }
}

/// Parses the commonest frame: TCP over IPv4 with neither tag nor options of IPv4. Returns `None` for any other frame; the
/// general way judges those.
fn plain_tcp(first_bytes: &[u8], length: usize) -> Option<Headers> {
    let b: &[u8; 54] = first_bytes.first_chunk()?;
    // EtherType, version and header length; not a fragment; the protocol.
    if (b[12], b[13], b[14]) != (0x08, 0x00, 0x45) || b[20] & 0xbf != 0 || b[21] != 0 || b[23] != protocol::TCP {
        return None;
    }
    let end = MIN_FRAME + usize::from(u16::from_be_bytes([b[16], b[17]]));
    let header = usize::from(b[46] >> 4) * 4;
    if end > length || header < 20 || 34 + header > end {
        return None;
    }
    let tcp =
        L4::Tcp { source: u16::from_be_bytes([b[34], b[35]]), destination: u16::from_be_bytes([b[36], b[37]]), header };
    Some(Headers {
        destination: Mac([b[0], b[1], b[2], b[3], b[4], b[5]]),
        source: Mac([b[6], b[7], b[8], b[9], b[10], b[11]]),
        vlan: None,
        kind: Kind::Ipv4(Ipv4 {
            source: Ipv4Addr::new(b[26], b[27], b[28], b[29]),
            destination: Ipv4Addr::new(b[30], b[31], b[32], b[33]),
            protocol: protocol::TCP,
            at: MIN_FRAME,
            header: 20,
            end,
            fragment: None,
            transport: Some(Transport { protocol: tcp, at: 34, end }),
        }),
        length,
    })
}

fn parse_kind(bytes: &[u8], length: usize, at: usize, ether_type: u16) -> Result<Kind, Malformed> {
    match ether_type {
        ether_type::ARP => parse_arp(bytes, at).ok_or(Malformed::Arp).map(Kind::Arp),
        ether_type::IPV4 => parse_ipv4(bytes, length, at).map(Kind::Ipv4),
        ether_type::IPV6 => parse_ipv6(bytes, length, at).map(Kind::Ipv6),
        other => Ok(Kind::Other(other)),
    }
}

fn parse_arp(bytes: &[u8], at: usize) -> Option<Arp> {
    // Hardware 1 (Ethernet), protocol IPv4, and the lengths of their addresses.
    if array(bytes, at)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    // The last field, the target, is at 24.
    Some(Arp {
        operation: be16(bytes, at + 6)?,
        sender_mac: Mac(array(bytes, at + 8)?),
        sender: array::<4>(bytes, at + 14)?.into(),
        target: array::<4>(bytes, at + 24)?.into(),
    })
}

fn parse_ipv4(bytes: &[u8], length: usize, at: usize) -> Result<Ipv4, Malformed> {
    let fixed: [u8; 20] = array(bytes, at).ok_or(Malformed::Ipv4Header)?;
    let [first, _, l0, l1, i0, i1, f0, f1, _, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3] = fixed;
    let header = usize::from(first & 0xf) * 4;
    if first >> 4 != 4 || header < 20 || bytes.len() < at + header {
        return Err(Malformed::Ipv4Header);
    }
    let total = usize::from(u16::from_be_bytes([l0, l1]));
    let end = at + total;
    if total < header || end > length {
        return Err(Malformed::Ipv4Length);
    }
    let fragment = u16::from_be_bytes([f0, f1]);
    let (more, offset) = (fragment & 0x2000 != 0, (fragment & 0x1fff) << 3);
    let fragment =
        (more || offset != 0).then(|| Fragment { id: u32::from(u16::from_be_bytes([i0, i1])), offset, more });
    let transport = parse_transport(bytes, at + header, end, protocol, fragment)?;
    Ok(Ipv4 {
        source: [s0, s1, s2, s3].into(),
        destination: [d0, d1, d2, d3].into(),
        protocol,
        at,
        header,
        end,
        fragment,
        transport,
    })
}

fn parse_ipv6(bytes: &[u8], length: usize, at: usize) -> Result<Ipv6, Malformed> {
    let [first, _, _, _, l0, l1, mut next, _] = array(bytes, at).ok_or(Malformed::Ipv6Header)?;
    let source: [u8; 16] = array(bytes, at + 8).ok_or(Malformed::Ipv6Header)?;
    let destination: [u8; 16] = array(bytes, at + 24).ok_or(Malformed::Ipv6Header)?;
    if first >> 4 != 6 {
        return Err(Malformed::Ipv6Header);
    }
    let end = at + 40 + usize::from(u16::from_be_bytes([l0, l1]));
    if end > length {
        return Err(Malformed::Ipv6Length);
    }
    let (mut header, mut fragment, mut routed, mut followed) = (40, None, false, 0);
    // Hop-by-hop options, routing, fragment, authentication, destination options.
    while matches!(next, 0 | 43 | 44 | 51 | 60) && fragment.is_none_or(|fragment: Fragment| fragment.offset == 0) {
        let here = at + header;
        let [following, size, b2, b3, i0, i1, i2, i3] = array(bytes, here).ok_or(Malformed::Extensions)?;
        let size = match next {
            44 => 8,
            51 => (usize::from(size) + 2) * 4,
            _ => (usize::from(size) + 1) * 8,
        };
        followed += 1;
        header += size;
        if followed > MAX_EXTENSIONS || at + header > end || at + header > bytes.len() {
            return Err(Malformed::Extensions);
        }
        if next == 44 {
            let field = u16::from_be_bytes([b2, b3]);
            // A packet that is its only fragment is whole.
            if field & 0xfff9 != 0 {
                let id = u32::from_be_bytes([i0, i1, i2, i3]);
                fragment = Some(Fragment { id, offset: field & 0xfff8, more: field & 1 != 0 });
            }
        }
        routed |= next == 43 && b3 != 0;
        next = following;
    }
    let transport = parse_transport(bytes, at + header, end, next, fragment)?;
    Ok(Ipv6 {
        source: source.into(),
        destination: destination.into(),
        protocol: next,
        at,
        header,
        end,
        fragment,
        routed,
        transport,
    })
}

fn parse_transport(
    bytes: &[u8],
    at: usize,
    end: usize,
    number: u8,
    fragment: Option<Fragment>,
) -> Result<Option<Transport>, Malformed> {
    if let Some(fragment) = fragment {
        if usize::from(fragment.offset) + (end - at) > crate::MAX_PACKET {
            return Err(Malformed::Fragment);
        }
        if fragment.offset != 0 {
            return Ok(None);
        }
    }
    // What lies beyond the packet's end is padding.
    let bytes = bytes.get(..end).unwrap_or(bytes);
    let ports = || Some((be16(bytes, at)?, be16(bytes, at + 2)?));
    let (protocol, end) = match number {
        protocol::TCP => {
            let (source, destination) = ports().ok_or(Malformed::Tcp)?;
            let header = usize::from(byte(bytes, at + 12).ok_or(Malformed::Tcp)? >> 4) * 4;
            if header < 20 || at + header > end || at + 20 > bytes.len() {
                return Err(Malformed::Tcp);
            }
            (L4::Tcp { source, destination, header }, end)
        }
        protocol::UDP => {
            let (source, destination) = ports().ok_or(Malformed::Udp)?;
            let size = usize::from(be16(bytes, at + 4).ok_or(Malformed::Udp)?);
            // The length is the whole packet's, of which a fragment has only a part.
            let fits = fragment.is_some() || at + size <= end;
            if size < 8 || at + 8 > bytes.len() || !fits {
                return Err(Malformed::Udp);
            }
            (L4::Udp { source, destination }, end.min(at + size))
        }
        protocol::ICMP | protocol::ICMP6 => {
            let kind = array::<4>(bytes, at).ok_or(Malformed::Icmp)?[0];
            (if number == protocol::ICMP { L4::Icmp { kind } } else { L4::Icmp6 { kind } }, end)
        }
        _ => return Ok(None),
    };
    Ok(Some(Transport { protocol, at, end }))
}
