//! How much of a guest's memory a ramdisk needs. A Linux kernel unpacks the ramdisk into files, which are in memory as
//! well, before it frees the ramdisk. If both do not fit, the kernel panics with a message that does not name the
//! cause.

use alloc::format;
use alloc::string::String;

use guest_image::Kernel;

use crate::unpack::Compression;

/// The factor by which a compressed ramdisk is assumed to grow, if its size when unpacked is not known.
const FACTOR: u64 = 3;
/// The most files that are looked at; the bytes after them are counted as they are.
const MOST_FILES: usize = 1 << 16;
/// Bytes of a cpio header, before the name of the file.
const HEADER: usize = 110;
const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;
/// Bytes that a kernel needs for each page: 64 to describe it, and some 16 more for the p2m list and page tables.
const PER_PAGE: u64 = 80;

/// How much memory the files in a ramdisk need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Bytes of memory.
    pub bytes: u64,
    /// Whether `bytes` is estimated.
    pub estimated: bool,
}

/// Returns how much memory the files in `ramdisk` need. A ramdisk is a sequence of cpio archives (`newc`), of which the
/// last may be compressed. `None` for anything else, which a kernel does not unpack.
#[must_use]
pub fn contents(ramdisk: &[u8]) -> Option<Contents> {
    let (mut bytes, mut rest, mut files) = (0, ramdisk, MOST_FILES);
    loop {
        let padding = rest.iter().take_while(|byte| **byte == 0).count();
        rest = rest.get(padding..).unwrap_or_default();
        let Some((size, after)) = archive(rest, &mut files) else { break };
        bytes += size;
        rest = after;
    }
    let len = rest.len() as u64;
    let (more, estimated) = match Compression::of(rest) {
        Some(format) => format.unpacked_size(rest).map_or((len * FACTOR, true), |size| (size, false)),
        None => (len, !rest.is_empty()),
    };
    let known = bytes > 0 || Compression::of(rest).is_some() || rest.starts_with(b"0707");
    known.then_some(Contents { bytes: bytes + more, estimated })
}

/// Returns the memory that the files in the archive at the start of `bytes` need, and the bytes after the archive.
fn archive<'a>(bytes: &'a [u8], files: &mut usize) -> Option<(u64, &'a [u8])> {
    let (mut total, mut rest) = (0, bytes);
    loop {
        *files = files.checked_sub(1)?;
        let number = |at: usize| usize::from_str_radix(core::str::from_utf8(rest.get(at..at + 8)?).ok()?, 16).ok();
        let magic = rest.starts_with(b"070701") || rest.starts_with(b"070702");
        // The lengths of content and name: numbers of 32 bits, whose sums cannot overflow.
        let (length, name) = (number(54).filter(|_| magic)?, number(94)?);
        let content = (HEADER + name).next_multiple_of(4);
        let name = rest.get(HEADER..HEADER + name)?;
        rest.get(content..content + length)?;
        // The last file may lack its padding.
        rest = rest.get((content + length).next_multiple_of(4)..).unwrap_or_default();
        total += length.next_multiple_of(PAGE) as u64;
        if name == b"TRAILER!!!\0" {
            return Some((total, rest));
        }
    }
}

/// Returns a warning if a guest of `memory` MiB is too small for `kernel` (an ELF file), `ramdisk`, and the ramdisk's
/// files.
#[must_use]
pub fn warning(memory: u64, kernel: &[u8], ramdisk: &[u8]) -> Option<String> {
    let Contents { bytes, estimated } = contents(ramdisk)?;
    let span = Kernel::parse(kernel).ok()?.span;
    let kernel = span.1 - span.0;
    let fixed = kernel + ramdisk.len() as u64 + bytes;
    let usable = memory.saturating_mul(MIB / PAGE as u64).saturating_mul(PAGE as u64 - PER_PAGE);
    if fixed <= usable {
        return None;
    }
    let mib = |bytes: u64| bytes.div_ceil(MIB);
    let needed = mib(fixed + fixed / (PAGE as u64 - PER_PAGE) * PER_PAGE);
    Some(format!(
        "{memory} MiB of memory cannot hold the ramdisk ({} MiB) beside what it unpacks to ({}{} MiB) and the kernel \
         ({} MiB): it takes {needed} MiB and more",
        mib(ramdisk.len() as u64),
        if estimated { "about " } else { "" },
        mib(bytes),
        mib(kernel),
    ))
}
