//! The back end of disks: takes requests out of guests' rings, has them carried out, and answers each once (ABI io 5).
//!
//! ```text
//! ring -> Vbd: a copy in the journal, judged -> waits its turn -> Queue: a flight
//!   descriptors: a grant copy          Fetch
//!   Disk::place                        Plan     -> memory, zeroes: grant copies
//!   the guest's pages                  Pin      -> Submit -> Device -> Plan, until no sectors are left
//!   a durable write                    FlushNext, FlushNow
//! End -> unpin -> answer -> publish -> notify
//! ```
//!
//! A [`Queue`] is what shares one device, or dom0's memory: all [`Vbd`]s behind it, and their flights. Its owner calls
//! [`Queue::attend`] when a guest's event arrives, and [`Queue::turn`] then, at an interrupt of the device, and when the last
//! turn said so. A turn is bounded.
//!
//! Touches: rings and journals, through `SharedPage`; guests' pages, by batches of pins and copies of a [`Host`]; sectors,
//! through the traits of the crate `disk`.
//! Never touches: the store (it parses and lists keys), event channels, clocks (the caller passes the time).
//! Keeps: one answer for a request; no pin outlives its request, but where a device is lost; a guest reaches its own disk's
//! sectors and its own pages; buffers grow to the longest request and stay; dropping a queue
//! or a vbd does nothing, only [`Queue::disconnect`] ends a vbd.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

mod advance;
mod batch;
mod connection;
mod finish;
mod flight;
mod flush;
mod front;
mod health;
mod host;
mod limits;
mod queue;
mod record;
mod start;
mod vbd;
mod waiting;

pub use connection::{ConnectError, Connection, Counters, Disconnected, journal_bytes, vbd_bytes};
pub use front::{BadFront, Front, KEYS, MAX_RING_KEYS};
pub use health::{Event, LATE_NS};
pub use host::{GrantCopy, Handle, Host, PinError, Pinned, Scratch, Wanted};
pub use limits::{DATA_PINS, FLIGHTS, Limits, PER_TURN, Pins};
pub use queue::{Queue, Turn, VbdId};
pub use record::{Features, Key, Record};
pub use vbd::Vbd;
