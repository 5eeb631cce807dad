//! Which page holds what.
//!
//! The elements lie one behind the other from pfn 0, all mapped 1:1 from VIRT_BASE:
//!
//! ```text
//! gap | kernel | ramdisk? | p2m list? | start info | store? | console? | page tables | stack | padding
//! and behind the region, unmapped or mapped elsewhere: ramdisk? | p2m list and its tables?
//! ```
//!
//! The mapping ends at a 4 MiB boundary with at least 512 KiB of padding behind the stack, which a
//! kernel uses before it can map anything itself. How many tables that takes depends on its end and the
//! other way round: a fixed point.

use crate::error::ImageError;
use crate::kernel::Kernel;
use crate::{PAGE_SIZE, Pfn};

/// Bits of an address that select something; the others repeat the topmost of them.
pub(crate) const CANONICAL_BITS: u32 = 48;
/// Entries of the top-level table that are the hypervisor's.
const HYPERVISOR_SLOTS: (u64, u64) = (256, 272);
const REGION_ALIGN: u64 = 4 << 20;
const PADDING_PAGES: u64 = (512 << 10) / PAGE_SIZE;
const ENTRIES: u64 = 512;

/// What the maker of a domain decides.
#[derive(Clone, Copy, Default)]
pub struct Config<'a> {
    /// Pages the domain has when it starts.
    pub nr_pages: u64,
    /// The ramdisk, empty for none.
    pub ramdisk: &'a [u8],
    /// The command line; cut after 1023 bytes or at a NUL.
    pub command_line: &'a [u8],
    /// `start_info` flags (SIF_*) without MOD_START_PFN, which the plan sets itself. INITDOMAIN only for the first domain.
    pub flags: u32,
    /// Whether the domain gets a store page and a console page. All but the first domain need them.
    pub rings: bool,
}

/// Consecutive pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PfnRange {
    /// The first page.
    pub start: u64,
    /// Behind the last page.
    pub end: u64,
}

impl PfnRange {
    fn new(start: u64, len: u64) -> Self {
        Self { start, end: start + len }
    }

    /// Pages in the range.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether `pfn` is one of them.
    #[must_use]
    pub const fn contains(&self, pfn: u64) -> bool {
        self.start <= pfn && pfn < self.end
    }
}

/// Where everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// From the first to the last page of the kernel.
    pub kernel: PfnRange,
    /// The ramdisk; behind the region if the kernel takes it unmapped.
    pub ramdisk: PfnRange,
    /// The p2m list, 8 bytes for each page of the domain.
    pub p2m: PfnRange,
    /// The start-info page.
    pub start_info: Pfn,
    /// The page shared with the store, zeroed.
    pub store: Option<Pfn>,
    /// The page shared with the console.
    pub console: Option<Pfn>,
    /// The page tables of the region: the L4, then all L3, all L2, all L1.
    pub tables: PfnRange,
    /// The boot stack.
    pub stack: Pfn,
    /// Behind the last page of the region mapped from VIRT_BASE.
    pub region_end: Pfn,
    /// The L3, L2 and L1 tables that map the p2m list at INIT_P2M; empty if it lies in the region.
    pub p2m_tables: PfnRange,
    pub(crate) region: Mapping,
    pub(crate) p2m_mapping: Option<Mapping>,
}

impl Layout {
    /// Pages taken: the domain must have as many.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.region_end.0.max(self.ramdisk.end).max(self.p2m.end).max(self.p2m_tables.end)
    }
}

/// A range of virtual addresses that maps consecutive pages, and the tables it takes below the top level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// First address, without the bits that only repeat the topmost one.
    start: u64,
    /// Pages mapped.
    pub(crate) pages: u64,
    /// The first page mapped.
    pub(crate) backing: u64,
    /// The first of the L3 tables; L2 and L1 follow.
    pub(crate) tables: u64,
}

