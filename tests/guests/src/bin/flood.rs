//! Writes without a pause and never ends: on its console ring, or with `how=log` to the hypervisor's log. For tests
//! that this slows nobody else.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::hypercall;
use unikernel::boot::Boot;
use unikernel::println;

unikernel::bare_entry!(main);

fn main(boot: &Boot) {
    println!("flood: begins");
    let to_log = boot.argument("how") == Some("log");
    for line in 0u64.. {
        if to_log {
            // What the log does not take is lost, and the next line follows at once.
            let _ = hypercall::console_write(b"flood: a line for the log\n");
        } else {
            println!("flood: line {line}, and some more text so that the ring is full all the time");
        }
    }
}
