//! What the headers of a packet mean to the switch: whether the guest may send the packet, and how it may be cut. The headers
//! were read from a private copy.

use core::net::Ipv4Addr;

use network::{Headers, Kind, L4, Mac, Malformed};
use ring_protocol::net::GsoProtocol;

/// The ports of DHCP.
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// The port of servers of DHCP for IPv6.
const DHCP6_SERVER: u16 = 547;
/// Messages of ICMP for IPv6 that only routers send: an advertisement, and a redirection.
const OF_ROUTERS: [u8; 2] = [134, 137];

/// The version of IP that a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Ipv4,
    Ipv6,
    /// Another protocol, or headers that make no sense.
    Other,
}

impl Network {
    pub(crate) const fn of(headers: &Headers) -> Self {
        match headers.kind {
            Kind::Ipv4(_) => Self::Ipv4,
            Kind::Ipv6(_) => Self::Ipv6,
            _ => Self::Other,
        }
    }

    /// Returns whether a packet of this network may be cut as `protocol`.
    pub(crate) fn fits(self, protocol: GsoProtocol) -> bool {
        match protocol {
            GsoProtocol::Tcp4 => self == Self::Ipv4,
            GsoProtocol::Tcp6 => self == Self::Ipv6,
        }
    }
}

/// Returns whether the vif with the address `mac` may send a packet with these headers. With `address`, the guest has that IPv4
/// address alone. Guests give no addresses (DHCP), and are no routers (IPv6).
pub(crate) fn is_honest(headers: &Headers, mac: Mac, address: Option<Ipv4Addr>) -> bool {
    if headers.source != mac || address.is_some() && headers.vlan.is_some() {
        return false;
    }
    match &headers.kind {
        Kind::Arp(arp) => {
            // 0.0.0.0 asks whether an address is in use.
            let is_own = |address| arp.sender == address || arp.sender == Ipv4Addr::UNSPECIFIED;
            arp.sender_mac == mac && address.is_none_or(is_own)
        }
        Kind::Ipv4(packet) => {
            let ports = match packet.transport.map(|transport| transport.protocol) {
                Some(L4::Udp { source, destination }) => Some((source, destination)),
                _ => None,
            };
            let asks_for_address = packet.source == Ipv4Addr::UNSPECIFIED && ports == Some((DHCP_CLIENT, DHCP_SERVER));
            let gives_addresses = ports.is_some_and(|(source, _)| source == DHCP_SERVER);
            !gives_addresses && address.is_none_or(|address| packet.source == address || asks_for_address)
        }
        Kind::Ipv6(packet) => match packet.transport.map(|transport| transport.protocol) {
            Some(L4::Icmp6 { kind }) => !OF_ROUTERS.contains(&kind),
            Some(L4::Udp { source, .. }) => source != DHCP6_SERVER,
            _ => true,
        },
        // The first may tell of a router where nobody looks; the others name a sender that nobody reads.
        Kind::Malformed(Malformed::Extensions | Malformed::Arp | Malformed::Vlan) => false,
        Kind::Malformed(_) | Kind::Other(_) => address.is_none(),
    }
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
        is_honest(&Headers::parse(frame, frame.len()).unwrap(), OWN, address)
    }

    fn arp(mac: Mac, address: [u8; 4]) -> Vec<u8> {
        frame(&[8, 6], &[&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac.0, &address, &[0; 10]].concat())
    }

    /// A UDP packet.
    fn packet4(source: [u8; 4], ports: [u8; 4]) -> Vec<u8> {
        let head = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0, 0];
        frame(&[8, 0], &[&head[..], &source, &[10, 0, 0, 9], &ports, &[0, 20], &[0; 14]].concat())
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
        let own = packet4([10, 0, 0, 1], [0, 80, 0, 80]);
        assert!(honest(&own, Some(ADDRESS)));
        assert!(!honest(&packet4([10, 0, 0, 2], [0; 4]), Some(ADDRESS)));
        assert!(honest(&packet4([0; 4], [0, 68, 0, 67]), Some(ADDRESS)), "the guest asks for its address");
        assert!(!honest(&packet4([0; 4], [0, 68, 0, 53]), Some(ADDRESS)));
        let tagged = frame(&[0x81, 0, 0, 5], &own[12..]);
        assert!(honest(&tagged, None) && !honest(&tagged, Some(ADDRESS)));
        for strange in [frame(&[0x88, 0xcc], &[0; 40]), own[..30].to_vec()] {
            assert!(honest(&strange, None) && !honest(&strange, Some(ADDRESS)));
        }
    }

    #[test]
    fn a_guest_gives_no_addresses_and_is_no_router() {
        assert!(!honest(&packet4([10, 0, 0, 1], [0, 67, 0, 68]), None));
        let packet6 = |next, rest: &[u8]| {
            let head = [0x60, 0, 0, 0, 0, u8::try_from(rest.len()).unwrap(), next, 255];
            frame(&[0x86, 0xdd], &[&head[..], &[0; 32], rest].concat())
        };
        assert!(honest(&packet6(58, &[135, 0, 0, 0]), None) && !honest(&packet6(58, &[134, 0, 0, 0]), None));
        assert!(!honest(&packet6(58, &[137, 0, 0, 0]), None), "a redirection");
        assert!(!honest(&packet6(17, &[2, 35, 2, 34, 0, 8, 0, 0]), None), "DHCP of IPv6");
        assert!(honest(&packet6(17, &[2, 34, 2, 35, 0, 8, 0, 0]), None));
        assert!(!honest(&packet6(0, &[58, 0, 0, 0, 0, 0, 0, 0, 134, 0, 0, 0]), None), "behind options");
        assert!(honest(&packet6(0, &[58, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0]), None));
        assert!(!honest(&packet6(0, &[0; 200]), None), "endless options");
    }
}
