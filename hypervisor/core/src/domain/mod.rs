//! Domains: what they are made of, how they begin and end.
//!
//! Touches: the fixed tables of domains and vcpus, and frames through `frame` and `paging`.
//! Never touches: a page-table entry itself, an event bit.

pub mod crash;
mod journal;
pub mod life;
pub mod ops;
mod refusals;
pub mod visit;

pub(crate) use journal::{Journal, Shown};

use crate::addr::FrameSlot;
use crate::lock::{Leaf, Owned};
use crate::paging::Space;
use crate::prelude::*;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64};
use hypercall_abi::tenon::{CrashReport, Refusals};

/// Vcpus a domain may have: those with a record in the shared_info page.
pub const MAX_DOMAIN_VCPUS: usize = hypercall_abi::shared::LEGACY_VCPUS;
/// Frames a domain's ports take at most.
pub const PORT_FRAMES: usize = index(hypercall_abi::event::PORTS) / crate::addr::ENTRIES;

/// A domain to be.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// What it may do.
    pub powers: Powers,
    /// How many vcpus it has.
    pub vcpus: u32,
    /// How many frames it may have.
    pub max_pages: u64,
    /// Its UUID.
    pub handle: [u8; 16],
}

/// Where a domain is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Life {
    /// The slot is free.
    Free = 0,
    /// It exists.
    Alive = 1,
    /// It is being unmade and may not be used any more.
    Dying = 2,
}

impl Life {
    const fn byte(self) -> u8 {
        self as u8
    }

    const fn of_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Alive,
            2 => Self::Dying,
            _ => Self::Free,
        }
    }
}

bitflags::bitflags! {
    /// What a domain may do to others and to the machine (P9): given by name when it is made.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Powers: u8 {
        /// Make, unmake and look into other domains.
        const CONTROL = 1;
        /// Write to the machine's console.
        const CONSOLE_WRITE = 2;
        /// Read from the machine's console and take its interrupt.
        const CONSOLE_READ = 4;
        /// Turn the machine off by shutting down, and ask for its memory map and its own interrupts.
        const MACHINE = 8;
    }
}

renewable! {
    /// One domain of the machine's fixed set.
    pub struct Domain {
        id: AtomicU16 = AtomicU16::new(0),
        life: AtomicU8 = AtomicU8::new(Life::Free.byte()),
        powers: AtomicU8 = AtomicU8::new(0),
        /// Its page tables and frames.
        pub space: Space = Space::new(),
        /// Frames it may own ([`crate::frame::FrameTable::owned`]).
        pub max_pages: AtomicU64 = AtomicU64::new(0),
        shared_info: FrameSlot = FrameSlot::new(),
        /// Frames of its ports.
        pub(crate) port_frames: [FrameSlot; PORT_FRAMES] = [const { FrameSlot::new() }; PORT_FRAMES],
        /// Index into the world's vcpus plus one, 0 where there is none.
        pub(crate) vcpus: [AtomicU16; MAX_DOMAIN_VCPUS] = [const { AtomicU16::new(0) }; MAX_DOMAIN_VCPUS],
        /// The toolstack keeps it from running.
        pub(crate) paused: AtomicBool = AtomicBool::new(true),
        /// When it began to die: visits that began before may still be about it.
        pub(crate) dies: AtomicU64 = AtomicU64::new(0),
        /// Owned by the CPU that is at work on its beginning or its end.
        pub(crate) work: Owned<()> = Owned::new(()),
        /// 0, or its shutdown reason plus one.
        shutdown: AtomicU32 = AtomicU32::new(0),
        /// Bits of `vm_assist`.
        pub(crate) assists: AtomicU64 = AtomicU64::new(0),
        /// Nanoseconds its vcpus have run.
        pub(crate) cpu_time: AtomicU64 = AtomicU64::new(0),
        /// Entries from guest user mode, and entries that needed a rule, since it was made.
        pub(crate) entries: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2],
        /// Vcpus that poll, a bit each. Only the vcpu itself changes its bit: when it begins, and when it runs again.
        pub(crate) pollers: AtomicU32 = AtomicU32::new(0),
        /// Its grants.
        pub grants: crate::grant::Grants = crate::grant::Grants::new(),
        /// What it says, and what is said of it.
        pub(crate) journal: Leaf<Journal> = Leaf::new(Journal::new()),
        /// UUID, crash report, refusals.
        pub(crate) notes: Leaf<ToolstackNotes> = Leaf::new(ToolstackNotes::NONE),
    }
}

