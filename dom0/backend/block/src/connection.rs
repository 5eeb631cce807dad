//! What a vbd is made of, what it counts, and what it leaves.

use alloc::boxed::Box;
use core::fmt;

use disk::Disk;
use ring_protocol::block::journal::{self, JournalError};
use ring_protocol::block::{PAGE_BYTES, SLOT_BYTES};
use ring_protocol::ring::Layout;

use crate::host::Host;
use crate::limits::Limits;
use crate::waiting::Waiting;

/// Bytes of the journal of a ring of so many pages.
#[must_use]
pub fn journal_bytes(pages: usize) -> usize {
    slots(pages).map_or(0, journal::journal_bytes)
}

/// Bytes of the heap that a vbd with a ring of so many pages takes, beside its disk.
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
    /// Our end of its event channel.
    pub port: u32,
    /// Its ring, of 1 to 16 pages.
    pub ring: H::Ring,
    /// Memory for the journal: [`journal_bytes`] of the ring's pages.
    pub journal: H::Memory,
    /// The disk.
    pub disk: Box<dyn Disk>,
    /// What it may use at most.
    pub limits: Limits,
}

/// Why a vbd is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// The ring or the journal.
    Journal(JournalError),
    /// There is no memory for the requests that may wait.
    NoMemory,
    /// The disk has blocks that a front end cannot read one by one: 512, 1,024, 2,048 and 4,096 bytes are served.
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
    /// Writes that succeeded, durable ones among them.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards that succeeded.
    pub discards: u64,
    /// Sectors of those reads.
    pub sectors_read: u64,
    /// Sectors of those writes.
    pub sectors_written: u64,
    /// Requests that failed: a bad grant, or the device.
    pub errors: u64,
    /// Requests that broke a rule, or asked for what we do not do.
    pub refused: u64,
    /// Pins that are never given back, because a device that is lost may still write there.
    pub lost_pins: u64,
}

/// What a vbd leaves.
#[derive(Debug)]
pub struct Disconnected<H: Host> {
    /// To be unmapped.
    pub ring: H::Ring,
    /// To be used again.
    pub journal: H::Memory,
    /// The disk.
    pub disk: Box<dyn Disk>,
    /// What it did.
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
