//! A front end of a disk, xvda, that any guest can be. `do=good` writes and reads back for ever, and says so; `do=crash` does as
//! much and then crashes with requests in its ring; `do=harm` changes indices, slots, descriptors, grants and nodes at any
//! moment, closes and connects again, and crashes in the end. For tests that dom0 goes on serving others.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::domid;
use guests::abi::grant::entry;
use guests::abi::sched::ShutdownReason;
use guests::memory::{self, PAGE, Pages, Window};
use guests::{hypercall, probe};
use ring_protocol::SharedPage;
use ring_protocol::block::{PROTOCOL, Response, SLOT_BYTES, Segment, Slot, operation};
use ring_protocol::ring::{FrontRing, Layout};
use unikernel::boot::Boot;
use unikernel::{println, time};
use zerocopy::{FromBytes, IntoBytes};

unikernel::entry!(main);

/// Our directory of the disk, in the store.
const FRONT: &str = "device/vbd/51712/";
/// References before these are the store's and the console's.
const FIRST: u32 = 8;
/// Pages: the ring, descriptors, and data.
const RING: u64 = 0;
const DESCRIPTORS: u64 = 1;
const DATA: u64 = 2;
const PAGES: u64 = 16;
/// Nanoseconds that an answer may take.
const PATIENCE_NS: u64 = 20_000_000_000;

/// A page of ours that the back end has as well.
#[derive(Clone, Copy)]
struct Page(u64);

impl Page {
    fn at(self, offset: usize) -> u64 {
        self.0 + offset as u64
    }

    fn word(self, offset: usize) -> u64 {
        probe::load(self.at(offset))
    }
}

impl SharedPage for Page {
    fn len_bytes(&self) -> usize {
        4096
    }

    fn load_u32(&self, offset: usize) -> u32 {
        let word = self.word(offset & !7);
        u32::try_from(word >> (offset % 8 * 8) & u64::from(u32::MAX)).unwrap_or(0)
    }

    /// Writes both words of eight bytes: the other one may only be a wish to be woken, which is never relied on here.
    fn store_u32(&self, offset: usize, value: u32) {
        let (at, shift) = (offset & !7, offset % 8 * 8);
        let other = self.word(at) & !(u64::from(u32::MAX) << shift);
        probe::store(self.at(at), other | u64::from(value) << shift);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        probe::load_bytes(self.at(offset), into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        probe::store_bytes(self.at(offset), from);
    }
}

/// Text in a buffer.
struct Text<const N: usize>([u8; N], usize);

impl<const N: usize> Text<N> {
    const fn new() -> Self {
        Self([0; N], 0)
    }

    fn add(mut self, part: &[u8]) -> Self {
        let room = self.0.get_mut(self.1..).unwrap_or_default();
        let count = room.len().min(part.len());
        room.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
        self.1 += count;
        self
    }

    fn number(self, number: u32) -> Self {
        let (mut digits, mut rest, mut at) = ([0; 10], number, 10);
        while at == 10 || rest > 0 {
            at -= 1;
            digits[at] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
        }
        self.add(digits.get(at..).unwrap_or_default())
    }

    fn bytes(&self) -> &[u8] {
        self.0.get(..self.1).unwrap_or_default()
    }
}

/// A client of the store. It watches nothing, so that each message is an answer.
struct Store {
    page: Page,
    client: ring_protocol::store::Client,
    port: u32,
}

impl Store {
    const READ: u32 = 2;
    const WRITE: u32 = 11;
    const REMOVE: u32 = 13;
    const ERROR: u32 = 16;

    fn new(boot: &Boot) -> Self {
        let info = boot.info();
        let page = Page(memory::linear(memory::page_of_frame(info.store_mfn).expect("the store page is ours")));
        let client = ring_protocol::store::Client::attach(&page).expect("the ring is sound");
        Self { page, client, port: info.store_evtchn }
    }

    /// Returns the answer's text; `None` for an error.
    fn ask(&mut self, kind: u32, payload: &[u8]) -> Option<Text<256>> {
        let words = [kind, 0, 0, u32::try_from(payload.len()).unwrap_or(0)];
        self.send(words.as_bytes());
        self.send(payload);
        let mut head = [0; 16];
        self.receive(&mut head);
        let [kind, _, _, length] = <[u32; 4]>::read_from_bytes(&head).expect("16 bytes");
        let mut answer = Text::new();
        for _ in 0..length {
            let mut byte = [0];
            self.receive(&mut byte);
            answer = answer.add(&byte);
        }
        (kind != Self::ERROR).then_some(answer)
    }

