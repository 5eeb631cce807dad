//! Serves the store: to each guest through the page that the guest granted, and to dom0 by calls.

mod session;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::{Rc, Weak};
use alloc::string::{String, ToString};
use core::cell::{Cell, RefCell};
use core::fmt;

use guest_image::MachineFrame;
use hypercall_abi::grant::REF_XENSTORE;
use store::transport::Link;
use store::{ConnectionId, Duty, Quotas, StoreError};
use toolstack::limit::LineLimit;
use toolstack::{Access, DomainId, Node};

use crate::host::{Channel, Class, Host};
use crate::shape::{Attached, Ends, Service, Turn, turns};
use crate::signal::Signal;

pub use session::Session;

/// Bytes of the heap for serving a guest: link, channel, page and task. What the store holds for the guest is not included.
const SERVED_BYTES: usize = 8 * 1024;

/// The most bytes of the heap that one guest can make dom0 use for the store.
#[must_use]
pub fn store_bytes() -> usize {
    Quotas::default().domain_bytes() + SERVED_BYTES
}

/// The store and the guests that are served with it. Clones stand for the same store.
#[derive(Clone)]
pub struct StoreService<H: Host>(Rc<Shared<H>>);

struct Shared<H: Host> {
    host: H,
    own: DomainId,
    store: RefCell<store::Store>,
    /// The store's session for requests of dom0 itself.
    session: ConnectionId,
    served: RefCell<BTreeMap<u16, Served<H>>>,
    /// The sessions that dom0's other services (disks, networks) have opened. Each has a signal, which is set when the session
    /// has events.
    sessions: RefCell<BTreeMap<ConnectionId, Rc<Signal>>>,
    /// Set when the store has work left to do.
    left: Rc<Signal>,
    /// The task that does postponed work: work that a request causes, but that is not done in the turn that handles the
    /// request. The task ends when this structure is dropped.
    work: RefCell<Option<H::Task>>,
    /// The part of the heap set aside for the next guest that will be served.
    reserved: RefCell<Option<H::Reserved>>,
}

/// A guest being served.
struct Served<H: Host> {
    ring: Attached<H, Ring<H>>,
    /// The part of the heap set aside for serving the guest, and for what the guest makes the store hold.
    _reserved: Option<H::Reserved>,
}

/// The store as it serves one guest.
struct Ring<H: Host> {
    shared: Weak<Shared<H>>,
    link: RefCell<Link>,
    ends: Ends<H>,
    /// Whether the store took no more requests from the guest's ring when this service's latest turn ended. It leaves them in
    /// the ring while too many changes by the guest are still to be told to watchers, or too many replies to the guest are
    /// unfetched.
    stalled: Cell<bool>,
    /// Limits the warnings that the guest causes.
    lines: RefCell<LineLimit>,
}

impl<H: Host> fmt::Debug for StoreService<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreService").field("own", &self.0.own).finish_non_exhaustive()
    }
}

impl<H: Host> Service<H> for Ring<H> {
    type Kept = Weak<Shared<H>>;

    const NAME: &'static str = "store";
    const REFERENCE: u32 = REF_XENSTORE;
    const CLASS: Class = Class::Control;
    const TURN_BYTES: usize = store::TURN_BYTES;
    /// Messages per turn.
    const BUDGET: usize = 1;

    fn attach(shared: &Weak<Shared<H>>, ends: Ends<H>) -> Result<Self, &'static str> {
        let link = Link::introduce(DomainId(ends.domain), &ends.page).map_err(|_| "page changes under us")?;
        Ok(Self {
            shared: Weak::clone(shared),
            link: RefCell::new(link),
            ends,
            stalled: Cell::new(false),
            lines: RefCell::default(),
        })
    }

    fn serve(&self, budget: usize) -> Turn {
        let Some(shared) = self.shared.upgrade() else { return Turn::Idle };
        let more = (0..budget).all(|_| shared.step(self));
        Turn::again_if(more)
    }

    fn detach(&self) {
        let suppressed = self.lines.borrow().suppressed();
        if suppressed > 0 {
            log::warn!("{suppressed} more warnings about domain {} were suppressed", self.ends.domain);
        }
    }
}

impl<H: Host> Ring<H> {
    /// Logs a warning that the guest caused, unless the guest has caused too many warnings of late.
    fn complain(&self, now_ns: u64, what: &str) {
        match self.lines.borrow_mut().admit(now_ns) {
            None => {}
            Some(0) => log::warn!("{what}"),
            Some(more) => log::warn!("{what} ({more} more suppressed)"),
        }
    }
}

impl<H: Host> StoreService<H> {
    /// A new store, run by domain `own`, which is its only client until a guest is introduced.
    pub fn new(host: H, own: DomainId) -> Self {
        let mut store = store::Store::new(own, Quotas::default());
        let session = store.open_local();
        let shared = Rc::new(Shared {
            host,
            own,
            store: RefCell::new(store),
            session,
            served: RefCell::default(),
            sessions: RefCell::default(),
            left: Rc::default(),
            work: RefCell::default(),
            reserved: RefCell::default(),
        });
        let (worker, left) = (Rc::downgrade(&shared), Rc::clone(&shared.left));
        let work = move || worker.upgrade().map(|shared| Turn::again_if(shared.work()));
        let wait = async move || left.wait().await;
        let task = shared.host.spawn(Class::Control, turns(shared.host.clone(), store::TURN_BYTES, work, wait));
        shared.work.replace(Some(task));
        Self(shared)
    }

