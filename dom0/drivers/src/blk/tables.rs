//! The memory of requests in flight: for each slot a header, a range, a status, a serial number, and a table of descriptors.
//!
//! ```text
//!     0  the queue
//!  8192  slots, 64 bytes each: header 16, range 16, status 8, serial number 24
//! 24576  tables: one per slot, if the device supports indirect tables
//! ```
//!
//! For a device that does not support indirect tables, the chain of a slot lies in the queue's own descriptors, at a fixed
//! place for each slot. Such a device has fewer slots and shorter chains.

use super::split::Segment;
use crate::hardware::DmaMemory;
use crate::virtio::{Descriptor, Queue, flags};
use disk::BusAddress;

/// Bytes of memory that a disk's driver needs.
pub const MEMORY_BYTES: usize = 256 << 10;
/// Where the slots begin, and the bytes of a slot.
const SLOTS: usize = 8192;
const SLOT: usize = 64;
/// Where the tables begin.
const TABLES: usize = 24576;
/// Where the range, the status and the serial number begin in a slot; the header is at 0.
const RANGE: usize = 16;
const STATUS: usize = 32;
const SERIAL: usize = 40;
/// Bytes of a serial number.
pub(super) const SERIAL_BYTES: usize = 20;
const _: () = assert!(SERIAL + SERIAL_BYTES <= SLOT);
/// A status that no correct device writes: V 5.2.6 has 0 to 2.
const NO_STATUS: u8 = 255;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// The maximum number of descriptors of a chain without indirect tables. A queue of 256 entries has room for seven such chains.
const DIRECT: u16 = 34;

/// How the memory is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    indirect: bool,
    /// The maximum number of descriptors of a slot.
    chain: u16,
    /// How many slots there are.
    pub(super) slots: u16,
}

impl Plan {
    /// The plan of a device that is not started: no slots.
    pub(super) const NONE: Self = Self { indirect: false, chain: 0, slots: 0 };

    /// Divides the memory for a queue of `size` entries and requests of up to `segments` segments. `None` if no request fits.
    pub(super) fn new(size: u16, segments: u16, indirect: bool) -> Option<Self> {
        // No chain may be longer than the queue, indirect or not (V 2.7.5.3.1).
        let chain = segments.saturating_add(2).min(size);
        let chain = if indirect { chain } else { chain.min(DIRECT) };
        if chain < 3 {
            return None;
        }
        let room = (MEMORY_BYTES - TABLES) / DESCRIPTOR / usize::from(chain);
        let slots = if indirect { size.min(u16::try_from(room).unwrap_or(u16::MAX)) } else { size / chain };
        Some(Self { indirect, chain, slots })
    }

    /// Returns the maximum number of segments of a request.
    pub(super) fn segments(self) -> usize {
        usize::from(self.chain).saturating_sub(2)
    }

    /// Returns the slot of the chain with this head. `None` if no slot has this head.
    pub(super) fn slot_of(self, head: u32) -> Option<u16> {
        let head = u16::try_from(head).ok()?;
        let step = if self.indirect { 1 } else { self.chain };
        head.is_multiple_of(step).then(|| head / step.max(1)).filter(|slot| *slot < self.slots)
    }

    fn head_of(self, slot: u16) -> u16 {
        if self.indirect { slot } else { slot * self.chain }
    }

    /// Returns where in the memory the chain of a slot begins.
    fn chain_of(self, slot: u16) -> usize {
        let first = usize::from(slot) * usize::from(self.chain) * DESCRIPTOR;
        if self.indirect { TABLES + first } else { first }
    }
}

/// A request to the device, for one slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    /// The kind (V 5.2.6).
    pub(super) kind: u32,
    pub(super) sector: u64,
    pub(super) data: Data<'a>,
}

