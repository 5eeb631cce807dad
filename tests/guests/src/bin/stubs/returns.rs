//! The way back to user code by `iret` from where Linux has its frame (core 3.7).

use crate::stage::{
    POPPED, SP, Stage, TOP, Trip, check_entry, check_fault, check_syscall, kernel_gs, register, register_ordinary,
    set_base,
};
use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackType, IRET_IN_SYSCALL, IretContext, SegmentBase};
use guests::abi::{Hypercall, selector};
use guests::probe::{self, Code, Registers, UserSpace, call, execute, stack_end};
use guests::{NOT_CANONICAL, code, events, flag, hypercall, mask_address, pattern, registers_of, test};
use unikernel::traps::{self, EVENT, SYSCALL};

fn flags_of_the_frame() {
    let stage = Stage::new();
    let chosen = [flag::AC, flag::NT, flag::DF, flag::RF, 1 << 21, 0x8d5, flag::AC | flag::NT | flag::DF | flag::RF];
    let dropped = [flag::IOPL, flag::VM, 1 << 19, 1 << 20, 0x8028, 0xffff_ffff_0000_0000];
    for bits in chosen.into_iter().chain(dropped) {
        for rflags in [0x202, 0x200, 2] {
            let trip = Trip::with_flags(rflags | bits);
            check_syscall(&stage.go(code!("syscall"), &trip), &trip);
        }
    }
    // A single step is over after one instruction; SYSCALL hides it.
    for rflags in [0x302, 0x102] {
        let trip = Trip::with_flags(rflags);
        check_syscall(&stage.go(code!("syscall"), &trip), &trip);
        check_fault(&stage.go(code!("nop", "nop"), &trip), &trip, (1, 0, UserSpace::CODE + 1));
    }
    stage.ordinary();
}
test!("stubs.iret.flags", flags_of_the_frame);

/// core 3.7: with the flag RCX and R11 may be lost. They show the frame's values, or what SYSCALL and SYSRET leave there: never
/// anything of the hypervisor's (attack 5).
fn a_lossy_return() {
    let stage = Stage::new();
    let (user, kernel) = (u64::from(selector::GUEST_CS), u64::from(selector::GUEST_CS & !3));
    let code = code!("nop");
    let ways = [
        (user, 0x202, UserSpace::CODE),
        (user, 2, UserSpace::CODE),
        (user, 0x202 | flag::TF, UserSpace::CODE),
        (user, 2 | flag::AC | flag::DF, UserSpace::CODE),
        (0xe023, 0x202, UserSpace::CODE),
        (user, 0x202, 0x8000_0000_0000),
        (kernel, 2, code.start),
    ];
    for flags in [IRET_IN_SYSCALL, 0, u64::MAX, !IRET_IN_SYSCALL] {
        for (n, (cs, rflags, rip)) in ways.into_iter().chain(ways).enumerate() {
            let back = if n < ways.len() { SP - POPPED } else { SP - POPPED - 8 };
            let trip = Trip { back, ..Trip::with_flags(rflags) };
            let rsp = if cs == kernel { stack_end() } else { trip.frame.rsp };
            let trip = Trip { frame: IretContext { cs, rip, rsp, flags, ..trip.frame }, ..trip };
            let frame = stage.go(code, &trip).frame;
            let lost = flags & IRET_IN_SYSCALL != 0;
            let of_syscall = frame.rcx == rip || code.start.abs_diff(frame.rcx) < 1 << 20;
            assert!(frame.rcx == trip.frame.rcx || lost && of_syscall, "{flags:#x} {frame}");
            let of_flags = frame.r11 == trip.user_flags() || frame.r11 & !0xed7 == 0 && frame.r11 & 0x202 == 0x202;
            assert!(frame.r11 == trip.frame.r11 || lost && of_flags, "{flags:#x} {frame}");
        }
    }
}
test!("stubs.iret.lossy", a_lossy_return);

