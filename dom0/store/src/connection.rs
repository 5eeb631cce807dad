//! One client: what it sent half of, what it has not fetched, what it has open.
//!
//! Bounded whatever the client does: at most one message of input, replies up to a limit above
//! which no request is taken, and events up to a limit above which each watch keeps one event for
//! its own path (an event too many is always legal, a lost one is not; ABI 3.3, 3.6).

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use crate::domain::Caller;
use crate::quota::Quotas;
use crate::view::Changes;
use crate::watch::WatchEvent;
use crate::wire::{self, Assembler, Kind};

/// A client's side of the server.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pub(crate) caller: Caller,
    pub(crate) input: Assembler,
    pub(crate) outbox: Outbox,
    pub(crate) transactions: BTreeMap<u32, Changes>,
}

impl Connection {
    pub(crate) fn new(caller: Caller) -> Self {
        Self { caller, input: Assembler::default(), outbox: Outbox::default(), transactions: BTreeMap::new() }
    }

    /// Bytes of open transactions, `except` one.
    pub(crate) fn transaction_bytes(&self, except: u32) -> usize {
        let others = self.transactions.iter().filter(|(id, _)| **id != except);
        others.map(|(_, changes)| changes.bytes()).sum()
    }

    /// The smallest number no open transaction has.
    pub(crate) fn free_transaction(&self) -> u32 {
        (1..).find(|id| !self.transactions.contains_key(id)).unwrap_or(u32::MAX)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Reply(Vec<u8>),
    Event(WatchEvent),
}

/// What waits to be fetched, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Item>,
    reply_bytes: usize,
    events: usize,
    event_bytes: usize,
    /// One event per watch that could not queue a better one.
    overflow: VecDeque<WatchEvent>,
    /// The message being sent, and how much of it is gone.
    head: Vec<u8>,
    sent: usize,
}

fn cost(event: &WatchEvent) -> usize {
    event.path.len() + event.token.len() + 64
}

impl Outbox {
    pub(crate) fn reply(&mut self, message: Vec<u8>) {
        self.reply_bytes += message.len();
        self.queue.push_back(Item::Reply(message));
    }

    /// Queues an event unless the same one still waits. `own` stands for it when there is no room:
    /// the event of the same watch for the path it watches.
    pub(crate) fn event(&mut self, event: WatchEvent, own: WatchEvent, quotas: &Quotas) {
        let item = Item::Event(event);
        if self.queue.contains(&item) {
            return;
        }
        let Item::Event(event) = item else { return };
        if self.has_room_for(&event, quotas) {
            self.push_event(event);
        } else if !self.overflow.contains(&own) {
            self.overflow.push_back(own);
        }
    }

    /// A watch is gone: no event must stand in for it any longer.
    pub(crate) fn forget(&mut self, own: &WatchEvent) {
        self.overflow.retain(|waiting| waiting != own);
    }

    pub(crate) const fn reply_bytes(&self) -> usize {
        self.reply_bytes
    }

    /// The next bytes to send; empty when nothing waits.
    pub(crate) fn pending(&mut self, quotas: &Quotas) -> &[u8] {
        if self.sent >= self.head.len() {
            self.sent = 0;
            self.head = match self.pop(quotas) {
                None => Vec::new(),
                Some(Item::Reply(message)) => message,
                Some(Item::Event(event)) => encode(&event),
            };
        }
        self.head.get(self.sent..).unwrap_or_default()
    }

    /// So many of the pending bytes went out.
    pub(crate) const fn mark_sent(&mut self, bytes: usize) {
        self.sent = self.sent.saturating_add(bytes);
    }

    /// The next event, for a client that gets its replies otherwise.
    pub(crate) fn next_event(&mut self, quotas: &Quotas) -> Option<WatchEvent> {
        loop {
            match self.pop(quotas)? {
                Item::Event(event) => return Some(event),
                Item::Reply(_) => {}
            }
        }
    }

    pub(crate) fn has_events(&self) -> bool {
        self.events > 0
    }

    /// What is left of the message being sent.
    pub(crate) fn unsent_head(&self) -> &[u8] {
        self.head.get(self.sent..).unwrap_or_default()
    }

    /// Whole messages that wait, in order.
    pub(crate) fn items(&self) -> impl Iterator<Item = &Item> {
        self.queue.iter()
    }

