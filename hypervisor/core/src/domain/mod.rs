//! Domains: their state, and how they are made and destroyed.
//!
//! Touches: the fixed tables of domains and vcpus, and frames through `frame` and `paging`.
//! Never touches: page-table entries, event bits.

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

/// Most vcpus of a domain: those that have a record in the shared_info page.
pub const MAX_DOMAIN_VCPUS: usize = hypercall_abi::shared::LEGACY_VCPUS;
/// Most frames that a domain's ports take.
pub const PORT_FRAMES: usize = index(hypercall_abi::event::PORTS) / crate::addr::ENTRIES;

/// What a new domain is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// The id that is asked for; `None` for any free one from [`DomainId::BY_REQUEST`] on.
    pub id: Option<DomainId>,
    /// What the domain may do.
    pub powers: Powers,
    /// Number of vcpus.
    pub vcpus: u32,
    /// Most frames that it may own.
    pub max_pages: u64,
    /// The domain's UUID.
    pub handle: [u8; 16],
}

/// Whether a slot holds a domain, and whether that is being destroyed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Life {
    /// The slot is free.
    Free = 0,
    /// The slot holds a domain that is not being destroyed.
    Alive = 1,
    /// The slot holds a domain that is being destroyed and cannot be used any more.
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
    /// What a domain may do to others and to the machine (P9), given when it is made.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Powers: u8 {
        /// Make, destroy and examine other domains.
        const CONTROL = 1;
        /// Write to the machine's console.
        const CONSOLE_WRITE = 2;
        /// Read from the machine's console, and bind its interrupt.
        const CONSOLE_READ = 4;
        /// Turn the machine off by shutting down; get the machine's memory map and its own interrupts.
        const MACHINE = 8;
        /// Configure PCI devices, and take their interrupts.
        const DEVICES = 16;
    }
}

renewable! {
    /// One domain of the machine's fixed set.
    pub struct Domain {
        id: AtomicU16 = AtomicU16::new(0),
        life: AtomicU8 = AtomicU8::new(Life::Free.byte()),
        powers: AtomicU8 = AtomicU8::new(0),
        /// The domain's page tables and frames.
        pub space: Space = Space::new(),
        /// Most frames that it may own ([`crate::frame::FrameTable::owned`]).
        pub max_pages: AtomicU64 = AtomicU64::new(0),
        shared_info: FrameSlot = FrameSlot::new(),
        /// Frames of its ports.
        pub(crate) port_frames: [FrameSlot; PORT_FRAMES] = [const { FrameSlot::new() }; PORT_FRAMES],
        /// For each vcpu its index into the world's vcpus plus one; 0 if there is no such vcpu.
        pub(crate) vcpus: [AtomicU16; MAX_DOMAIN_VCPUS] = [const { AtomicU16::new(0) }; MAX_DOMAIN_VCPUS],
        /// Whether the toolstack has paused the domain.
        pub(crate) paused: AtomicBool = AtomicBool::new(true),
        /// When the domain began to die. Visits that began before may still look at it.
        pub(crate) dies: AtomicU64 = AtomicU64::new(0),
        /// Owned by the CPU that makes or destroys the domain.
        pub(crate) work: Owned<()> = Owned::new(()),
        /// The shutdown reason plus one; 0 if the domain has not shut down.
        shutdown: AtomicU32 = AtomicU32::new(0),
        /// The assists that are enabled by `vm_assist`, a bit each.
        pub(crate) assists: AtomicU64 = AtomicU64::new(0),
        /// Nanoseconds that its vcpus have run.
        pub(crate) cpu_time: AtomicU64 = AtomicU64::new(0),
        /// Counts since the domain was made: exits from guest user mode; hypercalls and instructions carried out for the
        /// guest's kernel.
        pub(crate) entries: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2],
        /// The vcpus that poll, a bit each. Only the vcpu itself changes its bit: when it begins to poll, and when it
        /// runs again.
        pub(crate) pollers: AtomicU32 = AtomicU32::new(0),
        /// The domain's grants.
        pub grants: crate::grant::Grants = crate::grant::Grants::new(),
        /// The domain's lines in the log.
        pub(crate) journal: Leaf<Journal> = Leaf::new(Journal::new()),
        /// UUID, crash report, refusals.
        pub(crate) notes: Leaf<ToolstackNotes> = Leaf::new(ToolstackNotes::NONE),
    }
}

/// Facts about a domain that only the toolstack reads.
#[derive(Clone, Copy, Debug)]
pub struct ToolstackNotes {
    /// The UUID.
    pub handle: [u8; 16],
    /// Why the domain crashed.
    pub report: CrashReport,
    /// The last refused requests.
    pub refusals: Refusals,
}

impl ToolstackNotes {
    /// The notes on a domain that has not crashed, and of which nothing was refused.
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
    /// What the domain may do, a bit each.
    pub(crate) fn powers(&self) -> u8 {
        self.powers.load(Relaxed)
    }

    /// Marks the slot as free, whatever it holds.
    pub(crate) fn mark_free(&self) {
        self.enter(Life::Free);
    }
}

impl Domain {
    /// The domain's number.
    #[must_use]
    pub fn id(&self) -> DomainId {
        DomainId(self.id.load(Acquire))
    }

    /// Whether the slot holds a domain, and whether that is being destroyed.
    #[must_use]
    pub fn life(&self) -> Life {
        Life::of_byte(self.life.load(Acquire))
    }

    /// Enters a stage of the domain's life; returns the previous stage.
    pub(crate) fn enter(&self, stage: Life) -> Life {
        Life::of_byte(self.life.swap(stage.byte(), SeqCst))
    }

    /// Whether the domain may do this.
    #[must_use]
    pub fn may(&self, power: Powers) -> bool {
        Powers::from_bits_retain(self.powers.load(Relaxed)).contains(power)
    }

    /// The domain's shared_info frame.
    #[must_use]
    pub fn shared_info(&self) -> Option<Frame> {
        self.shared_info.get()
    }

    /// Why the domain has shut down, if it has.
    #[must_use]
    pub fn shutdown_reason(&self) -> Option<u32> {
        self.shutdown.load(Acquire).checked_sub(1)
    }

    /// Records that the domain has shut down; returns false if it had before.
    pub(crate) fn note_shutdown(&self, reason: u32) -> bool {
        self.shutdown.compare_exchange(0, reason.saturating_add(1), AcqRel, Acquire).is_ok()
    }

    /// Records that a vcpu polls. Whoever makes a port pending after this finds the vcpu.
    pub(crate) fn begin_poll(&self, vcpu: VcpuId) {
        self.pollers.fetch_or(1u32.checked_shl(vcpu.0).unwrap_or(0), SeqCst);
    }

    /// Records that a vcpu does not poll any more.
    pub(crate) fn end_poll(&self, vcpu: VcpuId) {
        let bit = 1u32.checked_shl(vcpu.0).unwrap_or(0);
        if self.pollers.load(Relaxed) & bit != 0 {
            self.pollers.fetch_and(!bit, SeqCst);
        }
    }

    /// Whether the domain's vcpus may run.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.life() == Life::Alive && !self.paused.load(SeqCst) && self.shutdown_reason().is_none()
    }

    /// Whether the domain has enabled an assist.
    #[must_use]
    pub fn assisted(&self, assist: hypercall_abi::callback::Assist) -> bool {
        self.assists.load(Relaxed) >> assist.number() & 1 != 0
    }
}
