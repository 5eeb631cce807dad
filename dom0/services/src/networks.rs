//! The network devices of the machine: started, and kept until somebody builds a switch on one.

use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;
use core::cell::RefCell;

use drivers::pci::{Address, Found};
use network::{Mac, Reset, Uplink};

use crate::machine::{Devices, Driver, NetworkDriver};

/// A network device that was started.
#[derive(Debug)]
struct Entry<D: Devices> {
    address: Address,
    mac: Mac,
    mtu: u16,
    /// `None` after [`MachineNetworks::take`].
    driver: Option<NetworkDriver<D>>,
}

/// A network device of the machine, as a list shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkRow {
    /// Where the device is.
    pub address: Address,
    /// Its Ethernet address.
    pub mac: Mac,
    /// The maximum number of bytes of a frame's payload.
    pub mtu: u16,
    /// Whether it was taken.
    pub taken: bool,
}

/// The network devices of the machine.
#[derive(Debug)]
pub struct MachineNetworks<D: Devices> {
    /// In the order of their addresses on the bus.
    entries: RefCell<Vec<Entry<D>>>,
}

impl<D: Devices> Default for MachineNetworks<D> {
    /// No device is known yet.
    fn default() -> Self {
        Self { entries: RefCell::default() }
    }
}

/// A network device that is being started.
pub(crate) struct Starting<D: Devices> {
    found: Found,
    driver: NetworkDriver<D>,
}

impl<D: Devices> Starting<D> {
    pub(crate) const fn new(found: Found, driver: NetworkDriver<D>) -> Self {
        Self { found, driver }
    }
}

impl<D: Devices> MachineNetworks<D> {
    /// Goes on with a device that is being started, and adds the device once it works. Returns the device if its start goes on,
    /// else `None`. `not_used` is given a device that does not work, and the reason.
    pub(crate) fn go_on(
        &self,
        mut network: Starting<D>,
        devices: &D,
        tell: impl Fn(&str),
        not_used: impl Fn(&Found, &str),
    ) -> Option<Starting<D>> {
        match network.driver.device.reset() {
            Reset::Pending => return Some(network),
            Reset::Done => self.add(network, tell),
            Reset::Dead(why) => {
                not_used(&network.found, why);
                devices.give_up_network(network.driver);
            }
        }
        None
    }

    fn add(&self, Starting { found, driver }: Starting<D>, tell: impl Fn(&str)) {
        let (mac, mtu) = (driver.device.mac(), driver.device.mtu());
        tell(&format!("network device {}: {mac}, MTU {mtu}", found.address));
        let mut entries = self.entries.borrow_mut();
        let place = entries.partition_point(|entry| entry.address < found.address);
        entries.insert(place, Entry { address: found.address, mac, mtu, driver: Some(driver) });
    }

    /// Returns all devices, in the order of their addresses on the bus.
    pub fn rows(&self) -> Vec<NetworkRow> {
        let row = |entry: &Entry<D>| NetworkRow {
            address: entry.address,
            mac: entry.mac,
            mtu: entry.mtu,
            taken: entry.driver.is_none(),
        };
        self.entries.borrow().iter().map(row).collect()
    }

    /// Takes the device at a place in [`MachineNetworks::rows`], to build a switch on it. `None` if there is no such device, or
    /// if the device was taken.
    pub fn take(&self, place: usize) -> Option<Driver<Box<dyn Uplink>, D::Interrupt>> {
        let Driver { device, interrupt } = self.entries.borrow_mut().get_mut(place)?.driver.take()?;
        Some(Driver { device: Box::new(device), interrupt })
    }

    /// Takes the first device that was not taken. `None` if there is no such device.
    pub fn take_first(&self) -> Option<Driver<Box<dyn Uplink>, D::Interrupt>> {
        let place = self.entries.borrow().iter().position(|entry| entry.driver.is_some())?;
        self.take(place)
    }
}