/// core 3.7, pitfall 12: with the flag, a return to flat code is by SYSRET, which leaves RIP and RFLAGS in RCX and R11; but not
/// where SYSRET would do something else. The rules go by the same conditions.
fn a_return_by_sysret() {
    let stage = Stage::new();
    let flat = (u64::from(selector::GUEST_CS), u64::from(selector::GUEST_SS));
    let (user, kernel) = (0x12_3450, 0x67_8900);
    set_base(SegmentBase::GsUser, user);
    set_base(SegmentBase::GsKernel, kernel);
    for back in [SP - POPPED, SP - POPPED - 8] {
        let lossy = |(cs, ss): (u64, u64), rflags: u64, rip: u64| {
            let trip = Trip { back, ..Trip::with_flags(rflags) };
            Trip { frame: IretContext { flags: IRET_IN_SYSCALL, cs, ss, rip, ..trip.frame }, ..trip }
        };
        for rflags in [0x202, 2, 0x202 | flag::AC | flag::DF | flag::NT, 0xed7 | 1 << 21, 0x202 | flag::IOPL | flag::VM]
        {
            for selectors in [flat, (flat.0 | 0xffff_0000, flat.1 & !3), (flat.0, flat.1 | 1 << 40)] {
                let trip = lossy(selectors, rflags, UserSpace::CODE);
                let stop = stage.go(code!("rdgsbase r8", "ud2"), &trip).trapped(6);
                assert_eq!(kernel_gs(), kernel);
                check_entry(&stop, &trip);
                let (frame, IretContext { rax, rsp, rip, .. }) = (stop.frame, trip.frame);
                let (rcx, r11, r8) = (rip, trip.user_flags(), user);
                assert_eq!(registers_of(&frame), Registers { rax, rsp, rcx, r11, r8, ..trip.registers }, "{frame}");
                assert_eq!((frame.rip, frame.error), (rip + 5, 0), "{frame}");
                assert_eq!((frame.rflags | flag::IF) & !flag::RF, r11, "{frame}");
            }
        }
        for rip in [0x8000_0000_0000, NOT_CANONICAL, 0xffff_7fff_ffff_ffff] {
            let frame = stage.go(code!("nop"), &lossy(flat, 0x202, rip)).trapped(13).frame;
            assert_eq!((frame.rip, frame.error, frame.rsp), (rip, 0, UserSpace::frame().rsp), "{frame}");
            assert_ne!(frame.rcx, rip, "{frame}");
        }
        for (bit, vector, rip) in [(flag::TF, 1, UserSpace::CODE + 1), (flag::RF, 6, UserSpace::CODE + 1)] {
            let frame = stage.go(code!("nop", "ud2"), &lossy(flat, 0x202 | bit, UserSpace::CODE)).trapped(vector).frame;
            assert_eq!((frame.rip, frame.rsp), (rip, UserSpace::frame().rsp), "{frame}");
            assert_ne!(frame.rcx, UserSpace::CODE, "{frame}");
        }
        // Compatibility code, and then selectors that do not load: of nothing, of data for code, null for a stack.
        let frame = stage.go(code!("nop"), &lossy((0xe023, flat.1), 0x202, UserSpace::CODE)).trapped(6).frame;
        assert_eq!((frame.cs, frame.rip), (0xe023, UserSpace::CODE + 1), "{frame}");
        let (nothing, data, null) = (0x1233, 0xe02b, 3);
        for (cs, ss, error) in
            [(nothing, flat.1, 0x1230), (data, flat.1, 0xe028), (flat.0, nothing, 0x1230), (flat.0, null, 0)]
        {
            let frame = stage.go(code!("nop"), &lossy((cs, ss), 0x202, UserSpace::CODE)).trapped(13).frame;
            assert_eq!((frame.cs, frame.ss, frame.error, frame.rip), (cs, ss, error, UserSpace::CODE), "{frame}");
        }
        stage.ordinary();
    }
    for base in [SegmentBase::GsUser, SegmentBase::GsKernel] {
        set_base(base, 0);
    }
}
test!("stubs.iret.sysret", a_return_by_sysret);

/// Where the frame lies does not matter, nor where the stack ends.
fn places_of_frame_and_stack() {
    let stage = Stage::new();
    for below in [POPPED - 16, POPPED - 8, POPPED + 8, POPPED + 16, POPPED + 4, 2048] {
        let trip = Trip { back: SP - below - 16, sp: SP - 16, ..Trip::new() };
        check_syscall(&stage.go(code!("syscall"), &trip), &trip);
    }
    let across = [TOP, TOP + 1, TOP + 4, TOP + 7, TOP + 8, TOP + 16, TOP + 40, TOP + 56, TOP + 64, TOP + 72, TOP + 80];
    let odd = [SP - 1, SP - 4, SP - 8, SP - 9, SP - 12];
    for sp in across.into_iter().chain(odd) {
        let trip = Trip::on_stack(sp);
        check_syscall(&stage.go(code!("syscall"), &trip), &trip);
        let stop = stage.go(code!("mov eax, [0]"), &trip);
        check_fault(&stop, &trip, (14, 4, UserSpace::CODE));
    }
    stage.ordinary();
}
test!("stubs.iret.places", places_of_frame_and_stack);

