//! Memory of this domain: pages, page tables, the heap, and windows onto frames of others.
//!
//! Page *n* lies at [`VIRT_BASE`]` + n * 4096` and nowhere else. The builder maps only the first pages like this
//! (ABI core 1.3); [`init`] maps the rest. It makes page tables as Linux does: filled while writable, then mapped
//! read-only, and only then installed in the live tree (ABI core 4.8).
//!
//! ```text
//! 0xffffffff_80000000  VIRT_BASE: page 0, 1, 2, ... (at most 1 GiB; pages beyond are not used)
//! 0xffffffff_c0000000  windows: shared pages, granted and foreign frames (64 MiB)
//! 0xffffffff_c8000000  memory borrowed from the hypervisor, where that is allowed (768 MiB)
//! ```

mod borrowed;
#[cfg(test)]
mod budgets;
mod foreign;
mod heap;
mod window;

use crate::boot::Boot;
use crate::hypercall;
use crate::sync::MaskMutex;
use hypercall_abi::mmu::{MmuUpdate, pte, uvmf};
use hypercall_abi::{Errno, domid, start_info};

pub use borrowed::lend_large;
pub use foreign::Foreign;
pub use heap::{Reserved, can_allocate, reserve, reserved};
pub use window::Window;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Address of page 0.
pub const VIRT_BASE: u64 = 0xffff_ffff_8000_0000;
/// Pages the linear mapping can hold.
pub(crate) const LINEAR_PAGES: u64 = 1 << 18;
/// Flags of an entry that maps an own page; the hypervisor adds what guest code in ring 3 needs (ABI core 4.2).
const LEAF: u64 = pte::PRESENT | pte::WRITE | pte::ACCESSED | pte::DIRTY;
/// Flags of an entry that leads to a table.
const BRANCH: u64 = LEAF | pte::USER;
/// Entries of a page table.
const ENTRIES: u64 = 512;

/// The state of this domain's memory.
struct Memory {
    /// The builder's p2m list: the frame of each page.
    p2m: &'static [u64],
    /// Address of the hypervisor's M2P table: the page of each frame; read-only (ABI core 2.2).
    m2p: u64,
    /// Number of entries of the M2P table.
    m2p_entries: u64,
    /// One bit per page, set if the page is in use or must not be given out.
    used: &'static mut [u64],
    /// The first page that is not mapped yet.
    mapped_end: u64,
    /// Where the next search for a free page starts.
    hint: u64,
    /// Address of the root table.
    root: u64,
}

static MEMORY: MaskMutex<Option<Memory>> = MaskMutex::new(None);

/// Runs `f` on the memory; `None` before [`init`].
fn with<T>(f: impl FnOnce(&mut Memory) -> T) -> Option<T> {
    MEMORY.lock().as_mut().map(f)
}

/// Maps all pages, and makes the other functions of this module work.
///
/// # Safety
/// Called once, on vcpu 0, before anything else changes the builder's layout.
///
/// # Panics
/// If the domain is too small or the hypervisor refuses to map its own pages.
pub(crate) unsafe fn init(boot: &Boot) {
    let info = boot.info();
    let pages = usize::try_from(info.nr_pages).expect("nr_pages fits an address space");
    // SAFETY: the builder mapped the list here, `nr_pages` long (ABI core 1.3), and nobody writes it.
    let p2m = unsafe { core::slice::from_raw_parts(info.mfn_list as *const u64, pages) };
    let m2p = hypercall::machphys_mapping().expect("machphys_mapping is refused");
    let limit = info.nr_pages.min(LINEAR_PAGES);
    let first_free = (boot.layout_end() - VIRT_BASE) / PAGE;
    let bitmap_words = limit.div_ceil(64);
    let bitmap_pages = (bitmap_words * 8).div_ceil(PAGE);
    let words = usize::try_from(bitmap_words).expect("at most 4096");
    let bitmap = (VIRT_BASE + first_free * PAGE) as *mut u64;
    // SAFETY: the padding after the boot stack is mapped writable, has at least 512 KiB (ABI core 1.3) and is not used by
    // anything; the bitmap of 2^18 pages takes 32 KiB of it.
    let used = unsafe {
        bitmap.write_bytes(0, words);
        core::slice::from_raw_parts_mut(bitmap, words)
    };
    let mut memory = Memory {
        p2m,
        m2p: m2p.v_start,
        m2p_entries: ((m2p.v_end - m2p.v_start) / 8).min(m2p.max_mfn.saturating_add(1)),
        used,
        mapped_end: 0,
        hint: first_free,
        root: info.pt_base,
    };
    memory.reserve(0, first_free + bitmap_pages);
    memory.reserve(limit, bitmap_words * 64 - limit);
    memory.reserve(info.first_p2m_pfn, info.nr_p2m_frames);
    if info.flags & start_info::flags::MOD_START_PFN != 0 {
        memory.reserve(info.mod_start, info.mod_len.div_ceil(PAGE));
    }
    while memory.mapped_end < limit && memory.is_mapped(memory.mapped_end) {
        memory.mapped_end += ENTRIES;
    }
    while memory.mapped_end < limit {
        memory.extend(limit).expect("mapping our own pages is refused");
    }
    memory.mapped_end = limit;
    *MEMORY.lock() = Some(memory);
}

