//! The store as a service: one server, the rings of all guests, and the toolstack's own way in.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::Rc;
use core::cell::RefCell;
use guest_image::MachineFrame;
use hypercall_abi::grant::REF_XENSTORE;
use store::local::Transaction;
use store::transport::Link;
use store::{ConnectionId, DomainId, Duty, Quotas, Store, StoreError};
use toolstack::{Access, Node};
use unikernel::events::Channel;
use unikernel::grants::GrantedPage;
use unikernel::tasks::{self, Bell, Task};

/// Our own number. The ABI gives back ends no way to ask; guests address us by it.
pub(crate) const OWN: u16 = 0;

/// A guest's ring while it is served.
struct Client {
    link: Link,
    page: GrantedPage,
    channel: Rc<Channel>,
    /// Rings the bell when the guest does. Dropping it ends it.
    _listener: Task<()>,
}

/// The server and its clients.
pub(crate) struct Stores {
    store: RefCell<Store>,
    session: ConnectionId,
    clients: RefCell<BTreeMap<DomainId, Client>>,
    /// Somebody has something to say.
    bell: Rc<Bell>,
}

/// Starts the service.
pub(crate) fn start() -> Rc<Stores> {
    let mut store = Store::new(DomainId(OWN), Quotas::default());
    let session = store.open_local();
    let stores =
        Rc::new(Stores { store: RefCell::new(store), session, clients: RefCell::default(), bell: Rc::default() });
    tasks::spawn(serve(Rc::clone(&stores))).detach();
    stores
}

async fn serve(stores: Rc<Stores>) {
    loop {
        // One message of each client at a time, until nobody has more: then none waits behind a busy one.
        while stores.step_all() {
            tasks::yield_now().await;
        }
        stores.bell.wait().await;
    }
}

impl Stores {
    /// One step of every client; answers whether one of them has more to do.
    fn step_all(&self) -> bool {
        let mut store = self.store.borrow_mut();
        let mut again = false;
        for client in self.clients.borrow_mut().values_mut() {
            let step = client.link.step(&client.page, &mut store);
            if step.notify {
                client.channel.notify();
            }
            if let Some(why) = step.stopped {
                log::warn!("domain {}: its store connection ends: {why:?}", client.link.domain());
            }
            // What one client did may have left an event for one that had its turn already.
            again |= step.again || step.notify;
        }
        again
    }

    /// Carries out what the store wants done outside.
    fn carry_out_duties(&self) {
        loop {
            let duty = self.store.borrow_mut().next_duty();
            match duty {
                Some(Duty::Attach { domain, port, .. }) => match self.attach(domain, port) {
                    Ok(client) => drop(self.clients.borrow_mut().insert(domain, client)),
                    Err(why) => log::error!("domain {domain}: its store ring is not served: {why}"),
                },
                Some(Duty::Detach { domain }) => drop(self.clients.borrow_mut().remove(&domain)),
                None => break,
            }
        }
        self.bell.ring();
    }

    /// Maps the ring by its grant (the frame named in the introduction is not believed), and listens.
    fn attach(&self, domain: DomainId, port: u32) -> Result<Client, &'static str> {
        let page = GrantedPage::map(domain.0, REF_XENSTORE).map_err(|why| why.name())?;
        let channel = Rc::new(Channel::connect(domain.0, port).map_err(|why| why.name())?);
        let link = Link::introduce(domain, &page).map_err(|_| "its indices are impossible")?;
        let listener = tasks::spawn(listen(Rc::clone(&channel), Rc::clone(&self.bell)));
        Ok(Client { link, page, channel, _listener: listener })
    }

    /// Tells watchers that a domain ended.
    pub(crate) fn domain_shut_down(&self, domain: toolstack::DomainId) {
        self.store.borrow_mut().domain_shut_down(DomainId(domain.0));
        self.bell.ring();
    }
}

/// Rings the bell whenever the other end of a channel does.
pub(crate) async fn listen(channel: Rc<Channel>, bell: Rc<Bell>) {
    loop {
        channel.wait().await;
        bell.ring();
    }
}

/// The toolstack's way in.
pub(crate) struct Session(pub(crate) Rc<Stores>);

impl Session {
    fn with<T>(
        &self,
        f: impl FnOnce(&mut store::local::Session<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let result = {
            let mut store = self.0.store.borrow_mut();
            f(&mut store.session(self.0.session))
        };
        self.0.carry_out_duties();
        result
    }
}

fn write_node(t: &mut Transaction<'_, '_>, guest: toolstack::DomainId, node: &Node) -> Result<(), StoreError> {
    t.write(&node.path, node.value.as_bytes())?;
    let permissions = match node.access {
        Access::Read => format!("n{OWN},r{guest}"),
        Access::Own => format!("n{guest}"),
    };
    t.set_permissions(&node.path, &permissions)
}

impl toolstack::Store for Session {
    type Error = StoreText;

    fn write(&mut self, guest: toolstack::DomainId, nodes: &[Node]) -> Result<(), StoreText> {
        let write = |t: &mut Transaction<'_, '_>| nodes.iter().try_for_each(|node| write_node(t, guest, node));
        self.with(|session| session.transaction(write)).map_err(StoreText)
    }

    fn remove(&mut self, path: &str) -> Result<(), StoreText> {
        match self.with(|session| session.remove(path)) {
            Ok(()) | Err(StoreError::NotFound) => Ok(()),
            Err(why) => Err(StoreText(why)),
        }
    }

    fn introduce(&mut self, domain: toolstack::DomainId, page: MachineFrame, port: u32) -> Result<(), StoreText> {
        self.with(|session| session.introduce(DomainId(domain.0), page.0, port)).map_err(StoreText)
    }

    fn release(&mut self, domain: toolstack::DomainId) -> Result<(), StoreText> {
        match self.with(|session| session.release(DomainId(domain.0))) {
            // It was never introduced, or is gone already.
            Ok(()) | Err(StoreError::NotFound) => Ok(()),
            Err(why) => Err(StoreText(why)),
        }
    }
}

/// An error of the store, in words.
#[derive(Debug)]
pub(crate) struct StoreText(StoreError);

impl core::fmt::Display for StoreText {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "the store refuses: {:?}", self.0)
    }
}
