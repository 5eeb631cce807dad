//! Writes to page tables by ordinary instructions (core 4.7): every form Linux uses.

use guests::abi::mmu::pte;
use guests::abi::{Errno, Hypercall};
use guests::memory::{self, Window};
use guests::probe::{self, Code, Registers, Stop, call, execute, update_va_mapping};
use guests::tables::{Chain, LEAF};
use guests::{code, pattern, test};

/// An address whose L1 entry we write, that entry's address, and pages to map there.
struct Target {
    window: Window,
    chain: Chain,
}

impl Target {
    fn new() -> Self {
        // core 3.12: without this assist, emulation is not promised.
        call(Hypercall::VmAssist, [0, 2, 0, 0, 0]).expect("the assist is known");
        let target = Self { window: Window::reserve(1).expect("there is room"), chain: Chain::new() };
        for i in 0..2 {
            probe::write(target.chain.page_address(i), 1000 + i).expect("the page is writable");
        }
        target
    }

    fn va(&self) -> u64 {
        self.window.address()
    }

    fn slot(&self) -> u64 {
        memory::entry_address(self.va(), 1).expect("there is a table")
    }

    fn entry(&self) -> u64 {
        probe::read(self.slot()).expect("the table is readable")
    }

    /// Sets the entry by a call, flushed.
    fn set(&self, entry: u64) {
        update_va_mapping(self.va(), entry, 2).expect("an entry is taken");
    }

    /// Runs `code` with RDI = the slot, RAX and RDX as given.
    fn run(&self, code: Code, rax: u64, rdx: u64) -> Stop {
        let registers = Registers { rdi: self.slot(), rax, rdx, ..pattern() };
        execute(code, &registers)
    }

