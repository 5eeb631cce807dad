//! The hypervisor's own page tables, and RAM frame by frame through the direct map.
//!
//! The tables are built once at boot and then only their leaves for the per-CPU windows change: every guest root
//! holds copies of our sixteen L4 entries, which therefore never move.

use crate::insn;
use crate::ranges::Ranges;
use crate::{Hardware, percpu};
use core::arch::asm;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use hv_core::addr::{ENTRIES, Frame, GuestVirt, HOLE_SLOTS, HOLE_START, M2P_START, PAGE_SIZE, long, low16};
use hv_core::machine::{Frames, Page};
use x86_64::structures::paging::PageTableFlags as Flags;

/// Bytes that one L4 entry reaches.
const SLOT: u64 = 1 << 39;
/// LAPIC and IOAPICs.
const DEVICES: u64 = HOLE_START + SLOT;
/// Per-CPU GDT and LDT windows.
pub(crate) const WINDOWS: u64 = HOLE_START + 4 * SLOT;
/// The image: virtual = physical + this. Also in `link.ld`.
pub(crate) const IMAGE: u64 = HOLE_START + 5 * SLOT;
/// The direct map: virtual = physical + this.
const DIRECT: u64 = HOLE_START + 6 * SLOT;
/// The boot tables' direct map ends here, and what we allocate at boot lies below.
pub(crate) const BOOT_LIMIT: u64 = 4 << 30;

/// Flags of tables and plain data of ours.
const TABLE: Flags = Flags::PRESENT.union(Flags::WRITABLE).union(Flags::ACCESSED);
/// Text: nobody writes it.
pub(crate) const TEXT: Flags = Flags::PRESENT.union(Flags::GLOBAL).union(Flags::ACCESSED);
/// Constants.
pub(crate) const CONSTANT: Flags = TEXT.union(Flags::NO_EXECUTE);
/// Memory of ours.
pub(crate) const DATA: Flags = CONSTANT.union(Flags::WRITABLE).union(Flags::DIRTY);
/// Device registers.
const DEVICE: Flags = DATA.union(Flags::NO_CACHE).union(Flags::WRITE_THROUGH);
/// What ring 3 may read.
const GUEST_CONSTANT: Flags = CONSTANT.union(Flags::USER_ACCESSIBLE);

/// Number of the highest RAM frame plus one.
static FRAME_LIMIT: AtomicU64 = AtomicU64::new(0);
/// Machine address of the machine-to-physical table.
static M2P: AtomicU64 = AtomicU64::new(0);
/// Our own root: only the sixteen slots, no guest.
static ROOT: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static image_physical: u8;
    static text_start: u8;
    static text_end: u8;
    static ro_start: u8;
    static ro_end: u8;
    static data_start: u8;
    static image_end: u8;
    static boot_stack_guard: u8;
}

/// An address as a number.
pub(crate) fn address_of<T>(at: *const T) -> u64 {
    at as u64
}

/// Where something in RAM is in the direct map.
fn direct<T>(address: u64) -> *const T {
    (DIRECT + address) as *const T
}

/// A register of a device whose page [`build`] has mapped, at so many bytes from the first.
pub(crate) fn device_register(at: u64) -> *mut u32 {
    (DEVICES + at) as *mut u32
}

/// Virtual addresses of the image's data, stacks included.
pub(crate) fn image_data() -> Range<u64> {
    address_of(&raw const data_start)..address_of(&raw const image_end)
}

/// The frames the image was loaded into, boot part included.
pub(crate) fn image_frames() -> Range<u64> {
    let end = address_of(&raw const image_end) - IMAGE;
    address_of(&raw const image_physical) / 4096..end / 4096
}

/// The machine address of something inside the image.
pub(crate) fn image_address<T>(at: *const T) -> u64 {
    address_of(at).wrapping_sub(IMAGE)
}

/// Bytes of RAM or firmware tables while the boot tables are still in use; `None` if they reach beyond those.
pub(crate) fn boot_bytes(address: u64, length: u64) -> Option<&'static [u8]> {
    let end = address.checked_add(length)?;
    if address == 0 || end > BOOT_LIMIT {
        return None;
    }
    // SAFETY: the boot tables and the final direct map both map [0, 4 GiB) of RAM at DIRECT, and `boot` calls this
    // only for what the loader and the firmware handed over, which nobody writes any more.
    Some(unsafe { core::slice::from_raw_parts(direct(address), usize::try_from(length).ok()?) })
}

/// `count` words at a machine address, for the life of the hypervisor.
///
/// # Safety
/// The words lie in RAM that nobody else was given, inside the direct map of the tables in use now and later.
unsafe fn words(address: u64, count: u64) -> &'static [AtomicU64] {
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: by this function's contract; atomics make sharing sound, and a frame's address is aligned.
    unsafe { core::slice::from_raw_parts(direct(address), count) }
}

