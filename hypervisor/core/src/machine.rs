//! What the rules ask of a machine. `hv-machine` implements these traits over the hardware, `tests/sim` over a
//! vector of pages. They return facts and carry out orders; no rule lives behind them.

use crate::addr::{CpuId, CpuSet, ENTRIES, Frame, FrameSlot, GuestVirt, PAGE_SHIFT, low32, nth};
use core::sync::atomic::AtomicU64;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A frame's memory as words. Guests and the page walker of every CPU may touch it at the same time.
pub type Page = [AtomicU64; ENTRIES];

/// Word number `index` of a list of frames.
pub(crate) fn word<'m>(m: &'m impl Frames, list: &[FrameSlot], index: usize) -> Option<&'m AtomicU64> {
    m.page(list.get(index / ENTRIES)?.get()?).get(index % ENTRIES)
}

/// Memory by machine frame, through the direct map.
pub trait Frames {
    /// Number of the highest RAM frame, plus one. Frames at or above it, and holes below, are never passed to the other
    /// methods: the frame table knows which frames are RAM.
    fn frame_limit(&self) -> u64;
    /// The frame as words. Page-table entries are read and exchanged here.
    fn page(&self, frame: Frame) -> &Page;
    /// The word at a machine address in a frame, its low three bits left aside.
    fn word(&self, at: u64) -> &AtomicU64 {
        let page = self.page(Frame::from_u32(low32(at >> PAGE_SHIFT)));
        page.get((at / 8 % ENTRIES as u64) as usize).unwrap_or(&page[0])
    }
    /// Copies bytes out of a frame. `offset + to.len()` never passes the end of the page.
    fn read(&self, frame: Frame, offset: usize, to: &mut [u8]);
    /// Copies bytes into a frame. `offset + from.len()` never passes the end of the page.
    fn write(&self, frame: Frame, offset: usize, from: &[u8]);
    /// Fills a frame with zeros.
    fn zero(&self, frame: Frame);
    /// Copies `length` bytes from an offset in a frame to one in another, neither of which passes the end of its page. Guests
    /// may change both meanwhile; within one frame, overlapping ranges are left with any mixture of their bytes.
    fn copy(&self, from: (Frame, usize), to: (Frame, usize), length: usize);
    /// The address at which the entry code sees a frame, for [`Entry`].
    fn direct(&self, frame: Frame) -> u64;
    /// Says in the machine-to-physical table which pseudo-physical page a frame is (ABI core 2.2).
    fn set_m2p(&self, frame: Frame, pfn: u64);
    /// What belongs into slot 256 + `index` (0..16) of every guest L4: 0 or a complete entry.
    fn hole_entry(&self, index: usize) -> u64;
}

/// What a flush removes from a CPU's translation caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flush {
    /// Everything that a guest can have put there.
    All,
    /// The translation of one address.
    Page(GuestVirt),
}

/// The physical CPUs as a group.
pub trait Cpus {
    /// The CPU this code runs on.
    fn this_cpu(&self) -> CpuId;
    /// Flushes on every CPU of the set, this one included if named, and returns when all have done so. A CPU inside the
    /// rules counts as one that has only where it waits for a lock ([`crate::lock::while_waiting`]), waits in here, or
    /// has come out: until then it may be about to use what it found by walking tables (see [`crate::claim`]).
    fn flush(&self, cpus: CpuSet, what: Flush);
    /// Moves with every complete flush of this CPU, of its own and for others; not with loads of roots. What was found by
    /// walking tables holds as long as it stays (see [`crate::claim::walks::WalkCache`]).
    fn flushes(&self) -> u64;
    /// Another domain comes to this CPU: what was found so far holds no more, and [`Cpus::flushes`] moves.
    fn forget(&self);
    /// Makes a CPU leave its guest, or its sleep, soon.
    fn kick(&self, cpu: CpuId);
}

/// The first vector that messages of devices may have. Those below are exceptions and the old interrupt controllers'.
pub const FIRST_MESSAGE: u8 = 0x30;
/// How many vectors there are for messages. Those above are ring 0's own.
pub const MESSAGES: usize = 0xe0 - FIRST_MESSAGE as usize;

