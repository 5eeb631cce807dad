//! A disk of a guest, from the moment when both its directories are written until both are removed: one task.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use core::cell::{Cell, RefCell};
use core::future::pending;

use block_backend::{Connection, Counters, Features, Front, Limits, VbdId};
use store::StoreError;
use toolstack::DomainId;
use toolstack::limit::LineLimit;
use xenbus_backend::{Act, Device, Kind, State};

use super::host::{Backing, BlockHost, Own};
use super::medium::{Hold, Medium, View};
use super::nodes::{self, Paths};
use super::worker::Worker;
use crate::host::Channel;
use crate::shape::PATIENCE_NS;
use crate::signal::Waiters;
use crate::store::Session;

/// The kind of these devices: a front end has published its ring when its state is `Initialised`.
pub(super) const KIND: Kind = Kind { published: State::Initialised };

/// What a disk holds as long as it is attached.
pub(super) struct Holdings<H: BlockHost> {
    pub(super) medium: Rc<RefCell<Medium<H>>>,
    pub(super) _hold: Option<Hold>,
    pub(super) journal: Own<H::Memory>,
    pub(super) _reserved: H::Reserved,
}

/// What connects a disk to its guest.
struct Link<H: BlockHost> {
    id: VbdId,
    channel: H::Channel,
}

/// A disk of a guest.
pub(super) struct Vbd<H: BlockHost> {
    pub(super) host: H,
    pub(super) own: DomainId,
    pub(super) domain: u16,
    /// The guest's name, for messages.
    pub(super) guest: String,
    /// The disk's number in the guest.
    pub(super) number: u32,
    /// The disk's name in the guest.
    pub(super) name: String,
    /// The target in the disk's description.
    pub(super) target: String,
    pub(super) paths: Paths,
    pub(super) features: Features,
    pub(super) limits: Limits,
    /// Nanoseconds that an operation may take until the device is reset. `None` if the disk's description sets no limit.
    pub(super) late_ns: Option<u64>,
    pub(super) session: Session<H>,
    pub(super) worker: Rc<Worker<H>>,
    pub(super) held: Holdings<H>,
    pub(super) device: RefCell<Device>,
    /// Limits the log lines that the guest causes by all its disks.
    pub(super) lines: Rc<RefCell<LineLimit>>,
    /// The tasks that wait until the disk is removed or found in use.
    pub(super) changed: Rc<Waiters>,
    pub(super) state: Inner<H>,
}

/// The parts of a disk that change while it is attached.
pub(super) struct Inner<H: BlockHost> {
    /// Whether the next step reads the front end's nodes along with its state.
    reads: Cell<bool>,
    link: RefCell<Option<Link<H>>>,
    /// The sums of the counters of connections that have ended.
    before: Cell<Counters>,
    in_use: Cell<bool>,
}

impl<H: BlockHost> Default for Inner<H> {
    fn default() -> Self {
        Self { reads: Cell::new(false), link: RefCell::new(None), before: Cell::default(), in_use: Cell::new(false) }
    }
}

impl<H: BlockHost> Vbd<H> {
    /// Carries out the acts of the handshake, until both directories are removed.
    pub(super) async fn drive(self: &Rc<Self>) {
        loop {
            while !self.host.can_allocate(store::TURN_BYTES) {
                self.pause().await;
            }
            let now_ns = self.host.now_ns();
            let act = match self.step(now_ns) {
                Ok(act) => act,
                Err(error) => {
                    self.complain(&format!("the store refuses what is to be written: {}", error.name()));
                    self.pause().await;
                    continue;
                }
            };
            match &act {
                Act::Rest => {
                    self.wait(now_ns).await;
                    continue;
                }
                Act::Read => self.state.reads.set(true),
                Act::Disconnect => self.disconnect().await,
                Act::InUse => {
                    log::warn!("{} does not release its disk {}", self.guest, self.name);
                    self.state.in_use.set(true);
                    self.changed.wake();
                }
                Act::Connect(_) | Act::Publish | Act::Write(_) | Act::Offline | Act::Remove => {}
            }
            self.device.borrow_mut().done(&act, now_ns);
            match act {
                Act::Connect(front) => self.connect(&front),
                Act::Remove => {
                    self.late_ns.into_iter().for_each(|late_ns| self.worker.lift_limit(late_ns));
                    return;
                }
                _ => {}
            }
            self.host.yield_now().await;
        }
    }

    async fn pause(&self) {
        self.host.sleep_until(self.host.now_ns().saturating_add(PATIENCE_NS)).await;
    }

