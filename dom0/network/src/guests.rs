//! The guests of a station: each has one port, one Ethernet address and one IPv4 address.
//!
//! Guarantees: no address is given twice; a guest is asked for by its port alone, and what is answered goes to that port.

use crate::bucket::{Bucket, mix};
use crate::build::Frame;
use crate::dhcp::{self, Lease, Message, Terms};
use crate::flows::Flows;
use crate::headers::{Ipv4, L4, Transport};
use crate::{Mac, Network, PortId, Reason};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;

/// The maximum number of guests of a station.
const MAX_GUESTS: usize = 1_024;
/// DHCP messages of a guest that are answered in a second.
const DHCP_A_SECOND: u64 = 10;
/// Echoes of a guest that are answered, and errors about its packets, in a second.
const ICMP_A_SECOND: u64 = 100;
/// Stations of the uplink's network that a guest makes the gateway look for in a second.
const NEIGHBOURS_A_SECOND: u64 = 10;
/// The longest name of a guest that is handed out, in bytes.
const MAX_NAME: usize = 63;

/// Why a guest is not attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotAttach {
    /// The port has a guest.
    Port,
    /// Another port has the Ethernet address.
    Mac,
    /// The address belongs to another guest, or to the station.
    AddressInUse(Ipv4Addr),
    /// The network has no such address for a station.
    NotInNetwork(Ipv4Addr),
    /// The network has no free address, or the station has its maximum of guests.
    Full,
    /// No memory was left.
    Memory,
}

impl fmt::Display for CannotAttach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port => f.write_str("the port has a guest"),
            Self::Mac => f.write_str("another port has the Ethernet address"),
            Self::AddressInUse(address) => write!(f, "{address} is in use"),
            Self::NotInNetwork(address) => write!(f, "{address} is no address for a guest of this network"),
            Self::Full => f.write_str("no address is free"),
            Self::Memory => f.write_str("no memory is left"),
        }
    }
}

/// A guest of a station.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) port: PortId,
    pub(crate) mac: Mac,
    pub(crate) address: Ipv4Addr,
    name: String,
    dhcp: Bucket,
    /// Limits echoes and errors.
    pub(crate) icmp: Bucket,
    /// Limits questions about neighbours.
    pub(crate) neighbours: Bucket,
    pub(crate) flows: Flows,
}

/// The guests of a station.
#[derive(Debug)]
pub struct Guests {
    network: Network,
    /// Addresses that no guest gets: the station's, the router's.
    reserved: [Option<Ipv4Addr>; 2],
    /// Addresses that a guest gets only by asking for them.
    kept: Vec<Ipv4Addr>,
    /// In the order of their ports.
    guests: Vec<Guest>,
}

impl Guests {
    pub(crate) const fn new(network: Network, reserved: [Option<Ipv4Addr>; 2]) -> Self {
        Self { network, reserved, kept: Vec::new(), guests: Vec::new() }
    }

    fn is_free(&self, address: Ipv4Addr) -> bool {
        !self.reserved.contains(&Some(address)) && self.guests.iter().all(|guest| guest.address != address)
    }

    /// Chooses the address for an Ethernet address: the same one as long as it is free.
    fn choose(&self, mac: Mac) -> Option<Ipv4Addr> {
        let [a, b, c, d, e, f] = mac.0;
        let hash = mix(u64::from_be_bytes([0, 0, a, b, c, d, e, f]));
        let start = u32::try_from(hash % u64::from(self.network.hosts())).ok()?;
        // One more than there are addresses in use is enough to find a free one.
        let taken = self.guests.len() + self.reserved.len() + self.kept.len();
        let tries = u32::try_from(taken + 1).ok()?.min(self.network.hosts());
        let candidates = (0..tries).map(|i| self.network.host((start + i) % self.network.hosts()));
        candidates.into_iter().find(|&address| self.is_free(address) && !self.kept.contains(&address))
    }

    /// Keeps an address for the guest that is attached with it: the station chooses the address for no other guest.
    ///
    /// # Errors
    /// No memory is left.
    pub fn keep(&mut self, address: Ipv4Addr) -> Result<(), CannotAttach> {
        self.kept.try_reserve(1).map_err(|_| CannotAttach::Memory)?;
        self.kept.push(address);
        Ok(())
    }

