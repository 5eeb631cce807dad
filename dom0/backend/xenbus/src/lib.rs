//! The back end's side of the xenbus handshake (ABI io 3.9), the same for every kind of device, as a pure state machine.
//!
//! [`Device`] tells its owner what to do next; the owner does it and reports that it is done. F is the state in the
//! front end's directory in the store, B the state in the back end's directory.
//!
//! | want | B | F | act |
//! | --- | --- | --- | --- |
//! | up | 1 | 1 to 4 | publish the features, B=2 |
//! | up | 2 | the rings are published | read the nodes, connect, B=4; if that fails, B=5 |
//! | up | 1, 2, 4 | 5 | B=5 |
//! | up | 2, 4 | not 6, 0; the device has failed | B=5 |
//! | up | 1 to 5 | 6, 0 | disconnect, B=6 |
//! | up | 6 | 1 to 4 | publish again, B=2: at most ten times a minute |
//! | down | not connected | 1, 2 | B=6, remove both directories |
//! | down | any | 6, 0 | disconnect, B=6, remove both directories |
//! | down | 1, 2, 4 | any other | online=0, B=5; reported as in use after ten seconds |
//! | forced | any | any | disconnect, B=6, remove both directories |
//! | the domain is dead | any | any | disconnect, remove both directories |
//! | any other | | | nothing |
//!
//! Touches: nothing. The store, pages, ports and the clock are the owner's.
//! Keeps: what a front end writes leads to a row above or to nothing. Every connect is followed by one disconnect. A
//! device is connected only with nodes that were read together with the state that published them. B is never 4 while F
//! is 5, 6 or gone.
//!
//! Disks use this crate (`services::block`). The console that every guest has takes no part in this handshake (ABI io 2.2:
//! its page and port are in `start_info`); further consoles (ABI io 2.4) and networks will.
//! Deliberately absent so far: taking over a connected device after the back end was restarted (ABI io 9.3).
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod device;
mod rate;
mod state;

pub use device::{Act, Device, Front, IN_USE_NS, Kind};
pub use state::State;
