//! The first domain: makes the guests of the boot bundle, serves their store and consoles, and sees to their end.
//!
//! This is the wiring diagram. What a domain is made of is the toolstack's business, what the tree says the store's,
//! what a console does the console back end's; here they meet the hypervisor, through the unikernel.
//!
//! Touches: the boot bundle, the machine's console, the guests by authority, and their rings by grants.
//! Never touches: a guest's memory after it runs, but for the rings.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

mod authority;
mod bundle;
mod consoles;
mod guests;
mod stores;

use alloc::rc::Rc;
use hypercall_abi::sched::ShutdownReason;
use unikernel::boot::Boot;
use unikernel::{control, memory, println, tasks};

unikernel::entry!(main);

fn main(boot: &Boot) {
    let free = memory::free_pages() >> 8;
    println!("dom0: Tenon {}, {free} MiB free", env!("CARGO_PKG_VERSION"));
    let bundle = boot.ramdisk();
    let reason = tasks::block_on(async move {
        let stores = stores::start();
        let consoles = consoles::start();
        guests::run(bundle, Rc::clone(&stores), consoles).await
    });
    if reason == ShutdownReason::Poweroff {
        println!("dom0: no guest is left, powering off");
    }
    control::shutdown(reason);
}
