//! A kernel in a domain: what is where, what is mapped how, what the kernel is told.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared by two tests")]
mod common;

use common::*;
use guest_image::{Config, ImageError, Kernel, Layout, MachineFrame, Pfn, PfnRange, Plan, Start, Wiring};
use test_kernels::elf_at;

const MIB: u64 = 256;
const INIT_P2M: u64 = 0x80_0000_0000;
const WIRING: Wiring = Wiring { shared_info: MachineFrame(0x777), store_port: 1, console_port: 2 };

fn config(nr_pages: u64) -> Config<'static> {
    Config { nr_pages, command_line: b"console=hvc0", rings: true, ..Config::default() }
}

fn build(file: &[u8], config: Config<'_>) -> (Layout, Domain, Start) {
    let plan = Plan::new(Kernel::parse(file).unwrap(), config).unwrap();
    let mut domain = Domain::new(config.nr_pages);
    let start = plan.construct(&mut domain, &WIRING).unwrap();
    check_mapping(&plan, &domain, &start);
    check_leaves(&plan, &domain);
    (plan.layout, domain, start)
}

/// Each leaf table is one of the domain's tables, has an entry, and is told once.
fn check_leaves(plan: &Plan<'_>, domain: &Domain) {
    let leaves: Vec<Pfn> = plan.leaf_tables().collect();
    let pages = plan.layout.region_end.0;
    assert!(leaves.len() as u64 >= pages / 512, "{} leaf tables for {pages} pages", leaves.len());
    for (n, leaf) in leaves.iter().enumerate() {
        assert!(plan.layout.tables.contains(leaf.0) || plan.layout.p2m_tables.contains(leaf.0));
        assert!(!leaves[..n].contains(leaf));
        let flags: Vec<u64> = (0..512).map(|slot| domain.word(leaf.0, slot * 8) & 0xfff).collect();
        assert!(flags.iter().any(|flags| *flags != 0) && flags.iter().all(|flags| [0, 0x21, 0x23].contains(flags)));
    }
}

/// Every page of the region is mapped by its address, writable unless it is a page table; nothing else is.
fn check_mapping(plan: &Plan<'_>, domain: &Domain, start: &Start) {
    let layout = &plan.layout;
    let mut tables = vec![layout.tables.start];
    for pfn in 0..layout.region_end.0 {
        let (entry, passed) = domain.walk(start.root, plan.kernel.virt_base.wrapping_add(pfn << 12)).unwrap();
        assert_eq!(Domain::pfn_of(entry >> 12), pfn);
        assert_eq!(entry & 0xfff, if layout.tables.contains(pfn) { 0x21 } else { 0x23 }, "pfn {pfn:#x}");
        tables.extend(passed);
    }
    let behind = plan.kernel.virt_base.wrapping_add(layout.region_end.0 << 12);
    if behind != 0 {
        assert_eq!(domain.walk(start.root, behind), None);
    }
    let listed: Vec<u64> = if layout.p2m_tables.is_empty() {
        Vec::new()
    } else {
        let mut own = Vec::new();
        for page in 0..layout.p2m.count() {
            let (entry, passed) = domain.walk(start.root, plan.kernel.init_p2m.unwrap() + (page << 12)).unwrap();
            assert_eq!((Domain::pfn_of(entry >> 12), entry & 0xfff), (layout.p2m.start + page, 0x23));
            own.extend(&passed[..3]);
        }
        own.sort_unstable();
        own.dedup();
        own
    };
    // All tables are used, and the L4 comes first.
    tables.sort_unstable();
    tables.dedup();
    assert_eq!(tables, (layout.tables.start..layout.tables.end).collect::<Vec<_>>());
    assert_eq!(listed, (layout.p2m_tables.start..layout.p2m_tables.end).collect::<Vec<_>>());
    for pfn in 0..plan.config.nr_pages {
        let at = layout.p2m.start + pfn / 512;
        assert_eq!(domain.word(at, usize::try_from(pfn % 512).unwrap() * 8), Domain::frame(pfn));
    }
    // Entries that lead nowhere are zero, whatever was in the page.
    for table in (layout.tables.start..layout.tables.end).chain(layout.p2m_tables.start..layout.p2m_tables.end) {
        for slot in 0..512 {
            let entry = domain.word(table, slot * 8);
            assert!(entry == 0 || entry & 1 == 1);
        }
    }
}

