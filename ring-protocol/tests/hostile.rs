//! Peers that write whatever they like, and peers that keep the rules, at random.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use common::index;
use std::collections::VecDeque;

use ring_protocol::block::{Response, SLOT_BYTES};
use ring_protocol::bytes::{ByteRing, Reader, Writer};
use ring_protocol::net::{RX_SLOT_BYTES, RxResponse, TX_SLOT_BYTES, TxResponse};
use ring_protocol::ring::{BackRing, FrontRing, Layout};
use ring_protocol::{SharedPage, WordPage};
use test_random::Random;
use zerocopy::FromBytes;

#[test]
fn a_back_end_takes_only_what_fits_whatever_the_front_end_writes() {
    let mut random = Random::new();
    for _ in 0..2_000 {
        let page: WordPage = WordPage::new();
        let layout = Layout::new(64 + 8 * 8, 8).unwrap();
        let start = index(&mut random, u32::MAX - 4);
        for offset in [0, 4, 8, 12] {
            page.store_u32(offset, start);
        }
        let mut back = BackRing::attach(&page, layout).unwrap();
        let (mut taken, mut answered) = (0u32, 0u32);
        let mut broken = false;
        for _ in 0..60 {
            page.store_u32(random.below(4) * 4, index(&mut random, start.wrapping_add(taken)));
            let before = page.load_u32(0);
            match back.look(&page) {
                Ok(waiting) => {
                    assert!(!broken, "a broken ring came back");
                    assert_eq!(waiting, before.wrapping_sub(start.wrapping_add(taken)));
                    assert!(taken + waiting - answered <= 8);
                }
                Err(_) => broken = true,
            }
            while random.below(4) != 0 {
                match back.take(&page, &mut [0; 8]) {
                    Some(index) => {
                        assert_eq!(index, start.wrapping_add(taken));
                        taken += 1;
                    }
                    None => break,
                }
            }
            while random.below(3) != 0 && back.respond(&page, &[0xaa; 8]).is_ok() {
                answered += 1;
            }
            let _ = back.publish(&page);
            assert!(taken - answered <= 8, "more in flight than slots");
            assert_eq!(back.in_flight(), taken - answered);
            broken |= random.below(3) == 0 && back.rearm(&page, 1).is_err();
        }
    }
}

#[test]
fn a_front_end_takes_only_answers_it_asked_for() {
    let mut random = Random::new();
    for _ in 0..2_000 {
        let page: WordPage = WordPage::new();
        let layout = Layout::new(64 + 4 * 8, 8).unwrap();
        let mut front = FrontRing::init(&page, layout);
        let (mut asked, mut taken) = (0u32, 0u32);
        for _ in 0..40 {
            while random.below(3) != 0 && front.submit(&page, &[1; 8]).unwrap().is_some() {
                asked += 1;
            }
            let _ = front.publish(&page);
            page.store_u32(random.below(4) * 4, index(&mut random, taken));
            let _ = front.look(&page);
            while front.take(&page, &mut [0; 8]).is_some() {
                taken += 1;
            }
            assert!(taken <= asked && asked - taken <= 4, "{taken} answers to {asked} requests");
            let _ = front.rearm(&page, random.below(5));
        }
    }
}

#[test]
fn honest_ends_lose_and_invent_nothing() {
    let mut random = Random::new();
    for entries in [1usize, 2, 8] {
        let page: WordPage = WordPage::new();
        let layout = Layout::new(64 + entries * 8, 8).unwrap();
        let mut front = FrontRing::init(&page, layout);
        let mut back = BackRing::attach(&page, layout).unwrap();
        let mut expected_requests: VecDeque<u64> = VecDeque::new();
        let mut in_back: Vec<u64> = Vec::new();
        let mut expected_responses: VecDeque<u64> = VecDeque::new();
        let mut entry = [0; 8];
        for _ in 0..50_000 {
            match random.below(6) {
                0 => {
                    let request = random.next();
                    if front.submit(&page, &request.to_le_bytes()).unwrap().is_some() {
                        expected_requests.push_back(request);
                    } else {
                        assert_eq!(front.room(), 0);
                    }
                }
                1 => drop(front.publish(&page)),
                2 => {
                    back.look(&page).unwrap();
                    while back.take(&page, &mut entry).is_some() {
                        let request = u64::from_le_bytes(entry);
                        assert_eq!(expected_requests.pop_front(), Some(request));
                        in_back.push(request);
                    }
                }
                3 if !in_back.is_empty() => {
                    let pick = random.below(in_back.len());
                    let answer = !in_back.swap_remove(pick);
                    back.respond(&page, &answer.to_le_bytes()).unwrap();
                    expected_responses.push_back(answer);
                }
                4 => drop(back.publish(&page)),
                _ => {
                    front.look(&page).unwrap();
                    while front.take(&page, &mut entry).is_some() {
                        let answer = u64::from_le_bytes(entry);
                        assert_eq!(expected_responses.pop_front(), Some(answer));
                    }
                }
            }
        }
    }
}

