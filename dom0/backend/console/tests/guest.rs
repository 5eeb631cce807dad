//! A console against guests that behave, flood, do not read, and lie.

use console_backend::{AttachError, BUDGET, Console, TYPED_MAX};
use ring_protocol::console::{FrontEnd, is_connected, set_connected};
use ring_protocol::{SharedPage, WordPage};
use test_random::Random;

const KEPT: usize = 8192;

fn new_console(page: &WordPage) -> (FrontEnd, Console) {
    (FrontEnd::attach(page).unwrap(), Console::attach(page, KEPT).unwrap())
}

#[test]
fn bytes_pass_unchanged_both_ways() {
    let page: WordPage = WordPage::new();
    let (mut guest, mut console) = new_console(&page);
    assert!(is_connected(&page));
    guest.output.write(&page, b"\x1b[1mlogin:\x00\xff").unwrap();
    assert_eq!(console.type_in(b"root\r"), 5);
    let mut shown = Vec::new();
    let served = console.serve(&page, BUDGET, |bytes| shown.extend_from_slice(bytes)).unwrap();
    assert_eq!((served.notify, served.again, served.taken), (true, false, 12));
    assert_eq!(shown, b"\x1b[1mlogin:\x00\xff");
    let mut typed = [0; 16];
    assert_eq!(guest.input.read(&page, &mut typed), Ok(5));
    assert_eq!(&typed[..5], b"root\r");
}

#[test]
fn a_console_without_memory_leaves_the_page_unconnected() {
    let page: WordPage = WordPage::new();
    set_connected(&page, false);
    // No allocator can give this much.
    assert_eq!(Console::attach(&page, usize::MAX).err(), Some(AttachError::NoMemory));
    assert!(!is_connected(&page), "no back end serves this page");
}

#[test]
fn nobody_is_notified_for_nothing() {
    let page: WordPage = WordPage::new();
    let (_, mut console) = new_console(&page);
    let served = console.serve(&page, BUDGET, |_| panic!("no bytes")).unwrap();
    assert!(!served.notify);
}

#[test]
fn a_budget_bounds_a_visit_and_more_is_announced() {
    let page: WordPage = WordPage::new();
    let (mut guest, mut console) = new_console(&page);
    assert_eq!(guest.output.write(&page, &[b'x'; 3000]), Ok(2048));
    let served = console.serve(&page, 700, |_| {}).unwrap();
    assert_eq!((served.taken, served.again), (700, true));
    let served = console.serve(&page, BUDGET, |_| {}).unwrap();
    assert_eq!((served.taken, served.again), (1348, false));
}

#[test]
fn a_flood_is_drained_and_only_its_end_kept() {
    let page: WordPage = WordPage::new();
    let (mut guest, mut console) = new_console(&page);
    let mut printed = 0u64;
    for round in 0..2000u32 {
        let chunk = [round.to_le_bytes()[0]; 2048];
        printed += u64::try_from(guest.output.write(&page, &chunk).unwrap()).unwrap();
        let served = console.serve(&page, BUDGET, |_| {}).unwrap();
        assert_eq!(served.taken, 2048, "a guest is never held up");
    }
    assert_eq!(console.scrollback().end(), printed);
    let since = console.scrollback().since(0);
    assert_eq!(since.first.len() + since.second.len(), KEPT);
    assert_eq!(since.missed, printed - u64::try_from(KEPT).unwrap());
}

#[test]
fn a_guest_that_does_not_read_loses_only_keystrokes() {
    let page: WordPage = WordPage::new();
    let (mut guest, mut console) = new_console(&page);
    let mut taken = 0;
    for _ in 0..100 {
        taken += console.type_in(&[b'k'; 100]);
        let _ = console.serve(&page, BUDGET, |_| {}).unwrap();
    }
    assert_eq!(taken, 1024 + TYPED_MAX);
    let mut read = 0;
    let mut buffer = [0; 1024];
    loop {
        let count = guest.input.read(&page, &mut buffer).unwrap();
        if count == 0 {
            break;
        }
        read += count;
        let _ = console.serve(&page, BUDGET, |_| {}).unwrap();
    }
    assert_eq!(read, taken, "what was accepted arrives");
}

#[test]
fn a_lying_guest_is_left_alone() {
    for (offset, value) in [(3084, 2049), (3084, u32::MAX), (3072, 1), (3072, 0x8000_0000)] {
        let page: WordPage = WordPage::new();
        let (_, mut console) = new_console(&page);
        page.store_u32(offset, value);
        let why = console.serve(&page, BUDGET, |_| {}).unwrap_err();
        assert_eq!(console.stopped(), Some(why));
        assert!(!is_connected(&page));
        page.store_u32(offset, 0);
        assert!(console.serve(&page, BUDGET, |_| {}).is_err(), "for good");
        assert_eq!(console.type_in(b"x"), 1);
    }
}

#[test]
fn random_indices_never_panic() {
    let mut random = Random::new();
    let mut next = || u32::try_from(random.next() >> 32).unwrap();
    for _ in 0..20_000 {
        let page: WordPage = WordPage::new();
        let base = next();
        for offset in [3072, 3076, 3080, 3084] {
            page.store_u32(offset, base);
        }
        let mut console = Console::attach(&page, 64).unwrap();
        for _ in 0..4 {
            let offset = 3072 + 4 * usize::try_from(next() % 4).unwrap();
            let value = if next() % 2 == 0 { next() } else { base.wrapping_add(next() % 4096) };
            page.store_u32(offset, value);
            console.type_in(&[1; 40]);
            if let Ok(served) = console.serve(&page, BUDGET, |_| {}) {
                assert!(served.taken <= BUDGET);
            }
        }
    }
}

#[test]
fn a_guest_made_anew_keeps_what_it_printed_and_loses_what_was_typed() {
    let page: WordPage = WordPage::new();
    let (mut guest, mut console) = new_console(&page);
    guest.output.write(&page, b"first life").unwrap();
    let _ = console.serve(&page, BUDGET, |_| {}).unwrap();
    console.type_in(b"too late");
    let page: WordPage = WordPage::new();
    let mut guest = FrontEnd::attach(&page).unwrap();
    console.reattach(&page).unwrap();
    guest.output.write(&page, b", second").unwrap();
    let served = console.serve(&page, BUDGET, |_| {}).unwrap();
    assert_eq!((served.taken, guest.input.available(&page)), (8, Ok(0)));
    let since = console.scrollback().since(0);
    assert_eq!([since.first, since.second].concat(), b"first life, second");
}
