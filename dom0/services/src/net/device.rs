//! A network device of a guest: what it is made of, and how its rings are served.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::net::Ipv4Addr;

use net_backend::{ConnectError, Connection, Counters, Features, Front, KEYS, Limits, Ports, VifId};
use network::Mac;
use toolstack::forward::Forward;
use xenbus_backend::{Kind, State};

use super::bridge::Bridge;
use super::host::{Backing, NetHost};
use super::station::Kept;
use crate::device::{Endpoint, Handshake, Key};
use crate::host::Channel;

/// What connects a vif to its guest.
pub(super) struct Link<H: NetHost> {
    id: VifId,
    /// The address that dom0 offers the guest.
    address: Option<Ipv4Addr>,
    _channels: (H::Channel, Option<H::Channel>),
}

/// A network device of a guest.
pub(super) struct Vif<H: NetHost> {
    pub(super) handshake: Handshake<H>,
    pub(super) bridge: Rc<Bridge<H>>,
    pub(super) mac: Mac,
    pub(super) limits: Limits,
    /// Connections from the uplink that lead to the guest by this vif.
    pub(super) forwards: Vec<Forward>,
    /// `None` while the vif is not connected.
    pub(super) link: RefCell<Option<Link<H>>>,
    /// The sums of the counters of connections that have ended.
    pub(super) before: Cell<Counters>,
    /// The configured address, which no other guest gets.
    pub(super) _kept: Option<Kept>,
    pub(super) _reserved: H::Reserved,
}

impl<H: NetHost> Endpoint<H> for Vif<H> {
    type Front = Front;
    const KIND: Kind = Kind { published: State::Connected };
    const NOUN: &'static str = "vif";

    fn handshake(&self) -> &Handshake<H> {
        &self.handshake
    }

    fn front_keys() -> impl Iterator<Item = &'static str> {
        KEYS.into_iter()
    }

    fn parse<'a>(read: impl Fn(&str) -> Option<&'a [u8]>) -> Result<Front, String> {
        Front::parse(read).map_err(|why| why.to_string())
    }

    fn keys(&self, state: State) -> Vec<Key> {
        match state {
            State::InitWait => Features::served().offered().map(|key| (key.name, key.value)).collect(),
            _ => Vec::new(),
        }
    }

    fn connect(self: &Rc<Self>, front: &Front) -> Result<(), String> {
        let (host, identity) = (&self.handshake.host, &self.handshake.identity);
        let map = |reference, what| {
            let ring = host.map(identity.domain, reference);
            ring.map_err(|errno| format!("its {what} ring cannot be mapped: {}", errno.name()))
        };
        let (tx, rx) = (map(front.tx_reference, "TX")?, map(front.rx_reference, "RX")?);
        let bind = |port| {
            let channel = host.connect(identity.domain, port);
            channel.map_err(|errno| format!("its port {port} cannot be bound: {}", errno.name()))
        };
        let first = bind(front.ports.tx)?;
        let second = (front.ports.rx != front.ports.tx).then(|| bind(front.ports.rx)).transpose()?;
        let ports = Ports { tx: first.port(), rx: second.as_ref().unwrap_or(&first).port() };
        let connection = Connection::<Backing<H>> {
            domain: identity.domain,
            ports,
            tx,
            rx,
            takes: front.takes,
            mac: self.mac,
            limits: self.limits,
        };
        let id = self.bridge.connect(connection, Rc::downgrade(self)).map_err(|why| match why {
            ConnectError::Ring(why) => format!("its rings cannot be served: {why}"),
            other => other.to_string(),
        })?;
        let station = self.bridge.station.as_ref();
        let address = station.map(|station| station.attach(id, self.mac, self.limits.address, &identity.guest));
        let address = address.transpose().inspect_err(|_| drop(self.bridge.disconnect(id)))?;
        for forward in &self.forwards {
            if let Some(Err(why)) = station.map(|station| station.forward(id, forward)) {
                log::warn!("{}: connections are not forwarded: {why}", identity.guest);
            }
        }
        self.link.replace(Some(Link { id, address, _channels: (first, second) }));
        Ok(())
    }

    async fn disconnect(&self) {
        let Some(link) = self.link.take() else { return };
        if let Some(station) = &self.bridge.station {
            station.detach(link.id);
        }
        if let Some(left) = self.bridge.disconnect(link.id) {
            self.before.set(self.before.get() + left.counters);
        }
    }

    async fn finish(&self) {
        self.bridge.vifs.set(self.bridge.vifs.get().saturating_sub(1));
    }
}

impl<H: NetHost> Vif<H> {
    /// Returns what was done for the guest over all connections.
    pub(super) fn counters(&self) -> Counters {
        let now = self.link.borrow().as_ref().map(|link| self.bridge.counters(link.id));
        self.before.get() + now.unwrap_or_default()
    }

    /// Returns the address that dom0 offers the guest. `None` if dom0 offers none, or none yet.
    pub(super) fn address(&self) -> Option<Ipv4Addr> {
        self.link.borrow().as_ref().and_then(|link| link.address).or(self.limits.address)
    }

    /// Returns how many of the guest's connections are translated. `None` if the network is not translated, or the vif is not
    /// connected.
    pub(super) fn flows(&self) -> Option<usize> {
        let id = self.link.borrow().as_ref()?.id;
        self.bridge.station.as_ref()?.flows(id)
    }

    /// Notes that the vif cannot be served any more, for the reason `why`. The guest is told to close the vif.
    pub(super) fn fail(&self, why: &str) {
        self.handshake.fail::<Self>(why);
    }
}
