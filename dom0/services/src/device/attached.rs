//! The devices of one kind that guests have.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;

use toolstack::limit::LineLimit;
use toolstack::{DomainId, Node, Store};

use super::Endpoint;
use super::handshake::{Handshake, Identity};
use crate::host::{Class, Host};
use crate::signal::Waiters;
use crate::store::StoreService;

/// The number of a guest's domain, and the number of the device in the guest.
pub(crate) type Name = (u16, u32);

/// A device with the task that drives it.
struct Driven<H: Host, E> {
    endpoint: Rc<E>,
    task: H::Task,
}

/// The devices of one kind.
pub(crate) struct Attached<H: Host, E> {
    pub(crate) host: H,
    pub(crate) store: StoreService<H>,
    devices: RefCell<BTreeMap<Name, Driven<H, E>>>,
    changed: Rc<Waiters>,
    /// The tasks of devices that are gone. A task cannot drop itself: the next call of a method drops these tasks.
    ended: RefCell<Vec<H::Task>>,
}

impl<H: Host, E: Endpoint<H>> Attached<H, E> {
    pub(crate) fn new(host: H, store: StoreService<H>) -> Self {
        Self { host, store, devices: RefCell::default(), changed: Rc::default(), ended: RefCell::default() }
    }

    /// Returns how many devices there are.
    pub(crate) fn count(&self) -> usize {
        self.devices.borrow().len()
    }

    /// Writes both directories, and begins to drive the device that `make` returns for the handshake.
    ///
    /// # Errors
    /// The store refuses the directories. Nothing is left of them then.
    pub(crate) fn attach(
        self: &Rc<Self>,
        identity: Identity,
        directories: &[Node],
        make: impl FnOnce(Handshake<H>) -> E,
    ) -> Result<(), String> {
        self.ended.take();
        let name = (identity.domain, identity.number);
        self.store.write(DomainId(identity.domain), directories)?;
        let session = self.store.session();
        if let Err(error) = session.watch(&identity.paths.front_state()) {
            self.store.remove(&identity.paths.front)?;
            self.store.remove(&identity.paths.back)?;
            return Err(error.name().to_string());
        }
        let lines = self.lines_of(identity.domain);
        let changed = Rc::clone(&self.changed);
        let handshake = Handshake::new::<E>(self.host.clone(), identity, session, lines, changed);
        self.drive(Rc::new(make(handshake)), name);
        Ok(())
    }

    /// Returns the limit for log lines that a guest causes. All devices of the guest share it.
    fn lines_of(&self, domain: u16) -> Rc<RefCell<LineLimit>> {
        let devices = self.devices.borrow();
        let other = devices.range((domain, 0)..=(domain, u32::MAX)).next();
        other.map_or_else(Rc::default, |(_, other)| Rc::clone(&other.endpoint.handshake().lines))
    }

    /// Starts the task of a device. At its end, all that the device holds is given back.
    fn drive(self: &Rc<Self>, endpoint: Rc<E>, name: Name) {
        let (attached, driven) = (Rc::downgrade(self), Rc::clone(&endpoint));
        let task = self.host.spawn(Class::Control, async move {
            driven.handshake().drive(&driven).await;
            driven.finish().await;
            drop(driven);
            let Some(attached) = attached.upgrade() else { return };
            let gone = attached.devices.borrow_mut().remove(&name);
            if let Some(Driven { endpoint, task }) = gone {
                drop(endpoint);
                attached.ended.borrow_mut().push(task);
            }
            attached.changed.wake();
        });
        self.devices.borrow_mut().insert(name, Driven { endpoint, task });
    }

    /// Returns the device with this name.
    pub(crate) fn find(&self, name: Name) -> Option<Rc<E>> {
        self.devices.borrow().get(&name).map(|driven| Rc::clone(&driven.endpoint))
    }

    /// Returns all devices.
    pub(crate) fn all(&self) -> Vec<Rc<E>> {
        self.devices.borrow().values().map(|driven| Rc::clone(&driven.endpoint)).collect()
    }

    /// Returns the devices of a domain, in the order of their numbers.
    pub(crate) fn of(&self, domain: u16) -> Vec<Rc<E>> {
        let devices = self.devices.borrow();
        devices.range((domain, 0)..=(domain, u32::MAX)).map(|(_, driven)| Rc::clone(&driven.endpoint)).collect()
    }

    /// Takes a device away from a guest, and returns when the device is gone. Without `force`, the guest is asked to release
    /// the device. The removal goes on even if the future is dropped.
    ///
    /// # Errors
    /// The guest has no such device, or has not released the device within ten seconds; the device is removed once the guest
    /// releases it.
    pub(crate) async fn detach(&self, name: Name, force: bool) -> Result<(), String> {
        self.ended.take();
        let endpoint = self.find(name).ok_or_else(|| format!("the guest has no {} {}", E::NOUN, name.1))?;
        let handshake = endpoint.handshake();
        handshake.want(|device, now_ns| if force { device.force() } else { device.detach(now_ns) });
        let in_use = format!("{} uses the {} {}", handshake.identity.guest, E::NOUN, handshake.identity.name);
        let removed = Rc::downgrade(&endpoint);
        drop(endpoint);
        let look = || match removed.upgrade() {
            None => Some(Ok(())),
            Some(endpoint) if !force && endpoint.handshake().is_in_use() => Some(Err(in_use.clone())),
            Some(_) => None,
        };
        let done = self.changed.until(look).await;
        self.ended.take();
        done
    }

    /// Removes all devices of a domain that has ended, and returns when nothing of them is mapped, in use or in the store. Only
    /// then may the number of the domain be used again.
    pub(crate) async fn domain_died(&self, domain: u16) {
        self.ended.take();
        self.of(domain).iter().for_each(|endpoint| endpoint.handshake().want(|device, _| device.domain_died()));
        let none = || self.of(domain).is_empty().then_some(());
        self.changed.until(none).await;
        self.ended.take();
    }
}
