//! How each command is carried out.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hypercall_abi::domctl::DomainInfo;

use super::changed::either;
use super::entry::{Entry, State};
use super::reply::{GuestDisk, GuestVif, MachineInfo, Refusal, Reply, Row, Size, Wait};
use super::{Console, Disks, Manager, Mark, Networks, PATIENCE_NS, Place, Platform};
use crate::command::{Command, Verb, help};
use crate::config::{GuestConfig, check_name};
use crate::create::Guest;
use crate::disk::DiskConfig;
use crate::end::EndRequest;
use crate::vif::VifConfig;
use crate::{DomainId, Hypervisor, domains};

/// Bytes of the hypervisor's log read in one call.
const LOG_PIECE: usize = 1024;

impl<P: Platform> Manager<P> {
    /// Carries out a command. `create` and `destroy` return when they are finished, `shutdown` and `reboot` once the guest has
    /// been asked. Commands that need the guest's domain wait while the guest is being made or ended; other tasks run
    /// meanwhile.
    ///
    /// # Errors
    /// Why the command was refused.
    pub async fn answer(&self, command: &Command) -> Result<Reply, Refusal> {
        Ok(match command {
            Command::List { all } => Reply::List(self.rows(*all)?),
            Command::Info => Reply::Info(self.information()?),
            Command::Disks => Reply::Disks(self.platform.machine_disks().await),
            Command::BlockAttach { name, disk } => self.block_attach(name, disk).await?,
            Command::BlockDetach { name, vdev, force } => self.block_detach(name, vdev, *force).await?,
            Command::BlockReset(serial) => match self.platform.disks().reset(serial) {
                Ok(()) => Reply::Done { verb: "block-reset", name: serial.clone() },
                Err(why) => return Err(Refusal::Other(why)),
            },
            Command::BlockList(name) => Reply::GuestDisks(self.guest_disks(name.as_deref()).await?),
            Command::Networks => {
                self.platform.machine_disks().await;
                Reply::Networks(self.platform.networks().networks())
            }
            Command::NetworkAttach { name, vif } => self.network_attach(name, vif).await?,
            Command::NetworkDetach { name, device, force } => self.network_detach(name, device, *force).await?,
            Command::NetworkList(name) => Reply::GuestVifs(self.guest_vifs(name.as_deref()).await?),
            Command::Dmesg { clear } => Reply::Log(self.log(*clear)?),
            Command::Help(verb) => Reply::Help(verb.map_or_else(help, Verb::help)),
            Command::Quit => Reply::Quit,
            Command::Uptime(name) => self.uptime(name.as_deref()).await?,
            Command::Create(name) => self.create(self.resolve(name)?).await?,
            Command::Console(name) => Reply::Console(self.name_of(self.resolve(name)?)),
            Command::Pause(name) => self.on_domain("pause", name, Hypervisor::pause).await?,
            Command::Unpause(name) => self.on_domain("unpause", name, Hypervisor::unpause).await?,
            Command::Destroy(name) => self.destroy(self.resolve(name)?).await?,
            Command::Domid(name) => {
                let (_, Guest { domain, config, .. }) = self.guest(name).await?;
                Reply::Domid { name: config.name, domain }
            }
            Command::Shutdown { name, .. } => self.ask("shutdown", name, EndRequest::Poweroff).await?,
            Command::Reboot { name, .. } => self.ask("reboot", name, EndRequest::Reboot).await?,
            Command::MemSet { name, mib } => self.set_memory(name, *mib).await?,
            Command::Rename { name, to } => self.rename(name, to)?,
        })
    }

    /// Waits until the guest that was asked to power off has ended, or the one that was asked to reboot has been made again.
    ///
    /// # Errors
    /// The guest was asked to reboot, but is not made again.
    pub async fn wait(&self, wait: &Wait) -> Result<(), Refusal> {
        loop {
            let seen = self.changes.count();
            if let Some(outcome) = self.outcome(wait) {
                return outcome;
            }
            self.changes.after(seen).await;
        }
    }

    /// How a request to power off or reboot went; `None` until the guest has ended and, for a reboot, has been made again.
    fn outcome(&self, wait: &Wait) -> Option<Result<(), Refusal>> {
        let entries = self.entries.borrow();
        let state = entries.iter().find(|entry| entry.config.name == wait.name).map(|entry| &entry.state);
        match (state, wait.wish) {
            (Some(State::Lives(guest)), _) if guest.domain == wait.domain => None,
            (Some(State::Ending | State::Parting(..)), _) => None,
            (Some(State::Lives(_)), EndRequest::Reboot) => Some(Ok(())),
            (Some(State::Waits(_) | State::Planned | State::Begun), EndRequest::Reboot) => None,
            (_, EndRequest::Poweroff) => Some(Ok(())),
            _ => Some(Err(Refusal::DidNotComeBack(wait.name.clone()))),
        }
    }

