//! Hostile guests on a heap of fixed size: the heap that dom0 sets aside for each guest is enough, whatever guests do.
//!
//! The heap is the one that dom0 uses, on memory that does not grow. Inside [`inside`], the test's thread allocates
//! from it; everything else comes from the host.

use super::heap::Arena;
use crate::sync::MaskMutex;
use console_backend::{Console, LineWriter, console_bytes};
use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use ring_protocol::console::FrontEnd;
use ring_protocol::store::Client;
use ring_protocol::{SharedPage, WordPage};
use std::alloc::System;
use std::cell::Cell;
use store::transport::Link;
use store::wire::message;
use store::{ConnectionId, DomainId, Quotas, Store, TURN_BYTES};
use test_random::Random;

const CLIENTS: u16 = 6;
/// Bytes of output kept for each guest, as in dom0.
const KEPT: usize = 64 * 1024;
/// Bytes that the store and its own session use before there is a guest.
const BASE: usize = 32 * 1024;
/// Allocations of this size or more do not come from dom0's own heap.
const LARGEST: usize = 256 * 1024;

std::thread_local! {
    /// Whether this thread allocates in the arena.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

static ARENA: Arena = Arena::new();
static LIVE: AtomicUsize = AtomicUsize::new(0);
static GROSS: AtomicUsize = AtomicUsize::new(0);
static WIDEST: AtomicUsize = AtomicUsize::new(0);
static REFUSED: AtomicUsize = AtomicUsize::new(0);
/// Held by the test that uses the arena.
static TURN: MaskMutex<()> = MaskMutex::new(());

/// An allocator that uses the arena [`inside`], and the host's heap elsewhere.
struct Split;

/// Bytes of the heap that an allocation uses: a multiple of 32, with the allocator's record.
const fn cost(layout: Layout) -> usize {
    (layout.size() + 8).next_multiple_of(32)
}

// SAFETY: each allocation comes from the arena or from the host; its address tells from which, when it is freed.
unsafe impl GlobalAlloc for Split {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if INSIDE.get() {
            // SAFETY: the caller's promise, passed on.
            let at = unsafe { ARENA.alloc(layout) };
            if !at.is_null() {
                LIVE.fetch_add(cost(layout), Relaxed);
                GROSS.fetch_add(cost(layout), Relaxed);
                WIDEST.fetch_max(layout.size(), Relaxed);
                return at;
            }
            // In dom0 this would end the domain.
            REFUSED.fetch_add(1, Relaxed);
        }
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if ARENA.contains(at) {
            LIVE.fetch_sub(cost(layout), Relaxed);
            // SAFETY: the allocation came from the arena.
            unsafe { ARENA.dealloc(at, layout) };
        } else {
            // SAFETY: the allocation came from the host's heap.
            unsafe { System.dealloc(at, layout) };
        }
    }
}

#[global_allocator]
static SPLIT: Split = Split;

/// Runs `work` with the arena as the heap.
fn inside<R>(work: impl FnOnce() -> R) -> R {
    INSIDE.set(true);
    let done = work();
    INSIDE.set(false);
    done
}

/// Guests that are served by a store in the arena, and the largest allocations so far.
struct Machine {
    store: Store,
    dom0: ConnectionId,
    pages: Vec<WordPage>,
    links: Vec<Link>,
    clients: Vec<Client>,
    /// What each guest still has to send, in whole requests.
    unsent: Vec<Vec<u8>>,
    /// Bytes in use before the machine was made.
    base: usize,
    /// The most that one turn allocated, in bytes.
    longest: usize,
}

impl Machine {
    fn new() -> Self {
        let before = LIVE.load(Relaxed);
        let (mut store, dom0) = inside(|| {
            let mut store = Store::new(DomainId(0), Quotas::default());
            let dom0 = store.open_local();
            (store, dom0)
        });
        let pages: Vec<WordPage> = (0..CLIENTS).map(|_| WordPage::new()).collect();
        let mut links = Vec::new();
        for (domain, page) in (1..).zip(&pages) {
            inside(|| welcome(&mut store, dom0, domain));
            links.push(inside(|| Link::introduce(DomainId(domain), page)).unwrap());
        }
        let clients = pages.iter().map(|page| Client::attach(page).unwrap()).collect();
        let unsent = vec![Vec::new(); usize::from(CLIENTS)];
        Self { store, dom0, pages, links, clients, unsent, base: before, longest: 0 }
    }

    /// Runs one turn and records how much it allocates, for the comparison with [`TURN_BYTES`].
    fn turn<R>(&mut self, turn: impl FnOnce(&mut Self) -> R) -> R {
        GROSS.store(0, Relaxed);
        let done = inside(|| turn(self));
        self.longest = self.longest.max(GROSS.load(Relaxed));
        done
    }

