//! One client: its half-sent message, its unfetched output, its open transactions.
//!
//! All are bounded whatever the client does: at most one message of input; replies up to a limit, at which no request
//! is taken; events up to a limit, beyond which each watch keeps one event for its own path (an extra event is always
//! allowed, a lost event never; ABI io 3.3, 3.6).

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Bound::{Excluded, Unbounded};

use crate::domain::Caller;
use crate::path::Path;
use crate::quota::{Quotas, heap, map_entry, shared};
use crate::view::Changes;
use crate::watch::{Watch, WatchEvent};
use crate::wire::{self, Assembler, Kind};

/// A client's side of the server.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pub(crate) caller: Caller,
    pub(crate) input: Assembler,
    pub(crate) outbox: Outbox,
    pub(crate) transactions: BTreeMap<u32, Changes>,
    /// Bytes of the client's changes that watchers have not been told of yet.
    pub(crate) untold: usize,
}

impl Connection {
    pub(crate) fn new(caller: Caller) -> Self {
        Self {
            caller,
            input: Assembler::default(),
            outbox: Outbox::default(),
            transactions: BTreeMap::new(),
            untold: 0,
        }
    }

    /// Bytes of open transactions and of changes not told.
    pub(crate) fn held(&self) -> usize {
        self.transactions.values().map(Changes::bytes).sum::<usize>() + self.untold
    }

    /// The smallest number that no open transaction has.
    pub(crate) fn free_transaction(&self) -> u32 {
        (1..).find(|id| !self.transactions.contains_key(id)).unwrap_or(u32::MAX)
    }
}

/// An event that waits to be fetched: its watch, and the path that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) watch: Arc<Watch>,
    pub(crate) path: Path,
}

impl Event {
    /// Bytes of the heap that the event uses. Path and token are counted in full, though other events may share them.
    fn cost(&self) -> usize {
        let places = 2 * size_of::<Item>() + map_entry(size_of::<Text>());
        places + shared(self.path.as_str().len()) + shared(self.watch.token.len())
    }

    /// The event as the client sees it; events with equal texts are the same to the client.
    fn text(&self) -> Text {
        (self.path.clone(), self.watch.relative, Arc::clone(&self.watch.token))
    }
}

/// A path, whether it is shown relative to a home, and a token.
type Text = (Path, bool, Arc<[u8]>);

/// Bytes of the heap that a reply uses.
fn reply_cost(message: &[u8]) -> usize {
    heap(message.len()) + 2 * size_of::<Item>()
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Reply(Vec<u8>),
    Event(Event),
}

/// Output that waits to be fetched, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Item>,
    reply_bytes: usize,
    /// The texts of the events in the queue; an event whose text is here is not queued again.
    waiting: BTreeSet<Text>,
    event_bytes: usize,
    /// Watches whose event found no room: each gets one event for its own path as soon as there is room.
    overflow: BTreeMap<u64, Arc<Watch>>,
    /// The number of the watch in `overflow` that was served last.
    served: u64,
    /// The message being sent.
    head: Vec<u8>,
    /// How many bytes of `head` are sent.
    sent: usize,
}

impl Outbox {
    pub(crate) fn reply(&mut self, message: Vec<u8>) {
        self.reply_bytes += reply_cost(&message);
        self.queue.push_back(Item::Reply(message));
    }

    /// Queues an event for a change at `path`, unless an equal event still waits. If there is no room for the event,
    /// the watch will be told that its own path changed.
    pub(crate) fn event(&mut self, watch: &Arc<Watch>, path: &Path, quotas: &Quotas) {
        if self.overflow.contains_key(&watch.number) {
            return;
        }
        let event = Event { watch: Arc::clone(watch), path: path.clone() };
        if self.waiting.contains(&event.text()) {
            return;
        }
        if self.has_room_for(&event, quotas) {
            self.push_event(event);
        } else {
            self.overflow.insert(watch.number, event.watch);
        }
    }

    /// Drops the overflow event owed to a watch that was removed.
    pub(crate) fn forget(&mut self, watch: &Watch) {
        self.overflow.remove(&watch.number);
    }

    pub(crate) const fn reply_bytes(&self) -> usize {
        self.reply_bytes
    }

    /// Whether there is output.
    pub(crate) fn has_output(&self) -> bool {
        self.sent < self.head.len() || !self.queue.is_empty()
    }

    /// Returns the next bytes to send; empty if there is no output.
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

    /// Tells that `bytes` of the pending bytes were sent.
    pub(crate) const fn mark_sent(&mut self, bytes: usize) {
        self.sent = self.sent.saturating_add(bytes);
    }

