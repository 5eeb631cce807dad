//! Memory for guests' devices: single pages that only grant copies access, runs of pages that are mapped and reused, and runs
//! that Rust refers to as bytes.
//!
//! All kinds are added to the memory of this domain, and only while at least [`KEPT`] pages of the machine stay free.
//! Guarantees: memory is zeroed before it is handed out.

use crate::dma::{Dma, FIRST_PAGE};
use crate::memory;
use crate::sync::MaskMutex;
use crate::{control, hypercall};
use alloc::vec::Vec;
use core::mem::ManuallyDrop;
use core::slice;
use core::sync::atomic::{AtomicU64, Ordering};
use disk::{BusAddress, OwnMemory};
use drivers::hardware::DmaMemory;
use hypercall_abi::domid;
use hypercall_abi::memory::MemoryOp;
use ring_protocol::SharedPage;

/// A bit in the number by which grant copies name a page. If set, the page is of the boot bundle, and the other bits are its
/// page-frame number in this domain. If clear, the number is that of a machine frame.
const OF_BUNDLE: u64 = 1 << 47;

/// Returns the number by which grant copies name the page at an address of the boot bundle. `None` if there is no page.
#[must_use]
pub fn of_bundle(address: u64) -> Option<u64> {
    memory::page_of(address).map(|page| page | OF_BUNDLE)
}

/// Returns the machine frame of a page that grant copies name by this number. If there is no such page, returns `u64::MAX`,
/// which is no frame of any machine.
#[must_use]
pub fn machine_frame(page: u64) -> u64 {
    if page & OF_BUNDLE == 0 { page } else { memory::frame_of_page(page & !OF_BUNDLE).unwrap_or(u64::MAX) }
}

/// Free pages of the machine that are left for the hypervisor, and for the heap of this domain.
pub const KEPT: u64 = 1024;
/// Frames that are taken from the hypervisor, or given back, by one call.
const BATCH: usize = 64;

/// Frames, at most [`BATCH`].
struct Stack {
    frames: [u64; BATCH],
    count: usize,
}

impl Stack {
    const fn new() -> Self {
        Self { frames: [0; BATCH], count: 0 }
    }

    fn pop(&mut self) -> Option<u64> {
        self.count = self.count.checked_sub(1)?;
        self.frames.get(self.count).copied()
    }

    /// Returns false, and keeps nothing, if the stack is full.
    fn push(&mut self, frame: u64) -> bool {
        let slot = self.frames.get_mut(self.count);
        let room = slot.is_some();
        slot.into_iter().for_each(|slot| *slot = frame);
        self.count += usize::from(room);
        room
    }

    fn frames(&mut self) -> &mut [u64] {
        self.frames.get_mut(..self.count).unwrap_or_default()
    }
}

/// Frames of zeroes from the hypervisor that are not handed out yet.
static FRESH: MaskMutex<Stack> = MaskMutex::new(Stack::new());
/// Frames that are to be given back to the hypervisor, which clears them before it hands them out again.
static DONE: MaskMutex<Stack> = MaskMutex::new(Stack::new());

/// Returns whether the machine has `count` free pages in addition to [`KEPT`].
fn has(count: u64) -> bool {
    hypercall::physical_info().is_ok_and(|info| info.free_pages >= KEPT.saturating_add(count))
}

/// Takes a frame of zeroes that is mapped nowhere, and returns its number; `None` if the machine has none to spare.
#[must_use]
pub fn take() -> Option<u64> {
    let mut fresh = FRESH.lock();
    if fresh.count == 0 && has(BATCH as u64) {
        let got = control::populate(domid::SELF, FIRST_PAGE, &mut fresh.frames).unwrap_or(0);
        fresh.count = got.min(BATCH);
    }
    fresh.pop()
}

/// Gives back a frame of [`take`]. Ignores, with a line in the log, a frame that Rust references may lead to. The hypervisor
/// gets 64 frames by one call, so up to 64 frames stay with this domain until other frames are given back.
pub fn give_back(frame: u64) {
    if memory::is_linear(frame) || is_buffer(frame) {
        return log::error!("frame {frame:#x} is not of a disk");
    }
    let mut done = DONE.lock();
    if !done.push(frame) {
        flush(&mut done);
        done.push(frame);
    }
}

fn flush(done: &mut Stack) {
    let count = done.count as u64;
    // SAFETY: no Rust reference leads to the frames, as `give_back` checks. If a frame is still mapped, it stays with this
    // domain until it is unmapped.
    let returned = unsafe { hypercall::reservation(MemoryOp::DecreaseReservation, done.frames(), domid::SELF) };
    if returned != Ok(count) {
        log::error!("of {count} frames of disks, {returned:?} were given back");
    }
    done.count = 0;
}

