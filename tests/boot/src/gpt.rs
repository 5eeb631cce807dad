//! Partitioned disks for guests: a GUID partition table, as UEFI describes it, around the contents of the partitions.

use crate::nbd::SECTOR;
use std::ops::Range;

/// Sectors of the table of partitions: 128 entries of 128 bytes.
const TABLE: usize = 32;
const ENTRY: usize = 128;
/// Partitions begin at a multiple of so many sectors.
const ALIGNED: usize = 2048;
/// "Linux file system data", as it is written on a disk.
const LINUX: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];

/// A disk with these partitions, of whole sectors, and where each of them lies on the disk.
#[must_use]
pub fn disk(partitions: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
    let mut places = Vec::new();
    let mut next = ALIGNED * SECTOR;
    for partition in partitions {
        places.push(next..next + partition.len());
        next = (next + partition.len()).next_multiple_of(ALIGNED * SECTOR);
    }
    let sectors = next / SECTOR + ALIGNED;
    let mut disk = vec![0; sectors * SECTOR];
    let mut table = vec![0; TABLE * SECTOR];
    for (number, (place, content)) in places.iter().zip(partitions).enumerate() {
        disk[place.clone()].copy_from_slice(content);
        let entry = &mut table[number * ENTRY..][..ENTRY];
        entry[..16].copy_from_slice(&LINUX);
        entry[16..32].fill(u8::try_from(number + 1).unwrap_or(u8::MAX));
        entry[32..40].copy_from_slice(&(place.start as u64 / SECTOR as u64).to_le_bytes());
        entry[40..48].copy_from_slice(&(place.end as u64 / SECTOR as u64 - 1).to_le_bytes());
    }
    let last = sectors - 1;
    let first_table = 2;
    let last_table = last - TABLE;
    for (own, other, at) in [(1, last, first_table), (last, 1, last_table)] {
        disk[at * SECTOR..][..table.len()].copy_from_slice(&table);
        let header = header(own, other, at, (first_table + TABLE)..last_table, &table);
        disk[own * SECTOR..][..header.len()].copy_from_slice(&header);
    }
    // The old table that protects the new one: a partition of type 0xee over the whole disk.
    let mbr = &mut disk[..SECTOR];
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    (disk, places)
}

fn header(own: usize, other: usize, at: usize, usable: Range<usize>, table: &[u8]) -> [u8; 92] {
    let mut header = [0; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
    for (place, sector) in [(24, own), (32, other), (40, usable.start), (48, usable.end - 1), (72, at)] {
        header[place..place + 8].copy_from_slice(&(sector as u64).to_le_bytes());
    }
    header[56..72].fill(0xd1);
    let entries = (TABLE * SECTOR / ENTRY) as u64;
    // The number of entries, and the size of one.
    header[80..88].copy_from_slice(&(entries | (ENTRY as u64) << 32).to_le_bytes());
    header[88..].copy_from_slice(&checksum(table).to_le_bytes());
    // The checksum of the header is of one that has none yet.
    let own = checksum(&header);
    header[16..20].copy_from_slice(&own.to_le_bytes());
    header
}

/// The CRC-32 of Ethernet and gzip.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_lie_where_the_table_says() {
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926);
        let (disk, places) = disk(&[vec![1; 3 << 20], vec![2; 512]]);
        assert_eq!(places, [1 << 20..4 << 20, 4 << 20..(4 << 20) + 512]);
        assert!(disk[places[0].clone()].iter().all(|byte| *byte == 1));
        let number = |at: usize| u64::from_le_bytes(disk[at..at + 8].try_into().unwrap());
        let last = disk.len() as u64 / 512 - 1;
        assert_eq!((number(512 + 24), number(512 + 32)), (1, last));
        let backup = usize::try_from(last).unwrap() * 512;
        assert_eq!((&disk[backup..backup + 8], number(backup + 24), number(backup + 32)), (&b"EFI PART"[..], last, 1));
        assert_eq!((number(1024 + 32), number(1024 + 40)), (2048, 8191));
        assert_eq!((number(1152 + 32), number(1152 + 40)), (8192, 8192));
    }
}
