//! The first domain as the boot bundle brings it: planned beforehand, so that ring 0 parses no foreign file. Not Xen's:
//! this is between `xtask`, which plans and writes it, and the hypervisor, which carries it out.
//!
//! A [`FirstImage`] is followed by [`Run`]s until the end: each a header and the content of consecutive pages. Page tables
//! and the p2m list name pages where a running domain's name frames; the hypervisor puts the frames in. Pages that no run
//! fills are zero.

/// [`FirstImage::magic`].
pub const MAGIC: [u8; 8] = *b"TENON1st";
/// Bytes of a page in a run.
pub const PAGE: usize = 4096;
/// Pages that a first domain can have: 2 GiB.
pub const MAX_PAGES: u64 = 1 << 19;

abi! {
    /// What the hypervisor has to know of the plan. Numbers of pages count from the domain's first.
    pub struct FirstImage: 104 {
        /// [`MAGIC`].
        magic: [u8; 8],
        /// Pages the domain has.
        nr_pages: u64,
        /// RIP.
        entry: u64,
        /// RSP.
        stack: u64,
        /// RSI: address of the start-info page.
        start_info: u64,
        /// The start-info page.
        start_info_page: u64,
        /// The L4 table.
        root_page: u64,
        /// First page of the p2m list.
        p2m_page: u64,
        /// Page tables: first page, and the first behind them.
        tables: [u64; 2],
        /// More page tables.
        more_tables: [u64; 2],
        /// 1 if the kernel takes a ramdisk by page number.
        takes_ramdisk: u64,
    }

    /// Consecutive pages whose content follows.
    pub struct Run: 16 {
        /// The first.
        page: u64,
        /// How many.
        count: u64,
    }
}