/// A pool of runs that are reused, sorted by their length.
struct Pool<T> {
    kinds: Vec<Kind<T>>,
}

struct Kind<T> {
    count: usize,
    free: Vec<T>,
    /// How many runs of this length exist, free or used. `free` has room for all.
    made: usize,
}

impl<T> Pool<T> {
    const fn new() -> Self {
        Self { kinds: Vec::new() }
    }

    /// Takes a free run of `count` pages, or makes one by `make`. `None` if `make` fails, or if no memory is left to note the
    /// run.
    fn take(&mut self, count: usize, make: impl FnOnce() -> Option<T>) -> Option<T> {
        let place = match self.kinds.iter().position(|kind| kind.count == count) {
            Some(place) => place,
            None => {
                self.kinds.try_reserve(1).ok()?;
                self.kinds.push(Kind { count, free: Vec::new(), made: 0 });
                self.kinds.len() - 1
            }
        };
        let kind = self.kinds.get_mut(place)?;
        if let Some(free) = kind.free.pop() {
            return Some(free);
        }
        // Room is reserved here, because `give_back` must not need memory.
        kind.free.try_reserve(kind.made + 1).ok()?;
        let made = make()?;
        kind.made += 1;
        Some(made)
    }

    /// Gives back a run that [`take`](Self::take) returned for the same `count`.
    fn give_back(&mut self, count: usize, it: T) {
        if let Some(kind) = self.kinds.iter_mut().find(|kind| kind.count == count) {
            kind.free.push(it);
        }
    }
}

static RUNS: MaskMutex<Pool<Dma>> = MaskMutex::new(Pool::new());

/// Consecutive pages of this domain, mapped. A dropped run goes to a pool, for the next run of the same length.
#[derive(Debug)]
pub struct Run(ManuallyDrop<Dma>);

impl Run {
    /// Takes `count` consecutive pages of zeroes, 1 to 512; `None` if the machine has none to spare.
    #[must_use]
    pub fn take(count: usize) -> Option<Self> {
        let make = || has(count.next_power_of_two() as u64).then(|| Dma::allocate(count).ok()).flatten();
        let dma = RUNS.lock().take(count, make)?;
        dma.clear();
        Some(Self(ManuallyDrop::new(dma)))
    }
}

impl OwnMemory for Run {
    fn page(&self) -> u64 {
        self.0.frame()
    }

    /// The caller must not drop the run before each device that was given the address has ended its accesses.
    fn address(&self) -> BusAddress {
        self.0.bus_address(0)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // SAFETY: the value is dropped, so the run is not used after this.
        let dma = unsafe { ManuallyDrop::take(&mut self.0) };
        let count = dma.len_bytes() / 4096;
        RUNS.lock().give_back(count, dma);
    }
}

impl SharedPage for Run {
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

/// The maximum number of buffers.
const BUFFERS: usize = 48;

/// A set of runs of frames.
struct Frames {
    /// The first frame of each run, and above that, from bit [`COUNT`] on, the number of frames. 0 for no run.
    runs: [AtomicU64; BUFFERS],
    /// The runs' frames are below this one, and from `low` on; most other frames are told apart by these two.
    high: AtomicU64,
    low: AtomicU64,
}

const COUNT: u32 = 52;

impl Frames {
    const fn new() -> Self {
        Self { runs: [const { AtomicU64::new(0) }; BUFFERS], high: AtomicU64::new(0), low: AtomicU64::new(u64::MAX) }
    }

    /// Returns false if the set is full.
    fn add(&self, first: u64, count: usize) -> bool {
        let word = first | (count as u64) << COUNT;
        self.high.fetch_max(first + count as u64, Ordering::Relaxed);
        self.low.fetch_min(first, Ordering::Relaxed);
        self.runs.iter().any(|run| run.compare_exchange(0, word, Ordering::Relaxed, Ordering::Relaxed).is_ok())
    }

    fn remove(&self, first: u64) {
        let is_it = |word| (word & ((1 << COUNT) - 1) == first && word != 0).then_some(0);
        let _ = self.runs.iter().any(|run| run.fetch_update(Ordering::Relaxed, Ordering::Relaxed, is_it).is_ok());
    }

