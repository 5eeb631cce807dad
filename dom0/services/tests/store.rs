//! The store for guests that come, ask, misbehave and go.

mod common;

use common::Fake;
use guest_image::MachineFrame;
use hypercall_abi::grant::REF_XENSTORE;
use ring_protocol::store::{CONNECTION, Client, ERROR, LinkError};
use ring_protocol::{SharedPage, WordPage};
use services::Class;
use services::store::{StoreService, store_bytes};
use std::rc::Rc;
use store::wire::{Assembler, Kind, message};
use toolstack::{Access, DomainId, Node, Store};

const OWN: DomainId = DomainId(0);
const FRAME: MachineFrame = MachineFrame(0x1234);

fn world() -> (Fake, StoreService<Fake>) {
    let host = Fake::default();
    (host.clone(), StoreService::new(host, OWN))
}

/// A guest with its end of the ring.
struct Guest {
    host: Fake,
    domain: u16,
    page: Rc<WordPage>,
    client: Client,
    assembler: Assembler,
}

impl Guest {
    /// A guest that has just been introduced.
    fn introduced(host: &Fake, store: &StoreService<Fake>, domain: u16) -> Self {
        assert!(store.reserve());
        store.introduce(DomainId(domain), FRAME, 7).unwrap();
        let page = host.page(domain, REF_XENSTORE);
        let client = Client::attach(&*page).unwrap();
        Self { host: host.clone(), domain, page, client, assembler: Assembler::default() }
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.send_in(0, kind, payload);
    }

    fn send_in(&mut self, transaction: u32, kind: Kind, payload: &[u8]) {
        let bytes = message(kind as u32, 1, transaction, payload);
        assert_eq!(self.client.requests.write(&*self.page, &bytes), Ok(bytes.len()));
        self.host.raise(self.domain);
    }

    /// What has been answered or told, in words.
    fn heard(&mut self) -> Vec<String> {
        let mut buffer = [0; 1024];
        let count = self.client.responses.read(&*self.page, &mut buffer).unwrap();
        let (mut rest, mut heard) = (&buffer[..count], Vec::new());
        while !rest.is_empty() {
            let (taken, message) = self.assembler.push(rest).unwrap();
            heard.extend(message.map(|message| String::from_utf8_lossy(&message.payload).replace('\0', "|")));
            rest = &rest[taken..];
        }
        heard
    }

    fn asked(&mut self, kind: Kind, payload: &[u8]) -> Vec<String> {
        self.send(kind, payload);
        self.host.rounds(2);
        self.heard()
    }
}

fn node(path: &str, value: &str, access: Access) -> Node {
    Node { path: path.into(), value: value.into(), access }
}

#[test]
fn a_guest_asks_and_hears_what_others_change() {
    let (host, store) = world();
    store.write(DomainId(5), &[node("/local/domain/5/name", "five", Access::Read)]).unwrap();
    store.write(DomainId(5), &[node("/local/domain/5/data", "", Access::Own)]).unwrap();
    let mut guest = Guest::introduced(&host, &store, 5);
    assert_eq!(guest.asked(Kind::Read, b"name\0"), ["five"]);
    assert_eq!(guest.asked(Kind::Write, b"name\0six"), ["EACCES|"]);
    assert_eq!(guest.asked(Kind::Write, b"data/x\0six"), ["OK|"]);
    assert_eq!(guest.asked(Kind::Watch, b"name\0token\0"), ["OK|", "name|token|"]);
    store.write(DomainId(5), &[node("/local/domain/5/name", "seven", Access::Read)]).unwrap();
    host.rounds(4);
    assert_eq!(guest.heard(), ["name|token|"]);
    let before = host.notified(5);
    host.rounds(10);
    assert_eq!(host.notified(5), before, "nobody is notified for nothing");
    assert_eq!((host.tasks(Class::Control), host.tasks(Class::Data)), (2, 0), "the store's own work, and the guest");
}

#[test]
fn a_turn_is_one_message_and_a_flood_leaves_others_their_turns() {
    let (host, store) = world();
    for domain in [5, 6] {
        store.write(DomainId(domain), &[node(&format!("/local/domain/{domain}/name"), "n", Access::Read)]).unwrap();
    }
    let mut flood = Guest::introduced(&host, &store, 5);
    let mut quiet = Guest::introduced(&host, &store, 6);
    host.rounds(2);
    for _ in 0..40 {
        flood.send(Kind::Read, b"name\0");
    }
    quiet.send(Kind::Read, b"name\0");
    host.round();
    assert_eq!((flood.heard().len(), quiet.heard().len()), (1, 1));
    for _ in 1..40 {
        host.round();
        assert_eq!(flood.heard().len(), 1, "a message each round");
    }
    host.rounds(3);
    assert!(flood.heard().is_empty());
}

