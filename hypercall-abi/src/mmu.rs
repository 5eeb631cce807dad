//! Page tables: entries, `mmu_update`, `update_va_mapping`, `mmuext_op`, `multicall` (core 4).

/// Bits of a page-table entry (core 10.6).
pub mod pte {
    /// The entry translates.
    pub const PRESENT: u64 = 1;
    /// Writes are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// Ring 3 may use it.
    pub const USER: u64 = 1 << 2;
    /// Write-through.
    pub const PWT: u64 = 1 << 3;
    /// Cache disable.
    pub const PCD: u64 = 1 << 4;
    /// Set by the CPU at first use.
    pub const ACCESSED: u64 = 1 << 5;
    /// Set by the CPU at first write.
    pub const DIRTY: u64 = 1 << 6;
    /// L1: page-attribute bit. L2, L3: superpage, never a PV guest's.
    pub const PAT_OR_PSE: u64 = 1 << 7;
    /// Survives a root load.
    pub const GLOBAL: u64 = 1 << 8;
    /// Bits 9..=11, software's.
    pub const AVAILABLE_LOW: u64 = 0x7 << 9;
    /// Bits 12..=51: the frame.
    pub const FRAME: u64 = 0x000f_ffff_ffff_f000;
    /// Bits 52..=62, software's.
    pub const AVAILABLE_HIGH: u64 = 0x7ff << 52;
    /// Marks a leaf that the guest kernel made for itself.
    pub const GUEST_KERNEL: u64 = 1 << 52;
    /// No execution.
    pub const NX: u64 = 1 << 63;
}

abi! {
    /// One element of `mmu_update` (core 4.4), written by the guest.
    pub struct MmuUpdate: 16 {
        /// Machine address of the entry; the low three bits are an [`UpdateCommand`].
        ptr: u64,
        /// New content.
        val: u64,
    }

    /// Low bits of [`MmuUpdate::ptr`] (core 4.4).
    pub enum UpdateCommand: u64 {
        /// Checked update of a page-table entry.
        Normal = 0,
        /// Update of the machine-to-physical table.
        MachPhys = 1,
        /// As `Normal`, keeping accessed and dirty bits the CPU has set.
        PreserveAd = 2,
        /// As `Normal` for PV guests.
        NoTranslate = 3,
    }
}

/// Flags of `update_va_mapping` (core 10.8).
pub mod uvmf {
    /// Which kind of flush: mask.
    pub const KIND: u64 = 3;
    /// No flush.
    pub const NONE: u64 = 0;
    /// Flush everything.
    pub const TLB_FLUSH: u64 = 1;
    /// Flush the address.
    pub const INVLPG: u64 = 2;
    /// On all vcpus; other values of the upper bits point to a bitmap of vcpus, 0 means this vcpu.
    pub const ALL: u64 = 4;
}

abi! {
    /// One element of `mmuext_op` (core 4.6), written by the guest.
    pub struct MmuextOp: 24 {
        /// A [`MmuextCommand`].
        cmd: u32,
        /// Zero.
        pad: u32,
        /// Frame number or linear address.
        arg1: u64,
        /// Number of entries, address of a vcpu bitmap, or source frame.
        arg2: u64,
    }

    /// Commands of `mmuext_op` (core 4.6).
    pub enum MmuextCommand: u32 {
        /// Pin an L1 table.
        PinL1 = 0,
        /// Pin an L2 table.
        PinL2 = 1,
        /// Pin an L3 table.
        PinL3 = 2,
        /// Pin an L4 table.
        PinL4 = 3,
        /// Drop a pin.
        Unpin = 4,
        /// Load the kernel root.
        NewBaseptr = 5,
        /// Flush this vcpu.
        TlbFlushLocal = 6,
        /// Flush one address on this vcpu.
        InvlpgLocal = 7,
        /// Flush the vcpus of a bitmap.
        TlbFlushMulti = 8,
        /// Flush one address on the vcpus of a bitmap.
        InvlpgMulti = 9,
        /// Flush all vcpus.
        TlbFlushAll = 10,
        /// Flush one address on all vcpus.
        InvlpgAll = 11,
        /// Write back the caches of this CPU.
        FlushCache = 12,
        /// Set the local descriptor table.
        SetLdt = 13,
        /// Set the user root.
        NewUserBaseptr = 15,
        /// Zero a frame.
        ClearPage = 16,
        /// Copy a frame.
        CopyPage = 17,
        /// Write back the caches of all CPUs.
        FlushCacheGlobal = 18,
        /// Superpage accounting; not supported.
        MarkSuper = 19,
        /// Superpage accounting; not supported.
        UnmarkSuper = 20,
    }

    /// One element of `multicall` (core 4.9).
    pub struct MulticallEntry: 64 {
        /// Hypercall number, written by the guest.
        op: u64,
        /// Result, written by the hypervisor.
        result: i64,
        /// Arguments, written by the guest.
        args: [u64; 6],
    }
}
