//! What each CPU has of its own: a [`Cpu`] with its trap stacks, a page of descriptors, and a window in slot 260.
//!
//! While ring 0 runs, the GS base is the address of this CPU's [`Cpu`]. While a guest runs, the GS base is the
//! guest's, and ours waits in the register SWAPGS exchanges it with.

use crate::memory::{self, CONSTANT, DATA, WINDOWS, address_of, image_address};
use core::arch::asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};
use hv_core::addr::index;
use hv_core::frame::asked::Asked;
use hv_core::machine::{Entry, MESSAGES, Page};

/// CPUs we have room for: as many as the rules.
pub(crate) const MAX_CPUS: usize = hv_core::addr::MAX_CPUS;

/// Pages of a GDT window; the last but one is the CPU's own.
const GDT_PAGES: u64 = 16;
/// The page of the window, and of every guest's table, that belongs to us.
pub(crate) const OWN_PAGE: u64 = 14;
/// Pages of an LDT window.
pub(crate) const LDT_PAGES: u64 = 16;
/// Bytes of one CPU's windows.
const WINDOW: u64 = (GDT_PAGES + LDT_PAGES) * 4096;

/// The task-state segment: stacks for entries from ring 3 and for the exceptions that may come anywhere.
#[repr(C)]
pub(crate) struct Tss {
    /// Puts the 64-bit words of the segment, which begins right after, on their natural boundary.
    _align: AtomicU32,
    start: AtomicU32,
    /// Stack for entries from ring 3: the end of the `Registers` of the vcpu that runs.
    pub(crate) rsp0: AtomicU64,
    _rsp12: [AtomicU64; 2],
    _reserved1: AtomicU64,
    pub(crate) ist: [AtomicU64; 7],
    _reserved2: AtomicU64,
    _reserved3: AtomicU16,
    pub(crate) io_bitmap: AtomicU16,
}

impl Tss {
    /// Bytes of the segment.
    pub(crate) const BYTES: u16 = 104;

    /// Where the CPU sees it begin.
    pub(crate) fn base(&self) -> u64 {
        address_of(&raw const self.start)
    }
}

/// One CPU's constants and state. Atomics let it be shared, mostly with nobody.
#[repr(C, align(4096))]
pub(crate) struct Cpu {
    /// Its own address, to get from GS to Rust.
    this: AtomicU64,
    /// Where `run` left its stack.
    host_stack: AtomicU64,
    /// The guest's stack pointer for a moment on SYSCALL.
    scratch: AtomicU64,
    /// The end of the running vcpu's `Registers`.
    pub(crate) registers_end: AtomicU64,
    /// Where its [`Entry`] is.
    entry_at: AtomicU64,
    /// The stacks.
    pub(crate) tss: Tss,
    /// Its number.
    pub(crate) id: AtomicU32,
    /// How interrupts name it.
    pub(crate) apic_id: AtomicU32,
    /// The page-table root it uses.
    pub(crate) root: AtomicU64,
    /// Complete flushes of it so far.
    pub(crate) flushes: AtomicU64,
    /// Whether it has been started.
    pub(crate) online: AtomicBool,
    /// Whether a guest runs, or is about to.
    pub(crate) in_guest: AtomicBool,
    /// Whether it sleeps, outside the rules.
    pub(crate) idle: AtomicBool,
    /// Another CPU wants everything flushed before a guest runs here again.
    pub(crate) asked: Asked,
    /// Interrupts that came during `idle` or `let_in`.
    pub(crate) woken: AtomicU32,
    /// Which of them were messages of devices.
    pub(crate) messages: [AtomicU64; MESSAGES.div_ceil(64)],
    /// When the timer interrupt is due.
    pub(crate) deadline: AtomicU64,
    /// XCR0 as it is in hardware.
    pub(crate) xcr0: AtomicU64,
    /// The XCR0 the vcpu wants.
    pub(crate) guest_xcr0: AtomicU64,
    /// CR4 as it is in hardware.
    pub(crate) cr4: AtomicU64,
    /// Debug registers 0 to 3 as they are in hardware.
    pub(crate) breakpoints: [AtomicU64; 4],
    /// Debug register 7 as it is in hardware.
    pub(crate) debug_control: AtomicU64,
    /// The selector SYSENTER loads, as it is in hardware.
    pub(crate) sysenter_cs: AtomicU32,
    /// TSC_AUX as it is in hardware.
    pub(crate) tsc_aux: AtomicU32,
    /// Descriptors in the LDT.
    pub(crate) ldt_entries: AtomicU32,
    /// So many pages of the GDT may be other than zeros.
    pub(crate) gdt_mapped: AtomicU64,
    /// Which LDT pages are mapped.
    pub(crate) ldt_mapped: AtomicU32,
    /// The entry that leads to the table of its windows.
    window_table: AtomicU64,
    // Stacks for what may come anywhere, even where the stack pointer is the guest's. A large one, on which we report what
    // happened, would overflow into a small one, never into the fields above.
    nmi: [AtomicU64; 128],
    debug: [AtomicU64; 128],
    machine_check: [AtomicU64; 1024],
    double_fault: [AtomicU64; 1024],
    /// The entry code has its stack pointer at `entry` for as long as it acts by itself: a fault there, which would be a bug of
    /// ours, is reported on what lies below.
    _below: [AtomicU64; 512],
    /// What the entry code goes by.
    pub(crate) entry: Entry,
}

