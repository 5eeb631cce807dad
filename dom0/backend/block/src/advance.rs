//! How a flight advances: descriptors, places, copies, pins, the device.

use disk::{Operation, Outcome, Place, Ticket};
use ring_protocol::SharedPage;
use ring_protocol::block::{Direction, Extent, INDIRECT_SEGMENTS, PAGE_BYTES, SECTOR_BYTES, Segment, Status, judge};
use zerocopy::FromBytes;

use crate::flight::{Durable, Index, Set, Stage, Work};
use crate::health::Health;
use crate::host::{GrantCopy, Host, PinError, Wanted};
use crate::limits::FLIGHTS;
use crate::queue::{FLUSH, PROOF, Queue};

/// The maximum number of bytes of the descriptors of a request.
const DESCRIPTORS: usize = INDIRECT_SEGMENTS * size_of::<Segment>();
/// The number of requests whose descriptors fit into a page.
const PER_PAGE: usize = PAGE_BYTES / DESCRIPTORS;
/// The number of descriptors that are read from a page at once.
const READ_AT_ONCE: usize = 32;
/// The maximum number of sectors that one turn gives back in memory: 4,096 pages. A device discards all at once.
const DISCARDED: u64 = 32_768;
/// The maximum number of completions that a turn looks at. A correct device never has that many operations.
const COMPLETIONS: usize = 4 * FLIGHTS;

impl<H: Host> Queue<H> {
    /// Takes the operations that the device has completed.
    pub(crate) fn complete(&mut self) {
        for _ in 0..COMPLETIONS {
            let Some((Ticket(ticket), outcome)) = self.device.as_mut().and_then(|device| device.completed()) else {
                return;
            };
            let (resets, number) = (ticket >> 8, ticket & 0xff);
            // A completion from before the reset is ignored: its operation is issued again.
            if self.health.is_resetting() || resets != self.resets & (u32::MAX >> 8) {
                continue;
            }
            match number {
                FLUSH if self.flushing.is_some() && self.health == Health::Fine => self.flush_ended(outcome),
                PROOF if self.flushing.is_some() && self.health == Health::Proving => self.proved(outcome),
                number if self.flights.at(Stage::Device).has(Index::of(number)) && number < FLUSH => {
                    self.part_ended(Index::of(number), outcome);
                }
                // The device does not have this operation.
                _ => {}
            }
        }
    }

    fn part_ended(&mut self, index: Index, outcome: Outcome) {
        self.let_go(index);
        let flight = self.flights.get_mut(index);
        match (flight.work, outcome) {
            (Work::Transfer(_), Outcome::Good) => {
                let (_, sectors) = flight.part;
                flight.cursor = flight.beyond;
                flight.sector += sectors;
                flight.left -= sectors;
                self.flights.go(index, Stage::Plan);
            }
            (Work::Discard, Outcome::Good) => self.flights.end(index, Status::Okay),
            (Work::Discard, Outcome::Unsupported) => self.flights.end(index, Status::Unsupported),
            _ => self.flights.end(index, Status::Error),
        }
    }

    /// Advances every flight as far as possible without waiting.
    pub(crate) fn advance(&mut self, host: &mut H, now_ns: u64) {
        self.fetch(host);
        self.plan_all(host);
        self.pin(host);
        self.submit(now_ns);
        self.submit_flush(now_ns);
        if core::mem::take(&mut self.kick)
            && let Some(device) = &mut self.device
        {
            device.kick();
        }
    }

    /// Finds the place of the next sectors of each flight in [`Stage::Plan`], and copies those that are in memory.
    fn plan_all(&mut self, host: &mut H) {
        let planned = self.flights.at(Stage::Plan);
        if planned.is_empty() {
            return;
        }
        let discards = planned
            .filter(|index| self.flights.get(*index).work == Work::Discard)
            .fold(0, |all, index| all | index.bit());
        Set(planned.0 & !discards).for_each(|index| self.plan(host, index));
        let step = DISCARDED / Set(discards).len().max(1) as u64;
        Set(discards).for_each(|index| self.discard(host, index, step));
        self.run_copies(host);
    }

