//! Reservations and memory maps (core 4.10).
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::memory::{COMMAND_BITS, E820_RAM, E820Entry, MemoryOp, Reservation};
use guests::abi::{Errno, Hypercall, domid};
use guests::memory::{PAGE, Pages, Window};
use guests::probe::{self, address, call, update_va_mapping};
use guests::tables::{LEAF, READ_ONLY};
use guests::{hypercall, test};

unikernel::entry!(unikernel::testing::run);

const NOT_A_PAGE: u64 = u64::MAX;

fn reservation(command: MemoryOp, extents: &mut [u64]) -> Result<u64, Errno> {
    let arg = Reservation {
        extent_start: probe::address_mut(extents),
        nr_extents: extents.len() as u64,
        domid: domid::SELF,
        ..Reservation::default()
    };
    call(Hypercall::MemoryOp, [command.number(), address(&arg), 0, 0, 0])
}

fn m2p(frame: u64) -> u64 {
    let table = hypercall::machphys_mapping().expect("there is a table").v_start;
    probe::read(table + frame * 8).unwrap_or(NOT_A_PAGE)
}

fn pages_now() -> u64 {
    let own = domid::SELF;
    let op = MemoryOp::CurrentReservation.number();
    call(Hypercall::MemoryOp, [op, address(&own), 0, 0, 0]).expect("our own pages")
}

/// What the machine has and what was logged is the toolstack's to know.
fn the_machine_is_not_ours_to_know() {
    assert_eq!(hypercall::physical_info().map(drop), Err(Errno::Perm));
    let mut text = [b'x'; 64];
    for clear in [false, true] {
        assert_eq!(hypercall::read_log(0, clear, &mut text), Err(Errno::Perm));
    }
    assert_eq!(text, [b'x'; 64]);
}

test!("memory.machine", the_machine_is_not_ours_to_know);

/// core 2.2.
fn the_machine_to_physical_table() {
    let map = hypercall::machphys_mapping().expect("there is a table");
    assert_eq!(map.v_start, 0xffff_8000_0000_0000);
    assert!(map.v_end > map.v_start && map.v_end <= 0xffff_8040_0000_0000);
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    assert!(frame <= map.max_mfn);
    assert_eq!(m2p(frame), page.first());
}
test!("memory.machphys", the_machine_to_physical_table);

fn the_memory_map() {
    let mut entries = [E820Entry { address: 0, size: 0, kind: 0 }; 128];
    match hypercall::memory_map(&mut entries) {
        // Where there is none, a guest assumes RAM from 0 (core 4.10); the first domain of Xen has none.
        Err(e) => assert_eq!(e, Errno::NoSys),
        Ok(count) => {
            let count = usize::try_from(count).expect("a small number");
            assert!(count > 0 && count <= entries.len());
            let first = entries[0];
            assert_eq!((first.address, first.kind), (0, E820_RAM));
            let size = first.size;
            assert!(size >= pages_now() * PAGE, "room for all pages without a hole");
        }
    }
}
test!("memory.map", the_memory_map);

/// core 4.10: a page goes, its frame's table entry says so, and another frame comes for it.
fn a_page_goes_and_comes() {
    let window = Window::reserve(1).expect("there is room");
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let before = pages_now();
    update_va_mapping(page.address(), 0, 2).expect("the page is unmapped");
    let mut extents = [frame];
    assert_eq!(reservation(MemoryOp::DecreaseReservation, &mut extents), Ok(1));
    assert_eq!(pages_now(), before - 1);
    assert_eq!(m2p(frame), NOT_A_PAGE, "the frame is nobody's page (pitfall 50)");
    assert_eq!(reservation(MemoryOp::DecreaseReservation, &mut [frame]), Ok(0), "it is not ours any more");

    let mut extents = [page.first()];
    assert_eq!(reservation(MemoryOp::PopulatePhysmap, &mut extents), Ok(1));
    let new = extents[0];
    assert_eq!(m2p(new), page.first());
    assert_eq!(pages_now(), before);
    update_va_mapping(window.address(), (new * PAGE) | LEAF, 2).expect("the frame is ours");
    probe::write(window.address(), 5).expect("it is memory");
    update_va_mapping(window.address(), 0, 2).expect("it is unmapped");
    update_va_mapping(page.address(), (new * PAGE) | LEAF, 2).expect("it takes the page's place");
    assert_eq!(probe::read(page.address()), Ok(5));
    // Our own page list still names the old frame, so the page is not used again.
    let _ = page.leak();
}
test!("memory.balloon", a_page_goes_and_comes);

/// Gives `count` pages back, so that a domain at its limit may take as many.
fn make_room(count: u64) {
    let pages = Pages::allocate(count).expect("pages are free");
    for i in 0..count {
        let frame = pages.frame(i).expect("the page is ours");
        update_va_mapping(pages.address() + i * PAGE, 0, 2).expect("the page is unmapped");
        assert_eq!(reservation(MemoryOp::DecreaseReservation, &mut [frame]), Ok(1));
    }
    let _ = pages.leak();
}

