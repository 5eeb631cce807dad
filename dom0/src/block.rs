//! The unikernel as the domain that disks of guests are served from.

use block_backend::{GrantCopy, Handle, PinError, Pinned, Wanted};
use disk::BusAddress;
use hypercall_abi::Errno;
use ring_protocol::SharedPage;
use ring_protocol::block::Direction;
use services::block::{BlockHost, Image, OwnMemory};
use unikernel::grants::{self, Grant, GrantedPages, NotPinned, PageCopy};
use unikernel::hypercall;
use unikernel::memory::{self, PAGE};
use unikernel::pages::{self, Run};

use crate::host::Unikernel;

/// In a page number: the page is of the boot bundle, and the other bits are its number in this domain. Without this bit, the
/// number is that of a machine frame.
const OF_BUNDLE: u64 = 1 << 47;

/// A file of the boot bundle as an image; `None` if the file is not where the bundle's pages are.
pub(crate) fn image(bytes: &'static [u8]) -> Option<Image> {
    let address = bytes.as_ptr().addr() as u64;
    let page = memory::page_of(address)? | OF_BUNDLE;
    Some(Image { page, offset: address % PAGE, bytes })
}

/// The machine frame of a page.
fn frame(page: u64) -> u64 {
    // No machine has a frame of the last number, so the copy is refused.
    if page & OF_BUNDLE == 0 { page } else { memory::frame_of_page(page & !OF_BUNDLE).unwrap_or(u64::MAX) }
}

/// Consecutive pages of this domain.
pub(crate) struct Memory(Run);

impl OwnMemory for Memory {
    fn page(&self) -> u64 {
        self.0.frame()
    }

    fn address(&self) -> BusAddress {
        self.0.address()
    }
}

impl SharedPage for Memory {
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

impl BlockHost for Unikernel {
    type Ring = GrantedPages;
    type Memory = Memory;

    fn map_ring(&self, domain: u16, references: &[u32]) -> Result<GrantedPages, Errno> {
        GrantedPages::map(domain, references)
    }

    fn allocate(&self, pages: usize) -> Option<Memory> {
        Run::take(pages).map(Memory)
    }

    fn take_page(&self) -> Option<u64> {
        pages::take()
    }

    fn give_back_page(&self, page: u64) {
        pages::give_back(page);
    }

    fn pin(&self, wanted: &[Wanted], answers: &mut [Result<Pinned, PinError>]) {
        let grant = |it: &Wanted| Grant { domain: it.domain, reference: it.reference, writable: it.writable };
        grants::pin(wanted.iter().map(grant), |place, answer| {
            let answer = answer.map(|(handle, address)| Pinned { handle: Handle(handle), address });
            let answer = answer.map_err(|why| match why {
                NotPinned::Refused => PinError::Refused,
                NotPinned::NoHandles => PinError::NoHandles,
            });
            answers.get_mut(place).into_iter().for_each(|slot| *slot = answer);
        });
    }

    fn unpin(&self, handles: &[Handle]) {
        grants::unpin(handles.iter().map(|handle| handle.0));
    }

    fn copy(&self, copies: &[GrantCopy], answers: &mut [bool]) {
        let copy = |it: &GrantCopy| PageCopy {
            domain: it.domain,
            reference: it.reference,
            offset: it.offset,
            frame: frame(it.page),
            frame_offset: it.page_offset,
            bytes: it.bytes,
            into_ours: it.direction == Direction::Write,
        };
        grants::copy(copies.iter().map(copy), |place, done| {
            answers.get_mut(place).into_iter().for_each(|slot| *slot = done);
        });
    }

    fn notify(&self, port: u32) {
        // If the other end is gone, nobody is to be told.
        let _ = hypercall::send(port);
    }
}
