//! What the loader left: PVH start information (QEMU, Firecracker, Cloud Hypervisor) or Multiboot2 (GRUB).

use crate::Ranges;
use crate::memory::{BOOT_LIMIT, boot_bytes};
use core::ops::Range;
use heapless::{String, Vec};
use hv_core::addr::{bytes_of, index};
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// In EAX when Multiboot2 started us.
const MULTIBOOT2: u32 = 0x36d7_6289;
/// First word of PVH start information.
const PVH: u32 = 0x336e_c578;
/// Memory-map type of plain RAM.
const RAM: u32 = 1;

/// The loader's information, copied out of memory that is about to be reused.
pub(super) struct Loaded {
    pub(super) cmdline: String<4096>,
    pub(super) module: &'static [u8],
    pub(super) module_at: Range<u64>,
    pub(super) ram: Ranges,
    /// Frames from 1 MiB on of which the memory map says nothing: where firmware puts the registers of devices.
    pub(super) unmapped: Ranges,
    /// The ACPI root pointer's bytes, if handed over.
    pub(super) rsdp: Option<Vec<u8, 36>>,
}

impl Loaded {
    /// The frames of the module.
    pub(super) fn module_frames(&self) -> Range<u64> {
        self.module_at.start / 4096..self.module_at.end.div_ceil(4096)
    }
}

/// PVH start information, version 1.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PvhInfo {
    magic: u32,
    version: u32,
    _flags: u32,
    modules: u32,
    module_list: u64,
    cmdline: u64,
    rsdp: u64,
    map: u64,
    map_entries: u32,
    _reserved: u32,
}

/// A module of PVH.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PvhModule {
    address: u64,
    size: u64,
    _cmdline: u64,
    _reserved: u64,
}

/// An entry of the memory map; both protocols agree on it.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    _reserved: u32,
}

/// Reads what the loader left at `information`.
pub(super) fn read(magic: u32, information: u64) -> Result<Loaded, &'static str> {
    match magic {
        MULTIBOOT2 => multiboot2(information),
        _ => pvh(information),
    }
}

fn pvh(information: u64) -> Result<Loaded, &'static str> {
    let info: PvhInfo = structure(information).ok_or("PVH start information is out of reach")?;
    if info.magic != PVH {
        return Err("neither Multiboot2 nor PVH start information");
    }
    if info.version < 1 || info.map_entries == 0 {
        return Err("PVH start information has no memory map");
    }
    let size = u64::from(info.map_entries) * bytes_of::<MapEntry>();
    let map = boot_bytes(info.map, size).ok_or("the PVH memory map is out of reach")?;
    let mut module_at = 0..0;
    if info.modules > 0 {
        let module: PvhModule = structure(info.module_list).ok_or("the PVH module list is out of reach")?;
        module_at = module.address..module.address.saturating_add(module.size);
    }
    let cmdline = match info.cmdline {
        0 => &[],
        at => boot_bytes(at, 4096.min(BOOT_LIMIT - at.min(BOOT_LIMIT))).ok_or("the command line is out of reach")?,
    };
    let rsdp = boot_bytes(info.rsdp, 36).and_then(|bytes| Vec::from_slice(bytes).ok());
    finish(cmdline, module_at, map, size_of::<MapEntry>(), rsdp)
}

fn multiboot2(information: u64) -> Result<Loaded, &'static str> {
    let total: u32 = structure(information).ok_or("Multiboot2 information is out of reach")?;
    tags(boot_bytes(information, total.into()).ok_or("Multiboot2 information is out of reach")?)
}

