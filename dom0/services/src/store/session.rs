//! Sessions of the store for other services of dom0: transactions, and watches that wake a task.

use alloc::rc::Rc;
use core::fmt;

use store::local::Transaction;
use store::{ConnectionId, StoreError, WatchEvent};
use toolstack::DomainId;

use super::{Shared, StoreService};
use crate::host::Host;
use crate::signal::Signal;

/// Nanoseconds between two looks at a removal that goes on.
const LOOK_NS: u64 = 1_000_000;

/// A session with all rights. Dropping it removes its watches.
pub struct Session<H: Host> {
    shared: Rc<Shared<H>>,
    id: ConnectionId,
    told: Rc<Signal>,
}

impl<H: Host> fmt::Debug for Session<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("id", &self.id).finish_non_exhaustive()
    }
}

impl<H: Host> StoreService<H> {
    /// The domain that runs the store.
    #[must_use]
    pub fn own(&self) -> DomainId {
        self.0.own
    }

    /// Opens a session for a service of this domain.
    #[must_use]
    pub fn session(&self) -> Session<H> {
        let id = self.0.store.borrow_mut().open_local();
        let told: Rc<Signal> = Rc::default();
        self.0.sessions.borrow_mut().insert(id, Rc::clone(&told));
        Session { shared: Rc::clone(&self.0), id, told }
    }

    /// How many sessions of services are open.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.0.sessions.borrow().len()
    }
}

impl<H: Host> Session<H> {
    /// Runs `work` as one transaction, and wakes those whom its changes concern.
    ///
    /// # Errors
    /// The error that `work` returns; nothing is changed then.
    pub fn transaction<R>(
        &self,
        work: impl FnOnce(&mut Transaction<'_, '_>) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let done = self.shared.store.borrow_mut().session(self.id).transaction(work);
        self.shared.deliver(None);
        done
    }

    /// Removes a node and all nodes below it, however many there are, and returns once that is done.
    ///
    /// # Errors
    /// The store's error.
    pub async fn remove_gradually(&self, path: &str) -> Result<(), StoreError> {
        let begun = self.shared.store.borrow_mut().session(self.id).remove_gradually(path);
        self.shared.deliver(None);
        begun?;
        while self.shared.store.borrow_mut().session(self.id).is_removing(path) {
            self.shared.host.sleep_until(self.shared.host.now_ns().saturating_add(LOOK_NS)).await;
        }
        Ok(())
    }

    /// Watches the node at `path` and all nodes below it. The first event comes at once.
    ///
    /// # Errors
    /// The store's error.
    pub fn watch(&self, path: &str) -> Result<(), StoreError> {
        let watched = self.shared.store.borrow_mut().session(self.id).watch(path, b"service");
        self.shared.deliver(None);
        watched
    }

    /// Returns the oldest event that was not fetched yet. When too many events wait, a watch reports only its own path.
    pub fn next_event(&self) -> Option<WatchEvent> {
        self.shared.store.borrow_mut().session(self.id).next_event()
    }

    /// The signal that is set when there are events. Others may set it too, to wake the task that waits for it.
    #[must_use]
    pub fn told(&self) -> &Signal {
        &self.told
    }
}

impl<H: Host> Drop for Session<H> {
    fn drop(&mut self) {
        self.shared.sessions.borrow_mut().remove(&self.id);
        self.shared.store.borrow_mut().close_local(self.id);
    }
}
