//! Partition tables as tools write them, and damaged or hostile ones.

use disk::Shape;
use disk::table::{Flaw, Interval, Kind, NoPartition, NoTable, Reader, Table};
use test_random::Random;

const SECTORS: u64 = 4096;

fn shape(sectors: u64, block_bytes: u32) -> Shape {
    Shape { sectors, block_bytes, physical_bytes: block_bytes, read_only: false, volatile: true, discard: None }
}

/// Reads the table of a disk. Returns the table and the number of reads.
fn scan(disk: &[u8], block_bytes: u32) -> (Result<Table, NoTable>, u32) {
    let sectors = disk.len() as u64 / 512;
    let mut reader = Reader::new(shape(sectors, block_bytes)).unwrap();
    let mut reads = 0;
    while let Some((sector, count)) = reader.wants() {
        reads += 1;
        assert!(reads < 80, "no end");
        assert!((1..=128).contains(&count));
        let start = usize::try_from(sector.min(sectors)).unwrap() * 512;
        let end = start + usize::try_from(count).unwrap() * 512;
        reader.give(disk.get(start..end).unwrap_or_default());
    }
    (reader.finish(), reads)
}

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

fn mbr_entry(disk: &mut [u8], sector: usize, index: usize, kind: u8, first: u32, sectors: u32) {
    let at = sector * 512 + 446 + 16 * index;
    disk[at + 4] = kind;
    put(disk, at + 8, &first.to_le_bytes());
    put(disk, at + 12, &sectors.to_le_bytes());
    put(disk, sector * 512 + 510, &[0x55, 0xaa]);
}

/// Writes one copy of a GPT with 128 entries: header in `block`, entries in `entries`.
fn gpt_copy(disk: &mut [u8], unit: usize, block: usize, entries: usize, parts: &[(u64, u64)]) {
    gpt_copy_of(128, disk, unit, block, entries, parts);
}

fn gpt_copy_of(count: u8, disk: &mut [u8], unit: usize, block: usize, entries: usize, parts: &[(u64, u64)]) {
    let (size, blocks) = (unit * 512, disk.len() / 512 / unit);
    let mut table = vec![0; usize::from(count) * 128];
    for (i, (first, last)) in parts.iter().enumerate().filter(|(_, part)| part.1 > 0) {
        put(&mut table, i * 128, &[0xaf; 16]);
        put(&mut table, i * 128 + 32, &first.to_le_bytes());
        put(&mut table, i * 128 + 40, &last.to_le_bytes());
    }
    put(disk, entries * size, &table);
    let mut header = [0; 92];
    put(&mut header, 0, b"EFI PART");
    put(&mut header, 8, &[0, 0, 1, 0, 92, 0, 0, 0]);
    put(&mut header, 24, &(block as u64).to_le_bytes());
    put(&mut header, 40, &(if count > 128 { 64u64 } else { 34 }).to_le_bytes());
    put(&mut header, 48, &(blocks as u64 - 34).to_le_bytes());
    put(&mut header, 72, &(entries as u64).to_le_bytes());
    put(&mut header, 80, &[count, 0, 0, 0, 128, 0, 0, 0]);
    put(&mut header, 88, &crc(&table).to_le_bytes());
    let sum = crc(&header);
    put(&mut header, 16, &sum.to_le_bytes());
    put(disk, block * size, &header);
}

fn gpt(unit: usize, parts: &[(u64, u64)]) -> Vec<u8> {
    let blocks = usize::try_from(SECTORS).unwrap();
    let mut disk = vec![0; blocks * unit * 512];
    mbr_entry(&mut disk, 0, 0, 0xee, 1, u32::MAX);
    gpt_copy(&mut disk, unit, 1, 2, parts);
    gpt_copy(&mut disk, unit, blocks - 1, blocks - 33, parts);
    disk
}

fn interval(first: u64, sectors: u64) -> Interval {
    Interval { first, sectors }
}

#[test]
fn a_gpt_is_read_in_blocks_of_any_size() {
    for unit in [1, 8] {
        let disk = gpt(unit, &[(34, 99), (0, 0), (100, 4062), (4000, 4063)]);
        let (table, reads) = scan(&disk, u32::try_from(unit * 512).unwrap());
        let table = table.unwrap();
        let unit = unit as u64;
        assert_eq!((table.kind(), table.flaw(), reads), (Kind::Gpt, None, 3));
        assert_eq!(table.numbers().collect::<Vec<_>>(), [1, 3, 4]);
        assert_eq!(table.partition(1), Ok(interval(34 * unit, 66 * unit)));
        assert_eq!(table.partition(2), Err(NoPartition::Missing));
        assert_eq!(table.partition(3), Err(NoPartition::Overlaps(4)));
        assert_eq!(table.partition(4), Err(NoPartition::BeyondTheEnd));
    }
}