/// Offsets the entry code uses.
pub(crate) const HOST_STACK: usize = offset_of!(Cpu, host_stack);
pub(crate) const SCRATCH: usize = offset_of!(Cpu, scratch);
pub(crate) const REGISTERS_END: usize = offset_of!(Cpu, registers_end);
pub(crate) const ENTRY: usize = offset_of!(Cpu, entry_at);
pub(crate) const ROOT: usize = offset_of!(Cpu, root);
const _: () = assert!(offset_of!(Cpu, tss.rsp0) % 8 == 0 && offset_of!(Tss, rsp0) == 8);
const _: () = assert!(offset_of!(Tss, io_bitmap) + 2 - 4 == Tss::BYTES as usize);

impl Cpu {
    const fn new() -> Self {
        // SAFETY: a structure of atomics, for which zeros are a value: 0 and false.
        unsafe { core::mem::zeroed() }
    }

    /// Where its GDT begins.
    pub(crate) fn gdt(&self) -> u64 {
        WINDOWS + u64::from(self.id.load(Relaxed)) * WINDOW
    }

    /// Where its LDT begins.
    pub(crate) fn ldt(&self) -> u64 {
        self.gdt() + GDT_PAGES * 4096
    }

    /// The entry that maps page `index` of its windows (GDT 0..16, LDT 16..32).
    pub(crate) fn window(&self, index: u64) -> &'static AtomicU64 {
        let first = (self.gdt() >> 12) & 0x1ff;
        let page = memory::page(memory::table_of(self.window_table.load(Relaxed)));
        &page[usize::try_from(first + index).unwrap_or(0) & 0x1ff]
    }

    /// The entry for LDT page `index`.
    pub(crate) fn ldt_window(&self, index: u64) -> &'static AtomicU64 {
        self.window(GDT_PAGES + index)
    }

    /// Its own page of descriptors.
    pub(crate) fn descriptors(&self) -> &'static Page {
        &OWN_DESCRIPTORS[index(self.id.load(Relaxed)) % MAX_CPUS].0
    }
}

/// The record of no vcpu: nothing is pending.
static NO_RECORD: AtomicU64 = AtomicU64::new(0);

/// One for each CPU that the machine may have; those that run are `online`.
#[unsafe(link_section = ".bss.entry_cpus")]
pub(crate) static CPUS: [Cpu; MAX_CPUS] = [const { Cpu::new() }; MAX_CPUS];

