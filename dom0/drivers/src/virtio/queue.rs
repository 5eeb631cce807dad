//! The driver's side of a split virtqueue (V 2.7).
//!
//! Layout of the memory, for up to [`MOST`] entries:
//!
//! ```text
//!     0  descriptors: address 8, length 4, flags 2, next 2
//!  4096  available: flags 2, index 2, heads 2 each, used_event 2
//!  5124  used: flags 2, index 2, (head 4, length 4) each, avail_event 2
//! ```
//!
//! Indices count up for ever and wrap at 65,536; the entry for an index is the index modulo the size. The device sees available
//! heads at the next [`Queue::expose`]. The device writes the used part: an index beyond the requests in flight is refused
//! here; a head that is not in flight, and a length, are judged by the caller.

use super::feature;
use crate::hardware::DmaMemory;
use core::sync::atomic::{Ordering, fence};
use disk::BusAddress;

/// The maximum number of entries.
pub(crate) const MOST: u16 = 256;
/// Where the available part begins.
const AVAILABLE: usize = 4096;
/// Where the used part begins. Its entries lie at multiples of 8.
const USED: usize = 5124;
/// Bytes of the queue.
pub(crate) const QUEUE_BYTES: usize = 8192;
/// In the flags of the available part: the driver wants no interrupt. In those of the used part: the device wants no
/// notification.
const QUIET: u16 = 1;

/// Flags of a descriptor.
pub(crate) mod flags {
    /// Another descriptor of the chain follows.
    pub(crate) const NEXT: u16 = 1;
    /// The device writes this memory; else it reads.
    pub(crate) const WRITE: u16 = 2;
    /// This memory is a table of descriptors.
    pub(crate) const INDIRECT: u16 = 4;
}

/// A descriptor: a run of memory of a request, or a table of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) address: BusAddress,
    pub(crate) bytes: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    /// Stores the descriptor at an offset.
    pub(crate) fn store(self, memory: &impl DmaMemory, offset: usize) {
        memory.store64(offset, self.address.number());
        let rest = u64::from(self.bytes) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        memory.store64(offset + 8, rest);
    }
}

/// The device has written a used index that violates the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken;

/// A completed chain, as the device states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u32,
    /// How many bytes the device has written.
    pub(crate) bytes: u32,
}

/// Returns the offset of a descriptor of the queue.
pub(crate) fn descriptor(number: u16) -> usize {
    usize::from(number) * 16
}

/// The queue.
#[derive(Debug)]
pub(crate) struct Queue<M> {
    memory: M,
    size: u16,
    event_idx: bool,
    /// The index behind the last head that is available.
    available: u16,
    /// The available index that the device was last shown.
    shown: u16,
    /// The index behind the last used entry that was taken.
    seen: u16,
    /// Whether an interrupt is asked for.
    armed: bool,
}

impl<M: DmaMemory> Queue<M> {
    pub(crate) const fn new(memory: M) -> Self {
        Self { memory, size: 0, event_idx: false, available: 0, shown: 0, seen: 0, armed: false }
    }

    pub(crate) const fn memory(&self) -> &M {
        &self.memory
    }

    pub(crate) fn into_memory(self) -> M {
        self.memory
    }

    /// Empties the queue for a device that was reset. `size` is the number of entries, a power of two up to [`MOST`].
    pub(crate) fn empty(&mut self, size: u16, features: u64) {
        (0..QUEUE_BYTES).step_by(8).for_each(|offset| self.memory.store64(offset, 0));
        self.size = size;
        self.event_idx = features & feature::EVENT_IDX != 0;
        (self.available, self.shown, self.seen, self.armed) = (0, 0, 0, true);
        self.quiet();
    }

    /// Returns the addresses that the device is told: of the descriptors, the available part and the used part.
    pub(crate) fn parts(&self) -> [BusAddress; 3] {
        [0, AVAILABLE, USED].map(|offset| self.memory.bus_address(offset))
    }