/// core 3.7: CS and SS count only in their low 16 bits, and become ring 3.
fn selectors_of_the_frame() {
    let stage = Stage::new();
    let (cs, ss) = (u64::from(selector::GUEST_CS), u64::from(selector::GUEST_SS));
    for (cs, ss) in
        [(cs | 0xffff_ffff_ffff_0000, ss), (cs | 1 << 32, ss & !3), (cs, ss & !3 | 0x1234_0000), (cs, ss & !3 | 1)]
    {
        let mut trip = Trip::new();
        (trip.frame.cs, trip.frame.ss) = (cs, ss);
        check_syscall(&stage.go(code!("syscall"), &trip), &trip);
    }
    // 32-bit code of user mode (core 3.1), which ends in #UD.
    let mut trip = Trip::new();
    trip.frame.cs = 0xe023;
    let stop = stage.go(code!("nop"), &trip).trapped(6);
    assert_eq!((stop.frame.cs, stop.frame.rip), (0xe023, UserSpace::CODE + 1), "{}", stop.frame);
    // Selectors of nothing, a data segment for code, and a null stack segment.
    for (cs, ss, error) in [(0x1233, ss, 0x1230), (0xe02b, ss, 0xe028), (cs, 0x1233, 0x1230), (cs, 3, 0)] {
        let mut trip = Trip::new();
        (trip.frame.cs, trip.frame.ss) = (cs, ss);
        let stop = stage.go(code!("syscall"), &trip);
        let mut stop = stop.trapped(13);
        assert_eq!((stop.frame.cs, stop.frame.ss), (cs, ss), "{}", stop.frame);
        (stop.frame.cs, stop.frame.ss) = (u64::from(selector::GUEST_CS), u64::from(selector::GUEST_SS));
        check_fault(&stop, &trip, (13, error, UserSpace::CODE));
    }
    stage.ordinary();
}
test!("stubs.iret.selectors", selectors_of_the_frame);

/// core 3.7: any ring but 3 is kernel mode.
fn to_kernel_mode_from_there() {
    let stage = Stage::new();
    let code = code!("movzx r8d, byte ptr [rdi]");
    for ring in 0..3 {
        for rflags in [2, 0x202, flag::AC | 2] {
            let mut trip = Trip::with_flags(rflags);
            trip.registers.rdi = mask_address();
            let cs = u64::from(selector::GUEST_CS & !3) | ring;
            trip.frame = IretContext { rip: code.start, cs, rsp: stack_end(), ..trip.frame };
            let stop = stage.go(code!("nop"), &trip);
            let frame = stop.ended();
            let masked = rflags & flag::IF == 0;
            let IretContext { rax, rcx, r11, rsp, .. } = trip.frame;
            let r8 = u64::from(masked);
            assert_eq!(registers_of(&frame), Registers { rax, rcx, r11, rsp, r8, ..trip.registers }, "{frame}");
            assert_eq!(frame.cs, u64::from(selector::GUEST_CS & !3) | r8 << 32, "{frame}");
            assert_eq!(frame.rflags & flag::AC, rflags & flag::AC, "{frame}");
            let _ = events::mask_upcalls();
        }
    }
    stage.ordinary();
}
test!("stubs.iret.kernel", to_kernel_mode_from_there);

/// core 3.5, pitfall 12: the fault of a return is the guest's, where it wanted to go.
fn targets_that_are_not_canonical() {
    let stage = Stage::new();
    for rip in [0x8000_0000_0000, NOT_CANONICAL, 0xffff_7fff_ffff_ffff, 0x7fff_ffff_ffff_ffff] {
        for rflags in [0x202, 2, 0x202 | flag::AC | flag::DF] {
            let mut trip = Trip::with_flags(rflags);
            trip.frame.rip = rip;
            check_fault(&stage.go(code!("syscall"), &trip), &trip, (13, 0, rip));
        }
        stage.ordinary();
    }
    // The end of what is canonical, where nothing is.
    for rip in [0x7fff_ffff_fff0, 0xffff_8000_0000_0000] {
        let mut trip = Trip::new();
        trip.frame.rip = rip;
        let stop = stage.go(code!("syscall"), &trip).trapped(14);
        check_fault(&stop, &trip, (14, stop.frame.error & 0x11 | 4, rip));
        crate::stage::check_fault_address(rip);
    }
    // A stack pointer that is not canonical is nothing a return looks at.
    let mut trip = Trip::new();
    trip.frame.rsp = NOT_CANONICAL;
    check_syscall(&stage.go(code!("syscall"), &trip), &trip);
}
test!("stubs.iret.bad-target", targets_that_are_not_canonical);

