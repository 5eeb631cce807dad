//! Grants of a domain to itself: the table, mapping, copying, and what is refused (io 1).
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use guests::abi::grant::{
    Copy, CopySide, Entry, GetVersion, GrantOp, MapGrantRef, QuerySize, SetVersion, SetupTable, UnmapGrantRef, entry,
    map, status,
};
use guests::abi::mmu::pte;
use guests::abi::{Errno, Hypercall, domid};
use guests::memory::{self, PAGE, Pages, Window};
use guests::probe::{self, address_mut, call, update_va_mapping};
use guests::tables::{Chain, pin};
use guests::{own_number, test};
use unikernel::grants::{self, Side, SideCopy};
use unikernel::pages::Buffer;

unikernel::entry!(unikernel::testing::run);

/// A domain that does not exist.
const NOBODY: u16 = 0x7123;

fn op<T>(command: GrantOp, array: &mut [T]) -> Result<u64, Errno> {
    let count = array.len() as u64;
    call(Hypercall::GrantTableOp, [command.number(), address_mut(array), count, 0, 0])
}

/// Our grant table, mapped, and pages to lend.
struct Table {
    window: Window,
    pages: Pages,
    /// Where grants are mapped.
    target: Window,
    own: u16,
}

impl Table {
    fn new() -> Self {
        let mut frames = [0u64];
        let mut setup = [SetupTable {
            dom: domid::SELF,
            nr_frames: 1,
            frame_list: address_mut(&mut frames),
            ..SetupTable::default()
        }];
        assert_eq!(op(GrantOp::SetupTable, &mut setup), Ok(0));
        assert_eq!(setup[0].status, status::OKAY);
        let window = Window::map(&frames, domid::SELF, true).expect("the table is shown to its owner");
        let pages = Pages::allocate(2).expect("pages are free");
        let target = Window::reserve(2).expect("there is room");
        Self { window, pages, target, own: own_number() }
    }

    /// Writes entry `gref`: page `i` for `who`.
    fn grant(&self, gref: u32, flags: u16, who: u16, frame: u64) {
        let entry = Entry { flags, domid: who, frame: u32::try_from(frame).expect("a small machine") };
        let word = u64::from(entry.flags) | u64::from(entry.domid) << 16 | u64::from(entry.frame) << 32;
        probe::write(self.window.address() + u64::from(gref) * 8, word).expect("the table is writable");
    }

    fn grant_page(&self, gref: u32, flags: u16, i: u64) {
        self.grant(gref, flags, self.own, self.pages.frame(i).expect("the page is ours"));
    }

    fn flags(&self, gref: u32) -> u16 {
        let word = probe::read(self.window.address() + u64::from(gref) * 8).expect("the table is readable");
        u16::try_from(word & 0xffff).expect("16 bits")
    }

    fn request(&self, gref: u32, flags: u32) -> MapGrantRef {
        MapGrantRef { host_addr: self.target.address(), flags, gref, dom: self.own, ..MapGrantRef::default() }
    }

    fn map(&self, gref: u32, flags: u32) -> MapGrantRef {
        let mut request = [self.request(gref, flags)];
        assert_eq!(op(GrantOp::MapGrantRef, &mut request), Ok(0));
        request[0]
    }

    fn unmap(&self, handle: u32) -> i16 {
        let mut request = [UnmapGrantRef { host_addr: self.target.address(), handle, ..UnmapGrantRef::default() }];
        assert_eq!(op(GrantOp::UnmapGrantRef, &mut request), Ok(0));
        request[0].status
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        for gref in 8..16 {
            self.grant(gref, entry::INVALID, 0, 0);
        }
    }
}

