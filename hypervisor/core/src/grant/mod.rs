//! Grant tables: how one domain lends a page to another (ABI io 1).
//!
//! Touches: the entries of the granter's table, the counts of the frames lent, the handles of the one who maps.
//! Never touches: event channels, the scheduler. A mapping's page-table entry is `paging`'s.
//! Keeps: P6. A pin holds its frame until it is given up, whatever the granter does or dies of: it is recorded in a table
//! of ours, and the granter's entry is read once, when the first pin is taken.

pub mod ops;
mod pin;

use crate::addr::{FrameSlot, index};
use crate::lock::{self, Lock};
use core::sync::atomic::AtomicU32;

/// Frames a domain's table may have. Even and at least 4, or Linux miscounts (ABI io 1.2).
pub const MAX_FRAMES: u32 = 32;
/// Frames of handles a domain may have.
const MAX_HANDLE_FRAMES: u32 = 32;
/// Handles in a frame: two words each.
const HANDLES_PER_FRAME: u32 = 256;

/// Why something about a grant is not done. `dispatch` says which status stands for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrantRefused {
    /// The table has no such reference, or nothing to do with it was asked for.
    NoSuchGrant,
    /// The entry does not grant this to this domain, or is in use too often.
    NotGranted,
    /// What is granted, or one's own page of a copy, is no page to be used so.
    NoSuchPage,
    /// The handle is free, or about to change.
    NoSuchHandle,
    /// No such domain lives.
    NoSuchDomain,
    /// It is about another domain, and the caller controls none.
    NoAuthority,
    /// All handles are taken.
    NoHandle,
    /// A table cannot be so large.
    CannotGrow,
    /// The page-table slot is not there, holds something else, or refuses the mapping.
    CannotMap,
    /// The bus address is not the one that was told.
    WrongBusAddress,
    /// The list of frames cannot be written.
    BadList,
    /// A copy leaves its pages.
    BadCopy,
}

renewable! {
    /// A domain's part in grants: its table, our record of the pins on it, and the handles of what it has mapped itself.
    pub struct Grants {
        /// Frames of the table, lent to the domain.
        table: [FrameSlot; index(MAX_FRAMES)] = [const { FrameSlot::new() }; index(MAX_FRAMES)],
        /// For each of them a frame with a word per entry, see [`pin`].
        active: [FrameSlot; index(MAX_FRAMES)] = [const { FrameSlot::new() }; index(MAX_FRAMES)],
        /// Frames of handles.
        handles: [FrameSlot; index(MAX_HANDLE_FRAMES)] = [const { FrameSlot::new() }; index(MAX_HANDLE_FRAMES)],
        /// No handle before this one is free, but for a moment while one is searched for: a search begins here.
        free: AtomicU32 = AtomicU32::new(0),
        /// Held while pins are taken or given up, and while a free handle is searched for.
        lock: Lock<lock::Grants, ()> = Lock::new(()),
    }
}

impl Grants {
    /// How many frames they take at most.
    pub(crate) const FRAMES: u32 = 2 * MAX_FRAMES + MAX_HANDLE_FRAMES;

    /// Every frame that the hypervisor holds for them.
    pub(crate) fn frames(&self) -> impl Iterator<Item = &FrameSlot> {
        self.table.iter().chain(&self.active).chain(&self.handles)
    }
}

/// How many frames a list has.
fn filled(list: &[FrameSlot]) -> u32 {
    list.iter().map(|slot| u32::from(slot.get().is_some())).sum()
}
