//! The flows of one guest through the translator.
//!
//! Guarantees: at most [`MAX_FLOWS`], or as many as the caller allows; if a further one begins, the one that was idle for
//! longest ends. Finding a flow costs no more than the guest's own flows, and which flows share a chain depends on a secret.

use crate::bucket::{SECOND, mix};
use alloc::vec::Vec;
use core::net::Ipv4Addr;

/// The maximum number of flows of a guest.
pub(crate) const MAX_FLOWS: usize = 1_024;
/// No flow.
const NONE: u16 = u16::MAX;

/// Seconds for which flows may be idle.
mod idle {
    pub(super) const TCP_OPENING: u64 = 60;
    pub(super) const TCP_OPEN: u64 = 7_440;
    pub(super) const TCP_ENDED: u64 = 60;
    pub(super) const TCP_RESET: u64 = 10;
    pub(super) const UDP_ASKING: u64 = 60;
    pub(super) const UDP_ANSWERED: u64 = 180;
    pub(super) const ECHO: u64 = 60;
}

/// What tells a flow from the others of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// The number of the protocol above IP.
    pub(crate) protocol: u8,
    /// The guest's port, or the number of its echo.
    pub(crate) inner: u16,
    pub(crate) remote: Ipv4Addr,
    /// The peer's port. 0 for an echo.
    pub(crate) remote_port: u16,
}

/// A packet of a flow, as far as the flow's life depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    /// Whether the peer sent it.
    pub(crate) inward: bool,
    /// The flags of a TCP header; 0 for other protocols.
    pub(crate) flags: u8,
}

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

#[derive(Clone, Copy, Debug)]
struct Flow {
    key: Key,
    /// The port on the uplink's address. 0 if the slot is free.
    outer: u16,
    answered: bool,
    /// The guest, and the peer, have sent their last byte.
    ended: [bool; 2],
    expires_ns: u64,
    /// The next flow in the same chain, or the next free slot.
    next: u16,
    newer: u16,
    older: u16,
}

/// The flows of a guest.
#[derive(Debug)]
pub(crate) struct Flows {
    slots: Vec<Flow>,
    /// The first flow of each chain.
    chains: Vec<u16>,
    free: u16,
    newest: u16,
    oldest: u16,
    count: usize,
}

/// How many chains there are.
const CHAINS: usize = 1_024;

impl Flows {
    pub(crate) const fn new() -> Self {
        Self { slots: Vec::new(), chains: Vec::new(), free: NONE, newest: NONE, oldest: NONE, count: 0 }
    }

    pub(crate) const fn count(&self) -> usize {
        self.count
    }

    fn slot(&self, index: u16) -> Option<&Flow> {
        self.slots.get(usize::from(index)).filter(|flow| flow.outer != 0)
    }

    fn slot_mut(&mut self, index: u16) -> Option<&mut Flow> {
        self.slots.get_mut(usize::from(index))
    }

    fn chain(key: &Key, secret: u64) -> usize {
        let ports = u64::from(key.inner) << 48 | u64::from(key.remote_port) << 32 | u64::from(key.remote.to_bits());
        let word = mix(mix(ports ^ secret) ^ u64::from(key.protocol));
        usize::try_from(word % CHAINS as u64).unwrap_or(0)
    }

    /// Returns the key and the outer port of a flow; `None` if the flow has ended.
    pub(crate) fn get(&self, index: u16, now_ns: u64) -> Option<(Key, u16)> {
        self.slot(index).filter(|flow| flow.expires_ns > now_ns).map(|flow| (flow.key, flow.outer))
    }

    /// Returns the flow with this key, ended or not.
    pub(crate) fn find(&self, key: &Key, secret: u64) -> Option<u16> {
        let mut index = self.chains.get(Self::chain(key, secret)).copied()?;
        while let Some(flow) = self.slot(index) {
            if flow.key == *key {
                return Some(index);
            }
            index = flow.next;
        }
        None
    }

    /// Returns the flow that has been idle for longest; `None` if there are fewer than `limit`.
    pub(crate) const fn to_leave(&self, limit: usize) -> Option<u16> {
        if self.count < limit { None } else { Some(self.oldest) }
    }