    /// Events that stand for others.
    pub(crate) fn overflow(&self) -> impl Iterator<Item = &WatchEvent> {
        self.overflow.iter()
    }

    /// Puts back what [`unsent_head`](Self::unsent_head) said.
    pub(crate) fn restore_head(&mut self, head: Vec<u8>) {
        (self.head, self.sent) = (head, 0);
    }

    /// Puts back one of [`items`](Self::items).
    pub(crate) fn restore(&mut self, item: Item) {
        match item {
            Item::Reply(message) => self.reply(message),
            Item::Event(event) => self.push_event(event),
        }
    }

    /// Puts back one of [`overflow`](Self::overflow).
    pub(crate) fn restore_overflow(&mut self, event: WatchEvent) {
        self.overflow.push_back(event);
    }

    fn pop(&mut self, quotas: &Quotas) -> Option<Item> {
        let item = self.queue.pop_front()?;
        match &item {
            Item::Reply(message) => self.reply_bytes -= message.len(),
            Item::Event(event) => {
                self.events -= 1;
                self.event_bytes -= cost(event);
            }
        }
        while self.overflow.front().is_some_and(|own| self.has_room_for(own, quotas)) {
            let Some(own) = self.overflow.pop_front() else { break };
            if !self.queue.contains(&Item::Event(own.clone())) {
                self.push_event(own);
            }
        }
        Some(item)
    }

    const fn has_room_for(&self, event: &WatchEvent, quotas: &Quotas) -> bool {
        let bytes = event.path.len() + event.token.len() + 64;
        self.events < quotas.events && self.event_bytes + bytes <= quotas.event_bytes
    }

    fn push_event(&mut self, event: WatchEvent) {
        self.events += 1;
        self.event_bytes += cost(&event);
        self.queue.push_back(Item::Event(event));
    }
}

fn encode(event: &WatchEvent) -> Vec<u8> {
    let payload = [event.path.as_bytes(), b"\0", &*event.token, b"\0"].concat();
    wire::message(Kind::WatchEvent as u32, 0, 0, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(path: &str, token: &str) -> WatchEvent {
        WatchEvent { path: path.into(), token: token.as_bytes().into() }
    }

    #[test]
    fn what_waits_twice_is_sent_once_and_order_is_kept() {
        let quotas = Quotas::default();
        let mut outbox = Outbox::default();
        for path in ["/a", "/b", "/a"] {
            outbox.event(event(path, "t"), event("/", "t"), &quotas);
        }
        let seen: Vec<_> = core::iter::from_fn(|| outbox.next_event(&quotas)).collect();
        assert_eq!(seen, [event("/a", "t"), event("/b", "t")]);
        outbox.event(event("/a", "t"), event("/", "t"), &quotas);
        assert!(outbox.next_event(&quotas).is_some(), "what was fetched may come again");
    }

    #[test]
    fn too_many_events_become_one_per_watch() {
        let quotas = Quotas { events: 2, ..Quotas::default() };
        let mut outbox = Outbox::default();
        for number in 0..100 {
            outbox.event(event(&alloc::format!("/a/{number}"), "t"), event("/a", "t"), &quotas);
            outbox.event(event("/b/x", "u"), event("/b", "u"), &quotas);
        }
        let seen: Vec<_> = core::iter::from_fn(|| outbox.next_event(&quotas)).collect();
        let paths: Vec<_> = seen.iter().map(|event| &event.path[..]).collect();
        assert_eq!(paths, ["/a/0", "/b/x", "/a"]);
        assert_eq!((outbox.events, outbox.event_bytes), (0, 0));
    }

    #[test]
    fn output_is_sent_in_pieces() {
        let quotas = Quotas::default();
        let mut outbox = Outbox::default();
        outbox.reply(b"reply".to_vec());
        outbox.event(event("/a", "t"), event("/a", "t"), &quotas);
        let mut sent = Vec::new();
        while let [first, ..] = outbox.pending(&quotas) {
            sent.push(*first);
            outbox.mark_sent(1);
        }
        let tail = b"reply\x0f\0\0\0\0\0\0\0\0\0\0\0\x05\0\0\0/a\0t\0";
        assert_eq!(sent, tail);
        assert_eq!(outbox.reply_bytes(), 0);
    }
}
