//! A visit: packets of one guest's TX ring are taken, looked at, carried to where they go, and answered.

use alloc::vec::Vec;

use network::{Headers, MAX_PACKET, Mac, PortId};
use ring_protocol::net::{Chain, Hostile, Packet, TxRequest, gather, status};

use crate::batch::{Piece, Target, cut};
use crate::connection::{Broken, Drop};
use crate::header::{Network, is_honest};
use crate::host::{Buffer, Host, Side};
use crate::limits::{FRAMES, PER_VISIT};
use crate::line::Mode;
use crate::outlet::Outlet;
use crate::ports::{ALIGNMENT, Load, Visited};
use crate::switch::{HEAD_BYTES, Switch};
use crate::vif::{Room, Wait};

/// The maximum number of RX slots that a sender waits for.
const AWAITED_SLOTS: usize = 64;

/// A packet of the visited guest.
#[derive(Clone, Copy, Debug)]
struct Job {
    /// The packet's first slot among those that were taken.
    at: usize,
    chain: Chain,
    /// How the packet is answered.
    status: i16,
}

/// A packet in the linear buffer, and where it goes.
#[derive(Clone, Copy, Debug)]
struct Gathered {
    job: usize,
    start: usize,
    load: Load,
    to: To,
}

/// Receivers of a whole packet.
#[derive(Clone, Copy, Debug, Default)]
struct To {
    uplink: bool,
    station: bool,
    /// The vif at this place.
    guest: Option<usize>,
    /// All vifs that do not take the packet as it is.
    other_guests: bool,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Guest(usize),
    Group,
    Station,
    Uplink,
    Nobody,
}

/// What becomes of the visit after a packet was planned.
enum Plan {
    Next,
    /// The guest waits for a receiver. This packet and all later ones stay in the ring.
    Wait,
    /// This packet cannot be read. All later ones stay in the ring.
    Bad(usize),
}

/// The lists of a visit. They keep their memory from visit to visit.
#[derive(Debug)]
pub(crate) struct Work {
    slots: Vec<TxRequest>,
    jobs: Vec<Job>,
    /// Where the copies of each packet's first bytes end.
    heads: Vec<usize>,
    gathered: Vec<Gathered>,
    /// Bytes of the linear buffer in use.
    used: usize,
    /// Frames that the visit has made: a packet counts for each of its receivers, and for each of the segments that it is cut
    /// into.
    frames: usize,
}

impl Work {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::with_capacity(PER_VISIT),
            jobs: Vec::with_capacity(PER_VISIT),
            heads: Vec::with_capacity(PER_VISIT),
            gathered: Vec::with_capacity(PER_VISIT),
            used: 0,
            frames: 0,
        }
    }
}

impl<H: Host> Switch<H> {
    /// Carries packets of one guest.
    pub(crate) fn visit(&mut self, host: &mut H, place: usize, now_ns: u64) {
        let gathered = self.gather(place);
        let more = match gathered {
            Ok(more) => more,
            Err(why) => return self.vifs.break_off(place, why),
        };
        self.fetch_heads(host, place);
        let decided = self.carry(host, place, now_ns);
        self.answer(place, decided, more, now_ns);
    }

    /// Takes slots and gathers packets. Returns whether more requests are in the ring.
    fn gather(&mut self, place: usize) -> Result<bool, Broken> {
        let Work { slots, jobs, .. } = &mut self.work;
        slots.clear();
        jobs.clear();
        let Some(vif) = self.vifs.open(place) else { return Ok(false) };
        let there = vif.look().map_err(Broken::TxRing)? as usize;
        while slots.len() < PER_VISIT {
            let Some(slot) = vif.take() else { break };
            slots.push(slot);
        }
        let (more, mut at) = (there > slots.len(), 0);
        while at < slots.len() {
            match gather(slots.get(at..).unwrap_or_default()) {
                Ok(chain) => {
                    jobs.push(Job { at, chain, status: status::OKAY });
                    at += chain.slots;
                }
                Err(Hostile::Unfinished) if more => break,
                Err(hostile) => return Err(Broken::Slots(hostile)),
            }
        }
        vif.put_back(slots.len() - at);
        Ok(more || at < slots.len())
    }

