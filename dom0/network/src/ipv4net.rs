//! An IPv4 network: an address and how many of its first bits all stations share.

use core::fmt;
use core::net::Ipv4Addr;
use core::str::FromStr;

/// An IPv4 network, such as 10.77.0.0/24.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    first: u32,
    prefix: u8,
}

/// Why a text or a pair of numbers is no network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadNetwork {
    /// The text is not an address, a slash and a number.
    Form,
    /// The number of shared bits is not 1 to 30, so that two stations and the broadcast address find room.
    Prefix,
}

impl fmt::Display for BadNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Form => "a network has an address and a number of bits, such as 10.77.0.0/24",
            Self::Prefix => "a network shares 1 to 30 bits",
        })
    }
}

impl Network {
    /// Returns the network of `address` with `prefix` shared bits.
    ///
    /// # Errors
    /// [`BadNetwork::Prefix`]: not 1 to 30.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Result<Self, BadNetwork> {
        if !(1..=30).contains(&prefix) {
            return Err(BadNetwork::Prefix);
        }
        Ok(Self { first: u32::from(address) & (u32::MAX << (32 - prefix)), prefix })
    }

    /// Returns the mask of the shared bits.
    #[must_use]
    pub const fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - self.prefix))
    }

    /// Returns the number of shared bits.
    #[must_use]
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// Returns the address of all stations.
    #[must_use]
    pub const fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first | !(u32::MAX << (32 - self.prefix)))
    }

    /// Returns whether an address belongs to the network. The first and the last address do.
    #[must_use]
    pub const fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask().to_bits() == self.first
    }

    /// Returns whether an address is one that a station of the network may have.
    #[must_use]
    pub fn is_host(self, address: Ipv4Addr) -> bool {
        self.contains(address) && address.to_bits() != self.first && address != self.broadcast()
    }

    /// Returns how many stations the network can have.
    #[must_use]
    pub const fn hosts(self) -> u32 {
        (u32::MAX >> self.prefix) - 1
    }

    /// Returns the address of station `index`, counted from 0 and starting over after the last.
    #[must_use]
    pub const fn host(self, index: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first + 1 + index % self.hosts())
    }
}

impl FromStr for Network {
    type Err = BadNetwork;

    fn from_str(text: &str) -> Result<Self, BadNetwork> {
        let (address, prefix) = text.split_once('/').ok_or(BadNetwork::Form)?;
        let address = address.parse().map_err(|_| BadNetwork::Form)?;
        Self::new(address, prefix.parse().map_err(|_| BadNetwork::Form)?)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from_bits(self.first), self.prefix)
    }
}
