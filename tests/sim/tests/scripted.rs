//! Stories about page tables, one rule each.

use hv_core::addr::{CpuId, DomainId, Frame, GuestVirt, HOLE_SLOTS};
use hv_core::claim::{Access, GuestMemory};
use hv_core::domain::MAX_DOMAIN_VCPUS;
use hv_core::frame::table::{NO_PFN, WORDS};
use hv_core::frame::{FrameTable, Owner, Refused, Use};
use hv_core::lock::Held;
use hv_core::machine::Frames;
use hv_core::paging::entry::{ACCESSED, DIRTY, GLOBAL, NO_EXECUTE, PRESENT, USER, WRITABLE};
use hv_core::paging::{BUDGET, Outcome, Session, Slot, Space, Stop, WAITING};
use sim::machine::{SimMachine, address};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

const FRAMES: u32 = 128;
const RAM: u32 = 120;
const US: DomainId = DomainId(1);
const THEM: DomainId = DomainId(2);
const RW: u64 = PRESENT | WRITABLE | USER;
const RO: u64 = PRESENT | USER;

struct Bench {
    m: SimMachine,
    table: Box<FrameTable>,
    space: Space,
    other: Space,
}

impl Bench {
    fn new() -> Self {
        let table = Box::new(FrameTable::new());
        let words: Vec<AtomicU64> = (0..FRAMES as usize * WORDS).map(|_| AtomicU64::new(0)).collect();
        table.init(words.leak());
        table.add(Frame::from_u32(0), RAM);
        Self { m: SimMachine::new(RAM as usize), table, space: Space::of(US), other: Space::of(THEM) }
    }

    fn page(&self) -> Frame {
        self.table.populate(&self.m, US, 0, 7, u64::MAX).expect("memory")
    }

    fn theirs(&self) -> Frame {
        self.table.populate(&self.m, THEM, 0, 7, u64::MAX).expect("memory")
    }

    fn put(&self, table: Frame, slot: usize, entry: u64) {
        self.m.page(table)[slot].store(entry, SeqCst);
    }

    fn at(&self, table: Frame, slot: usize) -> u64 {
        self.m.page(table)[slot].load(SeqCst)
    }

