//! A vcpu: the part that other CPUs may read, and the state that belongs to the CPU that runs it.
//!
//! Touches: its registers and tables, and through [`context`] and [`descriptors`] the uses of frames that it holds.
//! Never touches: which vcpu runs next (`sched` decides), and which trap goes where (`trap` decides).

pub mod context;
pub mod debug;
pub mod descriptors;
pub(crate) mod life;
pub mod mode;
pub mod ops;
pub mod runstate;

use crate::addr::CpuId;
use crate::fault::between;
use crate::lean::shape::Shape;
use crate::lock::Owned;
use crate::machine::{Registers, Segments};
use crate::prelude::*;
use crate::sched::budget::Budget;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64};
use debug::{DR6_CLEAR, DR7_CLEAR};
use hypercall_abi::event::VIRQS;
use hypercall_abi::vcpu::{Runstate, RunstateInfo};

/// Most descriptors that an LDT may have.
pub const MAX_LDT: u32 = 8192;

/// What a turn costs others beside its own time, in nanoseconds: without it, very short turns would cost a vcpu nothing.
const SWITCH: u64 = 2_000;

/// A callback or trap handler of the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Handler {
    /// Its address; 0 if not registered.
    pub address: u64,
    /// Whether the handler starts with upcalls masked.
    pub masks_events: bool,
}

/// The callbacks that a vcpu has registered (ABI core 3.4).
#[derive(Clone, Copy, Debug, Default)]
pub struct Callbacks {
    /// For event upcalls.
    pub event: Handler,
    /// For segment registers that could not be loaded.
    pub failsafe: Handler,
    /// For SYSCALL from 64-bit user code.
    pub syscall: Handler,
    /// For SYSCALL from compatibility code.
    pub syscall32: Handler,
    /// For SYSENTER from compatibility code.
    pub sysenter: Handler,
}

impl Callbacks {
    /// No callback is registered.
    const NONE: Self = {
        let none = Handler { address: 0, masks_events: false };
        Self { event: none, failsafe: none, syscall: none, syscall32: none, sysenter: none }
    };
}

/// An exception to be delivered before the guest continues.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trap {
    /// Its vector.
    pub vector: u8,
    /// Its error code, for the vectors that have one.
    pub error: Option<u32>,
}

with_new! {
    /// A vcpu's registers and tables. The holder of the lock of [`Vcpu::state`] owns the vcpu: this is the CPU that
    /// runs it, as long as it runs, or the toolstack while it is stopped.
    #[derive(Clone, Copy, Debug)]
    pub struct VcpuState {
        /// General registers.
        pub regs: Registers = Registers::ZERO,
        /// Segment registers and bases, while the vcpu is not on a CPU.
        pub segments: Segments = Segments::ZERO,
        /// Whether the guest's kernel runs; otherwise guest user code.
        pub kernel_mode: bool = true,
        /// Root table of kernel mode.
        pub kernel_root: Option<Frame> = None,
        /// Root table of user mode.
        pub user_root: Option<Frame> = None,
        /// Stack pointer with which a trap from user mode starts.
        pub kernel_sp: u64 = 0,
        /// Stack segment for `kernel_sp`; only the guest uses it.
        pub kernel_ss: u64 = 0,
        /// Registered callbacks.
        pub callbacks: Callbacks = Callbacks::NONE,
        /// Frame that holds the trap table: 256 [`hypercall_abi::callback::TrapInfo`].
        pub traps: Option<Frame> = None,
        /// Frame that holds the FPU and other extended state.
        pub fpu: Option<Frame> = None,
        /// Whether `fpu` does not hold state yet: the vcpu starts with the reset state.
        pub fpu_fresh: bool = true,
        /// The guest's CR0.TS.
        pub task_switched: bool = false,
        /// The guest's CR2.
        pub cr2: u64 = 0,
        /// The guest's CR4, as the guest reads it.
        pub cr4: u64 = 0,
        /// XCR0.
        pub xcr0: u64 = 1,
        /// TSC_AUX.
        pub tsc_aux: u32 = 0,
        /// The guest's virtual I/O privilege level.
        pub iopl: u8 = 0,
        /// Address of the guest's I/O bitmap, and the number of ports it covers.
        pub iobitmap: (GuestVirt, u32) = (GuestVirt(0), 0),
        /// Frames of the global descriptor table.
        pub gdt: [Option<Frame>; 14] = [None; 14],
        /// Number of descriptors in the GDT.
        pub gdt_entries: u32 = 0,
        /// Address of the local descriptor table.
        pub ldt_base: GuestVirt = GuestVirt(0),
        /// Number of descriptors in the LDT.
        pub ldt_entries: u32 = 0,
        /// Pages of the LDT that are mapped in the CPU's window.
        pub ldt_mapped: [Option<Frame>; 16] = [None; 16],
        /// Debug registers.
        pub debug: [u64; 8] = [0, 0, 0, 0, 0, 0, DR6_CLEAR, DR7_CLEAR],
        /// An exception to be delivered before the guest continues.
        pub trap: Option<Trap> = None,
        /// Whether a non-maskable interrupt is pending.
        pub nmi_pending: bool = false,
        /// Whether a non-maskable interrupt is being handled.
        pub nmi_masked: bool = false,
        /// A hypercall that is not finished. It continues before the guest does (P8).
        pub call: Option<Call> = None,
        /// How much time the vcpu has spent in each runstate.
        pub runstate: RunstateInfo = RunstateInfo { state: Runstate::Offline.code(), pad: 0, state_entry_time: 0, time: [0; 4] },
        /// Where the guest wants a copy of `runstate`.
        pub runstate_area: Option<GuestVirt> = None,
        /// Where the guest wants a second copy of the time record.
        pub time_area: Option<GuestVirt> = None,
        /// Whether the copy at `time_area` is still to be written.
        pub time_stale: bool = false,
        /// The last write to a page table that was recognized for the fast path.
        pub last_write: Shape = Shape::NONE,
        /// Whether the areas are still to be written, which needs kernel mode.
        pub areas_stale: bool = false,
        /// Whether the context has been set.
        pub initialised: bool = false,
    }
}