    /// Carries out the store's duties ([`Duty`]): attaches and detaches rings of guests. Stops at the first ring that cannot be
    /// attached.
    fn carry_out_duties(&self) -> Result<(), String> {
        loop {
            let duty = self.0.store.borrow_mut().next_duty();
            match duty {
                Some(Duty::Attach { domain, port, .. }) => self.attach(domain, port)?,
                Some(Duty::Detach { domain }) => self.detach(domain),
                None => return Ok(()),
            }
        }
    }

    fn attach(&self, domain: DomainId, port: u32) -> Result<(), String> {
        let ring = Attached::attach(&self.0.host, &Rc::downgrade(&self.0), domain.0, port)?;
        let served = Served { ring, _reserved: self.0.reserved.take() };
        self.detach(domain);
        self.0.served.borrow_mut().insert(domain.0, served);
        Ok(())
    }

    fn detach(&self, domain: DomainId) {
        // The borrow of the map ends first, because detaching runs `Ring::detach` and calls of the host.
        let served = self.0.served.borrow_mut().remove(&domain.0);
        if let Some(served) = served {
            served.ring.detach();
        }
    }
}

impl<H: Host> Shared<H> {
    /// Gives a turn to every guest for which the store has output, and to every stalled guest that may go on, but not to guest
    /// `except`. Sets the signals of the sessions that have events. If the store has work to do, wakes the task that does this
    /// work.
    fn deliver(&self, except: Option<u16>) {
        let mut store = self.store.borrow_mut();
        for (domain, served) in &*self.served.borrow() {
            let id = ConnectionId::Domain(DomainId(*domain));
            let may_go_on = served.ring.service().stalled.get() && store.accepts_input(id);
            if Some(*domain) != except && (may_go_on || store.has_output(id)) {
                served.ring.kick();
            }
        }
        for (id, told) in &*self.sessions.borrow() {
            if store.session(*id).has_events() {
                told.set();
            }
        }
        if store.has_work() {
            self.left.set();
        }
    }

    /// Does one turn of the store's work; returns whether there is more.
    fn work(&self) -> bool {
        let more = self.store.borrow_mut().work();
        self.deliver(None);
        more
    }

    /// Gives one guest its output, and handles at most one message of the guest. Returns whether there is more to do at once.
    fn step(&self, ring: &Ring<H>) -> bool {
        let domain = ring.ends.domain;
        let step = ring.link.borrow_mut().step(&ring.ends.page, &mut self.store.borrow_mut());
        if let Some(why) = step.stopped {
            ring.complain(self.host.now_ns(), &format!("the store serves domain {domain} no longer: {why:?}"));
        }
        if step.notify {
            ring.ends.channel.notify();
            // `notify` says that this step has moved bytes. Only then are the other guests kicked: if every step kicked them,
            // two guests that do not fetch their output would kick each other for ever.
            self.deliver(Some(domain));
        }
        let id = ConnectionId::Domain(DomainId(domain));
        ring.stalled.set(!step.again && !self.store.borrow().accepts_input(id));
        step.again
    }
}

/// The name of an error of the store.
fn text(error: StoreError) -> String {
    error.name().to_string()
}

impl<H: Host> toolstack::Store for StoreService<H> {
    type Error = String;

    fn write(&self, guest: DomainId, nodes: &[Node]) -> Result<(), String> {
        let done = self.0.store.borrow_mut().session(self.0.session).transaction(|t| {
            for node in nodes {
                t.write(&node.path, node.value.as_bytes())?;
                let list = match node.access {
                    Access::Read => format!("n{},r{guest}", self.0.own),
                    Access::Own => format!("n{guest}"),
                };
                t.set_permissions(&node.path, &list)?;
            }
            Ok(())
        });
        self.0.deliver(None);
        done.map_err(text)
    }

    fn remove(&self, path: &str) -> Result<(), String> {
        let removed = self.0.store.borrow_mut().session(self.0.session).remove_gradually(path);
        self.0.deliver(None);
        removed.map_err(text)
    }

    fn introduce(&self, domain: DomainId, page: MachineFrame, port: u32) -> Result<(), String> {
        let id = domain;
        let session = self.0.session;
        let introduced = self.0.store.borrow_mut().session(session).introduce(id, page.0, port);
        introduced.map_err(text)?;
        self.carry_out_duties()?;
        self.0.deliver(None);
        Ok(())
    }

    fn release(&self, domain: DomainId) -> Result<(), String> {
        let id = domain;
        let released = self.0.store.borrow_mut().session(self.0.session).release(id);
        self.carry_out_duties()?;
        self.0.deliver(None);
        match released {
            // The toolstack calls this for a domain that it could not introduce, too. The store then answers `NotFound`.
            Ok(()) | Err(StoreError::NotFound) => Ok(()),
            Err(error) => Err(text(error)),
        }
    }

    fn domain_shut_down(&self, domain: DomainId) {
        self.0.store.borrow_mut().domain_shut_down(domain);
        self.0.deliver(None);
    }

    fn is_settled(&self) -> bool {
        !self.0.store.borrow().has_work()
    }

    fn reserve(&self) -> bool {
        let mut reserved = self.0.reserved.borrow_mut();
        if reserved.is_none() {
            *reserved = self.0.host.reserve(store_bytes());
        }
        reserved.is_some()
    }

    fn give_back(&self) {
        self.0.reserved.take();
    }
}
