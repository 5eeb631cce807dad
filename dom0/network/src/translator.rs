//! Which port of the uplink's address stands for which flow of which guest.
//!
//! ```text
//! guest:inner -> remote    becomes   uplink:outer -> remote     a flow, or a forward
//! remote -> uplink:outer   becomes   remote -> guest:inner      the flow of this remote, or a forward
//! later parts of a packet  follow their first part
//! ```
//!
//! Guarantees: what arrives from outside belongs to a flow that a guest began, with the very address and port to which the
//! guest began the flow, or to a forward; a guest's flows cost other guests no flow of theirs, and leave them ports; at most
//! [`MAX_PARTS`] packets are known by their first part, [`MAX_OWN_PARTS`] of a guest, and a guest's cost no guest that has
//! fewer.

use crate::bucket::{Random, SECOND};
use crate::bytes::{be16, byte};
use crate::flows::{ACK, Key, Packet, SYN};
use crate::guests::{Guest, Guests};
use crate::headers::{Ipv4, L4, protocol};
use crate::rewrite::{Change, End, Inner};
use crate::sweep::Sweep;
use crate::{PortId, Reason};
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;

/// The first port that stands for a flow. The last is 65,535.
const FIRST_PORT: u16 = 32_768;
/// How many ports stand for flows.
const PORTS: usize = 32_768;
/// How many ports are looked at for a flow.
const PORT_TRIES: usize = 64;
/// No flow.
const NONE: u32 = u32::MAX;
/// The maximum number of packets whose later parts are let through.
pub(crate) const MAX_PARTS: usize = 64;
/// Of these, the maximum number of a guest.
pub(crate) const MAX_OWN_PARTS: usize = 16;
/// How long the parts of a packet are let through.
const PARTS_NS: u64 = 30 * SECOND;
/// The maximum number of forwards, and of ports that are kept for forwards.
const MAX_FORWARDS: usize = 256;

/// A protocol whose connections can be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transported {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transported {
    const fn number(self) -> u8 {
        match self {
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
        }
    }
}

/// Why a port is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotForward {
    /// The port of the uplink's address leads elsewhere already.
    Outer,
    /// A connection of a guest has the port of the uplink's address.
    Flow,
    /// The guest's port is reached from another port already.
    Inner,
    /// The port of the switch has no guest.
    Guest,
    /// 0 is no port, and 68 is the DHCP client's.
    Port,
    /// There are as many forwards as there may be, or no memory is left.
    Full,
}

impl fmt::Display for CannotForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outer => "the port of the uplink's address is forwarded already",
            Self::Flow => "a connection of a guest has the port of the uplink's address",
            Self::Inner => "the guest's port is forwarded from another port already",
            Self::Guest => "the port of the switch has no guest",
            Self::Port => "this port cannot be forwarded",
            Self::Full => "no further port can be forwarded",
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Forward {
    protocol: u8,
    outer: u16,
    port: PortId,
    inner: u16,
}

/// A packet whose first part has passed.
#[derive(Clone, Copy, Debug)]
struct Parts {
    port: PortId,
    inward: bool,
    remote: Ipv4Addr,
    protocol: u8,
    /// The packet's number as its sender wrote it, and as it is sent on.
    id: u16,
    new_id: u16,
    expires_ns: u64,
}

/// The state of the translation.
#[derive(Debug)]
pub(crate) struct Translator {
    /// For each port from [`FIRST_PORT`] on: the guest's port times 65,536, and the flow's index.
    ports: Vec<u32>,
    forwards: Vec<Forward>,
    /// Ports that no flow gets.
    kept: Vec<u16>,
    /// Oldest first.
    parts: Vec<Parts>,
    random: Random,
    secret: u64,
    sweep: Sweep,
}