#[test]
fn a_guest_that_does_not_read_is_held_until_it_does() {
    let (host, store) = world();
    let long = "v".repeat(900);
    store.write(DomainId(5), &[node("/local/domain/5/long", &long, Access::Read)]).unwrap();
    let mut guest = Guest::introduced(&host, &store, 5);
    for _ in 0..30 {
        guest.send(Kind::Read, b"long\0");
        host.rounds(2);
    }
    let before = host.notified(5);
    host.rounds(20);
    assert_eq!(host.notified(5), before, "the store stands still for this guest, and does not spin");
    let mut heard = 0;
    for _ in 0..200 {
        heard += guest.heard().len();
        host.raise(5);
        host.rounds(2);
    }
    assert_eq!(heard, 30, "every request is answered once");
}

#[test]
fn a_guest_hears_what_another_one_changes() {
    let (host, store) = world();
    let shared = [node("/shared", "", Access::Own)];
    store.clone().write(DomainId(5), &shared).unwrap();
    let mut writer = Guest::introduced(&host, &store, 5);
    let mut reader = Guest::introduced(&host, &store, 6);
    store.clone().write(DomainId(6), &[node("/read", "", Access::Own)]).unwrap();
    assert_eq!(writer.asked(Kind::SetPermissions, b"/shared\0n5\0r6\0"), ["OK|"]);
    assert_eq!(reader.asked(Kind::Watch, b"/shared\0token\0"), ["OK|", "/shared|token|"]);
    assert_eq!(writer.asked(Kind::Write, b"/shared\0new"), ["OK|"]);
    host.rounds(2);
    assert_eq!(reader.heard(), ["/shared|token|"]);
}

/// It changes more than may be left to tell; the store takes no request of it until that is told, and then goes on by itself.
#[test]
fn a_guest_that_changes_much_is_held_until_watchers_have_heard() {
    let (host, store) = world();
    store.clone().write(DomainId(5), &[node("/local/domain/5/d", "", Access::Own)]).unwrap();
    let mut guest = Guest::introduced(&host, &store, 5);
    let mut watcher = Guest::introduced(&host, &store, 6);
    for token in 0..100 {
        watcher.send(Kind::Watch, format!("/local/domain/5\0{token}\0").as_bytes());
        host.rounds(3);
        watcher.heard();
    }
    assert_eq!(guest.asked(Kind::TransactionStart, b"\0"), ["1|"]);
    let long = "n".repeat(150);
    for number in 0..100 {
        guest.send_in(1, Kind::Write, format!("d/{}/{long}{number}\0x", number / 10).as_bytes());
        host.rounds(2);
        assert_eq!(guest.heard(), ["OK|"]);
    }
    guest.send_in(1, Kind::TransactionEnd, b"T\0");
    guest.send(Kind::Read, b"d\0");
    host.round();
    let mut heard = guest.heard();
    assert_eq!(heard, ["OK|"], "the read waits");
    let mut rounds = 0;
    while heard.len() < 2 {
        host.round();
        heard.extend(guest.heard());
        rounds += 1;
        assert!(rounds < 1_000, "it is never answered");
    }
    assert!(rounds > 5, "{rounds}");
}

#[test]
fn released_guests_leave_nothing() {
    let (host, store) = world();
    let nothing = (host.held(), host.tasks(Class::Control), host.reserved());
    assert_eq!(nothing, ((0, 0), 1, 0));
    for round in 0..20 {
        for domain in [5, 6, 7] {
            store.write(DomainId(domain), &[node(&format!("/local/domain/{domain}/d"), "", Access::Own)]).unwrap();
            let mut guest = Guest::introduced(&host, &store, domain);
            assert_eq!(guest.asked(Kind::Write, b"d/x\0y"), ["OK|"], "round {round}");
        }
        assert_eq!((host.held(), host.reserved()), ((3, 3), 3 * store_bytes()));
        for domain in [6, 5, 7] {
            store.domain_shut_down(DomainId(domain));
            store.release(DomainId(domain)).unwrap();
        }
        host.rounds(20);
        assert_eq!((host.held(), host.tasks(Class::Control), host.reserved()), nothing);
    }
    assert_eq!(store.release(DomainId(5)), Ok(()), "one that was never introduced has nothing to be released from");
}

