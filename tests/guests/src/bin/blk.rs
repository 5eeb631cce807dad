//! A front end of a disk, xvda, that any guest can be. `do=good` writes and reads back `pages=` pages (4 if left out) for ever,
//! and says so; `do=crash` does as much and then crashes with requests in its ring; `do=harm` changes indices, slots,
//! descriptors, grants and nodes at any moment, closes and connects again, and crashes in the end; `do=count` sends 50,000
//! requests with any contents, which it changes while they are served, and counts the responses. For tests that dom0 goes on
//! serving others.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::domid;
use guests::abi::grant::entry;
use guests::abi::sched::ShutdownReason;
use guests::front::{Device, FIRST, Granted, PATIENCE_NS, Random, reference};
use guests::granted::IN_USE;
use guests::hypercall;
use guests::shared::Shared;
use guests::xenstore::Store;
use ring_protocol::SharedPage;
use ring_protocol::block::{PROTOCOL, Response, SLOT_BYTES, Segment, Slot, operation};
use ring_protocol::ring::{FrontRing, Layout};
use unikernel::boot::Boot;
use unikernel::{println, time};
use zerocopy::{FromBytes, IntoBytes};

unikernel::entry!(main);

/// Pages: the ring, descriptors, and data.
const RING: u64 = 0;
const DESCRIPTORS: u64 = 1;
const DATA: u64 = 2;
const PAGES: u64 = 16;

/// The front end.
struct Disk {
    store: Store,
    device: Device,
    pages: Granted,
    port: u32,
    ring: FrontRing,
    next: u64,
}

fn layout() -> Layout {
    Layout::new(4096, SLOT_BYTES).expect("a page has slots")
}

impl Disk {
    fn new(boot: &Boot) -> Self {
        let pages = Granted::new(PAGES);
        let port = hypercall::allocate_unbound(domid::SELF, 0).expect("a port is free");
        let ring = FrontRing::init(&pages.page(RING), layout());
        Self { store: Store::new(boot), device: Device::new("vbd", 51712), pages, port, ring, next: 0 }
    }

    fn page(&self, page: u64) -> Shared {
        self.pages.page(page)
    }

    /// Writes a key of our directory of the disk.
    fn put(&mut self, key: &str, value: &str) {
        self.device.put(&mut self.store, key, value);
    }

    fn put_number(&mut self, key: &str, value: u32) {
        self.device.put_number(&mut self.store, key, value);
    }

    /// The back end's state; 0 if there is none.
    fn back(&mut self) -> u32 {
        self.device.back(&mut self.store)
    }

    fn until(&mut self, states: &[u32]) -> Option<u32> {
        self.device.until(&mut self.store, states)
    }

    /// Connects; returns whether the back end did.
    fn connect(&mut self) -> bool {
        let ring = self.page(RING);
        ring.write(0, &[0; 4096]);
        self.ring = FrontRing::init(&ring, layout());
        if self.until(&[2]).is_none() {
            return false;
        }
        self.put_number("ring-ref", reference(RING));
        self.put_number("event-channel", self.port);
        self.put("protocol", PROTOCOL);
        self.put("state", "3");
        if self.until(&[4, 5, 6]) != Some(4) {
            return false;
        }
        self.put("state", "4");
        true
    }

    /// Puts a request for a page of data into the ring.
    fn begin(&mut self, what: u8, sector: u64, page: u64) -> bool {
        let segments = [Segment { reference: reference(page), first: 0, last: 7, padding: 0 }];
        let segments = if what == operation::FLUSH { &[][..] } else { &segments };
        self.next += 1;
        let slot = Slot::direct(what, self.next, sector, segments);
        let ring = self.page(RING);
        let begun = self.ring.submit(&ring, slot.as_bytes()).is_ok_and(|index| index.is_some());
        let _ = self.ring.publish(&ring);
        let _ = hypercall::send(self.port);
        begun
    }

