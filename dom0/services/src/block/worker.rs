//! The worker of a queue: it gives the queue turns, and handles its events. Each device has a worker; all disks in memory share
//! another.

use alloc::boxed::Box;
use alloc::rc::{Rc, Weak};
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::future::{Future, poll_fn};
use core::pin::{Pin, pin};
use core::task::{Context, Poll};

use block_backend::{
    ConnectError, Connection, Counters, Disconnected, Event, FLIGHTS, Pins, Queue, Scratch, Turn, VbdId,
};
use disk::Device;

use super::host::{Backing, BlockHost, Own};
use super::vbd::Vbd;
use crate::host::Host;
use crate::shape::PATIENCE_NS;
use crate::signal::{Signal, Waiters};

/// Bytes of the lists of a request with the most segments: segments, handles and pieces.
const REQUEST_BYTES: usize = 256 * (8 + 4 + 16);
/// Bytes of the heap that a queue uses for as long as it exists: the lists of all its requests, and its batches.
pub const QUEUE_BYTES: usize = FLIGHTS * REQUEST_BYTES + 128 * 1024;
/// The maximum number of bytes of heap that a turn allocates: the lists of all requests grow to their maximum, and a list that
/// grows is copied.
pub const TURN_BYTES: usize = FLIGHTS * REQUEST_BYTES * 2;
/// The heap keeps a block for the largest turn of any service. That is a turn of the store, and must suffice here.
const _: () = assert!(TURN_BYTES <= store::TURN_BYTES);
/// Pages for descriptors, each for two requests at a time.
const SCRATCH: usize = 8;

/// A port that is listened to. One future serves all events of the port and never ends, so that no event allocates memory.
struct Listener {
    raised: Rc<Cell<bool>>,
    listening: Pin<Box<dyn Future<Output = ()>>>,
}

impl Listener {
    fn new<H: Host>(host: &H, port: u32) -> Self {
        let (host, raised) = (host.clone(), Rc::new(Cell::new(false)));
        let flag = Rc::clone(&raised);
        let listening = Box::pin(async move {
            loop {
                host.raised(port).await;
                flag.set(true);
            }
        });
        Self { raised, listening }
    }

    /// Whether the port was raised since the last call.
    fn poll(&mut self, context: &mut Context<'_>) -> bool {
        let _never_ready = self.listening.as_mut().poll(context);
        self.raised.take()
    }
}

/// A ring that the queue serves.
struct Served<H: BlockHost> {
    id: VbdId,
    vbd: Weak<Vbd<H>>,
    port: Listener,
}

/// A queue and the disks it serves.
pub(super) struct Worker<H: BlockHost> {
    host: H,
    /// The name of the device in messages.
    name: String,
    queue: RefCell<Queue<Backing<H>>>,
    served: RefCell<Vec<Served<H>>>,
    kick: Signal,
    /// The tasks that wait for the end of a turn.
    turned: Waiters,
    /// The nanoseconds after which disks want a late device reset. The shortest time counts.
    late_ns: RefCell<Vec<u64>>,
    _zeroes: H::Memory,
    _reserved: H::Reserved,
}