fn range(start: u64, end: u64) -> PfnRange {
    PfnRange { start, end }
}

#[test]
fn a_stock_kernel_gets_the_layout_of_the_start_of_day() {
    let ramdisk = [7; 5000];
    let file = linux(&[number(15, INIT_P2M), number(16, 1)]);
    let (layout, domain, start) = build(&file, Config { ramdisk: &ramdisk, ..config(64 * MIB) });
    // 16 MiB of gap, the kernel to 0x1304010.
    assert_eq!(layout.kernel, range(0x1000, 0x1305));
    assert_eq!(layout.start_info, Pfn(0x1305));
    assert_eq!((layout.store, layout.console), (Some(Pfn(0x1306)), Some(Pfn(0x1307))));
    // 20 MiB, or 10 L1 tables, suffice: 0x1308 and 13 tables, the stack and 128 pages are below 0x1400.
    assert_eq!(layout.region_end, Pfn(0x1400));
    assert_eq!(layout.tables, range(0x1308, 0x1308 + 1 + 1 + 1 + 10));
    assert_eq!(layout.stack, Pfn(layout.tables.end));
    assert_eq!(layout.ramdisk, range(0x1400, 0x1402));
    assert_eq!(layout.p2m, range(0x1402, 0x1402 + 32));
    assert_eq!(layout.p2m_tables, range(0x1422, 0x1425));
    assert_eq!(layout.pages(), 0x1425);

    assert_eq!(start.entry, BASE + 0x100_0010);
    assert_eq!(start.stack, BASE + ((layout.stack.0 + 1) << 12));
    assert_eq!(start.start_info, BASE + 0x130_5000);
    assert_eq!(start.root, MachineFrame(Domain::frame(layout.tables.start)));
    assert_eq!(start.console, Some(MachineFrame(Domain::frame(0x1307))));

    assert_eq!(domain.pages[0x1000], [0xaa; 4096]);
    assert_eq!(&domain.pages[0x1002][..0x346], &[&[0xaa; 0x345][..], &[0x5a]].concat());
    assert_eq!(&domain.pages[0x1003][..8], b"per-cpu\0");
    assert_eq!(&domain.pages[0x1004][0x0f..0x12], &[0x5a, 0xbb, 0xbb]);
    assert_eq!(&domain.pages[0x1005][0x80f..0x811], &[0xbb, 0]);
    assert_eq!(domain.pages[0x1234], [0; 4096]);
    assert_eq!(&domain.pages[0x1304][0xf..0x11], &[0, 0x5a]);
    assert_eq!(domain.pages[0x1400], [7; 4096]);
    assert_eq!(domain.pages[0x1401][5000 - 4096 - 1], 7);
}

