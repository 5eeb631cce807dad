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

impl Plan<'_> {
    /// Fills the pages of the domain, which must be at least as many as planned.
    ///
    /// # Errors
    /// The first refusal of `builder`; the domain is then of no use.
    pub fn construct<B: Builder>(&self, builder: &mut B, wiring: &Wiring) -> Result<Start, ConstructError<B::Error>> {
        let at = |part| move |error| ConstructError { part, error };
        for segment in self.kernel.segments() {
            write_bytes(builder, segment.start, segment.bytes).map_err(at("a segment"))?;
            write_zeros(builder, segment.start + segment.bytes.len() as u64, segment.zeros).map_err(at("a segment"))?;
        }
        self.write_hypercall_page(builder).map_err(at("the hypercall page"))?;
        write_bytes(builder, self.layout.ramdisk.start * PAGE_SIZE, self.config.ramdisk).map_err(at("the ramdisk"))?;
        self.write_p2m(builder).map_err(at("the p2m list"))?;
        self.write_tables(builder).map_err(at("the page tables"))?;
        self.write_rings(builder).map_err(at("the store and console pages"))?;
        self.write_start_info(builder, wiring).map_err(at("the start-info page"))?;
        self.start(builder).map_err(at("the page tables"))
    }

    fn start<B: Builder>(&self, builder: &mut B) -> Result<Start, B::Error> {
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

    /// The list, and zeros up to the end of its last page: a kernel writes there.
    fn write_p2m<B: Builder>(&self, builder: &mut B) -> Result<(), B::Error> {
        let list = self.layout.p2m;
        let pages = self.config.nr_pages;
        let bytes = pages * 8;
        write_words(builder, list.start, 0, pages, |builder, pfn| Ok(builder.frame_of(Pfn(pfn))?.0))?;
        write_zeros(builder, list.start * PAGE_SIZE + bytes, list.count() * PAGE_SIZE - bytes)
    }

    fn write_tables<B: Builder>(&self, builder: &mut B) -> Result<(), B::Error> {
        for tables in [self.layout.tables, self.layout.p2m_tables] {
            write_zeros(builder, tables.start * PAGE_SIZE, tables.count() * PAGE_SIZE)?;
        }
        self.write_mapping(builder, &self.layout.region)?;
        self.layout.p2m_mapping.iter().try_for_each(|mapping| self.write_mapping(builder, mapping))
    }

    /// Entries of level 1 lead to the pages, those of a higher level to the tables of the level below.
    fn write_mapping<B: Builder>(&self, builder: &mut B, mapping: &Mapping) -> Result<(), B::Error> {
        let root = self.layout.tables.start;
        for level in 1..=4 {
            let table = if level == 4 { root } else { mapping.first_table(level) };
            let target = if level == 1 { mapping.backing } else { mapping.first_table(level - 1) };
            let (first, count) = (mapping.first_entry(level), mapping.entries(level));
            write_words(builder, table, first, count, |builder, index| {
                let pfn = target + index;
                let flags = match level {
                    1 if self.layout.tables.contains(pfn) => READ_ONLY_ENTRY,
                    1 => PAGE_ENTRY,
                    _ => TABLE_ENTRY,
                };
                Ok(builder.frame_of(Pfn(pfn))?.address() | flags)
            })?;
        }
        Ok(())
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

/// Writes `count` words. The first goes to slot `first % 512` of `page`, the others follow through the pages after it;
/// `value` is asked for them by their number from 0 on.
fn write_words<B: Builder>(
    builder: &mut B,
    page: u64,
    first: u64,
    count: u64,
    mut value: impl FnMut(&mut B, u64) -> Result<u64, B::Error>,
) -> Result<(), B::Error> {
    let mut buffer = [0; BATCH * 8];
    let start = page * PAGE_SIZE + first % 512 * 8;
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
