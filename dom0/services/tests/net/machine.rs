//! A machine with guests' pages, grants and buffers of dom0 as fakes, and the count of all that can leak.

use std::cell::RefCell;
use std::rc::Rc;

use net_backend::{Buffer, GrantCopy, Side};
use ring_protocol::SharedPage;
use services::net::NetHost;

use crate::common::guest::Rounds;
use crate::common::{Fake, host_as_its_fake};

pub const PAGE: usize = 4096;
/// References from here on are granted by nobody.
pub const NOT_GRANTED: u32 = 10_000;
/// Ports from here on are raised by devices.
pub const FIRST_INTERRUPT: u32 = 500_000;
/// Nanoseconds that pass in a round.
pub const ROUND_NS: u64 = 1_000_000;

#[derive(Default)]
pub struct State {
    next_page: u64,
    /// Buffers that are in use.
    pub buffers: usize,
    /// So many further buffers there can be; `None` for any number.
    pub buffers_left: Option<usize>,
}

#[derive(Clone)]
pub struct Machine {
    pub fake: Fake,
    pub state: Rc<RefCell<State>>,
}

impl Default for Machine {
    fn default() -> Self {
        let fake = Fake::default();
        fake.grant_below(NOT_GRANTED);
        fake.devices_raise(FIRST_INTERRUPT);
        Self { fake, state: Rc::default() }
    }
}

host_as_its_fake!(Machine);

impl Rounds for Machine {
    fn fake(&self) -> &Fake {
        &self.fake
    }

    fn round(&self) {
        self.fake.round();
        self.fake.advance(ROUND_NS);
    }
}

impl Machine {
    /// Writes into a page of a guest.
    pub fn write(&self, domain: u16, reference: u32, bytes: &[u8]) {
        self.fake.page(domain, reference).write(0, bytes);
    }

    /// Reads from a page of a guest.
    pub fn read(&self, domain: u16, reference: u32, offset: usize, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fake.page(domain, reference).read(offset, &mut bytes);
        bytes
    }
}

/// Pages of dom0 while they are in use.
pub struct Own {
    page: u64,
    bytes: Vec<u8>,
    machine: Machine,
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

impl Drop for Own {
    fn drop(&mut self) {
        self.machine.state.borrow_mut().buffers -= 1;
    }
}

fn page_of<'a>(own: &'a mut [&mut Own], page: u64) -> &'a mut [u8] {
    let own = own.iter_mut().find(|own| (own.page..own.page + (own.bytes.len() / PAGE) as u64).contains(&page));
    let own = own.expect("a page of a buffer that was not passed");
    let at = (page - own.page) as usize * PAGE;
    &mut own.bytes[at..at + PAGE]
}

impl NetHost for Machine {
    type Buffer = Own;

    fn buffer(&self, pages: usize) -> Option<Own> {
        let mut state = self.state.borrow_mut();
        if let Some(left) = &mut state.buffers_left {
            *left = left.checked_sub(1)?;
        }
        let page = state.next_page;
        // A page between two buffers belongs to nobody.
        state.next_page += pages as u64 + 1;
        state.buffers += 1;
        Some(Own { page, bytes: vec![0; pages * PAGE], machine: self.clone() })
    }

    fn copy_packets(&self, copies: &[GrantCopy], answers: &mut [bool], own: &mut [&mut Own]) {
        assert_eq!(copies.len(), answers.len());
        for (copy, answer) in copies.iter().zip(answers) {
            let count = usize::from(copy.bytes);
            assert!(usize::from(copy.from_offset.max(copy.to_offset)) + count <= PAGE, "{copy:?}");
            let granted = |side: &Side| !matches!(side, Side::Guest { reference, .. } if *reference >= NOT_GRANTED);
            if !granted(&copy.from) || !granted(&copy.to) {
                continue;
            }
            let bytes = match copy.from {
                Side::Guest { domain, reference } => self.read(domain, reference, copy.from_offset.into(), count),
                Side::Own { page } => page_of(own, page)[copy.from_offset.into()..][..count].to_vec(),
            };
            match copy.to {
                Side::Guest { domain, reference } => {
                    self.fake.page(domain, reference).write(copy.to_offset.into(), &bytes);
                }
                Side::Own { page } => page_of(own, page)[copy.to_offset.into()..][..count].copy_from_slice(&bytes),
            }
            *answer = true;
        }
    }

    fn send(&self, port: u32) {
        self.fake.send(port);
    }
}