impl Memory {
    fn reserve(&mut self, first: u64, count: u64) {
        for page in first..first.saturating_add(count) {
            self.set_used(page, true);
        }
    }

    fn word(&mut self, page: u64) -> Option<&mut u64> {
        self.used.get_mut(usize::try_from(page / 64).ok()?)
    }

    fn set_used(&mut self, page: u64, used: bool) {
        let bit = 1 << (page % 64);
        if let Some(word) = self.word(page) {
            *word = if used { *word | bit } else { *word & !bit };
        }
    }

    fn is_free(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok();
        word.and_then(|word| self.used.get(word)).is_some_and(|word| word & (1 << (page % 64)) == 0)
    }

    /// Takes `count` contiguous free pages that are mapped; returns the first.
    fn take(&mut self, count: u64) -> Option<u64> {
        let end = self.mapped_end;
        let first = run_of(self.hint..end, count, |page| self.is_free(page))
            .or_else(|| run_of(0..end, count, |page| self.is_free(page)))?;
        self.reserve(first, count);
        self.hint = first + count;
        Some(first)
    }

    fn release(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            debug_assert!(!self.is_free(page), "page {page} is released twice");
            self.set_used(page, false);
        }
        self.hint = self.hint.min(first);
    }

    /// The frame of a page.
    fn frame(&self, page: u64) -> Option<u64> {
        self.p2m.get(usize::try_from(page).ok()?).copied()
    }

    /// The page of a frame, if the builder gave this domain the frame.
    fn page(&self, frame: u64) -> Option<u64> {
        self.page_hint(frame).filter(|page| self.frame(*page) == Some(frame))
    }

    /// The M2P entry of a frame: the frame's page number in the domain that owns it, which may be another domain.
    fn page_hint(&self, frame: u64) -> Option<u64> {
        if frame >= self.m2p_entries {
            return None;
        }
        // SAFETY: inside the table as the hypervisor described it; the hypervisor may change the entry, hence volatile.
        Some(unsafe { ((self.m2p + frame * 8) as *const u64).read_volatile() })
    }

    /// The address of the table that an entry points to.
    fn table(&self, entry: u64) -> Option<u64> {
        if entry & pte::PRESENT == 0 {
            return None;
        }
        Some(linear(self.page((entry & pte::FRAME) / PAGE)?))
    }

    /// The address of the entry for `va` in the table of `level` (4 is the root), if all tables above exist.
    fn slot(&self, va: u64, level: u32) -> Option<u64> {
        let mut table = self.root;
        for upper in (level + 1..=4).rev() {
            table = self.table(read_entry(table + index(va, upper) * 8))?;
        }
        Some(table + index(va, level) * 8)
    }

    fn is_mapped(&self, page: u64) -> bool {
        let slot = self.slot(linear(page), 1);
        slot.is_some_and(|slot| read_entry(slot) & pte::PRESENT != 0)
    }

    /// The machine address of an entry at virtual address `address`.
    fn machine_address(&self, address: u64) -> Option<u64> {
        let page = address.checked_sub(VIRT_BASE)? / PAGE;
        Some(self.frame(page)? * PAGE + address % PAGE)
    }

    /// Maps the next 512 pages, of those below `limit`.
    fn extend(&mut self, limit: u64) -> Result<(), Errno> {
        let first = self.mapped_end;
        let table = self.take(1).ok_or(Errno::NoMem)?;
        for i in 0..ENTRIES {
            let page = first + i;
            let frame = self.frame(page).filter(|_| page < limit);
            let entry = frame.map_or(0, |frame| entry_for(frame, LEAF));
            // SAFETY: `table` is a page of ours that nobody else uses, still mapped writable.
            unsafe { ((linear(table) + i * 8) as *mut u64).write_volatile(entry) };
        }
        self.hang_in(table, linear(first), 2)?;
        self.mapped_end = first + ENTRIES;
        Ok(())
    }

    /// Installs the filled page `table` as a page table: maps it read-only, then sets the entry of `level` for `va` to
    /// it.
    fn hang_in(&mut self, table: u64, va: u64, level: u32) -> Result<(), Errno> {
        self.make_tables(va, level)?;
        let frame = self.frame(table).ok_or(Errno::Inval)?;
        let slot = self.slot(va, level).ok_or(Errno::Inval)?;
        let ptr = self.machine_address(slot).ok_or(Errno::Inval)?;
        let update = MmuUpdate { ptr, val: entry_for(frame, BRANCH) };
        // SAFETY: the page is ours, and from here on only the hypervisor writes it; the slot was empty, so no address
        // in use changes its meaning.
        unsafe {
            hypercall::update_va_mapping(linear(table), entry_for(frame, LEAF & !pte::WRITE), uvmf::INVLPG)?;
            hypercall::mmu_update(&[update], domid::SELF)?;
        }
        Ok(())
    }

    /// Makes the table that holds the entry of `level` for `va`, if it does not exist.
    fn make_tables(&mut self, va: u64, level: u32) -> Result<(), Errno> {
        if self.slot(va, level).is_some() || level == 4 {
            return Ok(());
        }
        self.make_tables(va, level + 1)?;
        let table = self.take(1).ok_or(Errno::NoMem)?;
        // SAFETY: a page of ours that nobody else uses.
        unsafe { (linear(table) as *mut u8).write_bytes(0, 4096) };
        self.hang_in(table, va, level + 1)
    }
}

