//! What a back end has published and connected, as plain data that can outlive the back end. The keys in the store are written
//! from this record; a later back end uses the record.

use network::Mac;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::front::{Front, Ports, Takes};

/// What a back end publishes about a vif (ABI io 6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Features {
    /// Bit n: the key with number n of [`OFFERED`] is 1.
    flags: u32,
}

/// A key of a back end, and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The name of the node.
    pub name: &'static str,
    /// The value of the node, written in decimal.
    pub value: u64,
}

/// The keys whose value is 0 or 1. A record has their numbers, so a new key is added at the end.
const OFFERED: [&str; 7] = [
    "feature-rx-copy",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-ipv6-csum-offload",
    "feature-split-event-channels",
    "feature-rx-flip",
];

/// All keys of [`OFFERED`] but `feature-rx-flip`, which stock front ends read.
const SERVED: u32 = 0x3f;

impl Features {
    /// Returns what this back end publishes.
    #[must_use]
    pub const fn served() -> Self {
        Self { flags: SERVED }
    }

    /// Returns the keys that the front end reads. They are written together with the state `InitWait`.
    pub fn offered(&self) -> impl Iterator<Item = Key> + use<> {
        let flags = self.flags;
        let flag = move |(at, name): (usize, &'static str)| Key { name, value: u64::from(flags >> at & 1) };
        OFFERED.into_iter().enumerate().map(flag).chain([Key { name: "multi-queue-max-queues", value: 1 }])
    }
}

/// A vif as it was published and connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    /// What was published.
    pub features: Features,
    /// The guest.
    pub domain: u32,
    /// The number of the vif among the guest's.
    pub device: u32,
    /// 1 if the vif is connected, else 0.
    pub connected: u32,
    /// The grant references of the pages of the TX and the RX ring.
    pub references: [u32; 2],
    /// The front end's ports for TX and RX.
    pub front_ports: [u32; 2],
    /// Our ends of these channels.
    pub ports: [u32; 2],
    /// What the guest takes: scatter-gather, TCP over IPv4 and IPv6, checksums over IPv4 and IPv6, each 1 or 0.
    pub takes: [u8; 5],
    /// The vif's address.
    pub mac: [u8; 6],
    /// Zero.
    pub padding: u8,
}

const _: () = assert!(size_of::<Record>() == 52);

impl Record {
    /// Makes the record of a vif whose features are published, and which is not connected.
    #[must_use]
    pub fn published(domain: u16, device: u32, mac: Mac, features: Features) -> Self {
        Self { features, domain: domain.into(), device, mac: mac.0, ..Self::default() }
    }

    /// Returns this record with what the front end has published, and with `ports` as our ends.
    #[must_use]
    pub fn connected(mut self, front: &Front, ports: Ports) -> Self {
        let Takes { scatter_gather, tcp4, tcp6, checksum4, checksum6 } = front.takes;
        self.connected = 1;
        self.references = [front.tx_reference, front.rx_reference];
        self.front_ports = [front.ports.tx, front.ports.rx];
        self.ports = [ports.tx, ports.rx];
        self.takes = [scatter_gather, tcp4, tcp6, checksum4, checksum6].map(u8::from);
        self
    }

    /// Returns what the guest takes.
    #[must_use]
    pub fn takes(&self) -> Takes {
        let [scatter_gather, tcp4, tcp6, checksum4, checksum6] = self.takes.map(|takes| takes != 0);
        Takes { scatter_gather, tcp4, tcp6, checksum4, checksum6 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn a_stock_front_end_finds_what_it_needs() {
        let keys: Vec<_> = Features::served().offered().map(|key| (key.name, key.value)).collect();
        for name in ["feature-rx-copy", "feature-sg", "feature-gso-tcpv4", "feature-split-event-channels"] {
            assert!(keys.contains(&(name, 1)), "{name}");
        }
        assert!(keys.contains(&("feature-rx-flip", 0)) && keys.contains(&("multi-queue-max-queues", 1)));
    }

    #[test]
    fn a_record_is_plain_data() {
        let takes = Takes { scatter_gather: true, checksum4: true, ..Takes::default() };
        let front = Front { tx_reference: 8, rx_reference: 9, ports: Ports { tx: 1, rx: 2 }, takes };
        let record = Record::published(5, 0, Mac([0, 0x16, 0x3e, 1, 2, 3]), Features::served());
        let record = record.connected(&front, Ports { tx: 40, rx: 41 });
        assert_eq!((record.takes(), record.ports, record.connected), (takes, [40, 41], 1));
        assert_eq!(Record::read_from_bytes(record.as_bytes()).unwrap(), record);
    }
}
