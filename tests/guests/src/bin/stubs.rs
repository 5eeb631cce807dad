//! The ways that the hypervisor's entry code goes without asking its rules: system calls of user code, the way back, page
//! faults of user code, the GS base of user mode. Each test opens these ways, changes one condition and compares every
//! register, flag and word with what the ABI says (core 3). The suite runs it also with `lean=off`, where the rules do the
//! same.
//!
//! | argument | what is done |
//! | --- | --- |
//! | `test=NAME` | that test |
//! | `end=NAME` | the domain ends in that way, see `stubs/ends.rs` |
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

#[path = "stubs/calls.rs"]
mod calls;
#[path = "stubs/ends.rs"]
mod ends;
#[path = "stubs/faults.rs"]
mod faults;
#[path = "stubs/others.rs"]
mod others;
#[path = "stubs/returns.rs"]
mod returns;
#[path = "stubs/stacks.rs"]
mod stacks;
#[path = "stubs/stage.rs"]
mod stage;
#[path = "stubs/writes.rs"]
mod writes;

use unikernel::boot::Boot;

unikernel::entry!(main);

fn main(boot: &Boot) {
    match boot.argument("end") {
        Some(how) => ends::end(how),
        None => unikernel::testing::run(boot),
    }
}
