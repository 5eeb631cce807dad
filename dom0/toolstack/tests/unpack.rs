//! Kernels in every wrapping, and wrappings without a kernel.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared by two tests")]
mod packed;

use packed::{FORMATS, bzimage, damaged, gzip, kernel, lz4, sized, xz, zstd};
use std::borrow::Cow;
use std::cell::Cell;
use test_random::Random;
use toolstack::unpack::{Compression, Packed, UnpackError, at_once, unpack, unpack_within};

const LIMIT: usize = 64 << 20;

fn refusal(image: &[u8]) -> String {
    unpack(image, LIMIT).unwrap_err().to_string()
}

#[test]
fn every_format_of_a_distribution_is_unpacked() {
    let elf = kernel();
    for (format, pack) in FORMATS {
        let image = bzimage(&pack(&elf));
        assert!(unpack(&image, elf.len()).unwrap() == elf, "{format}");
    }
    // A gzip header may carry an extra field, a name, a comment and a checksum.
    let image = bzimage(&gzip(&elf, 2 | 4 | 8 | 16, b"\x03\0abcvmlinux\0no comment\0cc"));
    assert!(unpack(&image, LIMIT).unwrap() == elf);
}

/// However long unpacking takes, others have their turn: after every 64 KiB, or block of the format.
#[test]
fn every_format_pauses() {
    let elf = kernel().repeat(24);
    for (format, pack) in FORMATS {
        let image = bzimage(&pack(&elf));
        let pauses = Cell::new(0);
        let unpacked = at_once(unpack_within(&image, LIMIT, usize::MAX, async || pauses.set(pauses.get() + 1)));
        assert!(unpacked.unwrap() == elf, "{format}");
        // A block of zstd is at most 128 KiB, of lz4 8 MiB.
        let least = match format {
            Compression::Lz4 => 3,
            _ => elf.len() / (192 << 10),
        };
        assert!(pauses.get() >= least.max(1), "{format}: {} pauses, not {least}", pauses.get());
    }
}

#[test]
fn a_kernel_of_several_lz4_blocks_is_unpacked() {
    let mut elf = kernel();
    elf.resize(17 << 20, 5);
    assert!(unpack(&bzimage(&lz4(&elf)), LIMIT).unwrap() == elf);
}

#[test]
fn an_elf_file_passes_through() {
    assert!(matches!(unpack(&kernel(), 0), Ok(Cow::Borrowed(_))));
}

/// What `gzip vmlinux` makes is a kernel like any other, and is refused like any other.
#[test]
fn a_gzipped_elf_file_is_unpacked() {
    let elf = kernel();
    let packed = gzip(&elf, 8, b"vmlinux\0");
    assert!(unpack(&packed, elf.len()).unwrap() == elf);
    let room = toolstack::unpack::room_for(&packed);
    assert!((elf.len()..elf.len() + (8 << 20)).contains(&room), "{room}");
    assert_eq!(unpack(&packed, elf.len() - 1), Err(UnpackError::TooLarge { size: elf.len(), limit: elf.len() - 1 }));
    let mut damaged = packed.clone();
    let at = packed.len() - 8;
    damaged[at] ^= 1;
    assert_eq!(refusal(&damaged), "the gzip'ed file is corrupt: wrong checksum");
    assert_eq!(refusal(&[&packed[..], b"\0\0\x10\0"].concat()), "the gzip'ed file is corrupt: wrong checksum");
    assert_eq!(refusal(&gzip(b"#!/bin/sh\n", 0, b"")), "the gzip'ed file is not an ELF file");
    assert_eq!(refusal(&gzip(&bzimage(&xz(&elf)), 0, b"")), "the gzip'ed file is not an ELF file");
    for cut in [2, 10, packed.len() / 2, packed.len() - 1] {
        assert!(unpack(&packed[..cut], LIMIT).is_err(), "{cut}");
    }
}

#[test]
fn four_setup_sectors_are_meant_by_none() {
    let elf = kernel();
    let mut image = bzimage(&zstd(&elf));
    image[0x1f1] = 0;
    image[0x248..0x24c].copy_from_slice(&0x600u32.to_le_bytes());
    assert!(unpack(&image, LIMIT).unwrap() == elf);
}

