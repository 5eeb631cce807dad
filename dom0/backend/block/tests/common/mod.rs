//! A machine made of fakes: guests' pages, grants, frames of dom0, a device with a volatile cache, and faults at any call.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]

pub mod death;
pub mod device;
pub mod disks;
pub mod front;
pub mod neighbour;
pub mod two;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block_backend::{Connection, DATA_PINS, Limits};
use block_backend::{Event, GrantCopy, Handle, Host, PinError, Pinned, Pins, Queue, Scratch, Turn, VbdId, Wanted};
use disk::{BusAddress, Disk};
use ring_protocol::block::Direction;
use ring_protocol::block::journal::journal_bytes;
use ring_protocol::{SharedPage, WordPage};

pub use device::Device;
pub use front::Front;
use test_random::Random;

pub const PAGE: usize = 4096;
/// Pages of each guest: reference n is page n, below [`READ_ONLY`] of them writable.
pub const PAGES: usize = 96;
/// Grants from here on are read-only.
pub const READ_ONLY: u32 = 88;
/// Frames of dom0: scratch, zeroes, then memory of disks.
pub const FRAMES: usize = 160;
const SCRATCH: usize = 2;
const ZEROES: u64 = 2;
pub const FIRST_FREE: u64 = 3;
/// How often a grant may be used at a time.
const USES: u32 = 255;

pub type Page = Box<[u8; PAGE]>;

/// How often what fails, of 1,000 calls or elements.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    pub copy: u64,
    pub pin: u64,
    pub handles: u64,
    pub device: u64,
    pub full: u64,
    pub hang: u64,
    pub needs_reset: u64,
    pub dead: u64,
}

pub struct State {
    pub random: Random,
    pub guests: Vec<Vec<Page>>,
    pub frames: Vec<Page>,
    /// What each handle pins: guest, page, writable.
    pub pinned: Vec<Option<(u16, u32, bool)>>,
    pub free: Vec<u32>,
    /// How often each page is pinned, and how often to be written.
    uses: Vec<[(u32, u32); PAGES]>,
    pub handles: usize,
    pub faults: Faults,
    pub notified: Vec<u64>,
    pub calls: Calls,
}

/// How often each call was made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Calls {
    pub pin: u64,
    pub unpin: u64,
    pub copy: u64,
}

impl State {
    pub fn fails(&mut self, of_1000: u64) -> bool {
        of_1000 > 0 && self.random.below(1000) < of_1000
    }

    pub fn pins(&self) -> usize {
        self.pinned.iter().flatten().count()
    }

    /// The bytes at a bus address, if a device may touch them.
    pub fn reach(&mut self, address: BusAddress, bytes: usize, write: bool) -> &mut [u8] {
        let number = address.number();
        let (guest, page, offset) = ((number >> 32) as u16, (number as u32) >> 12, number as usize % PAGE);
        let (uses, writable) = self.uses[usize::from(guest)][page as usize];
        assert!(if write { writable } else { uses } > 0, "a device touches a page that is not pinned");
        &mut self.guests[usize::from(guest)][page as usize][offset..offset + bytes]
    }
}

#[derive(Clone)]
pub struct Machine(pub Rc<RefCell<State>>);

impl Machine {
    pub fn new(random: Random, guests: usize) -> Self {
        let pages = |count| (0..count).map(|_| Box::new([0; PAGE])).collect::<Vec<Page>>();
        Self(Rc::new(RefCell::new(State {
            random,
            guests: (0..guests).map(|_| pages(PAGES)).collect(),
            frames: pages(FRAMES),
            pinned: Vec::new(),
            free: Vec::new(),
            uses: vec![[(0, 0); PAGES]; guests],
            handles: 8192,
            faults: Faults::default(),
            notified: vec![0; guests],
            calls: Calls::default(),
        })))
    }

    pub fn faults(&self, faults: Faults) {
        self.0.borrow_mut().faults = faults;
    }

    pub fn below(&self, bound: u64) -> u64 {
        self.0.borrow_mut().random.below(bound)
    }

    pub fn pins(&self) -> usize {
        self.0.borrow().pins()
    }

