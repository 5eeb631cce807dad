//! What dom0 itself is on a network.

use crate::frame::FrameInfo;

/// A port of a switch that leads to a guest. The switch gives the numbers; a number is not used again while frames or state for
/// it exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u16);

/// Where a station sends frames.
pub trait Output {
    /// Sends a frame to a guest. The frame is dropped, and counted, if the guest has no room.
    fn to_guest(&mut self, port: PortId, frame: &[u8], info: FrameInfo);

    /// Sends a frame to the uplink. The frame is dropped, and counted, if there is no uplink or the uplink has no room.
    fn to_uplink(&mut self, frame: &[u8], info: FrameInfo);
}

/// What dom0 itself is on a network: answers, addresses, routes. All frames here are whole and in memory of dom0, which guests
/// cannot change. A station may change a frame in place before it passes the frame on.
pub trait Station {
    /// Takes a frame that a guest sent to [`mac`](Station::mac) or to a group. The source address is the guest's own: the
    /// switch has checked it.
    fn receive_guest(&mut self, port: PortId, frame: &mut [u8], info: FrameInfo, now_ns: u64, out: &mut dyn Output);

    /// Takes a frame from the uplink.
    fn receive_uplink(&mut self, frame: &mut [u8], info: FrameInfo, now_ns: u64, out: &mut dyn Output);

    /// Does what time requires, such as repeated requests. Returns when it is to be called next; `None` if no time is known.
    fn turn(&mut self, now_ns: u64, out: &mut dyn Output) -> Option<u64>;

    /// The station's address on the side of the guests.
    fn mac(&self) -> crate::Mac;
}
