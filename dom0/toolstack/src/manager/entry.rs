//! A guest that the manager knows, and what has become of it.

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;

use crate::DomainId;
use crate::config::GuestConfig;
use crate::create::Guest;

/// A guest, in whatever state.
#[derive(Debug)]
pub(super) struct Entry<C> {
    pub(super) config: GuestConfig,
    pub(super) console: Rc<C>,
    pub(super) state: State,
    /// When it was last made, in nanoseconds.
    pub(super) made_ns: u64,
    /// The domain of its last making that succeeded; `None` while another is under way.
    pub(super) made: Option<DomainId>,
    /// The UUID of its last domain, or of the one that is being made.
    pub(super) uuid: Option<[u8; 16]>,
    /// Its last end.
    pub(super) past: Option<LastEnd>,
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastEnd {
    /// Its domain, if it had one.
    pub domain: Option<DomainId>,
    /// In words: `crashed`.
    pub how: &'static str,
    /// When, in nanoseconds since the machine started.
    pub at_ns: u64,
    /// For a person, with registers; may be empty.
    pub report: String,
    /// What the hypervisor had refused it last.
    pub refused: Vec<String>,
}

/// What has become of a guest.
#[derive(Debug)]
pub(super) enum State {
    /// It will be made next, after those planned before it.
    Planned,
    /// It is being made.
    Begun,
    /// It runs, or is paused.
    Lives(Guest),
    /// It has ended, or has been given up; what it had is being freed.
    Ending,
    /// It has ended and is kept.
    Kept(Guest),
    /// It has ended, and is made again at this time in nanoseconds.
    Waits(u64),
    /// Nothing is left of it.
    Ended,
}

impl<C> Entry<C> {
    /// Whether it lives, or soon will.
    pub(super) const fn is_alive(&self) -> bool {
        matches!(self.state, State::Lives(_) | State::Waits(_) | State::Planned | State::Begun)
    }

    /// The guest with its domain, if it has one that is not on its way out.
    pub(super) const fn guest(&self) -> Option<&Guest> {
        match &self.state {
            State::Lives(guest) | State::Kept(guest) => Some(guest),
            State::Planned | State::Begun | State::Ending | State::Waits(_) | State::Ended => None,
        }
    }

    pub(super) const fn guest_mut(&mut self) -> Option<&mut Guest> {
        match &mut self.state {
            State::Lives(guest) | State::Kept(guest) => Some(guest),
            State::Planned | State::Begun | State::Ending | State::Waits(_) | State::Ended => None,
        }
    }

    /// Takes the guest with its domain out, to be destroyed.
    pub(super) fn take(&mut self) -> Option<Guest> {
        match core::mem::replace(&mut self.state, State::Ending) {
            State::Lives(guest) | State::Kept(guest) => Some(guest),
            other => {
                self.state = other;
                None
            }
        }
    }
}
