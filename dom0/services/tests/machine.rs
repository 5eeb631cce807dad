//! The devices of a machine, from the scan of its buses to the lists.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use common::Fake;
use disk::{Device, Full, Operation, Outcome, Reset, Shape, Ticket};
use drivers::blk::{Identity, Serial};
use drivers::hardware::ConfigurationPorts;
use drivers::pci::{Address, Found, Scan};
use drivers::virtio::NotTaken;
use network::{FrameInfo, Mac, Offloads, Uplink};
use services::machine::{self, Devices, DiskDriver, Driver, NetworkDriver};
use services::{Class, Host};

/// How a device behaves.
#[derive(Clone, Copy, Debug)]
struct Model {
    /// How often its reset is asked after, and how it ends.
    resets: u32,
    end: Reset,
    /// How often it is asked for its serial number before it answers.
    asked: u32,
    identity: Identity,
    /// It asks to be reset instead of answering.
    breaks: bool,
}

const GOOD: Model = Model { resets: 0, end: Reset::Done, asked: 1, identity: Identity::Unknown, breaks: false };

fn serial(text: &str) -> Identity {
    let mut bytes = [0; 20];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    Identity::Known(Serial::new(bytes))
}

impl Device for Model {
    fn shape(&self) -> Shape {
        let sectors = if self.resets == 0 { 2048 } else { 1 };
        Shape { sectors, block_bytes: 4096, physical_bytes: 4096, read_only: true, volatile: false, discard: None }
    }

    fn submit(&mut self, _: Ticket, _: Operation<'_>) -> Result<(), Full> {
        Err(Full)
    }

    fn kick(&mut self) {}

    fn completed(&mut self) -> Option<(Ticket, Outcome)> {
        None
    }

    fn rearm(&mut self) -> bool {
        false
    }

    fn needs_reset(&self) -> bool {
        self.breaks
    }

    fn reset(&mut self) -> Reset {
        if self.resets == 0 {
            return self.end;
        }
        self.resets -= 1;
        Reset::Pending
    }
}

/// A network device behaves as a disk does until it has started.
#[derive(Debug)]
struct Card(Model);

impl Uplink for Card {
    fn mac(&self) -> Mac {
        assert_eq!(self.0.resets, 0, "the device does not know yet");
        Mac([0x52, 0x54, 0, 0, 0, 1])
    }

    fn mtu(&self) -> u16 {
        1500
    }

    fn has_link(&self) -> bool {
        false
    }

    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn send(&mut self, _: &[u8], _: FrameInfo) -> Result<(), network::Full> {
        Err(network::Full)
    }

    fn kick(&mut self) {}

    fn receive(&mut self, _: &mut [u8]) -> Option<(usize, FrameInfo)> {
        None
    }

    fn rearm(&mut self) -> bool {
        false
    }

    fn needs_reset(&self) -> bool {
        false
    }

    fn reset(&mut self) -> Reset {
        Device::reset(&mut self.0)
    }
}

/// A function: vendor and device, class, and what becomes of it if it is a virtio disk or network device.
type Function = (u32, u32, Result<Model, NotTaken>);

#[derive(Clone, Debug, Default)]
struct Machine {
    functions: Rc<RefCell<BTreeMap<Address, Function>>>,
    given_up: Rc<RefCell<usize>>,
}

impl ConfigurationPorts for Machine {
    fn read(&self, function: Address, register: u8) -> u32 {
        match (self.functions.borrow().get(&function), register) {
            (None, _) => !0,
            (Some((ids, _, _)), 0) => *ids,
            (Some((_, class, _)), 8) => *class << 16,
            _ => 0,
        }
    }

    fn write(&self, _: Address, _: u8, _: u32) {}
}

impl Machine {
    fn model(&self, found: &Found) -> Result<Model, NotTaken> {
        self.functions.borrow()[&found.address].2
    }
}

impl Devices for Machine {
    type Disk = Model;
    type Network = Card;
    /// Where the device is.
    type Interrupt = Address;

    fn functions(&self) -> Vec<Found> {
        Scan::new(self).collect()
    }

    fn open_disk(&self, found: &Found) -> Result<DiskDriver<Self>, NotTaken> {
        Ok(Driver { device: self.model(found)?, interrupt: found.address })
    }

    fn identify(&self, disk: &mut Model) -> Identity {
        if disk.asked == 0 {
            return disk.identity;
        }
        disk.asked -= 1;
        Identity::Pending
    }

    fn give_up_disk(&self, _: DiskDriver<Self>) {
        *self.given_up.borrow_mut() += 1;
    }

