//! What a front end publishes in the store (ABI io 3.11): its rings, its ports, what it takes.

use core::fmt;

/// The keys of a front end that [`Front::parse`] asks for. The caller reads all in one transaction.
pub const KEYS: [&str; 12] = [
    QUEUES,
    TX_RING,
    RX_RING,
    EVENT_CHANNEL,
    EVENT_CHANNEL_TX,
    EVENT_CHANNEL_RX,
    RX_COPY,
    SCATTER_GATHER,
    GSO_TCP4,
    GSO_TCP6,
    NO_CHECKSUM,
    CHECKSUM6,
];

const QUEUES: &str = "multi-queue-num-queues";
const TX_RING: &str = "tx-ring-ref";
const RX_RING: &str = "rx-ring-ref";
const EVENT_CHANNEL: &str = "event-channel";
const EVENT_CHANNEL_TX: &str = "event-channel-tx";
const EVENT_CHANNEL_RX: &str = "event-channel-rx";
const RX_COPY: &str = "request-rx-copy";
const SCATTER_GATHER: &str = "feature-sg";
const GSO_TCP4: &str = "feature-gso-tcpv4";
const GSO_TCP6: &str = "feature-gso-tcpv6";
const NO_CHECKSUM: &str = "feature-no-csum-offload";
const CHECKSUM6: &str = "feature-ipv6-csum-offload";

/// A pair of ports. Both are the same port if the guest has one channel for both rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The port of the TX ring.
    pub tx: u32,
    /// The port of the RX ring.
    pub rx: u32,
}

/// What a guest takes in its RX ring. What it does not take is finished or cut before it gets there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Takes {
    /// Packets of several slots.
    pub scatter_gather: bool,
    /// TCP over IPv4 that is not cut into segments.
    pub tcp4: bool,
    /// TCP over IPv6 that is not cut into segments.
    pub tcp6: bool,
    /// Blank checksums over IPv4.
    pub checksum4: bool,
    /// Blank checksums over IPv6.
    pub checksum6: bool,
}

/// What a front end has published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front {
    /// The grant reference of the TX ring's page.
    pub tx_reference: u32,
    /// The grant reference of the RX ring's page.
    pub rx_reference: u32,
    /// The front end's ports, to which dom0 has not yet bound.
    pub ports: Ports,
    /// What the guest takes.
    pub takes: Takes,
}

/// Why a front end is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadFront {
    /// A key is missing.
    Missing(&'static str),
    /// The value of a key is no decimal number of 32 bits.
    Number(&'static str),
    /// The front end has this number of queues instead of one.
    Queues(u32),
    /// The front end wants pages to be exchanged instead of copied.
    NoCopy,
}

impl fmt::Display for BadFront {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(key) => write!(f, "its key {key} is missing"),
            Self::Number(key) => write!(f, "the value of its key {key} is no number"),
            Self::Queues(count) => write!(f, "it has {count} queues, and one was offered"),
            Self::NoCopy => write!(f, "its key {RX_COPY} is not 1, and packets are only copied"),
        }
    }
}

impl Front {
    /// Parses the keys. `read` returns the value of a key, `None` if the front end has no such key.
    ///
    /// # Errors
    /// The first key that is missing or has an invalid value.
    pub fn parse<'a>(read: impl Fn(&str) -> Option<&'a [u8]>) -> Result<Self, BadFront> {
        let optional = |key| read(key).map(|value| number(value).ok_or(BadFront::Number(key))).transpose();
        let needed = |key| optional(key)?.ok_or(BadFront::Missing(key));
        let has = |key| optional(key).map(|value| value.is_some_and(|value| value != 0));
        match optional(QUEUES)?.unwrap_or(1) {
            1 => {}
            count => return Err(BadFront::Queues(count)),
        }
        if !has(RX_COPY)? {
            return Err(BadFront::NoCopy);
        }
        let (tx_reference, rx_reference) = (needed(TX_RING)?, needed(RX_RING)?);
        let ports = match optional(EVENT_CHANNEL_TX)? {
            Some(tx) => Ports { tx, rx: needed(EVENT_CHANNEL_RX)? },
            None => needed(EVENT_CHANNEL).map(|port| Ports { tx: port, rx: port })?,
        };
        let takes = Takes {
            scatter_gather: has(SCATTER_GATHER)?,
            tcp4: has(GSO_TCP4)?,
            tcp6: has(GSO_TCP6)?,
            checksum4: !has(NO_CHECKSUM)?,
            checksum6: has(CHECKSUM6)?,
        };
        Ok(Self { tx_reference, rx_reference, ports, takes })
    }
}

