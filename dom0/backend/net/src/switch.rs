//! A switch: vifs, an uplink, a station, and a turn of work for them.

use alloc::boxed::Box;
use alloc::vec;
use core::fmt;

use network::{FrameInfo, MAX_PACKET, MIN_FRAME, Mac, Station, Uplink};

use crate::connection::Drop;
use crate::connection::{Broken, ConnectError, Connection, Disconnected, VifId};
use crate::host::{Buffer, Host};
use crate::limits::{FRAMES, PER_TURN, PER_VISIT, PROMPT_IN_A_ROW};
use crate::line::{Line, Mode, UplinkCounters};
use crate::outlet::Outlet;
use crate::ports::{ALIGNMENT, Vifs};
use crate::vif::Vif;
use crate::visit::{Work, is_link_local};

/// The bytes of each packet that are copied into scratch memory, where they are looked at.
pub(crate) const HEAD_BYTES: usize = 256;
/// Bytes of an Ethernet header and a VLAN tag.
const ETHERNET: usize = 18;
/// Bytes of the shortest headers of IPv4 and TCP.
const SHORTEST_HEADERS: usize = 40;
/// Pages of scratch memory: the first bytes of the packets of a visit, and a page to find faults with.
pub const SCRATCH_PAGES: usize = PER_VISIT * HEAD_BYTES / 4096 + 1;
/// Pages of the buffer that whole packets are gathered in: one packet may begin wherever the packets before it leave a place.
pub const LINEAR_PAGES: usize = 33;
/// Pages of the buffer for dom0's frames to guests: at least one packet.
pub const STAGING_PAGES: usize = 17;

const _: () = assert!(LINEAR_PAGES * 4096 > 2 * MAX_PACKET);

/// Memory of a switch. Each buffer has the number of pages that the constant of its name says.
#[derive(Debug)]
pub struct Buffers<B> {
    /// [`SCRATCH_PAGES`].
    pub scratch: B,
    /// [`LINEAR_PAGES`].
    pub linear: B,
    /// [`STAGING_PAGES`].
    pub staging: B,
}

/// What the owner of a switch is to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A vif has ended because of what its guest wrote. The owner disconnects it.
    Broken(VifId, Broken),
    /// The uplink's device is dead, for this reason.
    UplinkDead(&'static str),
}

/// When the owner of a switch gives it the next turn.
#[must_use = "a switch that gets no turn stands still"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Whether work is left that waits for nothing: the next turn is due as soon as other tasks have had theirs.
    pub again: bool,
    /// When the next turn is due even without an event or an interrupt. `None`: never.
    pub again_ns: Option<u64>,
}

/// The vifs of one network, with an uplink and a station if there are such.
pub struct Switch<H: Host> {
    pub(crate) vifs: Vifs<H>,
    pub(crate) line: Option<Line>,
    pub(crate) station: Option<Box<dyn Station>>,
    pub(crate) station_mac: Option<Mac>,
    /// When the station is to be called: also after each turn in which it got frames, which may have changed the time. `None`:
    /// no time is known.
    pub(crate) station_ns: Option<u64>,
    pub(crate) scratch: H::Buffer,
    pub(crate) linear: H::Buffer,
    /// Room for a frame of the station's on its way to the uplink.
    pub(crate) outgoing: Box<[u8]>,
    pub(crate) work: Work,
    mtu: u16,
    /// The places whose turns are next among guests without a backlog, and among those with one.
    next: [usize; 2],
    /// How many guests without a backlog were visited since the last one with a backlog.
    in_a_row: u32,
}

impl<H: Host> fmt::Debug for Switch<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Switch");
        shown.field("line", &self.line).field("station", &self.station_mac);
        shown.field("vifs", &self.vifs.iter().count()).finish_non_exhaustive()
    }
}

impl<H: Host> Switch<H> {
    /// Makes a switch without vifs, for frames of at most `mtu` bytes after the Ethernet header.
    #[must_use]
    pub fn new(buffers: Buffers<H::Buffer>, mtu: u16) -> Self {
        let Buffers { scratch, linear, staging } = buffers;
        let waste = scratch.page() + SCRATCH_PAGES as u64 - 1;
        Self {
            vifs: Vifs::new(staging, waste, ETHERNET + usize::from(mtu)),
            line: None,
            station: None,
            station_mac: None,
            station_ns: None,
            scratch,
            linear,
            outgoing: Box::default(),
            work: Work::new(),
            mtu,
            next: [0; 2],
            in_a_row: 0,
        }
    }

    /// Gives the switch an uplink, whose device is ready.
    pub fn set_uplink(&mut self, device: Box<dyn Uplink>, mode: Mode) {
        self.line = Some(Line::new(device, mode));
    }

    /// Returns what the uplink has done so far. `None` if there is no uplink.
    #[must_use]
    pub fn uplink_counters(&self) -> Option<UplinkCounters> {
        self.line.as_ref().map(|line| line.counters)
    }

