//! What dom0 is on a switch of guests: their router, with one address of the uplink for all of them, and their DHCP server.
//!
//! ```text
//! guest  -> ARP for the gateway, echo, DHCP     answered to that guest alone
//!        -> another network                     translated, then to the uplink's next hop
//! uplink -> DHCP, ARP, echo                     the gateway's own
//!        -> a flow, a forward, an error of one  translated, then to that guest
//!        -> anything else                       dropped and counted
//! ```
//!
//! Touches: the frames it is given. Guests of one switch reach each other by the switch, not by the gateway. IPv6 is not
//! routed.
//! Guarantees: the work for a frame is bounded by its bytes and by the bounds of [`crate::translator`] and
//! [`crate::neighbours`]; nothing waits; without memory a frame is dropped and counted.

mod inward;
mod outward;

use crate::bucket::{Bucket, Random};
use crate::build::{Frame, IP_HEADER};
use crate::bytes::{be16, put, put16};
use crate::checksum::sum;
use crate::client::{Client, News};
use crate::dhcp::Terms;
use crate::guests::Guests;
use crate::headers::{Arp, Ipv4, L4, Transport, protocol};
use crate::neighbours::Neighbours;
use crate::rewrite::{Change, End, Inner, inner, rewrite_inner};
use crate::translator::{CannotForward, Translator, Transported};
use crate::{
    Address, Checksum, Counters, FrameInfo, Headers, Kind, MIN_FRAME, Mac, Network, Output, PortId, Protocol, Reason,
    Segmentation, Station,
};
use alloc::string::String;
use core::net::Ipv4Addr;

/// The lease of a guest whose DNS servers are not known yet, in seconds.
const SHORT_LEASE: u32 = 60;
/// Echoes that the gateway answers on the uplink in a second.
const ECHOES_A_SECOND: u64 = 100;
/// Bytes of a packet that an ICMP error quotes: IPv4 header and ports.
const QUOTED: usize = IP_HEADER + 8;

/// How the uplink gets its address.
#[derive(Clone, Copy, Debug)]
pub enum Addressing {
    /// By DHCP.
    Dhcp,
    /// It is given.
    Static(Address),
}

/// What a gateway is.
#[derive(Clone, Debug)]
pub struct GatewaySettings {
    /// The gateway's Ethernet address on the side of the guests.
    pub mac: Mac,
    /// The guests' network.
    pub network: Network,
    /// The gateway's address on the side of the guests.
    pub address: Ipv4Addr,
    /// The DNS servers that guests use. All `None`: the uplink's.
    pub dns: [Option<Ipv4Addr>; 4],
    /// How long a lease is, in seconds.
    pub lease_seconds: u32,
    /// The maximum number of bytes of a guest's packet.
    pub mtu: u16,
    /// The domain of the guests' names. Empty if they have no domain.
    pub domain: String,
    /// The uplink's Ethernet address.
    pub uplink_mac: Mac,
    /// The maximum number of bytes of a packet on the uplink.
    pub uplink_mtu: u16,
    /// How the uplink gets its address.
    pub addressing: Addressing,
    /// A number that nobody outside knows: ports are chosen by it.
    pub seed: u64,
}

/// Why there is no gateway with such settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadSettings {
    /// The gateway's address is not one for a station of the guests' network.
    Address(Ipv4Addr),
    /// Packets have fewer than 576 bytes, the fewest that IPv4 allows for.
    Mtu(u16),
}

impl core::fmt::Display for BadSettings {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address} is no address for a station of the guests' network"),
            Self::Mtu(mtu) => write!(f, "packets of {mtu} bytes are too short: IPv4 needs 576"),
        }
    }
}

/// The router and DHCP server of a switch.
#[derive(Debug)]
pub struct Gateway {
    settings: GatewaySettings,
    guests: Guests,
    translator: Translator,
    neighbours: Neighbours,
    /// `None` if the address is given.
    client: Option<Client>,
    uplink: Option<Address>,
    echoes: Bucket,
    counters: Counters,
}

impl Gateway {
    /// Makes a gateway without guests.
    ///
    /// # Errors
    /// Says which setting makes no sense.
    pub fn new(settings: GatewaySettings) -> Result<Self, BadSettings> {
        if !settings.network.is_host(settings.address) {
            return Err(BadSettings::Address(settings.address));
        }
        if let Some(mtu) = [settings.mtu, settings.uplink_mtu].into_iter().find(|&mtu| mtu < 576) {
            return Err(BadSettings::Mtu(mtu));
        }
        let mut random = Random(settings.seed);
        let (client, uplink) = match settings.addressing {
            Addressing::Dhcp => (Some(Client::new(settings.uplink_mac, Random(random.next()))), None),
            Addressing::Static(address) => (None, Some(address)),
        };
        Ok(Self {
            guests: Guests::new(settings.network, [Some(settings.address), None]),
            translator: Translator::new(random),
            neighbours: Neighbours::new(),
            client,
            uplink,
            echoes: Bucket::new(ECHOES_A_SECOND),
            counters: Counters::new(),
            settings,
        })
    }

