//! A new server goes on where the old one stopped, and guests notice nothing (ABI io 9.4).

mod common;
use common::*;
use ring_protocol::store::Client;
use ring_protocol::{SharedPage, WordPage};
use store::transport::Link;
use store::wire::{Assembler, message};
use store::{DomainId, Quotas, SnapshotError, Store, StoreError};
use test_random::Random;

fn restart(world: &mut World) {
    let snapshot = world.store.save();
    world.store = Store::restore(&snapshot, Quotas::default()).unwrap();
    world.dom0 = world.store.open_local();
}

#[test]
fn the_tree_and_the_rights_survive() {
    let mut world = World::new(&[5, 6]);
    world.ask(World::guest(5), WRITE, "data/a/b|va|ue").unwrap();
    world.ask(World::guest(5), SET_PERMS, "data/a|n5|r6|").unwrap();
    world.ask(world.dom0, SET_PERMS, "@releaseDomain|n0|r5|").unwrap();
    world.ask(world.dom0, SET_TARGET, "6|5|").unwrap();
    let before = world.store.save();
    restart(&mut world);
    assert_eq!(world.store.save().len(), before.len());
    assert_eq!(world.ask(World::guest(5), READ, "data/a/b|"), value("va|ue"));
    assert_eq!(world.ask(World::guest(6), READ, "/local/domain/5/data/a|"), value(""));
    assert_eq!(world.ask(World::guest(6), WRITE, "/local/domain/5/data/x|"), ok());
    assert_eq!(world.ask(world.dom0, GET_PERMS, "@releaseDomain|"), value("n0|r5|"));
    assert_eq!(world.ask(world.dom0, IS_INTRODUCED, "6|"), value("T|"));
    assert_eq!(world.store.usage(DomainId(5)).nodes, 2 + 2, "data/x is its maker's");
    assert_eq!(world.store.next_duty(), None, "nobody is introduced again");
}

#[test]
fn watches_go_on_and_fire_once_to_be_sure() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    world.ask(guest, WATCH, "device|t|").unwrap();
    world.ask(guest, WATCH, "/local/domain/5/data|u|1|").unwrap();
    restart(&mut world);
    assert_eq!(world.events(guest), ["/local/domain/5/data|u", "device|t"]);
    world.ask(guest, WRITE, "data/a/b|1").unwrap();
    world.send(guest, WRITE, 0, b"device/a\x001");
    assert_eq!(world.events(guest), ["device/a|t"], "relative and depth are kept");
    assert_eq!(world.ask(guest, UNWATCH, "device|t|"), ok());
}

#[test]
fn open_transactions_end_with_again() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let (first, second) = (world.start(guest), world.start(guest));
    world.ask_in(guest, first, WRITE, "data/a|lost").unwrap();
    restart(&mut world);
    assert_eq!(world.ask_in(guest, first, READ, "data|"), value(""), "reads do not fail");
    assert_eq!(world.ask_in(guest, first, WRITE, "data/b|lost"), ok(), "nor writes");
    assert_eq!(world.ask_in(guest, first, END, "T|"), refused("EAGAIN"));
    assert_eq!(world.ask_in(guest, second, END, "F|"), ok());
    assert_eq!(world.ask(guest, DIRECTORY, "data|"), value(""));
}

#[test]
fn a_stream_goes_on_in_the_middle_of_a_message() {
    let mut world = World::new(&[5]);
    let page: WordPage = WordPage::new();
    let mut link = Link::introduce(DomainId(5), &page).unwrap();
    let mut client = Client::attach(&page).unwrap();
    let long = "x".repeat(1500);
    let mut requests: Vec<u8> = [
        message(WATCH, 1, 0, b"data\0t\0"),
        message(WRITE, 2, 0, &bytes(&format!("data/a|{long}"))),
        message(READ, 3, 0, b"data/a\0"),
        message(READ, 4, 0, b"data/a\0"),
        message(READ, 5, 0, b"data/a\0"),
    ]
    .concat();
    let mut received = Vec::new();
    let mut turns = 0;
    while turns < 400 {
        turns += 1;
        let some = requests.len().min(37);
        let sent = client.requests.write(&page, &requests[..some]).unwrap();
        requests.drain(..sent);
        let _ = link.step(&page, &mut world.store);
        let mut buffer = [0; 53];
        let count = client.responses.read(&page, &mut buffer).unwrap();
        received.extend_from_slice(&buffer[..count]);
        if turns % 3 == 0 {
            restart(&mut world);
            link = Link::attach(DomainId(5), &page).unwrap();
        }
    }
    let mut assembler = Assembler::default();
    let mut replies = Vec::new();
    let mut rest = &received[..];
    while !rest.is_empty() {
        let (taken, message) = assembler.push(rest).unwrap();
        rest = &rest[taken..];
        replies.extend(message.filter(|message| message.header.kind != WATCH_EVENT));
    }
    let seen: Vec<_> = replies.iter().map(|reply| (reply.header.request, reply.payload.len())).collect();
    assert_eq!(seen, [(1, 3), (2, 3), (3, 1500), (4, 1500), (5, 1500)], "each exactly once");
    assert_eq!(page.load_u32(2048), page.load_u32(2052), "all requests taken");
}

#[test]
fn a_damaged_snapshot_is_refused() {
    let mut world = World::new(&[5]);
    world.ask(World::guest(5), WATCH, "data|t|").unwrap();
    world.start(World::guest(5));
    let good = world.store.save();
    let restore = |bytes: &[u8]| Store::restore(bytes, Quotas::default());
    assert_eq!(restore(b"").err(), Some(SnapshotError::Magic));
    assert_eq!(restore(b"TNSTORE2abc").err(), Some(SnapshotError::Checksum));
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(restore(&bad).is_err(), "byte {at}");
        assert!(restore(&good[..at]).is_err(), "cut at {at}");
    }
    assert!(restore(&good).is_ok());
}

#[test]
fn a_snapshot_with_a_right_checksum_and_wrong_contents_never_panics() {
    let mut random = Random::new();
    let mut world = World::new(&[5]);
    world.ask(World::guest(5), WATCH, "data|t|").unwrap();
    world.ask(World::guest(5), WRITE, "data/a|1").unwrap();
    let good = world.store.save();
    let fnv = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
    };
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut bad = good.clone();
        for _ in 0..=random.below(3) {
            let at = 16 + random.below(bad.len() - 16);
            bad[at] = random.byte();
        }
        let sum = fnv(&bad[16..]).to_le_bytes();
        bad[8..16].copy_from_slice(&sum);
        match Store::restore(&bad, Quotas::default()) {
            Ok(mut store) => {
                store.audit().unwrap();
                let dom0 = store.open_local();
                let _: Result<_, StoreError> = store.session(dom0).list("/");
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 1000);
}
