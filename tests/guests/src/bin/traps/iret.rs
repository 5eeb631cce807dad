//! The `iret` hypercall (core 3.7).

use guests::abi::callback::{IRET_IN_SYSCALL, IretContext};
use guests::probe::{Registers, enter_by_iret, kernel_frame};
use guests::{NOT_CANONICAL, code, events, flag, mask_address, pattern, registers_of, test};

fn every_register_comes_back() {
    let code = code!("nop");
    let mut registers = pattern();
    let frame = IretContext { rax: registers.rax, rcx: registers.rcx, r11: registers.r11, ..kernel_frame(code) };
    let stop = enter_by_iret(&frame, &registers);
    registers.rsp = frame.rsp;
    assert_eq!(registers_of(&stop.ended()), registers);
    // With the flag, RCX and R11 may be lost, and nothing else.
    let lossy = IretContext { flags: IRET_IN_SYSCALL, ..frame };
    let ended = registers_of(&enter_by_iret(&lossy, &registers).ended());
    assert_eq!(Registers { rcx: registers.rcx, r11: registers.r11, ..ended }, registers);
}
test!("iret.registers", every_register_comes_back);

fn the_interrupt_flag_becomes_the_mask() {
    let read_mask = code!("movzx eax, byte ptr [rdi]");
    let registers = Registers { rdi: mask_address(), ..pattern() };
    for (rflags, mask) in [(0x2, 1), (0x202, 0)] {
        let frame = IretContext { rflags, ..kernel_frame(read_mask) };
        let ended = enter_by_iret(&frame, &registers).ended();
        assert_eq!(ended.rax, mask);
        assert_eq!(u64::from(ended.saved_mask()), mask);
        let _ = events::mask_upcalls();
    }
}
test!("iret.mask", the_interrupt_flag_becomes_the_mask);

/// core 3.7: CS and SS count only in their low 16 bits, and become ring 3.
fn the_rest_of_the_selectors_is_dropped() {
    let code = code!("mov eax, cs", "mov edx, ss");
    let base = kernel_frame(code);
    for (cs, ss) in [
        (base.cs | 0xff_0000_0000, base.ss),
        (base.cs | 0xdead_beef_dead_0000, base.ss | 0x1234_5678_9abc_0000),
        (base.cs, base.ss & !3),
    ] {
        let ended = enter_by_iret(&IretContext { cs, ss, ..base }, &pattern()).ended();
        assert_eq!((ended.rax, ended.rdx), (0xe033, 0xe02b));
    }
}
test!("iret.selectors", the_rest_of_the_selectors_is_dropped);

fn flags_are_taken_but_for_iopl_and_vm() {
    let code = code!("pushfq", "pop rax");
    let wanted = flag::AC | flag::DF | 0x8d5;
    let frame = IretContext { rflags: wanted | flag::IOPL | 1 << 17 | 0x2, ..kernel_frame(code) };
    let rax = enter_by_iret(&frame, &pattern()).ended().rax;
    assert_eq!(rax & (wanted | flag::IOPL | 1 << 17), wanted);
    assert_eq!(rax & flag::IF, flag::IF, "the real flag is always set");
}
test!("iret.flags", flags_are_taken_but_for_iopl_and_vm);

fn single_step_starts_at_the_target() {
    let code = code!("nop", "nop");
    let frame = IretContext { rflags: flag::TF | 0x2, ..kernel_frame(code) };
    let stop = enter_by_iret(&frame, &pattern()).trapped(1);
    assert_eq!(stop.frame.rip, code.start + 1);
}
test!("iret.single-step", single_step_starts_at_the_target);

/// core 3.5: a return that faults is the guest's exception at the context it wanted.
fn a_bad_target_is_a_fault_of_the_guest() {
    let code = code!("nop");
    let frame = IretContext { rip: NOT_CANONICAL, ..kernel_frame(code) };
    let stop = enter_by_iret(&frame, &pattern()).trapped(13);
    assert_eq!(stop.frame.rip, NOT_CANONICAL);
    assert_eq!(stop.frame.error, 0);
    // A selector of nothing: entry 0x246 of the guest's empty table.
    let frame = IretContext { cs: 0x1230, ..kernel_frame(code) };
    let stop = enter_by_iret(&frame, &pattern()).trapped(13);
    assert_eq!(stop.frame.error, 0x1230);
    assert_eq!(stop.frame.rip, code.start);
    // The flat data segment is no code.
    let frame = IretContext { cs: 0xe028, ..kernel_frame(code) };
    let stop = enter_by_iret(&frame, &pattern()).trapped(13);
    assert_eq!(stop.frame.error, 0xe028);
    // A stack segment that does not exist.
    let frame = IretContext { ss: 0x1230, ..kernel_frame(code) };
    let stop = enter_by_iret(&frame, &pattern()).trapped(13);
    assert_eq!(stop.frame.error, 0x1230);
}
test!("iret.bad-target", a_bad_target_is_a_fault_of_the_guest);
