//! The server: connections, domains, and one function that carries out a request.
//!
//! A turn of a client handles at most one request, so a client that floods the store waits for its next turn like all others.
//! The reply to a request is queued before the events that the request causes. Work that a request causes for other clients is
//! done in pieces: see [`Store::work`].

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use ring_protocol::store::{FEATURE_ERROR, FEATURE_RECONNECTION, FEATURE_WATCH_DEPTH};

use crate::connection::Connection;
use crate::domain::{Caller, ConnectionId, DomainId};
use crate::error::StoreError;
use crate::path::{INTRODUCE_DOMAIN, Path, RELEASE_DOMAIN};
use crate::permission::Permissions;
use crate::quota::Quotas;
use crate::request::{Request, WatchRequest};
use crate::tree::{Node, Tree, Usage};
use crate::view::{Changes, Fired, Ledger, View};
use crate::watch::{Watch, Watches};
use crate::wire::{self, Kind, Message, PAYLOAD_MAX, ProtocolError};
use crate::work::{Effect, Jobs};

/// The features of this server, as announced in the store page of each domain.
pub const FEATURES: u32 = FEATURE_RECONNECTION | FEATURE_ERROR | FEATURE_WATCH_DEPTH;

/// Something that the caller must do outside the store. The caller carries out duties in the order in which
/// [`Store::next_duty`] returns them.
#[must_use = "the store cannot map pages or bind ports itself"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Map the domain's store page, bind the domain's port, make both rings empty, and serve the domain.
    Attach {
        /// The domain.
        domain: DomainId,
        /// The frame of the domain's store page, as the client that introduced the domain gave it.
        frame: u64,
        /// The domain's end of the event channel.
        port: u32,
    },
    /// Stop serving this domain: unmap the domain's store page and close the port.
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
    /// Whether these bytes completed a message. If so, the message has been carried out and answered.
    pub message: bool,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Domain {
    /// Whether the domain has shut down and has not been resumed since. While this is true, watchers of `@releaseDomain` are
    /// not told of another shutdown.
    pub(crate) shut_down: bool,
}

type Outcome = Result<(Vec<u8>, Effect), StoreError>;

/// The store.
#[derive(Clone, Debug)]
pub struct Store {
    /// The domain in which this server runs. This domain owns the nodes that every store begins with.
    pub(crate) own: DomainId,
    pub(crate) tree: Tree,
    pub(crate) watches: Watches,
    pub(crate) connections: BTreeMap<ConnectionId, Connection>,
    pub(crate) domains: BTreeMap<DomainId, Domain>,
    pub(crate) duties: VecDeque<Duty>,
    pub(crate) quotas: Quotas,
    pub(crate) next_local: u32,
    /// Work that requests caused and that is still to be done.
    pub(crate) jobs: Jobs,
    pub(crate) steps: u64,
}

const DONE: &[u8] = b"OK\0";