/// Interrupts that came in while ring 0 slept, or waited between two steps of a call.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Arrived {
    /// Bytes have arrived on the console.
    pub console: bool,
    /// Messages of devices: a bit for each vector from [`FIRST_MESSAGE`] on.
    pub messages: [u64; MESSAGES.div_ceil(64)],
}

/// What devices of domains need of ring 0, which knows none of them.
pub trait Devices {
    /// Returns what a device writes, and where, in order to interrupt this CPU with a vector: address and data. `None` if
    /// messages cannot reach this CPU.
    fn message(&self, vector: u8) -> Option<(u64, u32)>;
    /// Keeps messages from interrupting this CPU, or lets them in again. None is lost.
    fn hold_messages(&self, hold: bool);
    /// Reads 1, 2 or 4 bytes of PCI configuration by one of its ports ([`crate::trap::config`]).
    fn read_config(&self, port: u16, size: u8) -> u32;
    /// Writes them.
    fn write_config(&self, port: u16, size: u8, value: u32);
}

/// Time.
pub trait Clock {
    /// Nanoseconds since power-on: monotonic and common to all CPUs.
    fn now(&self) -> u64;
    /// Asks for a timer interrupt on this CPU at this time; `u64::MAX` asks for none. Replaces the request before.
    fn arm(&self, deadline: u64);
    /// The time-stamp counter.
    fn tsc(&self) -> u64;
    /// Frequency of the time-stamp counter in kHz.
    fn tsc_khz(&self) -> u64;
    /// The time-stamp counter's value when [`Clock::now`] was 0.
    fn tsc_origin(&self) -> u64;
    /// Seconds and nanoseconds since 1970 (UTC) at time 0.
    fn wallclock(&self) -> (u64, u32);
}

/// The machine's own console.
pub trait Console {
    /// Prints bytes as they are, as many as it takes without waiting; returns how many.
    fn put(&self, bytes: &[u8]) -> usize;
    /// Takes typed bytes that have arrived; returns how many.
    fn take(&self, to: &mut [u8]) -> usize;
    /// Copies from the log of ring 0 what was kept from position `from` on, or later if that is forgotten; returns where that
    /// was.
    fn kept(&self, from: u32, to: &mut [u8]) -> core::ops::Range<u32>;
}

