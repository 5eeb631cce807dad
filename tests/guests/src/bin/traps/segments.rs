//! Segment bases and descriptor tables (core 3.10, 3.11), callbacks as calls (core 3.4).

use guests::abi::callback::{CallbackOp, CallbackRegister, CallbackType, CallbackUnregister, SegmentBase};
use guests::abi::mmu::MmuextCommand;
use guests::abi::{Errno, Hypercall, selector};
use guests::memory::{PAGE, Pages};
use guests::probe::{self, Registers, call, execute};
use guests::{NOT_CANONICAL, code, pattern, test};

fn set_base(which: u64, base: u64) -> Result<u64, Errno> {
    call(Hypercall::SetSegmentBase, [which, base, 0, 0, 0])
}

fn bases_by_call() {
    let words = [7u64, 8, 9];
    let address = probe::address(&words);
    set_base(SegmentBase::Fs.number(), address).expect("an address is taken");
    set_base(SegmentBase::GsKernel.number(), address + 8).expect("an address is taken");
    set_base(SegmentBase::GsUser.number(), address + 16).expect("an address is taken");
    assert_eq!(execute(code!("mov rax, fs:[0]"), &pattern()).ended().rax, 7);
    assert_eq!(execute(code!("mov rax, gs:[0]"), &pattern()).ended().rax, 8);
    for which in 0..3 {
        assert_eq!(set_base(which, NOT_CANONICAL), Err(Errno::Inval));
        set_base(which, 0).expect("zero is taken");
    }
    // A selector that does not load becomes null, and the call still succeeds.
    assert_eq!(set_base(SegmentBase::GsUserSelector.number(), 0x1230), Ok(0));
    assert!(set_base(4, 0).is_err());
}
test!("segments.bases", bases_by_call);

const FLAT_DATA_DPL0: u64 = 0x00cf_9300_0000_ffff;
const FLAT_CODE_DPL0: u64 = 0x00af_9b00_0000_ffff;

/// core 3.10: the page is typed: read-only first, checked, and DPL 3 afterwards.
fn a_descriptor_table_is_checked() {
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let frames = [frame];
    let set_gdt = |entries| call(Hypercall::SetGdt, [probe::address(&frames), entries, 0, 0, 0]);
    let poke = |index: u64, descriptor| probe::write(page.address() + index * 8, descriptor);
    poke(1, FLAT_CODE_DPL0).expect("the page is writable");
    poke(2, FLAT_DATA_DPL0).expect("the page is writable");

    assert_eq!(set_gdt(u64::from(selector::GUEST_ENTRIES) + 1), Err(Errno::Inval));
    assert_eq!(set_gdt(16), Err(Errno::Inval), "still writable");
    page.set_writable(0, false).expect("a page can be made read-only");
    set_gdt(16).expect("the table is taken");
    let load = code!("mov ds, eax", "mov eax, ds");
    let ds = |selector| execute(load, &Registers { rax: selector, ..pattern() });
    assert_eq!(ds(0x13).ended().rax, 0x13);
    assert_eq!(ds(0x1b).trapped(13).frame.error, 0x18, "entry 3 is empty");
    assert_eq!(ds(0xe02b).ended().rax, 0xe02b, "the flat segments stay");
    assert_eq!(ds(0).ended().rax, 0);
    assert!(page.set_writable(0, true).is_err(), "the page is a descriptor table");

    // update_descriptor writes into the live table.
    let update =
        |index: u64, descriptor| call(Hypercall::UpdateDescriptor, [frame * 4096 + index * 8, descriptor, 0, 0, 0]);
    update(3, FLAT_DATA_DPL0).expect("a data segment is taken");
    assert_eq!(ds(0x1b).ended().rax, 0x1b);
    let tss = 0x0000_8900_0000_0067;
    assert_eq!(update(4, tss), Err(Errno::Inval), "a task-state segment");
    let gate = 0x0000_8e00_e008_0000;
    assert_eq!(update(4, gate), Err(Errno::Inval), "an interrupt gate");
    assert_eq!(
        call(Hypercall::UpdateDescriptor, [frame * 4096 + 4, FLAT_DATA_DPL0, 0, 0, 0]),
        Err(Errno::Inval),
        "not aligned"
    );
    update(3, 0).expect("an empty descriptor is taken");
    assert_eq!(ds(0).ended().rax, 0);

    set_gdt(0).expect("no table is taken");
    page.set_writable(0, true).expect("the page is free again");
    // A page with a task-state segment in it is refused as a whole.
    poke(5, tss).expect("the page is writable");
    page.set_writable(0, false).expect("a page can be made read-only");
    assert_eq!(set_gdt(16), Err(Errno::Inval));
    page.set_writable(0, true).expect("the page is no table");
}
test!("segments.gdt", a_descriptor_table_is_checked);