    fn open_network(&self, found: &Found) -> Result<NetworkDriver<Self>, NotTaken> {
        Ok(Driver { device: Card(self.model(found)?), interrupt: found.address })
    }

    fn give_up_network(&self, _: NetworkDriver<Self>) {
        *self.given_up.borrow_mut() += 1;
    }
}

struct World {
    host: Fake,
    machine: Machine,
    devices: Rc<machine::Machine<Machine>>,
    told: Rc<RefCell<Vec<String>>>,
    _task: <Fake as Host>::Task,
}

const DISK: u32 = 0x1001_1af4;
const CARD: u32 = 0x1000_1af4;

impl World {
    /// A machine with these functions at 00:00.0, 00:01.0 and so on, whose devices are being looked for.
    fn of(functions: &[Function]) -> Self {
        let (host, machine, told) = (Fake::default(), Machine::default(), Rc::<RefCell<Vec<String>>>::default());
        let places = (0..).map(|device| Address::new(0, device, 0));
        machine.functions.borrow_mut().extend(places.zip(functions.iter().copied()));
        let devices = Rc::<machine::Machine<Machine>>::default();
        let (to, at, bus, by) = (Rc::clone(&told), Rc::clone(&devices), machine.clone(), host.clone());
        let find = async move { at.find(&by, &bus, |line: &str| to.borrow_mut().push(line.into())).await };
        let task = host.spawn(Class::Control, find);
        host.round();
        Self { host, machine, devices, told, _task: task }
    }

    fn disks(models: &[Model]) -> Self {
        Self::of(&models.iter().map(|model| (DISK, 0x0100, Ok(*model))).collect::<Vec<_>>())
    }

    fn pass(&self, milliseconds: u64) {
        for _ in 0..milliseconds {
            self.host.advance(1_000_000);
            self.host.round();
        }
    }

    /// Whether the search is over.
    fn settled(&self) -> bool {
        self.host.tasks(Class::Control) == 0
    }

    fn names(&self) -> Vec<String> {
        self.devices.disks.rows().into_iter().map(|row| row.serial.unwrap_or_else(|| "-".into())).collect()
    }
}

#[test]
fn a_machine_without_disks_costs_one_look_and_no_word() {
    // Host bridge, ISA bridge, IDE, display: what QEMU has anyway.
    let chipset = [0x0600, 0x0601, 0x0101, 0x0300].map(|class| (0x1237_8086, class, Err(NotTaken::LegacyOnly)));
    for functions in [&chipset[..], &[]] {
        let world = World::of(functions);
        assert!(world.settled() && world.told.borrow().is_empty() && world.devices.disks.rows().is_empty());
    }
}

#[test]
fn disks_are_listed_and_what_is_not_used_is_named() {
    let world = World::of(&[
        (DISK, 0x0100, Ok(Model { identity: serial("b"), asked: 3, ..GOOD })),
        (DISK, 0x0100, Err(NotTaken::LegacyOnly)),
        (CARD, 0x0200, Err(NotTaken::NoMessages)),
        (0x100e_8086, 0x0200, Ok(GOOD)),
        (0x0010_1b36, 0x0108, Ok(GOOD)),
        (0x1042_1af4, 0x0100, Ok(Model { identity: serial("a\u{1b}"), ..GOOD })),
        (DISK, 0x0100, Ok(Model { identity: serial(""), ..GOOD })),
        (DISK, 0x0100, Ok(GOOD)),
    ]);
    world.pass(5);
    assert!(world.settled());
    assert_eq!(world.names(), ["b", "a\\x1b", "-", "-"]);
    let told = [
        "not used: 00:01.0 SCSI controller (1af4:1001, class 0100): has only the legacy interface of virtio, which is \
         not supported",
        "not used: 00:02.0 Ethernet controller (1af4:1000, class 0200): has no MSI-X interrupts",
        "not used: 00:03.0 Ethernet controller (8086:100e, class 0200): there is no driver for it",
        "not used: 00:04.0 NVMe controller (1b36:0010, class 0108): there is no driver for it",
    ];
    assert_eq!(*world.told.borrow(), told);
    let row = &world.devices.disks.rows()[0];
    assert_eq!((row.bytes, row.block_bytes, row.read_only), (1 << 20, 4096, true));
    assert_eq!(row.what, "virtio disk at 00:00.0");
}

