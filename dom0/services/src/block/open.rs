//! What a description means on this machine: the devices, the files of the boot bundle, and memory that disks are made of.

use alloc::boxed::Box;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::any::Any;
use core::cell::RefCell;

use block_backend::{DATA_PINS, Pins};
use disk::table::{Interval, Reader};
use disk::{Access, Device, Disk, Memory, Partition, Shape, Whole};
use toolstack::disk::{DiskAccess, DiskConfig, Target};

use super::host::BlockHost;
use super::medium::{Base, Held, Hold, Medium};
use super::tap::Tap;
use super::worker::Worker;
use crate::host::Class;
use crate::listen::give_turns;

/// A file of the boot bundle, in memory of dom0 that never changes.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// The number by which grant copies name the page with the first byte. The pages of the file have consecutive numbers.
    pub page: u64,
    /// The offset of the first byte in that page.
    pub offset: u64,
    /// The bytes of the file.
    pub bytes: &'static [u8],
}

/// A queue, and the task that gives it turns until this value is dropped.
struct Running<H: BlockHost> {
    worker: Rc<Worker<H>>,
    _task: H::Task,
}

impl<H: BlockHost> Running<H> {
    fn start(host: &H, worker: Rc<Worker<H>>) -> Self {
        let (working, domain) = (Rc::clone(&worker), host.clone());
        let task = host.spawn(Class::Data, async move { give_turns(&domain, &*working).await });
        Self { worker, _task: task }
    }
}

/// A device of the machine.
struct Source<H: BlockHost> {
    serial: String,
    tap: Tap<H::Memory>,
    running: Running<H>,
    /// A value of the device's owner, which is dropped with the device: it keeps the port of the interrupt open.
    _kept: Box<dyn Any>,
}

/// A disk that is ready to be served.
pub(super) struct Opened<H: BlockHost> {
    pub(super) worker: Rc<Worker<H>>,
    pub(super) medium: Medium<H>,
    pub(super) hold: Option<Hold>,
}

/// The devices, files and queues that guests' disks are made of.
pub(super) struct Sources<H: BlockHost> {
    host: H,
    pins: Rc<Pins>,
    devices: RefCell<Vec<Source<H>>>,
    images: RefCell<Vec<(String, Image)>>,
    /// The queue of disks in memory, once there is such a disk.
    memory: RefCell<Option<Running<H>>>,
    holders: Held,
}

impl<H: BlockHost> Sources<H> {
    pub(super) fn new(host: H) -> Self {
        Self {
            host,
            pins: Rc::new(Pins::new(DATA_PINS)),
            devices: RefCell::default(),
            images: RefCell::default(),
            memory: RefCell::new(None),
            holders: Held::default(),
        }
    }

    /// Adds a device with this serial number, which raises the port `interrupt`.
    pub(super) fn add_device(
        &self,
        serial: &str,
        device: Box<dyn Device>,
        interrupt: u32,
        kept: Box<dyn Any>,
    ) -> Result<(), String> {
        if self.devices.borrow().iter().any(|source| source.serial == serial) {
            core::mem::forget(kept);
            return Err(format!("there are two disks with the serial number {serial}"));
        }
        let tap = Tap::new(device);
        let worker = match Worker::new(&self.host, serial, Some((Box::new(tap.clone()), interrupt)), &self.pins) {
            Ok(worker) => worker,
            Err(why) => {
                // The device is started, and may raise its interrupt at any time.
                core::mem::forget(kept);
                return Err(format!("the disk {serial}: {why}"));
            }
        };
        let running = Running::start(&self.host, worker);
        self.devices.borrow_mut().push(Source { serial: serial.into(), tap, running, _kept: kept });
        Ok(())
    }

    /// Adds a file of the boot bundle; a later one of the same name replaces an earlier one for disks attached later.
    pub(super) fn add_image(&self, name: &str, image: Image) {
        let mut images = self.images.borrow_mut();
        images.retain(|(known, _)| known != name);
        images.push((name.into(), image));
    }

    /// Returns the number of pins that all queues have taken.
    pub(super) fn pins(&self) -> u32 {
        self.pins.used()
    }

    /// The queue of the device with this serial number.
    pub(super) fn worker(&self, serial: &str) -> Option<Rc<Worker<H>>> {
        let devices = self.devices.borrow();
        devices.iter().find(|source| source.serial == serial).map(|source| Rc::clone(&source.running.worker))
    }

    /// Opens the target that a description names for the guest with this name.
    pub(super) async fn open(&self, guest: &str, config: &DiskConfig) -> Result<Opened<H>, String> {
        match &config.target {
            Target::File(path) => Err(format!("{path} is a file of the host, which no guest of this machine can have")),
            Target::Serial(serial) => self.open_device(guest, serial, config).await,
            Target::Bundle(name) => self.open_image(name, config),
            Target::Memory(_) if config.part.is_some() => Err("empty memory has no partitions".into()),
            Target::Memory(_) if config.overlay.is_some() => Err("empty memory needs no overlay".into()),
            Target::Memory(bytes) => {
                let worker = self.memory_worker()?;
                let medium = Medium::memory(&self.host, *bytes, config.access == DiskAccess::Read).await;
                let medium = medium.ok_or_else(|| format!("there are not {bytes} bytes of memory left"))?;
                Ok(Opened { worker, medium, hold: None })
            }
        }
    }

