//! Page faults of user code (core 3.6).

use crate::stage::{Stage, Trip, check_entry, check_fault, check_fault_address};
use guests::abi::callback::TrapInfo;
use guests::abi::{Hypercall, selector};
use guests::memory::PAGE;
use guests::probe::{self, Registers, UserSpace, call};
use guests::{NOT_CANONICAL, code, flag, pattern, test};
use unikernel::traps;

/// Where nothing is.
const NOTHING: u64 = UserSpace::DATA + 5 * PAGE + 0x123;
const READ: u64 = 4;
const WRITE: u64 = 6;
const WRITE_FORBIDDEN: u64 = 7;

/// A trip whose RDI is the address of the fault.
fn at(address: u64, rflags: u64) -> Trip {
    let trip = Trip::with_flags(rflags);
    Trip { registers: Registers { rdi: address, ..trip.registers }, ..trip }
}

fn every_kind_of_error() {
    let stage = Stage::new();
    let (read, write, fetch) = (code!("mov r8, [rdi]"), code!("mov [rdi], r8"), code!("jmp rdi"));
    let hole = 0xffff_8300_0000_0000;
    for rflags in [0x202, 2, 0x202 | flag::AC | flag::DF | flag::NT, flag::AC | 2] {
        for (code, address, error) in [
            (read, NOTHING, READ),
            (write, NOTHING, WRITE),
            (write, UserSpace::CODE + 0x800, WRITE_FORBIDDEN),
            (read, probe::stack_end() - 8, READ),
            (write, 0, WRITE),
            (read, 0x7fff_ffff_fff8, READ),
        ] {
            // Aligned, or AC would have its say.
            let trip = at(address & !7, rflags);
            check_fault(&stage.go(code, &trip), &trip, (14, error, UserSpace::CODE));
            check_fault_address(address & !7);
        }
        // The hypervisor's part: whether something is there is not told, or is no secret.
        for (code, error) in [(read, READ), (write, WRITE)] {
            let trip = at(hole, rflags);
            let mut stop = stage.go(code, &trip);
            stop.frame.error &= !1;
            check_fault(&stop, &trip, (14, error, UserSpace::CODE));
            check_fault_address(hole);
        }
        let trip = at(NOTHING, rflags);
        check_fault(&stage.go(fetch, &trip), &trip, (14, 0x14, NOTHING));
        check_fault_address(NOTHING);
        // core 3.2: no page fault.
        let trip = at(NOT_CANONICAL, rflags);
        check_fault(&stage.go(read, &trip), &trip, (13, 0, UserSpace::CODE));
        check_fault_address(NOTHING);
    }
    stage.ordinary();
}
test!("stubs.fault.errors", every_kind_of_error);

/// core 3.2: the gate is the one that was set last, and masks events only if it says so.
fn another_gate() {
    let stage = Stage::new();
    let other = code!("mov r8, rsp", "jmp r15");
    let handler = traps::handler_address(14);
    for masks in [true, false, true] {
        guests::install_gate(TrapInfo { address: other.start, ..traps::gate(14, 0, masks) });
        for rflags in [0x202, 2] {
            let mut trip = at(NOTHING, rflags);
            trip.registers.r15 = handler;
            let mut stop = stage.go(code!("mov r9, [rdi]"), &trip);
            assert_eq!(stop.handler_mask, u8::from(masks || rflags == 2));
            stop.handler_mask = 1;
            trip.registers.r8 = crate::stage::SP - 64;
            check_fault(&stop, &trip, (14, READ, UserSpace::CODE));
            check_fault_address(NOTHING);
            stage.ordinary();
        }
    }
    // The whole table anew.
    call(Hypercall::SetTrapTable, [0; 5]).expect("the table is cleared");
    for vector in 0..=255 {
        guests::install_gate(traps::gate(vector, if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 }, true));
    }
    let trip = at(NOTHING, 0x202);
    check_fault(&stage.go(code!("mov r9, [rdi]"), &trip), &trip, (14, READ, UserSpace::CODE));
}
test!("stubs.fault.gate", another_gate);

/// Bits of a step or a stack pointer that makes no sense do not keep a fault from its handler.
fn odd_faults() {
    let stage = Stage::new();
    for rsp in [0, 3, NOT_CANONICAL, 0xffff_8300_0000_0000] {
        let mut trip = at(NOTHING, 0x202);
        trip.frame.rsp = rsp;
        check_fault(&stage.go(code!("mov r8, [rdi]"), &trip), &trip, (14, READ, UserSpace::CODE));
    }
    // The fault comes before the step is over.
    let trip = at(NOTHING, 0x302);
    check_fault(&stage.go(code!("mov r8, [rdi]"), &trip), &trip, (14, READ, UserSpace::CODE));
    // A push without a stack.
    let mut trip = Trip::new();
    trip.frame.rsp = NOTHING & !7;
    check_fault(&stage.go(code!("push rax"), &trip), &trip, (14, WRITE, UserSpace::CODE));
    check_fault_address((NOTHING & !7) - 8);
    // 32-bit code has its own selector in the frame.
    let mut trip = at(NOTHING, 0x202);
    trip.frame.cs = 0xe023;
    let mut stop = stage.go(code!("mov r8d, [rdi]"), &trip);
    // 32-bit code reads it as DEC EAX and a move; registers lose their upper halves, so only the frame is looked at.
    assert_eq!((stop.frame.vector, stop.frame.cs), (14, 0xe023), "{}", stop.frame);
    assert_eq!(stop.frame.error, READ, "{}", stop.frame);
    stop.frame.cs = u64::from(selector::GUEST_CS);
    check_entry(&stop, &trip);
    check_fault_address(NOTHING);
    // The kernel's own faults are not counted as user code's.
    let registers = Registers { rdi: NOTHING, ..pattern() };
    let stop = probe::execute(code!("mov rax, [rdi]"), &registers).trapped(14);
    assert_eq!((stop.frame.error, stop.frame.from_user()), (0, false));
    stage.ordinary();
}
test!("stubs.fault.odd", odd_faults);
