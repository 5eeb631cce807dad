//! A client of the store that means harm, and that any guest can be. `do=fill` holds as much as its quotas let it, and
//! fetches nothing more; `do=break` breaks its ring again and again. For tests that dom0 goes on serving others.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]
#![allow(clippy::cast_possible_truncation, reason = "messages and rings are small")]

use guests::hypercall;
use guests::shared::Shared;
use ring_protocol::SharedPage;
use unikernel::boot::Boot;
use unikernel::{println, time};

unikernel::entry!(main);

/// Places in the store page (io 3.1).
const REQUESTS_TAKEN: usize = 2048;
const REQUESTS_MADE: usize = 2052;
const REPLIES_TAKEN: usize = 2056;
const REPLIES_MADE: usize = 2060;
const CONNECTION: usize = 2068;
const ERROR: usize = 2072;
const RING: u32 = 1024;

const READ: u32 = 2;
const WATCH: u32 = 4;
const START: u32 = 6;
const WRITE: u32 = 11;

/// Our end of the store page.
struct Ring {
    page: Shared,
    port: u32,
}

impl Ring {
    fn get(&self, at: usize) -> u32 {
        self.page.load_u32(at)
    }

    fn put(&self, at: usize, value: u32) {
        self.page.store_u32(at, value);
    }

    /// Sends a request whose payload has these parts; replies and events are thrown away unread.
    fn ask(&self, kind: u32, transaction: u32, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let words = [kind, 0, transaction, length as u32];
        for word in words {
            self.send(&word.to_le_bytes());
        }
        parts.iter().for_each(|part| self.send(part));
        while self.get(REQUESTS_TAKEN) != self.get(REQUESTS_MADE) {
            self.wait();
        }
    }

    fn send(&self, mut rest: &[u8]) {
        while !rest.is_empty() {
            let made = self.get(REQUESTS_MADE);
            let room = RING - made.wrapping_sub(self.get(REQUESTS_TAKEN));
            let at = made % RING;
            let run = (RING - at).min(room).min(rest.len() as u32);
            if run == 0 {
                self.wait();
                continue;
            }
            let (now, later) = rest.split_at(run as usize);
            self.page.write(at as usize, now);
            self.put(REQUESTS_MADE, made.wrapping_add(run));
            rest = later;
        }
    }

    /// Lets the store work, and throws away what it has answered.
    fn wait(&self) {
        self.put(REPLIES_TAKEN, self.get(REPLIES_MADE));
        let _ = hypercall::send(self.port);
        hypercall::yield_now();
    }
}

/// Fills the memory quota with large nodes, watches, transactions and small nodes, and goes on asking for more.
fn fill(ring: &Ring) {
    let (value, token) = ([b'x'; 2000], [b't'; 900]);
    let digits = |n: u32| [b'a' + (n / 260) as u8, b'a' + (n / 10 % 26) as u8, b'0' + (n % 10) as u8];
    for n in 0..1000 {
        ring.ask(WRITE, 0, &[b"data/", &digits(n), b"\0", &value]);
    }
    for n in 0..128 {
        ring.ask(WATCH, 0, &[b"data\0", &digits(n), &token, b"\0"]);
    }
    for n in 1..11 {
        ring.ask(START, 0, &[b"\0"]);
        ring.ask(WRITE, n, &[b"data/t\0", &value]);
    }
    for n in 0..1000 {
        ring.ask(WRITE, 0, &[b"data/s", &digits(n), b"\0"]);
    }
    // A transaction remembers what it has read; what it is refused must not stay there.
    for n in 0..3000 {
        ring.ask(READ, 1, &[b"data/", &digits(n), &value[..1900], b"\0"]);
    }
    println!("store: full");
    // Events and replies pile up from here on: nothing is fetched.
    for n in 0..40 {
        for word in [WRITE, 0, 0, 9] {
            ring.send(&word.to_le_bytes());
        }
        for part in [b"data/".as_slice(), &digits(n), b"\0"] {
            ring.send(part);
        }
        let _ = hypercall::send(ring.port);
    }
    println!("store: stays");
}

/// Breaks the ring and has it mended.
fn break_it(ring: &Ring, times: u32) {
    for _ in 0..times {
        ring.put(REQUESTS_MADE, ring.get(REQUESTS_TAKEN).wrapping_add(5000));
        let _ = hypercall::send(ring.port);
        while ring.get(ERROR) == 0 {
            hypercall::yield_now();
        }
        ring.put(CONNECTION, 1);
        let _ = hypercall::send(ring.port);
        while ring.get(CONNECTION) == 1 {
            hypercall::yield_now();
        }
    }
    println!("store: broken {times} times");
}

fn main(boot: &Boot) {
    let info = boot.info();
    let ring = Ring { page: Shared::of_frame(info.store_mfn), port: info.store_evtchn };
    match boot.argument("do") {
        Some("fill") => fill(&ring),
        Some("break") => return break_it(&ring, 2000),
        _ => println!("store: do=fill or do=break"),
    }
    loop {
        let _ = hypercall::poll(&[], time::now_ns() + 1_000_000_000);
    }
}
