//! The ELF file and its Xen notes. Everything here is foreign: each number is checked before it is used.

use core::ops::Range;

use crate::notes::{Note, OWNER};
use elf::abi::{EI_NIDENT, EM_X86_64, PT_LOAD, PT_NOTE, SHT_NOTE};
use elf::endian::LittleEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::ParsingTable;
use elf::section::SectionHeader;
use elf::segment::ProgramHeader;

use crate::PAGE_SIZE;
use crate::error::ImageError;
use crate::layout::{CANONICAL_BITS, is_canonical};

/// The most program headers a kernel may have; Linux has five.
pub const MOST_HEADERS: u16 = 64;
/// The most bytes of notes a kernel may have in all; Linux has less than a page.
pub const MOST_NOTE_BYTES: usize = 64 << 10;

/// Notes have numbers below this.
const NOTES: usize = 20;
/// Bytes of the ELF64 header.
const HEADER_LEN: usize = 64;

/// XENFEAT names of note FEATURES, with their bits.
const FEATURES: [(&[u8], u32); 7] = [
    (b"writable_page_tables", 0),
    (b"writable_descriptor_tables", 1),
    (b"auto_translated_physmap", 2),
    (SUPERVISOR_MODE_KERNEL, 3),
    (b"pae_pgdir_above_4gb", 4),
    (b"hvm_callback_vector", 8),
    (b"dom0", 11),
];
const SUPERVISOR_MODE_KERNEL: &[u8] = b"supervisor_mode_kernel";

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
    /// Where it ends, in bytes from the start of pfn 0, exclusive.
    fn end(&self) -> u64 {
        self.start + len_of(self.bytes) + self.zeros
    }
}

/// The descriptors of the Xen notes, by number.
struct Notes<'a> {
    descriptors: [Option<&'a [u8]>; NOTES],
    /// Bytes of notes that may yet be read.
    room: usize,
}

impl<'a> Kernel<'a> {
    /// Reads the headers, segments and notes of `file`.
    ///
    /// # Errors
    /// Says what is wrong with the file, and where; [`ImageError::NoXenNotes`] for a kernel that is not paravirtual.
    pub fn parse(file: &'a [u8]) -> Result<Self, ImageError<'a>> {
        let header = read_header(file)?;
        let headers = program_headers(file, &header)?;
        let notes = read_notes(file, &header, headers)?;
        notes.check_guest()?;
        let mut kernel = Self {
            file,
            headers,
            entry: notes.number(Note::Entry)?.unwrap_or(header.e_entry),
            virt_base: notes.number(Note::VirtBase)?.unwrap_or(0),
            paddr_offset: notes.number(Note::PaddrOffset)?.unwrap_or(0),
            hypercall_page: notes.number(Note::HypercallPage)?,
            init_p2m: notes.number(Note::InitP2m)?,
            unmapped_ramdisk: notes.number(Note::ModStartPfn)?.is_some_and(|v| v != 0),
            features: notes.features()?,
            span: (u64::MAX, 0),
        };
        for (index, header) in kernel.load_headers() {
            let segment = kernel.check_segment(index, &header)?;
            kernel.check_overlap(&segment)?;
            kernel.span = (kernel.span.0.min(segment.start), kernel.span.1.max(segment.end()));
        }
        if kernel.span.1 == 0 {
            return Err(ImageError::NoLoadSegment);
        }
        kernel.check_addresses()?;
        Ok(kernel)
    }

    /// The segments to load, in the order of the file.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'a>> + '_ {
        self.load_headers().filter_map(|(index, header)| self.check_segment(index, &header).ok())
    }

    /// The virtual addresses of the kernel.
    #[must_use]
    pub fn addresses(&self) -> Range<u64> {
        self.virt_base.wrapping_add(self.span.0)..self.virt_base.wrapping_add(self.span.1)
    }

