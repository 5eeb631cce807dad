//! What the first bytes of a packet say to the switch: where the packet goes, and whether the guest may send it. The bytes are a
//! private copy.

use core::net::Ipv4Addr;

use network::{MIN_FRAME, Mac};
use ring_protocol::net::GsoProtocol;

/// Ethernet types.
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const TAG: u16 = 0x8100;
const OUTER_TAG: u16 = 0x88a8;
/// Bytes of a VLAN tag.
const TAG_BYTES: usize = 4;
/// Bytes of an IPv6 header without extensions.
const IPV6_BYTES: usize = 40;
/// The maximum number of extension headers that are followed.
const EXTENSIONS: usize = 8;
/// The ports of DHCP.
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// IP protocols.
const UDP: u8 = 17;
const ICMP6: u8 = 58;
/// The type of a router advertisement.
const ROUTER_ADVERTISEMENT: u8 = 134;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Ipv4,
    Ipv6,
    Arp,
    Other,
}

/// The Ethernet header of a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    pub(crate) network: Network,
    /// Where the header after Ethernet's begins: after one VLAN tag, if there is one.
    at: usize,
}

impl Header {
    /// Parses the beginning of a frame. `None` if there is no Ethernet header.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let header: &[u8; MIN_FRAME] = bytes.first_chunk()?;
        let &[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = header;
        let (mut ether_type, mut at) = (u16::from_be_bytes([t0, t1]), MIN_FRAME);
        if ether_type == TAG || ether_type == OUTER_TAG {
            (ether_type, at) = (be16(bytes, MIN_FRAME + 2).unwrap_or(0), MIN_FRAME + TAG_BYTES);
        }
        let network = match ether_type {
            IPV4 => Network::Ipv4,
            IPV6 => Network::Ipv6,
            ARP => Network::Arp,
            _ => Network::Other,
        };
        Some(Self { destination: Mac([d0, d1, d2, d3, d4, d5]), source: Mac([s0, s1, s2, s3, s4, s5]), network, at })
    }

    fn is_tagged(&self) -> bool {
        self.at > MIN_FRAME
    }

    /// Returns whether a packet that is cut as `protocol` has that protocol's Ethernet type.
    pub(crate) fn fits(&self, protocol: GsoProtocol) -> bool {
        match protocol {
            GsoProtocol::Tcp4 => self.network == Network::Ipv4,
            GsoProtocol::Tcp6 => self.network == Network::Ipv6,
        }
    }

    /// Returns whether the vif with the address `mac` may send the frame that begins with `bytes`. With `address`, the guest has
    /// that IPv4 address alone.
    pub(crate) fn is_honest(&self, bytes: &[u8], mac: Mac, address: Option<Ipv4Addr>) -> bool {
        if self.source != mac || address.is_some() && self.is_tagged() {
            return false;
        }
        let rest = bytes.get(self.at..).unwrap_or_default();
        match self.network {
            Network::Arp => is_honest_arp(rest, mac, address),
            Network::Ipv4 => is_honest_ipv4(rest, address),
            Network::Ipv6 => !advertises_router(rest),
            Network::Other => address.is_none(),
        }
    }
}

/// An ARP packet names the sender, by both of the sender's addresses.
fn is_honest_arp(arp: &[u8], mac: Mac, address: Option<Ipv4Addr>) -> bool {
    let Some(&[_, kind, protocol, _, mac_bytes, address_bytes, ..]) = arp.first_chunk::<28>() else { return false };
    if (kind, protocol, mac_bytes, address_bytes) != (1, 8, 6, 4) || arp.get(8..14) != Some(&mac.0) {
        return false;
    }
    let sender = ipv4(arp, 14);
    // 0.0.0.0 asks whether an address is in use.
    address.is_none_or(|address| sender == Some(address) || sender == Some(Ipv4Addr::UNSPECIFIED))
}

fn is_honest_ipv4(packet: &[u8], address: Option<Ipv4Addr>) -> bool {
    let first = packet.first().copied().unwrap_or(0);
    let udp = packet.get(usize::from(first & 0xf) * 4..).unwrap_or_default();
    let is_first = be16(packet, 6).is_some_and(|fragment| fragment & 0x1fff == 0);
    let is_udp = packet.get(9) == Some(&UDP) && is_first;
    if is_udp && be16(udp, 0) == Some(DHCP_SERVER) {
        return false;
    }
    let Some(address) = address else { return true };
    let source = ipv4(packet, 12);
    let asks_for_address = is_udp && (be16(udp, 0), be16(udp, 2)) == (Some(DHCP_CLIENT), Some(DHCP_SERVER));
    first >> 4 == 4 && (source == Some(address) || source == Some(Ipv4Addr::UNSPECIFIED) && asks_for_address)
}

