//! The guests of a machine: made from the boot bundle, watched, ended, and made again if their configuration says so.
//!
//! ```text
//! a face (prompt, --exec) -> Command -> Manager::answer (verbs.rs) -> Reply, Refusal -> text or JSON
//! called by dom0's tasks:  keep_making   makes one guest after the other
//!                          bury          destroys or keeps each guest that has ended, and tells how it ended
//!                          watch_parting has bury called again once the devices of a guest that has ended are removed
//! ```
//!
//! Touches: domains, the tree of the store, consoles, disks, networks and the clock, through [`Platform`].
//! Never touches: the terminal. The manager does not know which face gave a command, and also runs on a host, against fakes.
//! Keeps: one guest is made at a time. If making a guest fails, all that was made for the guest is removed again. What
//! cannot be removed is reported by [`Platform::tell`].
//! The list of guests is not borrowed across an await.

mod changed;
mod entry;
mod make;
mod reply;
mod verbs;

use alloc::boxed::Box;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};
use core::future::Future;

use crate::bundle::{Bundle, EXEC};
use crate::config::Action;
use crate::create::Guest;
use crate::disk::DiskConfig;
use crate::end::{End, Outcome, end_of};
use crate::status::Failure;
use crate::vif::VifConfig;
use crate::{DomainId, Hypervisor, Store};

use changed::{Changes, both, either};
use entry::{Entry, State, Told};

pub use entry::LastEnd;
pub use reply::{
    DiskRow, GuestDisk, GuestVif, MachineInfo, NetworkDevice, NetworkRow, Refusal, Reply, Row, Size, Wait,
};

/// How many full reports on ended guests (`LastEnd::report` and `refused`) are kept, for all guests together. When there are
/// more, the oldest ones are emptied; `how` and `at_ns` of these ends stay.
const REPORTS_KEPT: usize = 16;
/// The least time in nanoseconds between making a guest and making it again.
const REMAKE_NS: u64 = 1_000_000_000;

/// How long in nanoseconds `bury` and the command `destroy` wait until the disks and network devices of a guest that has ended
/// are removed. If they are not removed in this time, `bury` goes on with other guests, and `destroy` answers
/// [`Refusal::Parting`]; the guest is destroyed once its devices are removed. The command `block-detach` waits twice this time
/// for the disk to be gone.
const PATIENCE_NS: u64 = 10_000_000_000;
/// Nanoseconds between two looks at the devices of guests that have ended.
const LOOK_NS: u64 = 1_000_000_000;

/// What the manager needs: the hypervisor, the store, consoles, disks, networks, a clock, and a way to tell a person.
pub trait Platform {
    /// The type of the hypervisor.
    type Hypervisor: Hypervisor;
    /// The type of the store.
    type Store: Store;
    /// The type of a guest's console.
    type Console: Console;
    /// The type of the disks of guests.
    type Disks: Disks;
    /// The type of the networks of guests.
    type Networks: Networks;

    /// The hypervisor, with authority over domains.
    fn hypervisor(&self) -> &Self::Hypervisor;
    /// The store, with its tree and its server.
    fn store(&self) -> &Self::Store;
    /// The disks of guests.
    fn disks(&self) -> &Self::Disks;
    /// The networks of guests.
    fn networks(&self) -> &Self::Networks;
    /// Makes a console for a guest of this name, not connected yet.
    fn console(&self, name: &str) -> Rc<Self::Console>;
    /// Nanoseconds since the machine started.
    fn now_ns(&self) -> u64;
    /// Waits until [`now_ns`](Platform::now_ns) reaches `deadline_ns`.
    fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()>;
    /// Lets other tasks run.
    fn pause(&self) -> impl Future<Output = ()>;
    /// Returns a number that differs at each call and in each boot. Guests' UUIDs are made from this number, which may be
    /// guessable.
    fn seed(&self) -> u64;
    /// Shows a person what happened, on lines of its own.
    fn tell(&self, text: &str);
    /// Returns the disks of the machine, once the search for the machine's devices is over.
    fn machine_disks(&self) -> impl Future<Output = Vec<DiskRow>>;
    /// Bytes of dom0's memory that are set aside for serving a guest when the guest is made. The guest's own memory is not
    /// included.
    fn guest_bytes(&self) -> usize;
    /// Bytes of dom0's memory that are set aside now for serving all guests together.
    fn promised_bytes(&self) -> usize;
    /// Marks where a measured stretch of work begins or ends.
    fn mark(&self, mark: Mark);
}