    /// Segments that occupy memory, with the numbers of their headers.
    fn load_headers(&self) -> impl Iterator<Item = (usize, ProgramHeader)> + use<'a> {
        self.headers.iter().enumerate().filter(|(_, h)| h.p_type == PT_LOAD && h.p_memsz > 0)
    }

    /// Loads go by physical address: Linux's per-CPU segment has virtual address 0.
    fn check_segment(&self, index: usize, header: &ProgramHeader) -> Result<Segment<'a>, ImageError<'a>> {
        let bytes = file_bytes(self.file, index, header)?;
        let zeros = header.p_memsz.checked_sub(header.p_filesz).ok_or(ImageError::SegmentSizes { index })?;
        let outside = ImageError::SegmentAddress { index, address: header.p_paddr };
        let start = header.p_paddr.checked_sub(self.paddr_offset).ok_or(outside)?;
        let end = start.checked_add(header.p_memsz).ok_or(outside)?;
        if end > 1 << CANONICAL_BITS { Err(outside) } else { Ok(Segment { index, start, bytes, zeros }) }
    }

    /// Each byte of the domain is written once. There are few segments, so each is compared with those before it.
    fn check_overlap(&self, segment: &Segment<'a>) -> Result<(), ImageError<'a>> {
        let mut before = self.segments().take_while(|other| other.index < segment.index);
        match before.find(|other| other.start < segment.end() && segment.start < other.end()) {
            Some(other) => Err(ImageError::SegmentOverlap {
                index: segment.index,
                other: other.index,
                address: segment.start.max(other.start) + self.paddr_offset,
            }),
            None => Ok(()),
        }
    }

    fn check_addresses(&self) -> Result<(), ImageError<'a>> {
        let pages = self.span.1.div_ceil(PAGE_SIZE);
        if !self.virt_base.is_multiple_of(PAGE_SIZE) || !is_canonical(self.virt_base) {
            return Err(ImageError::VirtBase { base: self.virt_base, pages });
        }
        // As distances from VIRT_BASE, so that a kernel may end with the address space.
        let within = |address: u64| (self.span.0..self.span.1).contains(&address.wrapping_sub(self.virt_base));
        if !within(self.entry) {
            let Range { start, end } = self.addresses();
            return Err(ImageError::Entry { entry: self.entry, start, end });
        }
        match self.hypercall_page {
            Some(page) if !page.is_multiple_of(PAGE_SIZE) || !within(page) => Err(ImageError::HypercallPage { page }),
            _ => Ok(()),
        }
    }
}

fn read_header(file: &[u8]) -> Result<FileHeader<LittleEndian>, ImageError<'_>> {
    // The reader panics on a file shorter than its identification.
    let header = file.get(..HEADER_LEN).ok_or(ImageError::NotElf)?;
    let ident = parse_ident::<LittleEndian>(header).map_err(|_| ImageError::NotElf)?;
    if ident.1 != Class::ELF64 {
        return Err(ImageError::NotElf64);
    }
    let tail = header.get(EI_NIDENT..).unwrap_or(&[]);
    let header = FileHeader::parse_tail(ident, tail).map_err(|_| ImageError::NotElf)?;
    match header.e_machine {
        EM_X86_64 => Ok(header),
        other => Err(ImageError::NotX86_64(other)),
    }
}

fn program_headers<'a>(
    file: &'a [u8],
    header: &FileHeader<LittleEndian>,
) -> Result<ParsingTable<'a, LittleEndian, ProgramHeader>, ImageError<'a>> {
    if header.e_phnum > MOST_HEADERS {
        return Err(ImageError::ProgramHeaderCount { at: header.e_phoff, count: header.e_phnum });
    }
    let len = u64::from(header.e_phnum) * u64::from(header.e_phentsize);
    let outside = ImageError::ProgramHeaders { end: header.e_phoff.saturating_add(len), file_len: len_of(file) };
    let table = slice(file, header.e_phoff, len).filter(|_| header.e_phnum == 0 || header.e_phentsize == 56);
    Ok(ParsingTable::new(LittleEndian, Class::ELF64, table.ok_or(outside)?))
}

/// Notes are in segments; a file stripped of those may still have sections.
fn read_notes<'a>(
    file: &'a [u8],
    header: &FileHeader<LittleEndian>,
    headers: ParsingTable<'a, LittleEndian, ProgramHeader>,
) -> Result<Notes<'a>, ImageError<'a>> {
    let mut notes = Notes { descriptors: [None; NOTES], room: MOST_NOTE_BYTES };
    for (index, segment) in headers.iter().enumerate().filter(|(_, h)| h.p_type == PT_NOTE) {
        notes.read(file_bytes(file, index, &segment)?, segment.p_offset)?;
    }
    if notes.is_empty() {
        let len = u64::from(header.e_shnum) * u64::from(header.e_shentsize);
        let table = slice(file, header.e_shoff, len).filter(|_| header.e_shentsize == 64).unwrap_or(&[]);
        let sections = ParsingTable::<_, SectionHeader>::new(LittleEndian, Class::ELF64, table);
        for section in sections.iter().filter(|s| s.sh_type == SHT_NOTE) {
            let at = section.sh_offset;
            let bytes = slice(file, at, section.sh_size).ok_or(ImageError::NoteTruncated { at })?;
            notes.read(bytes, at)?;
        }
    }
    if notes.is_empty() {
        return Err(ImageError::NoXenNotes);
    }
    Ok(notes)
}

