//! What disks need of the domain they run in, and the back end's host made of it.

use alloc::rc::Rc;

use block_backend::{GrantCopy, Handle, PinError, Pinned, Wanted};
use disk::OwnMemory;
use hypercall_abi::Errno;
use ring_protocol::SharedPage;

use crate::host::Host;

/// What disks need in addition to a [`Host`].
pub trait BlockHost: Host {
    /// The pages of a ring, mapped one after the other until this value is dropped.
    type Ring: SharedPage + 'static;
    /// Memory of this domain.
    type Memory: OwnMemory + SharedPage;

    /// Maps the pages that `domain` granted by `references`, at most 16.
    ///
    /// # Errors
    /// The hypervisor's error; `NoMem` if no addresses are free for the pages.
    fn map_ring(&self, domain: u16, references: &[u32]) -> Result<Self::Ring, Errno>;

    /// Allocates `pages` consecutive pages of zeroes. `None` if there is not enough memory.
    fn allocate(&self, pages: usize) -> Option<Self::Memory>;

    /// Takes a page of zeroes for a disk in memory. Returns the number by which grant copies name the page; `None` if there is
    /// no memory. Only grant copies read and write the page.
    fn take_page(&self) -> Option<u64>;

    /// Gives back a page of [`take_page`](BlockHost::take_page).
    fn give_back_page(&self, page: u64);

    /// Pins pages of guests: see [`block_backend::Host::pin`].
    fn pin(&self, wanted: &[Wanted], answers: &mut [Result<Pinned, PinError>]);

    /// Gives pins back: see [`block_backend::Host::unpin`].
    fn unpin(&self, handles: &[Handle]);

    /// Copies between pages of guests and pages of this domain: see [`block_backend::Host::copy`].
    fn copy(&self, copies: &[GrantCopy], answers: &mut [bool]);

    /// Sends an event on the local port `port`.
    fn notify(&self, port: u32);
}

/// Memory of this domain that several owners share.
#[derive(Debug)]
pub struct Own<M>(Rc<M>);

impl<M> Clone for Own<M> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<M> From<M> for Own<M> {
    fn from(memory: M) -> Self {
        Self(Rc::new(memory))
    }
}

impl<M: OwnMemory> Own<M> {
    /// Returns the number by which grant copies name the first page.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.0.page()
    }
}

impl<M: SharedPage> SharedPage for Own<M> {
    fn len_bytes(&self) -> usize {
        self.0.len_bytes()
    }

    fn load_u32(&self, offset: usize) -> u32 {
        self.0.load_u32(offset)
    }

    fn store_u32(&self, offset: usize, value: u32) {
        self.0.store_u32(offset, value);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.0.read(offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.0.write(offset, from);
    }
}

/// A [`BlockHost`] as the back end's host.
#[derive(Clone, Debug)]
pub struct Backing<H>(pub H);

impl<H: BlockHost> block_backend::Host for Backing<H> {
    type Ring = H::Ring;
    type Memory = Own<H::Memory>;

    fn pin(&mut self, wanted: &[Wanted], answers: &mut [Result<Pinned, PinError>]) {
        self.0.pin(wanted, answers);
    }

    fn unpin(&mut self, handles: &[Handle]) {
        self.0.unpin(handles);
    }

    fn copy(&mut self, copies: &[GrantCopy], answers: &mut [bool]) {
        self.0.copy(copies, answers);
    }

    fn notify(&mut self, _domain: u16, port: u32) {
        self.0.notify(port);
    }
}