    /// Keeps an address no longer. A guest that has the address goes on with it.
    pub fn release(&mut self, address: Ipv4Addr) {
        if let Some(at) = self.kept.iter().position(|kept| *kept == address) {
            self.kept.swap_remove(at);
        }
    }

    /// Attaches a guest. Returns the guest's address: `address`, or one that depends on `mac` alone as long as that is free.
    ///
    /// # Errors
    /// Says why the guest cannot have the address.
    pub fn attach(
        &mut self,
        port: PortId,
        mac: Mac,
        address: Option<Ipv4Addr>,
        name: &str,
    ) -> Result<Ipv4Addr, CannotAttach> {
        let Err(index) = self.index(port) else { return Err(CannotAttach::Port) };
        if self.guests.iter().any(|guest| guest.mac == mac) {
            return Err(CannotAttach::Mac);
        }
        if self.guests.len() >= MAX_GUESTS {
            return Err(CannotAttach::Full);
        }
        let address = match address {
            Some(address) if !self.network.is_host(address) => return Err(CannotAttach::NotInNetwork(address)),
            Some(address) if !self.is_free(address) => return Err(CannotAttach::AddressInUse(address)),
            Some(address) => address,
            None => self.choose(mac).ok_or(CannotAttach::Full)?,
        };
        let name = if name.len() <= MAX_NAME { name } else { "" };
        let mut own = String::new();
        own.try_reserve_exact(name.len()).map_err(|_| CannotAttach::Memory)?;
        own.push_str(name);
        self.guests.try_reserve(1).map_err(|_| CannotAttach::Memory)?;
        let [dhcp, icmp, neighbours] = [DHCP_A_SECOND, ICMP_A_SECOND, NEIGHBOURS_A_SECOND].map(Bucket::new);
        self.guests.insert(index, Guest { port, mac, address, name: own, dhcp, icmp, neighbours, flows: Flows::new() });
        Ok(address)
    }

    /// Forgets a guest. Returns what was known of it; `None` if the port has no guest.
    pub(crate) fn detach(&mut self, port: PortId) -> Option<Guest> {
        self.index(port).ok().map(|index| self.guests.remove(index))
    }

    fn index(&self, port: PortId) -> Result<usize, usize> {
        self.guests.binary_search_by_key(&port, |guest| guest.port)
    }

    pub(crate) fn get(&self, port: PortId) -> Option<&Guest> {
        self.guests.get(self.index(port).ok()?)
    }

    pub(crate) fn get_mut(&mut self, port: PortId) -> Option<&mut Guest> {
        let index = self.index(port).ok()?;
        self.guests.get_mut(index)
    }

    pub(crate) const fn count(&self) -> usize {
        self.guests.len()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Guest> {
        self.guests.iter_mut()
    }

    /// Returns the answer to a guest's DHCP message.
    pub(crate) fn dhcp(
        &mut self,
        port: PortId,
        datagram: &[u8],
        terms: &Terms<'_>,
        now_ns: u64,
    ) -> Result<Frame, Reason> {
        let guest = self.get_mut(port).ok_or(Reason::Unattached)?;
        if !guest.dhcp.take(now_ns) {
            return Err(Reason::Rate);
        }
        let question = Message::parse(datagram).ok_or(Reason::Dhcp)?;
        let lease = Lease { mac: guest.mac, address: guest.address, name: &guest.name };
        dhcp::answer(&question, &lease, terms).ok_or(Reason::Dhcp)
    }
}

/// Returns the datagram if a packet is a client's message to a DHCP server. `None` if not.
pub(crate) fn dhcp_question<'a>(frame: &'a [u8], ip: &Ipv4) -> Option<&'a [u8]> {
    match ip.transport {
        Some(Transport { protocol: L4::Udp { source: dhcp::CLIENT, destination: dhcp::SERVER }, at, end })
            if ip.fragment.is_none() =>
        {
            frame.get(at + 8..end)
        }
        _ => None,
    }
}
