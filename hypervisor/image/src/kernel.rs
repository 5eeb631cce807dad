//! The ELF file and its Xen notes. Everything here is foreign: each number is checked before it is used.

use core::fmt;
use core::ops::Range;

use elf::abi::{EI_NIDENT, EM_X86_64, PT_LOAD, PT_NOTE, SHT_NOTE};
use elf::endian::LittleEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::ParsingTable;
use elf::section::SectionHeader;
use elf::segment::ProgramHeader;
use hypercall_abi::elfnote::{Note, OWNER};

use crate::error::{ElfFault, ImageError, Name};
use crate::layout::{CANONICAL_BITS, is_canonical};
use crate::{PAGE_SIZE, Pfn};

/// Bytes of the ELF64 header.
const HEADER_LEN: usize = 64;

/// XENFEAT names of note FEATURES, with their bits.
const FEATURES: [(&str, u32); 7] = [
    ("writable_page_tables", 0),
    ("writable_descriptor_tables", 1),
    ("auto_translated_physmap", 2),
    (SUPERVISOR_MODE_KERNEL, 3),
    ("pae_pgdir_above_4gb", 4),
    ("hvm_callback_vector", 8),
    ("dom0", 11),
];
const SUPERVISOR_MODE_KERNEL: &str = "supervisor_mode_kernel";

/// A paravirtual kernel: a checked ELF file and what its Xen notes ask for.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    file: &'a [u8],
    headers: ParsingTable<'a, LittleEndian, ProgramHeader>,
    /// Where vcpu 0 starts: note ENTRY, or the ELF entry without one.
    pub entry: u64,
    /// The virtual address of pfn 0: note VIRT_BASE.
    pub virt_base: u64,
    /// What is subtracted from a segment's physical address: note PADDR_OFFSET.
    pub paddr_offset: u64,
    /// The virtual address of the page to fill with hypercall stubs: note HYPERCALL_PAGE.
    pub hypercall_page: Option<u64>,
    /// Where the kernel wants its p2m list mapped: note INIT_P2M.
    pub init_p2m: Option<u64>,
    /// Whether the kernel takes a ramdisk that is not mapped: note MOD_START_PFN.
    pub unmapped_ramdisk: bool,
    /// Bitmap of XENFEAT numbers the kernel copes with: notes FEATURES and SUPPORTED_FEATURES.
    pub features: u32,
    /// Bytes from the start of pfn 0 to the first and behind the last byte of the kernel.
    pub span: (u64, u64),
}

/// Without the file, which is large.
impl fmt::Debug for Kernel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, entry, features) = (self.addresses(), self.entry, self.features);
        write!(
            f,
            "Kernel({at:#x?}, entry {entry:#x}, features {features:#x})"
        )
    }
}

/// What a load segment asks for.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Number of its program header.
    pub index: usize,
    /// Where it starts, in bytes from the start of pfn 0.
    pub start: u64,
    /// What the file holds.
    pub bytes: &'a [u8],
    /// Bytes of zero that follow.
    pub zeros: u64,
}

impl Segment<'_> {
    /// The page the segment starts in, and the offset in it.
    #[must_use]
    pub const fn place(&self) -> (Pfn, u64) {
        (Pfn(self.start / PAGE_SIZE), self.start % PAGE_SIZE)
    }
}

/// What the notes said; `None` where they were silent.
#[derive(Default)]
struct Notes<'a> {
    any: bool,
    entry: Option<u64>,
    hypercall_page: Option<u64>,
    virt_base: Option<u64>,
    paddr_offset: Option<u64>,
    xen_version: Option<&'a [u8]>,
    guest_os: &'a [u8],
    loader: &'a [u8],
    feature_names: &'a [u8],
    features: u32,
    init_p2m: Option<u64>,
    mod_start_pfn: Option<u64>,
}