    /// Returns how many heads are available that the device was not shown.
    pub(crate) const fn hidden(&self) -> u16 {
        self.available.wrapping_sub(self.shown)
    }

    fn entry(&self, index: u16) -> usize {
        usize::from(index & self.size.wrapping_sub(1))
    }

    /// Makes a head available. The device sees it after [`Queue::expose`].
    pub(crate) fn add(&mut self, head: u16) {
        let entry = self.entry(self.available);
        self.memory.store16(AVAILABLE + 4 + 2 * entry, head);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows the device the available heads. Returns whether the device must be notified (V 2.7.10).
    pub(crate) fn expose(&mut self) -> bool {
        let before = self.shown;
        if self.available == before {
            return false;
        }
        self.shown = self.available;
        // Releases the heads and descriptors before the index.
        self.memory.store16(AVAILABLE + 2, self.available);
        // The device must see the index before the driver reads the device's wish: the device writes its wish, then reads the
        // index.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.memory.load16(USED) & QUIET == 0;
        }
        let event = self.memory.load16(USED + 4 + 8 * usize::from(self.size));
        passes(event, before, self.available)
    }

    /// Takes the next completed head. Returns `None` if no other chain has completed.
    pub(crate) fn take(&mut self) -> Result<Option<Used>, Broken> {
        let waiting = self.memory.load16(USED + 2).wrapping_sub(self.seen);
        // A head that the device was not shown cannot complete.
        if waiting > self.shown.wrapping_sub(self.seen) {
            return Err(Broken);
        }
        if waiting == 0 {
            return Ok(None);
        }
        if self.armed {
            self.quiet();
        }
        let element = self.memory.load64(USED + 4 + 8 * self.entry(self.seen));
        self.seen = self.seen.wrapping_add(1);
        let [a, b, c, d, e, f, g, h] = element.to_le_bytes();
        Ok(Some(Used { head: u32::from_le_bytes([a, b, c, d]), bytes: u32::from_le_bytes([e, f, g, h]) }))
    }

    /// Asks for no interrupt. With `EVENT_IDX` nothing needs writing: the device interrupts only when it passes the index that
    /// the driver named last. It has passed that index, and passes it again only after 65,536 entries, for one needless
    /// interrupt.
    fn quiet(&mut self) {
        self.armed = false;
        if !self.event_idx {
            self.memory.store16(AVAILABLE, QUIET);
        }
    }

    /// Asks for an interrupt when the next chain completes. Returns true if a completed chain is there already.
    pub(crate) fn rearm(&mut self) -> bool {
        self.armed = true;
        if self.event_idx {
            self.memory.store16(AVAILABLE + 4 + 2 * usize::from(self.size), self.seen);
        } else {
            self.memory.store16(AVAILABLE, 0);
        }
        // The device must see the driver's wish before the driver reads the index: the device writes the index, then reads the
        // wish.
        fence(Ordering::SeqCst);
        self.memory.load16(USED + 2) != self.seen
    }
}

/// Returns whether an index that moves from `before` to `now` passes `event`, the entry that the other side wants to hear of
/// (V 2.7.10.1). Indices wrap, so only differences are compared.
const fn passes(event: u16, before: u16, now: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_passes_the_indices_from_where_it_began_to_where_it_ends() {
        // Against counting, for all beginnings near the wrap, and batches of up to 256.
        for before in (0..=u16::MAX).step_by(97).chain(65_200..=u16::MAX) {
            for length in [1, 2, 255, 256] {
                let now = before.wrapping_add(length);
                for event in [0, 1, 2, 254, 255, 256, 257, 40_000, 65_535].map(|ahead| before.wrapping_add(ahead)) {
                    let counted = (0..length).any(|i| before.wrapping_add(i) == event);
                    assert_eq!(passes(event, before, now), counted, "{event} {before} {now}");
                }
            }
        }
        assert!(!passes(5, 9, 9));
    }
}
