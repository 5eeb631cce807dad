//! Measures how long it waits for dom0: for a value of the store, and until a byte it prints is taken. Tells the worst so far
//! five times a second. For tests that dom0 serves a guest also while it is busy with others.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::hypercall;
use guests::shared::Shared;
use ring_protocol::SharedPage;
use unikernel::boot::Boot;
use unikernel::{print, println, time};

unikernel::entry!(main);

/// Places in the store page (ABI io 3.1).
const REQUESTS_MADE: usize = 2052;
const REPLIES_TAKEN: usize = 2056;
const REPLIES_MADE: usize = 2060;
const RING: u32 = 1024;
/// Places in the console page (ABI io 2).
const OUTPUT_TAKEN: usize = 3080;
const OUTPUT_MADE: usize = 3084;

const READ: u32 = 2;
/// Bytes of the head of a message.
const HEAD: u32 = 16;
/// From one round to the next, in nanoseconds.
const PAUSE: u64 = 1_000_000;
/// From one look at the answer to the next.
const LOOK: u64 = 50_000;
/// From one report to the next.
const REPORT: u64 = 200_000_000;

/// A page that we share with dom0, and the port beside it.
struct Link {
    page: Shared,
    port: u32,
}

impl Link {
    fn get(&self, at: usize) -> u32 {
        self.page.load_u32(at)
    }

    /// Calls dom0, and sleeps until something holds; answers how long that took, in nanoseconds.
    fn until(&self, holds: impl Fn(&Self) -> bool) -> u64 {
        let begin = time::now_ns();
        let _ = hypercall::send(self.port);
        while !holds(self) {
            let _ = hypercall::poll(&[], time::now_ns() + LOOK);
        }
        time::now_ns() - begin
    }
}

/// Reads our own domain's name from the store.
fn read(store: &Link) -> u64 {
    let path = b"name\0";
    let head = [READ, 0, 0, 5].map(u32::to_le_bytes);
    let mut made = store.get(REQUESTS_MADE);
    for byte in head.iter().flatten().chain(path) {
        store.page.write((made % RING) as usize, &[*byte]);
        made = made.wrapping_add(1);
    }
    store.page.store_u32(REQUESTS_MADE, made);
    let took = store.until(|store| store.get(REPLIES_MADE).wrapping_sub(store.get(REPLIES_TAKEN)) > HEAD);
    store.page.store_u32(REPLIES_TAKEN, store.get(REPLIES_MADE));
    took
}

/// Prints a byte.
fn print_byte(console: &Link) -> u64 {
    print!(".");
    console.until(|console| console.get(OUTPUT_TAKEN) == console.get(OUTPUT_MADE))
}

fn main(boot: &Boot) {
    let info = boot.info();
    let store = Link { page: Shared::of_frame(info.store_mfn), port: info.store_evtchn };
    let console = Link { page: Shared::of_frame(info.console_mfn), port: info.console_evtchn };
    let (mut worst, mut rounds, mut report) = ([0; 2], 0u64, time::now_ns());
    loop {
        let took = [read(&store), print_byte(&console)];
        worst = [worst[0].max(took[0]), worst[1].max(took[1])];
        rounds += 1;
        if time::now_ns() >= report {
            report += REPORT;
            let [store, console] = worst.map(|ns| ns / 1000);
            println!("\nlatency: {rounds} rounds, store {store} us, console {console} us");
        }
        let _ = hypercall::poll(&[], time::now_ns() + PAUSE);
    }
}