impl<'a> Kernel<'a> {
    /// Reads the headers, segments and notes of `file`.
    ///
    /// # Errors
    /// Says what is wrong with the file, and where; [`ImageError::NoXenNotes`] for a kernel that is not paravirtual.
    pub fn parse(file: &'a [u8]) -> Result<Self, ImageError> {
        let header = read_header(file)?;
        let headers = program_headers(file, &header)?;
        let notes = read_notes(file, &header, headers)?;
        notes.check_guest()?;
        let mut kernel = Self {
            file,
            headers,
            entry: notes.entry.unwrap_or(header.e_entry),
            virt_base: notes.virt_base.unwrap_or(0),
            paddr_offset: notes.paddr_offset.unwrap_or(0),
            hypercall_page: notes.hypercall_page,
            init_p2m: notes.init_p2m,
            unmapped_ramdisk: notes.mod_start_pfn.is_some_and(|v| v != 0),
            features: notes.features | notes.named_features()?,
            span: (u64::MAX, 0),
        };
        for (index, header) in kernel.load_headers() {
            let segment = kernel.check_segment(index, &header)?;
            let end = segment.start + header.p_memsz;
            kernel.span = (kernel.span.0.min(segment.start), kernel.span.1.max(end));
        }
        if kernel.span.1 == 0 {
            return Err(ImageError::NoLoadSegment);
        }
        kernel.check_addresses()?;
        Ok(kernel)
    }

    /// The segments to load, in the order of the file.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'a>> + '_ {
        self.load_headers()
            .filter_map(|(index, header)| self.check_segment(index, &header).ok())
    }

    /// The virtual addresses of the kernel.
    #[must_use]
    pub fn addresses(&self) -> Range<u64> {
        self.virt_base.wrapping_add(self.span.0)..self.virt_base.wrapping_add(self.span.1)
    }

    /// Segments that occupy memory, with the numbers of their headers.
    fn load_headers(&self) -> impl Iterator<Item = (usize, ProgramHeader)> + use<'a> {
        self.headers
            .iter()
            .enumerate()
            .filter(|(_, h)| h.p_type == PT_LOAD && h.p_memsz > 0)
    }

    /// Loads go by physical address: Linux's per-CPU segment has virtual address 0.
    fn check_segment(
        &self,
        index: usize,
        header: &ProgramHeader,
    ) -> Result<Segment<'a>, ImageError> {
        let bytes = file_bytes(self.file, index, header)?;
        let zeros = header
            .p_memsz
            .checked_sub(header.p_filesz)
            .ok_or(ImageError::SegmentSizes { index })?;
        let outside = ImageError::SegmentAddress {
            index,
            address: header.p_paddr,
        };
        let start = header
            .p_paddr
            .checked_sub(self.paddr_offset)
            .ok_or(outside.clone())?;
        let end = start.checked_add(header.p_memsz).ok_or(outside.clone())?;
        if end > 1 << CANONICAL_BITS {
            Err(outside)
        } else {
            Ok(Segment {
                index,
                start,
                bytes,
                zeros,
            })
        }
    }

    fn check_addresses(&self) -> Result<(), ImageError> {
        let pages = self.span.1.div_ceil(PAGE_SIZE);
        if !self.virt_base.is_multiple_of(PAGE_SIZE) || !is_canonical(self.virt_base) {
            return Err(ImageError::VirtBase {
                base: self.virt_base,
                pages,
            });
        }
        // As distances from VIRT_BASE, so that a kernel may end with the address space.
        let within = |address: u64| {
            (self.span.0..self.span.1).contains(&address.wrapping_sub(self.virt_base))
        };
        if !within(self.entry) {
            let Range { start, end } = self.addresses();
            return Err(ImageError::Entry {
                entry: self.entry,
                start,
                end,
            });
        }
        match self.hypercall_page {
            Some(page) if !page.is_multiple_of(PAGE_SIZE) || !within(page) => {
                Err(ImageError::HypercallPage { page })
            }
            _ => Ok(()),
        }
    }
}

fn read_header(file: &[u8]) -> Result<FileHeader<LittleEndian>, ImageError> {
    // The reader panics on a file shorter than its identification.
    let Some((header, _)) = file.split_at_checked(HEADER_LEN) else {
        let magic = b"\x7fELF".get(..file.len()).unwrap_or(b"\x7fELF");
        let fault = if file.starts_with(magic) {
            ElfFault::Truncated
        } else {
            ElfFault::Magic
        };
        return Err(ImageError::NotElf(fault));
    };
    let ident = parse_ident::<LittleEndian>(header)?;
    if ident.1 != Class::ELF64 {
        return Err(ImageError::NotElf64);
    }
    let header = FileHeader::parse_tail(ident, header.get(EI_NIDENT..).unwrap_or(&[]))?;
    match header.e_machine {
        EM_X86_64 => Ok(header),
        other => Err(ImageError::NotX86_64(other)),
    }
}

