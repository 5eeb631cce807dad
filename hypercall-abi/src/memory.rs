//! Memory reservations and maps (core 4.10).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

abi! {
    /// Commands of `memory_op`: the low 6 bits of its first argument. Those of Xen's that are not here are refused with
    /// `NoSys`.
    pub enum MemoryOp: u32 {
        /// Allocate frames. [`Reservation`].
        IncreaseReservation = 0,
        /// Return frames. [`Reservation`].
        DecreaseReservation = 1,
        /// The highest machine frame.
        MaximumRamPage = 2,
        /// Pages a domain has.
        CurrentReservation = 3,
        /// Pages a domain may have.
        MaximumReservation = 4,
        /// Allocate frames for given pages. [`Reservation`].
        PopulatePhysmap = 6,
        /// The caller's memory map. [`MemoryMap`].
        MemoryMap = 9,
        /// The machine's memory map; dom0.
        MachineMemoryMap = 10,
        /// Other frames for some of the caller's; refused. [`Exchange`].
        Exchange = 11,
        /// Where the machine-to-physical table is. [`MachphysMapping`].
        MachphysMapping = 12,
    }
    /// Bits of the first argument that hold the command; the rest is the extent to start at.
    pub const COMMAND_BITS: u32 = 6;

    /// Frames to allocate or return.
    pub struct Reservation: 32 {
        /// Address of an array: frames to return, or pages in and frames out.
        extent_start: u64,
        /// How many.
        nr_extents: u64,
        /// Each is 2^order frames.
        extent_order: u32,
        /// Address limits; ignored.
        mem_flags: u32,
        /// Whose.
        domid: u16,
        /// Zero.
        pad: [u16; 3],
    }

    /// Frames to return and frames to get for them.
    pub struct Exchange: 72 {
        /// In: frames to return.
        given: Reservation,
        /// In: pages. Out: frames.
        wanted: Reservation,
        /// In and out: extents of `given` done so far.
        nr_exchanged: u64,
    }

    /// Asks for a memory map.
    pub struct MemoryMap: 16 {
        /// In: room. Out: entries.
        nr_entries: u32,
        /// Zero.
        pad: u32,
        /// Address of an array of [`E820Entry`].
        buffer: u64,
    }
}
/// One range of a memory map: 20 bytes, unaligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct E820Entry {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// 1 RAM, 2 reserved, 3 ACPI, 4 ACPI NVS, 5 unusable.
    pub kind: u32,
}
const _: () = assert!(size_of::<E820Entry>() == 20);
/// [`E820Entry::kind`] of RAM.
pub const E820_RAM: u32 = 1;
abi! {
    /// Where the machine-to-physical table is.
    pub struct MachphysMapping: 24 {
        /// Out: first address.
        v_start: u64,
        /// Out: first address after it.
        v_end: u64,
        /// Out: highest frame number it can hold.
        max_mfn: u64,
    }
}
