//! The disks of the machine, by serial number: started, and kept until a service takes them.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;

use disk::{Device, Reset, SECTOR, Shape};
use drivers::blk::Identity;
use drivers::pci::{Address, Found};
use toolstack::manager::DiskRow;

use crate::machine::{Devices, DiskDriver};

/// How often a disk is asked for its serial number before it counts as failed: about five seconds.
const ASKED: u32 = 5_000;

/// A disk that was started.
#[derive(Debug)]
struct Entry<D: Devices> {
    address: Address,
    /// In printable ASCII; `None` if the disk has no serial number.
    serial: Option<String>,
    shape: Shape,
    /// `None` after [`MachineDisks::take`].
    driver: Option<DiskDriver<D>>,
}

/// The disks of the machine.
#[derive(Debug)]
pub struct MachineDisks<D: Devices> {
    /// In the order of their addresses.
    entries: RefCell<Vec<Entry<D>>>,
}

impl<D: Devices> Default for MachineDisks<D> {
    /// No disk is known yet.
    fn default() -> Self {
        Self { entries: RefCell::default() }
    }
}

/// A disk that is being started.
pub(crate) struct Starting<D: Devices> {
    found: Found,
    driver: DiskDriver<D>,
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
    pub(crate) const fn new(found: Found, driver: DiskDriver<D>) -> Self {
        Self { found, driver, asked: None }
    }

    fn step(&mut self, devices: &D) -> Step {
        let disk = &mut self.driver.device;
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

impl<D: Devices> MachineDisks<D> {
    /// Goes on with a disk that is being started, and adds the disk once it works. Returns the disk if its start goes on, else
    /// `None`. `not_used` is given a disk that does not work, and the reason.
    pub(crate) fn go_on(
        &self,
        mut disk: Starting<D>,
        devices: &D,
        tell: impl Fn(&str),
        not_used: impl Fn(&Found, &str),
    ) -> Option<Starting<D>> {
        match disk.step(devices) {
            Step::Again => return Some(disk),
            Step::Works(serial) => self.add(disk, serial, tell),
            Step::Fails(why) => {
                not_used(&disk.found, why);
                devices.give_up_disk(disk.driver);
            }
        }
        None
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
        let shape = driver.device.shape();
        entries.insert(place, Entry { address: found.address, serial, shape, driver: Some(driver) });
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
    pub fn take(&self, serial: &str) -> Option<DiskDriver<D>> {
        self.with(serial, |entry| entry.driver.take()).flatten()
    }

    fn with<T>(&self, serial: &str, f: impl FnOnce(&mut Entry<D>) -> T) -> Option<T> {
        let mut entries = self.entries.borrow_mut();
        let mut named = entries.iter_mut().filter(|entry| entry.serial.as_deref() == Some(serial));
        let found = named.next()?;
        named.next().is_none().then(|| f(found))
    }
}
