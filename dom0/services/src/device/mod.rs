//! A device of a guest, of any kind: its two directories in the store, the handshake of its two ends, and its removal.
//!
//! | module | question |
//! | --- | --- |
//! | `attached` | which devices of a kind do guests have, and how do they go? |
//! | `handshake` | how does a device live, from the first state to the last? |
//! | `nodes` | what is written in the store about a device, and what is read? |
//!
//! A kind of device is an [`Endpoint`]: it knows the keys and the rings. The order of states is [`xenbus_backend`]'s.

mod attached;
mod handshake;
mod nodes;

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::future::Future;

use xenbus_backend::{Kind, State};

use crate::host::Host;

pub(crate) use attached::{Attached, Name};
pub(crate) use handshake::{Handshake, Identity};
pub(crate) use nodes::{Paths, directories};

/// A key of a back end, and its value, written in decimal.
pub(crate) type Key = (&'static str, u64);

/// Our end of a device of a guest.
pub(crate) trait Endpoint<H: Host>: Sized + 'static {
    /// What a front end publishes.
    type Front;
    /// The state in which a front end has published it.
    const KIND: Kind;
    /// The kind's name in messages, such as `disk`.
    const NOUN: &'static str;

    /// The handshake of this device.
    fn handshake(&self) -> &Handshake<H>;

    /// Returns the names of the keys that [`parse`](Endpoint::parse) asks for.
    fn front_keys() -> impl Iterator<Item = &'static str>;

    /// Parses what a front end has published. `read` returns the value of a key, `None` if there is no such key.
    ///
    /// # Errors
    /// The first key that is missing or has an invalid value.
    fn parse<'a>(read: impl Fn(&str) -> Option<&'a [u8]>) -> Result<Self::Front, String>;

    /// Returns the keys that are written together with this state of the back end.
    fn keys(&self, state: State) -> Vec<Key>;

    /// Maps the rings, binds the ports, and begins to serve.
    ///
    /// # Errors
    /// Why the front end cannot be served. Nothing is mapped or bound then.
    fn connect(self: &Rc<Self>, front: &Self::Front) -> Result<(), String>;

    /// Finishes what was taken so far, and unmaps and unbinds what [`connect`](Endpoint::connect) mapped and bound.
    fn disconnect(&self) -> impl Future<Output = ()>;

    /// Gives back what the device holds, once both directories are removed.
    fn finish(&self) -> impl Future<Output = ()>;
}

/// Returns the word that lists show for the state of a back end.
pub(crate) const fn word(state: State) -> &'static str {
    match state {
        State::Unknown => "gone",
        State::Initialising => "new",
        State::InitWait | State::Initialised => "waits",
        State::Connected => "connected",
        State::Closing => "closing",
        State::Closed => "closed",
        State::Reconfiguring | State::Reconfigured => "changing",
    }
}