impl Mapping {
    fn new(va: u64, pages: u64) -> Self {
        Self { start: va & ((1 << CANONICAL_BITS) - 1), pages, backing: 0, tables: 0 }
    }

    fn end(&self) -> u64 {
        self.start.saturating_add(self.pages.saturating_mul(PAGE_SIZE))
    }

    /// Where the entries of `level` for this range start, counted through all tables of that level from address 0.
    pub(crate) fn first_entry(&self, level: u32) -> u64 {
        self.start >> (3 + 9 * level)
    }

    /// Entries of `level` this range takes: pages for level 1, tables of the level below for the others.
    pub(crate) fn entries(&self, level: u32) -> u64 {
        let shift = 3 + 9 * level;
        if self.pages == 0 { 0 } else { ((self.end() - 1) >> shift) - (self.start >> shift) + 1 }
    }

    /// The first table of `level`, 1 to 3.
    pub(crate) fn first_table(&self, level: u32) -> u64 {
        (level + 1..4).fold(self.tables, |at, above| at + self.entries(above + 1))
    }

    /// L3, L2 and L1 tables.
    fn table_count(&self) -> u64 {
        (2..=4).map(|level| self.entries(level)).sum()
    }

    /// Slots of the top-level table.
    fn slots(&self) -> (u64, u64) {
        let first = self.first_entry(4);
        (first, first + self.entries(4))
    }

    /// In one half of the address space, and without the hypervisor's slots.
    fn is_allowed(&self) -> bool {
        self.end() <= 1 << CANONICAL_BITS && disjoint(self.slots(), HYPERVISOR_SLOTS) && {
            let (first, end) = self.slots();
            first >= ENTRIES / 2 || end <= ENTRIES / 2
        }
    }
}

/// How a kernel becomes a domain.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    /// The kernel.
    pub kernel: Kernel<'a>,
    /// What was asked for.
    pub config: Config<'a>,
    /// Where everything goes.
    pub layout: Layout,
}

impl<'a> Plan<'a> {
    /// Lays out a domain.
    ///
    /// # Errors
    /// [`ImageError::TooLittleMemory`] when it needs more than `config.nr_pages`, [`ImageError::VirtBase`] when it does
    /// not fit where the kernel wants to be.
    pub fn new(kernel: Kernel<'a>, config: Config<'a>) -> Result<Self, ImageError<'a>> {
        let layout = lay_out(&kernel, &config, config.nr_pages)?;
        if layout.pages() <= config.nr_pages {
            return Ok(Self { kernel, config, layout });
        }
        // A larger domain has a larger p2m list: name a size that will do.
        let mut needed = layout.pages();
        loop {
            let larger = lay_out(&kernel, &config, needed)?.pages();
            if larger <= needed {
                return Err(ImageError::TooLittleMemory { needed, given: config.nr_pages });
            }
            needed = larger;
        }
    }

    /// The virtual address of a page of the region.
    pub(crate) fn address(&self, pfn: Pfn) -> u64 {
        self.kernel.virt_base.wrapping_add(pfn.0 * PAGE_SIZE)
    }

    /// Whether the ramdisk is handed over by pfn instead of by address.
    pub(crate) fn ramdisk_by_pfn(&self) -> bool {
        self.kernel.unmapped_ramdisk && !self.layout.ramdisk.is_empty()
    }
}

/// Hands out pages one behind the other.
struct Cursor(u64);

impl Cursor {
    fn take(&mut self, pages: u64) -> PfnRange {
        let range = PfnRange::new(self.0, pages);
        self.0 = range.end;
        range
    }

    fn page(&mut self) -> Pfn {
        Pfn(self.take(1).start)
    }
}

