//! A virtio disk (V 5.2) as a [`disk::Device`].
//!
//! The driver splits an operation into requests to the device. A request takes one slot, and has whole blocks and at most as
//! many segments as the device allows. The operation ends with its last request, and fails if a request fails. If the free
//! slots do not suffice for a read or a write, its other requests wait; meanwhile no other operation is taken. A discard has at
//! most one request in the device at a time, so any number of discards can be under way.
//!
//! ```text
//! New -> reset -> Resetting -> (register reads 0) negotiate, read limits, set the queue -> Running
//!                     | asked too often, or the device is not usable                         | broken, late, NEEDS_RESET
//!                     v                                                                      v
//!                   Dead                                                                   reset
//! ```
//!
//! The memory of an operation belongs to the device from [`Device::submit`] until the operation completes or a reset has ended.

mod config;
mod flight;
mod identity;
mod split;
mod tables;

use crate::hardware::{ConfigurationPorts, DmaMemory, Registers};
use crate::virtio::{Life, NotTaken, Queue, Transport, feature};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use config::Limits;
use disk::{Device, Full, Operation, Outcome, Piece, Reset, Shape, Ticket};
use flight::{Op, Owner, Waiting};
use split::{Cursor, Segment};
use tables::{Data, Plan};

pub use identity::{Identity, Serial};
pub use tables::MEMORY_BYTES;

/// The maximum number of slots, and of operations at a time.
const SLOTS: usize = 256;
/// The maximum number of pieces of an operation.
pub const PIECES: usize = 256;
/// The queue.
const QUEUE: u16 = 0;

/// Kinds of requests (V 5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
}

/// The driver of one disk.
#[derive(Debug)]
pub struct Blk<C, R, M> {
    transport: Transport<C, R>,
    queue: Queue<M>,
    life: Life,
    /// Whether the device has violated the protocol. Then nothing that it writes is looked at until it is reset.
    broken: bool,
    limits: Limits,
    plan: Plan,
    /// The operation that each slot works for.
    slots: Vec<Option<u16>>,
    free_slots: Vec<u16>,
    ops: Vec<Option<Op>>,
    free_ops: Vec<u16>,
    waiting: Option<Waiting>,
    waiting_pieces: Vec<Piece>,
    /// The segments of the request that is being made.
    segments: Vec<Segment>,
    /// Operations to be returned by [`Device::completed`] that ended without a request, or while the serial number was read.
    done: VecDeque<(Ticket, Outcome)>,
    /// Whether requests were made while completed ones were taken: the device was not told of them yet.
    went_on: bool,
    /// Whether a completed request was found since the queue was last found empty.
    came: bool,
    /// Whether the last search found no completed request at all, though the device has requests.
    in_vain: bool,
    identity: Option<Identity>,
}

/// The limits of a disk whose configuration is not read yet.
const UNKNOWN: Limits = Limits {
    shape: Shape { sectors: 0, block_bytes: 512, physical_bytes: 512, read_only: true, volatile: false, discard: None },
    segments: 1,
    segment_bytes: 512,
    discard_sectors: 0,
};

impl<C: ConfigurationPorts, R: Registers, M: DmaMemory> Blk<C, R, M> {
    /// Makes the driver of a disk, which [`Device::reset`] then starts. `memory` must have [`MEMORY_BYTES`]. It belongs to the
    /// device until [`Blk::into_memory`].
    ///
    /// # Errors
    /// [`NotTaken::NoRoom`]: `memory` is too short, or no memory is left on the heap.
    pub fn new(transport: Transport<C, R>, memory: M) -> Result<Self, NotTaken> {
        let enough = memory.bytes() >= MEMORY_BYTES;
        let mut blk = Self {
            transport,
            queue: Queue::new(memory),
            life: Life::New,
            broken: false,
            limits: UNKNOWN,
            plan: Plan::NONE,
            slots: Vec::new(),
            free_slots: Vec::new(),
            ops: Vec::new(),
            free_ops: Vec::new(),
            waiting: None,
            waiting_pieces: Vec::new(),
            segments: Vec::new(),
            done: VecDeque::new(),
            went_on: false,
            came: false,
            in_vain: false,
            identity: None,
        };
        blk.make_room().filter(|()| enough).ok_or(NotTaken::NoRoom)?;
        Ok(blk)
    }