    fn with<R>(&self, budget: u32, work: impl FnOnce(&mut Session<'_, SimMachine>) -> R) -> R {
        work(&mut self.space.open(&self.m, &self.table, budget, &mut Held::entering_ring_0()))
    }

    fn does(&self, work: impl FnOnce(&mut Session<'_, SimMachine>) -> Outcome<()>) -> Outcome<()> {
        self.with(BUDGET, work)
    }

    /// Root, L3, L2, L1 and a page, connected by their slots 0 and not yet tables.
    fn tree(&self) -> [Frame; 5] {
        let tree = [self.page(), self.page(), self.page(), self.page(), self.page()];
        for pair in tree.windows(2) {
            self.put(pair[0], 0, pair[1].address() | RW);
        }
        tree
    }

    fn info(&self, frame: Frame) -> (Use, u32, u32) {
        let info = self.table.info(frame).expect("RAM");
        (info.kind.used_as, info.kind.count, info.owner.refs)
    }
}

fn slot(table: Frame, index: usize) -> Slot {
    Slot { table, index }
}

fn entry_at(table: Frame, index: usize) -> u64 {
    table.address() + 8 * index as u64
}

fn refused(why: Refused) -> Outcome<()> {
    Err(Stop::Refused(why))
}

/// Repeats a call as a guest does, and says how often.
fn until_done(
    b: &Bench,
    budget: u32,
    mut call: impl FnMut(&mut Session<'_, SimMachine>) -> Outcome<()>,
) -> (u32, Outcome<()>) {
    for calls in 1..10_000 {
        let outcome = b.with(budget, &mut call);
        if outcome != Err(Stop::More) {
            return (calls, outcome);
        }
    }
    panic!("never done");
}

#[test]
fn a_tree_comes_up_and_goes_down() {
    let b = Bench::new();
    let [root, l3, l2, l1, page] = b.tree();
    assert_eq!(b.does(|s| s.pin(root, 4)), Ok(()));
    assert_eq!(b.does(|s| s.pin(root, 4)), refused(Refused::AlreadyPinned));
    assert_eq!(b.info(root), (Use::L4, 1, 2));
    assert_eq!((b.info(l3), b.info(l2), b.info(l1)), ((Use::L3, 1, 2), (Use::L2, 1, 2), (Use::L1, 1, 2)));
    assert_eq!(b.info(page), (Use::Writable, 1, 2));
    for n in HOLE_SLOTS {
        assert_eq!(b.at(root, n), b.m.hole_entry(n - HOLE_SLOTS.start));
    }
    assert_ne!(b.at(root, 0) & ACCESSED, 0, "4.2: an L4 entry has A");
    assert_eq!(b.does(|s| s.unpin(root)), Ok(()));
    assert_eq!(b.does(|s| s.unpin(root)), refused(Refused::NotPinned));
    for f in [root, l3, l2, l1, page] {
        assert_eq!((b.info(f).1, b.info(f).2), (0, 1));
    }
}

#[test]
fn the_hypervisors_slots_are_not_the_guests() {
    let b = Bench::new();
    let [root, l3, ..] = b.tree();
    for n in HOLE_SLOTS {
        b.put(root, n, l3.address() | RW); // ignored and overwritten
    }
    assert_eq!(b.does(|s| s.pin(root, 4)), Ok(()));
    assert_eq!(b.info(l3), (Use::L3, 1, 2));
    for n in HOLE_SLOTS {
        assert_eq!(b.does(|s| s.mmu_update(entry_at(root, n), 0, US)), refused(Refused::HoleSlot));
        assert_eq!(b.at(root, n), b.m.hole_entry(n - HOLE_SLOTS.start));
    }
}

#[test]
fn leaves_get_the_forced_bits_and_keep_their_own() {
    let b = Bench::new();
    let (l1, page) = (b.page(), b.page());
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    let software = 1 << 9 | 1 << 57 | 1 << 58 | NO_EXECUTE;
    let given = page.address() | PRESENT | WRITABLE | GLOBAL | software;
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 3), given, US)), Ok(()));
    assert_eq!(b.at(l1, 3), page.address() | RW | software | 1 << 52, "US forced, G stripped, kernel marked");
    // Preserving A and D against a plain store.
    b.m.page(l1)[3].fetch_or(ACCESSED | DIRTY, SeqCst);
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 3) | 2, page.address() | RW, US)), Ok(()));
    assert_eq!(b.at(l1, 3), page.address() | RW | ACCESSED | DIRTY);
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 3), page.address() | RW, US)), Ok(()));
    assert_eq!(b.at(l1, 3), page.address() | RW);
    assert_eq!(b.info(page), (Use::Writable, 1, 2));
    // What is not present is the guest's own business.
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 3), !PRESENT, US)), Ok(()));
    assert_eq!((b.at(l1, 3), b.info(page)), (!PRESENT, (Use::Writable, 0, 1)));
    for (command, why) in [(4, Refused::Unknown), (7, Refused::Unknown)] {
        assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 3) | command, 0, US)), refused(why));
    }
}

#[test]
fn cacheability_and_devices_need_authority() {
    let b = Bench::new();
    let (l1, page) = (b.page(), b.page());
    let device = Frame::from_u32(RAM + 1);
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    for bit in [3, 4, 7] {
        let raw = page.address() | RW | 1 << bit;
        assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), raw, US)), refused(Refused::CacheBits));
    }
    let raw = device.address() | RW | 1 << 4;
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), raw, US)), refused(Refused::NotYourDevice));
    assert_eq!(b.space.devices.allow(RAM..FRAMES), Ok(()));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), raw, US)), Ok(()));
    let raw = page.address() | RW | 1 << 4;
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 1), raw, US)), refused(Refused::CacheBits), "RAM is write-back");
    let beyond = Frame::from_u32(FRAMES + 100).address() | RW;
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 2), beyond, US)), refused(Refused::NotYourDevice));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), 0, US)), Ok(()));
    assert_eq!(b.does(|s| s.unpin(l1)), Ok(()));
}

