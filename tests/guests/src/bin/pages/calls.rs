//! The calls themselves: arguments, counts, errors (core 4.4, 4.5, 4.6, 4.9).

use guests::abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, MulticallEntry, UpdateCommand, pte, uvmf};
use guests::abi::{Errno, Hypercall, domid};
use guests::memory::{PAGE, Pages, Window};
use guests::probe::{self, address, address_mut, call, mmuext, update_va_mapping};
use guests::tables::{Chain, LEAF, READ_ONLY};
use guests::{NOT_CANONICAL, memory, test};

const SELF: u64 = domid::SELF as u64;
/// An address where nothing is mapped.
const NOWHERE: u64 = 0x1234_5678_9000;

fn updates(list: &[MmuUpdate], done: u64) -> Result<u64, Errno> {
    call(Hypercall::MmuUpdate, [address(list), list.len() as u64, done, SELF, 0])
}

/// core 4.4: processing stops at the first error, and the count says how many succeeded; it is assigned, not added.
fn updates_are_counted() {
    let chain = Chain::new();
    chain.protect(1);
    chain.pin(1).expect("an L1 can be pinned");
    let update = |index, val| MmuUpdate { ptr: chain.machine_slot(1, index), val };
    let good = |index| update(index, chain.page_entry(0, LEAF));
    let bad = update(4, chain.page_entry(0, LEAF) | 1 << 51);
    let mut done = 77u32;
    let list = [good(1), good(2), bad, good(3)];
    assert!(updates(&list, address_mut(&mut done)).is_err());
    assert_eq!(done, 2);
    assert!(chain.peek(1, 2) != 0);
    assert_eq!(chain.peek(1, 3), 0, "what follows an error is not done");
    assert_eq!(updates(&[good(3)], address_mut(&mut done)), Ok(0));
    assert_eq!(done, 1);
    assert_eq!(updates(&[good(3)], 0), Ok(0), "nobody wants the count");
    assert_eq!(updates(&[], address_mut(&mut done)), Ok(0));
    assert_eq!(call(Hypercall::MmuUpdate, [NOWHERE, 1, 0, SELF, 0]), Err(Errno::Fault));
    chain.unpin(1).expect("it is pinned");
    chain.unprotect(1);
}
test!("calls.mmu-update.count", updates_are_counted);

fn updates_name_a_command_and_a_place() {
    let page = Pages::allocate(1).expect("a page is free");
    let maddr = page.frame(0).expect("the page is ours") * PAGE;
    // An ordinary page is written plainly.
    assert_eq!(probe::mmu_update(maddr + 8, 0x1234_5678), Ok(0));
    assert_eq!(probe::read(page.address() + 8), Ok(0x1234_5678));
    for command in 4..8 {
        assert_eq!(probe::mmu_update(maddr | command, 0), Err(Errno::NoSys), "command {command}");
    }
    assert!(probe::mmu_update(0x000f_ffff_ffff_f000, 0).is_err(), "no such frame");
    let list = [MmuUpdate { ptr: maddr, val: 0 }];
    for (domains, who) in [(0x7123, "owner"), (0x7123_0000, "table owner")] {
        let refused = call(Hypercall::MmuUpdate, [address(&list), 1, 0, domains, 0]);
        assert!(matches!(refused, Err(Errno::Srch | Errno::Perm)), "{who}: {refused:?}");
    }
}
test!("calls.mmu-update.target", updates_name_a_command_and_a_place);

/// core 2.2, 4.4: the machine-to-physical table, for own frames only.
fn the_machine_to_physical_table() {
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let entry = guests::hypercall::machphys_mapping().expect("there is a table").v_start + frame * 8;
    let command = UpdateCommand::MachPhys.number();
    assert_eq!(probe::read(entry), Ok(page.first()));
    assert_eq!(probe::mmu_update((frame * PAGE) | command, 0x5555), Ok(0));
    assert_eq!(probe::read(entry), Ok(0x5555));
    assert_eq!(probe::mmu_update((frame * PAGE) | command, page.first()), Ok(0));
    assert!(probe::mmu_update(0x000f_ffff_ffff_f000 | command, 1).is_err());
}
test!("calls.mmu-update.machphys", the_machine_to_physical_table);

/// core 4.4: command 2 keeps what the CPU noted; command 0 does not.
fn accessed_and_dirty_bits() {
    let chain = Chain::new();
    let window = Window::reserve(1).expect("there is room");
    let va = window.address();
    let slot = memory::entry_machine_address(va, 1).expect("there is a table");
    let noted = || {
        probe::read(memory::entry_address(va, 1).expect("there is a table"))
            .map(|entry| entry & (pte::ACCESSED | pte::DIRTY))
    };
    let clean = chain.page_entry(0, pte::PRESENT | pte::WRITE);
    update_va_mapping(va, clean, uvmf::INVLPG).expect("a page is mapped");
    assert_eq!(noted(), Ok(0));
    probe::write(va, 1).expect("the page is writable");
    assert_eq!(noted(), Ok(pte::ACCESSED | pte::DIRTY));
    let preserve = UpdateCommand::PreserveAd.number();
    let read_only = chain.page_entry(0, pte::PRESENT);
    assert_eq!(probe::mmu_update(slot | preserve, read_only), Ok(0));
    assert_eq!(noted(), Ok(pte::ACCESSED | pte::DIRTY));
    assert_eq!(probe::mmu_update(slot, read_only), Ok(0));
    assert_eq!(noted(), Ok(0));
    assert_eq!(probe::mmu_update(slot | preserve, clean | pte::DIRTY), Ok(0));
    assert_eq!(noted(), Ok(pte::DIRTY), "bits given are set");
    update_va_mapping(va, 0, uvmf::INVLPG).expect("nothing is mapped");
}
test!("calls.mmu-update.accessed", accessed_and_dirty_bits);

