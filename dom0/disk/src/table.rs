//! Partition tables: GPT (UEFI 2.10, section 5) and MBR with extended partitions.
//!
//! A guest may have written the table, so the reader is bounded: at most 256 entries, of which 128 used ones are noted, and at
//! most 64 links of an extended partition; the checksums of a GPT must be right. The table is read each time a partition is
//! attached; later changes to the table do not move an attached partition. [`Reader`] notes what the table says, and
//! [`Table::partition`] refuses partitions that contradict the rest of the table or the disk.
//!
//! The reader does no input itself. The caller asks [`Reader::wants`], reads these sectors, and calls [`Reader::give`], until
//! [`Reader::wants`] returns `None`.
//!
//! ```text
//! first block: MBR -> protective entry -> header 1 -> entries of 1 -> done
//!                                           | damaged    | damaged
//!                                           +------------+-> header 2 (last block) -> entries of 2 -> done
//!                  -> extended entry   -> link -> link -> ... -> done
//! ```

mod gpt;
mod mbr;

use crate::Shape;
use alloc::vec::Vec;
use core::fmt;

/// The maximum number of partitions that are noted. Partitions beyond it are left out.
pub const MOST: usize = 128;
/// The maximum number of entries of a GPT, used or not: 128 is usual, some images for CDs have 248.
const MOST_ENTRIES: u32 = 256;
/// The maximum number of links in the chain of an extended partition.
pub const LINKS: usize = 64;
/// An MBR with the longest chain fits: four entries of the MBR, and 64 logical partitions.
const _: () = assert!(LINKS + 4 <= MOST);

/// Returns `N` bytes at an offset; zeroes if `from` ends before them.
fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    from.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn number32(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(from, at))
}

fn number64(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(from, at))
}

/// Which kind of table a disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A GUID partition table.
    Gpt,
    /// A master boot record.
    Mbr,
}

/// An interval of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// The first sector.
    pub first: u64,
    /// The number of sectors.
    pub sectors: u64,
}

impl Interval {
    const fn end(self) -> u64 {
        self.first.saturating_add(self.sectors)
    }

    const fn meets(self, other: Self) -> bool {
        let common = self.first < other.end() && other.first < self.end();
        common && self.sectors > 0 && other.sectors > 0
    }

    const fn holds(self, other: Self) -> bool {
        self.first <= other.first && other.end() <= self.end()
    }
}

/// What an entry of a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// A partition.
    Plain,
    /// An extended partition, which contains the logical partitions.
    Extended,
    /// A logical partition, within the extended partition.
    Logical,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    number: u32,
    interval: Interval,
    role: Role,
}

/// What is wrong with a table that can still be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The first GPT header or its entries are damaged; the copy at the end of the disk is used.
    FirstCopy,
    /// The chain of the extended partition is broken or too long: a link or its logical partition is damaged, lies outside the
    /// extended partition, or was seen before; or there are more than [`LINKS`] links. Logical partitions from there on are
    /// left out.
    Chain,
}

/// Why a disk has no partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoTable {
    /// The disk is smaller than a block, or its first block is no MBR.
    Missing,
    /// The first block cannot be read.
    Unreadable,
    /// Both copies of a GPT are damaged.
    Damaged,
    /// No memory is left for the table.
    NoRoom,
}

impl fmt::Display for NoTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "the disk has no partition table",
            Self::Unreadable => "the first block cannot be read",
            Self::Damaged => "both copies of the partition table are damaged",
            Self::NoRoom => "no memory is left for the partition table",
        })
    }
}

/// Why a table has no such partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPartition {
    /// The table does not list the partition.
    Missing,
    /// The number is that of an extended partition: only the logical partitions in it can be used.
    Extended,
    /// The partition is empty, or begins or ends outside the usable sectors: with an MBR, the disk after its first block; with
    /// a GPT, the blocks that its header names.
    BeyondTheEnd,
    /// The partition has a sector in common with the partition of this number.
    Overlaps(u32),
    /// The partition contains a link of the chain of logical partitions, so its owner could change the table.
    HoldsTable,
}

impl fmt::Display for NoPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("there is no such partition"),
            Self::Extended => f.write_str("it is an extended partition"),
            Self::BeyondTheEnd => f.write_str("it lies outside what the table or the disk has"),
            Self::Overlaps(other) => write!(f, "it overlaps partition {other}"),
            Self::HoldsTable => f.write_str("it contains a part of the partition table"),
        }
    }
}