    /// The place of the guest with this name or, if there is none, of the guest whose domain has this number.
    fn resolve(&self, given: &str) -> Result<Place, Refusal> {
        let entries = self.entries.borrow();
        let named = |entry: &Entry<P::Console>| entry.config.name == given;
        let numbered = |entry: &Entry<P::Console>| entry.guest().is_some_and(|guest| guest.domain.to_string() == given);
        let found = entries.iter().position(named).or_else(|| entries.iter().position(numbered));
        found.map(Place).ok_or_else(|| Refusal::NoGuest(given.to_string()))
    }

    fn name_of(&self, place: Place) -> String {
        self.with(place, |entry| entry.config.name.clone()).unwrap_or_default()
    }

    /// Waits while the guest is being made, is due to be made again, or is being ended. Then returns it. Without a domain, a
    /// guest that is planned is refused with `InBetween`, any other with `HasEnded`.
    async fn guest(&self, given: &str) -> Result<(Place, Guest), Refusal> {
        let place = self.resolve(given)?;
        self.until(place, |state| match state {
            State::Begun | State::Ending => false,
            State::Waits(due) => *due > self.platform.now_ns(),
            State::Planned | State::Lives(_) | State::Kept(_) | State::Parting(..) | State::Ended => true,
        })
        .await;
        let refusal = |planned| if planned { Refusal::InBetween } else { Refusal::HasEnded };
        let why = self.with(place, |entry| refusal(matches!(entry.state, State::Planned))).unwrap_or(Refusal::HasEnded);
        let guest = self.with(place, |entry| entry.guest().cloned()).flatten();
        guest.map(|guest| (place, guest)).ok_or_else(|| why(self.name_of(place)))
    }

    async fn on_domain<E: ToString>(
        &self,
        verb: &'static str,
        name: &str,
        act: impl FnOnce(&P::Hypervisor, DomainId) -> Result<(), E>,
    ) -> Result<Reply, Refusal> {
        let (_, Guest { domain, config: GuestConfig { name, .. }, .. }) = self.guest(name).await?;
        match act(self.platform.hypervisor(), domain) {
            Ok(()) => Ok(Reply::Done { verb, name }),
            Err(why) => Err(Refusal::Guest(name, why.to_string())),
        }
    }

    /// Waits while the guest's resources are being freed.
    async fn freed(&self, place: Place) {
        self.until(place, |state| !matches!(state, State::Ending)).await;
    }

    /// An error if the guest's end waits for its disks.
    fn refuse_parting(&self, place: Place) -> Result<(), Refusal> {
        match self.with(place, |entry| matches!(entry.state, State::Parting(..))) {
            Some(true) => Err(Refusal::Parting(self.name_of(place))),
            _ => Ok(()),
        }
    }

    async fn until(&self, place: Place, so: impl Fn(&State) -> bool) {
        loop {
            let seen = self.changes.count();
            if self.with(place, |entry| so(&entry.state)).unwrap_or(true) {
                return;
            }
            self.changes.after(seen).await;
        }
    }

    /// Makes anew a guest that has ended: plans it, and waits until it has been made or could not be made.
    async fn create(&self, place: Place) -> Result<Reply, Refusal> {
        self.freed(place).await;
        let name = self.name_of(place);
        self.refuse_parting(place)?;
        if !self.with(place, |entry| matches!(entry.state, State::Ended)).unwrap_or(false) {
            return Err(Refusal::Exists(name));
        }
        self.with(place, |entry| entry.made = None);
        self.set_state(place, State::Planned);
        self.until(place, |state| !matches!(state, State::Planned | State::Begun | State::Ending)).await;
        match self.with(place, |entry| entry.made).flatten() {
            Some(domain) => Ok(Reply::Created { name, domain }),
            None => Err(Refusal::NotMade(name)),
        }
    }

