//! A machine with guests' pages, grants and frames of dom0 as fakes, and the count of all that can leak.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block_backend::{GrantCopy, Handle, PinError, Pinned, Wanted};
use disk::BusAddress;
use disk::OwnMemory;
use hypercall_abi::Errno;
use ring_protocol::block::Direction;
use ring_protocol::{SharedPage, WordPage};
use services::block::BlockHost;

use crate::common::guest::Rounds;
use crate::common::{Fake, host_as_its_fake};
use crate::device::Media;

/// References from here on are granted by nobody.
pub const NOT_GRANTED: u32 = 1000;
/// In a bus address: the page is dom0's.
const OURS: u64 = 1 << 60;
/// Nanoseconds that pass in a round.
pub const ROUND_NS: u64 = 1_000_000;

#[derive(Default)]
pub struct State {
    /// Frames of dom0 that are in use.
    frames: BTreeMap<u64, Rc<WordPage>>,
    next_frame: u64,
    /// Frames for disks in memory among them.
    disk_frames: BTreeSet<u64>,
    /// No memory is left.
    pub full: bool,
    /// So many frames for disks in memory there can be; `None` for any number.
    pub most_disk_frames: Option<usize>,
    /// What each handle pins.
    pub pins: BTreeMap<u32, (u16, u32, bool)>,
    next_pin: u32,
    /// Pages of rings of each guest that are mapped.
    pub rings: BTreeMap<u16, usize>,
    pub media: Vec<Rc<RefCell<Media>>>,
}

#[derive(Clone, Default)]
pub struct Machine {
    pub fake: Fake,
    pub state: Rc<RefCell<State>>,
}

host_as_its_fake!(Machine);

impl Rounds for Machine {
    fn fake(&self) -> &Fake {
        &self.fake
    }

    fn round(&self) {
        self.fake.round();
        let media = self.state.borrow().media.clone();
        for media in media {
            if media.borrow_mut().work(self) {
                self.fake.raise_port(media.borrow().interrupt);
            }
        }
        self.fake.advance(ROUND_NS);
    }
}

impl Machine {
    /// Frames of dom0 in use.
    pub fn frames(&self) -> usize {
        self.state.borrow().frames.len()
    }

    /// Pages of disks in memory.
    pub fn disk_frames(&self) -> usize {
        self.state.borrow().disk_frames.len()
    }

    /// The frames of an image, and the number of the first.
    pub fn image(&self, bytes: &[u8]) -> u64 {
        let first = self.state.borrow().next_frame;
        for part in bytes.chunks(4096) {
            self.new_frame().write(0, part);
        }
        first
    }

    fn new_frame(&self) -> Rc<WordPage> {
        let mut state = self.state.borrow_mut();
        let (page, frame) = (state.next_frame, Rc::new(WordPage::new()));
        state.next_frame += 1;
        state.frames.insert(page, Rc::clone(&frame));
        frame
    }

    fn frame(&self, page: u64) -> Rc<WordPage> {
        Rc::clone(self.state.borrow().frames.get(&page).expect("a frame that is not in use is touched"))
    }

    /// The page that a device reaches at an address, and where in it.
    pub fn reach(&self, address: BusAddress, write: bool) -> (Rc<WordPage>, usize) {
        let number = address.number();
        let offset = (number % 4096) as usize;
        if number & OURS != 0 {
            return (self.frame((number & !OURS) >> 12), offset);
        }
        let (domain, reference) = ((number >> 32) as u16, (number as u32) >> 12);
        let pinned = self.state.borrow().pins.values().any(|pin| *pin == (domain, reference, write));
        assert!(pinned, "a device touches a page that is not pinned");
        (self.fake.page(domain, reference), offset)
    }
}

/// Pages in a row.
pub struct Pages(pub Vec<Rc<WordPage>>);

impl Pages {
    fn at(&self, offset: usize) -> Option<(&WordPage, usize)> {
        self.0.get(offset / 4096).map(|page| (&**page, offset % 4096))
    }
}

impl SharedPage for Pages {
    fn len_bytes(&self) -> usize {
        self.0.len() * 4096
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.at(offset).map_or(0, |(page, offset)| page.load_u32(offset))
    }
    fn store_u32(&self, offset: usize, value: u32) {
        let (page, offset) = self.at(offset).expect("a store outside the pages");
        page.store_u32(offset, value);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        for (at, byte) in (offset..).zip(into) {
            let (page, offset) = self.at(at).expect("a read outside the pages");
            page.read(offset, std::slice::from_mut(byte));
        }
    }
    fn write(&self, offset: usize, from: &[u8]) {
        for (at, byte) in (offset..).zip(from) {
            let (page, offset) = self.at(at).expect("a write outside the pages");
            page.write(offset, std::slice::from_ref(byte));
        }
    }
}