#[test]
fn what_is_not_a_kernel_is_refused() {
    assert_eq!(refusal(b""), "neither an ELF file, gzip'ed or not, nor a bzImage");
    assert_eq!(refusal(&[0; 4096]), "neither an ELF file, gzip'ed or not, nor a bzImage");
    let mut old = bzimage(&zstd(&kernel()));
    old[0x206..0x208].copy_from_slice(&0x206u16.to_le_bytes());
    assert_eq!(refusal(&old), "bzImage with boot protocol 0x0206, older than 0x0208");
    assert_eq!(refusal(&old[..0x207]), "bzImage cut off: needs 592 bytes, has 519");
    let image = bzimage(&zstd(&kernel()));
    assert_eq!(refusal(&image[..0x24a]), "bzImage cut off: needs 592 bytes, has 586");
    let needed = image.len() - 27;
    assert_eq!(refusal(&image[..5000]), format!("bzImage cut off: needs {needed} bytes, has 5000"));
    let mut beyond = image;
    beyond[0x248..0x250].copy_from_slice(&[0xff; 8]);
    assert_eq!(
        refusal(&beyond),
        "bzImage cut off: needs 8589936126 bytes, has 164000".replace("164000", &beyond.len().to_string())
    );
}

#[test]
fn a_compression_we_cannot_undo_is_named() {
    assert_eq!(refusal(&bzimage(b"PKzip and more")), "bzImage with an unknown compression, magic [50, 4b, 7a, 69]");
    assert_eq!(refusal(&bzimage(b"")), "bzImage with an unknown compression, magic [00, 00, 00, 00]");
    assert_eq!(refusal(&bzimage(b"BZh9......\0\0\0\0")), "bzImage compressed with bzip2, which we cannot undo");
    assert_eq!(refusal(&bzimage(b"\x5d\0......\0\0\0\0")), "bzImage compressed with lzma, which we cannot undo");
    assert_eq!(refusal(&bzimage(b"\x89LZO\0...\0\0\0\0")), "bzImage compressed with lzo, which we cannot undo");
}

#[test]
fn output_is_bounded() {
    let elf = kernel();
    for (format, pack) in FORMATS {
        let packed = pack(&elf);
        let too_large = UnpackError::TooLarge { size: elf.len(), limit: elf.len() - 1 };
        assert_eq!(unpack(&bzimage(&packed), elf.len() - 1), Err(too_large), "{format}");
        // A payload that lies about its size cannot write more than it claimed.
        for claimed in [0, 4, elf.len() - 1, elf.len() + 1] {
            let mut lying = packed.clone();
            lying.truncate(packed.len() - 4);
            let error = unpack(&bzimage(&sized(lying, claimed)), LIMIT).unwrap_err();
            assert!(
                matches!(error, UnpackError::Corrupt(Packed::Payload(f), _) if f == format)
                    || matches!(error, UnpackError::WrongSize { .. }),
                "{format} {claimed}: {error}"
            );
        }
    }
}

#[test]
fn what_unpacks_to_something_else_is_refused() {
    for (format, pack) in FORMATS {
        let error = unpack(&bzimage(&pack(b"#!/bin/sh\nexit 1\n")), LIMIT).unwrap_err();
        assert_eq!(error.to_string(), format!("the {format} payload of the bzImage is not an ELF file"));
    }
}

#[test]
fn a_damaged_gzip_payload_fails_its_checksum() {
    let elf = kernel();
    let mut packed = gzip(&elf, 0, b"");
    let at = packed.len() - 8;
    packed[at] ^= 1;
    assert_eq!(refusal(&bzimage(&packed)), "the gzip payload of the bzImage is corrupt: wrong checksum");
}

#[test]
fn damaged_payloads_never_panic() {
    let mut random = Random::new();
    let elf = &kernel()[..6000];
    let mut refused = 0;
    for (_, pack) in FORMATS {
        let whole = bzimage(&pack(elf));
        for _ in 0..400 {
            let image = damaged(&mut random, &whole);
            if let Err(error) = unpack(&image, 1 << 20) {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(refused > 400, "{refused}");
}

/// `TENON_TEST_BZIMAGE` names a stock kernel, `TENON_TEST_KERNEL` the same one unpacked.
#[test]
fn a_stock_kernel_is_unpacked() {
    let Ok(path) = std::env::var("TENON_TEST_BZIMAGE") else {
        eprintln!("TENON_TEST_BZIMAGE is not set: nothing tested");
        return;
    };
    let image = std::fs::read(&path).unwrap();
    let elf = unpack(&image, 256 << 20).unwrap_or_else(|error| panic!("{path}: {error}"));
    guest_image::Kernel::parse(&elf).unwrap_or_else(|error| panic!("{path}: {error}"));
    if let Ok(expected) = std::env::var("TENON_TEST_KERNEL") {
        assert!(elf == std::fs::read(expected).unwrap());
    }
}