#[test]
fn start_info_says_where_everything_is() {
    let ramdisk = [7; 5000];
    let file = linux(&[number(15, INIT_P2M), number(16, 1)]);
    let (layout, domain, _) = build(&file, Config { ramdisk: &ramdisk, flags: 0x10, ..config(64 * MIB) });
    let page = layout.start_info.0;
    let word = |offset| domain.word(page, offset);
    let bytes = &domain.pages[usize::try_from(page).unwrap()];
    assert_eq!(&bytes[..32], b"xen-3.0-x86_64\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(word(0x20), 64 * MIB);
    assert_eq!(word(0x28), 0x77_7000);
    assert_eq!(word(0x30), 0x18);
    assert_eq!((word(0x38), word(0x40)), (Domain::frame(0x1306), 1));
    assert_eq!((word(0x48), word(0x50)), (Domain::frame(0x1307), 2));
    assert_eq!((word(0x58), word(0x60)), (BASE + (layout.tables.start << 12), 13));
    assert_eq!(word(0x68), INIT_P2M);
    assert_eq!((word(0x70), word(0x78)), (0x1400, 5000));
    assert_eq!(&bytes[0x80..0x8e], b"console=hvc0\0\0");
    assert_eq!((word(0x480), word(0x488)), (0x1402, 35));
    assert!(bytes[0x490..].iter().all(|b| *b == 0));
    // The console page says that nobody serves it yet, the store page is zero.
    let mut console = [0; 4096];
    console[3088] = 1;
    assert_eq!(domain.pages[0x1307], console);
    assert_eq!(domain.pages[0x1306], [0; 4096]);
}

#[test]
fn without_the_notes_ramdisk_and_list_are_in_the_region() {
    let ramdisk = [7; 5000];
    let (layout, domain, _) = build(&linux(&[]), Config { ramdisk: &ramdisk, ..config(64 * MIB) });
    assert_eq!(layout.ramdisk, range(0x1305, 0x1307));
    assert_eq!(layout.p2m, range(0x1307, 0x1327));
    assert_eq!(layout.start_info, Pfn(0x1327));
    assert_eq!(layout.p2m_tables.count(), 0);
    assert_eq!(layout.pages(), layout.region_end.0);
    let word = |offset| domain.word(0x1327, offset);
    assert_eq!(word(0x30), 0);
    assert_eq!(word(0x68), BASE + 0x130_7000);
    assert_eq!((word(0x70), word(0x78)), (BASE + 0x130_5000, 5000));
    assert_eq!((word(0x480), word(0x488)), (0, 0));
}

#[test]
fn the_first_domain_has_no_rings() {
    let (layout, domain, start) = build(&linux(&[]), Config { rings: false, flags: 3, ..config(64 * MIB) });
    assert_eq!((layout.store, layout.console, start.store, start.console), (None, None, None, None));
    assert_eq!(layout.tables.start, layout.start_info.0 + 1);
    assert_eq!(domain.word(layout.start_info.0, 0x30), 3);
    assert_eq!((domain.word(layout.start_info.0, 0x38), domain.word(layout.start_info.0, 0x48)), (0, 0));
}

#[test]
fn half_a_mebibyte_of_padding_is_kept_and_the_region_ends_at_four() {
    for pages in 0..0x900 {
        let file = elf(&[load(0, &[1], pages * 4096 + 1), notes(&linux_notes(BASE))]);
        let plan = Plan::new(Kernel::parse(&file).unwrap(), config(64 * MIB)).unwrap();
        let layout = plan.layout;
        assert_eq!(layout.region_end.0 % 1024, 0);
        assert!(layout.region_end.0 - layout.stack.0 > 128);
        assert!(layout.region_end.0 - layout.stack.0 <= 128 + 1024 + 1);
        // L4, L3, L2, and an L1 for each 2 MiB.
        assert_eq!(layout.tables.count(), 3 + layout.region_end.0 / 512);
    }
}

#[test]
fn a_kernel_of_our_own_may_sit_anywhere() {
    // Across boundaries of L1, L2 and L3 tables, in the lower half, and at the very end of the address space.
    for base in [0, 0x1000, 0x3f_ffff_e000, 0x7f_ffe0_0000, 0xffff_8800_0000_0000, 0xffff_ffff_ff80_0000] {
        let all = [number(1, base + 8), number(3, base), number(4, base), note(5, b"xen-3.0"), note(8, b"generic")];
        let file = elf(&[load(base, &[0x90; 0x3000], 0x5000), notes(&all)]);
        let (layout, domain, start) = build(&file, config(2048 + 1024));
        assert_eq!(layout.kernel, range(0, 5), "at {base:#x}");
        assert_eq!((start.entry, start.start_info), (base + 8, base.wrapping_add(layout.start_info.0 << 12)));
        assert_eq!(domain.pages[2], [0x90; 4096]);
        assert_eq!(domain.pages[3], [0; 4096]);
    }
}

#[test]
fn an_unusable_place_for_the_list_is_ignored() {
    // Not aligned, not canonical, the hypervisor's, above the kernel, in the kernel's own slot.
    for va in [INIT_P2M + 8, 1 << 50, 0xffff_8000_0000_0000, BASE + (1 << 30), BASE - (1 << 30)] {
        let (layout, _, _) = build(&linux(&[number(15, va)]), config(64 * MIB));
        assert!(layout.p2m.end < layout.region_end.0, "{va:#x}");
    }
    // A list across two slots of the top level takes two L3 tables.
    let (layout, _, _) = build(&linux(&[number(15, 2 * INIT_P2M - 0x1000)]), config(64 * MIB));
    assert_eq!((layout.p2m.count(), layout.p2m_tables.count()), (32, 6));
}

#[test]
fn the_hypercall_page_is_filled() {
    let file = linux(&[number(2, BASE + 0x100_1000)]);
    let (_, domain, _) = build(&file, config(64 * MIB));
    for number in 0..128u8 {
        assert_eq!(domain.pages[0x1001][usize::from(number) * 32..][..32], hypercall_abi::stub::code(number));
    }
    let slot = |n: usize| &domain.pages[0x1001][n * 32..][..16];
    assert_eq!(slot(5), &[0x51, 0x41, 0x53, 0xb8, 5, 0, 0, 0, 0x0f, 5, 0x41, 0x5b, 0x59, 0xc3, 0xcc, 0xcc]);
    assert_eq!(slot(23), &[0x51, 0x41, 0x53, 0x50, 0xb8, 23, 0, 0, 0, 0x0f, 5, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc]);
    for page in [BASE + 0x100_1008, BASE, BASE + 0x200_0000] {
        assert_eq!(Kernel::parse(&linux(&[number(2, page)])).err(), Some(ImageError::HypercallPage { page }));
    }
}

/// Core 1.2: the entry of the ELF header where there is no note ENTRY, 0 without VIRT_BASE and PADDR_OFFSET, and a page
/// of stubs only for those that ask for one. In every combination.
#[test]
fn notes_that_are_absent_have_defaults() {
    const KERNEL: u64 = 0x100_0000;
    for case in 0..8 {
        let [entry, virt_base, page] = [1, 2, 4].map(|bit| case & bit != 0);
        let base = if virt_base { BASE } else { 0 };
        let mut all = vec![note(5, b"xen-3.0\0"), note(8, b"generic\0")];
        all.extend(entry.then(|| number(1, base + KERNEL + 0x10)));
        all.extend(page.then(|| number(2, base + KERNEL + 0x1000)));
        all.extend(virt_base.then(|| number(3, base)));
        let file = elf_at(base + KERNEL + 0x20, &[load(KERNEL, &[0x90; 0x3000], 0x3000), notes(&all)]);

        let kernel = Kernel::parse(&file).unwrap();
        assert_eq!((kernel.virt_base, kernel.paddr_offset), (base, 0), "case {case}");
        assert_eq!((kernel.init_p2m, kernel.unmapped_ramdisk, kernel.features), (None, false, 0));
        assert_eq!(kernel.hypercall_page, page.then_some(base + KERNEL + 0x1000));
        let (layout, domain, start) = build(&file, config(64 * MIB));
        assert_eq!(layout.kernel, range(0x1000, 0x1003), "case {case}");
        assert_eq!(start.entry, base + KERNEL + if entry { 0x10 } else { 0x20 }, "case {case}");
        assert_eq!(start.start_info, base + (layout.start_info.0 << 12), "case {case}");
        assert_eq!(domain.pages[0x1001] == [0x90; 4096], !page, "case {case}");
        assert_eq!((domain.pages[0x1000], domain.pages[0x1002]), ([0x90; 4096], [0x90; 4096]), "case {case}");
    }
    // Linux's ELF header has a physical address: without its note nothing tells where it starts.
    let mut without = linux_notes(0);
    without.remove(3);
    let file = elf(&[load(KERNEL, &[0x90; 0x3000], 0x3000), notes(&without)]);
    let (start, end) = (BASE + KERNEL, BASE + KERNEL + 0x3000);
    assert_eq!(Kernel::parse(&file).err(), Some(ImageError::Entry { entry: KERNEL, start, end }));
}

#[test]
fn a_long_command_line_is_cut() {
    let line = [b'x'; 2000];
    let (layout, domain, _) = build(&linux(&[]), Config { command_line: &line, ..config(64 * MIB) });
    let page = &domain.pages[usize::try_from(layout.start_info.0).unwrap()];
    assert_eq!((page[0x80 + 1022], page[0x80 + 1023]), (b'x', 0));
}

#[test]
fn the_least_memory_named_is_enough_and_no_more() {
    let ramdisk = vec![1; 20 << 20];
    for file in [linux(&[]), linux(&[number(15, INIT_P2M), number(16, 1)])] {
        let with = |nr_pages| Config { ramdisk: &ramdisk, ..config(nr_pages) };
        let kernel = Kernel::parse(&file).unwrap();
        let error = Plan::new(kernel, with(1000)).err().unwrap();
        let ImageError::TooLittleMemory { needed, given: 1000 } = error else { panic!("{error}") };
        assert!(error.to_string().contains(&format!("needs {} MiB", needed.div_ceil(256))), "{error}");
        assert!(Plan::new(kernel, with(needed)).is_ok());
        assert!(matches!(Plan::new(kernel, with(needed - 1)), Err(ImageError::TooLittleMemory { .. })));
        build(&file, with(needed));
    }
    let kernel = linux(&[]);
    assert!(Plan::new(Kernel::parse(&kernel).unwrap(), config(0)).is_err());
    assert!(Plan::new(Kernel::parse(&kernel).unwrap(), config(u64::MAX)).is_err());
    assert!(Plan::new(Kernel::parse(&kernel).unwrap(), config(1 << 50)).is_err());
}

#[test]
fn a_refusal_says_what_was_being_written() {
    let ramdisk = [7; 5000];
    let file = linux(&[number(15, INIT_P2M), number(16, 1), number(2, BASE + 0x100_2000)]);
    let plan = Plan::new(Kernel::parse(&file).unwrap(), Config { ramdisk: &ramdisk, ..config(64 * MIB) }).unwrap();
    let parts = [
        (0x1000, "a segment"),
        (0x1300, "a segment"),
        (0x1401, "the ramdisk"),
        (0x1410, "the p2m list"),
        (0x1308, "the page tables"),
        (0x1423, "the page tables"),
        (0x1307, "the store and console pages"),
        (0x1305, "the start-info page"),
    ];
    for (broken, part) in parts {
        let mut domain = Domain { broken: Some(broken), ..Domain::new(64 * MIB) };
        let error = plan.construct(&mut domain, &WIRING).unwrap_err();
        assert_eq!(error.part, part);
        assert_eq!(error.to_string(), format!("writing {part}: page {broken:#x} is broken"));
    }
    // A domain smaller than its plan is a refusal too.
    assert!(plan.construct(&mut Domain::new(0x1300), &WIRING).is_err());
}

/// However large a kernel, its ramdisk or its domain, a piece takes no longer than copying so many pages.
#[test]
fn a_plan_can_be_carried_out_in_pieces() {
    let ramdisk = vec![7; 3 << 20];
    let file = linux(&[number(15, INIT_P2M), number(16, 1)]);
    let plan = Plan::new(Kernel::parse(&file).unwrap(), Config { ramdisk: &ramdisk, ..config(256 * MIB) }).unwrap();
    let mut whole = Domain::new(256 * MIB);
    let start = plan.construct(&mut whole, &WIRING).unwrap();
    let mut domain = Domain::new(256 * MIB);
    let mut count = 0;
    for piece in plan.pieces(64) {
        let before = domain.written;
        plan.write(&mut domain, &WIRING, &piece).unwrap();
        let written = domain.written - before;
        assert!(written <= 64 << 12, "piece {count} writes {written} bytes");
        count += 1;
    }
    assert_eq!(plan.start(&mut domain).unwrap(), start);
    assert!(domain.pages == whole.pages, "what is written differs");
    // The ramdisk and the bss alone are 24 of them; a word of the list and of the tables must be asked for.
    assert!(count > 24 + 64, "{count}");
}

/// `TENON_TEST_KERNEL` names an uncompressed kernel to lay out.
#[test]
fn a_real_kernel_can_be_planned() {
    let Ok(path) = std::env::var("TENON_TEST_KERNEL") else {
        eprintln!("TENON_TEST_KERNEL is not set: nothing tested");
        return;
    };
    let file = std::fs::read(&path).unwrap();
    let kernel = Kernel::parse(&file).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!((kernel.virt_base, kernel.paddr_offset, kernel.init_p2m), (BASE, 0, Some(INIT_P2M)));
    assert_eq!(kernel.features & 1, 1);
    let ramdisk = vec![3; 12_345_678];
    let (layout, _, _) = build(&file, Config { ramdisk: &ramdisk, ..config(256 * MIB) });
    // As measured with Xen's own builder: 41 tables for the 76 MiB of Debian's 6.1.
    assert_eq!(layout.tables.count(), 3 + layout.region_end.0 / 512);
}
