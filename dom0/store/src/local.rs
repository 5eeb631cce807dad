//! Sessions inside the server's own domain: the toolstack and the back ends make requests by calls.
//!
//! A session is privileged. Its transactions are closures: no other client runs in between, so a transaction cannot
//! conflict, and other clients' writes cannot starve it (XSA-206).

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::connection::Connection;
use crate::domain::{Caller, ConnectionId, DomainId};
use crate::error::StoreError;
use crate::path::Path;
use crate::permission::Permissions;
use crate::request::{Reader, Request, WatchRequest};
use crate::server::Store;
use crate::view::View;
use crate::watch::WatchEvent;
use crate::work::Effect;

impl Store {
    /// Opens a privileged session. Only code in the server's own domain can call this.
    pub fn open_local(&mut self) -> ConnectionId {
        let id = ConnectionId::Local(self.next_local);
        self.next_local = self.next_local.wrapping_add(1);
        let caller = Caller { domain: self.own, privileged: true, target: None };
        self.connections.insert(id, Connection::new(caller));
        id
    }

    /// Closes a session and removes its watches.
    pub fn close_local(&mut self, id: ConnectionId) {
        if matches!(id, ConnectionId::Local(_)) {
            self.watches.remove_all(id);
            self.connections.remove(&id);
        }
    }

    /// Returns the calls that a connection can make. If the connection is not open, every call returns `NotFound`; on a
    /// domain's connection, the domain's rights apply.
    pub const fn session(&mut self, id: ConnectionId) -> Session<'_> {
        Session { store: self, id }
    }

    fn ask(&mut self, id: ConnectionId, request: Request<'_>) -> Result<Vec<u8>, StoreError> {
        let (reply, effect) = self.perform(id, 0, request)?;
        self.follow(Some(id), effect);
        Ok(reply)
    }
}

/// Direct calls on behalf of one connection. Paths are absolute, or relative to the connection's home.
#[derive(Debug)]
pub struct Session<'a> {
    store: &'a mut Store,
    id: ConnectionId,
}

