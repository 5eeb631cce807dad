//! What a vbd is made of, its counters, and what is left of it at its end.

use alloc::boxed::Box;
use core::fmt;

use disk::Disk;
use ring_protocol::block::journal::{self, JournalError};
use ring_protocol::block::{PAGE_BYTES, SLOT_BYTES};
use ring_protocol::ring::Layout;

use crate::host::Host;
use crate::limits::Limits;
use crate::waiting::Waiting;

/// Returns the bytes of the journal of a ring of `pages` pages. 0 if there can be no such ring.
#[must_use]
pub fn journal_bytes(pages: usize) -> usize {
    slots(pages).map_or(0, journal::journal_bytes)
}

/// Returns the bytes of heap for the waiting requests of a vbd with a ring of `pages` pages. 0 if there can be no such ring.
#[must_use]
pub fn vbd_bytes(pages: usize) -> usize {
    slots(pages).map_or(0, |slots| slots as usize * size_of::<Waiting>())
}

fn slots(pages: usize) -> Option<u32> {
    Layout::new(pages * PAGE_BYTES, SLOT_BYTES).ok().map(|layout| layout.entries())
}

/// What a vbd is made of.
#[derive(Debug)]
pub struct Connection<H: Host> {
    /// The guest.
    pub domain: u16,
    /// Our end of the guest's event channel.
    pub port: u32,
    /// The ring, of 1 to 16 pages.
    pub ring: H::Ring,
    /// Memory for the journal: [`journal_bytes`] of the ring's pages.
    pub journal: H::Memory,
    /// The disk.
    pub disk: Box<dyn Disk>,
    /// The limits of the disk.
    pub limits: Limits,
}

/// Why a vbd is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// The ring or the journal is invalid.
    Journal(JournalError),
    /// No memory is left for the list of waiting requests.
    NoMemory,
    /// The disk has blocks of this many bytes. Only blocks of 512, 1,024, 2,048 and 4,096 bytes are served.
    BlockBytes(u32),
}

impl From<JournalError> for ConnectError {
    fn from(error: JournalError) -> Self {
        Self::Journal(error)
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Journal(error) => error.fmt(f),
            Self::NoMemory => f.write_str("there is no memory for its requests"),
            Self::BlockBytes(bytes) => write!(f, "the disk has blocks of {bytes} bytes"),
        }
    }
}

/// What a vbd has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded, durable writes included.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards that succeeded.
    pub discards: u64,
    /// Sectors of the reads that succeeded.
    pub sectors_read: u64,
    /// Sectors of the writes that succeeded.
    pub sectors_written: u64,
    /// Requests that failed while they were carried out: a bad grant, bad indirect descriptors, no room in an overlay, or the
    /// device.
    pub errors: u64,
    /// Requests that were invalid or not supported.
    pub refused: u64,
    /// Pins that are never given back, because a lost device may still write to their pages.
    pub lost_pins: u64,
}

/// The parts of a vbd that has ended.
#[derive(Debug)]
pub struct Disconnected<H: Host> {
    /// The ring, for the caller to unmap.
    pub ring: H::Ring,
    /// The memory of the journal, for another vbd.
    pub journal: H::Memory,
    /// The disk.
    pub disk: Box<dyn Disk>,
    /// The final counters.
    pub counters: Counters,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_ring_takes_little() {
        assert_eq!(journal_bytes(1), 33 * 128);
        assert!(vbd_bytes(1) < 8 << 10 && vbd_bytes(16) < 128 << 10);
        assert_eq!((journal_bytes(0), vbd_bytes(0)), (0, 0));
    }
}
