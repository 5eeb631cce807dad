//! What unpacking a kernel allocates is bounded by the file and by what it claims to unpack to. This program has a single
//! test, since every allocation of it is counted.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared by two tests")]
mod packed;

use packed::{FORMATS, bzimage, crc32, damaged, gzip, kernel, sized, zstd};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;
use test_random::Random;
use toolstack::unpack::{room_for, unpack};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const LIMIT: usize = 64 << 20;
/// Bytes allocated for each byte of the file and of what it claims: the output, a window of up to twice as much that is
/// doubled until it is large enough, and what is granted for blocks and resets.
const FACTOR: usize = 8;
/// Bytes that any decoder may allocate: its tables, the least window, the largest block.
const CONSTANT: usize = 8 << 20;

/// Unpacks an image and answers why it is refused. Checks what it allocated, and what it said it would take.
fn counted(what: &str, image: &[u8], claimed: usize) -> Option<String> {
    let region = Region::new(COUNTING);
    let result = unpack(image, LIMIT).map(|elf| elf.len());
    let counts = region.change();
    let allocated = counts.bytes_allocated + usize::try_from(counts.bytes_reallocated.max(0)).unwrap();
    let claimed = if claimed > LIMIT { 0 } else { claimed };
    let most = FACTOR * (image.len() + claimed) + CONSTANT;
    assert!(allocated <= most, "{what}: {allocated} bytes allocated for {} that claim {claimed}", image.len());
    if result.is_ok() {
        let live = counts.bytes_allocated;
        assert!(room_for(image) <= most, "{what}: asks for {} bytes, and took {live}", room_for(image));
    }
    result.err().map(|why| why.to_string())
}

/// An xz file of so many blocks, each with a dictionary of 64 MiB, `resets` chunks and a byte in each of them.
fn xz_blocks(blocks: usize, resets: usize) -> Vec<u8> {
    let with_crc = |bytes: &[u8]| [bytes, &crc32(bytes).to_le_bytes()].concat();
    let mut file = [&b"\xfd7zXZ\0"[..], &with_crc(&[0, 0])].concat();
    // Two words and a half: filter 0x21 with one byte of properties, and padding.
    let header = with_crc(&[2, 0, 0x21, 1, 28, 0, 0, 0]);
    for _ in 0..blocks {
        let mut block = header.clone();
        for _ in 0..resets {
            // A packed chunk of one byte, with new properties and a reset of everything.
            block.extend([0xe0, 0, 0, 0, 5, 0x5d, 0, 0, 0, 0, 0, 0]);
        }
        block.extend([1, 0, 0, b'x', 0]);
        block.resize(block.len().next_multiple_of(4), 0);
        file.extend(block);
    }
    file.push(0);
    file.extend([0; 64]);
    file
}

/// A zstd file with a window of 128 MiB, `blocks` blocks of `len` equal bytes in each of `frames` frames.
fn zstd_runs(frames: usize, blocks: u32, len: u32) -> Vec<u8> {
    let mut file = Vec::new();
    for _ in 0..frames {
        file.extend([0x28, 0xb5, 0x2f, 0xfd, 0, 17 << 3]);
        for n in 1..=blocks {
            let header = u32::from(n == blocks) | 1 << 1 | len << 3;
            file.extend(&header.to_le_bytes()[..3]);
            file.push(0x7f);
        }
    }
    file
}

/// Files made to cost much: what each claims, and what it is refused for.
fn costly_files_are_refused() {
    let small = 4096;
    for (what, payload, claimed, why) in [
        ("2,000 frames with windows", zstd_runs(2000, 1, 1), 2000, "bytes follow its only frame"),
        ("a window full of zeros", zstd_runs(1, 1000, 128 << 10), small, "larger than it claims"),
        ("empty blocks", zstd_runs(1, 1 << 20, 0), small, "more than 80 blocks for 4096 bytes"),
        ("2,000 blocks with dictionaries", xz_blocks(2000, 0), 2000, "2000 blocks for 2000 bytes"),
        ("more chunks than are read", xz_blocks(1, 70_000), 1 << 20, "in too many chunks"),
        ("50,000 resets", xz_blocks(1, 50_000), 50_001, "its state is reset 50000 times"),
    ] {
        let image = bzimage(&sized(payload, claimed));
        let refusal = counted(what, &image, claimed).unwrap_or_default();
        assert!(refusal.contains(why), "{what}: {refusal} is not: {why}");
    }
}

/// A payload that asks for the window of `zstd --ultra`, whatever it unpacks to.
fn ultra(elf: &[u8]) -> Vec<u8> {
    let mut packed = zstd(elf);
    assert_eq!(packed[4] & 0x20, 0, "the encoder names a window");
    packed[5] = 17 << 3;
    packed
}

/// The payload twice over, with the claim of both.
fn twice(mut payload: Vec<u8>, size: usize) -> Vec<u8> {
    payload.truncate(payload.len() - 4);
    sized(payload.repeat(2), 2 * size)
}

/// The window that a stock kernel's file asks for is larger than what it unpacks to, and is not taken.
fn a_window_is_no_larger_than_the_kernel() {
    let elf = kernel();
    let image = bzimage(&ultra(&elf));
    assert_eq!(counted("a large window", &image, elf.len()), None);
    assert!(room_for(&image) < 16 << 20, "{}", room_for(&image));
}

/// Damaged files of every format, headers and payload, and gzip'ed files.
fn damaged_files_cost_no_more() {
    let mut random = Random::new();
    let elf = &kernel()[..6000];
    let mut wholes: Vec<Vec<u8>> = FORMATS.iter().map(|(_, pack)| bzimage(&pack(elf))).collect();
    wholes.extend(FORMATS.iter().map(|(_, pack)| bzimage(&twice(pack(elf), elf.len()))));
    wholes.extend([gzip(elf, 0, b""), bzimage(&ultra(elf)), bzimage(&twice(ultra(elf), elf.len()))]);
    let mut refused = 0;
    for whole in &wholes {
        for round in 0..600 {
            let image = damaged(&mut random, whole);
            // The header says where the payload ends, and there is the claim.
            let claimed = claim(&image);
            refused += usize::from(counted(&format!("round {round}"), &image, claimed).is_some());
        }
    }
    assert!(refused > 600, "{refused}");
}

/// What the last word of the payload says; 0 if there is none.
fn claim(image: &[u8]) -> usize {
    let word = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?) as usize);
    let end = || {
        let sectors = image.get(0x1f1).map_or(4, |sectors| if *sectors == 0 { 4 } else { usize::from(*sectors) });
        Some((sectors + 1) * 512 + word(0x248)? + word(0x24c)?)
    };
    let end = if image.starts_with(&[0x1f, 0x8b]) { Some(image.len()) } else { end() };
    end.and_then(|end| word(end.checked_sub(4)?)).unwrap_or(0)
}

#[test]
fn allocations_are_bounded_by_file_and_claim() {
    costly_files_are_refused();
    a_window_is_no_larger_than_the_kernel();
    damaged_files_cost_no_more();
}
