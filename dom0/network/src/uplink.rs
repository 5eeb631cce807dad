//! A network device of the machine.

use core::fmt;

use crate::{FrameInfo, Mac, Reset};

/// What a device does by itself with frames that it sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// It computes [`Blank`](crate::Checksum::Blank) checksums.
    pub checksum: bool,
    /// It cuts TCP over IPv4.
    pub tcp4: bool,
    /// It cuts TCP over IPv6.
    pub tcp6: bool,
}

/// The device has no room. A later try may succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A network device of the machine. No call waits.
pub trait Uplink: fmt::Debug {
    /// The device's address.
    fn mac(&self) -> Mac;

    /// The maximum number of bytes of a frame's payload, after its Ethernet header.
    fn mtu(&self) -> u16;

    /// Whether the device's link is up. May read a register.
    fn has_link(&self) -> bool;

    /// What the device does by itself with frames that it sends. The caller does the rest before [`send`](Uplink::send).
    fn offloads(&self) -> Offloads;

    /// Copies a frame into memory of the device's and queues it. [`kick`](Uplink::kick) makes the device send it.
    ///
    /// # Errors
    /// [`Full`]: the device has not sent enough earlier frames yet, or the frame is longer than the device takes.
    fn send(&mut self, frame: &[u8], info: FrameInfo) -> Result<(), Full>;

    /// Tells the device about the frames that were queued since the last call.
    fn kick(&mut self);

    /// Copies the next frame that has arrived into `into`, of at least [`MAX_PACKET`](crate::MAX_PACKET) bytes. Returns the
    /// number of bytes and what accompanies them; `None` if no frame has arrived.
    fn receive(&mut self, into: &mut [u8]) -> Option<(usize, FrameInfo)>;

    /// Asks for an interrupt at the next frame. Returns true if a frame has arrived already, and no interrupt will come.
    fn rearm(&mut self) -> bool;

    /// Whether the device has to be reset: it says so, or it wrote what makes no sense.
    fn needs_reset(&self) -> bool;

    /// Resets the device, or goes on with the reset.
    fn reset(&mut self) -> Reset;
}
