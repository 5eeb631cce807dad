//! Pages that other domains granted (ABI io 1): mapped to be shared with them, pinned for a device, copied.
//!
//! Pins and copies go in batches, and each element has an answer of its own: what one guest does wrong costs no other.

use crate::memory::Window;
use crate::shared::PeerPages;
use crate::{dma, hypercall};
use alloc::vec::Vec;
use disk::BusAddress;
use hypercall_abi::grant::{Copy, CopySide, MapGrantRef, UnmapGrantRef, map, status};
use hypercall_abi::{Errno, domid};
use ring_protocol::SharedPage;

/// Elements of one call. Its structures are on the stack.
const BATCH: usize = 32;
/// The most pages mapped in a row.
pub const MOST_PAGES: usize = 16;

/// Pages of another domain, mapped writable in a row until this value is dropped.
#[derive(Debug)]
pub struct GrantedPages {
    pages: PeerPages,
    window: Window,
    handles: Vec<u32>,
}

impl GrantedPages {
    /// Maps the pages that `domain` granted by `references`, at most [`MOST_PAGES`], one after the other.
    ///
    /// # Errors
    /// `NoMem` if no address or memory is free, `NoSpc` if the hypervisor has no handle left, `Srch` without such a domain, `Inval`
    /// for a number of references out of range and for a grant that does not exist or is for another domain, and the
    /// hypervisor's error for the call as a whole.
    pub fn map(domain: u16, references: &[u32]) -> Result<Self, Errno> {
        if references.is_empty() || references.len() > MOST_PAGES {
            return Err(Errno::Inval);
        }
        let mut handles = Vec::new();
        handles.try_reserve_exact(references.len()).map_err(|_| Errno::NoMem)?;
        let window = Window::reserve(references.len() as u64)?;
        // SAFETY: the window shows whole pages in a row as far as they are mapped below, and as long as the value lives; the
        // value is handed out only if all are.
        let pages = unsafe { PeerPages::new(window.pointer(), references.len() * 4096) };
        // What is mapped before an error is unmapped when this is dropped.
        let mut mapped = Self { pages, window, handles };
        for reference in references {
            let mut grant = [MapGrantRef {
                host_addr: mapped.address(mapped.handles.len()),
                flags: map::HOST,
                gref: *reference,
                dom: domain,
                ..MapGrantRef::default()
            }];
            // SAFETY: the address belongs to a window of ours, which holds no Rust references.
            unsafe { hypercall::map_grants(&mut grant) }?;
            match grant[0].status {
                status::OKAY => mapped.handles.push(grant[0].handle),
                status::BAD_DOMAIN => return Err(Errno::Srch),
                status::NO_SPACE | status::NO_DEVICE_SPACE => return Err(Errno::NoSpc),
                _ => return Err(Errno::Inval),
            }
        }
        Ok(mapped)
    }

    fn address(&self, page: usize) -> u64 {
        self.window.address() + page as u64 * 4096
    }
}

impl Drop for GrantedPages {
    fn drop(&mut self) {
        for (page, handle) in self.handles.iter().enumerate() {
            let mut grant =
                [UnmapGrantRef { host_addr: self.address(page), handle: *handle, ..UnmapGrantRef::default() }];
            // SAFETY: nobody refers to the page: its accesses borrow `self`.
            let result = unsafe { hypercall::unmap_grants(&mut grant) };
            if result.is_err() || grant[0].status != status::OKAY {
                log::warn!("a granted page is not unmapped: {result:?}, status {}", grant[0].status);
            }
        }
    }
}

impl SharedPage for GrantedPages {
    fn len_bytes(&self) -> usize {
        self.pages.len_bytes()
    }

    fn load_u32(&self, offset: usize) -> u32 {
        self.pages.load_u32(offset)
    }

    fn store_u32(&self, offset: usize, value: u32) {
        self.pages.store_u32(offset, value);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.pages.read(offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.pages.write(offset, from);
    }
}

/// A page that a device is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The granter.
    pub domain: u16,
    /// The reference.
    pub reference: u32,
    /// The device writes into the page.
    pub writable: bool,
}

/// Why a page is not pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotPinned {
    /// There is no such grant for us, or the granter has withdrawn it.
    Refused,
    /// The hypervisor has no handle left for us.
    NoHandles,
}

