//! Notes by which a kernel image describes itself (core 1.2).

/// Owner name of the notes.
pub const OWNER: &[u8] = b"Xen\0";

numbers! {
    /// Note types.
    Note: u32 {
        /// Address of the first instruction.
        Entry = 1,
        /// Address of a page for hypercall stubs.
        HypercallPage = 2,
        /// Address that corresponds to page 0.
        VirtBase = 3,
        /// Subtracted from physical load addresses.
        PaddrOffset = 4,
        /// ABI tag, `xen-3.0`.
        XenVersion = 5,
        /// Name of the operating system.
        GuestOs = 6,
        /// Its version.
        GuestVersion = 7,
        /// `generic`.
        Loader = 8,
        /// 32-bit only.
        PaeMode = 9,
        /// Names of features, separated by bars.
        Features = 10,
        /// Wants its symbol table.
        BsdSymtab = 11,
        /// 32-bit only.
        HvStartLow = 12,
        /// How absent entries carry frames.
        L1MfnValid = 13,
        /// Can cancel a suspend.
        SuspendCancel = 14,
        /// Address where the p2m list is wanted.
        InitP2m = 15,
        /// Accepts a ramdisk that is not mapped.
        ModStartPfn = 16,
        /// Bitmap of features.
        SupportedFeatures = 17,
        /// PVH entry.
        Phys32Entry = 18,
        /// PVH relocation.
        Phys32Reloc = 19,
    }
}
