//! The kernel's stack becomes another page, or its root another table, between two trips: what is pushed and popped is in the
//! page that the tables say, with a flush or without one.

use crate::stage::{SP, Stage, TOP, TOP_INDEX, Trip, check_fault, check_filled, check_syscall, check_used, fill};
use guests::abi::callback::IretContext;
use guests::abi::mmu::{MmuextCommand, MmuextOp, MulticallEntry, uvmf};
use guests::abi::{Hypercall, domid};
use guests::memory::{self, PAGE, Pages};
use guests::probe::{self, Registers, UserSpace, call, enter_by_iret_at, execute, mmuext, update_va_mapping};
use guests::tables::{BRANCH, Chain, LEAF, READ_ONLY, current_root, pin};
use guests::{code, pattern, test};

/// What pages are filled with before a trip.
const EMPTY: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// A way to change the entry of the stack's last page.
type Change = fn(&Stage, u64);

fn by_list(stage: &Stage, entry: u64) {
    stage.chain.update(1, TOP_INDEX, entry).expect("an entry is taken");
}

fn by_list_of_two(stage: &Stage, entry: u64) {
    let slot = stage.chain.machine_slot(1, TOP_INDEX);
    let list = [slot, 0, slot, entry];
    let self_ = u64::from(domid::SELF);
    call(Hypercall::MmuUpdate, [probe::address(&list), 2, 0, self_, 0]).expect("entries are taken");
}

fn by_address(_: &Stage, entry: u64) {
    update_va_mapping(TOP, entry, 0).expect("an entry is taken");
}

fn by_address_flushed(_: &Stage, entry: u64) {
    update_va_mapping(TOP, entry, uvmf::INVLPG).expect("an entry is taken");
}

fn by_address_flushed_everywhere(_: &Stage, entry: u64) {
    update_va_mapping(TOP, entry, uvmf::TLB_FLUSH | uvmf::ALL).expect("an entry is taken");
}

fn written(stage: &Stage, entry: u64) {
    let registers = Registers { rdi: stage.chain.slot(1, TOP_INDEX), rax: entry, ..pattern() };
    let _ = execute(code!("mov [rdi], rax"), &registers).ended();
}

fn exchanged(stage: &Stage, entry: u64) {
    let registers = Registers { rdi: stage.chain.slot(1, TOP_INDEX), rax: entry, ..pattern() };
    let _ = execute(code!("xchg [rdi], rax"), &registers).ended();
}

fn by_multicall(stage: &Stage, entry: u64) {
    let update = [stage.chain.machine_slot(1, TOP_INDEX), entry];
    let args = [probe::address(&update), 1, 0, u64::from(domid::SELF), 0, 0];
    let mut list = MulticallEntry { op: Hypercall::MmuUpdate.number(), args, ..MulticallEntry::default() };
    call(Hypercall::Multicall, [probe::address_mut(&mut list), 1, 0, 0, 0]).expect("the list is done");
    assert_eq!(list.result, 0);
}

const CHANGES: [Change; 8] = [
    by_list,
    by_list_of_two,
    by_address,
    by_address_flushed,
    by_address_flushed_everywhere,
    written,
    exchanged,
    by_multicall,
];

fn the_last_page_becomes_another() {
    call(Hypercall::VmAssist, [0, 2, 0, 0, 0]).expect("the assist is known");
    let stage = Stage::new();
    let trip = Trip::new();
    let fault = Trip { registers: Registers { rdi: 0x10, ..trip.registers }, ..trip };
    for (n, change) in CHANGES.into_iter().enumerate() {
        for i in [1, 0, 1, 0] {
            // Both pages have been the stack, and the CPU knows the last.
            stage.ordinary();
            stage.fill(EMPTY);
            stage.open(code!("syscall"), &trip);
            change(&stage, stage.chain.page_entry(i, LEAF));
            stage.put(i, &trip.frame);
            check_syscall(&enter_by_iret_at(trip.back, &trip.registers), &trip);
            stage.check_page(1 - i, EMPTY);

            stage.map(1 - i);
            stage.ordinary();
            stage.fill(EMPTY);
            stage.open(code!("mov r8, [rdi]"), &fault);
            change(&stage, stage.chain.page_entry(i, LEAF));
            stage.put(i, &fault.frame);
            check_fault(&enter_by_iret_at(fault.back, &fault.registers), &fault, (14, 4, UserSpace::CODE));
            stage.check_page(1 - i, EMPTY);
        }
        unikernel::println!("way {n} of changing the entry");
    }
}
test!("stubs.stack.remapped", the_last_page_becomes_another);

