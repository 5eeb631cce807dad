//! The guests of this machine: made from the boot bundle, watched, ended, and made anew if they want to be.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use services::Signal;
use services::console::CONSOLE_BYTES;
use services::store::store_bytes;
use toolstack::DomainId;
use toolstack::bundle::{Bundle, EXEC};
use toolstack::config::GuestConfig;
use toolstack::create::{Guest, Request, create, unpacked};
use toolstack::end::{End, Outcome, end_of};
use toolstack::ramdisk::warning;
use toolstack::status::Failure;
use unikernel::mark::{self, CREATE};
use unikernel::tasks::{self, Task};
use unikernel::{hypercall, time};

use crate::host::{GuestConsole, StoreService, Unikernel};
use crate::hypervisor::Xen;
use crate::terminal::Terminal;

/// Bytes a kernel may unpack to.
const KERNEL_LIMIT: usize = 256 << 20;
/// Pages that guests leave to the hypervisor and to us.
const KEPT_PAGES: u64 = 1024;
/// What we set aside at boot: for the turn of a guest that is at hand, and for ourselves.
pub(crate) const OWN_BYTES: usize = store::TURN_BYTES + (1 << 19);
/// So many ends are kept with their report; of an older one only how and when.
const DETAILED: usize = 16;
/// A guest that ends at once is not made anew more often than this.
const LIFE_NS: u64 = 1_000_000_000;

/// What a guest may make us hold, as far as that is set aside when it is made.
pub(crate) fn guest_bytes() -> usize {
    store_bytes() + CONSOLE_BYTES
}

/// Every guest, and what it takes to make one.
pub(crate) struct Guests {
    pub(crate) own: DomainId,
    pub(crate) bundle: Bundle<'static>,
    pub(crate) hypervisor: RefCell<Xen>,
    pub(crate) store: StoreService,
    pub(crate) terminal: Rc<Terminal>,
    pub(crate) list: RefCell<Vec<Entry>>,
    /// What went wrong first.
    failed: Cell<Option<Failure>>,
    /// Commands of `--exec` are being carried out.
    busy: Cell<bool>,
    /// A guest is being made, and what memory there is is for that.
    making: Cell<bool>,
    /// Something may have ended.
    pub(crate) changed: Signal,
}

/// A guest, in whatever state.
pub(crate) struct Entry {
    pub(crate) config: GuestConfig,
    pub(crate) console: Rc<GuestConsole>,
    pub(crate) state: State,
    /// When it was last made.
    pub(crate) made: u64,
    /// Its last end.
    pub(crate) past: Option<Past>,
}

/// How a guest ended.
pub(crate) struct Past {
    /// Its domain, if it had one.
    pub(crate) domain: Option<DomainId>,
    /// In words: `crashed`.
    pub(crate) how: &'static str,
    /// When.
    pub(crate) at: u64,
    /// For a person, with registers; may be empty.
    pub(crate) report: String,
    /// What the hypervisor had refused it last.
    pub(crate) refused: Vec<String>,
}

/// What has become of a guest.
pub(crate) enum State {
    /// It has yet to be made for the first time.
    Planned,
    /// It is being made.
    Begun,
    /// It runs, or is paused.
    Lives(Guest),
    /// Ended and kept.
    Kept(Guest),
    /// Will be made anew, unless the task is dropped.
    Waits(Task<()>),
    /// Nothing is left of it.
    Ended,
}

impl Guests {
    /// No guest yet; those of `bundle` are made by [`Guests::make_planned`].
    pub(crate) fn new(own: DomainId, bundle: Bundle<'static>, terminal: Rc<Terminal>) -> Rc<Self> {
        Rc::new(Self {
            own,
            bundle,
            hypervisor: RefCell::default(),
            store: StoreService::new(Unikernel, own),
            terminal,
            list: RefCell::default(),
            failed: Cell::new(None),
            busy: Cell::new(bundle.entry(EXEC).is_some()),
            making: Cell::new(false),
            changed: Signal::default(),
        })
    }

