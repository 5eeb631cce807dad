//! What front ends of test guests share: a device in the store, pages that dom0 may use, and random numbers.

use alloc::format;
use alloc::string::String;

use unikernel::abi::grant::entry;
use unikernel::memory::{PAGE, Pages};
use unikernel::{hypercall, probe, time};

use crate::granted::GrantTable;
use crate::shared::Shared;
use crate::xenstore::Store;

/// References before these are the store's and the console's.
pub const FIRST: u32 = 8;
/// Nanoseconds that an answer may take.
pub const PATIENCE_NS: u64 = 20_000_000_000;

/// A device of ours, in the store.
#[derive(Debug)]
pub struct Device {
    front: String,
}

impl Device {
    /// The device with the number `number` and the class `class`, such as `vbd`.
    #[must_use]
    pub fn new(class: &str, number: u32) -> Self {
        Self { front: format!("device/{class}/{number}/") }
    }

    /// Returns a key of our directory. `None` if there is no such key.
    pub fn get(&self, store: &mut Store, key: &str) -> Option<String> {
        store.read(&format!("{}{key}", self.front))
    }

    /// Writes a key of our directory.
    pub fn put(&self, store: &mut Store, key: &str, value: &str) {
        let _ = store.write(&format!("{}{key}", self.front), value);
    }

    /// Writes a number as a key of our directory.
    pub fn put_number(&self, store: &mut Store, key: &str, value: u32) {
        self.put(store, key, &format!("{value}"));
    }

    /// Removes a key of our directory.
    pub fn remove(&self, store: &mut Store, key: &str) {
        let _ = store.remove(&format!("{}{key}", self.front));
    }

    /// Returns the back end's state. 0 if there is none.
    pub fn back(&self, store: &mut Store) -> u32 {
        let Some(back) = self.get(store, "backend") else { return 0 };
        store.read(&format!("{back}/state")).and_then(|state| state.parse().ok()).unwrap_or(0)
    }

    /// Waits until the back end's state is one of these, and returns the state. `None` if it takes too long.
    pub fn until(&self, store: &mut Store, states: &[u32]) -> Option<u32> {
        let deadline = time::now_ns() + PATIENCE_NS;
        while time::now_ns() < deadline {
            let state = self.back(store);
            if states.contains(&state) {
                return Some(state);
            }
            let _ = hypercall::poll(&[], time::now_ns() + 1_000_000);
        }
        None
    }
}

/// Pages of ours that dom0 may use. Each page has a place in the grant table, at first its own.
#[derive(Debug)]
pub struct Granted {
    /// The grant table of this domain.
    pub table: GrantTable,
    pages: Pages,
}

impl Granted {
    /// Allocates pages, and lets dom0 use all of them.
    ///
    /// # Panics
    /// If no pages are free.
    #[must_use]
    pub fn new(count: u64) -> Self {
        let granted = Self { table: GrantTable::new(), pages: Pages::allocate(count).expect("pages are free") };
        granted.grant_all();
        granted
    }

    /// Returns the number of pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.pages.count()
    }

    /// Returns the page with this number.
    #[must_use]
    pub fn page(&self, page: u64) -> Shared {
        Shared::of_pages(&self.pages, page)
    }

    /// Returns the words of a page.
    pub fn words(&self, page: u64) -> impl Iterator<Item = u64> {
        let start = self.pages.address() + page * PAGE;
        (start..start + PAGE).step_by(8).map(probe::load)
    }

    /// Lets the back end use `page` by the reference of `place`.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn grant(&self, place: u64, page: u64, flags: u16) {
        let frame = self.pages.frame(page).expect("the page is ours");
        self.table.set(reference(place), u64::from(flags) | frame << 32);
    }

    /// Lets the back end use each page by its own reference.
    pub fn grant_all(&self) {
        (0..self.count()).for_each(|page| self.grant(page, page, entry::PERMIT_ACCESS));
    }

    /// Panics if dom0 uses a page.
    ///
    /// # Panics
    /// Says which page is used.
    pub fn require_unused(&self) {
        for page in 0..self.count() {
            assert!(!self.table.in_use(reference(page)), "page {page} is still in use");
        }
    }
}

/// Returns the reference of a page.
#[must_use]
pub fn reference(page: u64) -> u32 {
    FIRST + u32::try_from(page).unwrap_or(0)
}

/// A generator of random numbers: splitmix.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// Returns a number of 64 bits.
    pub fn long(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Returns a number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.long() % bound
    }

    /// Returns true once in `count` times.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// Returns a number of 32 bits.
    pub fn word(&mut self) -> u32 {
        u32::try_from(self.long() & u64::from(u32::MAX)).unwrap_or(0)
    }

    /// Returns a number of 16 bits.
    pub fn half(&mut self) -> u16 {
        u16::try_from(self.long() & u64::from(u16::MAX)).unwrap_or(0)
    }
}
