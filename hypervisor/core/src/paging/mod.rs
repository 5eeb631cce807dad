//! Page tables of guests: which entry may point to which frame, and what follows when an entry changes.
//!
//! Touches: page-table entries and the counts of the frames they point to. [`entry`] checks one entry, `promote` turns
//! a frame into a table and back, `update` changes tables, `fast` does what these do in simple cases, `descriptors` checks
//! pages of segment descriptors and counts their uses, `flush` records which CPUs must flush. [`ops`] are the calls, which read
//! their requests and load roots.
//! Never touches: grants. Outside [`ops`], no vcpu's state is touched, and a guest virtual address is only used to find a slot.
//! Keeps: P1, P2, P3, P4, P8.
//!
//! # How a call that takes long is carried out (P8)
//!
//! All work on one domain's tables, except on the fast paths, is done in a [`Session`], which holds the domain's paging lock
//! and has a budget of entries to look at. Work that no answer depends on (undoing tables) becomes a debt when the budget ends:
//! the call is done, and the next session pays the debt first. Work that an answer depends on (making a table) ends with
//! [`Stop::More`]: **nothing of the request has happened yet**, and the same request must be made again (for a batch: from the
//! first request not done). Every operation first pays the domain's debts and continues the domain's unfinished work, whoever
//! began it. When the making of a table ends, its outcome is kept, with one use of the table if it has been made, until an
//! operation asks for the same frame as a table of the same level. That operation finds the table ready, or returns why the
//! frame cannot be one. So each outcome is delivered once. The request itself is never stored here: it is decoded and checked
//! again when it is made again. At most [`WAITING`] outcomes are kept; beyond that, the oldest one is dropped.
//!
//! On `More` the call stays in `VcpuState::call`, with its place in the batch, and `dispatch::step` continues it before
//! the guest runs. When a domain is destroyed, [`Session::tear_down`] is called until it no longer returns `More`.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod descriptors;
mod devices;
pub mod entry;
mod fast;
mod flush;
pub mod ops;
mod promote;
mod update;

pub use crate::frame::state::Refused;
pub use devices::Devices;
pub(crate) use fast::{Edit, LockedFastPath};
#[cfg(feature = "planted-fault")]
pub use promote::Holding;
pub use promote::WAITING;
pub use update::{Slot, TableWrite};

use crate::addr::{CpuSet, DomainId};
use crate::frame::FrameTable;
use crate::frame::table::Taker;
use crate::lock::{Above, Domain, Guard, Held, Level, Lock};
use crate::machine::{Cpus, Frames};
use core::sync::atomic::{AtomicU16, AtomicU64, Ordering::SeqCst};
use promote::Work;

/// Entries that one step of a call may look at, which takes some tens of microseconds.
pub const BUDGET: u32 = 4096;

/// Why an operation did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The operation is not allowed.
    Refused(Refused),
    /// The operation is not done yet: the call continues before the vcpu runs.
    More,
}

impl From<Refused> for Stop {
    fn from(why: Refused) -> Self {
        Self::Refused(why)
    }
}

/// The result of an operation, or why it did not happen.
pub type Outcome<T> = Result<T, Stop>;

renewable! {
    /// The state of a domain's page tables; part of the domain.
    #[derive(Debug)]
    pub struct Space {
        id: AtomicU16 = AtomicU16::new(0),
        /// CPUs that may hold translations of the domain.
        cpus: AtomicU64 = AtomicU64::new(0),
        /// Frames outside RAM that the domain may map.
        pub devices: Devices = Devices::new(),
        state: Lock<Domain, State> = Lock::new(State::NEW),
    }
}

/// The part of a [`Space`] that the paging lock guards.
#[derive(Debug)]
struct State {
    work: Work,
    /// How far the destruction of the domain's memory has come; `None` if the domain is not being destroyed.
    dying: Option<Sweep>,
}

impl State {
    /// The state of a domain without tables.
    const NEW: Self = Self { work: Work::new(), dying: None };
}

#[cfg(feature = "planted-fault")]
impl crate::audit::Spoil for State {
    fn spoil(&mut self) {
        self.dying = Some(Sweep::Frames(1));
        self.work.spoil();
    }
}

/// How far the destruction of a domain's memory has come. L1 tables are looked at first, then all frames leave the
/// domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sweep {
    /// L1 tables from this frame on may still hold frames of others.
    Tables(u32),
    /// No table holds frames of others any more; frames before this one have left the domain.
    Frames(u32),
}

impl Space {
    /// The space of a domain that owns nothing yet.
    #[must_use]
    pub fn of(id: DomainId) -> Self {
        let space = Self::new();
        space.belongs_to(id);
        space
    }

    /// The domain that the space belongs to.
    #[must_use]
    pub fn id(&self) -> DomainId {
        DomainId(self.id.load(SeqCst))
    }

    /// Sets the domain that the space belongs to; once for each domain.
    pub(crate) fn belongs_to(&self, id: DomainId) {
        self.id.store(id.0, SeqCst);
    }

    /// Takes the paging lock for a series of operations that together look at no more than `budget` entries
    /// ([`BUDGET`]; at least 1). No guest memory is copied while it is held.
    pub fn open<'a, M: Frames + Cpus, H: Level>(
        &'a self,
        m: &'a M,
        table: &'a FrameTable,
        budget: u32,
        held: &'a mut Held<H>,
    ) -> Session<'a, M>
    where
        Domain: Above<H>,
    {
        Session { m, table, space: self, state: self.state.lock(held), budget: budget.max(1), flush: false }
    }
}

/// Operations on one domain's page tables, under the domain's paging lock. The flush that they need is done when the session is
/// dropped, if [`Session::settle`] has not done it before.
#[must_use]
pub struct Session<'a, M: Frames + Cpus> {
    m: &'a M,
    table: &'a FrameTable,
    space: &'a Space,
    state: Guard<'a, Domain, State>,
    budget: u32,
    flush: bool,
}

impl<M: Frames + Cpus> Session<'_, M> {
    fn id(&self) -> DomainId {
        self.space.id()
    }

    fn taker(&self, from: DomainId) -> Taker {
        let cpus = if from == self.id() { self.space.cpus() } else { CpuSet(u64::MAX) };
        Taker { from, by: self.id(), cpus }
    }

    /// Begins an operation: pays the domain's debts, finishes its unfinished work, and takes one entry from the budget. Refuses
    /// if the domain's memory is being destroyed.
    fn ready(&mut self) -> Outcome<()> {
        ensure!(self.state.dying.is_none(), Refused::Dying);
        if !crate::fault::planted(crate::fault::Fault::IgnoreUnfinished) {
            self.run()?;
        }
        self.budget = self.budget.checked_sub(1).ok_or(Stop::More)?;
        Ok(())
    }
}