/// The way back reads what the tables say, not what the CPU still knows.
fn the_frame_of_the_right_page() {
    let stage = Stage::new();
    let trip = Trip::new();
    let wrong = IretContext { rip: 0xbad, rax: 0xbad, ..trip.frame };
    for change in [by_list, by_list_of_two, by_address, by_address_flushed, by_multicall] as [Change; 5] {
        for i in [1, 0] {
            stage.ordinary();
            stage.open(code!("syscall"), &trip);
            stage.put(1 - i, &wrong);
            stage.put(i, &trip.frame);
            change(&stage, stage.chain.page_entry(i, LEAF));
            check_syscall(&enter_by_iret_at(trip.back, &trip.registers), &trip);
        }
    }
    stage.map(0);
    stage.ordinary();
}
test!("stubs.stack.frame", the_frame_of_the_right_page);

/// The stack goes away and comes back: while it is away nothing needs it.
fn a_stack_that_comes_back() {
    let stage = Stage::new();
    for away in [0, stage.chain.page_entry(0, READ_ONLY)] {
        for change in [by_list, by_address_flushed] as [Change; 2] {
            stage.ordinary();
            change(&stage, away);
            let registers = Registers { rax: 25, rdi: 1, rsi: 0, ..pattern() };
            assert_eq!(execute(code!("syscall"), &registers).ended().rax, 0);
            assert_eq!(execute(code!("rdgsbase rax"), &pattern()).ended().rax, 0);
            stage.map(0);
            stage.ordinary();
        }
    }
}
test!("stubs.stack.back-again", a_stack_that_comes_back);

/// The page that was the stack becomes a page table: nothing is written to it any more.
fn a_stack_that_becomes_a_table() {
    let stage = Stage::new();
    let trip = Trip::new();
    for i in [0, 1, 0] {
        stage.map(i);
        stage.ordinary();
        let (frame, va) = (stage.chain.page_frame(i), stage.chain.page_address(i));
        stage.map(1 - i);
        fill(va, 0);
        update_va_mapping(va, (frame * PAGE) | READ_ONLY, uvmf::INVLPG).expect("a page can be made read-only");
        pin(1, frame).expect("nothing writes the page");
        for _ in 0..2 {
            stage.ordinary();
            let stop = stage.go(code!("mov eax, [0]"), &trip);
            check_fault(&stop, &trip, (14, 4, UserSpace::CODE));
        }
        check_filled(va, 0);
        mmuext(MmuextCommand::Unpin, frame, 0).expect("it is pinned");
        update_va_mapping(va, (frame * PAGE) | LEAF, uvmf::INVLPG).expect("it is no table any more");
    }
}
test!("stubs.stack.table", a_stack_that_becomes_a_table);

/// A second chain whose last page of the stack is another; the rest of the stack is the first's.
fn another_chain(stage: &Stage) -> Chain {
    let chain = Chain::new();
    for i in 0..TOP_INDEX {
        chain.poke(1, i, stage.chain.peek(1, i));
    }
    chain.poke(1, TOP_INDEX, chain.page_entry(0, LEAF));
    chain
}

