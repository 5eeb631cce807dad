//! Files that are not kernels: each is a clear refusal, none a panic, and none makes more work than its size and what it
//! claims to need.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared by two tests")]
mod common;

use common::*;
use guest_image::{Config, ImageError, Kernel, MOST_HEADERS, MOST_NOTE_BYTES, Plan, Wiring};
use test_random::Random;

fn refusal(file: &[u8]) -> String {
    Kernel::parse(file).err().unwrap().to_string()
}

fn with_notes(all: &[Vec<u8>]) -> Vec<u8> {
    elf(&[load(0x1000, &[1; 64], 64), notes(all)])
}

fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = linux(&[]);
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
    file
}

#[test]
fn what_is_not_an_elf64_for_this_machine_is_refused() {
    assert_eq!(refusal(b""), "not an ELF file, or its header is cut off");
    assert_eq!(refusal(b"MZ\0\0 a bzImage, perhaps"), "not an ELF file, or its header is cut off");
    assert_eq!(refusal(&linux(&[])[..40]), "not an ELF file, or its header is cut off");
    assert_eq!(refusal(&patched(4, &[1])), "not a 64-bit ELF file");
    assert_eq!(refusal(&patched(4, &[9])), "not an ELF file, or its header is cut off");
    assert_eq!(refusal(&patched(5, &[2])), "not an ELF file, or its header is cut off");
    assert_eq!(refusal(&patched(18, &[183, 0])), "ELF file for machine 183, not x86-64 (62)");
    assert_eq!(refusal(&patched(54, &[55, 0])), "program headers end at byte 0x11c, the file has 0x3d34");
    assert!(refusal(&linux(&[])[..100]).starts_with("program headers end at byte 0x120, the file has 0x64"));
}

#[test]
fn a_bad_segment_is_named() {
    let file = linux(&[]);
    assert!(refusal(&file[..0x3000]).starts_with("segment 3 ends at byte"), "{}", refusal(&file[..0x3000]));
    // The third header: physical address, then size in the file.
    let third = 64 + 2 * 56;
    assert_eq!(
        refusal(&patched(third + 32, &(1u64 << 40).to_le_bytes())),
        "segment 2 ends at byte 0x10000002480, the file has 0x3d34"
            .replace("2480", &format!("{:04x}", 0x120 + 0x2345 + 7))
    );
    assert_eq!(refusal(&patched(third + 40, &5u64.to_le_bytes())), "segment 2 is larger in the file than in memory");
    assert_eq!(
        refusal(&patched(third + 24, &u64::MAX.to_le_bytes())),
        "segment 2: physical address 0xffffffffffffffff is outside the domain"
    );
    let below = [number(3, 0), number(4, 0x2000), number(1, 0), note(5, b"xen-3.0"), note(8, b"generic")];
    assert_eq!(refusal(&with_notes(&below)), "segment 0: physical address 0x1000 is outside the domain");
    assert_eq!(refusal(&elf(&[notes(&linux_notes(BASE))])), "no segment to load");
}

#[test]
fn bad_notes_are_named() {
    let good = || linux_notes(BASE + 0x1000);
    assert!(Kernel::parse(&with_notes(&good())).is_ok());
    assert_eq!(refusal(&elf(&[load(0, &[1], 1)])), "no Xen notes: not a paravirtual kernel");
    let without =
        |nr: usize| good().into_iter().enumerate().filter(|(i, _)| *i != nr).map(|(_, n)| n).collect::<Vec<_>>();
    assert_eq!(refusal(&with_notes(&without(1))), "no Xen note XEN_VERSION (5)");
    let and = |extra: Vec<u8>| refusal(&with_notes(&[good(), vec![extra]].concat()));
    assert_eq!(and(note(5, b"xen-4.0\0")), "Xen note XEN_VERSION is \"xen-4.0\", not \"xen-3.0\"");
    assert_eq!(and(note(1, b"123")), "Xen note 1 has 3 bytes, not 4 or 8");
    assert_eq!(and(note(10, b"!teleport|dom0")), "the kernel requires the feature \"teleport\", which we do not have");
    assert_eq!(
        and(note(10, b"dom0|!supervisor_mode_kernel")),
        "the kernel requires the feature \"supervisor_mode_kernel\", which we do not have"
    );
    let strange = [note(5, b"xen-3.0"), note(6, b"plan9\0"), note(8, b"special")];
    assert_eq!(
        refusal(&with_notes(&strange)),
        "Xen note LOADER is not \"generic\" and GUEST_OS is \"plan9\", not \"linux\""
    );
    let mut cut = note(1, &[0; 8]);
    cut.truncate(20);
    assert!(and(cut).starts_with("the ELF note at byte 0x1"));
    assert_eq!(
        and(number(1, BASE + 0x1040)),
        "entry 0xffffffff80001040 is outside the kernel at 0xffffffff80001000..0xffffffff80001040"
    );
    assert!(and(number(3, BASE + 8)).contains("cannot be mapped at VIRT_BASE 0xffffffff80000008"));
    assert!(and(number(3, 1 << 47)).contains("cannot be mapped at VIRT_BASE 0x800000000000"));
}