/// What a request moves.
#[derive(Clone, Copy, Debug)]
pub(super) enum Data<'a> {
    /// The device writes the segments.
    In(&'a [Segment]),
    /// The device reads the segments.
    Out(&'a [Segment]),
    /// The device reads a range of sectors: the first sector, and the number of sectors.
    Range(u64, u32),
    /// The device writes its serial number.
    Serial,
    Nothing,
}

/// Writes a request into a slot and makes its chain available. [`Queue::expose`] then shows it to the device.
pub(super) fn fill<M: DmaMemory>(queue: &mut Queue<M>, plan: Plan, slot: u16, request: &Request<'_>) {
    let memory = queue.memory();
    let at = SLOTS + usize::from(slot) * SLOT;
    memory.store64(at, u64::from(request.kind));
    memory.store64(at + 8, request.sector);
    memory.store8(at + STATUS, NO_STATUS);
    let own = |offset, bytes| Segment { address: memory.bus_address(at + offset), bytes };
    let (one, segments, writes): (_, &[Segment], bool) = match request.data {
        Data::In(segments) => (None, segments, true),
        Data::Out(segments) => (None, segments, false),
        Data::Range(sector, sectors) => {
            memory.store64(at + RANGE, sector);
            memory.store64(at + RANGE + 8, u64::from(sectors));
            (Some(own(RANGE, 16)), &[], false)
        }
        Data::Serial => {
            (SERIAL..SLOT).step_by(8).for_each(|offset| memory.store64(at + offset, 0));
            (Some(own(SERIAL, 20)), &[], true)
        }
        Data::Nothing => (None, &[], false),
    };
    let base = plan.chain_of(slot);
    let first = if plan.indirect { 0 } else { plan.head_of(slot) };
    let mut count = 0;
    let mut put = |address: BusAddress, bytes, flags| {
        let next = if flags & flags::NEXT == 0 { 0 } else { first + count + 1 };
        Descriptor { address, bytes, flags, next }.store(memory, base + usize::from(count) * DESCRIPTOR);
        count += 1;
    };
    put(memory.bus_address(at), 16, flags::NEXT);
    let write = if writes { flags::WRITE } else { 0 };
    for segment in one.iter().chain(segments) {
        put(segment.address, segment.bytes, flags::NEXT | write);
    }
    put(memory.bus_address(at + STATUS), 1, flags::WRITE);
    if plan.indirect {
        let table = memory.bus_address(base);
        let bytes = u32::from(count) * 16;
        let entry = Descriptor { address: table, bytes, flags: flags::INDIRECT, next: 0 };
        entry.store(memory, usize::from(slot) * DESCRIPTOR);
    }
    queue.add(plan.head_of(slot));
}

/// Returns the status in a slot whose request has completed.
pub(super) fn status(memory: &impl DmaMemory, slot: u16) -> u8 {
    memory.load8(SLOTS + usize::from(slot) * SLOT + STATUS)
}

/// Returns the serial number in a slot whose request has completed.
pub(super) fn serial(memory: &impl DmaMemory, slot: u16) -> [u8; SERIAL_BYTES] {
    let at = SLOTS + usize::from(slot) * SLOT + SERIAL;
    let mut bytes = [0; SERIAL_BYTES];
    (at..).zip(&mut bytes).for_each(|(offset, byte)| *byte = memory.load8(offset));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_and_chains_fit_the_memory_and_the_queue() {
        for size in [4, 8, 64, 128, 256] {
            for segments in 1..=super::super::config::MOST_SEGMENTS {
                for indirect in [false, true] {
                    let plan = Plan::new(size, segments, indirect).unwrap();
                    assert!(plan.slots >= 1 && plan.slots <= size && plan.chain <= size);
                    assert!(plan.segments() >= 1 && plan.segments() <= usize::from(segments));
                    let end = plan.chain_of(plan.slots);
                    assert!(if indirect { end <= MEMORY_BYTES } else { end <= usize::from(size) * DESCRIPTOR });
                    for slot in 0..plan.slots {
                        assert_eq!(plan.slot_of(u32::from(plan.head_of(slot))), Some(slot));
                    }
                    assert_eq!(plan.slot_of(u32::from(size)), None);
                }
            }
            assert!(Plan::new(2, 1, true).is_none() && Plan::new(0, 1, false).is_none());
        }
    }
}
