//! A DHCP client: obtains the uplink's address and keeps it.
//!
//! ```text
//! seeking     DISCOVER to all; after 1, 2, 4 ... 64 seconds again, for ever
//! requesting  REQUEST to all; four times, then seeking
//! bound       from half of the lease on REQUEST to the server, from seven eighths on to all; the wait is half of what is left,
//!             at least a minute; at the end of the lease the address is lost, then seeking
//! ```
//!
//! Touches: nothing; the caller sends and receives. Guarantees: takes answers to its own last question only.

use crate::bucket::{Random, SECOND};
use crate::build::Frame;
use crate::dhcp::{self, MAX_DNS, Message, Question, message};
use crate::{Mac, Network};
use core::net::Ipv4Addr;

/// The longest wait between two searches, in seconds.
const LONGEST_WAIT: u64 = 64;
/// How often an offered address is requested.
const REQUESTS: u32 = 4;
/// The shortest wait between two renewals.
const RENEWAL_NS: u64 = 60 * SECOND;
/// The shortest lease that is believed, in seconds.
const SHORTEST_LEASE: u32 = 60;

/// An address on the uplink, and what belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: Ipv4Addr,
    /// The stations that are reached directly. `None` if all are reached by the router.
    pub network: Option<Network>,
    /// The router to all other networks. `None` if there is no router.
    pub router: Option<Ipv4Addr>,
    /// DNS servers.
    pub dns: [Option<Ipv4Addr>; 4],
}

#[derive(Clone, Copy, Debug)]
struct Bound {
    address: Address,
    server: (Mac, Ipv4Addr),
    renew_ns: u64,
    rebind_ns: u64,
    end_ns: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Seeking,
    Requesting { address: Ipv4Addr, server: Ipv4Addr },
    Bound(Bound),
}

/// What has become of the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    None,
    /// The address is obtained or renewed.
    Address(Address),
    /// The address may not be used any more.
    Lost,
}

/// A DHCP client.
#[derive(Debug)]
pub(crate) struct Client {
    mac: Mac,
    random: Random,
    state: State,
    transaction: u32,
    /// Questions since the state began.
    tries: u32,
    next_ns: u64,
}

impl Client {
    pub(crate) const fn new(mac: Mac, random: Random) -> Self {
        Self { mac, random, state: State::Seeking, transaction: 0, tries: 0, next_ns: 0 }
    }

    pub(crate) const fn next_ns(&self) -> u64 {
        self.next_ns
    }

    fn enter(&mut self, state: State, now_ns: u64) {
        (self.state, self.tries, self.next_ns) = (state, 0, now_ns);
    }

    /// Does what is due. Returns the question to send, and what has become of the address.
    pub(crate) fn turn(&mut self, now_ns: u64) -> (Option<Frame>, News) {
        if now_ns < self.next_ns {
            return (None, News::None);
        }
        let mut news = News::None;
        if let State::Bound(bound) = self.state
            && now_ns >= bound.end_ns
        {
            self.enter(State::Seeking, now_ns);
            news = News::Lost;
        }
        if matches!(self.state, State::Requesting { .. }) && self.tries >= REQUESTS {
            self.enter(State::Seeking, now_ns);
        }
        (self.question(now_ns), news)
    }

