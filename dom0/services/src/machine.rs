//! The devices of the machine: found at boot, started at the same time, and kept until a service takes them.
//!
//! ```text
//! Devices::functions -> a virtio disk    -> Devices::open_disk    -> reset, its serial number -> MachineDisks
//!                    -> a virtio network -> Devices::open_network -> reset                    -> MachineNetworks
//!                    -> a network or storage device without a driver, or a device that does not start: reported
//! ```
//!
//! Devices that are being started are polled each millisecond.
//! Guarantees: a device that hangs does not delay the start of other devices, and is reported after about 15 seconds at most.

use alloc::format;
use alloc::vec::Vec;
use core::cell::Cell;
use core::fmt;

use disk::Device;
use drivers::blk::Identity;
use drivers::pci::Found;
use drivers::virtio::{Kind, NotTaken};
use network::Uplink;

use crate::disks::{self, MachineDisks};
use crate::host::Host;
use crate::networks::{self, MachineNetworks};

/// Nanoseconds between two looks at devices that are starting.
const LOOK_NS: u64 = 1_000_000;

/// What the machine's devices are reached by.
pub trait Devices: fmt::Debug + 'static {
    /// A disk with its driver.
    type Disk: Device + 'static;
    /// A network device with its driver.
    type Network: Uplink + 'static;
    /// The interrupt of a device. It can be dropped once the device has been given up.
    type Interrupt: fmt::Debug + 'static;

    /// Returns all functions of the machine's PCI buses. Empty if this domain has no devices.
    fn functions(&self) -> Vec<Found>;

    /// Makes a driver for a virtio disk, which is not started yet.
    ///
    /// # Errors
    /// Why the disk is not taken.
    fn open_disk(&self, found: &Found) -> Result<DiskDriver<Self>, NotTaken>;

    /// Asks a disk for its serial number. Returns `Pending` until the disk has answered: call again.
    fn identify(&self, disk: &mut Self::Disk) -> Identity;

    /// Stops a disk that did not start, and frees its memory if the disk can no longer write there.
    fn give_up_disk(&self, driver: DiskDriver<Self>);

    /// Makes a driver for a virtio network device, which is not started yet.
    ///
    /// # Errors
    /// Why the device is not taken.
    fn open_network(&self, found: &Found) -> Result<NetworkDriver<Self>, NotTaken>;

    /// Stops a network device that did not start, and frees its memory if the device can no longer write there.
    fn give_up_network(&self, driver: NetworkDriver<Self>);
}

/// A device with its driver, and the interrupt that the device raises.
#[derive(Debug)]
pub struct Driver<T, I> {
    /// The device.
    pub device: T,
    /// Its interrupt.
    pub interrupt: I,
}

/// A disk, and the interrupt that it raises when requests have ended.
pub type DiskDriver<D> = Driver<<D as Devices>::Disk, <D as Devices>::Interrupt>;
/// A network device, and the interrupt that it raises when frames have arrived.
pub type NetworkDriver<D> = Driver<<D as Devices>::Network, <D as Devices>::Interrupt>;

/// The devices of the machine.
#[derive(Debug)]
pub struct Machine<D: Devices> {
    /// The disks.
    pub disks: MachineDisks<D>,
    /// The network devices.
    pub networks: MachineNetworks<D>,
    searching: Cell<bool>,
}

impl<D: Devices> Default for Machine<D> {
    /// No device is known until [`Machine::find`] has been called.
    fn default() -> Self {
        Self { disks: MachineDisks::default(), networks: MachineNetworks::default(), searching: Cell::new(true) }
    }
}

/// Returns whether a device without a driver is reported: virtio, network and storage devices, except IDE, which chipsets have.
const fn is_named(found: &Found) -> bool {
    let [class, subclass, _] = found.class;
    const IDE: u8 = 1;
    Kind::of(found).is_some() || class == 1 && subclass != IDE || class == 2
}

impl<D: Devices> Machine<D> {
    /// Finds the devices and starts them. `tell` is given a line for each network device, and for each device that was found
    /// and is not used.
    pub async fn find<H: Host>(&self, host: &H, devices: &D, tell: impl Fn(&str)) {
        let not_used = |found: &Found, why: &dyn fmt::Display| tell(&format!("not used: {found}: {why}"));
        let (mut disks, mut networks) = (Vec::new(), Vec::new());
        for found in devices.functions() {
            match Kind::of(&found) {
                Some(Kind::BLOCK) => match devices.open_disk(&found) {
                    Ok(driver) => disks.push(disks::Starting::new(found, driver)),
                    Err(why) => not_used(&found, &why),
                },
                Some(Kind::NET) => match devices.open_network(&found) {
                    Ok(driver) => networks.push(networks::Starting::new(found, driver)),
                    Err(why) => not_used(&found, &why),
                },
                _ if is_named(&found) => not_used(&found, &"there is no driver for it"),
                _ => {}
            }
        }
        let fails = |found: &Found, why: &str| not_used(found, &why);
        loop {
            disks = disks.into_iter().filter_map(|disk| self.disks.go_on(disk, devices, &tell, fails)).collect();
            networks = networks
                .into_iter()
                .filter_map(|network| self.networks.go_on(network, devices, &tell, fails))
                .collect();
            if disks.is_empty() && networks.is_empty() {
                break;
            }
            host.sleep_until(host.now_ns() + LOOK_NS).await;
        }
        self.searching.set(false);
    }

    /// Waits until every device has been started or reported.
    pub async fn settled<H: Host>(&self, host: &H) {
        while self.searching.get() {
            host.sleep_until(host.now_ns() + LOOK_NS).await;
        }
    }
}
