//! A domain for services to run in: pages, ports, a clock and a heap that tests look at and change.
#![allow(dead_code, unreachable_pub, reason = "each suite uses a part of it")]

pub mod front;
pub mod guest;
pub mod leaks;
pub mod orders;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use hypercall_abi::Errno;
use ring_protocol::{SharedPage, WordPage};
use services::{Channel, Class, Host};

/// The fake. Clones are the same.
#[derive(Clone, Default)]
pub struct Fake(Rc<Inner>);

/// What is called before and after the tasks have a turn.
type Watch = Rc<dyn Fn(bool)>;

#[derive(Default)]
struct Inner {
    pages: RefCell<BTreeMap<(u16, u32), Rc<WordPage>>>,
    mapped: Cell<usize>,
    next_port: Cell<u32>,
    /// Ours, and whose each is joined to.
    open: RefCell<BTreeMap<u32, (u16, u32)>>,
    raised: RefCell<BTreeSet<u32>>,
    /// Ports from here on are raised by devices. A port below must be open when somebody listens to it. `None`: nobody checks.
    first_interrupt: Cell<Option<u32>>,
    /// References from here on are granted by nobody. `None`: all are granted.
    not_granted: Cell<Option<u32>>,
    /// How often each guest was notified.
    notified: RefCell<BTreeMap<u16, usize>>,
    now: Cell<u64>,
    full: Cell<bool>,
    reserved: Cell<usize>,
    tasks: RefCell<Vec<Running>>,
    watch: RefCell<Option<Watch>>,
}

struct Running {
    class: Class,
    future: Pin<Box<dyn Future<Output = ()>>>,
    ended: Rc<Cell<bool>>,
}

impl Fake {
    /// The page that a guest granted.
    pub fn page(&self, domain: u16, reference: u32) -> Rc<WordPage> {
        Rc::clone(self.0.pages.borrow_mut().entry((domain, reference)).or_default())
    }

    /// Pages mapped and ports open.
    pub fn held(&self) -> (usize, usize) {
        (self.0.mapped.get(), self.0.open.borrow().len())
    }

    /// Bytes of the heap that are kept for somebody.
    pub fn reserved(&self) -> usize {
        self.0.reserved.get()
    }

    /// Tasks that have not ended, by class.
    pub fn tasks(&self, class: Class) -> usize {
        self.0.tasks.borrow().iter().filter(|task| task.class == class && !task.ended.get()).count()
    }

    /// How often a guest was notified.
    pub fn notified(&self, domain: u16) -> usize {
        self.0.notified.borrow().get(&domain).copied().unwrap_or(0)
    }

    /// A guest raises all channels it has with us.
    pub fn raise(&self, domain: u16) {
        let open = self.0.open.borrow();
        let ours = open.iter().filter(|(_, (of, _))| *of == domain).map(|(port, _)| *port);
        self.0.raised.borrow_mut().extend(ours);
    }

    /// A guest raises the channel that is its port `port`.
    pub fn raise_from(&self, domain: u16, port: u32) {
        let open = self.0.open.borrow();
        let ours = open.iter().filter(|(_, end)| **end == (domain, port)).map(|(ours, _)| *ours);
        self.0.raised.borrow_mut().extend(ours);
    }

    /// Whether a port of ours is open.
    pub fn is_open(&self, port: u32) -> bool {
        self.0.open.borrow().contains_key(&port)
    }

    /// A port of ours is raised, whoever does it.
    pub fn raise_port(&self, port: u32) {
        self.0.raised.borrow_mut().insert(port);
    }

    /// We send an event on a port of ours, which has to be open.
    pub fn send(&self, port: u32) {
        let (domain, _) = *self.0.open.borrow().get(&port).expect("an event on a port that is not open");
        *self.0.notified.borrow_mut().entry(domain).or_default() += 1;
    }

    /// Ports from here on are raised by devices. From now on a port below must be open when somebody listens to it.
    pub fn devices_raise(&self, first: u32) {
        self.0.first_interrupt.set(Some(first));
    }

    /// References from here on are granted by nobody.
    pub fn grant_below(&self, reference: u32) {
        self.0.not_granted.set(Some(reference));
    }

    /// The heap is full, or is no longer.
    pub fn set_full(&self, full: bool) {
        self.0.full.set(full);
    }

    pub fn advance(&self, ns: u64) {
        self.0.now.set(self.0.now.get() + ns);
    }

    /// From now on calls `watch` before (true) and after (false) the tasks have a turn.
    pub fn watch(&self, watch: impl Fn(bool) + 'static) {
        self.0.watch.replace(Some(Rc::new(watch)));
    }

    fn mark(&self, begins: bool) {
        let watch = self.0.watch.borrow().clone();
        if let Some(watch) = watch {
            watch(begins);
        }
    }

    /// Gives every task one turn.
    pub fn round(&self) {
        let mut tasks = std::mem::take(&mut *self.0.tasks.borrow_mut());
        self.mark(true);
        for task in &mut tasks {
            if !task.ended.get() {
                let done = task.future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
                task.ended.set(task.ended.get() || done);
            }
        }
        tasks.retain(|task| !task.ended.get());
        self.mark(false);
        let mut new = self.0.tasks.borrow_mut();
        tasks.append(&mut new);
        *new = tasks;
    }

