//! Addresses and ports of an IPv4 packet replaced in place, with every checksum kept as right, or as wrong, as it was.
//!
//! A checksum changes by the difference between the old and the new numbers (RFC 1624). So a packet is never summed, and a
//! blank checksum stays blank: the field holds the sum of the pseudo header, in which addresses are and ports are not.

use crate::Checksum;
use crate::bytes::{array, be16, byte, put, put16};
use crate::checksum::add;
use crate::headers::{Ipv4, L4, protocol};
use core::net::Ipv4Addr;

/// Which end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// What an end becomes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) end: End,
    pub(crate) address: Ipv4Addr,
    /// The port, or the number of an echo. Parts of a packet other than the first have none.
    pub(crate) port: u16,
    /// The number of the packet, if it gets another one.
    pub(crate) id: Option<u16>,
}

/// The difference between numbers, as a ones'-complement sum.
#[derive(Clone, Copy, Default)]
struct Difference(u16);

impl Difference {
    fn replace(&mut self, old: u16, new: u16) {
        self.0 = add(self.0, add(!old, new));
    }

    fn replace_address(&mut self, old: [u8; 4], new: [u8; 4]) {
        let halves = |[a, b, c, d]: [u8; 4]| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let (old, new) = (halves(old), halves(new));
        self.replace(old.0, new.0);
        self.replace(old.1, new.1);
    }

    /// Returns what a checksum becomes.
    const fn checksum(self, old: u16) -> u16 {
        !add(!old, self.0)
    }
}

/// Replaces an end of a packet, and takes one hop from the packet's count. Returns `None` if the headers are not the frame's;
/// the frame may be half changed then.
pub(crate) fn rewrite(frame: &mut [u8], ip: &Ipv4, change: &Change, checksum: Checksum) -> Option<()> {
    let new = change.address.octets();
    let address_at = ip.at + if change.end == End::Source { 12 } else { 16 };
    let old: [u8; 4] = array(frame, address_at)?;
    put(frame, address_at, new)?;
    let mut addresses = Difference::default();
    addresses.replace_address(old, new);

    let mut header = addresses;
    let hops = be16(frame, ip.at + 8)?;
    let fewer = hops.checked_sub(0x100)?;
    put16(frame, ip.at + 8, fewer)?;
    header.replace(hops, fewer);
    if let Some(id) = change.id {
        header.replace(be16(frame, ip.at + 4)?, id);
        put16(frame, ip.at + 4, id)?;
    }
    let old = be16(frame, ip.at + 10)?;
    put16(frame, ip.at + 10, header.checksum(old))?;

    let Some(transport) = ip.transport else { return Some(()) };
    let port_at = transport.at
        + match (transport.protocol, change.end) {
            (L4::Icmp { .. } | L4::Icmp6 { .. }, _) => 4,
            (_, End::Source) => 0,
            (_, End::Destination) => 2,
        };
    let mut ports = Difference::default();
    ports.replace(be16(frame, port_at)?, change.port);
    put16(frame, port_at, change.port)?;
    let field = be16(frame, transport.checksum_at())?;
    let udp = matches!(transport.protocol, L4::Udp { .. });
    let new = match (transport.protocol, checksum) {
        (L4::Tcp { .. } | L4::Udp { .. }, Checksum::Blank) => add(field, addresses.0),
        // The sender computed no checksum.
        (L4::Udp { .. }, _) if field == 0 => 0,
        (L4::Tcp { .. } | L4::Udp { .. }, _) => match Difference(add(addresses.0, ports.0)).checksum(field) {
            0 if udp => 0xffff,
            new => new,
        },
        // ICMP covers no addresses.
        _ => ports.checksum(field),
    };
    put16(frame, transport.checksum_at(), new)
}

/// The packet within an ICMP error: the beginning of one that its receiver's side had sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inner {
    at: usize,
    port_at: usize,
    pub(crate) protocol: u8,
    pub(crate) source: Ipv4Addr,
    pub(crate) source_port: u16,
    pub(crate) destination: Ipv4Addr,
    pub(crate) destination_port: u16,
}

/// Returns the packet that an ICMP error at `at` is about. `None` if it has no ports, or too little of it is there.
pub(crate) fn inner(frame: &[u8], at: usize) -> Option<Inner> {
    let at = at + 8;
    let first = byte(frame, at)?;
    let header = usize::from(first & 0xf) * 4;
    let part = be16(frame, at + 6)? & 0x1fff;
    if first >> 4 != 4 || header < 20 || part != 0 {
        return None;
    }
    let (protocol, ports) = (byte(frame, at + 9)?, at + header);
    let (port_at, source_port, destination_port) = match protocol {
        protocol::TCP | protocol::UDP => (ports, be16(frame, ports)?, be16(frame, ports + 2)?),
        // An echo request: its number stands for the port.
        protocol::ICMP if byte(frame, ports)? == 8 => (ports + 4, be16(frame, ports + 4)?, 0),
        _ => return None,
    };
    Some(Inner {
        at,
        port_at,
        protocol,
        source: array::<4>(frame, at + 12)?.into(),
        source_port,
        destination: array::<4>(frame, at + 16)?.into(),
        destination_port,
    })
}

/// Replaces an end of the packet within an ICMP error. The error's own checksum is the caller's.
pub(crate) fn rewrite_inner(frame: &mut [u8], inner: &Inner, change: &Change) -> Option<()> {
    let (address_at, port_at) = match change.end {
        End::Source => (inner.at + 12, inner.port_at),
        End::Destination => (inner.at + 16, inner.port_at + 2),
    };
    let mut addresses = Difference::default();
    addresses.replace_address(array(frame, address_at)?, change.address.octets());
    put(frame, address_at, change.address.octets())?;
    let old = be16(frame, inner.at + 10)?;
    put16(frame, inner.at + 10, addresses.checksum(old))?;
    put16(frame, port_at, change.port)
}
