//! The worker of a queue: it gives the queue turns, and handles its events. Each device has a worker; all disks in memory share
//! another.

use alloc::boxed::Box;
use alloc::rc::{Rc, Weak};
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::task::Context;

use block_backend::{ConnectError, Connection, Counters, Disconnected, Event, FLIGHTS, Pins, Queue, Scratch, VbdId};
use disk::Device;

use super::host::{Backing, BlockHost, Own};
use super::vbd::Vbd;
use crate::listen::{Listener, Next, Turns};
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
    /// The port that the device raises. `None` for disks in memory.
    interrupt: RefCell<Option<Listener>>,
    kick: Signal,
    /// The tasks that wait for the end of a turn.
    turned: Waiters,
    /// The nanoseconds after which disks want a late device reset. The shortest time counts.
    late_ns: RefCell<Vec<u64>>,
    _zeroes: H::Memory,
    _reserved: H::Reserved,
}

impl<H: BlockHost> Worker<H> {
    /// Makes the worker of a queue: of a device and the port that it raises, or of disks in memory if that is `None`.
    pub(super) fn new(
        host: &H,
        name: &str,
        device: Option<(Box<dyn Device>, u32)>,
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
        let (device, interrupt) = device.unzip();
        let interrupt = RefCell::new(interrupt.map(|port| Listener::new(host, port)));
        Ok(Rc::new(Self {
            host: host.clone(),
            name: name.into(),
            queue: RefCell::new(Queue::new(device, Rc::clone(pins), scratch, page, None)),
            served: RefCell::default(),
            interrupt,
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

impl<H: BlockHost> Turns for Worker<H> {
    const TURN_BYTES: usize = TURN_BYTES;

    fn turn(&self) -> Next {
        let turn = self.queue.borrow_mut().turn(&mut Backing(self.host.clone()), self.host.now_ns());
        loop {
            let event = self.queue.borrow_mut().event();
            let Some(event) = event else { break };
            self.handle(&event);
        }
        self.turned.wake();
        Next { again: turn.again, wake_ns: turn.wake_ns }
    }

    /// Makes the queue look at the rings whose ports were raised.
    fn listen(&self, context: &mut Context<'_>) -> bool {
        let mut any = self.interrupt.borrow_mut().as_mut().is_some_and(|port| port.poll(context));
        let mut queue = self.queue.borrow_mut();
        for served in &mut *self.served.borrow_mut() {
            if served.port.poll(context) {
                queue.attend(served.id);
                any = true;
            }
        }
        any
    }

    fn kick(&self) -> &Signal {
        &self.kick
    }
}
