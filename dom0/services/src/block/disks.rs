//! The disks of the machine, and which guest has which of them.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::any::Any;
use core::cell::{Cell, RefCell};
use core::fmt;

use block_backend::{Counters, Features, Limits, journal_bytes};
use disk::Device;
use ring_protocol::block::RING_PAGES;
use toolstack::disk::DiskConfig;
use toolstack::manager::{self, GuestDisk};
use toolstack::{DomainId, Node};
use xenbus_backend::State;

use super::host::{BlockHost, Own};
use super::open::{Opened, Sources};
use super::vbd::{Holdings, Vbd};
use crate::device::{Attached, Identity, Name, Paths, directories, word};
use crate::store::StoreService;

pub use super::open::Image;

/// Bytes of the heap for a disk beside its requests: its names, its session of the store, its task.
const VBD_BYTES: usize = 16 * 1024;
const NANOSECONDS: u64 = 1_000_000_000;

/// Returns the maximum number of bytes of heap that a disk of a guest uses, beside the tables of an overlay and the list of the
/// pages of a disk in memory.
#[must_use]
pub fn vbd_bytes() -> usize {
    block_backend::vbd_bytes(RING_PAGES) + VBD_BYTES
}

struct Shared<H: BlockHost> {
    sources: Sources<H>,
    attached: Rc<Attached<H, Vbd<H>>>,
    /// The disks that are being opened. True if the guest has died meanwhile.
    opening: RefCell<BTreeMap<Name, Rc<Cell<bool>>>>,
}

/// The disks of the machine and of its guests. Clones stand for the same disks.
pub struct Disks<H: BlockHost>(Rc<Shared<H>>);

impl<H: BlockHost> Clone for Disks<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<H: BlockHost> fmt::Debug for Disks<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disks").field("attached", &self.0.attached.count()).finish_non_exhaustive()
    }
}

/// A disk of a guest, for a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The number of the device: 51712 for xvda.
    pub device: u32,
    /// The name of the disk in the guest.
    pub name: String,
    /// The target in the disk's description.
    pub target: String,
    /// `r` or `w`.
    pub mode: &'static str,
    /// The back end's state.
    pub state: State,
    /// Whether the disk is to be removed, and the guest has not released it in time.
    pub in_use: bool,
    /// What was done for the guest.
    pub counters: Counters,
    /// Bytes of memory that the overlay holds; 0 without an overlay.
    pub overlay_bytes: u64,
}

/// A disk that is being opened, until this value is dropped.
struct Opening<H: BlockHost> {
    shared: Rc<Shared<H>>,
    name: Name,
    died: Rc<Cell<bool>>,
}

impl<H: BlockHost> Drop for Opening<H> {
    fn drop(&mut self) {
        let mut opening = self.shared.opening.borrow_mut();
        if opening.get(&self.name).is_some_and(|died| Rc::ptr_eq(died, &self.died)) {
            opening.remove(&self.name);
        }
    }
}

impl<H: BlockHost> Disks<H> {
    /// Makes the service, without any device or disk, for the guests of `store`.
    pub fn new(host: H, store: StoreService<H>) -> Self {
        Self(Rc::new(Shared {
            sources: Sources::new(host.clone()),
            attached: Rc::new(Attached::new(host, store)),
            opening: RefCell::default(),
        }))
    }

    /// Adds a device that is started. It raises the port `interrupt` of this domain; `kept` keeps the port open, and is dropped
    /// with the disks. After an error `kept` is never dropped, for the device may still raise the port.
    ///
    /// # Errors
    /// Another device has the serial number, or there is not enough memory.
    pub fn add_device(
        &self,
        serial: &str,
        device: Box<dyn Device>,
        interrupt: u32,
        kept: impl Any,
    ) -> Result<(), String> {
        self.0.sources.add_device(serial, device, interrupt, Box::new(kept))
    }

    /// Returns whether there is a device with this serial number.
    #[must_use]
    pub fn has_device(&self, serial: &str) -> bool {
        self.0.sources.worker(serial).is_some()
    }

    /// Adds a file of the boot bundle. A later file of the same name replaces it for disks that are attached later.
    pub fn add_image(&self, name: &str, image: Image) {
        self.0.sources.add_image(name, image);
    }

    /// Attaches a disk to the guest with this domain and name: opens its target, and writes both directories.
    ///
    /// # Errors
    /// A message that tells why the guest cannot have the disk. Nothing is left of the disk then.
    pub async fn attach(&self, domain: u16, guest: &str, config: &DiskConfig) -> Result<(), String> {
        let device = config.vdev.number();
        let opening = self.begin((domain, device), config.vdev.name())?;
        let Opened { worker, medium, hold } = self.0.sources.open(guest, config).await?;
        if opening.died.get() {
            return Err(format!("{guest} has ended"));
        }
        let (attached, name) = (&self.0.attached, config.vdev.name());
        let no_memory = || format!("not enough memory is left for the disk {name}");
        let reserved = attached.host.reserve(vbd_bytes()).ok_or_else(no_memory)?;
        let journal = attached.host.allocate(journal_bytes(RING_PAGES).div_ceil(4096)).ok_or_else(no_memory)?;
        let (own, shape) = (attached.store.own(), medium.shape());
        let features = Features::of(&shape);
        let paths = Paths::new(own, "vbd", domain, device);
        let discard = shape.discard.is_some() && !shape.read_only;
        let nodes = nodes(&paths, (own, domain), config, &features, discard);
        let identity = Identity { own, domain, guest: guest.into(), number: device, name: name.into(), paths };
        attached.attach(identity, &nodes, |handshake| {
            let late_ns = config.late.map(|seconds| seconds.saturating_mul(NANOSECONDS));
            late_ns.into_iter().for_each(|late_ns| worker.limit_lateness(late_ns));
            Vbd {
                handshake,
                target: config.target.to_string(),
                features,
                limits: Limits { bytes_per_second: config.rate, requests_per_second: config.iops },
                late_ns,
                worker,
                held: Holdings {
                    medium: Rc::new(RefCell::new(medium)),
                    _hold: hold,
                    journal: Own::from(journal),
                    _reserved: reserved,
                },
                link: RefCell::new(None),
                before: Cell::default(),
            }
        })
    }

