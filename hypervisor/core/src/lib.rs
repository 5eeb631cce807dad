//! The rules of the hypervisor: what is allowed, and what follows from it.
//!
//! Touches: values, and memory through the traits of [`machine`].
//! Never touches: a register, a device, a raw pointer. It knows nobody but the ABI, so it runs in ring 0, in a unit
//! test and in `tests/sim` alike.
//! Keeps: P1-P12 of `hypervisor/ARCHITECTURE.md`.
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;
#[cfg(feature = "planted-fault")]
pub mod audit;
pub mod calls;
pub mod claim;
pub mod decode;
pub mod dispatch;
pub mod domain;
pub mod emulate;
pub mod event;
pub mod fault;
pub mod frame;
pub mod grant;
pub mod lock;
pub mod machine;
pub mod memory;
pub mod paging;
pub mod policy;
pub mod sched;
pub mod time;
pub mod trap;
pub mod world;
