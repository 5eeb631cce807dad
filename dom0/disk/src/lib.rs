//! What a disk is: between the back ends that serve it to guests and the drivers and memory that hold its sectors.
//!
//! ```text
//! block back end -> Disk::place  -> Memory: the back end copies between the guest's pages and frames of ours
//!                                -> Device: the back end pins the guest's pages, and Device::submit moves the data by itself
//!                                -> Zeroes: the back end copies from a frame of zeroes
//! ```
//!
//! The disks: a whole device ([`Whole`]), a [`Partition`] of one, [`Memory`], and an [`Overlay`] in memory over any of them. A
//! [`table::Reader`] finds the partitions, and [`Holders`] knows who has which interval of a device.
//!
//! Touches: nothing. Bytes are moved by the back end's grant copies and by devices, never by code of this crate.
//! Keeps: sectors are judged against the disk's size here, whoever asked; nothing that a guest does makes this crate allocate
//! memory that cannot be refused.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

mod holders;
mod memory;
mod overlay;
mod partition;
pub mod table;

use alloc::boxed::Box;
use core::fmt;

pub use holders::{Access, Claim, Holders, InUse};
pub use memory::{Memory, Misplaced};
pub use overlay::{Overlay, Pages};
pub use partition::{Partition, Unfit, Whole};

/// Bytes of a sector: the unit of every address and length on a disk, whatever blocks the device has.
pub const SECTOR: usize = 512;

/// What a disk can do, for the front end's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Size in sectors.
    pub sectors: u64,
    /// Bytes of a logical block: requests are whole blocks. A power of two from 512 on.
    pub block_bytes: u32,
    /// Bytes of a physical block, at least a logical one: smaller writes are read and written again by the device.
    pub physical_bytes: u32,
    /// Writes and discards are refused.
    pub read_only: bool,
    /// What was written may be lost with the power until a flush has succeeded.
    pub volatile: bool,
    /// Sectors can be given back.
    pub discard: Option<Discard>,
}

impl Shape {
    /// Judges a request for `sectors` sectors from `sector` on, of which there must be at least one.
    ///
    /// # Errors
    /// Why the disk does not have them, or (`write`) may not change them.
    pub fn judge(&self, write: bool, sector: u64, sectors: u64) -> Result<(), NoPlace> {
        let end = sector.checked_add(sectors).ok_or(NoPlace::OutOfRange)?;
        if sectors == 0 || end > self.sectors {
            return Err(NoPlace::OutOfRange);
        }
        if write && self.read_only { Err(NoPlace::ReadOnly) } else { Ok(()) }
    }
}

/// How sectors are given back best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Bytes that are given back together.
    pub granularity: u32,
    /// Bytes from the beginning of the disk to the first of them.
    pub alignment: u32,
}

/// A machine address that a device may be given: of a page that is pinned, or of memory set aside for devices. Only the code
/// that pins and sets aside makes one, never from a number that a guest or a device named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusAddress(u64);

impl BusAddress {
    /// The address of memory that stays where it is until every device that was given it has answered or was reset.
    #[must_use]
    pub const fn of_pinned(address: u64) -> Self {
        Self(address)
    }

    /// An address further on in the same run of memory.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// The number a device is told.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// A run of memory that a device reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins.
    pub address: BusAddress,
    /// Its length: whole sectors.
    pub bytes: u32,
}

/// What a device is asked to do. The pieces of a request are as long as the sectors it reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Read from `sector` on into the pieces.
    Read {
        /// The first sector.
        sector: u64,
        /// Where it goes.
        pieces: &'a [Piece],
    },
    /// Write the pieces from `sector` on.
    Write {
        /// The first sector.
        sector: u64,
        /// Where it comes from.
        pieces: &'a [Piece],
    },
    /// Make durable what was answered before this was submitted.
    Flush,
    /// Give sectors back: they may read as anything until they are written.
    Discard {
        /// The first sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
}

/// Names an operation of a device to who submitted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u32);

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Good,
    /// The device reports an error, or answered nonsense.
    Failed,
    /// The device does not know the operation.
    Unsupported,
}

/// A device has no room for an operation now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// How far a reset is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// Ask again after a while.
    Pending,
    /// It has ended; the device is as new, and touches no memory it was given before.
    Done,
    /// The device does not come back, for this reason. It may touch what it was given for ever.
    Dead(&'static str),
}

/// A disk that moves data by itself.
pub trait Device: fmt::Debug {
    /// What it can do.
    fn shape(&self) -> Shape;

    /// Takes an operation, whole; the device splits it where it must. It begins with the next [`Device::kick`].
    ///
    /// # Errors
    /// There is no room for it until something has completed. The device must have room for any operation of up to 256 pieces
    /// when nothing is in flight.
    fn submit(&mut self, ticket: Ticket, operation: Operation<'_>) -> Result<(), Full>;

    /// Tells the device of what was submitted since the last time: once for a batch.
    fn kick(&mut self);

    /// The next operation that has ended, in any order.
    fn completed(&mut self) -> Option<(Ticket, Outcome)>;

    /// Asks for an interrupt at the next completion. True: there is one already, go on. Asked last before sleeping, after all that
    /// is submitted: what ends without the device raises no interrupt.
    fn rearm(&mut self) -> bool;

    /// Whether the device asks to be reset, or has broken the rules.
    fn needs_reset(&self) -> bool;

    /// Begins a reset, or goes on with it. When it is done, no ticket is in flight any more: whoever submitted them submits them
    /// again. Never waits.
    fn reset(&mut self) -> Reset;
}

/// Where sectors of a disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a frame of the first domain's own, from this byte on.
    Memory {
        /// Its page-frame number among the first domain's.
        page: u64,
        /// The first byte.
        offset: u16,
    },
    /// On the device, from this sector on.
    Device {
        /// The first sector.
        sector: u64,
    },
    /// Nowhere: they read as zeroes.
    Zeroes,
}

/// Why sectors have no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// The disk is smaller.
    OutOfRange,
    /// The disk is not written.
    ReadOnly,
    /// An overlay has reached its limit, or dom0's memory is all used.
    NoRoom,
}

impl fmt::Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfRange => "beyond the end of the disk",
            Self::ReadOnly => "the disk is read-only",
            Self::NoRoom => "no room is left for what is written",
        })
    }
}

/// A disk as a guest sees it: a device, an interval of one, or something in memory.
pub trait Disk: fmt::Debug {
    /// What it can do.
    fn shape(&self) -> Shape;

    /// Where the first of `sectors` sectors from `sector` on are, to be read or (`write`) written, and how many of them follow
    /// each other there: at least one, and within one page if it is memory. Sectors that are to be written have a place of their
    /// own afterwards, whether or not they are written then. A place is good until the next [`Disk::discard`].
    ///
    /// # Errors
    /// Why there is none.
    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace>;

    /// Gives back sectors, as far as this is not up to the device: answers what of them is the device's, if anything.
    ///
    /// # Errors
    /// Why not.
    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace>;
}

impl<D: Disk + ?Sized> Disk for Box<D> {
    fn shape(&self) -> Shape {
        (**self).shape()
    }

    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace> {
        (**self).place(write, sector, sectors)
    }

    fn discard(&mut self, sector: u64, sectors: u64) -> Result<Option<(u64, u64)>, NoPlace> {
        (**self).discard(sector, sectors)
    }
}