fn the_table_and_its_version() {
    let mut size = [QuerySize { dom: domid::SELF, ..QuerySize::default() }];
    assert_eq!(op(GrantOp::QuerySize, &mut size), Ok(0));
    assert_eq!(size[0].status, status::OKAY);
    // io 1.2: even, and at least 4.
    assert!(size[0].max_nr_frames >= 4 && size[0].max_nr_frames.is_multiple_of(2));
    let mut version = [SetVersion { version: 1 }];
    assert_eq!(op(GrantOp::SetVersion, &mut version), Ok(0));
    assert_eq!(version[0].version, 1);
    let mut bad = [SetVersion { version: 7 }];
    assert_eq!(op(GrantOp::SetVersion, &mut bad), Err(Errno::Inval));
    let mut get = [GetVersion { dom: domid::SELF, ..GetVersion::default() }];
    assert_eq!(op(GrantOp::GetVersion, &mut get), Ok(0));
    assert_eq!(get[0].version, 1);
    // io 1.2: asking again moves nothing.
    let mut frames = [[0u64; 2]; 2];
    for list in &mut frames {
        let mut setup =
            [SetupTable { dom: domid::SELF, nr_frames: 2, frame_list: address_mut(list), ..SetupTable::default() }];
        assert_eq!(op(GrantOp::SetupTable, &mut setup), Ok(0));
        assert_eq!(setup[0].status, status::OKAY);
    }
    assert_eq!(frames[0], frames[1]);
    assert!(frames[0][0] != frames[0][1]);
    let mut setup = [SetupTable {
        dom: domid::SELF,
        nr_frames: size[0].max_nr_frames + 1,
        frame_list: address_mut(&mut frames),
        ..SetupTable::default()
    }];
    assert_eq!(op(GrantOp::SetupTable, &mut setup), Ok(0));
    assert!(setup[0].status != status::OKAY, "beyond the limit");
}
test!("grants.table", the_table_and_its_version);

/// io 1.4, 1.5: the entry says that it is in use, and how.
fn a_grant_is_mapped_and_unmapped() {
    let table = Table::new();
    probe::write(table.pages.address(), 0x1234).expect("the page is writable");
    table.grant_page(8, entry::PERMIT_ACCESS, 0);
    let mapped = table.map(8, map::HOST);
    assert_eq!(mapped.status, status::OKAY);
    assert_eq!(mapped.dev_bus_addr, table.pages.frame(0).expect("the page is ours") * PAGE);
    assert_eq!(table.flags(8), entry::PERMIT_ACCESS | entry::READING | entry::WRITING);
    assert_eq!(probe::read(table.target.address()), Ok(0x1234));
    probe::write(table.target.address() + 8, 0x77).expect("it is mapped writable");
    assert_eq!(probe::read(table.pages.address() + 8), Ok(0x77));
    let made = memory::entry(table.target.address(), 1).expect("there is a table");
    assert_eq!(made & (pte::PRESENT | pte::WRITE | pte::NX), pte::PRESENT | pte::WRITE | pte::NX);
    assert_eq!(table.unmap(mapped.handle), status::OKAY);
    assert_eq!(table.flags(8), entry::PERMIT_ACCESS);
    let fault = probe::read(table.target.address()).expect_err("nothing is mapped");
    assert_eq!((fault.vector, fault.error), (14, 0));
    assert_eq!(table.unmap(mapped.handle), status::BAD_HANDLE);
}
test!("grants.map", a_grant_is_mapped_and_unmapped);

fn a_grant_for_reading() {
    let table = Table::new();
    table.grant_page(8, entry::PERMIT_ACCESS | entry::READONLY, 0);
    assert_eq!(table.map(8, map::HOST).status, status::GENERAL_ERROR, "writing was not granted");
    let mapped = table.map(8, map::HOST | map::READONLY);
    assert_eq!(mapped.status, status::OKAY);
    assert_eq!(table.flags(8) & (entry::READING | entry::WRITING), entry::READING);
    let fault = probe::write(table.target.address(), 1).expect_err("it is mapped read-only");
    assert_eq!((fault.vector, fault.error), (14, 3));
    assert_eq!(table.unmap(mapped.handle), status::OKAY);
    assert_eq!(table.flags(8), entry::PERMIT_ACCESS | entry::READONLY);
}
test!("grants.readonly", a_grant_for_reading);

