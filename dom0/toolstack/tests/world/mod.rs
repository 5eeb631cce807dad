//! A machine for a manager: fake domains and a fake tree, consoles, a clock that jumps, and tasks that are polled in turn.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use hypercall_abi::domctl::info;
use toolstack::DomainId;
use toolstack::bundle::Bundle;
use toolstack::command::Command;
use toolstack::disk::DiskConfig;
use toolstack::manager::{
    self, DiskRow, GuestDisk, GuestVif, Manager, Mark, NetworkDevice, NetworkRow, Refusal, Reply,
};
use toolstack::vif::VifConfig;

use crate::archive::archive;
use crate::common::*;

/// A console that keeps what is typed, and what state it is in.
#[derive(Default)]
pub(crate) struct Screenless {
    pub(crate) name: RefCell<String>,
    pub(crate) reserved: Cell<bool>,
    pub(crate) connected: Cell<Option<DomainId>>,
    pub(crate) talks: Cell<bool>,
    pub(crate) typed: RefCell<Vec<u8>>,
    pub(crate) shown: Cell<usize>,
    broken: Rc<Cell<bool>>,
}

impl manager::Console for Screenless {
    fn reserve(&self) -> bool {
        self.reserved.set(true);
        true
    }

    fn give_back(&self) {
        self.reserved.set(false);
    }

    fn connect(&self, domain: DomainId, _: u32) -> Result<(), String> {
        assert!(self.reserved.get() && self.connected.get().is_none());
        if self.broken.get() {
            return Err("its console page: broken".into());
        }
        self.connected.set(Some(domain));
        Ok(())
    }

    fn disconnect(&self) {
        self.connected.take();
    }

    fn is_silent(&self) -> bool {
        !self.talks.get()
    }

    fn rename(&self, name: &str) {
        self.name.replace(name.into());
    }

    fn name(&self) -> String {
        self.name.borrow().clone()
    }

    fn type_in(&self, bytes: &[u8]) {
        self.typed.borrow_mut().extend_from_slice(bytes);
    }

    fn show_missed(&self) {
        self.shown.set(self.shown.get() + 1);
    }
}

