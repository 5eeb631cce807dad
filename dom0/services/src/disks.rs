//! The disks of the machine: found at boot, started at the same time, and kept until a service takes them.
//!
//! ```text
//! Devices::functions -> a virtio disk -> Devices::open -> reset, polled each millisecond -> its serial number -> the list
//!                    -> a network or storage device without a driver, or a disk that does not start: reported
//! ```
//!
//! Guarantees: a disk that hangs does not delay the start of other disks, and is reported after about 15 seconds at most.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::fmt;

use disk::{Device, Reset, SECTOR, Shape};
use drivers::blk::Identity;
use drivers::pci::{Address, Found};
use drivers::virtio::{Kind, NotTaken};
use toolstack::manager::DiskRow;

use crate::host::Host;

/// Nanoseconds between two looks at disks that are starting.
const LOOK_NS: u64 = 1_000_000;
/// How often a disk is asked for its serial number before it counts as failed: about five seconds.
const ASKED: u32 = 5_000;

/// The devices of the machine.
pub trait Devices: 'static {
    /// A disk with its driver.
    type Disk: Device + 'static;
    /// The interrupt of a disk. It can be dropped once the disk has been given up.
    type Interrupt: fmt::Debug + 'static;

    /// Returns all functions of the machine's PCI buses. Empty if this domain has no devices.
    fn functions(&self) -> Vec<Found>;

    /// Makes a driver for a virtio disk, which is not started yet.
    ///
    /// # Errors
    /// Why the disk is not taken.
    fn open(&self, found: &Found) -> Result<Driver<Self>, NotTaken>;

    /// Asks a disk for its serial number. Returns `Pending` until the disk has answered: call again.
    fn identify(&self, disk: &mut Self::Disk) -> Identity;

    /// Stops a disk that did not start, and frees its memory if the disk can no longer write there.
    fn give_up(&self, driver: Driver<Self>);
}

/// A disk, and the interrupt that it raises when requests have ended.
pub struct Driver<D: Devices + ?Sized> {
    /// The disk.
    pub disk: D::Disk,
    /// Its interrupt.
    pub interrupt: D::Interrupt,
}

impl<D: Devices + ?Sized> fmt::Debug for Driver<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("disk", &self.disk).field("interrupt", &self.interrupt).finish()
    }
}

/// A disk that was started.
#[derive(Debug)]
struct Entry<D: Devices> {
    address: Address,
    /// In printable ASCII; `None` if the disk has no serial number.
    serial: Option<String>,
    shape: Shape,
    /// `None` after [`MachineDisks::take`].
    driver: Option<Driver<D>>,
}

/// The disks of the machine, by serial number.
#[derive(Debug)]
pub struct MachineDisks<D: Devices> {
    /// In the order of their addresses.
    entries: RefCell<Vec<Entry<D>>>,
    searching: Cell<bool>,
}

impl<D: Devices> Default for MachineDisks<D> {
    /// No disk is known until [`MachineDisks::find`] has been called.
    fn default() -> Self {
        Self { entries: RefCell::default(), searching: Cell::new(true) }
    }
}

/// A disk that is being started.
struct Starting<D: Devices> {
    found: Found,
    driver: Driver<D>,
    /// How often it was asked for its serial number; `None` before its reset has ended.
    asked: Option<u32>,
}

