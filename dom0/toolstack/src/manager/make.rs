//! Makes a running guest from a configuration.
//!
//! ```text
//! a file in TOML  -- xtask::guest_file -->  the boot bundle  -- Bundle::guests -->  GuestConfig (its keys: config.rs)
//!
//! plan_all   adds an entry in the list and a console for each guest of the bundle
//! make       makes one guest that is planned, or due to be made again (`destroy` may stop this):
//!              finds its kernel and ramdisk in the bundle, and checks that there is memory for it
//!              create::create   makes the domain, with its memory, page tables, vcpu and place in the store
//!              Console::connect; Disks::attach for each disk, Networks::attach for each network device
//!              Guest::start     lets the guest run
//! ```

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::bundle::BundleError;
use crate::config::{GuestConfig, MAX_DISKS, MAX_VIFS};
use crate::create::{CreateError, Guest, Request, Step, create, unpacked};
use crate::disk::{DiskConfig, Target};
use crate::ramdisk::warning;
use crate::vif::VifConfig;
use crate::{Hypervisor, Store};

use super::changed::{either, while_wanted};
use super::entry::{Entry, State};
use super::{Console, Disks, Manager, Mark, Networks, Place, Platform, listed};

/// The largest size of an unpacked kernel, in bytes.
const KERNEL_LIMIT: usize = 256 << 20;
/// Free pages of the machine that must remain, for the hypervisor and dom0, when a guest is made. A guest that grows to its
/// `maxmem` later may still take these pages.
const KEPT_PAGES: u64 = 1024;

/// Why a guest was not made.
enum Unmade {
    /// `destroy` stopped the making.
    GivenUp,
    /// An error, in words.
    Failed(String),
}

