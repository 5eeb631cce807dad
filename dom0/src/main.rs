//! The first domain: which services this image runs, and nothing else.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use unikernel::boot::Boot;
use unikernel::println;

unikernel::entry!(main);

fn main(_boot: &Boot) {
    println!("Tenon dom0 {}", env!("CARGO_PKG_VERSION"));
}
