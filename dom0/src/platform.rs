//! What the manager and the terminal work with, on a machine: hypercalls, the heap, the clock, the services.

use alloc::boxed::Box;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::future::Future;

use services::block::Disks;
use services::console::CONSOLE_BYTES;
use services::machine::Driver;
use services::net::Networks;
use services::store::store_bytes;
use toolstack::DomainId;
use toolstack::bundle::Bundle;
use toolstack::manager::{self, DiskRow, Mark};
use toolstack::terminal::{self, Cursor};
use unikernel::mark::{self, CREATE, DESTROY};
use unikernel::{console, hypercall, memory, tasks, time};

use crate::block::image;
use crate::host::{GuestConsole, Machine, StoreService, Unikernel};
use crate::hypervisor::Xen;

/// Set aside at boot: for the turn of a guest that is at hand, and for dom0 itself.
pub(crate) const OWN_BYTES: usize = store::TURN_BYTES + (1 << 19);

pub(crate) type Terminal = terminal::Terminal<Screen>;
pub(crate) type Manager = manager::Manager<Platform>;

/// The services of this domain, and what they are told on.
pub(crate) struct Platform {
    hypervisor: Xen,
    store: StoreService,
    /// The devices of the machine.
    machine: Machine,
    /// The disks of guests.
    disks: Disks<Unikernel>,
    /// The networks of guests.
    networks: Networks<Unikernel>,
    terminal: Rc<Terminal>,
}

/// A manager of the guests in `bundle`, for domain `own`.
pub(crate) fn manager(own: DomainId, bundle: Bundle<'static>, terminal: Rc<Terminal>) -> Rc<Manager> {
    let (hypervisor, store) = (Xen::default(), StoreService::new(Unikernel, own));
    let disks = Disks::new(Unikernel, store.clone());
    for (name, bytes) in bundle.disks() {
        match image(bytes) {
            Some(image) => disks.add_image(name, image),
            None => log::error!("the disk {name} of the boot bundle is out of reach"),
        }
    }
    let networks = Networks::new(Unikernel, store.clone(), time::counter() ^ time::now_ns().rotate_left(32));
    for forward in bundle.forwards() {
        match forward {
            Ok(forward) => networks.add_forward(forward),
            Err(why) => log::error!("a forward of the boot bundle: {why}"),
        }
    }
    let platform = Platform { hypervisor, store, machine: Machine::default(), disks, networks, terminal };
    Rc::new(manager::Manager::new(platform, own, bundle))
}

impl Platform {
    /// Finds the devices of the machine, has the disks with a serial number served, and names what is not used.
    pub(crate) async fn find_devices(&self) {
        let tell = |line: &str| self.terminal.message(line);
        self.machine.find(&Unikernel, &Unikernel, tell).await;
        for serial in self.machine.disks.rows().into_iter().filter_map(|row| row.serial) {
            let Some(Driver { device, interrupt }) = self.machine.disks.take(&serial) else { continue };
            if let Err(why) = self.disks.add_device(&serial, Box::new(device), interrupt.port(), interrupt) {
                tell(&format!("error: {why}"));
            }
        }
        while let Some(Driver { device, interrupt }) = self.machine.networks.take_first() {
            self.networks.add_device(&device.mac().to_string(), device, interrupt.port(), interrupt);
        }
    }
}

impl manager::Platform for Platform {
    type Hypervisor = Xen;
    type Store = StoreService;
    type Console = GuestConsole;
    type Disks = Disks<Unikernel>;
    type Networks = Networks<Unikernel>;

    fn hypervisor(&self) -> &Xen {
        &self.hypervisor
    }

    fn store(&self) -> &StoreService {
        &self.store
    }

    fn disks(&self) -> &Disks<Unikernel> {
        &self.disks
    }

    fn networks(&self) -> &Networks<Unikernel> {
        &self.networks
    }

    fn console(&self, name: &str) -> Rc<GuestConsole> {
        GuestConsole::new(Unikernel, name, Rc::clone(&self.terminal))
    }

    fn now_ns(&self) -> u64 {
        time::now_ns()
    }

    fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()> {
        time::sleep_until(deadline_ns)
    }

    fn pause(&self) -> impl Future<Output = ()> {
        tasks::yield_now()
    }

    fn seed(&self) -> u64 {
        time::counter() ^ time::now_ns().rotate_left(32)
    }

    fn tell(&self, text: &str) {
        self.terminal.message(text);
    }

    async fn machine_disks(&self) -> Vec<DiskRow> {
        self.machine.settled(&Unikernel).await;
        self.machine.disks.rows()
    }

    fn guest_bytes(&self) -> usize {
        store_bytes() + CONSOLE_BYTES
    }

    fn promised_bytes(&self) -> usize {
        memory::reserved().saturating_sub(OWN_BYTES)
    }

    fn mark(&self, mark: Mark) {
        match mark {
            Mark::CreateBegins => mark::begin::<CREATE>(),
            Mark::CreateEnds => mark::end::<CREATE>(),
            Mark::DestroyBegins => mark::begin::<DESTROY>(),
            Mark::DestroyEnds => mark::end::<DESTROY>(),
        }
    }
}

/// The screen of the machine's console, which all text of this domain goes to.
pub(crate) struct Screen;

static CURSOR: Cursor = Cursor::new();

impl terminal::Screen for Screen {
    fn write(&self, bytes: &[u8]) {
        // Nobody can be told if the console does not take it.
        let _ = hypercall::console_write(bytes);
    }

    fn cursor(&self) -> &Cursor {
        &CURSOR
    }
}

/// A terminal on the screen, where what this domain prints goes as well.
pub(crate) fn terminal(all: bool) -> Rc<Terminal> {
    console::set_sink(|text| terminal::print(&Screen, text));
    Rc::new(terminal::Terminal::new(Screen, all))
}