/// Returns whether an IPv6 packet tells hosts of a router. Stock hosts ignore advertisements in fragments.
fn advertises_router(packet: &[u8]) -> bool {
    let (mut next, mut at) = (packet.get(6).copied(), IPV6_BYTES);
    for _ in 0..EXTENSIONS {
        match next {
            Some(ICMP6) => return packet.get(at) == Some(&ROUTER_ADVERTISEMENT),
            // Hop-by-hop options, routing, destination options.
            Some(0 | 43 | 60) => {
                let length = packet.get(at + 1).map_or(0, |length| 8 + usize::from(*length) * 8);
                (next, at) = (packet.get(at).copied(), at + length);
            }
            _ => return false,
        }
    }
    true
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn ipv4(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let four: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(four.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

    fn frame(ether_type: &[u8], rest: &[u8]) -> Vec<u8> {
        [&OTHER.0[..], &OWN.0, ether_type, rest].concat()
    }

    fn honest(frame: &[u8], address: Option<Ipv4Addr>) -> bool {
        Header::parse(frame).unwrap().is_honest(frame, OWN, address)
    }

    fn arp(mac: Mac, address: [u8; 4]) -> Vec<u8> {
        frame(&[8, 6], &[&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac.0, &address, &[0; 10]].concat())
    }

    fn packet4(source: [u8; 4], protocol: u8, ports: [u8; 4]) -> Vec<u8> {
        let head = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0];
        frame(&[8, 0], &[&head[..], &source, &[10, 0, 0, 9], &ports, &[0; 16]].concat())
    }

    #[test]
    fn tags_are_looked_through() {
        let header = Header::parse(&frame(&[0x81, 0, 0, 5, 8, 6], &[])).unwrap();
        assert_eq!((header.destination, header.source, header.network), (OTHER, OWN, Network::Arp));
        assert!(Header::parse(&[0; 13]).is_none());
        assert_eq!(Header::parse(&frame(&[0x81, 0], &[0])).unwrap().network, Network::Other);
    }

    #[test]
    fn an_arp_packet_names_its_sender() {
        assert!(honest(&arp(OWN, [10, 0, 0, 1]), None) && honest(&arp(OWN, [10, 0, 0, 1]), Some(ADDRESS)));
        assert!(honest(&arp(OWN, [0; 4]), Some(ADDRESS)), "a probe");
        assert!(honest(&arp(OWN, [10, 0, 0, 2]), None));
        assert!(!honest(&arp(OWN, [10, 0, 0, 2]), Some(ADDRESS)));
        assert!(!honest(&arp(OTHER, [10, 0, 0, 1]), None));
        assert!(!honest(&arp(OWN, [10, 0, 0, 1])[..30], None), "cut off");
    }

    #[test]
    fn a_guest_with_one_address_uses_no_other() {
        let own = packet4([10, 0, 0, 1], 6, [0, 80, 0, 80]);
        assert!(honest(&own, Some(ADDRESS)));
        assert!(!honest(&packet4([10, 0, 0, 2], 6, [0; 4]), Some(ADDRESS)));
        assert!(honest(&packet4([0; 4], 17, [0, 68, 0, 67]), Some(ADDRESS)), "it asks for its address");
        assert!(!honest(&packet4([0; 4], 17, [0, 68, 0, 53]), Some(ADDRESS)));
        let tagged = frame(&[0x81, 0, 0, 5], &own[12..]);
        assert!(honest(&tagged, None) && !honest(&tagged, Some(ADDRESS)));
        let other = frame(&[0x88, 0xcc], &[0; 40]);
        assert!(honest(&other, None) && !honest(&other, Some(ADDRESS)));
    }

    #[test]
    fn a_guest_gives_no_addresses_and_is_no_router() {
        assert!(!honest(&packet4([10, 0, 0, 1], 17, [0, 67, 0, 68]), None));
        let packet6 = |next, rest: &[u8]| {
            let head = [0x60, 0, 0, 0, 0, 40, next, 255];
            frame(&[0x86, 0xdd], &[&head[..], &[0; 32], rest].concat())
        };
        assert!(honest(&packet6(58, &[135, 0]), None) && !honest(&packet6(58, &[134, 0]), None));
        assert!(!honest(&packet6(0, &[58, 0, 0, 0, 0, 0, 0, 0, 134, 0]), None), "behind options");
        assert!(honest(&packet6(0, &[58, 0, 0, 0, 0, 0, 0, 0, 128, 0]), None));
        assert!(!honest(&packet6(0, &[0; 200]), None), "endless options");
    }
}