/// core 3.8: an event that waits comes before the first instruction of code that is to have it.
fn an_event_that_waits() {
    let stage = Stage::new();
    let port = hypercall::bind_ipi(0).expect("a port is free");
    for back in [SP - POPPED, SP - POPPED - 8] {
        hypercall::send(port).expect("an IPI can be sent");
        assert!(events::upcall_pending());
        let masked = Trip { back, ..Trip::with_flags(2) };
        check_syscall(&stage.go(code!("syscall"), &masked), &masked);
        let trip = Trip { back, ..Trip::new() };
        let stop = probe::until_event(|| stage.go(code!("syscall"), &trip)).trapped(EVENT);
        check_fault(&stop, &trip, (EVENT, 0, UserSpace::CODE));
        events::scan();
        assert!(!events::upcall_pending());
        let trip = Trip { back, ..Trip::new() };
        check_syscall(&stage.go(code!("syscall"), &trip), &trip);
    }
    hypercall::close(port).expect("the port is ours");
}
test!("stubs.iret.event", an_event_that_waits);

/// core 3.8: `iret` ends the handling of an NMI, and one that came meanwhile comes then.
fn an_interrupt_that_cannot_be_masked() {
    let stage = Stage::new();
    // From the kernel: sends more NMIs if told so, then goes to user mode. From user mode: goes on to the ordinary handler.
    let handler = code!(
        "test byte ptr [rsp + 24], 3",
        "jnz 2f",
        "test r12, r12",
        "jz 1f",
        "mov eax, 24",
        "syscall",
        "1: mov rsp, rbx",
        "mov r8, [rsp + 8]",
        "mov eax, 23",
        "syscall",
        "ud2",
        "2: jmp r15",
    );
    let send = code!("mov eax, 24", "syscall", "nop");
    let mut gate = traps::gate(2, 0, true);
    gate.address = handler.start;
    guests::install_gate(gate);
    for back in [SP - POPPED, SP - POPPED - 8] {
        for another in [0, 1, 0] {
            let trip = Trip { back, ..Trip::new() };
            stage.open(code!("syscall"), &trip);
            probe::store_bytes(trip.back, zerocopy::IntoBytes::as_bytes(&trip.frame));
            // Handler and user code have the same registers: call 24 is vcpu_op, 11 sends an NMI.
            let registers = Registers {
                rdi: 11,
                rsi: 0,
                rdx: 0,
                rbx: back,
                r12: another,
                r15: traps::handler_address(2),
                ..trip.registers
            };
            let stop = execute(send, &registers);
            check_entry(&stop, &trip);
            let first = if another == 0 { (SYSCALL, UserSpace::CODE + 2) } else { (2, UserSpace::CODE) };
            assert_eq!((stop.frame.vector, stop.frame.rip), first, "{}", stop.frame);
            assert_eq!((stop.frame.rax, stop.frame.rsp), (trip.frame.rax, trip.frame.rsp), "{}", stop.frame);
        }
    }
    // It may be sent again.
    guests::install_gate(traps::gate(2, 0, true));
    let registers = Registers { rdi: 11, rsi: 0, rdx: 0, ..pattern() };
    let _ = execute(send, &registers).trapped(2);
    stage.ordinary();
}
test!("stubs.iret.nmi", an_interrupt_that_cannot_be_masked);

/// core 3.12: with the assist, frames have the I/O privilege level that `iret` has set.
fn levels_in_frames() {
    let stage = Stage::new();
    stage.ordinary();
    call(Hypercall::VmAssist, [0, 4, 0, 0, 0]).expect("the assist is known");
    for level in [3, 1, 0, 2] {
        for code in [code!("syscall"), code!("mov eax, [0]"), code!("int3")] {
            let trip = Trip::with_flags(0x202 | level << 12);
            let stop = stage.go(code, &trip);
            check_entry(&stop, &trip);
            assert_eq!(stop.frame.rflags & flag::IOPL, level << 12, "{}", stop.frame);
        }
    }
    call(Hypercall::VmAssist, [1, 4, 0, 0, 0]).expect("the assist is known");
    stage.ordinary();
}
test!("stubs.iret.levels", levels_in_frames);

