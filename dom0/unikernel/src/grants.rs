//! Pages that other domains granted (ABI io 1): they are mapped in order to be shared, pinned for a device, or copied.
//!
//! Pins and copies are made in batches, and each element of a batch has a result of its own: if one fails, the others do not.

use crate::memory::Window;
use crate::pages::{self, Buffer};
use crate::shared::PeerPages;
use crate::sync::MaskMutex;
use crate::{hypercall, memory};
use alloc::vec::Vec;
use disk::BusAddress;
use hypercall_abi::grant::{Copy, CopySide, MapGrantRef, UnmapGrantRef, map, status};
use hypercall_abi::{Errno, domid};
use ring_protocol::SharedPage;

/// The maximum number of elements of one hypercall. Their structures are on the stack.
const BATCH: usize = 32;
/// The maximum number of elements for which a shorter array is used, which costs less to clear.
const FEW: usize = 4;
/// The maximum number of pages of a [`GrantedPages`].
pub const MOST_PAGES: usize = 16;

/// Pages of another domain, mapped writable at consecutive addresses until this value is dropped.
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
    /// `NoMem` if no address or memory is free; `NoSpc` if the hypervisor has no handle left; `Srch` if there is no such
    /// domain; `Inval` for no reference, for too many, and for a grant that the hypervisor refuses, for instance because it
    /// does not exist or is for another domain; and the hypervisor's error for the call as a whole.
    pub fn map(domain: u16, references: &[u32]) -> Result<Self, Errno> {
        if references.is_empty() || references.len() > MOST_PAGES {
            return Err(Errno::Inval);
        }
        let mut handles = Vec::new();
        handles.try_reserve_exact(references.len()).map_err(|_| Errno::NoMem)?;
        let window = Window::reserve(references.len() as u64)?;
        // SAFETY: the window has whole pages, which are mapped below and stay mapped as long as this value lives; it is only
        // handed out if all are mapped.
        let pages = unsafe { PeerPages::new(window.pointer(), references.len() * 4096) };
        // Pages that are mapped before an error are unmapped when this value is dropped.
        let mut mapped = Self { pages, window, handles };
        for reference in references {
            let mut grant = [MapGrantRef {
                host_addr: mapped.address(mapped.handles.len()),
                flags: map::HOST,
                gref: *reference,
                dom: domain,
                ..MapGrantRef::default()
            }];
            // SAFETY: the address belongs to a window of ours, into which no Rust reference leads.
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

/// A granted page that a device is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The domain that granted the page.
    pub domain: u16,
    /// The reference of the grant.
    pub reference: u32,
    /// Whether the device writes into the page.
    pub writable: bool,
}

/// Why a page is not pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotPinned {
    /// There is no such grant for this domain, or the granter has withdrawn it.
    Refused,
    /// The hypervisor has no handle left for this domain, or this domain has no memory to note one.
    NoHandles,
}

/// The machine address of the page that each handle pins; 0 for a handle that pins nothing.
static PINNED: MaskMutex<Vec<u64>> = MaskMutex::new(Vec::new());
/// The number of handles by which [`PINNED`] grows in one step.
const GROWTH: usize = 512;

/// The status of a grant that is pinned but not noted, for lack of memory. The hypervisor never returns this status.
const NOT_NOTED: i16 = i16::MIN;

/// Notes the machine address of each page that was pinned. If there is no memory for a note, sets the status [`NOT_NOTED`].
fn note(calls: &mut [MapGrantRef]) {
    let mut pinned = PINNED.lock();
    for call in calls.iter_mut().filter(|call| call.status == status::OKAY) {
        let index = call.handle as usize;
        if index >= pinned.len() && !grow(&mut pinned, index) {
            call.status = NOT_NOTED;
        } else if let Some(slot) = pinned.get_mut(index) {
            *slot = call.dev_bus_addr;
        }
    }
}

/// Makes room for a handle; returns false if there is no memory for this.
#[cold]
fn grow(pinned: &mut Vec<u64>, index: usize) -> bool {
    let more = (index + 1).next_multiple_of(GROWTH) - pinned.len();
    if pinned.try_reserve_exact(more).is_err() {
        return false;
    }
    let wanted = pinned.len() + more;
    pinned.resize(wanted, 0);
    true
}

/// Pins pages for devices, without mapping them: until [`unpin`], the pages keep their owner and their type. Calls `each` for
/// each grant, with its place in `grants`, and with its handle and the page's address, or why the page is not pinned.
pub fn pin(
    mut grants: impl ExactSizeIterator<Item = Grant>,
    mut each: impl FnMut(usize, Result<(u32, BusAddress), NotPinned>),
) {
    let mut first = 0;
    while grants.len() > 0 {
        first += if grants.len() <= FEW {
            pin_batch::<FEW>(&mut grants, |place, answer| each(first + place, answer))
        } else {
            pin_batch::<BATCH>(&mut grants, |place, answer| each(first + place, answer))
        };
    }
}