    /// Reserves all heap memory that the driver will need. `None` if there is too little.
    fn make_room(&mut self) -> Option<()> {
        self.slots.try_reserve_exact(SLOTS).ok()?;
        self.free_slots.try_reserve_exact(SLOTS).ok()?;
        self.ops.try_reserve_exact(SLOTS).ok()?;
        self.free_ops.try_reserve_exact(SLOTS).ok()?;
        self.waiting_pieces.try_reserve_exact(PIECES).ok()?;
        self.segments.try_reserve_exact(usize::from(config::MOST_SEGMENTS)).ok()?;
        self.done.try_reserve_exact(2 * SLOTS).ok()
    }

    /// Returns what is known of the serial number. The first call after a start asks the device.
    pub fn identify(&mut self) -> Identity {
        if self.runs() && self.identity.is_none() {
            let asked = self.begin(Owner::Serial).map(|op| {
                self.identity = Some(Identity::Pending);
                self.request(op, kind::GET_ID, 0, Data::Serial);
                self.kick();
            });
            debug_assert!(asked.is_some() || self.free_slots.is_empty(), "no operation is free, but a slot is");
        }
        if self.identity == Some(Identity::Pending) {
            while let Some(ended) = self.next_ended() {
                self.done.push_back(ended);
            }
        }
        self.identity.unwrap_or(Identity::Pending)
    }

    /// Masks or unmasks the device's interrupt: for a device that interrupts without reason, and before its port is closed.
    pub fn mask_interrupt(&self, masked: bool) {
        self.transport.mask_interrupt(masked);
    }

    /// Begins or continues to stop the device, in steps like [`Device::reset`]. After [`Reset::Done`], the device accesses no
    /// memory and sends no interrupt until [`Device::reset`] starts it again.
    pub fn stop(&mut self) -> Reset {
        let stopped = self.life.stop(&self.transport);
        if stopped == Reset::Done {
            self.forget();
        }
        stopped
    }

    /// Returns the memory that [`Blk::new`] was given. `None` if the device was started and not stopped; the memory is dropped.
    pub fn into_memory(self) -> Option<M> {
        (self.life == Life::New).then(|| self.queue.into_memory())
    }

    fn runs(&self) -> bool {
        self.life == Life::Running && !self.broken
    }

    /// Forgets all operations and requests in flight.
    fn forget(&mut self) {
        self.slots.clear();
        self.free_slots.clear();
        self.ops.clear();
        self.free_ops.clear();
        self.done.clear();
        (self.waiting, self.went_on, self.broken) = (None, false, false);
        (self.came, self.in_vain) = (false, false);
        self.identity = self.identity.filter(|identity| *identity != Identity::Pending);
    }

