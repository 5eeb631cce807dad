//! A chain of page tables to try things on: root, L3, L2, L1, and two plain pages the L1 leads to.

use crate::abi::mmu::{MmuextCommand, pte};
use crate::memory::{PAGE, Pages};
use crate::probe::{self, mmuext};
use crate::{Errno, memory};

/// Entry flags for a table below.
pub const BRANCH: u64 = pte::PRESENT | pte::WRITE | pte::USER | pte::ACCESSED | pte::DIRTY;
/// Entry flags for a page of the kernel.
pub const LEAF: u64 = pte::PRESENT | pte::WRITE | pte::ACCESSED | pte::DIRTY;
/// Entry flags for a page of the kernel that is not written.
pub const READ_ONLY: u64 = pte::PRESENT | pte::ACCESSED;

/// Four tables and two pages; entry 0 of each table leads to the next.
#[derive(Debug)]
pub struct Chain {
    pages: Pages,
}

impl Chain {
    /// Builds the chain; all pages are writable still, and no page is a table to the hypervisor.
    ///
    /// # Panics
    /// If there are no free pages.
    #[must_use]
    pub fn new() -> Self {
        let chain = Self { pages: Pages::allocate(6).expect("six pages are free") };
        for level in 2..=4 {
            chain.poke(level, 0, chain.entry(level - 1, BRANCH));
        }
        chain.poke(1, 0, chain.page_entry(0, LEAF));
        chain
    }

    fn index(level: u32) -> u64 {
        assert!((1..=4).contains(&level));
        u64::from(4 - level)
    }

    /// The frame of the table of `level`.
    ///
    /// # Panics
    /// For a level outside 1..=4.
    #[must_use]
    pub fn frame(&self, level: u32) -> u64 {
        self.pages.frame(Self::index(level)).expect("the page is ours")
    }

    /// The frame of plain page `i` (0 or 1).
    ///
    /// # Panics
    /// For another number.
    #[must_use]
    pub fn page_frame(&self, i: u64) -> u64 {
        self.pages.frame(4 + i).expect("the page is ours")
    }

    /// The address of plain page `i`.
    #[must_use]
    pub fn page_address(&self, i: u64) -> u64 {
        self.pages.address() + (4 + i) * PAGE
    }

    /// An entry that leads to the table of `level`.
    #[must_use]
    pub fn entry(&self, level: u32, flags: u64) -> u64 {
        (self.frame(level) * PAGE) | flags
    }

    /// An entry that leads to plain page `i`.
    #[must_use]
    pub fn page_entry(&self, i: u64, flags: u64) -> u64 {
        (self.page_frame(i) * PAGE) | flags
    }

    /// The address of entry `index` in the table of `level`.
    #[must_use]
    pub fn slot(&self, level: u32, index: u64) -> u64 {
        self.pages.address() + Self::index(level) * PAGE + index * 8
    }

    /// The machine address of entry `index` in the table of `level`.
    #[must_use]
    pub fn machine_slot(&self, level: u32, index: u64) -> u64 {
        self.frame(level) * PAGE + index * 8
    }

    /// Writes an entry while the table is an ordinary page.
    ///
    /// # Panics
    /// If the page is not writable.
    pub fn poke(&self, level: u32, index: u64, entry: u64) {
        probe::write(self.slot(level, index), entry).expect("the page is writable");
    }

    /// Reads an entry.
    ///
    /// # Panics
    /// If the page is not readable.
    #[must_use]
    pub fn peek(&self, level: u32, index: u64) -> u64 {
        probe::read(self.slot(level, index)).expect("the page is readable")
    }

    /// Makes the tables from level 1 up to `level` read-only.
    ///
    /// # Panics
    /// If the hypervisor refuses.
    pub fn protect(&self, level: u32) {
        for level in 1..=level {
            self.set_writable(level, false).expect("a page can be made read-only");
        }
    }

    /// Makes them writable again.
    ///
    /// # Panics
    /// If one of them is in use as a table.
    pub fn unprotect(&self, level: u32) {
        for level in 1..=level {
            self.set_writable(level, true).expect("a page that is no table can be made writable");
        }
    }

    /// Maps the table of `level` writable or not.
    ///
    /// # Errors
    /// What the hypervisor answered.
    pub fn set_writable(&self, level: u32, writable: bool) -> Result<(), Errno> {
        self.pages.set_writable(Self::index(level), writable)
    }

    /// Pins the table of `level`.
    ///
    /// # Errors
    /// What the hypervisor answered.
    pub fn pin(&self, level: u32) -> Result<u64, Errno> {
        pin(level, self.frame(level))
    }

    /// Unpins the table of `level`.
    ///
    /// # Errors
    /// What the hypervisor answered.
    pub fn unpin(&self, level: u32) -> Result<u64, Errno> {
        mmuext(MmuextCommand::Unpin, self.frame(level), 0)
    }

    /// Updates entry `index` of the table of `level` by `mmu_update`.
    ///
    /// # Errors
    /// What the hypervisor answered.
    pub fn update(&self, level: u32, index: u64, entry: u64) -> Result<u64, Errno> {
        probe::mmu_update(self.machine_slot(level, index), entry)
    }
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

/// Pins any frame as a table of `level`.
///
/// # Errors
/// What the hypervisor answered.
///
/// # Panics
/// For a level outside 1..=4.
pub fn pin(level: u32, frame: u64) -> Result<u64, Errno> {
    let command = match level {
        1 => MmuextCommand::PinL1,
        2 => MmuextCommand::PinL2,
        3 => MmuextCommand::PinL3,
        4 => MmuextCommand::PinL4,
        _ => panic!("no level {level}"),
    };
    mmuext(command, frame, 0)
}

/// The frame of the root in use.
///
/// # Panics
/// Never: there is one.
#[must_use]
pub fn current_root() -> u64 {
    memory::entry_address(0, 4).and_then(memory::frame_of).expect("there is a root")
}