    /// Returns whether the uplink's device works and its link is up. False if there is no uplink. May read a register.
    #[must_use]
    pub fn has_link(&self) -> bool {
        self.line.as_ref().is_some_and(|line| line.is_fine() && line.device.has_link())
    }

    /// Gives the switch a station, which is called in the next turn.
    pub fn set_station(&mut self, station: Box<dyn Station>) {
        (self.station_mac, self.station_ns) = (Some(station.mac()), Some(0));
        self.station = Some(station);
        self.outgoing = vec![0; MAX_PACKET].into_boxed_slice();
    }

    /// Begins to serve a front end that has just connected.
    ///
    /// # Errors
    /// Why the front end cannot be served.
    pub fn connect(&mut self, connection: Connection<H>, now_ns: u64) -> Result<VifId, ConnectError> {
        if self.station_mac == Some(connection.mac) {
            return Err(ConnectError::MacInUse(connection.mac));
        }
        self.vifs.connect(connection, now_ns)
    }

    /// Ends a vif at once, and returns its parts. Nothing of the guest is in use afterwards, for the switch only copies. `None`
    /// if the vif has ended before.
    pub fn disconnect(&mut self, id: VifId) -> Option<Disconnected<H>> {
        let parts = self.vifs.disconnect(id)?;
        self.vifs.wake_senders(id);
        Some(parts)
    }

    /// Returns a vif. `None` if the vif has ended.
    #[must_use]
    pub fn vif(&self, id: VifId) -> Option<&Vif<H>> {
        self.vifs.at(self.vifs.place_of(id)?)
    }

    /// Returns the vifs with their names.
    pub fn vifs(&self) -> impl Iterator<Item = (VifId, &Vif<H>)> {
        self.vifs.iter().map(|vif| (vif.id, vif))
    }

    /// Notes that the guest has sent an event: a later turn looks at its rings.
    pub fn attend(&mut self, id: VifId) {
        let Some(place) = self.vifs.place_of(id) else { return };
        let Some(vif) = self.vifs.open(place) else { return };
        vif.attention = true;
        let awaited = vif.awaited;
        // A guest may send events without posting buffers.
        if awaited > 0 && self.vifs.has_room(place, awaited) {
            self.vifs.wake_senders(id);
        }
    }

    /// Notes that the owner has changed the station: the next turn calls it.
    pub fn attend_station(&mut self) {
        if self.station.is_some() {
            self.station_ns = Some(0);
        }
    }

    /// Notes that the uplink's device has sent an interrupt.
    pub fn attend_uplink(&mut self) {
        if let Some(line) = &mut self.line {
            line.attention = true;
        }
    }

    /// Returns the next event for the log, or for the owner of a vif. `None` if there is no other.
    pub fn event(&mut self) -> Option<Event> {
        self.vifs.event()
    }

    pub(crate) fn max_frame(&self) -> usize {
        ETHERNET + usize::from(self.mtu)
    }

    /// Bytes of the longest payload of a segment.
    pub(crate) fn max_segment(&self) -> usize {
        usize::from(self.mtu).saturating_sub(SHORTEST_HEADERS)
    }

    /// Takes frames from the uplink, carries packets of one guest, and publishes what was done.
    pub fn turn(&mut self, host: &mut H, now_ns: u64) -> Turn {
        let reset_ns = self.look_after_line(now_ns);
        self.receive(host, now_ns);
        self.end_waits(now_ns);
        if let Some(place) = self.next_place(now_ns) {
            self.visit(host, place, now_ns);
        }
        self.call_station(host, now_ns);
        if let Some(line) = &mut self.line {
            line.kick();
        }
        self.vifs.publish(host);
        let mut again = self.line.as_ref().is_some_and(|line| line.attention && line.is_fine());
        let mut again_ns = [reset_ns, self.station_ns].into_iter().flatten().min();
        for vif in self.vifs.iter().filter(|vif| vif.attention) {
            let due_ns = vif.wait.map(|wait| wait.until_ns).or(vif.rate.map(|rate| rate.ready_ns()));
            match due_ns.filter(|due_ns| *due_ns > now_ns) {
                None => again = true,
                due_ns => again_ns = again_ns.into_iter().chain(due_ns).min(),
            }
        }
        again |= self.station_ns.is_some_and(|due_ns| due_ns <= now_ns);
        Turn { again, again_ns }
    }

    fn look_after_line(&mut self, now_ns: u64) -> Option<u64> {
        let (dead, due_ns) = self.line.as_mut()?.look_after(now_ns);
        if let Some(why) = dead {
            self.vifs.report(Event::UplinkDead(why));
        }
        due_ns
    }