    /// What the hypervisor finds of a domain that has died goes.
    pub fn forget_pins(&self) {
        let state = &mut *self.0.borrow_mut();
        (state.pinned, state.free) = (Vec::new(), Vec::new());
        state.uses.iter_mut().for_each(|uses| *uses = [(0, 0); PAGES]);
    }

    pub fn queue(&self, device: Option<Device>) -> (Queue<Self>, Rc<Pins>) {
        let budget = Rc::new(Pins::new(DATA_PINS));
        let scratch = (0..SCRATCH as u64).map(|page| Scratch { page, memory: Memory::Frame(self.clone(), page) });
        let device = device.map(|device| Box::new(device) as Box<dyn disk::Device>);
        (Queue::new(device, Rc::clone(&budget), scratch.collect(), ZEROES, None), budget)
    }

    /// Connects the disk of a guest, whose front end this is.
    pub fn connect(&self, queue: &mut Queue<Self>, front: &Front, disk: Box<dyn Disk>, limits: Limits) -> VbdId {
        queue.connect(self.connection(front, disk, limits), 0).expect("a fresh ring is served")
    }

    pub fn connection(&self, front: &Front, disk: Box<dyn Disk>, limits: Limits) -> Connection<Self> {
        let journal = Memory::Heap(Rc::new(WordPage::new()));
        assert!(journal.len_bytes() >= journal_bytes(front.slots()));
        Connection { domain: front.domain, port: 7, ring: front.page.clone(), journal, disk, limits }
    }
}

impl Host for Machine {
    type Ring = RingPage;
    type Memory = Memory;

    fn pin(&mut self, wanted: &[Wanted], answers: &mut [Result<Pinned, PinError>]) {
        death::mortal();
        let state = &mut *self.0.borrow_mut();
        state.calls.pin += 1;
        assert_eq!(wanted.len(), answers.len());
        for (wanted, answer) in wanted.iter().zip(answers) {
            let Wanted { domain, reference, writable } = *wanted;
            let known = (reference as usize) < PAGES && (!writable || reference < READ_ONLY);
            let (refused, starved) = (state.faults.pin, state.faults.handles);
            if !known || state.fails(refused) || state.uses[usize::from(domain)][reference as usize].0 >= USES {
                *answer = Err(PinError::Refused);
            } else if state.fails(starved) || state.pinned.len() - state.free.len() >= state.handles {
                *answer = Err(PinError::NoHandles);
            } else {
                let pin = Some((domain, reference, writable));
                let handle = state.free.pop().unwrap_or(state.pinned.len() as u32);
                match state.pinned.get_mut(handle as usize) {
                    Some(place) => *place = pin,
                    None => state.pinned.push(pin),
                }
                let uses = &mut state.uses[usize::from(domain)][reference as usize];
                *uses = (uses.0 + 1, uses.1 + u32::from(writable));
                let address = BusAddress::of_pinned(u64::from(domain) << 32 | u64::from(reference) << 12);
                *answer = Ok(Pinned { handle: Handle(handle), address });
            }
        }
    }

    fn unpin(&mut self, handles: &[Handle]) {
        death::mortal();
        let state = &mut *self.0.borrow_mut();
        state.calls.unpin += 1;
        for handle in handles {
            let pin = state.pinned[handle.0 as usize].take();
            let (domain, page, writable) = pin.expect("a handle is given back twice");
            let uses = &mut state.uses[usize::from(domain)][page as usize];
            *uses = (uses.0 - 1, uses.1 - u32::from(writable));
            state.free.push(handle.0);
        }
    }

    fn copy(&mut self, copies: &[GrantCopy], answers: &mut [bool]) {
        death::mortal();
        let state = &mut *self.0.borrow_mut();
        state.calls.copy += 1;
        assert_eq!(copies.len(), answers.len());
        for (copy, answer) in copies.iter().zip(answers) {
            let fault = state.faults.copy;
            if state.fails(fault) {
                continue;
            }
            let (offset, own) = (usize::from(copy.offset), usize::from(copy.page_offset));
            let bytes = usize::from(copy.bytes);
            assert!(bytes > 0 && offset + bytes <= PAGE && own + bytes <= PAGE, "{copy:?}");
            let reads = copy.direction == Direction::Read;
            if copy.reference as usize >= PAGES || (reads && copy.reference >= READ_ONLY) {
                continue;
            }
            let theirs = &mut state.guests[usize::from(copy.domain)][copy.reference as usize][offset..offset + bytes];
            let ours = &mut state.frames[copy.page as usize][own..own + bytes];
            if reads {
                theirs.copy_from_slice(ours);
            } else {
                assert!(copy.page != ZEROES, "the frame of zeroes is written");
                ours.copy_from_slice(theirs);
            }
            *answer = true;
        }
    }