    /// Destroys a guest. If it is being made, the making is stopped; if it waits to be made, it is not made.
    async fn destroy(&self, place: Place) -> Result<Reply, Refusal> {
        self.freed(place).await;
        let name = self.name_of(place);
        self.refuse_parting(place)?;
        let taken = self.with(place, |entry| entry.take().map(|guest| (guest, entry.console.clone())));
        if let Some((guest, console)) = taken.flatten() {
            self.platform.mark(Mark::DestroyBegins);
            console.disconnect();
            self.remember(place, Some(guest.domain), "was destroyed", Default::default());
            if !self.end_disks(&guest).await {
                self.platform.mark(Mark::DestroyEnds);
                self.set_state(place, State::Parting(guest, None));
                return Err(Refusal::Parting(name));
            }
            let pause = async || self.platform.pause().await;
            let left_over = guest.destroy(self.platform.hypervisor(), self.platform.store(), pause).await;
            self.platform.mark(Mark::DestroyEnds);
            self.complain(&name, &left_over);
            self.set_state(place, State::Ended);
        } else if self.with(place, |entry| entry.is_alive()).unwrap_or(false) {
            self.remember(place, None, "was given up", Default::default());
            let begun = self.with(place, |entry| matches!(entry.state, State::Begun)).unwrap_or(false);
            // `make` finds the state `Ending`, and removes what it has made.
            self.set_state(place, if begun { State::Ending } else { State::Ended });
            self.freed(place).await;
        } else {
            return Err(Refusal::EndedAlready(name));
        }
        Ok(Reply::Done { verb: "destroy", name })
    }

    /// Removes the devices of a guest that is to be destroyed, if it has any; returns whether they are gone.
    async fn end_disks(&self, guest: &Guest) -> bool {
        let (domain, disks, networks) = (guest.domain, self.platform.disks(), self.platform.networks());
        let name = &guest.config.name;
        if !disks.list(domain, name).is_empty() || !networks.list(domain, name).is_empty() {
            // A guest that is stopped sends no more requests; if it cannot be stopped, its domain is gone.
            drop(self.platform.hypervisor().pause(domain));
        }
        // A disk may also be on its way.
        self.devices_gone(domain).await
    }

    async fn block_attach(&self, name: &str, disk: &DiskConfig) -> Result<Reply, Refusal> {
        let (place, guest) = self.guest(name).await?;
        let lives = || self.with(place, |entry| entry.has_domain(guest.domain)).unwrap_or(false);
        let name = guest.config.name.clone();
        match self.attach(&guest, disk, lives).await {
            Ok(()) => Ok(Reply::Done { verb: "block-attach", name }),
            Err(why) => Err(Refusal::Guest(name, why)),
        }
    }

    async fn block_detach(&self, name: &str, vdev: &str, force: bool) -> Result<Reply, Refusal> {
        let (_, guest) = self.guest(name).await?;
        let (name, disks) = (guest.config.name.clone(), self.platform.disks());
        let found = disks.list(guest.domain, &name).into_iter().find(|disk| disk.vdev == vdev);
        let detached = match found {
            Some(disk) => {
                let mut detached =
                    Err("the device of the disk has not answered; the disk goes when it does".to_string());
                let detach = async { detached = disks.detach(guest.domain, disk.device, force).await };
                let deadline_ns = self.platform.now_ns().saturating_add(2 * PATIENCE_NS);
                either(detach, Some(self.platform.sleep_until(deadline_ns))).await;
                detached
            }
            None => Err(format!("it has no disk {}", vdev.escape_debug())),
        };
        detached
            .map(|()| Reply::Done { verb: "block-detach", name: name.clone() })
            .map_err(|why| Refusal::Guest(name, why))
    }

    /// The disks of one guest, or of all.
    async fn guest_disks(&self, name: Option<&str>) -> Result<Vec<GuestDisk>, Refusal> {
        let disks = self.platform.disks();
        if let Some(name) = name {
            let (_, guest) = self.guest(name).await?;
            return Ok(disks.list(guest.domain, &guest.config.name));
        }
        let entries = self.entries.borrow();
        let guests = entries.iter().filter_map(Entry::guest);
        Ok(guests.flat_map(|guest| disks.list(guest.domain, &guest.config.name)).collect())
    }

    async fn network_attach(&self, name: &str, vif: &VifConfig) -> Result<Reply, Refusal> {
        let (place, guest) = self.guest(name).await?;
        let lives = || self.with(place, |entry| entry.has_domain(guest.domain)).unwrap_or(false);
        let name = guest.config.name.clone();
        match self.attach_vif(&guest, None, vif, lives).await {
            Ok(()) => Ok(Reply::Done { verb: "network-attach", name }),
            Err(why) => Err(Refusal::Guest(name, why)),
        }
    }

