//! Peers that write whatever they like, and peers that keep the rules, at random.

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use common::index;
use std::collections::VecDeque;

use ring_protocol::bytes::{ByteRing, Reader, Writer};
use ring_protocol::ring::{BackRing, FrontRing, Layout};
use ring_protocol::{SharedPage, WordPage};
use test_random::Random;

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
