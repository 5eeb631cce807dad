//! The vifs of a switch, and packets on their way into RX rings.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use network::{Checksum, FrameInfo, Headers, Mac, PortId, Protocol, Segmentation, checksum, segment};
use ring_protocol::net::{Extra, Gso, GsoProtocol, PAGE_BYTES, RxResponse, rx_flag, status};
use zerocopy::transmute;

use crate::batch::{Batch, Piece, Prepared, Target, cut};
use crate::connection::{Broken, ConnectError, Connection, Disconnected, Drop, VifId};
use crate::header::Network;
use crate::host::{Buffer, GrantCopy, Host, Side};
use crate::limits::MAX_VIFS;
use crate::switch::Event;
use crate::vif::Vif;

/// Frames in a buffer begin at a multiple of this number of bytes.
pub(crate) const ALIGNMENT: usize = 64;

/// What accompanies a packet into an RX ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) bytes: usize,
    pub(crate) blank: bool,
    pub(crate) validated: bool,
    pub(crate) gso: Option<Gso>,
    pub(crate) network: Network,
}

impl Load {
    /// Returns the load of a frame in dom0's memory.
    fn of_frame(frame: &[u8], info: FrameInfo) -> Self {
        let gso = info.segmentation.map(|how| {
            let protocol = match how.protocol {
                Protocol::Tcp4 => GsoProtocol::Tcp4,
                Protocol::Tcp6 => GsoProtocol::Tcp6,
            };
            Gso { protocol, bytes: how.bytes }
        });
        Self {
            bytes: frame.len(),
            blank: info.checksum == Checksum::Blank,
            validated: info.checksum == Checksum::Verified,
            gso,
            network: Headers::parse(frame, frame.len()).map_or(Network::Other, |headers| Network::of(&headers)),
        }
    }

    /// Returns what accompanies the packet as a frame.
    pub(crate) fn info(&self) -> FrameInfo {
        let checksum = match (self.blank, self.validated) {
            (true, _) => Checksum::Blank,
            (false, true) => Checksum::Verified,
            (false, false) => Checksum::Unverified,
        };
        let segmentation = self.gso.map(|gso| {
            let protocol = match gso.protocol {
                GsoProtocol::Tcp4 => Protocol::Tcp4,
                GsoProtocol::Tcp6 => Protocol::Tcp6,
            };
            Segmentation { protocol, bytes: gso.bytes }
        });
        FrameInfo { checksum, segmentation }
    }

    /// Returns how many frames the packet stands for.
    pub(crate) fn segments(&self) -> usize {
        self.gso.map_or(1, |gso| self.bytes.div_ceil(gso.bytes.max(1).into()))
    }

    fn flags(&self) -> u16 {
        match (self.blank, self.validated) {
            (true, _) => rx_flag::CHECKSUM_BLANK | rx_flag::DATA_VALIDATED,
            (false, true) => rx_flag::DATA_VALIDATED,
            (false, false) => 0,
        }
    }
}

/// The buffers that packets of a visited guest are copied from and to.
#[derive(Debug)]
pub(crate) struct Visited<'a, H: Host> {
    /// First bytes of the packets. The last page is for copies whose bytes nobody needs.
    pub(crate) scratch: &'a mut H::Buffer,
    /// Whole packets.
    pub(crate) linear: &'a mut H::Buffer,
}

/// All vifs of a switch.
#[derive(Debug)]
pub(crate) struct Vifs<H: Host> {
    places: Vec<Option<Vif<H>>>,
    /// How often each place was taken. The number is part of a vif's name.
    taken: Vec<u8>,
    /// The vifs' addresses and places, sorted.
    macs: Vec<(Mac, usize)>,
    pub(crate) batch: Batch,
    /// Frames of dom0's on their way to guests.
    staging: H::Buffer,
    staged: usize,
    /// Room for one segment.
    segment: Box<[u8]>,
    /// Copies that find out whose fault a failed copy is, and the delivery that each belongs to.
    probes: Vec<(GrantCopy, usize)>,
    /// The number of a page whose bytes nobody needs.
    waste: u64,
    events: VecDeque<Event>,
}