    /// Copies the first bytes of each packet into scratch memory, which guests cannot change.
    fn fetch_heads(&mut self, host: &mut H, place: usize) {
        let Work { slots, jobs, heads, .. } = &mut self.work;
        let Some(vif) = self.vifs.at(place) else { return };
        let (domain, scratch) = (vif.domain, self.scratch.page());
        let batch = &mut self.vifs.batch;
        heads.clear();
        for (n, job) in jobs.iter().enumerate() {
            if let Ok(packet) = &job.chain.packet {
                batch.pieces.clear();
                let mut left = head_bytes(packet);
                for part in packet.parts(&job.chain, slots.get(job.at..).unwrap_or_default()) {
                    let bytes = part.bytes.min(left);
                    let side = Side::Guest { domain, reference: part.reference };
                    batch.pieces.push(Piece { side, offset: part.offset, bytes });
                    left -= bytes;
                    if left == 0 {
                        break;
                    }
                }
                batch.aim_own(scratch, n * HEAD_BYTES, head_bytes(packet).into());
                batch.add_copies();
            }
            heads.push(batch.copies.len());
        }
        batch.run(host, &mut [&mut self.scratch]);
        let mut from = 0;
        for (job, end) in jobs.iter_mut().zip(heads) {
            if batch.failed(from, *end).is_some() {
                job.status = status::ERROR;
            }
            from = *end;
        }
        batch.clear();
    }

    /// Carries the packets to where they go. Returns how many are decided: the rest stays in the ring.
    fn carry(&mut self, host: &mut H, place: usize, now_ns: u64) -> usize {
        let mut decided = self.work.jobs.len();
        self.work.frames = 0;
        for job in 0..self.work.jobs.len() {
            if self.work.frames >= FRAMES {
                decided = job;
                break;
            }
            match self.plan(host, place, job, now_ns) {
                Plan::Next => {}
                Plan::Wait => {
                    decided = job;
                    break;
                }
                Plan::Bad(bad) => {
                    // Packets before the bad one may be gathered.
                    let _ = self.flush(host, place, now_ns);
                    return self.unreadable(place, bad);
                }
            }
        }
        match self.flush(host, place, now_ns) {
            Some(bad) => self.unreadable(place, bad),
            None => decided,
        }
    }

    /// Notes that a packet could not be read. Returns how many packets are decided.
    fn unreadable(&mut self, place: usize, job: usize) -> usize {
        // A sender that waits begins again at an earlier packet than it thought.
        if let Some(vif) = self.vifs.open(place) {
            (vif.wait, vif.attention) = (None, true);
        }
        self.refuse(place, job, Drop::BadGrant, status::ERROR);
        job + 1
    }

    /// Drops a packet of the guest, for a fault that is counted at the guest's vif.
    fn refuse(&mut self, place: usize, job: usize, reason: Drop, status: i16) {
        self.vifs.drop(place, reason);
        self.set_status(job, status);
    }

    fn set_status(&mut self, job: usize, status: i16) {
        if let Some(job) = self.work.jobs.get_mut(job) {
            job.status = status;
        }
    }

    fn plan(&mut self, host: &mut H, place: usize, n: usize, now_ns: u64) -> Plan {
        let Some(job) = self.work.jobs.get(n).copied() else { return Plan::Next };
        let Ok(packet) = job.chain.packet else {
            self.refuse(place, n, Drop::Malformed, status::ERROR);
            return Plan::Next;
        };
        if job.status != status::OKAY {
            self.refuse(place, n, Drop::BadGrant, status::ERROR);
            return Plan::Next;
        }
        let linear_end = self.work.used + usize::from(packet.bytes);
        if (self.vifs.batch.is_full() || linear_end > self.linear.bytes().len())
            && let Some(bad) = self.flush(host, place, now_ns)
        {
            return Plan::Bad(bad);
        }
        match self.judge(place, n, &packet) {
            Ok((destination, load)) => match self.route(place, destination) {
                Route::Guest(to) => self.plan_guest(host, place, n, to, &load, now_ns),
                Route::Group => self.plan_group(host, place, n, &load, now_ns),
                Route::Station => self.plan_linear(place, n, &load, To { station: true, ..To::default() }),
                Route::Uplink => self.plan_linear(place, n, &load, To { uplink: true, ..To::default() }),
                Route::Nobody => self.drop_sent(place, n, Drop::Unknown),
            },
            Err(reason) => self.drop_sent(place, n, reason),
        }
    }

