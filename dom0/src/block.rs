//! The unikernel as the domain that disks of guests are served from.

use block_backend::{GrantCopy, Handle, PinError, Pinned, Wanted};
use hypercall_abi::Errno;
use ring_protocol::block::Direction;
use services::block::{BlockHost, Image};
use unikernel::grants::{self, Grant, GrantedPages, NotPinned, PageCopy};
use unikernel::hypercall;
use unikernel::memory::PAGE;
use unikernel::pages::{self, Run};

use crate::host::Unikernel;

/// A file of the boot bundle as an image; `None` if the file is not where the bundle's pages are.
pub(crate) fn image(bytes: &'static [u8]) -> Option<Image> {
    let address = bytes.as_ptr().addr() as u64;
    Some(Image { page: pages::of_bundle(address)?, offset: address % PAGE, bytes })
}

impl BlockHost for Unikernel {
    type Ring = GrantedPages;
    type Memory = Run;

    fn map_ring(&self, domain: u16, references: &[u32]) -> Result<GrantedPages, Errno> {
        GrantedPages::map(domain, references)
    }

    fn allocate(&self, pages: usize) -> Option<Run> {
        Run::take(pages)
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
            frame: pages::machine_frame(it.page),
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