/// core 4.4: tables above the last, the root's entry among them.
fn a_table_above_becomes_another() {
    let stage = Stage::new();
    let other = another_chain(&stage);
    other.protect(3);
    let trip = Trip::new();
    let go = |page: u64, empty: u64| {
        fill(page, EMPTY);
        fill(empty, EMPTY);
        stage.open(code!("syscall"), &trip);
        probe::store_bytes(page + PAGE - 72, zerocopy::IntoBytes::as_bytes(&trip.frame));
        check_syscall(&enter_by_iret_at(trip.back, &trip.registers), &trip);
        check_used(page, EMPTY);
        check_filled(empty, EMPTY);
    };
    let pages = [stage.chain.page_address(0), other.page_address(0)];
    let link = |level: u32, chain: &Chain| match level {
        4 => stage.hang_in(chain.entry(3, BRANCH)),
        _ => {
            stage.chain.update(level, 0, chain.entry(level - 1, BRANCH)).expect("an entry is taken");
        }
    };
    for level in [4, 3, 2] {
        for _ in 0..2 {
            go(pages[0], pages[1]);
            link(level, &other);
            go(pages[1], pages[0]);
            link(level, &stage.chain);
        }
    }
    go(pages[0], pages[1]);
    other.unprotect(3);
}
test!("stubs.stack.tables-above", a_table_above_becomes_another);

/// core 4.6: each root has its own stack, and its own user mode.
fn another_root() {
    let stage = Stage::new();
    let other = another_chain(&stage);
    let (old, page) = (current_root(), Pages::allocate(1).expect("a page is free"));
    let root = memory::entry_address(0, 4).expect("there is a root");
    for i in (0..256).chain(272..512) {
        probe::store(page.address() + i * 8, probe::load(root + i * 8));
    }
    probe::store(page.address(), other.entry(3, BRANCH));
    other.protect(3);
    page.set_writable(0, false).expect("a page can be made read-only");
    let new = page.frame(0).expect("the page is ours");
    pin(4, new).expect("it is a root");
    let spaces = [&UserSpace::new(), &stage.space];
    let pages = [other.page_address(0), stage.chain.page_address(0)];
    let mut trip = Trip::new();
    trip.registers.rdi = UserSpace::DATA;
    for (i, space) in spaces.into_iter().enumerate() {
        probe::store(space.data(), 100 + i as u64);
    }
    let code = code!("mov r8, [rdi]", "syscall");
    for both in [true, false, true] {
        for (i, space) in spaces.into_iter().enumerate() {
            let root = [new, old][i];
            space.open(code.bytes(), SP);
            if both {
                // As Linux does it.
                let list = [
                    MmuextOp { cmd: MmuextCommand::NewBaseptr as u32, pad: 0, arg1: root, arg2: 0 },
                    MmuextOp { cmd: MmuextCommand::NewUserBaseptr as u32, pad: 0, arg1: space.root(), arg2: 0 },
                ];
                let self_ = u64::from(domid::SELF);
                call(Hypercall::MmuextOp, [probe::address(&list), 2, 0, self_, 0]).expect("roots are taken");
            } else {
                mmuext(MmuextCommand::NewUserBaseptr, space.root(), 0).expect("a root is taken");
                mmuext(MmuextCommand::NewBaseptr, root, 0).expect("a root is taken");
            }
            pages.iter().for_each(|page| fill(*page, EMPTY));
            probe::store_bytes(pages[i] + PAGE - 72, zerocopy::IntoBytes::as_bytes(&trip.frame));
            let stop = enter_by_iret_at(trip.back, &trip.registers);
            let mut seen = trip;
            seen.registers.r8 = 100 + i as u64;
            crate::stage::check_syscall_at(&stop, &seen, UserSpace::CODE + 5);
            check_used(pages[i], EMPTY);
            check_filled(pages[1 - i], EMPTY);
        }
    }
    assert_eq!(current_root(), old);
    mmuext(MmuextCommand::NewUserBaseptr, 0, 0).expect("no user root is taken");
    mmuext(MmuextCommand::Unpin, new, 0).expect("it is pinned");
    page.set_writable(0, true).expect("it is no table any more");
    other.unprotect(3);
}
test!("stubs.stack.roots", another_root);