/// A page by itself.
#[repr(C, align(4096))]
struct OwnPage(Page);

/// Page 14 of each CPU's GDT.
#[unsafe(link_section = ".bss.entry_tables")]
static OWN_DESCRIPTORS: [OwnPage; MAX_CPUS] = [const { OwnPage([const { AtomicU64::new(0) }; 512]) }; MAX_CPUS];

/// What a GDT page shows where a guest has none.
#[unsafe(link_section = ".bss.entry_tables")]
static ZEROS: OwnPage = OwnPage([const { AtomicU64::new(0) }; 512]);

/// The entry that maps the page of zeros.
pub(crate) fn zeros_entry() -> u64 {
    image_address(&raw const ZEROS) | CONSTANT.bits()
}

/// Which entry of the interrupt stack table is whose, counted from 1 as in a gate.
pub(crate) const IST_DOUBLE_FAULT: u8 = 1;
pub(crate) const IST_MACHINE_CHECK: u8 = 2;
pub(crate) const IST_NMI: u8 = 3;
pub(crate) const IST_DEBUG: u8 = 4;

/// Maps every CPU's windows: the CPU's own page, zeros for the other GDT pages, nothing for the LDT.
pub(crate) fn map_windows(tables: &mut memory::Builder<'_>) -> Result<(), &'static str> {
    for (cpu, id) in CPUS.iter().zip(0u32..) {
        cpu.id.store(id, Relaxed);
        for page in 0..GDT_PAGES - 1 {
            tables.entry(cpu.gdt() + page * 4096, 1)?.store(zeros_entry(), Relaxed);
        }
        let own = image_address(cpu.descriptors()) | DATA.bits();
        tables.entry(cpu.gdt() + OWN_PAGE * 4096, 1)?.store(own, Relaxed);
        cpu.window_table.store(tables.entry(cpu.gdt(), 2)?.load(Relaxed), Relaxed);
    }
    Ok(())
}

/// Fills in the addresses of CPU `id`, before it may take an exception.
pub(crate) fn prepare(id: usize) -> &'static Cpu {
    let cpu = &CPUS[id];
    cpu.this.store(address_of(&raw const *cpu), Relaxed);
    cpu.entry_at.store(address_of(&raw const cpu.entry), Relaxed);
    cpu.entry.info.store(address_of(&raw const NO_RECORD), Relaxed);
    let stacks = [&cpu.double_fault[..], &cpu.machine_check, &cpu.nmi, &cpu.debug];
    for (entry, stack) in cpu.tss.ist.iter().zip(stacks) {
        entry.store(address_of(stack.as_ptr_range().end), Relaxed);
    }
    // Beyond the limit: no port is open to ring 3.
    cpu.tss.io_bitmap.store(Tss::BYTES, Relaxed);
    cpu.deadline.store(u64::MAX, Relaxed);
    cpu
}

/// This CPU's [`Cpu`].
pub(crate) fn this() -> &'static Cpu {
    let at: *const Cpu;
    // SAFETY: ring 0 runs with GS at a `Cpu` whose first word is its own address (`prepare`, `cpu::init`, and
    // SWAPGS in every entry); elements of `CPUS` live for ever and consist of atomics.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) at, options(nostack, preserves_flags, readonly, pure));
        &*at
    }
}

/// A word of this CPU's [`Cpu`] by its offset there: one instruction less than by [`this`], for what is read at every exit.
#[inline(always)]
pub(crate) fn word<const AT: usize>() -> u64 {
    const { assert!(AT.is_multiple_of(8) && AT < size_of::<Cpu>()) };
    let word: u64;
    // SAFETY: as in `this`; an aligned word of a `Cpu` is read in one piece, as all of them are atomic.
    unsafe { asm!("mov {}, gs:[{}]", out(reg) word, const AT, options(nostack, preserves_flags, readonly, pure)) };
    word
}
