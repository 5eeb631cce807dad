//! How a device of a guest lives, from the moment when both its directories are written until both are removed: one task.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::future::pending;

use store::StoreError;
use toolstack::DomainId;
use toolstack::limit::LineLimit;
use xenbus_backend::{Act, Device, Front, State};

use super::nodes::{self, Paths};
use super::{Endpoint, Key};
use crate::host::Host;
use crate::shape::PATIENCE_NS;
use crate::signal::Waiters;
use crate::store::Session;

/// Which device it is.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// This domain.
    pub(crate) own: DomainId,
    /// The guest's domain.
    pub(crate) domain: u16,
    /// The guest's name, for messages.
    pub(crate) guest: String,
    /// The device's number in the guest.
    pub(crate) number: u32,
    /// The device's name in messages.
    pub(crate) name: String,
    /// Where the device is in the store.
    pub(crate) paths: Paths,
}

/// A device of a guest in the store.
pub(crate) struct Handshake<H: Host> {
    pub(crate) host: H,
    pub(crate) identity: Identity,
    session: Session<H>,
    device: RefCell<Device>,
    /// Limits the log lines that the guest causes by all its devices of the kind.
    pub(super) lines: Rc<RefCell<LineLimit>>,
    /// The tasks that wait until a device is removed or found in use.
    changed: Rc<Waiters>,
    /// Whether the next step reads the front end's nodes along with its state.
    reads: Cell<bool>,
    in_use: Cell<bool>,
}

impl<H: Host> Handshake<H> {
    /// A device whose directories have been written. `session` watches the front end's state.
    pub(super) fn new<E: Endpoint<H>>(
        host: H,
        identity: Identity,
        session: Session<H>,
        lines: Rc<RefCell<LineLimit>>,
        changed: Rc<Waiters>,
    ) -> Self {
        let device = RefCell::new(Device::new(E::KIND));
        let (reads, in_use) = (Cell::new(false), Cell::new(false));
        Self { host, identity, session, device, lines, changed, reads, in_use }
    }

    /// Carries out the acts of the handshake, until both directories are removed.
    pub(super) async fn drive<E: Endpoint<H>>(&self, endpoint: &Rc<E>) {
        loop {
            while !self.host.can_allocate(store::TURN_BYTES) {
                self.pause().await;
            }
            let now_ns = self.host.now_ns();
            let act = match self.step(&**endpoint, now_ns) {
                Ok(act) => act,
                // Other guests may have put more nodes into the front end's directory than one turn may remove.
                Err(StoreError::NoSpace) if self.device.borrow().is_leaving() => {
                    if let Err(error) = self.session.remove_gradually(&self.identity.paths.front).await {
                        self.complain::<E>(&format!("its directory cannot be removed: {}", error.name()));
                        self.pause().await;
                    }
                    continue;
                }
                Err(error) => {
                    self.complain::<E>(&format!("the store refuses what is to be written: {}", error.name()));
                    self.pause().await;
                    continue;
                }
            };
            match &act {
                Act::Rest => {
                    self.wait(now_ns).await;
                    continue;
                }
                Act::Read => self.reads.set(true),
                Act::Disconnect => endpoint.disconnect().await,
                Act::InUse => {
                    log::warn!("{} does not release its {} {}", self.identity.guest, E::NOUN, self.identity.name);
                    self.in_use.set(true);
                    self.changed.wake();
                }
                Act::Connect(_) | Act::Publish | Act::Write(_) | Act::Offline | Act::Remove => {}
            }
            self.device.borrow_mut().done(&act, now_ns);
            match act {
                Act::Connect(front) => match endpoint.connect(&front) {
                    Ok(()) => self.device.borrow_mut().connected(),
                    Err(why) => {
                        self.device.borrow_mut().not_connected();
                        self.report::<E>(&why);
                    }
                },
                Act::Remove => return,
                _ => {}
            }
            self.host.yield_now().await;
        }
    }

    async fn pause(&self) {
        self.host.sleep_until(self.host.now_ns().saturating_add(PATIENCE_NS)).await;
    }

    /// Reads the front end's state, decides, and writes, all in one transaction.
    fn step<E: Endpoint<H>>(&self, endpoint: &E, now_ns: u64) -> Result<Act<E::Front>, StoreError> {
        let reads = self.reads.take();
        let Identity { own, domain, paths, .. } = &self.identity;
        let mut bad = None;
        let act = self.session.transaction(|t| {
            let state = nodes::front_state(t, paths);
            let published = state.is_up() && state >= E::KIND.published;
            let nodes = if reads && published {
                let found = nodes::front_keys(t, paths, E::front_keys());
                let read = |key: &str| found.iter().find(|(name, _)| *name == key).map(|(_, value)| &**value);
                E::parse(read).map_err(|why| bad = Some(why)).ok()
            } else {
                None
            };
            if let Some(why) = &bad {
                nodes::error(t, paths, *own, *domain, why);
                self.device.borrow_mut().failed();
            }
            let act = self.device.borrow().step(Front { state, nodes }, now_ns);
            let keys = |state: State| -> Vec<Key> { endpoint.keys(state) };
            nodes::carry_out(t, paths, keys, &act).map(|()| act)
        });
        if let Some(why) = bad {
            self.complain::<E>(&why);
        }
        act
    }

    /// Waits until the front end writes its state, [`Handshake::want`] or [`Handshake::fail`] is called, or the next step is
    /// due.
    async fn wait(&self, now_ns: u64) {
        let again_ns = self.device.borrow().again_ns(now_ns);
        let timer = async {
            match again_ns {
                Some(at) => self.host.sleep_until(at).await,
                None => pending().await,
            }
        };
        self.session.told().or(timer).await;
        while self.session.next_event().is_some() {}
    }

    /// Returns the back end's state, as the guest reads it.
    pub(crate) fn back_state(&self) -> State {
        self.device.borrow().state()
    }

    /// Returns whether the guest was asked to release the device and did not do so in time.
    pub(crate) fn is_in_use(&self) -> bool {
        self.in_use.get()
    }

    /// Changes the aim of the handshake by `change`, and wakes the device's task.
    pub(super) fn want(&self, change: impl FnOnce(&mut Device, u64)) {
        change(&mut self.device.borrow_mut(), self.host.now_ns());
        self.session.told().set();
    }

    /// Notes that the device cannot be served any more, for the reason `why`. The guest is told to close the device.
    pub(crate) fn fail<E: Endpoint<H>>(&self, why: &str) {
        self.device.borrow_mut().failed();
        self.report::<E>(why);
        self.session.told().set();
    }

    /// Writes the reason into the error node and the log.
    fn report<E: Endpoint<H>>(&self, why: &str) {
        let Identity { own, domain, paths, .. } = &self.identity;
        let written = self.session.transaction(|t| {
            nodes::error(t, paths, *own, *domain, why);
            Ok(())
        });
        debug_assert!(written.is_ok(), "the closure returns no error");
        self.complain::<E>(why);
    }

    /// Logs a line that the guest has caused, unless it has caused too many lines recently.
    fn complain<E: Endpoint<H>>(&self, what: &str) {
        let line = format!("the {} {} of {}: {what}", E::NOUN, self.identity.name, self.identity.guest);
        match self.lines.borrow_mut().admit(self.host.now_ns()) {
            None => {}
            Some(0) => log::warn!("{line}"),
            Some(more) => log::warn!("{line} ({more} more suppressed)"),
        }
    }
}