/// Pins the next `N` pages at most, as [`pin`] does. Returns how many grants this took.
fn pin_batch<const N: usize>(
    grants: &mut impl Iterator<Item = Grant>,
    mut each: impl FnMut(usize, Result<(u32, BusAddress), NotPinned>),
) -> usize {
    let mut calls = [MapGrantRef::default(); N];
    let mut count = 0;
    for (call, grant) in calls.iter_mut().zip(grants) {
        call.flags = map::DEVICE | if grant.writable { 0 } else { map::READONLY };
        (call.gref, call.dom) = (grant.reference, grant.domain);
        call.status = status::GENERAL_ERROR;
        count += 1;
    }
    let calls = calls.get_mut(..count).unwrap_or_default();
    // SAFETY: nothing is mapped. Even if the call fails as a whole, each status tells whether its element was carried out.
    let _ = unsafe { hypercall::map_grants(calls) };
    note(calls);
    for (place, call) in calls.iter().enumerate() {
        each(
            place,
            match call.status {
                status::OKAY => Ok((call.handle, BusAddress::of_pinned(call.dev_bus_addr))),
                NOT_NOTED => {
                    end_pins(&mut [ending(call.handle, call.dev_bus_addr)]);
                    Err(NotPinned::NoHandles)
                }
                status::NO_SPACE | status::NO_DEVICE_SPACE => Err(NotPinned::NoHandles),
                _ => Err(NotPinned::Refused),
            },
        );
    }
    count
}

/// Ends pins, by the handles that [`pin`] returned. The caller makes sure that no device reaches the pages any more: each
/// device has answered or was reset.
pub fn unpin(mut handles: impl ExactSizeIterator<Item = u32>) {
    while handles.len() > 0 {
        if handles.len() <= FEW {
            unpin_batch::<FEW>(&mut handles);
        } else {
            unpin_batch::<BATCH>(&mut handles);
        }
    }
}

/// Ends the next `N` pins at most.
fn unpin_batch<const N: usize>(handles: &mut impl Iterator<Item = u32>) {
    let mut calls = [UnmapGrantRef::default(); N];
    let mut count = 0;
    for (call, handle) in calls.iter_mut().zip(handles) {
        call.handle = handle;
        count += 1;
    }
    let calls = calls.get_mut(..count).unwrap_or_default();
    let mut pinned = PINNED.lock();
    for call in &mut *calls {
        call.dev_bus_addr = pinned.get_mut(call.handle as usize).map_or(0, core::mem::take);
    }
    drop(pinned);
    end_pins(calls);
}

fn ending(handle: u32, dev_bus_addr: u64) -> UnmapGrantRef {
    UnmapGrantRef { handle, dev_bus_addr, ..UnmapGrantRef::default() }
}

fn end_pins(calls: &mut [UnmapGrantRef]) {
    // SAFETY: nothing is mapped.
    let result = unsafe { hypercall::unmap_grants(calls) };
    if let Some(call) = calls.iter().find(|call| call.status != status::OKAY) {
        log::warn!("a page is not unpinned: {result:?}, status {}", call.status);
    }
}

/// A copy between a granted page and a page of this domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The domain that granted the page.
    pub domain: u16,
    /// The reference of the grant.
    pub reference: u32,
    /// The first byte in the granted page.
    pub offset: u16,
    /// The machine frame of this domain's page.
    pub frame: u64,
    /// The first byte in this domain's page.
    pub frame_offset: u16,
    /// How many bytes are copied. They end within the page on both sides.
    pub bytes: u16,
    /// Whether to copy from the granted page into this domain's, to which no Rust reference may lead: memory of a
    /// [`crate::dma::Dma`], or a page of [`crate::pages`]. Otherwise from this domain's page into the granted one.
    pub into_ours: bool,
}

/// Makes copies. Calls `each` for each copy, with its place in `copies`, and with whether all its bytes were copied.
pub fn copy(copies: impl ExactSizeIterator<Item = PageCopy>, each: impl FnMut(usize, bool)) {
    let fill = |call: &mut Copy, it: PageCopy| {
        let theirs = CopySide { gref_or_frame: it.reference.into(), domid: it.domain, offset: it.offset, pad: 0 };
        let ours = CopySide { gref_or_frame: it.frame, domid: domid::SELF, offset: it.frame_offset, pad: 0 };
        if it.into_ours && (memory::is_linear(it.frame) || pages::is_buffer(it.frame)) {
            log::error!("frame {:#x} is not for copies into it", it.frame);
            return; // the element has no flags: it counts as refused
        }
        (call.source, call.dest, call.flags) =
            if it.into_ours { (theirs, ours, SOURCE_IS_GRANT) } else { (ours, theirs, DEST_IS_GRANT) };
        call.len = it.bytes;
    };
    // SAFETY: `fill` names a frame to be written only after it has checked that no Rust reference leads there.
    unsafe { copy_all(copies, fill, each) }
}