impl Translator {
    pub(crate) fn new(mut random: Random) -> Self {
        let secret = random.next();
        let (ports, forwards, kept, parts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { ports, forwards, kept, parts, random, secret, sweep: Sweep::new() }
    }

    pub(crate) fn forward(
        &mut self,
        protocol: Transported,
        outer: u16,
        port: PortId,
        inner: u16,
    ) -> Result<(), CannotForward> {
        let protocol = protocol.number();
        if outer == 0 || inner == 0 || (protocol, outer) == (protocol::UDP, crate::dhcp::CLIENT) {
            return Err(CannotForward::Port);
        }
        let mut same = self.forwards.iter().filter(|forward| forward.protocol == protocol);
        if same.clone().any(|forward| forward.outer == outer) {
            return Err(CannotForward::Outer);
        }
        if same.any(|forward| (forward.port, forward.inner) == (port, inner)) {
            return Err(CannotForward::Inner);
        }
        // What the peer of that flow still sends is for the flow's guest alone.
        if outer
            .checked_sub(FIRST_PORT)
            .and_then(|at| self.ports.get(usize::from(at)))
            .is_some_and(|flow| *flow != NONE)
        {
            return Err(CannotForward::Flow);
        }
        if self.forwards.len() >= MAX_FORWARDS || self.forwards.try_reserve(1).is_err() {
            return Err(CannotForward::Full);
        }
        self.forwards.push(Forward { protocol, outer, port, inner });
        Ok(())
    }

    /// Keeps a port for a forward, whether there is one or not.
    pub(crate) fn keep(&mut self, outer: u16) -> Result<(), CannotForward> {
        if self.kept.contains(&outer) {
            return Ok(());
        }
        if self.kept.len() >= MAX_FORWARDS || self.kept.try_reserve(1).is_err() {
            return Err(CannotForward::Full);
        }
        self.kept.push(outer);
        Ok(())
    }

    /// Forgets what leads to a guest.
    pub(crate) fn detach(&mut self, guest: &Guest) {
        guest.flows.outer_ports().for_each(|outer| free(&mut self.ports, outer));
        self.forwards.retain(|forward| forward.port != guest.port);
        self.parts.retain(|parts| parts.port != guest.port);
        self.sweep.restart();
    }

    /// Ends all flows: the uplink's address is another.
    pub(crate) fn reset(&mut self, guests: &mut Guests) {
        guests.iter_mut().for_each(|guest| guest.flows = crate::flows::Flows::new());
        self.ports.fill(NONE);
        self.parts.clear();
    }

    /// Says what becomes of the source of a guest's packet. `share` is the guest's share of the flows: see [`share`].
    pub(crate) fn outward(
        &mut self,
        guest: &mut Guest,
        frame: &[u8],
        ip: &Ipv4,
        uplink: Ipv4Addr,
        share: usize,
        now_ns: u64,
    ) -> Result<Change, Reason> {
        let mut change = Change { end: End::Source, address: uplink, port: 0, id: None };
        let Some(transport) = ip.transport else {
            let parts = self.find_parts(Some(guest.port), ip.destination, ip, now_ns)?;
            change.id = Some(parts.new_id);
            return Ok(change);
        };
        let (inner, remote_port, flags) = match transport.protocol {
            L4::Tcp { source, destination, .. } => (source, destination, byte(frame, transport.at + 13)),
            L4::Udp { source, destination } => (source, destination, Some(0)),
            L4::Icmp { kind: 8 } => (echo_number(frame, ip)?, 0, Some(0)),
            L4::Icmp { .. } | L4::Icmp6 { .. } => return Err(Reason::Protocol),
        };
        let flags = flags.ok_or(Reason::Malformed)?;
        let key = Key { protocol: ip.protocol, inner, remote: ip.destination, remote_port };
        let forward = self
            .forwards
            .iter()
            .find(|forward| (forward.protocol, forward.port, forward.inner) == (key.protocol, guest.port, inner));
        change.port = match forward {
            Some(forward) => forward.outer,
            None => self.flow(guest, key, flags, share, now_ns)?,
        };
        if ip.fragment.is_some() {
            let new_id = self.random.below(65_536);
            change.id = Some(self.add_parts(guest.port, false, ip.destination, ip, frame, new_id, now_ns)?);
        }
        Ok(change)
    }

    /// Returns the outer port of a guest's flow, which begins if it is not known.
    fn flow(&mut self, guest: &mut Guest, key: Key, flags: u8, share: usize, now_ns: u64) -> Result<u16, Reason> {
        let packet = Packet { inward: false, flags };
        let index = match guest.flows.find(&key, self.secret) {
            Some(index) => index,
            None if key.protocol == protocol::TCP && flags & (SYN | ACK) != SYN => return Err(Reason::NoFlow),
            None => {
                // Two leave where further guests have made the share smaller.
                for _ in 0..2 {
                    if let Some(oldest) = guest.flows.to_leave(share)
                        && let Some(outer) = guest.flows.remove(oldest, self.secret)
                    {
                        free(&mut self.ports, outer);
                    }
                }
                let outer = self.free_port()?;
                let index = guest.flows.insert(key, outer, self.secret).ok_or(Reason::Memory)?;
                if let Some(entry) = self.ports.get_mut(usize::from(outer - FIRST_PORT)) {
                    *entry = u32::from(guest.port.0) << 16 | u32::from(index);
                }
                index
            }
        };
        self.sweep.note(guest.flows.touch(index, packet, now_ns));
        guest.flows.get(index, now_ns).map(|(_, outer)| outer).ok_or(Reason::NoFlow)
    }

    /// Returns a port that no flow and no forward has. An unpredictable one: who guesses it could answer in the peer's place.
    fn free_port(&mut self) -> Result<u16, Reason> {
        if self.ports.is_empty() {
            self.ports.try_reserve_exact(PORTS).map_err(|_| Reason::Memory)?;
            self.ports.resize(PORTS, NONE);
        }
        for _ in 0..PORT_TRIES {
            let outer =
                FIRST_PORT + u16::try_from(self.random.below(u32::from(u16::MAX - FIRST_PORT) + 1)).unwrap_or(0);
            let is_free = self.ports.get(usize::from(outer - FIRST_PORT)) == Some(&NONE);
            let is_kept = self.kept.contains(&outer) || self.forwards.iter().any(|forward| forward.outer == outer);
            if is_free && !is_kept {
                return Ok(outer);
            }
        }
        Err(Reason::Ports)
    }

    /// Says which guest a packet from outside is for, and what becomes of its destination.
    pub(crate) fn inward(
        &mut self,
        guests: &mut Guests,
        frame: &[u8],
        ip: &Ipv4,
        now_ns: u64,
    ) -> Result<(PortId, Change), Reason> {
        let Some(transport) = ip.transport else {
            let port = self.find_parts(None, ip.source, ip, now_ns)?.port;
            let address = guests.get(port).ok_or(Reason::NoFlow)?.address;
            return Ok((port, Change { end: End::Destination, address, port: 0, id: None }));
        };
        let (outer, remote_port, flags) = match transport.protocol {
            L4::Tcp { source, destination, .. } => (destination, source, byte(frame, transport.at + 13)),
            L4::Udp { source, destination } => (destination, source, Some(0)),
            L4::Icmp { kind: 0 } => (echo_number(frame, ip)?, 0, Some(0)),
            L4::Icmp { .. } | L4::Icmp6 { .. } => return Err(Reason::Protocol),
        };
        let packet = Packet { inward: true, flags: flags.ok_or(Reason::Malformed)? };
        let (port, inner, index) =
            self.behind(guests, ip.protocol, outer, (ip.source, remote_port), now_ns).ok_or(Reason::NoFlow)?;
        let guest = guests.get_mut(port).ok_or(Reason::NoFlow)?;
        if let Some(index) = index {
            self.sweep.note(guest.flows.touch(index, packet, now_ns));
        }
        if ip.fragment.is_some() {
            self.add_parts(port, true, ip.source, ip, frame, 0, now_ns)?;
        }
        Ok((port, Change { end: End::Destination, address: guest.address, port: inner, id: None }))
    }

    /// Returns the guest whose packet an ICMP error is about, and the guest's address and port. `None` if the packet belongs to
    /// no flow.
    pub(crate) fn behind_error(&self, guests: &Guests, inner: &Inner, now_ns: u64) -> Option<(PortId, Ipv4Addr, u16)> {
        let remote = (inner.destination, inner.destination_port);
        let (port, own, _) = self.behind(guests, inner.protocol, inner.source_port, remote, now_ns)?;
        Some((port, guests.get(port)?.address, own))
    }

    /// Returns the port of the uplink's address to which the peer had sent what a guest's ICMP error is about. `None` if
    /// that belongs to no flow.
    pub(crate) fn before_error(&self, guest: &Guest, quoted: &Inner, now_ns: u64) -> Option<u16> {
        let Inner { protocol, source: remote, source_port: remote_port, destination_port: inner, .. } = *quoted;
        if protocol == protocol::ICMP {
            return None;
        }
        let forward = self
            .forwards
            .iter()
            .find(|forward| (forward.protocol, forward.port, forward.inner) == (protocol, guest.port, inner));
        if let Some(forward) = forward {
            return Some(forward.outer);
        }
        let index = guest.flows.find(&Key { protocol, inner, remote, remote_port }, self.secret)?;
        guest.flows.get(index, now_ns).map(|(_, outer)| outer)
    }

    /// Returns the guest behind a port of the uplink's address, the guest's own port, and the flow's index unless this is a
    /// forward.
    fn behind(
        &self,
        guests: &Guests,
        protocol: u8,
        outer: u16,
        remote: (Ipv4Addr, u16),
        now_ns: u64,
    ) -> Option<(PortId, u16, Option<u16>)> {
        let mut forwards = self.forwards.iter();
        if let Some(forward) = forwards.find(|forward| (forward.protocol, forward.outer) == (protocol, outer)) {
            return Some((forward.port, forward.inner, None));
        }
        let entry = *self.ports.get(usize::from(outer.checked_sub(FIRST_PORT)?))?;
        let (port, index) = (PortId(u16::try_from(entry >> 16).ok()?), u16::try_from(entry & 0xffff).ok()?);
        let (key, own_outer) = guests.get(port)?.flows.get(index, now_ns)?;
        let is_its = own_outer == outer && key.protocol == protocol && (key.remote, key.remote_port) == remote;
        is_its.then_some((port, key.inner, Some(index)))
    }

    /// Returns what is known of a packet by its first part. `from` is the guest that sent it; `None` if it came from outside.
    fn find_parts(&self, from: Option<PortId>, remote: Ipv4Addr, ip: &Ipv4, now_ns: u64) -> Result<Parts, Reason> {
        // Without a header above IP, it is a later part, or another protocol.
        let fragment = ip.fragment.filter(|fragment| fragment.offset != 0).ok_or(Reason::Protocol)?;
        let id = u16::try_from(fragment.id).map_err(|_| Reason::Fragment)?;
        let mut parts = self.parts.iter();
        let found = parts.find(|parts| {
            parts.inward == from.is_none()
                && from.is_none_or(|from| from == parts.port)
                && (parts.remote, parts.protocol, parts.id) == (remote, ip.protocol, id)
                && parts.expires_ns > now_ns
        });
        found.copied().ok_or(Reason::Fragment)
    }

    /// Remembers the first part of a packet. Returns the number with which its parts are sent on.
    #[expect(clippy::too_many_arguments, reason = "a packet's identity has that many parts")]
    fn add_parts(
        &mut self,
        port: PortId,
        inward: bool,
        remote: Ipv4Addr,
        ip: &Ipv4,
        frame: &[u8],
        new_id: u32,
        now_ns: u64,
    ) -> Result<u16, Reason> {
        let id = be16(frame, ip.at + 4).ok_or(Reason::Malformed)?;
        let new_id = u16::try_from(new_id).unwrap_or(0);
        let same = |parts: &Parts| {
            (parts.inward, parts.remote, parts.protocol, parts.id) == (inward, remote, ip.protocol, id)
                // Outside, all guests have one address: a number stands for the packet that began last, whoever gets it.
                && (inward || parts.port == port)
        };
        self.parts.retain(|parts| parts.expires_ns > now_ns && !same(parts));
        let of = |port| self.parts.iter().filter(|parts| parts.port == port).count();
        let most = self.parts.iter().map(|parts| parts.port).max_by_key(|port| of(*port));
        let loses = if of(port) >= MAX_OWN_PARTS { Some(port) } else { most.filter(|_| self.parts.len() >= MAX_PARTS) };
        if let Some(index) = self.parts.iter().position(|parts| Some(parts.port) == loses) {
            self.parts.remove(index);
        }
        self.parts.try_reserve(1).map_err(|_| Reason::Memory)?;
        let expires_ns = now_ns + PARTS_NS;
        self.parts.push(Parts { port, inward, remote, protocol: ip.protocol, id, new_id, expires_ns });
        Ok(new_id)
    }

    /// Ends some of the flows that have been idle for too long, if it is time to look for them.
    pub(crate) fn sweep(&mut self, guests: &mut Guests, now_ns: u64) {
        let Self { sweep, ports, secret, .. } = self;
        sweep.step(guests, *secret, now_ns, |outer| free(ports, outer));
    }

    /// Returns when [`sweep`](Self::sweep) is to be called next. `None` if no flow can end.
    pub(crate) fn next_ns(&self) -> Option<u64> {
        self.sweep.next_ns()
    }
}

/// Returns how many flows each of `guests` guests may have. Half of the ports stay free, so that a free one is soon found.
pub(crate) fn share(guests: usize) -> usize {
    (PORTS / 2 / guests.max(1)).min(crate::flows::MAX_FLOWS)
}

/// Marks a port as free.
fn free(ports: &mut [u32], outer: u16) {
    if let Some(entry) = outer.checked_sub(FIRST_PORT).and_then(|index| ports.get_mut(usize::from(index))) {
        *entry = NONE;
    }
}

/// Returns the number by which an echo's answer is known.
fn echo_number(frame: &[u8], ip: &Ipv4) -> Result<u16, Reason> {
    let transport = ip.transport.ok_or(Reason::Protocol)?;
    if transport.at + 8 > transport.end {
        return Err(Reason::Malformed);
    }
    be16(frame, transport.at + 4).ok_or(Reason::Malformed)
}
