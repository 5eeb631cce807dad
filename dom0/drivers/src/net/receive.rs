//! Receive buffers: with the device, or holding parts of the frame that is being taken.
//!
//! Buffer `i` belongs to descriptor `i` and is always at the same place. A frame has one buffer, or as many as its header says
//! if the device may merge buffers.

use super::header::{self, Header};
use super::{QUEUE_BYTES, config};
use crate::hardware::DmaMemory;
use crate::virtio::{Broken, Descriptor, Queue, flags};
use alloc::vec::Vec;

/// Bytes of all buffers, and bytes of a buffer that may be merged.
const ALL: usize = 256 << 10;
const MERGED: usize = 4096;
/// The minimum number of bytes of a buffer that holds a whole frame.
const LEAST: usize = 2048;
/// The maximum number of buffers.
const MOST: usize = ALL / LEAST;
/// Bytes of memory that the buffers and their queue need.
pub(super) const MEMORY_BYTES: usize = QUEUE_BYTES + ALL;

/// A buffer that the device has filled: its number, and how many bytes of it.
#[derive(Clone, Copy, Debug)]
struct Part {
    buffer: u16,
    bytes: usize,
}

#[derive(Debug)]
pub(super) struct Receiver<M> {
    pub(super) queue: Queue<M>,
    /// Bytes of a buffer.
    bytes: usize,
    mergeable: bool,
    /// Whether each buffer is with the device.
    posted: Vec<bool>,
    /// The buffers of the frame that is being taken, and its header.
    parts: Vec<Part>,
    header: Header,
}

impl<M: DmaMemory> Receiver<M> {
    /// Returns `None` if `memory` is too short, or if no memory is left on the heap.
    pub(super) fn new(memory: M) -> Option<Self> {
        let (mut posted, mut parts) = (Vec::new(), Vec::new());
        posted.try_reserve_exact(MOST).ok()?;
        parts.try_reserve_exact(MOST).ok()?;
        (memory.bytes() >= MEMORY_BYTES).then(|| Self {
            queue: Queue::new(memory),
            bytes: MERGED,
            mergeable: false,
            posted,
            parts,
            header: Header::default(),
        })
    }

    /// Makes all buffers available in a queue of `size` entries, for a device that was reset, and for frames of up to `frame`
    /// bytes. Fails if the queue has no room for a buffer.
    pub(super) fn begin(&mut self, size: u16, limits: &config::Limits) -> Result<(), &'static str> {
        self.mergeable = limits.has(config::feature::MRG_RXBUF);
        let whole = (header::BYTES + limits.frame()).next_power_of_two().max(LEAST);
        self.bytes = if self.mergeable { MERGED } else { whole };
        let count = usize::from(size).min(ALL / self.bytes);
        if count == 0 || count * self.bytes < header::BYTES + limits.frame() {
            return Err("has no queue that a received frame fits into");
        }
        self.queue.empty(size, limits.features);
        self.forget();
        for buffer in 0..u16::try_from(count).unwrap_or(0) {
            let memory = self.queue.memory();
            let address = memory.bus_address(self.place(buffer));
            let bytes = u32::try_from(self.bytes).unwrap_or(0);
            let descriptor = Descriptor { address, bytes, flags: flags::WRITE, next: 0 };
            descriptor.store(memory, super::descriptor(buffer));
            self.posted.push(true);
            self.queue.add(buffer);
        }
        Ok(())
    }

    /// Forgets all buffers.
    pub(super) fn forget(&mut self) {
        self.posted.clear();
        self.parts.clear();
    }

    fn place(&self, buffer: u16) -> usize {
        QUEUE_BYTES + usize::from(buffer) * self.bytes
    }

    /// Returns whether the device is short of buffers that were made available again.
    pub(super) fn is_low(&self) -> bool {
        usize::from(self.queue.hidden()) * 2 >= self.posted.len()
    }

    /// Takes the next frame that has arrived whole: copies the frame into `into`, and makes its buffers available again.
    /// Returns its header and its number of bytes; 0 bytes if the frame does not fit. `None` if no frame has arrived.
    ///
    /// The caller may call this in a loop: buffers that are made available meanwhile do not reach the device before
    /// [`Queue::expose`].
    pub(super) fn take(&mut self, into: &mut [u8]) -> Result<Option<(Header, usize)>, Broken> {
        loop {
            let Some(used) = self.queue.take()? else { return Ok(None) };
            let buffer = u16::try_from(used.head).map_err(|_| Broken)?;
            let bytes = usize::try_from(used.bytes).map_err(|_| Broken)?;
            let posted = self.posted.get_mut(usize::from(buffer)).ok_or(Broken)?;
            let least = if self.parts.is_empty() { header::BYTES } else { 1 };
            if !core::mem::take(posted) || bytes > self.bytes || bytes < least {
                return Err(Broken);
            }
            if self.parts.is_empty() {
                let mut header = [0; header::BYTES];
                self.queue.memory().read_bytes(self.place(buffer), &mut header);
                self.header = Header::from_bytes(header);
            }
            self.parts.push(Part { buffer, bytes });
            let wanted = if self.mergeable { usize::from(self.header.buffers) } else { 1 };
            if wanted == 0 || wanted > self.posted.len() {
                return Err(Broken);
            }
            if self.parts.len() == wanted {
                let bytes = self.gather(into).unwrap_or(0);
                return Ok(Some((self.header, bytes)));
            }
        }
    }

    /// Copies the parts into `into` and makes their buffers available again. Returns the bytes of the frame; `None` if it does
    /// not fit.
    fn gather(&mut self, into: &mut [u8]) -> Option<usize> {
        let (mut end, mut skip) = (Some(0), header::BYTES);
        let mut parts = core::mem::take(&mut self.parts);
        for Part { buffer, bytes } in parts.drain(..) {
            end = end.and_then(|at| {
                let place = self.place(buffer) + skip;
                let piece = into.get_mut(at..at + bytes - skip)?;
                self.queue.memory().read_bytes(place, piece);
                Some(at + piece.len())
            });
            skip = 0;
            if let Some(posted) = self.posted.get_mut(usize::from(buffer)) {
                *posted = true;
            }
            self.queue.add(buffer);
        }
        self.parts = parts;
        end
    }
}