/// The frame as words. Only for frames that are RAM.
pub(crate) fn page(frame: Frame) -> &'static Page {
    debug_assert!(frame.number() < FRAME_LIMIT.load(Relaxed).max(BOOT_LIMIT / 4096));
    let at: *const Page = direct(frame.address());
    // SAFETY:
    // 1. The contract of `Frames`: the frame is RAM, and all RAM is in the direct map, writable, for ever.
    // 2. A frame's start is aligned for words, and the page ends where the frame ends.
    // 3. Whoever else uses the frame (guests, page walkers, other CPUs) may do so at any time: words are atomic.
    unsafe { &*at }
}

/// Why there are no tables.
type NoMemory = &'static str;
const NO_MEMORY: NoMemory = "not enough RAM below 4 GiB for the hypervisor's tables";

/// Builds the hypervisor's page tables out of frames it takes from `free`.
pub(crate) struct Builder<'a> {
    root: Frame,
    free: &'a mut Ranges,
    huge: bool,
}

impl<'a> Builder<'a> {
    /// Empty tables with all sixteen slots present, so that later mappings appear in every guest's root.
    fn new(free: &'a mut Ranges) -> Result<Self, NoMemory> {
        let huge = insn::cpuid(0x8000_0001, 0)[3] & 1 << 26 != 0;
        let root = new_table(free)?;
        for slot in HOLE_SLOTS {
            let mut flags = TABLE;
            if slot == 256 {
                flags = flags.difference(Flags::WRITABLE) | Flags::USER_ACCESSIBLE;
            }
            page(root)[slot].store(new_table(free)?.address() | flags.bits(), Relaxed);
        }
        ROOT.store(root.address(), Relaxed);
        Ok(Self { root, free, huge })
    }

    /// Maps `bytes` (rounded up to pages) at `virt`, with the largest pages that fit.
    fn map(&mut self, virt: u64, phys: u64, bytes: u64, flags: Flags) -> Result<(), NoMemory> {
        let end = virt + bytes.next_multiple_of(4096);
        let mut virt = virt;
        let mut phys = phys;
        while virt < end {
            let fits = |size: u64| (virt | phys).is_multiple_of(size) && end - virt >= size;
            let level = match () {
                () if self.huge && fits(1 << 30) => 3,
                () if fits(1 << 21) => 2,
                () => 1,
            };
            let size = 1u64 << (12 + 9 * (level - 1));
            let large = if level > 1 { Flags::HUGE_PAGE } else { Flags::empty() };
            self.entry(virt, level)?.store(phys | (flags | large).bits(), Relaxed);
            virt += size;
            phys += size;
        }
        Ok(())
    }

    /// The entry for `virt` in its table of `level`; tables on the way are made.
    pub(crate) fn entry(&mut self, virt: u64, level: u32) -> Result<&'static AtomicU64, NoMemory> {
        let index = |level: u32| usize::from(low16(virt >> (12 + 9 * (level - 1)) & 0x1ff));
        let mut table = self.root;
        for upper in (level + 1..=4).rev() {
            let entry = &page(table)[index(upper)];
            if entry.load(Relaxed) == 0 {
                let user = TABLE | Flags::USER_ACCESSIBLE;
                let flags = if virt < DEVICES { user } else { TABLE };
                entry.store(new_table(self.free)?.address() | flags.bits(), Relaxed);
            }
            table = table_of(entry.load(Relaxed));
        }
        Ok(&page(table)[index(level)])
    }

    /// Memory of our own: `bytes` of RAM, filled with `fill`.
    fn allocate(&mut self, bytes: u64, fill: u64) -> Result<(u64, &'static [AtomicU64]), NoMemory> {
        let frames = bytes.div_ceil(4096);
        let first = self.free.take(frames, BOOT_LIMIT / 4096).ok_or(NO_MEMORY)?;
        // SAFETY: just taken from the free frames below BOOT_LIMIT, which both sets of tables map.
        let words = unsafe { words(first * 4096, frames * long(ENTRIES)) };
        words.iter().for_each(|word| word.store(fill, Relaxed));
        Ok((first * 4096, words))
    }
}

/// The table an upper entry points to.
pub(crate) fn table_of(entry: u64) -> Frame {
    Frame::containing(entry & 0x000f_ffff_ffff_f000).unwrap_or(Frame::from_u32(0))
}

/// A zeroed frame for a table.
fn new_table(free: &mut Ranges) -> Result<Frame, NoMemory> {
    let frame = free.take(1, BOOT_LIMIT / 4096).and_then(Frame::new).ok_or(NO_MEMORY)?;
    Hardware(()).zero(frame);
    Ok(frame)
}

