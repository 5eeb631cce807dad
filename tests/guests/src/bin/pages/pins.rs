//! Types, pins and what holds a table (core 4.1, 4.6).

use guests::abi::mmu::{MmuextCommand, pte};
use guests::memory::{Pages, Window};
use guests::probe::{mmuext, update_va_mapping};
use guests::tables::{BRANCH, Chain, LEAF, READ_ONLY, pin};
use guests::{Errno, events, probe, test};

fn every_level_can_be_pinned() {
    let chain = Chain::new();
    for level in 1..=4 {
        assert_eq!(chain.pin(level), Err(Errno::Inval), "level {level} is still writable");
    }
    chain.protect(4);
    for level in 1..=4 {
        chain.pin(level).unwrap_or_else(|e| panic!("pin level {level}: {e:?}"));
        assert_eq!(chain.pin(level), Err(Errno::Inval), "level {level} is pinned already");
        for table in 1..=level {
            assert!(chain.set_writable(table, true).is_err(), "level {table} is a table");
        }
        chain.unpin(level).unwrap_or_else(|e| panic!("unpin level {level}: {e:?}"));
        assert_eq!(chain.unpin(level), Err(Errno::Inval), "level {level} is not pinned");
        // At once, not later (pitfall 7).
        chain.unprotect(4);
        chain.protect(4);
    }
    chain.unprotect(4);
}
test!("pins.levels", every_level_can_be_pinned);

fn pins_of_inner_tables_outlive_the_outer() {
    let chain = Chain::new();
    chain.protect(4);
    for level in 1..=4 {
        chain.pin(level).expect("a table can be pinned");
    }
    for level in (1..=4).rev() {
        chain.unpin(level).expect("a pinned table can be unpinned");
        chain.set_writable(level, true).expect("nothing else holds it");
        for inner in 1..level {
            assert!(chain.set_writable(inner, true).is_err(), "level {inner} is pinned by itself");
        }
    }
}
test!("pins.nested", pins_of_inner_tables_outlive_the_outer);

fn a_table_has_one_type() {
    let chain = Chain::new();
    chain.protect(4);
    chain.pin(1).expect("an L1 can be pinned");
    for level in 2..=4 {
        assert_eq!(pin(level, chain.frame(1)), Err(Errno::Inval), "an L1 as level {level}");
    }
    // An L3 that leads to an L1 is refused, and leaves nothing behind.
    chain.set_writable(3, true).expect("the L3 is no table");
    chain.poke(3, 0, chain.entry(1, BRANCH));
    chain.set_writable(3, false).expect("a page can be made read-only");
    assert_eq!(chain.pin(3), Err(Errno::Inval));
    chain.unpin(1).expect("the L1 is pinned");
    chain.unprotect(4);
}
test!("pins.types", a_table_has_one_type);

/// core 4.1 rule 5: what a refused validation took is given back, whichever entry was bad.
fn a_refused_table_leaves_no_trace() {
    let chain = Chain::new();
    chain.protect(1);
    let bad = chain.page_entry(0, LEAF) | 1 << 51;
    for index in [1, 100, 511] {
        chain.set_writable(1, true).expect("the L1 is no table");
        chain.poke(1, 1, chain.page_entry(0, READ_ONLY));
        chain.poke(1, index, bad);
        chain.set_writable(1, false).expect("a page can be made read-only");
        chain.protect(4);
        for level in 1..=4 {
            assert!(chain.pin(level).is_err(), "level {level} over a bad entry {index}");
        }
        chain.unprotect(4);
        chain.poke(1, index, 0);
    }
    // The page the good entries led to is free for any type: make it a table.
    chain.poke(1, 0, 0);
    chain.poke(1, 1, 0);
    let pages = Pages::allocate(1).expect("a page is free");
    pages.set_writable(0, false).expect("a page can be made read-only");
    for level in 1..=4 {
        let frame = pages.frame(0).expect("the page is ours");
        pin(level, frame).expect("an empty page is a table of any level");
        mmuext(MmuextCommand::Unpin, frame, 0).expect("it is pinned");
    }
    pages.set_writable(0, true).expect("the page is free");
}
test!("pins.refused", a_refused_table_leaves_no_trace);

fn only_own_frames_can_be_pinned() {
    let shared =
        probe::read(guests::memory::entry_address(events::shared_page().addr() as u64, 1).expect("it is mapped"))
            .expect("readable");
    let shared = (shared & pte::FRAME) >> 12;
    for level in 1..=4 {
        for frame in [shared, 0x000f_ffff_ffff, u64::MAX] {
            assert_eq!(pin(level, frame), Err(Errno::Inval), "frame {frame:#x}");
        }
    }
}
test!("pins.not-own", only_own_frames_can_be_pinned);

/// P1: no frame is at once a table and writable, through whichever mapping.
fn a_second_writable_mapping_prevents_a_table() {
    let chain = Chain::new();
    chain.protect(1);
    let window = Window::reserve(2).expect("there is room");
    let map = |flags| update_va_mapping(window.address(), chain.entry(1, flags), 2);
    map(LEAF).expect("an ordinary page can be mapped twice");
    assert_eq!(chain.pin(1), Err(Errno::Inval), "the second mapping writes");
    map(READ_ONLY).expect("it can be made read-only");
    chain.pin(1).expect("nobody writes it");
    assert!(map(LEAF).is_err(), "a table gets no writable mapping");
    assert_eq!(probe::read(window.address()), Ok(chain.peek(1, 0)), "the old mapping stands");
    // Read-only mappings are as many as one likes.
    let more = window.address() + 4096;
    update_va_mapping(more, chain.entry(1, READ_ONLY), 2).expect("read-only is allowed");
    update_va_mapping(more, 0, 2).expect("nothing is mapped");
    chain.unpin(1).expect("it is pinned");
    map(LEAF).expect("it is an ordinary page again");
    update_va_mapping(window.address(), 0, 2).expect("nothing is mapped");
    chain.unprotect(1);
}
test!("pins.writable-alias", a_second_writable_mapping_prevents_a_table);

/// core 4.1: one L1 may hang in two L2s; it is a table until the last reference is gone.
fn a_shared_table_lives_as_long_as_its_last_reference() {
    let chain = Chain::new();
    chain.poke(2, 7, chain.entry(1, BRANCH));
    chain.protect(2);
    chain.pin(2).expect("an L2 may lead twice to one L1");
    chain.update(2, 0, 0).expect("an entry can be removed");
    assert!(chain.set_writable(1, true).is_err(), "one reference is left");
    chain.update(2, 7, 0).expect("an entry can be removed");
    chain.set_writable(1, true).expect("none is left");
    chain.unpin(2).expect("it is pinned");
    chain.unprotect(2);
}
test!("pins.shared", a_shared_table_lives_as_long_as_its_last_reference);
