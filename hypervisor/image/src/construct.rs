//! A plan carried out: the only part that writes into the new domain.

use core::fmt;

use hypercall_abi::start_info::{MAGIC, StartInfo, flags};
use hypercall_abi::stub;
use zerocopy::IntoBytes;

use crate::layout::{Mapping, Plan};
use crate::{MachineFrame, PAGE_SIZE, Pfn};

const PAGE: usize = 4096;
/// Words gathered before they are written: half a kilobyte of stack.
const BATCH: usize = 64;

/// Present, writable, user, accessed, dirty: entries of L2 to L4.
const TABLE_ENTRY: u64 = 0x67;
/// Present, writable, accessed. The hypervisor adds the user bit when it promotes the table.
const PAGE_ENTRY: u64 = 0x23;
/// A page table's own page: present, accessed.
const READ_ONLY_ENTRY: u64 = 0x21;

/// Offset of the connection state in a console page, and its value while nobody serves the page.
const CONSOLE_CONNECTION: usize = 3088;
const CONSOLE_DISCONNECTED: u8 = 1;

/// Access to the pages of a domain under construction, none of which runs yet.
pub trait Builder {
    /// Why an access was refused.
    type Error;

    /// The machine frame behind a page of the domain.
    ///
    /// # Errors
    /// When the domain has no such page.
    fn frame_of(&mut self, pfn: Pfn) -> Result<MachineFrame, Self::Error>;

    /// Writes `bytes` from byte `offset` of a page on. They never reach beyond the page, and pages are
    /// mostly visited in order: keeping the last one mapped pays.
    ///
    /// # Errors
    /// When the page cannot be reached.
    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Clears `len` bytes from byte `offset` of a page on. Does nothing where frames are known to be zero already.
    ///
    /// # Errors
    /// When the page cannot be reached.
    fn zero(&mut self, pfn: Pfn, offset: usize, len: usize) -> Result<(), Self::Error> {
        let zeros = [0; 256];
        let mut done = 0;
        while done < len {
            let part = zeros.get(..(len - done).min(zeros.len())).unwrap_or(&zeros);
            self.write(pfn, offset + done, part)?;
            done += part.len();
        }
        Ok(())
    }
}

/// What is known of a domain only once it exists, and the kernel must be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wiring {
    /// Its shared-info frame.
    pub shared_info: MachineFrame,
    /// Its end of the store's event channel, 0 without.
    pub store_port: u32,
    /// Its end of the console's event channel, 0 without.
    pub console_port: u32,
}

/// How vcpu 0 starts. The other registers are zero, RFLAGS 0x202, the selectors the flat ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// RIP.
    pub entry: u64,
    /// RSP, and the stack for exceptions: the end of the boot stack.
    pub stack: u64,
    /// RSI: the virtual address of the start-info page.
    pub start_info: u64,
    /// The L4 table, to be pinned and loaded.
    pub root: MachineFrame,
    /// The store page, to be granted to dom0.
    pub store: Option<MachineFrame>,
    /// The console page, to be granted to dom0.
    pub console: Option<MachineFrame>,
}

/// A [`Builder`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConstructError<E> {
    /// What was being written.
    pub part: &'static str,
    /// Why not.
    pub error: E,
}

impl<E: fmt::Display> fmt::Display for ConstructError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "writing {}: {}", self.part, self.error)
    }
}

impl<E: fmt::Debug + fmt::Display> core::error::Error for ConstructError<E> {}

/// A part of the work that a plan is, done by [`Plan::write`].
#[derive(Clone, Copy)]
pub struct Piece<'a>(Part<'a>);