    pub fn rounds(&self, count: usize) {
        (0..count).for_each(|_| self.round());
    }
}

/// A page while it is mapped.
pub struct Mapped(Rc<WordPage>, Fake);

impl Drop for Mapped {
    fn drop(&mut self) {
        let mapped = &self.1.0.mapped;
        mapped.set(mapped.get() - 1);
    }
}

impl SharedPage for Mapped {
    fn len_bytes(&self) -> usize {
        self.0.len_bytes()
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.0.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.0.store_u32(offset, value);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.0.read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        self.0.write(offset, from);
    }
}

/// A port while it is open.
pub struct Port(u32, u16, Fake);

impl Drop for Port {
    fn drop(&mut self) {
        self.2.0.open.borrow_mut().remove(&self.0);
        self.2.0.raised.borrow_mut().remove(&self.0);
    }
}

impl Channel for Port {
    fn port(&self) -> u32 {
        self.0
    }

    fn notify(&self) {
        *self.2.0.notified.borrow_mut().entry(self.1).or_default() += 1;
    }
}

/// Ends its task when dropped.
pub struct Handle(Rc<Cell<bool>>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.set(true);
    }
}

/// A part of the heap.
pub struct Part(usize, Fake);

impl Drop for Part {
    fn drop(&mut self) {
        let reserved = &self.1.0.reserved;
        reserved.set(reserved.get() - self.0);
    }
}

impl Host for Fake {
    type Page = Mapped;
    type Channel = Port;
    type Task = Handle;
    type Reserved = Part;

    /// Domain 99 grants nothing.
    fn map(&self, domain: u16, reference: u32) -> Result<Mapped, Errno> {
        if domain == 99 || self.0.not_granted.get().is_some_and(|first| reference >= first) {
            return Err(Errno::Inval);
        }
        self.0.mapped.set(self.0.mapped.get() + 1);
        Ok(Mapped(self.page(domain, reference), self.clone()))
    }

    /// Port 99 is nobody's.
    fn connect(&self, domain: u16, port: u32) -> Result<Port, Errno> {
        if port == 99 {
            return Err(Errno::Inval);
        }
        let ours = self.0.next_port.get() + 1;
        self.0.next_port.set(ours);
        self.0.open.borrow_mut().insert(ours, (domain, port));
        Ok(Port(ours, domain, self.clone()))
    }

    fn raised(&self, port: u32) -> impl Future<Output = ()> {
        poll_fn(move |_| {
            let of_device = self.0.first_interrupt.get().is_none_or(|first| port >= first);
            assert!(of_device || self.is_open(port), "somebody listens to a port that is closed");
            if self.0.raised.borrow_mut().remove(&port) { Poll::Ready(()) } else { Poll::Pending }
        })
    }

    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) -> Handle {
        let ended = Rc::new(Cell::new(false));
        self.0.tasks.borrow_mut().push(Running { class, future: Box::pin(task), ended: Rc::clone(&ended) });
        Handle(ended)
    }

    fn yield_now(&self) -> impl Future<Output = ()> {
        let mut yielded = false;
        poll_fn(move |_| if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending })
    }

    fn now_ns(&self) -> u64 {
        self.0.now.get()
    }

    fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()> {
        poll_fn(move |_| if self.0.now.get() >= deadline_ns { Poll::Ready(()) } else { Poll::Pending })
    }

    fn can_allocate(&self, _bytes: usize) -> bool {
        !self.0.full.get()
    }

    fn reserve(&self, bytes: usize) -> Option<Part> {
        if self.0.full.get() {
            return None;
        }
        self.0.reserved.set(self.0.reserved.get() + bytes);
        Some(Part(bytes, self.clone()))
    }
}

/// Makes a machine a domain for services to run in, as the fake in its field `fake` is.
#[allow(unused_macros, reason = "each suite uses a part of this module")]
macro_rules! host_as_its_fake {
    ($machine:ty) => {
        impl services::Host for $machine {
            type Page = $crate::common::Mapped;
            type Channel = $crate::common::Port;
            type Task = $crate::common::Handle;
            type Reserved = $crate::common::Part;

            fn map(&self, domain: u16, reference: u32) -> Result<Self::Page, hypercall_abi::Errno> {
                self.fake.map(domain, reference)
            }
            fn connect(&self, domain: u16, port: u32) -> Result<Self::Channel, hypercall_abi::Errno> {
                self.fake.connect(domain, port)
            }
            fn raised(&self, port: u32) -> impl Future<Output = ()> {
                self.fake.raised(port)
            }
            fn spawn(&self, class: services::Class, task: impl Future<Output = ()> + 'static) -> Self::Task {
                self.fake.spawn(class, task)
            }
            fn yield_now(&self) -> impl Future<Output = ()> {
                self.fake.yield_now()
            }
            fn now_ns(&self) -> u64 {
                self.fake.now_ns()
            }
            fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()> {
                self.fake.sleep_until(deadline_ns)
            }
            fn can_allocate(&self, bytes: usize) -> bool {
                self.fake.can_allocate(bytes)
            }
            fn reserve(&self, bytes: usize) -> Option<Self::Reserved> {
                self.fake.reserve(bytes)
            }
        }
    };
}
#[allow(unused_imports, reason = "each suite uses a part of it")]
pub(crate) use host_as_its_fake;
