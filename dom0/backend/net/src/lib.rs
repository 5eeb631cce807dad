//! The back end of network devices, and the switch between them: takes packets from guests' TX rings, carries each to where it
//! goes, and answers each slot once (ABI io 6).
//!
//! ```text
//! TX ring -> gather: packets -> fetch_heads: their first bytes, in scratch memory -> judge, route
//!   to a guest     slot by slot into its RX ring: one copy, guest to guest      -> settle -> RX ring
//!   to the uplink  gathered in the linear buffer, finished, cut                 -> Uplink::send
//!   to the station gathered in the linear buffer                                -> Station::receive_guest
//! -> answer -> publish -> notify
//! Uplink::receive -> guests, Station::receive_uplink; the station's frames -> staging buffer -> guests
//! ```
//!
//! A vif is a network device of a guest; a [`Switch`] has the vifs of one network. The owner of a switch calls
//! [`Switch::attend`] when a guest's event arrives and [`Switch::attend_uplink`] at the device's interrupt. It calls
//! [`Switch::turn`] after that, and when the last [`Turn`] asks for the next. The work of a turn is bounded.
//!
//! Touches: rings, through `SharedPage`; guests' pages, by copies of a [`Host`]; frames in buffers of dom0; a device, through
//! `network::Uplink`; what dom0 itself is on the network, through `network::Station`.
//! Never touches: the store (this crate only parses and lists keys), clocks (the caller passes the time).
//! Guarantees: each slot gets one answer, TX in ring order, RX in slot order; what decides about a packet is read once, into
//! memory that no guest can change; nothing of a guest stays in use between calls, so a vif ends at once; a packet allocates
//! nothing; a receiver without buffers holds its senders up for 10 ms, once; a guest that breaks a rule ends its own vif alone.
//! Only [`Switch::disconnect`] ends a vif: dropping a switch or a vif tells nobody. All that a later back end needs is in the
//! rings and in a [`Record`]: slots are answered in order, and only whole packets are published (ABI io 9.4).
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

mod batch;
mod connection;
mod front;
mod header;
mod host;
mod limits;
mod line;
mod outlet;
mod ports;
mod record;
mod switch;
mod vif;
mod visit;

pub use connection::{Broken, ConnectError, Connection, Counters, Disconnected, Drop, Drops, Limits, VifId};
pub use front::{BadFront, Front, KEYS, Ports, Takes};
pub use host::{Buffer, GrantCopy, Host, Side};
pub use limits::{BACK_BUFFERS, MAX_VIFS, PATIENCE_NS, PER_TURN, PER_VISIT, PROMPT_IN_A_ROW};
pub use line::{Mode, UplinkCounters};
pub use record::{Features, Key, Record};
pub use switch::{Buffers, Event, LINEAR_PAGES, SCRATCH_PAGES, STAGING_PAGES, Switch, Turn};
pub use vif::Vif;