#[derive(Clone, Copy)]
enum Part<'a> {
    /// Bytes of the file or the ramdisk, from this byte of the domain on.
    Bytes(u64, &'a [u8], &'static str),
    /// Zeros, from this byte of the domain on.
    Zeros(u64, u64, &'static str),
    HypercallPage,
    /// Words of the p2m list: the first and the one behind the last.
    P2m(u64, u64),
    /// Entries of one level of a mapping, likewise.
    Entries(&'a Mapping, u32, u64, u64),
    Rings,
    StartInfo,
}

/// A word must be asked for: so many take as long as copying a page.
const WORDS_PER_PAGE: u64 = 16;

fn count(pages: u64) -> usize {
    usize::try_from(pages).unwrap_or(usize::MAX)
}

/// Ranges of at most `most` that make up `count`.
fn cut(count: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at: u64 = 0;
    core::iter::from_fn(move || {
        let first = at;
        at = first.saturating_add(most.max(1)).min(count);
        (first < at).then_some((first, at))
    })
}

impl<'a> Plan<'a> {
    /// Fills the pages of the domain, which must be at least as many as planned.
    ///
    /// # Errors
    /// The first refusal of `builder`; the domain is then of no use.
    pub fn construct<B: Builder>(&self, builder: &mut B, wiring: &Wiring) -> Result<Start, ConstructError<B::Error>> {
        self.pieces(u64::MAX).try_for_each(|piece| self.write(builder, wiring, &piece))?;
        self.start(builder)
    }

    /// What is to be written, all of it once and in this order, in pieces that take no longer than copying `pages` pages.
    pub fn pieces(&self, pages: u64) -> impl Iterator<Item = Piece<'_>> {
        let bytes = pages.saturating_mul(PAGE_SIZE);
        let words = pages.saturating_mul(WORDS_PER_PAGE);
        let zeros =
            move |start: u64, len: u64, what| cut(len, bytes).map(move |(a, b)| Part::Zeros(start + a, b - a, what));
        let copied = move |start: u64, from: &'a [u8], what| {
            cut(from.len() as u64, bytes).map(move |(first, end)| {
                let range = usize::try_from(first).unwrap_or(usize::MAX)..usize::try_from(end).unwrap_or(usize::MAX);
                Part::Bytes(start + first, from.get(range).unwrap_or_default(), what)
            })
        };
        let segments = self.kernel.segments().flat_map(move |segment| {
            let end = segment.start + segment.bytes.len() as u64;
            copied(segment.start, segment.bytes, "a segment").chain(zeros(end, segment.zeros, "a segment"))
        });
        let (layout, nr_pages) = (&self.layout, self.config.nr_pages);
        // Zeros up to the end of the list's last page: a kernel writes there.
        let after = (layout.p2m.start * PAGE_SIZE + nr_pages * 8, layout.p2m.count() * PAGE_SIZE - nr_pages * 8);
        let p2m = cut(nr_pages, words).map(|(first, end)| Part::P2m(first, end));
        let tables = [layout.tables, layout.p2m_tables].into_iter();
        let tables = tables
            .flat_map(move |tables| zeros(tables.start * PAGE_SIZE, tables.count() * PAGE_SIZE, "the page tables"));
        let levels = [Some(&layout.region), layout.p2m_mapping.as_ref()].into_iter().flatten();
        let entries =
            levels.flat_map(|mapping| (1..=4).map(move |level| (mapping, level))).flat_map(move |(mapping, level)| {
                cut(mapping.entries(level), words).map(move |(a, b)| Part::Entries(mapping, level, a, b))
            });
        segments
            .chain([Part::HypercallPage])
            .chain(copied(layout.ramdisk.start * PAGE_SIZE, self.config.ramdisk, "the ramdisk"))
            .chain(p2m)
            .chain(zeros(after.0, after.1, "the p2m list"))
            .chain(tables)
            .chain(entries)
            .chain([Part::Rings, Part::StartInfo])
            .map(Piece)
    }

    /// The tables of level 1, whose entries lead to the domain's pages. Judging one of these looks at 512 entries.
    pub fn leaf_tables(&self) -> impl Iterator<Item = Pfn> {
        let mappings = [Some(&self.layout.region), self.layout.p2m_mapping.as_ref()].into_iter().flatten();
        mappings.flat_map(|mapping| (mapping.first_table(1)..).take(count(mapping.entries(2)))).map(Pfn)
    }

    /// Writes one of the [`pieces`](Plan::pieces).
    ///
    /// # Errors
    /// The first refusal of `builder`; the domain is then of no use.
    pub fn write<B: Builder>(
        &self,
        builder: &mut B,
        wiring: &Wiring,
        piece: &Piece<'_>,
    ) -> Result<(), ConstructError<B::Error>> {
        let (part, written) = match piece.0 {
            Part::Bytes(start, bytes, what) => (what, write_bytes(builder, start, bytes)),
            Part::Zeros(start, len, what) => (what, write_zeros(builder, start, len)),
            Part::HypercallPage => ("the hypercall page", self.write_hypercall_page(builder)),
            Part::P2m(first, end) => ("the p2m list", self.write_p2m(builder, first, end)),
            Part::Entries(mapping, level, first, end) => {
                ("the page tables", self.write_entries(builder, mapping, level, (first, end)))
            }
            Part::Rings => ("the store and console pages", self.write_rings(builder)),
            Part::StartInfo => ("the start-info page", self.write_start_info(builder, wiring)),
        };
        written.map_err(|error| ConstructError { part, error })
    }

    /// How a domain starts into which all pieces have been written.
    ///
    /// # Errors
    /// `builder` lacks a page.
    pub fn start<B: Builder>(&self, builder: &mut B) -> Result<Start, ConstructError<B::Error>> {
        self.first_state(builder).map_err(|error| ConstructError { part: "the page tables", error })
    }

    fn first_state<B: Builder>(&self, builder: &mut B) -> Result<Start, B::Error> {
        let mut frame = |pfn: Option<Pfn>| pfn.map(|pfn| builder.frame_of(pfn)).transpose();
        Ok(Start {
            entry: self.kernel.entry,
            stack: self.address(self.layout.stack).wrapping_add(PAGE_SIZE),
            start_info: self.address(self.layout.start_info),
            store: frame(self.layout.store)?,
            console: frame(self.layout.console)?,
            root: builder.frame_of(Pfn(self.layout.tables.start))?,
        })
    }

    fn write_hypercall_page<B: Builder>(&self, builder: &mut B) -> Result<(), B::Error> {
        let Some(va) = self.kernel.hypercall_page else {
            return Ok(());
        };
        let page = Pfn(va.wrapping_sub(self.kernel.virt_base) / PAGE_SIZE);
        (0..128u8).try_for_each(|number| builder.write(page, usize::from(number) * stub::SIZE, &stub::code(number)))
    }

    fn write_p2m<B: Builder>(&self, builder: &mut B, first: u64, end: u64) -> Result<(), B::Error> {
        let words = end - first;
        write_words(builder, self.layout.p2m.start * PAGE_SIZE + first * 8, words, |builder, index| {
            Ok(builder.frame_of(Pfn(first + index))?.0)
        })
    }

    /// Entries of level 1 lead to the pages, those of a higher level to the tables of the level below.
    fn write_entries<B: Builder>(
        &self,
        builder: &mut B,
        mapping: &Mapping,
        level: u32,
        (first, end): (u64, u64),
    ) -> Result<(), B::Error> {
        let table = if level == 4 { self.layout.tables.start } else { mapping.first_table(level) };
        let target = if level == 1 { mapping.backing } else { mapping.first_table(level - 1) };
        let start = table * PAGE_SIZE + (mapping.first_entry(level) % 512 + first) * 8;
        write_words(builder, start, end - first, |builder, index| {
            let pfn = target + first + index;
            let flags = match level {
                1 if self.layout.tables.contains(pfn) => READ_ONLY_ENTRY,
                1 => PAGE_ENTRY,
                _ => TABLE_ENTRY,
            };
            Ok(builder.frame_of(Pfn(pfn))?.address() | flags)
        })
    }

    fn write_rings<B: Builder>(&self, builder: &mut B) -> Result<(), B::Error> {
        for page in [self.layout.store, self.layout.console].into_iter().flatten() {
            builder.zero(page, 0, PAGE)?;
        }
        match self.layout.console {
            Some(page) => builder.write(page, CONSOLE_CONNECTION, &[CONSOLE_DISCONNECTED]),
            None => Ok(()),
        }
    }

    fn write_start_info<B: Builder>(&self, builder: &mut B, wiring: &Wiring) -> Result<(), B::Error> {
        let layout = &self.layout;
        let page = layout.start_info;
        let by_pfn = self.ramdisk_by_pfn();
        let start_flags = self.config.flags | if by_pfn { flags::MOD_START_PFN } else { 0 };
        let ramdisk = match layout.ramdisk {
            range if range.is_empty() => 0,
            range if by_pfn => range.start,
            range => self.address(Pfn(range.start)),
        };
        let p2m = layout.p2m_mapping.and(self.kernel.init_p2m);
        // A table left out of this range would be mapped writable by the kernel, and refused.
        let p2m_pages = p2m.map_or((0, 0), |_| (layout.p2m.start, layout.p2m_tables.end - layout.p2m.start));
        let mut frame = |pfn: Option<Pfn>| pfn.map_or(Ok(0), |pfn| builder.frame_of(pfn).map(|frame| frame.0));
        let mut info = StartInfo {
            nr_pages: self.config.nr_pages,
            shared_info: wiring.shared_info.address(),
            flags: start_flags,
            store_mfn: frame(layout.store)?,
            store_evtchn: wiring.store_port,
            console_mfn: frame(layout.console)?,
            console_evtchn: wiring.console_port,
            pt_base: self.address(Pfn(layout.tables.start)),
            nr_pt_frames: layout.tables.count(),
            mfn_list: p2m.unwrap_or(self.address(Pfn(layout.p2m.start))),
            mod_start: ramdisk,
            mod_len: self.config.ramdisk.len() as u64,
            first_p2m_pfn: p2m_pages.0,
            nr_p2m_frames: p2m_pages.1,
            ..StartInfo::default()
        };
        fill(&mut info.magic, MAGIC);
        let [command_line @ .., _nul] = &mut info.cmd_line;
        let up_to_nul = self.config.command_line.split(|b| *b == 0).next();
        fill(command_line, up_to_nul.unwrap_or(&[]));
        builder.zero(page, 0, PAGE)?;
        builder.write(page, 0, info.as_bytes())
    }
}