/// What only the toolstack reads.
#[derive(Clone, Copy, Debug)]
pub struct ToolstackNotes {
    /// UUID.
    pub handle: [u8; 16],
    /// Why it crashed.
    pub report: CrashReport,
    /// What it was refused last.
    pub refusals: Refusals,
}

impl ToolstackNotes {
    /// Those of a domain that has not crashed, and was refused nothing.
    const NONE: Self =
        Self { handle: [0; 16], report: CrashReport { vcpu: 0, length: 0, text: [0; 128] }, refusals: refusals::EMPTY };
}

#[cfg(feature = "planted-fault")]
impl crate::audit::Spoil for ToolstackNotes {
    fn spoil(&mut self) {
        (self.handle, self.report.length, self.refusals.count) = ([1; 16], 1, 1);
    }
}

#[cfg(feature = "planted-fault")]
impl Domain {
    /// What it may do, a bit each.
    pub(crate) fn powers(&self) -> u8 {
        self.powers.load(Relaxed)
    }

    /// Its slot is free, whatever is in it.
    pub(crate) fn mark_free(&self) {
        self.enter(Life::Free);
    }
}

impl Domain {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> DomainId {
        DomainId(self.id.load(Acquire))
    }

    /// Where it is in its life.
    #[must_use]
    pub fn life(&self) -> Life {
        Life::of_byte(self.life.load(Acquire))
    }

    /// It enters a stage of its life; answers from which.
    pub(crate) fn enter(&self, stage: Life) -> Life {
        Life::of_byte(self.life.swap(stage.byte(), SeqCst))
    }

    /// Whether it may do this.
    #[must_use]
    pub fn may(&self, power: Powers) -> bool {
        Powers::from_bits_retain(self.powers.load(Relaxed)).contains(power)
    }

    /// Its shared_info frame.
    #[must_use]
    pub fn shared_info(&self) -> Option<Frame> {
        self.shared_info.get()
    }

    /// Why it has shut down, if it has.
    #[must_use]
    pub fn shutdown_reason(&self) -> Option<u32> {
        self.shutdown.load(Acquire).checked_sub(1)
    }

    /// Notes that it has shut down; false if it had before.
    pub(crate) fn note_shutdown(&self, reason: u32) -> bool {
        self.shutdown.compare_exchange(0, reason.saturating_add(1), AcqRel, Acquire).is_ok()
    }

    /// A vcpu polls from now on: who makes a port pending afterwards finds it.
    pub(crate) fn begin_poll(&self, vcpu: VcpuId) {
        self.pollers.fetch_or(1u32.checked_shl(vcpu.0).unwrap_or(0), SeqCst);
    }

    /// A vcpu does not poll any more, if it did.
    pub(crate) fn end_poll(&self, vcpu: VcpuId) {
        let bit = 1u32.checked_shl(vcpu.0).unwrap_or(0);
        if self.pollers.load(Relaxed) & bit != 0 {
            self.pollers.fetch_and(!bit, SeqCst);
        }
    }

    /// Whether its vcpus may run.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.life() == Life::Alive && !self.paused.load(SeqCst) && self.shutdown_reason().is_none()
    }

    /// Whether it asked for an assist.
    #[must_use]
    pub fn assisted(&self, assist: hypercall_abi::callback::Assist) -> bool {
        self.assists.load(Relaxed) >> assist.number() & 1 != 0
    }
}
