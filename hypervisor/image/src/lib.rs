//! What a kernel image looks like in a new domain's memory.
//!
//! [`Kernel::parse`] reads an ELF64 file and its Xen notes, [`Plan::new`] decides where everything goes, and
//! [`Plan::construct`] carries the plan out through a [`Builder`]: segments, page tables with real machine frames, the
//! p2m list, the start-info page. What comes back is how vcpu 0 starts. Two users: the hypervisor, for
//! the first domain, and dom0's toolstack, for all others.
//!
//! Touches: the bytes it is given, and the pages of the new domain through the [`Builder`].
//! Never touches: hypercalls, frame ownership, the m2p, `shared_info`. It allocates nothing.
//! Keeps: what it reads and writes is bounded by the file and the domain, whatever the file claims. Nobody believes it. The
//! page tables are proposals; the hypervisor promotes them like any guest's.
//!
//! The rules are those of the Xen PV start of day: 1:1 image of pfn 0 upwards from VIRT_BASE, tables mapped read-only.
#![no_std]
#![forbid(unsafe_code)]

mod construct;
mod error;
mod kernel;
mod layout;
mod notes;

pub use construct::{Builder, ConstructError, Start, Wiring};
pub use error::ImageError;
pub use kernel::{Kernel, MOST_HEADERS, MOST_NOTE_BYTES, Segment};
pub use layout::{Config, Layout, PfnRange, Plan};

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// A page of the domain as the domain counts them: its pseudo-physical frame number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

/// A frame of the machine, what page-table entries of a paravirtual guest hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MachineFrame(pub u64);

impl MachineFrame {
    /// The machine address of the first byte.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0 << 12
    }
}
