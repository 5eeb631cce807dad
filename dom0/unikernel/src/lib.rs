//! A library for 64-bit paravirtual guests in Rust: the base of dom0 and the test guests.
//!
//! An image links this crate and names its main program with `unikernel::entry!(main)`. `main` runs on vcpu 0 with
//! traps, memory, events and time set up. Everything is cooperative: code runs with event upcalls masked, and events
//! are handled between the turns of tasks ([`tasks`]). So no handler ever interrupts code, unless the code unmasks upcalls.
//!
//! Touches: its own domain, through hypercalls, page tables it owns and the pages it shares with the hypervisor.
//! Never touches: hardware; other domains' memory, unless it was granted or mapped by authority.
//! Keeps: page 0 is at `VIRT_BASE`, page *n* at `VIRT_BASE + n * 4096`, and no own page has a second mapping; a page
//! that serves as a page table is mapped read-only from before its first use as one.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod boot;
pub mod console;
pub mod control;
pub mod devices;
pub mod dma;
pub mod entry;
pub mod events;
pub mod grants;
pub mod hypercall;
pub mod machine;
pub mod mark;
pub mod memory;
pub mod pages;
#[cfg(feature = "probe")]
pub mod probe;
mod shared;
pub mod sync;
pub mod tasks;
pub mod testing;
pub mod time;
pub mod traps;

pub use hypercall_abi as abi;