/// Where a measured stretch of work begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// A guest is about to be made.
    CreateBegins,
    /// The guest has been made, or could not be made.
    CreateEnds,
    /// The command `destroy` is about to destroy a guest.
    DestroyBegins,
    /// The guest has been destroyed, or its destruction waits until its devices are removed.
    DestroyEnds,
}

/// The console of a guest. A guest that is made again keeps its console.
pub trait Console {
    /// Sets aside memory for the guest's output and input; returns whether there is enough.
    fn reserve(&self) -> bool;
    /// Called when the guest was not made. Frees what [`reserve`](Console::reserve) set aside, unless the console has ever been
    /// connected: the memory may then hold what the guest printed.
    fn give_back(&self);
    /// Begins to serve the guest, whose domain now is `domain`; `port` is the guest's end of the event channel.
    ///
    /// # Errors
    /// Why the console cannot be served, in words.
    fn connect(&self, domain: DomainId, port: u32) -> Result<(), String>;
    /// Takes the guest's last output and unmaps its page. Does nothing if the console is not connected.
    fn disconnect(&self);
    /// Whether the guest has printed nothing since the console was last connected.
    fn is_silent(&self) -> bool;
    /// Gives the console the new name of the guest.
    fn rename(&self, name: &str);
    /// The guest's name.
    fn name(&self) -> String;
    /// Sends keystrokes to the guest, or keeps them until its ring has room. Keystrokes for which the console has no room are
    /// lost. If the console is not connected, all keystrokes are lost.
    fn type_in(&self, bytes: &[u8]);
    /// Shows on the terminal what was printed while the terminal did not show this console.
    fn show_missed(&self);
}

/// The disks of guests.
pub trait Disks {
    /// Attaches a disk to a guest of this domain and name. If this fails, or if the future is dropped before it is done,
    /// all that the attachment has made is removed again.
    ///
    /// # Errors
    /// Why the guest cannot have the disk, in words.
    fn attach(&self, domain: DomainId, guest: &str, disk: &DiskConfig) -> impl Future<Output = Result<(), String>>;
    /// Takes the disk with this number away from a guest, and returns when the disk is gone. Without `force`, the guest is
    /// asked to release the disk.
    ///
    /// # Errors
    /// The guest has no such disk, or does not release the disk in time. In the second case, the disk goes once it is released.
    fn detach(&self, domain: DomainId, device: u32, force: bool) -> impl Future<Output = Result<(), String>>;
    /// Removes all disks of a domain that runs no more, and returns when nothing of the domain is pinned or mapped for a disk,
    /// and nothing of its disks is in the store. The caller destroys the domain only then: its number could be used
    /// again.
    fn domain_died(&self, domain: DomainId) -> impl Future<Output = ()>;
    /// The disks of a domain; `guest` is the name of its guest.
    fn list(&self, domain: DomainId, guest: &str) -> Vec<GuestDisk>;
    /// Resets the disk of the machine with this serial number. Requests that the disk has not answered are issued again, or
    /// fail if the disk was reset less than a minute ago. Does nothing if the disk is being reset or is lost.
    ///
    /// # Errors
    /// There is no such device.
    fn reset(&self, serial: &str) -> Result<(), String>;
    /// Bytes of dom0's memory that are set aside for serving a disk while the disk is attached.
    fn disk_bytes(&self) -> usize;
}