    /// Copies the descriptors of indirect requests, as many in one call as there is scratch memory for.
    fn fetch(&mut self, host: &mut H) {
        let mut waiting = self.flights.at(Stage::Fetch);
        if waiting.is_empty() {
            return;
        }
        if self.scratch.is_empty() {
            waiting.for_each(|index| self.flights.end(index, Status::Error));
            return;
        }
        loop {
            let group = self.group(&mut waiting);
            if group.is_empty() {
                return;
            }
            let failed = self.copies.run(host);
            for (place, index) in group.enumerate() {
                if failed.has(index) {
                    self.flights.end(index, Status::Error);
                } else {
                    self.judge(index, place);
                }
            }
        }
    }

    /// Adds copies of descriptors for the next flights in `waiting`. Returns those flights. A flight without memory for its
    /// segments is skipped, and tried again in a later turn.
    fn group(&mut self, waiting: &mut Set) -> Set {
        let mut group = Set::default();
        let mut places =
            self.scratch.iter().flat_map(|scratch| (0..PER_PAGE).map(|at| (scratch.page, at * DESCRIPTORS)));
        for index in waiting {
            let flight = self.flights.get_mut(index);
            let Some(vbd) = self.vbds.get(flight.vbd.0).and_then(Option::as_ref) else { continue };
            if flight.segments.try_reserve(flight.count).is_err() {
                continue;
            }
            let Some((page, at)) = places.next() else { break };
            let copy = GrantCopy {
                domain: vbd.domain,
                reference: flight.descriptors,
                offset: 0,
                page,
                page_offset: u16::try_from(at).unwrap_or(0),
                bytes: u16::try_from(flight.count * size_of::<Segment>()).unwrap_or(0),
                direction: Direction::Write,
            };
            self.copies.add(index, copy);
            group = group.with(Set(index.bit()));
            if group.len() == self.scratch.len() * PER_PAGE {
                break;
            }
        }
        group
    }

    /// Reads the descriptors of a request once, from scratch memory, and checks them.
    fn judge(&mut self, index: Index, place: usize) {
        let flight = self.flights.get_mut(index);
        let Some(vbd) = self.vbds.get_mut(flight.vbd.0).and_then(Option::as_mut) else { return };
        let Some(scratch) = self.scratch.get(place / PER_PAGE) else { return };
        flight.segments.clear();
        for first in (0..flight.count).step_by(READ_AT_ONCE) {
            let mut bytes = [0; READ_AT_ONCE * size_of::<Segment>()];
            let count = READ_AT_ONCE.min(flight.count - first);
            let used = bytes.get_mut(..count * size_of::<Segment>()).unwrap_or_default();
            scratch.memory.read(place % PER_PAGE * DESCRIPTORS + first * size_of::<Segment>(), used);
            let segments = used.as_chunks::<8>().0.iter();
            flight.segments.extend(segments.filter_map(|bytes| Segment::read_from_bytes(bytes).ok()));
        }
        match judge(&flight.segments, flight.sector, &vbd.geometry) {
            Ok(Extent { sectors, .. }) => {
                (flight.left, flight.sectors) = (sectors, sectors);
                let moved = u32::try_from(sectors).unwrap_or(0).saturating_mul(SECTOR_BYTES);
                vbd.refund(flight.charged.saturating_sub(moved));
                self.flights.go(index, Stage::Plan);
            }
            Err(refused) => self.flights.end(index, refused.status()),
        }
    }

