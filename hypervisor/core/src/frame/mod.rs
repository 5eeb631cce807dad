//! The frame table: for each frame its owner, what it is used as, and how often.
//!
//! Touches: a few words per frame, and the machine's flush. [`state`] holds the rules, as pure functions on the value
//! of a word; [`table`] holds the only loop that applies them, `owned` the fast paths; [`epoch`] records when each CPU
//! last flushed, [`asked`] which flushes a CPU was asked for; [`pool`] hands out free frames.
//! Never touches: page-table entries, domains, locks other than the pool's.
//! Keeps: P2 (counts), P4 (flush before a new type or owner), P10 (frames are zeroed for a new owner).
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod asked;
pub mod epoch;
pub(crate) mod owned;
pub mod pool;
pub mod state;
pub mod table;

pub use state::{Owner, Refused, Use};
pub use table::{FrameTable, Info, Left, Taken};