#[test]
fn introducing_again_begins_anew_with_one_page_and_port() {
    let (host, store) = world();
    let mut first = Guest::introduced(&host, &store, 5);
    first.send(Kind::GetDomainPath, b"5\0");
    let mut second = Guest::introduced(&host, &store, 5);
    host.rounds(3);
    assert_eq!(host.held(), (1, 1));
    assert_eq!(host.reserved(), store_bytes());
    assert_eq!(second.asked(Kind::GetDomainPath, b"5\0"), ["/local/domain/5|"]);
}

#[test]
fn a_session_hears_a_guest_and_a_guest_hears_a_session() {
    let (host, store) = world();
    store.write(DomainId(5), &[node("/local/domain/5/data", "", Access::Own)]).unwrap();
    let mut guest = Guest::introduced(&host, &store, 5);
    let session = store.session();
    session.watch("/local/domain/5/data/x").unwrap();
    assert_eq!(session.next_event().unwrap().path, "/local/domain/5/data/x", "the first event comes at once");
    assert!(session.next_event().is_none());
    assert_eq!(guest.asked(Kind::Write, b"data/x\0one"), ["OK|"]);
    assert_eq!(session.next_event().unwrap().path, "/local/domain/5/data/x");
    assert_eq!(guest.asked(Kind::Watch, b"data\0token\0"), ["OK|", "data|token|"]);
    let failed = session.transaction(|t| {
        t.write("/local/domain/5/data/x", b"two")?;
        t.read("/nowhere")
    });
    assert!(failed.is_err());
    host.rounds(3);
    assert!(guest.heard().is_empty(), "a transaction that fails changes nothing");
    let read = session.transaction(|t| {
        let before = t.read_text("/local/domain/5/data/x")?;
        t.write("/local/domain/5/data/x", b"two")?;
        Ok(before)
    });
    assert_eq!(read.unwrap(), "one");
    host.rounds(3);
    assert_eq!(guest.heard(), ["data/x|token|"]);
    assert_eq!(store.sessions(), 1);
    drop(session);
    assert_eq!(store.sessions(), 0);
}

#[test]
fn dropping_the_store_says_nothing() {
    let (host, store) = world();
    let mut guest = Guest::introduced(&host, &store, 5);
    host.rounds(2);
    guest.send(Kind::GetDomainPath, b"5\0");
    let mut before = vec![0; 4096];
    guest.page.read(0, &mut before);
    let notified = host.notified(5);
    drop(store);
    host.rounds(5);
    let mut after = vec![0; 4096];
    guest.page.read(0, &mut after);
    assert!(before == after, "not a byte of the page has changed");
    assert_eq!((host.notified(5), host.held(), host.tasks(Class::Control)), (notified, (0, 0), 0));
    assert_eq!(host.reserved(), 0);
}

#[test]
fn a_broken_ring_is_served_again_when_the_guest_asks_for_it() {
    let (host, store) = world();
    let mut guest = Guest::introduced(&host, &store, 5);
    host.rounds(2);
    // req_prod.
    guest.page.store_u32(2052, 5000);
    host.raise(5);
    host.rounds(3);
    assert_eq!(guest.page.load_u32(ERROR), LinkError::BadIndices as u32);
    let notified = host.notified(5);
    host.raise(5);
    host.rounds(10);
    assert_eq!(host.notified(5), notified, "it is not served");
    guest.page.store_u32(CONNECTION, 1);
    host.raise(5);
    host.rounds(3);
    guest.client = Client::attach(&*guest.page).unwrap();
    assert_eq!(guest.asked(Kind::GetDomainPath, b"5\0"), ["/local/domain/5|"]);
}

#[test]
fn what_cannot_be_had_is_named() {
    let (host, store) = world();
    assert_eq!(store.introduce(DomainId(99), FRAME, 7).unwrap_err(), "its store page: Inval");
    assert_eq!(store.introduce(DomainId(5), FRAME, 99).unwrap_err(), "its store port: Inval");
    assert_eq!(host.held(), (0, 0));
    store.release(DomainId(5)).unwrap();
    host.set_full(true);
    assert!(!store.reserve());
    host.set_full(false);
    assert!(store.reserve());
    store.give_back();
    assert_eq!(host.reserved(), 0);
}

#[test]
fn a_large_tree_is_removed_in_pieces_while_others_have_turns() {
    let (host, store) = world();
    let nodes: Vec<Node> = (0..900).map(|n| node(&format!("/local/domain/5/d/{n}"), "x", Access::Own)).collect();
    store.write(DomainId(5), &nodes).unwrap();
    host.rounds(5);
    store.remove("/local/domain/5/d").unwrap();
    let mut rounds = 0;
    while !store.is_settled() {
        host.round();
        rounds += 1;
        assert!(rounds < 1000, "it never ends");
    }
    assert!(rounds >= 3, "900 nodes in {rounds} turns");
}