    /// Finds the place of the next sectors and copies those in memory, until the next sectors are on the device or none are
    /// left.
    fn plan(&mut self, host: &mut H, index: Index) {
        loop {
            let flight = self.flights.get_mut(index);
            if flight.left == 0 {
                return self.transferred(index);
            }
            let most = u32::try_from(flight.left).unwrap_or(u32::MAX);
            let Some(vbd) = self.vbds.get_mut(flight.vbd.0).and_then(Option::as_mut) else { return };
            let Ok((place, run)) = vbd.disk.place(!flight.reads(), flight.sector, most) else {
                return self.flights.end(index, Status::Error);
            };
            let sectors = run.clamp(1, most);
            let copied = match place {
                Place::Device { sector } if self.device.is_some() => {
                    flight.part = (sector, sectors.into());
                    return self.flights.go(index, Stage::Pin);
                }
                Place::Memory { page, offset } => self.copy(host, index, (page, Some(offset)), sectors),
                Place::Zeroes if flight.reads() => self.copy(host, index, (self.zeroes, None), sectors),
                // The disk contradicts itself.
                Place::Device { .. } | Place::Zeroes => None,
            };
            if copied.is_none() {
                return self.flights.end(index, Status::Error);
            }
        }
    }

    /// Adds copies between the guest's pages and a page of dom0. With an offset, the sectors follow each other in the page from
    /// there on; with `None`, each copy begins at byte 0 (a page of zeroes). Returns `None` if the page or the guest's segments
    /// do not have the sectors.
    fn copy(&mut self, host: &mut H, index: Index, (page, offset): (u64, Option<u16>), sectors: u32) -> Option<()> {
        let mut at = u32::from(offset.unwrap_or(0));
        let room = u32::try_from(PAGE_BYTES).ok()?.checked_sub(at)? / SECTOR_BYTES;
        let sectors = if offset.is_some() { sectors.min(room) } else { sectors };
        let mut left = sectors;
        while left > 0 {
            if self.copies.is_full() {
                self.run_copies(host);
            }
            let flight = self.flights.get_mut(index);
            let vbd = self.vbds.get(flight.vbd.0)?.as_ref()?;
            let span = flight.cursor.next(&flight.segments, left)?;
            let Work::Transfer(direction) = flight.work else { return None };
            let copy = GrantCopy {
                domain: vbd.domain,
                reference: span.reference,
                offset: span.offset,
                page,
                page_offset: u16::try_from(at).ok()?,
                bytes: span.bytes,
                direction,
            };
            self.copies.add(index, copy);
            left -= span.sectors;
            if offset.is_some() {
                at += u32::from(span.bytes);
            }
        }
        let flight = self.flights.get_mut(index);
        flight.sector += u64::from(sectors);
        flight.left -= u64::from(sectors);
        (sectors > 0).then_some(())
    }

    /// Does the copies of the batch. A request with a failed copy gets an error, even if its later steps succeed.
    fn run_copies(&mut self, host: &mut H) {
        for index in self.copies.run(host) {
            self.flights.get_mut(index).status = Status::Error;
        }
    }

    /// All sectors of a transfer have been moved: a durable write is flushed next, any other request ends.
    fn transferred(&mut self, index: Index) {
        let flight = self.flights.get(index);
        let through = self.vbd(flight.vbd).is_some_and(|vbd| vbd.write_through);
        if through && flight.work == Work::Transfer(Direction::Write) {
            self.flights.get_mut(index).durable = Durable::After;
        }
        match self.flights.get(index).durable {
            Durable::After => self.flush(index),
            Durable::No | Durable::Before => self.flights.end(index, Status::Okay),
        }
    }

    /// Gives back at most `at_most` sectors in memory, where each page takes a step, or all sectors if that is up to the
    /// device.
    fn discard(&mut self, host: &mut H, index: Index, at_most: u64) {
        // Outstanding copies are done first: a page that is given back may belong to another disk next.
        self.run_copies(host);
        let flight = self.flights.get_mut(index);
        let Some(vbd) = self.vbds.get_mut(flight.vbd.0).and_then(Option::as_mut) else { return };
        let sectors = flight.left.min(at_most);
        let mut part = vbd.disk.discard(flight.sector, sectors);
        if let Ok(Some(_)) = part {
            // The device discards the sectors, all in one operation.
            part = vbd.disk.discard(flight.sector, flight.left);
        }
        match part {
            Ok(None) => {
                flight.sector += sectors;
                flight.left -= sectors;
                if flight.left == 0 {
                    self.flights.end(index, Status::Okay);
                }
            }
            Ok(Some(part)) if self.device.is_some() => {
                flight.part = part;
                self.flights.go(index, Stage::Submit);
            }
            Ok(Some(_)) | Err(_) => self.flights.end(index, Status::Error),
        }
    }

