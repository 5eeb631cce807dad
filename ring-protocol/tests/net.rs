//! Slots of random bytes, gathered and judged by a second reading of the ABI's rules (ABI io 6.1, 6.2).

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use ring_protocol::net::{CHAIN_SLOTS, Hostile, TxRequest, gather, tx_flag};
use test_random::Random;
use zerocopy::{FromBytes, IntoBytes};

/// Slots that are nearly a packet.
fn nearly(random: &mut Random) -> Vec<TxRequest> {
    let data = match random.below(4) {
        0 => 1,
        1 => 15 + random.below(8),
        _ => 1 + random.below(6),
    };
    let extras = match random.below(6) {
        0 => 1 + random.below(7),
        1 | 2 => 1,
        _ => 0,
    };
    let mut slots = Vec::new();
    for at in 0..data {
        let more = if at + 1 < data { tx_flag::MORE_DATA } else { 0 };
        let size = 14 + random.below(1000);
        slots.push(TxRequest { reference: 9, offset: random.below(3000), flags: more, id: 0, size });
    }
    let others: u16 = slots[1..].iter().map(|slot| slot.size).sum();
    slots[0].size += others;
    for at in 0..extras {
        let more = u32::from(at + 1 < extras);
        let size = 40 + random.below(100);
        let kind = if random.below(8) == 0 { random.below(7) } else { 1 };
        let protocol = if random.below(8) == 0 { random.below(4) } else { 1 };
        let extra = TxRequest { reference: kind | more << 8 | size << 16, offset: protocol, ..TxRequest::default() };
        slots.insert(1, extra);
        // Extras are inserted at the front, so the first inserted is the last.
        slots[1].reference = slots[1].reference & !0x100 | u32::from(at > 0) << 8;
        slots[0].flags |= tx_flag::EXTRA_INFO;
    }
    slots
}

/// The rules, read once more: how many slots, how many of them extra, and whether the packet is carried, with the bytes of its
/// first slot. `Err`: the vif ends.
fn expected(slots: &[TxRequest]) -> Result<(usize, usize, Option<u16>), Hostile> {
    let bytes = |at: usize| slots.get(at).map(|slot| slot.as_bytes().to_vec());
    let word = |slot: &[u8], at: usize| u16::from_le_bytes([slot[at], slot[at + 1]]);
    let first = bytes(0).ok_or(Hostile::Unfinished)?;
    let (mut at, mut gsos, mut carried) = (1, Vec::new(), true);
    let mut more = word(&first, 6) & 8 != 0;
    while more {
        if at == 6 {
            return Err(Hostile::EndlessExtras);
        }
        let extra = bytes(at).ok_or(Hostile::Unfinished)?;
        carried &= extra[0] == 1 && (1..=2).contains(&extra[4]);
        gsos.push(word(&extra, 2));
        more = extra[1] & 1 != 0;
        at += 1;
    }
    let extras = at - 1;
    carried &= gsos.len() <= 1;
    let total = word(&first, 10);
    let (mut data, mut others, mut last) = (1, 0_u64, first.clone());
    while word(&last, 6) & 4 != 0 {
        if data == 20 {
            return Err(Hostile::EndlessPacket);
        }
        last = bytes(at).ok_or(Hostile::Unfinished)?;
        let (offset, size) = (u64::from(word(&last, 4)), u64::from(word(&last, 10)));
        carried &= size > 0 && offset + size <= 4096;
        others += size;
        (at, data) = (at + 1, data + 1);
    }
    let length = u64::from(total).saturating_sub(others);
    carried &= data <= 18 && total >= 14 && length >= 14 && u64::from(word(&first, 4)) + length <= 4096;
    carried &= gsos.iter().all(|gso| (48..=total).contains(gso));
    Ok((at, extras, carried.then_some(length as u16)))
}

fn check(slots: &[TxRequest]) -> bool {
    let found = gather(slots).map(|chain| (chain.slots, chain.extras, chain.packet.ok().map(|it| it.first_bytes)));
    assert_eq!(found, expected(slots), "{slots:x?}");
    let Ok(chain) = gather(slots) else { return false };
    assert!(chain.slots <= CHAIN_SLOTS && chain.slots <= slots.len());
    let Ok(packet) = chain.packet else { return false };
    let parts: Vec<_> = packet.parts(&chain, slots).collect();
    assert_eq!(parts.len(), chain.slots - chain.extras);
    assert_eq!(parts.iter().map(|part| usize::from(part.bytes)).sum::<usize>(), packet.bytes.into());
    assert!(parts.iter().all(|part| part.bytes > 0 && part.offset + part.bytes <= 4096));
    true
}

#[test]
fn packets_and_mutations_of_packets_are_judged_as_the_rules_say() {
    let mut random = Random::new();
    let (mut carried, mut whole, mut mutated_carried) = (0, 0, 0);
    for _ in 0..300_000 {
        let mut slots = nearly(&mut random);
        whole += u64::from(gather(&slots).is_ok());
        carried += u64::from(check(&slots));
        for _ in 0..1 + random.below(3) {
            let at = random.below(slots.len());
            let mut bytes: [u8; 12] = slots[at].as_bytes().try_into().unwrap();
            bytes[random.below(12)] = random.next() as u8;
            slots[at] = TxRequest::read_from_bytes(&bytes).unwrap();
        }
        slots.truncate(1 + random.below(slots.len()));
        mutated_carried += u64::from(check(&slots));
    }
    println!("{whole} whole, {carried} carried; of the mutated {mutated_carried} carried");
    assert!(whole > 150_000 && carried > 80_000 && mutated_carried > 10_000, "the test is lopsided");
}

#[test]
fn slots_of_random_bytes_are_judged_as_the_rules_say() {
    let mut random = Random::new();
    for _ in 0..500_000 {
        let count = random.below(30);
        let slots = (0..count).map(|_| {
            let mut bytes = [0; 12];
            bytes.fill_with(|| random.next() as u8);
            TxRequest::read_from_bytes(&bytes).unwrap()
        });
        let slots: Vec<_> = slots.collect();
        check(&slots);
    }
}