/// Pins pages for devices, without mapping them: until [`unpin`] they keep their owner and their type. `each` is told the place of
/// each grant in the list, and its handle and address or why it is not pinned.
pub fn pin(grants: &[Grant], mut each: impl FnMut(usize, Result<(u32, BusAddress), NotPinned>)) {
    for (first, part) in (0..).step_by(BATCH).zip(grants.chunks(BATCH)) {
        let mut calls = [MapGrantRef::default(); BATCH];
        let calls = calls.get_mut(..part.len()).unwrap_or_default();
        for (call, grant) in calls.iter_mut().zip(part) {
            call.flags = map::DEVICE | if grant.writable { 0 } else { map::READONLY };
            (call.gref, call.dom) = (grant.reference, grant.domain);
            call.status = status::GENERAL_ERROR;
        }
        // SAFETY: nothing is mapped. If the call fails as a whole, each status tells whether its element was done.
        let _ = unsafe { hypercall::map_grants(calls) };
        for (place, call) in (first..).zip(calls) {
            each(
                place,
                match call.status {
                    status::OKAY => Ok((call.handle, BusAddress::of_pinned(call.dev_bus_addr))),
                    status::NO_SPACE | status::NO_DEVICE_SPACE => Err(NotPinned::NoHandles),
                    _ => Err(NotPinned::Refused),
                },
            );
        }
    }
}

/// Ends pins, each with the address that [`pin`] answered. No device reaches the pages any more: each has answered or was reset.
pub fn unpin(pins: impl Iterator<Item = (u32, BusAddress)>) {
    let mut pins = pins.peekable();
    while pins.peek().is_some() {
        let mut calls = [UnmapGrantRef::default(); BATCH];
        let mut count = 0;
        for (call, (handle, address)) in calls.iter_mut().zip(pins.by_ref()) {
            (call.handle, call.dev_bus_addr) = (handle, address.number());
            count += 1;
        }
        let calls = calls.get_mut(..count).unwrap_or_default();
        // SAFETY: nothing is mapped.
        let result = unsafe { hypercall::unmap_grants(calls) };
        if let Some(call) = calls.iter().find(|call| call.status != status::OKAY) {
            log::warn!("a page is not unpinned: {result:?}, status {}", call.status);
        }
    }
}

/// A copy between a granted page and one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The granter.
    pub domain: u16,
    /// The reference.
    pub reference: u32,
    /// The first byte in the granted page.
    pub offset: u16,
    /// The machine frame of our page.
    pub frame: u64,
    /// The first byte in our page.
    pub frame_offset: u16,
    /// How many bytes. On both sides they end within the page.
    pub bytes: u16,
    /// From the granted page into ours, which must be memory of [`dma::Dma`]; otherwise from ours.
    pub into_ours: bool,
}

/// Copies. `each` is told the place of each copy in the list, and whether it was done.
pub fn copy(copies: &[PageCopy], mut each: impl FnMut(usize, bool)) {
    const SOURCE_IS_GRANT: u16 = 1;
    const DEST_IS_GRANT: u16 = 2;
    for (first, part) in (0..).step_by(BATCH).zip(copies.chunks(BATCH)) {
        let mut calls = [Copy::default(); BATCH];
        let calls = calls.get_mut(..part.len()).unwrap_or_default();
        for (call, it) in calls.iter_mut().zip(part) {
            call.status = status::GENERAL_ERROR;
            let theirs = CopySide { gref_or_frame: it.reference.into(), domid: it.domain, offset: it.offset, pad: 0 };
            let ours = CopySide { gref_or_frame: it.frame, domid: domid::SELF, offset: it.frame_offset, pad: 0 };
            if it.into_ours && !dma::is_set_aside(it.frame) {
                log::error!("frame {:#x} is not for copies into it", it.frame);
                continue; // a copy of nothing, whose status stays
            }
            (call.source, call.dest, call.flags) =
                if it.into_ours { (theirs, ours, SOURCE_IS_GRANT) } else { (ours, theirs, DEST_IS_GRANT) };
            call.len = it.bytes;
        }
        // SAFETY: frames of ours that are written are of memory that is accessed atomically or volatilely only (looked at above).
        let _ = unsafe { hypercall::copy_grants(calls) };
        for (place, (call, it)) in (first..).zip(calls.iter().zip(part)) {
            each(place, call.status == status::OKAY && call.len == it.bytes);
        }
    }
}