#[test]
fn a_disk_that_hangs_delays_no_other_one_and_is_given_up() {
    let world = World::disks(&[
        Model { resets: 10_000, end: Reset::Dead("does not answer a reset"), ..GOOD },
        Model { asked: u32::MAX, ..GOOD },
        Model { resets: 3, identity: serial("slow"), ..GOOD },
        Model { identity: serial("quick"), ..GOOD },
        Model { breaks: true, ..GOOD },
        Model { end: Reset::Dead("does not start"), ..GOOD },
    ]);
    let named =
        |place: usize, why: &str| format!("not used: 00:0{place}.0 SCSI controller (1af4:1001, class 0100): {why}");
    assert_eq!(*world.told.borrow(), [named(4, "does not answer"), named(5, "does not start")]);
    world.pass(1);
    assert_eq!(world.names(), ["quick"]);
    world.pass(4);
    assert_eq!(world.names(), ["slow", "quick"], "in the order of their addresses");
    world.pass(5_000);
    assert_eq!(world.told.borrow()[2..], [named(1, "does not answer")]);
    assert!(!world.settled());
    world.pass(5_000);
    assert_eq!(world.told.borrow()[3..], [named(0, "does not answer a reset")]);
    assert!(world.settled());
    assert_eq!((world.names().len(), *world.machine.given_up.borrow()), (2, 4));
}

#[test]
fn who_wants_the_list_waits_until_it_is_complete() {
    let world = World::disks(&[Model { resets: 2, ..GOOD }]);
    let seen = Rc::new(RefCell::new(None));
    let (devices, host, to) = (Rc::clone(&world.devices), world.host.clone(), Rc::clone(&seen));
    let _task = world.host.spawn(Class::Data, async move {
        devices.settled(&host).await;
        to.replace(Some(devices.disks.rows().len()));
    });
    world.host.round();
    assert_eq!(*seen.borrow(), None);
    world.pass(5);
    assert_eq!(*seen.borrow(), Some(1));
}

#[test]
fn a_disk_is_taken_once_and_only_by_a_number_of_its_own() {
    let named = |name| Model { identity: serial(name), ..GOOD };
    let world = World::disks(&[named("one"), named("two"), named("two")]);
    world.pass(2);
    assert_eq!(world.told.borrow().len(), 1);
    assert!(world.told.borrow()[0].contains("another disk has the serial number two"));
    assert_eq!(world.devices.disks.shape("one").map(|shape| shape.sectors), Some(2048));
    assert!(world.devices.disks.take("one").is_some() && world.devices.disks.take("one").is_none());
    assert!(
        world.devices.disks.take("two").is_none()
            && world.devices.disks.shape("two").is_none()
            && world.devices.disks.take("").is_none()
    );
    assert_eq!(world.names(), ["one", "two", "two"], "a disk that is served is listed");
}

fn cards(models: &[Result<Model, NotTaken>]) -> World {
    World::of(&models.iter().map(|model| (CARD, 0x0200, *model)).collect::<Vec<_>>())
}

#[test]
fn network_devices_are_started_and_told_with_their_addresses() {
    let world = cards(&[
        Ok(Model { resets: 3, ..GOOD }),
        Ok(Model { resets: 10_000, end: Reset::Dead("does not answer a reset"), ..GOOD }),
        Ok(GOOD),
        Ok(Model { end: Reset::Dead("does not state its address"), ..GOOD }),
    ]);
    let named =
        |place: usize, why: &str| format!("not used: 00:0{place}.0 Ethernet controller (1af4:1000, class 0200): {why}");
    let started = |place: usize| format!("network device 00:0{place}.0: 52:54:00:00:00:01, MTU 1500");
    assert_eq!(*world.told.borrow(), [started(2), named(3, "does not state its address")]);
    world.pass(4);
    assert_eq!(world.told.borrow()[2..], [started(0)]);
    assert!(!world.settled());
    world.pass(10_000);
    assert_eq!(world.told.borrow()[3..], [named(1, "does not answer a reset")]);
    assert!(world.settled());
    assert_eq!(*world.machine.given_up.borrow(), 2);
    let taken = std::iter::from_fn(|| world.devices.networks.take_first());
    assert_eq!(taken.map(|driver| driver.interrupt.to_string()).collect::<Vec<_>>(), ["00:00.0", "00:02.0"]);
    assert!(world.devices.disks.rows().is_empty());
}

#[test]
fn a_network_device_is_taken_once_with_its_interrupt() {
    let world = cards(&[Ok(GOOD); 3]);
    let networks = &world.devices.networks;
    let place = |driver: Option<Driver<Box<dyn Uplink>, Address>>| driver.map(|driver| driver.interrupt.to_string());
    for address in ["00:00.0", "00:01.0", "00:02.0"] {
        assert_eq!(place(networks.take_first()).as_deref(), Some(address));
    }
    assert_eq!(place(networks.take_first()), None);
}
