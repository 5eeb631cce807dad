//! A disk of a guest: what it is made of, and how its ring is served.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use block_backend::{Connection, Counters, Features, Front, KEYS, Limits, MAX_RING_KEYS, VbdId};
use xenbus_backend::{Kind, State};

use super::host::{Backing, BlockHost, Own};
use super::medium::{Hold, Medium, View};
use super::worker::Worker;
use crate::device::{Endpoint, Handshake, Key};
use crate::host::Channel;

/// What a disk holds as long as it is attached.
pub(super) struct Holdings<H: BlockHost> {
    pub(super) medium: Rc<RefCell<Medium<H>>>,
    pub(super) _hold: Option<Hold>,
    pub(super) journal: Own<H::Memory>,
    pub(super) _reserved: H::Reserved,
}

/// What connects a disk to its guest.
pub(super) struct Link<H: BlockHost> {
    id: VbdId,
    channel: H::Channel,
}

/// A disk of a guest.
pub(super) struct Vbd<H: BlockHost> {
    pub(super) handshake: Handshake<H>,
    /// The target in the disk's description.
    pub(super) target: String,
    pub(super) features: Features,
    pub(super) limits: Limits,
    /// Nanoseconds that an operation may take until the device is reset. `None` if the disk's description sets no limit.
    pub(super) late_ns: Option<u64>,
    pub(super) worker: Rc<Worker<H>>,
    pub(super) held: Holdings<H>,
    /// `None` while the disk is not connected.
    pub(super) link: RefCell<Option<Link<H>>>,
    /// The sums of the counters of connections that have ended.
    pub(super) before: Cell<Counters>,
}

impl<H: BlockHost> Endpoint<H> for Vbd<H> {
    type Front = Front;
    const KIND: Kind = Kind { published: State::Initialised };
    const NOUN: &'static str = "disk";

    fn handshake(&self) -> &Handshake<H> {
        &self.handshake
    }

    fn front_keys() -> impl Iterator<Item = &'static str> {
        KEYS.into_iter().chain(MAX_RING_KEYS)
    }

    fn parse<'a>(read: impl Fn(&str) -> Option<&'a [u8]>) -> Result<Front, String> {
        Front::parse(read).map_err(|why| why.to_string())
    }

    fn keys(&self, state: State) -> Vec<Key> {
        let pair = |key: block_backend::Key| (key.name, key.value);
        match state {
            State::InitWait => self.features.offered().map(pair).collect(),
            State::Connected => self.features.connected().map(pair).collect(),
            _ => Vec::new(),
        }
    }

    fn connect(self: &Rc<Self>, front: &Front) -> Result<(), String> {
        if self.worker.is_lost() {
            return Err("the disk is lost".into());
        }
        let (host, domain) = (&self.handshake.host, self.handshake.identity.domain);
        let ring = host.map_ring(domain, front.references());
        let ring = ring.map_err(|errno| format!("its ring cannot be mapped: {}", errno.name()))?;
        let channel = host.connect(domain, front.port);
        let channel = channel.map_err(|errno| format!("its port cannot be bound: {}", errno.name()))?;
        let connection = Connection::<Backing<H>> {
            domain,
            port: channel.port(),
            ring,
            journal: self.held.journal.clone(),
            disk: View::boxed(&self.held.medium),
            limits: self.limits,
        };
        let id = self.worker.connect(connection, Rc::downgrade(self)).map_err(|why| format!("{why}"))?;
        self.link.replace(Some(Link { id, channel }));
        Ok(())
    }

    /// Waits until nothing is in flight, then unmaps the ring and closes the port.
    async fn disconnect(&self) {
        let id = self.link.borrow().as_ref().map(|link| link.id);
        let Some(id) = id else { return };
        let left = self.worker.disconnect(id).await;
        self.before.set(sum(self.before.get(), left.counters));
        drop(left);
        if let Some(Link { channel, .. }) = self.link.take() {
            drop(channel);
        }
    }

    async fn finish(&self) {
        self.late_ns.into_iter().for_each(|late_ns| self.worker.lift_limit(late_ns));
        Medium::empty(&self.held.medium, &self.handshake.host).await;
    }
}

impl<H: BlockHost> Vbd<H> {
    /// Returns what was done for the guest over all connections.
    pub(super) fn counters(&self) -> Counters {
        let now = self.link.borrow().as_ref().map(|link| self.worker.counters(link.id));
        sum(self.before.get(), now.unwrap_or_default())
    }

    /// Notes that the disk cannot be served any more, for the reason `why`. The guest is told to close the disk.
    pub(super) fn fail(&self, why: &str) {
        self.handshake.fail::<Self>(why);
    }
}

fn sum(a: Counters, b: Counters) -> Counters {
    Counters {
        reads: a.reads + b.reads,
        writes: a.writes + b.writes,
        flushes: a.flushes + b.flushes,
        discards: a.discards + b.discards,
        sectors_read: a.sectors_read + b.sectors_read,
        sectors_written: a.sectors_written + b.sectors_written,
        errors: a.errors + b.errors,
        refused: a.refused + b.refused,
        lost_pins: a.lost_pins + b.lost_pins,
    }
}