#[test]
fn a_region_in_the_hypervisors_slots_is_refused() {
    for base in [0xffff_8000_0000_0000u64, 0x7fff_ffff_f000, 0xffff_ffff_ffff_0000] {
        let all = [number(1, base.wrapping_add(0x1000)), number(3, base), note(5, b"xen-3.0"), note(8, b"generic")];
        let file = with_notes(&all);
        let plan = Plan::new(Kernel::parse(&file).unwrap(), Config { nr_pages: 4096, ..Config::default() });
        assert!(matches!(plan, Err(ImageError::VirtBase { .. })), "{base:#x}");
    }
}

#[test]
fn optional_and_known_features_are_collected() {
    let kernel = with_notes(&[linux_notes(BASE + 0x1000), vec![note(10, b"dom0|!writable_page_tables|what")]].concat());
    assert_eq!(Kernel::parse(&kernel).unwrap().features, 0x8801);
    let kernel =
        with_notes(&[note(5, b"xen-3.0"), note(6, b"linux"), number(1, 0x1000), note(10, b"pae_pgdir_above_4gb")]);
    assert_eq!(Kernel::parse(&kernel).unwrap().features, 1 << 4);
}

#[test]
fn notes_are_found_in_sections_too() {
    let mut file = linux(&[]);
    // Turn the note segment into PT_NULL and describe it by a section instead.
    let header = 64 + 3 * 56;
    let offset = u64::from_le_bytes(file[header + 8..header + 16].try_into().unwrap());
    let len = file.len() as u64 - offset;
    file[header] = 0;
    assert_eq!(refusal(&file), "no Xen notes: not a paravirtual kernel");
    let table = file.len() as u64;
    let mut section = vec![0; 64];
    section[4] = 7;
    section[24..32].copy_from_slice(&offset.to_le_bytes());
    section[32..40].copy_from_slice(&len.to_le_bytes());
    file.extend(section);
    file[40..48].copy_from_slice(&table.to_le_bytes());
    file[60] = 1;
    assert_eq!(Kernel::parse(&file).unwrap().virt_base, BASE);
}

/// `file`, where each of the first `count` program headers is a copy of number `from`.
fn repeated(mut file: Vec<u8>, from: usize, count: usize) -> Vec<u8> {
    let header = file[64 + 56 * from..][..56].to_vec();
    file[64..64 + 56 * count].chunks_exact_mut(56).for_each(|to| to.copy_from_slice(&header));
    file
}

/// A file of 2 MB with 20,000 headers, each of which loads the same MiB.
#[test]
fn many_program_headers_are_refused() {
    let mut parts = vec![load(0x100_0000, &[], 0); 20_000];
    parts[19_999] = load(0x100_0000, &vec![0x90; 1 << 20], 1 << 20);
    parts.push(notes(&linux_notes(BASE + 0x100_0010)));
    let file = repeated(elf(&parts), 19_999, 20_000);
    assert_eq!(refusal(&file), "20001 program headers at byte 0x40, at most 64 are read");
    let most = usize::from(MOST_HEADERS);
    let parts = |count: usize| {
        let all = (0..count as u64 - 1).map(|n| load(0x100_0000 + 64 * n, &[0x90; 64], 64));
        elf(&all.chain([notes(&linux_notes(BASE + 0x100_0010))]).collect::<Vec<_>>())
    };
    assert_eq!(Kernel::parse(&parts(most)).unwrap().span, (0x100_0000, 0x100_0000 + 64 * 63));
    assert_eq!(refusal(&parts(most + 1)), "65 program headers at byte 0x40, at most 64 are read");
}

/// Segments may touch, but not by a byte do two of them claim the same memory; where in the file their bytes are does
/// not matter.
#[test]
fn segments_that_overlap_are_refused() {
    let file = |second: u64, len: u64| {
        let note = notes(&linux_notes(BASE + 0x100_0010));
        elf(&[load(0x100_0000, &[1; 64], 0x1000), load(second, &[2; 64], len), load(0x200_0000, &[3], 1), note])
    };
    for (second, len) in [(0x100_1000, 0x1000), (0xff_f000, 0x1000), (0x1ff_0000, 0x1_0000)] {
        assert!(Kernel::parse(&file(second, len)).is_ok(), "{second:#x}");
    }
    let overlaps = |index: u32, other: u32, at: u64| {
        format!("segment {index} overlaps segment {other} at the physical address {at:#x}")
    };
    assert_eq!(refusal(&file(0x100_0fff, 0x1000)), overlaps(1, 0, 0x100_0fff));
    assert_eq!(refusal(&file(0xff_f001, 0x1000)), overlaps(1, 0, 0x100_0000));
    assert_eq!(refusal(&file(0x1ff_0000, 0x1_0001)), overlaps(2, 1, 0x200_0000));
    assert_eq!(refusal(&repeated(file(0x100_1000, 0x1000), 0, 2)), overlaps(1, 0, 0x100_0000));
}

