//! The basic types: frames, addresses, domains, ports. No plain integer crosses a module boundary.

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall_abi::Errno;

/// Bytes in a page; the only page size that a PV guest sees.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] as a length of addresses.
pub const PAGE_BYTES: u64 = long(PAGE_SIZE);
/// Number of address bits inside a page.
pub const PAGE_SHIFT: u32 = 12;
/// Entries in a page table, which is also the number of words in a page.
pub const ENTRIES: usize = 512;

/// First address of the hole that belongs to the hypervisor (ABI core 2.1).
pub const HOLE_START: u64 = 0xffff_8000_0000_0000;
/// First address after the hole; all addresses from here up are the guest's.
pub const HOLE_END: u64 = 0xffff_8800_0000_0000;
/// The slots of an L4 table that belong to the hypervisor.
pub const HOLE_SLOTS: core::ops::Range<usize> = 256..272;
/// First address of the machine-to-physical table, which guests can read (ABI core 2.2).
pub const M2P_START: u64 = HOLE_START;
/// First address after the window of the machine-to-physical table.
pub const M2P_END: u64 = 0xffff_8040_0000_0000;

/// The element of a list with a number that a guest gave, if it exists.
pub(crate) fn nth<T>(list: &[T], number: impl TryInto<usize>) -> Option<&T> {
    list.get(number.try_into().ok()?)
}

/// The low 16 bits of a register.
#[must_use]
pub const fn low16(value: u64) -> u16 {
    (value & 0xffff) as u16
}

/// The low 32 bits of a register.
#[must_use]
pub const fn low32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// A number as an index; no bit is lost on a 64-bit machine.
#[must_use]
pub const fn index(number: u32) -> usize {
    number as usize
}

/// A length or an index as 64 bits.
#[must_use]
pub const fn long(length: usize) -> u64 {
    length as u64
}

/// Bytes that a structure takes in a guest's memory.
#[must_use]
pub const fn bytes_of<T>() -> u64 {
    long(size_of::<T>())
}

/// Copies bytes from one list to another, up to the end of the shorter one.
pub(crate) fn fill<'a>(to: impl IntoIterator<Item = &'a mut u8>, from: impl IntoIterator<Item = &'a u8>) {
    to.into_iter().zip(from).for_each(|(to, from)| *to = *from);
}

/// A machine frame number (Xen's "mfn"). Its 32 bits reach 16 TiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame(u32);

impl Frame {
    /// The frame with this number, if the number has at most 32 bits.
    #[must_use]
    pub fn new(number: u64) -> Option<Self> {
        u32::try_from(number).ok().map(Self)
    }

    /// The frame with this number.
    #[must_use]
    pub const fn from_u32(number: u32) -> Self {
        Self(number)
    }

    /// The frame that contains a machine address.
    #[must_use]
    pub fn containing(address: u64) -> Option<Self> {
        Self::new(address >> PAGE_SHIFT)
    }

    /// The frame's number.
    #[must_use]
    pub fn number(self) -> u64 {
        u64::from(self.0)
    }

    /// The frame's number in 32 bits.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// The frame's number, as an index into tables with one element per frame.
    #[must_use]
    pub fn index(self) -> usize {
        index(self.0)
    }

    /// The machine address of the frame's first byte.
    #[must_use]
    pub fn address(self) -> u64 {
        u64::from(self.0) << PAGE_SHIFT
    }
}

/// A slot that holds a frame or nothing: written under a lock, read by anybody.
#[derive(Debug)]
pub struct FrameSlot(AtomicU32);

impl FrameSlot {
    /// An empty slot.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// The frame in the slot.
    #[must_use]
    pub fn get(&self) -> Option<Frame> {
        Some(Frame(self.0.load(Ordering::Acquire))).filter(|frame| frame.0 != 0)
    }

    /// Puts a frame into the slot. Frame 0 belongs to the firmware and is never allocated, so 0 means empty.
    pub fn set(&self, frame: Frame) {
        self.0.store(frame.0, Ordering::Release);
    }

    /// Puts a frame into the slot, or empties it.
    pub(crate) fn put(&self, frame: Option<Frame>) {
        self.0.store(frame.map_or(0, |frame| frame.0), Ordering::Release);
    }