    fn begin(&self, name: Name, vdev: &str) -> Result<Opening<H>, String> {
        let mut opening = self.0.opening.borrow_mut();
        if self.0.attached.find(name).is_some() || opening.contains_key(&name) {
            return Err(format!("the guest has a disk {vdev} already"));
        }
        let died: Rc<Cell<bool>> = Rc::default();
        opening.insert(name, Rc::clone(&died));
        Ok(Opening { shared: Rc::clone(&self.0), name, died })
    }

    /// Takes a disk away from a guest, and returns when the disk is gone. Without `force`, the guest is asked to release the
    /// disk. The removal goes on even if the future is dropped.
    ///
    /// # Errors
    /// The guest has no such disk, or has not released the disk within ten seconds; the disk is removed once the guest
    /// releases it.
    pub async fn detach(&self, domain: u16, device: u32, force: bool) -> Result<(), String> {
        self.0.attached.detach((domain, device), force).await
    }

    /// Removes all disks of a domain that has ended, and returns when nothing of the disks is in flight, pinned, mapped or in
    /// the store. Only then may the number of the domain be used again. A device that does not answer is waited for;
    /// [`Disks::reset`] ends the wait.
    pub async fn domain_died(&self, domain: u16) {
        self.0.opening.borrow_mut().retain(|(of, _), died| {
            died.set(died.get() || *of == domain);
            *of != domain
        });
        self.0.attached.domain_died(domain).await;
    }

    /// Returns the disks of a guest.
    #[must_use]
    pub fn list(&self, domain: u16) -> Vec<Listed> {
        let listed = |vbd: &Rc<Vbd<H>>| Listed {
            device: vbd.handshake.identity.number,
            name: vbd.handshake.identity.name.clone(),
            target: vbd.target.clone(),
            mode: vbd.features.mode(),
            state: vbd.handshake.back_state(),
            in_use: vbd.handshake.is_in_use(),
            counters: vbd.counters(),
            overlay_bytes: vbd.held.medium.borrow().overlay_bytes(),
        };
        self.0.attached.of(domain).iter().map(listed).collect()
    }

    /// Resets a device. Its unanswered requests are issued again, or fail if the last reset was less than a minute ago. Does
    /// nothing if the device is being reset or is lost.
    ///
    /// # Errors
    /// No device has the serial number.
    pub fn reset(&self, serial: &str) -> Result<(), String> {
        let worker = self
            .0
            .sources
            .worker(serial)
            .ok_or_else(|| format!("no disk has the serial number {}", serial.escape_debug()))?;
        worker.reset();
        Ok(())
    }

    /// Returns how many pins the requests of all guests have now.
    #[must_use]
    pub fn pins(&self) -> u32 {
        self.0.sources.pins()
    }
}

/// The disks as the manager of guests uses them.
impl<H: BlockHost> manager::Disks for Disks<H> {
    async fn attach(&self, domain: DomainId, guest: &str, disk: &DiskConfig) -> Result<(), String> {
        Self::attach(self, domain.0, guest, disk).await
    }

    async fn detach(&self, domain: DomainId, device: u32, force: bool) -> Result<(), String> {
        Self::detach(self, domain.0, device, force).await
    }

    async fn domain_died(&self, domain: DomainId) {
        Self::domain_died(self, domain.0).await;
    }

    fn list(&self, domain: DomainId, guest: &str) -> Vec<GuestDisk> {
        let row = |Listed { device, name, target, mode, state, in_use, counters, overlay_bytes }| GuestDisk {
            guest: guest.into(),
            domain,
            vdev: name,
            device,
            target,
            mode,
            state: if in_use { "in use" } else { word(state) },
            reads: counters.reads,
            writes: counters.writes,
            flushes: counters.flushes,
            discards: counters.discards,
            sectors_read: counters.sectors_read,
            sectors_written: counters.sectors_written,
            errors: counters.errors.saturating_add(counters.refused),
            overlay_kib: overlay_bytes.div_ceil(1024),
        };
        Self::list(self, domain.0).into_iter().map(row).collect()
    }

    fn reset(&self, serial: &str) -> Result<(), String> {
        Self::reset(self, serial)
    }

    fn disk_bytes(&self) -> usize {
        vbd_bytes()
    }
}

/// Returns both directories of a disk as they are first written.
fn nodes(
    paths: &Paths,
    (own, domain): (DomainId, u16),
    config: &DiskConfig,
    features: &Features,
    discard: bool,
) -> Vec<Node> {
    let device = config.vdev.number().to_string();
    let (target, discard) = (config.target.to_string(), if discard { "1" } else { "0" });
    let of_front = [("virtual-device", &*device), ("device-type", "disk")];
    let of_back = [
        ("removable", "0"),
        ("bootable", "1"),
        ("dev", config.vdev.name()),
        ("type", "phy"),
        ("mode", features.mode()),
        ("device-type", "disk"),
        ("discard-enable", discard),
        ("params", &target),
    ];
    directories(paths, (own, domain), &of_front, &of_back)
}
