//! A front end: writes requests into its ring, takes each answer once.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use ring_protocol::WordPage;
use ring_protocol::block::{INDIRECT_SEGMENTS, Response, Segment, Slot, operation};
use ring_protocol::ring::{FrontRing, Layout};
use zerocopy::{FromBytes, IntoBytes};

use super::{Machine, PAGE, RingPage};

pub struct Front {
    pub domain: u16,
    pub page: RingPage,
    pub ring: FrontRing,
    layout: Layout,
    pub next_id: u64,
    /// What was asked and is not answered, with the operation that the answer repeats.
    pub waiting: BTreeMap<u64, u8>,
}

/// A part of a page.
pub fn segment(reference: u32, first: u8, last: u8) -> Segment {
    Segment { reference, first, last, padding: 0 }
}

/// A whole page.
pub fn whole(reference: u32) -> Segment {
    segment(reference, 0, 7)
}

impl Front {
    pub fn new(domain: u16, pages: usize) -> Self {
        let page = RingPage { words: Rc::new(WordPage::new()), pages, shifting: Rc::new(Cell::new(0)) };
        let layout = Layout::new(pages * PAGE, 112).unwrap();
        let ring = FrontRing::init(&page, layout);
        Self { domain, page, ring, layout, next_id: 0, waiting: BTreeMap::new() }
    }

    pub fn slots(&self) -> u32 {
        self.layout.entries()
    }

    /// Puts a request of this kind into the ring and publishes it. Answers its id.
    pub fn send(&mut self, make: impl FnOnce(u64) -> Slot) -> Option<u64> {
        let id = self.put(make)?;
        let _ = self.ring.publish(&self.page);
        Some(id)
    }

    pub fn put(&mut self, make: impl FnOnce(u64) -> Slot) -> Option<u64> {
        let id = self.next_id;
        let slot = make(id);
        self.ring.submit(&self.page, slot.as_bytes()).unwrap()?;
        self.next_id += 1;
        assert_eq!(slot.head().id, id);
        self.waiting.insert(id, slot.head().operation);
        Some(id)
    }

    pub fn read(&mut self, sector: u64, segments: &[Segment]) -> Option<u64> {
        self.send(|id| Slot::direct(operation::READ, id, sector, segments))
    }

    pub fn write(&mut self, sector: u64, segments: &[Segment]) -> Option<u64> {
        self.send(|id| Slot::direct(operation::WRITE, id, sector, segments))
    }

    pub fn flush(&mut self) -> Option<u64> {
        self.send(|id| Slot::direct(operation::FLUSH, id, 0, &[]))
    }

    /// A request with its segments in the page `descriptors`.
    pub fn indirect(
        &mut self,
        machine: &Machine,
        op: u8,
        sector: u64,
        segments: &[Segment],
        descriptors: u32,
    ) -> Option<u64> {
        assert!(segments.len() <= INDIRECT_SEGMENTS);
        let bytes = segments.as_bytes();
        machine.0.borrow_mut().guests[usize::from(self.domain)][descriptors as usize][..bytes.len()]
            .copy_from_slice(bytes);
        let count = segments.len() as u16;
        self.send(|id| Slot::indirect(op, id, sector, count, descriptors))
    }

    /// Takes the answers that are there: id and status.
    pub fn answers(&mut self) -> Vec<(u64, i16)> {
        let mut taken = Vec::new();
        let mut bytes = [0; 16];
        // Asks for an event at the next answer, as long as none is there.
        while self.ring.rearm(&self.page, 1).unwrap() {
            self.ring.take(&self.page, &mut bytes).expect("there is one");
            let response = Response::read_from_bytes(&bytes).unwrap();
            let operation = self.waiting.remove(&response.id).expect("an answer to nothing, or a second one");
            if self.page.shifting.get() == 0 {
                assert_eq!(response.operation, operation);
            }
            // A flush alone fails with -5: front ends may take -1 for unsupported.
            let flush = response.operation == operation::FLUSH && response.status == -5;
            assert!(flush || (-2..=0).contains(&response.status), "{operation}: {}", response.status);
            taken.push((response.id, response.status));
        }
        taken
    }
}
