//! Page tables of guests: who may point where, and what follows when it changes.
//!
//! Touches: page-table entries and the counts of the frames they lead to. [`entry`] judges one entry, `promote` turns a
//! frame into a table and back, `update` changes tables, `descriptors` does the same for descriptor pages, `flush` knows
//! who must forget what. [`ops`] are the calls, which read their requests and load roots.
//! Never touches: grants; outside [`ops`], a vcpu's state, or guest virtual addresses except to find a slot.
//! Keeps: P1, P2, P3, P4, P8.
//!
//! # How a call that takes long is carried out (P8)
//!
//! All work on one domain's tables is done in a [`Session`], which holds the domain's paging lock and has a budget of
//! entries to look at. Work without an answer (taking tables down) is left as a debt when the budget ends: the call is
//! done, and the next session pays first. Work with an answer (making a table) ends with [`Stop::More`]: **nothing of the
//! request has happened yet**, and the same request is to be made again, without those of its batch that are done. Every
//! operation pays the domain's debts and continues its unfinished work first, whoever began it. The outcome is kept, with one
//! use of the new table, until an operation asks for that frame as that table: it finds the table ready, or is told why it is
//! none. So the answer is delivered once, and the request is never remembered here: it is decoded and checked anew. Up to
//! [`WAITING`] outcomes wait; the oldest one beyond is let go.
//!
//! On `More` the call stays in `VcpuState::call`, which holds its place, and `dispatch::step` goes on with it before the guest
//! runs. A domain being destroyed calls [`Session::tear_down`] until it stops saying `More`.
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

/// Entries one call may look at: some tens of microseconds.
pub const BUDGET: u32 = 4096;

/// Why an operation did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// It is not allowed.
    Refused(Refused),
    /// Not yet: the call goes on before the vcpu does.
    More,
}

impl From<Refused> for Stop {
    fn from(why: Refused) -> Self {
        Self::Refused(why)
    }
}

/// Done, or why not.
pub type Outcome<T> = Result<T, Stop>;

renewable! {
    /// A domain's memory as far as page tables go: part of the domain.
    #[derive(Debug)]
    pub struct Space {
        id: AtomicU16 = AtomicU16::new(0),
        /// CPUs that may hold translations.
        cpus: AtomicU64 = AtomicU64::new(0),
        /// Frames outside RAM that it may map.
        pub devices: Devices = Devices::new(),
        state: Lock<Domain, State> = Lock::new(State::NEW),
    }
}

/// What the paging lock guards.
#[derive(Debug)]
struct State {
    work: Work,
    /// The domain is being destroyed: the next frame to look at, first for L1 tables, then to give it away.
    dying: Option<Sweep>,
}

impl State {
    /// That of a domain which has no tables.
    const NEW: Self = Self { work: Work::new(), dying: None };
}

#[cfg(feature = "planted-fault")]
impl crate::audit::Spoil for State {
    fn spoil(&mut self) {
        self.dying = Some(Sweep::Frames(1));
        self.work.spoil();
    }
}

/// How far the destruction of a domain's memory has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sweep {
    /// L1 tables from this frame on still hold what belongs to others.
    Tables(u32),
    /// No table holds anything any more; frames before this one have left.
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

    /// Whose it is.
    #[must_use]
    pub fn id(&self) -> DomainId {
        DomainId(self.id.load(SeqCst))
    }

    /// Says whose it is, once for each domain.
    pub(crate) fn belongs_to(&self, id: DomainId) {
        self.id.store(id.0, SeqCst);
    }

    /// Takes the paging lock for a series of operations that together look at no more than `budget` entries
    /// ([`BUDGET`]; at least 1). No guest memory is copied meanwhile.
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

/// Operations on one domain's page tables, under its lock. When it ends it flushes what the operations owe.
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

    /// Begins an operation: debts are paid and unfinished work is finished first.
    fn ready(&mut self) -> Outcome<()> {
        ensure!(self.state.dying.is_none(), Refused::Dying);
        if !crate::fault::planted(crate::fault::Fault::IgnoreUnfinished) {
            self.run()?;
        }
        self.budget = self.budget.checked_sub(1).ok_or(Stop::More)?;
        Ok(())
    }
}
