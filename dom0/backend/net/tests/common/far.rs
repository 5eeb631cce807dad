//! The far side: a device that keeps what is sent and gives what is put in, and a station that answers.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use network::{FrameInfo, Full, Mac, Offloads, Output, PortId, Reset, Station, Uplink};

/// What the other end of a device has and sees.
#[derive(Debug, Default)]
pub struct Wire {
    pub sent: Vec<(Vec<u8>, FrameInfo)>,
    /// How many of them were kicked.
    pub kicked: usize,
    pub coming: VecDeque<(Vec<u8>, FrameInfo)>,
    pub room: usize,
    pub offloads: Offloads,
    pub mtu: u16,
    pub needs_reset: bool,
    pub unplugged: bool,
    /// What the next resets say.
    pub resets: VecDeque<Reset>,
    pub rearmed: u64,
}

#[derive(Clone, Debug)]
pub struct Device(pub Rc<RefCell<Wire>>);

impl Device {
    pub fn new() -> Self {
        Self(Rc::new(RefCell::new(Wire { room: usize::MAX, mtu: 1500, ..Wire::default() })))
    }
}

impl Uplink for Device {
    fn mac(&self) -> Mac {
        Mac([2, 0, 0, 0, 0, 0xfe])
    }
    fn mtu(&self) -> u16 {
        self.0.borrow().mtu
    }
    fn has_link(&self) -> bool {
        !self.0.borrow().unplugged
    }
    fn offloads(&self) -> Offloads {
        self.0.borrow().offloads
    }
    fn send(&mut self, frame: &[u8], info: FrameInfo) -> Result<(), Full> {
        let mut wire = self.0.borrow_mut();
        assert!(!wire.needs_reset, "a frame for a device that is being reset");
        wire.room = wire.room.checked_sub(1).ok_or(Full)?;
        wire.sent.push((frame.to_vec(), info));
        Ok(())
    }
    fn kick(&mut self) {
        let mut wire = self.0.borrow_mut();
        wire.kicked = wire.sent.len();
    }
    fn receive(&mut self, into: &mut [u8]) -> Option<(usize, FrameInfo)> {
        assert!(into.len() >= network::MAX_PACKET);
        let (frame, info) = self.0.borrow_mut().coming.pop_front()?;
        into[..frame.len()].copy_from_slice(&frame);
        Some((frame.len(), info))
    }
    fn rearm(&mut self) -> bool {
        let mut wire = self.0.borrow_mut();
        wire.rearmed += 1;
        !wire.coming.is_empty()
    }
    fn needs_reset(&self) -> bool {
        self.0.borrow().needs_reset
    }
    fn reset(&mut self) -> Reset {
        let mut wire = self.0.borrow_mut();
        let reset = wire.resets.pop_front().unwrap_or(Reset::Done);
        wire.needs_reset &= reset == Reset::Pending;
        reset
    }
}

/// What a station has heard, and what it does with that.
#[derive(Debug, Default)]
pub struct Heard {
    pub from_guests: Vec<(PortId, Vec<u8>, FrameInfo)>,
    pub from_uplink: Vec<Vec<u8>>,
    /// The station sends each frame of a guest back, with the addresses exchanged.
    pub echoes: bool,
    /// The station passes each frame of a guest to the uplink.
    pub routes: bool,
    /// The station passes each frame of the uplink to this guest.
    pub forwards_to: Option<PortId>,
    pub turns: u64,
    pub next_ns: Option<u64>,
}

#[derive(Clone, Debug, Default)]
pub struct Ear(pub Rc<RefCell<Heard>>);

pub const STATION: Mac = Mac([2, 0, 0, 0, 0, 0xaa]);

impl Station for Ear {
    fn receive_guest(&mut self, port: PortId, frame: &mut [u8], info: FrameInfo, _now_ns: u64, out: &mut dyn Output) {
        let mut heard = self.0.borrow_mut();
        heard.from_guests.push((port, frame.to_vec(), info));
        if heard.echoes {
            let (to, rest) = frame.split_at_mut(6);
            to.swap_with_slice(&mut rest[..6]);
            frame[6..12].copy_from_slice(&STATION.0);
            out.to_guest(port, frame, info);
        }
        if heard.routes {
            out.to_uplink(frame, info);
        }
    }
    fn receive_uplink(&mut self, frame: &mut [u8], info: FrameInfo, _now_ns: u64, out: &mut dyn Output) {
        let mut heard = self.0.borrow_mut();
        heard.from_uplink.push(frame.to_vec());
        if let Some(port) = heard.forwards_to {
            out.to_guest(port, frame, info);
        }
    }
    fn turn(&mut self, now_ns: u64, _out: &mut dyn Output) -> Option<u64> {
        let mut heard = self.0.borrow_mut();
        heard.turns += 1;
        heard.next_ns.filter(|at| *at > now_ns)
    }
    fn mac(&self) -> Mac {
        STATION
    }
}
