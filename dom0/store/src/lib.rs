//! The store: a small tree by which domains meet (ABI io 3), as a pure state machine.
//!
//! Touches: the tree, watches, transactions and message queues it holds; in [`transport`], bytes of
//! a shared page through [`ring_protocol::SharedPage`].
//! Never touches: event channels, grants, clocks, the console. What its caller must do outside is returned as a
//! [`Duty`] or a [`Step`](transport::Step). Whether a client is privileged is fixed when its connection is made.
//! Keeps (audited): the tree is consistent, and usage counts equal a recount. Memory per client is bounded whatever the
//! client does, and so is the work of one turn. A request takes effect as a whole or not at all. A client gets only
//! replies and events that the permissions allow it. The same calls give the same results.
//! Deliberately absent: recursion over paths, a privileged domain number, merging of events for
//! different paths, unbounded queues.
//!
//! | module | question |
//! | --- | --- |
//! | [`wire`], `request` | what did the client say? |
//! | [`path`], [`permission`], [`quota`] | may it say that? |
//! | [`tree`], `view` | what is there, and what would be there after this transaction? |
//! | [`watch`] | which watches concern a change? |
//! | `connection`, `server` | whose turn is it, and what is the reply? |
//! | `work` | what is left to do after a reply, piece by piece? |
//! | [`local`] | how does code in the server's own domain make requests? |
//! | [`transport`] | how do the bytes get here? |
//! | `snapshot` | how does a new server continue where the old one stopped? |
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
