//! A guest that talks to the store through its ring.

use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use guest_image::MachineFrame;
use hypercall_abi::grant::REF_XENSTORE;
use ring_protocol::WordPage;
use ring_protocol::store::Client;
use services::Host;
use services::store::StoreService;
use store::wire::{Assembler, Kind, message};
use toolstack::{Access, DomainId, Node, Store};

use super::Fake;

/// The guest's port to the store.
const STORE_PORT: u32 = 7;

/// A machine in which guests run.
pub trait Rounds: Host {
    fn fake(&self) -> &Fake;

    /// Gives every task a turn, and every device.
    fn round(&self);

    fn rounds(&self, count: usize) {
        (0..count).for_each(|_| self.round());
    }

    /// Goes on until the future is done; `None` if it is not done after so many rounds.
    fn run_for<T>(&self, rounds: usize, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        for _ in 0..rounds {
            if let Poll::Ready(result) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return Some(result);
            }
            self.round();
        }
        None
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.run_for(50_000, future).expect("it never ends")
    }
}

/// A guest with its end of the store's ring.
pub struct Guest<M> {
    pub machine: M,
    pub domain: u16,
    page: Rc<WordPage>,
    client: Client,
    assembler: Assembler,
}

impl<M: Rounds> Guest<M> {
    pub fn new(machine: &M, store: &StoreService<M>, domain: u16) -> Self {
        let home = format!("/local/domain/{domain}");
        let node = |path: String, access| Node { path, value: String::new(), access };
        let nodes = [node(home.clone(), Access::Read), node(format!("{home}/device"), Access::Read)];
        store.write(DomainId(domain), &nodes).unwrap();
        assert!(store.reserve());
        store.introduce(DomainId(domain), MachineFrame(1), STORE_PORT).unwrap();
        let page = machine.fake().page(domain, REF_XENSTORE);
        let client = Client::attach(&*page).unwrap();
        Self { machine: machine.clone(), domain, page, client, assembler: Assembler::default() }
    }

    /// The answer to a request: `None` if it is an error.
    fn ask(&mut self, transaction: u32, kind: Kind, payload: &[u8]) -> Option<String> {
        let bytes = message(kind as u32, 1, transaction, payload);
        assert_eq!(self.client.requests.write(&*self.page, &bytes), Ok(bytes.len()));
        for _ in 0..200 {
            self.machine.fake().raise_from(self.domain, STORE_PORT);
            self.machine.round();
            let mut buffer = [0; 1024];
            let count = self.client.responses.read(&*self.page, &mut buffer).unwrap();
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let (taken, message) = self.assembler.push(rest).unwrap();
                rest = &rest[taken..];
                if let Some(message) = message {
                    let text = String::from_utf8_lossy(&message.payload).replace('\0', "");
                    return Some(text).filter(|_| message.header.kind != Kind::Error as u32);
                }
            }
        }
        panic!("the store does not answer domain {}", self.domain);
    }

    pub fn get(&mut self, path: &str) -> Option<String> {
        self.ask(0, Kind::Read, format!("{path}\0").as_bytes())
    }

    pub fn put(&mut self, path: &str, value: &str) -> bool {
        self.ask(0, Kind::Write, format!("{path}\0{value}").as_bytes()).is_some()
    }

    /// Lets all domains write a node and make nodes below it.
    pub fn open_to_all(&mut self, path: &str) {
        self.ask(0, Kind::SetPermissions, format!("{path}\0b{}\0", self.domain).as_bytes()).unwrap();
    }

    pub fn remove(&mut self, path: &str) {
        self.ask(0, Kind::Remove, format!("{path}\0").as_bytes());
    }

    /// Writes nodes together. Tries again when others have changed something meanwhile.
    pub fn put_all(&mut self, nodes: &[(String, String)]) {
        for _ in 0..20 {
            let id: u32 = self.ask(0, Kind::TransactionStart, b"\0").unwrap().parse().unwrap();
            for (path, value) in nodes {
                self.ask(id, Kind::Write, format!("{path}\0{value}").as_bytes());
            }
            if self.ask(id, Kind::TransactionEnd, b"T\0").is_some() {
                return;
            }
        }
        panic!("the transaction never succeeds");
    }
}