    /// Reads the front end's state, decides, and writes, all in one transaction.
    fn step(&self, now_ns: u64) -> Result<Act<Front>, StoreError> {
        let reads = self.state.reads.take();
        let mut bad = None;
        let act = self.session.transaction(|t| {
            let state = nodes::front_state(t, &self.paths);
            let published = state.is_up() && state >= KIND.published;
            let nodes = if reads && published {
                nodes::front(t, &self.paths).map_err(|why| bad = Some(format!("{why}"))).ok()
            } else {
                None
            };
            if let Some(why) = &bad {
                nodes::error(t, &self.paths, self.own, self.domain, why);
                self.device.borrow_mut().failed();
            }
            let act = self.device.borrow().step(xenbus_backend::Front { state, nodes }, now_ns);
            nodes::carry_out(t, &self.paths, &self.features, &act).map(|()| act)
        });
        if let Some(why) = bad {
            self.complain(&why);
        }
        act
    }

    /// Waits until the front end writes its state, [`Vbd::want`] or [`Vbd::fail`] is called, or the next step is due.
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

    fn connect(self: &Rc<Self>, front: &Front) {
        match self.link_to(front) {
            Ok(link) => {
                self.state.link.replace(Some(link));
                self.device.borrow_mut().connected();
            }
            Err(why) => {
                self.device.borrow_mut().not_connected();
                self.report(&why);
            }
        }
    }

    fn link_to(self: &Rc<Self>, front: &Front) -> Result<Link<H>, String> {
        if self.worker.is_lost() {
            return Err("the disk is lost".into());
        }
        let ring = self.host.map_ring(self.domain, front.references());
        let ring = ring.map_err(|errno| format!("its ring cannot be mapped: {}", errno.name()))?;
        let channel = self.host.connect(self.domain, front.port);
        let channel = channel.map_err(|errno| format!("its port cannot be bound: {}", errno.name()))?;
        let connection = Connection::<Backing<H>> {
            domain: self.domain,
            port: channel.port(),
            ring,
            journal: self.held.journal.clone(),
            disk: View::boxed(&self.held.medium),
            limits: self.limits,
        };
        let id = self.worker.connect(connection, Rc::downgrade(self)).map_err(|why| format!("{why}"))?;
        Ok(Link { id, channel })
    }

    /// Waits until nothing is in flight, then unmaps the ring and closes the port.
    async fn disconnect(&self) {
        let id = self.state.link.borrow().as_ref().map(|link| link.id);
        let Some(id) = id else { return };
        let left = self.worker.disconnect(id).await;
        self.state.before.set(sum(self.state.before.get(), left.counters));
        drop(left);
        if let Some(Link { channel, .. }) = self.state.link.take() {
            drop(channel);
        }
    }

    /// Returns what was done for the guest over all connections.
    pub(super) fn counters(&self) -> Counters {
        let now = self.state.link.borrow().as_ref().map(|link| self.worker.counters(link.id));
        sum(self.state.before.get(), now.unwrap_or_default())
    }

    /// Returns the back end's state, as the guest reads it.
    pub(super) fn back_state(&self) -> State {
        self.device.borrow().state()
    }

    /// Returns whether the guest was asked to release the disk and did not do so in time.
    pub(super) fn is_in_use(&self) -> bool {
        self.state.in_use.get()
    }

    /// Changes the aim of the handshake by `change`, and wakes the disk's task.
    pub(super) fn want(&self, change: impl FnOnce(&mut Device, u64)) {
        change(&mut self.device.borrow_mut(), self.host.now_ns());
        self.session.told().set();
    }

    /// Notes that the disk cannot be served any more, for the reason `why`. The guest is told to close the disk.
    pub(super) fn fail(&self, why: &str) {
        self.device.borrow_mut().failed();
        self.report(why);
        self.session.told().set();
    }

    /// Writes the reason into the error node and the log.
    fn report(&self, why: &str) {
        let written = self.session.transaction(|t| {
            nodes::error(t, &self.paths, self.own, self.domain, why);
            Ok(())
        });
        debug_assert!(written.is_ok(), "the closure returns no error");
        self.complain(why);
    }

    /// Logs a line that the guest has caused, unless it has caused too many lines recently.
    fn complain(&self, what: &str) {
        let line = format!("the disk {} of {}: {what}", self.name, self.guest);
        match self.lines.borrow_mut().admit(self.host.now_ns()) {
            None => {}
            Some(0) => log::warn!("{line}"),
            Some(more) => log::warn!("{line} ({more} more suppressed)"),
        }
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
