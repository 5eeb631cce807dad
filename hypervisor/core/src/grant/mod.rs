//! Grant tables: how one domain lends a page to another (ABI io 1).
//!
//! Touches: the entries of the granter's table, the counts of the frames lent, the handles of the one who maps.
//! Never touches: event channels, the scheduler. A mapping's page-table entry is `paging`'s.
//! Keeps: P6. A pin holds its frame until it is given up, whatever the granter does or dies of: it is recorded in a table
//! of ours, and the granter's entry is read once, when the first pin is taken.

mod ops;
mod pin;

pub use ops::grant_table_op;

use crate::addr::Frame;
use crate::machine::Machine;
use crate::world::World;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall_abi::grant::ENTRIES_PER_FRAME;

/// Frames a domain's table may have. Even and at least 4, or Linux miscounts (ABI io 1.2).
pub const MAX_FRAMES: u32 = 32;
/// Frames of handles a domain may have.
const MAX_HANDLE_FRAMES: usize = 32;
/// Handles in a frame: two words each.
const HANDLES_PER_FRAME: u32 = 256;

/// A domain's part in grants: its table, our record of the pins on it, and the handles of what it has mapped itself.
pub struct Grants {
    /// Frames of the table, lent to the domain; 0 where there is none yet.
    table: [AtomicU32; MAX_FRAMES as usize],
    /// For each of them a frame with a word per entry, see [`pin`].
    active: [AtomicU32; MAX_FRAMES as usize],
    /// Frames of handles.
    handles: [AtomicU32; MAX_HANDLE_FRAMES],
    /// Held while pins or handles change.
    lock: crate::lock::Lock<crate::lock::Grants, ()>,
}

impl Grants {
    /// No table.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            table: [const { AtomicU32::new(0) }; MAX_FRAMES as usize],
            active: [const { AtomicU32::new(0) }; MAX_FRAMES as usize],
            handles: [const { AtomicU32::new(0) }; MAX_HANDLE_FRAMES],
            lock: crate::lock::Lock::new(()),
        }
    }

    /// Frames the table has.
    fn size(&self) -> u32 {
        u32::try_from(self.table.iter().take_while(|slot| slot.load(Ordering::Acquire) != 0).count()).unwrap_or(0)
    }

    /// The frame of a list that an index is in, and the index within it.
    fn at(list: &[AtomicU32], index: u32, per_frame: u32) -> Option<(Frame, usize)> {
        let slot = list.get(usize::try_from(index / per_frame).ok()?)?;
        match slot.load(Ordering::Acquire) {
            0 => None,
            number => Some((Frame::from_u32(number), usize::try_from(index % per_frame).ok()?)),
        }
    }

    fn entry(&self, gref: u32) -> Option<(Frame, usize)> {
        Self::at(&self.table, gref, ENTRIES_PER_FRAME)
    }

    fn pins(&self, gref: u32) -> Option<(Frame, usize)> {
        Self::at(&self.active, gref, ENTRIES_PER_FRAME)
    }

    /// Returns the frames of a domain that is gone.
    pub(crate) fn release<M: Machine>(&self, world: &World, _m: &M) {
        for slot in self.table.iter().chain(&self.active).chain(&self.handles) {
            match slot.swap(0, Ordering::AcqRel) {
                0 => {}
                number => world.frames.retire(Frame::from_u32(number)),
            }
        }
    }
}

impl Default for Grants {
    fn default() -> Self {
        Self::new()
    }
}
