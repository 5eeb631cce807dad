//! A second vcpu changes what the first one's fast paths need while that runs user code. One CPU runs, so they alternate.
//!
//! A vcpu gets its first state once in a domain's life, so each of these wants a boot of its own.

use crate::stage::{Stage, TOP, TOP_INDEX, Trip, check_fault, check_filled, check_syscall_at, check_used, fill};
use core::sync::atomic::{AtomicU64, Ordering};
use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackType};
use guests::abi::mmu::{MmuextCommand, uvmf};
use guests::abi::shared::vcpu_info;
use guests::abi::vcpu::{RegisterVcpuInfo, VcpuOp};
use guests::abi::{Errno, Hypercall};
use guests::memory::{PAGE, Pages};
use guests::probe::second::{VCPU, join, start};
use guests::probe::{self, Code, Registers, Stop, UserSpace, call, mmuext, update_va_mapping};
use guests::tables::{BRANCH, Chain, LEAF, READ_ONLY, current_root, pin};
use guests::{code, events, flag, hypercall, test};
use unikernel::hypercall::RunstateArea;
use unikernel::time;
use unikernel::traps::{self, SYSCALL};

static PLACE: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];
static REFUSED: AtomicU64 = AtomicU64::new(0);

fn place(i: usize) -> u64 {
    PLACE[i].load(Ordering::Relaxed)
}

fn set_places(values: [u64; 6]) {
    for (place, value) in PLACE.iter().zip(values) {
        place.store(value, Ordering::Relaxed);
    }
    REFUSED.store(0, Ordering::Relaxed);
}