    fn maps(&self, i: u64) -> bool {
        probe::mmuext(guests::abi::mmu::MmuextCommand::TlbFlushLocal, 0, 0).expect("a flush");
        probe::read(self.va()) == Ok(1000 + i)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The bits of an entry a guest chose; the hypervisor adds U and may add its mark.
fn chosen(entry: u64) -> u64 {
    entry & !(pte::USER | pte::GUEST_KERNEL | pte::GLOBAL)
}

fn moves() {
    let target = Target::new();
    let entry = |i| target.chain.page_entry(i, LEAF);
    let forms = [
        code!("mov [rdi], rax"),
        code!("lea rbx, [rdi - 0x80]", "mov [rbx + 0x80], rax"),
        code!("lea rbx, [rdi - 0x12340]", "mov [rbx + 0x12340], rax"),
        code!("mov rbx, 3", "lea r12, [rdi - 24]", "mov [r12 + rbx*8], rax"),
        code!("mov r13, rdi", "mov [r13], rax"),
        code!("mov r9, rax", "mov [rdi], r9"),
        code!("xchg [rdi], rax"),
    ];
    for (n, form) in forms.into_iter().enumerate() {
        for i in [0, 1, 0] {
            let _ = target.run(form, entry(i), 0).ended();
            assert_eq!(chosen(target.entry()), entry(i), "form {n}");
            assert!(target.maps(i), "form {n}");
        }
        let _ = target.run(form, 0, 0).ended();
        assert_eq!(target.entry(), 0, "form {n}");
    }
    target.set(entry(0));
    let _ = target.run(code!("mov qword ptr [rdi], 0"), 0, 0).ended();
    assert_eq!(target.entry(), 0);
    let _ = target.run(code!("mov qword ptr [rdi], 0x12345678"), 0, 0).ended();
    assert_eq!(target.entry(), 0x1234_5678, "absent: any content");
}
test!("writes.mov", moves);

fn narrow_moves() {
    let target = Target::new();
    let start = 0x1122_3344_5566_7700;
    for (form, expected) in [
        (code!("mov [rdi], al"), 0x1122_3344_5566_77aa & !1),
        (code!("mov [rdi], ax"), 0x1122_3344_5566_aaaa & !1),
        (code!("mov [rdi], eax"), 0x1122_3344_aaaa_aaaa & !1),
        (code!("mov [rdi + 4], eax"), 0xaaaa_aaaa_5566_7700),
        (code!("mov [rdi + 6], ax"), 0xaaaa_3344_5566_7700),
        (code!("mov byte ptr [rdi + 3], 0x12"), 0x1122_3344_1266_7700),
        (code!("mov dword ptr [rdi], 0x12345678"), 0x1122_3344_1234_5678),
    ] {
        target.set(start);
        let _ = target.run(form, 0xaaaa_aaaa_aaaa_aaaa, 0).ended();
        assert_eq!(target.entry(), expected);
    }
}
test!("writes.narrow", narrow_moves);

fn exchanges() {
    let target = Target::new();
    let entry = |i| target.chain.page_entry(i, LEAF);
    target.set(entry(0));
    let before = target.entry();
    let frame = target.run(code!("xchg [rdi], rdx"), 0, entry(1)).ended();
    assert_eq!(frame.rdx, before, "the old entry as the guest sees it");
    assert!(target.maps(1));

    // core 4.7: compare with what is in the slot.
    let held = target.entry();
    let cmpxchg = code!("lock cmpxchg [rdi], rdx", "setz bl");
    let frame = target.run(cmpxchg, held, entry(0)).ended();
    assert_eq!((frame.rax, frame.rbx & 0xff), (held, 1));
    assert!(target.maps(0));
    let held = target.entry();
    let frame = target.run(cmpxchg, held ^ 0x1000, entry(1)).ended();
    assert_eq!((frame.rax, frame.rbx & 0xff), (held, 0), "a mismatch is a result");
    assert_eq!(target.entry(), held);
    assert!(target.maps(0));
}
test!("writes.exchange", exchanges);

fn bit_operations() {
    let target = Target::new();
    let leaf = target.chain.page_entry(0, LEAF);
    let carry = |stop: Stop| stop.ended().rbx & 0xff;
    let forms = [
        (code!("lock btr qword ptr [rdi], 5", "setc bl"), pte::ACCESSED, false),
        (code!("lock bts qword ptr [rdi], 5", "setc bl"), pte::ACCESSED, true),
        (code!("mov ecx, 5", "lock btr [rdi], rcx", "setc bl"), pte::ACCESSED, false),
        (code!("mov ecx, 6", "lock bts [rdi], rcx", "setc bl"), pte::DIRTY, true),
    ];
    for (n, (form, bit, sets)) in forms.into_iter().enumerate() {
        for was_set in [false, true] {
            target.set(if was_set { leaf | bit } else { leaf & !bit });
            assert_eq!(carry(target.run(form, 0, 0)), u64::from(was_set), "form {n}");
            assert_eq!(target.entry() & bit != 0, sets, "form {n}");
            assert!(target.maps(0), "form {n}");
        }
    }
}
test!("writes.bits", bit_operations);

fn and_and_or() {
    let target = Target::new();
    let leaf = target.chain.page_entry(0, LEAF);
    let clear = [
        code!("lock and byte ptr [rdi], 0xfd"),
        code!("lock and dword ptr [rdi], -3"),
        code!("lock and qword ptr [rdi], -3"),
        code!("mov rax, -3", "and [rdi], rax"),
        code!("mov rax, -3", "lock and [rdi], rax"),
    ];
    for (n, form) in clear.into_iter().enumerate() {
        target.set(leaf);
        let _ = target.run(form, 0, 0).ended();
        assert_eq!(chosen(target.entry()), leaf & !pte::WRITE, "form {n}");
    }
    let set = [
        code!("lock or byte ptr [rdi], 2"),
        code!("or qword ptr [rdi], 2"),
        code!("mov eax, 2", "or [rdi], rax"),
        code!("mov eax, 2", "lock or [rdi], eax"),
    ];
    for (n, form) in set.into_iter().enumerate() {
        target.set(leaf & !pte::WRITE);
        let _ = target.run(form, 0, 0).ended();
        assert_eq!(chosen(target.entry()), leaf, "form {n}");
    }
    target.set(leaf);
    let _ = target.run(code!("and qword ptr [rdi], 0x7ffff000"), 0, 0).ended();
    assert_eq!(target.entry(), leaf & 0x7fff_f000, "81 /4 with a sign-extended immediate");
}
test!("writes.and-or", and_and_or);

/// core 4.7: what validation refuses is the fault as it was.
fn refused_writes() {
    let target = Target::new();
    let leaf = target.chain.page_entry(0, LEAF);
    target.set(leaf);
    let held = target.entry();
    let check = |stop: Stop, what: &str| {
        assert!(!stop.ended, "{what} is to be refused");
        assert_eq!((stop.frame.vector, stop.frame.error), (14, 3), "{what}");
        assert_eq!(guests::events::page_fault_address() & !7, target.slot(), "{what}");
        assert_eq!(target.entry(), held, "{what}");
    };
    let mov = code!("mov [rdi], rax");
    check(target.run(mov, leaf | 1 << 51, 0), "a reserved bit");
    let table = target.slot() & !4095;
    let table = memory::frame_of(table).expect("the table is ours");
    check(target.run(mov, (table << 12) | LEAF, 0), "a table, writable");
    check(target.run(code!("mov [rdi + 1], eax"), 0, 0), "not aligned");
    assert!(target.maps(0));

    // An L2 is not for this.
    let slot = memory::entry_address(target.va(), 2).expect("there is a table");
    let fault = probe::write(slot, 0).expect_err("an L2 is changed by calls only");
    assert_eq!((fault.vector, fault.error, fault.address), (14, 3, slot));

    let _ = target.run(mov, 0, 0).ended();
    assert_eq!(target.entry(), 0);
}
test!("writes.refused", refused_writes);

/// core 4.1: references are taken and dropped by such writes too.
fn references_follow_the_writes() {
    let target = Target::new();
    let chain = Chain::new();
    let frame = chain.frame(1);
    let entry = (frame << 12) | LEAF;
    let mov = code!("mov [rdi], rax");
    chain.set_writable(1, false).expect("a page can be made read-only");
    let _ = target.run(mov, entry, 0).ended();
    assert_eq!(chain.pin(1), Err(Errno::Inval), "a writable mapping exists");
    let _ = target.run(code!("lock and byte ptr [rdi], 0xfd"), 0, 0).ended();
    chain.pin(1).expect("it is read-only now");
    let _ = target.run(mov, entry, 0).trapped(14);
    let _ = target.run(mov, 0, 0).ended();
    chain.unpin(1).expect("it is pinned");
    chain.unprotect(1);
}
test!("writes.references", references_follow_the_writes);