/// The part of this CPU's state that belongs to the vcpu it runs and that the rules change one piece at a time. Everything
/// here acts on the CPU at once.
pub trait CpuState {
    /// Loads a page-table root of a guest, which flushes this CPU's translations.
    fn load_root(&self, root: Frame);
    /// Loads the hypervisor's own root, as [`CpuState::load_root`] does a guest's.
    fn leave_root(&self);
    /// The FS base.
    fn fs_base(&self) -> u64;
    /// Sets the FS base; canonical.
    fn set_fs_base(&self, base: u64);
    /// What the entry code of this CPU goes by.
    fn entry(&self) -> &Entry;
    /// The first word of the record that [`Entry::info`] leads to; 0 before it led anywhere.
    fn record_head(&self) -> u64;
    /// Whether the guest has RDGSBASE and its like, which the entry code needs.
    fn has_gs_instructions(&self) -> bool;
    /// The address of the page fault that has just ended a run.
    fn fault_address(&self) -> u64;
    /// The GS base the guest has active.
    fn gs_base(&self) -> u64;
    /// Sets the GS base the guest has active; canonical.
    fn set_gs_base(&self, base: u64);
    /// Loads a selector into the guest's GS and returns the base it brought; `None` if the selector does not load, in
    /// which case GS is null. The active base is preserved by the caller.
    fn load_gs(&self, selector: u16) -> Option<u64>;
    /// The selectors of DS, ES, FS, GS.
    fn data_selectors(&self) -> [u16; 4];
    /// CR0.TS.
    fn set_task_switched(&self, on: bool);
    /// The CR4 bits a guest may choose: TSD, DE, FSGSBASE, OSXSAVE. Others of `bits` are ignored.
    fn set_guest_cr4(&self, bits: u64);
    /// XCR0; the rules have checked it against CPUID.
    fn set_xcr0(&self, value: u64);
    /// Loads debug registers 0 to 3; none is the hypervisor's. Costs little where they are there.
    fn set_breakpoints(&self, addresses: [u64; 4]);
    /// Loads debug register 7; the rules have normalised the value. Costs little where it is there.
    fn set_debug_control(&self, dr7: u64);
    /// Reads debug register 6 and clears it.
    fn take_debug_status(&self) -> u64;
    /// Lets SYSENTER in, or has it fault where it stands. Costs little where nothing changes.
    fn allow_sysenter(&self, on: bool);
    /// Maps a guest's GDT frames as the first pages of this CPU's table; `None`, and what is left of 14, maps a page of zeros.
    fn load_gdt(&self, frames: &[Option<Frame>]);
    /// Sets the LDT to `entries` descriptors (0: none), with no page of it mapped yet.
    fn load_ldt(&self, entries: u32);
    /// Maps one page (0..16) of the LDT.
    fn map_ldt(&self, page: u8, frame: Frame);
    /// If a faulting address lies in this CPU's LDT window: the byte offset into the LDT.
    fn ldt_offset(&self, address: u64) -> Option<u32>;
    /// Whether a faulting address lies in this CPU's GDT window: the byte offset into the GDT.
    fn gdt_offset(&self, address: u64) -> Option<u32>;
    /// Fills the frame of an FPU's state with the state after reset.
    fn reset_fpu(&self, fpu: Frame);
    /// Loads FPU state, data segment registers and their bases. GDT and LDT must be this vcpu's already; CR0.TS is clear
    /// afterwards.
    ///
    /// # Errors
    /// All selectors (DS, ES, FS, GS), if some did not load and are null now.
    fn switch_in(&self, segments: &Segments, fpu: Frame) -> Result<(), [u16; 4]>;
    /// Saves what [`CpuState::switch_in`] loads. CR0.TS is clear afterwards.
    fn switch_out(&self, segments: &mut Segments, fpu: Frame);
    /// CPUID as the hardware answers it: EAX, EBX, ECX, EDX.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// TSC_AUX, where RDTSCP and RDPID exist.
    fn set_tsc_aux(&self, value: u32);
}

/// All of it: what a whole hypervisor needs.
pub trait Machine: Frames + Cpus + Clock + Console + Devices + CpuState + Sync + 'static {
    /// The vcpu with these registers is about to run: its exits are kept there, and what other CPUs have asked for is done.
    /// Afterwards a CPU that wants this one to flush interrupts its guest.
    fn begin(&self, registers: &mut Registers);
    /// Lets interrupts that wait come in, and does what other CPUs have asked this one for; returns those that somebody waits
    /// for. No lock is held, and nothing found by walking tables is used afterwards.
    fn let_in(&self) -> Arrived;
}

/// The general registers of a vcpu in the order ring 0's entry code pushes them, which is the ABI's `user_regs` order
/// (ABI core 10.3), so that contexts copy straight. The CPU pushes the last five words itself, ending at a 16-byte boundary.
#[repr(C, align(16))]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Registers {
    /// Keeps the end of the structure at a 16-byte boundary; entry code may use it.
    pub scratch: u64,
    /// R15.
    pub r15: u64,
    /// R14.
    pub r14: u64,
    /// R13.
    pub r13: u64,
    /// R12.
    pub r12: u64,
    /// RBP.
    pub rbp: u64,
    /// RBX.
    pub rbx: u64,
    /// R11: after SYSCALL the flags of the caller.
    pub r11: u64,
    /// R10: fourth hypercall argument.
    pub r10: u64,
    /// R9.
    pub r9: u64,
    /// R8: fifth hypercall argument.
    pub r8: u64,
    /// RAX: hypercall number and result.
    pub rax: u64,
    /// RCX: after SYSCALL the return address.
    pub rcx: u64,
    /// RDX: third hypercall argument.
    pub rdx: u64,
    /// RSI: second hypercall argument.
    pub rsi: u64,
    /// RDI: first hypercall argument.
    pub rdi: u64,
    /// The CPU's error code for the last exit (low half); entry code may keep the vector in the high half.
    pub error: u64,
    /// RIP.
    pub rip: u64,
    /// CS: the selector, upper bits zero.
    pub cs: u64,
    /// RFLAGS. IF is always set, IOPL always 0 (P12).
    pub rflags: u64,
    /// RSP.
    pub rsp: u64,
    /// SS: the selector, upper bits zero.
    pub ss: u64,
}
const _: () = assert!(size_of::<Registers>() == 176);

