//! Time (being written): sleeps on the one-shot timer.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]
use unikernel::println;
unikernel::entry!(main);
fn main(_b: &unikernel::boot::Boot) {
    println!("free {} pages", unikernel::memory::free_pages());
    let r = unikernel::time::record();
    println!("{r:?} {}", unikernel::time::now_ns());
    unikernel::tasks::block_on(async {
        for i in 0..5 {
            unikernel::time::sleep_ns(20_000_000).await;
            println!("{i} {}", unikernel::time::now_ns());
        }
    });
    println!("@@ done: passed");
}
