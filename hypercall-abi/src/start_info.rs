//! What a domain finds at the address in RSI when it starts (core 1.4).

abi! {
    /// The start of day.
    pub struct StartInfo: 0x490 {
        /// [`MAGIC`], zero padded.
        magic: [u8; 32],
        /// Pages owned at start.
        nr_pages: u64,
        /// Machine address of the shared_info page.
        shared_info: u64,
        /// [`flags`].
        flags: u32,
        /// Zero.
        pad0: u32,
        /// Frame of the xenstore page, 0 if none.
        store_mfn: u64,
        /// Port to the store.
        store_evtchn: u32,
        /// Zero.
        pad1: u32,
        /// Frame of the console page, 0 if none.
        console_mfn: u64,
        /// Port to the console.
        console_evtchn: u32,
        /// Zero.
        pad2: u32,
        /// Address of the L4 table.
        pt_base: u64,
        /// Number of page-table frames from there on.
        nr_pt_frames: u64,
        /// Address of the p2m list.
        mfn_list: u64,
        /// Address or page number of the ramdisk, 0 if none.
        mod_start: u64,
        /// Its bytes.
        mod_len: u64,
        /// Command line, zero-terminated.
        cmd_line: [u8; 1024],
        /// First page of the p2m list and its tables, if mapped outside the initial region.
        first_p2m_pfn: u64,
        /// How many.
        nr_p2m_frames: u64,
    }
}
/// What [`StartInfo::magic`] starts with.
pub const MAGIC: &[u8] = b"xen-3.0-x86_64";
/// Bits of [`StartInfo::flags`].
pub mod flags {
    /// The domain has authority.
    pub const PRIVILEGED: u32 = 1;
    /// The first domain: never set for a domU.
    pub const INITDOMAIN: u32 = 1 << 1;
    /// `mod_start` is a page number.
    pub const MOD_START_PFN: u32 = 1 << 3;
}
