//! Frames that are being sent: chains of pages.
//!
//! Page `i` belongs to descriptor `i` and is always at the same place. A frame has as many pages as it needs, the first of
//! which begins with the header.

use super::QUEUE_BYTES;
use super::config::Limits;
use super::header::{self, Header};
use crate::hardware::DmaMemory;
use crate::virtio::{Broken, Descriptor, Queue, flags};
use alloc::vec::Vec;
use network::MAX_PACKET;

/// The maximum number of pages, and the bytes of a page.
const MOST: usize = 128;
const PAGE: usize = 4096;
/// Bytes of memory that the pages and their queue need.
pub(super) const MEMORY_BYTES: usize = QUEUE_BYTES + MOST * PAGE;

/// A page.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// Whether this is the first page of a frame that the device has.
    head: bool,
    /// The next page of the frame.
    next: Option<u16>,
}

#[derive(Debug)]
pub(super) struct Sender<M> {
    pub(super) queue: Queue<M>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// The pages of the frame that is being made.
    chain: Vec<u16>,
}

impl<M: DmaMemory> Sender<M> {
    /// Returns `None` if `memory` is too short, or if no memory is left on the heap.
    pub(super) fn new(memory: M) -> Option<Self> {
        let (mut slots, mut free, mut chain) = (Vec::new(), Vec::new(), Vec::new());
        slots.try_reserve_exact(MOST).ok()?;
        free.try_reserve_exact(MOST).ok()?;
        chain.try_reserve_exact(MOST).ok()?;
        (memory.bytes() >= MEMORY_BYTES).then(|| Self { queue: Queue::new(memory), slots, free, chain })
    }

    /// Frees all pages, in a queue of `size` entries, for a device that was reset. Fails if the queue has no room for a frame.
    pub(super) fn begin(&mut self, size: u16, limits: &Limits) -> Result<(), &'static str> {
        let count = usize::from(size).min(MOST);
        if count < pages(limits.frame()) {
            return Err("has no queue that a sent frame fits into");
        }
        self.queue.empty(size, limits.features);
        self.forget();
        self.slots.resize(count, Slot::default());
        self.free.extend((0..u16::try_from(count).unwrap_or(0)).rev());
        Ok(())
    }

    /// Forgets all pages.
    pub(super) fn forget(&mut self) {
        self.slots.clear();
        self.free.clear();
    }

    /// Returns whether the longest packet fits.
    pub(super) fn takes_all(&self) -> bool {
        self.slots.len() >= pages(MAX_PACKET)
    }

    /// Copies a frame into free pages. The device sees the frame after [`Queue::expose`]. Returns false without enough pages.
    pub(super) fn send(&mut self, header: Header, frame: &[u8]) -> Result<bool, Broken> {
        let wanted = pages(frame.len());
        if self.free.len() < wanted {
            self.take_sent()?;
        }
        let Some(left) = self.free.len().checked_sub(wanted) else { return Ok(false) };
        self.chain.clear();
        self.chain.extend(self.free.drain(left..));
        let memory = self.queue.memory();
        let (mut rest, mut skip) = (frame, header::BYTES);
        for (place, page) in self.chain.iter().enumerate() {
            let at = QUEUE_BYTES + usize::from(*page) * PAGE;
            let (piece, others) = rest.split_at(rest.len().min(PAGE - skip));
            if place == 0 {
                memory.write_bytes(at, &header.to_bytes());
            }
            memory.write_bytes(at + skip, piece);
            let next = self.chain.get(place + 1).copied();
            Descriptor {
                address: memory.bus_address(at),
                bytes: u32::try_from(skip + piece.len()).unwrap_or(0),
                flags: if next.is_some() { flags::NEXT } else { 0 },
                next: next.unwrap_or(0),
            }
            .store(memory, super::descriptor(*page));
            if let Some(slot) = self.slots.get_mut(usize::from(*page)) {
                *slot = Slot { head: place == 0, next };
            }
            (rest, skip) = (others, 0);
        }
        if let Some(head) = self.chain.first() {
            self.queue.add(*head);
        }
        Ok(true)
    }

    /// Frees the pages of frames that the device has sent.
    fn take_sent(&mut self) -> Result<(), Broken> {
        while let Some(used) = self.queue.take()? {
            // A head that the device does not have, or completes a second time, violates the protocol.
            let mut page = u16::try_from(used.head).map_err(|_| Broken)?;
            let slot = self.slots.get_mut(usize::from(page)).ok_or(Broken)?;
            if !core::mem::take(&mut slot.head) {
                return Err(Broken);
            }
            let mut next = slot.next;
            self.free.push(page);
            while let Some(following) = next {
                page = following;
                self.free.push(page);
                next = self.slots.get(usize::from(page)).and_then(|slot| slot.next);
            }
        }
        Ok(())
    }
}

/// Returns how many pages a frame of `bytes` bytes needs.
const fn pages(bytes: usize) -> usize {
    (header::BYTES + bytes).div_ceil(PAGE)
}
