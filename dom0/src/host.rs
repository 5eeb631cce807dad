//! The unikernel as the domain that services run in.

use alloc::vec::Vec;
use core::future::Future;

use drivers::blk::Identity;
use drivers::pci::Found;
use drivers::virtio::NotTaken;
use hypercall_abi::Errno;
use services::console;
use services::machine::{self, Devices, DiskDriver, Driver, NetworkDriver};
use services::{Class, Host, store};
use unikernel::events::{self, Channel};
use unikernel::grants::GrantedPages;
use unikernel::memory::{self, Reserved};
use unikernel::tasks::{self, Task};
use unikernel::time;

use crate::platform::Terminal;

/// The console of a guest.
pub(crate) type GuestConsole = console::GuestConsole<Unikernel, Terminal>;
/// The store.
pub(crate) type StoreService = store::StoreService<Unikernel>;

/// The devices of the machine.
pub(crate) type Machine = machine::Machine<Unikernel>;

/// This domain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unikernel;

/// A channel as services use it.
#[derive(Debug)]
pub(crate) struct Port(Channel);

impl services::Channel for Port {
    fn port(&self) -> u32 {
        self.0.port()
    }

    fn notify(&self) {
        self.0.notify();
    }
}

impl Host for Unikernel {
    type Page = GrantedPages;
    type Channel = Port;
    type Task = Task<()>;
    type Reserved = Reserved;

    fn map(&self, domain: u16, reference: u32) -> Result<GrantedPages, Errno> {
        GrantedPages::map(domain, &[reference])
    }

    fn connect(&self, domain: u16, port: u32) -> Result<Port, Errno> {
        Channel::connect(domain, port).map(Port)
    }

    fn raised(&self, port: u32) -> impl Future<Output = ()> {
        events::wait(port)
    }

    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) -> Task<()> {
        match class {
            Class::Control => tasks::spawn(task),
            Class::Data => tasks::spawn_data(task),
        }
    }

    fn yield_now(&self) -> impl Future<Output = ()> {
        tasks::yield_now()
    }

    fn now_ns(&self) -> u64 {
        time::now_ns()
    }

    fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()> {
        time::sleep_until(deadline_ns)
    }

    fn can_allocate(&self, bytes: usize) -> bool {
        memory::can_allocate(bytes)
    }

    fn reserve(&self, bytes: usize) -> Option<Reserved> {
        memory::reserve(bytes)
    }
}

impl Devices for Unikernel {
    type Disk = unikernel::machine::Disk;
    type Network = unikernel::machine::Network;
    type Interrupt = Channel;

    fn functions(&self) -> Vec<Found> {
        unikernel::machine::functions().unwrap_or_default()
    }

    fn open_disk(&self, found: &Found) -> Result<DiskDriver<Self>, NotTaken> {
        unikernel::machine::open_disk(found).map(|(device, interrupt)| Driver { device, interrupt })
    }

    fn identify(&self, disk: &mut Self::Disk) -> Identity {
        disk.identify()
    }

    fn give_up_disk(&self, Driver { device, interrupt }: DiskDriver<Self>) {
        unikernel::machine::give_up_disk(device, interrupt);
    }

    fn open_network(&self, found: &Found) -> Result<NetworkDriver<Self>, NotTaken> {
        unikernel::machine::open_network(found).map(|(device, interrupt)| Driver { device, interrupt })
    }

    fn give_up_network(&self, Driver { device, interrupt }: NetworkDriver<Self>) {
        unikernel::machine::give_up_network(device, interrupt);
    }
}
