//! The store through a ring page, as a guest sees it (ABI io 3.1).

mod common;
use common::*;
use ring_protocol::store::{CONNECTION, Client, ERROR as ERROR_WORD, LinkError, SERVER_FEATURES};
use ring_protocol::{SharedPage, WordPage};
use store::transport::Link;
use store::wire::{Assembler, Message, message};
use store::{DomainId, Store};

const FIVE: DomainId = DomainId(5);

/// A guest that writes what fits and reads what is there.
struct Guest {
    client: Client,
    unsent: Vec<u8>,
    assembler: Assembler,
    replies: Vec<Message>,
    reads: bool,
}

impl Guest {
    fn new(page: &WordPage) -> Self {
        let client = Client::attach(page).unwrap();
        let (unsent, replies) = (Vec::new(), Vec::new());
        Self { client, unsent, assembler: Assembler::default(), replies, reads: true }
    }

    fn turn(&mut self, page: &WordPage) {
        let sent = self.client.requests.write(page, &self.unsent).unwrap();
        self.unsent.drain(..sent);
        let mut buffer = [0; 1024];
        while self.reads {
            let count = self.client.responses.read(page, &mut buffer).unwrap();
            if count == 0 {
                break;
            }
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let (taken, message) = self.assembler.push(rest).unwrap();
                self.replies.extend(message);
                rest = &rest[taken..];
            }
        }
    }
}

fn run(page: &WordPage, guest: &mut Guest, link: &mut Link, store: &mut Store) {
    for _ in 0..200 {
        guest.turn(page);
        let _ = link.step(page, store);
    }
    guest.turn(page);
}

fn payloads(guest: &Guest) -> Vec<String> {
    guest.replies.iter().map(|message| text(&message.payload)).collect()
}

#[test]
fn long_messages_pass_a_short_ring() {
    let mut world = World::new(&[5]);
    let page: WordPage = WordPage::new();
    let mut link = Link::introduce(FIVE, &page).unwrap();
    assert_eq!((link.domain(), page.load_u32(SERVER_FEATURES)), (FIVE, store::FEATURES));
    let mut guest = Guest::new(&page);
    world.store.session(world.dom0).write("/big", &[b'v'; 4096]).unwrap();
    world.store.session(world.dom0).set_permissions("/big", "r0").unwrap();
    let long = format!("data/a|{}", "x".repeat(2000));
    guest.unsent =
        [message(WRITE, 1, 0, &bytes(&long)), message(READ, 2, 0, b"/big\0"), message(READ, 3, 0, b"data/a\0")]
            .concat();
    run(&page, &mut guest, &mut link, &mut world.store);
    assert_eq!(payloads(&guest), ["OK|".into(), "v".repeat(4096), "x".repeat(2000)]);
    let requests: Vec<_> = guest.replies.iter().map(|message| message.header.request).collect();
    assert_eq!(requests, [1, 2, 3]);
}

#[test]
fn a_step_takes_one_message_and_says_what_to_do() {
    let mut world = World::new(&[5]);
    let page: WordPage = WordPage::new();
    let mut link = Link::introduce(FIVE, &page).unwrap();
    let mut guest = Guest::new(&page);
    assert_eq!(link.step(&page, &mut world.store), store::transport::Step::default());
    let request = message(READ, 1, 0, b"data\0");
    guest.unsent = request.repeat(3);
    guest.turn(&page);
    let steps: Vec<_> = (0..4).map(|_| link.step(&page, &mut world.store)).collect();
    let summary: Vec<_> = steps.iter().map(|step| (step.notify, step.again)).collect();
    assert_eq!(summary, [(true, true), (true, true), (true, false), (false, false)]);
    guest.turn(&page);
    assert_eq!(guest.replies.len(), 3);
}

