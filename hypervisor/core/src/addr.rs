//! The nouns: frames, addresses, domains, ports. No bare integer crosses a module boundary.

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall_abi::Errno;

/// Bytes in a page; the only page size a PV guest sees.
pub const PAGE_SIZE: usize = 4096;
/// The same as a length of addresses.
pub const PAGE_BYTES: u64 = long(PAGE_SIZE);
/// Bits of an address that lie inside its page.
pub const PAGE_SHIFT: u32 = 12;
/// Entries in a page table, words in a page.
pub const ENTRIES: usize = 512;

/// First address of the hole that belongs to the hypervisor (ABI core 2.1).
pub const HOLE_START: u64 = 0xffff_8000_0000_0000;
/// First address after the hole: guests own everything from here up.
pub const HOLE_END: u64 = 0xffff_8800_0000_0000;
/// The slots of an L4 table that belong to the hypervisor.
pub const HOLE_SLOTS: core::ops::Range<usize> = 256..272;
/// Where a guest reads the machine-to-physical table (ABI core 2.2).
pub const M2P_START: u64 = HOLE_START;
/// First address after the window of the machine-to-physical table.
pub const M2P_END: u64 = 0xffff_8040_0000_0000;

/// The element of a list that a guest's number names, if there is one.
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

/// A number as an index: no bit is lost on a 64-bit machine.
#[must_use]
pub const fn index(number: u32) -> usize {
    number as usize
}

/// A length or an index in 64 bits.
#[must_use]
pub const fn long(length: usize) -> u64 {
    length as u64
}

/// How many bytes of a guest's memory a structure takes.
#[must_use]
pub const fn bytes_of<T>() -> u64 {
    long(size_of::<T>())
}

/// Copies bytes from the front of one list to the front of another, as far as both go.
pub(crate) fn fill<'a>(to: impl IntoIterator<Item = &'a mut u8>, from: impl IntoIterator<Item = &'a u8>) {
    to.into_iter().zip(from).for_each(|(to, from)| *to = *from);
}

/// A machine frame number (Xen's "mfn"). 32 bits of it reach 16 TiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame(u32);

impl Frame {
    /// The frame with this number, if a machine could have it at all.
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

    /// Its number.
    #[must_use]
    pub fn number(self) -> u64 {
        u64::from(self.0)
    }

    /// Its number, as narrow as it is.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// Its number, to index tables with one element per frame.
    #[must_use]
    pub fn index(self) -> usize {
        index(self.0)
    }

    /// The machine address of its first byte.
    #[must_use]
    pub fn address(self) -> u64 {
        u64::from(self.0) << PAGE_SHIFT
    }
}

/// A place for the number of a frame, or of none: written under a lock, read by anybody.
#[derive(Debug)]
pub struct FrameSlot(AtomicU32);

impl FrameSlot {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// The frame.
    #[must_use]
    pub fn get(&self) -> Option<Frame> {
        Some(Frame(self.0.load(Ordering::Acquire))).filter(|frame| frame.0 != 0)
    }

    /// Puts a frame there. Frame 0 is the firmware's and never handed out.
    pub fn set(&self, frame: Frame) {
        self.0.store(frame.0, Ordering::Release);
    }

    /// Puts a frame there, or none.
    pub(crate) fn put(&self, frame: Option<Frame>) {
        self.0.store(frame.map_or(0, |frame| frame.0), Ordering::Release);
    }

    /// Takes the frame out.
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

/// A virtual address as a guest gave it: a claim until `claim` has walked the guest's tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct GuestVirt(pub u64);

/// An address that a handler or a segment base can have.
///
/// # Errors
/// `Inval` for one that is not canonical.
pub(crate) fn canonical(address: u64) -> Result<u64, Errno> {
    if GuestVirt(address).is_canonical() { Ok(address) } else { Err(Errno::Inval) }
}

impl GuestVirt {
    /// Whether bits 63..47 are equal, as every loadable address needs.
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

    /// Canonical and outside the hole: an address a guest may own.
    #[must_use]
    pub fn is_guests(self) -> bool {
        self.is_canonical() && !self.in_hole()
    }

    /// The byte inside its page.
    #[must_use]
    pub fn offset(self) -> usize {
        usize::from(low16(self.0 & 0xfff))
    }

    /// The index into the table of `level` (1..=4) that translates this address.
    #[must_use]
    pub fn slot(self, level: u8) -> usize {
        let shift = PAGE_SHIFT + 9 * (u32::from(level).saturating_sub(1));
        usize::from(low16(self.0 >> shift & 0x1ff))
    }

    /// The address `bytes` further on; wraps like the CPU's own arithmetic.
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

/// Domains that can exist at once.
pub const MAX_DOMAINS: u16 = 128;

impl DomainId {
    /// The first number that names no domain but a role (SELF, IO, XEN, ...).
    pub const FIRST_RESERVED: u16 = 0x7ff0;
    /// Slots of domains.
    pub(crate) const SLOTS: usize = MAX_DOMAINS as usize;

    /// The slot of a domain with this id: no two domains share one.
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

/// Vcpus that can exist at once.
pub const MAX_VCPUS: usize = 512;

/// Physical CPUs that can take part.
pub const MAX_CPUS: usize = 32;

/// A physical CPU's number, below [`MAX_CPUS`], counted from 0 in the order they came up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuId(pub u32);

/// A set of physical CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuSet(pub u64);

impl CpuSet {
    /// Only this CPU.
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

    /// How many are in it.
    #[must_use]
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether nobody is in it.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Its CPUs, by number.
    pub fn iter(self) -> impl Iterator<Item = CpuId> {
        ones(self.0).map(CpuId)
    }
}

/// The bits of a word that are set, by number, the lowest first.
pub(crate) fn ones(word: u64) -> impl Iterator<Item = u32> {
    let left = core::iter::successors(Some(word), |left| Some(left & left.wrapping_sub(1)));
    left.take_while(|left| *left != 0).map(|left| left.trailing_zeros())
}
