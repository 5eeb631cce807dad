//! The shape of every service: it is attached to a guest's page and port, serves in bounded turns, and is detached.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use core::fmt;

use hypercall_abi::Errno;

use crate::host::{Channel, Class, Host};
use crate::signal::Signal;

/// How long a turn is put off when there is no memory for it.
pub const PATIENCE_NS: u64 = 100_000_000;

/// What a turn leaves.
#[must_use = "a service that is not served again stands still"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to do at once, after others have had their turns.
    Again,
    /// Nothing, until the guest or we have something new.
    Idle,
}

impl Turn {
    /// The turn of one who knows whether there is more.
    pub const fn again_if(more: bool) -> Self {
        if more { Self::Again } else { Self::Idle }
    }
}

/// What a guest shares with a service: a page and an event channel. Dropping it unmaps and closes.
#[derive(Debug)]
pub struct Ends<H: Host> {
    /// The guest.
    pub domain: u16,
    /// Its page.
    pub page: H::Page,
    /// Our end of its channel.
    pub channel: H::Channel,
}

impl<H: Host> Ends<H> {
    /// Maps a page of a guest and joins its port; `what` the service is called in messages.
    fn take(host: &H, domain: u16, (reference, port): (u32, u32), what: &str) -> Result<Self, String> {
        let failed = |end: &'static str| move |errno: Errno| format!("its {what} {end}: {}", errno.name());
        let page = host.map(domain, reference).map_err(failed("page"))?;
        let channel = host.connect(domain, port).map_err(failed("port"))?;
        Ok(Self { domain, page, channel })
    }
}

/// A service of one guest, for as long as the guest lives.
pub trait Service<H: Host>: Sized + 'static {
    /// What outlives one attachment.
    type Kept;

    /// What it is called in messages.
    const NAME: &'static str;
    /// The grant reference of the guest's page.
    const REFERENCE: u32;
    /// When its turns come.
    const CLASS: Class;
    /// Bytes of the heap that a turn may allocate in all.
    const TURN_BYTES: usize;
    /// The budget of a turn, in the service's own unit: bytes, messages, requests.
    const BUDGET: usize;

    /// Begins: checks what is in the page.
    ///
    /// # Errors
    /// Why the guest cannot be served. Nothing has been said to it then.
    fn attach(kept: &Self::Kept, ends: Ends<H>) -> Result<Self, &'static str>;

    /// One turn, of `budget` units at most whatever the guest does meanwhile.
    fn serve(&self, budget: usize) -> Turn;

    /// Ends: does what is left to do and says what is left to say. Nothing of this happens when the service is dropped.
    fn detach(&self);
}

/// A service that is attached, with the task that gives it its turns. Dropping it ends both without a word.
pub struct Attached<H: Host, S> {
    service: Rc<S>,
    /// Asks for a turn without an event of the guest.
    kick: Rc<Signal>,
    _task: H::Task,
}

impl<H: Host, S> fmt::Debug for Attached<H, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").field("kick", &self.kick).finish_non_exhaustive()
    }
}

impl<H: Host, S: Service<H>> Attached<H, S> {
    /// Attaches a service to guest `domain`, whose end of the event channel is `port`; its first turn comes at once.
    ///
    /// # Errors
    /// Why the guest's page or port cannot be used, in words.
    pub fn attach(host: &H, kept: &S::Kept, domain: u16, port: u32) -> Result<Self, String> {
        let ends = Ends::take(host, domain, (S::REFERENCE, port), S::NAME)?;
        let port = ends.channel.port();
        let service = Rc::new(S::attach(kept, ends).map_err(|why| format!("its {} {why}", S::NAME))?);
        let kick: Rc<Signal> = Rc::default();
        // The task holds neither the page nor the channel: they go when the service is detached.
        let (served, kicked) = (Rc::downgrade(&service), Rc::clone(&kick));
        let turn = move || served.upgrade().map(|service| service.serve(S::BUDGET));
        let wait = {
            let host = host.clone();
            async move || kicked.or(host.raised(port)).await
        };
        let task = host.spawn(S::CLASS, turns(host.clone(), S::TURN_BYTES, turn, wait));
        Ok(Self { service, kick, _task: task })
    }

    /// The service.
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

/// Takes turn after turn. Each waits until the heap has `bytes` for it; after it come other tasks, or `wait` if there is no more
/// to do. Ends when `turn` says that nobody is left.
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