    async fn open_device(&self, guest: &str, serial: &str, config: &DiskConfig) -> Result<Opened<H>, String> {
        let found = self
            .devices
            .borrow()
            .iter()
            .enumerate()
            .find(|(_, source)| source.serial == serial)
            .map(|(number, source)| (number, source.tap.clone(), Rc::clone(&source.running.worker)));
        let (number, tap, worker) = found.ok_or_else(|| format!("no disk has the serial number {serial}"))?;
        if worker.is_lost() {
            return Err(format!("the disk {serial} is lost"));
        }
        let (shape, writes) = (tap.shape(), config.writes_target());
        if shape.read_only && writes {
            return Err(format!("the disk {serial} is read-only"));
        }
        let interval = match config.part {
            None => whole(&shape),
            Some(part) => {
                let mut reader = Reader::new(shape).map_err(|why| format!("{serial}: {why}"))?;
                while let Some(wanted) = reader.wants() {
                    let read = tap.read(&self.host, wanted, || worker.kick()).await;
                    reader.give(&read.map_err(|why| format!("{serial}: {why}"))?);
                }
                partition(reader, serial, part)?
            }
        };
        let disk = Partition::new(Whole::with_shape(shape), interval.first, interval.sectors, !writes);
        let disk = disk.map_err(|why| format!("{serial}: {why}"))?;
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let access = if writes { Access::Write } else { Access::Read };
        let anyway = config.access == DiskAccess::Anyway;
        let interval = (number, interval.first, interval.sectors);
        let claim = self.holders.borrow_mut().hold(interval, access, anyway, guest.into());
        let claim = claim.map_err(|why| format!("{serial} is in use: {why}"))?;
        let hold = Hold::new(Rc::clone(&self.holders), claim);
        let medium = self.layered(Base::Device(disk), config)?;
        Ok(Opened { worker, medium, hold: Some(hold) })
    }

    fn open_image(&self, name: &str, config: &DiskConfig) -> Result<Opened<H>, String> {
        let image = self.images.borrow().iter().find(|(known, _)| known == name).map(|(_, image)| *image);
        let image = image.ok_or_else(|| format!("the boot bundle has no file {name}"))?;
        let bytes = image.bytes.len();
        if bytes == 0 || !bytes.is_multiple_of(disk::SECTOR) {
            return Err(format!("{name} has {bytes} bytes, and a disk has whole sectors of {} bytes", disk::SECTOR));
        }
        let memory = Memory::image(image.page, image.offset, bytes as u64);
        let memory = memory.map_err(|why| format!("{name} {why}"))?;
        let interval = match config.part {
            None => whole(&memory.shape()),
            Some(part) => {
                let mut reader = Reader::new(memory.shape()).map_err(|why| format!("{name}: {why}"))?;
                while let Some((first, sectors)) = reader.wants() {
                    let first = usize::try_from(first).unwrap_or(usize::MAX).saturating_mul(disk::SECTOR);
                    let end = first.saturating_add(sectors as usize * disk::SECTOR);
                    reader.give(image.bytes.get(first..end).unwrap_or_default());
                }
                partition(reader, name, part)?
            }
        };
        let disk = Partition::new(memory, interval.first, interval.sectors, true);
        let disk = disk.map_err(|why| format!("{name}: {why}"))?;
        let medium = self.layered(Base::Image(disk), config)?;
        Ok(Opened { worker: self.memory_worker()?, medium, hold: None })
    }

    /// Makes the medium: the target itself, or an overlay over the target if the description asks for one.
    fn layered(&self, base: Base, config: &DiskConfig) -> Result<Medium<H>, String> {
        let Some(limit) = config.overlay else { return Ok(Medium::plain(self.host.clone(), base)) };
        let overlay = Medium::overlay(self.host.clone(), base, limit);
        overlay.map_err(|_| "no memory is left for the tables of the overlay".into())
    }

    fn memory_worker(&self) -> Result<Rc<Worker<H>>, String> {
        let mut memory = self.memory.borrow_mut();
        if memory.is_none() {
            let worker = Worker::new(&self.host, "in memory", None, &self.pins);
            let worker = worker.map_err(|why| format!("disks in memory: {why}"))?;
            *memory = Some(Running::start(&self.host, worker));
        }
        let running = memory.as_ref().ok_or("disks in memory have no queue")?;
        Ok(Rc::clone(&running.worker))
    }
}

/// Returns all sectors of a disk, without an incomplete block at the end.
fn whole(shape: &Shape) -> Interval {
    let block = u64::from(shape.block_bytes / 512).max(1);
    Interval { first: 0, sectors: shape.sectors - shape.sectors % block }
}

fn partition(reader: Reader, name: &str, part: u32) -> Result<Interval, String> {
    let table = reader.finish().map_err(|why| format!("{name}: {why}"))?;
    if let Some(flaw) = table.flaw() {
        log::warn!("the partition table of {name} is damaged ({flaw:?}), and is used as far as it can be");
    }
    table.partition(part).map_err(|why| format!("partition {part} of {name}: {why}"))
}