    /// Adds a flow. Returns its index; `None` if no memory or no slot is left.
    pub(crate) fn insert(&mut self, key: Key, outer: u16, secret: u64) -> Option<u16> {
        if self.chains.is_empty() {
            self.chains.try_reserve_exact(CHAINS).ok()?;
            self.chains.resize(CHAINS, NONE);
        }
        let index = if self.free == NONE {
            if self.slots.len() >= MAX_FLOWS {
                return None;
            }
            self.slots.try_reserve(1).ok()?;
            u16::try_from(self.slots.len()).ok()?
        } else {
            self.free
        };
        let chain = Self::chain(&key, secret);
        let next = self.chains.get(chain).copied()?;
        let flow =
            Flow { key, outer, answered: false, ended: [false; 2], expires_ns: 0, next, newer: NONE, older: NONE };
        match self.slots.get_mut(usize::from(index)) {
            Some(slot) => {
                self.free = slot.next;
                *slot = flow;
            }
            None => self.slots.push(flow),
        }
        *self.chains.get_mut(chain)? = index;
        self.count += 1;
        self.link(index);
        Some(index)
    }

    /// Ends a flow. Returns its outer port; `None` if there is no such flow.
    pub(crate) fn remove(&mut self, index: u16, secret: u64) -> Option<u16> {
        let flow = *self.slot(index)?;
        let head = self.chains.get_mut(Self::chain(&flow.key, secret))?;
        if *head == index {
            *head = flow.next;
        } else {
            let mut before = *head;
            while let Some(other) = self.slot_mut(before) {
                if other.next == index {
                    other.next = flow.next;
                    break;
                }
                before = other.next;
            }
        }
        self.unlink(index);
        let free = self.free;
        let slot = self.slot_mut(index)?;
        (slot.outer, slot.next) = (0, free);
        self.free = index;
        self.count -= 1;
        Some(flow.outer)
    }

    /// Puts a flow at the new end of the order.
    fn link(&mut self, index: u16) {
        let newest = self.newest;
        if let Some(flow) = self.slot_mut(index) {
            (flow.newer, flow.older) = (NONE, newest);
        }
        match self.slot_mut(newest) {
            Some(flow) => flow.newer = index,
            None => self.oldest = index,
        }
        self.newest = index;
    }

    /// Takes a flow out of the order.
    fn unlink(&mut self, index: u16) {
        let Some(&Flow { newer, older, .. }) = self.slot(index) else { return };
        match self.slot_mut(newer) {
            Some(flow) => flow.older = older,
            None => self.newest = older,
        }
        match self.slot_mut(older) {
            Some(flow) => flow.newer = newer,
            None => self.oldest = newer,
        }
    }

    /// Notes a packet of a flow: the flow lives on. Returns when it ends unless it has another packet.
    pub(crate) fn touch(&mut self, index: u16, packet: Packet, now_ns: u64) -> u64 {
        if self.newest != index {
            self.unlink(index);
            self.link(index);
        }
        let Some(flow) = self.slot_mut(index) else { return u64::MAX };
        if packet.flags & (SYN | ACK) == SYN {
            (flow.answered, flow.ended) = (false, [false; 2]);
        }
        flow.answered |= packet.inward;
        if packet.flags & FIN != 0
            && let Some(ended) = flow.ended.get_mut(usize::from(packet.inward))
        {
            *ended = true;
        }
        let seconds = match flow.key.protocol {
            crate::headers::protocol::TCP if packet.flags & RST != 0 => idle::TCP_RESET,
            crate::headers::protocol::TCP if flow.ended == [true; 2] => idle::TCP_ENDED,
            crate::headers::protocol::TCP if flow.answered => idle::TCP_OPEN,
            crate::headers::protocol::TCP => idle::TCP_OPENING,
            crate::headers::protocol::UDP if flow.answered => idle::UDP_ANSWERED,
            crate::headers::protocol::UDP => idle::UDP_ASKING,
            _ => idle::ECHO,
        };
        flow.expires_ns = now_ns + seconds * SECOND;
        flow.expires_ns
    }

    /// Ends the flows with an index of `from` to `from + count` that have been idle for too long; tells their outer ports.
    /// Returns when the first of the others ends; `u64::MAX` if there is no other.
    pub(crate) fn sweep(&mut self, from: u16, count: u16, now_ns: u64, secret: u64, mut ended: impl FnMut(u16)) -> u64 {
        let mut next_ns = u64::MAX;
        for index in from..from.saturating_add(count) {
            let Some(flow) = self.slot(index) else { continue };
            if flow.expires_ns > now_ns {
                next_ns = next_ns.min(flow.expires_ns);
            } else if let Some(outer) = self.remove(index, secret) {
                ended(outer);
            }
        }
        next_ns
    }

    /// Returns a number that is larger than the index of any flow; 0 if there is none.
    pub(crate) const fn end(&self) -> usize {
        if self.count == 0 { 0 } else { self.slots.len() }
    }

    /// Returns the outer ports of all flows.
    pub(crate) fn outer_ports(&self) -> impl Iterator<Item = u16> {
        self.slots.iter().map(|flow| flow.outer).filter(|&outer| outer != 0)
    }
}