    /// Takes the next event. For local sessions, whose replies are return values.
    pub(crate) fn next_event(&mut self, quotas: &Quotas) -> Option<WatchEvent> {
        loop {
            match self.pop(quotas)? {
                Item::Event(event) => return Some(event.watch.event(&event.path)),
                Item::Reply(_) => {}
            }
        }
    }

    pub(crate) fn has_events(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The unsent rest of the message being sent.
    pub(crate) fn unsent_head(&self) -> &[u8] {
        self.head.get(self.sent..).unwrap_or_default()
    }

    /// The whole messages that wait, in order.
    pub(crate) fn items(&self) -> impl Iterator<Item = &Item> {
        self.queue.iter()
    }

    /// Puts back what [`unsent_head`](Self::unsent_head) returned.
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

    fn pop(&mut self, quotas: &Quotas) -> Option<Item> {
        let item = self.queue.pop_front()?;
        match &item {
            Item::Reply(message) => self.reply_bytes -= reply_cost(message),
            Item::Event(event) => {
                self.waiting.remove(&event.text());
                self.event_bytes -= event.cost();
            }
        }
        while let Some(event) = self.next_overflow().filter(|event| self.has_room_for(event, quotas)) {
            self.served = event.watch.number;
            self.overflow.remove(&self.served);
            if !self.waiting.contains(&event.text()) {
                self.push_event(event);
            }
        }
        Some(item)
    }

    /// The event for the next watch in `overflow`, in turn.
    fn next_overflow(&self) -> Option<Event> {
        let behind = self.overflow.range((Excluded(self.served), Unbounded)).next();
        let (_, watch) = behind.or_else(|| self.overflow.first_key_value())?;
        Some(Event { watch: Arc::clone(watch), path: watch.path.clone() })
    }

    fn has_room_for(&self, event: &Event, quotas: &Quotas) -> bool {
        self.waiting.len() < quotas.events && self.event_bytes + event.cost() <= quotas.event_bytes
    }

    fn push_event(&mut self, event: Event) {
        self.waiting.insert(event.text());
        self.event_bytes += event.cost();
        self.queue.push_back(Item::Event(event));
    }
}

fn encode(event: &Event) -> Vec<u8> {
    let WatchEvent { path, token } = event.watch.event(&event.path);
    let payload = [path.as_bytes(), b"\0", &*token, b"\0"].concat();
    wire::message(Kind::WatchEvent as u32, 0, 0, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::domain::{ConnectionId, DomainId};

    fn watch(path: &str, token: &str) -> Arc<Watch> {
        let home = DomainId(5);
        Arc::new(Watch {
            number: token.bytes().next().unwrap().into(),
            connection: ConnectionId::Domain(home),
            path: Path::literal(path),
            home,
            relative: false,
            token: token.as_bytes().into(),
            depth: None,
        })
    }

    fn told(path: &str, token: &str) -> WatchEvent {
        WatchEvent { path: path.into(), token: token.as_bytes().into() }
    }

    #[test]
    fn what_waits_twice_is_sent_once_and_order_is_kept() {
        let quotas = Quotas::default();
        let mut outbox = Outbox::default();
        for path in ["/a", "/b", "/a"] {
            outbox.event(&watch("/", "t"), &Path::literal(path), &quotas);
        }
        let seen: Vec<_> = core::iter::from_fn(|| outbox.next_event(&quotas)).collect();
        assert_eq!(seen, [told("/a", "t"), told("/b", "t")]);
        outbox.event(&watch("/", "t"), &Path::literal("/a"), &quotas);
        assert!(outbox.next_event(&quotas).is_some(), "what was fetched may come again");
    }

    #[test]
    fn too_many_events_become_one_per_watch() {
        let quotas = Quotas { events: 2, ..Quotas::default() };
        let mut outbox = Outbox::default();
        for number in 0..100 {
            outbox.event(&watch("/a", "t"), &Path::literal(&alloc::format!("/a/{number}")), &quotas);
            outbox.event(&watch("/b", "u"), &Path::literal("/b/x"), &quotas);
        }
        let seen: Vec<_> = core::iter::from_fn(|| outbox.next_event(&quotas)).collect();
        let paths: Vec<_> = seen.iter().map(|event| &event.path[..]).collect();
        assert_eq!(paths, ["/a/0", "/b/x", "/a"]);
        assert_eq!((outbox.waiting.len(), outbox.event_bytes, outbox.overflow.len()), (0, 0, 0));
    }

    #[test]
    fn output_is_sent_in_pieces() {
        let quotas = Quotas::default();
        let mut outbox = Outbox::default();
        outbox.reply(b"reply".to_vec());
        outbox.event(&watch("/a", "t"), &Path::literal("/a"), &quotas);
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