impl<H: BlockHost> Worker<H> {
    /// Makes the worker of a queue: of `device`, or of disks in memory if that is `None`.
    pub(super) fn new(
        host: &H,
        name: &str,
        device: Option<Box<dyn Device>>,
        pins: &Rc<Pins>,
    ) -> Result<Rc<Self>, &'static str> {
        const NO_MEMORY: &str = "not enough memory is left to serve it";
        let reserved = host.reserve(QUEUE_BYTES).ok_or(NO_MEMORY)?;
        let zeroes = host.allocate(1).ok_or(NO_MEMORY)?;
        let mut scratch = Vec::new();
        for _ in 0..SCRATCH {
            let memory = Own::from(host.allocate(1).ok_or(NO_MEMORY)?);
            scratch.push(Scratch { page: memory.page(), memory });
        }
        let page = disk::OwnMemory::page(&zeroes);
        Ok(Rc::new(Self {
            host: host.clone(),
            name: name.into(),
            queue: RefCell::new(Queue::new(device, Rc::clone(pins), scratch, page, None)),
            served: RefCell::default(),
            kick: Signal::default(),
            turned: Waiters::default(),
            late_ns: RefCell::default(),
            _zeroes: zeroes,
            _reserved: reserved,
        }))
    }

    /// Begins to serve a ring.
    pub(super) fn connect(&self, connection: Connection<Backing<H>>, vbd: Weak<Vbd<H>>) -> Result<VbdId, ConnectError> {
        let port = Listener::new(&self.host, connection.port);
        let id = self.queue.borrow_mut().connect(connection, self.host.now_ns())?;
        self.served.borrow_mut().push(Served { id, vbd, port });
        self.kick();
        Ok(id)
    }

    /// Stops serving a ring. Returns the parts of its vbd once no request of it is in flight.
    pub(super) async fn disconnect(&self, id: VbdId) -> Disconnected<Backing<H>> {
        self.queue.borrow_mut().disconnect(id);
        self.served.borrow_mut().retain(|served| served.id != id);
        self.kick();
        self.turned.until(|| self.queue.borrow_mut().disconnected(id)).await
    }

    /// Returns the counters of a vbd that is served. All are 0 if there is no such vbd.
    pub(super) fn counters(&self, id: VbdId) -> Counters {
        self.queue.borrow().vbd(id).map(block_backend::Vbd::counters).unwrap_or_default()
    }

    /// Adds a limit: the device is reset when an operation takes `late_ns`, until [`lift_limit`](Self::lift_limit).
    pub(super) fn limit_lateness(&self, late_ns: u64) {
        self.late_ns.borrow_mut().push(late_ns);
        self.apply_limits();
    }

    /// Lifts a limit of [`limit_lateness`](Self::limit_lateness).
    pub(super) fn lift_limit(&self, late_ns: u64) {
        let mut limits = self.late_ns.borrow_mut();
        if let Some(place) = limits.iter().position(|limit| *limit == late_ns) {
            limits.swap_remove(place);
        }
        drop(limits);
        self.apply_limits();
    }

    fn apply_limits(&self) {
        let shortest = self.late_ns.borrow().iter().min().copied();
        self.queue.borrow_mut().limit_lateness(shortest);
    }

    /// Resets the device, by a command of the administrator.
    pub(super) fn reset(&self) {
        self.queue.borrow_mut().reset(self.host.now_ns());
        self.kick();
    }

    /// Returns whether the device is lost.
    pub(super) fn is_lost(&self) -> bool {
        self.queue.borrow().is_lost()
    }

    /// Gives the queue a turn soon.
    pub(super) fn kick(&self) {
        self.kick.set();
    }

    /// Gives turns for ever. `interrupt` is the port that the device raises.
    pub(super) async fn run(self: Rc<Self>, interrupt: Option<u32>) {
        let host = self.host.clone();
        let mut interrupt = interrupt.map(|port| Listener::new(&host, port));
        // Most turns leave the deadline as it is.
        let (mut sleep, mut deadline_ns) = (pin!(None), None);
        loop {
            while !host.can_allocate(TURN_BYTES) {
                host.sleep_until(host.now_ns().saturating_add(PATIENCE_NS)).await;
            }
            let turn = self.turn();
            if turn.again {
                host.yield_now().await;
                poll_fn(|context| {
                    self.listen(context);
                    Poll::Ready(())
                })
                .await;
                continue;
            }
            if sleep.is_none() || turn.wake_ns != deadline_ns {
                deadline_ns = turn.wake_ns;
                sleep.set(deadline_ns.map(|at| host.sleep_until(at)));
            }
            self.wait(&mut interrupt, sleep.as_mut()).await;
        }
    }

    /// Waits for an interrupt, a raised port, a kick, or the end of `sleep`, which is `None` after that.
    async fn wait(&self, interrupt: &mut Option<Listener>, mut sleep: Pin<&mut Option<impl Future<Output = ()>>>) {
        let other = poll_fn(|context| {
            let interrupted = interrupt.as_mut().is_some_and(|port| port.poll(context));
            let raised = self.listen(context);
            if interrupted || raised {
                return Poll::Ready(());
            }
            let woken = sleep.as_mut().as_pin_mut().is_some_and(|sleep| sleep.poll(context).is_ready());
            if woken {
                sleep.set(None);
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        self.kick.or(other).await;
    }

    /// Makes the queue look at the rings whose ports were raised. Returns whether a port was raised.
    fn listen(&self, context: &mut Context<'_>) -> bool {
        let mut queue = self.queue.borrow_mut();
        let mut any = false;
        for served in &mut *self.served.borrow_mut() {
            if served.port.poll(context) {
                queue.attend(served.id);
                any = true;
            }
        }
        any
    }

    fn turn(&self) -> Turn {
        let turn = self.queue.borrow_mut().turn(&mut Backing(self.host.clone()), self.host.now_ns());
        loop {
            let event = self.queue.borrow_mut().event();
            let Some(event) = event else { break };
            self.handle(&event);
        }
        self.turned.wake();
        turn
    }

    fn handle(&self, event: &Event) {
        let vbds: Vec<_> = {
            let served = self.served.borrow();
            let concerned = served.iter().filter(|served| match event {
                Event::Broken(id, _) => served.id == *id,
                Event::Lost(_) => true,
                _ => false,
            });
            concerned.filter_map(|served| served.vbd.upgrade()).collect()
        };
        // All events except a broken ring are caused by the device, not by a guest, and need no limit of lines.
        if !matches!(event, Event::Broken(..)) {
            log::warn!("the disk {} {event}", self.name);
        }
        for vbd in vbds {
            match event {
                Event::Broken(_, why) => vbd.fail(&alloc::format!("its ring is broken: {why}")),
                _ => vbd.fail(&alloc::format!("the disk {} is lost", self.name)),
            }
        }
    }
}