    /// Pins the pages of the next part of each flight in [`Stage::Pin`], in few calls.
    fn pin(&mut self, host: &mut H) {
        for index in self.flights.at(Stage::Pin) {
            if self.flights.get(index).status != Status::Okay || self.health == Health::Dead {
                self.flights.end(index, Status::Error);
                continue;
            }
            if self.pinning.is_full() {
                self.run_pins(host);
            }
            self.want_pins(index);
        }
        self.run_pins(host);
    }

    /// Adds the pages of a flight's next part to the batch. Without memory for their pins, the flight tries again in a later
    /// turn.
    fn want_pins(&mut self, index: Index) {
        let flight = self.flights.get_mut(index);
        let Some(vbd) = self.vbds.get(flight.vbd.0).and_then(Option::as_ref) else { return };
        let count = flight.segments.len();
        if flight.handles.try_reserve(count).is_err() || flight.pieces.try_reserve(count).is_err() {
            return;
        }
        let writable = flight.reads();
        let (mut cursor, mut left) = (flight.cursor, u32::try_from(flight.part.1).unwrap_or(0));
        let domain = vbd.domain;
        let spans = core::iter::from_fn(|| {
            let span = cursor.next(&flight.segments, left)?;
            left -= span.sectors;
            Some((span, Wanted { domain, reference: span.reference, writable }))
        });
        self.pinning.add(index, spans);
        flight.beyond = cursor;
    }

    fn run_pins(&mut self, host: &mut H) {
        if self.pinning.is_empty() {
            return;
        }
        self.pinning.run(host);
        loop {
            let Some((index, spans, answers)) = self.pinning.next_owner() else { return };
            let flight = self.flights.get_mut(index);
            let (mut refused, mut starved) = (false, false);
            for (span, answer) in spans.iter().zip(answers) {
                match answer {
                    Ok(pinned) => {
                        flight.handles.push(pinned.handle);
                        let address = pinned.address.plus(span.offset.into());
                        flight.pieces.push(disk::Piece { address, bytes: span.bytes.into() });
                    }
                    Err(PinError::Refused) => refused = true,
                    Err(PinError::NoHandles) => starved = true,
                }
            }
            match (refused, starved) {
                (true, _) => {
                    self.let_go(index);
                    self.flights.end(index, Status::Error);
                }
                // A flight that waits keeps no pins: else two flights could wait for each other's.
                (_, true) => self.let_go(index),
                _ => self.flights.go(index, Stage::Submit),
            }
        }
    }

    /// Marks the pins of a flight to be given back. The device must not have the flight.
    pub(crate) fn let_go(&mut self, index: Index) {
        let flight = self.flights.get_mut(index);
        self.loose.append(&mut flight.handles);
        flight.pieces.clear();
    }

    /// Submits the flights in [`Stage::Submit`] to the device.
    fn submit(&mut self, now_ns: u64) {
        for index in self.flights.at(Stage::Submit) {
            if self.health == Health::Dead {
                self.let_go(index);
                self.flights.end(index, Status::Error);
                continue;
            }
            let ticket = self.ticket(index.number());
            let flight = self.flights.get_mut(index);
            let (sector, sectors) = flight.part;
            let operation = match flight.work {
                Work::Transfer(Direction::Read) => Operation::Read { sector, pieces: &flight.pieces },
                Work::Transfer(Direction::Write) => Operation::Write { sector, pieces: &flight.pieces },
                Work::Discard => Operation::Discard { sector, sectors },
                Work::Flush => Operation::Flush,
            };
            let Some(device) = self.device.as_mut().filter(|_| self.health == Health::Fine) else { return };
            if device.submit(ticket, operation).is_err() {
                return;
            }
            flight.since_ns = now_ns;
            self.kick = true;
            self.flights.go(index, Stage::Device);
            self.watch_from(now_ns);
        }
    }
}