impl Registers {
    /// A general register by the number instructions use: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    #[must_use]
    pub fn general(&self, number: u8) -> u64 {
        self.word(Self::place(number))
    }

    /// Which word of the structure a general register is.
    pub(crate) fn place(number: u8) -> usize {
        const PLACES: [u8; 16] = [11, 12, 13, 6, 20, 5, 14, 15, 10, 9, 8, 7, 4, 3, 2, 1];
        nth(&PLACES, number & 15).copied().unwrap_or(0).into()
    }

    /// A word of the structure; 0 beyond its end.
    #[inline(always)]
    pub(crate) fn word(&self, place: usize) -> u64 {
        let words: &[u64; size_of::<Self>() / 8] = zerocopy::transmute_ref!(self);
        words.get(place).copied().unwrap_or(0)
    }

    /// Changes a word of the structure.
    #[inline(always)]
    pub(crate) fn set_word(&mut self, place: usize, value: u64) {
        let words: &mut [u64; size_of::<Self>() / 8] = zerocopy::transmute_mut!(self);
        if let Some(word) = words.get_mut(place) {
            *word = value;
        }
    }

    /// The same, to change it.
    pub fn general_mut(&mut self, number: u8) -> &mut u64 {
        match number & 15 {
            0 => &mut self.rax,
            1 => &mut self.rcx,
            2 => &mut self.rdx,
            3 => &mut self.rbx,
            4 => &mut self.rsp,
            5 => &mut self.rbp,
            6 => &mut self.rsi,
            7 => &mut self.rdi,
            8 => &mut self.r8,
            9 => &mut self.r9,
            10 => &mut self.r10,
            11 => &mut self.r11,
            12 => &mut self.r12,
            13 => &mut self.r13,
            14 => &mut self.r14,
            _ => &mut self.r15,
        }
    }
}

impl Registers {
    /// All registers 0.
    pub const ZERO: Self = zerocopy::transmute!([0u64; size_of::<Self>() / 8]);
}

/// What a vcpu owns of a CPU besides [`Registers`] and what is loaded through [`CpuState`]; saved and loaded by `hv-machine`.
#[derive(Clone, Copy, Default, Debug)]
pub struct Segments {
    /// DS, ES, FS, GS selectors.
    pub selectors: [u16; 4],
    /// FS base.
    pub fs_base: u64,
    /// The GS base that was active.
    pub gs_base: u64,
    /// The GS base of the mode that was not, see [`Entry::other_gs`].
    pub other_gs: u64,
}

