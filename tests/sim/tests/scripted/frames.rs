//! Frames: who owns them, and until when.

use super::{Bench, FRAMES, RAM, RO, RW, THEM, US, entry_at, refused, until_done};
use hv_core::addr::Frame;
use hv_core::frame::table::{NO_PFN, WORDS};
use hv_core::frame::{FrameTable, Refused};
use hv_core::paging::Stop;
use sim::machine::SimMachine;
use std::sync::atomic::AtomicU64;

#[test]
fn frames_given_back_stay_until_nobody_uses_them() {
    let b = Bench::new();
    let (l1, page) = (b.page(), b.page());
    let free = b.table.free_frames();
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), page.address() | RW, US)), Ok(()));
    assert_eq!(b.does(|s| s.mmu_update(page.address() | 1, 99, US)), Ok(()));
    assert_eq!(b.m.m2p(page), 99);
    assert_eq!(b.table.give_back(&b.m, page, THEM), Err(Refused::NotOwner));
    assert_eq!(b.table.give_back(&b.m, page, US), Ok(()));
    assert_eq!(b.table.give_back(&b.m, page, US), Err(Refused::NotOwner), "only once");
    assert_eq!((b.m.m2p(page), b.table.owned(US), b.table.free_frames()), (NO_PFN, 2, free));
    assert_eq!(b.does(|s| s.mmu_update(page.address() | 1, 99, US)), refused(Refused::NotOwner));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), 0, US)), Ok(()));
    assert_eq!((b.table.owned(US), b.table.free_frames()), (1, free + 1));
    assert_eq!(b.table.give_back(&b.m, Frame::from_u32(RAM), US), Err(Refused::NoSuchFrame));
    assert_eq!(b.table.give_back(&b.m, Frame::from_u32(FRAMES), US), Err(Refused::NoSuchFrame));
}

#[test]
fn a_dying_domain_gives_everything_back_in_steps() {
    let b = Bench::new();
    let free = b.table.free_frames();
    let [root, ..] = b.tree();
    let [second, ..] = b.tree();
    let [third, ..] = b.tree();
    assert_eq!(b.does(|s| s.pin(root, 4)), Ok(()));
    assert_eq!(b.does(|s| s.switch_root(None, Some(second), || {})), Ok(()));
    assert_eq!(b.with(700, |s| s.pin(third, 4)), Err(Stop::More));
    b.with(1, |s| s.drop_root(second)); // while the climb is under way
    let (calls, outcome) = until_done(&b, 100, |s| s.tear_down());
    assert_eq!(outcome, Ok(()));
    assert!(calls > 27, "unfinished work of 2,700 entries is left in bounded steps: {calls}");
    assert_eq!((b.table.free_frames(), b.table.owned(US)), (free, 0));
    assert_eq!(b.does(|s| s.unpin(root)), refused(Refused::Dying));
}

#[test]
fn lent_frames_are_mapped_but_never_tables() {
    let b = Bench::new();
    let l1 = b.page();
    assert_eq!(b.table.lend(&b.m, US), Err(Refused::NoMemory), "nothing is set aside");
    assert_eq!(b.table.promise(US, 1), Ok(()));
    let lent = b.table.lend(&b.m, US).unwrap();
    let free = b.table.free_frames();
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), lent.address() | RW, US)), Ok(()));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 1), lent.address() | RO, US)), Ok(()));
    assert_eq!(b.does(|s| s.pin(lent, 1)), refused(Refused::WrongType));
    assert_eq!(b.table.give_back(&b.m, lent, US), Err(Refused::NotOwner));
    assert_eq!(b.does(|s| s.mmu_update(lent.address() | 1, 5, US)), refused(Refused::NotOwner));
    b.table.retire(lent);
    assert_eq!(b.table.free_frames(), free, "still mapped");
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 2), lent.address() | RO, US)), refused(Refused::NotOwner));
    assert_eq!(b.does(|s| s.unpin(l1)), Ok(()));
    assert_eq!(b.table.free_frames(), free + 1);
}

#[test]
fn runs_of_frames_are_aligned_and_leave_the_lists_whole() {
    let b = Bench::new();
    let free = b.table.free_frames();
    let run = |order, pfn| b.table.populate(&b.m, US, order, pfn, u64::MAX);
    let eight = run(3, NO_PFN).unwrap();
    assert!(eight.index().is_multiple_of(8));
    assert_eq!(b.table.free_frames(), free - 8);
    let mine = run(4, 100).unwrap();
    assert!(mine.index().is_multiple_of(16));
    assert_eq!((b.m.m2p(mine), b.m.m2p(Frame::from_u32(mine.as_u32() + 15))), (100, 115));
    assert_eq!([run(7, NO_PFN), run(10, NO_PFN), run(32, NO_PFN)], [Err(Refused::NoMemory); 3]);
    let rest: Vec<Frame> = std::iter::from_fn(|| b.table.allocate(&b.m).ok()).collect();
    assert_eq!(rest.len(), free as usize - 24);
    assert!(rest.iter().all(|f| !(eight.index()..eight.index() + 8).contains(&f.index())));
    assert_eq!(run(0, 0), Err(Refused::NoMemory));
    assert_eq!(b.table.owned(US), 24, "what was not given does not count");
    rest.iter().for_each(|f| b.table.retire(*f));
    (0..8).for_each(|n| assert_eq!(b.table.give_back(&b.m, Frame::from_u32(eight.as_u32() + n), US), Ok(())));
    assert_eq!((b.table.free_frames(), b.table.owned(US)), (free - 16, 16));
    (0..16).for_each(|n| assert_eq!(b.table.give_back(&b.m, Frame::from_u32(mine.as_u32() + n), US), Ok(())));
    assert_eq!(run(6, NO_PFN).map(Frame::index), Ok(0), "halves that are both free are one again");
}

