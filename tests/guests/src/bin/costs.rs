//! What grants cost: pins of many pages in a batch, and copies, between this guest and itself. For `cargo xtask bench io`,
//! which counts the instructions of ring 0 in each window.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::domid;
use guests::abi::grant::{Entry, entry};
use guests::memory::{self, Pages, Window};
use guests::{hypercall, own_number, probe};
use unikernel::boot::Boot;
use unikernel::grants::{self, Grant, PageCopy};
use unikernel::mark::{self, COPY_ODD, COPY_PAGE, COPY_SMALL, PIN};
use unikernel::println;

unikernel::entry!(main);

/// Pages of a batch.
const PAGES: u32 = 32;
/// References before these are the store's and the console's.
const FIRST: u32 = 8;
/// Copies bytes of a frame of ours to the page of the first reference.
fn copy<const WINDOW: u16>(own: u16, frame: u64, offset: u16, bytes: u16) {
    let one = PageCopy { domain: own, reference: FIRST, offset, frame, frame_offset: offset, bytes, into_ours: false };
    let copies = [one; PAGES as usize];
    for _ in 0..2 {
        // What is measured is the second time: pages are known by then.
        mark::begin::<WINDOW>();
        grants::copy(copies.into_iter(), |_, done| assert!(done, "it is granted"));
        mark::end::<WINDOW>();
    }
}

fn main(_: &Boot) {
    let own = own_number();
    let mut frames = [0];
    hypercall::setup_grant_table(&mut frames).expect("there is a table");
    let table = Window::map(&frames, domid::SELF, true).expect("the table is shown to its owner");
    let pages = Pages::allocate(PAGES.into()).expect("pages are free");
    for n in 0..PAGES {
        let frame = memory::frame_of_page(pages.first() + u64::from(n)).expect("the page is ours");
        let granted = Entry { flags: entry::PERMIT_ACCESS, domid: own, frame: u32::try_from(frame).expect("32 bits") };
        probe::store_bytes(table.address() + u64::from(8 * (FIRST + n)), zerocopy::IntoBytes::as_bytes(&granted));
    }
    let list: [Grant; PAGES as usize] = core::array::from_fn(|n| Grant {
        domain: own,
        reference: FIRST + u32::try_from(n).unwrap_or(0),
        writable: true,
    });
    let mut pins = [0; PAGES as usize];
    for _ in 0..2 {
        mark::begin::<PIN>();
        grants::pin(list.into_iter(), |place, answer| {
            (pins[place], _) = answer.expect("it is granted");
        });
        grants::unpin(pins.into_iter());
        mark::end::<PIN>();
    }
    let from = pages.frame(1).expect("the page is ours");
    copy::<COPY_ODD>(own, from, 1, 4000);
    copy::<COPY_PAGE>(own, from, 0, 4096);
    copy::<COPY_SMALL>(own, from, 8, 8);
    println!("costs: all measured");
}