    fn send(&mut self, mut rest: &[u8]) {
        while !rest.is_empty() {
            let count = self.client.requests.write(&self.page, rest).expect("the ring is sound");
            rest = rest.get(count..).unwrap_or_default();
            self.wait(count);
        }
    }

    fn receive(&mut self, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let rest = into.get_mut(done..).unwrap_or_default();
            let count = self.client.responses.read(&self.page, rest).expect("the ring is sound");
            done += count;
            self.wait(count);
        }
    }

    fn wait(&self, done: usize) {
        let _ = hypercall::send(self.port);
        if done == 0 {
            hypercall::yield_now();
        }
    }

    fn get(&mut self, path: &[u8]) -> Option<Text<256>> {
        self.ask(Self::READ, Text::<256>::new().add(path).add(b"\0").bytes())
    }

    fn put(&mut self, key: &str, value: &[u8]) {
        let request = Text::<256>::new().add(FRONT.as_bytes()).add(key.as_bytes()).add(b"\0").add(value);
        let _ = self.ask(Self::WRITE, request.bytes());
    }

    fn put_number(&mut self, key: &str, value: u32) {
        self.put(key, Text::<16>::new().number(value).bytes());
    }

    fn remove(&mut self, key: &str) {
        let request = Text::<256>::new().add(FRONT.as_bytes()).add(key.as_bytes()).add(b"\0");
        let _ = self.ask(Self::REMOVE, request.bytes());
    }

    /// The back end's state; 0 if there is none.
    fn back(&mut self) -> u32 {
        let Some(back) = self.get(Text::<256>::new().add(FRONT.as_bytes()).add(b"backend").bytes()) else { return 0 };
        let state = self.get(Text::<256>::new().add(back.bytes()).add(b"/state").bytes());
        state.and_then(|state| state.bytes().first().map(|digit| u32::from(digit.wrapping_sub(b'0')))).unwrap_or(0)
    }

    /// Waits until the back end's state is one of these, and returns it.
    fn until(&mut self, states: &[u32]) -> Option<u32> {
        let deadline = time::now_ns() + PATIENCE_NS;
        while time::now_ns() < deadline {
            let state = self.back();
            if states.contains(&state) {
                return Some(state);
            }
            let _ = hypercall::poll(&[], time::now_ns() + 1_000_000);
        }
        None
    }
}

/// A generator of random numbers: splitmix.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn word(&mut self) -> u32 {
        u32::try_from(self.next() & u64::from(u32::MAX)).unwrap_or(0)
    }
}

/// The front end.
struct Disk {
    store: Store,
    table: Window,
    pages: Pages,
    port: u32,
    ring: FrontRing,
    next: u64,
}

fn layout() -> Layout {
    Layout::new(4096, SLOT_BYTES).expect("a page has slots")
}

impl Disk {
    fn new(boot: &Boot) -> Self {
        let mut frames = [0];
        hypercall::setup_grant_table(&mut frames).expect("there is a grant table");
        let table = Window::map(&frames, domid::SELF, true).expect("the table is shown to its owner");
        let pages = Pages::allocate(PAGES).expect("pages are free");
        let port = hypercall::allocate_unbound(domid::SELF, 0).expect("a port is free");
        let ring = FrontRing::init(&Page(pages.address()), layout());
        let disk = Self { store: Store::new(boot), table, pages, port, ring, next: 0 };
        (0..PAGES).for_each(|page| disk.grant(page, page, entry::PERMIT_ACCESS));
        disk
    }

    fn page(&self, page: u64) -> Page {
        Page(self.pages.address() + page * PAGE)
    }

    /// Lets the back end reach `page` by the reference of `place`.
    fn grant(&self, place: u64, page: u64, flags: u16) {
        let frame = self.pages.frame(page).expect("the page is ours");
        probe::store(self.table.address() + (u64::from(FIRST) + place) * 8, u64::from(flags) | frame << 32);
    }