    fn notify(&mut self, domain: u16, port: u32) {
        death::mortal();
        assert_eq!(port, 7);
        self.0.borrow_mut().notified[usize::from(domain)] += 1;
    }
}

/// The pages of a ring.
#[derive(Clone)]
pub struct RingPage {
    pub words: Rc<WordPage<16384>>,
    pub pages: usize,
    /// Slots change at each load, by this.
    pub shifting: Rc<Cell<u64>>,
}

impl SharedPage for RingPage {
    fn len_bytes(&self) -> usize {
        self.pages * PAGE
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.words.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        death::mortal();
        assert!(offset < self.len_bytes());
        self.words.store_u32(offset, value);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        for (at, word) in into.chunks_mut(4).enumerate() {
            word.copy_from_slice(&self.words.load_u32(offset + 4 * at).to_le_bytes()[..word.len()]);
        }
        let mut seed = self.shifting.get();
        if seed > 0 && into.len() == 112 {
            let mut random = Random::seeded(seed);
            // The id is the front end's only name of it, so it stays.
            let at = [0, 1, 2, 3, 16, 17, 24, 28, 29, 36, 37, 44][random.below(12)];
            into[at] = random.next() as u8;
            seed = random.next() | 1;
            self.shifting.set(seed);
        }
    }
    fn write(&self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= self.len_bytes());
        for (at, word) in from.chunks_exact(4).enumerate() {
            death::mortal();
            self.words.store_u32(offset + 4 * at, u32::from_le_bytes(word.try_into().unwrap()));
        }
    }
}

/// Memory of dom0's own.
#[derive(Clone)]
pub enum Memory {
    Heap(Rc<WordPage<16640>>),
    Frame(Machine, u64),
}

impl SharedPage for Memory {
    fn len_bytes(&self) -> usize {
        match self {
            Self::Heap(words) => words.len_bytes(),
            Self::Frame(..) => PAGE,
        }
    }
    fn load_u32(&self, offset: usize) -> u32 {
        match self {
            Self::Heap(words) => words.load_u32(offset),
            Self::Frame(..) => panic!("scratch is read as bytes"),
        }
    }
    fn store_u32(&self, offset: usize, value: u32) {
        match self {
            Self::Heap(words) => {
                death::mortal();
                words.store_u32(offset, value);
            }
            Self::Frame(..) => panic!("scratch is written by copies"),
        }
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        match self {
            Self::Heap(_) => {
                for (at, word) in into.chunks_mut(4).enumerate() {
                    word.copy_from_slice(&self.load_u32(offset + 4 * at).to_le_bytes()[..word.len()]);
                }
            }
            Self::Frame(machine, page) => {
                let state = machine.0.borrow();
                into.copy_from_slice(&state.frames[*page as usize][offset..offset + into.len()]);
            }
        }
    }
    fn write(&self, offset: usize, from: &[u8]) {
        for (at, word) in from.chunks_exact(4).enumerate() {
            self.store_u32(offset + 4 * at, u32::from_le_bytes(word.try_into().unwrap()));
        }
    }
}

/// Turns until nothing is to be done at once. Answers what the last one said, and what was reported.
pub fn turns(queue: &mut Queue<Machine>, machine: &mut Machine, now_ns: u64) -> (Turn, Vec<Event>) {
    let mut events = Vec::new();
    for _ in 0..10_000 {
        let turn = queue.turn(machine, now_ns);
        events.extend(std::iter::from_fn(|| queue.event()));
        if !turn.again {
            return (turn, events);
        }
    }
    panic!("the queue never rests");
}
