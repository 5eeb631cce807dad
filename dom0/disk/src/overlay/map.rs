//! Which clusters there are: a tree of three levels, of which only what is needed is there.
//!
//! ```text
//! top      one entry for each 4,096 clusters (16 MiB), made once
//! middle   64 entries, 1 KiB
//! leaf     64 clusters (256 KiB), 512 bytes
//! ```
//!
//! A tree was preferred to a hash table: guests choose the sectors, so they could choose them to collide; and a table that
//! doubles stops everybody while it is filled anew.

use alloc::boxed::Box;
use alloc::vec::Vec;

/// Entries of a middle table and of a leaf.
const FAN: u64 = 64;
/// Bytes of a leaf.
const LEAF_BYTES: u64 = FAN * size_of::<Cluster>() as u64;
/// Bytes of a middle table.
const MIDDLE_BYTES: u64 = FAN * size_of::<Option<Leaf>>() as u64;

/// A cluster: bits 0 to 7 say which sectors are ours, bits 8 to 15 which are zero, the rest is the number of the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cluster(u64);

impl Cluster {
    const fn new(page: u64, ours: u8, zero: u8) -> Self {
        Self(page << 16 | (zero as u64) << 8 | ours as u64)
    }

    /// Its page; it has one while a sector is ours.
    pub(super) const fn page(self) -> Option<u64> {
        if self.ours() == 0 { None } else { Some(self.0 >> 16) }
    }

    /// The sectors that are ours.
    pub(super) const fn ours(self) -> u8 {
        self.0.to_le_bytes()[0]
    }

    /// The sectors that read as zeroes.
    pub(super) const fn zero(self) -> u8 {
        self.0.to_le_bytes()[1]
    }

    /// Makes sectors ours, in `page`.
    pub(super) const fn write(&mut self, page: u64, mask: u8) {
        *self = Self::new(page, self.ours() | mask, self.zero() & !mask);
    }

    /// Makes those of the sectors that are ours zero. Answers the page if no sector in it is ours any more.
    pub(super) const fn give_back(&mut self, mask: u8) -> Option<u64> {
        let page = self.page();
        let (gone, left) = (self.ours() & mask, self.ours() & !mask);
        *self = Self::new(if left == 0 { 0 } else { self.0 >> 16 }, left, self.zero() | gone);
        if left == 0 { page } else { None }
    }
}

type Leaf = Box<[Cluster]>;
type Middle = Box<[Option<Leaf>]>;

/// The clusters of a disk.
#[derive(Debug)]
pub(super) struct Map {
    top: Box<[Option<Middle>]>,
    /// Bytes of the tables below the top.
    bytes: u64,
}

/// `count` entries that are nothing yet, if there is memory for them.
fn table<T: Default>(count: u64) -> Option<Box<[T]>> {
    let count = usize::try_from(count).ok()?;
    let mut entries = Vec::new();
    entries.try_reserve_exact(count).ok()?;
    entries.resize_with(count, T::default);
    Some(entries.into_boxed_slice())
}

/// The entries of the tables of each level that lead to a cluster.
fn path(cluster: u64) -> Option<[usize; 3]> {
    let index = |number: u64| usize::try_from(number).ok();
    Some([index(cluster / (FAN * FAN))?, index(cluster / FAN % FAN)?, index(cluster % FAN)?])
}

impl Map {
    /// A map of `clusters` clusters, none of which is there. `None` without memory for it.
    pub(super) fn new(clusters: u64) -> Option<Self> {
        Some(Self { top: table(clusters.div_ceil(FAN * FAN))?, bytes: 0 })
    }