#[test]
fn a_table_has_no_writable_mapping_and_the_reverse() {
    let b = Bench::new();
    let (l1, page, alias) = (b.page(), b.page(), b.page());
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), page.address() | RW, US)), Ok(()));
    assert_eq!(b.does(|s| s.pin(page, 1)), refused(Refused::WrongType));
    assert_eq!(b.does(|s| s.take_descriptors(page)), refused(Refused::WrongType));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), page.address() | RO, US)), Ok(()), "RO first");
    assert_eq!(b.does(|s| s.pin(page, 1)), Ok(()), "pin later");
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), page.address() | RW, US)), refused(Refused::WrongType));
    assert_eq!(b.at(l1, 0), page.address() | RO);
    // No table of its own level below itself, no level twice.
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 1), l1.address() | RW, US)), refused(Refused::WrongType));
    b.put(alias, 0, alias.address() | RW);
    assert_eq!(b.does(|s| s.pin(alias, 2)), refused(Refused::WrongType));
    assert_eq!(b.does(|s| s.pin(page, 2)), refused(Refused::AlreadyPinned));
    assert_eq!(b.info(alias), (Use::L2, 0, 1));
}

#[test]
fn a_long_promotion_is_answered_once() {
    let b = Bench::new();
    let [root, .., l1, page] = b.tree();
    let (calls, outcome) = until_done(&b, 100, |s| s.pin(root, 4));
    assert_eq!(outcome, Ok(()));
    assert!((19..=24).contains(&calls), "about 2000 entries at 100 a call: {calls}");
    assert_eq!((b.info(root), b.info(page)), ((Use::L4, 1, 2), (Use::Writable, 1, 2)));
    let (calls, outcome) = until_done(&b, 100, |s| s.unpin(root));
    assert_eq!((calls, outcome), (1, Ok(())), "taking down has no answer: it is a debt");
    assert_eq!(b.info(l1).1, 1, "which is not paid yet");
    let (calls, outcome) = until_done(&b, 100, |s| s.mmu_update(entry_at(page, 0), 1, US));
    assert_eq!(outcome, Ok(()));
    assert!(calls > 15, "but before anything else: {calls}");
    assert_eq!((b.info(l1).1, b.info(page)), (0, (Use::Writable, 0, 1)));
}

#[test]
fn a_long_refusal_is_told_once_and_then_forgotten() {
    let b = Bench::new();
    let [root, l3, l2, l1, page] = b.tree();
    b.put(l1, 511, Frame::from_u32(RAM + 1).address() | RO);
    let (calls, outcome) = until_done(&b, 100, |s| s.pin(root, 4));
    assert_eq!(outcome, refused(Refused::NotYourDevice));
    assert!(calls > 5);
    for f in [root, l3, l2, l1, page] {
        assert_eq!((b.info(f).1, b.info(f).2), (0, 1), "nothing is held");
    }
    b.put(l1, 511, 0);
    assert_eq!(until_done(&b, 100, |s| s.pin(root, 4)).1, Ok(()), "it is judged anew");
}

#[test]
fn an_interrupted_request_survives_others_in_between() {
    let b = Bench::new();
    let [root, ..] = b.tree();
    let (l1, page) = (b.page(), b.page());
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    assert_eq!(b.with(600, |s| s.pin(root, 4)), Err(Stop::More));
    // Another vcpu of the domain has to finish that first, whatever it wants.
    let (calls, outcome) = until_done(&b, 600, |s| s.mmu_update(entry_at(l1, 0), page.address() | RW, US));
    assert_eq!(outcome, Ok(()));
    assert!(calls > 1);
    assert_eq!(b.info(root), (Use::L4, 1, 2), "one use waits with the domain");
    assert!(!b.table.info(root).unwrap().kind.pinned);
    assert_eq!(b.with(2, |s| s.pin(root, 4)), Ok(()), "ready at once");
    assert_eq!(b.info(root), (Use::L4, 1, 2));
}

