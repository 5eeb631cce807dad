//! The server: connections, domains, and one function that carries out a request.
//!
//! Every step is one request of one client, so a client that floods waits for its next turn like all
//! others. A request is acknowledged before the events it causes are queued.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use ring_protocol::store::{FEATURE_ERROR, FEATURE_RECONNECTION, FEATURE_WATCH_DEPTH};

use crate::connection::Connection;
use crate::domain::{Caller, ConnectionId, DomainId};
use crate::error::StoreError;
use crate::path::{INTRODUCE_DOMAIN, Path, RELEASE_DOMAIN};
use crate::permission::{Permissions, Rights};
use crate::quota::Quotas;
use crate::request::{Request, WatchRequest};
use crate::tree::{Node, Tree, Usage};
use crate::view::{Changes, Fired, View};
use crate::watch::{Watch, Watches};
use crate::wire::{self, Kind, Message, PAYLOAD_MAX, ProtocolError};

/// What this server can do, as it announces it in the ring page.
pub const FEATURES: u32 = FEATURE_RECONNECTION | FEATURE_ERROR | FEATURE_WATCH_DEPTH;

/// Something the caller must do outside the store, in order.
#[must_use = "the store cannot map pages or bind ports itself"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Map the store page of this domain, bind its port, and serve it from the start.
    Attach {
        /// The domain.
        domain: DomainId,
        /// Frame of its store page, as the introducer named it.
        frame: u64,
        /// Its end of the event channel.
        port: u32,
    },
    /// Stop serving this domain, unmap and unbind.
    Detach {
        /// The domain.
        domain: DomainId,
    },
}

/// What a [`Store::handle`] call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handled {
    /// Bytes taken from the front of the input.
    pub taken: usize,
    /// Whether they completed a message, which then was carried out and answered.
    pub message: bool,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Domain {
    /// It shut down, and the watchers were told.
    pub(crate) shut_down: bool,
}

/// What follows from a request beside its reply.
#[derive(Debug)]
pub(crate) enum Effect {
    None,
    Changed(Vec<Fired>),
    /// The event every new watch starts with, for the caller alone.
    FirstEvent(Path, Box<Watch>),
    Special(&'static str, DomainId),
    /// A domain is gone: what it owned vanished, then the special name fires.
    Gone(Vec<Fired>, DomainId),
}

type Outcome = Result<(Vec<u8>, Effect), StoreError>;

/// The store.
#[derive(Clone, Debug)]
pub struct Store {
    /// The domain this server runs in: owner of the first nodes.
    pub(crate) own: DomainId,
    pub(crate) tree: Tree,
    pub(crate) watches: Watches,
    pub(crate) connections: BTreeMap<ConnectionId, Connection>,
    pub(crate) domains: BTreeMap<DomainId, Domain>,
    pub(crate) duties: VecDeque<Duty>,
    pub(crate) quotas: Quotas,
    pub(crate) next_local: u32,
}

const DONE: &[u8] = b"OK\0";

impl Store {
    /// A store without clients, run by domain `own`.
    #[must_use]
    pub fn new(own: DomainId, quotas: Quotas) -> Self {
        Self {
            own,
            tree: Tree::new(own),
            watches: Watches::default(),
            connections: BTreeMap::new(),
            domains: BTreeMap::new(),
            duties: VecDeque::new(),
            quotas,
            next_local: 0,
        }
    }

    /// Takes bytes a client sent: at most up to the end of one message, which is then carried out.
    /// Takes nothing while the client leaves too many replies unfetched, or is not connected.
    ///
    /// # Errors
    /// The client announced too long a payload. It has been disconnected: no transaction, no watch
    /// and no half-sent message of it is left.
    pub fn handle(&mut self, id: ConnectionId, bytes: &[u8]) -> Result<Handled, ProtocolError> {
        let nothing = Handled { taken: 0, message: false };
        if !self.accepts_input(id) {
            return Ok(nothing);
        }
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(nothing);
        };
        match connection.input.push(bytes) {
            Ok((taken, None)) => Ok(Handled { taken, message: false }),
            Ok((taken, Some(message))) => {
                self.answer(id, &message);
                Ok(Handled { taken, message: true })
            }
            Err(error) => {
                self.reset_connection(id);
                Err(error)
            }
        }
    }

    /// Whether [`handle`](Self::handle) would take anything from this client.
    #[must_use]
    pub fn accepts_input(&self, id: ConnectionId) -> bool {
        let waiting = |connection: &Connection| connection.outbox.reply_bytes();
        self.connections.get(&id).map(waiting).is_some_and(|bytes| bytes < self.quotas.reply_bytes)
    }

