//! Requests that were found valid and wait to be carried out.

use ring_protocol::block::journal::Entry;
use ring_protocol::block::{Extent, PAGE_BYTES, Request, SECTOR_BYTES, Slot};

use crate::limits::REQUEST_COST;

/// A request that waits to be carried out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub(crate) entry: Entry,
    pub(crate) slot: Slot,
    pub(crate) request: Request,
    /// The maximum number of bytes that the request moves.
    pub(crate) bytes: u32,
    /// The number of segments, which is the maximum number of pins.
    pub(crate) segments: u32,
}

impl Waiting {
    pub(crate) fn new(entry: Entry, slot: Slot, request: Request) -> Self {
        let (bytes, segments) = match request {
            Request::Direct { extent, segments, .. } => (extent.sectors * u64::from(SECTOR_BYTES), segments),
            // The descriptors are not read yet, so each segment counts as a whole page.
            Request::Indirect { segments, .. } => ((segments * PAGE_BYTES) as u64, segments),
            Request::Flush | Request::Discard(Extent { .. }) => (0, 0),
        };
        let [bytes, segments] = [bytes, segments as u64].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        Self { entry, slot, request, bytes, segments }
    }

    pub(crate) const fn cost(&self) -> u32 {
        self.bytes.saturating_add(REQUEST_COST)
    }
}