    /// The status of a request for a page of data.
    fn ask(&mut self, what: u8, sector: u64, page: u64) -> i16 {
        assert!(self.begin(what, sector, page), "the ring has room");
        let (ring, deadline) = (self.page(RING), time::now_ns() + PATIENCE_NS);
        loop {
            assert!(time::now_ns() < deadline, "no answer");
            if self.ring.look(&ring).expect("the back end is sound") > 0 {
                let mut bytes = [0; size_of::<Response>()];
                self.ring.take(&ring, &mut bytes).expect("there is an answer");
                let response = Response::read_from_bytes(&bytes).expect("an answer's length");
                assert_eq!((response.id, response.operation), (self.next, what), "an answer to something else");
                return response.status;
            }
            let _ = hypercall::poll(&[self.port], time::now_ns() + 1_000_000);
        }
    }

    /// Writes numbered pages and reads them back.
    fn work(&mut self, number: u64, pages: u64) {
        for page in 0..pages {
            let word = number << 8 | page;
            let (from, to) = (self.page(DATA), self.page(DATA + 1));
            (0..4096).step_by(8).for_each(|at| from.write(at, word.as_bytes()));
            (0..4096).step_by(8).for_each(|at| to.write(at, &[0xee; 8]));
            let sector = page * 8;
            assert_eq!(self.ask(operation::WRITE, sector, DATA), 0, "a write fails");
            assert_eq!(self.ask(operation::FLUSH, 0, DATA), 0, "a flush fails");
            assert_eq!(self.ask(operation::READ, sector, DATA + 1), 0, "a read fails");
            assert!(self.pages.words(DATA + 1).all(|found| found == word), "page {page} reads as something else");
        }
    }

    /// Leaves the back end with requests that it may have begun.
    fn leave_busy(&mut self) {
        for request in 0..20 {
            let what = if request % 3 == 0 { operation::READ } else { operation::WRITE };
            self.begin(what, request * 8, DATA + request % (PAGES - DATA));
        }
    }

    /// Closes the disk and connects again, if the back end goes along.
    fn connect_again(&mut self) {
        self.pages.grant_all();
        self.device.remove(&mut self.store, "ring-page-order");
        self.put("state", "6");
        let _ = hypercall::poll(&[], time::now_ns() + 5_000_000);
        if self.back() == 6 {
            self.put("state", "1");
            let connected = self.connect();
            println!("blk: again {connected}");
        }
    }

    /// Does one thing that no front end does, or a request that may be sound.
    fn harm(&mut self, random: &mut Random) {
        let ring = self.page(RING);
        let pick = |random: &mut Random, list: &[u32]| {
            let length = list.len() as u64;
            list.get(usize::try_from(random.below(length)).unwrap_or(0)).copied().unwrap_or(0)
        };
        match random.below(48) {
            0 => ring.store_u32(0, random.word()),
            1 => ring.store_u32(0, ring.load_u32(0).wrapping_add(random.word() % 40)),
            2 => ring.store_u32(8 * usize::from(random.below(2) == 0) + 4, random.word()),
            3 => ring.store_u32(8, random.word()),
            4..=18 => {
                // A slot of random words, with an operation that there is.
                let at = 64 + usize::try_from(random.below(32)).unwrap_or(0) * SLOT_BYTES;
                (0..SLOT_BYTES).step_by(8).for_each(|word| ring.write(at + word, &random.long().to_le_bytes()));
                ring.write(
                    at,
                    &[u8::try_from(random.below(8)).unwrap_or(0), u8::try_from(random.below(14)).unwrap_or(0)],
                );
                ring.write(at + 16, &random.below(4096).to_le_bytes());
                for segment in 0..11 {
                    let reference = FIRST + random.word() % 20;
                    ring.write(at + 24 + segment * 8, &reference.to_le_bytes());
                }
                self.begin(operation::READ, random.below(2048), DATA);
            }
            19..=32 => {
                let segments = u16::try_from(1 + random.below(300)).unwrap_or(1);
                let descriptors = self.page(DESCRIPTORS);
                for segment in 0..512 {
                    let sectors = u32::from(random.below(9) == 0) << 8 | 7 << 8;
                    let segment_at = segment * 8;
                    let reference = FIRST + random.word() % 16;
                    descriptors.write(segment_at, (u64::from(reference) | u64::from(sectors) << 32).as_bytes());
                }
                self.next += 1;
                let what = if random.below(2) == 0 { operation::READ } else { operation::WRITE };
                let reference = reference(DESCRIPTORS);
                let slot = Slot::indirect(what, self.next, random.below(64), segments, reference);
                let _ = self.ring.submit(&ring, slot.as_bytes());
                let _ = self.ring.publish(&ring);
                let _ = hypercall::send(self.port);
                // The descriptors change while the back end may read them.
                (0..64).for_each(|at| descriptors.write(at * 8, &random.long().to_le_bytes()));
            }
            33..=36 => {
                let flags = [0, entry::PERMIT_ACCESS, entry::PERMIT_ACCESS | entry::READONLY];
                let flags = flags.get(usize::try_from(random.below(3)).unwrap_or(0)).copied().unwrap_or(0);
                self.pages.grant(random.below(PAGES), random.below(PAGES), flags);
            }
            37 => {
                let word = random.long();
                self.pages.table.set(reference(random.below(PAGES)), word);
            }
            38 => self.put_number("state", pick(random, &[0, 1, 2, 3, 4, 5, 6, 7, 99])),
            39 => {
                let key = ["ring-ref", "event-channel", "protocol", "ring-page-order", "ring-ref0", "state"];
                let key = key.get(usize::try_from(random.below(6)).unwrap_or(0)).copied().unwrap_or("state");
                if random.below(3) == 0 {
                    self.device.remove(&mut self.store, key);
                } else {
                    self.put_number(key, random.word());
                }
            }
            40 => {
                let _ = hypercall::close(self.port);
                self.port = hypercall::allocate_unbound(domid::SELF, 0).unwrap_or(self.port);
            }
            _ => {
                for _ in 0..40 {
                    self.begin(operation::WRITE, random.below(4096), DATA);
                }
                let _ = hypercall::poll(&[], time::now_ns() + 200_000);
            }
        }
        let _ = hypercall::send(self.port);
    }
}

