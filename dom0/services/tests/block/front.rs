//! A stock front end (ABI io 3.10): asks for sectors through its block ring.

use std::collections::BTreeMap;

use ring_protocol::block::{Response, Segment, Slot, operation};
use ring_protocol::ring::{FrontRing, Layout};
use zerocopy::{FromBytes, IntoBytes};

use crate::common::front::FrontEnd;
use crate::common::guest::Rounds;
use crate::machine::{Machine, Pages};

pub type Guest = crate::common::guest::Guest<Machine>;

/// The first reference of a ring; data pages have lower ones.
const RINGS: u32 = 100;

/// A front end of one disk.
pub struct Front {
    pub device: u32,
    /// How many pages its rings have.
    pub pages: usize,
    ring: Option<(Pages, FrontRing)>,
    rings: u32,
    next_id: u64,
    pub waiting: BTreeMap<u64, u8>,
    /// It has written what no stock driver writes: its answers may be any.
    pub odd: bool,
}

impl FrontEnd<Machine> for Front {
    const KIND: &'static str = "vbd";

    fn device(&self) -> u32 {
        self.device
    }

    fn step(&mut self, guest: &mut Guest) {
        match (self.state(guest), self.back_state(guest)) {
            (1, 2) => self.publish(guest),
            (3, 4) => {
                for key in ["sectors", "info", "sector-size"] {
                    assert!(self.back(guest, key).is_some(), "{key} is missing at B=4");
                }
                self.set_state(guest, 4);
            }
            (2..=5, 5 | 6) => self.close(guest),
            _ => {}
        }
    }

    fn close(&mut self, guest: &mut Guest) {
        self.ring = None;
        self.waiting.clear();
        self.set_state(guest, 6);
    }
}

impl Front {
    pub const fn new(device: u32) -> Self {
        Self { device, pages: 1, ring: None, rings: 0, next_id: 0, waiting: BTreeMap::new(), odd: false }
    }

    pub fn publish(&mut self, guest: &mut Guest) {
        self.rings += 1;
        let first = RINGS + 400 * ((self.device >> 4) % 2) + 16 * (self.rings % 16);
        let references = first..first + self.pages as u32;
        let pages = references.clone().map(|reference| guest.machine.fake.page(guest.domain, reference));
        let pages = Pages(pages.collect());
        let layout = Layout::new(self.pages * 4096, 112).unwrap();
        let ring = FrontRing::init(&pages, layout);
        self.ring = Some((pages, ring));
        self.waiting.clear();
        let mut keys = vec![
            ("event-channel".to_string(), (20 + self.rings % 50).to_string()),
            ("protocol".into(), "x86_64-abi".into()),
            ("feature-persistent".into(), "0".into()),
        ];
        if self.pages == 1 {
            keys.push(("ring-ref".into(), first.to_string()));
        } else {
            keys.push(("ring-page-order".into(), self.pages.ilog2().to_string()));
            keys.extend(references.enumerate().map(|(n, page)| (format!("ring-ref{n}"), page.to_string())));
        }
        keys.push(("state".into(), "3".into()));
        let nodes: Vec<_> = keys.into_iter().map(|(key, value)| (self.path(&key), value)).collect();
        guest.put_all(&nodes);
    }

    /// Puts a request for a page into the ring; false if there is no ring, or no room in it.
    pub fn send(&mut self, guest: &Guest, op: u8, sector: u64, reference: u32) -> bool {
        let Some((pages, ring)) = &mut self.ring else { return false };
        let segments = [Segment { reference, first: 0, last: 7, padding: 0 }];
        let segments = if op == operation::FLUSH { &[][..] } else { &segments };
        let slot = Slot::direct(op, self.next_id, sector, segments);
        if ring.submit(&*pages, slot.as_bytes()).unwrap().is_none() {
            return false;
        }
        let _ = ring.publish(&*pages);
        self.waiting.insert(self.next_id, op);
        self.next_id += 1;
        guest.machine.fake.raise(guest.domain);
        true
    }

    /// Writes indices that no front end writes.
    pub fn break_ring(&mut self, guest: &Guest) {
        if let Some((pages, _)) = &self.ring {
            ring_protocol::SharedPage::store_u32(pages, 0, 0x8000_0000);
            guest.machine.fake.raise(guest.domain);
        }
    }

    /// Takes the answers that are there.
    pub fn answers(&mut self) -> Vec<i16> {
        let mut statuses = Vec::new();
        let Some((pages, ring)) = &mut self.ring else { return statuses };
        let mut bytes = [0; 16];
        while ring.rearm(&*pages, 1).unwrap() {
            ring.take(&*pages, &mut bytes).unwrap();
            let response = Response::read_from_bytes(&bytes).unwrap();
            let asked = self.waiting.remove(&response.id);
            assert!(self.odd || asked == Some(response.operation), "an answer to nothing");
            statuses.push(response.status);
        }
        statuses
    }

    /// The status of a request for a page at `sector`.
    pub fn ask(&mut self, guest: &Guest, op: u8, sector: u64, reference: u32) -> i16 {
        assert!(self.send(guest, op, sector, reference));
        for _ in 0..100 {
            guest.machine.round();
            if let [status] = self.answers()[..] {
                return status;
            }
        }
        panic!("the request is never answered");
    }

    pub fn write(&mut self, guest: &Guest, sector: u64, byte: u8) -> i16 {
        ring_protocol::SharedPage::write(&*guest.machine.fake.page(guest.domain, 10), 0, &[byte; 4096]);
        self.ask(guest, operation::WRITE, sector, 10)
    }

    /// The first byte of each sector of a page, and the status.
    pub fn read(&mut self, guest: &Guest, sector: u64) -> Result<[u8; 8], i16> {
        let status = self.ask(guest, operation::READ, sector, 11);
        let page = guest.machine.fake.page(guest.domain, 11);
        let mut bytes = [0; 4096];
        ring_protocol::SharedPage::read(&*page, 0, &mut bytes);
        if status == 0 { Ok(std::array::from_fn(|n| bytes[n * 512])) } else { Err(status) }
    }
}

/// What may be left of guests that are gone.
pub fn left(machine: &Machine, domains: &[u16]) -> usize {
    let state = machine.state.borrow();
    let pins = state.pins.values().filter(|(domain, ..)| domains.contains(domain)).count();
    let rings = state.rings.iter().filter(|(domain, _)| domains.contains(domain)).map(|(_, count)| count);
    pins + rings.sum::<usize>()
}
