//! A network device of the machine, and the network that it leads to.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use network::{FrameInfo, Full, Mac, Offloads, Reset, Uplink};

use crate::frames::dhcp::{payload, take_apart};
use crate::frames::world::{DNS, ROUTER, ROUTER_MAC, UPLINK, UPLINK_MAC};
use crate::frames::{Fill, ethernet, fill, ipv4, udp};

/// What the other end of the device has and sees.
#[derive(Debug, Default)]
pub struct Wire {
    pub sent: Vec<Vec<u8>>,
    pub coming: VecDeque<Vec<u8>>,
    pub needs_reset: bool,
    pub unplugged: bool,
    /// The usual one if `None`.
    pub mtu: Option<u16>,
    /// What a reset says; `None` if the device works again.
    pub dead: Option<&'static str>,
}

/// The device. Clones stand for the same device.
#[derive(Clone, Debug, Default)]
pub struct Device(pub Rc<RefCell<Wire>>);

impl Device {
    /// Answers the last question for an address, if there is a question that was not answered before.
    pub fn serve(&self) -> bool {
        let mut wire = self.0.borrow_mut();
        let Some(question) = wire.sent.drain(..).filter_map(|frame| take_apart(&frame)).next_back() else {
            return false;
        };
        assert_eq!(question.mac, UPLINK_MAC);
        let kind = if question.options[&53] == [1] { 2 } else { 5 };
        let lease = 3_600_u32.to_be_bytes();
        let options: &[(u8, &[u8])] =
            &[(53, &[kind]), (54, &ROUTER), (1, &[255, 255, 255, 0]), (3, &ROUTER), (6, &DNS), (51, &lease)];
        let mut datagram = udp((67, 68), &payload(2, question.transaction, [0; 4], UPLINK, UPLINK_MAC, options));
        fill(&ROUTER, &UPLINK, 17, &mut datagram, Fill::Whole);
        let answer = ethernet(UPLINK_MAC, ROUTER_MAC, 0x800, &ipv4(ROUTER, UPLINK, 17, 0, 0, &[], &datagram));
        wire.coming.push_back(answer);
        true
    }
}

impl Uplink for Device {
    fn mac(&self) -> Mac {
        Mac(UPLINK_MAC)
    }
    fn mtu(&self) -> u16 {
        self.0.borrow().mtu.unwrap_or(1_500)
    }
    fn has_link(&self) -> bool {
        !self.0.borrow().unplugged
    }
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }
    fn send(&mut self, frame: &[u8], _: FrameInfo) -> Result<(), Full> {
        self.0.borrow_mut().sent.push(frame.to_vec());
        Ok(())
    }
    fn kick(&mut self) {}
    fn receive(&mut self, into: &mut [u8]) -> Option<(usize, FrameInfo)> {
        let frame = self.0.borrow_mut().coming.pop_front()?;
        into[..frame.len()].copy_from_slice(&frame);
        Some((frame.len(), FrameInfo::default()))
    }
    fn rearm(&mut self) -> bool {
        !self.0.borrow().coming.is_empty()
    }
    fn needs_reset(&self) -> bool {
        self.0.borrow().needs_reset
    }
    fn reset(&mut self) -> Reset {
        let mut wire = self.0.borrow_mut();
        wire.needs_reset = false;
        wire.dead.map_or(Reset::Done, Reset::Dead)
    }
}