/// The networks, and the network devices of guests.
pub trait Networks {
    /// Attaches a network device with the number `device` to a guest of this domain and name. If this fails, all
    /// that the attachment has made is removed again.
    ///
    /// # Errors
    /// Why the guest cannot have the device, in words.
    fn attach(&self, domain: DomainId, guest: &str, device: u32, vif: &VifConfig) -> Result<(), String>;
    /// Takes the device with this number away from a guest, and returns when the device is gone. Without `force`, the guest is
    /// asked to release the device.
    ///
    /// # Errors
    /// The guest has no such device, or does not release the device in time; the device is removed once the guest releases it.
    fn detach(&self, domain: DomainId, device: u32, force: bool) -> impl Future<Output = Result<(), String>>;
    /// Removes all network devices of a domain that runs no more, and returns when nothing of the domain is mapped for a
    /// device, and nothing of its devices is in the store. The caller destroys the domain only then: its number could be used
    /// again.
    fn domain_died(&self, domain: DomainId) -> impl Future<Output = ()>;
    /// The network devices of a domain, in the order of their numbers; `guest` is the name of its guest.
    fn list(&self, domain: DomainId, guest: &str) -> Vec<GuestVif>;
    /// The networks.
    fn networks(&self) -> Vec<NetworkRow>;
    /// Bytes of dom0's memory that are set aside for serving a network device while it is attached.
    fn vif_bytes(&self) -> usize;
}

/// The index of a guest in the list. It never changes, because entries are only added, never removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place(usize);

/// All guests, and what it takes to make one.
pub struct Manager<P: Platform> {
    platform: P,
    own: DomainId,
    bundle: Bundle<'static>,
    entries: RefCell<Vec<Entry<P::Console>>>,
    /// The first failure.
    failed: Cell<Option<Failure>>,
    /// Whether some commands of the bundle (`--exec`) still have to be carried out.
    commanded: Cell<bool>,
    changes: Changes,
}

impl<P: Platform> Manager<P> {
    /// A manager that runs in domain `own`. Its list of guests is empty until [`Manager::plan_all`] adds those of `bundle`.
    pub fn new(platform: P, own: DomainId, bundle: Bundle<'static>) -> Self {
        Self {
            platform,
            own,
            bundle,
            entries: RefCell::default(),
            failed: Cell::new(None),
            commanded: Cell::new(bundle.entry(EXEC).is_some()),
            changes: Changes::default(),
        }
    }

    /// The platform that the manager works on.
    pub const fn platform(&self) -> &P {
        &self.platform
    }

    /// The console of the guest with this name; `None` if there is no such guest.
    pub fn console(&self, name: &str) -> Option<Rc<P::Console>> {
        let entries = self.entries.borrow();
        let entry = entries.iter().find(|entry| entry.config.name == name);
        entry.map(|entry| entry.console.clone())
    }

    /// The names of all guests.
    pub fn names(&self) -> Vec<String> {
        self.entries.borrow().iter().map(|entry| entry.config.name.clone()).collect()
    }

    /// The name of the first guest that is alive (see [`is_alive`](Self::is_alive)); `None` if no guest is.
    pub fn first_alive(&self) -> Option<String> {
        let entries = self.entries.borrow();
        let entry = entries.iter().find(|entry| entry.is_alive());
        entry.map(|entry| entry.config.name.clone())
    }

    /// Whether the guest with this name is alive: it has a domain that has not ended, or it is being made, or it will be made.
    pub fn is_alive(&self, name: &str) -> bool {
        self.entries.borrow().iter().any(|entry| entry.config.name == name && entry.is_alive())
    }

    /// Whether nothing is left to do, so that the machine can be turned off: each guest has ended for good (it is not kept, and
    /// will not be made again), and the commands of `--exec` have been carried out.
    pub fn all_ended(&self) -> bool {
        let ended = |entry: &Entry<P::Console>| matches!(entry.state, State::Ended);
        !self.commanded.get() && self.entries.borrow().iter().all(ended)
    }

