//! What a service needs of the domain it runs in.

use core::future::Future;

use hypercall_abi::Errno;
use ring_protocol::SharedPage;

/// Which tasks run first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Somebody waits for each of its steps.
    Control,
    /// It moves bytes: it runs after control.
    Data,
}

/// An event channel to another domain. Dropping it closes our end.
pub trait Channel: 'static {
    /// The number of our port.
    fn port(&self) -> u32;

    /// Raises the other end.
    fn notify(&self);
}

/// The domain that services run in. Clones are the same.
pub trait Host: Clone + 'static {
    /// A page that another domain granted us, mapped until it is dropped.
    type Page: SharedPage + 'static;
    /// An event channel.
    type Channel: Channel;
    /// A running task; dropping it ends the task.
    type Task: 'static;
    /// A part of the heap that is kept for somebody until this is dropped.
    type Reserved: 'static;

    /// Maps grant reference `reference` of `domain`.
    ///
    /// # Errors
    /// What the hypervisor refuses it with; `NoMem` if there is no address for it.
    fn map(&self, domain: u16, reference: u32) -> Result<Self::Page, Errno>;

    /// Joins port `port` of `domain`.
    ///
    /// # Errors
    /// What the hypervisor refuses it with.
    fn connect(&self, domain: u16, port: u32) -> Result<Self::Channel, Errno>;

    /// Waits until our port `port` is raised.
    fn raised(&self, port: u32) -> impl Future<Output = ()>;

    /// Starts a task.
    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) -> Self::Task;

    /// Lets other tasks run.
    fn yield_now(&self) -> impl Future<Output = ()>;

    /// Nanoseconds of a clock that does not go back.
    fn now_ns(&self) -> u64;

    /// Waits until the clock says `deadline_ns`.
    fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()>;

    /// Whether the heap has this many bytes in a row now.
    fn can_allocate(&self, bytes: usize) -> bool;

    /// Keeps this many bytes of the heap for somebody; `None` if there is no memory for them.
    fn reserve(&self, bytes: usize) -> Option<Self::Reserved>;
}