/// core 3.10: a table has up to 14 pages, and all of them are taken in one call.
fn a_descriptor_table_of_14_pages() {
    const PAGES: u64 = 14;
    let pages = Pages::allocate(PAGES).expect("pages are free");
    let mut frames = [0; 14];
    for (n, frame) in (0..).zip(&mut frames) {
        for at in (0..PAGE).step_by(8) {
            probe::write(pages.address() + n * PAGE + at, FLAT_DATA_DPL0).expect("the page is writable");
        }
        *frame = pages.frame(n).expect("the page is ours");
        pages.set_writable(n, false).expect("a page can be made read-only");
    }
    let set_gdt = |entries| call(Hypercall::SetGdt, [probe::address(&frames), entries, 0, 0, 0]);
    for entries in [PAGES * 512, 9 * 512, 8 * 512 + 1, PAGES * 512] {
        assert_eq!(set_gdt(entries), Ok(0), "{entries} entries");
    }
    let last = (PAGES * 512 - 1) << 3 | 3;
    let load = code!("mov ds, eax", "mov eax, ds");
    assert_eq!(execute(load, &Registers { rax: last, ..pattern() }).ended().rax, last);
    assert_eq!(execute(load, &Registers { rax: 0, ..pattern() }).ended().rax, 0);
    set_gdt(0).expect("no table is taken");
    (0..PAGES).for_each(|n| pages.set_writable(n, true).expect("the page is free again"));
}
test!("segments.gdt.long", a_descriptor_table_of_14_pages);

/// core 3.10, 4.6: an LDT is mapped when its first descriptor is used.
fn a_local_descriptor_table() {
    let page = Pages::allocate(1).expect("a page is free");
    probe::write(page.address() + 8, FLAT_DATA_DPL0).expect("the page is writable");
    page.set_writable(0, false).expect("a page can be made read-only");
    probe::mmuext(MmuextCommand::SetLdt, page.address(), 4).expect("an LDT is taken");
    let load = code!("mov ds, eax", "mov eax, ds");
    let ds = |selector| execute(load, &Registers { rax: selector, ..pattern() });
    assert_eq!(ds(0xf).ended().rax, 0xf, "entry 1 of the local table");
    assert_eq!(ds(0x2f).trapped(13).frame.error, 0x2c, "past its end");
    assert_eq!(ds(0).ended().rax, 0);
    assert!(probe::mmuext(MmuextCommand::SetLdt, page.address() + 8, 4).is_err(), "not aligned");
    assert!(probe::mmuext(MmuextCommand::SetLdt, page.address(), 8193).is_err(), "too long");
    probe::mmuext(MmuextCommand::SetLdt, 0, 0).expect("no LDT is taken");
    page.set_writable(0, true).expect("the page is free again");
}
test!("segments.ldt", a_local_descriptor_table);

fn callbacks_are_checked() {
    let register = |kind: u16, address| {
        let arg = CallbackRegister { kind, address, ..CallbackRegister::default() };
        let op = CallbackOp::Register.number();
        call(Hypercall::CallbackOp, [op, probe::address(&arg), 0, 0, 0])
    };
    for kind in [CallbackType::Event, CallbackType::Failsafe, CallbackType::Syscall] {
        assert_eq!(register(kind as u16, NOT_CANONICAL), Err(Errno::Inval));
    }
    assert_eq!(register(3, 0), Err(Errno::NoSys));
    assert_eq!(register(100, 0), Err(Errno::NoSys));
    let unregister = |kind| {
        let arg = CallbackUnregister { kind, pad: 0 };
        let op = CallbackOp::Unregister.number();
        call(Hypercall::CallbackOp, [op, probe::address(&arg), 0, 0, 0])
    };
    assert_eq!(unregister(CallbackType::Event as u16), Err(Errno::Inval));
    assert_eq!(unregister(100), Err(Errno::NoSys));
    assert_eq!(call(Hypercall::CallbackOp, [2, 0, 0, 0, 0]), Err(Errno::NoSys));
}
test!("segments.callbacks", callbacks_are_checked);
