//! The back end of disks: takes requests from guests' rings, carries them out, and answers each request once (ABI io 5).
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
//! A vbd is a disk of a guest; a flight is a request that is being carried out. A [`Queue`] has all [`Vbd`]s of one device, or
//! all that lie in dom0's memory alone, and their flights. The owner of a queue calls [`Queue::attend`] when a guest's event
//! arrives. It calls [`Queue::turn`] after that, at each interrupt of the device, and when the last [`Turn`] asks for the next.
//! The work of a turn is bounded.
//!
//! Touches: rings and journals, through `SharedPage`; guests' pages, by pins and copies of a [`Host`]; sectors, through the
//! traits of the crate `disk`. Never touches: the store (this crate only parses and lists keys), clocks (the caller passes the
//! time). Guarantees: each request gets one answer; a pin ends before its request is answered, unless the device is lost; a
//! guest reaches only the sectors of its own disks and its own pages; buffers grow to the longest request and keep that size.
//! Only [`Queue::disconnect`] ends a vbd: dropping a queue or a vbd gives nothing back.
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