#[test]
fn what_is_set_aside_is_for_one_domain() {
    let b = Bench::new();
    assert_eq!(b.table.promise(US, RAM + 1), Err(Refused::NoMemory));
    assert_eq!(b.table.promise(US, 10), Ok(()));
    assert_eq!(b.table.promise(THEM, RAM - 9), Err(Refused::NoMemory), "ten are promised");
    while b.table.populate(&b.m, THEM, 0, 7, u64::MAX).is_ok() {}
    assert_eq!((b.table.owned(THEM), b.table.unpromised_frames(), b.table.free_frames()), (RAM - 10, 0, 10));
    assert_eq!((b.table.allocate(&b.m), b.table.lend(&b.m, THEM)), (Err(Refused::NoMemory), Err(Refused::NoMemory)));
    for _ in 0..5 {
        assert!(b.table.lend(&b.m, US).is_ok() && b.table.allocate_for(&b.m, US).is_ok());
    }
    assert_eq!((b.table.lend(&b.m, US), b.table.free_frames()), (Err(Refused::NoMemory), 0));
}

#[test]
fn a_frame_counts_until_its_last_reference_goes() {
    let b = Bench::new();
    let [table, page] = [b.page(), b.page()];
    b.put(table, 0, page.address() | RW);
    assert_eq!(b.does(|s| s.pin(table, 1)), Ok(()));
    assert_eq!(b.table.give_back(&b.m, page, US), Ok(()));
    assert_eq!((b.table.owned(US), b.table.populate(&b.m, US, 0, 7, 2)), (2, Err(Refused::OverLimit)));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(table, 0), 0, US)), Ok(()));
    assert_eq!(b.table.owned(US), 1);
    assert!(b.table.populate(&b.m, US, 0, 7, 2).is_ok());
}

#[test]
fn pages_are_cleared_and_copied_where_that_is_allowed() {
    let b = Bench::new();
    let (from, to, table, theirs) = (b.page(), b.page(), b.page(), b.theirs());
    b.put(from, 8, 5);
    assert_eq!(b.does(|s| s.pin(table, 1)), Ok(()));
    assert_eq!(b.does(|s| s.copy_page(from, to, US)), Ok(()));
    assert_eq!(b.at(to, 8), 5);
    assert_eq!(b.does(|s| s.copy_page(table, to, US)), Ok(()), "tables may be read");
    assert_eq!(b.does(|s| s.copy_page(from, table, US)), refused(Refused::WrongType));
    assert_eq!(b.does(|s| s.clear_page(table, US)), refused(Refused::WrongType));
    assert_eq!(b.does(|s| s.clear_page(theirs, US)), refused(Refused::NotOwner));
    assert_eq!(b.does(|s| s.clear_page(theirs, THEM)), Ok(()), "whose frames is the caller's to judge");
    assert_eq!(b.does(|s| s.clear_page(from, US)), Ok(()));
    assert_eq!(b.at(from, 8), 0);
}

#[test]
fn frames_are_added_once_and_lie_in_blocks_as_large_as_can_be() {
    let table = Box::new(FrameTable::new());
    let words: Vec<AtomicU64> = (0..FRAMES as usize * WORDS).map(|_| AtomicU64::new(0)).collect();
    table.init(words.leak());
    let m = SimMachine::new(RAM as usize);
    // Pieces that meet inside a block, one of them twice, and one that takes in a frame that has become somebody's.
    table.add(Frame::from_u32(8), 5);
    table.add(Frame::from_u32(8), 5);
    let taken = table.populate(&m, US, 0, 7, 1).expect("memory");
    assert_eq!((taken, table.free_frames()), (Frame::from_u32(12), 4));
    table.add(Frame::from_u32(5), 27);
    assert_eq!(table.free_frames(), 26);
    assert_eq!(table.owned(US), 1);
    // 16 to 31, 8 to 11, and 5, 6, 7, 13, 14, 15 beside them.
    for (order, first) in [(4, 16), (2, 8), (1, 14), (1, 6), (0, 13), (0, 5)] {
        let block = table.populate(&m, THEM, order, 7, u64::MAX);
        assert_eq!(block, Ok(Frame::from_u32(first)), "order {order}");
    }
    assert_eq!(table.free_frames(), 0);
}
