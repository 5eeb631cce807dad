//! A guest that the manager knows, and its state.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;

use crate::DomainId;
use crate::config::GuestConfig;
use crate::create::Guest;
use crate::end::End;

/// A guest, in any state.
#[derive(Debug)]
pub(super) struct Entry<C> {
    pub(super) config: GuestConfig,
    pub(super) console: Rc<C>,
    pub(super) state: State,
    /// When the guest was last made, in nanoseconds since the machine started.
    pub(super) made_ns: u64,
    /// The domain that the last making of this guest gave. `None` before the first making, from the moment that `create` or
    /// `make` begins a new one until that succeeds, and after one that failed.
    pub(super) made: Option<DomainId>,
    /// The UUID of the guest's last domain, or of the one that is being made.
    pub(super) uuid: Option<[u8; 16]>,
    /// How the guest last ended.
    pub(super) past: Option<LastEnd>,
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastEnd {
    /// The guest's domain, if it had one.
    pub domain: Option<DomainId>,
    /// How it ended, in words: `crashed`, for instance.
    pub how: &'static str,
    /// When it ended, in nanoseconds since the machine started.
    pub at_ns: u64,
    /// A report for a person, with registers; may be empty.
    pub report: String,
    /// The last requests of the guest that the hypervisor refused, in words.
    pub refused: Vec<String>,
}

/// How a guest ended that was not destroyed, and the report of that.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) end: End,
    pub(super) report: String,
}

/// The state of a guest.
#[derive(Debug)]
pub(super) enum State {
    /// It waits to be made. The guests that wait are made in the order of the manager's list.
    Planned,
    /// It is being made.
    Begun,
    /// It has a domain, running or paused.
    Lives(Guest),
    /// It has ended, or is being made and no longer wanted. Its resources are being freed.
    Ending,
    /// It has ended; its domain is there until its devices are removed. `None`: it was destroyed.
    Parting(Guest, Option<Box<Told>>),
    /// It has ended, and its domain is kept (`preserve`).
    Kept(Guest),
    /// It has ended, and will be made again at this time, in nanoseconds since the machine started.
    Waits(u64),
    /// It has ended, and nothing is left of it.
    Ended,
}

impl<C> Entry<C> {
    /// Whether the guest has a domain that has not ended, or will be made.
    pub(super) const fn is_alive(&self) -> bool {
        matches!(self.state, State::Lives(_) | State::Waits(_) | State::Planned | State::Begun)
    }

    /// The guest with its domain, if it has a domain that is not being destroyed.
    pub(super) const fn guest(&self) -> Option<&Guest> {
        match &self.state {
            State::Lives(guest) | State::Kept(guest) => Some(guest),
            State::Planned | State::Begun | State::Ending | State::Parting(..) | State::Waits(_) | State::Ended => None,
        }
    }

    /// Whether the guest has this domain, and the domain is not being destroyed.
    pub(super) fn has_domain(&self, domain: DomainId) -> bool {
        self.guest().is_some_and(|guest| guest.domain == domain)
    }

    pub(super) const fn guest_mut(&mut self) -> Option<&mut Guest> {
        match &mut self.state {
            State::Lives(guest) | State::Kept(guest) => Some(guest),
            State::Planned | State::Begun | State::Ending | State::Parting(..) | State::Waits(_) | State::Ended => None,
        }
    }

    /// Takes a guest in the state `Parting` out of the entry; the state is `Ending` then. Returns `None`, and changes nothing,
    /// in any other state.
    pub(super) fn take_parting(&mut self) -> Option<(Guest, Option<Box<Told>>)> {
        match core::mem::replace(&mut self.state, State::Ending) {
            State::Parting(guest, told) => Some((guest, told)),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Takes the guest with its domain out of the entry, to be destroyed; the state is `Ending` then. Returns `None`, and
    /// changes nothing, if there is no domain, or it is being destroyed already.
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
