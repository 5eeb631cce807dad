//! Makes one call that takes days: a list of calls, each with a list of updates, in a few pages that are mapped many times.
//! For tests of what else goes on meanwhile.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::mmu::{MmuUpdate, MulticallEntry};
use guests::abi::{Errno, Hypercall, domid};
use guests::memory::{PAGE, Pages, Window};
use guests::probe::{self, call, update_va_mapping};
use guests::tables::LEAF;
use unikernel::boot::Boot;
use unikernel::println;
use zerocopy::IntoBytes;

unikernel::entry!(main);

/// Pages of a list, all of which are the same one.
const ALIASES: u64 = 4096;

fn main(_boot: &Boot) {
    println!("long: from here on a single call goes on");
    let answer = one_long_call();
    println!("long: the call is over: {answer:?}");
}

/// A list of calls, each with a list of updates of a page that is no table.
fn one_long_call() -> Result<u64, Errno> {
    let target = Pages::allocate(1).ok_or(Errno::NoMem)?;
    let update = MmuUpdate { ptr: target.frame(0).ok_or(Errno::Fault)? * PAGE, val: 0 };
    let (updates, count) = aliased(update.as_bytes())?;
    let args = [updates, count, 0, u64::from(domid::SELF), 0, 0];
    let entry = MulticallEntry { op: Hypercall::MmuUpdate.number(), result: -1, args };
    let (calls, count) = aliased(entry.as_bytes())?;
    call(Hypercall::Multicall, [calls, count, 0, 0, 0])
}

/// A list of the same element many times over, in a single page; where it begins, and how long it is.
fn aliased(element: &[u8]) -> Result<(u64, u64), Errno> {
    let page = Pages::allocate(1).ok_or(Errno::NoMem)?;
    let length = element.len() as u64;
    for at in (0..PAGE).step_by(element.len()) {
        probe::store_bytes(page.address() + at, element);
    }
    let window = Window::reserve(ALIASES)?;
    for n in 0..ALIASES {
        update_va_mapping(window.address() + n * PAGE, (page.frame(0).ok_or(Errno::Fault)? * PAGE) | LEAF, 0)?;
    }
    let list = window.address();
    core::mem::forget(window);
    let _ = page.leak();
    Ok((list, ALIASES * PAGE / length))
}