    /// The console of a guest.
    pub(crate) fn console(&self, name: &str) -> Option<Rc<GuestConsole>> {
        let list = self.list.borrow();
        let entry = list.iter().find(|entry| entry.config.name == name);
        entry.map(|entry| Rc::clone(&entry.console))
    }

    /// The first guest that lives, or soon will.
    pub(crate) fn first_alive(&self) -> Option<String> {
        let list = self.list.borrow();
        let entry = list.iter().find(|entry| entry.is_alive());
        entry.map(|entry| entry.config.name.clone())
    }

    /// Whether a guest lives, or soon will.
    pub(crate) fn is_alive(&self, name: &str) -> bool {
        let list = self.list.borrow();
        let mut entries = list.iter().filter(|entry| entry.config.name == name);
        entries.any(|entry| entry.is_alive())
    }

    /// Whether nothing is left to do or to look at.
    pub(crate) fn all_ended(&self) -> bool {
        let ended = |entry: &Entry| matches!(entry.state, State::Ended);
        !self.busy.get() && self.list.borrow().iter().all(ended)
    }

    /// The commands of `--exec` have been carried out.
    pub(crate) fn commanded(&self) {
        self.busy.set(false);
        self.changed.set();
    }

    /// What went wrong first, if anything did.
    pub(crate) fn failed(&self) -> Option<Failure> {
        self.failed.get()
    }

    /// Something went wrong: the machine ends so, unless something else had before.
    pub(crate) fn note(&self, failure: Failure) {
        self.failed.set(self.failed.get().or(Some(failure)));
    }

    fn fail(&self, why: &str) {
        self.note(Failure::NotMade);
        self.terminal.message(&format!("error: {why}"));
    }

    /// Reads what guests the bundle has.
    pub(crate) fn plan_all(&self) {
        for config in self.bundle.guests() {
            let config = match config {
                Ok(config) => config,
                Err(why) => {
                    self.fail(&why.to_string());
                    continue;
                }
            };
            let name = config.name.clone();
            if self.console(&name).is_some() {
                self.fail(&format!("guest {name}: there is one of this name already"));
                continue;
            }
            let console = GuestConsole::new(Unikernel, &name, Rc::clone(&self.terminal));
            self.list.borrow_mut().push(Entry { config, console, state: State::Planned, made: 0, past: None });
        }
        if self.list.borrow().is_empty() && self.failed().is_none() {
            self.fail("the boot bundle has no guests");
        }
    }

    /// Makes every guest that is planned, and lets others do their work in between.
    pub(crate) async fn make_planned(&self) {
        let planned = || {
            let list = self.list.borrow();
            list.iter().find(|entry| matches!(entry.state, State::Planned)).map(|entry| entry.config.name.clone())
        };
        while let Some(name) = planned() {
            tasks::yield_now().await;
            // It may have been given up meanwhile.
            if self.is_planned(&name) {
                self.start(&name).await;
            }
        }
    }

    fn is_planned(&self, name: &str) -> bool {
        let list = self.list.borrow();
        list.iter().any(|entry| entry.config.name == name && matches!(entry.state, State::Planned))
    }

    /// Makes a guest anew that waits for it.
    async fn restart(&self, name: &str) {
        let waits = |entry: &&mut Entry| entry.config.name == name && matches!(entry.state, State::Waits(_));
        let before =
            self.list.borrow_mut().iter_mut().find(waits).map(|e| core::mem::replace(&mut e.state, State::Ended));
        if let Some(State::Waits(task)) = before {
            // It is the one that runs this.
            task.detach();
            self.start(name).await;
        }
    }

