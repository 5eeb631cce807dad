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
use toolstack::limit::LineLimit;
use toolstack::manager::{self, GuestDisk};
use toolstack::{DomainId, Store};
use xenbus_backend::State;

use super::host::{BlockHost, Own};
use super::medium::Medium;
use super::nodes::{self, Paths};
use super::open::{Opened, Sources};
use super::vbd::{Holdings, KIND, Vbd};
use crate::host::Class;
use crate::signal::Waiters;
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

/// The number of a guest's domain, and the number of the disk in the guest: 51712 for xvda.
type Name = (u16, u32);

/// A disk with the task that drives it.
struct Attached<H: BlockHost> {
    vbd: Rc<Vbd<H>>,
    task: H::Task,
}

struct Shared<H: BlockHost> {
    host: H,
    store: StoreService<H>,
    sources: Sources<H>,
    attached: RefCell<BTreeMap<Name, Attached<H>>>,
    /// The disks that are being opened. True if the guest has died meanwhile.
    opening: RefCell<BTreeMap<Name, Rc<Cell<bool>>>>,
    changed: Rc<Waiters>,
    /// The tasks of disks that are gone. A task cannot drop itself: the next call of a method drops these tasks.
    ended: RefCell<Vec<H::Task>>,
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
        f.debug_struct("Disks").field("attached", &self.0.attached.borrow().len()).finish_non_exhaustive()
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
            host,
            store,
            attached: RefCell::default(),
            opening: RefCell::default(),
            changed: Rc::default(),
            ended: RefCell::default(),
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
        self.0.ended.take();
        let device = config.vdev.number();
        let opening = self.begin((domain, device), config.vdev.name())?;
        let Opened { worker, medium, hold } = self.0.sources.open(guest, config).await?;
        if opening.died.get() {
            return Err(format!("{guest} has ended"));
        }
        let no_memory = || format!("not enough memory is left for the disk {}", config.vdev.name());
        let reserved = self.0.host.reserve(vbd_bytes()).ok_or_else(no_memory)?;
        let journal = self.0.host.allocate(journal_bytes(RING_PAGES).div_ceil(4096)).ok_or_else(no_memory)?;
        let (own, shape) = (self.0.store.own(), medium.shape());
        let features = Features::of(&shape);
        let paths = Paths::new(own, domain, device);
        let discard = shape.discard.is_some() && !shape.read_only;
        let directories = nodes::directories(&paths, own, domain, config, &features, discard);
        self.0.store.write(DomainId(domain), &directories)?;
        let session = self.0.store.session();
        if let Err(error) = session.watch(&paths.front_state()) {
            self.0.store.remove(&paths.front)?;
            self.0.store.remove(&paths.back)?;
            return Err(error.name().to_string());
        }
        let late_ns = config.late.map(|seconds| seconds.saturating_mul(NANOSECONDS));
        late_ns.into_iter().for_each(|late_ns| worker.limit_lateness(late_ns));
        let vbd = Rc::new(Vbd {
            host: self.0.host.clone(),
            own,
            domain,
            guest: guest.into(),
            number: device,
            name: config.vdev.name().into(),
            target: config.target.to_string(),
            paths,
            features,
            limits: Limits { bytes_per_second: config.rate, requests_per_second: config.iops },
            late_ns,
            session,
            worker,
            held: Holdings {
                medium: Rc::new(RefCell::new(medium)),
                _hold: hold,
                journal: Own::from(journal),
                _reserved: reserved,
            },
            device: RefCell::new(xenbus_backend::Device::new(KIND)),
            lines: self.lines_of(domain),
            changed: Rc::clone(&self.0.changed),
            state: super::vbd::Inner::default(),
        });
        self.drive(vbd, (domain, device));
        Ok(())
    }

    fn begin(&self, name: Name, vdev: &str) -> Result<Opening<H>, String> {
        let mut opening = self.0.opening.borrow_mut();
        if self.0.attached.borrow().contains_key(&name) || opening.contains_key(&name) {
            return Err(format!("the guest has a disk {vdev} already"));
        }
        let died: Rc<Cell<bool>> = Rc::default();
        opening.insert(name, Rc::clone(&died));
        Ok(Opening { shared: Rc::clone(&self.0), name, died })
    }

    /// Returns the limit for log lines that a guest causes. All disks of the guest share it.
    fn lines_of(&self, domain: u16) -> Rc<RefCell<LineLimit>> {
        let attached = self.0.attached.borrow();
        let other = attached.range((domain, 0)..=(domain, u32::MAX)).next();
        other.map_or_else(Rc::default, |(_, other)| Rc::clone(&other.vbd.lines))
    }

    /// Starts the task of a disk. At its end, all that the disk holds is given back.
    fn drive(&self, vbd: Rc<Vbd<H>>, name: Name) {
        let (shared, driven) = (Rc::downgrade(&self.0), Rc::clone(&vbd));
        let host = self.0.host.clone();
        let task = self.0.host.spawn(Class::Control, async move {
            driven.drive().await;
            Medium::empty(&driven.held.medium, &host).await;
            drop(driven);
            let Some(shared) = shared.upgrade() else { return };
            let gone = shared.attached.borrow_mut().remove(&name);
            if let Some(Attached { vbd, task }) = gone {
                drop(vbd);
                shared.ended.borrow_mut().push(task);
            }
            shared.changed.wake();
        });
        self.0.attached.borrow_mut().insert(name, Attached { vbd, task });
    }

    fn find(&self, name: Name) -> Option<Rc<Vbd<H>>> {
        self.0.attached.borrow().get(&name).map(|attached| Rc::clone(&attached.vbd))
    }

    /// Takes a disk away from a guest, and returns when the disk is gone. Without `force`, the guest is asked to release the
    /// disk. The removal goes on even if the future is dropped.
    ///
    /// # Errors
    /// The guest has no such disk, or has not released the disk within ten seconds; the disk is removed once the guest
    /// releases it.
    pub async fn detach(&self, domain: u16, device: u32, force: bool) -> Result<(), String> {
        self.0.ended.take();
        let name = (domain, device);
        let vbd = self.find(name).ok_or_else(|| format!("the guest has no disk {device}"))?;
        vbd.want(|device, now_ns| if force { device.force() } else { device.detach(now_ns) });
        let (removed, in_use) = (Rc::downgrade(&vbd), format!("{} uses the disk {}", vbd.guest, vbd.name));
        drop(vbd);
        let look = || match removed.upgrade() {
            None => Some(Ok(())),
            Some(vbd) if !force && vbd.is_in_use() => Some(Err(in_use.clone())),
            Some(_) => None,
        };
        let done = self.0.changed.until(look).await;
        self.0.ended.take();
        done
    }

    /// Removes all disks of a domain that has ended, and returns when nothing of the disks is in flight, pinned, mapped or in
    /// the store. Only then may the number of the domain be used again. A device that does not answer is waited for;
    /// [`Disks::reset`] ends the wait.
    pub async fn domain_died(&self, domain: u16) {
        self.0.ended.take();
        self.0.opening.borrow_mut().retain(|(of, _), died| {
            died.set(died.get() || *of == domain);
            *of != domain
        });
        let vbds: Vec<_> = self.0.vbds(domain);
        vbds.iter().for_each(|vbd| vbd.want(|device, _| device.domain_died()));
        drop(vbds);
        let none = || self.0.vbds(domain).is_empty().then_some(());
        self.0.changed.until(none).await;
        self.0.ended.take();
    }

    /// Returns the disks of a guest.
    #[must_use]
    pub fn list(&self, domain: u16) -> Vec<Listed> {
        let listed = |vbd: &Rc<Vbd<H>>| Listed {
            device: vbd.number,
            name: vbd.name.clone(),
            target: vbd.target.clone(),
            mode: vbd.features.mode(),
            state: vbd.back_state(),
            in_use: vbd.is_in_use(),
            counters: vbd.counters(),
            overlay_bytes: vbd.held.medium.borrow().overlay_bytes(),
        };
        self.0.vbds(domain).iter().map(listed).collect()
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

/// Returns the word that lists show for the state of a back end.
const fn word(state: State) -> &'static str {
    match state {
        State::Unknown => "gone",
        State::Initialising => "new",
        State::InitWait | State::Initialised => "waits",
        State::Connected => "connected",
        State::Closing => "closing",
        State::Closed => "closed",
        State::Reconfiguring | State::Reconfigured => "changing",
    }
}

impl<H: BlockHost> Shared<H> {
    fn vbds(&self, domain: u16) -> Vec<Rc<Vbd<H>>> {
        let attached = self.attached.borrow();
        attached.range((domain, 0)..=(domain, u32::MAX)).map(|(_, attached)| Rc::clone(&attached.vbd)).collect()
    }
}
