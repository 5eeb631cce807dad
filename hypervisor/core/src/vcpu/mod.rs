//! A vcpu: what other CPUs may look at, and what belongs to the CPU that runs it.
//!
//! Touches: its registers and tables, and through [`context`] and [`descriptors`] the uses of frames it stands for.
//! Never touches: who runs next, which is `sched`'s; which trap goes where, which is `trap`'s.

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
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64};
use debug::{DR6_CLEAR, DR7_CLEAR};
use hypercall_abi::event::VIRQS;
use hypercall_abi::vcpu::{Runstate, RunstateInfo};

/// Descriptors an LDT may have.
pub const MAX_LDT: u32 = 8192;

/// A callback or trap handler of the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Handler {
    /// Where; 0 if not registered.
    pub address: u64,
    /// Whether it starts with upcalls masked.
    pub masks_events: bool,
}

/// The callbacks a vcpu registers for itself (ABI core 3.4).
#[derive(Clone, Copy, Debug, Default)]
pub struct Callbacks {
    /// Event upcall.
    pub event: Handler,
    /// Segment registers that did not load.
    pub failsafe: Handler,
    /// SYSCALL from 64-bit user code.
    pub syscall: Handler,
    /// SYSCALL from compatibility code.
    pub syscall32: Handler,
    /// SYSENTER from compatibility code.
    pub sysenter: Handler,
}

impl Callbacks {
    /// No callback is registered.
    const NONE: Self = {
        let none = Handler { address: 0, masks_events: false };
        Self { event: none, failsafe: none, syscall: none, syscall32: none, sysenter: none }
    };
}

/// An exception to be delivered before the guest runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trap {
    /// Its vector.
    pub vector: u8,
    /// Its error code, for the vectors that have one.
    pub error: Option<u32>,
}

with_new! {
    /// A vcpu's registers and tables. Whoever holds the lock of [`Vcpu::state`] owns the vcpu: the CPU that runs it for as long
    /// as it does, the toolstack while it is stopped.
    #[derive(Clone, Copy, Debug)]
    pub struct VcpuState {
        /// General registers.
        pub regs: Registers = Registers::ZERO,
        /// Segment registers and bases while it is off the CPU.
        pub segments: Segments = Segments::ZERO,
        /// Whether the guest kernel runs, or guest user code.
        pub kernel_mode: bool = true,
        /// Root of kernel mode.
        pub kernel_root: Option<Frame> = None,
        /// Root of user mode.
        pub user_root: Option<Frame> = None,
        /// Stack a bounce from user mode starts with.
        pub kernel_sp: u64 = 0,
        /// Its segment, kept for the guest only.
        pub kernel_ss: u64 = 0,
        /// Handlers.
        pub callbacks: Callbacks = Callbacks::NONE,
        /// Frame of 256 [`hypercall_abi::callback::TrapInfo`].
        pub traps: Option<Frame> = None,
        /// Frame of the extended state.
        pub fpu: Option<Frame> = None,
        /// The FPU state is not the guest's yet: `fpu` is to be filled with the reset state.
        pub fpu_fresh: bool = true,
        /// The guest's CR0.TS.
        pub task_switched: bool = false,
        /// The guest's CR2.
        pub cr2: u64 = 0,
        /// The guest's CR4 as it reads it.
        pub cr4: u64 = 0,
        /// XCR0.
        pub xcr0: u64 = 1,
        /// TSC_AUX.
        pub tsc_aux: u32 = 0,
        /// Virtual I/O privilege level.
        pub iopl: u8 = 0,
        /// Address of the I/O bitmap and the ports it covers.
        pub iobitmap: (GuestVirt, u32) = (GuestVirt(0), 0),
        /// Frames of the global descriptor table.
        pub gdt: [Option<Frame>; 14] = [None; 14],
        /// Descriptors in it.
        pub gdt_entries: u32 = 0,
        /// Address of the local descriptor table.
        pub ldt_base: GuestVirt = GuestVirt(0),
        /// Descriptors in it.
        pub ldt_entries: u32 = 0,
        /// Pages of it that are mapped.
        pub ldt_mapped: [Option<Frame>; 16] = [None; 16],
        /// Debug registers.
        pub debug: [u64; 8] = [0, 0, 0, 0, 0, 0, DR6_CLEAR, DR7_CLEAR],
        /// An exception to be delivered.
        pub trap: Option<Trap> = None,
        /// A non-maskable interrupt waits.
        pub nmi_pending: bool = false,
        /// One is being handled.
        pub nmi_masked: bool = false,
        /// A hypercall that is not finished: it goes on before the guest does (P8).
        pub call: Option<Call> = None,
        /// How time was spent.
        pub runstate: RunstateInfo = RunstateInfo { state: Runstate::Offline.code(), pad: 0, state_entry_time: 0, time: [0; 4] },
        /// Where the guest wants to read it.
        pub runstate_area: Option<GuestVirt> = None,
        /// Where the guest wants a second copy of the time.
        pub time_area: Option<GuestVirt> = None,
        /// That copy is still to be written.
        pub time_stale: bool = false,
        /// The last write to a page table that took the fast path.
        pub last_write: Shape = Shape::NONE,
        /// The areas wait for kernel mode to be written.
        pub areas_stale: bool = false,
        /// The context has been set.
        pub initialised: bool = false,
    }
}