    /// Makes a guest that does not exist, and says so if that fails. One is made at a time; meanwhile others are served, and
    /// it may be given up.
    pub(crate) async fn start(&self, name: &str) {
        self.set_state(name, State::Begun);
        while self.making.replace(true) {
            tasks::yield_now().await;
        }
        if let Some((config, console)) = self.begun(name) {
            mark::begin::<CREATE>();
            let made = self.make(&config, &console).await;
            mark::end::<CREATE>();
            if !matches!(made, Ok(Some(_))) {
                self.store.give_back();
                console.give_back();
            }
            match made {
                Ok(Some(guest)) => self.set_state(name, State::Lives(guest)),
                Ok(None) => {}
                Err(why) => {
                    self.fail(&why);
                    self.remember(name, None, "was not made", (why, Vec::new()));
                    self.set_state(name, State::Ended);
                }
            }
        }
        self.making.set(false);
    }

    /// What to make of a guest that is being made, unless it has been given up.
    fn begun(&self, name: &str) -> Option<(GuestConfig, Rc<GuestConsole>)> {
        let list = self.list.borrow();
        let entry = list.iter().find(|entry| entry.config.name == name && matches!(entry.state, State::Begun))?;
        Some((entry.config.clone(), Rc::clone(&entry.console)))
    }

    pub(crate) fn set_state(&self, name: &str, state: State) {
        let mut list = self.list.borrow_mut();
        if let Some(entry) = list.iter_mut().find(|entry| entry.config.name == name) {
            if let State::Lives(_) = state {
                entry.made = time::now_ns();
            }
            entry.state = state;
        }
        drop(list);
        self.changed.set();
    }

    /// Makes a guest; `None` if it is given up while its kernel is unpacked.
    async fn make(&self, config: &GuestConfig, console: &Rc<GuestConsole>) -> Result<Option<Guest>, String> {
        let (kernel, ramdisk) = self.bundle.images(config).map_err(|why| why.to_string())?;
        self.store.settled().await;
        if !self.store.reserve() || !console.reserve() {
            let kib = guest_bytes().div_ceil(1024);
            return Err(format!(
                "guest {}: dom0 needs {kib} KiB to serve it, and the machine has not as much left",
                config.name
            ));
        }
        let free =
            hypercall::physical_info().map_err(|errno| format!("physinfo refused: {}", errno.name()))?.free_pages;
        let spare = free.saturating_sub(KEPT_PAGES);
        if config.memory << 8 > spare {
            let (name, memory) = (&config.name, config.memory);
            return Err(format!("guest {name}: {memory} MiB of memory, and the machine has {} MiB left", spare >> 8));
        }
        let room = usize::try_from(spare << 12).unwrap_or(usize::MAX);
        let kernel = unpacked(config, kernel, (KERNEL_LIMIT, room), tasks::yield_now).await;
        let kernel = &*kernel.map_err(|why| why.to_string())?;
        if self.begun(&config.name).is_none() {
            return Ok(None);
        }
        if let Some(why) = warning(config.memory, kernel, ramdisk) {
            self.terminal.message(&format!("warning: guest {}: {why}", config.name));
        }
        let request = Request { config, kernel, ramdisk, uuid: uuid(), backend: self.own };
        let hypervisor = &mut *self.hypervisor.borrow_mut();
        let store = &mut self.store.clone();
        let guest = create(hypervisor, store, &request).map_err(|why| why.to_string())?;
        if let Err(why) = console.connect(guest.domain.0, guest.console.port) {
            let left_over = guest.destroy(hypervisor, store);
            return Err(format!("guest {}: {why}{}", config.name, listed(&left_over)));
        }
        guest.start(hypervisor, store).map(Some).map_err(|why| {
            console.disconnect();
            why.to_string()
        })
    }

    /// Sees which guests have ended, and does what follows.
    pub(crate) fn look(self: &Rc<Self>) {
        while let Some((name, end)) = self.next_end() {
            self.finish(&name, &end);
        }
    }

