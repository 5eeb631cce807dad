//! The notes by which a kernel image describes itself (ABI core 1.2).

/// Owner name of the notes.
pub(crate) const OWNER: &[u8] = b"Xen\0";

/// The notes we read; kernels carry others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Note {
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
    /// `generic`.
    Loader = 8,
    /// Names of features, separated by bars.
    Features = 10,
    /// Address where the p2m list is wanted.
    InitP2m = 15,
    /// Accepts a ramdisk that is not mapped.
    ModStartPfn = 16,
    /// Bitmap of features.
    SupportedFeatures = 17,
}
