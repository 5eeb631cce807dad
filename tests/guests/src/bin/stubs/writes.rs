//! Writes to page tables that begin with the bytes of those that kernels are made of (core 4.7), and some that only look so.

use crate::stage::Stage;
use guests::abi::Hypercall;
use guests::memory::{PAGE, Pages};
use guests::probe::{self, Code, Fault, Registers, call, execute};
use guests::tables::{LEAF, READ_ONLY};
use guests::{code, flag, pattern, registers_of, test};

/// An entry of the stack's own L1 table that leads nowhere: any number will do if its lowest bit is clear.
const INDEX: u64 = 100;

struct Table {
    stage: Stage,
}

impl Table {
    fn new() -> Self {
        call(Hypercall::VmAssist, [0, 2, 0, 0, 0]).expect("the assist is known");
        Self { stage: Stage::new() }
    }

    fn slot(&self) -> u64 {
        self.stage.chain.slot(1, INDEX)
    }

    fn set(&self, entry: u64) {
        self.stage.chain.update(1, INDEX, entry).expect("an absent entry is any number");
    }

    fn get(&self) -> u64 {
        self.stage.chain.peek(1, INDEX)
    }

    /// Runs one instruction of `length` bytes on the entry `old`, and says what must come of it.
    #[track_caller]
    fn does(&self, code: Code, length: u64, (old, rax, rdx): (u64, u64, u64), want: (u64, u64, u64, Option<bool>)) {
        // Twice: the second time the CPU's last shape is the same.
        for carry in [0, 0x8d5] {
            self.set(old);
            let set = code!("push rbx", "popfq", "jmp r15");
            let registers = Registers { rdi: self.slot(), rax, rdx, rbx: carry | 2, r15: code.start, ..pattern() };
            let frame = execute(set, &registers).ended();
            let (entry, rax_after, rdx_after, zero) = want;
            assert_eq!(self.get(), entry, "{frame}");
            assert_eq!(frame.rip, code.start + length, "{frame}");
            let after = Registers { rax: rax_after, rdx: rdx_after, rsp: probe::stack_end(), ..registers };
            assert_eq!(registers_of(&frame), after, "{frame}");
            // AND says whether nothing is left, and never carries.
            let flags = zero.map_or(carry, |zero| u64::from(zero) << 6);
            let told = if zero.is_some() { 0x41 } else { 0x8d5 };
            assert_eq!(frame.rflags & told, flags & told, "{frame}");
        }
    }
}

/// The five that kernels are made of.
fn ordinary_writes() {
    let table = Table::new();
    let (old, rax, rdx) = (0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4320, 0x1111_2222_3333_4440);
    table.does(code!("mov [rdi], rax"), 3, (old, rax, rdx), (rax, rax, rdx, None));
    table.does(code!("mov [rdi], rdx"), 3, (old, rax, rdx), (rdx, rax, rdx, None));
    table.does(code!("xchg [rdi], rax"), 3, (old, rax, rdx), (rax, old, rdx, None));
    table.does(code!("xchg [rdi], rdx"), 3, (old, rax, rdx), (rdx, rax, old, None));
    table.does(code!("and byte ptr [rdi], 0x51"), 3, (old, rax, rdx), (old & !0xff | 0x50, rax, rdx, Some(false)));
    table.does(code!("and byte ptr [rdi], 0xf"), 3, (old, rax, rdx), (old & !0xff, rax, rdx, Some(true)));
}
test!("stubs.write.ordinary", ordinary_writes);

/// What a compare-exchange and a bit test leave in registers and flags.
fn writes_that_compare() {
    let table = Table::new();
    let (old, new) = (0x1234_5678_9abc_def0, 0x1111_2222_3333_4440);
    for prefix in [false, true] {
        for equal in [true, false] {
            table.set(old);
            let rax = if equal { old } else { old ^ 0x10 };
            let registers = Registers { rdi: table.slot(), rax, rdx: new, ..pattern() };
            let exchange = if prefix { code!("lock cmpxchg [rdi], rdx") } else { code!("cmpxchg [rdi], rdx") };
            let frame = execute(exchange, &registers).ended();
            assert_eq!(table.get(), if equal { new } else { old });
            assert_eq!((frame.rax, frame.rflags & 0x40 != 0), (old, equal), "{frame}");
            let patched = code!(".byte 0x3e", "cmpxchg [rdi], rdx");
            table.set(old);
            let frame = execute(patched, &registers).ended();
            assert_eq!(table.get(), if equal { new } else { old });
            assert_eq!((frame.rax, frame.rflags & 0x40 != 0), (old, equal), "{frame}");
        }
        for (bit, was) in [(4, true), (3, false), (63, false), (60, true)] {
            table.set(old);
            let registers = Registers { rdi: table.slot(), ..pattern() };
            let code = match (prefix, bit) {
                (false, 4) => code!("btr qword ptr [rdi], 4"),
                (false, 3) => code!("btr qword ptr [rdi], 3"),
                (false, 63) => code!("btr qword ptr [rdi], 63"),
                (false, _) => code!("btr qword ptr [rdi], 60"),
                (true, 4) => code!("lock btr qword ptr [rdi], 4"),
                (true, 3) => code!("lock btr qword ptr [rdi], 3"),
                (true, 63) => code!("lock btr qword ptr [rdi], 63"),
                (true, _) => code!("lock btr qword ptr [rdi], 60"),
            };
            let frame = execute(code, &registers).ended();
            assert_eq!(table.get(), old & !(1 << bit), "bit {bit}");
            assert_eq!(frame.rflags & 1 != 0, was, "bit {bit}: {frame}");
            assert_eq!(registers_of(&frame), Registers { rsp: probe::stack_end(), ..registers }, "{frame}");
        }
    }
}
test!("stubs.write.compares", writes_that_compare);