    /// Makes a guest send a request and, if `reads`, fetch its replies.
    fn ask(&mut self, guest: usize, kind: u32, transaction: u32, payload: &[u8], reads: bool) {
        let payload = &payload[..payload.len().min(4096)];
        self.unsent[guest].extend(message(kind, 7, transaction, payload));
        for _ in 0..64 {
            let sent = self.clients[guest].requests.write(&self.pages[guest], &self.unsent[guest]).unwrap();
            self.unsent[guest].drain(..sent);
            if self.unsent[guest].is_empty() && sent == 0 {
                break;
            }
            self.turn(|m| {
                let _ = m.links[guest].step(&m.pages[guest], &mut m.store);
            });
            let mut buffer = [0; 1024];
            while reads && self.clients[guest].responses.read(&self.pages[guest], &mut buffer).unwrap() > 0 {
                self.turn(|m| {
                    let _ = m.links[guest].step(&m.pages[guest], &mut m.store);
                });
            }
            self.turn(|m| m.store.work());
        }
        // A guest whose requests are not taken starts over, or it would never send a whole request again.
        if self.unsent[guest].len() > 64 * 1024 {
            self.break_ring(guest);
        }
    }

    /// Makes a guest break its ring, and ask for a new one.
    fn break_ring(&mut self, guest: usize) {
        let page = &self.pages[guest];
        page.store_u32(2068, 1);
        self.unsent[guest].clear();
        self.turn(|m| {
            let _ = m.links[guest].step(&m.pages[guest], &mut m.store);
        });
        self.clients[guest] = Client::attach(&self.pages[guest]).unwrap();
    }

    fn audit(&self, what: &str) {
        self.store.audit().unwrap();
        let live = LIVE.load(Relaxed) - self.base;
        let budget = BASE + usize::from(CLIENTS) * Quotas::default().domain_bytes();
        assert!(live <= budget, "{what}: {live} bytes of {budget}");
        let refused = REFUSED.load(Relaxed);
        assert_eq!(refused, 0, "{what}: allocations refused with {live} bytes of {budget} in use");
        for domain in 1..=CLIENTS {
            let charged = self.store.charged(DomainId(domain));
            // One change, and nodes that privileged callers write, may come on top of the quota.
            assert!(charged <= Quotas::default().memory_bytes + 16 * 1024, "{what}: domain {domain} has {charged}");
        }
    }

    fn end(self, what: &str) {
        self.audit(what);
        let longest = self.longest;
        let (widest, live) = (WIDEST.load(Relaxed), LIVE.load(Relaxed) - self.base);
        println!("{what}: {live} bytes in use, {longest} in a turn, {widest} in one piece");
        assert!(longest <= TURN_BYTES, "{what}: a turn took {longest} bytes");
        assert!(widest < LARGEST, "{what}: {widest} bytes in one piece");
        inside(|| drop(self));
    }
}

/// Introduces a domain as the toolstack does.
fn welcome(store: &mut Store, dom0: ConnectionId, domain: u16) {
    let mut session = store.session(dom0);
    let home = format!("/local/domain/{domain}");
    session.mkdir(&home).unwrap();
    session.set_permissions(&home, &format!("n0,r{domain}")).unwrap();
    // All guests may read `data`, so all of them are told of all changes.
    let data = format!("{home}/data");
    session.mkdir(&data).unwrap();
    session.set_permissions(&data, &format!("b{domain}")).unwrap();
    session.introduce(DomainId(domain), 0x1000, 3).unwrap();
    let _ = store.next_duty();
}

/// Runs `work` with the arena to itself, with `bytes` of memory.
fn with_arena(bytes: usize, work: impl FnOnce()) {
    let _turn = TURN.lock();
    ARENA.renew(bytes);
    [&LIVE, &REFUSED, &WIDEST].iter().for_each(|counter| counter.store(0, Relaxed));
    work();
}

fn store_arena() -> usize {
    BASE + usize::from(CLIENTS) * Quotas::default().domain_bytes() + TURN_BYTES
}

/// A request that uses up a quota when repeated: `way` chooses the quota, `n` is the number of the repetition. Returns
/// the message's kind, transaction and payload.
fn greedy(way: usize, n: usize) -> (u32, u32, Vec<u8>) {
    let x = |count: usize| "x".repeat(count);
    let names = |n: usize| format!("{}/{}", n / 40, n % 40);
    let (kind, transaction, payload) = match way {
        // Small nodes, large nodes, and nodes with long names.
        0 => (11, 0, format!("data/{}\0", names(n))),
        1 => (11, 0, format!("data/{}\0{}", names(n), x(2000))),
        2 => (12, 0, format!("data/{}{n}\0", x(900))),
        // Watches with long tokens, on long paths.
        3 => (4, 0, format!("data/{}\0{n}{}\0", x(20), x(900))),
        4 => (4, 0, format!("data/{}{n}\0{n}\0", x(900))),
        // Transactions that copy the widest directory again and again.
        5 if n < 600 => (12, 0, format!("data/{n}\0")),
        5 if n < 610 => (6, 0, "\0".into()),
        5 => (11, 1 + u32::try_from(n % 10).unwrap(), format!("data/{n}\0")),
        // Deep trees.
        6 => (11, 0, format!("data/{n}{}\0", "/y".repeat(200))),
        // Changes that all guests watch.
        7 if n < 120 => (4, 0, format!("/local/domain/{}/data\0{n}\0", 1 + n % 6)),
        7 => (11, 0, format!("data/{}/{}\0", x(100), n % 900)),
        // Small requests whose replies are not fetched.
        8 => (2, 0, "data\0".into()),
        _ => (1, 0, "data\0".into()),
    };
    (kind, transaction, payload.into_bytes())
}