#[test]
fn outcomes_nobody_comes_for_are_let_go() {
    let b = Bench::new();
    const MORE: usize = WAITING + 2;
    let tables: Vec<Frame> = (0..MORE).map(|_| b.page()).collect();
    for &f in &tables {
        assert_eq!(b.with(300, |s| s.pin(f, 1)), Err(Stop::More)); // never asked again
        assert_eq!(b.does(|s| s.unpin(f)), refused(Refused::NotPinned)); // but finished
    }
    let held: Vec<u32> = tables.iter().map(|f| b.info(*f).1).collect();
    let mut kept = [1; MORE];
    (kept[0], kept[1]) = (0, 0);
    assert_eq!(held, kept, "the oldest went");
    assert_eq!(until_done(&b, 4096, |s| s.tear_down()).1, Ok(()));
    assert_eq!(b.table.owned(US), 0);
}

/// As many callers as a domain has vcpus, each with a request that takes more than one session: whoever comes finishes
/// what the one before began. Outcomes that were let go before their request came again were worked out anew, for ever.
#[test]
fn as_many_callers_as_vcpus_are_all_answered() {
    let b = Bench::new();
    let mut waiting: Vec<Frame> = (0..MAX_DOMAIN_VCPUS).map(|_| b.page()).collect();
    let rounds = (1..=10).find(|_| {
        waiting.retain(|table| match b.with(300, |s| s.pin(*table, 1)) {
            Ok(()) => false,
            Err(Stop::More) => true,
            Err(why) => panic!("{why:?}"),
        });
        waiting.is_empty()
    });
    assert_eq!(rounds, Some(3), "{} have no answer after 10 rounds", waiting.len());
}

#[test]
fn roots_are_replaced_before_the_old_one_goes() {
    let b = Bench::new();
    let [root, ..] = b.tree();
    let second = b.page();
    let mut loads = 0;
    assert_eq!(b.does(|s| s.switch_root(None, Some(root), || loads += 1)), Ok(()));
    assert_eq!(b.info(root), (Use::L4, 1, 2));
    let during = std::cell::Cell::new((Use::None, 0, 0));
    assert_eq!(b.does(|s| s.switch_root(Some(root), Some(second), || during.set(b.info(root)))), Ok(()));
    assert_eq!(during.get(), (Use::L4, 1, 2), "the old root is whole while the new one is loaded");
    assert_eq!(b.info(root).1, 0);
    let page = b.theirs();
    let refusal = b.does(|s| s.switch_root(Some(second), Some(page), || panic!("not accepted")));
    assert_eq!(refusal, refused(Refused::NotOwner));
    assert_eq!(b.does(|s| s.switch_root(Some(second), Some(second), || loads += 1)), Ok(()));
    assert_eq!(loads, 2);
    b.with(BUDGET, |s| s.drop_root(second));
    assert_eq!(b.info(second).1, 0);
}

