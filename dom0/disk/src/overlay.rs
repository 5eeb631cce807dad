//! Copy on write in memory. Written sectors go to pages of the overlay; other sectors are read from a disk below, which is
//! never written.
//!
//! Eight sectors make a cluster. A cluster has at most one page. Each sector of a cluster is in one of three states:
//!
//! ```text
//! base   never written: it is read from the disk below
//! ours   written: it is in the cluster's page
//! zero   written, then given back: it reads as zeroes, never again as the sector of the disk below
//!
//! write    base, zero -> ours     a page is taken if the cluster has none; nothing is copied from the disk below
//! discard  ours -> zero           base stays base: a discard need do nothing, so it costs no memory
//!                                 when no sector of the cluster is ours any more, the page is given back
//! ```
//!
//! One limit in bytes holds for the pages and the tables that lead to them, so a guest that writes single sectors all over the
//! disk reaches the limit, too. The topmost table is not counted: a disk of 1 TiB has one of 1 MiB ([`map`]).

mod map;

use crate::memory::PAGE;
use crate::{Discard, Disk, NoPlace, Place, SECTOR, Shape};
use core::fmt;
use map::{Cluster, Map};

/// Sectors of a cluster.
const CLUSTER: u64 = PAGE / SECTOR as u64;

/// Where an overlay gets its pages.
pub trait Pages: fmt::Debug {
    /// Takes a page of zeroes. Returns the number by which grant copies name it; `None` if no page is free.
    fn take(&mut self) -> Option<u64>;

    /// Gives a page back. No copy from or to the page is outstanding.
    fn give_back(&mut self, page: u64);
}

/// A writable disk in memory, over a disk that is only read.
#[derive(Debug)]
pub struct Overlay<B, P> {
    base: B,
    pages: P,
    map: Map,
    shape: Shape,
    /// How many pages the overlay has.
    taken: u64,
    /// The maximum of [`Overlay::held_bytes`].
    limit: u64,
}

/// The state of a sector (see the module). `Ours` has the number of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Base,
    Ours(u64),
    Zero,
}

impl<B: Disk, P: Pages> Overlay<B, P> {
    /// Makes an overlay of at most `limit` bytes. Others may read the disk below, and nobody may write it.
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

    /// Returns the bytes that count against the limit: pages, and tables below the topmost.
    #[must_use]
    pub const fn held_bytes(&self) -> u64 {
        self.taken * PAGE + self.map.bytes()
    }

    /// Gives back all pages. What was written is lost.
    pub fn dissolve(mut self) {
        let pages = &mut self.pages;
        self.map.each(0, u64::MAX, |_, cluster| cluster.page().into_iter().for_each(|page| pages.give_back(page)));
    }

    fn room(&self) -> u64 {
        self.limit.saturating_sub(self.held_bytes())
    }

    /// Returns the state of `sector`, and how many of the `wanted` sectors from there on have that state. A run in state `Ours`
    /// ends with its cluster.
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

    /// Gives the sectors in `mask` of the cluster of `sector` the state `Ours`. Returns the number of the cluster's page.
    fn make_ours(&mut self, sector: u64, mask: u8) -> Result<u64, NoPlace> {
        let room = self.room();
        let cluster = self.map.make(sector / CLUSTER, room).ok_or(NoPlace::NoRoom)?;
        if let Some(page) = cluster.page() {
            cluster.write(page, mask);
            return Ok(page);
        }
        // New tables for the entry may have used some of the room.
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

/// Returns the bits of `count` sectors of a cluster, from its sector `first` on.
fn mask(first: u64, count: u64) -> u8 {
    let bits = (1u64 << count.min(CLUSTER)) - 1;
    u8::try_from((bits << first.min(CLUSTER)) & 0xff).unwrap_or(0)
}

/// Returns where a sector begins in its page, in bytes.
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

    /// Takes a step for each cluster in the leaves of the interval, so a caller with bounded time splits a large interval.
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
