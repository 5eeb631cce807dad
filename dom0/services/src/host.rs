//! What a service needs of the domain it runs in.

use core::future::Future;

use hypercall_abi::Errno;
use ring_protocol::SharedPage;

/// The priority of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A guest waits for each step of the task.
    Control,
    /// The task moves bytes; it runs after tasks of class `Control`.
    Data,
}

/// An event channel to another domain. Dropping it closes the local port.
pub trait Channel: 'static {
    /// The number of the local port.
    fn port(&self) -> u32;

    /// Sends an event to the other end.
    fn notify(&self);
}

/// The domain that services run in. Clones stand for the same domain.
pub trait Host: Clone + 'static {
    /// A page that another domain granted, mapped until this value is dropped.
    type Page: SharedPage + 'static;
    /// An event channel.
    type Channel: Channel;
    /// A running task; dropping it ends the task.
    type Task: 'static;
    /// A part of the heap that is set aside until this value is dropped.
    type Reserved: 'static;

    /// Maps grant reference `reference` of `domain`.
    ///
    /// # Errors
    /// The hypervisor's error; `NoMem` if no address is free for the page.
    fn map(&self, domain: u16, reference: u32) -> Result<Self::Page, Errno>;

    /// Binds a local port to port `port` of `domain`.
    ///
    /// # Errors
    /// The hypervisor's error.
    fn connect(&self, domain: u16, port: u32) -> Result<Self::Channel, Errno>;

    /// Waits for an event on the local port `port`.
    fn raised(&self, port: u32) -> impl Future<Output = ()>;

    /// Starts a task.
    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) -> Self::Task;

    /// Lets other tasks run.
    fn yield_now(&self) -> impl Future<Output = ()>;

    /// Nanoseconds of a clock that never goes back.
    fn now_ns(&self) -> u64;

    /// Waits until [`now_ns`](Host::now_ns) reaches `deadline_ns`.
    fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()>;

    /// Whether the heap has a free block of this many bytes now.
    fn can_allocate(&self, bytes: usize) -> bool;

    /// Sets aside this many bytes of the heap; `None` if there is not enough memory.
    fn reserve(&self, bytes: usize) -> Option<Self::Reserved>;
}
