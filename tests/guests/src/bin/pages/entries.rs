//! What an entry of each level may say (core 4.2).

use guests::abi::mmu::pte;
use guests::memory::Window;
use guests::probe::{self, Registers, execute, update_va_mapping};
use guests::tables::{BRANCH, Chain, LEAF, READ_ONLY};
use guests::{Errno, code, pattern, test};

/// Bits that make an entry of a table refused.
const REFUSED_IN_BRANCHES: [(&str, u64); 6] = [
    ("PWT", pte::PWT),
    ("PCD", pte::PCD),
    ("PSE", pte::PAT_OR_PSE),
    ("G", pte::GLOBAL),
    ("bit 51", 1 << 51),
    ("bit 48", 1 << 48),
];

fn illegal_bits_in_branches() {
    let chain = Chain::new();
    chain.protect(4);
    chain.pin(4).expect("a chain can be pinned");
    for level in 2..=4 {
        for (name, bits) in REFUSED_IN_BRANCHES {
            let entry = chain.entry(level - 1, BRANCH) | bits;
            assert!(chain.update(level, 0, entry).is_err(), "{name} in level {level}");
            assert!(chain.update(level, 5, entry).is_err(), "{name} in a fresh slot of level {level}");
            assert_eq!(chain.peek(level, 5), 0);
        }
    }
    chain.unpin(4).expect("it is pinned");
    chain.unprotect(4);
    // The same at promotion.
    for level in 2..=4 {
        for (name, bits) in REFUSED_IN_BRANCHES {
            chain.poke(level, 9, chain.entry(level - 1, BRANCH) | bits);
            chain.protect(4);
            assert!(chain.pin(level).is_err(), "{name} in level {level} at promotion");
            chain.unprotect(4);
        }
        chain.poke(level, 9, 0);
    }
}
test!("entries.branch-bits", illegal_bits_in_branches);

fn illegal_leaves() {
    let chain = Chain::new();
    chain.protect(1);
    chain.pin(1).expect("an L1 can be pinned");
    for (name, entry) in [
        ("bit 51", chain.page_entry(0, LEAF) | 1 << 51),
        ("bit 48", chain.page_entry(0, LEAF) | 1 << 48),
        ("itself, writable", chain.entry(1, LEAF)),
    ] {
        assert!(chain.update(1, 3, entry).is_err(), "{name}");
        assert_eq!(chain.peek(1, 3), 0, "{name}");
    }
    chain.update(1, 3, chain.entry(1, READ_ONLY)).expect("a table may be seen");
    chain.update(1, 3, 0).expect("an entry can be removed");
    chain.unpin(1).expect("it is pinned");
    chain.unprotect(1);
}
test!("entries.leaves", illegal_leaves);

/// core 4.2: what is not present is nobody's business.
fn absent_entries_may_say_anything() {
    let chain = Chain::new();
    let contents = [!1, 0x8000_0000_0000_0000, 0x000f_ffff_ffff_f000, 0xdead_beef_0000_0e62];
    for level in 1..=4 {
        for (i, content) in (100..).zip(contents) {
            chain.poke(level, i, content);
        }
    }
    chain.protect(4);
    chain.pin(4).expect("absent entries are not looked at");
    for level in 1..=4 {
        for (i, content) in (100..).zip(contents) {
            assert_eq!(chain.peek(level, i), content);
            chain.update(level, i + 10, content).expect("absent entries are not looked at");
            assert_eq!(chain.peek(level, i + 10), content);
        }
    }
    chain.unpin(4).expect("it is pinned");
    chain.unprotect(4);
}
test!("entries.absent", absent_entries_may_say_anything);

/// core 4.2: bits 9-11 and 52-62 belong to software (52 marks kernel leaves, 62 grants: left out here), NX to anybody.
fn software_bits_survive() {
    const SOFTWARE: u64 = 7 << 9 | 0x1ff << 53;
    let chain = Chain::new();
    chain.poke(1, 2, chain.page_entry(0, READ_ONLY) | SOFTWARE | pte::NX);
    chain.protect(4);
    chain.pin(4).expect("a chain can be pinned");
    let visible = SOFTWARE | pte::NX;
    assert_eq!(chain.peek(1, 2) & visible, visible);
    for level in 1..=4 {
        let entry = if level == 1 { chain.page_entry(0, LEAF) } else { chain.entry(level - 1, BRANCH) };
        for bits in [SOFTWARE, pte::NX, visible, 0, 1 << 57, 1 << 58] {
            chain.update(level, 0, entry | bits).expect("software bits are free");
            assert_eq!(chain.peek(level, 0) & visible, bits, "level {level}");
        }
    }
    chain.unpin(4).expect("it is pinned");
    chain.unprotect(4);
}
test!("entries.software-bits", software_bits_survive);

