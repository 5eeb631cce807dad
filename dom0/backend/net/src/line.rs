//! The uplink of a switch: frames to and from a network device of the machine.

use alloc::boxed::Box;
use alloc::vec;
use core::fmt;

use network::{Checksum, FrameInfo, Headers, Kind, L4, Offloads, Protocol, Reset, Segmentation, Transport, Uplink};
use network::{checksum, segment};

use crate::connection::{Drop, Drops};
use crate::limits::RESET_NS;

/// Bytes of an Ethernet header with a VLAN tag.
const ETHERNET: usize = 18;
/// Bytes of a VLAN tag.
const TAG: usize = 4;

/// Who talks to an uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Guests and the station: the uplink is a port of the switch, and all addresses that no vif has are at its other end.
    Bridged,
    /// The station alone.
    Routed,
}

/// What an uplink has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UplinkCounters {
    /// Frames that were sent, after they were cut.
    pub sent_packets: u64,
    /// Bytes of these frames.
    pub sent_bytes: u64,
    /// Frames that arrived.
    pub received_packets: u64,
    /// Bytes of these frames.
    pub received_bytes: u64,
    /// How often the device was reset.
    pub resets: u64,
    /// Frames of either direction that were dropped.
    pub drops: Drops,
}

/// How the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Fine,
    Resetting,
    Dead,
}