    /// How many bytes complete the header or message that has begun: never read further ahead.
    #[must_use]
    pub fn wanted_input(&self, id: ConnectionId) -> usize {
        let connection = self.connections.get(&id);
        connection.and_then(|connection| connection.input.wanted().ok()).unwrap_or(0)
    }

    /// The next bytes for this client; empty when nothing waits.
    pub fn output(&mut self, id: ConnectionId) -> &[u8] {
        let Some(connection) = self.connections.get_mut(&id) else {
            return &[];
        };
        connection.outbox.pending(&self.quotas)
    }

    /// So many bytes of [`output`](Self::output) reached the client.
    pub fn output_sent(&mut self, id: ConnectionId, bytes: usize) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.outbox.mark_sent(bytes);
        }
    }

    /// The next thing to be done outside, oldest first.
    pub fn next_duty(&mut self) -> Option<Duty> {
        self.duties.pop_front()
    }

    /// Forgets what a client has open: watches, transactions, half messages, unfetched output.
    /// The client may go on with a fresh ring.
    pub fn reset_connection(&mut self, id: ConnectionId) {
        self.watches.remove_all(id);
        if let Some(connection) = self.connections.get_mut(&id) {
            *connection = Connection::new(connection.caller);
        }
    }

    /// A domain shut down (for whatever reason, suspension included), crashed or died. Tells the
    /// watchers of `@releaseDomain`, once until the domain is resumed.
    pub fn domain_shut_down(&mut self, domain: DomainId) {
        let Some(state) = self.domains.get_mut(&domain) else {
            return;
        };
        if !core::mem::replace(&mut state.shut_down, true) {
            self.fire_special(RELEASE_DOMAIN, domain);
        }
    }

    /// The limits in force.
    #[must_use]
    pub const fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// What the nodes of a domain use.
    #[must_use]
    pub fn usage(&self, domain: DomainId) -> Usage {
        self.tree.usage(domain)
    }

    /// The committed tree, to look at.
    #[must_use]
    pub const fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Recomputes what the store promises about itself.
    ///
    /// # Errors
    /// The first contradiction found, in words.
    pub fn audit(&self) -> Result<(), String> {
        self.tree.audit()?;
        let mut held: BTreeMap<ConnectionId, usize> = BTreeMap::new();
        for (path, watch) in self.watches.iter() {
            *held.entry(watch.connection).or_default() += 1;
            if !self.connections.contains_key(&watch.connection) {
                return Err(format!("a watch on {path} belongs to nobody"));
            }
        }
        for (id, connection) in &self.connections {
            let counted = held.get(id).copied().unwrap_or(0);
            if counted != self.watches.held(*id).watches {
                return Err(format!("{id:?} has {counted} watches, and another number is noted"));
            }
            let limits = !connection.caller.privileged;
            if limits && counted > self.quotas.watches {
                return Err(format!("{id:?} has {counted} watches"));
            }
            if limits && connection.transactions.len() > self.quotas.transactions {
                return Err(format!("{id:?} has too many transactions"));
            }
        }
        Ok(())
    }

    fn answer(&mut self, id: ConnectionId, message: &Message) {
        let header = message.header;
        let outcome = self.decode_and_perform(id, message);
        let (kind, payload, effect) = match outcome {
            Ok((payload, effect)) => (header.kind, payload, effect),
            Err(error) => {
                let name = [error.name().as_bytes(), b"\0"].concat();
                (Kind::Error as u32, name, Effect::None)
            }
        };
        if let Some(connection) = self.connections.get_mut(&id) {
            let reply = wire::message(kind, header.request, header.transaction, &payload);
            connection.outbox.reply(reply);
        }
        self.fire(effect);
    }

    fn decode_and_perform(&mut self, id: ConnectionId, message: &Message) -> Outcome {
        let connection = self.connections.get(&id).ok_or(StoreError::NotFound)?;
        let Message { header, payload } = message;
        if header.transaction != 0 && !connection.transactions.contains_key(&header.transaction) {
            return Err(StoreError::NotFound);
        }
        let request = Request::decode(header.kind, payload, &connection.caller, &self.quotas)?;
        self.perform(id, header.transaction, request)
    }

    /// Carries out one request. What watches hear of is the caller's to fire.
    pub(crate) fn perform(&mut self, id: ConnectionId, transaction: u32, request: Request<'_>) -> Outcome {
        let caller = self.connections.get(&id).ok_or(StoreError::NotFound)?.caller;
        match request {
            Request::Read(path) => self.look(id, transaction, &path, |node| Ok(node.value.clone())),
            Request::Directory(path) => self.look(id, transaction, &path, directory),
            Request::DirectoryPart(path, offset) => {
                self.look(id, transaction, &path, |node| Ok(directory_part(node, offset)))
            }
            Request::GetPermissions(path) => self.look(id, transaction, &path, |node| {
                let list = node.permissions.encode();
                if list.len() > PAYLOAD_MAX { Err(StoreError::TooBig) } else { Ok(list) }
            }),
            Request::Write(path, value) => self.change(id, transaction, |view| view.write(&path, value)),
            Request::MakeDirectory(path) => self.change(id, transaction, |view| view.mkdir(&path)),
            Request::Remove(path) => self.change(id, transaction, |view| view.remove(&path)),
            Request::SetPermissions(path, list) => {
                let list = self.without_strangers(&caller, list);
                self.change(id, transaction, |view| view.set_permissions(&path, list))
            }
            Request::Watch(watch) => self.watch(id, &caller, &watch),
            Request::Unwatch(watch) => {
                self.unwatch(id, &watch)?;
                done(Effect::None)
            }
            Request::ResetWatches => {
                self.watches.remove_all(id);
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.transactions.clear();
                }
                done(Effect::None)
            }
            Request::TransactionStart if transaction != 0 => Err(StoreError::Busy),
            Request::TransactionStart => self.start_transaction(id),
            Request::TransactionEnd { commit } => {
                let fired = self.end_transaction(id, transaction, commit)?;
                done(Effect::Changed(fired))
            }
            Request::GetDomainPath(domain) => Ok((terminated(Path::home(domain).as_str()), Effect::None)),
            Request::GetFeature => Ok((terminated(&format!("{FEATURES}")), Effect::None)),
            Request::Introduce { domain, frame, port } => self.introduce(domain, frame, port),
            Request::Release(domain) => self.release(domain),
            Request::Resume(domain) => {
                self.domains.get_mut(&domain).ok_or(StoreError::NotFound)?.shut_down = false;
                done(Effect::None)
            }
            Request::SetTarget(domain, target) => {
                if !self.is_introduced(target) {
                    return Err(StoreError::NotFound);
                }
                let id = ConnectionId::Domain(domain);
                let connection = self.connections.get_mut(&id).ok_or(StoreError::NotFound)?;
                connection.caller.target = Some(target);
                done(Effect::None)
            }
            Request::IsDomainIntroduced(domain) => {
                let answer = if self.is_introduced(domain) { "T" } else { "F" };
                Ok((terminated(answer), Effect::None))
            }
            Request::Control(command) => self.control(command),
        }
    }

    /// Whether requests of this domain are, or could be, served.
    #[must_use]
    pub fn is_introduced(&self, domain: DomainId) -> bool {
        domain == self.own || self.domains.contains_key(&domain)
    }

    fn look(
        &mut self,
        id: ConnectionId,
        transaction: u32,
        path: &Path,
        show: impl FnOnce(&Node) -> Result<Vec<u8>, StoreError>,
    ) -> Outcome {
        let (node, _) = self.in_view(id, transaction, |view| view.node(path))?;
        Ok((show(&node)?, Effect::None))
    }

    fn change(
        &mut self,
        id: ConnectionId,
        transaction: u32,
        change: impl FnOnce(&mut View<'_>) -> Result<(), StoreError>,
    ) -> Outcome {
        let ((), fired) = self.in_view(id, transaction, change)?;
        done(Effect::Changed(fired))
    }

    /// Lets `work` see the tree inside a transaction, or in one of its own that is committed when
    /// it succeeds.
    pub(crate) fn in_view<R>(
        &mut self,
        id: ConnectionId,
        transaction: u32,
        work: impl FnOnce(&mut View<'_>) -> Result<R, StoreError>,
    ) -> Result<(R, Vec<Fired>), StoreError> {
        let connection = self.connections.get_mut(&id).ok_or(StoreError::NotFound)?;
        let watch_bytes = self.watches.held(id).bytes;
        let other_bytes = watch_bytes + connection.transaction_bytes(transaction);
        let mut own = Changes::default();
        let changes = match transaction {
            0 => &mut own,
            number => connection.transactions.get_mut(&number).ok_or(StoreError::NotFound)?,
        };
        let mut view = View {
            tree: &self.tree,
            changes: &mut *changes,
            caller: &connection.caller,
            quotas: &self.quotas,
            other_bytes,
        };
        let result = work(&mut view);
        if let Err(why @ (StoreError::NoSpace | StoreError::NoMemory)) = result {
            // The request may have stopped half-way: what it did must not be committed.
            changes.doom(why);
        }
        Ok((result?, own.commit(&mut self.tree)))
    }

    /// Without entries for domains that do not exist, when an unprivileged caller names them: a
    /// later domain of that number must not find rights waiting (XSA-322).
    fn without_strangers(&self, caller: &Caller, list: Permissions) -> Permissions {
        if caller.privileged {
            return list;
        }
        list.retaining(|domain| self.is_introduced(domain))
    }

    fn watch(&mut self, id: ConnectionId, caller: &Caller, asked: &WatchRequest<'_>) -> Outcome {
        let watch = Watch {
            connection: id,
            home: caller.domain,
            relative: asked.place.relative,
            token: asked.token.into(),
            depth: asked.depth,
        };
        let path = &asked.place.path;
        if !caller.privileged {
            self.admit_watch(id, caller, watch.cost(path))?;
        }
        self.watches.add(path.clone(), watch.clone())?;
        done(Effect::FirstEvent(path.clone(), Box::new(watch)))
    }

    fn admit_watch(&self, id: ConnectionId, caller: &Caller, bytes: usize) -> Result<(), StoreError> {
        let held = self.watches.held(id);
        if held.watches >= self.quotas.watches {
            return Err(StoreError::TooBig);
        }
        let open = self.connections.get(&id).map_or(0, |open| open.transaction_bytes(0));
        let all = held.bytes + bytes + open + self.tree.usage(caller.domain).bytes;
        if all > self.quotas.memory_bytes { Err(StoreError::NoMemory) } else { Ok(()) }
    }

    fn unwatch(&mut self, id: ConnectionId, asked: &WatchRequest<'_>) -> Result<(), StoreError> {
        let path = &asked.place.path;
        let removed = self.watches.remove(id, path, asked.token)?;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.outbox.forget(&removed.event(path));
        }
        Ok(())
    }

    fn start_transaction(&mut self, id: ConnectionId) -> Outcome {
        let connection = self.connections.get_mut(&id).ok_or(StoreError::NotFound)?;
        let open = connection.transactions.len();
        if !connection.caller.privileged && open >= self.quotas.transactions {
            return Err(StoreError::NoSpace);
        }
        let number = connection.free_transaction();
        connection.transactions.insert(number, Changes::explicit());
        Ok((terminated(&format!("{number}")), Effect::None))
    }

    /// Ends a transaction; its number is free again whatever the outcome.
    fn end_transaction(&mut self, id: ConnectionId, number: u32, commit: bool) -> Result<Vec<Fired>, StoreError> {
        let connection = self.connections.get_mut(&id).ok_or(StoreError::NotFound)?;
        let changes = connection.transactions.remove(&number).ok_or(StoreError::Invalid)?;
        if !commit {
            return Ok(Vec::new());
        }
        changes.check(&self.tree, &connection.caller, &self.quotas)?;
        Ok(changes.commit(&mut self.tree))
    }

    fn introduce(&mut self, domain: DomainId, frame: u64, port: u32) -> Outcome {
        if domain == self.own {
            return Err(StoreError::Invalid);
        }
        let id = ConnectionId::Domain(domain);
        self.duties.push_back(Duty::Attach { domain, frame, port });
        if self.domains.contains_key(&domain) {
            self.reset_connection(id);
            return done(Effect::None);
        }
        self.domains.insert(domain, Domain::default());
        let caller = Caller { domain, privileged: false, target: None };
        self.connections.insert(id, Connection::new(caller));
        done(Effect::Special(INTRODUCE_DOMAIN, domain))
    }

    fn release(&mut self, domain: DomainId) -> Outcome {
        self.domains.remove(&domain).ok_or(StoreError::NotFound)?;
        let id = ConnectionId::Domain(domain);
        self.watches.remove_all(id);
        self.connections.remove(&id);
        for connection in self.connections.values_mut() {
            if connection.caller.target == Some(domain) {
                connection.caller.target = None;
            }
            // An open transaction may hold rights it gave to the domain that is gone.
            for changes in connection.transactions.values_mut() {
                changes.doom(StoreError::Again);
            }
        }
        self.duties.push_back(Duty::Detach { domain });
        done(Effect::Gone(self.clear_domain(domain), domain))
    }

    /// Removes the nodes a domain owns and the rights it was given, so that the next domain with
    /// its number inherits nothing (XSA-322, XSA-419).
    fn clear_domain(&mut self, domain: DomainId) -> Vec<Fired> {
        let caller = Caller { domain: self.own, privileged: true, target: None };
        let mut changes = Changes::default();
        let mut view =
            View { tree: &self.tree, changes: &mut changes, caller: &caller, quotas: &self.quotas, other_bytes: 0 };
        for (path, node) in self.tree.iter() {
            if node.permissions.owner() == domain {
                // The root and special names cannot be removed; they go back to us.
                if view.remove(path).is_err() {
                    let _ = view.set_permissions(path, Permissions::private(self.own));
                }
            }
        }
        let fired = changes.commit(&mut self.tree);
        let mentioning = self.tree.iter().filter(|(_, node)| node.permissions.mention(domain));
        let mentioned: Vec<(Path, Node)> = mentioning.map(|(path, node)| (path.clone(), Node::clone(node))).collect();
        for (path, mut node) in mentioned {
            node.permissions = node.permissions.retaining(|named| named != domain);
            self.tree.insert(path, node);
        }
        fired
    }

    fn control(&self, command: &[u8]) -> Outcome {
        match command {
            b"help" => Ok((terminated("check help"), Effect::None)),
            b"check" => {
                let text = self.audit().err().unwrap_or_else(|| "OK".into());
                Ok((terminated(&text), Effect::None))
            }
            _ => Err(StoreError::Invalid),
        }
    }

    /// Tells the watchers.
    pub(crate) fn fire(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Changed(fired) => self.fire_changes(&fired),
            Effect::FirstEvent(path, watch) => {
                let event = watch.event(&path);
                if let Some(connection) = self.connections.get_mut(&watch.connection) {
                    connection.outbox.event(event.clone(), event, &self.quotas);
                }
            }
            Effect::Special(name, domain) => self.fire_special(name, domain),
            Effect::Gone(fired, domain) => {
                self.fire_changes(&fired);
                self.fire_special(RELEASE_DOMAIN, domain);
            }
        }
    }

    /// A watcher hears of a change if it may read the node, or the directory it lies in, or could
    /// read the node before (XSA-115).
    fn fire_changes(&mut self, fired: &[Fired]) {
        for Fired { change, before } in fired {
            let path = &change.path;
            let now = self.tree.get(path).cloned();
            let parent = path.parent().and_then(|parent| self.tree.get(&parent).cloned());
            let witnesses = [now, parent, before.clone()];
            let may_hear = |caller: &Caller| {
                let allows = |node: &Arc<Node>| node.permissions.allow(caller, Rights::READ);
                witnesses.iter().flatten().any(allows)
            };
            for (at, watch) in self.watches.at_or_above(path) {
                if change.exact && at != *path {
                    continue;
                }
                let Some(connection) = self.connections.get_mut(&watch.connection) else {
                    continue;
                };
                if may_hear(&connection.caller) {
                    let (event, own) = (watch.event(path), watch.event(&at));
                    connection.outbox.event(event, own, &self.quotas);
                }
            }
        }
    }

    fn fire_special(&mut self, name: &'static str, domain: DomainId) {
        let name = Path::literal(name);
        let Some(node) = self.tree.get(&name).cloned() else {
            return;
        };
        for watch in self.watches.on(&name) {
            let Some(connection) = self.connections.get_mut(&watch.connection) else {
                continue;
            };
            if node.permissions.allow(&connection.caller, Rights::READ) {
                let (event, own) = (watch.special_event(&name, domain), watch.event(&name));
                connection.outbox.event(event, own, &self.quotas);
            }
        }
    }
}