    /// To be called when the commands of the bundle have been carried out; wakes the tasks that wait for a change.
    pub fn commands_done(&self) {
        self.commanded.set(false);
        self.changes.add();
    }

    /// The first failure, if there was one.
    pub const fn failed(&self) -> Option<Failure> {
        self.failed.get()
    }

    /// Records a failure. The first one becomes the exit status of the machine.
    pub fn note(&self, failure: Failure) {
        self.failed.set(self.failed.get().or(Some(failure)));
    }

    fn fail(&self, why: &str) {
        self.note(Failure::NotMade);
        self.platform.tell(&format!("error: {why}"));
    }

    /// To be called when a domain may have ended; wakes the tasks that wait for a change.
    pub fn look_again(&self) {
        self.changes.add();
    }

    /// The number of changes so far, for [`Manager::changed`].
    pub const fn changes(&self) -> u64 {
        self.changes.count()
    }

    /// Waits until [`changes`](Self::changes) differs from `seen`.
    pub async fn changed(&self, seen: u64) {
        self.changes.after(seen).await;
    }

    /// Deals with each guest that has ended: destroys or keeps it, as its configuration says, tells how it ended, and has it
    /// made again if the configuration says so. A guest whose devices are not gone within ten seconds is left for later.
    pub async fn bury(&self) {
        loop {
            if let Some(place) = self.next_parted() {
                if let Some((guest, told)) = self.with(place, Entry::take_parting).flatten() {
                    self.conclude(place, guest, told).await;
                }
            } else if let Some((place, end)) = self.next_end() {
                self.finish(place, end).await;
            } else {
                return;
            }
        }
    }

    /// Looks every second at the guests that cannot be destroyed yet because their devices are not removed. Once the devices of
    /// one are removed, counts a change, so that the task that calls `bury` calls it again. Never returns.
    pub async fn watch_parting(&self) {
        loop {
            let seen = self.changes.count();
            if self.entries.borrow().iter().any(|entry| matches!(entry.state, State::Parting(..))) {
                self.platform.sleep_until(self.platform.now_ns().saturating_add(LOOK_NS)).await;
                if self.next_parted().is_some() {
                    self.changes.add();
                }
            } else {
                self.changes.after(seen).await;
            }
        }
    }

    /// A guest in the state `Parting` whose devices are removed by now, so that its domain can be destroyed.
    fn next_parted(&self) -> Option<Place> {
        let (disks, networks) = (self.platform.disks(), self.platform.networks());
        let parted = |entry: &Entry<P::Console>| match &entry.state {
            State::Parting(guest, _) => {
                let (domain, name) = (guest.domain, &guest.config.name);
                disks.list(domain, name).is_empty() && networks.list(domain, name).is_empty()
            }
            _ => false,
        };
        self.entries.borrow().iter().position(parted).map(Place)
    }

    /// Removes the disks and network devices of a domain that runs no more. Returns false if they are not all removed within
    /// [`PATIENCE_NS`]. The removal then goes on after the return: disks on a disk of the machine that does not answer are
    /// removed once that disk answers.
    async fn devices_gone(&self, domain: DomainId) -> bool {
        let mut gone = false;
        // Both removals begin at once, so that a slow one does not delay the other.
        let died = async {
            both(self.platform.networks().domain_died(domain), self.platform.disks().domain_died(domain)).await;
            gone = true;
        };
        let deadline_ns = self.platform.now_ns().saturating_add(PATIENCE_NS);
        either(died, Some(self.platform.sleep_until(deadline_ns))).await;
        gone
    }

    /// Returns a guest that has ended and has not been dealt with, and its end; `None` if there is none.
    fn next_end(&self) -> Option<(Place, End)> {
        let entries = self.entries.borrow();
        entries.iter().enumerate().find_map(|(index, entry)| {
            let State::Lives(guest) = &entry.state else { return None };
            match end_of(self.platform.hypervisor(), guest) {
                Ok(end) => end.map(|end| (Place(index), end)),
                Err(why) => {
                    self.platform.tell(&format!("error: guest {}: {why}", entry.config.name));
                    None
                }
            }
        })
    }

