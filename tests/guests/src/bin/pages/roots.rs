//! Changing roots (core 4.6, 4.8; pitfall 7).

use guests::abi::mmu::MmuextCommand;
use guests::memory::{PAGE, Pages};
use guests::probe::{self, execute, mmuext};
use guests::tables::{Chain, current_root, pin};
use guests::{Errno, code, memory, pattern, test};

/// A page with the entries of the root in use, read-only already.
fn copy_of_the_root() -> Pages {
    let page = Pages::allocate(1).expect("a page is free");
    let root = memory::entry_address(0, 4).expect("there is a root");
    for i in (0..256).chain(272..512) {
        let entry = probe::read(root + i * 8).expect("the root is readable");
        probe::write(page.address() + i * 8, entry).expect("the page is writable");
    }
    page.set_writable(0, false).expect("a page can be made read-only");
    page
}

fn cr3() -> u64 {
    execute(code!("mov rax, cr3"), &pattern()).ended().rax >> 12
}

fn another_root() {
    let page = copy_of_the_root();
    let frame = page.frame(0).expect("the page is ours");
    let old = current_root();
    assert_eq!(cr3(), old);
    mmuext(MmuextCommand::NewBaseptr, frame, 0).expect("a root need not be pinned");
    assert_eq!(cr3(), frame);
    assert!(page.set_writable(0, true).is_err(), "it is in use");
    // The hypervisor's part is there too: its table is readable.
    let table = guests::hypercall::machphys_mapping().expect("there is a table").v_start;
    assert_eq!(probe::read(table + frame * 8), Ok(page.first()));
    pin(4, frame).expect("it can be pinned while in use");
    mmuext(MmuextCommand::NewBaseptr, frame, 0).expect("the same root again");
    mmuext(MmuextCommand::Unpin, frame, 0).expect("it can be unpinned while in use");
    assert!(page.set_writable(0, true).is_err(), "it is in use");
    mmuext(MmuextCommand::NewBaseptr, old, 0).expect("the old root is pinned");
    assert_eq!(cr3(), old);
    page.set_writable(0, true).expect("typeless at once");
}
test!("roots.new", another_root);

fn what_is_no_root_is_refused() {
    let chain = Chain::new();
    chain.protect(4);
    let old = current_root();
    for command in [MmuextCommand::NewBaseptr, MmuextCommand::NewUserBaseptr] {
        for frame in [chain.page_frame(0), 0x000f_ffff_ffff, u64::MAX] {
            assert_eq!(mmuext(command, frame, 0), Err(Errno::Inval), "{} {frame:#x}", command.name());
        }
    }
    chain.pin(3).expect("an L3 can be pinned");
    assert_eq!(mmuext(MmuextCommand::NewUserBaseptr, chain.frame(3), 0), Err(Errno::Inval));
    chain.unpin(3).expect("it is pinned");
    assert_eq!(cr3(), old);
    mmuext(MmuextCommand::NewUserBaseptr, chain.frame(4), 0).expect("a user root is taken");
    assert!(chain.set_writable(4, true).is_err(), "the user root is in use");
    mmuext(MmuextCommand::NewUserBaseptr, 0, 0).expect("no user root is taken");
    chain.unprotect(4);
}
test!("roots.refused", what_is_no_root_is_refused);

/// core 4.4: a change in the root in use is visible at once, in both directions.
fn a_change_in_the_live_root() {
    let chain = Chain::new();
    chain.protect(3);
    let slot = current_root() * PAGE + 300 * 8;
    let va = 0xffff_0000_0000_0000 | 300 << 39;
    probe::write(chain.page_address(0), 0x77).expect("the page is writable");
    for _ in 0..3 {
        probe::mmu_update(slot, chain.entry(3, guests::tables::BRANCH)).expect("a slot of ours");
        assert_eq!(probe::read(va), Ok(0x77));
        assert!(chain.set_writable(2, true).is_err());
        probe::mmu_update(slot, 0).expect("a slot of ours");
        let fault = probe::read(va).expect_err("nothing is mapped");
        assert_eq!((fault.vector, fault.error, fault.address), (14, 0, va));
        chain.unprotect(3);
        chain.protect(3);
    }
    chain.unprotect(3);
}
test!("roots.live", a_change_in_the_live_root);