#[allow(clippy::unnecessary_wraps, reason = "the outcome of a request is a result")]
fn done(effect: Effect) -> Outcome {
    Ok((DONE.to_vec(), effect))
}

fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn child_list(node: &Node) -> Vec<u8> {
    let mut list = Vec::new();
    for name in &node.children {
        list.extend_from_slice(name.as_bytes());
        list.push(0);
    }
    list
}

fn directory(node: &Node) -> Result<Vec<u8>, StoreError> {
    let list = child_list(node);
    if list.len() > PAYLOAD_MAX { Err(StoreError::TooBig) } else { Ok(list) }
}

/// The generation, then whole names from `offset` on as far as they fit; an empty name after the
/// last one says that the list is complete.
fn directory_part(node: &Node, offset: usize) -> Vec<u8> {
    let list = child_list(node);
    let mut reply = terminated(&format!("{}", node.generation));
    let rest = list.get(offset..).unwrap_or_default();
    let room = PAYLOAD_MAX - reply.len();
    if rest.len() < room {
        reply.extend_from_slice(rest);
        reply.push(0);
        return reply;
    }
    let fitting = rest.get(..room).unwrap_or(rest);
    let end = fitting.iter().rposition(|byte| *byte == 0).map_or(0, |last| last + 1);
    reply.extend_from_slice(fitting.get(..end).unwrap_or_default());
    reply
}