fn what_is_refused() {
    let table = Table::new();
    table.grant_page(8, entry::PERMIT_ACCESS, 0);
    let refused = |request: MapGrantRef| {
        let mut request = [request];
        assert_eq!(op(GrantOp::MapGrantRef, &mut request), Ok(0), "a bad element does not fail the call");
        request[0].status
    };
    let good = table.request(8, map::HOST);
    assert_eq!(refused(MapGrantRef { gref: 1 << 20, ..good }), status::BAD_GNTREF);
    assert_eq!(refused(MapGrantRef { gref: 9, ..good }), status::GENERAL_ERROR, "not granted");
    assert_eq!(refused(MapGrantRef { flags: 0, ..good }), status::BAD_GNTREF, "for nothing");
    assert_eq!(refused(MapGrantRef { dom: NOBODY, ..good }), status::BAD_DOMAIN);
    table.grant(10, entry::PERMIT_ACCESS, table.own ^ 1, table.pages.frame(0).expect("the page is ours"));
    assert_eq!(refused(MapGrantRef { gref: 10, ..good }), status::GENERAL_ERROR, "granted to somebody else");
    table.grant(11, entry::PERMIT_ACCESS, table.own, 0xffff_ffff);
    assert!(refused(MapGrantRef { gref: 11, ..good }) != status::OKAY, "no such frame");
    assert!(refused(MapGrantRef { host_addr: 0x1234_5678_9000, ..good }) != status::OKAY, "no table there");
    assert!(refused(MapGrantRef { host_addr: 0xffff_8000_0000_0000, ..good }) != status::OKAY, "the hole");
    assert_eq!(table.flags(8), entry::PERMIT_ACCESS, "nothing is held");
    assert_eq!(table.unmap(0x0fff_ffff), status::BAD_HANDLE);
    // In a list, the good ones are done.
    let mut list = [MapGrantRef { gref: 9, ..good }, good];
    assert_eq!(op(GrantOp::MapGrantRef, &mut list), Ok(0));
    assert_eq!([list[0].status, list[1].status], [status::GENERAL_ERROR, status::OKAY]);
    assert_eq!(table.unmap(list[1].handle), status::OKAY);
    // The call as a whole.
    let bad = call(Hypercall::GrantTableOp, [GrantOp::MapGrantRef.number(), 0x1234_5678_9000, 1, 0, 0]);
    assert_eq!(bad, Err(Errno::Fault));
    assert_eq!(call(Hypercall::GrantTableOp, [99, 0, 0, 0, 0]), Err(Errno::NoSys));
}
test!("grants.refused", what_is_refused);

/// P1, P6: a writable mapping keeps a page from being a table, and a table from being granted writable.
fn grants_and_page_tables() {
    let table = Table::new();
    let chain = Chain::new();
    chain.protect(1);
    table.grant(8, entry::PERMIT_ACCESS, table.own, chain.frame(1));
    let mapped = table.map(8, map::HOST);
    assert_eq!(mapped.status, status::OKAY);
    assert_eq!(chain.pin(1), Err(Errno::Inval), "somebody may write it");
    assert_eq!(table.unmap(mapped.handle), status::OKAY);
    chain.pin(1).expect("nobody writes it any more");
    assert_eq!(table.map(8, map::HOST).status, status::GENERAL_ERROR, "a table");
    assert_eq!(table.flags(8), entry::PERMIT_ACCESS, "nothing is held");
    let mapped = table.map(8, map::HOST | map::READONLY);
    assert_eq!(mapped.status, status::OKAY, "a table may be seen");
    assert_eq!(table.unmap(mapped.handle), status::OKAY);
    chain.unpin(1).expect("it is pinned");
    chain.unprotect(1);
    // The grant table itself is no page table.
    let frame = memory::entry(table.window.address(), 1).expect("it is mapped") & pte::FRAME;
    assert!(pin(1, frame >> 12).is_err());
}
test!("grants.tables", grants_and_page_tables);