impl Store {
    /// A store without clients, run by the domain `own`.
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
            jobs: Jobs::default(),
            steps: 0,
        }
    }

    /// Takes bytes that a client sent, at most up to the end of one message. Carries out and answers a message that is
    /// complete. Takes nothing in three cases: the client is not connected; the client has too many bytes of unfetched replies;
    /// the client made changes of which watchers have not been told yet, and these use too many bytes.
    ///
    /// # Errors
    /// The client announced too long a payload. The client's connection has been reset: see
    /// [`reset_connection`](Self::reset_connection).
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

    /// Whether [`handle`](Self::handle) would take bytes from this client now.
    #[must_use]
    pub fn accepts_input(&self, id: ConnectionId) -> bool {
        self.connections.get(&id).is_some_and(|connection| {
            connection.outbox.reply_bytes() < self.quotas.reply_bytes && connection.untold < self.quotas.untold_bytes
        })
    }

    /// How many more bytes this client must send to complete the header or, once the header is complete, the message. 0 if the
    /// client is not connected, or has announced too long a payload. The caller must not read more bytes than this from the
    /// client's ring.
    #[must_use]
    pub fn wanted_input(&self, id: ConnectionId) -> usize {
        let connection = self.connections.get(&id);
        connection.and_then(|connection| connection.input.wanted().ok()).unwrap_or(0)
    }

    /// Whether [`output`](Self::output) would return any bytes for this client.
    #[must_use]
    pub fn has_output(&self, id: ConnectionId) -> bool {
        self.connections.get(&id).is_some_and(|connection| connection.outbox.has_output())
    }

    /// Returns the next bytes to send to this client; empty if there are none.
    pub fn output(&mut self, id: ConnectionId) -> &[u8] {
        let Some(connection) = self.connections.get_mut(&id) else {
            return &[];
        };
        connection.outbox.pending(&self.quotas)
    }

    /// To be called when `bytes` bytes of [`output`](Self::output) have reached the client.
    pub fn output_sent(&mut self, id: ConnectionId, bytes: usize) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.outbox.mark_sent(bytes);
        }
    }

    /// Takes the oldest duty that the caller has not taken yet; `None` if no duty is left.
    pub fn next_duty(&mut self) -> Option<Duty> {
        self.duties.pop_front()
    }

    /// Drops everything that a client has open: watches, transactions, a half-received message, unfetched output. The client
    /// may continue with fresh rings.
    pub fn reset_connection(&mut self, id: ConnectionId) {
        self.watches.remove_all(id);
        if let Some(connection) = self.connections.get_mut(&id) {
            let untold = connection.untold;
            *connection = Connection { untold, ..Connection::new(connection.caller) };
        }
    }

    /// To be called when a domain has shut down (for whatever reason, suspension included), crashed or died. Tells the watchers
    /// of `@releaseDomain` once: not again until the domain has been resumed, or released and introduced anew. Does nothing if
    /// the domain is not introduced.
    pub fn domain_shut_down(&mut self, domain: DomainId) {
        let Some(state) = self.domains.get_mut(&domain) else {
            return;
        };
        if !core::mem::replace(&mut state.shut_down, true) {
            self.follow(None, Effect::Special(RELEASE_DOMAIN, domain));
        }
    }

    /// The limits in force.
    #[must_use]
    pub const fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// How many nodes a domain owns, and how many bytes of the heap these nodes use.
    #[must_use]
    pub fn usage(&self, domain: DomainId) -> Usage {
        self.tree.usage(domain)
    }

    /// Bytes of the heap charged to a domain's quota: its nodes, its watches, its open transactions, and its changes
    /// that watchers have not been told of yet.
    #[must_use]
    pub fn charged(&self, domain: DomainId) -> usize {
        self.tree.usage(domain).bytes + self.ledger().held(domain).unwrap_or(0)
    }

    /// How many steps have been done so far. A node counts as a step each time it is looked up in the tree, copied, checked for
    /// a commit, or committed. It also counts when it is visited to remove the rights of a domain that is gone. Each piece of a
    /// job that [`work`](Self::work) does is a step too (a look at one watch, for instance). Tests use this number to bound the
    /// length of a turn.
    #[must_use]
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// The committed tree, for reading.
    #[must_use]
    pub const fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Checks these things:
    /// - The tree is consistent.
    /// - Every watch belongs to a connection.
    /// - The number of watches that is recorded for a client is the number that the client has.
    /// - `untold` of a client is the number of bytes that pending jobs charge to the client.
    /// - No unprivileged client has too many watches or transactions.
    ///
    /// # Errors
    /// The first contradiction found, in words.
    pub fn audit(&self) -> Result<(), String> {
        self.tree.audit()?;
        let mut held: BTreeMap<ConnectionId, usize> = BTreeMap::new();
        for watch in self.watches.iter() {
            *held.entry(watch.connection).or_default() += 1;
            if !self.connections.contains_key(&watch.connection) {
                return Err(format!("a watch on {} belongs to nobody", watch.path));
            }
        }
        for (id, connection) in &self.connections {
            let counted = held.get(id).copied().unwrap_or(0);
            if counted != self.watches.held(*id).watches {
                return Err(format!("{id:?} has {counted} watches, and its count of them differs"));
            }
            let limits = !connection.caller.privileged;
            if limits && counted > self.quotas.watches {
                return Err(format!("{id:?} has {counted} watches"));
            }
            if limits && connection.transactions.len() > self.quotas.transactions {
                return Err(format!("{id:?} has too many transactions"));
            }
            if connection.untold != self.jobs.untold(*id) {
                return Err(format!(
                    "{id:?} is charged for {} bytes, and its jobs hold another number",
                    connection.untold
                ));
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
        self.follow(Some(id), effect);
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

    /// Carries out one request. Returns the reply and the effect of the request. The events of the request are not queued here:
    /// the caller must pass the effect to [`Store::follow`], which queues these events.
    pub(crate) fn perform(&mut self, id: ConnectionId, transaction: u32, request: Request<'_>) -> Outcome {
        let caller = self.connections.get(&id).ok_or(StoreError::NotFound)?.caller;
        match request {
            Request::Read(path) => self.look(id, transaction, &path, |node| Ok(node.value.to_vec())),
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

    /// Whether this domain has been introduced and not released since. The server's own domain always counts as introduced.
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

    /// Runs `work` on the tree as the transaction with this number sees the tree. Number 0 means a new transaction, which is
    /// committed if `work` succeeds. Returns what `work` returned, and the changes that watchers are to be told of. There are
    /// none if `transaction` is not 0, because nothing is committed then.
    pub(crate) fn in_view<R>(
        &mut self,
        id: ConnectionId,
        transaction: u32,
        work: impl FnOnce(&mut View<'_>) -> Result<R, StoreError>,
    ) -> Result<(R, Vec<Fired>), StoreError> {
        let connection = self.connections.get_mut(&id).ok_or(StoreError::NotFound)?;
        let caller = connection.caller;
        let mut changes = match transaction {
            0 => Changes::default(),
            number => connection.transactions.remove(&number).ok_or(StoreError::NotFound)?,
        };
        let ledger = Ledger { watches: &self.watches, connections: &self.connections };
        let mut view = View { tree: &self.tree, changes: &mut changes, caller: &caller, quotas: &self.quotas, ledger };
        let result = work(&mut view);
        if let Err(why @ (StoreError::NoSpace | StoreError::NoMemory)) = result {
            // The request may have stopped half-way: what it has done must not be committed.
            changes.doom(why);
        }
        self.steps += changes.take_work() as u64;
        if let (true, Some(connection)) = (transaction != 0, self.connections.get_mut(&id)) {
            connection.transactions.insert(transaction, changes);
            return Ok((result?, Vec::new()));
        }
        Ok((result?, self.commit(changes)))
    }

    pub(crate) fn commit(&mut self, changes: Changes) -> Vec<Fired> {
        self.steps += changes.len() as u64;
        changes.commit(&mut self.tree)
    }

    pub(crate) const fn ledger(&self) -> Ledger<'_> {
        Ledger { watches: &self.watches, connections: &self.connections }
    }

    /// Returns `list`. If the caller is unprivileged, leaves out each entry whose domain number is not introduced. If such an
    /// entry stayed, a domain that gets the number later would begin with rights that were meant for another (XSA-322). The
    /// first entry, which names the owner, always stays.
    fn without_strangers(&self, caller: &Caller, list: Permissions) -> Permissions {
        if caller.privileged {
            return list;
        }
        list.retaining(|domain| self.is_introduced(domain))
    }

    fn watch(&mut self, id: ConnectionId, caller: &Caller, asked: &WatchRequest<'_>) -> Outcome {
        let watch = Watch {
            number: 0,
            connection: id,
            path: asked.place.path.clone(),
            home: caller.domain,
            relative: asked.place.relative,
            token: asked.token.into(),
            depth: asked.depth,
        };
        if !caller.privileged {
            self.admit_watch(id, caller, watch.cost())?;
        }
        let watch = self.watches.add(watch)?;
        done(Effect::FirstEvent(watch))
    }

    fn admit_watch(&self, id: ConnectionId, caller: &Caller, bytes: usize) -> Result<(), StoreError> {
        if self.watches.held(id).watches >= self.quotas.watches {
            return Err(StoreError::TooBig);
        }
        let all = self.charged(caller.domain) + bytes;
        if all > self.quotas.memory_bytes { Err(StoreError::NoMemory) } else { Ok(()) }
    }

    fn unwatch(&mut self, id: ConnectionId, asked: &WatchRequest<'_>) -> Result<(), StoreError> {
        let removed = self.watches.remove(id, &asked.place.path, asked.token)?;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.outbox.forget(&removed);
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
        let (changes, caller) = (Changes::explicit(), connection.caller);
        let all = self.charged(caller.domain) + changes.bytes();
        if !caller.privileged && all > self.quotas.memory_bytes {
            return Err(StoreError::NoMemory);
        }
        let connection = self.connections.get_mut(&id).ok_or(StoreError::NotFound)?;
        connection.transactions.insert(number, changes);
        Ok((terminated(&format!("{number}")), Effect::None))
    }

    /// Ends a transaction: commits its changes if `commit` is true. The transaction is gone afterwards, even if the
    /// commit fails, so its number can be used again. Returns the changes that were committed.
    fn end_transaction(&mut self, id: ConnectionId, number: u32, commit: bool) -> Result<Vec<Fired>, StoreError> {
        let connection = self.connections.get_mut(&id).ok_or(StoreError::NotFound)?;
        let changes = connection.transactions.remove(&number).ok_or(StoreError::Invalid)?;
        if !commit {
            return Ok(Vec::new());
        }
        let caller = connection.caller;
        self.steps += changes.len() as u64;
        changes.check(&self.tree, &caller, &self.quotas, self.ledger())?;
        Ok(self.commit(changes))
    }

    fn introduce(&mut self, domain: DomainId, frame: u64, port: u32) -> Outcome {
        if domain == self.own {
            return Err(StoreError::Invalid);
        }
        // A domain number is rarely used again soon: unless the creator asks for a particular one, the hypervisor hands out
        // numbers in rising order, and starts over only at the end of the range. So the nodes and rights of the domain that had
        // this number before have usually been removed by now. Those that are left are removed here, before the new domain is
        // introduced.
        while self.jobs.unmakes(domain) && self.work() {}
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
            // An open transaction may give rights to the domain that is gone, so no open transaction can be committed any more.
            for changes in connection.transactions.values_mut() {
                changes.doom(StoreError::Again);
            }
        }
        self.duties.push_back(Duty::Detach { domain });
        done(Effect::Gone(domain))
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
}

#[allow(clippy::unnecessary_wraps, reason = "the outcome of a request is a result")]
fn done(effect: Effect) -> Outcome {
    Ok((DONE.to_vec(), effect))
}

fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn directory(node: &Node) -> Result<Vec<u8>, StoreError> {
    let list = node.children.as_bytes();
    if list.len() > PAYLOAD_MAX { Err(StoreError::TooBig) } else { Ok(list.to_vec()) }
}

/// Returns the node's generation, and then a part of the list of its children's names: from byte `offset` of the list, as many
/// whole names as fit into a message. An empty name after the last name of the list marks the end of the list.
fn directory_part(node: &Node, offset: usize) -> Vec<u8> {
    let list = node.children.as_bytes();
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
