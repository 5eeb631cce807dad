//! The network devices of the machine: started, and kept until somebody builds a switch on one.

use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;
use core::cell::RefCell;

use drivers::pci::{Address, Found};
use network::{Reset, Uplink};

use crate::machine::{Devices, Driver, NetworkDriver};

/// The network devices of the machine.
#[derive(Debug)]
pub struct MachineNetworks<D: Devices> {
    /// Those that were started and not taken, in the order of their addresses on the bus.
    started: RefCell<Vec<(Address, NetworkDriver<D>)>>,
}

impl<D: Devices> Default for MachineNetworks<D> {
    /// No device is known yet.
    fn default() -> Self {
        Self { started: RefCell::default() }
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
        let mut started = self.started.borrow_mut();
        let place = started.partition_point(|(address, _)| *address < found.address);
        started.insert(place, (found.address, driver));
    }

    /// Takes the device with the lowest address on the bus, to build a switch on it. `None` if there is no device that was not
    /// taken.
    pub fn take_first(&self) -> Option<Driver<Box<dyn Uplink>, D::Interrupt>> {
        let mut started = self.started.borrow_mut();
        if started.is_empty() {
            return None;
        }
        let (_, Driver { device, interrupt }) = started.remove(0);
        Some(Driver { device: Box::new(device), interrupt })
    }
}
