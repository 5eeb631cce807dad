//! The disks of guests: makes each from its description, and serves it.
//!
//! ```text
//! Disks::attach    description -> open: a Medium, and who holds it -> nodes: both directories, in one transaction
//! Vbd              a task per disk of a guest: does what xenbus_backend::Device says
//! Worker           a task per device, and one for memory: gives turns to a block_backend::Queue
//! Disks::detach, Disks::domain_died    until nothing is in flight, pinned, mapped, or written in the store
//! ```
//!
//! | module | question |
//! | --- | --- |
//! | `disks` | which disks are there, and which guest has which of them? |
//! | `host` | what do disks need of the domain they run in? |
//! | `open` | what does a description mean on this machine? |
//! | `medium` | where are the sectors of a guest's disk, and what does it hold? |
//! | `tap` | how is a partition table read from a device that serves guests? |
//! | `nodes` | what is written in the store about a disk, and what is read? |
//! | `vbd` | how does a disk of a guest live, from the first state to the last? |
//! | `worker` | when does a queue get its turn, and what becomes of its events? |
//!
//! Touches: rings, ports and pins of guests, through the [`BlockHost`]; the store, through a session per disk.
//! Keeps: a guest's memory for requests and its journal are set aside, or the disk is refused, when the disk is attached. An
//! overlay takes pages and tables as it is written, at most its limit, and is refused more when there is none.
//! Dropping a [`Disks`] writes nothing, sends nothing and gives back no pin; [`Disks::detach`] and [`Disks::domain_died`] are
//! the named acts.

mod disks;
mod host;
mod medium;
mod nodes;
mod open;
mod tap;
mod vbd;
mod worker;

pub use disks::{Disks, Image, Listed, vbd_bytes};
pub use host::{Backing, BlockHost, Own};
pub use worker::{QUEUE_BYTES, TURN_BYTES};
