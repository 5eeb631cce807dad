//! Memory that devices read and write at any time: consecutive frames with known machine addresses. All unsafe code for such
//! memory is here.
//!
//! Touches: frames of this domain that have no other mapping in it, so that no Rust reference leads to them.
//! Guarantees: memory that a device may still write is not given back. Dropping a [`Dma`] does not free its memory;
//! [`Dma::give_back`] does, and its contract names what the caller must ensure.

use crate::memory::{PAGE, Window};
use crate::shared::PeerPages;
use crate::{control, hypercall};
use core::arch::asm;
use core::mem::ManuallyDrop;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use disk::BusAddress;
use drivers::hardware::DmaMemory;
use hypercall_abi::memory::MemoryOp;
use hypercall_abi::{Errno, domid};
use ring_protocol::SharedPage;

/// The page number under which each run is requested. It is larger than the number of any page that the domain got from its
/// builder or borrows.
pub(crate) const FIRST_PAGE: u64 = 1 << 31;
/// The maximum number of frames of a run: 2 MiB.
const MOST: usize = 512;

/// Bytes that are accessed atomically or volatilely, never through a reference.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes {
    base: *mut u8,
    count: usize,
}

impl Bytes {
    /// # Safety
    /// `count` bytes at `base` are mapped writable for as long as the value is used, and no Rust reference leads to them.
    pub(crate) const unsafe fn new(base: *mut u8, count: usize) -> Self {
        Self { base, count }
    }

    pub(crate) const fn count(self) -> usize {
        self.count
    }

    /// Returns a pointer to a `T` at an offset. `None` if the `T` would be outside the bytes or not aligned.
    pub(crate) fn at<T>(self, offset: usize) -> Option<*mut T> {
        let end = offset.checked_add(size_of::<T>())?;
        let at = self.base.wrapping_add(offset);
        (end <= self.count && at.addr().is_multiple_of(align_of::<T>())).then(|| at.cast())
    }

    /// Returns a pointer to `count` bytes from `offset` on. `None` if they would not all be inside.
    fn run(self, offset: usize, count: usize) -> Option<*mut u8> {
        let end = offset.checked_add(count)?;
        (end <= self.count).then(|| self.base.wrapping_add(offset))
    }
}

