//! What the back end asks of the hypervisor: pins, copies, notifications. Pins and copies come in batches, with an answer for
//! each element.

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
    /// The guest's grant reference for the page.
    pub reference: u32,
    /// Whether the device writes into the page, because the guest reads the disk.
    pub writable: bool,
}

/// A pinned page: its address and its owner stay the same until it is unpinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// The handle that unpins the page.
    pub handle: Handle,
    /// The machine address of the first byte of the page.
    pub address: BusAddress,
}

/// Why a page is not pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinError {
    /// The guest's fault: there is no such grant, or it is not for dom0, is read-only, or is in use too often.
    Refused,
    /// Our fault: no handle is free. A later try may succeed.
    NoHandles,
}

/// A copy between a page of a guest and a frame of dom0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantCopy {
    /// The guest.
    pub domain: u16,
    /// The guest's grant reference for the page.
    pub reference: u32,
    /// The first byte in the guest's page.
    pub offset: u16,
    /// The number by which the host knows the frame.
    pub page: u64,
    /// The first byte in dom0's frame.
    pub page_offset: u16,
    /// The number of bytes. Neither side may cross the end of its page.
    pub bytes: u16,
    /// [`Read`](Direction::Read) copies from dom0's frame into the guest's page, [`Write`](Direction::Write) the other way.
    pub direction: Direction,
}

/// The hypervisor, and the memory that the back end shares with guests and with its successor.
pub trait Host {
    /// The pages of a ring, mapped one after the other.
    type Ring: SharedPage;
    /// Memory of dom0: journals, and pages that descriptors are copied into.
    type Memory: SharedPage;

    /// Pins pages, and writes one answer for each wanted page. The caller passes `answers` of the same length, filled with
    /// [`PinError::Refused`].
    fn pin(&mut self, wanted: &[Wanted], answers: &mut [Result<Pinned, PinError>]);

    /// Gives pins back. The caller guarantees that no device accesses their pages any more.
    fn unpin(&mut self, handles: &[Handle]);

    /// Copies, and writes one answer for each copy: true if the copy is done. The caller passes `answers` of the same length,
    /// filled with false.
    fn copy(&mut self, copies: &[GrantCopy], answers: &mut [bool]);

    /// Sends an event to a guest. `port` is our end of the channel.
    fn notify(&mut self, domain: u16, port: u32);
}

/// A page of dom0 that descriptors are copied into.
#[derive(Debug)]
pub struct Scratch<M> {
    /// The number of the page, as in [`GrantCopy::page`].
    pub page: u64,
    /// The bytes of the page.
    pub memory: M,
}
