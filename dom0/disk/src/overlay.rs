//! Copy on write in memory: what is written goes to pages of ours, the rest is read from a disk that is never written.
//!
//! Eight sectors make a cluster, which has one page or none. Each sector of it is in one of three states:
//!
//! ```text
//! base   read from the disk below: nobody has written it
//! ours   in the page
//! zero   written and given back: it reads as zeroes, never again as what the disk below has
//!
//! write    base, zero -> ours     a page is taken if the cluster has none; nothing is copied up
//! discard  ours -> zero           base stays base: a discard may do nothing, and so costs no memory
//!                                 the page is given back with the last sector of ours in it
//! ```
//!
//! A limit in bytes holds for pages and for what describes them together, so a guest that writes one sector here and there
//! comes to it as well. Beside it, a disk of 1 TiB costs 1 MiB for the topmost table ([`map`]).

mod map;

use crate::memory::PAGE;
use crate::{Discard, Disk, NoPlace, Place, SECTOR, Shape};
use core::fmt;
use map::{Cluster, Map};

/// Sectors of a cluster.
const CLUSTER: u64 = PAGE / SECTOR as u64;

/// Where pages of ours come from.
pub trait Pages: fmt::Debug {
    /// Takes a page of zeroes: its number among the first domain's. `None` if no more are to be had.
    fn take(&mut self) -> Option<u64>;

    /// Gives one back. Nobody copies from or to it any more.
    fn give_back(&mut self, page: u64);
}

/// What is written over a disk that is not.
#[derive(Debug)]
pub struct Overlay<B, P> {
    base: B,
    pages: P,
    map: Map,
    shape: Shape,
    /// Pages taken.
    taken: u64,
    /// The most bytes that pages and tables may have.
    limit: u64,
}

/// Where a run of sectors is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Base,
    Ours(u64),
    Zero,
}

impl<B: Disk, P: Pages> Overlay<B, P> {
    /// An overlay of at most `limit` bytes. The disk below is read, whoever else does so, and must not change.
    ///
    /// # Errors
    /// [`NoPlace::NoRoom`]: no memory is left for the topmost table.
    pub fn new(base: B, pages: P, limit: u64) -> Result<Self, NoPlace> {
        let below = base.shape();
        let shape = Shape {
            physical_bytes: below.physical_bytes.max(4096),
            read_only: false,
            volatile: false,
            discard: Some(Discard { granularity: 4096, alignment: 0 }),
            ..below
        };
        let map = Map::new(below.sectors.div_ceil(CLUSTER)).ok_or(NoPlace::NoRoom)?;
        Ok(Self { base, pages, map, shape, taken: 0, limit })
    }

    /// Bytes that count against the limit.
    #[must_use]
    pub const fn held_bytes(&self) -> u64 {
        self.taken * PAGE + self.map.bytes()
    }

    /// Gives back all pages, and with them what was written.
    pub fn dissolve(mut self) {
        let pages = &mut self.pages;
        self.map.each(0, u64::MAX, |_, cluster| cluster.page().into_iter().for_each(|page| pages.give_back(page)));
    }

    fn room(&self) -> u64 {
        self.limit.saturating_sub(self.held_bytes())
    }

    /// The state of `sector`, and for how many of the `wanted` sectors from it on it is the same. Runs of ours end with their
    /// cluster.
    fn run(&self, sector: u64, wanted: u32) -> (State, u32) {
        let end = sector + u64::from(wanted);
        let state = state_of(self.map.get(sector / CLUSTER), sector);
        let mut at = sector;
        while at < end {
            let index = at / CLUSTER;
            if state == State::Base && self.map.is_empty_at(index) {
                at = Map::end_of_leaf(index) * CLUSTER;
                continue;
            }
            let cluster = self.map.get(index);
            let end_of_cluster = (index + 1) * CLUSTER;
            while at < end_of_cluster && state_of(cluster, at) == state {
                at += 1;
            }
            if at < end_of_cluster || matches!(state, State::Ours(_)) {
                break;
            }
        }
        (state, u32::try_from(at.min(end) - sector).unwrap_or(wanted))
    }

    /// Makes sectors of one cluster ours.
    fn make_ours(&mut self, sector: u64, mask: u8) -> Result<u64, NoPlace> {
        let room = self.room();
        let cluster = self.map.make(sector / CLUSTER, room).ok_or(NoPlace::NoRoom)?;
        if let Some(page) = cluster.page() {
            cluster.write(page, mask);
            return Ok(page);
        }
        // Making the entry may have used some of the room.
        if self.room() < PAGE {
            return Err(NoPlace::NoRoom);
        }
        let page = self.pages.take().ok_or(NoPlace::NoRoom)?;
        self.taken += 1;
        if let Some(cluster) = self.map.make(sector / CLUSTER, 0) {
            cluster.write(page, mask);
        }
        Ok(page)
    }
}

fn state_of(cluster: Cluster, sector: u64) -> State {
    let bit = mask(sector % CLUSTER, 1);
    match cluster.page() {
        Some(page) if cluster.ours() & bit != 0 => State::Ours(page),
        _ if cluster.zero() & bit != 0 => State::Zero,
        _ => State::Base,
    }
}

/// The bits of `count` sectors of a cluster from `first` on.
fn mask(first: u64, count: u64) -> u8 {
    let bits = (1u64 << count.min(CLUSTER)) - 1;
    u8::try_from((bits << first.min(CLUSTER)) & 0xff).unwrap_or(0)
}

/// Where a sector is in its page.
fn offset(sector: u64) -> u16 {
    u16::try_from(sector % CLUSTER * SECTOR as u64).unwrap_or(0)
}

impl<B: Disk, P: Pages> Disk for Overlay<B, P> {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        self.shape.judge(write, sector, u64::from(sectors))?;
        if write {
            let here = u64::from(sectors).min(CLUSTER - sector % CLUSTER);
            let page = self.make_ours(sector, mask(sector % CLUSTER, here))?;
            return Ok((Place::Memory { page, offset: offset(sector) }, u32::try_from(here).unwrap_or(1)));
        }
        match self.run(sector, sectors) {
            (State::Base, run) => self.base.place(false, sector, run),
            (State::Ours(page), run) => Ok((Place::Memory { page, offset: offset(sector) }, run)),
            (State::Zero, run) => Ok((Place::Zeroes, run)),
        }
    }

    /// Takes a step for each cluster there is among the sectors: who must not be long splits a large interval.
    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        self.shape.judge(true, sector, sectors)?;
        let end = sector + sectors;
        let (pages, taken) = (&mut self.pages, &mut self.taken);
        self.map.each(sector / CLUSTER, end.div_ceil(CLUSTER), |index, cluster| {
            let first = sector.max(index * CLUSTER);
            let last = end.min((index + 1) * CLUSTER);
            if let Some(page) = cluster.give_back(mask(first % CLUSTER, last - first)) {
                pages.give_back(page);
                *taken -= 1;
            }
        });
        Ok(None)
    }
}