/// Returns a decimal number of 32 bits. `None` if the value is anything else, such as a number with a sign or spaces.
fn number(value: &[u8]) -> Option<u32> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    digits.then(|| core::str::from_utf8(value).ok()?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const STOCK: [(&str, &str); 9] = [
        ("tx-ring-ref", "768"),
        ("rx-ring-ref", "769"),
        ("event-channel-tx", "21"),
        ("event-channel-rx", "22"),
        ("request-rx-copy", "1"),
        ("feature-sg", "1"),
        ("feature-gso-tcpv4", "1"),
        ("feature-gso-tcpv6", "1"),
        ("feature-ipv6-csum-offload", "1"),
    ];

    fn parse(keys: &[(&str, &'static str)]) -> Result<Front, BadFront> {
        Front::parse(|key| keys.iter().find(|(name, _)| *name == key).map(|(_, value)| value.as_bytes()))
    }

    fn without(name: &str) -> Vec<(&'static str, &'static str)> {
        STOCK.iter().filter(|(key, _)| *key != name).copied().collect()
    }

    #[test]
    fn a_stock_front_end_takes_everything() {
        let front = parse(&STOCK).unwrap();
        assert_eq!((front.tx_reference, front.rx_reference), (768, 769));
        assert_eq!(front.ports, Ports { tx: 21, rx: 22 });
        let Takes { scatter_gather, tcp4, tcp6, checksum4, checksum6 } = front.takes;
        assert!(scatter_gather && tcp4 && tcp6 && checksum4 && checksum6);
        assert!(STOCK.iter().all(|(name, _)| KEYS.contains(name)));
    }

    #[test]
    fn one_channel_may_serve_both_rings() {
        let mut keys = without("event-channel-tx");
        assert_eq!(parse(&keys), Err(BadFront::Missing("event-channel")));
        keys.push(("event-channel", "5"));
        assert_eq!(parse(&keys).unwrap().ports, Ports { tx: 5, rx: 5 });
        assert_eq!(parse(&without("event-channel-rx")), Err(BadFront::Missing("event-channel-rx")));
    }

    #[test]
    fn what_is_not_said_is_not_taken() {
        let mut keys = without("feature-sg");
        keys.push(("feature-no-csum-offload", "1"));
        let takes = parse(&keys).unwrap().takes;
        assert!(!takes.scatter_gather && !takes.checksum4 && takes.checksum6 && takes.tcp4);
        assert_eq!(parse(&STOCK[..5]).unwrap().takes, Takes { checksum4: true, ..Takes::default() });
    }

    #[test]
    fn anything_may_stand_in_the_keys() {
        assert_eq!(parse(&[]), Err(BadFront::NoCopy));
        for name in ["tx-ring-ref", "rx-ring-ref"] {
            assert_eq!(parse(&without(name)), Err(BadFront::Missing(name)));
        }
        let with = |name, value| {
            let mut keys = without(name);
            keys.push((name, value));
            parse(&keys)
        };
        assert_eq!(with("request-rx-copy", "0"), Err(BadFront::NoCopy));
        assert_eq!(with("multi-queue-num-queues", "2"), Err(BadFront::Queues(2)));
        for value in ["", "-1", "+1", " 1", "1 ", "0x1", "4294967296", "\u{663}"] {
            for name in ["tx-ring-ref", "event-channel-rx", "feature-sg", "request-rx-copy"] {
                assert_eq!(with(name, value), Err(BadFront::Number(name)), "{value}");
            }
        }
    }
}