    /// Empties the slot; returns the frame that was in it.
    #[must_use]
    pub fn take(&self) -> Option<Frame> {
        Some(Frame(self.0.swap(0, Ordering::AcqRel))).filter(|frame| frame.0 != 0)
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mfn {:#x}", self.0)
    }
}

/// A virtual address that a guest gave. It is a claim until `claim` has walked the guest's tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct GuestVirt(pub u64);

/// Checks an address for a handler or a segment base.
///
/// # Errors
/// `Inval` if it is not canonical.
pub(crate) fn canonical(address: u64) -> Result<u64, Errno> {
    if GuestVirt(address).is_canonical() { Ok(address) } else { Err(Errno::Inval) }
}

impl GuestVirt {
    /// Whether bits 63..47 are equal, which the CPU requires of every address.
    #[must_use]
    pub fn is_canonical(self) -> bool {
        let top = self.0 >> 47;
        top == 0 || top == 0x1_ffff
    }

    /// Whether the address lies in the slots that belong to the hypervisor.
    #[must_use]
    pub fn in_hole(self) -> bool {
        (HOLE_START..HOLE_END).contains(&self.0)
    }

    /// Whether the address is canonical and outside the hole: one that a guest may use.
    #[must_use]
    pub fn is_guests(self) -> bool {
        self.is_canonical() && !self.in_hole()
    }

    /// The offset of the byte inside its page.
    #[must_use]
    pub fn offset(self) -> usize {
        usize::from(low16(self.0 & 0xfff))
    }

    /// The index of the address in the table of `level` (1 to 4).
    #[must_use]
    pub fn slot(self, level: u8) -> usize {
        let shift = PAGE_SHIFT + 9 * (u32::from(level).saturating_sub(1));
        usize::from(low16(self.0 >> shift & 0x1ff))
    }

    /// The address `bytes` further on. It wraps around, as in the CPU's own arithmetic.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl fmt::Debug for GuestVirt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "va {:#x}", self.0)
    }
}

/// A domain's number, below [`DomainId::FIRST_RESERVED`] (ABI core 10.7).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct DomainId(pub u16);

/// Most domains that can exist at once.
pub const MAX_DOMAINS: u16 = 128;

impl DomainId {
    /// The first number that stands for a role (SELF, IO, XEN, ...) and not for a domain.
    pub const FIRST_RESERVED: u16 = 0x7ff0;
    /// Slots below this are given only to who asks for an id in them: 0 is the first domain's, and a domain that serves
    /// others keeps its id when it is made again.
    pub const BY_REQUEST: usize = 8;
    /// Number of slots for domains.
    pub(crate) const SLOTS: usize = MAX_DOMAINS as usize;

    /// The slot of a domain with this id. No two existing domains have the same.
    #[must_use]
    pub fn slot(self) -> usize {
        usize::from(self.0 % MAX_DOMAINS)
    }
}

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.0)
    }
}

/// An event-channel port of one domain; 0 is never valid (ABI core 5.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Port(pub u32);

/// A vcpu's number inside its domain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct VcpuId(pub u32);

/// Most vcpus that can exist at once.
pub const MAX_VCPUS: usize = 512;

/// Most physical CPUs that can be used.
pub const MAX_CPUS: usize = 32;

/// A physical CPU's number, below [`MAX_CPUS`], counted from 0 in the order in which CPUs came up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuId(pub u32);

/// A set of physical CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuSet(pub u64);

impl CpuSet {
    /// The set of this CPU only.
    #[must_use]
    pub fn only(cpu: CpuId) -> Self {
        Self(1u64.checked_shl(cpu.0).unwrap_or(0))
    }

    /// Whether `cpu` is in the set.
    #[must_use]
    pub fn has(self, cpu: CpuId) -> bool {
        self.0 & Self::only(cpu).0 != 0
    }

    /// The set without `cpu`.
    #[must_use]
    pub fn without(self, cpu: CpuId) -> Self {
        Self(self.0 & !Self::only(cpu).0)
    }

    /// Number of CPUs in the set.
    #[must_use]
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The CPUs in the set, in the order of their numbers.
    pub fn iter(self) -> impl Iterator<Item = CpuId> {
        ones(self.0).map(CpuId)
    }
}

/// The numbers of the set bits of a word, lowest first.
pub(crate) fn ones(word: u64) -> impl Iterator<Item = u32> {
    let left = core::iter::successors(Some(word), |left| Some(left & left.wrapping_sub(1)));
    left.take_while(|left| *left != 0).map(|left| left.trailing_zeros())
}
