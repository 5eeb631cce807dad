//! Files for tests. Kernels of a few bytes: ELF files with the notes of Xen's ABI (core 1.2), made by hand so that they can
//! be wrong as well. And images of disks.
//!
//! ```
//! # use test_kernels::{BASE, elf, load, note, notes, number};
//! let halts = elf(&[load(0, &[0xf4], 0x1000), notes(&[number(1, BASE), number(3, BASE), note(5, b"xen-3.0\0")])]);
//! ```

#![forbid(unsafe_code)]
#![allow(clippy::missing_panics_doc, reason = "a test that asks for too much may panic")]

mod qcow2;
mod smallest;

pub use qcow2::qcow2;
pub use smallest::{Notes, smallest};

/// `PT_LOAD`.
pub const LOAD: u32 = 1;
/// `PT_NOTE`.
pub const NOTE: u32 = 4;
/// Linux's virtual address of physical address 0.
pub const BASE: u64 = 0xffff_ffff_8000_0000;
/// Where the ELF header says that a file of [`elf`] starts: a physical address, as in Linux.
pub const START: u64 = 0x100_0000;

/// A program header and its bytes.
#[derive(Clone)]
pub struct Part {
    /// `PT_LOAD` or `PT_NOTE`.
    pub kind: u32,
    /// Virtual address.
    pub vaddr: u64,
    /// Physical address.
    pub paddr: u64,
    /// What is in the file.
    pub bytes: Vec<u8>,
    /// Bytes in memory.
    pub memsz: u64,
}

/// A segment of `memsz` bytes at the physical address `paddr`, that begins with `bytes`.
#[must_use]
pub fn load(paddr: u64, bytes: &[u8], memsz: u64) -> Part {
    Part { kind: LOAD, vaddr: 0, paddr, bytes: bytes.to_vec(), memsz }
}

/// A note of the owner `Xen`.
#[must_use]
pub fn note(number: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [4, u32::try_from(descriptor.len()).unwrap(), number] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(b"Xen\0");
    bytes.extend_from_slice(descriptor);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A note whose value is a number.
#[must_use]
pub fn number(number: u32, value: u64) -> Vec<u8> {
    note(number, &value.to_le_bytes())
}

/// Notes in a segment of their own.
#[must_use]
pub fn notes(all: &[Vec<u8>]) -> Part {
    Part { kind: NOTE, vaddr: 0, paddr: 0, bytes: all.concat(), memsz: 0 }
}

/// An ELF file of these parts, for x86-64, that starts at [`START`].
#[must_use]
pub fn elf(parts: &[Part]) -> Vec<u8> {
    elf_at(START, parts)
}

/// An ELF file of these parts, for x86-64, that starts at `entry`.
#[must_use]
pub fn elf_at(entry: u64, parts: &[Part]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [entry, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    for half in [0u16, 0, 64, 56, u16::try_from(parts.len()).unwrap(), 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = 64 + 56 * parts.len() as u64;
    for part in parts {
        for half in [part.kind, 7] {
            file.extend(half.to_le_bytes());
        }
        let length = part.bytes.len() as u64;
        for word in [offset, part.vaddr, part.paddr, length, part.memsz, 4] {
            file.extend(word.to_le_bytes());
        }
        offset += length;
    }
    parts.iter().for_each(|part| file.extend(&part.bytes));
    file
}

/// A kernel of one page, which halts at [`BASE`].
#[must_use]
pub fn halting() -> Vec<u8> {
    let all = [number(1, BASE), number(3, BASE), note(5, b"xen-3.0\0"), note(8, b"generic\0")];
    elf(&[load(0, b"\x90\x90\xf4", 0x1000), notes(&all)])
}

/// What `gzip` makes of a file, but for the file's name and time.
#[must_use]
pub fn gzipped(file: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    packed.extend(miniz_oxide::deflate::compress_to_vec(file, 6));
    let crc = !file.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    });
    for word in [crc, u32::try_from(file.len()).unwrap()] {
        packed.extend(word.to_le_bytes());
    }
    packed
}

/// A Linux set-up header that promises a payload the file does not have.
#[must_use]
pub fn cut_bzimage() -> Vec<u8> {
    let mut cut = vec![0; 1024];
    cut[0x1f1] = 1;
    cut[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
    cut[0x202..0x206].copy_from_slice(b"HdrS");
    cut[0x206..0x208].copy_from_slice(&[15, 2]);
    cut[0x24c] = 200;
    cut
}
