//! Grants that a test guest gives (ABI io 1.2), and takes away again at any moment.

use unikernel::abi::domid;
use unikernel::abi::grant::entry;
use unikernel::memory::Window;
use unikernel::{hypercall, probe};

/// Entries of the one frame that the table has.
pub const ENTRIES: u32 = 512;

/// The marks in an entry that somebody uses.
pub const IN_USE: u64 = (entry::READING | entry::WRITING) as u64;

/// The grant table of this domain.
#[derive(Debug)]
pub struct GrantTable {
    window: Window,
}

impl GrantTable {
    /// Maps the table.
    ///
    /// # Panics
    /// If the hypervisor refuses.
    #[must_use]
    pub fn new() -> Self {
        let mut frames = [0];
        hypercall::setup_grant_table(&mut frames).expect("there is a table");
        Self { window: Window::map(&frames, domid::SELF, true).expect("the table is shown to its owner") }
    }

    /// Writes the two words of an entry: flags in bits 0..16, the other domain in 16..32, the frame in 32..64.
    ///
    /// # Panics
    /// If the table has no such entry.
    pub fn set(&self, reference: u32, word: u64) {
        assert!(reference < ENTRIES, "reference {reference}");
        probe::store(self.window.address() + u64::from(reference) * 8, word);
    }

    /// Whether domain 0 is using the grant.
    #[must_use]
    pub fn in_use(&self, reference: u32) -> bool {
        let word = probe::load(self.window.address() + u64::from(reference % ENTRIES) * 8);
        word & IN_USE != 0
    }
}

impl Default for GrantTable {
    fn default() -> Self {
        Self::new()
    }
}