fn program_headers<'a>(
    file: &'a [u8],
    header: &FileHeader<LittleEndian>,
) -> Result<ParsingTable<'a, LittleEndian, ProgramHeader>, ImageError> {
    let len = u64::from(header.e_phnum) * u64::from(header.e_phentsize);
    let outside = ImageError::ProgramHeaders {
        end: header.e_phoff.saturating_add(len),
        file_len: len_of(file),
    };
    let table = slice(file, header.e_phoff, len)
        .filter(|_| header.e_phnum == 0 || header.e_phentsize == 56);
    Ok(ParsingTable::new(
        LittleEndian,
        Class::ELF64,
        table.ok_or(outside)?,
    ))
}

/// Notes are in segments; a file stripped of those may still have sections.
fn read_notes<'a>(
    file: &'a [u8],
    header: &FileHeader<LittleEndian>,
    headers: ParsingTable<'a, LittleEndian, ProgramHeader>,
) -> Result<Notes<'a>, ImageError> {
    let mut notes = Notes::default();
    for (index, segment) in headers
        .iter()
        .enumerate()
        .filter(|(_, h)| h.p_type == PT_NOTE)
    {
        notes.read(file_bytes(file, index, &segment)?, segment.p_offset)?;
    }
    if !notes.any {
        let len = u64::from(header.e_shnum) * u64::from(header.e_shentsize);
        let table = slice(file, header.e_shoff, len)
            .filter(|_| header.e_shentsize == 64)
            .unwrap_or(&[]);
        let sections = ParsingTable::<_, SectionHeader>::new(LittleEndian, Class::ELF64, table);
        for section in sections.iter().filter(|s| s.sh_type == SHT_NOTE) {
            let bytes = slice(file, section.sh_offset, section.sh_size);
            notes.read(
                bytes.ok_or(ImageError::NoteTruncated {
                    at: section.sh_offset,
                })?,
                section.sh_offset,
            )?;
        }
    }
    if notes.any {
        Ok(notes)
    } else {
        Err(ImageError::NoXenNotes)
    }
}