impl Session<'_> {
    /// Runs `work` as one transaction: all of its changes take effect if it succeeds, none if it fails.
    ///
    /// # Errors
    /// The error that `work` returns.
    pub fn transaction<R>(
        &mut self,
        work: impl FnOnce(&mut Transaction<'_, '_>) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let in_view = |view: &mut View<'_>| work(&mut Transaction { view });
        let (result, fired) = self.store.in_view(self.id, 0, in_view)?;
        self.store.follow(Some(self.id), Effect::Changed(fired));
        Ok(result)
    }

    /// Reads a value.
    ///
    /// # Errors
    /// `NotFound`, or `Invalid` for a malformed path.
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, StoreError> {
        self.transaction(|t| t.read(path))
    }

    /// Reads a value as text.
    ///
    /// # Errors
    /// As [`read`](Self::read); `Invalid` if the value is not UTF-8.
    pub fn read_text(&mut self, path: &str) -> Result<String, StoreError> {
        self.transaction(|t| t.read_text(path))
    }

    /// Returns the names of a node's children.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn list(&mut self, path: &str) -> Result<Vec<String>, StoreError> {
        self.transaction(|t| t.list(path))
    }

    /// Sets a value. Creates the node and its missing ancestors if needed.
    ///
    /// # Errors
    /// `Invalid` for a malformed path.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.transaction(|t| t.write(path, value))
    }

    /// Creates a node, and its missing ancestors.
    ///
    /// # Errors
    /// `Invalid` for a malformed path.
    pub fn mkdir(&mut self, path: &str) -> Result<(), StoreError> {
        self.transaction(|t| t.mkdir(path))
    }

    /// Removes a node and everything below it.
    ///
    /// # Errors
    /// `NotFound` if even the node's directory is missing; `Invalid` for the root; `NoSpace` if there are more nodes than a
    /// turn may remove: see [`remove_gradually`](Self::remove_gradually).
    pub fn remove(&mut self, path: &str) -> Result<(), StoreError> {
        self.transaction(|t| t.remove(path))
    }

    /// Removes a subtree of any size, in pieces: see [`Store::work`]. Other clients may see it half removed.
    ///
    /// # Errors
    /// `Access` on a connection that is not privileged; `Invalid` for a malformed path or the root.
    pub fn remove_gradually(&mut self, path: &str) -> Result<(), StoreError> {
        let caller = self.store.connections.get(&self.id).ok_or(StoreError::NotFound)?.caller;
        if !caller.privileged {
            return Err(StoreError::Access);
        }
        let path = Reader { caller: &caller, quotas: &self.store.quotas }.path(path.as_bytes())?;
        path.parent().ok_or(StoreError::Invalid)?;
        self.store.follow(Some(self.id), Effect::Removed(path));
        Ok(())
    }

    /// Returns whether a removal of the node at `path` by [`remove_gradually`](Self::remove_gradually) goes on. False for a
    /// malformed path.
    #[must_use]
    pub fn is_removing(&self, path: &str) -> bool {
        let caller = self.store.connections.get(&self.id).map(|connection| connection.caller);
        let path = caller.and_then(|caller| {
            let reader = Reader { caller: &caller, quotas: &self.store.quotas };
            reader.path(path.as_bytes()).ok()
        });
        path.is_some_and(|path| self.store.jobs.removes(&path))
    }

    /// Reads a permission list.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn permissions(&mut self, path: &str) -> Result<Permissions, StoreError> {
        self.transaction(|t| t.permissions(path))
    }

    /// Replaces a permission list, written as `n0,r5`.
    ///
    /// # Errors
    /// As [`read`](Self::read); `Invalid` for a malformed list.
    pub fn set_permissions(&mut self, path: &str, list: &str) -> Result<(), StoreError> {
        self.transaction(|t| t.set_permissions(path, list))
    }

    /// Registers a watch; its first event is queued at once.
    ///
    /// # Errors
    /// `Exists`, or `Invalid` for a malformed path.
    pub fn watch(&mut self, path: &str, token: &[u8]) -> Result<(), StoreError> {
        let watch = self.describe(path, token)?;
        self.store.ask(self.id, Request::Watch(watch)).map(drop)
    }

    /// Removes a watch. Events already queued are still delivered.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn unwatch(&mut self, path: &str, token: &[u8]) -> Result<(), StoreError> {
        let watch = self.describe(path, token)?;
        self.store.ask(self.id, Request::Unwatch(watch)).map(drop)
    }

    /// Returns the oldest event not fetched yet. When the queue is full, a watch reports only its own path instead of
    /// each change; the caller must then look at everything below this path.
    pub fn next_event(&mut self) -> Option<WatchEvent> {
        let connection = self.store.connections.get_mut(&self.id)?;
        connection.outbox.next_event(&self.store.quotas)
    }

    /// Whether [`next_event`](Self::next_event) would return an event.
    #[must_use]
    pub fn has_events(&self) -> bool {
        let connection = self.store.connections.get(&self.id);
        connection.is_some_and(|connection| connection.outbox.has_events())
    }

    /// Makes a domain a client, and queues the duty to attach its page. If the domain is a client already,
    /// its watches and transactions are dropped.
    ///
    /// # Errors
    /// `Invalid` for the server's own domain.
    pub fn introduce(&mut self, domain: DomainId, frame: u64, port: u32) -> Result<(), StoreError> {
        self.privileged(Request::Introduce { domain, frame, port })
    }

    /// Ends a domain in the store: its connection is closed, its nodes and rights are removed.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn release(&mut self, domain: DomainId) -> Result<(), StoreError> {
        self.privileged(Request::Release(domain))
    }

    /// Tells that a domain that shut down runs again, so that its next shutdown is reported again.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resume(&mut self, domain: DomainId) -> Result<(), StoreError> {
        self.privileged(Request::Resume(domain))
    }

    fn privileged(&mut self, request: Request<'_>) -> Result<(), StoreError> {
        let connection = self.store.connections.get(&self.id).ok_or(StoreError::NotFound)?;
        if !connection.caller.privileged {
            return Err(StoreError::Access);
        }
        self.store.ask(self.id, request).map(drop)
    }

    fn describe<'t>(&self, path: &str, token: &'t [u8]) -> Result<WatchRequest<'t>, StoreError> {
        let connection = self.store.connections.get(&self.id).ok_or(StoreError::NotFound)?;
        let reader = Reader { caller: &connection.caller, quotas: &self.store.quotas };
        reader.describe_watch(path.as_bytes(), token, None)
    }
}