/// What a partition table says.
#[derive(Clone, Debug)]
pub struct Table {
    kind: Kind,
    flaw: Option<Flaw>,
    entries: Vec<Entry>,
    /// The first sectors of the links of the extended partition.
    links: Vec<u64>,
    /// The sectors that partitions may have.
    usable: Interval,
}

impl Table {
    fn with_room(usable: Interval) -> Option<Self> {
        let mut table = Self { kind: Kind::Mbr, flaw: None, entries: Vec::new(), links: Vec::new(), usable };
        table.entries.try_reserve_exact(MOST).ok()?;
        table.links.try_reserve_exact(LINKS).ok()?;
        Some(table)
    }

    /// Notes an entry. Entries beyond the first [`MOST`] are left out.
    fn note(&mut self, number: u32, interval: Interval, role: Role) {
        if self.entries.len() < MOST {
            self.entries.push(Entry { number, interval, role });
        }
    }

    /// Returns the kind of the table.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns what is wrong with the table, for a warning. `None` if nothing is.
    #[must_use]
    pub const fn flaw(&self) -> Option<Flaw> {
        self.flaw
    }

    /// Returns the numbers of the partitions, as Linux counts them: logical partitions from 5 on. Extended partitions are left
    /// out.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.entries.iter().filter(|entry| entry.role != Role::Extended).map(|entry| entry.number)
    }

    /// Returns the interval of a partition.
    ///
    /// # Errors
    /// Why the partition cannot be used.
    pub fn partition(&self, number: u32) -> Result<Interval, NoPartition> {
        let index = self.entries.iter().position(|entry| entry.number == number).ok_or(NoPartition::Missing)?;
        let entry = self.entries.get(index).ok_or(NoPartition::Missing)?;
        if entry.role == Role::Extended {
            return Err(NoPartition::Extended);
        }
        if entry.interval.sectors == 0 || !self.usable.holds(entry.interval) {
            return Err(NoPartition::BeyondTheEnd);
        }
        let inside = |other: &Entry| entry.role == Role::Logical && other.role == Role::Extended;
        let others = self.entries.iter().enumerate().filter(|(at, other)| *at != index && !inside(other));
        for (_, other) in others {
            if entry.interval.meets(other.interval) {
                return Err(NoPartition::Overlaps(other.number));
            }
        }
        let holds_link = |first: &u64| entry.interval.meets(Interval { first: *first, sectors: 1 });
        if self.links.iter().any(holds_link) {
            return Err(NoPartition::HoldsTable);
        }
        Ok(entry.interval)
    }
}

/// Reads the partition table of a disk, step by step.
#[derive(Debug)]
pub struct Reader {
    table: Table,
    /// Sectors of a logical block: the unit of all numbers in a table.
    unit: u64,
    sectors: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The first block is wanted.
    First,
    /// The header of this copy of a GPT is wanted.
    Header(gpt::Copy),
    /// The entries that this header leads to are wanted.
    Entries(gpt::Copy, gpt::Header),
    /// The link of the extended partition at this sector is wanted.
    Link(mbr::Chain, u64),
    /// Nothing is wanted.
    Done(Result<(), NoTable>),
}

impl Reader {
    /// Begins to read the table of a disk of this shape.
    ///
    /// # Errors
    /// [`NoTable::NoRoom`]: no memory is left for the table.
    pub fn new(shape: Shape) -> Result<Self, NoTable> {
        let unit = u64::from(shape.block_bytes / 512).max(1);
        let usable = Interval { first: unit, sectors: shape.sectors.saturating_sub(unit) };
        let table = Table::with_room(usable).ok_or(NoTable::NoRoom)?;
        let state = if shape.sectors < unit { State::Done(Err(NoTable::Missing)) } else { State::First };
        Ok(Self { table, unit, sectors: shape.sectors, state })
    }

    /// Returns what to read next: the first sector, and the number of sectors. `None` at the end. Entries are at most 64
    /// sectors, rounded up to a block; all else is one block.
    #[must_use]
    pub fn wants(&self) -> Option<(u64, u32)> {
        let block = |sector| Some((sector, u32::try_from(self.unit).ok()?));
        match &self.state {
            State::First => block(0),
            State::Header(copy) => block(self.header_sector(*copy)),
            State::Entries(_, header) => {
                let sectors = header.entries_bytes().div_ceil(self.unit * 512) * self.unit;
                Some((header.entries.checked_mul(self.unit)?, u32::try_from(sectors).ok()?))
            }
            State::Link(_, sector) => block(*sector),
            State::Done(_) => None,
        }
    }