/// Builds the final tables and loads them. The module's frames are in the direct map also where the memory map no longer calls
/// them RAM: firmware may reserve more after the loader has placed the module. `devices` are machine addresses of register
/// pages, mapped in their order from [`DEVICES`] on. Leaves four zeroed words per frame.
pub(crate) fn build(
    ram: &Ranges,
    module: &Range<u64>,
    free: &mut Ranges,
    devices: impl Iterator<Item = u64>,
) -> Result<&'static [AtomicU64], NoMemory> {
    let limit = ram.limit();
    FRAME_LIMIT.store(limit, Relaxed);
    let mut tables = Builder::new(free)?;
    let mut rest = Ranges::new();
    rest.add(module.clone());
    ram.iter().for_each(|range| rest.remove(range));
    for range in ram.iter().chain(rest.iter()) {
        let bytes = (range.end - range.start) * 4096;
        tables.map(DIRECT + range.start * 4096, range.start * 4096, bytes, DATA)?;
    }
    map_image(&mut tables)?;
    for (virt, phys) in (DEVICES..).step_by(PAGE_SIZE).zip(devices) {
        tables.map(virt, phys, 4096, DEVICE)?;
    }
    percpu::map_windows(&mut tables)?;
    let (m2p, _) = tables.allocate(limit * 8, u64::MAX)?;
    M2P.store(m2p, Relaxed);
    tables.map(M2P_START, m2p, limit * 8, GUEST_CONSTANT)?;
    let (_, words) = tables.allocate(limit * 32, 0)?;
    let frame_words = words.get(..usize::try_from(limit * 4).unwrap_or(0)).unwrap_or(&[]);
    // SAFETY: the new root maps the image, the stack inside it and all RAM at the addresses they have now; the low
    // identity map that disappears is used by nobody since `start`.
    unsafe { insn::write_cr3(tables.root.address()) };
    Ok(frame_words)
}

/// Maps the image with the rights each part needs. The boot part stays out: it is done.
fn map_image(tables: &mut Builder<'_>) -> Result<(), NoMemory> {
    let guard = address_of(&raw const boot_stack_guard);
    let (text, text_stop) = (address_of(&raw const text_start), address_of(&raw const text_end));
    let (constants, constants_stop) = (address_of(&raw const ro_start), address_of(&raw const ro_end));
    let data = image_data();
    let parts = [
        (text..text_stop, TEXT),
        (constants..constants_stop, CONSTANT),
        (data.start..guard, DATA),
        (guard + 4096..data.end, DATA),
    ];
    for (part, flags) in parts {
        tables.map(part.start, part.start - IMAGE, part.end - part.start, flags)?;
    }
    Ok(())
}

/// Bytes from an offset to the next word.
fn to_word(offset: usize) -> usize {
    offset.wrapping_neg() % 8
}

/// Copies so many words, one after the other.
///
/// # Safety
/// They are there, and both kinds of memory have no other user that would mind: a frame's words are atomics. `from` and `to`
/// are the same or apart.
unsafe fn move_words(from: *const [u8; 8], to: *mut [u8; 8], count: usize) {
    // SAFETY: by this function's contract. The direction flag is clear in ring 0.
    unsafe {
        asm!(
            "rep movsq", inout("rcx") count => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags),
        )
    };
}

/// Reads words.
#[inline(always)]
fn read_words(frame: Frame, offset: usize, to: &mut [[u8; 8]]) {
    let from = page(frame).get(offset / 8..).unwrap_or_default();
    // SAFETY: so many words begin at each of both, which are apart: the one is ours, the other a frame.
    unsafe { move_words(from.as_ptr().cast(), to.as_mut_ptr(), to.len().min(from.len())) };
}

/// Reads less than a word.
fn read_small(frame: Frame, offset: usize, to: &mut [u8]) {
    if let Some(word) = page(frame).get(offset / 8).filter(|_| !to.is_empty()) {
        let bytes = word.load(Relaxed).to_le_bytes();
        to.iter_mut().zip(bytes.into_iter().skip(offset % 8)).for_each(|(to, from)| *to = from);
    }
}

/// Writes less than a word, in naturally aligned pieces, so that an aligned field changes at once and its neighbours,
/// which a guest may be writing, not at all.
fn write_small(frame: Frame, offset: usize, from: &[u8]) {
    if offset + from.len() > PAGE_SIZE {
        return;
    }
    let to = page(frame).as_ptr().cast_mut().cast::<u8>();
    let mut rest = from;
    while let [a, ..] = *rest {
        let at = offset + from.len() - rest.len();
        // SAFETY: `at` and the bytes of `rest` after it lie inside the page (checked above), and each access is
        // aligned. The page consists of atomics, so writing through a shared reference's address is allowed.
        let written = unsafe {
            match *rest {
                [a, b, c, d, ..] if at.is_multiple_of(4) => {
                    to.add(at).cast::<u32>().write_volatile(u32::from_le_bytes([a, b, c, d]));
                    4
                }
                [a, b, ..] if at.is_multiple_of(2) => {
                    to.add(at).cast::<u16>().write_volatile(u16::from_le_bytes([a, b]));
                    2
                }
                _ => {
                    to.add(at).write_volatile(a);
                    1
                }
            }
        };
        rest = rest.get(written..).unwrap_or(&[]);
    }
}

