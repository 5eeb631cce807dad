//! The whole store as bytes, so that a new server continues as if the old one had never stopped (ABI io 9.4).
//!
//! Stock guests cannot register watches again or repeat requests, so what they have open must survive. A snapshot taken
//! between two steps agrees with the ring pages, because a step publishes indices only for bytes that the store has
//! taken or sent. The snapshot holds the tree; the domains with their watches, half-received messages and unfetched
//! output; and the numbers of open transactions. A restored transaction reads the live tree, and its commit returns
//! `Again`, on which clients repeat it by themselves. Sessions of the server's own domain are not kept: they end with
//! the old server.
//!
//! Layout: magic, checksum of the rest, the rest. Numbers are little-endian, byte strings have their
//! length in front. A snapshot is used only if its checksum and the audit agree.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::connection::{Connection, Event, Item};
use crate::domain::{Caller, ConnectionId, DomainId};
use crate::path::Path;
use crate::permission::{Permission, Permissions};
use crate::quota::Quotas;
use crate::server::{Domain, Store};
use crate::tree::Node;
use crate::view::Changes;
use crate::watch::{Watch, WatchEvent};
use crate::wire::HEADER_BYTES;

const MAGIC: &[u8; 8] = b"TNSTORE2";

/// Why a snapshot cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotError {
    /// The bytes are not a snapshot, or one of another version.
    Magic,
    /// The snapshot changed since it was taken.
    Checksum,
    /// The snapshot ends early or a field is impossible; the number is the offset after the checksum.
    Malformed(usize),
    /// The store in the snapshot contradicts itself.
    Audit(String),
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("no store snapshot of this version"),
            Self::Checksum => f.write_str("store snapshot has a wrong checksum"),
            Self::Malformed(at) => write!(f, "store snapshot is malformed at byte {at}"),
            Self::Audit(why) => write!(f, "store snapshot contradicts itself: {why}"),
        }
    }
}

impl Store {
    /// Writes down everything that a new server needs. This is the last call to a server. Unlike other calls it takes
    /// time in proportion to the size of the store, and it finishes all work that is left.
    #[must_use]
    pub fn save(&mut self) -> Vec<u8> {
        while self.work() {}
        let mut out = Writer(Vec::new());
        out.number(self.own.0);
        let nodes: Vec<_> = self.tree.iter().collect();
        out.list(&nodes, |out, (path, node)| {
            out.bytes(path.as_str().as_bytes());
            out.bytes(&node.value);
            let entries: Vec<_> = node.permissions.entries().collect();
            out.list(&entries, |out, entry| out.bytes(&entry.encode()));
        });
        let domains: Vec<_> = self.domains.iter().collect();
        out.list(&domains, |out, (domain, state)| {
            out.number(domain.0);
            out.flag(state.shut_down);
            self.save_connection(out, **domain);
        });
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&checksum(&out.0).to_le_bytes());
        bytes.append(&mut out.0);
        bytes
    }

    fn save_connection(&self, out: &mut Writer, domain: DomainId) {
        let id = ConnectionId::Domain(domain);
        let Some(connection) = self.connections.get(&id) else {
            out.flag(false);
            return;
        };
        out.flag(true);
        out.option(connection.caller.target.map(|target| u32::from(target.0)));
        out.bytes(connection.input.partial());
        let transactions: Vec<_> = connection.transactions.keys().copied().collect();
        out.list(&transactions, |out, number| out.word(*number));
        out.bytes(connection.outbox.unsent_head());
        let items: Vec<_> = connection.outbox.items().collect();
        out.list(&items, |out, item| out.item(item));
        let watches: Vec<_> = self.watches.of(id).collect();
        out.list(&watches, |out, watch| {
            out.bytes(watch.path.as_str().as_bytes());
            out.flag(watch.relative);
            out.option(watch.depth);
            out.bytes(&watch.token);
        });
    }

    /// Makes a store from a snapshot. The caller attaches the links again ([`Link::attach`]) without introducing the
    /// domains. Every watch fires once, since its client may not know of changes just before the restart.
    ///
    /// [`Link::attach`]: crate::transport::Link::attach
    ///
    /// # Errors
    /// The snapshot is damaged; nothing of it is used.
    pub fn restore(snapshot: &[u8], quotas: Quotas) -> Result<Self, SnapshotError> {
        let rest = snapshot.strip_prefix(MAGIC).ok_or(SnapshotError::Magic)?;
        let (sum, body) = rest.split_first_chunk().ok_or(SnapshotError::Checksum)?;
        if u64::from_le_bytes(*sum) != checksum(body) {
            return Err(SnapshotError::Checksum);
        }
        let mut reader = Reader { bytes: body, at: 0 };
        let store = Self::read(&mut reader, quotas);
        let mut store = store.filter(|_| reader.at == body.len()).ok_or(reader.malformed())?;
        store.audit().map_err(SnapshotError::Audit)?;
        store.fire_every_watch();
        Ok(store)
    }

    fn read(from: &mut Reader<'_>, quotas: Quotas) -> Option<Self> {
        let own = from.domain()?;
        let mut store = Self::new(own, quotas);
        for _ in 0..from.word()? {
            let path = from.path(own)?;
            let value = from.bytes()?;
            let permissions = from.permissions()?;
            // A directory was saved before the nodes below it, so each node finds its parent.
            if let Some(parent) = path.parent() {
                let mut grown = Node::clone(store.tree.get(&parent)?);
                grown.children = grown.children.with(path.name());
                store.tree.insert(parent, grown);
            }
            store.tree.insert(path, Node::leaf(value, permissions));
        }
        for _ in 0..from.word()? {
            let domain = from.domain()?;
            let shut_down = from.flag()?;
            store.domains.insert(domain, Domain { shut_down });
            if from.flag()? {
                store.read_connection(from, domain)?;
            }
        }
        Some(store)
    }

    fn read_connection(&mut self, from: &mut Reader<'_>, domain: DomainId) -> Option<()> {
        let id = ConnectionId::Domain(domain);
        let target = match from.option()? {
            Some(target) => Some(DomainId(u16::try_from(target).ok()?)),
            None => None,
        };
        let mut connection = Connection::new(Caller { domain, privileged: false, target });
        let (taken, whole) = connection.input.push(from.bytes()?).ok()?;
        if whole.is_some() || taken != connection.input.partial().len() {
            return None;
        }
        for _ in 0..from.word()? {
            connection.transactions.insert(from.word()?, Changes::lost());
        }
        let head = from.bytes()?.to_vec();
        connection.outbox.restore_head(head);
        for _ in 0..from.word()? {
            connection.outbox.restore(from.item(domain)?);
        }
        for _ in 0..from.word()? {
            let path = from.path(domain)?;
            let relative = from.flag()?;
            let depth = from.option()?;
            let token = from.bytes()?.into();
            let watch = Watch { number: 0, connection: id, path, home: domain, relative, token, depth };
            self.watches.add(watch).ok()?;
        }
        self.connections.insert(id, connection);
        Some(())
    }

    fn fire_every_watch(&mut self) {
        for watch in self.watches.iter() {
            if let Some(connection) = self.connections.get_mut(&watch.connection) {
                connection.outbox.event(watch, &watch.path, &self.quotas);
            }
        }
    }
}