impl VcpuState {
    /// The frames of the vcpu's GDT.
    #[must_use]
    pub fn gdt_pages(&self) -> &[Option<Frame>] {
        let pages = index(self.gdt_entries.div_ceil(low32(descriptors::PER_FRAME)));
        self.gdt.get(..pages).unwrap_or(&self.gdt)
    }

    /// Makes an exception pending, to be delivered before the guest continues.
    pub fn raise(&mut self, vector: u8, error: Option<u32>) {
        self.trap = Some(Trap { vector, error });
    }

    /// The root table for the current mode.
    #[must_use]
    pub fn root(&self) -> Option<Frame> {
        if self.kernel_mode { self.kernel_root } else { self.user_root }
    }
}

/// Where a vcpu is, for the scheduler.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// It may not run: it is down or paused, or its domain has ended.
    Off,
    /// It sleeps until an event.
    Blocked,
    /// It is in the queue of a CPU.
    Queued,
    /// It runs on this CPU. Only this CPU may put it back into a queue: if the vcpu has slept and been woken in
    /// between, it may run on another CPU already.
    Running(CpuId),
}

impl Place {
    pub(crate) const fn word(self) -> u32 {
        match self {
            Self::Off => 0,
            Self::Blocked => 1,
            Self::Queued => 2,
            Self::Running(cpu) => 3 + cpu.0,
        }
    }

    const fn of_word(word: u32) -> Self {
        match word {
            0 => Self::Off,
            1 => Self::Blocked,
            2 => Self::Queued,
            running => Self::Running(CpuId(running - 3)),
        }
    }
}

/// Values for the ports that a vcpu polls (ABI core 5.4). Other values are the number of the only port.
pub mod polling {
    /// It does not poll.
    pub const NO: u32 = 0;
    /// It polls several ports.
    pub const MANY: u32 = u32::MAX;
    /// No port, but any event: it waits, see `TenonOp::Wait`.
    pub const ANY: u32 = u32::MAX - 1;
}