#[test]
fn writes_to_own_tables_are_found_and_carried_out() {
    let b = Bench::new();
    let [root, _, _, l1, page] = b.tree();
    b.put(l1, 1, l1.address() | RO);
    b.put(l1, 2, page.address() | RO);
    assert_eq!(b.does(|s| s.pin(root, 4)), Ok(()));
    let own = address([0, 0, 0, 1]).plus(8 * 5);
    for (at, why) in [(0, "writable already"), (2, "no table"), (3, "not present")] {
        let found = b.with(BUDGET, |s| s.find_table_write(root, address([0, 0, 0, at])));
        assert_eq!(found, Err(Stop::Refused(Refused::NotTableWrite)), "{why}");
    }
    let found = b.with(BUDGET, |s| s.find_table_write(root, own)).unwrap();
    assert_eq!((found.slot, found.value), (slot(l1, 5), 0));
    let new = page.address() | RW;
    assert_eq!(b.with(BUDGET, |s| s.write_table(found.slot, Some(9), new)), Ok(Some(0)), "not what it holds");
    assert_eq!(b.with(BUDGET, |s| s.write_table(found.slot, Some(0), new)), Ok(None));
    assert_eq!((b.at(l1, 5), b.info(page)), (new, (Use::Writable, 2, 4)));
    let bad = b.with(BUDGET, |s| s.write_table(found.slot, None, root.address() | RW));
    assert_eq!(bad, Err(Stop::Refused(Refused::WrongType)));
    assert_eq!(b.at(l1, 5), new);
    let other = b.with(BUDGET, |s| s.write_table(slot(root, 5), None, 0));
    assert_eq!(other, Err(Stop::Refused(Refused::NotTable)), "only L1 tables are written so");
    // The same by address.
    assert_eq!(b.does(|s| s.update_va(root, address([0, 0, 0, 5]), 0, US)), Ok(()));
    assert_eq!((b.at(l1, 5), b.info(page)), (0, (Use::Writable, 1, 3)));
    for at in [address([1, 0, 0, 0]), address([256, 0, 0, 0]), GuestVirt(1 << 47)] {
        assert_eq!(b.does(|s| s.update_va(root, at, 0, US)), refused(Refused::NotMapped));
    }
}

#[test]
fn descriptor_pages_are_corrected_and_kept() {
    let b = Bench::new();
    let (gdt, page) = (b.page(), b.page());
    let code = 0x00af_9b00_0000_ffff;
    b.put(gdt, 2, code & !(1 << 40));
    assert_eq!(b.does(|s| s.take_descriptors(gdt)), Ok(()));
    assert_eq!(b.at(gdt, 2), code | 3 << 45, "ring 3, accessed");
    assert!(b.table.holds_descriptors(gdt));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(gdt, 3), code, US)), refused(Refused::WrongType));
    assert_eq!(b.does(|s| s.update_descriptor(entry_at(gdt, 3), code)), Ok(()));
    assert_eq!(b.at(gdt, 3), code | 3 << 45);
    let tss = 0x0000_8b00_0000_0067;
    assert_eq!(b.does(|s| s.update_descriptor(entry_at(gdt, 4), tss)), refused(Refused::BadDescriptor));
    assert_eq!(b.does(|s| s.update_descriptor(entry_at(gdt, 4) + 4, 0)), refused(Refused::Misaligned));
    b.put(page, 9, tss);
    assert_eq!(b.does(|s| s.take_descriptors(page)), refused(Refused::BadDescriptor));
    assert_eq!((b.info(page).1, b.info(page).2), (0, 1));
    b.table.drop_use(gdt, US);
    assert!(!b.table.holds_descriptors(gdt));
}

#[test]
fn stale_translations_are_flushed_before_a_new_type() {
    let b = Bench::new();
    let [root, _, _, l1, page] = b.tree();
    assert_eq!(b.does(|s| s.pin(root, 4)), Ok(()));
    for cpu in [0, 1] {
        b.space.enter(&b.table, CpuId(cpu));
    }
    b.table.epochs().runs_guest(CpuId(5)); // some other domain's
    let flushed = |what: &dyn Fn()| {
        let before = b.m.flushes.get();
        what();
        b.m.flushes.get() - before
    };
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), page.address() | RO, US)), Ok(()));
    assert_eq!(flushed(&|| assert_eq!(b.does(|s| s.pin(page, 1)), Ok(()))), 2, "both CPUs of the domain");
    assert_eq!(b.does(|s| s.unpin(page)), Ok(()));
    assert_eq!(flushed(&|| assert_eq!(b.does(|s| s.pin(page, 1)), Ok(()))), 0, "the same again needs none");
    assert_eq!(b.does(|s| s.unpin(page)), Ok(()));
    b.space.leave(CpuId(1));
    let clear = || assert_eq!(b.does(|s| s.clear_page(page, US)), Ok(()));
    assert_eq!(flushed(&clear), 1, "from table to writable; one CPU has left");
    // Once somebody else used the frame, every CPU that runs guests may know it.
    assert_eq!(b.table.take_writable(&b.m, page, US, THEM), Ok(()));
    b.table.drop_use(page, THEM);
    assert_eq!(flushed(&|| assert_eq!(b.does(|s| s.pin(page, 1)), Ok(()))), 3);
    // Upper entries that go are flushed with the call.
    assert_eq!(flushed(&|| assert_eq!(b.does(|s| s.mmu_update(entry_at(root, 0), 0, US)), Ok(()))), 1);
    assert_eq!(flushed(&|| assert_eq!(b.does(|s| s.mmu_update(entry_at(root, 1), 2, US)), Ok(()))), 0);
}

