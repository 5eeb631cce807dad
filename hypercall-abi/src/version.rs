//! `xen_version`: who we are and what we can do (core 8.1).

abi! {
    /// Commands of `xen_version`.
    pub enum VersionOp: u32 {
        /// Major << 16 | minor.
        Version = 0,
        /// 16 characters.
        Extraversion = 1,
        /// [`CompileInfo`].
        CompileInfo = 2,
        /// 1024 characters.
        Capabilities = 3,
        /// 64 characters.
        Changeset = 4,
        /// First address of the hypervisor's hole.
        PlatformParameters = 5,
        /// [`FeatureInfo`].
        GetFeatures = 6,
        /// Bytes in a page.
        Pagesize = 7,
        /// The domain's UUID.
        GuestHandle = 8,
        /// The hypervisor's command line.
        Commandline = 9,
        /// Build id.
        BuildId = 10,
    }

    /// Who built it.
    pub struct CompileInfo: 144 {
        /// Compiler.
        compiler: [u8; 64],
        /// Builder.
        by: [u8; 16],
        /// Builder's domain.
        domain: [u8; 32],
        /// Date.
        date: [u8; 32],
    }

    /// Asks for one word of features.
    pub struct FeatureInfo: 8 {
        /// In: which word.
        submap_idx: u32,
        /// Out: the bits.
        submap: u32,
    }
}
/// Feature bits of word 0 (core 8.1), and the number of our own word.
pub mod feature {
    /// The word of Tenon's extensions: the bytes `TEN1`. There are no extensions yet; that the word is there tells a guest
    /// where it runs. Xen refuses the number.
    pub const TENON_SUBMAP: u32 = 0x314e_4554;

    /// `mmu_update` can preserve accessed and dirty bits.
    pub const MMU_PT_UPDATE_PRESERVE_AD: u32 = 1 << 5;
    /// COPY_PAGE and CLEAR_PAGE work.
    pub const HIGHMEM_ASSIST: u32 = 1 << 6;
    /// Grant mappings carry software bits.
    pub const GNTTAB_MAP_AVAIL_BITS: u32 = 1 << 7;
    /// The caller is dom0.
    pub const DOM0: u32 = 1 << 11;
}