    /// Bytes of the tables below the top.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    fn leaf(&self, cluster: u64) -> Option<&Leaf> {
        let [top, middle, _] = path(cluster)?;
        self.top.get(top)?.as_ref()?.get(middle)?.as_ref()
    }

    /// A cluster; one that is not there is all base.
    pub(super) fn get(&self, cluster: u64) -> Cluster {
        let entry = self.leaf(cluster).zip(path(cluster)).and_then(|(leaf, [.., last])| leaf.get(last));
        entry.copied().unwrap_or_default()
    }

    /// Whether no cluster is there up to [`Map::end_of_leaf`].
    pub(super) fn is_empty_at(&self, cluster: u64) -> bool {
        self.leaf(cluster).is_none()
    }

    /// The first cluster that is not in the same leaf.
    pub(super) const fn end_of_leaf(cluster: u64) -> u64 {
        (cluster / FAN + 1) * FAN
    }

    /// The entry of a cluster, made with tables of at most `room` bytes if it is not there. `None` without room or memory.
    pub(super) fn make(&mut self, cluster: u64, mut room: u64) -> Option<&mut Cluster> {
        let [top, middle, last] = path(cluster)?;
        let top = self.top.get_mut(top)?;
        if top.is_none() {
            *top = Some(table(FAN).filter(|_| MIDDLE_BYTES <= room)?);
            self.bytes += MIDDLE_BYTES;
            room -= MIDDLE_BYTES;
        }
        let entry = top.as_mut()?.get_mut(middle)?;
        if entry.is_none() {
            *entry = Some(table(FAN).filter(|_| LEAF_BYTES <= room)?);
            self.bytes += LEAF_BYTES;
        }
        entry.as_mut()?.get_mut(last)
    }

    /// Does `f` with each cluster in the leaves that are there, from `first` up to `end`.
    pub(super) fn each(&mut self, first: u64, end: u64, mut f: impl FnMut(u64, &mut Cluster)) {
        let skip = usize::try_from(first / (FAN * FAN)).unwrap_or(usize::MAX);
        let mut base = first / (FAN * FAN) * (FAN * FAN);
        for middle in self.top.iter_mut().skip(skip) {
            if base >= end {
                return;
            }
            for (leaf, at) in middle.iter_mut().flatten().zip((base..).step_by(64)) {
                let entries = leaf.iter_mut().flat_map(|leaf| leaf.iter_mut()).zip(at..);
                entries.filter(|(_, index)| (first..end).contains(index)).for_each(|(entry, index)| f(index, entry));
            }
            base += FAN * FAN;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_has_its_page_while_a_sector_is_ours() {
        let mut cluster = Cluster::default();
        assert_eq!((cluster.page(), cluster.ours(), cluster.zero()), (None, 0, 0));
        cluster.write(0, 0b0011);
        assert_eq!((cluster.page(), cluster.ours(), cluster.zero()), (Some(0), 0b0011, 0));
        assert_eq!(cluster.give_back(0b0101), None);
        assert_eq!((cluster.page(), cluster.ours(), cluster.zero()), (Some(0), 0b0010, 0b0001));
        assert_eq!(cluster.give_back(0b1110), Some(0));
        assert_eq!((cluster.page(), cluster.ours(), cluster.zero()), (None, 0, 0b0011));
        cluster.write((1 << 48) - 1, 0b0001);
        assert_eq!((cluster.page(), cluster.zero()), (Some((1 << 48) - 1), 0b0010));
    }

    #[test]
    fn tables_are_made_only_where_there_is_room() {
        let mut map = Map::new(10_000).unwrap();
        assert!(map.make(9_999, MIDDLE_BYTES - 1).is_none());
        assert_eq!(map.bytes(), 0);
        assert!(map.make(9_999, MIDDLE_BYTES + LEAF_BYTES - 1).is_none());
        assert_eq!(map.bytes(), MIDDLE_BYTES);
        map.make(9_999, LEAF_BYTES).unwrap().write(5, 1);
        assert!(map.make(9_990, 0).is_some());
        assert!(map.make(100_000, u64::MAX).is_none());
        assert_eq!(map.get(9_999).page(), Some(5));
        assert!(map.is_empty_at(0) && !map.is_empty_at(9_990));
        let mut seen = Vec::new();
        map.each(9_995, 10_001, |index, cluster| seen.push((index, cluster.page())));
        assert_eq!(seen.len(), 6);
        assert_eq!(seen[4], (9_999, Some(5)));
    }
}
