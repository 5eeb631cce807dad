//! Operations in the device: how they become requests, and what follows when a request completes.

use super::split::{Cursor, Most};
use super::tables::{self, Data, Request};
use super::{Blk, Identity, Serial, config, kind};
use crate::hardware::{ConfigurationPorts, DmaMemory, Registers};
use disk::{Device, Outcome, Piece, Ticket};

/// Who is told when an operation has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Ticket(Ticket),
    /// This driver, which reads the serial number.
    Serial,
}

/// An operation in the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) owner: Owner,
    /// The number of requests that the device has not completed.
    pub(super) requests: u16,
    pub(super) outcome: Outcome,
    /// The sectors of a discard that no request was made for yet: the first sector, and the number of sectors.
    pub(super) discard: (u64, u64),
}

/// The rest of a read or write, which waits for free slots. The pieces of the operation are in the driver's `waiting_pieces`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) op: u16,
    pub(super) write: bool,
    pub(super) sector: u64,
    pub(super) cursor: Cursor,
}

impl<C: ConfigurationPorts, R: Registers, M: DmaMemory> Blk<C, R, M> {
    /// Begins an operation. Returns its index; `None` without a slot for its first request.
    pub(super) fn begin(&mut self, owner: Owner) -> Option<u16> {
        self.free_slots.last()?;
        let op = self.free_ops.pop()?;
        let begun = Op { owner, requests: 0, outcome: Outcome::Good, discard: (0, 0) };
        *self.ops.get_mut(usize::from(op))? = Some(begun);
        Some(op)
    }

    pub(super) fn op(&mut self, op: u16) -> Option<&mut Op> {
        self.ops.get_mut(usize::from(op))?.as_mut()
    }

    /// Makes a request for an operation. Returns false without a free slot.
    pub(super) fn request(&mut self, op: u16, kind: u32, sector: u64, data: Data<'_>) -> bool {
        let Some(slot) = self.free_slots.pop() else { return false };
        if let Some(working) = self.slots.get_mut(usize::from(slot)) {
            *working = Some(op);
        }
        if let Some(op) = self.op(op) {
            op.requests += 1;
        }
        tables::fill(&mut self.queue, self.plan, slot, &Request { kind, sector, data });
        true
    }

    /// Makes requests for the waiting read or write, as long as slots are free. `pieces` are all pieces of that operation.
    pub(super) fn go_on(&mut self, pieces: &[Piece]) {
        let most = Most {
            segments: self.plan.segments(),
            segment_bytes: self.limits.segment_bytes,
            block: self.limits.shape.block_bytes,
        };
        let mut segments = core::mem::take(&mut self.segments);
        while let Some(Waiting { op, write, sector, mut cursor }) = self.waiting {
            if cursor.is_at_end(pieces) {
                self.waiting = None;
            } else if self.free_slots.is_empty() {
                break;
            } else {
                let bytes = cursor.cut(pieces, &most, &mut segments);
                let (kind, data) =
                    if write { (kind::OUT, Data::Out(&segments)) } else { (kind::IN, Data::In(&segments)) };
                self.waiting = None;
                // A block with more segments than the device allows cannot be moved.
                if bytes == 0 {
                    self.spoil(op, Outcome::Failed);
                } else if self.request(op, kind, sector, data) {
                    let sector = sector + u64::from(bytes / config::BYTES);
                    self.waiting = Some(Waiting { op, write, sector, cursor });
                }
            }
        }
        self.segments = segments;
    }

    /// Makes the next request of a discard.
    pub(super) fn go_on_discarding(&mut self, op: u16) {
        let most = u64::from(self.limits.discard_sectors);
        let Some((sector, sectors)) = self.op(op).map(|op| op.discard).filter(|(_, sectors)| *sectors > 0) else {
            return;
        };
        let now = sectors.min(most);
        let data = Data::Range(sector, u32::try_from(now).unwrap_or(0));
        if self.request(op, kind::DISCARD, 0, data)
            && let Some(op) = self.op(op)
        {
            op.discard = (sector + now, sectors - now);
        }
    }

    /// Makes an operation fail with `outcome`, unless it has failed before.
    pub(super) fn spoil(&mut self, op: u16, outcome: Outcome) {
        if let Some(op) = self.op(op).filter(|op| op.outcome == Outcome::Good) {
            op.outcome = outcome;
        }
    }

    /// Takes completed requests until an operation has ended. Returns that operation. `None` if no other request has completed,
    /// or if the device does not run.
    pub(super) fn next_ended(&mut self) -> Option<(Ticket, Outcome)> {
        while self.runs() {
            match self.queue.take() {
                Ok(Some(used)) => {
                    // A head that is not in flight, or completes a second time, violates the protocol.
                    let slot = self.plan.slot_of(used.head);
                    let working = slot.and_then(|slot| Some((slot, self.slots.get_mut(usize::from(slot))?.take()?)));
                    let Some((slot, op)) = working else {
                        self.broken = true;
                        break;
                    };
                    self.came = true;
                    let ended = self.came_back(slot, op);
                    if ended.is_some() {
                        return ended;
                    }
                }
                Ok(None) => break,
                Err(_) => self.broken = true,
            }
        }
        let came = core::mem::take(&mut self.came);
        self.in_vain = !came && self.free_slots.len() < self.slots.len();
        if core::mem::take(&mut self.went_on) {
            self.kick();
        }
        None
    }

    /// Takes a completed request, and makes a request that waited for a slot. Returns the operation if it has ended, else
    /// `None`. `None` also for the operation that reads the serial number.
    pub(super) fn came_back(&mut self, slot: u16, op: u16) -> Option<(Ticket, Outcome)> {
        let outcome = match tables::status(self.queue.memory(), slot) {
            0 => Outcome::Good,
            2 => Outcome::Unsupported,
            _ => Outcome::Failed,
        };
        if self.op(op)?.owner == Owner::Serial {
            let serial = Serial::new(tables::serial(self.queue.memory(), slot));
            let known = outcome == Outcome::Good;
            self.identity = Some(if known { Identity::Known(serial) } else { Identity::Unknown });
        }
        self.free_slots.push(slot);
        self.op(op)?.requests -= 1;
        if outcome == Outcome::Good {
            self.go_on_discarding(op);
        } else {
            self.spoil(op, outcome);
            self.waiting = self.waiting.filter(|waiting| waiting.op != op);
        }
        if self.waiting.is_some() {
            let pieces = core::mem::take(&mut self.waiting_pieces);
            self.go_on(&pieces);
            self.waiting_pieces = pieces;
        }
        self.went_on |= self.queue.hidden() != 0;
        self.end_if_over(op)
    }

    /// Ends an operation that has no request in the device. A waiting operation always has one there. Returns the ended
    /// operation; `None` if it goes on, or if it read the serial number.
    pub(super) fn end_if_over(&mut self, op: u16) -> Option<(Ticket, Outcome)> {
        let entry = self.ops.get_mut(usize::from(op))?;
        let ended = entry.take_if(|op| op.requests == 0)?;
        self.free_ops.push(op);
        match ended.owner {
            Owner::Ticket(ticket) => Some((ticket, ended.outcome)),
            Owner::Serial => None,
        }
    }
}
