//! Domains and vcpus: what they are made of, how they are made and unmade.
//!
//! Touches: the fixed tables of domains and vcpus, and frames through `frame` and `paging`.
//! Never touches: a page-table entry itself, an event bit.

pub mod context;
pub mod control;
pub mod vcpu;

use crate::addr::{DomainId, Frame, VcpuId};
use crate::lock::Leaf;
use crate::paging::Space;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::tenon::CrashReport;

/// Vcpus a domain may have: those with a record in the shared_info page.
pub const MAX_DOMAIN_VCPUS: usize = hypercall_abi::shared::LEGACY_VCPUS;
/// Frames a domain's ports take at most.
pub const PORT_FRAMES: usize = hypercall_abi::event::PORTS as usize / crate::addr::ENTRIES;

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

/// What a domain may do to others and to the machine (P9): given by name when it is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Powers {
    /// Make, unmake and look into other domains.
    pub control: bool,
    /// Write to the machine's console.
    pub console_write: bool,
    /// Read from the machine's console and take its interrupt.
    pub console_read: bool,
    /// Turn the machine off by shutting down.
    pub machine: bool,
}

impl Powers {
    const CONTROL: u8 = 1;
    const CONSOLE_WRITE: u8 = 2;
    const CONSOLE_READ: u8 = 4;
    const MACHINE: u8 = 8;

    fn to_bits(self) -> u8 {
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        bit(self.control, Self::CONTROL)
            | bit(self.console_write, Self::CONSOLE_WRITE)
            | bit(self.console_read, Self::CONSOLE_READ)
            | bit(self.machine, Self::MACHINE)
    }

    fn from_bits(bits: u8) -> Self {
        Self {
            control: bits & Self::CONTROL != 0,
            console_write: bits & Self::CONSOLE_WRITE != 0,
            console_read: bits & Self::CONSOLE_READ != 0,
            machine: bits & Self::MACHINE != 0,
        }
    }
}

/// One domain of the machine's fixed set.
pub struct Domain {
    id: AtomicU16,
    life: AtomicU8,
    powers: AtomicU8,
    /// Its page tables and frames.
    pub space: Space,
    /// Frames it has.
    pub pages: AtomicU64,
    /// Frames it may have.
    pub max_pages: AtomicU64,
    shared_info: AtomicU32,
    /// Frames of its ports, 0 where none is allocated yet.
    pub(crate) port_frames: [AtomicU32; PORT_FRAMES],
    /// Index into the world's vcpus plus one, 0 where there is none.
    pub(crate) vcpus: [AtomicU16; MAX_DOMAIN_VCPUS],
    /// The toolstack keeps it from running.
    pub(crate) paused: AtomicBool,
    /// 0, or its shutdown reason plus one.
    shutdown: AtomicU32,
    /// Bits of `vm_assist`.
    pub(crate) assists: AtomicU64,
    /// Nanoseconds its vcpus have run.
    pub(crate) cpu_time: AtomicU64,
    /// Entries from guest user mode, and entries that needed a rule, since it was made.
    pub(crate) entries: [AtomicU64; 2],
    /// Its grants.
    pub grants: crate::grant::Grants,
    /// UUID and crash report.
    pub(crate) papers: Leaf<Papers>,
}

/// What only the toolstack reads.
#[derive(Clone, Copy, Debug)]
pub struct Papers {
    /// UUID.
    pub handle: [u8; 16],
    /// Why it crashed.
    pub report: CrashReport,
}

impl Domain {
    /// A free slot.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            id: AtomicU16::new(0),
            life: AtomicU8::new(Life::Free as u8),
            powers: AtomicU8::new(0),
            space: Space::new(DomainId(0)),
            pages: AtomicU64::new(0),
            max_pages: AtomicU64::new(0),
            shared_info: AtomicU32::new(0),
            port_frames: [const { AtomicU32::new(0) }; PORT_FRAMES],
            vcpus: [const { AtomicU16::new(0) }; MAX_DOMAIN_VCPUS],
            paused: AtomicBool::new(true),
            shutdown: AtomicU32::new(0),
            assists: AtomicU64::new(0),
            cpu_time: AtomicU64::new(0),
            entries: [const { AtomicU64::new(0) }; 2],
            grants: crate::grant::Grants::new(),
            papers: Leaf::new(Papers { handle: [0; 16], report: CrashReport { vcpu: 0, length: 0, text: [0; 128] } }),
        }
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> DomainId {
        DomainId(self.id.load(Ordering::Acquire))
    }

    /// Where it is in its life.
    #[must_use]
    pub fn life(&self) -> Life {
        match self.life.load(Ordering::Acquire) {
            1 => Life::Alive,
            2 => Life::Dying,
            _ => Life::Free,
        }
    }

    /// What it may do.
    #[must_use]
    pub fn powers(&self) -> Powers {
        Powers::from_bits(self.powers.load(Ordering::Relaxed))
    }

    /// Its shared_info frame.
    #[must_use]
    pub fn shared_info(&self) -> Option<Frame> {
        match self.shared_info.load(Ordering::Acquire) {
            0 => None,
            number => Some(Frame::from_u32(number)),
        }
    }

    /// Why it has shut down, if it has.
    #[must_use]
    pub fn shutdown_reason(&self) -> Option<u32> {
        self.shutdown.load(Ordering::Acquire).checked_sub(1)
    }

    /// Notes that it has shut down; false if it had before.
    pub(crate) fn note_shutdown(&self, reason: u32) -> bool {
        self.shutdown.compare_exchange(0, reason.saturating_add(1), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Whether its vcpus may run.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.life() == Life::Alive && !self.paused.load(Ordering::SeqCst) && self.shutdown_reason().is_none()
    }

    /// Whether it asked for an assist.
    #[must_use]
    pub fn assisted(&self, assist: hypercall_abi::callback::Assist) -> bool {
        self.assists.load(Ordering::Relaxed) >> assist.number() & 1 != 0
    }

    /// The index of one of its vcpus into the world's.
    #[must_use]
    pub fn vcpu_index(&self, number: VcpuId) -> Option<usize> {
        let slot = self.vcpus.get(usize::try_from(number.0).ok()?)?;
        usize::from(slot.load(Ordering::Acquire)).checked_sub(1)
    }

    /// Numbers of the vcpus it has.
    pub fn vcpu_numbers(&self) -> impl Iterator<Item = VcpuId> + '_ {
        (0u32..)
            .zip(&self.vcpus)
            .filter(|(_, slot)| slot.load(Ordering::Acquire) != 0)
            .map(|(number, _)| VcpuId(number))
    }
}

impl Default for Domain {
    fn default() -> Self {
        Self::new()
    }
}

/// A printable shutdown reason.
#[must_use]
pub fn reason_name(reason: u32) -> &'static str {
    ShutdownReason::from_number(u64::from(reason)).map_or("unknown", ShutdownReason::name)
}