/// How the start of a disk goes on.
enum Step {
    Again,
    Works(Option<String>),
    Fails(&'static str),
}

impl<D: Devices> Starting<D> {
    fn step(&mut self, devices: &D) -> Step {
        let disk = &mut self.driver.disk;
        let asked = match self.asked {
            Some(asked) => asked,
            None => match disk.reset() {
                Reset::Pending => return Step::Again,
                Reset::Dead(why) => return Step::Fails(why),
                Reset::Done => 0,
            },
        };
        self.asked = Some(asked + 1);
        match devices.identify(disk) {
            Identity::Known(serial) => Step::Works(Some(serial.to_string()).filter(|serial| !serial.is_empty())),
            Identity::Unknown => Step::Works(None),
            Identity::Pending if asked >= ASKED || disk.needs_reset() => Step::Fails("does not answer"),
            Identity::Pending => Step::Again,
        }
    }
}

/// Returns whether a device without a driver is reported: virtio, network and storage devices, except IDE, which chipsets have.
const fn is_named(found: &Found) -> bool {
    let [class, subclass, _] = found.class;
    const IDE: u8 = 1;
    Kind::of(found).is_some() || class == 1 && subclass != IDE || class == 2
}

impl<D: Devices> MachineDisks<D> {
    /// Finds the disks and starts them. `tell` is given a line for each device that was found and is not used.
    pub async fn find<H: Host>(&self, host: &H, devices: &D, tell: impl Fn(&str)) {
        let not_used = |found: &Found, why: &dyn fmt::Display| tell(&format!("not used: {found}: {why}"));
        let mut starting = Vec::new();
        for found in devices.functions() {
            if Kind::of(&found) == Some(Kind::BLOCK) {
                match devices.open(&found) {
                    Ok(driver) => starting.push(Starting { found, driver, asked: None }),
                    Err(why) => not_used(&found, &why),
                }
            } else if is_named(&found) {
                not_used(&found, &"there is no driver for it");
            }
        }
        loop {
            for mut disk in core::mem::take(&mut starting) {
                match disk.step(devices) {
                    Step::Again => starting.push(disk),
                    Step::Works(serial) => self.add(disk, serial, &tell),
                    Step::Fails(why) => {
                        not_used(&disk.found, &why);
                        devices.give_up(disk.driver);
                    }
                }
            }
            if starting.is_empty() {
                break;
            }
            host.sleep_until(host.now_ns() + LOOK_NS).await;
        }
        self.searching.set(false);
    }

    fn add(&self, Starting { found, driver, .. }: Starting<D>, serial: Option<String>, tell: impl Fn(&str)) {
        let mut entries = self.entries.borrow_mut();
        if let Some(serial) = &serial
            && entries.iter().any(|entry| entry.serial.as_ref() == Some(serial))
        {
            tell(&format!(
                "warning: {found}: another disk has the serial number {serial}, too; neither is found by it"
            ));
        }
        let place = entries.partition_point(|entry| entry.address < found.address);
        let shape = driver.disk.shape();
        entries.insert(place, Entry { address: found.address, serial, shape, driver: Some(driver) });
    }

    /// Waits until every disk has been started or reported.
    pub async fn settled<H: Host>(&self, host: &H) {
        while self.searching.get() {
            host.sleep_until(host.now_ns() + LOOK_NS).await;
        }
    }

    /// Returns all disks, for the command `disks`.
    pub fn rows(&self) -> Vec<DiskRow> {
        let row = |Entry { address, serial, shape, .. }: &Entry<D>| DiskRow {
            serial: serial.clone(),
            bytes: shape.sectors.saturating_mul(SECTOR as u64),
            block_bytes: shape.block_bytes,
            read_only: shape.read_only,
            what: format!("virtio disk at {address}"),
        };
        self.entries.borrow().iter().map(row).collect()
    }

    /// Returns what the disk with this serial number can do. `None` if no disk has the number, or if two have.
    pub fn shape(&self, serial: &str) -> Option<Shape> {
        self.with(serial, |entry| entry.shape)
    }

    /// Takes the disk with this serial number, to serve it. `None` if no disk has the number, if two have, or if the disk was
    /// taken.
    pub fn take(&self, serial: &str) -> Option<Driver<D>> {
        self.with(serial, |entry| entry.driver.take()).flatten()
    }

    fn with<T>(&self, serial: &str, f: impl FnOnce(&mut Entry<D>) -> T) -> Option<T> {
        let mut entries = self.entries.borrow_mut();
        let mut named = entries.iter_mut().filter(|entry| entry.serial.as_deref() == Some(serial));
        let found = named.next()?;
        named.next().is_none().then(|| f(found))
    }
}