/// Copies as much as there is room for.
fn fill(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}

/// Writes `bytes` from byte `start` of the domain on.
fn write_bytes<B: Builder>(builder: &mut B, start: u64, bytes: &[u8]) -> Result<(), B::Error> {
    let mut rest = bytes;
    for (page, offset, len) in pieces(start, bytes.len() as u64) {
        let (piece, after) = rest.split_at_checked(len).unwrap_or((rest, &[]));
        builder.write(page, offset, piece)?;
        rest = after;
    }
    Ok(())
}

fn write_zeros<B: Builder>(builder: &mut B, start: u64, len: u64) -> Result<(), B::Error> {
    pieces(start, len).try_for_each(|(page, offset, len)| builder.zero(page, offset, len))
}

/// Cuts a range of bytes at page boundaries: page, offset in it, length.
fn pieces(start: u64, len: u64) -> impl Iterator<Item = (Pfn, usize, usize)> {
    let end = start + len;
    let mut at = start;
    core::iter::from_fn(move || {
        let (page, offset) = (at / PAGE_SIZE, at % PAGE_SIZE);
        let len = (PAGE_SIZE - offset).min(end - at);
        at += len;
        // Both are at most a page.
        (len > 0).then_some((Pfn(page), usize::try_from(offset).ok()?, usize::try_from(len).ok()?))
    })
}

/// Writes `count` words from byte `start` of the domain on; `value` is asked for them by their number from 0 on.
fn write_words<B: Builder>(
    builder: &mut B,
    start: u64,
    count: u64,
    mut value: impl FnMut(&mut B, u64) -> Result<u64, B::Error>,
) -> Result<(), B::Error> {
    let mut buffer = [0; BATCH * 8];
    let mut done = 0;
    while done < count {
        let mut filled = 0;
        for (slot, index) in buffer.chunks_exact_mut(8).zip(done..count) {
            slot.copy_from_slice(&value(builder, index)?.to_le_bytes());
            filled += 1;
        }
        write_bytes(builder, start + done * 8, buffer.get(..filled * 8).unwrap_or(&buffer))?;
        done += filled as u64;
    }
    Ok(())
}