/// Returns the first page of the first `count` contiguous pages in `range` that are all free.
fn run_of(range: core::ops::Range<u64>, count: u64, is_free: impl Fn(u64) -> bool) -> Option<u64> {
    let mut first = range.start;
    let mut found = 0;
    for page in range {
        if found == count {
            break;
        }
        if is_free(page) {
            found += 1;
        } else {
            first = page + 1;
            found = 0;
        }
    }
    (found == count).then_some(first)
}

/// The address of a page.
#[must_use]
pub fn linear(page: u64) -> u64 {
    VIRT_BASE + page * PAGE
}

/// An entry that points to `frame`.
fn entry_for(frame: u64, flags: u64) -> u64 {
    (frame * PAGE) | flags
}

/// The index of `va`'s entry in a table of `level`.
fn index(va: u64, level: u32) -> u64 {
    (va >> (12 + 9 * (level - 1))) % ENTRIES
}

/// Reads a page-table entry by its address.
fn read_entry(address: u64) -> u64 {
    // SAFETY: callers pass addresses of entries in tables of ours, which stay mapped for as long as the guest runs. The
    // CPU may set bits at the same time, hence volatile.
    unsafe { (address as *const u64).read_volatile() }
}

/// The frame at an address in the linear mapping.
#[must_use]
pub fn frame_of(address: u64) -> Option<u64> {
    let page = address.checked_sub(VIRT_BASE)? / PAGE;
    with(|memory| memory.frame(page)).flatten()
}

/// The frame of a page.
#[must_use]
pub fn frame_of_page(page: u64) -> Option<u64> {
    with(|memory| memory.frame(page)).flatten()
}

/// The page that a frame from the builder lies at.
#[must_use]
pub fn page_of_frame(frame: u64) -> Option<u64> {
    with(|memory| memory.page(frame)).flatten()
}