#[test]
fn a_byte_ring_survives_any_indices_and_touches_only_its_bytes() {
    let mut random = Random::new();
    let ring = ByteRing::new(16, 32, 48, 52);
    for _ in 0..20_000 {
        let page: WordPage<32> = WordPage::new();
        let start = index(&mut random, u32::MAX);
        page.store_u32(48, start);
        page.store_u32(52, start);
        let mut reader = Reader::attach(ring, &page).unwrap();
        let mut writer = Writer::attach(ring, &page).unwrap();
        for _ in 0..4 {
            let offset = if random.below(2) == 0 { 48 } else { 52 };
            page.store_u32(offset, index(&mut random, start));
            let mut buffer = vec![0; random.below(80)];
            if let Ok(count) = reader.read(&page, &mut buffer) {
                assert!(count <= 32 && count <= buffer.len());
            }
            if let Ok(count) = writer.write(&page, &vec![0xee; random.below(80)]) {
                assert!(count <= 32);
            }
        }
        let mut around = [0; 128];
        page.read(0, &mut around);
        assert!(around[..16].iter().chain(&around[56..]).all(|byte| *byte == 0));
    }
}

#[test]
fn a_byte_ring_is_a_stream() {
    let mut random = Random::new();
    let ring = ByteRing::new(0, 64, 64, 68);
    let page: WordPage<32> = WordPage::new();
    page.store_u32(64, u32::MAX - 1000);
    page.store_u32(68, u32::MAX - 1000);
    let mut reader = Reader::attach(ring, &page).unwrap();
    let mut writer = Writer::attach(ring, &page).unwrap();
    let (mut sent, mut received) = (0u8, 0u8);
    for _ in 0..20_000 {
        let chunk: Vec<u8> = (0..random.below(90)).map(|i| sent.wrapping_add(i)).collect();
        sent = sent.wrapping_add(writer.write(&page, &chunk).unwrap() as u8);
        let mut buffer = vec![0; random.below(90)];
        let count = reader.read(&page, &mut buffer).unwrap();
        for byte in &buffer[..count] {
            assert_eq!(*byte, received);
            received = received.wrapping_add(1);
        }
    }
}

/// A page that a test ends on when a byte beyond its ring is touched.
struct Fenced {
    page: WordPage,
    len: usize,
}

impl Fenced {
    fn check(&self, offset: usize, bytes: usize) {
        assert!(offset + bytes <= self.len, "{bytes} bytes at {offset} of {}", self.len);
    }
}

impl SharedPage for Fenced {
    fn len_bytes(&self) -> usize {
        self.len
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.check(offset, 4);
        self.page.load_u32(offset)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.check(offset, 4);
        self.page.store_u32(offset, value);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.check(offset, into.len());
        self.page.read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        self.page.write(offset, from);
    }
}

/// What a hostile back end has done so far, for all connections.
#[derive(Debug, Default)]
struct Tried {
    answers: u64,
    believed: u64,
    foreign: u64,
    broken: u64,
}

