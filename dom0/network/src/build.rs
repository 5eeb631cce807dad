//! Frames that dom0 sends of its own: ARP, UDP and ICMP in IPv4.
//!
//! Guarantees: a frame is whole or is not made; its checksums are right.

use crate::bytes::put16;
use crate::checksum::{complement, sum};
use crate::headers::{ether_type, protocol};
use crate::{MIN_FRAME, Mac};
use core::net::Ipv4Addr;

/// Bytes of an IPv4 header without options.
pub(crate) const IP_HEADER: usize = 20;

/// Room for a frame that is written from its start to its end.
pub(crate) struct Frame {
    bytes: [u8; Self::ROOM],
    length: usize,
}

impl Frame {
    /// Holds a DHCP message in 576 bytes of IPv4, and an echo with as much.
    const ROOM: usize = 640;

    pub(crate) const fn new() -> Self {
        Self { bytes: [0; Self::ROOM], length: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or(&[])
    }

    pub(crate) const fn length(&self) -> usize {
        self.length
    }

    /// Appends bytes. Returns `None` if they do not fit.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Option<()> {
        let end = self.length + bytes.len();
        self.bytes.get_mut(self.length..end)?.copy_from_slice(bytes);
        self.length = end;
        Some(())
    }

    /// Appends zeroes until the frame has `length` bytes.
    pub(crate) fn pad(&mut self, length: usize) {
        self.length = self.length.max(length.min(Self::ROOM));
    }

    fn ethernet(&mut self, from: Mac, to: Mac, ether_type: u16) -> Option<()> {
        self.push(&to.0)?;
        self.push(&from.0)?;
        self.push(&ether_type.to_be_bytes())
    }

    /// Begins a frame with Ethernet and IPv4 headers. [`finish_ipv4`](Self::finish_ipv4) fills in length and checksum.
    pub(crate) fn ipv4(from: (Mac, Ipv4Addr), to: (Mac, Ipv4Addr), protocol: u8) -> Option<Self> {
        let mut frame = Self::new();
        frame.ethernet(from.0, to.0, ether_type::IPV4)?;
        // No options; may not be fragmented; 64 hops.
        frame.push(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0])?;
        frame.push(&from.1.octets())?;
        frame.push(&to.1.octets())?;
        Some(frame)
    }

    fn finish_ipv4(&mut self) -> Option<()> {
        let total = u16::try_from(self.length - MIN_FRAME).ok()?;
        put16(&mut self.bytes, MIN_FRAME + 2, total)?;
        let checksum = !sum(self.bytes.get(MIN_FRAME..MIN_FRAME + IP_HEADER)?, 0);
        put16(&mut self.bytes, MIN_FRAME + 10, checksum)
    }

    /// Begins a UDP datagram in IPv4.
    pub(crate) fn udp(from: (Mac, Ipv4Addr, u16), to: (Mac, Ipv4Addr, u16)) -> Option<Self> {
        let mut frame = Self::ipv4((from.0, from.1), (to.0, to.1), protocol::UDP)?;
        frame.push(&from.2.to_be_bytes())?;
        frame.push(&to.2.to_be_bytes())?;
        frame.push(&[0; 4])?;
        Some(frame)
    }

    /// Fills in the lengths and checksums of a UDP datagram.
    pub(crate) fn finish_udp(&mut self) -> Option<()> {
        self.finish_ipv4()?;
        let at = MIN_FRAME + IP_HEADER;
        let length = u16::try_from(self.length - at).ok()?;
        put16(&mut self.bytes, at + 4, length)?;
        let pseudo = sum(self.bytes.get(MIN_FRAME + 12..at)?, u16::from(protocol::UDP));
        let pseudo = crate::checksum::add(pseudo, length);
        let checksum = complement(sum(self.bytes().get(at..)?, pseudo), true);
        put16(&mut self.bytes, at + 6, checksum)
    }

    /// Fills in the lengths and checksums of an ICMP message, whose own checksum is zero so far.
    pub(crate) fn finish_icmp(&mut self) -> Option<()> {
        self.finish_ipv4()?;
        let at = MIN_FRAME + IP_HEADER;
        let checksum = !sum(self.bytes().get(at..)?, 0);
        put16(&mut self.bytes, at + 2, checksum)
    }

    /// Makes an ARP packet. `operation` is 1 for a question, 2 for an answer.
    pub(crate) fn arp(operation: u16, from: (Mac, Ipv4Addr), to: (Mac, Ipv4Addr), destination: Mac) -> Option<Self> {
        let mut frame = Self::new();
        frame.ethernet(from.0, destination, ether_type::ARP)?;
        frame.push(&[0, 1, 8, 0, 6, 4])?;
        frame.push(&operation.to_be_bytes())?;
        frame.push(&from.0.0)?;
        frame.push(&from.1.octets())?;
        frame.push(&to.0.0)?;
        frame.push(&to.1.octets())?;
        frame.pad(60);
        Some(frame)
    }
}
