//! What a vif is made of, its counters, and what is left of it at its end.

use core::fmt;
use core::net::Ipv4Addr;

use network::{Mac, PortId};
use ring_protocol::net::Hostile;
use ring_protocol::ring::RingError;

use crate::front::{Ports, Takes};
use crate::host::Host;

/// Names a vif to its switch. A vif that is connected later has another name, until 256 vifs had the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VifId(pub(crate) PortId);

impl VifId {
    /// Returns the name of the vif as stations use it.
    #[must_use]
    pub const fn port(self) -> PortId {
        self.0
    }
}

/// The limits that the configuration sets to a vif.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes per second that the guest may send. `None`: no limit.
    pub bytes_per_second: Option<u64>,
    /// The guest's only IPv4 address: no frame with another source leaves the vif, nor a tagged frame, nor a frame of another
    /// protocol than IPv4, ARP and IPv6. `None`: the guest may have any address.
    pub address: Option<Ipv4Addr>,
}

/// What a vif is made of.
#[derive(Debug)]
pub struct Connection<H: Host> {
    /// The guest.
    pub domain: u16,
    /// Our ends of the guest's event channels.
    pub ports: Ports,
    /// The page of the TX ring.
    pub tx: H::Ring,
    /// The page of the RX ring.
    pub rx: H::Ring,
    /// What the guest takes.
    pub takes: Takes,
    /// The vif's address, which no other vif of the switch has.
    pub mac: Mac,
    /// The limits of the vif.
    pub limits: Limits,
}

/// Why a vif is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// The indices of a ring contradict each other.
    Ring(RingError),
    /// The address is that of a group of stations, or zero.
    NoStation(Mac),
    /// Another vif of the switch, or the station, has this address.
    MacInUse(Mac),
    /// The switch has [`MAX_VIFS`](crate::MAX_VIFS) vifs.
    TooMany,
    /// No memory is left.
    NoMemory,
}

impl From<RingError> for ConnectError {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => error.fmt(f),
            Self::NoStation(mac) => write!(f, "{mac} is no address of a single station"),
            Self::MacInUse(mac) => write!(f, "the address {mac} is in use on the same switch"),
            Self::TooMany => write!(f, "the switch has {} vifs already", crate::MAX_VIFS),
            Self::NoMemory => f.write_str("there is no memory for it"),
        }
    }
}

/// Why a vif has ended by itself. The owner disconnects it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The indices of the TX ring are impossible.
    TxRing(RingError),
    /// The indices of the RX ring are impossible.
    RxRing(RingError),
    /// The slots of the TX ring are impossible.
    Slots(Hostile),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TxRing(error) => write!(f, "TX ring: {error}"),
            Self::RxRing(error) => write!(f, "RX ring: {error}"),
            Self::Slots(error) => write!(f, "TX ring: {error}"),
        }
    }
}

/// Why a packet is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// From the guest: a source address that is not the vif's, or an answer that only the network gives (DHCP, routers).
    Spoofed,
    /// From the guest: slots or headers that make no sense.
    Malformed,
    /// From the guest: longer than the switch or the receiver takes.
    Oversize,
    /// From the guest: more packets to groups than allowed.
    Flood,
    /// From the guest: a page that cannot be read.
    BadGrant,
    /// From the guest: nobody has the destination's address.
    Unknown,
    /// From the guest: the uplink has no room, or is out of order.
    UplinkFull,
    /// For the guest: its RX ring has too few buffers.
    NoRoom,
    /// For the guest: its RX ring had too few buffers for long.
    Stalled,
    /// For the guest: a buffer that cannot be written.
    BadBuffer,
    /// For the guest: the packet cannot be changed into what the guest takes.
    Unsupported,
}

impl Drop {
    /// All reasons.
    pub const ALL: [Self; 11] = [
        Self::Spoofed,
        Self::Malformed,
        Self::Oversize,
        Self::Flood,
        Self::BadGrant,
        Self::Unknown,
        Self::UplinkFull,
        Self::NoRoom,
        Self::Stalled,
        Self::BadBuffer,
        Self::Unsupported,
    ];

    /// Returns the reason as a word for lists.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Spoofed => "spoofed",
            Self::Malformed => "malformed",
            Self::Oversize => "oversize",
            Self::Flood => "flood",
            Self::BadGrant => "bad-grant",
            Self::Unknown => "unknown",
            Self::UplinkFull => "uplink-full",
            Self::NoRoom => "no-room",
            Self::Stalled => "stalled",
            Self::BadBuffer => "bad-buffer",
            Self::Unsupported => "unsupported",
        }
    }
}

/// How many packets were dropped, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops([u64; Drop::ALL.len()]);

impl Drops {
    /// Returns the number of packets that were dropped for this reason.
    #[must_use]
    pub fn of(&self, reason: Drop) -> u64 {
        self.0.get(reason as usize).copied().unwrap_or(0)
    }

    /// Returns the number of all packets that were dropped.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    pub(crate) fn count(&mut self, reason: Drop) {
        if let Some(count) = self.0.get_mut(reason as usize) {
            *count += 1;
        }
    }
}

/// What a vif has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that the guest sent and that were not dropped for a fault of the guest's.
    pub sent_packets: u64,
    /// Bytes of these packets.
    pub sent_bytes: u64,
    /// Packets that the guest received.
    pub received_packets: u64,
    /// Bytes of these packets.
    pub received_bytes: u64,
    /// How often the guest had to wait because of its rate.
    pub rate_waits: u64,
    /// How often the guest had to wait for a receiver without buffers.
    pub full_waits: u64,
    /// How often the guest left packets waiting so long that packets for the guest were dropped at once.
    pub stalls: u64,
    /// Packets that were dropped.
    pub drops: Drops,
}

impl core::ops::Add for Counters {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let mut drops = self.drops;
        drops.0.iter_mut().zip(other.drops.0).for_each(|(count, more)| *count += more);
        Self {
            sent_packets: self.sent_packets + other.sent_packets,
            sent_bytes: self.sent_bytes + other.sent_bytes,
            received_packets: self.received_packets + other.received_packets,
            received_bytes: self.received_bytes + other.received_bytes,
            rate_waits: self.rate_waits + other.rate_waits,
            full_waits: self.full_waits + other.full_waits,
            stalls: self.stalls + other.stalls,
            drops,
        }
    }
}

/// The parts of a vif that has ended.
#[derive(Debug)]
pub struct Disconnected<H: Host> {
    /// The page of the TX ring, for the caller to unmap.
    pub tx: H::Ring,
    /// The page of the RX ring, for the caller to unmap.
    pub rx: H::Ring,
    /// The final counters.
    pub counters: Counters,
}
