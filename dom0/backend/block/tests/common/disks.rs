//! Disks: an interval of a device, and one that lies partly in memory.

use std::cell::RefCell;
use std::rc::Rc;

use disk::{Discard, Disk, NoPlace, Overlay, Pages, Place, Shape};

use super::Machine;

/// Sectors of a device.
#[derive(Debug)]
pub struct Partition {
    pub first: u64,
    pub sectors: u64,
    pub volatile: bool,
    pub read_only: bool,
}

impl Partition {
    pub fn boxed(first: u64, sectors: u64) -> Box<dyn Disk> {
        Box::new(Self { first, sectors, volatile: true, read_only: false })
    }

    fn check(&self, write: bool, sector: u64, sectors: u64) -> Result<(), NoPlace> {
        match () {
            () if sector + sectors > self.sectors => Err(NoPlace::OutOfRange),
            () if write && self.read_only => Err(NoPlace::ReadOnly),
            () => Ok(()),
        }
    }
}

impl Disk for Partition {
    fn shape(&self) -> Shape {
        let Self { sectors, volatile, read_only, .. } = *self;
        let discard = Some(Discard { granularity: 4096, alignment: 0 });
        Shape { sectors, block_bytes: 512, physical_bytes: 4096, read_only, volatile, discard }
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        self.check(write, sector, sectors.into())?;
        Ok((Place::Device { sector: self.first + sector }, sectors))
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        self.check(true, sector, sectors)?;
        Ok(Some((self.first + sector, sectors)))
    }
}

/// Sectors of a cluster of [`Patchwork`].
const CLUSTER: u64 = 3;

/// A disk whose clusters lie in memory and on a device by turns. What was never written in memory reads as zeroes.
#[derive(Debug)]
pub struct Patchwork {
    pub device: Partition,
    /// The first frame of its memory.
    pub frame: u64,
    pub written: Vec<bool>,
    /// Nothing is on a device.
    pub memory_only: bool,
}

impl Patchwork {
    pub fn boxed(first: u64, sectors: u64, frame: u64, memory_only: bool) -> Box<dyn Disk> {
        let device = Partition { first, sectors, volatile: !memory_only, read_only: false };
        Box::new(Self { device, frame, written: vec![false; sectors as usize], memory_only })
    }
}

impl Disk for Patchwork {
    fn shape(&self) -> Shape {
        Shape { discard: None, ..self.device.shape() }
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        self.device.check(write, sector, sectors.into())?;
        let cluster = sector / CLUSTER;
        let run = (sectors).min((CLUSTER - sector % CLUSTER) as u32);
        if cluster.is_multiple_of(2) && !self.memory_only {
            return Ok((Place::Device { sector: self.device.first + sector }, run));
        }
        let run = run.min(8 - (sector % 8) as u32);
        let range = sector as usize..(sector as usize + run as usize);
        if write {
            self.written[range].fill(true);
        } else if !self.written[range.start] {
            let count = self.written[range].iter().take_while(|written| !**written).count();
            return Ok((Place::Zeroes, count as u32));
        } else {
            let count = self.written[range].iter().take_while(|written| **written).count();
            let place = Place::Memory { page: self.frame + sector / 8, offset: (sector % 8 * 512) as u16 };
            return Ok((place, count as u32));
        }
        Ok((Place::Memory { page: self.frame + sector / 8, offset: (sector % 8 * 512) as u16 }, run))
    }

    fn discard(&mut self, _: u64, _: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        Ok(None)
    }
}

/// Frames of dom0 that overlays take and give back, so that one guest's page becomes another's.
#[derive(Clone)]
pub struct Pool {
    pub machine: Machine,
    pub free: Rc<RefCell<Vec<u64>>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool of {}", self.free.borrow().len())
    }
}

impl Pages for Pool {
    fn take(&mut self) -> Option<u64> {
        let page = self.free.borrow_mut().pop()?;
        self.machine.0.borrow_mut().frames[page as usize].fill(0);
        Some(page)
    }

    fn give_back(&mut self, page: u64) {
        let mut free = self.free.borrow_mut();
        assert!(!free.contains(&page));
        // The one that was given back last is the next to be taken.
        free.push(page);
    }
}

/// An overlay that outlives its vbd.
#[derive(Clone, Debug)]
pub struct Layered(pub Rc<RefCell<Option<Overlay<Partition, Pool>>>>);

impl Layered {
    /// Over sectors of a device that are only read.
    pub fn new(first: u64, sectors: u64, pool: &Pool, limit: u64) -> Self {
        let below = Partition { first, sectors, volatile: true, read_only: true };
        Self(Rc::new(RefCell::new(Some(Overlay::new(below, pool.clone(), limit).expect("there is memory")))))
    }

    pub fn dissolve(&self) {
        self.0.borrow_mut().take().expect("dissolved once").dissolve();
    }

    fn with<T>(&self, what: impl FnOnce(&mut Overlay<Partition, Pool>) -> T) -> T {
        what(self.0.borrow_mut().as_mut().expect("not dissolved"))
    }
}

impl Disk for Layered {
    fn shape(&self) -> Shape {
        self.with(|overlay| overlay.shape())
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        self.with(|overlay| overlay.place(write, sector, sectors))
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        self.with(|overlay| overlay.discard(sector, sectors))
    }
}
