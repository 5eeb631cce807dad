//! Traps, `iret`, emulated instructions and user mode (core 3).
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

#[path = "traps/compat.rs"]
mod compat;
#[path = "traps/emulated.rs"]
mod emulated;
#[path = "traps/failsafe.rs"]
mod failsafe;
#[path = "traps/frames.rs"]
mod frames;
#[path = "traps/iret.rs"]
mod iret;
#[path = "traps/segments.rs"]
mod segments;
#[path = "traps/user.rs"]
mod user;

unikernel::entry!(unikernel::testing::run);
