//! What networks need of the domain they run in, and the back end's host made of it.

use net_backend::{Buffer, GrantCopy};

use crate::host::Host;

/// What networks need in addition to a [`Host`].
pub trait NetHost: Host {
    /// Memory of this domain that frames are copied into and from.
    type Buffer: Buffer + 'static;

    /// Allocates `pages` consecutive pages of zeroes. `None` if there is not enough memory.
    fn buffer(&self, pages: usize) -> Option<Self::Buffer>;

    /// Copies between pages: see [`net_backend::Host::copy`].
    fn copy_packets(&self, copies: &[GrantCopy], answers: &mut [bool], own: &mut [&mut Self::Buffer]);

    /// Sends an event on the local port `port`.
    fn send(&self, port: u32);
}

/// A [`NetHost`] as the back end's host.
#[derive(Clone, Debug)]
pub(super) struct Backing<H>(pub(super) H);

impl<H: NetHost> net_backend::Host for Backing<H> {
    type Ring = H::Page;
    type Buffer = H::Buffer;

    fn copy(&mut self, copies: &[GrantCopy], answers: &mut [bool], own: &mut [&mut H::Buffer]) {
        self.0.copy_packets(copies, answers, own);
    }

    fn notify(&mut self, port: u32) {
        self.0.send(port);
    }
}