/// Requests that are counted, and those of one ring. (The back end lets a front end connect ten times a minute.)
const COUNTED: u64 = 50_000;
const RING_LIFE: u64 = 5_000;

impl Disk {
    /// A request with any contents but this id.
    fn any_request(&self, random: &mut Random, id: u64) -> Slot {
        if random.below(16) == 0 {
            let mut bytes = [0; SLOT_BYTES];
            bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.long().to_le_bytes()));
            bytes[8..16].copy_from_slice(&id.to_le_bytes());
            return Slot::read_from_bytes(&bytes).expect("the size of a slot");
        }
        let sector = if random.below(8) == 0 { random.long() } else { random.below(256) * 8 };
        let what = if random.below(2) == 0 { operation::READ } else { operation::WRITE };
        let count = usize::try_from(random.below(12)).unwrap_or(0);
        let segments = core::array::from_fn::<_, 11, _>(|_| self.any_segment(random));
        match random.below(8) {
            0 => Slot::direct(operation::FLUSH, id, 0, &[]),
            1 => Slot::discard(id, sector, random.below(32)),
            2 | 3 => {
                let segments = u16::try_from(random.below(260)).unwrap_or(0);
                Slot::indirect(what, id, sector, segments, reference(DESCRIPTORS))
            }
            _ => Slot::direct(what, id, sector, segments.get(..count).unwrap_or(&segments)),
        }
    }

    /// A segment of a page of ours, or of none.
    fn any_segment(&self, random: &mut Random) -> Segment {
        let reference = match random.below(16) {
            0 => random.word(),
            1 => reference(PAGES) + random.word() % 400,
            _ => reference(DATA + random.below(PAGES - DATA)),
        };
        let [first, last, ..] =
            if random.below(8) == 0 { random.long().to_le_bytes() } else { [0, 7, 0, 0, 0, 0, 0, 0] };
        Segment { reference, first, last, padding: 0 }
    }

    /// Changes what the back end may be looking at: slots except for their ids, descriptors, grants.
    fn meddle(&self, random: &mut Random) {
        let slot = 64 + usize::try_from(random.below(32)).unwrap_or(0) * SLOT_BYTES;
        let word = random.long();
        match random.below(4) {
            0 => {
                let at = usize::try_from(random.below(12)).unwrap_or(0) * 8 + 16;
                self.page(RING).write(slot + if at == 16 { 0 } else { at }, word.as_bytes());
            }
            1 => (0..16).for_each(|_| {
                let at = usize::try_from(random.below(256)).unwrap_or(0) * 8;
                self.page(DESCRIPTORS).write(at, self.any_segment(random).as_bytes());
            }),
            // Without the marks that tell a use, which are to be those of real uses at the end.
            2 => self.pages.table.set(reference(DATA + random.below(PAGES - DATA)), word & !IN_USE),
            _ => {
                let flags = if word & 1 == 0 { entry::PERMIT_ACCESS } else { entry::PERMIT_ACCESS | entry::READONLY };
                (DESCRIPTORS..PAGES).for_each(|page| self.pages.grant(page, page, flags));
            }
        }
    }

    /// Sends `count` requests with any contents; each gets one response.
    fn send_counted(&mut self, random: &mut Random, count: u64) {
        let ring = self.page(RING);
        let (mut sent, mut answered, mut deadline) = (0, 0, u64::MAX);
        while answered < count {
            let batch = sent + 1 + random.below(32);
            while sent < count.min(batch)
                && self.ring.submit(&ring, self.any_request(random, sent).as_bytes()).is_ok_and(|index| index.is_some())
            {
                sent += 1;
            }
            let _ = self.ring.publish(&ring);
            let _ = hypercall::send(self.port);
            self.meddle(random);
            hypercall::yield_now();
            self.meddle(random);
            let came = self.ring.look(&ring).expect("no more responses than requests");
            while self.ring.take(&ring, &mut [0; size_of::<Response>()]).is_some() {
                answered += 1;
            }
            if came > 0 || deadline == u64::MAX {
                deadline = time::now_ns() + PATIENCE_NS;
            }
            assert!(time::now_ns() < deadline, "{sent} requests, {answered} responses, and no more come");
        }
    }

    /// Breaks the ring, closes it, and has nothing left that is in use.
    fn break_ring(&mut self, random: &mut Random) {
        self.page(RING).store_u32(0, random.word() | 1 << 31);
        let _ = hypercall::send(self.port);
        assert!(self.until(&[5, 6]).is_some(), "a broken ring is not closed");
        self.put("state", "6");
        assert_eq!(self.until(&[6]), Some(6), "a broken ring is not let go of");
        self.pages.require_unused();
    }
}