    async fn network_detach(&self, name: &str, device: &str, force: bool) -> Result<Reply, Refusal> {
        let (_, guest) = self.guest(name).await?;
        let (name, networks) = (guest.config.name.clone(), self.platform.networks());
        let named = |vif: &GuestVif| vif.device.to_string() == device || vif.mac.eq_ignore_ascii_case(device);
        let found = networks.list(guest.domain, &name).into_iter().find(named);
        let detached = match found {
            Some(vif) => networks.detach(guest.domain, vif.device, force).await,
            None => Err(format!("it has no network device {}", device.escape_debug())),
        };
        detached
            .map(|()| Reply::Done { verb: "network-detach", name: name.clone() })
            .map_err(|why| Refusal::Guest(name, why))
    }

    /// The network devices of one guest, or of all.
    async fn guest_vifs(&self, name: Option<&str>) -> Result<Vec<GuestVif>, Refusal> {
        let networks = self.platform.networks();
        if let Some(name) = name {
            let (_, guest) = self.guest(name).await?;
            return Ok(networks.list(guest.domain, &guest.config.name));
        }
        let entries = self.entries.borrow();
        let guests = entries.iter().filter_map(Entry::guest);
        Ok(guests.flat_map(|guest| networks.list(guest.domain, &guest.config.name)).collect())
    }

    async fn ask(&self, verb: &'static str, name: &str, wish: EndRequest) -> Result<Reply, Refusal> {
        let (_, guest) = self.guest(name).await?;
        let name = guest.config.name.clone();
        match guest.ask(wish, self.platform.store()) {
            Ok(()) => Ok(Reply::Asked { verb, wait: Wait { name, domain: guest.domain, wish } }),
            Err(why) => Err(Refusal::Guest(name, why.to_string())),
        }
    }

    async fn set_memory(&self, name: &str, mib: u64) -> Result<Reply, Refusal> {
        let (_, guest) = self.guest(name).await?;
        let GuestConfig { name, maxmem, .. } = guest.config.clone();
        let hypervisor = self.platform.hypervisor();
        let refused = |why: String| Refusal::Guest(name.clone(), why);
        if !(1..=maxmem).contains(&mib) {
            return Err(Refusal::OutOfRange(name, maxmem));
        }
        let found = hypervisor.info(guest.domain).map_err(|why| refused(why.to_string()))?;
        let found = found.filter(|info| info.domain == guest.domain.0);
        let has = found.ok_or_else(|| refused(format!("there is no domain {}", guest.domain)))?.tot_pages;
        let free = hypervisor.physical_info().map_err(|why| refused(why.to_string()))?.free_pages;
        if (mib << 8).saturating_sub(has) > free {
            return Err(Refusal::NoMemory { name, has_mib: has >> 8, free_mib: free >> 8 });
        }
        // With this limit, a guest that has given pages back cannot take them again before it is asked to.
        hypervisor.set_max_memory(guest.domain, mib << 10).map_err(|why| refused(why.to_string()))?;
        guest.set_memory_target(mib, self.platform.store()).map_err(|why| refused(why.to_string()))?;
        Ok(Reply::Done { verb: "mem-set", name })
    }

    fn rename(&self, name: &str, to: &str) -> Result<Reply, Refusal> {
        let place = self.resolve(name)?;
        check_name(to).map_err(|why| Refusal::BadName(to.to_string(), why))?;
        if self.names().iter().any(|other| other == to) {
            return Err(Refusal::NameTaken(to.to_string()));
        }
        let console = self.with(place, |entry| self.rename_entry(entry, to)).transpose()?;
        if let Some(console) = console {
            console.rename(to);
        }
        Ok(Reply::Done { verb: "rename", name: to.to_string() })
    }

    fn rename_entry(&self, entry: &mut Entry<P::Console>, to: &str) -> Result<Rc<P::Console>, Refusal> {
        let name = entry.config.name.clone();
        if matches!(entry.state, State::Waits(_) | State::Planned | State::Begun | State::Ending | State::Parting(..)) {
            return Err(Refusal::InBetween(name));
        }
        if let Some(guest) = entry.guest_mut() {
            guest.rename(to, self.platform.store()).map_err(|why| Refusal::Guest(name, why.to_string()))?;
        }
        entry.config.name = to.to_string();
        Ok(entry.console.clone())
    }

    async fn uptime(&self, name: Option<&str>) -> Result<Reply, Refusal> {
        let (name, since) = match name {
            None => ("dom0".to_string(), 0),
            Some(name) => {
                let (place, guest) = self.guest(name).await?;
                (guest.config.name, self.with(place, |entry| entry.made_ns).unwrap_or(0))
            }
        };
        Ok(Reply::Uptime { name, seconds: self.platform.now_ns().saturating_sub(since) / 1_000_000_000 })
    }