/// Whether headers name the same notes again and again, or one segment has many, no more than a fixed number of bytes
/// of notes is read.
#[test]
fn notes_are_bounded() {
    let padded = |len: usize| {
        let mut all = vec![linux_notes(BASE + 0x100_0010).concat()];
        all.push(vec![0; (len - all[0].len()) / 12 * 12]);
        all
    };
    let file = |headers: usize, len: usize| {
        let mut parts = vec![notes(&[]); headers - 1];
        parts.extend([notes(&padded(len)), load(0x100_0000, &[0x90; 64], 64)]);
        repeated(elf(&parts), headers - 1, headers)
    };
    assert!(Kernel::parse(&file(1, MOST_NOTE_BYTES)).is_ok());
    assert!(Kernel::parse(&file(4, MOST_NOTE_BYTES / 4)).is_ok());
    for (headers, len) in [(1, MOST_NOTE_BYTES + 12), (5, MOST_NOTE_BYTES / 4), (60, 1 << 20)] {
        let refusal = refusal(&file(headers, len));
        assert!(refusal.starts_with("the ELF notes at byte 0x"), "{refusal}");
        assert!(refusal.ends_with(" make more than 65536 bytes of notes"), "{refusal}");
    }
}

/// Every part of a domain is written at most once, and cleared at most once before: no more than this for a plan.
fn most_written(file: &[u8], plan: &Plan<'_>) -> u64 {
    let layout = &plan.layout;
    let ours = layout.p2m.count() + layout.tables.count() + layout.p2m_tables.count() + 4;
    file.len() as u64 + plan.kernel.span.1 - plan.kernel.span.0 + plan.config.ramdisk.len() as u64 + 2 * 4096 * ours
}

#[test]
fn a_corrupted_kernel_never_panics() {
    let mut random = Random::new();
    let all = [number(15, 0x80_0000_0000), number(16, 1), number(2, BASE + 0x1000)];
    let all = [linux_notes(BASE + 0x1000), all.to_vec()].concat();
    // What mutations have to play with: segments that are not there, for copies of others.
    let mut parts = vec![load(0x1000, &[1; 64], 0x1000), load(0x2000, b"data", 0x3000), notes(&all)];
    parts.resize(200, notes(&[]));
    let spare = elf(&parts);
    let whole = elf(&parts[..3]);
    let (mut planned, mut refused) = (0, 0);
    for _ in 0..60_000 {
        let mut file = if random.below(4) == 0 {
            let mut file = repeated(spare.clone(), 1, 2 + random.below(190));
            // The first and the third header as they were, and few or many between and behind them.
            file[64..64 + 56].copy_from_slice(&spare[64..64 + 56]);
            file[64 + 2 * 56..64 + 3 * 56].copy_from_slice(&spare[64 + 2 * 56..64 + 3 * 56]);
            file[56] = u8::try_from(2 + random.below(199)).unwrap();
            file
        } else {
            whole.clone()
        };
        for _ in 0..=random.below(4) {
            let at = random.below(file.len());
            let values = [0, 1, 0x7f, 0x80, 0xff, u8::try_from(random.next() & 0xff).unwrap()];
            file[at] = values[random.below(values.len())];
        }
        if random.below(8) == 0 {
            file.truncate(random.below(file.len()));
        }
        let nr_pages = [0, 1, 1500, 4096, 1 << 40, u64::MAX][random.below(6)];
        let config = Config { nr_pages, ramdisk: &[1; 5000], rings: true, ..Config::default() };
        match Kernel::parse(&file).and_then(|kernel| Plan::new(kernel, config)) {
            Ok(plan) if nr_pages <= 4096 => {
                planned += 1;
                // Whatever the file says, a plan stays within its domain, and writes it once.
                if planned % 16 == 0 {
                    let mut domain = Domain::new(nr_pages);
                    plan.construct(&mut domain, &Wiring::default()).unwrap();
                    let (most, written) = (most_written(&file, &plan), domain.written);
                    assert!(written <= most, "{written} bytes are written for a file of {}, not {most}", file.len());
                }
            }
            Ok(_) => {}
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        }
    }
    assert!(planned > 1000 && refused > 1000, "{planned} planned, {refused} refused");
}