#[test]
fn foreign_mappings_hold_what_they_map() {
    let b = Bench::new();
    let (l1, theirs) = (b.page(), b.theirs());
    b.put(theirs, 0, 77);
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    let raw = theirs.address() | RW | NO_EXECUTE | ACCESSED | DIRTY;
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), raw, US)), refused(Refused::NotOwner));
    assert_eq!(b.does(|s| s.map_leaf(slot(l1, 0), raw, THEM)), Ok(()));
    assert_eq!(b.does(|s| s.map_leaf(slot(theirs, 0), raw, THEM)), refused(Refused::NotTable));
    assert_eq!(b.does(|s| s.unmap_leaf(slot(l1, 0), theirs, false, None)), refused(Refused::Mismatch));
    assert_eq!(b.does(|s| s.unmap_leaf(slot(l1, 0), l1, true, None)), refused(Refused::Mismatch));
    let mut held = Held::entering_ring_0();
    let pinned = b.other.open(&b.m, &b.table, BUDGET, &mut held).pin(theirs, 1);
    assert_eq!(pinned, refused(Refused::WrongType), "mapped writable by us");
    // They die; we keep the frame until we let go.
    let free = b.table.free_frames();
    assert_eq!(b.other.open(&b.m, &b.table, BUDGET, &mut held).tear_down(), Ok(()));
    assert_eq!((b.table.free_frames(), b.table.owned(THEM)), (free, 0));
    assert_eq!(b.table.info(theirs).unwrap().owner.owner, Owner::Orphan);
    assert_eq!(b.does(|s| s.map_leaf(slot(l1, 1), raw, THEM)), refused(Refused::NotOwner));
    assert_eq!(b.at(theirs, 0), 77);
    assert_eq!(b.does(|s| s.unmap_leaf(slot(l1, 0), theirs, true, None)), Ok(()));
    assert_eq!(b.table.free_frames(), free + 1);
    let again = b.page();
    assert_eq!((again, b.at(again, 0)), (theirs, 0), "and it comes back empty");
    let mut other = b.other.open(&b.m, &b.table, BUDGET, &mut held);
    assert_eq!(other.pin(again, 1), refused(Refused::Dying));
}