/// The calls inside a transaction: they take effect together.
#[derive(Debug)]
pub struct Transaction<'t, 'v> {
    view: &'t mut View<'v>,
}

impl Transaction<'_, '_> {
    /// Reads a value.
    ///
    /// # Errors
    /// `NotFound`, or `Invalid` for a malformed path.
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, StoreError> {
        let path = self.path(path)?;
        Ok(self.view.node(&path)?.value.to_vec())
    }

    /// Reads a value as text.
    ///
    /// # Errors
    /// As [`read`](Self::read); `Invalid` if the value is not UTF-8.
    pub fn read_text(&mut self, path: &str) -> Result<String, StoreError> {
        String::from_utf8(self.read(path)?).map_err(|_| StoreError::Invalid)
    }

    /// Returns the names of a node's children.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn list(&mut self, path: &str) -> Result<Vec<String>, StoreError> {
        let path = self.path(path)?;
        let node = self.view.node(&path)?;
        Ok(node.children.iter().map(ToString::to_string).collect())
    }

    /// Sets a value. Creates the node and its missing ancestors if needed.
    ///
    /// # Errors
    /// `Invalid` for a malformed path; `TooBig` for a value longer than a payload.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        let path = self.path(path)?;
        // A client could not read a longer value through its ring.
        if value.len() > crate::wire::PAYLOAD_MAX {
            return Err(StoreError::TooBig);
        }
        self.view.write(&path, value)
    }

    /// Creates a node, and its missing ancestors.
    ///
    /// # Errors
    /// `Invalid` for a malformed path.
    pub fn mkdir(&mut self, path: &str) -> Result<(), StoreError> {
        let path = self.path(path)?;
        self.view.mkdir(&path)
    }

    /// Removes a node and everything below it.
    ///
    /// # Errors
    /// `NotFound` if even the node's directory is missing; `Invalid` for the root.
    pub fn remove(&mut self, path: &str) -> Result<(), StoreError> {
        let path = self.path(path)?;
        self.view.remove(&path)
    }

    /// Reads a permission list.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn permissions(&mut self, path: &str) -> Result<Permissions, StoreError> {
        let path = self.path_or_special(path)?;
        Ok(self.view.node(&path)?.permissions.clone())
    }

    /// Replaces a permission list, written as `n0,r5`.
    ///
    /// # Errors
    /// As [`read`](Self::read); `Invalid` for a malformed list.
    pub fn set_permissions(&mut self, path: &str, list: &str) -> Result<(), StoreError> {
        let path = self.path_or_special(path)?;
        self.view.set_permissions(&path, Permissions::parse(list)?)
    }

    fn path(&self, path: &str) -> Result<Path, StoreError> {
        Reader { caller: self.view.caller, quotas: self.view.quotas }.path(path.as_bytes())
    }

    fn path_or_special(&self, path: &str) -> Result<Path, StoreError> {
        let reader = Reader { caller: self.view.caller, quotas: self.view.quotas };
        reader.path_or_special(path.as_bytes()).map(|resolved| resolved.path)
    }
}