    fn question(&mut self, now_ns: u64) -> Option<Frame> {
        let all = (Mac::BROADCAST, Ipv4Addr::BROADCAST);
        // A second more or less, so that machines that start together do not ask together.
        let jitter = u64::from(self.random.below(1_000)) * (SECOND / 1_000);
        let wait = (1 << self.tries.min(6)).min(LONGEST_WAIT) * SECOND + jitter;
        let (kind, client, offered, to, wait) = match self.state {
            State::Seeking => (message::DISCOVER, None, None, all, wait),
            State::Requesting { address, server } => (message::REQUEST, None, Some((address, server)), all, wait),
            State::Bound(bound) => {
                let (to, until) =
                    if now_ns < bound.rebind_ns { (bound.server, bound.rebind_ns) } else { (all, bound.end_ns) };
                let left = until.saturating_sub(now_ns);
                let wait = (left / 2).max(RENEWAL_NS).min(left.max(1));
                (message::REQUEST, Some(bound.address.address), None, to, wait)
            }
        };
        // The question about an offer is part of the conversation in which the offer was made.
        if !matches!(self.state, State::Requesting { .. }) {
            self.transaction = self.random.below(u32::MAX);
        }
        self.tries = self.tries.saturating_add(1);
        self.next_ns = now_ns.saturating_add(wait);
        dhcp::ask(&Question { kind, mac: self.mac, transaction: self.transaction, client, offered, to })
    }

    /// Takes a message that a server at `from` sent. Returns what has become of the address.
    pub(crate) fn receive(&mut self, message: &Message<'_>, from: Mac, now_ns: u64) -> News {
        if !message.reply
            || message.mac != Some(self.mac)
            || message.transaction != self.transaction
            || self.tries == 0
            || from.is_group()
        {
            return News::None;
        }
        match (self.state, message.kind) {
            (State::Seeking, message::OFFER) => {
                if let (Some(address), Some(server)) = (message.yours.filter(|&it| is_station(it)), message.server) {
                    self.enter(State::Requesting { address, server }, now_ns);
                }
                News::None
            }
            (State::Requesting { address, server }, message::ACK)
                if message.yours == Some(address) && message.server.is_none_or(|other| other == server) =>
            {
                self.bind(message, address, (from, server), now_ns)
            }
            (State::Bound(bound), message::ACK) if message.yours == Some(bound.address.address) => {
                let server = message.server.unwrap_or(bound.server.1);
                self.bind(message, bound.address.address, (from, server), now_ns)
            }
            (State::Requesting { server, .. }, message::NAK) if message.server.is_none_or(|other| other == server) => {
                // A second later: a server that refuses what it offers would be asked for ever.
                self.enter(State::Seeking, now_ns + SECOND);
                News::None
            }
            (State::Bound(_), message::NAK) => {
                self.enter(State::Seeking, now_ns + SECOND);
                News::Lost
            }
            _ => News::None,
        }
    }

    fn bind(&mut self, message: &Message<'_>, address: Ipv4Addr, server: (Mac, Ipv4Addr), now_ns: u64) -> News {
        let mask = message.mask.map_or(u32::MAX, u32::from);
        // A mask with gaps names no network: all stations are reached by the router then.
        let prefix = u8::try_from(mask.leading_ones()).unwrap_or(32);
        let network = (mask.count_ones() == u32::from(prefix)).then(|| Network::new(address, prefix).ok()).flatten();
        let seconds = message.lease_seconds.unwrap_or(3_600).max(SHORTEST_LEASE);
        let renewal =
            message.renewal_seconds.filter(|&it| it < seconds && it >= SHORTEST_LEASE / 2).unwrap_or(seconds / 2);
        let rebinding = message.rebinding_seconds.filter(|&it| it < seconds && it >= renewal);
        let rebinding = rebinding.unwrap_or((seconds / 8 * 7).max(renewal));
        let after = |seconds: u32| now_ns.saturating_add(u64::from(seconds) * SECOND);
        let router = message.router.filter(|&router| is_station(router) && router != address);
        let dns = message.dns.map(|server| server.filter(|&it| is_station(it)));
        let address = Address { address, network, router, dns };
        let bound =
            Bound { address, server, renew_ns: after(renewal), rebind_ns: after(rebinding), end_ns: after(seconds) };
        self.enter(State::Bound(bound), bound.renew_ns);
        News::Address(address)
    }
}

/// Returns whether an address can be a single station's.
pub(crate) const fn is_station(address: Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_broadcast() || address.is_multicast() || address.is_loopback())
        && address.octets()[0] < 240
        && address.octets()[0] != 0
}

const _: () = assert!(MAX_DNS == 4);
