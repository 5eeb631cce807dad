//! Bytes nobody meant: the store answers or refuses, stays consistent, and stays small.

mod common;
use common::*;
use ring_protocol::{SharedPage, WordPage};
use store::transport::Link;
use store::wire::message;
use store::{DomainId, Store};
use test_random::Random;

const PIECES: [&str; 22] = [
    "data",
    "/",
    "device",
    "a",
    "b",
    "/local/domain/",
    "5",
    "6",
    "0",
    "@releaseDomain",
    "n5",
    "r6",
    "T",
    "F",
    "1",
    "18446744073709551616",
    "|",
    "|",
    "|",
    "//",
    "-",
    "\u{7f}",
];

fn payload(random: &mut Random) -> Vec<u8> {
    let mut text = String::new();
    for _ in 0..random.below(8) {
        text += random.pick(&PIECES);
    }
    let mut payload = bytes(&text);
    match random.below(12) {
        0 => payload.resize(random.below(4097), b'x'),
        1 => payload.push(random.byte()),
        2 if !payload.is_empty() => {
            let at = random.below(payload.len());
            payload[at] = random.byte();
        }
        3 => {}
        _ => payload.push(0),
    }
    payload
}

#[test]
fn requests_made_of_pieces_never_break_the_store() {
    let mut random = Random::new();
    let mut world = World::new(&[5, 6]);
    for step in 0..60_000 {
        let id = random.pick(&[World::guest(5), World::guest(6), World::guest(5), world.dom0]);
        let privileged = id == world.dom0;
        let kind = random.below(28);
        let transaction = u32::try_from(random.below(4) * random.below(2)).unwrap();
        // dom0 is trusted not to give everything away or to forget its clients.
        if privileged && (kind == RELEASE || kind == SET_PERMS || kind == INTRODUCE) {
            continue;
        }
        let request = message(kind, 7, transaction, &payload(&mut random));
        let handled = world.store.handle(id, &request).unwrap();
        assert!(handled.message || !world.store.accepts_input(id));
        if random.below(4) != 0 {
            world.drain(id);
        }
        if step % 1000 == 0 {
            world.store.audit().unwrap();
        }
    }
    for domain in [5, 6] {
        let usage = world.store.usage(DomainId(domain));
        assert!(usage.nodes <= 1000 && usage.bytes <= 512 * 1024, "{usage:?}");
    }
}

#[test]
fn a_stream_of_noise_is_cut_off_or_answered() {
    let mut random = Random::new();
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let mut refused = 0;
    for _ in 0..100_000 {
        let length = 1 + random.below(40);
        // Small numbers look like headers more often.
        let small = random.below(2) == 0;
        let noise: Vec<u8> = (0..length).map(|_| if small { random.byte() % 4 } else { random.byte() }).collect();
        let mut rest = &noise[..];
        while !rest.is_empty() {
            match world.store.handle(guest, rest) {
                Ok(handled) if handled.taken > 0 => rest = &rest[handled.taken..],
                Ok(_) => {
                    assert!(!world.drain(guest).is_empty(), "takes nothing, gives nothing");
                }
                Err(_) => {
                    refused += 1;
                    break;
                }
            }
        }
    }
    assert!(refused > 0);
    assert_eq!(world.ask(world.dom0, READ, "/|"), value(""));
}

#[test]
fn a_page_written_at_random_stops_one_link_only() {
    let mut random = Random::new();
    for _ in 0..300 {
        let mut world = World::new(&[5, 6]);
        let page: WordPage = WordPage::new();
        let mut link = Link::introduce(DomainId(5), &page).unwrap();
        let mut stopped = 0;
        for _ in 0..100 {
            match random.below(6) {
                0 => {
                    let offset = 2048 + 4 * random.below(8);
                    let near = page.load_u32(offset).wrapping_add(u32::from(random.byte()));
                    let value = if random.below(6) == 0 { u32::from(random.byte()) << 24 } else { near };
                    page.store_u32(offset, value);
                }
                1 | 2 => {
                    let request = message(READ, 1, 0, &payload(&mut random));
                    page.write(random.below(1024), &request[..request.len().min(24)]);
                }
                _ => {
                    let step = link.step(&page, &mut world.store);
                    stopped += u32::from(step.stopped.is_some());
                    assert!(!step.again || step.notify);
                }
            }
        }
        assert_eq!(world.ask(World::guest(6), READ, "data|"), value(""), "stopped {stopped} times");
        let _: &Store = &world.store;
    }
}