    fn drop_sent(&mut self, place: usize, job: usize, reason: Drop) -> Plan {
        self.refuse(place, job, reason, status::DROPPED);
        Plan::Next
    }

    /// Reads a packet's headers, and judges whether the guest may send the packet. Returns its destination, and what
    /// accompanies it.
    fn judge(&self, place: usize, job: usize, packet: &Packet) -> Result<(Mac, Load), Drop> {
        let head = self.scratch.bytes().get(job * HEAD_BYTES..).unwrap_or_default();
        let head = head.get(..head_bytes(packet).into()).unwrap_or_default();
        let bytes = usize::from(packet.bytes);
        let headers = Headers::parse(head, bytes).map_err(|_| Drop::Malformed)?;
        let vif = self.vifs.at(place).ok_or(Drop::Malformed)?;
        if !is_honest(&headers, vif.mac, vif.address) {
            return Err(Drop::Spoofed);
        }
        let (network, destination) = (Network::of(&headers), headers.destination);
        match packet.gso {
            Some(gso) if !network.fits(gso.protocol) || destination.is_group() => return Err(Drop::Malformed),
            Some(gso) if usize::from(gso.bytes) > self.max_segment() => return Err(Drop::Oversize),
            None if bytes > self.max_frame() => return Err(Drop::Oversize),
            _ => {}
        }
        let Packet { checksum_blank: blank, data_validated: validated, gso, .. } = *packet;
        Ok((destination, Load { bytes, blank, validated, gso, network }))
    }

    /// Lists where the bytes of a packet lie: the first of them in scratch memory, the rest with the guest.
    fn list_pieces(&mut self, place: usize, n: usize) {
        let batch = &mut self.vifs.batch;
        batch.clear_packet();
        let Some(job) = self.work.jobs.get(n) else { return };
        let Ok(packet) = &job.chain.packet else { return };
        let head = head_bytes(packet);
        let start = n * HEAD_BYTES;
        batch.add_own(self.scratch.page(), start, head.into());
        batch.cuts.push((0, head));
        let Some(domain) = self.vifs.at(place).map(|vif| vif.domain) else { return };
        let batch = &mut self.vifs.batch;
        let mut skip = head;
        let slots = self.work.slots.get(job.at..).unwrap_or_default();
        for (at, part) in packet.parts(&job.chain, slots).enumerate() {
            if part.bytes <= skip {
                skip -= part.bytes;
                continue;
            }
            let (offset, bytes) = (part.offset + skip, part.bytes - skip);
            skip = 0;
            let side = Side::Guest { domain, reference: part.reference };
            batch.pieces.push(Piece { side, offset, bytes });
            match batch.cuts.first_mut() {
                Some((_, first)) if at == 0 => *first += bytes,
                _ => batch.cuts.push((offset, bytes)),
            }
        }
    }

    fn plan_guest(&mut self, host: &mut H, place: usize, n: usize, to: usize, load: &Load, now_ns: u64) -> Plan {
        let takes = self.vifs.takes(to, load);
        self.list_pieces(place, n);
        let slots = match self.vifs.slots(to, load) {
            Some(slots) if takes => slots,
            // The segments of the packet, or the packet with its checksum.
            _ => load.segments().min(AWAITED_SLOTS),
        };
        match self.room(place, to, slots, now_ns) {
            Room::Yes => {}
            Room::WaitUntil(_) => return Plan::Wait,
            Room::Stalled => {
                self.vifs.drop(to, Drop::Stalled);
                self.set_status(n, status::DROPPED);
                return Plan::Next;
            }
        }
        if !takes {
            return self.convert(host, place, n, load, To { guest: Some(to), ..To::default() }, now_ns);
        }
        if self.vifs.slots(to, load).is_none() {
            return self.drop_sent(place, n, Drop::Oversize);
        }
        self.vifs.deliver(to, Some(n), load);
        Plan::Next
    }

    /// Changes a packet in the linear buffer into what its receiver takes. Packets keep their order, so the packets before it
    /// are delivered first.
    fn convert(&mut self, host: &mut H, place: usize, n: usize, load: &Load, to: To, now_ns: u64) -> Plan {
        if let Some(bad) = self.flush(host, place, now_ns) {
            return Plan::Bad(bad);
        }
        self.plan_linear(place, n, load, to);
        self.flush(host, place, now_ns).map_or(Plan::Next, Plan::Bad)
    }