    /// A guest that has ended and is not yet seen to.
    fn next_end(&self) -> Option<(String, End)> {
        let list = self.list.borrow();
        let hypervisor = &mut *self.hypervisor.borrow_mut();
        list.iter().find_map(|entry| {
            let State::Lives(guest) = &entry.state else { return None };
            match end_of(hypervisor, guest) {
                Ok(end) => end.map(|end| (entry.config.name.clone(), end)),
                Err(why) => {
                    log::error!("guest {}: {why}", entry.config.name);
                    None
                }
            }
        })
    }

    fn finish(self: &Rc<Self>, name: &str, end: &End) {
        let Some((guest, console, made)) = self.take(name) else {
            return;
        };
        self.store.domain_shut_down(guest.domain);
        console.disconnect();
        let report = end.told(console.is_silent());
        self.terminal.message(&report);
        self.remember(name, Some(guest.domain), end.how, (report, end.refused.clone()));
        let (outcome, left_over) = {
            let hypervisor = &mut *self.hypervisor.borrow_mut();
            guest.finish(end, hypervisor, &mut self.store.clone())
        };
        self.complain(name, &left_over);
        if let Some(failure) = Failure::of_end(end.reason)
            && !matches!(outcome, Outcome::Restart(_))
        {
            self.note(failure);
        }
        let state = match outcome {
            Outcome::Gone => State::Ended,
            Outcome::Preserved(guest) => State::Kept(guest),
            Outcome::Restart(_) => {
                let (guests, name) = (Rc::clone(self), name.to_string());
                State::Waits(tasks::spawn(async move {
                    time::sleep_until(made.saturating_add(LIFE_NS)).await;
                    guests.restart(&name).await;
                }))
            }
        };
        self.set_state(name, state);
    }

    /// Keeps how a guest ended, in place of its end before.
    pub(crate) fn remember(
        &self,
        name: &str,
        domain: Option<DomainId>,
        how: &'static str,
        (report, refused): (String, Vec<String>),
    ) {
        if let Some(entry) = self.list.borrow_mut().iter_mut().find(|entry| entry.config.name == name) {
            entry.past = Some(Past { domain, how, at: time::now_ns(), report, refused });
        }
        // The details of the oldest end give way.
        let mut list = self.list.borrow_mut();
        let pasts = list.iter_mut().filter_map(|entry| entry.past.as_mut());
        let mut detailed: Vec<&mut Past> = pasts.filter(|past| !past.report.is_empty()).collect();
        detailed.sort_unstable_by_key(|past| past.at);
        let many = detailed.len().saturating_sub(DETAILED);
        for past in detailed.into_iter().take(many) {
            (past.report, past.refused) = (String::new(), Vec::new());
        }
    }

    /// Takes a guest that exists out of the list, for its end.
    pub(crate) fn take(&self, name: &str) -> Option<(Guest, Rc<GuestConsole>, u64)> {
        let mut list = self.list.borrow_mut();
        let entry = list.iter_mut().find(|entry| entry.config.name == name)?;
        match core::mem::replace(&mut entry.state, State::Ended) {
            State::Lives(guest) | State::Kept(guest) => Some((guest, Rc::clone(&entry.console), entry.made)),
            other => {
                entry.state = other;
                None
            }
        }
    }

    pub(crate) fn complain(&self, name: &str, left_over: &[String]) {
        if !left_over.is_empty() {
            self.terminal.message(&format!("guest {name}{}", listed(left_over)));
        }
    }
}

fn listed(left_over: &[String]) -> String {
    left_over.iter().map(|what| format!("; left over: {what}")).collect()
}

/// A name that differs from others: the counter and the clock, mixed. Nothing rests on its being unguessable.
fn uuid() -> [u8; 16] {
    let mut state = time::counter() ^ time::now_ns().rotate_left(32);
    let mut bytes = [0; 16];
    for half in bytes.chunks_mut(8) {
        // The finalizer of the splitmix generator.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        half.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
    }
    // Version 4, variant 1.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}
