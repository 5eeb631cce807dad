//! The store: a small tree by which domains meet (ABI io 3), as a pure state machine.
//!
//! Touches: the tree, watches, transactions and message queues it holds; in [`transport`], bytes of
//! a shared page through [`ring_protocol::SharedPage`].
//! Never touches: event channels, grants, clocks, the console. What must happen outside is told as a
//! [`Duty`] or a [`Step`](transport::Step); who is privileged is told when a connection is made.
//! Keeps (audited): the tree is consistent and usage counts equal a recount; memory per client is
//! bounded whatever it does, and so is a turn; a request takes effect as a whole or not at all; every answer and
//! every event passes the permissions of its receiver; the same calls give the same answers.
//! Deliberately absent: recursion over paths, a privileged domain number, coalescing of events for
//! different paths, unbounded queues.
//!
//! | module | question |
//! | --- | --- |
//! | [`wire`], `request` | what did the client say? |
//! | [`path`], [`permission`], [`quota`] | may it say that? |
//! | [`tree`], `view` | what is there, and what would be there after this transaction? |
//! | [`watch`] | who hears of it? |
//! | `connection`, `server` | whose turn is it, and what is the answer? |
//! | `work` | what follows, piece by piece? |
//! | [`local`] | the same for callers in our own domain |
//! | [`transport`] | how do the bytes get here? |
//! | `snapshot` | how does a new server go on where this one stopped? |
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

extern crate alloc;

mod connection;
mod domain;
mod error;
pub mod local;
pub mod path;
pub mod permission;
pub mod quota;
mod request;
mod server;
mod snapshot;
pub mod transport;
pub mod tree;
mod view;
pub mod watch;
pub mod wire;
mod work;

pub use domain::{Caller, ConnectionId, DomainId, parse_domain};
pub use error::StoreError;
pub use path::Path;
pub use quota::{Quotas, TURN_BYTES};
pub use server::{Duty, FEATURES, Handled, Store};
pub use snapshot::SnapshotError;
pub use watch::WatchEvent;