impl<H: Host> Vifs<H> {
    pub(crate) fn new(staging: H::Buffer, waste: u64, segment_bytes: usize) -> Self {
        Self {
            places: Vec::new(),
            taken: Vec::new(),
            macs: Vec::new(),
            batch: Batch::new(),
            staging,
            staged: 0,
            segment: vec![0; segment_bytes].into_boxed_slice(),
            probes: Vec::with_capacity(MAX_VIFS),
            waste,
            events: VecDeque::new(),
        }
    }

    /// Adds a vif.
    pub(crate) fn connect(&mut self, with: Connection<H>, now_ns: u64) -> Result<VifId, ConnectError> {
        let mac = with.mac;
        if mac.is_group() || mac.0 == [0; 6] {
            return Err(ConnectError::NoStation(mac));
        }
        let Err(order) = self.macs.binary_search_by_key(&mac, |(mac, _)| *mac) else {
            return Err(ConnectError::MacInUse(mac));
        };
        let place = self.places.iter().position(Option::is_none).unwrap_or(self.places.len());
        if place >= MAX_VIFS {
            return Err(ConnectError::TooMany);
        }
        // Each vif has one event at most, and the uplink one.
        let events = self.places.len() + 2;
        let reserved = self.places.try_reserve(1).and_then(|()| self.taken.try_reserve(1));
        let reserved = reserved.and_then(|()| self.macs.try_reserve(1)).and_then(|()| self.events.try_reserve(events));
        reserved.map_err(|_| ConnectError::NoMemory)?;
        let generation = self.taken.get(place).map_or(0, |taken| taken.wrapping_add(1));
        let id = VifId(PortId(u16::from(generation) << 8 | cut(place)));
        let vif = Vif::connect(with, id, now_ns)?;
        match (self.places.get_mut(place), self.taken.get_mut(place)) {
            (Some(free), Some(taken)) => (*free, *taken) = (Some(vif), generation),
            _ => {
                self.places.push(Some(vif));
                self.taken.push(generation);
            }
        }
        self.macs.insert(order, (mac, place));
        Ok(id)
    }

    pub(crate) fn disconnect(&mut self, id: VifId) -> Option<Disconnected<H>> {
        let place = self.place_of(id)?;
        self.macs.retain(|(_, other)| *other != place);
        self.places.get_mut(place)?.take().map(Vif::into_parts)
    }

    /// Returns the place of a vif. `None` if the vif has ended.
    pub(crate) fn place_of(&self, id: VifId) -> Option<usize> {
        let place = usize::from(id.0.0 & 0xff);
        self.at(place).filter(|vif| vif.id == id).map(|_| place)
    }

    /// Returns the place of the vif with this address. `None` if there is no such vif.
    pub(crate) fn place_of_mac(&self, mac: Mac) -> Option<usize> {
        let found = self.macs.binary_search_by_key(&mac, |(mac, _)| *mac).ok()?;
        self.macs.get(found).map(|(_, place)| *place)
    }

    pub(crate) fn places(&self) -> usize {
        self.places.len()
    }

    pub(crate) fn at(&self, place: usize) -> Option<&Vif<H>> {
        self.places.get(place)?.as_ref()
    }

    pub(crate) fn at_mut(&mut self, place: usize) -> Option<&mut Vif<H>> {
        self.places.get_mut(place)?.as_mut()
    }

