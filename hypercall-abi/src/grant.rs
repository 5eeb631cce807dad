//! Grant tables, version 1 (io 1).

/// Entries of a version 1 table in one frame.
pub const ENTRIES_PER_FRAME: u32 = 512;
/// Grant reference of the console page, seeded by whoever builds the domain (io 1.1).
pub const REF_CONSOLE: u32 = 0;
/// Grant reference of the xenstore page.
pub const REF_XENSTORE: u32 = 1;

abi! {
    /// A version 1 entry; domid and frame are the granter's, flags are shared (io 1.1).
    pub struct Entry: 8 {
        /// [`entry`] bits.
        flags: u16,
        /// Who may use it.
        domid: u16,
        /// The frame granted.
        frame: u32,
    }
}

/// Bits of [`Entry::flags`].
pub mod entry {
    /// Mask of the type.
    pub const TYPE: u16 = 3;
    /// Type: not in use.
    pub const INVALID: u16 = 0;
    /// Type: the grantee may map or copy.
    pub const PERMIT_ACCESS: u16 = 1;
    /// Type: transfer; refused.
    pub const ACCEPT_TRANSFER: u16 = 2;
    /// The grantee may not write.
    pub const READONLY: u16 = 1 << 2;
    /// Set by the hypervisor while in use.
    pub const READING: u16 = 1 << 3;
    /// Set by the hypervisor while writable in use.
    pub const WRITING: u16 = 1 << 4;
    /// Copy-only part of a page; version 2 only.
    pub const SUB_PAGE: u16 = 1 << 8;
}

abi! {
    /// Commands of `grant_table_op` (io 1.3). Those of Xen's that are not here (3, 9, 11, 12) are refused with `NoSys`.
    pub enum GrantOp: u32 {
        /// [`MapGrantRef`] array.
        MapGrantRef = 0,
        /// [`UnmapGrantRef`] array.
        UnmapGrantRef = 1,
        /// One [`SetupTable`].
        SetupTable = 2,
        /// Page transfer; refused.
        Transfer = 4,
        /// [`struct@Copy`] array.
        Copy = 5,
        /// One [`QuerySize`].
        QuerySize = 6,
        /// [`UnmapAndReplace`] array.
        UnmapAndReplace = 7,
        /// One [`SetVersion`].
        SetVersion = 8,
        /// One [`GetVersion`].
        GetVersion = 10,
    }

    /// Maps a grant.
    pub struct MapGrantRef: 32 {
        /// In: linear address, or machine address of the L1 entry.
        host_addr: u64,
        /// In: [`map`] bits.
        flags: u32,
        /// In: the reference.
        gref: u32,
        /// In: the granter.
        dom: u16,
        /// Out: a [`status`].
        status: i16,
        /// Out: what unmapping needs.
        handle: u32,
        /// Out: machine address of the frame.
        dev_bus_addr: u64,
    }
}
/// Bits of [`MapGrantRef::flags`].
pub mod map {
    /// For DMA.
    pub const DEVICE: u32 = 1;
    /// For the CPU.
    pub const HOST: u32 = 2;
    /// Without writing.
    pub const READONLY: u32 = 4;
    /// `host_addr` is the machine address of an L1 entry.
    pub const CONTAINS_PTE: u32 = 16;
}
abi! {
    /// Unmaps a grant.
    pub struct UnmapGrantRef: 24 {
        /// In: as given to map; 0 = no CPU mapping.
        host_addr: u64,
        /// In: as answered by map; 0 = no DMA mapping.
        dev_bus_addr: u64,
        /// In.
        handle: u32,
        /// Out: a [`status`].
        status: i16,
        /// Zero.
        pad: u16,
    }

    /// Unmaps a grant, and moves the mapping of another address there.
    pub struct UnmapAndReplace: 24 {
        /// In: linear address, as given to map.
        host_addr: u64,
        /// In: linear address whose entry is moved and left empty; 0 = no entry, as when unmapping.
        new_addr: u64,
        /// In.
        handle: u32,
        /// Out: a [`status`].
        status: i16,
        /// Zero.
        pad: u16,
    }

    /// Asks for the frames of a domain's table.
    pub struct SetupTable: 24 {
        /// In: whose table.
        dom: u16,
        /// Zero.
        pad: u16,
        /// In: how many frames it should have.
        nr_frames: u32,
        /// Out: a [`status`].
        status: i16,
        /// Zero.
        pad2: [u16; 3],
        /// In: address of an array of frame numbers to fill.
        frame_list: u64,
    }

    /// One side of a copy.
    pub struct CopySide: 16 {
        /// In: reference (low 32 bits) or frame number.
        gref_or_frame: u64,
        /// In: whose.
        domid: u16,
        /// In: first byte.
        offset: u16,
        /// Zero.
        pad: u32,
    }

    /// Copies between pages.
    pub struct Copy: 40 {
        /// In: where from.
        source: CopySide,
        /// In: where to.
        dest: CopySide,
        /// In: bytes.
        len: u16,
        /// In: bit 0 source is a reference, bit 1 destination is a reference.
        flags: u16,
        /// Out: a [`status`].
        status: i16,
        /// Zero.
        pad: u16,
    }

    /// Asks for the size of a table.
    pub struct QuerySize: 16 {
        /// In: whose.
        dom: u16,
        /// Zero.
        pad: u16,
        /// Out: frames in use.
        nr_frames: u32,
        /// Out: the limit.
        max_nr_frames: u32,
        /// Out: a [`status`].
        status: i16,
        /// Zero.
        pad2: u16,
    }

    /// Chooses the entry format.
    pub struct SetVersion: 4 {
        /// In: wanted. Out: in force.
        version: u32,
    }

    /// Asks for the entry format.
    pub struct GetVersion: 8 {
        /// In: whose.
        dom: u16,
        /// Zero.
        pad: u16,
        /// Out.
        version: u32,
    }
}
/// Results of single grant operations (io 1.3).
pub mod status {
    /// Done.
    pub const OKAY: i16 = 0;
    /// Refused for a reason without a number of its own.
    pub const GENERAL_ERROR: i16 = -1;
    /// No such domain.
    pub const BAD_DOMAIN: i16 = -2;
    /// No such reference, or flags that ask for nothing.
    pub const BAD_GNTREF: i16 = -3;
    /// No such handle.
    pub const BAD_HANDLE: i16 = -4;
    /// Bad linear address.
    pub const BAD_VIRT_ADDR: i16 = -5;
    /// Bad bus address.
    pub const BAD_DEV_ADDR: i16 = -6;
    /// No handle left.
    pub const NO_DEVICE_SPACE: i16 = -7;
    /// Not permitted.
    pub const PERMISSION_DENIED: i16 = -8;
    /// The frame is not the granter's to give.
    pub const BAD_PAGE: i16 = -9;
    /// The copy crosses a page.
    pub const BAD_COPY_ARG: i16 = -10;
    /// Out of space.
    pub const NO_SPACE: i16 = -13;
}
