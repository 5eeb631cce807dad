//! Tables and what they map.

use super::{Bench, FRAMES, RAM, RO, RW, THEM, US, entry_at, refused, slot};
use hv_core::addr::{CpuId, Frame, GuestVirt, HOLE_SLOTS};
use hv_core::claim::{Access, GuestMemory};
use hv_core::frame::{Owner, Refused, Use};
use hv_core::lock::Held;
use hv_core::machine::Frames;
use hv_core::paging::entry::{ACCESSED, DIRTY, GLOBAL, NO_EXECUTE, PRESENT, WRITABLE};
use hv_core::paging::{BUDGET, Stop};
use sim::machine::address;
use std::sync::atomic::Ordering::SeqCst;

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