    /// Returns a vif that its guest has not broken. `None` if there is no such vif.
    pub(crate) fn open(&mut self, place: usize) -> Option<&mut Vif<H>> {
        self.at_mut(place).filter(|vif| !vif.broken)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Vif<H>> {
        self.places.iter().flatten()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Vif<H>> {
        self.places.iter_mut().flatten()
    }

    pub(crate) fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(crate) fn report(&mut self, event: Event) {
        self.events.push_back(event);
    }

    /// Ends what a vif does, because its guest broke a rule.
    pub(crate) fn break_off(&mut self, place: usize, why: Broken) {
        let Some(vif) = self.open(place) else { return };
        (vif.broken, vif.attention, vif.wait) = (true, false, None);
        let id = vif.id;
        self.report(Event::Broken(id, why));
        self.wake_senders(id);
    }

    /// Lets the senders that wait for this vif go on.
    pub(crate) fn wake_senders(&mut self, id: VifId) {
        if let Some(vif) = self.place_of(id).and_then(|place| self.at_mut(place)) {
            vif.awaited = 0;
        }
        for vif in self.iter_mut().filter(|vif| vif.wait.is_some_and(|wait| wait.on == id)) {
            (vif.wait, vif.attention) = (None, true);
        }
    }

    /// Returns the number of RX slots that the batch's packet takes at this vif, the extra slot among them. `None` if the guest
    /// takes packets of one slot alone, and the packet has more.
    pub(crate) fn slots(&self, place: usize, load: &Load) -> Option<usize> {
        let scatter_gather = self.at(place)?.takes.scatter_gather;
        let slots = self.batch.slots(load.bytes, scatter_gather)?;
        Some(slots + usize::from(load.gso.is_some()))
    }

    /// Returns whether the vif has buffers for a packet that waits for nobody.
    pub(crate) fn has_room(&mut self, place: usize, slots: usize) -> bool {
        match self.open(place).map(|vif| vif.has_room(slots)) {
            Some(Ok(has_room)) => has_room,
            Some(Err(error)) => {
                self.break_off(place, Broken::RxRing(error));
                false
            }
            None => false,
        }
    }

    /// Adds the batch's packet to the batch, for a vif that has room.
    pub(crate) fn deliver(&mut self, place: usize, job: Option<usize>, load: &Load) {
        let Self { places, batch, .. } = self;
        let Some(vif) = places.get_mut(place).and_then(Option::as_mut) else { return };
        let scatter_gather = vif.takes.scatter_gather;
        let Some(slots) = batch.slots(load.bytes, scatter_gather) else { return };
        let by_slot = batch.goes_slot_by_slot(scatter_gather);
        batch.targets.clear();
        let mut left = load.bytes;
        for at in 0..slots {
            let whole = (0, cut(left.min(PAGE_BYTES)));
            let (offset, bytes) = if by_slot { batch.cuts.get(at).copied().unwrap_or(whole) } else { whole };
            left -= usize::from(bytes).min(left);
            // The caller has seen that the buffers are there.
            let Some(buffer) = vif.take_buffer() else { break };
            let mut flags = if at + 1 < slots { rx_flag::MORE_DATA } else { 0 };
            if at == 0 {
                flags |= load.flags() | if load.gso.is_some() { rx_flag::EXTRA_INFO } else { 0 };
            }
            let response = RxResponse { id: buffer.id, offset, flags, status: bytes.cast_signed() };
            batch.prepared.push(Prepared { id: buffer.id, slot: transmute!(response) });
            let side = Side::Guest { domain: vif.domain, reference: buffer.reference };
            batch.targets.push(Piece { side, offset, bytes });
            if let Some(gso) = load.gso.filter(|_| at == 0) {
                let Some(buffer) = vif.take_buffer() else { break };
                batch.prepared.push(Prepared { id: buffer.id, slot: transmute!(Extra::gso(gso)) });
            }
        }
        batch.add_copies();
        batch.add_delivery(Target::Vif(place), job, load.bytes);
    }

    /// Does all copies and fills the RX rings. Returns the first packet of the visited guest that cannot be read: that packet,
    /// and all later packets of the guest, are delivered to nobody. `None` if there is no such packet.
    pub(crate) fn settle(&mut self, host: &mut H, visit: Visited<'_, H>) -> Option<usize> {
        let Visited { scratch, linear } = visit;
        self.batch.run(host, &mut [&mut self.staging, scratch, linear]);
        let bad = if self.batch.answers.contains(&false) { self.find_fault(host, scratch) } else { None };
        self.fill(bad);
        bad
    }

    /// Does all copies of dom0's own frames and fills the RX rings. No packet of a visited guest may be in the batch.
    pub(crate) fn settle_own(&mut self, host: &mut H) {
        self.batch.run(host, &mut [&mut self.staging]);
        self.fill(None);
    }

    /// Fills the RX rings, as the answers to the copies say. The packets of the visited guest from `bad` on are undone.
    fn fill(&mut self, bad: Option<usize>) {
        let Self { places, batch, .. } = self;
        let (mut copies_at, mut prepared_at) = (0, 0);
        for delivery in &batch.deliveries {
            let undone = bad.is_some() && delivery.job >= bad;
            let slots = batch.prepared.get(prepared_at..delivery.prepared_end).unwrap_or_default();
            if let Target::Vif(place) = delivery.target
                && let Some(vif) = places.get_mut(place).and_then(Option::as_mut)
            {
                if undone {
                    vif.put_back_buffers(slots.len());
                } else if batch.failed(copies_at, delivery.copies_end).is_some() {
                    for Prepared { id, .. } in slots {
                        vif.fill(&transmute!(RxResponse { id: *id, offset: 0, flags: 0, status: status::ERROR }));
                    }
                    vif.dropped(Drop::BadBuffer);
                } else {
                    slots.iter().for_each(|prepared| vif.fill(&prepared.slot));
                    vif.counters.received_packets += 1;
                    vif.counters.received_bytes += delivery.bytes as u64;
                }
            }
            (copies_at, prepared_at) = (delivery.copies_end, delivery.prepared_end);
        }
        batch.clear();
        self.staged = 0;
    }

    /// Copies have failed. Returns the first packet of the visited guest that cannot be read: a failed copy is done again, into
    /// a page of dom0. `None` if the receivers are at fault.
    fn find_fault(&mut self, host: &mut H, scratch: &mut H::Buffer) -> Option<usize> {
        let Self { batch, probes, waste, .. } = self;
        probes.clear();
        let (mut copies_at, mut bad) = (0, None);
        for delivery in &batch.deliveries {
            let failed = batch.failed(copies_at, delivery.copies_end);
            copies_at = delivery.copies_end;
            let (Some(copy), Some(job)) = (failed, delivery.job) else { continue };
            match (copy.from, delivery.target) {
                (Side::Guest { .. }, Target::Vif(_)) => {
                    probes.push((GrantCopy { to: Side::Own { page: *waste }, to_offset: 0, ..copy }, job));
                }
                // The page of dom0 can be written.
                (Side::Guest { .. }, Target::Linear) => {
                    bad = Some(job);
                    break;
                }
                (Side::Own { .. }, _) => {}
            }
        }
        let (mut copy, mut answer) = ([GrantCopy::NOTHING; PROBES], [false; PROBES]);
        for some in probes.chunks(PROBES) {
            copy.iter_mut().zip(some).for_each(|(place, (probe, _))| *place = *probe);
            answer.fill(false);
            let (Some(copies), Some(answers)) = (copy.get(..some.len()), answer.get_mut(..some.len())) else { break };
            host.copy(copies, answers, &mut [&mut *scratch]);
            let failed = some.iter().zip(answers).find(|(_, done)| !**done);
            if let Some(((_, job), _)) = failed {
                return Some(*job);
            }
        }
        bad
    }

    /// Publishes responses of all vifs that have new ones.
    pub(crate) fn publish(&mut self, host: &mut H) {
        for vif in self.iter_mut().filter(|vif| vif.has_unpublished() && !vif.broken) {
            vif.publish(host);
        }
    }

    /// Returns whether the guest takes the packet as it is.
    pub(crate) fn takes(&self, place: usize, load: &Load) -> bool {
        let Some(takes) = self.at(place).map(|vif| vif.takes) else { return false };
        let cuts = match load.gso.map(|gso| gso.protocol) {
            None => true,
            Some(GsoProtocol::Tcp4) => takes.tcp4,
            Some(GsoProtocol::Tcp6) => takes.tcp6,
        };
        let finishes = match load.network {
            _ if !load.blank => true,
            Network::Ipv6 => takes.checksum6,
            _ => takes.checksum4,
        };
        cuts && finishes
    }

    /// Sends a frame of dom0's to a guest, as packets that the guest takes. The frame is dropped, and counted, if the guest has
    /// no room. Only frames of dom0's may be in the batch.
    pub(crate) fn send(&mut self, host: &mut H, place: usize, frame: &[u8], info: FrameInfo) {
        let load = Load::of_frame(frame, info);
        if self.takes(place, &load) {
            return self.stage(host, place, frame, &load, false);
        }
        let Some(how) = info.segmentation else { return self.stage(host, place, frame, &load, true) };
        let mut room = core::mem::take(&mut self.segment);
        let cut = Headers::parse(frame, frame.len()).ok();
        let cut = cut.and_then(|headers| segment::Cut::new(frame, &headers, how, &mut room).ok());
        match cut {
            Some(mut cut) => {
                while let Some(segment) = cut.next_segment() {
                    let load = Load { bytes: segment.len(), blank: false, validated: true, gso: None, ..load };
                    self.stage(host, place, segment, &load, false);
                }
            }
            None => self.drop(place, Drop::Unsupported),
        }
        self.segment = room;
    }

    /// Copies a frame into the staging buffer and adds it to the batch.
    fn stage(&mut self, host: &mut H, place: usize, frame: &[u8], load: &Load, finish: bool) {
        let end = |staged: usize| staged + frame.len();
        if self.batch.is_full() || end(self.staged) > self.staging.bytes().len() {
            self.settle_own(host);
        }
        let start = self.staged;
        let Some(room) = self.staging.bytes_mut().get_mut(start..end(start)) else {
            return self.drop(place, Drop::Unsupported);
        };
        room.copy_from_slice(frame);
        let mut load = *load;
        if finish {
            let finished = Headers::parse(room, room.len()).ok().map(|headers| checksum::finish(room, &headers));
            if !matches!(finished, Some(Ok(()))) {
                return self.drop(place, Drop::Unsupported);
            }
            (load.blank, load.validated) = (false, true);
        }
        let page = self.staging.page();
        if self.send_own(place, page, start, &load) {
            self.staged = end(start).next_multiple_of(ALIGNMENT);
        }
    }

    /// Adds a frame at `start` of consecutive pages of dom0 to the batch, for a guest that takes the frame as it is. Returns
    /// false if the frame was dropped.
    pub(crate) fn send_own(&mut self, place: usize, page: u64, start: usize, load: &Load) -> bool {
        self.batch.clear_packet();
        self.batch.add_own(page, start, load.bytes);
        let Some(slots) = self.slots(place, load) else {
            self.drop(place, Drop::Unsupported);
            return false;
        };
        if !self.has_room(place, slots) {
            self.drop(place, Drop::NoRoom);
            return false;
        }
        self.deliver(place, None, load);
        true
    }

    pub(crate) fn drop(&mut self, place: usize, reason: Drop) {
        if let Some(vif) = self.at_mut(place) {
            vif.dropped(reason);
        }
    }
}

/// The maximum number of copies that are done again in one call.
const PROBES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn a_load_and_a_frame_say_the_same() {
        for (checksum, blank, validated) in
            [(Checksum::Blank, true, false), (Checksum::Verified, false, true), (Checksum::Unverified, false, false)]
        {
            let segmentation = blank.then_some(Segmentation { protocol: Protocol::Tcp6, bytes: 1400 });
            let info = FrameInfo { checksum, segmentation };
            let load = Load::of_frame(&[0; 60], info);
            assert_eq!((load.blank, load.validated, load.info()), (blank, validated, info));
        }
        assert_eq!(rx_flag::CHECKSUM_BLANK | rx_flag::DATA_VALIDATED, 3);
        let response = RxResponse { id: 1, offset: 2, flags: 3, status: 4 };
        let slot: [u8; 8] = transmute!(response);
        assert_eq!(slot, response.as_bytes());
    }
}
