//! Memory in large folios, which are split, shared, moved and given back in parts: what it holds is checked.

use crate::linux::{self, Map, PAGE};

/// Maps that each process takes through everything, one after the other.
const ROUNDS: u64 = 4;
/// Pages that a folio has; all below are multiples.
const FOLIO: usize = 16;
/// Pages of the map of a round.
const PAGES: usize = 64 * FOLIO;
/// Maps that a process fills and then gives back but for a page of each folio: the four together fill 384 MiB and keep
/// 24 MiB, so that a smaller guest must split folios to go on.
const HELD: usize = 24;

const DONTNEED: usize = 4;
const FREE: usize = 8;
const COLD: usize = 20;

/// Runs four processes.
pub(crate) fn run() {
    let children = [1_u64, 2, 3, 4].map(|number| {
        linux::fork(|| {
            (0..ROUNDS).for_each(|round| change(number << 32 | round << 16));
            hold(number << 32);
        })
    });
    children.into_iter().for_each(linux::wait);
}

/// Interrupts the CPUs of three processes that run all the time.
pub(crate) fn interrupt() {
    const BARRIERS: u32 = 50;
    let this = linux::getpid();
    for _ in 0..3 {
        linux::fork(|| {
            linux::take_barriers();
            // Until the parent has ended.
            while linux::parent() == this {}
        });
    }
    linux::sleep(1, 0);
    (0..BARRIERS).for_each(|_| linux::barrier());
}

/// What a page holds, by a salt.
fn word(page: usize, salt: u64) -> u64 {
    (page as u64 + 1 + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Writes those of a map's pages that `which` chooses by their place in a folio.
fn fill(map: &Map, salt: u64, which: impl Fn(usize) -> bool) {
    (0..PAGES).filter(|page| which(page % FOLIO)).for_each(|page| map.set(page, word(page, salt)));
}

/// Checks what those pages hold that `salt` gives a salt.
#[track_caller]
fn check(map: &Map, salt: impl Fn(usize) -> Option<u64>) {
    for page in 0..PAGES {
        if let Some(salt) = salt(page % FOLIO) {
            assert_eq!(map.get(page), word(page, salt), "page {page} is wrong");
        }
    }
}

/// Does something with the same pages of each folio.
fn each(pages: core::ops::Range<usize>, work: impl Fn(core::ops::Range<usize>)) {
    (0..PAGES).step_by(FOLIO).for_each(|first| work(first + pages.start..first + pages.end));
}

/// A map through all that can happen to its folios.
fn change(salt: u64) {
    let map = Map::with_folios(PAGES * PAGE);
    fill(&map, salt, |_| true);
    check(&map, |_| Some(salt));
    // Parent and child write to pages that they share.
    let child = linux::fork(|| {
        fill(&map, salt + 1, |place| place % 2 == 1);
        check(&map, |place| Some(salt + place as u64 % 2));
    });
    let after = |place: usize| salt + 2 * u64::from(place.is_multiple_of(3));
    fill(&map, salt + 2, |place| place.is_multiple_of(3));
    check(&map, |place| Some(after(place)));
    linux::wait(child);
    check(&map, |place| Some(after(place)));
    // Parts of a folio that are cold split it.
    each(2..4, |pages| map.advise(pages, COLD));
    check(&map, |place| Some(after(place)));
    each(5..9, |pages| map.advise(pages, DONTNEED));
    each(5..9, |pages| pages.for_each(|page| assert_eq!(map.get(page), 0, "page {page} was given back")));
    each(10..12, |pages| map.advise(pages, FREE));
    each(10..12, |pages| {
        for page in pages {
            let held = map.get(page);
            assert!(held == 0 || held == word(page, after(page % FOLIO)), "page {page} is neither kept nor empty");
        }
    });
    map.protect(false);
    let kept = |place: usize| (!(5..9).contains(&place) && !(10..14).contains(&place)).then(|| after(place));
    check(&map, kept);
    map.protect(true);
    each(12..14, |pages| map.unmap(pages));
    check(&map, kept);
    drop(map);
    let map = Map::with_folios(PAGES * PAGE);
    fill(&map, salt, |_| true);
    let map = map.moved();
    check(&map, |_| Some(salt));
    fill(&map, salt + 1, |place| place == 7);
    check(&map, |place| Some(salt + u64::from(place == 7)));
}

/// Keeps a page of each folio of many maps.
fn hold(salt: u64) {
    let maps = [(); HELD].map(|()| {
        let map = Map::with_folios(PAGES * PAGE);
        fill(&map, salt, |_| true);
        each(1..FOLIO, |pages| map.advise(pages, DONTNEED));
        map
    });
    maps.iter().for_each(|map| check(map, |place| (place == 0).then_some(salt)));
}