    async fn finish(&self, place: Place, end: End) {
        let taken = self.with(place, |entry| entry.take().map(|guest| (guest, entry.console.clone())));
        let Some((guest, console)) = taken.flatten() else { return };
        self.platform.store().domain_shut_down(guest.domain);
        console.disconnect();
        let report = end.told(console.is_silent());
        self.remember(place, Some(guest.domain), end.how, (report.clone(), end.refused.clone()));
        let gone = end.action == Action::Preserve || self.devices_gone(guest.domain).await;
        let told = Some(Box::new(Told { end, report }));
        if gone {
            self.conclude(place, guest, told).await;
        } else {
            self.platform.tell(&format!("{}", Refusal::Parting(guest.config.name.clone())));
            self.set_state(place, State::Parting(guest, told));
        }
    }

    /// Does what is left to do for a guest that has ended: destroys the guest, or keeps it with its devices. A guest to be
    /// destroyed must have no devices any more. `told` is `None` if the command `destroy` ended the guest.
    async fn conclude(&self, place: Place, guest: Guest, told: Option<Box<Told>>) {
        let (hypervisor, store) = (self.platform.hypervisor(), self.platform.store());
        let (name, pause) = (guest.config.name.clone(), async || self.platform.pause().await);
        let Some(told) = told else {
            let left_over = guest.destroy(hypervisor, store, pause).await;
            self.complain(&name, &left_over);
            return self.set_state(place, State::Ended);
        };
        let Told { end, report } = *told;
        let made_ns = self.with(place, |entry| entry.made_ns).unwrap_or(0);
        let (outcome, left_over) = guest.finish(&end, hypervisor, store, pause).await;
        // The end is told last: by now, unless the guest is kept, its domain is gone and its nodes are being removed.
        self.platform.tell(&report);
        self.complain(&name, &left_over);
        if let Some(failure) = Failure::of_end(end.reason)
            && !matches!(outcome, Outcome::Restart(_))
        {
            self.note(failure);
        }
        self.set_state(
            place,
            match outcome {
                Outcome::Gone => State::Ended,
                Outcome::Preserved(guest) => State::Kept(guest),
                Outcome::Restart(_) => State::Waits(made_ns.saturating_add(REMAKE_NS)),
            },
        );
    }

    fn with<T>(&self, place: Place, act: impl FnOnce(&mut Entry<P::Console>) -> T) -> Option<T> {
        self.entries.borrow_mut().get_mut(place.0).map(act)
    }

    fn set_state(&self, place: Place, state: State) {
        self.with(place, |entry| entry.state = state);
        self.changes.add();
    }

    /// Records how a guest ended, or that it was not made, in place of what was recorded before.
    fn remember(
        &self,
        place: Place,
        domain: Option<DomainId>,
        how: &'static str,
        (report, refused): (String, Vec<String>),
    ) {
        let past = LastEnd { domain, how, at_ns: self.platform.now_ns(), report, refused };
        self.with(place, |entry| entry.past = Some(past));
        // Keep the full reports of only the newest ends.
        let mut entries = self.entries.borrow_mut();
        let pasts = entries.iter_mut().filter_map(|entry| entry.past.as_mut());
        let mut detailed: Vec<&mut LastEnd> = pasts.filter(|past| !past.report.is_empty()).collect();
        detailed.sort_unstable_by_key(|past| past.at_ns);
        let many = detailed.len().saturating_sub(REPORTS_KEPT);
        for past in detailed.into_iter().take(many) {
            (past.report, past.refused) = (String::new(), Vec::new());
        }
    }

    fn complain(&self, name: &str, left_over: &[String]) {
        if !left_over.is_empty() {
            self.platform.tell(&format!("guest {name}{}", listed(left_over)));
        }
    }
}

fn listed(left_over: &[String]) -> String {
    left_over.iter().map(|what| format!("; left over: {what}")).collect()
}