/// P10: a frame that comes shows nothing of whoever had it before.
fn a_frame_comes_without_a_past() {
    make_room(8);
    let mut extents = [0u64; 8];
    assert_eq!(reservation(MemoryOp::IncreaseReservation, &mut extents), Ok(8));
    for frame in extents {
        let window = Window::map(&[frame], domid::SELF, true).expect("the frame is ours");
        for at in (0..PAGE).step_by(8) {
            assert_eq!(probe::read(window.address() + at), Ok(0), "frame {frame:#x} at {at:#x}");
        }
        probe::write(window.address(), 0x5ec4e7).expect("it is memory");
    }
    assert_eq!(reservation(MemoryOp::DecreaseReservation, &mut extents), Ok(8));
}
test!("memory.zeroed", a_frame_comes_without_a_past);

/// core 4.10: a frame that is still mapped stays until the last mapping goes, and counts as long. A guest that mapped what it
/// got and gave it back at once held nearly all memory of the machine, and its count never moved.
fn a_mapped_frame_stays_usable() {
    make_room(16);
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let window = Window::reserve(1).expect("there is room");
    update_va_mapping(window.address(), (frame * PAGE) | LEAF, 2).expect("a page is mapped");
    update_va_mapping(page.address(), 0, 2).expect("the page is unmapped");
    let before = pages_now();
    assert_eq!(reservation(MemoryOp::DecreaseReservation, &mut [frame]), Ok(1));
    assert_eq!(pages_now(), before, "it is still ours");
    probe::write(window.address(), 9).expect("it is still mapped");
    // Whoever gets frames now does not get this one.
    let mut extents = [0u64; 16];
    assert_eq!(reservation(MemoryOp::IncreaseReservation, &mut extents), Ok(16));
    assert!(!extents.contains(&frame));
    assert_eq!(probe::read(window.address()), Ok(9));
    assert_eq!(reservation(MemoryOp::DecreaseReservation, &mut extents), Ok(16));
    update_va_mapping(window.address(), 0, 2).expect("it is unmapped");
    assert_eq!(pages_now(), before - 1);
    let _ = page.leak();
}
test!("memory.mapped", a_mapped_frame_stays_usable);

/// core 4.10: bad extents are counted, not failed; bad arguments count as nothing done.
fn counts_instead_of_errors() {
    let good = Pages::allocate(1).expect("a page is free");
    let frame = good.frame(0).expect("the page is ours");
    update_va_mapping(good.address(), 0, 2).expect("the page is unmapped");
    let mut extents = [frame, 0x000f_ffff_ffff, frame];
    assert_eq!(reservation(MemoryOp::DecreaseReservation, &mut extents), Ok(1), "up to the bad one");
    let _ = good.leak();
    assert_eq!(reservation(MemoryOp::DecreaseReservation, &mut []), Ok(0));
    let arg =
        Reservation { extent_start: 0x1234_5678_9000, nr_extents: 4, domid: domid::SELF, ..Reservation::default() };
    let run =
        |command: MemoryOp, arg: &Reservation| call(Hypercall::MemoryOp, [command.number(), address(arg), 0, 0, 0]);
    assert_eq!(run(MemoryOp::DecreaseReservation, &arg), Ok(0), "the list cannot be read");
    assert_eq!(run(MemoryOp::PopulatePhysmap, &arg), Ok(0), "the list cannot be read");
    let nobody = Reservation { domid: 0x7123, ..arg };
    let result = run(MemoryOp::DecreaseReservation, &nobody);
    assert!(matches!(result, Ok(0) | Err(Errno::Srch | Errno::Perm)), "{result:?}");
    // The command's upper bits say where to start: at the end there is nothing to do.
    let arg = Reservation { extent_start: probe::address_mut(&mut extents), nr_extents: 3, ..arg };
    let from_the_end = MemoryOp::DecreaseReservation.number() | 3 << COMMAND_BITS;
    assert_eq!(call(Hypercall::MemoryOp, [from_the_end, address(&arg), 0, 0, 0]), Ok(3));
    assert_eq!(call(Hypercall::MemoryOp, [63, 0, 0, 0, 0]), Err(Errno::NoSys));
}
test!("memory.counts", counts_instead_of_errors);

/// core 4.1: a table that is given back keeps its type until its last reference goes.
fn a_pinned_table_is_given_back() {
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let alias = Window::reserve(1).expect("there is room");
    page.set_writable(0, false).expect("a page can be made read-only");
    guests::tables::pin(1, frame).expect("an empty page is a table");
    update_va_mapping(alias.address(), (frame * PAGE) | READ_ONLY, 2).expect("a table may be seen");
    update_va_mapping(page.address(), 0, 2).expect("the page is unmapped");
    let given = reservation(MemoryOp::DecreaseReservation, &mut [frame]);
    assert!(matches!(given, Ok(0 | 1)), "{given:?}");
    assert_eq!(probe::read(alias.address()), Ok(0), "it is still there to be seen");
    assert!(update_va_mapping(alias.address(), (frame * PAGE) | LEAF, 2).is_err(), "and not to be written");
    let _ = probe::mmuext(guests::abi::mmu::MmuextCommand::Unpin, frame, 0);
    update_va_mapping(alias.address(), 0, 2).expect("it is unmapped");
    let _ = page.leak();
}
test!("memory.table", a_pinned_table_is_given_back);
