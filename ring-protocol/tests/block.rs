//! Slots of random bytes, judged by the parser and by a second reading of the ABI's table (ABI io 5.1, 5.3).

#![allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod common;

use ring_protocol::block::{Direction, Extent, Geometry, Request, Segment, Slot, Status, judge};
use test_random::Random;
use zerocopy::FromBytes;

struct Disk {
    sectors: u64,
    block: u64,
    read_only: bool,
    discard: bool,
}

impl Disk {
    fn geometry(&self) -> Geometry {
        Geometry::new(self.sectors, self.block as u32 * 512, self.read_only, self.discard).unwrap()
    }
}

/// A number that is small, near a limit, or anything.
fn number(random: &mut Random, near: u64) -> u64 {
    match random.below(5) {
        0 => random.next(),
        1 => near.wrapping_add(random.below(20)).wrapping_sub(10),
        2 => u64::MAX - random.below(4000),
        _ => random.below(near.max(1)) / 8 * 8,
    }
}

fn random_slot(random: &mut Random, disk: &Disk) -> [u8; 112] {
    let mut bytes = [0; 112];
    bytes.fill_with(|| random.next() as u8);
    bytes[0] = [0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 6, random.next() as u8][random.below(12)];
    bytes[1] = [0, 1, 2, 3, 11, 12, random.next() as u8][random.below(7)];
    bytes[2..4].copy_from_slice(&([0u16, 1, 12, 256, 257, 512][random.below(6)]).to_le_bytes());
    bytes[16..24].copy_from_slice(&number(random, disk.sectors).to_le_bytes());
    for segment in bytes[24..].chunks_exact_mut(8) {
        let odd = random.below(40) == 0;
        (segment[4], segment[5]) = if odd { (random.next() as u8, random.next() as u8) } else { (0, 7) };
    }
    if bytes[0] == 5 {
        bytes[24..32].copy_from_slice(&number(random, disk.sectors).to_le_bytes());
    }
    bytes
}

fn word(bytes: &[u8; 112], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The sectors of segments, or nothing if one of them breaks a rule.
fn sum(segments: &[u8], block: u64) -> Option<u64> {
    segments.chunks_exact(8).map(|s| (u64::from(s[4]), u64::from(s[5]))).try_fold(0, |sum, (first, last)| {
        let fine = first <= last && last <= 7 && first % block == 0 && (last + 1) % block == 0;
        fine.then(|| sum + last + 1 - first)
    })
}

fn range(disk: &Disk, sector: u64, sectors: u64) -> Result<Extent, Status> {
    let end = u128::from(sector) + u128::from(sectors);
    let aligned = sector.is_multiple_of(disk.block) && sectors.is_multiple_of(disk.block);
    let fine = sectors > 0 && end <= u128::from(disk.sectors) && aligned;
    if fine { Ok(Extent { sector, sectors }) } else { Err(Status::Error) }
}

/// The table of the ABI, read once more.
fn expected(bytes: &[u8; 112], disk: &Disk) -> Result<Request, Status> {
    let (operation, small, sector) = (bytes[0], bytes[1], word(bytes, 16));
    let writes = matches!((operation, small), (1 | 3 | 5, _) | (6, 1));
    let count = u16::from_le_bytes([bytes[2], bytes[3]]);
    match operation {
        3 if small == 0 => return Ok(Request::Flush),
        5 if !disk.discard || small & 1 != 0 => return Err(Status::Unsupported),
        0 | 1 | 3 | 5 | 6 => {}
        _ => return Err(Status::Unsupported),
    }
    if writes && disk.read_only {
        return Err(Status::Error);
    }
    match operation {
        5 => range(disk, sector, word(bytes, 24)).map(Request::Discard),
        6 if small <= 1 && (1..=256).contains(&count) => Ok(Request::Indirect {
            direction: if small == 0 { Direction::Read } else { Direction::Write },
            sector,
            segments: count.into(),
            descriptors: u32::from_le_bytes(bytes[28..32].try_into().unwrap()),
        }),
        0 | 1 | 3 if small <= 11 => {
            let segments = usize::from(small);
            let sectors = sum(&bytes[24..24 + 8 * segments], disk.block).ok_or(Status::Error)?;
            let extent = range(disk, sector, sectors)?;
            let direction = if operation == 0 { Direction::Read } else { Direction::Write };
            Ok(Request::Direct { direction, extent, segments, durable: operation == 3 })
        }
        _ => Err(Status::Error),
    }
}

#[test]
fn the_parser_and_the_table_agree() {
    let mut random = Random::new();
    let (mut served, mut refused) = (0, 0);
    for _ in 0..400_000 {
        let disk = Disk {
            sectors: number(&mut random, 4096),
            block: 1 << random.below(4),
            read_only: random.below(4) == 0,
            discard: random.below(4) != 0,
        };
        let bytes = random_slot(&mut random, &disk);
        let slot = Slot::read_from_bytes(&bytes).unwrap();
        let found = slot.request(&disk.geometry()).map_err(|refused| refused.status());
        assert_eq!(found, expected(&bytes, &disk), "{bytes:?}");
        assert_eq!(slot.head().id, word(&bytes, 8));
        assert_eq!(slot.head().operation, if bytes[0] == 6 { bytes[1] } else { bytes[0] });
        *(if found.is_ok() { &mut served } else { &mut refused }) += 1;
    }
    assert!(served > 40_000 && refused > 40_000, "{served} served, {refused} refused: the test is lopsided");
}

#[test]
fn a_descriptor_page_is_judged_as_a_slot_is() {
    let mut random = Random::new();
    for _ in 0..50_000 {
        let disk = Disk { sectors: 4096, block: 1 << random.below(4), read_only: false, discard: false };
        let count = 1 + random.below(256);
        let mut bytes: Vec<u8> = [1, 0, 0, 0, 0, 7, 0, 0].repeat(count);
        for _ in 0..random.below(3) {
            let at = random.below(bytes.len());
            bytes[at] = random.next() as u8;
        }
        let sector = number(&mut random, disk.sectors);
        let segments = <[Segment]>::ref_from_bytes(&bytes).unwrap();
        let found = judge(segments, sector, &disk.geometry()).map_err(|refused| refused.status());
        let expected = sum(&bytes, disk.block).ok_or(Status::Error).and_then(|sum| range(&disk, sector, sum));
        assert_eq!(found, expected);
    }
}