    /// Takes the bytes of the sectors that were wanted; an empty slice if they cannot be read. Bytes beyond those are ignored.
    pub fn give(&mut self, bytes: &[u8]) {
        let state = core::mem::replace(&mut self.state, State::Done(Ok(())));
        self.state = match state {
            State::First => self.first_block(bytes),
            State::Header(copy) => {
                let (block, blocks) = (self.header_block(copy), self.sectors / self.unit);
                let header = gpt::Header::parse(bytes, block, blocks, self.unit);
                header.map_or_else(|| self.other_copy(copy), |header| State::Entries(copy, header))
            }
            State::Entries(copy, header) => match header.entries(bytes) {
                Some(entries) => {
                    self.table.usable = self.scaled(header.usable.0, header.usable.1);
                    for (number, (first, last)) in entries {
                        self.table.note(number, self.scaled(first, last), Role::Plain);
                    }
                    State::Done(Ok(()))
                }
                None => self.other_copy(copy),
            },
            State::Link(chain, sector) => self.link(chain, sector, bytes),
            State::Done(result) => State::Done(result),
        };
    }

    /// Returns the table that was read.
    ///
    /// # Errors
    /// Why the disk has no table. [`NoTable::Unreadable`] if the reader still wants sectors.
    pub fn finish(self) -> Result<Table, NoTable> {
        match self.state {
            State::Done(Ok(())) => Ok(self.table),
            State::Done(Err(why)) => Err(why),
            _ => Err(NoTable::Unreadable),
        }
    }

    fn header_block(&self, copy: gpt::Copy) -> u64 {
        match copy {
            gpt::Copy::First => 1,
            gpt::Copy::Second => (self.sectors / self.unit).saturating_sub(1),
        }
    }

    fn header_sector(&self, copy: gpt::Copy) -> u64 {
        self.header_block(copy) * self.unit
    }

    /// Returns the state after `copy` was found damaged: the second copy is tried after the first.
    fn other_copy(&mut self, copy: gpt::Copy) -> State {
        match copy {
            gpt::Copy::First if self.sectors / self.unit > 2 => {
                self.table.flaw = Some(Flaw::FirstCopy);
                State::Header(gpt::Copy::Second)
            }
            _ => State::Done(Err(NoTable::Damaged)),
        }
    }

    /// Returns the sectors of blocks `first` to `last`; 0 sectors if `last` is below `first`.
    fn scaled(&self, first: u64, last: u64) -> Interval {
        let blocks = if last < first { 0 } else { (last - first).saturating_add(1) };
        self.interval(first, blocks)
    }

    fn interval(&self, first: u64, blocks: u64) -> Interval {
        Interval { first: first.saturating_mul(self.unit), sectors: blocks.saturating_mul(self.unit) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_contradict_each_other_are_refused_by_name() {
        let mut table = Table::with_room(Interval { first: 1, sectors: 99 }).unwrap();
        let entries =
            [(1, 1, 9, Role::Plain), (2, 9, 11, Role::Plain), (3, 50, 50, Role::Extended), (4, 0, 1, Role::Plain)];
        let logical = [(5, 60, 5, Role::Logical), (6, 70, 10, Role::Logical), (7, 90, 11, Role::Logical)];
        for (number, first, sectors, role) in entries.into_iter().chain(logical) {
            table.note(number, Interval { first, sectors }, role);
        }
        table.links.extend([50, 75]);
        assert_eq!(table.partition(1), Err(NoPartition::Overlaps(2)));
        assert_eq!(table.partition(2), Err(NoPartition::Overlaps(1)));
        assert_eq!(table.partition(3), Err(NoPartition::Extended));
        assert_eq!(table.partition(4), Err(NoPartition::BeyondTheEnd));
        assert_eq!(table.partition(5), Ok(Interval { first: 60, sectors: 5 }));
        assert_eq!(table.partition(6), Err(NoPartition::HoldsTable));
        assert_eq!(table.partition(7), Err(NoPartition::BeyondTheEnd));
        assert_eq!(table.partition(8), Err(NoPartition::Missing));
        assert_eq!(table.numbers().collect::<Vec<_>>(), [1, 2, 4, 5, 6, 7]);
    }
}
