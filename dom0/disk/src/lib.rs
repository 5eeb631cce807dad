//! What a disk is. Back ends, which serve disks to guests, use these traits; drivers and memory, which hold sectors, are behind
//! the traits.
//!
//! ```text
//! block back end -> Disk::place  -> Memory: the back end copies between the guest's pages and frames of dom0
//!                                -> Device: the back end pins the guest's pages, and Device::submit has the data moved
//!                                -> Zeroes: the back end copies from a frame of zeroes
//! ```
//!
//! The disks: a whole device ([`Whole`]), an interval of another disk ([`Partition`]), [`Memory`], and an [`Overlay`] in memory
//! over any disk. A [`table::Reader`] finds partitions, and [`Holders`] notes who has which interval of a device.
//!
//! Touches: nothing. Bytes are moved by the back end's grant copies and by devices, never by code of this crate.
//! Guarantees: every disk checks each request against its own size; every allocation that a guest can cause can be refused.
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

pub use device::Reset;
pub use holders::{Access, Claim, Holders, InUse};
pub use memory::{Memory, Misplaced};
pub use overlay::{Overlay, Pages};
pub use partition::{Partition, Unfit, Whole};

/// Bytes of a sector: the unit of every address and length on a disk, whatever the size of the device's blocks.
pub const SECTOR: usize = 512;

/// Memory of this domain, in consecutive pages, that grant copies and devices reach. Dropping it gives the memory back.
pub trait OwnMemory: 'static {
    /// Returns the number by which grant copies name the first page.
    fn page(&self) -> u64;

    /// Returns the address of the first byte for a device.
    fn address(&self) -> BusAddress;
}

/// What a disk can do, for the front end's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Size in sectors.
    pub sectors: u64,
    /// Bytes of a logical block: requests are whole blocks. A power of two, at least 512.
    pub block_bytes: u32,
    /// Bytes of a physical block, at least those of a logical block. For a smaller write, the device reads and rewrites the
    /// whole physical block.
    pub physical_bytes: u32,
    /// Writes and discards are refused.
    pub read_only: bool,
    /// If the power fails, writes may be lost that no successful flush has followed.
    pub volatile: bool,
    /// How sectors are given back. `None` if the disk takes none back.
    pub discard: Option<Discard>,
}

impl Shape {
    /// Checks a request for `sectors` sectors from `sector` on, which writes if `write` is true.
    ///
    /// # Errors
    /// [`NoPlace::OutOfRange`] if `sectors` is 0 or the request ends beyond the disk; [`NoPlace::ReadOnly`] if the request
    /// would write to a read-only disk.
    pub fn judge(&self, write: bool, sector: u64, sectors: u64) -> Result<(), NoPlace> {
        let end = sector.checked_add(sectors).ok_or(NoPlace::OutOfRange)?;
        if sectors == 0 || end > self.sectors {
            return Err(NoPlace::OutOfRange);
        }
        if write && self.read_only { Err(NoPlace::ReadOnly) } else { Ok(()) }
    }
}

/// Which sectors a disk takes back together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Bytes of a unit: the disk takes back whole units.
    pub granularity: u32,
    /// Bytes from the beginning of the disk to the first whole unit.
    pub alignment: u32,
}

/// A machine address that a device may access: in a pinned page, or in memory set aside for devices. Only the code that pins
/// pages or sets memory aside makes such addresses, never from a number that a guest or a device supplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusAddress(u64);

impl BusAddress {
    /// Wraps a machine address. The caller guarantees that the memory stays there until every device that was given the address
    /// has completed its operation or was reset.
    #[must_use]
    pub const fn of_pinned(address: u64) -> Self {
        Self(address)
    }

    /// Returns the address `bytes` bytes further on, in the same run of memory.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// Returns the number that is given to a device.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// A run of memory that a device reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The first byte of the run.
    pub address: BusAddress,
    /// The length of the run in bytes: whole sectors.
    pub bytes: u32,
}

/// What a device is asked to do. The pieces of an operation are together as long as the sectors that the operation reads or
/// writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Read from `sector` on into the pieces.
    Read {
        /// The first sector.
        sector: u64,
        /// Where the data goes.
        pieces: &'a [Piece],
    },
    /// Write the pieces from `sector` on.
    Write {
        /// The first sector.
        sector: u64,
        /// Where the data comes from.
        pieces: &'a [Piece],
    },
    /// Make durable every write that had completed when the flush was submitted.
    Flush,
    /// Give sectors back: they may read as anything until they are written again.
    Discard {
        /// The first sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
}

/// Names an operation of a device. The submitter chooses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u32);

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The operation is done.
    Good,
    /// The device reported an error, or completed the operation with an invalid result.
    Failed,
    /// The device does not know the operation.
    Unsupported,
}

/// A device has no room for an operation now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A disk that moves data by itself.
pub trait Device: fmt::Debug {
    /// Returns what the device can do.
    fn shape(&self) -> Shape;

    /// Takes one whole operation, and splits it if the hardware needs that. The device begins it at the next [`Device::kick`].
    ///
    /// # Errors
    /// [`Full`]: there is no room until another operation has completed. With nothing in flight, a device must have room for
    /// any operation of up to 256 pieces.
    fn submit(&mut self, ticket: Ticket, operation: Operation<'_>) -> Result<(), Full>;

    /// Tells the device of the operations submitted since the last kick. One call serves a batch.
    fn kick(&mut self);

    /// Returns an operation that has ended, and how; operations end in any order. `None` if no other operation has ended.
    fn completed(&mut self) -> Option<(Ticket, Outcome)>;

    /// Asks for an interrupt at the next completion. Returns true if an operation has ended already: call [`Device::completed`]
    /// instead of sleeping. Call this last before sleeping, after every [`Device::submit`]: an operation that ends without the
    /// hardware raises no interrupt.
    fn rearm(&mut self) -> bool;

    /// Returns whether the device asks to be reset, or has violated its protocol.
    fn needs_reset(&self) -> bool;

    /// Begins a reset or continues one, without waiting. After [`Reset::Done`] no ticket is in flight: the submitter submits
    /// its operations again.
    fn reset(&mut self) -> Reset;
}

/// Where sectors of a disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a frame of dom0.
    Memory {
        /// The number by which grant copies name the frame.
        page: u64,
        /// The first byte, counted from the beginning of the frame.
        offset: u16,
    },
    /// On the device.
    Device {
        /// The first sector.
        sector: u64,
    },
    /// Nowhere: the sectors read as zeroes.
    Zeroes,
}

/// Why sectors have no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// The sectors are beyond the end of the disk, or there are 0 of them.
    OutOfRange,
    /// The disk is read-only.
    ReadOnly,
    /// An overlay has reached its limit, or dom0 has no free memory.
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
    /// Returns what the disk can do.
    fn shape(&self) -> Shape;

    /// Finds sectors, to read them or (`write`) to write them. Returns the place of `sector`, and how many of the `sectors`
    /// sectors from there on follow each other in that place: at least one; in memory, none beyond the end of the page. With
    /// `write`, an overlay gives these sectors a place in memory even if the caller then writes nothing. A place is valid until
    /// the next [`Disk::discard`].
    ///
    /// # Errors
    /// Why the sectors have no place.
    fn place(&mut self, write: bool, sector: u64, sectors: u32) -> Result<(Place, u32), NoPlace>;

    /// Gives sectors back. Returns the first sector and the number of sectors that the caller must make the device discard;
    /// `None` if the device has nothing to do.
    ///
    /// # Errors
    /// Why the sectors cannot be given back.
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