/// A page that bytes are copied from or to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A page that another domain granted.
    Granted {
        /// The domain that granted the page.
        domain: u16,
        /// The reference of the grant.
        reference: u32,
    },
    /// A page of this domain, by its machine frame.
    Own(u64),
}

/// A copy between two pages, of which at least one is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideCopy {
    /// The page that is read.
    pub from: Side,
    /// The first byte that is read.
    pub from_offset: u16,
    /// The page that is written.
    pub to: Side,
    /// The first byte that is written.
    pub to_offset: u16,
    /// How many bytes are copied. They end within the page on both sides.
    pub bytes: u16,
}

/// Makes copies in which both sides may be granted pages. Calls `each` for each copy, with its place in `copies`, and with
/// whether all its bytes were copied. `own` are the buffers that are written: a copy into any other page of this domain is
/// refused, as is one between two pages of this domain.
pub fn copy_sides<B: AsMut<Buffer>>(
    copies: impl ExactSizeIterator<Item = SideCopy>,
    own: &mut [&mut B],
    each: impl FnMut(usize, bool),
) {
    let fill = |call: &mut Copy, it: SideCopy| {
        if let Side::Own(frame) = it.to
            && !own.iter_mut().any(|buffer| (**buffer).as_mut().has(frame))
        {
            return log::error!("frame {frame:#x} is of no buffer that is lent for copies into it");
        }
        let (from, from_flag) = side(it.from, it.from_offset, SOURCE_IS_GRANT);
        let (to, to_flag) = side(it.to, it.to_offset, DEST_IS_GRANT);
        (call.source, call.dest, call.flags) = (from, to, from_flag | to_flag);
        // Without flags the element counts as refused.
        call.len = if call.flags == 0 { 0 } else { it.bytes };
    };
    // SAFETY: `fill` names only frames to be written of buffers that are borrowed exclusively meanwhile: no Rust reference
    // leads there.
    unsafe { copy_all(copies, fill, each) }
}

fn side(side: Side, offset: u16, flag: u16) -> (CopySide, u16) {
    match side {
        Side::Granted { domain, reference } => {
            (CopySide { gref_or_frame: reference.into(), domid: domain, offset, pad: 0 }, flag)
        }
        Side::Own(frame) => (CopySide { gref_or_frame: frame, domid: domid::SELF, offset, pad: 0 }, 0),
    }
}

/// Flags of a copy: which sides are granted pages.
const SOURCE_IS_GRANT: u16 = 1;
const DEST_IS_GRANT: u16 = 2;

/// Makes copies, each of which `fill` turns into an element of the hypercall. An element without flags, as `fill` gets it, is
/// refused.
///
/// # Safety
/// No Rust reference leads to a frame that an element from `fill` names to be written.
unsafe fn copy_all<T>(
    mut copies: impl ExactSizeIterator<Item = T>,
    mut fill: impl FnMut(&mut Copy, T),
    mut each: impl FnMut(usize, bool),
) {
    let mut first = 0;
    while copies.len() > 0 {
        let few = copies.len() <= FEW;
        let answer = |place: usize, done| each(first + place, done);
        // SAFETY: the contract is the same.
        first += unsafe {
            if few {
                copy_batch::<FEW, T>(&mut copies, &mut fill, answer)
            } else {
                copy_batch::<BATCH, T>(&mut copies, &mut fill, answer)
            }
        };
    }
}

/// Makes the next `N` copies at most, as [`copy_all`] does. Returns how many copies this took.
///
/// # Safety
/// As for [`copy_all`].
unsafe fn copy_batch<const N: usize, T>(
    copies: &mut impl Iterator<Item = T>,
    fill: &mut impl FnMut(&mut Copy, T),
    mut each: impl FnMut(usize, bool),
) -> usize {
    let mut calls = [Copy::default(); N];
    let mut count = 0;
    for (call, it) in calls.iter_mut().zip(copies) {
        count += 1;
        call.status = status::GENERAL_ERROR;
        fill(call, it);
    }
    let calls = calls.get_mut(..count).unwrap_or_default();
    // SAFETY: no Rust reference leads to the frames that are written, by the contract. The hypervisor refuses frames of others.
    let _ = unsafe { hypercall::copy_grants(calls) };
    for (place, call) in calls.iter().enumerate() {
        each(place, call.status == status::OKAY && call.flags != 0);
    }
    count
}