    fn domains(&self) -> Result<Vec<DomainInfo>, Refusal> {
        domains(self.platform.hypervisor()).map_err(|why| Refusal::Other(why.to_string()))
    }

    fn information(&self) -> Result<MachineInfo, Refusal> {
        let hypervisor = self.platform.hypervisor();
        let machine = hypervisor.physical_info().map_err(|why| Refusal::Other(why.to_string()))?;
        let domains = self.domains()?;
        // Memory that is neither free nor a domain's belongs to the hypervisor.
        let given: u64 = domains.iter().map(|domain| domain.tot_pages).sum();
        let own = domains.iter().find(|domain| domain.domain == self.own.0).map_or(0, |own| own.tot_pages);
        let bundle = (self.bundle.size() as u64).div_ceil(4096);
        Ok(MachineInfo {
            abi: hypervisor.version(),
            total_mib: machine.total_pages >> 8,
            free_mib: machine.free_pages >> 8,
            hypervisor_kib: machine.total_pages.saturating_sub(machine.free_pages + given) << 2,
            dom0_kib: own.saturating_sub(bundle) << 2,
            for_guests_kib: self.platform.promised_bytes() >> 10,
            each_guest_kib: self.platform.guest_bytes().div_ceil(1024),
            each_disk_kib: self.platform.disks().disk_bytes().div_ceil(1024),
            each_vif_kib: self.platform.networks().vif_bytes().div_ceil(1024),
            bundle_kib: bundle << 2,
            cpus: machine.nr_cpus,
            domains: domains.len(),
            vcpus: domains.iter().map(|domain| domain.nr_online_vcpus).sum(),
        })
    }

    /// All domains, and the guests that are still to be made; with `all`, also the guests that have ended.
    fn rows(&self, all: bool) -> Result<Vec<Row>, Refusal> {
        let found = self.domains()?;
        let entries = self.entries.borrow();
        let is = |entry: &Entry<P::Console>, info: &DomainInfo| entry.uuid == Some(info.handle);
        let name = |info: &DomainInfo| match entries.iter().find(|entry| is(entry, info)) {
            _ if info.domain == self.own.0 => "dom0".to_string(),
            Some(entry) => entry.config.name.clone(),
            None => "-".to_string(),
        };
        // A guest that is being made may already have a domain.
        let to_come = |entry: &&Entry<P::Console>| {
            matches!(entry.state, State::Planned | State::Begun) && !found.iter().any(|info| is(entry, info))
        };
        let over = |entry: &&Entry<P::Console>| all && matches!(entry.state, State::Ended | State::Waits(_));
        let domains = found.iter().map(|info| Row::Domain { name: name(info), info: *info });
        let planned = entries.iter().filter(to_come).map(|entry| Row::Planned(size(&entry.config)));
        let ended = entries.iter().filter(over).map(|entry| Row::Ended(size(&entry.config), entry.past.clone()));
        Ok(domains.chain(planned).chain(ended).collect())
    }

    /// The hypervisor's log and what guests wrote to it, as escaped lines. With `clear`, what has been read is cleared.
    fn log(&self, clear: bool) -> Result<Vec<String>, Refusal> {
        let refused = |why: <P::Hypervisor as Hypervisor>::Error| Refusal::Other(why.to_string());
        let hypervisor = self.platform.hypervisor();
        let (mut log, mut at, mut piece) = (Vec::new(), 0, [0; LOG_PIECE]);
        loop {
            let (count, next) = hypervisor.read_log(at, false, &mut piece).map_err(refused)?;
            if count == 0 {
                break;
            }
            log.extend_from_slice(piece.get(..count).unwrap_or_default());
            at = next;
        }
        if clear {
            // Lines that were logged after the last read are not cleared.
            hypervisor.read_log(at, true, &mut []).map_err(refused)?;
        }
        Ok(String::from_utf8_lossy(&log).lines().map(escaped).collect())
    }
}

fn size(config: &GuestConfig) -> Size {
    Size { name: config.name.clone(), memory_mib: config.memory, vcpus: config.vcpus }
}

/// A line of text in printable ASCII: all other characters are escaped.
fn escaped(line: &str) -> String {
    let mut shown = String::new();
    for character in line.chars() {
        match character {
            ' '..='~' => shown.push(character),
            _ => shown.extend(character.escape_default()),
        }
    }
    shown
}
