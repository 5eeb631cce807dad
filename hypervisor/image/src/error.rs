//! Why a file cannot become a domain: what was wrong, and where.

use crate::PAGE_SIZE;
use core::fmt;

use crate::kernel::{MOST_HEADERS, MOST_NOTE_BYTES};

/// A refusal to make a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageError<'a> {
    /// Not a complete header of a little-endian ELF file.
    NotElf,
    /// A 32-bit ELF file.
    NotElf64,
    /// The file is for another processor: its `e_machine`.
    NotX86_64(u16),
    /// The table of program headers lies outside the file, or its entries have another size.
    ProgramHeaders {
        /// File offset where the table should end.
        end: u64,
        /// Bytes the file has.
        file_len: u64,
    },
    /// The table has more program headers than [`MOST_HEADERS`].
    ProgramHeaderCount {
        /// File offset of the table.
        at: u64,
        /// Program headers it should have.
        count: u16,
    },
    /// No segment is to be loaded.
    NoLoadSegment,
    /// A segment reaches beyond the end of the file.
    SegmentTruncated {
        /// Its program header.
        index: usize,
        /// File offset where it should end.
        end: u64,
        /// Bytes the file has.
        file_len: u64,
    },
    /// A segment is larger in the file than in memory.
    SegmentSizes {
        /// Its program header.
        index: usize,
    },
    /// A segment's physical address lies below PADDR_OFFSET, or its end beyond the address space.
    SegmentAddress {
        /// Its program header.
        index: usize,
        /// The address in question.
        address: u64,
    },
    /// Two segments are to be loaded to the same place.
    SegmentOverlap {
        /// The program header of the later one.
        index: usize,
        /// The program header of the earlier one.
        other: usize,
        /// The first physical address that both claim.
        address: u64,
    },
    /// The notes have more bytes than [`MOST_NOTE_BYTES`] in all.
    NotesTooLong {
        /// File offset of the notes that are too many.
        at: u64,
    },
    /// A note ends outside its segment.
    NoteTruncated {
        /// File offset of the note's header.
        at: u64,
    },
    /// A numeric note has neither 4 nor 8 bytes.
    NoteSize {
        /// The note's number.
        note: u32,
        /// Bytes it has.
        len: usize,
    },
    /// There is no note with the owner `Xen`: not a paravirtual kernel.
    NoXenNotes,
    /// Note XEN_VERSION is missing.
    NoXenVersion,
    /// Note XEN_VERSION names an interface other than `xen-3.0`.
    XenVersion(&'a [u8]),
    /// Neither LOADER starts with `generic` nor GUEST_OS with `linux`; GUEST_OS's value.
    UnknownGuest(&'a [u8]),
    /// The kernel requires a feature that nobody knows, or that a paravirtual domain cannot have.
    RequiredFeature(&'a [u8]),
    /// VIRT_BASE is not page-aligned, not canonical, or the region would leave its half of the address
    /// space or meet the slots the hypervisor keeps.
    VirtBase {
        /// VIRT_BASE.
        base: u64,
        /// Pages that should be mapped from there on.
        pages: u64,
    },
    /// The entry point is outside the kernel.
    Entry {
        /// Where the kernel wants to start.
        entry: u64,
        /// First address of the kernel.
        start: u64,
        /// End of the kernel, exclusive.
        end: u64,
    },
    /// The hypercall page is not page-aligned or outside the kernel.
    HypercallPage {
        /// Where the kernel wants it.
        page: u64,
    },
    /// The domain is too small.
    TooLittleMemory {
        /// Pages that would do.
        needed: u64,
        /// Pages it has.
        given: u64,
    },
}

impl fmt::Display for ImageError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf => write!(f, "not an ELF file, or its header is cut off"),
            Self::NotElf64 => write!(f, "not a 64-bit ELF file"),
            Self::NotX86_64(machine) => {
                write!(f, "ELF file for machine {machine}, not x86-64 (62)")
            }
            Self::ProgramHeaders { end, file_len } => {
                write!(f, "program headers end at byte {end:#x}, the file has {file_len:#x}")
            }
            Self::ProgramHeaderCount { at, count } => {
                write!(f, "{count} program headers at byte {at:#x}, at most {MOST_HEADERS} are read")
            }
            Self::NoLoadSegment => write!(f, "no segment to load"),
            Self::SegmentTruncated { index, end, file_len } => {
                write!(f, "segment {index} ends at byte {end:#x}, the file has {file_len:#x}")
            }
            Self::SegmentSizes { index } => {
                write!(f, "segment {index} is larger in the file than in memory")
            }
            Self::SegmentAddress { index, address } => {
                write!(f, "segment {index}: physical address {address:#x} is outside the domain")
            }
            Self::SegmentOverlap { index, other, address } => {
                write!(f, "segment {index} overlaps segment {other} at the physical address {address:#x}")
            }
            Self::NotesTooLong { at } => {
                write!(f, "the ELF notes at byte {at:#x} make more than {MOST_NOTE_BYTES} bytes of notes")
            }
            Self::NoteTruncated { at } => write!(f, "the ELF note at byte {at:#x} is cut off"),
            Self::NoteSize { note, len } => {
                write!(f, "Xen note {note} has {len} bytes, not 4 or 8")
            }
            Self::NoXenNotes => write!(f, "no Xen notes: not a paravirtual kernel"),
            Self::NoXenVersion => write!(f, "no Xen note XEN_VERSION (5)"),
            Self::XenVersion(v) => write!(f, "Xen note XEN_VERSION is \"{}\", not \"xen-3.0\"", short(v)),
            Self::UnknownGuest(os) => {
                let os = short(os);
                write!(f, "Xen note LOADER is not \"generic\" and GUEST_OS is \"{os}\", not \"linux\"")
            }
            Self::RequiredFeature(name) => {
                write!(f, "the kernel requires the feature \"{}\", which we do not have", short(name))
            }
            Self::VirtBase { base, pages } => {
                write!(f, "{} MiB cannot be mapped at VIRT_BASE {base:#x}", mib(*pages))
            }
            Self::Entry { entry, start, end } => {
                write!(f, "entry {entry:#x} is outside the kernel at {start:#x}..{end:#x}")
            }
            Self::HypercallPage { page } => write!(f, "the hypercall page {page:#x} is not a page of the kernel"),
            Self::TooLittleMemory { needed, given } => {
                let (needed, given) = (mib(*needed), given / PAGES_PER_MIB);
                write!(
                    f,
                    "too little memory: needs {needed} MiB at least for the kernel and its ramdisk, has {given} MiB"
                )
            }
        }
    }
}

const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE;

/// MiB that so many pages take.
const fn mib(pages: u64) -> u64 {
    pages.div_ceil(PAGES_PER_MIB)
}

/// As much of a foreign name as a message needs, printable.
fn short(name: &[u8]) -> core::slice::EscapeAscii<'_> {
    name.get(..32).unwrap_or(name).escape_ascii()
}

impl core::error::Error for ImageError<'_> {}
