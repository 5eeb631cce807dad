//! A 64-bit paravirtual guest in Rust, as a library: the floor under dom0 and the test guests.
//!
//! An image links this crate, says `unikernel::entry!(main)` and runs `main` on vcpu 0 with traps, memory, events and
//! time set up. Everything above is cooperative: code runs with event upcalls masked and meets events when it sleeps
//! ([`tasks`]), so no handler ever interrupts it, unless it unmasks on purpose.
//!
//! Touches: its own domain, through hypercalls, page tables it owns and the pages it shares with the hypervisor.
//! Never touches: hardware, other domains' memory that was not granted or mapped by authority.
//! Keeps: page 0 at `VIRT_BASE`, page *n* at `VIRT_BASE + n * 4096`, and no second mapping of an own page; a page that
//! serves as a page table is mapped read-only from before its first use as one.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod boot;
pub mod console;
pub mod control;
pub mod entry;
pub mod events;
pub mod grants;
pub mod hypercall;
pub mod mark;
pub mod memory;
#[cfg(feature = "probe")]
pub mod probe;
mod shared;
pub mod sync;
pub mod tasks;
pub mod testing;
pub mod time;
pub mod traps;

pub use hypercall_abi as abi;