#[test]
fn overwriting_a_grant_drops_the_entrys_reference_alone() {
    let b = Bench::new();
    let (l1, theirs) = (b.page(), b.theirs());
    assert_eq!(b.does(|s| s.pin(l1, 1)), Ok(()));
    assert_eq!(b.table.take_writable(&b.m, theirs, THEM, US), Ok(()), "the grant's own");
    assert_eq!(b.does(|s| s.map_leaf(slot(l1, 0), theirs.address() | RW, THEM)), Ok(()));
    assert_eq!(b.info(theirs), (Use::Writable, 2, 3));
    assert_eq!(b.does(|s| s.mmu_update(entry_at(l1, 0), 0, US)), Ok(()));
    assert_eq!(b.info(theirs), (Use::Writable, 1, 2));
    assert_eq!(b.does(|s| s.unmap_leaf(slot(l1, 0), theirs, true, None)), refused(Refused::Mismatch));
}

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
fn claims_are_tested_by_the_guests_own_tables() {
    let b = Bench::new();
    let [root, l3, l2, l1, page] = b.tree();
    let (next, low) = (b.page(), b.page());
    b.put(l1, 1, next.address() | RW);
    b.put(l1, 2, page.address() | RO);
    b.put(l1, 4, Frame::from_u32(RAM + 2).address() | RW | 1 << 4);
    b.put(l3, 1, l2.address() | RO); // the same tables without the right to write
    b.put(low, 0, 1);
    assert_eq!(b.space.devices.allow(RAM..FRAMES), Ok(()));
    assert_eq!(b.does(|s| s.pin(root, 4)), Ok(()));
    let view = GuestMemory::new(&b.m, &b.table, root);
    let edge = address([0, 0, 0, 0]).plus(4092);
    assert_eq!(view.write(edge, &0x1122_3344_5566_7788u64), Ok(()));
    assert_eq!(view.read::<u64>(edge), Ok(0x1122_3344_5566_7788));
    assert_eq!((b.at(page, 511) >> 32, b.at(next, 0)), (0x5566_7788, 0x1122_3344));
    let fault = view.read::<u64>(address([0, 0, 0, 2]).plus(4092)).unwrap_err();
    assert_eq!((fault.address, fault.error()), (address([0, 0, 0, 3]), 4));
    for (at, error) in [
        (address([0, 0, 0, 2]), 7),
        (address([0, 0, 0, 3]), 6),
        (address([0, 0, 0, 4]), 7),
        (address([0, 1, 0, 0]), 7),
        (address([256, 0, 0, 0]), 6),
        (GuestVirt(1 << 50), 6),
    ] {
        let fault = view.write(at, &1u8).unwrap_err();
        assert_eq!((fault.address, fault.error()), (at, error));
    }
    assert_eq!(view.frame(address([0, 1, 0, 0]), Access::Read), Ok(page));
    assert_eq!(view.read::<u32>(address([0, 0, 0, 2]).plus(4092)), Ok(0x5566_7788));
    let word = address([0, 0, 0, 0]).plus(16);
    assert_eq!(view.write(word.plus(1), &0x55u8), Ok(()));
    assert_eq!(b.at(page, 2), 0x5500);
    let wrap = view.read_bytes(GuestVirt(u64::MAX - 3), &mut [0; 8]).unwrap_err();
    assert_eq!(wrap.address, GuestVirt(u64::MAX - 3));
    assert!(GuestMemory::new(&b.m, &b.table, Frame::from_u32(FRAMES + 1)).read::<u8>(word).is_err());
}

#[test]
fn numbers_from_anywhere_are_refused_quietly() {
    let b = Bench::new();
    let mine = b.page();
    assert_eq!(b.does(|s| s.pin(mine, 1)), Ok(()));
    for number in [RAM, RAM + 1, FRAMES, FRAMES + 1, u32::MAX] {
        let f = Frame::from_u32(number);
        assert!(b.does(|s| s.pin(f, 4)).is_err());
        assert!(b.does(|s| s.unpin(f)).is_err());
        assert!(b.does(|s| s.take_descriptors(f)).is_err());
        assert!(b.does(|s| s.switch_root(None, Some(f), || {})).is_err());
        assert!(b.does(|s| s.map_leaf(slot(f, 0), RO, US)).is_err());
        assert!(b.does(|s| s.copy_page(f, mine, US)).is_err());
        assert!(b.does(|s| s.clear_page(f, US)).is_err());
        for command in 0..8 {
            assert!(b.does(|s| s.mmu_update(f.address() | command, RW, US)).is_err());
        }
    }
    for level in [0, 5, 255] {
        assert_eq!(b.does(|s| s.pin(mine, level)), refused(Refused::AlreadyPinned));
    }
    let other = b.page();
    for level in [0, 5, 255] {
        assert!(b.does(|s| s.pin(other, level)).is_err());
    }
    assert!(b.does(|s| s.write_table(slot(mine, 512), None, 0).map(|_| ())).is_err());
    assert!(b.does(|s| s.mmu_update(u64::MAX, 0, US)).is_err());
    assert!(b.does(|s| s.update_descriptor(!7, 0)).is_err());
    assert_eq!(sim::complaints(), 0);
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