impl VcpuState {
    /// The frames of its GDT.
    #[must_use]
    pub fn gdt_pages(&self) -> &[Option<Frame>] {
        let pages = index(self.gdt_entries.div_ceil(low32(descriptors::PER_FRAME)));
        self.gdt.get(..pages).unwrap_or(&self.gdt)
    }

    /// Has an exception delivered before the guest runs on.
    pub fn raise(&mut self, vector: u8, error: Option<u32>) {
        self.trap = Some(Trap { vector, error });
    }

    /// The root that is or will be loaded.
    #[must_use]
    pub fn root(&self) -> Option<Frame> {
        if self.kernel_mode { self.kernel_root } else { self.user_root }
    }
}

/// Where a vcpu is in the scheduler's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Not to be run: down, paused, or of a domain that has ended.
    Off,
    /// Sleeps until an event.
    Blocked,
    /// In the queue of a CPU.
    Queued,
    /// On this CPU. That one alone may put it back into a queue: had the vcpu slept and been woken meanwhile, it may be on
    /// another already.
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

/// What a vcpu polls for (ABI core 5.4).
pub mod polling {
    /// Nothing.
    pub const NO: u32 = 0;
    /// Several ports; other values name the one.
    pub const MANY: u32 = u32::MAX;
}

renewable! {
    /// One vcpu of the machine's fixed set.
    pub struct Vcpu {
        /// Slot of its domain plus one; 0 if free.
        pub(crate) domain: AtomicU16 = AtomicU16::new(0),
        /// Its number in the domain.
        pub(crate) number: AtomicU32 = AtomicU32::new(0),
        /// Its index into the world's vcpus.
        pub(crate) index: AtomicU16 = AtomicU16::new(0),
        /// The CPU it ran on last, which keeps its deadlines.
        cpu: AtomicU32 = AtomicU32::new(0),
        /// A [`Place`].
        pub(crate) place: AtomicU32 = AtomicU32::new(Place::Off.word()),
        /// Brought up by the guest.
        pub(crate) online: AtomicBool = AtomicBool::new(false),
        /// A [`polling`] value.
        pub(crate) polling: AtomicU32 = AtomicU32::new(polling::NO),
        /// Machine address of its vcpu_info record, 0 if it has none.
        pub(crate) info: AtomicU64 = AtomicU64::new(0),
        /// Port of each virtual interrupt, 0 if not bound.
        pub(crate) virqs: [AtomicU16; index(VIRQS)] = [const { AtomicU16::new(0) }; index(VIRQS)],
        /// One-shot deadline, `u64::MAX` if none.
        pub(crate) deadline: AtomicU64 = AtomicU64::new(u64::MAX),
        /// Period of the tick, 0 if none.
        pub(crate) period: AtomicU64 = AtomicU64::new(0),
        /// Next tick.
        pub(crate) next_tick: AtomicU64 = AtomicU64::new(0),
        /// Deadline of a poll.
        pub(crate) poll_deadline: AtomicU64 = AtomicU64::new(u64::MAX),
        /// Another vcpu sent an NMI.
        pub(crate) nmi: AtomicBool = AtomicBool::new(false),
        /// Its registers and tables.
        pub state: Owned<VcpuState> = Owned::new(VcpuState::new()),
    }
}

impl Vcpu {
    /// Its number in its domain.
    #[must_use]
    pub fn number(&self) -> VcpuId {
        VcpuId(self.number.load(Relaxed))
    }

    /// The frame of its vcpu_info record, and where in it the record begins.
    #[must_use]
    pub fn record(&self) -> Option<(Frame, usize)> {
        let at = self.info.load(Acquire);
        Some((Frame::containing(at).filter(|_| at != 0)?, GuestVirt(at).offset()))
    }

    /// Where it is.
    #[must_use]
    pub fn place(&self) -> Place {
        between();
        Place::of_word(self.place.load(SeqCst))
    }

    /// Moves it from one place to another; false if it was not there.
    pub fn moves(&self, from: Place, to: Place) -> bool {
        between();
        self.place.compare_exchange(from.word(), to.word(), SeqCst, SeqCst).is_ok()
    }

    /// Moves it into a queue, whoever has it: a fault that is planted.
    #[cfg(feature = "planted-fault")]
    pub(crate) fn seizes(&self) -> bool {
        matches!(self.place(), Place::Running(_)) && self.moves(self.place(), Place::Queued)
    }

    /// Moves it into a queue, whoever has it: not in an image.
    #[cfg(not(feature = "planted-fault"))]
    pub(crate) const fn seizes(&self) -> bool {
        false
    }

    /// Its index into the world's vcpus.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index.load(Relaxed)
    }

    /// The CPU it ran on last, which keeps its deadlines.
    #[must_use]
    pub fn last_cpu(&self) -> CpuId {
        CpuId(self.cpu.load(Relaxed))
    }

    /// Notes that it runs on another CPU from now on.
    pub(crate) fn set_last_cpu(&self, cpu: CpuId) {
        self.cpu.store(cpu.0, Relaxed);
    }

    /// The earliest of its deadlines, ticks apart; `u64::MAX` if it has none.
    #[must_use]
    pub fn earliest(&self) -> u64 {
        self.deadline.load(Relaxed).min(self.poll_deadline.load(Relaxed))
    }
}
