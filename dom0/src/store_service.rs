//! The store, served: to guests through the page each of them granted us, to ourselves by calls.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::{Rc, Weak};
use alloc::string::{String, ToString};
use core::cell::{Cell, RefCell};

use guest_image::MachineFrame;
use hypercall_abi::grant::REF_XENSTORE;
use store::transport::Link;
use store::{ConnectionId, Duty, Quotas, StoreError, TURN_BYTES};
use toolstack::limit::LineLimit;
use toolstack::{Access, DomainId, Node};
use unikernel::events::Channel;
use unikernel::grants::GrantedPage;
use unikernel::memory::{self, Reserved};
use unikernel::tasks::{self, Task};
use unikernel::time;

use crate::signal::Signal;

/// What serving a guest takes of the heap beside the store itself: its link, channel, page and task.
const SERVED_BYTES: usize = 8 * 1024;
/// How long a turn is put off when there is no memory for it.
const PATIENCE_NS: u64 = 100_000_000;

/// What a guest may make the store take of the heap.
pub(crate) fn store_bytes() -> usize {
    Quotas::default().domain_bytes() + SERVED_BYTES
}

/// The store and those it serves. Clones are the same store.
#[derive(Clone)]
pub(crate) struct StoreService(Rc<Shared>);

struct Shared {
    own: DomainId,
    store: RefCell<store::Store>,
    /// Our own way to it.
    session: ConnectionId,
    served: RefCell<BTreeMap<u16, Served>>,
    /// The store has something left to do.
    left: Rc<Signal>,
    /// The heap for the next guest to be served.
    reserved: RefCell<Option<Reserved>>,
}

/// A guest being served.
struct Served {
    ring: Rc<Ring>,
    /// The store may have something for this guest.
    kick: Rc<Signal>,
    /// The heap for what the guest makes the store hold.
    _reserved: Option<Reserved>,
    /// Ends with this structure.
    _task: Task<()>,
}

/// Gone as soon as the guest is not served any more, wherever its task is: then its page is free.
struct Ring {
    link: RefCell<Link>,
    page: GrantedPage,
    channel: Channel,
    /// The store took no request of it, because others had yet to hear of the last ones.
    held: Cell<bool>,
    /// What may be said about it.
    lines: RefCell<LineLimit>,
}

impl Ring {
    /// Says something that the guest caused, unless too much of that has been said.
    fn complain(&self, what: &str) {
        match self.lines.borrow_mut().admit(time::now_ns()) {
            None => {}
            Some(0) => log::warn!("{what}"),
            Some(more) => log::warn!("{what} ({more} more suppressed)"),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let (suppressed, domain) = (self.lines.borrow().suppressed(), self.link.borrow().domain());
        if suppressed > 0 {
            log::warn!("{suppressed} more warnings about domain {domain} were suppressed");
        }
    }
}

impl StoreService {
    /// An empty store, run by domain `own`.
    pub(crate) fn new(own: DomainId) -> Self {
        let mut store = store::Store::new(store::DomainId(own.0), Quotas::default());
        let session = store.open_local();
        let (store, left) = (RefCell::new(store), Rc::default());
        let (served, reserved) = (RefCell::default(), RefCell::default());
        let shared = Rc::new(Shared { own, store, session, served, left, reserved });
        tasks::spawn(work(Rc::downgrade(&shared), Rc::clone(&shared.left))).detach();
        Self(shared)
    }

    /// Waits until nothing is left of domains that are gone, and everybody has heard of everything.
    pub(crate) async fn settled(&self) {
        while self.0.store.borrow().has_work() {
            tasks::yield_now().await;
        }
    }

    /// Has the heap hold what the next guest may make the store hold; answers whether there is memory for it. What earlier
    /// guests left there must be gone: see [`Self::settled`].
    pub(crate) fn reserve(&self) -> bool {
        let mut reserved = self.0.reserved.borrow_mut();
        if reserved.is_none() {
            *reserved = memory::reserve(store_bytes());
        }
        reserved.is_some()
    }

    /// No guest comes: what was reserved for it is free again.
    pub(crate) fn give_back(&self) {
        self.0.reserved.take();
    }

    /// Tells those who watch that a domain shut down.
    pub(crate) fn domain_shut_down(&self, domain: DomainId) {
        self.0.store.borrow_mut().domain_shut_down(store::DomainId(domain.0));
        self.0.deliver(None);
    }

    /// Does what the store cannot do itself.
    fn carry_out_duties(&self) -> Result<(), String> {
        loop {
            let duty = self.0.store.borrow_mut().next_duty();
            match duty {
                Some(Duty::Attach { domain, port, .. }) => self.attach(domain, port)?,
                Some(Duty::Detach { domain }) => {
                    // Dropped outside the borrow: unmapping and closing are calls.
                    let served = self.0.served.borrow_mut().remove(&domain.0);
                    drop(served);
                }
                None => return Ok(()),
            }
        }
    }

