//! A store, disks and a device, and what must be left of a guest that is gone: nothing.

use std::cell::RefCell;
use std::rc::Rc;

use services::block::{Disks, Listed};
use services::store::StoreService;
use toolstack::DomainId;
use toolstack::disk::DiskConfig;

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::common::leaks::{self, assert_no_nodes, release};
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

/// What can leak: frames, disk frames, and what any service can leak.
type Counted = (usize, usize, leaks::Counted);

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
        let mut world = Self { machine, store, disks, media, before: Counted::default() };
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
        release(&self.machine, &self.store, domain);
    }

    fn count(&self) -> Counted {
        let any = leaks::count(&self.machine, &self.store);
        (self.machine.frames(), self.machine.disk_frames(), any)
    }

    /// All guests are gone: nothing of theirs is left.
    pub fn assert_clean(&self, domains: &[u16]) {
        assert_eq!(self.count(), self.before);
        assert_eq!((self.disks.pins(), self.machine.state.borrow().pins.len()), (0, 0));
        assert!(self.machine.state.borrow().rings.values().all(|count| *count == 0));
        assert_no_nodes(&self.store, "vbd", domains);
    }
}
