//! A store, disks and a device, and what must be left of a guest that is gone: nothing.

use std::cell::RefCell;
use std::rc::Rc;

use services::Class;
use services::block::{Disks, Listed};
use services::store::StoreService;
use toolstack::disk::DiskConfig;
use toolstack::{DomainId, Store};

use crate::common::guest::Rounds;
use crate::device::{Device, Media};
use crate::front::{Front, Guest};
use crate::machine::Machine;

pub const XVDA: u32 = 51712;
pub const XVDB: u32 = 51728;
/// Sectors of the device.
pub const SECTORS: usize = 2048;

pub struct World {
    pub machine: Machine,
    pub store: StoreService<Machine>,
    pub disks: Disks<Machine>,
    pub media: Rc<RefCell<Media>>,
    before: Counted,
}

/// What can leak: frames, disk frames, heap, pages and ports, tasks, sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counted {
    frames: usize,
    disk_frames: usize,
    heap: usize,
    held: (usize, usize),
    tasks: (usize, usize),
    sessions: usize,
}

pub fn config(text: &str) -> DiskConfig {
    text.parse().unwrap()
}

impl World {
    /// A machine with the disk `abc`, whose queues exist.
    pub fn new() -> Self {
        let machine = Machine::default();
        let store = StoreService::new(machine.clone(), DomainId(0));
        let disks = Disks::new(machine.clone(), store.clone());
        let media = Media::new(&machine, SECTORS, 900);
        disks.add_device("abc", Box::new(Device(Rc::clone(&media))), 900, ()).unwrap();
        assert!(disks.has_device("abc") && !disks.has_device("abd"));
        let nothing = Counted { frames: 0, disk_frames: 0, heap: 0, held: (0, 0), tasks: (0, 0), sessions: 0 };
        let mut world = Self { machine, store, disks, media, before: nothing };
        // The first disk in memory makes the queue of all of them.
        world.attach(99, "memory:4096,,xvda,w").unwrap();
        world.machine.run(world.disks.domain_died(99));
        world.before = world.count();
        world
    }

    pub fn attach(&self, domain: u16, text: &str) -> Result<(), String> {
        self.machine.run(self.disks.attach(domain, &format!("guest{domain}"), &config(text)))
    }

    /// A guest with this disk, connected.
    pub fn connected(&self, domain: u16, text: &str) -> (Guest, Front) {
        let mut guest = Guest::new(&self.machine, &self.store, domain);
        self.attach(domain, text).unwrap();
        let mut front = Front::new(config(text).vdev.number());
        front.connect(&mut guest);
        (guest, front)
    }

    pub fn listed(&self, domain: u16) -> Vec<Listed> {
        self.disks.list(domain)
    }

    /// Ends a domain as the manager does.
    pub fn end(&self, domain: u16) {
        self.machine.run(self.disks.domain_died(domain));
        assert_eq!(crate::front::left(&self.machine, &[domain]), 0, "pins and rings of domain {domain}");
        self.store.domain_shut_down(DomainId(domain));
        self.store.release(DomainId(domain)).unwrap();
        self.machine.rounds(10);
    }

    fn count(&self) -> Counted {
        let fake = &self.machine.fake;
        self.machine.rounds(3);
        Counted {
            frames: self.machine.frames(),
            disk_frames: self.machine.disk_frames(),
            heap: fake.reserved(),
            held: fake.held(),
            tasks: (fake.tasks(Class::Control), fake.tasks(Class::Data)),
            sessions: self.store.sessions(),
        }
    }

    /// All guests are gone: nothing of theirs is left.
    pub fn assert_clean(&self, domains: &[u16]) {
        assert_eq!(self.count(), self.before);
        assert_eq!((self.disks.pins(), self.machine.state.borrow().pins.len()), (0, 0));
        assert!(self.machine.state.borrow().rings.values().all(|count| *count == 0));
        let session = self.store.session();
        for domain in domains {
            for path in [
                format!("/local/domain/{domain}/device/vbd"),
                format!("/local/domain/0/backend/vbd/{domain}"),
                format!("/local/domain/0/error/backend/vbd/{domain}"),
            ] {
                let below = session.transaction(|t| t.list(&path)).unwrap_or_default();
                assert!(below.is_empty(), "{path}: {below:?}");
            }
        }
    }
}