/// Whether Rust may refer to a frame of this domain: the frame is from the builder, or borrowed. All other frames of this
/// domain are reached by atomic accesses, or not at all.
pub(crate) fn is_linear(frame: u64) -> bool {
    with(|memory| memory.page(frame).is_some() || borrowed::is_borrowed(memory, frame)).unwrap_or(true)
}

/// The page that an address in the linear mapping lies in; `None` for any other address.
#[must_use]
pub fn page_of(address: u64) -> Option<u64> {
    let page = address.checked_sub(VIRT_BASE)? / PAGE;
    (page < LINEAR_PAGES).then_some(page)
}

/// The address at which the entry of `level` (1 to 4) that translates `va` can be read, if the entry exists.
#[must_use]
pub fn entry_address(va: u64, level: u32) -> Option<u64> {
    with(|memory| memory.slot(va, level)).flatten()
}

/// The machine address of the entry of `level` that translates `va`, as `mmu_update` needs it.
#[must_use]
pub fn entry_machine_address(va: u64, level: u32) -> Option<u64> {
    with(|memory| memory.machine_address(memory.slot(va, level)?)).flatten()
}

/// The entry of `level` that translates `va`.
#[must_use]
pub fn entry(va: u64, level: u32) -> Option<u64> {
    entry_address(va, level).map(read_entry)
}

/// The number of free pages.
#[must_use]
pub fn free_pages() -> u64 {
    with(|memory| {
        let words = memory.used.iter();
        words.map(|word| u64::from(word.count_zeros())).sum()
    })
    .unwrap_or(0)
}

/// Contiguous pages. Dropping them frees them.
#[derive(Debug)]
pub struct Pages {
    first: u64,
    count: u64,
}

impl Pages {
    /// Allocates `count` contiguous zeroed pages.
    #[must_use]
    pub fn allocate(count: u64) -> Option<Self> {
        let first = with(|memory| memory.take(count))??;
        let pages = Self { first, count };
        // SAFETY: the pages were free, so nobody refers to them.
        unsafe {
            pages.pointer().write_bytes(0, usize::try_from(count * PAGE).ok()?);
        };
        Some(pages)
    }

    /// The number of the first page.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The number of pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        linear(self.first)
    }

    /// A pointer to the first byte.
    #[must_use]
    pub fn pointer(&self) -> *mut u8 {
        self.address() as *mut u8
    }

    /// The frame of the `i`-th of these pages.
    #[must_use]
    pub fn frame(&self, i: u64) -> Option<u64> {
        frame_of_page(self.first + i).filter(|_| i < self.count)
    }

    /// Never frees the pages; returns their address.
    #[must_use]
    pub fn leak(self) -> u64 {
        let address = self.address();
        core::mem::forget(self);
        address
    }

    /// Maps the `i`-th page writable or read-only. A page must be read-only before it serves as a page table.
    ///
    /// # Errors
    /// As `update_va_mapping`; in particular if the page is in use as a table.
    pub fn set_writable(&self, i: u64, writable: bool) -> Result<(), Errno> {
        let frame = self.frame(i).ok_or(Errno::Inval)?;
        let flags = if writable { LEAF } else { LEAF & !pte::WRITE };
        let va = self.address() + i * PAGE;
        // SAFETY: the address still maps the same page of ours.
        unsafe { hypercall::update_va_mapping(va, entry_for(frame, flags), uvmf::INVLPG) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        with(|memory| memory.release(self.first, self.count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_found_only_where_all_its_pages_are_free() {
        let free = [true, false, true, true, false, true, true, true];
        let is_free = |page: u64| free[usize::try_from(page).unwrap()];
        assert_eq!(run_of(0..8, 1, is_free), Some(0));
        assert_eq!(run_of(0..8, 2, is_free), Some(2));
        assert_eq!(run_of(0..8, 3, is_free), Some(5));
        assert_eq!(run_of(0..8, 4, is_free), None);
        assert_eq!(run_of(3..7, 3, is_free), None);
        assert_eq!(run_of(0..0, 1, is_free), None);
    }

    #[test]
    fn indices_are_the_nine_bit_groups_of_an_address() {
        let va = 0xffff_ffff_8020_1000;
        assert_eq!([4, 3, 2, 1].map(|l| index(va, l)), [511, 510, 1, 1]);
    }
}
