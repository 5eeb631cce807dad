//! A machine made of fakes: guests' pages, grants, pages of dom0, and copies that may fail.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "random numbers are cut to size on purpose"
)]

pub mod far;
pub mod frames;
pub mod front;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use net_backend::{Buffer, Buffers, Connection, GrantCopy, Host, LINEAR_PAGES, Limits, Ports, SCRATCH_PAGES};
use net_backend::{STAGING_PAGES, Side, Switch, Takes, Turn, VifId};
use network::Mac;
use ring_protocol::{SharedPage, WordPage};

pub use front::Front;
use test_random::Random;

pub const PAGE: usize = 4096;
/// Pages of each guest: reference n is page n. The first are RX buffers, the others hold packets for TX and cannot be written.
pub const RX_PAGES: usize = 256;
pub const PAGES: usize = RX_PAGES + 256;
/// All that a stock guest takes.
pub const ALL: Takes = Takes { scatter_gather: true, tcp4: true, tcp6: true, checksum4: true, checksum6: true };

#[derive(Default)]
pub struct State {
    pub random: Option<Random>,
    /// The pages of each guest.
    pub guests: Vec<Vec<u8>>,
    /// Copies that fail, of 1,000.
    pub faults: u64,
    /// Copies and calls so far, and the most copies of one turn.
    pub copies: u64,
    pub calls: u64,
    /// Events by port.
    pub notified: Vec<u32>,
    next_page: u64,
}

/// The machine.
#[derive(Clone, Default)]
pub struct Machine(pub Rc<RefCell<State>>);

/// Pages of dom0.
pub struct Own {
    page: u64,
    bytes: Vec<u8>,
}

