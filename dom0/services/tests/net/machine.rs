//! A machine with guests' pages, grants and buffers of dom0 as fakes, and the count of all that can leak.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use hypercall_abi::Errno;
use net_backend::{Buffer, GrantCopy, Side};
use ring_protocol::SharedPage;
use services::net::NetHost;
use services::{Class, Host};

use crate::common::guest::Rounds;
use crate::common::{Fake, Handle, Mapped, Part, Port};

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

#[derive(Clone, Default)]
pub struct Machine {
    pub fake: Fake,
    pub state: Rc<RefCell<State>>,
}

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
    /// Goes on until the future is done; `None` if it is not done after so many rounds.
    pub fn run_for<T>(&self, rounds: usize, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        for _ in 0..rounds {
            if let Poll::Ready(result) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return Some(result);
            }
            self.round();
        }
        None
    }

    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.run_for(50_000, future).expect("it never ends")
    }

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

impl Host for Machine {
    type Page = Mapped;
    type Channel = Port;
    type Task = Handle;
    type Reserved = Part;

    fn map(&self, domain: u16, reference: u32) -> Result<Mapped, Errno> {
        if reference >= NOT_GRANTED { Err(Errno::Inval) } else { self.fake.map(domain, reference) }
    }
    fn connect(&self, domain: u16, port: u32) -> Result<Port, Errno> {
        self.fake.connect(domain, port)
    }
    fn raised(&self, port: u32) -> impl Future<Output = ()> {
        let (machine, mut raised) = (self.clone(), Box::pin(self.fake.raised(port)));
        poll_fn(move |context| {
            let of_device = port >= FIRST_INTERRUPT;
            assert!(of_device || machine.fake.is_open(port), "somebody listens to a port that is closed");
            raised.as_mut().poll(context)
        })
    }
    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) -> Handle {
        self.fake.spawn(class, task)
    }
    fn yield_now(&self) -> impl Future<Output = ()> {
        self.fake.yield_now()
    }
    fn now_ns(&self) -> u64 {
        self.fake.now_ns()
    }
    fn sleep_until(&self, deadline_ns: u64) -> impl Future<Output = ()> {
        self.fake.sleep_until(deadline_ns)
    }
    fn can_allocate(&self, bytes: usize) -> bool {
        self.fake.can_allocate(bytes)
    }
    fn reserve(&self, bytes: usize) -> Option<Part> {
        self.fake.reserve(bytes)
    }
}