/// The uplink of a switch.
pub(crate) struct Line {
    pub(crate) device: Box<dyn Uplink>,
    pub(crate) mode: Mode,
    offloads: Offloads,
    health: Health,
    /// Whether the device may have frames.
    pub(crate) attention: bool,
    /// Whether frames were queued since the last kick.
    queued: bool,
    /// Room for one segment.
    segment: Box<[u8]>,
    pub(crate) counters: UplinkCounters,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Line");
        shown.field("device", &self.device.mac()).field("mode", &self.mode).field("health", &self.health);
        shown.field("attention", &self.attention).field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl Line {
    pub(crate) fn new(device: Box<dyn Uplink>, mode: Mode) -> Self {
        let segment = vec![0; ETHERNET + usize::from(device.mtu())].into_boxed_slice();
        let offloads = device.offloads();
        let health = Health::Fine;
        Self { device, mode, offloads, health, attention: true, queued: false, segment, counters: Default::default() }
    }

    pub(crate) fn is_fine(&self) -> bool {
        self.health == Health::Fine
    }

    /// Resets the device if it needs that. Returns why the device is dead from now on, and when the next call is due.
    pub(crate) fn look_after(&mut self, now_ns: u64) -> (Option<&'static str>, Option<u64>) {
        if self.health == Health::Fine && self.device.needs_reset() {
            self.health = Health::Resetting;
            self.counters.resets += 1;
        }
        if self.health != Health::Resetting {
            return (None, None);
        }
        match self.device.reset() {
            Reset::Pending => (None, Some(now_ns.saturating_add(RESET_NS))),
            Reset::Done => {
                (self.health, self.attention, self.offloads) = (Health::Fine, true, self.device.offloads());
                (None, None)
            }
            Reset::Dead(why) => {
                (self.health, self.attention) = (Health::Dead, false);
                (Some(why), None)
            }
        }
    }

    /// Sends a frame. Does first what the device does not do by itself, perhaps in place, and says so in `info`.
    ///
    /// # Errors
    /// Why the frame, or one of its segments, was dropped. The drop is counted here.
    pub(crate) fn send(&mut self, frame: &mut [u8], info: &mut FrameInfo) -> Result<(), Drop> {
        let sent = self.try_send(frame, info);
        if let Err(reason) = sent {
            self.counters.drops.count(reason);
        }
        sent
    }

    fn try_send(&mut self, frame: &mut [u8], info: &mut FrameInfo) -> Result<(), Drop> {
        if self.health != Health::Fine {
            return Err(Drop::UplinkFull);
        }
        match info.segmentation {
            Some(how) if !self.cuts(how.protocol) => return self.send_cut(frame, how),
            Some(how) => self.check_segments(frame, how)?,
            None if frame.len() > self.max_frame(frame) => return Err(Drop::Oversize),
            None if info.checksum != Checksum::Blank => {}
            None if self.offloads.checksum => check_checksum(frame)?,
            None => {
                finish(frame)?;
                info.checksum = Checksum::Verified;
            }
        }
        self.queue(frame, *info)
    }

    /// Judges a frame that the device is to cut: the device believes what it is told.
    fn check_segments(&self, frame: &[u8], how: Segmentation) -> Result<(), Drop> {
        let headers = Headers::parse(frame, frame.len()).map_err(|_| Drop::Malformed)?;
        let version = match headers.kind {
            Kind::Ipv4(_) => Protocol::Tcp4,
            Kind::Ipv6(packet) if !packet.routed => Protocol::Tcp6,
            _ => return Err(Drop::Malformed),
        };
        let Some((Transport { protocol: L4::Tcp { header, .. }, at, end }, None)) = headers.transport() else {
            return Err(Drop::Malformed);
        };
        if version != how.protocol || end != frame.len() || how.bytes == 0 {
            return Err(Drop::Malformed);
        }
        let segment = at + header + usize::from(how.bytes);
        if segment > self.max_frame(frame) { Err(Drop::Oversize) } else { Ok(()) }
    }

    /// Returns the maximum number of bytes of a frame with this one's Ethernet header: a tag is no part of the payload.
    fn max_frame(&self, frame: &[u8]) -> usize {
        let is_tagged = frame.get(12..14) == Some(&[0x81, 0]);
        self.segment.len().saturating_sub(if is_tagged { 0 } else { TAG })
    }

    fn cuts(&self, protocol: Protocol) -> bool {
        match protocol {
            Protocol::Tcp4 => self.offloads.tcp4,
            Protocol::Tcp6 => self.offloads.tcp6,
        }
    }

    fn send_cut(&mut self, frame: &[u8], how: Segmentation) -> Result<(), Drop> {
        let max = self.max_frame(frame);
        let mut room = core::mem::take(&mut self.segment);
        let sent = self.send_segments(frame, how, room.get_mut(..max).unwrap_or_default());
        self.segment = room;
        sent
    }

    fn send_segments(&mut self, frame: &[u8], how: Segmentation, room: &mut [u8]) -> Result<(), Drop> {
        let headers = Headers::parse(frame, frame.len()).map_err(|_| Drop::Malformed)?;
        let mut cut = segment::Cut::new(frame, &headers, how, room).map_err(|_| Drop::Malformed)?;
        while let Some(segment) = cut.next_segment() {
            self.queue(segment, FrameInfo { checksum: Checksum::Verified, segmentation: None })?;
        }
        Ok(())
    }

    fn queue(&mut self, frame: &[u8], info: FrameInfo) -> Result<(), Drop> {
        self.device.send(frame, info).map_err(|_| Drop::UplinkFull)?;
        self.queued = true;
        self.counters.sent_packets += 1;
        self.counters.sent_bytes += frame.len() as u64;
        Ok(())
    }

    /// Makes the device send what was queued.
    pub(crate) fn kick(&mut self) {
        if core::mem::take(&mut self.queued) {
            self.device.kick();
        }
    }
}

/// Judges a frame whose checksum the device is to compute.
fn check_checksum(frame: &[u8]) -> Result<(), Drop> {
    let headers = Headers::parse(frame, frame.len()).map_err(|_| Drop::Malformed)?;
    match headers.transport() {
        Some((Transport { protocol: L4::Tcp { .. } | L4::Udp { .. }, .. }, None)) => Ok(()),
        _ => Err(Drop::Malformed),
    }
}

fn finish(frame: &mut [u8]) -> Result<(), Drop> {
    let headers = Headers::parse(frame, frame.len()).map_err(|_| Drop::Malformed)?;
    checksum::finish(frame, &headers).map_err(|_| Drop::Malformed)
}