with_new! {
/// What the entry code of a CPU needs to take a system call or a page fault of user code to the guest's kernel, and to take it
/// back, without asking the rules. The rules say before the guest runs what it may do ([`crate::lean::arm()`]); what it has
/// done is in here afterwards ([`crate::lean::left`]).
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Entry {
    /// A [`mode`].
    pub mode: AtomicU64 = AtomicU64::new(0),
    /// The GS base of the mode that does not run: of user mode while the guest's kernel does, and the other way round.
    /// Canonical.
    pub other_gs: AtomicU64 = AtomicU64::new(0),
    /// CR3 of kernel mode.
    pub kernel_cr3: AtomicU64 = AtomicU64::new(0),
    /// CR3 of user mode.
    pub user_cr3: AtomicU64 = AtomicU64::new(0),
    /// Where ring 0 sees the vcpu_info record.
    pub info: AtomicU64 = AtomicU64::new(0),
    /// Where ring 0 sees the frame that a system call pushes.
    pub frame: AtomicU64 = AtomicU64::new(0),
    /// Where the guest sees it.
    pub frame_sp: AtomicU64 = AtomicU64::new(0),
    /// Where ring 0 sees the frame that the way back to user code pops, where Linux leaves it.
    pub back: AtomicU64 = AtomicU64::new(0),
    /// Where the guest sees it.
    pub back_sp: AtomicU64 = AtomicU64::new(0),
    /// The guest's handler of system calls; canonical.
    pub syscall: AtomicU64 = AtomicU64::new(0),
    /// The guest's handler of page faults; canonical.
    pub fault: AtomicU64 = AtomicU64::new(0),
    /// The guest's CR2.
    pub cr2: AtomicU64 = AtomicU64::new(0),
    /// Entries from user code that needed no rule, not counted yet.
    pub from_user: AtomicU64 = AtomicU64::new(0),
    /// Entries that needed a rule and took a fast path, not counted yet.
    pub ruled: AtomicU64 = AtomicU64::new(0),
    /// RAX for a moment.
    pub rax: AtomicU64 = AtomicU64::new(0),
    /// RDX for a moment.
    pub rdx: AtomicU64 = AtomicU64::new(0),
}
}

/// Values of [`Entry::mode`].
pub mod mode {
    /// Everything goes to the rules.
    pub const SLOW: u64 = 0;
    /// User code runs, and the fields hold.
    pub const USER: u64 = 1;
    /// The guest's kernel runs, and the fields hold.
    pub const KERNEL: u64 = 2;
    /// The guest's kernel runs and has no root for user code: everything goes to the rules, which may take fast paths.
    pub const ROOTLESS: u64 = 3;
}

/// Which entry into ring 0 it was: the high half of [`Registers::error`], where it is no vector.
pub mod entry {
    /// SYSCALL.
    pub const SYSCALL: u32 = 0x200;
    /// SYSCALL from compatibility code.
    pub const SYSCALL32: u32 = 0x201;
    /// SYSENTER.
    pub const SYSENTER: u32 = 0x202;
    /// Added to the vector of a fault at the return to the guest.
    pub const FAILED_RETURN: u32 = 0x100;
}

impl Segments {
    /// Null segments.
    pub const ZERO: Self = Self { selectors: [0; 4], fs_base: 0, gs_base: 0, other_gs: 0 };
}

/// Why `run` came back from a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// SYSCALL from 64-bit code: a hypercall or a system call. RCX and R11 hold what the CPU left there.
    Syscall,
    /// SYSCALL from compatibility code (AMD).
    Syscall32,
    /// SYSENTER from compatibility code (Intel); RIP and RSP of the caller are lost.
    Sysenter,
    /// An exception or INT n: vector, error code (0 if none) and CR2 for a page fault.
    Fault {
        /// 0..=31, or 0x80 for the system-call gate.
        vector: u8,
        /// As the CPU pushed it.
        error: u32,
        /// CR2, only for vector 14.
        address: u64,
    },
    /// The return to the guest itself faulted (bad CS, SS or RIP): registers are as they were.
    ReturnFault {
        /// 11, 12, 13 or 14.
        vector: u8,
        /// As the CPU pushed it.
        error: u32,
        /// CR2, only for vector 14: where the descriptor of CS or SS lies, in a table's window.
        address: u64,
    },
    /// A device or another CPU wanted attention; it has been acknowledged.
    Interrupt(Interrupt),
}

/// Which interrupt ended a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interrupt {
    /// The deadline given to [`Clock::arm`] passed.
    Timer,
    /// [`Cpus::kick`].
    Kick,
    /// Bytes arrived on the console.
    Console,
    /// A device sent a message with this vector.
    Message(u8),
    /// None of these, or an NMI.
    Other,
}