/// io 1.5: the mapping is the hypervisor's; whoever overwrites it cannot be unmapped, and hurts nobody but himself.
fn an_overwritten_mapping() {
    let table = Table::new();
    // This entry stays in use for ever, so no other test uses it.
    table.grant_page(20, entry::PERMIT_ACCESS, 0);
    let mapped = table.map(20, map::HOST);
    assert_eq!(mapped.status, status::OKAY);
    update_va_mapping(table.target.address(), 0, 2).expect("our tables are ours");
    assert!(table.unmap(mapped.handle) != status::OKAY);
    // Twice is possible, elsewhere.
    let second = MapGrantRef { host_addr: table.target.address() + PAGE, ..table.request(20, map::HOST) };
    let mut list = [second];
    assert_eq!(op(GrantOp::MapGrantRef, &mut list), Ok(0));
    assert_eq!(list[0].status, status::OKAY);
    probe::write(table.target.address() + PAGE, 3).expect("it is mapped writable");
    let mut list = [UnmapGrantRef { host_addr: second.host_addr, handle: list[0].handle, ..UnmapGrantRef::default() }];
    assert_eq!(op(GrantOp::UnmapGrantRef, &mut list), Ok(0));
    assert_eq!(list[0].status, status::OKAY);
}
test!("grants.overwritten", an_overwritten_mapping);

/// io 1.3: `host_addr` may be the machine address of the entry.
fn by_the_address_of_the_entry() {
    let table = Table::new();
    table.grant_page(8, entry::PERMIT_ACCESS, 1);
    let slot = memory::entry_machine_address(table.target.address(), 1).expect("there is a table");
    let request = MapGrantRef { host_addr: slot, ..table.request(8, map::HOST | map::CONTAINS_PTE) };
    let mut list = [request];
    assert_eq!(op(GrantOp::MapGrantRef, &mut list), Ok(0));
    assert_eq!(list[0].status, status::OKAY);
    probe::write(table.target.address(), 0x99).expect("it is mapped writable");
    assert_eq!(probe::read(table.pages.address() + PAGE), Ok(0x99));
    let mut unmap = [UnmapGrantRef { host_addr: slot, handle: list[0].handle, ..UnmapGrantRef::default() }];
    assert_eq!(op(GrantOp::UnmapGrantRef, &mut unmap), Ok(0));
    assert_eq!(unmap[0].status, status::OKAY);
    assert!(probe::read(table.target.address()).is_err());
}
test!("grants.contains-pte", by_the_address_of_the_entry);

/// io 1.3: also of a table's first entry, whose address is that of a page.
fn by_the_address_of_the_first_entry() {
    let table = Table::new();
    table.grant_page(8, entry::PERMIT_ACCESS, 1);
    let chain = Chain::new();
    chain.protect(1);
    chain.pin(1).expect("an L1 can be pinned");
    let slot = chain.machine_slot(1, 0);
    let mut list = [MapGrantRef { host_addr: slot, ..table.request(8, map::HOST | map::CONTAINS_PTE) }];
    assert_eq!(op(GrantOp::MapGrantRef, &mut list), Ok(0));
    assert_eq!(list[0].status, status::OKAY);
    let granted = table.pages.frame(1).expect("the page is ours");
    assert_eq!((chain.peek(1, 0) & pte::FRAME) / PAGE, granted);
    let mut unmap = [UnmapGrantRef { host_addr: slot, handle: list[0].handle, ..UnmapGrantRef::default() }];
    assert_eq!(op(GrantOp::UnmapGrantRef, &mut unmap), Ok(0));
    assert_eq!(unmap[0].status, status::OKAY);
    assert_eq!(chain.peek(1, 0), 0);
    chain.unpin(1).expect("it is pinned");
    chain.unprotect(1);
}
test!("grants.contains-first-pte", by_the_address_of_the_first_entry);