/// FNV-1a over 64 bits: enough to find accidental damage, which is all it is for.
fn checksum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, number: u16) {
        self.word(number.into());
    }

    fn word(&mut self, word: u32) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    fn flag(&mut self, flag: bool) {
        self.0.push(flag.into());
    }

    fn option(&mut self, word: Option<u32>) {
        self.flag(word.is_some());
        self.word(word.unwrap_or(0));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        // No byte string is too long for a word: values, tokens and messages are far shorter.
        self.word(u32::try_from(bytes.len()).unwrap_or(0));
        self.0.extend_from_slice(bytes);
    }

    fn list<T>(&mut self, items: &[T], mut one: impl FnMut(&mut Self, &T)) {
        self.word(u32::try_from(items.len()).unwrap_or(0));
        for item in items {
            one(self, item);
        }
    }

    fn item(&mut self, item: &Item) {
        match item {
            Item::Reply(message) => {
                self.flag(false);
                self.bytes(message);
            }
            Item::Event(event) => {
                self.flag(true);
                let WatchEvent { path, token } = event.watch.event(&event.path);
                self.bytes(path.as_bytes());
                self.bytes(&token);
            }
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    const fn malformed(&self) -> SnapshotError {
        SnapshotError::Malformed(self.at)
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..)?.get(..count)?;
        self.at += count;
        Some(taken)
    }

    fn word(&mut self) -> Option<u32> {
        let bytes = self.take(4)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    fn domain(&mut self) -> Option<DomainId> {
        u16::try_from(self.word()?).ok().map(DomainId)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.take(1)? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    fn option(&mut self) -> Option<Option<u32>> {
        let present = self.flag()?;
        let word = self.word()?;
        Some(present.then_some(word))
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let count = usize::try_from(self.word()?).ok()?;
        self.take(count)
    }

    fn path(&mut self, own: DomainId) -> Option<Path> {
        Path::resolve_special(self.bytes()?, own).ok().map(|resolved| resolved.path)
    }

    fn permissions(&mut self) -> Option<Permissions> {
        let mut entries = Vec::new();
        for _ in 0..self.word()? {
            entries.push(Permission::parse(self.bytes()?).ok()?);
        }
        Permissions::new(&entries).ok()
    }

    /// Reads an event. Its watch may be gone, so a watch that only holds the event's path and token stands in for it.
    fn event(&mut self, domain: DomainId) -> Option<Event> {
        let path = Path::literal(core::str::from_utf8(self.bytes()?).ok()?);
        let token = self.bytes()?.into();
        let connection = ConnectionId::Domain(domain);
        let watch =
            Watch { number: 0, connection, path: path.clone(), home: domain, relative: false, token, depth: None };
        Some(Event { watch: Arc::new(watch), path })
    }

    fn item(&mut self, domain: DomainId) -> Option<Item> {
        if self.flag()? {
            return self.event(domain).map(Item::Event);
        }
        let message = self.bytes()?;
        (message.len() >= HEADER_BYTES).then(|| Item::Reply(message.to_vec()))
    }
}