    /// Finds out whether a receiver has room. If the sender is to wait, the sender's vif waits from here on.
    fn room(&mut self, place: usize, to: usize, slots: usize, now_ns: u64) -> Room {
        let Some(vif) = self.vifs.open(to) else { return Room::Stalled };
        let on = vif.id;
        let room = vif.room(slots, now_ns).and_then(|room| match room {
            // The buffers that came meanwhile are seen by the second look.
            Room::WaitUntil(_) if vif.await_buffers(slots)? => vif.room(slots, now_ns),
            other => Ok(other),
        });
        match room {
            Ok(Room::WaitUntil(until_ns)) => {
                // What was sent before may have broken the sender.
                if let Some(sender) = self.vifs.open(place) {
                    sender.wait = Some(Wait { on, until_ns });
                    sender.counters.full_waits += 1;
                }
                Room::WaitUntil(until_ns)
            }
            Ok(room) => room,
            Err(error) => {
                self.vifs.break_off(to, Broken::RxRing(error));
                Room::Stalled
            }
        }
    }

    fn plan_group(&mut self, host: &mut H, place: usize, n: usize, load: &Load, now_ns: u64) -> Plan {
        let Some(sender) = self.vifs.at(place).filter(|vif| vif.floods.is_ready(now_ns)) else {
            return self.drop_sent(place, n, Drop::Flood);
        };
        let own = sender.id;
        self.list_pieces(place, n);
        let mut to = To { uplink: self.is_bridged(), station: self.station.is_some(), ..To::default() };
        let mut receivers = usize::from(to.uplink) + usize::from(to.station);
        for other in 0..self.vifs.places() {
            if self.vifs.open(other).is_none_or(|vif| vif.id == own) {
                continue;
            }
            receivers += 1;
            if !self.vifs.takes(other, load) {
                to.other_guests = true;
                continue;
            }
            let Some(slots) = self.vifs.slots(other, load) else {
                self.vifs.drop(other, Drop::Unsupported);
                continue;
            };
            if !self.vifs.has_room(other, slots) {
                self.vifs.drop(other, Drop::NoRoom);
                continue;
            }
            if self.vifs.batch.is_full()
                && let Some(bad) = self.settle(host)
            {
                return Plan::Bad(bad);
            }
            self.vifs.deliver(other, Some(n), load);
        }
        self.work.frames += receivers;
        if let Some(sender) = self.vifs.at_mut(place) {
            sender.floods.take(receivers as u64, now_ns);
        }
        if to.other_guests {
            return self.convert(host, place, n, load, to, now_ns);
        }
        if to.uplink || to.station { self.plan_linear(place, n, load, to) } else { Plan::Next }
    }

    /// Gathers a packet in the linear buffer. The caller has seen that there is room.
    fn plan_linear(&mut self, place: usize, n: usize, load: &Load, to: To) -> Plan {
        self.list_pieces(place, n);
        let start = self.work.used;
        let head = self.vifs.batch.cuts.first().map_or(0, |_| load.bytes.min(HEAD_BYTES));
        let from = self.scratch.bytes().get(n * HEAD_BYTES..n * HEAD_BYTES + head);
        let into = self.linear.bytes_mut().get_mut(start..start + head);
        if let (Some(from), Some(into)) = (from, into) {
            into.copy_from_slice(from);
        }
        if load.bytes > head {
            let batch = &mut self.vifs.batch;
            batch.pieces.remove(0);
            batch.aim_own(self.linear.page(), start + head, load.bytes - head);
            batch.add_copies();
            batch.add_delivery(Target::Linear, Some(n), load.bytes);
        }
        self.work.used = (start + load.bytes).next_multiple_of(ALIGNMENT);
        self.work.frames += load.segments();
        self.work.gathered.push(Gathered { job: n, start, load: *load, to });
        Plan::Next
    }

    /// Does the copies that were planned, and passes on what was gathered. Returns the first packet that cannot be read: that
    /// packet and all later ones went nowhere. `None` if there is no such packet.
    fn flush(&mut self, host: &mut H, place: usize, now_ns: u64) -> Option<usize> {
        let bad = self.settle(host);
        for at in 0..self.work.gathered.len() {
            if let Some(gathered) = self.work.gathered.get(at).copied() {
                self.pass_on(host, place, gathered, now_ns);
            }
        }
        if !self.work.gathered.is_empty() {
            self.vifs.settle_own(host);
            self.work.gathered.clear();
        }
        self.work.used = 0;
        bad
    }

