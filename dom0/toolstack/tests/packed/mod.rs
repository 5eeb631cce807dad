//! Kernels in every wrapping, and what damages them.

use lzma_rust2::{FilterType, Write, XzOptions, XzWriter};
use test_random::Random;
use toolstack::unpack::Compression;

/// An "ELF file" with something to compress, and x86 calls for the filter.
pub(crate) fn kernel() -> Vec<u8> {
    let mut elf = b"\x7fELF".to_vec();
    for i in 0..40_000u32 {
        elf.extend_from_slice(&[0xe8]);
        elf.extend_from_slice(&(i.wrapping_mul(2_654_435_761) >> 20).to_le_bytes());
        elf.extend_from_slice(b"text text text");
    }
    elf
}

pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[0x1f1] = 2;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&0xa00u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    image.extend_from_slice(payload);
    image.extend_from_slice(b"relocations and a signature");
    image
}

pub(crate) fn sized(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
    packed
}

pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |mut crc, byte| {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
        crc
    })
}

pub(crate) fn gzip(data: &[u8], flags: u8, fields: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 2, 3];
    packed.extend_from_slice(fields);
    packed.extend(miniz_oxide::deflate::compress_to_vec(data, 6));
    packed.extend_from_slice(&crc32(data).to_le_bytes());
    sized(packed, data.len())
}

pub(crate) fn xz(data: &[u8]) -> Vec<u8> {
    let mut options = XzOptions::with_preset(3);
    options.prepend_pre_filter(FilterType::BcjX86, 0);
    let mut writer = XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(data).unwrap();
    sized(writer.finish().unwrap(), data.len())
}

pub(crate) fn zstd(data: &[u8]) -> Vec<u8> {
    let packed = ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest);
    sized(packed, data.len())
}

pub(crate) fn lz4(data: &[u8]) -> Vec<u8> {
    let mut packed = vec![2, 0x21, 0x4c, 0x18];
    for block in data.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        packed.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        packed.extend(block);
    }
    sized(packed, data.len())
}

pub(crate) type Packer = fn(&[u8]) -> Vec<u8>;
pub(crate) const FORMATS: [(Compression, Packer); 4] = [
    (Compression::Gzip, |data| gzip(data, 0, b"")),
    (Compression::Xz, xz),
    (Compression::Zstd, zstd),
    (Compression::Lz4, lz4),
];

/// Returns a copy of `whole` with a few other bytes, or without its end.
pub(crate) fn damaged(random: &mut Random, whole: &[u8]) -> Vec<u8> {
    let mut image = whole.to_vec();
    for _ in 0..=random.below(3) {
        // The header now and then, else the payload. A small payload that begins the file is all there is.
        let at = match random.below(4) {
            0 if image.len() > 0x1000 => 0x1f0 + random.below(0x60),
            1 if image.len() > 0x1000 => 0x1000 + random.below(24),
            _ if image.len() > 0x1000 => 0x1000 + random.below(image.len() - 0x1000),
            _ => random.below(image.len()),
        };
        image[at] = random.byte();
    }
    if random.below(4) == 0 {
        image.truncate(random.below(image.len()));
    }
    image
}