/// Copies bytes that a device may read or write at the same time.
///
/// # Safety
/// `count` bytes are mapped at `from`, and mapped writable at `to`, and do not overlap. A Rust reference may lead only to the
/// side that no device reaches.
unsafe fn copy_shared(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: by the contract, the instructions access only mapped bytes. They are opaque to the compiler, which so makes no
    // assumption about bytes that change meanwhile. The direction flag is clear in Rust code.
    unsafe {
        asm!(
            "rep movsq",
            "mov rcx, {tail}",
            "rep movsb",
            tail = in(reg) count % 8,
            inout("rcx") count / 8 => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// A run of frames for devices, zeroed and mapped. Their machine addresses may be anywhere in RAM.
#[derive(Debug)]
pub struct Dma {
    window: ManuallyDrop<Window>,
    bytes: Bytes,
    frame: u64,
}

// SAFETY: every access is atomic, and the memory is the same for every vcpu.
unsafe impl Send for Dma {}

impl Dma {
    /// Allocates `count` consecutive frames, 1 to 512. They are added to the memory that this domain has, so its limit must
    /// allow them: see [`crate::memory::lend_large`].
    ///
    /// # Errors
    /// `NoMem` if no such run or no address for it is free; `Inval` for another `count`; otherwise the hypervisor's error.
    pub fn allocate(count: usize) -> Result<Self, Errno> {
        if !(1..=MOST).contains(&count) {
            return Err(Errno::Inval);
        }
        let whole = count.next_power_of_two();
        // All runs are requested under one page number, which nothing uses afterwards: a run is known by its first frame.
        let frame = control::populate_run(domid::SELF, FIRST_PAGE, whole.ilog2())?.ok_or(Errno::NoMem)?;
        return_frames(frame + count as u64, whole - count);
        Self::map(frame, count).inspect_err(|_| return_frames(frame, count))
    }

    /// The first machine frame of the run.
    #[must_use]
    pub const fn frame(&self) -> u64 {
        self.frame
    }

    fn map(frame: u64, count: usize) -> Result<Self, Errno> {
        let mut frames = [0; MOST];
        let frames = frames.get_mut(..count).ok_or(Errno::Inval)?;
        (frame..).zip(frames.iter_mut()).for_each(|(frame, slot)| *slot = frame);
        let window = Window::map(frames, domid::SELF, true)?;
        let count = frames.len() * 4096;
        // SAFETY:
        // 1. The window maps these frames writable until it is dropped, and `ManuallyDrop` keeps it until `give_back`.
        // 2. The frames were added to this domain just now, so nothing else maps them, and the window hands out no reference.
        let bytes = unsafe { Bytes::new(window.pointer(), count) };
        let dma = Self { window: ManuallyDrop::new(window), bytes, frame };
        dma.clear();
        Ok(dma)
    }

    /// Returns the address of the first byte. The bytes are mapped, and were written, until [`Dma::give_back`].
    pub(crate) const fn base(&self) -> *mut u8 {
        self.bytes.base
    }

    /// Writes zeroes to all bytes.
    pub(crate) fn clear(&self) {
        (0..self.bytes.count()).step_by(8).for_each(|offset| self.store64(offset, 0));
    }

    fn shared(&self) -> PeerPages {
        // SAFETY: the window maps whole pages until `give_back`, and no reference leads to them.
        unsafe { PeerPages::new(self.window.pointer(), self.bytes.count()) }
    }

    /// Gives the memory back to the hypervisor. The memory of a value that is dropped instead is kept for ever.
    ///
    /// # Safety
    /// No device can still write the memory: each device that was given an address in it has been reset, and the reset was read
    /// back.
    pub unsafe fn give_back(self) {
        let Self { window, frame, bytes } = self;
        drop(ManuallyDrop::into_inner(window));
        return_frames(frame, bytes.count() / 4096);
    }
}

/// Gives back to the hypervisor `count` frames, which are mapped nowhere.
fn return_frames(first: u64, count: usize) {
    if count == 0 {
        return;
    }
    let mut frames = [0; MOST];
    let frames = frames.get_mut(..count).unwrap_or_default();
    (first..).zip(frames.iter_mut()).for_each(|(frame, slot)| *slot = frame);
    // SAFETY: the frames are mapped nowhere, and no device writes them: they were never used, or by the contract of
    // `give_back`.
    let returned = unsafe { hypercall::reservation(MemoryOp::DecreaseReservation, frames, domid::SELF) };
    debug_assert_eq!(returned, Ok(frames.len() as u64), "frames cannot be given back");
}

/// The atomic of type `$atomic` at `$offset` in the memory; `None` if it is not inside, or not aligned.
macro_rules! word {
    ($self:ident, $offset:ident, $atomic:ident) => {
        // SAFETY: `at` keeps it inside the memory and aligned; it is mapped, by the contract of `Bytes::new`; the other side is
        // a device, hence an atomic.
        $self.bytes.at($offset).map(|word| unsafe { $atomic::from_ptr(word) })
    };
}

impl DmaMemory for Dma {
    fn bytes(&self) -> usize {
        self.bytes.count()
    }

    fn bus_address(&self, offset: usize) -> BusAddress {
        // There is no IOMMU, so the address for a device is the machine address. It stays valid as long as a device uses it,
        // because the run keeps its frames until `give_back`.
        BusAddress::of_pinned(self.frame * PAGE).plus(offset.min(self.bytes.count()) as u64)
    }

    fn load8(&self, offset: usize) -> u8 {
        word!(self, offset, AtomicU8).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn load16(&self, offset: usize) -> u16 {
        word!(self, offset, AtomicU16).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn load64(&self, offset: usize) -> u64 {
        word!(self, offset, AtomicU64).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store8(&self, offset: usize, value: u8) {
        if let Some(word) = word!(self, offset, AtomicU8) {
            word.store(value, Ordering::Release);
        }
    }

    fn store16(&self, offset: usize, value: u16) {
        if let Some(word) = word!(self, offset, AtomicU16) {
            word.store(value, Ordering::Release);
        }
    }

    fn store64(&self, offset: usize, value: u64) {
        if let Some(word) = word!(self, offset, AtomicU64) {
            word.store(value, Ordering::Release);
        }
    }

    fn read_bytes(&self, offset: usize, into: &mut [u8]) {
        match self.bytes.run(offset, into.len()) {
            // SAFETY: `run` keeps the bytes inside the memory, which is mapped by the contract of `Bytes::new`; `into` is a
            // reference, and no reference leads to the memory, so the two do not overlap.
            Some(from) => unsafe { copy_shared(from, into.as_mut_ptr(), into.len()) },
            None => into.fill(0),
        }
    }

    fn write_bytes(&self, offset: usize, from: &[u8]) {
        if let Some(to) = self.bytes.run(offset, from.len()) {
            // SAFETY: as in `read_bytes`.
            unsafe { copy_shared(from.as_ptr(), to, from.len()) };
        }
    }
}

impl SharedPage for Dma {
    fn len_bytes(&self) -> usize {
        self.shared().len_bytes()
    }

    fn load_u32(&self, offset: usize) -> u32 {
        self.shared().load_u32(offset)
    }

    fn store_u32(&self, offset: usize, value: u32) {
        self.shared().store_u32(offset, value);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.shared().read(offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.shared().write(offset, from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_inside_the_memory_and_aligned() {
        let mut memory = [0u64; 4];
        // SAFETY: the array outlives the value and is not touched meanwhile.
        let bytes = unsafe { Bytes::new(memory.as_mut_ptr().cast(), 32) };
        let inside = |offset| [bytes.at::<u8>(offset).is_some(), bytes.at::<u64>(offset).is_some()];
        assert_eq!(
            [0, 1, 24, 25, 31, 32].map(inside),
            [[true, true], [true, false], [true, true], [true, false], [true, false], [false, false]]
        );
        assert_eq!(inside(usize::MAX), [false, false]);
        let run = |offset, count| bytes.run(offset, count).is_some();
        assert!(run(0, 32) && run(31, 1) && run(32, 0) && run(5, 0));
        assert!(!run(0, 33) && !run(31, 2) && !run(33, 0) && !run(1, usize::MAX) && !run(usize::MAX, 2));
        // Registers may begin off a multiple of their width.
        // SAFETY: as above.
        let bytes = unsafe { Bytes::new(memory.as_mut_ptr().cast::<u8>().wrapping_add(4), 28) };
        assert!(bytes.at::<u64>(0).is_none() && bytes.at::<u64>(4).is_some() && bytes.at::<u32>(0).is_some());
    }

    #[test]
    fn bytes_of_any_number_are_copied_to_any_place() {
        let from: [u8; 64] = core::array::from_fn(|n| u8::try_from(n).unwrap() + 1);
        for (offset, count) in (0..17).flat_map(|offset| (0..40).map(move |count| (offset, count))) {
            let mut to = [0; 80];
            // SAFETY: both are arrays with room for the bytes.
            unsafe { copy_shared(from[offset..].as_ptr(), to[offset / 2..].as_mut_ptr(), count) };
            let expected = |n: usize| {
                if (offset / 2..offset / 2 + count).contains(&n) { from[n + offset - offset / 2] } else { 0 }
            };
            assert_eq!(to, core::array::from_fn(expected), "{offset} {count}");
        }
    }
}