    fn reference(page: u64) -> u32 {
        FIRST + u32::try_from(page).unwrap_or(0)
    }

    /// Connects; returns whether the back end did.
    fn connect(&mut self) -> bool {
        let ring = self.page(RING);
        ring.write(0, &[0; 4096]);
        self.ring = FrontRing::init(&ring, layout());
        if self.store.until(&[2]).is_none() {
            return false;
        }
        self.store.put_number("ring-ref", Self::reference(RING));
        self.store.put_number("event-channel", self.port);
        self.store.put("protocol", PROTOCOL.as_bytes());
        self.store.put("state", b"3");
        if self.store.until(&[4, 5, 6]) != Some(4) {
            return false;
        }
        self.store.put("state", b"4");
        true
    }

    /// Puts a request for a page of data into the ring.
    fn begin(&mut self, what: u8, sector: u64, page: u64) -> bool {
        let segments = [Segment { reference: Self::reference(page), first: 0, last: 7, padding: 0 }];
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
            let word = (number << 8 | page).to_le_bytes();
            let (from, to) = (self.page(DATA), self.page(DATA + 1));
            (0..4096).step_by(8).for_each(|at| from.write(at, &word));
            (0..4096).step_by(8).for_each(|at| to.write(at, &[0xee; 8]));
            let sector = page * 8;
            assert_eq!(self.ask(operation::WRITE, sector, DATA), 0, "a write fails");
            assert_eq!(self.ask(operation::FLUSH, 0, DATA), 0, "a flush fails");
            assert_eq!(self.ask(operation::READ, sector, DATA + 1), 0, "a read fails");
            assert!((0..512).all(|at| to.word(at * 8).to_le_bytes() == word), "page {page} reads as something else");
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
        (0..PAGES).for_each(|page| self.grant(page, page, entry::PERMIT_ACCESS));
        self.store.remove("ring-page-order");
        self.store.put("state", b"6");
        let _ = hypercall::poll(&[], time::now_ns() + 5_000_000);
        if self.store.back() == 6 {
            self.store.put("state", b"1");
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
                (0..SLOT_BYTES).step_by(8).for_each(|word| ring.write(at + word, &random.next().to_le_bytes()));
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
                let reference = Self::reference(DESCRIPTORS);
                let slot = Slot::indirect(what, self.next, random.below(64), segments, reference);
                let _ = self.ring.submit(&ring, slot.as_bytes());
                let _ = self.ring.publish(&ring);
                let _ = hypercall::send(self.port);
                // The descriptors change while the back end may read them.
                (0..64).for_each(|at| descriptors.write(at * 8, &random.next().to_le_bytes()));
            }
            33..=36 => {
                let flags = [0, entry::PERMIT_ACCESS, entry::PERMIT_ACCESS | entry::READONLY];
                let flags = flags.get(usize::try_from(random.below(3)).unwrap_or(0)).copied().unwrap_or(0);
                self.grant(random.below(PAGES), random.below(PAGES), flags);
            }
            37 => {
                let word = random.next();
                let place = u64::from(FIRST) + random.below(PAGES);
                probe::store(self.table.address() + place * 8, word);
            }
            38 => self.store.put_number("state", pick(random, &[0, 1, 2, 3, 4, 5, 6, 7, 99])),
            39 => {
                let key = ["ring-ref", "event-channel", "protocol", "ring-page-order", "ring-ref0", "state"];
                let key = key.get(usize::try_from(random.below(6)).unwrap_or(0)).copied().unwrap_or("state");
                if random.below(3) == 0 { self.store.remove(key) } else { self.store.put_number(key, random.word()) }
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

fn main(boot: &Boot) {
    let mut disk = Disk::new(boot);
    let mut random = Random(time::counter());
    match boot.argument("do") {
        Some("good") => {
            assert!(disk.connect(), "not connected: B={}", disk.store.back());
            for number in 1.. {
                disk.work(number, 4);
                if number % 16 == 0 {
                    println!("blk: good {number}");
                }
                let _ = hypercall::poll(&[], time::now_ns() + 2_000_000);
            }
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
            assert!(disk.connect(), "not connected: B={}", disk.store.back());
            disk.work(random.next() >> 16, 4);
            disk.leave_busy();
        }
    }
    hypercall::shutdown(ShutdownReason::Crash);
}
