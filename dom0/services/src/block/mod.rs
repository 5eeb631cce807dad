//! The disks of guests: this module makes each disk from its description, and serves the disk.
//!
//! ```text
//! Disks::attach    description -> open: a Medium and its Hold -> device: both directories, in one transaction
//! Vbd              the endpoint of a disk: a task carries out the acts of its handshake
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
//! | `vbd` | what is a disk of a guest made of, and how is its ring served? |
//! | `worker` | when does a queue get its turn, and what becomes of its events? |
//!
//! Touches: rings, ports and pins of guests, through the [`BlockHost`]; the store, through a session per disk.
//! Guarantees: the memory for a disk's requests and journal is set aside when the disk is attached, or the disk is refused. An
//! overlay takes pages and tables as the guest writes, up to its limit; a write fails if the machine has no memory for it.
//! Dropping a [`Disks`] writes nothing, sends nothing and gives back no pin: only [`Disks::detach`] and [`Disks::domain_died`]
//! end disks.

mod disks;
mod host;
mod medium;
mod open;
mod tap;
mod vbd;
mod worker;

pub use disks::{Disks, Image, Listed, vbd_bytes};
pub use host::{Backing, BlockHost, Own};
pub use worker::{QUEUE_BYTES, TURN_BYTES};
