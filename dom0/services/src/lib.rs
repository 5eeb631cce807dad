//! The services of dom0 for its guests, all of one shape: attach, serve, detach.
//!
//! | module | question |
//! | --- | --- |
//! | `host` | what does a service need of the domain it runs in? |
//! | `shape` | how does a service begin, get its turns, and end? |
//! | `signal` | how does one task wake others? |
//! | `listen` | how do events of others bring about turns? |
//! | `device` | how does a device of a guest come, and how does it go? |
//! | [`block`] | which disks does a guest have, and who serves them? |
//! | [`console`] | what did a guest print, and what is typed for it? |
//! | [`machine`] | which devices does the machine have? |
//! | [`disks`] | which disks are among them? |
//! | [`networks`] | which network devices are among them? |
//! | [`net`] | which networks are there, and who serves guests on them? |
//! | [`store`] | who is connected to the store? |
//!
//! Touches: the page and the port of each guest, through the [`Host`]; the machine's devices, through [`machine::Devices`].
//! Never touches: hypercalls, clocks and memory of its own. It runs as well on a host, against fakes.
//! Keeps: a turn is bounded, and waits until the heap has what it may allocate; what a guest writes is checked by the
//! crates that know the protocol. Dropping a service only unmaps the page and closes the port; `detach` also tells the
//! guest, or a person, what they need to know at the end.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

pub mod block;
pub mod console;
mod device;
pub mod disks;
mod host;
mod listen;
pub mod machine;
pub mod net;
pub mod networks;
mod shape;
mod signal;
pub mod store;

pub use host::{Channel, Class, Host};
pub use shape::{Attached, Ends, PATIENCE_NS, Service, Turn};
pub use signal::{Signal, Waiters, before};