macro_rules! shared_page {
    ($name:ident) => {
        impl SharedPage for $name {
            fn len_bytes(&self) -> usize {
                self.pages.len_bytes()
            }
            fn load_u32(&self, offset: usize) -> u32 {
                self.pages.load_u32(offset)
            }
            fn store_u32(&self, offset: usize, value: u32) {
                self.pages.store_u32(offset, value);
            }
            fn read(&self, offset: usize, into: &mut [u8]) {
                self.pages.read(offset, into);
            }
            fn write(&self, offset: usize, from: &[u8]) {
                self.pages.write(offset, from);
            }
        }
    };
}

/// A ring while it is mapped.
pub struct Ring {
    domain: u16,
    pages: Pages,
    machine: Machine,
}

shared_page!(Ring);

impl Drop for Ring {
    fn drop(&mut self) {
        let mut state = self.machine.state.borrow_mut();
        *state.rings.get_mut(&self.domain).expect("it is mapped") -= self.pages.0.len();
    }
}

/// Frames of dom0 while they are in use.
pub struct Memory {
    first: u64,
    pages: Pages,
    machine: Machine,
}

shared_page!(Memory);

impl Drop for Memory {
    fn drop(&mut self) {
        let mut state = self.machine.state.borrow_mut();
        for page in self.first..self.first + self.pages.0.len() as u64 {
            state.frames.remove(&page).expect("a frame is given back twice");
        }
    }
}

impl OwnMemory for Memory {
    fn page(&self) -> u64 {
        self.first
    }
    fn address(&self) -> BusAddress {
        BusAddress::of_pinned(OURS | self.first << 12)
    }
}

impl BlockHost for Machine {
    type Ring = Ring;
    type Memory = Memory;

    fn map_ring(&self, domain: u16, references: &[u32]) -> Result<Ring, Errno> {
        assert!((1..=16).contains(&references.len()));
        if references.iter().any(|reference| *reference >= NOT_GRANTED) {
            return Err(Errno::Inval);
        }
        *self.state.borrow_mut().rings.entry(domain).or_default() += references.len();
        let pages = Pages(references.iter().map(|reference| self.fake.page(domain, *reference)).collect());
        Ok(Ring { domain, pages, machine: self.clone() })
    }

    fn allocate(&self, pages: usize) -> Option<Memory> {
        if self.state.borrow().full {
            return None;
        }
        let first = self.state.borrow().next_frame;
        let pages = Pages((0..pages).map(|_| self.new_frame()).collect());
        Some(Memory { first, pages, machine: self.clone() })
    }

    fn take_page(&self) -> Option<u64> {
        let state = self.state.borrow();
        if state.full || state.most_disk_frames.is_some_and(|most| state.disk_frames.len() >= most) {
            return None;
        }
        drop(state);
        let page = self.state.borrow().next_frame;
        self.new_frame();
        self.state.borrow_mut().disk_frames.insert(page);
        Some(page)
    }

    fn give_back_page(&self, page: u64) {
        let mut state = self.state.borrow_mut();
        assert!(state.disk_frames.remove(&page), "a page is given back twice");
        state.frames.remove(&page);
    }

    fn pin(&self, wanted: &[Wanted], answers: &mut [Result<Pinned, PinError>]) {
        let mut state = self.state.borrow_mut();
        for (Wanted { domain, reference, writable }, answer) in wanted.iter().zip(answers) {
            if *reference >= NOT_GRANTED {
                continue;
            }
            let handle = state.next_pin;
            state.next_pin += 1;
            state.pins.insert(handle, (*domain, *reference, *writable));
            let address = BusAddress::of_pinned(u64::from(*domain) << 32 | u64::from(*reference) << 12);
            *answer = Ok(Pinned { handle: Handle(handle), address });
        }
    }

    fn unpin(&self, handles: &[Handle]) {
        let mut state = self.state.borrow_mut();
        for handle in handles {
            assert!(state.pins.remove(&handle.0).is_some(), "a pin is given back twice");
        }
    }

    fn copy(&self, copies: &[GrantCopy], answers: &mut [bool]) {
        for (copy, answer) in copies.iter().zip(answers) {
            if copy.reference >= NOT_GRANTED {
                continue;
            }
            let theirs = self.fake.page(copy.domain, copy.reference);
            let ours = self.frame(copy.page);
            let mut bytes = vec![0; usize::from(copy.bytes)];
            if copy.direction == Direction::Read {
                ours.read(copy.page_offset.into(), &mut bytes);
                theirs.write(copy.offset.into(), &bytes);
            } else {
                theirs.read(copy.offset.into(), &mut bytes);
                ours.write(copy.page_offset.into(), &bytes);
            }
            *answer = true;
        }
    }

    fn notify(&self, _port: u32) {}
}
