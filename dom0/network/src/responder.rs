//! A station that hands out addresses, and nothing else: for switches whose router is somebody else, or that have none.
//!
//! Touches: the frames it is given. Guarantees: answers DHCP messages of attached guests, each to its port alone, at most ten a
//! second; sends nothing of its own accord, and nothing to the uplink.

use crate::dhcp::Terms;
use crate::guests::{Guests, dhcp_question};
use crate::{Checksum, Counters, FrameInfo, Headers, Kind, Mac, Network, Output, PortId, Reason, Station};
use alloc::string::String;
use core::net::Ipv4Addr;

/// What a responder hands out.
#[derive(Clone, Debug)]
pub struct ResponderSettings {
    /// The responder's Ethernet address.
    pub mac: Mac,
    /// The address by which DHCP names the responder. No guest gets it, and nothing answers at it: clients renew their leases
    /// by broadcast.
    pub address: Ipv4Addr,
    /// The guests' network.
    pub network: Network,
    /// The router. `None` if the network has no router.
    pub router: Option<Ipv4Addr>,
    /// DNS servers.
    pub dns: [Option<Ipv4Addr>; 4],
    /// How long a lease is, in seconds.
    pub lease_seconds: u32,
    /// The maximum number of bytes of a packet.
    pub mtu: u16,
    /// The domain of the guests' names. Empty if they have no domain.
    pub domain: String,
}

/// A station that hands out addresses.
#[derive(Debug)]
pub struct Responder {
    settings: ResponderSettings,
    guests: Guests,
    counters: Counters,
}

impl Responder {
    /// Makes a responder without guests.
    #[must_use]
    pub const fn new(settings: ResponderSettings) -> Self {
        let guests = Guests::new(settings.network, [Some(settings.address), settings.router]);
        Self { settings, guests, counters: Counters::new() }
    }

    /// Returns the guests, to attach one or to keep an address.
    pub const fn guests(&mut self) -> &mut Guests {
        &mut self.guests
    }

    /// Forgets the guest of a port. Returns false if the port has no guest.
    pub fn detach(&mut self, port: PortId) -> bool {
        self.guests.detach(port).is_some()
    }

    /// Returns how many frames were dropped, by reason.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    fn guest(&mut self, port: PortId, frame: &[u8], now_ns: u64, out: &mut dyn Output) -> Result<(), Reason> {
        let headers = Headers::parse(frame, frame.len()).map_err(|_| Reason::Malformed)?;
        let ip = match headers.kind {
            Kind::Ipv4(ip) if headers.vlan.is_none() => ip,
            Kind::Malformed(_) => return Err(Reason::Malformed),
            _ => return Err(Reason::NotForUs),
        };
        let datagram = dhcp_question(frame, &ip).ok_or(Reason::NotForUs)?;
        let settings = &self.settings;
        let terms = Terms {
            mac: settings.mac,
            address: settings.address,
            network: settings.network,
            router: settings.router,
            dns: settings.dns,
            lease_seconds: settings.lease_seconds,
            mtu: settings.mtu,
            domain: &settings.domain,
        };
        let answer = self.guests.dhcp(port, datagram, &terms, now_ns)?;
        out.to_guest(port, answer.bytes(), FrameInfo { checksum: Checksum::Verified, segmentation: None });
        Ok(())
    }
}

impl Station for Responder {
    fn receive_guest(&mut self, port: PortId, frame: &mut [u8], _: FrameInfo, now_ns: u64, out: &mut dyn Output) {
        if let Err(reason) = self.guest(port, frame, now_ns, out) {
            self.counters.count(reason);
        }
    }

    fn receive_uplink(&mut self, _: &mut [u8], _: FrameInfo, _: u64, _: &mut dyn Output) {
        self.counters.count(Reason::NotForUs);
    }

    fn turn(&mut self, _: u64, _: &mut dyn Output) -> Option<u64> {
        None
    }

    fn mac(&self) -> Mac {
        self.settings.mac
    }
}