impl Buffer for Own {
    fn page(&self) -> u64 {
        self.page
    }
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Machine {
    pub fn new(random: Random, guests: usize) -> Self {
        let machine = Self::default();
        let mut state = machine.0.borrow_mut();
        state.random = Some(random);
        state.guests = (0..guests).map(|_| vec![0; PAGES * PAGE]).collect();
        state.notified = vec![0; 2 * guests];
        state.next_page = 1000;
        drop(state);
        machine
    }

    fn own(&self, pages: usize) -> Own {
        let page = self.0.borrow().next_page;
        // A page between two buffers belongs to nobody.
        self.0.borrow_mut().next_page += pages as u64 + 1;
        Own { page, bytes: vec![0xdd; pages * PAGE] }
    }

    pub fn switch(&self, mtu: u16) -> Switch<Self> {
        let [scratch, linear, staging] = [SCRATCH_PAGES, LINEAR_PAGES, STAGING_PAGES].map(|pages| self.own(pages));
        Switch::new(Buffers { scratch, linear, staging }, mtu)
    }

    pub fn connect(&self, switch: &mut Switch<Self>, front: &Front, takes: Takes, limits: Limits) -> VifId {
        let domain = front.domain;
        let tx = front.tx_page.clone();
        // The front end reads answers from slots as long as those that change.
        let shifting = Rc::new(Cell::new(front.rx_page.shifting.take()));
        let rx = RingPage { words: front.rx_page.words.clone(), shifting };
        let port = u32::from(domain);
        let ports = Ports { tx: 2 * port, rx: 2 * port + 1 };
        let connection = Connection { domain, ports, tx, rx, takes, mac: front.mac, limits };
        switch.connect(connection, 0).unwrap()
    }

    pub fn write(&self, domain: u16, reference: u32, offset: usize, bytes: &[u8]) {
        let at = reference as usize * PAGE + offset;
        self.0.borrow_mut().guests[usize::from(domain)][at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn read(&self, domain: u16, reference: u32, offset: usize, bytes: usize) -> Vec<u8> {
        let at = reference as usize * PAGE + offset;
        self.0.borrow().guests[usize::from(domain)][at..at + bytes].to_vec()
    }
}

impl Host for Machine {
    type Ring = RingPage;
    type Buffer = Own;

    fn copy(&mut self, copies: &[GrantCopy], answers: &mut [bool], own: &mut [&mut Own]) {
        let state = &mut *self.0.borrow_mut();
        assert_eq!(copies.len(), answers.len());
        state.calls += 1;
        state.copies += copies.len() as u64;
        for (copy, answer) in copies.iter().zip(answers) {
            assert!(!*answer && copy.bytes > 0, "{copy:?}");
            let end = |offset: u16| usize::from(offset) + usize::from(copy.bytes);
            assert!(end(copy.from_offset) <= PAGE && end(copy.to_offset) <= PAGE, "{copy:?}");
            if state.random.as_mut().unwrap().below(1000) < state.faults {
                continue;
            }
            let mut bytes = [0; PAGE];
            let bytes = &mut bytes[..usize::from(copy.bytes)];
            match copy.from {
                Side::Guest { domain, reference } => {
                    let Some(page) = granted(state, domain, reference) else { continue };
                    bytes.copy_from_slice(&page[copy.from_offset.into()..end(copy.from_offset)]);
                }
                Side::Own { page } => {
                    bytes.copy_from_slice(&page_of(own, page)[copy.from_offset.into()..][..bytes.len()])
                }
            }
            match copy.to {
                Side::Guest { domain, reference } => {
                    let Some(page) = granted(state, domain, reference) else { continue };
                    if reference as usize >= RX_PAGES {
                        continue;
                    }
                    page[copy.to_offset.into()..end(copy.to_offset)].copy_from_slice(bytes);
                }
                Side::Own { page } => page_of(own, page)[copy.to_offset.into()..][..bytes.len()].copy_from_slice(bytes),
            }
            *answer = true;
        }
    }

    fn notify(&mut self, port: u32) {
        self.0.borrow_mut().notified[port as usize] += 1;
    }
}

fn granted(state: &mut State, domain: u16, reference: u32) -> Option<&mut [u8]> {
    let pages = state.guests.get_mut(usize::from(domain)).expect("a guest that does not exist");
    let at = (reference as usize).checked_mul(PAGE)?;
    pages.get_mut(at..at.checked_add(PAGE)?)
}

fn page_of<'a>(own: &'a mut [&mut Own], page: u64) -> &'a mut [u8] {
    let buffer = own.iter_mut().find(|own| (own.page..own.page + (own.bytes.len() / PAGE) as u64).contains(&page));
    let buffer = buffer.expect("a page of a buffer that was not passed");
    let at = (page - buffer.page) as usize * PAGE;
    &mut buffer.bytes[at..at + PAGE]
}

/// The page of a ring.
#[derive(Clone)]
pub struct RingPage {
    pub words: Rc<WordPage>,
    /// Slots change at each load, by this.
    pub shifting: Rc<Cell<u64>>,
}

impl RingPage {
    pub fn new() -> Self {
        Self { words: Rc::new(WordPage::new()), shifting: Rc::new(Cell::new(0)) }
    }
}

impl SharedPage for RingPage {
    fn len_bytes(&self) -> usize {
        PAGE
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.words.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.words.store_u32(offset, value);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= PAGE);
        for (at, word) in into.chunks_mut(4).enumerate() {
            word.copy_from_slice(&self.words.load_u32(offset + 4 * at).to_le_bytes()[..word.len()]);
        }
        let seed = self.shifting.get();
        if seed > 0 && into.len() >= 8 {
            let mut random = Random::seeded(seed);
            if random.below(4) == 0 {
                // The id is the front end's only name of a slot, so it stays.
                let places = if into.len() == 8 { &[4, 5, 6, 7][..] } else { &[0, 1, 4, 5, 6, 10, 11] };
                into[places[random.below(places.len())]] = random.next() as u8;
            }
            self.shifting.set(random.next() | 1);
        }
    }
    fn write(&self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= PAGE);
        for (at, word) in from.chunks_exact(4).enumerate() {
            self.words.store_u32(offset + 4 * at, u32::from_le_bytes(word.try_into().unwrap()));
        }
    }
}

/// Turns until nothing is to be done at once. Returns what the last turn said.
pub fn turns(switch: &mut Switch<Machine>, machine: &mut Machine, now_ns: u64) -> Turn {
    for _ in 0..10_000 {
        let turn = switch.turn(machine, now_ns);
        if !turn.again {
            return turn;
        }
    }
    panic!("the switch never rests: {switch:?}");
}

/// The address of a guest.
pub fn mac(domain: u16) -> Mac {
    Mac([0, 0x16, 0x3e, 0, (domain >> 8) as u8, domain as u8])
}