/// One connection to a back end that writes any bytes into any slot, and any index, between any two steps of the front end.
/// `parse` says which id an answer names. It ends when the ring is broken, or after some rounds.
fn hostile_back_end(random: &mut Random, slot: usize, parse: IdOf, tried: &mut Tried) {
    let layout = Layout::new(4096, slot).unwrap();
    let page = Fenced { page: WordPage::new(), len: layout.ring_bytes() };
    let mut front = FrontRing::init(&page, layout);
    // The ids in the order of their slots, as a front end keeps them; none is used twice.
    let mut asked: VecDeque<u64> = VecDeque::new();
    let (mut next_id, mut next_answer) = (random.next() & 0x7fff, 0_u32);
    for _ in 0..200 {
        while random.below(4) != 0 {
            let request: Vec<u8> = next_id.to_le_bytes().into_iter().cycle().take(slot).collect();
            if front.submit(&page, &request).unwrap().is_none() {
                assert_eq!(asked.len(), layout.entries() as usize);
                break;
            }
            asked.push_back(next_id & 0xffff);
            next_id += 1;
        }
        let _ = front.publish(&page);
        for _ in 0..random.below(8) {
            match random.below(16) {
                0 => page.store_u32(random.below(4) * 4, index(random, next_answer)),
                1..4 => {
                    let honest = next_answer.wrapping_add(random.below(asked.len() + 1) as u32);
                    page.store_u32(8, honest);
                }
                // The answer to one of the next requests, or any id, status, offset and length.
                _ => {
                    let ahead = random.below(12);
                    let mut bytes: Vec<u8> = (0..slot).map(|_| random.byte()).collect();
                    if let (true, Some(id)) = (random.below(2) == 0, asked.get(ahead)) {
                        bytes[..2].copy_from_slice(&(*id as u16).to_le_bytes());
                        bytes[2..8.min(slot)].fill(0);
                    }
                    let place = next_answer.wrapping_add(ahead as u32) as usize % layout.entries() as usize;
                    page.write(64 + place * slot, &bytes);
                }
            }
        }
        let there = front.look(&page);
        if let Ok(there) = there {
            assert!(there as usize <= asked.len(), "{there} answers to {} requests", asked.len());
        }
        let mut answer = vec![0; slot];
        while random.below(8) != 0 {
            let Some(at) = front.take(&page, &mut answer) else { break };
            assert!(there.is_ok(), "an answer from a broken ring");
            assert_eq!(at, next_answer, "answers are taken in turn, each once");
            next_answer = next_answer.wrapping_add(1);
            let own = asked.pop_front().expect("no more answers than requests");
            tried.answers += 1;
            if parse(&answer) == own { tried.believed += 1 } else { tried.foreign += 1 }
        }
        assert_eq!(front.room() as usize, layout.entries() as usize - asked.len(), "a slot is lost or used twice");
        if there.is_err() || random.below(4) == 0 && front.rearm(&page, random.below(9)).is_err() {
            tried.broken += 1;
            // Whatever comes later: a broken ring stays broken.
            page.store_u32(8, next_answer);
            assert!(front.look(&page).is_err() && front.take(&page, &mut answer).is_none());
            return;
        }
    }
}

/// Reads the id of an answer.
type IdOf = fn(&[u8]) -> u64;

/// A million answers with any ids, statuses, offsets and lengths, and indices that jump. A front end is given an answer for
/// each request at most, in the order of the slots, so that it knows which id the answer must have; and no byte beyond the ring
/// is touched.
#[test]
fn a_front_end_stays_sound_whatever_the_back_end_writes() {
    let net_tx = |answer: &[u8]| u64::from(TxResponse::read_from_prefix(answer).unwrap().0.id);
    let net_rx = |answer: &[u8]| u64::from(RxResponse::read_from_prefix(answer).unwrap().0.id);
    let block = |answer: &[u8]| Response::read_from_prefix(answer).unwrap().0.id;
    let kinds: [(usize, IdOf); 3] = [(TX_SLOT_BYTES, net_tx), (RX_SLOT_BYTES, net_rx), (SLOT_BYTES, block)];
    let (mut random, mut tried) = (Random::new(), Tried::default());
    while tried.answers < 1_000_000 {
        let (slot, parse) = kinds[random.below(kinds.len())];
        hostile_back_end(&mut random, slot, parse, &mut tried);
    }
    println!("{tried:?}");
    assert!(tried.believed > 100_000 && tried.foreign > 100_000 && tried.broken > 1_000, "{tried:?}");
}