fn main(boot: &Boot) {
    let mut disk = Disk::new(boot);
    let mut random = Random(time::counter());
    match boot.argument("do") {
        Some("good") => {
            assert!(disk.connect(), "not connected: B={}", disk.back());
            let pages = boot.argument("pages").and_then(|pages| pages.parse().ok()).unwrap_or(4);
            for number in 1.. {
                disk.work(number, pages);
                if number % 16 == 0 {
                    println!("blk: good {number}");
                }
                let _ = hypercall::poll(&[], time::now_ns() + 2_000_000);
            }
        }
        Some("count") => {
            println!("blk: count from {:#x}", random.0);
            for ring in 0..COUNTED / RING_LIFE {
                disk.pages.grant_all();
                if ring > 0 {
                    disk.put("state", "1");
                }
                assert!(disk.connect(), "not connected: B={}", disk.back());
                disk.send_counted(&mut random, RING_LIFE);
                disk.break_ring(&mut random);
            }
            println!("blk: counted {COUNTED}");
            hypercall::shutdown(ShutdownReason::Poweroff);
        }
        Some("harm") => {
            println!("blk: harm from {:#x}", random.0);
            disk.connect();
            for step in 0..random.below(400) {
                if step % 80 == 79 {
                    disk.connect_again();
                }
                disk.harm(&mut random);
                if random.below(4) == 0 {
                    hypercall::yield_now();
                }
            }
        }
        _ => {
            assert!(disk.connect(), "not connected: B={}", disk.back());
            disk.work(random.long() >> 16, 4);
            disk.leave_busy();
        }
    }
    hypercall::shutdown(ShutdownReason::Crash);
}