    fn has(&self, frame: u64) -> bool {
        let between = frame >= self.low.load(Ordering::Relaxed) && frame < self.high.load(Ordering::Relaxed);
        between
            && self.runs.iter().any(|run| {
                let word = run.load(Ordering::Relaxed);
                let first = word & ((1 << COUNT) - 1);
                (first..first + (word >> COUNT)).contains(&frame)
            })
    }
}

/// The frames of all buffers.
static OF_BUFFERS: Frames = Frames::new();

/// Returns whether a frame is of a [`Buffer`]: Rust may refer to it.
pub(crate) fn is_buffer(frame: u64) -> bool {
    OF_BUFFERS.has(frame)
}

/// Consecutive pages of this domain that Rust refers to as bytes. Only copies that borrow the buffer
/// ([`crate::grants::copy_sides`]) change the bytes behind Rust's back; no device has the address.
#[derive(Debug)]
pub struct Buffer(ManuallyDrop<Dma>);

impl Buffer {
    /// Takes `count` consecutive pages of zeroes, 1 to 512. `None` if the machine has none to spare, or if there are 48
    /// buffers.
    #[must_use]
    pub fn take(count: usize) -> Option<Self> {
        let run = Run::take(count)?;
        if !OF_BUFFERS.add(run.page(), count) {
            return None;
        }
        let mut run = ManuallyDrop::new(run);
        // SAFETY: the run is not used or dropped after this.
        Some(Self(ManuallyDrop::new(unsafe { ManuallyDrop::take(&mut run.0) })))
    }

    /// Returns the machine frame of the first page. Those of the following pages follow.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.0.frame()
    }

    /// Returns whether a machine frame is of a page of this buffer.
    #[must_use]
    pub fn has(&self, frame: u64) -> bool {
        (self.page()..self.page() + (self.0.bytes() / 4096) as u64).contains(&frame)
    }

    /// Returns the bytes of all pages.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY:
        // 1. The bytes are mapped and written until the buffer is dropped.
        // 2. While this borrow lives, nothing writes them. No device has the address, or has it any more, by the contract of
        //    `Run::address`. Grant copies write only frames of a buffer that they borrow exclusively, and otherwise no frame
        //    for which `is_buffer` is true. The run is in no pool.
        unsafe { slice::from_raw_parts(self.0.base(), self.0.bytes()) }
    }

    /// Returns the bytes of all pages.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `self` is borrowed exclusively, so no other reference leads to the bytes.
        unsafe { slice::from_raw_parts_mut(self.0.base(), self.0.bytes()) }
    }
}

impl AsMut<Self> for Buffer {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        OF_BUFFERS.remove(self.page());
        // SAFETY: the value is dropped, so the pages are not used after this.
        let dma = unsafe { ManuallyDrop::take(&mut self.0) };
        drop(Run(ManuallyDrop::new(dma)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_takes_as_many_as_it_has_room_for() {
        let mut stack = Stack::new();
        assert_eq!(stack.pop(), None);
        let taken = (0..100).filter(|frame| stack.push(*frame)).count();
        assert_eq!((taken, stack.frames().len()), (BATCH, BATCH));
        assert_eq!((stack.pop(), stack.pop(), stack.frames().len()), (Some(63), Some(62), 62));
    }

    #[test]
    fn what_is_given_back_is_used_again_for_the_same_length() {
        let mut pool = Pool::new();
        let mut made = 0;
        let mut take = |pool: &mut Pool<usize>, count| {
            pool.take(count, || {
                made += 1;
                Some(made)
            })
        };
        assert_eq!([take(&mut pool, 1), take(&mut pool, 17), take(&mut pool, 1)], [Some(1), Some(2), Some(3)]);
        pool.give_back(17, 2);
        pool.give_back(1, 3);
        pool.give_back(1, 1);
        assert_eq!([take(&mut pool, 1), take(&mut pool, 1), take(&mut pool, 1)], [Some(1), Some(3), Some(4)]);
        assert_eq!(take(&mut pool, 17), Some(2));
        assert_eq!(pool.take(2, || None), None);
    }

    #[test]
    fn a_set_has_the_frames_of_the_runs_in_it() {
        let frames = Frames::new();
        assert!(!frames.has(0) && !frames.has(u64::MAX));
        assert!(frames.add(0x1000, 17) && frames.add(0x2000, 1));
        let of_them = [0xfff, 0x1000, 0x1010, 0x1011, 0x1fff, 0x2000, 0x2001].map(|frame| frames.has(frame));
        assert_eq!(of_them, [false, true, true, false, false, true, false]);
        frames.remove(0x1000);
        assert!(!frames.has(0x1000) && frames.has(0x2000));
        let added = (0..100).filter(|n| frames.add(0x8000 + n * 16, 16)).count();
        assert_eq!(added, BUFFERS - 1);
        assert!(frames.has(0x2000) && frames.has(0x8000 + 16 * (BUFFERS as u64 - 1) - 1));
        assert!(!frames.has(0x8000 + 16 * (BUFFERS as u64 - 1)), "it was not added");
    }
}