renewable! {
    /// One vcpu of the machine's fixed set.
    pub struct Vcpu {
        /// Slot of the vcpu's domain plus one; 0 if the vcpu is free.
        pub(crate) domain: AtomicU16 = AtomicU16::new(0),
        /// The vcpu's number in its domain.
        pub(crate) number: AtomicU32 = AtomicU32::new(0),
        /// The vcpu's index into the world's vcpus.
        pub(crate) index: AtomicU16 = AtomicU16::new(0),
        /// The CPU on which the vcpu last ran, which keeps its deadlines.
        cpu: AtomicU32 = AtomicU32::new(0),
        /// A [`Place`].
        pub(crate) place: AtomicU32 = AtomicU32::new(Place::Off.word()),
        /// Whether the guest has brought the vcpu up.
        pub(crate) online: AtomicBool = AtomicBool::new(false),
        /// Its domain has devices, and others wait for what it does.
        pub(crate) serves: AtomicBool = AtomicBool::new(false),
        /// How long the vcpu had run of its slice when it left its CPU for a boosted one, in nanoseconds.
        pub(crate) used: AtomicU64 = AtomicU64::new(0),
        /// The vcpu's [`Budget::GUEST`].
        pub(crate) budget: AtomicU64 = AtomicU64::new(0),
        /// A [`polling`] value.
        pub(crate) polling: AtomicU32 = AtomicU32::new(polling::NO),
        /// Machine address of its vcpu_info record; 0 if it has none.
        pub(crate) info: AtomicU64 = AtomicU64::new(0),
        /// Port of each virtual interrupt; 0 if not bound.
        pub(crate) virqs: [AtomicU16; index(VIRQS)] = [const { AtomicU16::new(0) }; index(VIRQS)],
        /// Deadline of the one-shot timer; `u64::MAX` if not set.
        pub(crate) deadline: AtomicU64 = AtomicU64::new(u64::MAX),
        /// Period of the periodic timer in nanoseconds; 0 if off.
        pub(crate) period: AtomicU64 = AtomicU64::new(0),
        /// When the periodic timer fires next.
        pub(crate) next_tick: AtomicU64 = AtomicU64::new(0),
        /// Deadline of a poll; `u64::MAX` if none.
        pub(crate) poll_deadline: AtomicU64 = AtomicU64::new(u64::MAX),
        /// Whether another vcpu sent an NMI.
        pub(crate) nmi: AtomicBool = AtomicBool::new(false),
        /// The vcpu's registers and tables.
        pub state: Owned<VcpuState> = Owned::new(VcpuState::new()),
    }
}

impl Vcpu {
    /// The vcpu's number in its domain.
    #[must_use]
    pub fn number(&self) -> VcpuId {
        VcpuId(self.number.load(Relaxed))
    }

    /// The frame that holds the vcpu_info record, and the record's offset in the frame.
    #[must_use]
    pub fn record(&self) -> Option<(Frame, usize)> {
        let at = self.info.load(Acquire);
        Some((Frame::containing(at).filter(|_| at != 0)?, GuestVirt(at).offset()))
    }

    /// Where the vcpu is.
    #[must_use]
    pub fn place(&self) -> Place {
        between();
        Place::of_word(self.place.load(SeqCst))
    }

    /// Moves the vcpu from one place to another; returns false if it was not in the first place.
    pub fn moves(&self, from: Place, to: Place) -> bool {
        between();
        self.place.compare_exchange(from.word(), to.word(), SeqCst, SeqCst).is_ok()
    }

    /// Moves the vcpu into a queue even if another CPU runs it: a planted fault.
    #[cfg(feature = "planted-fault")]
    pub(crate) fn seizes(&self) -> bool {
        matches!(self.place(), Place::Running(_)) && self.moves(self.place(), Place::Queued)
    }

    /// Does nothing: images do not have the planted fault.
    #[cfg(not(feature = "planted-fault"))]
    pub(crate) const fn seizes(&self) -> bool {
        false
    }

    /// The vcpu's index into the world's vcpus.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index.load(Relaxed)
    }

    /// The CPU on which the vcpu last ran, which keeps its deadlines.
    #[must_use]
    pub fn last_cpu(&self) -> CpuId {
        CpuId(self.cpu.load(Relaxed))
    }

    /// Records that the vcpu runs on another CPU from now on.
    pub(crate) fn set_last_cpu(&self, cpu: CpuId) {
        self.cpu.store(cpu.0, Relaxed);
    }

    /// How long the vcpu may run boosted from now on, in nanoseconds; 0 if it has used much of the CPU.
    pub(crate) fn boost_left(&self, now: u64) -> u64 {
        Budget::GUEST.left(&self.budget, now)
    }

    /// Whether the vcpu is boosted when it is woken. A vcpu that has used up its budget is not until half of it is there again:
    /// so one that uses more than its share all the time is never boosted.
    pub(crate) fn may_be_boosted(&self, now: u64) -> bool {
        Budget::GUEST.is_half_full(&self.budget, now)
    }

    /// Charges the vcpu for a turn of `ran` nanoseconds, which has just ended on this CPU. It owes nothing beyond its budget.
    pub(crate) fn charge(&self, now: u64, ran: u64) {
        Budget::GUEST.use_up(&self.budget, now, ran.saturating_add(SWITCH));
    }

    /// Whether any event wakes the vcpu, a masked one too (`TenonOp::Wait`).
    pub(crate) fn wakes_on_any_event(&self) -> bool {
        self.polling.load(SeqCst) == polling::ANY
    }

    /// The earliest of the vcpu's deadlines, without the periodic timer; `u64::MAX` if it has none.
    #[must_use]
    pub fn earliest(&self) -> u64 {
        self.deadline.load(Relaxed).min(self.poll_deadline.load(Relaxed))
    }
}
