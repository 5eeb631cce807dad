//! The clusters of an overlay: a tree of three levels. Tables below the top are made when a sector under them is first written.
//!
//! ```text
//! top      one entry for each 4,096 clusters (16 MiB), made with the map
//! middle   64 entries, 1 KiB
//! leaf     64 clusters (256 KiB), 512 bytes
//! ```
//!
//! A tree was preferred to a hash table: a guest could choose sectors that collide, and a table that doubles stops everybody
//! while its entries move.

use alloc::boxed::Box;
use alloc::vec::Vec;

/// Entries of a middle table and of a leaf.
const FAN: u64 = 64;
/// Bytes of a leaf.
const LEAF_BYTES: u64 = FAN * size_of::<Cluster>() as u64;
/// Bytes of a middle table.
const MIDDLE_BYTES: u64 = FAN * size_of::<Option<Leaf>>() as u64;

/// A cluster. Bits 0 to 7 mark the sectors that are ours, bits 8 to 15 those that are zero; bits 16 to 63 are the page's
/// number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cluster(u64);

impl Cluster {
    const fn new(page: u64, ours: u8, zero: u8) -> Self {
        Self(page << 16 | (zero as u64) << 8 | ours as u64)
    }

    /// Returns the cluster's page. `None` if no sector of the cluster is ours.
    pub(super) const fn page(self) -> Option<u64> {
        if self.ours() == 0 { None } else { Some(self.0 >> 16) }
    }

    /// Returns the bits of the sectors that are ours.
    pub(super) const fn ours(self) -> u8 {
        self.0.to_le_bytes()[0]
    }

    /// Returns the bits of the sectors that were given back, and read as zeroes.
    pub(super) const fn zero(self) -> u8 {
        self.0.to_le_bytes()[1]
    }

    /// Makes the sectors in `mask` ours, in `page`.
    pub(super) const fn write(&mut self, page: u64, mask: u8) {
        *self = Self::new(page, self.ours() | mask, self.zero() & !mask);
    }

    /// Makes zero the sectors in `mask` that are ours. Returns the page if this leaves no sector of the cluster ours, else
    /// `None`.
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

/// Returns a table of `count` empty entries. `None` without memory for it.
fn table<T: Default>(count: u64) -> Option<Box<[T]>> {
    let count = usize::try_from(count).ok()?;
    let mut entries = Vec::new();
    entries.try_reserve_exact(count).ok()?;
    entries.resize_with(count, T::default);
    Some(entries.into_boxed_slice())
}

/// Returns the index of a cluster in its top table, middle table and leaf. `None` if an index is too large for the machine.
fn path(cluster: u64) -> Option<[usize; 3]> {
    let index = |number: u64| usize::try_from(number).ok();
    Some([index(cluster / (FAN * FAN))?, index(cluster / FAN % FAN)?, index(cluster % FAN)?])
}

impl Map {
    /// Makes a map of `clusters` clusters without any leaf. `None` without memory for the topmost table.
    pub(super) fn new(clusters: u64) -> Option<Self> {
        Some(Self { top: table(clusters.div_ceil(FAN * FAN))?, bytes: 0 })
    }

    /// Returns the bytes of the tables below the top.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    fn leaf(&self, cluster: u64) -> Option<&Leaf> {
        let [top, middle, _] = path(cluster)?;
        self.top.get(top)?.as_ref()?.get(middle)?.as_ref()
    }

    /// Returns a cluster. All sectors of a cluster without a leaf are base.
    pub(super) fn get(&self, cluster: u64) -> Cluster {
        let entry = self.leaf(cluster).zip(path(cluster)).and_then(|(leaf, [.., last])| leaf.get(last));
        entry.copied().unwrap_or_default()
    }

    /// Returns whether there is no leaf for a cluster. Then all clusters up to [`Map::end_of_leaf`] are base.
    pub(super) fn is_empty_at(&self, cluster: u64) -> bool {
        self.leaf(cluster).is_none()
    }

    /// Returns the first cluster of the leaf after the leaf of `cluster`.
    pub(super) const fn end_of_leaf(cluster: u64) -> u64 {
        (cluster / FAN + 1) * FAN
    }

    /// Returns the entry of a cluster. Missing tables are made, of at most `room` bytes. `None` without room or memory.
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

    /// Calls `f` with the index and the entry of each cluster from `first` up to, not including, `end` that has a leaf.
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