/// io 1.6.
fn copies() {
    let table = Table::new();
    let frame = |i| table.pages.frame(i).expect("the page is ours");
    for at in 0..PAGE / 8 {
        probe::write(table.pages.address() + at * 8, at * 0x0101).expect("the page is writable");
    }
    table.grant_page(8, entry::PERMIT_ACCESS | entry::READONLY, 0);
    table.grant_page(9, entry::PERMIT_ACCESS, 1);
    let by_ref = |gref: u64, offset| CopySide { gref_or_frame: gref, domid: table.own, offset, pad: 0 };
    let by_frame = |frame, offset| CopySide { gref_or_frame: frame, domid: domid::SELF, offset, pad: 0 };
    let copy = |source, dest, len, flags| {
        let mut list = [Copy { source, dest, len, flags, status: 77, pad: 0 }];
        assert_eq!(op(GrantOp::Copy, &mut list), Ok(0));
        list[0].status
    };
    let word = |at: u64| probe::read(table.pages.address() + PAGE + at).expect("the page is readable");
    assert_eq!(copy(by_ref(8, 0), by_ref(9, 0), 4096, 3), status::OKAY);
    assert_eq!([word(0), word(8), word(4088)], [0, 0x0101, 511 * 0x0101]);
    assert_eq!(copy(by_ref(8, 16), by_frame(frame(1), 8), 8, 1), status::OKAY);
    assert_eq!(word(8), 2 * 0x0101);
    assert_eq!(copy(by_frame(frame(0), 24), by_ref(9, 8), 8, 2), status::OKAY);
    assert_eq!(word(8), 3 * 0x0101);
    assert_eq!(copy(by_frame(frame(0), 0), by_frame(frame(1), 0), 0, 0), status::OKAY, "nothing to do");
    assert_eq!(copy(by_frame(frame(0), 0), by_ref(8, 0), 8, 2), status::GENERAL_ERROR, "read-only");
    assert_eq!(copy(by_ref(8, 4090), by_ref(9, 0), 8, 3), status::BAD_COPY_ARG);
    assert_eq!(copy(by_ref(8, 0), by_ref(9, 4090), 8, 3), status::BAD_COPY_ARG);
    assert!(copy(by_ref(12, 0), by_ref(9, 0), 8, 3) != status::OKAY, "not granted");
    assert_eq!(copy(by_ref(1 << 20, 0), by_ref(9, 0), 8, 3), status::BAD_GNTREF);
    let nobody = CopySide { domid: NOBODY, ..by_ref(8, 0) };
    assert_eq!(copy(nobody, by_ref(9, 0), 8, 3), status::BAD_DOMAIN);
    // Not into a table.
    let root = memory::entry_address(0, 4).and_then(memory::frame_of).expect("there is a root");
    assert!(copy(by_frame(frame(0), 0), by_frame(root, 0), 8, 0) != status::OKAY);
    for gref in [8, 9] {
        assert_eq!(table.flags(gref) & (entry::READING | entry::WRITING), 0, "nothing is held");
    }
}
test!("grants.copy", copies);

/// What the unikernel makes of these for a switch: batches of more than one call, each copy with an answer of its own.
fn copies_from_side_to_side() {
    let table = Table::new();
    let frame = |i| table.pages.frame(i).expect("the page is ours");
    for at in 0..PAGE / 8 {
        probe::write(table.pages.address() + at * 8, at * 0x0101).expect("the page is writable");
    }
    table.grant_page(8, entry::PERMIT_ACCESS | entry::READONLY, 0);
    table.grant_page(9, entry::PERMIT_ACCESS, 1);
    let granted = |reference| Side::Granted { domain: table.own, reference };
    let list: [SideCopy; 40] = core::array::from_fn(|n| {
        let at = u16::try_from(n).unwrap_or(0) * 8;
        let (from, to) = match n {
            3 => (granted(12), granted(9)),
            4 => (granted(8), granted(8)),
            5 => (Side::Own(frame(0)), granted(9)),
            // No buffer is lent, so this is refused, and between two pages of ours nothing is copied.
            6 => (granted(8), Side::Own(frame(1))),
            7 => (Side::Own(frame(0)), Side::Own(frame(1))),
            _ => (granted(8), granted(9)),
        };
        SideCopy { from, from_offset: at, to, to_offset: at + 16, bytes: 8 }
    });
    let (mut answers, mut buffers) = ([None; 40], <[&mut Buffer; 0]>::default());
    grants::copy_sides(list.into_iter(), &mut buffers, |place, done| {
        assert!(answers[place].replace(done).is_none(), "one answer each");
    });
    for (n, (answer, at)) in answers.iter().zip((0..).step_by(8)).enumerate() {
        let done = ![3, 4, 6, 7].contains(&n);
        assert_eq!(*answer, Some(done), "copy {n}");
        let word = probe::read(table.pages.address() + PAGE + at + 16).expect("the page is readable");
        assert_eq!(word, if done { at / 8 * 0x0101 } else { 0 }, "copy {n}");
    }
}
test!("grants.copy-sides", copies_from_side_to_side);
