//! What the store and the consoles have in common: each serves a guest through a page and a port of the guest's own. A
//! [`Service`] is the store, or a console, as it serves one guest. It is attached to the page and the port, serves in bounded
//! turns, and is detached.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use core::fmt;

use hypercall_abi::Errno;

use crate::host::{Channel, Class, Host};
use crate::signal::Signal;

/// Nanoseconds by which a turn is put off when the heap has no room for what the turn may allocate.
pub const PATIENCE_NS: u64 = 100_000_000;

/// Whether there is more to do after a turn.
#[must_use = "a service that gets no further turn stands still"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to do already. Other tasks get their turns first.
    Again,
    /// Nothing can be done before the task is woken. The task of a [`Service`] is woken by an event of the guest or by a
    /// [`kick`](Attached::kick).
    Idle,
}

impl Turn {
    /// `Again` if there is more to do, else `Idle`.
    pub const fn again_if(more: bool) -> Self {
        if more { Self::Again } else { Self::Idle }
    }
}

/// What a service shares with a guest: a page and an event channel. Dropping this value unmaps the page and closes the port.
#[derive(Debug)]
pub struct Ends<H: Host> {
    /// The guest.
    pub domain: u16,
    /// The guest's page.
    pub page: H::Page,
    /// The local end of the guest's event channel.
    pub channel: H::Channel,
}

impl<H: Host> Ends<H> {
    /// Maps the page that guest `domain` granted as `reference`, and binds a local port to the guest's `port`. `what` is the
    /// service's name in error messages.
    fn take(host: &H, domain: u16, (reference, port): (u32, u32), what: &str) -> Result<Self, String> {
        let failed = |end: &'static str| move |errno: Errno| format!("its {what} {end}: {}", errno.name());
        let page = host.map(domain, reference).map_err(failed("page"))?;
        let channel = host.connect(domain, port).map_err(failed("port"))?;
        Ok(Self { domain, page, channel })
    }
}

/// A service that dom0 gives to one guest while the guest has a domain.
pub trait Service<H: Host>: Sized + 'static {
    /// State that is kept from one attachment to the next.
    type Kept;

    /// The service's name in messages.
    const NAME: &'static str;
    /// The grant reference of the guest's page.
    const REFERENCE: u32;
    /// The priority of the service's task.
    const CLASS: Class;
    /// The most bytes of the heap that one turn may allocate in all.
    const TURN_BYTES: usize;
    /// The budget of a turn, in the service's own unit: bytes of output, or messages.
    const BUDGET: usize;

    /// Checks the page, and begins to serve the guest.
    ///
    /// # Errors
    /// Why the guest cannot be served. In this case, no event has been sent to the guest, and a console has not marked its
    /// page as connected either.
    fn attach(kept: &Self::Kept, ends: Ends<H>) -> Result<Self, &'static str>;

    /// Takes one turn. The turn handles at most `budget` units, whatever the guest does meanwhile.
    fn serve(&self, budget: usize) -> Turn;

    /// Ends the service: does the last work for the guest, marks the page as not connected if the page has such a mark, and
    /// logs what has not been logged yet. A service that is dropped without this call does nothing of this.
    fn detach(&self);
}

/// An attached service, and the task that gives the service its turns. Dropping this value ends both without
/// [`detach`](Self::detach).
pub struct Attached<H: Host, S> {
    service: Rc<S>,
    /// Wakes the task for a turn that no event of the guest caused.
    kick: Rc<Signal>,
    _task: H::Task,
}

impl<H: Host, S> fmt::Debug for Attached<H, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").field("kick", &self.kick).finish_non_exhaustive()
    }
}

impl<H: Host, S: Service<H>> Attached<H, S> {
    /// Attaches a service to guest `domain`; `port` is the guest's end of the event channel. The first turn is taken as soon as
    /// the task runs.
    ///
    /// # Errors
    /// Why the guest cannot be served, in words.
    pub fn attach(host: &H, kept: &S::Kept, domain: u16, port: u32) -> Result<Self, String> {
        let ends = Ends::take(host, domain, (S::REFERENCE, port), S::NAME)?;
        let port = ends.channel.port();
        let service = Rc::new(S::attach(kept, ends).map_err(|why| format!("its {} {why}", S::NAME))?);
        let kick: Rc<Signal> = Rc::default();
        // The task has only a weak reference to the service, which owns the page and the channel. So both are released when the
        // service is detached.
        let (served, kicked) = (Rc::downgrade(&service), Rc::clone(&kick));
        let turn = move || served.upgrade().map(|service| service.serve(S::BUDGET));
        let wait = {
            let host = host.clone();
            async move || kicked.or(host.raised(port)).await
        };
        let task = host.spawn(S::CLASS, turns(host.clone(), S::TURN_BYTES, turn, wait));
        Ok(Self { service, kick, _task: task })
    }

    /// The attached service.
    pub fn service(&self) -> &S {
        &self.service
    }

    /// Gives the service a turn soon.
    pub fn kick(&self) {
        self.kick.set();
    }

    /// Detaches the service, then unmaps the page and closes the port.
    pub fn detach(self) {
        self.service.detach();
    }
}

/// Calls `turn` again and again, until `turn` returns `None`, which means that the service (or whatever else takes the turns)
/// is gone. Before each call, waits until the heap has a free block of `bytes` bytes. After a call, lets other tasks run if
/// there is more to do; otherwise awaits `wait()`.
pub(crate) async fn turns<H: Host>(host: H, bytes: usize, turn: impl Fn() -> Option<Turn>, wait: impl AsyncFn()) {
    loop {
        while !host.can_allocate(bytes) {
            host.sleep_until(host.now_ns().saturating_add(PATIENCE_NS)).await;
        }
        match turn() {
            Some(Turn::Again) => host.yield_now().await,
            Some(Turn::Idle) => wait().await,
            None => return,
        }
    }
}
