//! A domain's memory as it is given: runs first, single pages then, and what is told when memory ends.

use std::cell::RefCell;

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::Errno;
use toolstack::runs::{RUN_ORDER, populate};

const RUN: usize = 1 << RUN_ORDER;

/// What was given, the frames, and the calls: page and count.
type Given = (Result<usize, Errno>, Vec<u64>, Vec<(u64, usize)>);

/// Gives 1,300 pages on a machine with `runs` runs and `single` other frames.
fn given(runs: u64, single: usize) -> Given {
    let mut frames = vec![MachineFrame(0); 1300];
    let (calls, left) = (RefCell::new(Vec::new()), RefCell::new((runs, single)));
    let run = |page| {
        let runs = &mut left.borrow_mut().0;
        calls.borrow_mut().push((page, RUN));
        *runs = match runs.checked_sub(1) {
            Some(rest) => rest,
            None => return Ok(None),
        };
        Ok(Some(0x1_0000 * (1 + *runs)))
    };
    let pages = |page, numbers: &mut [u64]| {
        let single = &mut left.borrow_mut().1;
        calls.borrow_mut().push((page, numbers.len()));
        let count = numbers.len().min(*single);
        *single -= count;
        numbers.iter_mut().take(count).for_each(|number| *number = 7);
        if count == 0 { Err(Errno::NoMem) } else { Ok(count) }
    };
    let done = populate(Pfn(100), &mut frames, run, pages);
    (done, frames.iter().map(|frame| frame.0).collect(), calls.into_inner())
}

#[test]
fn runs_are_given_first_and_pages_where_there_are_none() {
    let (done, frames, calls) = given(1, 10_000);
    assert_eq!(done, Ok(1300));
    assert_eq!((frames[0], frames[511], frames[512], frames[1299]), (0x1_0000, 0x1_0000 + 511, 7, 7));
    assert_eq!(calls, [(100, 512), (612, 512), (612, 512), (1124, 276)]);
}

#[test]
fn memory_that_ends_is_told_by_the_count() {
    let (done, frames, _) = given(2, 100);
    assert_eq!((done, frames[1123], frames[1124]), (Ok(1124), 7, 0));
    let (done, ..) = given(2, 0);
    assert_eq!(done, Err(Errno::NoMem));
}