#[test]
fn guests_that_fill_their_quotas_fit_into_their_budgets() {
    with_arena(store_arena(), || {
        let mut machine = Machine::new();
        for way in 0..10 {
            for n in 0..1500 {
                for guest in 0..usize::from(CLIENTS) {
                    let (kind, transaction, payload) = greedy((way + guest * 3) % 10, n);
                    // After a while, half of the guests fetch nothing.
                    machine.ask(guest, kind, transaction, &payload, n < 1000 || guest % 2 == 0);
                }
            }
            machine.audit(&format!("way {way}"));
            for guest in 0..usize::from(CLIENTS) {
                machine.break_ring(guest);
            }
            if way % 3 == 2 {
                for guest in 0..usize::from(CLIENTS) {
                    machine.ask(guest, 13, 0, b"data/0\0", true);
                    machine.ask(guest, 13, 0, b"data\0", true);
                    let domain = u16::try_from(guest).unwrap() + 1;
                    let (path, rights) = (format!("/local/domain/{domain}/data"), format!("b{domain}"));
                    machine.turn(|m| m.store.session(m.dom0).mkdir(&path).unwrap());
                    machine.turn(|m| m.store.session(m.dom0).set_permissions(&path, &rights).unwrap());
                }
            }
        }
        machine.end("quotas");
    });
}

#[test]
fn guests_that_do_anything_fit_into_their_budgets() {
    with_arena(store_arena(), || {
        let mut random = Random::seeded(17);
        let mut machine = Machine::new();
        for step in 0..60_000 {
            let guest = random.below(CLIENTS.into());
            let (way, n) = (random.below(10), random.below(1500));
            let (mut kind, mut transaction, mut payload) = greedy(way, n);
            match random.below(12) {
                0 => (kind, payload) = (13, format!("data/{}\0", n % 40).into_bytes()),
                1 => (kind, transaction, payload) = (7, transaction.max(1), b"T\0".to_vec()),
                2 => (kind, payload) = (14, format!("data/{}\0n{}\0r1\0r2\0", n % 40, guest + 1).into_bytes()),
                3 => transaction = u32::try_from(random.below(11)).unwrap(),
                4 => {
                    payload = payload.strip_prefix(b"data").map_or(payload.clone(), |rest| {
                        [format!("/local/domain/{}/data", 1 + random.below(CLIENTS)).as_bytes(), rest].concat()
                    })
                }
                5 => kind = u32::try_from(random.below(24)).unwrap(),
                _ => {}
            }
            machine.ask(guest, kind, transaction, &payload, random.below(3) > 0);
            if random.below(5000) == 0 {
                machine.break_ring(guest);
            }
            if step % 5000 == 0 {
                machine.audit(&format!("step {step}"));
            }
        }
        machine.end("anything");
    });
}

#[test]
fn consoles_take_what_they_need_at_once() {
    let each = console_bytes(KEPT);
    with_arena(usize::from(CLIENTS) * each + console_backend::TURN_BYTES, || {
        let pages: Vec<WordPage> = (0..CLIENTS).map(|_| WordPage::new()).collect();
        let mut consoles: Vec<(Console, LineWriter)> = Vec::with_capacity(pages.len());
        for page in &pages {
            consoles.push(inside(|| (Console::attach(page, KEPT).unwrap(), LineWriter::new("guest| ".into()))));
        }
        let mut ends: Vec<FrontEnd> = pages.iter().map(|page| FrontEnd::attach(page).unwrap()).collect();
        let mut longest = 0;
        for round in 0..2000usize {
            for ((console, lines), (end, page)) in consoles.iter_mut().zip(ends.iter_mut().zip(&pages)) {
                let noise: Vec<u8> = (0..700).map(|n| u8::try_from((round * 31 + n * 7) % 256).unwrap()).collect();
                end.output.write(page, &noise).unwrap();
                GROSS.store(0, Relaxed);
                inside(|| {
                    console.type_in(&[b'k'; 300]);
                    let served = console.serve(page, 2048, |bytes| lines.push(bytes, |_| {})).unwrap();
                    assert_eq!(served.taken, 700);
                });
                longest = longest.max(GROSS.load(Relaxed));
            }
        }
        let live = LIVE.load(Relaxed);
        println!("consoles: {live} bytes in use, {longest} in a turn");
        assert!(live <= usize::from(CLIENTS) * each && REFUSED.load(Relaxed) == 0);
        assert!(longest <= console_backend::TURN_BYTES);
        inside(|| drop(consoles));
        assert_eq!(LIVE.load(Relaxed), 0);
    });
}