    /// Returns the guests, to attach one or to keep an address.
    pub const fn guests(&mut self) -> &mut Guests {
        &mut self.guests
    }

    /// Forgets the guest of a port, its flows and the forwards to it. Returns false if the port has no guest.
    pub fn detach(&mut self, port: PortId) -> bool {
        let guest = self.guests.detach(port);
        guest.inspect(|guest| self.translator.detach(guest)).is_some()
    }

    /// Returns the address of the guest of a port. `None` if the port has no guest.
    #[must_use]
    pub fn address_of(&self, port: PortId) -> Option<Ipv4Addr> {
        self.guests.get(port).map(|guest| guest.address)
    }

    /// Leads connections to port `outer_port` of the uplink's address to port `inner_port` of a guest, until the guest is
    /// detached.
    ///
    /// # Errors
    /// Says why the port is not forwarded.
    pub fn forward(
        &mut self,
        protocol: Transported,
        outer_port: u16,
        port: PortId,
        inner_port: u16,
    ) -> Result<(), CannotForward> {
        if self.guests.get(port).is_none() {
            return Err(CannotForward::Guest);
        }
        self.translator.forward(protocol, outer_port, port, inner_port)
    }

    /// Keeps a port of the uplink's address for a forward: no flow gets the port from now on.
    ///
    /// # Errors
    /// As many ports are kept as can be forwarded, or no memory is left.
    pub fn keep_port(&mut self, outer_port: u16) -> Result<(), CannotForward> {
        self.translator.keep(outer_port)
    }

    /// Returns the uplink's address and what belongs to it. `None` if the uplink has no address.
    #[must_use]
    pub const fn uplink_address(&self) -> Option<Address> {
        self.uplink
    }

    /// Returns how many flows a guest has. `None` if the port has no guest.
    #[must_use]
    pub fn flows(&self, port: PortId) -> Option<usize> {
        self.guests.get(port).map(|guest| guest.flows.count())
    }

    /// Returns how many frames were dropped, by reason.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the uplink's address, without what belongs to it.
    fn own(&self) -> Option<Ipv4Addr> {
        self.uplink.map(|uplink| uplink.address)
    }

    /// Takes what the DHCP client says of the address.
    fn take(&mut self, news: News, out: &mut dyn Output) {
        let new = match news {
            News::None => return,
            News::Address(address) => Some(address),
            News::Lost => None,
        };
        if new.map(|new| new.address) != self.own() {
            self.translator.reset(&mut self.guests);
            self.neighbours.clear();
            if let Some(new) = new {
                // Tells all stations the new address.
                self.send_arp(1, new.address, (Mac([0; 6]), new.address), Mac::BROADCAST, out);
            }
        }
        self.uplink = new;
    }

    /// Asks for the uplink's address, or to keep it, if that is due.
    fn ask(&mut self, now_ns: u64, out: &mut dyn Output) {
        if let Some(client) = &mut self.client {
            let (question, news) = client.turn(now_ns);
            self.take(news, out);
            if let Some(question) = question {
                out.to_uplink(question.bytes(), OWN);
            }
        }
    }

    fn send_arp(&self, operation: u16, own: Ipv4Addr, to: (Mac, Ipv4Addr), mac: Mac, out: &mut dyn Output) {
        if let Some(frame) = Frame::arp(operation, (self.settings.uplink_mac, own), to, mac) {
            out.to_uplink(frame.bytes(), OWN);
        }
    }
}

/// What accompanies a frame of the gateway's own.
const OWN: FrameInfo = FrameInfo { checksum: Checksum::Verified, segmentation: None };

/// Turns an echo request into its answer, in place. Returns `None`, and changes nothing, if the packet is not a whole echo
/// request with a right checksum.
fn answer_echo(frame: &mut [u8], ip: &Ipv4) -> Option<()> {
    let Some(Transport { protocol: L4::Icmp { kind: 8 }, at, end }) = ip.transport else { return None };
    if ip.fragment.is_some() || ip.at != MIN_FRAME || sum(frame.get(at..end)?, 0) != 0xffff {
        return None;
    }
    let (ethernet, packet) = frame.split_at_mut_checked(MIN_FRAME)?;
    let (to, rest) = ethernet.split_first_chunk_mut::<6>()?;
    to.swap_with_slice(rest.get_mut(..6)?);
    // The addresses change places, which the header's checksum does not show.
    let (from, rest) = packet.get_mut(12..)?.split_first_chunk_mut::<4>()?;
    from.swap_with_slice(rest.get_mut(..4)?);
    put(frame, at, [0])?;
    put16(frame, at + 2, 0)?;
    let checksum = !sum(frame.get(at..end)?, 0);
    put16(frame, at + 2, checksum)
}