/// Goes through the tags of Multiboot2 information. One that is cut off ends them.
fn tags(all: &'static [u8]) -> Result<Loaded, &'static str> {
    let (mut cmdline, mut module_at, mut map, mut entry_size, mut rsdp) = (&[][..], None, &[][..], 0, None);
    let mut rest = all.get(8..).unwrap_or(&[]);
    while let Ok((&[kind, size], _)) = <[u32; 2]>::ref_from_prefix(rest) {
        let Some(tag) = rest.get(8..index(size)) else { break };
        match kind {
            0 => break,
            1 => cmdline = tag,
            3 if module_at.is_none() => module_at = u32_pair(tag),
            6 => {
                entry_size = u32_pair(tag).map_or(0, |pair| usize::try_from(pair.start).unwrap_or(0));
                map = tag.get(8..).unwrap_or(&[]);
            }
            // The new root pointer replaces the old one, whichever comes first.
            14 if rsdp.is_none() => rsdp = Vec::from_slice(tag).ok(),
            15 => rsdp = Vec::from_slice(tag.get(..36).unwrap_or(tag)).ok(),
            _ => {}
        }
        rest = rest.get(index(size).next_multiple_of(8)..).unwrap_or(&[]);
    }
    finish(cmdline, module_at.unwrap_or(0..0), map, entry_size, rsdp)
}

/// The first two words of a tag as a range of addresses.
fn u32_pair(tag: &[u8]) -> Option<Range<u64>> {
    let ([start, end], _) = <[u32; 2]>::read_from_prefix(tag).ok()?;
    Some(start.into()..end.into())
}

/// Puts together what both protocols have in common.
fn finish(
    cmdline: &'static [u8],
    module_at: Range<u64>,
    map: &[u8],
    entry_size: usize,
    rsdp: Option<Vec<u8, 36>>,
) -> Result<Loaded, &'static str> {
    if entry_size < 20 || map.len() < entry_size {
        return Err("the loader gave no memory map");
    }
    let size = module_at.end.saturating_sub(module_at.start);
    let module = if size == 0 { &[] } else { boot_bytes(module_at.start, size).ok_or("the module is out of reach")? };
    let (ram, unmapped) = (ram(map, entry_size), unmapped(map, entry_size));
    Ok(Loaded { cmdline: keep(cmdline)?, module, module_at, ram, unmapped, rsdp })
}

/// The entries of a memory map.
fn entries(map: &[u8], entry_size: usize) -> impl Iterator<Item = MapEntry> {
    map.chunks_exact(entry_size).filter_map(|bytes| MapEntry::read_from_prefix(bytes).ok()).map(|(entry, _)| entry)
}

/// What no entry of a memory map claims, whatever for, from 1 MiB on and as far as a frame has a number.
fn unmapped(map: &[u8], entry_size: usize) -> Ranges {
    let mut left = Ranges::new();
    left.add(256..1 << 32);
    for entry in entries(map, entry_size) {
        let end = entry.address.saturating_add(entry.size);
        left.remove(entry.address / 4096..end.div_ceil(4096));
    }
    left
}

/// The RAM of a memory map in whole frames. What any other entry claims is none.
fn ram(map: &[u8], entry_size: usize) -> Ranges {
    let entries = || entries(map, entry_size);
    let mut ram = Ranges::new();
    for entry in entries().filter(|entry| entry.kind == RAM) {
        let end = entry.address.saturating_add(entry.size).min(1 << 44);
        ram.add(entry.address.div_ceil(4096)..end / 4096);
    }
    for entry in entries().filter(|entry| entry.kind != RAM) {
        let end = entry.address.saturating_add(entry.size);
        ram.remove(entry.address / 4096..end.div_ceil(4096));
    }
    ram
}

/// A structure at a machine address.
fn structure<T: FromBytes>(address: u64) -> Option<T> {
    let bytes = boot_bytes(address, bytes_of::<T>())?;
    T::read_from_bytes(bytes).ok()
}