/// Attack 13: eight zero bytes are an ADD of a byte, the first instruction the CPU meets or not.
fn zero_bytes_are_no_write_of_ours() {
    let table = Table::new();
    let zeros = Pages::allocate(1).expect("a page is free");
    for at in (0..PAGE).step_by(8) {
        probe::store(zeros.address() + at, 0);
    }
    for code in [Code::at(zeros.address()), Code::at(zeros.address() + 128)] {
        for index in [INDEX, 2] {
            let (slot, before) = (table.stage.chain.slot(1, index), table.stage.chain.peek(1, index));
            let stop = execute(code, &Registers { rax: slot, ..pattern() }).trapped(14);
            assert_eq!((stop.frame.rip, stop.frame.error), (code.start, 3), "{}", stop.frame);
            assert_eq!(guests::events::page_fault_address(), slot);
            assert_eq!(table.stage.chain.peek(1, index), before);
        }
        // After an ordinary one as well.
        table.set(0x10);
        probe::write(table.slot(), 0x20).expect("an absent entry is any number");
        assert_eq!(table.get(), 0x20);
    }
}
test!("stubs.write.zeros", zero_bytes_are_no_write_of_ours);

/// Attack 14: a write that begins on the page before the table, and others that are not aligned, are the guest's fault.
fn writes_across_a_page() {
    let table = Table::new();
    // Two pages in a row: one that is written, then the L1 table.
    let pages = Pages::allocate(1).expect("a page is free");
    let chain = &table.stage.chain;
    let plain = pages.frame(0).expect("the page is ours");
    for (index, entry) in [(200, (plain * PAGE) | LEAF), (201, (chain.frame(1) * PAGE) | READ_ONLY)] {
        chain.update(1, index, entry).expect("an entry is taken");
    }
    let edge = 201 * PAGE;
    let first = chain.peek(1, 0);
    // The same instructions aligned first, so that their shape is known.
    let forms: [(Code, u64); 5] = [
        (code!("mov [rdi], rdx"), 8),
        (code!("xchg [rdi], rdx"), 8),
        (code!("cmpxchg [rdi], rdx"), 8),
        (code!("lock cmpxchg [rdi], rdx"), 8),
        (code!("btr qword ptr [rdi], 2"), 8),
    ];
    for (form, size) in forms {
        for below in [4, 1, 7] {
            table.set(0);
            let registers = Registers { rdi: table.slot(), rax: 0, rdx: 0xff_fff0, ..pattern() };
            let _ = execute(form, &registers).ended();
            probe::store(pages.address() + PAGE - 8, 0x7777_7777_7777_7777);
            let stop = execute(form, &Registers { rdi: edge - below, ..registers }).trapped(14);
            let fault = Fault { vector: 14, error: stop.frame.error, address: guests::events::page_fault_address() };
            assert_eq!(fault, Fault { vector: 14, error: 3, address: edge }, "{size} bytes from -{below}");
            assert_eq!(stop.frame.rip, form.start, "{}", stop.frame);
            assert_eq!(probe::load(pages.address() + PAGE - 8), 0x7777_7777_7777_7777);
            assert_eq!(chain.peek(1, 0), first);
        }
        // Inside the table, but not aligned.
        for off in [1, 4] {
            let registers = Registers { rdi: table.slot() + off, rax: 0, rdx: 0xff_fff0, ..pattern() };
            table.set(0x40);
            let stop = execute(form, &registers).trapped(14);
            assert_eq!((stop.frame.rip, stop.frame.error), (form.start, 3), "{}", stop.frame);
            assert_eq!(table.get(), 0x40);
        }
    }
    // The first entry by its own address is an ordinary write.
    probe::write(edge, first).expect("the entry is as it was");
    assert_eq!(chain.peek(1, 0), first);
    for index in [200, 201] {
        chain.update(1, index, 0).expect("an entry is taken");
    }
}
test!("stubs.write.across", writes_across_a_page);

/// A single step over a write ends behind it.
fn a_step_over_a_write() {
    let table = Table::new();
    let code = code!("push rbx", "popfq", "mov [rdi], rdx", "nop", "nop");
    table.set(0);
    let registers = Registers { rdi: table.slot(), rdx: 0x30, rbx: flag::TF | 2, ..pattern() };
    let stop = execute(code, &registers).trapped(1);
    assert_eq!(stop.frame.rip, code.start + 5, "{}", stop.frame);
    assert_eq!(table.get(), 0x30);
}
test!("stubs.write.step", a_step_over_a_write);