/// Returns the packet that an ICMP error is about.
fn quoted(frame: &[u8], ip: &Ipv4) -> Result<Inner, Reason> {
    let transport = ip.transport.ok_or(Reason::Malformed)?;
    let message = frame.get(..transport.end).ok_or(Reason::Malformed)?;
    if sum(message.get(transport.at..).ok_or(Reason::Malformed)?, 0) != 0xffff {
        return Err(Reason::Checksum);
    }
    inner(message, transport.at).ok_or(Reason::NoFlow)
}

/// Replaces an end of the packet that an ICMP error is about.
fn requote(frame: &mut [u8], ip: &Ipv4, inner: &Inner, change: &Change) -> Option<()> {
    let transport = ip.transport?;
    rewrite_inner(frame, inner, change)?;
    put16(frame, transport.at + 2, 0)?;
    let checksum = !sum(frame.get(transport.at..transport.end)?, 0);
    put16(frame, transport.at + 2, checksum)
}

/// Fits what is to be cut into packets of `mtu` bytes. Returns `None` if the packet is too long.
fn fit(ip: &Ipv4, info: FrameInfo, mtu: u16) -> Option<FrameInfo> {
    let Some(how) = info.segmentation else {
        return (ip.end - ip.at <= usize::from(mtu)).then_some(info);
    };
    let Some(Transport { protocol: L4::Tcp { header, .. }, .. }) = ip.transport else { return None };
    let room = usize::from(mtu).checked_sub(ip.header + header)?;
    let bytes = how.bytes.min(u16::try_from(room).ok()?);
    (bytes >= crate::segment::MIN_SEGMENT)
        .then_some(FrameInfo { segmentation: Some(Segmentation { bytes, ..how }), ..info })
}

/// Judges what is about to be routed. Returns the packet.
fn routable(headers: &Headers, info: FrameInfo) -> Result<Ipv4, Reason> {
    let ip = match headers.kind {
        Kind::Ipv4(ip) if headers.vlan.is_none() => ip,
        Kind::Malformed(_) => return Err(Reason::Malformed),
        _ => return Err(Reason::NotForUs),
    };
    if ip.header != IP_HEADER {
        return Err(Reason::Options);
    }
    let transport = ip.transport.map(|transport| transport.protocol);
    let blank = info.checksum == Checksum::Blank;
    if blank && (ip.fragment.is_some() || !matches!(transport, Some(L4::Tcp { .. } | L4::Udp { .. }))) {
        return Err(Reason::Checksum);
    }
    if let Some(how) = info.segmentation {
        let is_tcp = how.protocol == Protocol::Tcp4 && matches!(transport, Some(L4::Tcp { .. }));
        if !is_tcp || ip.fragment.is_some() {
            return Err(Reason::Protocol);
        }
    }
    Ok(ip)
}

impl Station for Gateway {
    fn receive_guest(&mut self, port: PortId, frame: &mut [u8], info: FrameInfo, now_ns: u64, out: &mut dyn Output) {
        if let Err(reason) = self.handle_guest(port, frame, info, now_ns, out) {
            self.counters.count(reason);
        }
    }

    fn receive_uplink(&mut self, frame: &mut [u8], info: FrameInfo, now_ns: u64, out: &mut dyn Output) {
        if let Err(reason) = self.handle_uplink(frame, info, now_ns, out) {
            self.counters.count(reason);
        }
    }

    fn turn(&mut self, now_ns: u64, out: &mut dyn Output) -> Option<u64> {
        self.ask(now_ns, out);
        if let Some(own) = self.own() {
            let mac = self.settings.uplink_mac;
            let dropped = self.neighbours.turn(now_ns, |address| {
                if let Some(frame) = Frame::arp(1, (mac, own), (Mac([0; 6]), address), Mac::BROADCAST) {
                    out.to_uplink(frame.bytes(), OWN);
                }
            });
            (0..dropped).for_each(|_| self.counters.count(Reason::Neighbour));
        }
        self.translator.sweep(&mut self.guests, now_ns);
        let client = self.client.as_ref().map(Client::next_ns);
        [client, self.neighbours.next_ns(), self.translator.next_ns()].into_iter().flatten().min()
    }

    fn mac(&self) -> Mac {
        self.settings.mac
    }
}