/// Disks that say yes, unless they are to refuse, to take long, or to be used when they are to go.
#[derive(Default)]
pub(crate) struct FakeDisks {
    attached: RefCell<Vec<(DomainId, String, DiskConfig)>>,
    /// A disk that cannot be attached.
    pub(crate) broken: RefCell<String>,
    /// Attaching takes as long as this is true.
    pub(crate) slow: Cell<bool>,
    /// The end of a domain's disks takes as long as this is true.
    pub(crate) held: Cell<bool>,
    /// Guests do not release their disks.
    pub(crate) busy: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

impl FakeDisks {
    async fn while_set(&self, flag: &Cell<bool>) {
        std::future::poll_fn(|context| {
            if !flag.get() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Clears a flag, and wakes those who wait for that.
    pub(crate) fn clear(&self, flag: impl Fn(&Self) -> &Cell<bool>) {
        flag(self).set(false);
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    /// The disks of a domain go, though nobody waits for that any more.
    pub(crate) fn forget(&self, domain: DomainId) {
        self.attached.borrow_mut().retain(|(of, ..)| *of != domain);
    }

    fn left(&self) -> Vec<String> {
        self.attached.borrow().iter().map(|(domain, _, disk)| format!("disk {disk} of {domain}")).collect()
    }
}

impl manager::Disks for FakeDisks {
    async fn attach(&self, domain: DomainId, guest: &str, disk: &DiskConfig) -> Result<(), String> {
        self.while_set(&self.slow).await;
        if *self.broken.borrow() == disk.vdev.name() {
            return Err("it is broken".into());
        }
        let mut attached = self.attached.borrow_mut();
        if attached.iter().any(|(of, _, other)| *of == domain && other.vdev == disk.vdev) {
            return Err(format!("the guest has a disk {} already", disk.vdev.name()));
        }
        let holder = attached.iter().find(|(.., other)| other.target == disk.target && disk.writes_target());
        match holder {
            Some((_, holder, _)) => Err(format!("{} is in use: {holder} writes it", disk.target)),
            None => {
                attached.push((domain, guest.into(), disk.clone()));
                Ok(())
            }
        }
    }

    async fn detach(&self, domain: DomainId, device: u32, force: bool) -> Result<(), String> {
        self.while_set(&self.slow).await;
        if self.busy.get() && !force {
            return Err("it is used".into());
        }
        self.attached.borrow_mut().retain(|(of, _, disk)| *of != domain || disk.vdev.number() != device);
        Ok(())
    }

    async fn domain_died(&self, domain: DomainId) {
        // A domain without disks has nothing to wait for.
        if self.attached.borrow().iter().any(|(of, ..)| *of == domain) {
            self.while_set(&self.held).await;
        }
        self.attached.borrow_mut().retain(|(of, ..)| *of != domain);
    }

    fn list(&self, domain: DomainId, guest: &str) -> Vec<GuestDisk> {
        let attached = self.attached.borrow();
        let mine = attached.iter().filter(|(of, ..)| *of == domain);
        let row = |(_, _, disk): &(_, _, DiskConfig)| GuestDisk {
            guest: guest.into(),
            domain,
            vdev: disk.vdev.name().into(),
            device: disk.vdev.number(),
            target: disk.target.to_string(),
            mode: "w",
            state: "connected",
            reads: 1,
            writes: 2,
            flushes: 3,
            discards: 4,
            sectors_read: 16,
            sectors_written: 33,
            errors: 7,
            overlay_kib: 12,
        };
        mine.map(row).collect()
    }

    fn reset(&self, serial: &str) -> Result<(), String> {
        if serial == "a" { Ok(()) } else { Err(format!("no disk has the serial number {serial}")) }
    }

    fn disk_bytes(&self) -> usize {
        40 << 10
    }
}

/// Networks that say yes, unless they are to refuse, or guests are not to release their devices.
#[derive(Default)]
pub(crate) struct FakeNetworks {
    /// A device that a network of its own leads to.
    pub(crate) device: RefCell<Option<NetworkDevice>>,
    attached: RefCell<Vec<(DomainId, u32, VifConfig)>>,
    /// A network that does not exist.
    pub(crate) broken: RefCell<String>,
    /// Guests do not release their devices.
    pub(crate) busy: Cell<bool>,
    /// The devices of a domain that has ended stay as long as this is true.
    pub(crate) held: Cell<bool>,
}

impl FakeNetworks {
    /// The devices of a domain go, though nobody waits for that any more.
    pub(crate) fn forget(&self, domain: DomainId) {
        self.held.set(false);
        self.attached.borrow_mut().retain(|(of, ..)| *of != domain);
    }

    fn left(&self) -> Vec<String> {
        self.attached.borrow().iter().map(|(domain, device, _)| format!("vif {device} of {domain}")).collect()
    }
}

impl manager::Networks for FakeNetworks {
    fn attach(&self, domain: DomainId, _: &str, device: u32, vif: &VifConfig) -> Result<(), String> {
        if *self.broken.borrow() == vif.bridge {
            return Err("there is no such network".into());
        }
        self.attached.borrow_mut().push((domain, device, vif.clone()));
        Ok(())
    }

    async fn detach(&self, domain: DomainId, device: u32, force: bool) -> Result<(), String> {
        if self.busy.get() && !force {
            return Err("it is used".into());
        }
        self.attached.borrow_mut().retain(|(of, number, _)| (*of, *number) != (domain, device));
        Ok(())
    }

    async fn domain_died(&self, domain: DomainId) {
        if self.held.get() {
            std::future::pending::<()>().await;
        }
        self.attached.borrow_mut().retain(|(of, ..)| *of != domain);
    }

    fn list(&self, domain: DomainId, guest: &str) -> Vec<GuestVif> {
        let attached = self.attached.borrow();
        let row = |(_, device, vif): &(_, u32, VifConfig)| GuestVif {
            guest: guest.into(),
            domain,
            device: *device,
            mac: vif.mac.unwrap_or_else(|| network::Mac::of_guest(guest, *device)).to_string(),
            bridge: vif.bridge.clone(),
            ip: vif.ip.map(|ip| ip.to_string()),
            state: "connected",
            received: 1,
            received_bytes: 2048,
            sent: 3,
            sent_bytes: 4096,
            drops: vec![("spoofed", 5), ("rate", 6)],
            flows: (vif.bridge == "nat").then_some(7),
        };
        let mut rows: Vec<_> = attached.iter().filter(|(of, ..)| *of == domain).map(row).collect();
        rows.sort_by_key(|row| row.device);
        rows
    }

    fn networks(&self) -> Vec<NetworkRow> {
        let address = Some("10.77.0.1/24".to_string());
        let mut rows = vec![NetworkRow {
            name: "nat".into(),
            kind: "translated",
            vifs: self.attached.borrow().len(),
            address,
            uplink: None,
            device: None,
        }];
        let device = self.device.borrow().clone();
        rows.extend(device.map(|device| NetworkRow {
            name: "uplink".into(),
            kind: "bridged",
            vifs: 0,
            address: None,
            uplink: Some("eth0".into()),
            device: Some(device),
        }));
        rows
    }

    fn vif_bytes(&self) -> usize {
        10 << 10
    }
}

/// What happens to a machine at some time.
type Happening = Box<dyn FnOnce(&Fake)>;

#[derive(Default)]
pub(crate) struct Fake {
    pub(crate) machine: Shared<Machine>,
    pub(crate) tree: Shared<Tree>,
    pub(crate) guest_disks: FakeDisks,
    pub(crate) networks: FakeNetworks,
    pub(crate) consoles_broken: Rc<Cell<bool>>,
    pub(crate) now: Cell<u64>,
    sleepers: RefCell<Vec<(u64, Waker)>>,
    pub(crate) told: RefCell<Vec<String>>,
    pub(crate) disks: RefCell<Vec<DiskRow>>,
    pub(crate) marks: RefCell<Vec<Mark>>,
    /// Pauses so far, and what happens at one of them.
    pub(crate) pauses: Cell<usize>,
    pub(crate) at_pause: RefCell<Option<(usize, Happening)>>,
    /// The most pages between two pauses.
    pub(crate) longest: Cell<usize>,
}

impl manager::Platform for Fake {
    type Hypervisor = Shared<Machine>;
    type Store = Shared<Tree>;
    type Console = Screenless;
    type Disks = FakeDisks;
    type Networks = FakeNetworks;

    fn hypervisor(&self) -> &Shared<Machine> {
        &self.machine
    }

    fn store(&self) -> &Shared<Tree> {
        &self.tree
    }

    fn disks(&self) -> &FakeDisks {
        &self.guest_disks
    }

    fn networks(&self) -> &FakeNetworks {
        &self.networks
    }

    fn console(&self, name: &str) -> Rc<Screenless> {
        let broken = Rc::clone(&self.consoles_broken);
        Rc::new(Screenless { name: RefCell::new(name.into()), broken, ..Screenless::default() })
    }

    fn now_ns(&self) -> u64 {
        self.now.get()
    }

    fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()> {
        std::future::poll_fn(move |context| {
            if self.now.get() >= deadline_ns {
                return Poll::Ready(());
            }
            self.sleepers.borrow_mut().push((deadline_ns, context.waker().clone()));
            Poll::Pending
        })
    }

    async fn pause(&self) {
        self.pauses.set(self.pauses.get() + 1);
        let pages = std::mem::take(&mut self.machine.borrow_mut().turn);
        self.longest.set(self.longest.get().max(pages));
        let due = self.at_pause.borrow_mut().take_if(|(at, _)| *at == self.pauses.get());
        if let Some((_, happen)) = due {
            happen(self);
        }
        let mut yielded = false;
        std::future::poll_fn(|context| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    fn seed(&self) -> u64 {
        self.now.get() + self.pauses.get() as u64
    }

    fn tell(&self, text: &str) {
        self.told.borrow_mut().push(text.into());
    }

    async fn machine_disks(&self) -> Vec<DiskRow> {
        self.disks.borrow().clone()
    }

    fn guest_bytes(&self) -> usize {
        300 << 10
    }

    fn promised_bytes(&self) -> usize {
        self.tree.borrow().served.len() * (300 << 10)
    }

    fn mark(&self, mark: Mark) {
        self.marks.borrow_mut().push(mark);
    }
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

type Task = (Arc<Flag>, Pin<Box<dyn Future<Output = ()>>>);

/// A manager with its two tasks, and those that ask it.
pub(crate) struct World {
    pub(crate) manager: Rc<Manager<Fake>>,
    tasks: Vec<Task>,
}

pub(crate) type Asked = Rc<RefCell<Option<Result<Reply, Refusal>>>>;

impl World {
    /// A machine whose bundle has guests of these configurations; nothing has been made yet.
    pub(crate) fn planned(configs: &[&str]) -> Self {
        let names: Vec<String> = (0..configs.len()).map(|n| format!("guests/{n}/config")).collect();
        let kernel = kernel();
        let entries = names.iter().zip(configs).map(|(name, text)| (name.as_str(), text.as_bytes()));
        let entries: Vec<(&str, &[u8])> = entries.chain([("k", kernel.as_slice())]).collect();
        Self::of(&entries)
    }

    /// A machine with this bundle.
    pub(crate) fn of(entries: &[(&str, &[u8])]) -> Self {
        let bundle = Bundle::new(Box::leak(archive(entries).into_boxed_slice()));
        let fake = Fake { machine: Machine::new(), ..Fake::default() };
        let manager = Rc::new(Manager::new(fake, DomainId(0), bundle));
        manager.plan_all();
        Self { manager, tasks: Vec::new() }
    }

    /// As [`World::planned`], with the two tasks; all guests have been made.
    pub(crate) fn running(configs: &[&str]) -> Self {
        let mut world = Self::planned(configs);
        world.begin();
        world.settle();
        world
    }

    /// Starts the two tasks of the manager.
    pub(crate) fn begin(&mut self) {
        let making = Rc::clone(&self.manager);
        self.spawn(async move { making.keep_making().await });
        let parting = Rc::clone(&self.manager);
        self.spawn(async move { parting.watch_parting().await });
        let burying = Rc::clone(&self.manager);
        self.spawn(async move {
            loop {
                let seen = burying.changes();
                burying.bury().await;
                burying.changed(seen).await;
            }
        });
    }

    pub(crate) fn fake(&self) -> &Fake {
        self.manager.platform()
    }

    pub(crate) fn spawn(&mut self, task: impl Future<Output = ()> + 'static) {
        self.tasks.push((Arc::new(Flag(AtomicBool::new(true))), Box::pin(task)));
    }

    /// Polls each task that has been woken once; answers whether there was one.
    pub(crate) fn round(&mut self) -> bool {
        let mut any = false;
        self.tasks.retain_mut(|(flag, task)| {
            if !flag.0.swap(false, Ordering::Relaxed) {
                return true;
            }
            any = true;
            task.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(flag)))).is_pending()
        });
        any
    }

    /// Lets everything happen that happens without time passing.
    pub(crate) fn settle(&mut self) {
        for _ in 0..1_000_000 {
            if !self.round() {
                return;
            }
        }
        panic!("the tasks never rest");
    }

    /// Lets time pass.
    pub(crate) fn pass(&mut self, ns: u64) {
        let fake = self.manager.platform();
        fake.now.set(fake.now.get() + ns);
        fake.sleepers.take().into_iter().for_each(|(_, waker)| waker.wake());
        self.settle();
    }

    /// Asks, and leaves the answer to come.
    pub(crate) fn begin_asking(&mut self, line: &str) -> Asked {
        let answer = Asked::default();
        let asked = Rc::clone(&answer);
        let command = Command::parse(line).unwrap().unwrap().command;
        let manager = Rc::clone(&self.manager);
        self.spawn(async move {
            let reply = manager.answer(&command).await;
            asked.replace(Some(reply));
        });
        answer
    }

    pub(crate) fn ask(&mut self, line: &str) -> Result<Reply, Refusal> {
        let answer = self.begin_asking(line);
        self.settle();
        answer.take().unwrap_or_else(|| panic!("{line}: no answer"))
    }

    pub(crate) fn text(&mut self, line: &str) -> String {
        match self.ask(line) {
            Ok(reply) => reply.text(),
            Err(why) => why.to_string(),
        }
    }

    pub(crate) fn json(&mut self, line: &str) -> serde_json::Value {
        let json = match self.ask(line) {
            Ok(reply) => reply.json(),
            Err(why) => why.json(),
        };
        serde_json::from_str(&json).unwrap_or_else(|why| panic!("{json}: {why}"))
    }

    /// A domain ends for this reason, and its hypervisor says so.
    pub(crate) fn shut_down(&mut self, domain: u16, reason: u32) {
        self.fake().machine.borrow_mut().domains.get_mut(&domain).unwrap().info.flags |=
            info::SHUTDOWN | reason << info::SHUTDOWN_SHIFT;
        self.manager.look_again();
        self.settle();
    }

    pub(crate) fn told(&self) -> Vec<String> {
        self.fake().told.take()
    }

    /// What guests leave behind: domains, frames, nodes, connections, memory set aside, consoles.
    pub(crate) fn left(&self) -> Vec<String> {
        let (machine, tree) = (self.fake().machine.borrow(), self.fake().tree.borrow());
        let mut left: Vec<String> = machine.domains.keys().map(|domain| format!("domain {domain}")).collect();
        left.extend((machine.free != FREE).then(|| format!("{} frames", FREE - machine.free)));
        left.extend(tree.nodes.keys().cloned());
        left.extend(tree.served.keys().map(|domain| format!("store connection of {domain}")));
        left.extend(self.fake().guest_disks.left());
        left.extend(self.fake().networks.left());
        left.extend(tree.reserved.then(|| "memory for a guest".into()));
        for name in self.manager.names() {
            let console = self.manager.console(&name).unwrap();
            left.extend(console.connected.get().map(|domain| format!("console of {domain}")));
        }
        left
    }
}