impl From<CreateError> for Unmade {
    fn from(error: CreateError) -> Self {
        match error.step {
            Step::GiveUp if error.left_over.is_empty() => Self::GivenUp,
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl From<BundleError> for Unmade {
    fn from(error: BundleError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl<P: Platform> Manager<P> {
    /// Adds all guests of the bundle to the list, to be made. Reports each guest whose configuration cannot be read.
    pub fn plan_all(&self) {
        for config in self.bundle.guests() {
            match config {
                Ok(config) => self.plan(config),
                Err(why) => self.fail(&why.to_string()),
            }
        }
        if self.entries.borrow().is_empty() && self.failed().is_none() {
            self.fail("the boot bundle has no guests");
        }
    }

    fn plan(&self, config: GuestConfig) {
        if self.console(&config.name).is_some() {
            return self.fail(&format!("guest {}: there is one of this name already", config.name));
        }
        let console = self.platform.console(&config.name);
        let entry = Entry { config, console, state: State::Planned, made_ns: 0, made: None, uuid: None, past: None };
        self.entries.borrow_mut().push(entry);
    }

    /// Makes guests, one after the other, until none is planned or due to be made again.
    pub async fn make_planned(&self) {
        while self.next_to_make().is_some() {
            self.platform.pause().await;
            // During the pause, `destroy` may have changed the guest's state, so that the guest is no longer to be made.
            if let Some(place) = self.next_to_make() {
                self.make(place).await;
            }
        }
    }

    /// Makes each guest as soon as it is planned or becomes due to be made again, one after the other. Never returns.
    pub async fn keep_making(&self) {
        loop {
            let seen = self.changes.count();
            self.make_planned().await;
            let sleep = self.next_due().map(|due| self.platform.sleep_until(due));
            either(self.changes.after(seen), sleep).await;
        }
    }

    fn next_to_make(&self) -> Option<Place> {
        let now = self.platform.now_ns();
        let entries = self.entries.borrow();
        let planned = entries.iter().position(|entry| matches!(entry.state, State::Planned));
        let due = || entries.iter().position(|entry| matches!(entry.state, State::Waits(due) if due <= now));
        planned.or_else(due).map(Place)
    }

    /// When the next guest is due to be made again, in nanoseconds since the machine started; `None` if no guest
    /// waits to be made again.
    fn next_due(&self) -> Option<u64> {
        let due = |entry: &Entry<P::Console>| match entry.state {
            State::Waits(due) => Some(due),
            _ => None,
        };
        self.entries.borrow().iter().filter_map(due).min()
    }

    /// Makes a guest that has no domain, or reports why the guest could not be made. Other tasks run meanwhile; `destroy` may
    /// stop this by changing the guest's state.
    async fn make(&self, place: Place) {
        self.with(place, |entry| entry.made = None);
        self.set_state(place, State::Begun);
        let Some((config, console)) = self.with(place, |entry| (entry.config.clone(), entry.console.clone())) else {
            return;
        };
        self.platform.mark(Mark::CreateBegins);
        let made = self.build(place, &config, &console).await;
        self.platform.mark(Mark::CreateEnds);
        match made {
            Ok(guest) => {
                let now = self.platform.now_ns();
                self.with(place, |entry| (entry.made_ns, entry.made) = (now, Some(guest.domain)));
                self.set_state(place, State::Lives(guest));
            }
            Err(why) => {
                self.platform.store().give_back();
                console.give_back();
                if let Unmade::Failed(why) = why {
                    self.fail(&why);
                    self.remember(place, None, "was not made", (why, Vec::new()));
                }
                self.set_state(place, State::Ended);
            }
        }
    }

    async fn build(&self, place: Place, config: &GuestConfig, console: &Rc<P::Console>) -> Result<Guest, Unmade> {
        let (hypervisor, store) = (self.platform.hypervisor(), self.platform.store());
        let (kernel, ramdisk) = self.bundle.images(config)?;
        while !store.is_settled() {
            self.platform.pause().await;
        }
        if !store.reserve() || !console.reserve() {
            let kib = self.platform.guest_bytes().div_ceil(1024);
            let why = format!("dom0 needs {kib} KiB to serve it, and the machine has not as much left");
            return Err(Unmade::Failed(format!("guest {}: {why}", config.name)));
        }
        let spare = self.spare_for(config)?;
        let room = usize::try_from(spare << 12).unwrap_or(usize::MAX);
        let wanted = || self.with(place, |entry| matches!(entry.state, State::Begun)).unwrap_or(false);
        let kernel = unpacked(config, kernel, (KERNEL_LIMIT, room), async || self.platform.pause().await);
        // If the unpacking is stopped, nothing is left to destroy: only memory of dom0 has been used so far.
        let kernel = &*while_wanted(kernel, wanted).await.ok_or(Unmade::GivenUp)??;
        if let Some(why) = warning(config.memory, kernel, ramdisk) {
            self.platform.tell(&format!("warning: guest {}: {why}", config.name));
        }
        let go_on = async || {
            self.platform.pause().await;
            wanted()
        };
        let uuid = uuid(self.platform.seed());
        self.with(place, |entry| entry.uuid = Some(uuid));
        let request = Request { config, kernel, ramdisk, uuid, backend: self.own };
        let guest = create(hypervisor, store, &request, go_on).await?;
        let domain = guest.domain;
        let connected = console.connect(domain, guest.console.port).map_err(Unmade::Failed);
        let equipped = match connected {
            Ok(()) => self.attach_all(&guest, wanted).await,
            Err(why) => Err(why),
        };
        // A domain that cannot be started has not run, so no device is still at work on its requests. Its devices are removed
        // before the domain is destroyed.
        let remove_devices = async || {
            console.disconnect();
            self.platform.networks().domain_died(domain).await;
            self.platform.disks().domain_died(domain).await;
        };
        let pause = async || self.platform.pause().await;
        match equipped {
            Ok(()) => guest.start(hypervisor, store, remove_devices, pause).await.map_err(Unmade::from),
            Err(why) => {
                remove_devices().await;
                let left_over = guest.destroy(hypervisor, store, pause).await;
                Err(match why {
                    Unmade::GivenUp if left_over.is_empty() => Unmade::GivenUp,
                    Unmade::GivenUp => Unmade::Failed(format!("guest {}{}", config.name, listed(&left_over))),
                    Unmade::Failed(why) => {
                        Unmade::Failed(format!("guest {}: {why}{}", config.name, listed(&left_over)))
                    }
                })
            }
        }
    }

    /// Attaches the disks and network devices that the configuration lists. Ends with [`Unmade::GivenUp`] as soon as the guest
    /// is no longer wanted.
    async fn attach_all(&self, guest: &Guest, wanted: impl Fn() -> bool) -> Result<(), Unmade> {
        let mut done = None;
        let attach = async {
            let mut attached = Ok(());
            for disk in &guest.config.disk {
                if attached.is_ok() {
                    attached = self.attach(guest, disk, || true).await;
                }
            }
            for (device, vif) in (0..).zip(&guest.config.vif) {
                if attached.is_ok() {
                    attached = self.attach_vif(guest, Some(device), vif, || true).await;
                }
            }
            done = Some(attached);
        };
        let unwanted = async {
            loop {
                let seen = self.changes.count();
                if !wanted() {
                    break;
                }
                self.changes.after(seen).await;
            }
        };
        either(attach, Some(unwanted)).await;
        done.ok_or(Unmade::GivenUp)?.map_err(Unmade::Failed)
    }

    /// Attaches a disk to a guest. If the disk's target is a disk of the machine, first waits until the machine's disks are
    /// known. Fails if the guest has ended by then (`lives` returns false).
    ///
    /// # Errors
    /// Why the guest cannot have the disk. The attachment has been undone then.
    pub(super) async fn attach(
        &self,
        guest: &Guest,
        disk: &DiskConfig,
        lives: impl Fn() -> bool,
    ) -> Result<(), String> {
        let (name, disks) = (&guest.config.name, self.platform.disks());
        if matches!(disk.target, Target::Serial(_)) {
            self.platform.machine_disks().await;
        }
        let why = match (lives(), disks.list(guest.domain, name).len() < MAX_DISKS) {
            (false, _) => "the guest has ended".to_string(),
            (true, false) => format!("a guest has at most {MAX_DISKS} disks"),
            (true, true) => match disks.attach(guest.domain, name, disk).await {
                Ok(()) => return Ok(()),
                Err(why) => why,
            },
        };
        Err(format!("disk {}: {why}", disk.vdev.name()))
    }

    /// Attaches a network device to a guest, if the guest has not ended (`lives`) by the time the machine's devices are known.
    /// Without a number, the device gets the lowest one that is free.
    ///
    /// # Errors
    /// Why the guest cannot have the device. The attachment has been undone then.
    pub(super) async fn attach_vif(
        &self,
        guest: &Guest,
        device: Option<u32>,
        vif: &VifConfig,
        lives: impl Fn() -> bool,
    ) -> Result<(), String> {
        // The networks know their uplink only when the search for the machine's devices is over. Only the wait
        // counts here, not the list of disks that `machine_disks` returns.
        self.platform.machine_disks().await;
        let (name, networks) = (&guest.config.name, self.platform.networks());
        let present = networks.list(guest.domain, name);
        let free = || (0..).find(|number| present.iter().all(|vif| vif.device != *number)).unwrap_or(0);
        let device = device.unwrap_or_else(free);
        let attached = match (lives(), present.len() < MAX_VIFS) {
            (false, _) => Err("the guest has ended".to_string()),
            (true, false) => Err(format!("a guest has at most {MAX_VIFS} network devices")),
            (true, true) => networks.attach(guest.domain, name, device, vif),
        };
        attached.map_err(|why| format!("vif {device}: {why}"))
    }

    /// Returns how many pages are free beyond [`KEPT_PAGES`]; an error if the guest needs more pages than these.
    fn spare_for(&self, config: &GuestConfig) -> Result<u64, Unmade> {
        let free =
            self.platform.hypervisor().physical_info().map_err(|why| Unmade::Failed(why.to_string()))?.free_pages;
        let spare = free.saturating_sub(KEPT_PAGES);
        if config.memory << 8 <= spare {
            return Ok(spare);
        }
        let (name, memory) = (&config.name, config.memory);
        let why = format!("guest {name}: {memory} MiB of memory, and the machine has {} MiB left", spare >> 8);
        Err(Unmade::Failed(why))
    }
}

/// A version 4 UUID made from `seed`.
fn uuid(mut seed: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    for half in bytes.chunks_mut(8) {
        // The finalizer of the splitmix generator.
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = seed;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        half.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
    }
    // Version 4, variant 1.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}