fn update_va_mapping_needs_a_table() {
    let page = Pages::allocate(1).expect("a page is free");
    let entry = (page.frame(0).expect("the page is ours") * PAGE) | READ_ONLY;
    for va in [NOWHERE, NOT_CANONICAL, 0xffff_8000_0000_0000, 0xffff_87ff_ffff_f000] {
        assert_eq!(update_va_mapping(va, entry, 0), Err(Errno::Inval), "{va:#x}");
    }
}
test!("calls.update-va-mapping.refused", update_va_mapping_needs_a_table);

/// core 4.5: after a flush the new translation is in force, whichever way it was asked for.
fn update_va_mapping_flushes() {
    let chain = Chain::new();
    for i in 0..2 {
        probe::write(chain.page_address(i), 100 + i).expect("the page is writable");
    }
    let window = Window::reserve(1).expect("there is room");
    let vcpus = [1u64];
    let flags = [
        uvmf::INVLPG,
        uvmf::TLB_FLUSH,
        uvmf::INVLPG | uvmf::ALL,
        uvmf::TLB_FLUSH | uvmf::ALL,
        uvmf::INVLPG | address(&vcpus),
        uvmf::TLB_FLUSH | address(&vcpus),
    ];
    for flag in flags {
        for i in [0, 1, 0] {
            update_va_mapping(window.address(), chain.page_entry(i, LEAF), flag).expect("a page is mapped");
            assert_eq!(probe::read(window.address()), Ok(100 + i), "flags {flag:#x}");
        }
    }
    update_va_mapping(window.address(), 0, uvmf::INVLPG).expect("nothing is mapped");
    assert!(probe::read(window.address()).is_err());
}
test!("calls.update-va-mapping.flush", update_va_mapping_flushes);

/// core 4.6: flushes by their own calls.
fn flushes_take_effect() {
    let chain = Chain::new();
    for i in 0..2 {
        probe::write(chain.page_address(i), 200 + i).expect("the page is writable");
    }
    let window = Window::reserve(1).expect("there is room");
    let va = window.address();
    let vcpus = [1u64];
    let flushes = [
        (MmuextCommand::TlbFlushLocal, 0, 0),
        (MmuextCommand::InvlpgLocal, va, 0),
        (MmuextCommand::TlbFlushMulti, 0, address(&vcpus)),
        (MmuextCommand::InvlpgMulti, va, address(&vcpus)),
        (MmuextCommand::TlbFlushAll, 0, 0),
        (MmuextCommand::InvlpgAll, va, 0),
    ];
    for (command, arg1, arg2) in flushes {
        for i in [0, 1, 0] {
            update_va_mapping(va, chain.page_entry(i, LEAF), uvmf::NONE).expect("a page is mapped");
            mmuext(command, arg1, arg2).unwrap_or_else(|e| panic!("{}: {e:?}", command.name()));
            assert_eq!(probe::read(va), Ok(200 + i), "{}", command.name());
        }
    }
    // core 4.6: addresses in the hole are ignored.
    mmuext(MmuextCommand::InvlpgLocal, 0xffff_8080_0000_0000, 0).expect("it is ignored");
    update_va_mapping(va, 0, uvmf::INVLPG).expect("nothing is mapped");
}
test!("calls.flush", flushes_take_effect);