fn expect<T, E>(result: Result<T, E>) {
    if result.is_err() {
        REFUSED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Tells the user program of the first vcpu that all is done. The word is in its data page.
fn tell() {
    probe::store(place(0), 1);
}

/// User code that waits until [`tell`], then makes a system call, or faults.
fn waits_then_calls() -> Code {
    code!("2: mov rax, [rdi]", "test rax, rax", "jz 2b", "syscall")
}

fn waits_then_faults() -> Code {
    code!("2: mov rax, [rdi]", "test rax, rax", "jz 2b", "mov r8, [rsi]")
}

/// Enters user code, which waits, lets the second vcpu do `job`, and gives how the code went on.
fn while_user_code_runs(stage: &Stage, code: Code, job: fn()) -> (Stop, Trip) {
    probe::store(stage.space.data(), 0);
    let mut trip = Trip::new();
    (trip.registers.rdi, trip.registers.rsi) = (UserSpace::DATA, 0x10);
    start(job);
    let stop = stage.go(code, &trip);
    join();
    assert_eq!(REFUSED.load(Ordering::Relaxed), 0, "the second vcpu was refused something");
    // TEST leaves these flags behind, and the word is 1.
    trip.frame.rax = 1;
    (stop, trip)
}

const LENGTH: u64 = 10;

fn both(stage: &Stage, job: fn(), check: impl Fn()) {
    let (stop, trip) = while_user_code_runs(stage, waits_then_calls(), job);
    check_syscall_at(&stop, &trip, UserSpace::CODE + LENGTH);
    check();
    let (stop, trip) = while_user_code_runs(stage, waits_then_faults(), job);
    check_fault(&stop, &trip, (14, 4, UserSpace::CODE + LENGTH - 2));
    check();
}

fn remap() {
    expect(probe::mmu_update(place(1), place(2)));
    tell();
}

fn remap_flushed() {
    expect(update_va_mapping(TOP, place(2), uvmf::INVLPG | uvmf::ALL));
    tell();
}

fn remap_by_writing() {
    probe::store(place(3), place(2));
    tell();
}

/// The stack becomes another page, by every way to change an entry.
fn the_stack_moves() {
    call(Hypercall::VmAssist, [0, 2, 0, 0, 0]).expect("the assist is known");
    let stage = Stage::new();
    let (slot, written) = (stage.chain.machine_slot(1, TOP_INDEX), stage.chain.slot(1, TOP_INDEX));
    for job in [remap as fn(), remap_flushed, remap_by_writing] {
        for i in [1, 0] {
            stage.ordinary();
            set_places([stage.space.data(), slot, stage.chain.page_entry(i, LEAF), written, 0, 0]);
            stage.fill(7);
            both(&stage, job, || {
                // The frame of the way there was on the other one.
                check_used(stage.chain.page_address(i), 7);
                stage.fill(7);
                stage.map(1 - i);
            });
            stage.map(i);
        }
    }
}
test!("stubs.other.remaps", the_stack_moves);

/// The page that was the stack becomes a table; another is the stack.
fn make_a_table() {
    expect(update_va_mapping(TOP, place(2), uvmf::INVLPG | uvmf::ALL));
    fill(place(3), 0);
    expect(update_va_mapping(place(3), (place(4) * PAGE) | READ_ONLY, uvmf::INVLPG | uvmf::ALL));
    expect(pin(1, place(4)));
    tell();
}

fn the_stack_becomes_a_table() {
    let stage = Stage::new();
    for i in [0, 1, 0] {
        let (va, frame) = (stage.chain.page_address(i), stage.chain.page_frame(i));
        stage.map(i);
        stage.ordinary();
        set_places([stage.space.data(), 0, stage.chain.page_entry(1 - i, LEAF), va, frame, 0]);
        stage.fill(7);
        both(&stage, make_a_table, || {
            check_filled(va, 0);
            check_used(stage.chain.page_address(1 - i), 7);
            fill(stage.chain.page_address(1 - i), 7);
            mmuext(MmuextCommand::Unpin, frame, 0).expect("it is pinned");
            update_va_mapping(va, (frame * PAGE) | LEAF, uvmf::INVLPG).expect("it is no table any more");
            stage.map(i);
        });
    }
}
test!("stubs.other.table", the_stack_becomes_a_table);

/// The entry of the root in use, and of the table below.
fn another_way_to_the_stack() {
    let stage = Stage::new();
    let other = Chain::new();
    for i in 0..TOP_INDEX {
        other.poke(1, i, stage.chain.peek(1, i));
    }
    other.poke(1, TOP_INDEX, other.page_entry(0, LEAF));
    other.protect(3);
    let back = |level: u32| match level {
        4 => stage.hang_in(stage.chain.entry(3, BRANCH)),
        _ => drop(stage.chain.update(level, 0, stage.chain.entry(level - 1, BRANCH)).expect("an entry is taken")),
    };
    for level in [4, 3, 2] {
        let slot = if level == 4 { current_root() * PAGE } else { stage.chain.machine_slot(level, 0) };
        stage.ordinary();
        set_places([stage.space.data(), slot, other.entry(level - 1, BRANCH), 0, 0, 0]);
        fill(other.page_address(0), 7);
        both(&stage, remap, || {
            check_used(other.page_address(0), 7);
            fill(other.page_address(0), 7);
            back(level);
        });
    }
    other.unprotect(3);
}
test!("stubs.other.tables-above", another_way_to_the_stack);

fn switch_levels_on() {
    expect(call(Hypercall::VmAssist, [0, 4, 0, 0, 0]));
    tell();
}

/// core 3.12: an assist is the domain's, whoever switches it on.
fn an_assist_of_the_other() {
    let stage = Stage::new();
    stage.ordinary();
    set_places([stage.space.data(), 0, 0, 0, 0, 0]);
    let (stop, _) = while_user_code_runs(&stage, waits_then_calls(), switch_levels_on);
    assert_eq!(stop.frame.rip, UserSpace::CODE + LENGTH, "{}", stop.frame);
    let trip = Trip::with_flags(0x202 | flag::IOPL);
    let stop = stage.go(code!("syscall"), &trip);
    assert_eq!(stop.frame.rflags & flag::IOPL, flag::IOPL, "{}", stop.frame);
}
test!("stubs.other.assist", an_assist_of_the_other);

static AREA: RunstateArea = RunstateArea::new();

/// Notes the time.
fn look_at_the_clock() {
    PLACE[1].store(time::now_ns(), Ordering::Relaxed);
    tell();
}

/// core 6.4: what could not be written into an area of the kernel's while user code ran is there when the handler is.
fn an_area_of_the_kernel() {
    let stage = Stage::new();
    stage.ordinary();
    hypercall::register_runstate(0, &AREA).expect("an area is taken");
    let since = code!("mov r8, [r12]", "jmp r15").start;
    for (code, vector) in [(waits_then_calls(), SYSCALL), (waits_then_faults(), 14)] {
        let mut gate = traps::gate(14, 0, true);
        gate.address = since;
        guests::install_gate(gate);
        crate::stage::register(CallbackType::Syscall, CALLBACK_MASKS_EVENTS, since);
        set_places([stage.space.data(), 0, 0, 0, 0, 0]);
        probe::store(stage.space.data(), 0);
        let mut trip = Trip::new();
        (trip.registers.rdi, trip.registers.rsi) = (UserSpace::DATA, 0x10);
        (trip.registers.r12, trip.registers.r15) = (probe::address(&AREA) + 8, traps::handler_address(vector));
        start(look_at_the_clock);
        let stop = stage.go(code, &trip).trapped(vector);
        guests::install_gate(traps::gate(14, 0, true));
        crate::stage::register_ordinary();
        join();
        // This vcpu has run since the other looked at the clock, and not before.
        let (entered, looked) = (stop.frame.r8, place(1));
        assert!(looked > 0 && entered >= looked, "runs since {entered}, the other looked at {looked}");
    }
}
test!("stubs.other.runstate", an_area_of_the_kernel);

fn register(vcpu: u32, frame: u64, offset: u32) -> Result<u64, Errno> {
    let arg = RegisterVcpuInfo { mfn: frame, offset, reserved: 0 };
    let op = VcpuOp::RegisterVcpuInfo.number();
    call(Hypercall::VcpuOp, [op, u64::from(vcpu), probe::address(&arg), 0, 0])
}

static ANSWER: AtomicU64 = AtomicU64::new(0);

fn move_the_record_of_the_first() {
    let result = register(0, place(1), 64);
    ANSWER.store(result.unwrap_or_else(Errno::to_rax), Ordering::Relaxed);
    tell();
}

/// As Xen: nobody moves the record of another vcpu that is up.
fn a_record_of_another_stays() {
    let stage = Stage::new();
    stage.ordinary();
    let page = Pages::allocate(1).expect("a page is free");
    probe::store(page.address() + 64, 0);
    set_places([stage.space.data(), page.frame(0).expect("the page is ours"), 0, 0, 0, 0]);
    both(&stage, move_the_record_of_the_first, || {
        assert_eq!(ANSWER.load(Ordering::Relaxed), Errno::Inval.to_rax());
        assert_eq!(probe::load(page.address() + 64), 0, "nothing was written there");
    });
    // Down, it may be moved.
    register(VCPU, page.frame(0).expect("the page is ours"), 128).expect("that vcpu is down");
    stage.ordinary();
    let _ = page.leak();
}
test!("stubs.other.record", a_record_of_another_stays);

/// core 10.2: the record of the caller's own moves, and with it mask and fault address.
fn the_record_moves() {
    let stage = Stage::new();
    stage.ordinary();
    let page = Pages::allocate(1).expect("a page is free");
    let at = page.address() + 0x800;
    let old = events::shared_page().addr() as u64;
    register(0, page.frame(0).expect("the page is ours"), 0x800).expect("a place in our page");
    // Whatever `events` writes from here on is of no interest to the hypervisor.
    let old_words = [0, vcpu_info::CR2 as u64].map(|word| probe::load(old + word));
    let new = |word: usize| probe::load(at + word as u64);
    probe::store(at, 0x100);
    assert_eq!(probe::load(old), old_words[0]);
    for (rflags, masked) in [(0x202, 0), (2, 1), (0x202, 0)] {
        let mut trip = Trip::with_flags(rflags);
        let mut stop = stage.go(code!("syscall"), &trip);
        assert_eq!(stop.frame.saved_mask(), masked, "{}", stop.frame);
        stop.handler_mask = 1;
        crate::stage::check_syscall(&stop, &trip);
        assert_eq!(new(0) & 0xff00, 0x100);
        trip.registers.rdi = 0x12_3000 + u64::from(masked);
        let mut stop = stage.go(code!("mov r8, [rdi]"), &trip);
        stop.handler_mask = 1;
        check_fault(&stop, &trip, (14, 4, UserSpace::CODE));
        assert_eq!(new(vcpu_info::CR2), trip.registers.rdi);
        assert_eq!(probe::load(old + vcpu_info::CR2 as u64), old_words[1]);
    }
    let registers = Registers { rdi: at, ..guests::pattern() };
    let mut trip = Trip { registers, ..Trip::new() };
    trip.frame.rflags = 0x202;
    let _ = stage.go(code!("hlt"), &trip).trapped(13);
    let _ = page.leak();
}
test!("stubs.record", the_record_moves);