/// Copies the command line, up to its zero byte.
fn keep(cmdline: &[u8]) -> Result<String<4096>, &'static str> {
    let text = cmdline.split(|&byte| byte == 0).next().unwrap_or(&[]);
    let text = core::str::from_utf8(text).map_err(|_| "the command line is not UTF-8")?;
    String::try_from(text).map_err(|_| "the command line is longer than 4096 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn map(entries: &[(u64, u64, u32)]) -> std::vec::Vec<u8> {
        let bytes = |&(address, size, kind): &(u64, u64, u32)| {
            let mut entry = std::vec::Vec::from(address.to_le_bytes());
            entry.extend(size.to_le_bytes());
            entry.extend(kind.to_le_bytes());
            entry.extend([0; 4]);
            entry
        };
        entries.iter().flat_map(bytes).collect()
    }

    #[test]
    fn ram_is_whole_frames_that_nobody_else_claims() {
        let map = map(&[(0, 0x9fc00, 1), (0x9fc00, 0x400, 2), (0x10_0800, 0x10_0000, 1), (0x18_0001, 1, 3)]);
        let mut found: std::vec::Vec<_> = ram(&map, 24).iter().collect();
        found.sort_by_key(|range| range.start);
        assert_eq!(found, [0..0x9f, 0x101..0x180, 0x181..0x200]);
        let left = unmapped(&map, 24);
        let all = (left.iter().next(), left.iter().count());
        assert_eq!(all, (Some(0x201..1 << 32), 1), "what RAM or anything else claims in part is no device's");
    }

    #[test]
    fn absurd_sizes_do_not_overflow() {
        let map = map(&[(u64::MAX - 4096, u64::MAX, 1), (0x1000, u64::MAX, 1), (u64::MAX, u64::MAX, 2)]);
        assert_eq!(ram(&map, 24).limit(), 1 << 32);
    }

    /// Multiboot2 information with these tags, as a loader places it: 8-byte aligned.
    fn information(tags: &[(u32, &[u8])]) -> std::vec::Vec<u64> {
        let mut bytes = std::vec::Vec::from([0; 8]);
        for (kind, content) in tags {
            bytes.extend(kind.to_le_bytes());
            bytes.extend(u32::try_from(8 + content.len()).unwrap().to_le_bytes());
            bytes.extend(*content);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.as_chunks().0.iter().map(|&word| u64::from_le_bytes(word)).collect()
    }

    fn read_tags(information: std::vec::Vec<u64>) -> Result<Loaded, &'static str> {
        tags(information.leak().as_bytes())
    }

    fn map_tag() -> std::vec::Vec<u8> {
        let mut content = std::vec::Vec::from([24, 0, 0, 0, 0, 0, 0, 0]);
        content.extend(map(&[(0x10_0000, 0x10_0000, 1)]));
        content
    }

    #[test]
    fn tags_are_told_apart_and_the_first_module_counts() {
        let module = |at: u32| [at.to_le_bytes(), at.to_le_bytes()].concat();
        let map = map_tag();
        let loaded = read_tags(information(&[
            (14, &[1; 20]),
            (21, &[9; 4]),
            (3, &module(0x7000)),
            (6, &map),
            (3, &module(0x8000)),
            (15, &[2; 40]),
            (14, &[3; 20]),
            (0, &[]),
            (3, &module(0x9000)),
        ]))
        .unwrap();
        assert_eq!((loaded.module_at.clone(), loaded.module), (0x7000..0x7000, &[][..]));
        assert_eq!(loaded.module_frames(), 7..7);
        assert_eq!(loaded.rsdp.unwrap(), [2; 36]);
        assert_eq!((loaded.ram.frames(), loaded.ram.limit()), (0x100, 0x200));
    }

    /// Cut anywhere, or with any word replaced, the tags are read to some end; a map is found or its lack is told.
    #[test]
    fn broken_tags_end_the_list() {
        let map = map_tag();
        let good = information(&[(1, b"log=debug\0"), (14, &[1; 20]), (6, &map), (0, &[])]);
        for length in 0..good.len() {
            let cut = read_tags(good[..length].to_vec());
            assert_eq!(cut.is_ok(), length >= good.len() - 1, "cut to {length} words");
        }
        for at in 1..good.len() {
            for word in [0, 1, 7, 8, u64::MAX, 6 << 32, u64::from(u32::MAX) << 32 | 6, 0xffff_fff9 << 32] {
                let mut bad = good.clone();
                bad[at] = word;
                let frames = read_tags(bad).map_or(0, |loaded| loaded.ram.frames());
                assert!(frames <= 1 << 32, "word {at} as {word:#x}");
            }
        }
    }

    #[test]
    fn a_map_is_needed() {
        assert!(finish(&[], 0..0, &[], 24, None).is_err());
        assert!(finish(&[], 0..0, &[0; 24], 8, None).is_err());
    }
}