impl<'a> Notes<'a> {
    /// Takes up the Xen notes among `bytes`, which start at byte `offset` of the file.
    ///
    /// Names and descriptors are padded to 4 bytes whatever the segment's alignment says.
    fn read(&mut self, bytes: &'a [u8], offset: u64) -> Result<(), ImageError<'a>> {
        self.room = self.room.checked_sub(bytes.len()).ok_or(ImageError::NotesTooLong { at: offset })?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = offset + (len_of(bytes) - len_of(rest));
            let (note, after) = split_note(rest).ok_or(ImageError::NoteTruncated { at })?;
            let slot = usize::try_from(note.number).ok().and_then(|number| self.descriptors.get_mut(number));
            if let Some(slot) = slot.filter(|_| note.owner == OWNER) {
                *slot = Some(note.descriptor);
            }
            rest = after;
        }
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.descriptors.iter().all(Option::is_none)
    }

    fn bytes(&self, note: Note) -> Option<&'a [u8]> {
        self.descriptors.get(note as usize).copied().flatten()
    }

    fn text(&self, note: Note) -> &'a [u8] {
        self.bytes(note).and_then(|text| text.split(|b| *b == 0).next()).unwrap_or(&[])
    }

    fn number(&self, note: Note) -> Result<Option<u64>, ImageError<'a>> {
        let number = |bytes: &[u8]| match bytes.len() {
            4 => bytes.first_chunk().map(|word| u64::from(u32::from_le_bytes(*word))),
            8 => bytes.first_chunk().map(|word| u64::from_le_bytes(*word)),
            _ => None,
        };
        let refuse = |len| ImageError::NoteSize { note: note as u32, len };
        self.bytes(note).map(|bytes| number(bytes).ok_or(refuse(bytes.len()))).transpose()
    }

    fn check_guest(&self) -> Result<(), ImageError<'a>> {
        let (version, os) = (self.text(Note::XenVersion), self.text(Note::GuestOs));
        if !version.starts_with(b"xen-3.0") {
            let missing = self.bytes(Note::XenVersion).is_none();
            return Err(if missing { ImageError::NoXenVersion } else { ImageError::XenVersion(version) });
        }
        if !self.text(Note::Loader).starts_with(b"generic") && !os.starts_with(b"linux") {
            return Err(ImageError::UnknownGuest(os));
        }
        Ok(())
    }

    /// The features the kernel copes with. Note FEATURES is a list that ends where the note does, not with a NUL, note
    /// SUPPORTED_FEATURES a bitmap of which only the first word has a meaning.
    ///
    /// A required feature (`!`) is one the kernel needs to be *asked about*, not one to be offered: Linux "requires"
    /// writable page tables and runs without. So it must be known, and only the impossible one is refused.
    fn features(&self) -> Result<u32, ImageError<'a>> {
        let bitmap = self.bytes(Note::SupportedFeatures).and_then(|bytes| bytes.first_chunk());
        let mut bits = bitmap.map_or(0, |word| u32::from_le_bytes(*word));
        for entry in self.text(Note::Features).split(|b| *b == b'|').filter(|entry| !entry.is_empty()) {
            let required = entry.strip_prefix(b"!");
            let wanted = required.unwrap_or(entry);
            let known = FEATURES.iter().find(|(name, _)| *name == wanted);
            if required.is_some() && (known.is_none() || wanted == SUPERVISOR_MODE_KERNEL) {
                return Err(ImageError::RequiredFeature(wanted));
            }
            bits |= known.map_or(0, |(_, bit)| 1 << bit);
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
    let word = |at: usize| header.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let (owner, rest) = split_padded(rest, word(0)?)?;
    let (descriptor, rest) = split_padded(rest, word(4)?)?;
    let number = word(8)?;
    Some((RawNote { number, owner, descriptor }, rest))
}

/// The last element may lack its padding.
fn split_padded(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(len).ok()?;
    let padded = len.checked_next_multiple_of(4)?;
    Some((bytes.get(..len)?, bytes.get(padded..).unwrap_or(&[])))
}

fn file_bytes<'a>(file: &'a [u8], index: usize, header: &ProgramHeader) -> Result<&'a [u8], ImageError<'a>> {
    let end = header.p_offset.saturating_add(header.p_filesz);
    let truncated = ImageError::SegmentTruncated { index, end, file_len: len_of(file) };
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