    /// Takes frames from the uplink.
    fn receive(&mut self, host: &mut H, now_ns: u64) {
        let (mut used, mut receivers) = (0, 0);
        for _ in 0..PER_TURN {
            if receivers >= FRAMES {
                break;
            }
            let Some(line) = self.line.as_mut().filter(|line| line.attention && line.is_fine()) else { break };
            if self.linear.bytes().len() - used < MAX_PACKET {
                self.vifs.settle_own(host);
                used = 0;
            }
            let Some(room) = self.linear.bytes_mut().get_mut(used..) else { break };
            let Some((bytes, info)) = line.device.receive(room) else {
                line.attention = line.device.rearm();
                break;
            };
            line.counters.received_packets += 1;
            line.counters.received_bytes += bytes as u64;
            receivers += self.pass_in(host, used, bytes, info, now_ns);
            used = (used + bytes).next_multiple_of(ALIGNMENT);
        }
        self.vifs.settle_own(host);
    }

    /// Passes on a frame that has arrived, which lies in the linear buffer. Returns how many guests it is for.
    fn pass_in(&mut self, host: &mut H, start: usize, bytes: usize, info: FrameInfo, now_ns: u64) -> usize {
        let Self { vifs, line, station, station_mac, station_ns, linear, outgoing, .. } = self;
        let Some(device) = line else { return 0 };
        let Some(frame) = linear.bytes_mut().get_mut(start..start + bytes) else { return 0 };
        let mut receivers = 0;
        let Some(&[t0, t1, t2, t3, t4, t5, s0, s1, s2, s3, s4, s5, ..]) = frame.first_chunk::<MIN_FRAME>() else {
            device.counters.drops.count(Drop::Malformed);
            return 0;
        };
        let (to, from) = (Mac([t0, t1, t2, t3, t4, t5]), Mac([s0, s1, s2, s3, s4, s5]));
        let mut for_station = true;
        if device.mode == Mode::Bridged {
            if vifs.place_of_mac(from).is_some() || *station_mac == Some(from) {
                device.counters.drops.count(Drop::Spoofed);
                return 0;
            }
            let guest = vifs.place_of_mac(to);
            for_station = station.is_some() && (to.is_group() || *station_mac == Some(to));
            if let Some(guest) = guest {
                receivers = 1;
                vifs.send(host, guest, frame, info);
            } else if to.is_group() && !is_link_local(&to.0) {
                for place in 0..vifs.places() {
                    if vifs.open(place).is_some() {
                        receivers += 1;
                        vifs.send(host, place, frame, info);
                    }
                }
            } else if !for_station {
                device.counters.drops.count(Drop::Unknown);
            }
        }
        if let Some(station) = station.as_mut().filter(|_| for_station) {
            let mut out = Outlet { host, vifs, line: line.as_mut(), outgoing };
            station.receive_uplink(frame, info, now_ns, &mut out);
            *station_ns = Some(now_ns);
        }
        receivers
    }

    fn call_station(&mut self, host: &mut H, now_ns: u64) {
        let Self { vifs, line, station, station_ns, outgoing, .. } = self;
        let Some(station) = station.as_mut() else { return };
        if station_ns.is_none_or(|due_ns| due_ns > now_ns) {
            return;
        }
        let mut out = Outlet { host, vifs, line: line.as_mut(), outgoing };
        *station_ns = station.turn(now_ns, &mut out);
        self.vifs.settle_own(host);
    }

    /// Lets guests go on that have waited long enough for a receiver.
    fn end_waits(&mut self, now_ns: u64) {
        for vif in self.vifs.iter_mut().filter(|vif| vif.wait.is_some_and(|wait| wait.until_ns <= now_ns)) {
            (vif.wait, vif.attention) = (None, true);
        }
    }

    /// Returns the next place whose guest may send. `None` if there is no such guest. Guests that may send and have no backlog
    /// are first, in turn, but of five visits at least one is to a guest with a backlog.
    fn next_place(&mut self, now_ns: u64) -> Option<usize> {
        let backlog_first = self.in_a_row >= PROMPT_IN_A_ROW;
        let (backlog, place) = [backlog_first, !backlog_first].into_iter().find_map(|backlog| {
            let place = self.next_with(backlog, now_ns)?;
            Some((backlog, place))
        })?;
        self.in_a_row = if backlog { 0 } else { self.in_a_row.saturating_add(1) };
        let [prompt, later] = &mut self.next;
        *if backlog { later } else { prompt } = place + 1;
        Some(place)
    }

    /// Returns the next place whose guest may send and has a backlog, or has none.
    fn next_with(&mut self, backlog: bool, now_ns: u64) -> Option<usize> {
        let (count, [prompt, later]) = (self.vifs.places(), self.next);
        let next = if backlog { later } else { prompt };
        (0..count).map(|step| (next + step) % count).find(|place| {
            let ready = self.vifs.open(*place).filter(|vif| vif.attention && vif.wait.is_none());
            ready.is_some_and(|vif| vif.backlog == backlog && vif.rate.is_none_or(|rate| rate.is_ready(now_ns)))
        })
    }
}