/// The layout of a domain of `nr_pages`, which may turn out to need more.
fn lay_out(kernel: &Kernel<'_>, config: &Config<'_>, nr_pages: u64) -> Result<Layout, ImageError<'static>> {
    let too_large = ImageError::VirtBase { base: kernel.virt_base, pages: nr_pages };
    let list_pages = nr_pages.checked_mul(8).ok_or(too_large)?.div_ceil(PAGE_SIZE);
    let ramdisk_pages = (config.ramdisk.len() as u64).div_ceil(PAGE_SIZE);

    // Whether INIT_P2M can be honoured depends on where the region ends, hence a second try.
    let try_with = |p2m_at: Option<u64>| -> Result<Layout, ImageError<'static>> {
        let kernel_pages = PfnRange { start: kernel.span.0 / PAGE_SIZE, end: kernel.span.1.div_ceil(PAGE_SIZE) };
        let mut cursor = Cursor(kernel_pages.end);
        let mut ramdisk = cursor.take(if kernel.unmapped_ramdisk { 0 } else { ramdisk_pages });
        let mut p2m = cursor.take(if p2m_at.is_some() { 0 } else { list_pages });
        let start_info = cursor.page();
        let store = config.rings.then(|| cursor.page());
        let console = config.rings.then(|| cursor.page());
        let mut region = size_region(kernel.virt_base, cursor.0)?;
        let tables = cursor.take(1 + region.table_count());
        region.tables = tables.start + 1;
        let stack = cursor.page();

        let mut cursor = Cursor(region.pages);
        if kernel.unmapped_ramdisk {
            ramdisk = cursor.take(ramdisk_pages);
        }
        let mut p2m_tables = PfnRange::new(cursor.0, 0);
        let p2m_mapping = p2m_at.map(|va| {
            let mut mapping = Mapping::new(va, list_pages);
            p2m = cursor.take(list_pages);
            p2m_tables = cursor.take(mapping.table_count());
            (mapping.backing, mapping.tables) = (p2m.start, p2m_tables.start);
            mapping
        });
        let region_end = Pfn(region.pages);
        Ok(Layout {
            kernel: kernel_pages,
            ramdisk,
            p2m,
            start_info,
            store,
            console,
            tables,
            stack,
            region_end,
            p2m_tables,
            region,
            p2m_mapping,
        })
    };
    if let Some(va) = kernel.init_p2m.filter(|va| va.is_multiple_of(PAGE_SIZE) && is_canonical(*va)) {
        let layout = try_with(Some(va))?;
        if layout.p2m_mapping.is_some_and(|p2m| va < kernel.virt_base && may_coexist(&p2m, &layout.region)) {
            return Ok(layout);
        }
    }
    try_with(None)
}

/// The region that holds `used` pages, its own tables, the stack and the padding.
fn size_region(base: u64, used: u64) -> Result<Mapping, ImageError<'static>> {
    let start = base & ((1 << CANONICAL_BITS) - 1);
    let mut region = Mapping::new(base, 0);
    loop {
        let pages = used + 1 + region.table_count() + 1 + PADDING_PAGES;
        let refused = ImageError::VirtBase { base, pages };
        let end = pages.checked_mul(PAGE_SIZE).and_then(|len| start.checked_add(len)).ok_or(refused)?;
        let end = end.checked_next_multiple_of(REGION_ALIGN).ok_or(refused)?;
        let larger = Mapping::new(base, (end - start) / PAGE_SIZE);
        if !larger.is_allowed() {
            return Err(refused);
        }
        if larger == region {
            return Ok(region);
        }
        region = larger;
    }
}

/// The p2m list has L3 tables of its own, so it may not even share a slot of the top-level table with the region.
fn may_coexist(p2m: &Mapping, region: &Mapping) -> bool {
    p2m.is_allowed() && disjoint(p2m.slots(), region.slots())
}

fn disjoint(a: (u64, u64), b: (u64, u64)) -> bool {
    a.1 <= b.0 || b.1 <= a.0
}

/// Whether bits 47 to 63 are equal.
pub(crate) fn is_canonical(va: u64) -> bool {
    let top = va >> (CANONICAL_BITS - 1);
    top == 0 || top == u64::MAX >> (CANONICAL_BITS - 1)
}
