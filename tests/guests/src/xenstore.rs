//! A client of the store (ABI io 3), for test guests that are front ends of devices.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use ring_protocol::store::Client;
use unikernel::boot::Boot;
use unikernel::hypercall;

use crate::shared::Shared;

/// Kinds of messages (ABI io 3.2).
mod kind {
    pub(super) const READ: u32 = 2;
    pub(super) const WRITE: u32 = 11;
    pub(super) const REMOVE: u32 = 13;
    pub(super) const ERROR: u32 = 16;
}

/// Bytes of the head of a message.
const HEAD: usize = 16;

/// The guest's end of its store page.
#[derive(Debug)]
pub struct Store {
    page: Shared,
    port: u32,
    client: Client,
}

impl Store {
    /// Connects to the store.
    ///
    /// # Panics
    /// If the page is not ours, or its indices contradict each other.
    #[must_use]
    pub fn new(boot: &Boot) -> Self {
        let info = boot.info();
        let page = Shared::of_frame(info.store_mfn);
        let client = Client::attach(&page).expect("the indices agree");
        Self { page, port: info.store_evtchn, client }
    }

    /// The value of a node; `None` if it cannot be read. A path without a slash at its beginning is one of our own domain.
    pub fn read(&mut self, path: &str) -> Option<String> {
        let value = self.ask(kind::READ, &[path.as_bytes(), b"\0"])?;
        String::from_utf8(value).ok()
    }

    /// Writes a node; returns whether the store has done so.
    pub fn write(&mut self, path: &str, value: &str) -> bool {
        self.ask(kind::WRITE, &[path.as_bytes(), b"\0", value.as_bytes()]).is_some()
    }

    /// Removes a node with all below it; returns whether the store has done so.
    pub fn remove(&mut self, path: &str) -> bool {
        self.ask(kind::REMOVE, &[path.as_bytes(), b"\0"]).is_some()
    }

    /// Sends a request whose payload has these parts. Returns the payload of the reply; `None` if the reply is an error.
    fn ask(&mut self, kind: u32, parts: &[&[u8]]) -> Option<Vec<u8>> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        for word in [kind, 0, 0, u32::try_from(length).expect("a short message")] {
            self.send(&word.to_le_bytes());
        }
        parts.iter().for_each(|part| self.send(part));
        let mut head = [0; HEAD];
        self.receive(&mut head);
        let word = |i: usize| u32::from_le_bytes([head[i * 4], head[i * 4 + 1], head[i * 4 + 2], head[i * 4 + 3]]);
        let mut payload = vec![0; word(3) as usize];
        self.receive(&mut payload);
        (word(0) != kind::ERROR).then_some(payload)
    }

    fn send(&mut self, mut rest: &[u8]) {
        while !rest.is_empty() {
            let sent = self.client.requests.write(&self.page, rest).expect("the indices agree");
            rest = &rest[sent..];
            self.wait();
        }
    }

    fn receive(&mut self, mut rest: &mut [u8]) {
        while !rest.is_empty() {
            let got = self.client.responses.read(&self.page, rest).expect("the indices agree");
            rest = &mut rest[got..];
            self.wait();
        }
    }

    /// Lets dom0 work.
    fn wait(&self) {
        let _ = hypercall::send(self.port);
        hypercall::yield_now();
    }
}
