//! Never gives the CPU back: no call, no event, no trap. For tests of the scheduler and of destroying a running domain.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use unikernel::boot::Boot;
use unikernel::println;

unikernel::bare_entry!(main);

fn main(_boot: &Boot) {
    println!("spin: from here on only the hypervisor's timer gets the CPU back");
    loop {
        core::hint::spin_loop();
    }
}