    /// Does the copies that were planned. Returns the first packet that cannot be read. `None` if there is no such packet.
    fn settle(&mut self, host: &mut H) -> Option<usize> {
        let bad = self.vifs.settle(host, Visited { scratch: &mut self.scratch, linear: &mut self.linear })?;
        self.work.gathered.retain(|gathered| gathered.job < bad);
        Some(bad)
    }

    /// Passes on a packet in the linear buffer.
    fn pass_on(&mut self, host: &mut H, place: usize, gathered: Gathered, now_ns: u64) {
        let Gathered { job, start, load, to } = gathered;
        let Self { vifs, line, station, station_ns, linear, outgoing, .. } = self;
        let Some(frame) = linear.bytes_mut().get_mut(start..start + load.bytes) else { return };
        let mut info = load.info();
        if let Some(guest) = to.guest {
            vifs.send(host, guest, frame, info);
        }
        if to.other_guests {
            for other in (0..vifs.places()).filter(|other| *other != place) {
                if vifs.open(other).is_some() && !vifs.takes(other, &load) {
                    vifs.send(host, other, frame, info);
                }
            }
        }
        let mut failed = None;
        if let Some(line) = line.as_mut().filter(|_| to.uplink) {
            failed = line.send(frame, &mut info).err();
        }
        if let Some(station) = station.as_mut().filter(|_| to.station) {
            let port = vifs.at(place).map_or(PortId(0), |vif| vif.id.port());
            let mut out = Outlet { host, vifs, line: line.as_mut(), outgoing };
            station.receive_guest(port, frame, info, now_ns, &mut out);
            *station_ns = Some(now_ns);
        }
        if let Some(reason) = failed {
            self.refuse(place, job, reason, status::DROPPED);
        }
    }

    /// Answers the first `decided` packets, and puts the others back.
    fn answer(&mut self, place: usize, decided: usize, more: bool, now_ns: u64) {
        let Work { slots, jobs, .. } = &self.work;
        let Some(vif) = self.vifs.open(place) else { return };
        let mut bytes = 0;
        for job in jobs.iter().take(decided) {
            vif.answer(&job.chain, slots.get(job.at..).unwrap_or_default(), job.status);
            let sent = job.chain.packet.map_or(0, |packet| packet.bytes);
            bytes += u64::from(sent);
            if job.status == status::OKAY {
                vif.counters.sent_packets += 1;
                vif.counters.sent_bytes += u64::from(sent);
            }
        }
        let left: usize = jobs.iter().skip(decided).map(|job| job.chain.slots).sum();
        vif.put_back(left);
        let more = more || left > 0;
        if let Some(rate) = &mut vif.rate {
            rate.take(bytes, now_ns);
            vif.counters.rate_waits += u64::from(more && !rate.is_ready(now_ns));
        }
        vif.backlog = more;
        if more {
            vif.attention = true;
            return;
        }
        match vif.rearm() {
            Ok(more) => vif.attention = more,
            Err(error) => self.vifs.break_off(place, Broken::TxRing(error)),
        }
    }

    /// Finds where a frame of the vif at `place` goes.
    fn route(&self, place: usize, to: Mac) -> Route {
        if to.is_group() {
            return if is_link_local(&to.0) { Route::Nobody } else { Route::Group };
        }
        match self.vifs.place_of_mac(to) {
            Some(own) if own == place => return Route::Nobody,
            Some(other) => return Route::Guest(other),
            None => {}
        }
        if self.station_mac == Some(to) {
            Route::Station
        } else if self.is_bridged() {
            Route::Uplink
        } else {
            Route::Nobody
        }
    }

    pub(crate) fn is_bridged(&self) -> bool {
        self.line.as_ref().is_some_and(|line| line.mode == Mode::Bridged)
    }
}

/// Returns whether an address is one of those that no switch passes on: 01:80:c2:00:00:00 to 0f.
pub(crate) fn is_link_local(mac: &[u8; 6]) -> bool {
    matches!(mac, [0x01, 0x80, 0xc2, 0, 0, last] if *last < 16)
}

/// Returns how many bytes of a packet are copied into scratch memory.
fn head_bytes(packet: &Packet) -> u16 {
    packet.bytes.min(cut(HEAD_BYTES))
}

const _: () = assert!(MAX_PACKET <= u16::MAX as usize);