#[test]
fn events_reach_a_guest_that_asks_nothing() {
    let mut world = World::new(&[5]);
    let page: WordPage = WordPage::new();
    let mut link = Link::introduce(FIVE, &page).unwrap();
    let mut guest = Guest::new(&page);
    guest.unsent = message(WATCH, 1, 0, b"device\0t\0");
    run(&page, &mut guest, &mut link, &mut world.store);
    world.store.session(world.dom0).write("/local/domain/5/device/x", b"1").unwrap();
    assert!(link.step(&page, &mut world.store).notify);
    guest.turn(&page);
    assert_eq!(payloads(&guest), ["OK|", "device|t|", "device/x|t|"]);
}

#[test]
fn a_guest_that_does_not_read_stalls_itself() {
    let mut world = World::new(&[5, 6]);
    let page: WordPage = WordPage::new();
    let mut link = Link::introduce(FIVE, &page).unwrap();
    let mut guest = Guest::new(&page);
    guest.reads = false;
    world.ask(World::guest(5), WRITE, &format!("data/a|{}", "x".repeat(1000))).unwrap();
    guest.unsent = message(READ, 1, 0, b"data/a\0").repeat(200);
    run(&page, &mut guest, &mut link, &mut world.store);
    let stalled = guest.unsent.len();
    assert!(stalled > 0, "the server took everything");
    let step = link.step(&page, &mut world.store);
    assert_eq!((step.notify, step.again), (false, false), "nothing to do until the guest reads");
    assert_eq!(world.ask(World::guest(6), READ, "data|"), value(""));
    guest.reads = true;
    for _ in 0..10 {
        run(&page, &mut guest, &mut link, &mut world.store);
    }
    assert_eq!(guest.replies.len(), 200, "and then goes on where it was");
}

#[test]
fn impossible_indices_stop_the_link_and_say_so() {
    for offset in [2052, 2056] {
        let mut world = World::new(&[5]);
        let page: WordPage = WordPage::new();
        let mut link = Link::introduce(FIVE, &page).unwrap();
        let mut guest = Guest::new(&page);
        guest.unsent = message(WATCH, 1, 0, b"device\0t\0");
        run(&page, &mut guest, &mut link, &mut world.store);
        page.store_u32(offset, page.load_u32(offset).wrapping_add(1025));
        world.store.session(world.dom0).write("/local/domain/5/device/x", b"1").unwrap();
        let step = link.step(&page, &mut world.store);
        assert_eq!((step.notify, step.stopped), (true, Some(LinkError::BadIndices)));
        assert_eq!(page.load_u32(ERROR_WORD), 2);
        assert_eq!(link.step(&page, &mut world.store), store::transport::Step::default());
        assert_eq!(world.ask(World::guest(5), UNWATCH, "device|t|"), refused("ENOENT"));
    }
}

#[test]
fn a_broken_stream_stops_the_link_and_a_request_to_reconnect_heals_it() {
    let mut world = World::new(&[5]);
    let page: WordPage = WordPage::new();
    let mut link = Link::introduce(FIVE, &page).unwrap();
    let mut guest = Guest::new(&page);
    guest.unsent = [0xff; 32].to_vec();
    guest.turn(&page);
    let step = link.step(&page, &mut world.store);
    assert_eq!(step.stopped, Some(LinkError::Protocol));
    assert_eq!(page.load_u32(ERROR_WORD), 3);
    page.store_u32(CONNECTION, 1);
    assert!(link.step(&page, &mut world.store).notify);
    assert_eq!((page.load_u32(CONNECTION), page.load_u32(ERROR_WORD)), (0, 0));
    let mut guest = Guest::new(&page);
    guest.unsent = message(READ, 1, 0, b"data\0");
    run(&page, &mut guest, &mut link, &mut world.store);
    assert_eq!(payloads(&guest), [""]);
}

#[test]
fn a_link_to_a_released_domain_does_nothing() {
    let mut world = World::new(&[5]);
    let page: WordPage = WordPage::new();
    let mut link = Link::introduce(FIVE, &page).unwrap();
    let mut guest = Guest::new(&page);
    world.store.session(world.dom0).release(FIVE).unwrap();
    guest.unsent = message(READ, 1, 0, b"data\0");
    run(&page, &mut guest, &mut link, &mut world.store);
    assert!(guest.replies.is_empty());
}