    /// Starts the device after a reset. Fails with the reason why the device cannot be used.
    fn start(&mut self) -> Result<(), &'static str> {
        let bytes = self.transport.device().map_or(0, Registers::bytes);
        let features = self.transport.negotiate(|_| config::wanted(bytes))?;
        self.limits = Limits::read(&self.transport, features)?;
        let limit = self.transport.queue_limit(QUEUE).min(crate::virtio::MOST);
        let size = if limit == 0 { 0 } else { 1 << limit.ilog2() };
        let indirect = features & feature::INDIRECT_DESC != 0;
        self.plan = Plan::new(size, self.limits.segments, indirect).ok_or("has no queue that a request fits into")?;
        self.queue.empty(size, features);
        self.forget();
        for slot in (0..self.plan.slots).rev() {
            self.slots.push(None);
            self.ops.push(None);
            self.free_slots.push(slot);
            self.free_ops.push(slot);
        }
        self.transport.begin(&[(size, self.queue.parts())])
    }

    /// Ends an operation without a request to the device.
    fn at_once(&mut self, ticket: Ticket, outcome: Outcome) {
        self.done.push_back((ticket, outcome));
    }

    /// Returns whether the disk has these sectors, they are whole blocks, and (`write`) the disk is writable.
    fn fits(&self, write: bool, sector: u64, sectors: u64) -> bool {
        let unit = u64::from(self.limits.shape.block_bytes / config::BYTES);
        let whole = sector.is_multiple_of(unit) && sectors.is_multiple_of(unit);
        whole && self.limits.shape.judge(write, sector, sectors).is_ok()
    }

    fn read_or_write(&mut self, ticket: Ticket, write: bool, sector: u64, pieces: &[Piece]) -> Result<(), Full> {
        let whole = pieces.iter().all(|piece| piece.bytes.is_multiple_of(config::BYTES)) && pieces.len() <= PIECES;
        let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.bytes)).sum();
        if !whole || !self.fits(write, sector, bytes / u64::from(config::BYTES)) {
            self.at_once(ticket, Outcome::Failed);
            return Ok(());
        }
        let op = self.begin(Owner::Ticket(ticket)).ok_or(Full)?;
        self.waiting = Some(Waiting { op, write, sector, cursor: Cursor::default() });
        self.go_on(pieces);
        if self.waiting.is_some() {
            self.waiting_pieces.clear();
            self.waiting_pieces.extend(pieces);
        }
        // An operation that could not make its first request has ended.
        if let Some(ended) = self.end_if_over(op) {
            self.done.push_back(ended);
        }
        Ok(())
    }

    fn discard(&mut self, ticket: Ticket, sector: u64, sectors: u64) -> Result<(), Full> {
        let outcome = match self.limits.shape.discard {
            None => Outcome::Unsupported,
            Some(_) if !self.fits(true, sector, sectors) => Outcome::Failed,
            Some(_) => {
                let op = self.begin(Owner::Ticket(ticket)).ok_or(Full)?;
                if let Some(op) = self.op(op) {
                    op.discard = (sector, sectors);
                }
                self.go_on_discarding(op);
                return Ok(());
            }
        };
        self.at_once(ticket, outcome);
        Ok(())
    }
}

impl<C: ConfigurationPorts, R: Registers, M: DmaMemory> Device for Blk<C, R, M> {
    /// Returns the shape that the device had at its last start.
    fn shape(&self) -> Shape {
        self.limits.shape
    }

    fn submit(&mut self, ticket: Ticket, operation: Operation<'_>) -> Result<(), Full> {
        if !self.runs() || self.waiting.is_some() || self.done.len() >= SLOTS {
            return Err(Full);
        }
        match operation {
            Operation::Read { sector, pieces } => self.read_or_write(ticket, false, sector, pieces),
            Operation::Write { sector, pieces } => self.read_or_write(ticket, true, sector, pieces),
            Operation::Discard { sector, sectors } => self.discard(ticket, sector, sectors),
            Operation::Flush if !self.limits.shape.volatile => {
                self.at_once(ticket, Outcome::Good);
                Ok(())
            }
            Operation::Flush => {
                let op = self.begin(Owner::Ticket(ticket)).ok_or(Full)?;
                self.request(op, kind::FLUSH, 0, Data::Nothing);
                Ok(())
            }
        }
    }

    fn kick(&mut self) {
        if self.runs() && self.queue.expose() {
            self.transport.notify(QUEUE);
        }
    }

    fn completed(&mut self) -> Option<(Ticket, Outcome)> {
        self.done.pop_front().or_else(|| self.next_ended())
    }

    fn rearm(&mut self) -> bool {
        self.runs() && (self.queue.rearm() || !self.done.is_empty())
    }

    /// Reads the device's status only if [`Device::completed`] has just found nothing though the device has requests. In a
    /// virtual machine, reading a register costs more than the rest of a request.
    fn needs_reset(&self) -> bool {
        !self.runs() || self.in_vain && self.transport.needs_reset()
    }

    fn reset(&mut self) -> Reset {
        let quiet = self.life.quiesce(&self.transport);
        if quiet != Reset::Done {
            return quiet;
        }
        let started = self.start();
        self.life.begin(&self.transport, started)
    }
}