fn extended_operations() {
    let chain = Chain::new();
    probe::write(chain.page_address(0) + 4088, 7).expect("the page is writable");
    mmuext(MmuextCommand::CopyPage, chain.page_frame(1), chain.page_frame(0)).expect("pages are copied");
    assert_eq!(probe::read(chain.page_address(1) + 4088), Ok(7));
    mmuext(MmuextCommand::ClearPage, chain.page_frame(1), 0).expect("a page is cleared");
    assert_eq!(probe::read(chain.page_address(1) + 4088), Ok(0));
    chain.protect(1);
    chain.pin(1).expect("an L1 can be pinned");
    assert!(mmuext(MmuextCommand::ClearPage, chain.frame(1), 0).is_err(), "a table");
    assert!(mmuext(MmuextCommand::CopyPage, chain.frame(1), chain.page_frame(0)).is_err(), "a table");
    assert!(chain.peek(1, 0) != 0);
    chain.unpin(1).expect("it is pinned");
    chain.unprotect(1);

    assert_eq!(mmuext(MmuextCommand::MarkSuper, 0, 0), Err(Errno::OpNotSupp));
    assert_eq!(mmuext(MmuextCommand::UnmarkSuper, 0, 0), Err(Errno::OpNotSupp));
    let unknown = [MmuextOp { cmd: 99, ..MmuextOp::default() }];
    assert_eq!(call(Hypercall::MmuextOp, [address(&unknown), 1, 0, SELF, 0]), Err(Errno::NoSys));
    assert_eq!(call(Hypercall::MmuextOp, [NOWHERE, 1, 0, SELF, 0]), Err(Errno::Fault));
    // The count, as with mmu_update.
    let flush = MmuextOp { cmd: MmuextCommand::TlbFlushLocal as u32, ..MmuextOp::default() };
    let mut done = 77u32;
    let list = [flush, flush, unknown[0], flush];
    let result = call(Hypercall::MmuextOp, [address(&list), 4, address_mut(&mut done), SELF, 0]);
    assert_eq!((result, done), (Err(Errno::NoSys), 2));
    let result = call(Hypercall::MmuextOp, [address(&list), 2, address_mut(&mut done), SELF, 0]);
    assert_eq!((result, done), (Ok(0), 2));
}
test!("calls.mmuext", extended_operations);

/// core 4.9.
fn multicalls() {
    let entry = |which: Hypercall, args: [u64; 6]| MulticallEntry { op: which.number(), result: 77, args };
    let version = entry(Hypercall::XenVersion, [0; 6]);
    let unknown = MulticallEntry { op: 11, ..version };
    let refused = entry(Hypercall::UpdateVaMapping, [NOWHERE, 0, 0, 0, 0, 0]);
    let run = |list: &mut [MulticallEntry]| {
        let count = list.len() as u64;
        call(Hypercall::Multicall, [address_mut(list), count, 0, 0, 0])
    };
    let mut list = [version, unknown, refused, version];
    assert_eq!(run(&mut list), Ok(0), "one bad entry does not fail the list");
    assert!(list[0].result >> 16 >= 3);
    assert_eq!(list[1].result, -38);
    assert_eq!(list[2].result, -22);
    assert_eq!(list[3].result, list[0].result);

    let inner = [version];
    let nested = entry(Hypercall::Multicall, [address(&inner), 1, 0, 0, 0, 0]);
    let mut list = [nested, version];
    assert_eq!(run(&mut list), Ok(0));
    assert_eq!(list[0].result, -22, "no list within a list");
    assert_eq!(list[1].result >> 16, inner[0].result.max(list[1].result) >> 16);
    assert_eq!(inner[0].result, 77, "the inner list was not run");

    assert_eq!(call(Hypercall::Multicall, [NOWHERE, 1, 0, 0, 0]), Err(Errno::Fault));
    assert_eq!(call(Hypercall::Multicall, [0, 0, 0, 0, 0]), Ok(0));
}
test!("calls.multicall", multicalls);

/// core 4.8: a batch mixes calls, and each sees what the earlier did: read-only, then pin, then unpin, then writable.
fn a_multicall_is_done_in_order() {
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let map = |flags| MulticallEntry {
        op: Hypercall::UpdateVaMapping.number(),
        result: 77,
        args: [page.address(), (frame * PAGE) | flags, uvmf::INVLPG, 0, 0, 0],
    };
    let pin = MmuextOp { cmd: MmuextCommand::PinL1 as u32, pad: 0, arg1: frame, arg2: 0 };
    let unpin = MmuextOp { cmd: MmuextCommand::Unpin as u32, ..pin };
    let op = |op: &MmuextOp| MulticallEntry {
        op: Hypercall::MmuextOp.number(),
        result: 77,
        args: [address(op), 1, 0, SELF, 0, 0],
    };
    let mut list = [map(READ_ONLY), op(&pin), map(LEAF), op(&unpin), map(LEAF)];
    let count = list.len() as u64;
    call(Hypercall::Multicall, [address_mut(&mut list), count, 0, 0, 0]).expect("a list is done");
    assert_eq!([list[0].result, list[1].result, list[3].result, list[4].result], [0; 4]);
    assert!(list[2].result < 0, "the page was a table at that moment");
    probe::write(page.address(), 1).expect("the page is writable again");
}
test!("calls.multicall.order", a_multicall_is_done_in_order);

/// core 3.12.
fn assists() {
    let assist = |command, kind| call(Hypercall::VmAssist, [command, kind, 0, 0, 0]);
    for kind in [0, 1, 2, 3, 5, 32] {
        assert_eq!(assist(0, kind), Ok(0), "assist {kind}");
    }
    for kind in [6, 31, 33, 64, u64::MAX] {
        assert!(assist(0, kind).is_err(), "assist {kind}");
    }
    assert_eq!(assist(2, 2), Err(Errno::NoSys));
    for kind in [2, 5, 32] {
        assert_eq!(assist(1, kind), Ok(0), "assist {kind}");
    }
}
test!("calls.assist", assists);