/// core 4.2: ring 3 must be able to use what the guest kernel maps for itself.
fn the_user_bit_is_forced() {
    let chain = Chain::new();
    let no_user = BRANCH & !pte::USER;
    for level in 2..=4 {
        chain.poke(level, 0, chain.entry(level - 1, no_user));
    }
    chain.protect(4);
    chain.pin(4).expect("a chain can be pinned");
    for level in 1..=4 {
        assert_eq!(chain.peek(level, 0) & pte::USER, pte::USER, "level {level}");
    }
    chain.update(1, 1, chain.page_entry(1, READ_ONLY)).expect("a leaf is taken");
    assert_eq!(chain.peek(1, 1) & pte::USER, pte::USER);
    chain.unpin(4).expect("it is pinned");
    chain.unprotect(4);
}
test!("entries.user-bit", the_user_bit_is_forced);

/// core 2.1, 4.3: slots 256-271 of a root are the hypervisor's, whatever the guest wrote there.
fn the_hypervisors_slots() {
    let chain = Chain::new();
    for index in 256..272 {
        chain.poke(4, index, chain.entry(3, BRANCH));
    }
    chain.protect(4);
    chain.pin(4).expect("the content of the hypervisor's slots does not count");
    for index in 256..272 {
        assert!(chain.peek(4, index) != chain.entry(3, BRANCH), "slot {index} was overwritten");
        for entry in [0, chain.entry(3, BRANCH)] {
            assert_eq!(chain.update(4, index, entry), Err(Errno::Inval), "slot {index}");
        }
    }
    for index in [255, 272, 511] {
        chain.update(4, index, chain.entry(3, BRANCH)).expect("the slot is the guest's");
        chain.update(4, index, 0).expect("the slot is the guest's");
    }
    chain.unpin(4).expect("it is pinned");
    chain.unprotect(4);
}
test!("entries.hole", the_hypervisors_slots);

/// core 2.3: no table maps itself or one of its own level. (Xen allows it read-only, and has an option to refuse.)
fn no_table_leads_to_its_own_level() {
    let chain = Chain::new();
    chain.protect(4);
    chain.pin(4).expect("a chain can be pinned");
    for level in 2..=4 {
        let own = chain.entry(level, BRANCH & !pte::WRITE);
        assert_eq!(chain.update(level, 1, own), Err(Errno::Inval), "level {level}");
        for other in 2..=4 {
            if other + 1 != level {
                assert!(chain.update(level, 1, chain.entry(other, BRANCH)).is_err());
            }
        }
    }
    chain.unpin(4).expect("it is pinned");
    chain.unprotect(4);
}
test!("entries.self", no_table_leads_to_its_own_level);

/// A page that must not be executed is not; one that may be written is, and so on: rights mean what they say.
fn rights_are_in_force() {
    let chain = Chain::new();
    let window = Window::reserve(1).expect("there is room");
    let va = window.address();
    let map = |flags| update_va_mapping(va, chain.page_entry(0, flags), 2).expect("a page is mapped");
    map(LEAF);
    probe::write(va, 0x0b0f).expect("the page is writable");
    assert_eq!(probe::read(chain.page_address(0)), Ok(0x0b0f));
    map(READ_ONLY);
    let fault = probe::write(va, 1).expect_err("the page is read-only");
    assert_eq!((fault.vector, fault.error, fault.address), (14, 3, va));
    let jump = || execute(code!("jmp rdi"), &Registers { rdi: va, ..pattern() });
    assert_eq!(jump().trapped(6).frame.rip, va);
    map(READ_ONLY | pte::NX);
    assert_eq!(jump().trapped(14).frame.error, 0x11, "a fetch of a present page");
    update_va_mapping(va, 0, 2).expect("nothing is mapped");
    let fault = probe::read(va).expect_err("nothing is mapped");
    assert_eq!((fault.vector, fault.error), (14, 0));
}
test!("entries.rights", rights_are_in_force);