/// System calls and page faults whose handlers go back at once, as Linux does, with timer interrupts among them: what one
/// leaves behind is what the next finds.
fn many_without_a_rule() {
    const TIMES: u64 = 50_000;
    let stage = Stage::new();
    let calls = code!(
        "dec r14",
        "jz 1f",
        "pop rcx",
        "pop r11",
        "push 0",
        "push rcx",
        "push r11",
        "push rax",
        "mov eax, 23",
        "syscall",
        "1: jmp r15",
    );
    // As if the faulting instruction, of three bytes, had been carried out.
    let faults = code!(
        "pop rcx",
        "pop r11",
        "mov qword ptr [rsp], 0",
        "add qword ptr [rsp + 8], 3",
        "push rcx",
        "push r11",
        "push rax",
        "mov eax, 23",
        "syscall",
    );
    register(CallbackType::Syscall, CALLBACK_MASKS_EVENTS, calls.start);
    let mut gate = traps::gate(14, 0, true);
    gate.address = faults.start;
    guests::install_gate(gate);
    set_base(SegmentBase::GsUser, 0x12_3450);
    set_base(SegmentBase::GsKernel, 0x67_8900);
    let code = code!("2: syscall", "mov r8, [rsi]", "inc r13", "rdgsbase rdi", "jmp 2b");
    let mut trip = Trip::new();
    (trip.registers.rsi, trip.registers.r14) = (0x12_3000, TIMES);
    trip.registers.r15 = traps::handler_address(SYSCALL);
    let stop = stage.go(code, &trip).trapped(SYSCALL);
    check_entry(&stop, &trip);
    let Registers { r13, .. } = trip.registers;
    trip.registers = Registers { r13: r13 + TIMES - 1, r14: 0, rdi: 0x12_3450, ..trip.registers };
    let IretContext { rax, rsp, .. } = trip.frame;
    let (rcx, r11) = (UserSpace::CODE + 2, stop.frame.rflags);
    assert_eq!(registers_of(&stop.frame), Registers { rax, rsp, rcx, r11, ..trip.registers }, "{}", stop.frame);
    assert_eq!(kernel_gs(), 0x67_8900);
    assert_eq!(events::page_fault_address(), 0x12_3000);
    guests::install_gate(traps::gate(14, 0, true));
    register_ordinary();
    for base in [SegmentBase::GsUser, SegmentBase::GsKernel] {
        set_base(base, 0);
    }
    stage.ordinary();
}
test!("stubs.iret.many", many_without_a_rule);

/// A frame that begins the next trip while registers hold patterns: every way on shows the frame's registers alone.
fn registers_of_every_way() {
    let stage = Stage::new();
    let ways: [(Code, u64); 5] = [
        (code!("syscall"), SYSCALL),
        (code!("mov eax, [0]"), 14),
        (code!("hlt"), 13),
        (code!("int3"), 3),
        (code!("ud2"), 6),
    ];
    for (code, vector) in ways {
        for seed in 1..4u64 {
            let word = |i: u64| (seed * 31 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut trip = Trip::new();
            trip.registers = Registers {
                rax: word(0),
                rbx: word(1),
                rcx: word(2),
                rdx: word(3),
                rsi: word(4),
                rdi: word(5),
                rbp: word(6),
                rsp: 0,
                r8: word(8),
                r9: word(9),
                r10: word(10),
                r11: word(11),
                r12: word(12),
                r13: word(13),
                r14: word(14),
                r15: word(15),
            };
            (trip.frame.rax, trip.frame.rcx, trip.frame.r11) = (word(16), word(17), word(18));
            let stop = stage.go(code, &trip).trapped(vector);
            match vector {
                SYSCALL => check_syscall(&stop, &trip),
                14 => check_fault(&stop, &trip, (14, 4, UserSpace::CODE)),
                3 => check_fault(&stop, &trip, (3, 0, UserSpace::CODE + 1)),
                _ => check_fault(&stop, &trip, (vector, 0, UserSpace::CODE)),
            }
        }
    }
}
test!("stubs.iret.registers", registers_of_every_way);