/// The hypervisor's own root table, without any guest.
pub(crate) fn root() -> Frame {
    table_of(ROOT.load(Relaxed))
}

impl Frames for Hardware {
    fn frame_limit(&self) -> u64 {
        FRAME_LIMIT.load(Relaxed)
    }

    fn page(&self, frame: Frame) -> &Page {
        page(frame)
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        debug_assert!(at / 4096 < FRAME_LIMIT.load(Relaxed).max(BOOT_LIMIT / 4096));
        let at: *const AtomicU64 = direct(at & !7);
        // SAFETY: as in `page`, of which it is a word.
        unsafe { &*at }
    }

    fn read(&self, frame: Frame, offset: usize, to: &mut [u8]) {
        debug_assert!(offset + to.len() <= PAGE_SIZE, "a read beyond the frame");
        if offset.is_multiple_of(8) && to.len().is_multiple_of(8) {
            return read_words(frame, offset, to.as_chunks_mut().0);
        }
        let (head, body) = to.split_at_mut(to_word(offset).min(to.len()));
        let (whole, tail) = body.as_chunks_mut();
        let at = offset + head.len();
        read_small(frame, offset, head);
        read_small(frame, at + 8 * whole.len(), tail);
        read_words(frame, at, whole);
    }

    fn write(&self, frame: Frame, offset: usize, from: &[u8]) {
        debug_assert!(offset + from.len() <= PAGE_SIZE, "a write beyond the frame");
        let (head, body) = from.split_at(to_word(offset).min(from.len()));
        let (whole, tail) = body.as_chunks::<8>();
        let at = offset + head.len();
        write_small(frame, offset, head);
        let to = page(frame).get(at / 8..).unwrap_or_default();
        // SAFETY: as in `read`; a frame's words are atomics, of which a shared pointer may change what they hold.
        unsafe { move_words(whole.as_ptr().cast(), to.as_ptr().cast_mut().cast(), whole.len().min(to.len())) };
        write_small(frame, at + 8 * whole.len(), tail);
    }

    fn zero(&self, frame: Frame) {
        let words = page(frame).as_ptr();
        // SAFETY: stores 512 words to the page, which has as many. It consists of atomics, whose sharers expect a word to
        // change at any time, and it does so at once.
        unsafe {
            asm!("rep stosq", inout("rcx") ENTRIES => _, inout("rdi") words => _, in("rax") 0, options(nostack, preserves_flags))
        };
    }

    fn copy(&self, (from, from_at): (Frame, usize), (to, to_at): (Frame, usize), length: usize) {
        let fits = |at: usize| at <= PAGE_SIZE && length <= PAGE_SIZE - at;
        debug_assert!(fits(from_at) && fits(to_at), "a copy beyond its frames");
        if !(fits(from_at) && fits(to_at)) {
            return;
        }
        let (from, to) = (page(from).as_ptr().cast::<u8>(), page(to).as_ptr().cast_mut().cast::<u8>());
        // SAFETY: reads and writes so many bytes of two pages (looked at above), or of one, which consist of atomics whose
        // sharers expect them to change at any time. No reference to the bytes exists, and the direction flag is clear in ring
        // 0.
        unsafe {
            asm!(
                "rep movsq", "mov rcx, {tail}", "rep movsb", tail = in(reg) length % 8,
                inout("rcx") length / 8 => _, inout("rsi") from.add(from_at) => _, inout("rdi") to.add(to_at) => _,
                options(nostack, preserves_flags),
            )
        };
    }

    fn set_m2p(&self, frame: Frame, pfn: u64) {
        let word = M2P.load(Relaxed) + frame.number() * 8;
        if let Some(table) = Frame::containing(word).filter(|_| frame.number() < self.frame_limit()) {
            page(table)[GuestVirt(word).offset() / 8].store(pfn, Relaxed);
        }
    }

    fn direct(&self, frame: Frame) -> u64 {
        DIRECT + frame.address()
    }

    fn hole_entry(&self, index: usize) -> u64 {
        let entries = page(root()).get(HOLE_SLOTS).unwrap_or(&[]);
        entries.get(index).map_or(0, |entry| entry.load(Relaxed))
    }
}