impl<'a> Notes<'a> {
    /// Takes up the Xen notes among `bytes`, which start at byte `offset` of the file.
    ///
    /// Names and descriptors are padded to 4 bytes whatever the segment's alignment says.
    fn read(&mut self, bytes: &'a [u8], offset: u64) -> Result<(), ImageError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let truncated = ImageError::NoteTruncated {
                at: offset + (len_of(bytes) - len_of(rest)),
            };
            let (note, after) = split_note(rest).ok_or(truncated)?;
            if note.owner == OWNER {
                self.take(note.number, note.descriptor)?;
            }
            rest = after;
        }
        Ok(())
    }

    fn take(&mut self, note: u32, bytes: &'a [u8]) -> Result<(), ImageError> {
        self.any = true;
        let number = || {
            number(bytes).ok_or(ImageError::NoteSize {
                note,
                len: bytes.len(),
            })
        };
        match Note::from_number(u64::from(note)) {
            Some(Note::Entry) => self.entry = Some(number()?),
            Some(Note::HypercallPage) => self.hypercall_page = Some(number()?),
            Some(Note::VirtBase) => self.virt_base = Some(number()?),
            Some(Note::PaddrOffset) => self.paddr_offset = Some(number()?),
            Some(Note::XenVersion) => self.xen_version = Some(bytes),
            Some(Note::GuestOs) => self.guest_os = bytes,
            Some(Note::Loader) => self.loader = bytes,
            Some(Note::Features) => self.feature_names = bytes,
            Some(Note::InitP2m) => self.init_p2m = Some(number()?),
            Some(Note::ModStartPfn) => self.mod_start_pfn = Some(number()?),
            // A bitmap of which only the first word has a meaning.
            Some(Note::SupportedFeatures) => {
                self.features = bytes
                    .first_chunk()
                    .map_or(0, |word| u32::from_le_bytes(*word))
            }
            _ => {}
        }
        Ok(())
    }

    fn check_guest(&self) -> Result<(), ImageError> {
        let version = self.xen_version.ok_or(ImageError::NoXenVersion)?;
        if !version.starts_with(b"xen-3.0") {
            return Err(ImageError::XenVersion(name(version)));
        }
        if !self.loader.starts_with(b"generic") && !self.guest_os.starts_with(b"linux") {
            return Err(ImageError::UnknownGuest(name(self.guest_os)));
        }
        Ok(())
    }

    /// The bits of note FEATURES, a list that ends where the note does and not with a NUL.
    ///
    /// A required feature (`!`) is one the kernel needs to be *asked about*, not one to be offered: Linux "requires"
    /// writable page tables and runs without. So it must be known, and only the impossible one is refused.
    fn named_features(&self) -> Result<u32, ImageError> {
        let mut bits = 0;
        for entry in self
            .feature_names
            .split(|b| matches!(b, b'|' | 0))
            .filter(|e| !e.is_empty())
        {
            let required = entry.strip_prefix(b"!");
            let wanted = required.unwrap_or(entry);
            match FEATURES
                .iter()
                .find(|(known, _)| known.as_bytes() == wanted)
            {
                Some((SUPERVISOR_MODE_KERNEL, _)) if required.is_some() => {
                    return Err(ImageError::RequiredFeatureRefused(name(wanted)));
                }
                Some((_, bit)) => bits |= 1 << bit,
                None if required.is_some() => {
                    return Err(ImageError::RequiredFeatureUnknown(name(wanted)));
                }
                None => {}
            }
        }
        Ok(bits)
    }
}

struct RawNote<'a> {
    number: u32,
    owner: &'a [u8],
    descriptor: &'a [u8],
}

/// The note at the start of `bytes`, and what follows.
fn split_note(bytes: &[u8]) -> Option<(RawNote<'_>, &[u8])> {
    let (header, rest) = bytes.split_at_checked(12)?;
    let word = |at: usize| {
        header
            .get(at..at + 4)?
            .try_into()
            .ok()
            .map(u32::from_le_bytes)
    };
    let (owner, rest) = split_padded(rest, word(0)?)?;
    let (descriptor, rest) = split_padded(rest, word(4)?)?;
    Some((
        RawNote {
            number: word(8)?,
            owner,
            descriptor,
        },
        rest,
    ))
}

/// The last element may lack its padding.
fn split_padded(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(len).ok()?;
    let padded = len.checked_next_multiple_of(4)?;
    Some((bytes.get(..len)?, bytes.get(padded..).unwrap_or(&[])))
}

fn number(bytes: &[u8]) -> Option<u64> {
    match bytes.len() {
        4 => Some(u64::from(u32::from_le_bytes(*bytes.first_chunk()?))),
        8 => Some(u64::from_le_bytes(*bytes.first_chunk()?)),
        _ => None,
    }
}

/// The printable start of `bytes`.
fn name(bytes: &[u8]) -> Name {
    let mut name = Name::new();
    let printable = bytes.iter().take_while(|b| **b != 0).map(|b| {
        if b.is_ascii_graphic() {
            char::from(*b)
        } else {
            '?'
        }
    });
    for c in printable {
        if name.push(c).is_err() {
            break;
        }
    }
    name
}

fn file_bytes<'a>(
    file: &'a [u8],
    index: usize,
    header: &ProgramHeader,
) -> Result<&'a [u8], ImageError> {
    let end = header.p_offset.saturating_add(header.p_filesz);
    let truncated = ImageError::SegmentTruncated {
        index,
        end,
        file_len: len_of(file),
    };
    slice(file, header.p_offset, header.p_filesz).ok_or(truncated)
}

fn slice(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = usize::try_from(offset.checked_add(len)?).ok()?;
    bytes.get(start..end)
}

fn len_of(bytes: &[u8]) -> u64 {
    bytes.len() as u64
}