    fn attach(&self, domain: store::DomainId, port: u32) -> Result<(), String> {
        let page =
            GrantedPage::map(domain.0, REF_XENSTORE).map_err(|errno| format!("its store page: {}", errno.name()))?;
        let link = Link::introduce(domain, &page).map_err(|_| "its store page changes under us".to_string())?;
        let channel = Channel::connect(domain.0, port).map_err(|errno| format!("its store port: {}", errno.name()))?;
        let ring = Rc::new(Ring {
            link: RefCell::new(link),
            page,
            channel,
            held: Cell::new(false),
            lines: RefCell::default(),
        });
        let kick = Rc::new(Signal::default());
        let task = serve(Rc::downgrade(&self.0), domain, Rc::downgrade(&ring), Rc::clone(&kick));
        let reserved = self.0.reserved.take();
        let served = Served { ring, kick, _reserved: reserved, _task: tasks::spawn(task) };
        let before = self.0.served.borrow_mut().insert(domain.0, served);
        drop(before);
        Ok(())
    }
}

impl Shared {
    /// Wakes the guests that the store has something for, or takes requests from again, but `except`; and our own task if
    /// the store has something left to do.
    fn deliver(&self, except: Option<u16>) {
        let store = self.store.borrow();
        for (domain, served) in &*self.served.borrow() {
            let id = ConnectionId::Domain(store::DomainId(*domain));
            let may_go_on = served.ring.held.get() && store.accepts_input(id);
            if Some(*domain) != except && (may_go_on || store.has_output(id)) {
                served.kick.set();
            }
        }
        if store.has_work() {
            self.left.set();
        }
    }

    /// Does a piece of what the store has left to do; answers whether there is more.
    fn work(&self) -> bool {
        let more = self.store.borrow_mut().work();
        self.deliver(None);
        more
    }

    /// One step for one guest; answers whether there is more to do at once.
    fn step(&self, domain: store::DomainId, ring: &Ring) -> bool {
        let step = ring.link.borrow_mut().step(&ring.page, &mut self.store.borrow_mut());
        if let Some(why) = step.stopped {
            ring.complain(&format!("the store serves domain {domain} no longer: {why:?}"));
        }
        if step.notify {
            ring.channel.notify();
            // Only a step that moved something can have given others something, so two that are stuck do not wake
            // each other for ever.
            self.deliver(Some(domain.0));
        }
        ring.held.set(!step.again && !self.store.borrow().accepts_input(ConnectionId::Domain(domain)));
        step.again
    }
}

/// Waits until whatever a turn of the store allocates can be had.
async fn memory_for_a_turn() {
    while !memory::can_allocate(TURN_BYTES) {
        time::sleep_until(time::now_ns().saturating_add(PATIENCE_NS)).await;
    }
}

/// Does what the store has left to do, and lets others have their turn after each piece.
async fn work(shared: Weak<Shared>, left: Rc<Signal>) {
    loop {
        memory_for_a_turn().await;
        let Some(more) = shared.upgrade().map(|shared| shared.work()) else { return };
        if more {
            tasks::yield_now().await;
        } else {
            left.wait().await;
        }
    }
}

async fn serve(shared: Weak<Shared>, domain: store::DomainId, ring: Weak<Ring>, kick: Rc<Signal>) {
    loop {
        memory_for_a_turn().await;
        let (again, port) = {
            let (Some(shared), Some(ring)) = (shared.upgrade(), ring.upgrade()) else {
                return;
            };
            (shared.step(domain, &ring), ring.channel.port())
        };
        if again {
            tasks::yield_now().await;
        } else {
            kick.or_port(port).await;
        }
    }
}

/// The store refused, or could not be made to serve somebody.
fn text(error: StoreError) -> String {
    error.name().to_string()
}

impl toolstack::Store for StoreService {
    type Error = String;

    fn write(&mut self, guest: DomainId, nodes: &[Node]) -> Result<(), String> {
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

    fn remove(&mut self, path: &str) -> Result<(), String> {
        let removed = self.0.store.borrow_mut().session(self.0.session).remove_gradually(path);
        self.0.deliver(None);
        removed.map_err(text)
    }

    fn introduce(&mut self, domain: DomainId, page: MachineFrame, port: u32) -> Result<(), String> {
        let id = store::DomainId(domain.0);
        let session = self.0.session;
        let introduced = self.0.store.borrow_mut().session(session).introduce(id, page.0, port);
        introduced.map_err(text)?;
        self.carry_out_duties()?;
        self.0.deliver(None);
        Ok(())
    }

    fn release(&mut self, domain: DomainId) -> Result<(), String> {
        let id = store::DomainId(domain.0);
        let released = self.0.store.borrow_mut().session(self.0.session).release(id);
        self.carry_out_duties()?;
        self.0.deliver(None);
        match released {
            // One that could not be introduced has nothing to be released from.
            Ok(()) | Err(StoreError::NotFound) => Ok(()),
            Err(error) => Err(text(error)),
        }
    }
}
