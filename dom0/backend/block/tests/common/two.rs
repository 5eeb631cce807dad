//! Two guests with a partition each on one device.

use std::cell::RefCell;
use std::rc::Rc;

use block_backend::{Event, Limits, Queue, VbdId};

use super::device::Media;
use super::disks::Partition;
use super::{Device, Front, Machine, turns};
use test_random::Random;

/// A device of 2,048 sectors with a partition of 1,024 for each of two guests.
pub struct Two {
    pub machine: Machine,
    pub media: Rc<RefCell<Media>>,
    pub queue: Queue<Machine>,
    pub fronts: [Front; 2],
    pub ids: [VbdId; 2],
    pub now: u64,
}

impl Two {
    pub fn new() -> Self {
        let machine = Machine::new(Random::seeded(1), 2);
        let media = Media::new(2048);
        let (mut queue, _) = machine.queue(Some(Device::new(&machine, &media)));
        let fronts = [0, 1].map(|domain| Front::new(domain, 1));
        let ids = [0, 1].map(|n| {
            let disk = Partition::boxed(n as u64 * 1024, 1024);
            machine.connect(&mut queue, &fronts[n], disk, Limits::default())
        });
        Self { machine, media, queue, fronts, ids, now: 1 }
    }

    pub fn run(&mut self) -> Vec<Event> {
        self.ids.iter().for_each(|id| self.queue.attend(*id));
        self.now += 1000;
        let (_, events) = turns(&mut self.queue, &mut self.machine, self.now);
        events
    }

    /// Runs, and answers the statuses of a guest, oldest request first.
    pub fn statuses(&mut self, guest: usize) -> Vec<i16> {
        self.run();
        let mut answers = self.fronts[guest].answers();
        answers.sort_unstable();
        answers.into_iter().map(|(_, status)| status).collect()
    }

    pub fn fill(&mut self, guest: usize, page: usize, byte: u8) {
        self.machine.0.borrow_mut().guests[guest][page].fill(byte);
    }

    pub fn page(&self, guest: usize, page: usize) -> Vec<u8> {
        self.machine.0.borrow().guests[guest][page].to_vec()
    }
}
