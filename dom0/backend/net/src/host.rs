//! What the back end asks of the hypervisor: copies and notifications. Copies come in batches, with an answer for each copy.

use ring_protocol::SharedPage;

/// A page that bytes are copied from or to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A page that a guest granted to dom0.
    Guest {
        /// The guest.
        domain: u16,
        /// The guest's grant reference for the page.
        reference: u32,
    },
    /// A page of dom0, of a [`Buffer`].
    Own {
        /// The number by which the host knows the page.
        page: u64,
    },
}

/// A copy between two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantCopy {
    /// The page that is read.
    pub from: Side,
    /// The first byte that is read.
    pub from_offset: u16,
    /// The page that is written.
    pub to: Side,
    /// The first byte that is written.
    pub to_offset: u16,
    /// The number of bytes, at least 1. Neither side crosses the end of its page.
    pub bytes: u16,
}

impl GrantCopy {
    /// No copy: a value to fill lists with.
    pub(crate) const NOTHING: Self =
        Self { from: Side::Own { page: 0 }, from_offset: 0, to: Side::Own { page: 0 }, to_offset: 0, bytes: 0 };
}

/// Consecutive pages of dom0 that copies reach by number and the CPU as bytes. Copies change the bytes only
/// inside [`Host::copy`].
pub trait Buffer {
    /// Returns the number of the first page, as in [`Side::Own`]. The pages after it have the numbers that follow.
    fn page(&self) -> u64;

    /// Returns the bytes of the pages.
    fn bytes(&self) -> &[u8];

    /// Returns the bytes of the pages.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// The hypervisor, and the memory that the back end shares with guests.
pub trait Host {
    /// The page of a ring, mapped.
    type Ring: SharedPage;
    /// Memory of dom0 that frames are copied into and from.
    type Buffer: Buffer;

    /// Carries out the copies in their order, and writes one answer for each: true if the copy is done. The caller passes
    /// `answers` of the same length, filled with false, and `own`: the buffers whose pages the copies name.
    fn copy(&mut self, copies: &[GrantCopy], answers: &mut [bool], own: &mut [&mut Self::Buffer]);

    /// Sends an event to a guest. `port` is our end of the channel.
    fn notify(&mut self, port: u32);
}