#[test]
fn a_table_may_have_more_entries_than_partitions_but_not_without_bound() {
    let mut disk = gpt(1, &[]);
    // As on an image for CDs.
    gpt_copy_of(248, &mut disk, 1, 1, 2, &[(64, 127), (128, 200)]);
    let table = scan(&disk, 512).0.unwrap();
    assert_eq!((table.numbers().count(), table.partition(2)), (2, Ok(interval(128, 73))));
    let all: Vec<(u64, u64)> = (0..248).map(|i| (64 + i, 64 + i)).collect();
    gpt_copy_of(248, &mut disk, 1, 1, 2, &all);
    let table = scan(&disk, 512).0.unwrap();
    assert_eq!((table.flaw(), table.numbers().count()), (None, 128), "the first 128 are noted");
    // A count of entries that differs from the checksum's, a count of 504, and entries that a partition could write.
    for (at, byte) in [(80, 1), (81, 1), (40, 3)] {
        let mut header: [u8; 92] = disk[512..604].try_into().unwrap();
        header[at] = byte;
        header[16..20].fill(0);
        let sum = crc(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        let mut disk = disk.clone();
        put(&mut disk, 512, &header);
        assert_eq!(scan(&disk, 512).0.unwrap().flaw(), Some(Flaw::FirstCopy), "{at}");
    }
}

#[test]
fn the_copy_at_the_end_serves_when_the_first_is_damaged() {
    let whole = gpt(1, &[(34, 99)]);
    // The signature, the checksum, a field, and an entry.
    for damaged in [512, 512 + 16, 512 + 40, 2 * 512 + 33] {
        let mut disk = whole.clone();
        disk[damaged] ^= 1;
        let (table, _) = scan(&disk, 512);
        let table = table.unwrap();
        assert_eq!((table.flaw(), table.partition(1)), (Some(Flaw::FirstCopy), Ok(interval(34, 66))));
        let last = disk.len() - 512;
        disk[last + 72] ^= 1;
        assert_eq!(scan(&disk, 512).0.unwrap_err(), NoTable::Damaged);
    }
}

#[test]
fn a_damaged_gpt_never_becomes_another_table() {
    let whole = gpt(1, &[(34, 99), (100, 200)]);
    let mut random = Random::new();
    for _ in 0..3000 {
        let mut disk = whole.clone();
        for _ in 0..=random.below(3) {
            // Within the first 34 sectors or the last 33, except the MBR, which could then describe any table.
            let at = 512 + random.below(66 * 512);
            let at = if at < 34 * 512 { at } else { disk.len() - 33 * 512 + (at - 34 * 512) };
            disk[at] ^= 1 << random.below(8);
        }
        match scan(&disk, 512).0 {
            Ok(table) => {
                assert_eq!(table.partition(1), Ok(interval(34, 66)));
                assert_eq!(table.partition(2), Ok(interval(100, 101)));
            }
            Err(why) => assert_eq!(why, NoTable::Damaged),
        }
    }
}

#[test]
fn primary_and_logical_partitions_of_an_mbr_are_found() {
    let mut disk = vec![0; 4096 * 512];
    mbr_entry(&mut disk, 0, 0, 0x83, 64, 100);
    mbr_entry(&mut disk, 0, 2, 0x0f, 1000, 1000);
    mbr_entry(&mut disk, 0, 3, 0x82, 3000, 2000);
    mbr_entry(&mut disk, 1000, 0, 0x83, 10, 90);
    mbr_entry(&mut disk, 1000, 1, 0x05, 500, 100);
    mbr_entry(&mut disk, 1500, 0, 0x83, 1, 20);
    // Chains need not lead upwards.
    mbr_entry(&mut disk, 1500, 1, 0x05, 200, 50);
    mbr_entry(&mut disk, 1200, 0, 0x83, 2, 48);
    let (table, reads) = scan(&disk, 512);
    let table = table.unwrap();
    assert_eq!((table.kind(), table.flaw(), reads), (Kind::Mbr, None, 4));
    assert_eq!(table.numbers().collect::<Vec<_>>(), [1, 4, 5, 6, 7]);
    assert_eq!(table.partition(1), Ok(interval(64, 100)));
    assert_eq!(table.partition(3), Err(NoPartition::Extended));
    assert_eq!(table.partition(4), Err(NoPartition::BeyondTheEnd));
    assert_eq!(table.partition(5), Ok(interval(1010, 90)));
    assert_eq!(table.partition(6), Ok(interval(1501, 20)));
    assert_eq!(table.partition(7), Ok(interval(1202, 48)));
}

#[test]
fn chains_that_lead_back_outside_or_on_for_ever_end() {
    // Back to the first link.
    let mut disk = vec![0; 4096 * 512];
    mbr_entry(&mut disk, 0, 0, 0x05, 1000, 1000);
    mbr_entry(&mut disk, 1000, 0, 0x83, 10, 10);
    mbr_entry(&mut disk, 1000, 1, 0x05, 0, 1);
    let table = scan(&disk, 512).0.unwrap();
    assert_eq!((table.flaw(), table.numbers().count()), (Some(Flaw::Chain), 1));
    // Outside the extended partition, though on the disk.
    mbr_entry(&mut disk, 1000, 1, 0x05, 1000, 1);
    assert_eq!(scan(&disk, 512).0.unwrap().flaw(), Some(Flaw::Chain));
    // A logical partition outside.
    mbr_entry(&mut disk, 1000, 0, 0x83, 10, 991);
    assert_eq!(scan(&disk, 512).0.unwrap().numbers().count(), 0);
    // An extended partition that reaches beyond the disk.
    mbr_entry(&mut disk, 0, 0, 0x05, 1000, 5000);
    assert_eq!(scan(&disk, 512).1, 1);
    // A link in each sector.
    mbr_entry(&mut disk, 0, 0, 0x05, 1000, 1000);
    for link in 0..500 {
        mbr_entry(&mut disk, 1000 + usize::try_from(link * 2).unwrap(), 0, 0x83, 1, 1);
        mbr_entry(&mut disk, 1000 + usize::try_from(link * 2).unwrap(), 1, 0x05, link * 2 + 2, 1);
    }
    let (table, reads) = scan(&disk, 512);
    let table = table.unwrap();
    assert_eq!((table.flaw(), table.numbers().count(), reads), (Some(Flaw::Chain), 64, 65));
    assert_eq!(table.partition(68), Ok(interval(1127, 1)));
}

#[test]
fn disks_without_a_table_say_so() {
    assert_eq!(scan(&vec![0; 4096 * 512], 512).0.unwrap_err(), NoTable::Missing);
    assert_eq!(scan(&[], 512).0.unwrap_err(), NoTable::Missing);
    assert_eq!(scan(&[0; 512], 4096).0.unwrap_err(), NoTable::Missing);
    let mut reader = Reader::new(shape(100, 512)).unwrap();
    reader.give(&[]);
    assert_eq!(reader.finish().unwrap_err(), NoTable::Unreadable);
    assert_eq!(Reader::new(shape(100, 512)).unwrap().finish().unwrap_err(), NoTable::Unreadable);
    // A protective record alone, on a disk with no room for more.
    for sectors in [1, 2, 3, 4] {
        let mut disk = vec![0; sectors * 512];
        mbr_entry(&mut disk, 0, 0, 0xee, 1, 3);
        assert_eq!(scan(&disk, 512).0.unwrap_err(), NoTable::Damaged);
    }
}

#[test]
fn whatever_stands_in_a_record_partitions_lie_apart_and_on_the_disk() {
    let mut random = Random::new();
    let mut found = 0;
    for _ in 0..20_000 {
        let sectors = 64 + random.below(200);
        let mut disk = vec![0; usize::try_from(sectors).unwrap() * 512];
        for _ in 0..random.below(12) {
            let small = [0x83, 0x05, 0x0f, 0, 0x82, 0x05, 0x05][random.below(7)];
            let sector = usize::try_from(random.below(3) * random.below(sectors) / 2).unwrap();
            let index = random.below(4);
            let number = |random: &mut Random| {
                let number = if random.below(20) == 0 { random.next() } else { random.below(sectors) };
                u32::try_from(number & 0xffff_ffff).unwrap()
            };
            let (first, count) = (number(&mut random), number(&mut random));
            mbr_entry(&mut disk, sector, index, small, first, count / 4);
            put(&mut disk, 510, &[0x55, 0xaa]);
        }
        let Ok(table) = scan(&disk, 512).0 else { continue };
        let parts: Vec<Interval> = table.numbers().filter_map(|number| table.partition(number).ok()).collect();
        found += parts.len();
        for (i, part) in parts.iter().enumerate() {
            assert!(part.first >= 1 && part.first + part.sectors <= sectors && part.sectors > 0);
            for other in &parts[..i] {
                assert!(part.first + part.sectors <= other.first || other.first + other.sectors <= part.first);
            }
        }
    }
    assert!(found > 1000, "{found}");
}
