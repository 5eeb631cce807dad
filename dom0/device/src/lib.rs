//! What devices of all kinds have in common: how far the reset of a device of the machine is, and how much a guest's device may
//! move in a second.
//!
//! Touches: nothing. The caller passes the time.
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod bucket;

pub use bucket::Bucket;

/// How far the reset of a device has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// The reset goes on: continue the reset after a while.
    Pending,
    /// The reset has ended. The device is ready, and no longer accesses memory that it was given before.
    Done,
    /// The device cannot be used, for this reason. It may access memory that it was given at any later time.
    Dead(&'static str),
}
