//! Disks: an interval of a device, and one that lies partly in memory.

use disk::{Discard, Disk, NoPlace, Place, Shape};

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
