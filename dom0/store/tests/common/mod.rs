//! A client of the store that speaks the protocol, for all tests.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use store::wire::{Assembler, HEADER_BYTES, message};
use store::{ConnectionId, DomainId, Quotas, Store};

pub const CONTROL: u32 = 0;
pub const DIRECTORY: u32 = 1;
pub const READ: u32 = 2;
pub const GET_PERMS: u32 = 3;
pub const WATCH: u32 = 4;
pub const UNWATCH: u32 = 5;
pub const START: u32 = 6;
pub const END: u32 = 7;
pub const INTRODUCE: u32 = 8;
pub const RELEASE: u32 = 9;
pub const GET_DOMAIN_PATH: u32 = 10;
pub const WRITE: u32 = 11;
pub const MKDIR: u32 = 12;
pub const RM: u32 = 13;
pub const SET_PERMS: u32 = 14;
pub const WATCH_EVENT: u32 = 15;
pub const ERROR: u32 = 16;
pub const IS_INTRODUCED: u32 = 17;
pub const RESUME: u32 = 18;
pub const SET_TARGET: u32 = 19;
pub const RESET_WATCHES: u32 = 21;
pub const DIRECTORY_PART: u32 = 22;
pub const GET_FEATURE: u32 = 23;

/// A reply as text: `Ok(payload)` or `Err(error name)`; zero bytes shown as `|`.
pub type Reply = Result<String, String>;

pub struct World {
    pub store: Store,
    pub dom0: ConnectionId,
    next_request: u32,
}

impl World {
    /// A store with a privileged session and these domains introduced, each with an own home.
    pub fn new(domains: &[u16]) -> Self {
        Self::with_quotas(domains, Quotas::default())
    }

    pub fn with_quotas(domains: &[u16], quotas: Quotas) -> Self {
        let mut store = Store::new(DomainId(0), quotas);
        let dom0 = store.open_local();
        let mut world = Self { store, dom0, next_request: 1 };
        for domain in domains {
            world.introduce(*domain);
        }
        world
    }

    pub fn introduce(&mut self, domain: u16) {
        let mut session = self.store.session(self.dom0);
        let home = format!("/local/domain/{domain}");
        session.mkdir(&home).unwrap();
        session.set_permissions(&home, &format!("n0,r{domain}")).unwrap();
        for own in ["data", "device"] {
            let path = format!("{home}/{own}");
            session.mkdir(&path).unwrap();
            session.set_permissions(&path, &format!("n{domain},r0")).unwrap();
        }
        session.introduce(DomainId(domain), 0x1000, 3).unwrap();
        let _ = self.store.next_duty();
    }

    pub fn guest(domain: u16) -> ConnectionId {
        ConnectionId::Domain(DomainId(domain))
    }

    /// Sends one request; gives back everything that came out, in order.
    pub fn exchange(&mut self, id: ConnectionId, kind: u32, transaction: u32, payload: &[u8]) -> Vec<(u32, String)> {
        self.send(id, kind, transaction, payload);
        self.drain(id)
    }

    pub fn send(&mut self, id: ConnectionId, kind: u32, transaction: u32, payload: &[u8]) {
        self.next_request += 1;
        let bytes = message(kind, self.next_request, transaction, payload);
        let handled = self.store.handle(id, &bytes).unwrap();
        assert_eq!((handled.taken, handled.message), (bytes.len(), true));
    }

    /// Fetches what waits, when everybody has heard of everything.
    pub fn drain(&mut self, id: ConnectionId) -> Vec<(u32, String)> {
        while self.store.work() {}
        let mut assembler = Assembler::default();
        let mut messages = Vec::new();
        loop {
            let mut bytes = self.store.output(id).to_vec();
            if bytes.is_empty() {
                return messages;
            }
            self.store.output_sent(id, bytes.len());
            assert!(bytes.len() <= HEADER_BYTES + 4096, "a message too long to be one");
            while !bytes.is_empty() {
                let (taken, message) = assembler.push(&bytes).unwrap();
                bytes.drain(..taken);
                if let Some(message) = message {
                    messages.push((message.header.kind, text(&message.payload)));
                }
            }
        }
    }

    /// Sends one request; its reply. Events that came with it are dropped.
    pub fn ask(&mut self, id: ConnectionId, kind: u32, payload: &str) -> Reply {
        self.ask_in(id, 0, kind, payload)
    }

    pub fn ask_in(&mut self, id: ConnectionId, tx: u32, kind: u32, payload: &str) -> Reply {
        let out = self.exchange(id, kind, tx, &bytes(payload));
        let (kind, payload) = out.into_iter().find(|(kind, _)| *kind != WATCH_EVENT).unwrap();
        if kind == ERROR { Err(payload.trim_end_matches('|').into()) } else { Ok(payload) }
    }

    /// Events waiting, as `path|token`.
    pub fn events(&mut self, id: ConnectionId) -> Vec<String> {
        let events = self.drain(id).into_iter().filter(|(kind, _)| *kind == WATCH_EVENT);
        events.map(|(_, payload)| payload.trim_end_matches('|').into()).collect()
    }

    /// Opens a transaction.
    pub fn start(&mut self, id: ConnectionId) -> u32 {
        self.ask(id, START, "|").unwrap().trim_end_matches('|').parse().unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.store.audit().unwrap();
        }
    }
}

/// `|` stands for a zero byte.
pub fn bytes(text: &str) -> Vec<u8> {
    text.replace('|', "\0").into_bytes()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "|")
}

pub fn ok() -> Reply {
    Ok("OK|".into())
}

pub fn refused(name: &str) -> Reply {
    Err(name.into())
}

pub fn value(text: &str) -> Reply {
    Ok(text.into())
}
