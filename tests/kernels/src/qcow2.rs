//! Images in QEMU's format qcow2 (QEMU's docs/interop/qcow2.txt), version 3, with clusters of 64 KiB.

const CLUSTER: usize = 1 << 16;
/// A cluster may be written in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Where the size of a compressed cluster begins in its entry: 62 - (16 - 8).
const SECTORS: u32 = 54;

/// An image of a disk with this content. Clusters of zeroes are left out, and every second one of the others is compressed.
#[must_use]
pub fn qcow2(content: &[u8]) -> Vec<u8> {
    // The header, an empty table of reference counts, which only writers need, the table of tables, the tables, and the data.
    let tables = content.len().div_ceil(CLUSTER * CLUSTER / 8);
    assert!(tables <= CLUSTER / 8);
    let mut image = vec![0; (3 + tables) * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &16_u32.to_be_bytes());
    put(24, &(content.len() as u64).to_be_bytes());
    put(36, &u32::try_from(tables).expect("few tables").to_be_bytes());
    put(40, &(2 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    for table in 0..tables {
        put(2 * CLUSTER + 8 * table, &(COPIED | ((3 + table) * CLUSTER) as u64).to_be_bytes());
    }
    let used = content.chunks(CLUSTER).enumerate().filter(|(_, cluster)| cluster.iter().any(|byte| *byte != 0));
    for (count, (number, cluster)) in used.enumerate() {
        let mut cluster = cluster.to_vec();
        cluster.resize(CLUSTER, 0);
        let packed = miniz_oxide::deflate::compress_to_vec(&cluster, 1);
        let entry = if count % 2 == 1 && packed.len() < CLUSTER {
            let at = image.len() as u64;
            // The sectors that the data touch, but for the first.
            let more = (at % 512 + packed.len() as u64 - 1) / 512;
            image.extend(packed);
            COMPRESSED | more << SECTORS | at
        } else {
            let at = image.len().next_multiple_of(CLUSTER);
            image.resize(at, 0);
            image.extend(cluster);
            COPIED | at as u64
        };
        image[3 * CLUSTER + 8 * number..][..8].copy_from_slice(&entry.to_be_bytes());
    }
    image.resize(image.len().next_multiple_of(512), 0);
    image
}
