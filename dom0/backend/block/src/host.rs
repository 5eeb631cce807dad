//! What the back end asks of the hypervisor: pins, copies, notifications. Batches, with an answer for each element.

use disk::BusAddress;
use ring_protocol::SharedPage;
use ring_protocol::block::Direction;

/// Names a pin to the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u32);

/// A page of a guest that a device is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The guest.
    pub domain: u16,
    /// Its grant reference.
    pub reference: u32,
    /// The device writes into it: the disk is read.
    pub writable: bool,
}

/// A page that stays where it is and whose it is until it is unpinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// To unpin it.
    pub handle: Handle,
    /// Its first byte.
    pub address: BusAddress,
}

/// Why a page is not pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinError {
    /// The guest's fault: no such grant, not for us, read-only, used too often.
    Refused,
    /// Ours: we have no handles left. It is worth another try.
    NoHandles,
}

/// A copy between a page of a guest and a frame of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantCopy {
    /// The guest.
    pub domain: u16,
    /// Its grant reference.
    pub reference: u32,
    /// The first byte in the guest's page.
    pub offset: u16,
    /// Our page-frame number.
    pub page: u64,
    /// The first byte in our page.
    pub page_offset: u16,
    /// How many; both sides end within their pages.
    pub bytes: u16,
    /// [`Read`](Direction::Read): from our page into the guest's.
    pub direction: Direction,
}

/// The hypervisor, and the memory it lets us share.
pub trait Host {
    /// The pages of a ring, one after the other.
    type Ring: SharedPage;
    /// Memory of our own: journals, and pages that descriptors are copied into.
    type Memory: SharedPage;

    /// Pins pages; there are as many answers as pages are wanted, each at first [`PinError::Refused`].
    fn pin(&mut self, wanted: &[Wanted], answers: &mut [Result<Pinned, PinError>]);

    /// Gives pins back. No device touches their pages any more.
    fn unpin(&mut self, handles: &[Handle]);

    /// Copies; there are as many answers as copies, each at first false. True: it is done.
    fn copy(&mut self, copies: &[GrantCopy], answers: &mut [bool]);

    /// Sends to our end of a guest's event channel.
    fn notify(&mut self, domain: u16, port: u32);
}

/// A page of our own that descriptors are copied into.
#[derive(Debug)]
pub struct Scratch<M> {
    /// Its page-frame number.
    pub page: u64,
    /// Its bytes.
    pub memory: M,
}
