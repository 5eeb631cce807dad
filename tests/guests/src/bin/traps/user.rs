//! User mode: there by `iret`, back by system calls and faults, under a root of its own (core 3.1-3.4, 3.6).

use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackType, IretContext, SegmentBase};
use guests::abi::{Hypercall, selector};
use guests::probe::{self, Code, Registers, Stop, UserSpace, call, trap_stack_end};
use guests::{code, events, flag, mask_address, pattern, registers_of, set_iopl, test};
use unikernel::traps::{self, SYSCALL};

fn run(space: &UserSpace, code: Code) -> Stop {
    let registers = pattern();
    let frame = IretContext { rax: registers.rax, rcx: registers.rcx, r11: registers.r11, ..UserSpace::frame() };
    let stop = space.run(code, &frame, &registers);
    let _ = events::mask_upcalls();
    // core 3.3: from user mode the frame is at the end of the kernel's stack, CS keeps its RPL, the mask was 0.
    assert_eq!(stop.base, trap_stack_end());
    assert_eq!(stop.frame.cs, u64::from(selector::GUEST_CS), "{}", stop.frame);
    assert_eq!(stop.frame.ss, u64::from(selector::GUEST_SS), "{}", stop.frame);
    assert_eq!(stop.frame.rsp, UserSpace::DATA + 4096, "{}", stop.frame);
    assert_eq!(stop.frame.rflags & (flag::IF | flag::IOPL), flag::IF);
    assert_eq!(stop.handler_selectors, (selector::GUEST_CS, selector::GUEST_SS));
    assert_eq!(stop.handler_mask, 1);
    stop
}

/// core 3.4: the return address and RFLAGS are in the frame.
fn a_system_call() {
    let space = UserSpace::new();
    let code = code!("syscall", "nop");
    let stop = run(&space, code).trapped(SYSCALL);
    assert_eq!(stop.frame.rip, UserSpace::CODE + 2);
    let registers = pattern();
    let after = registers_of(&stop.frame);
    let expected = Registers { rcx: after.rcx, r11: after.r11, rsp: UserSpace::DATA + 4096, ..registers };
    assert_eq!(after, expected);
    // core 3.4: AC, TF and NT do not reach the handler, and the frame shows them.
    let code = code!("pushfq", "or qword ptr [rsp], 0x44000", "popfq", "syscall");
    let stop = run(&space, code).trapped(SYSCALL);
    assert_eq!(stop.frame.rflags & (flag::AC | flag::NT), flag::AC | flag::NT);
    assert_eq!(stop.handler_rflags & (flag::AC | flag::NT | flag::TF), 0);
}
test!("user.syscall", a_system_call);

/// core 3.2: without a callback it is #UD at the instruction.
fn a_system_call_without_a_callback() {
    let space = UserSpace::new();
    let register = |address| {
        let arg = guests::abi::callback::CallbackRegister {
            kind: CallbackType::Syscall as u16,
            flags: CALLBACK_MASKS_EVENTS,
            pad: 0,
            address,
        };
        call(Hypercall::CallbackOp, [0, probe::address(&arg), 0, 0, 0]).expect("a callback is taken");
    };
    register(0);
    let stop = run(&space, code!("nop", "syscall", "nop")).trapped(6);
    assert_eq!(stop.frame.rip, UserSpace::CODE + 1);
    register(traps::handler_address(SYSCALL));
    let _ = run(&space, code!("syscall")).trapped(SYSCALL);
}
test!("user.syscall.none", a_system_call_without_a_callback);

fn faults_of_user_code() {
    let space = UserSpace::new();
    let stop = run(&space, code!("nop"));
    assert!(stop.ended, "{}", stop.frame);
    assert_eq!(stop.frame.rip, UserSpace::CODE + 1);
    let stop = run(&space, code!("int3")).trapped(3);
    assert_eq!(stop.frame.rip, UserSpace::CODE + 1);
    for code in [code!("hlt"), code!("rdmsr"), code!("mov rax, cr0"), code!("mov rax, cr2"), code!("clts")] {
        let stop = run(&space, code).trapped(13);
        assert_eq!((stop.frame.rip, stop.frame.error), (UserSpace::CODE, 0));
    }
    // core 3.6: the U bit is set; core 4.3: the kernel's addresses do not exist under a user root.
    let stop = run(&space, code!("mov [rsp + 0x1000], rax")).trapped(14);
    assert_eq!(stop.frame.error, 6);
    assert_eq!(events::page_fault_address(), UserSpace::DATA + 0x2000);
    let stop = run(&space, code!("lea rdi, [rip]", "mov [rdi], rax")).trapped(14);
    assert_eq!(stop.frame.error, 7, "code is read-only");
    let stop = run(&space, code!("mov rdi, 0xffffffff80100000", "mov rax, [rdi]")).trapped(14);
    assert_eq!(stop.frame.error, 4);
    assert_eq!(events::page_fault_address(), 0xffff_ffff_8010_0000);
}
test!("user.faults", faults_of_user_code);

/// core 3.2: a user may raise what a gate opens to ring 3.
fn software_interrupts_of_user_code() {
    let space = UserSpace::new();
    guests::install_gate(traps::gate(0x41, 1, true));
    let stop = run(&space, code!("int 0x41")).trapped(13);
    assert_eq!((stop.frame.rip, stop.frame.error), (UserSpace::CODE, 0x41 << 3 | 2));
    guests::install_gate(traps::gate(0x41, 3, true));
    let stop = run(&space, code!("int 0x41")).trapped(0x41);
    assert_eq!(stop.frame.rip, UserSpace::CODE + 2);
    let stop = run(&space, code!("int 0x80")).trapped(0x80);
    assert_eq!(stop.frame.rip, UserSpace::CODE + 2);
}
test!("user.int-n", software_interrupts_of_user_code);

/// core 3.9: user mode needs I/O privilege 3. core 3.13: forced CPUID works everywhere.
fn emulated_instructions_of_user_code() {
    let space = UserSpace::new();
    set_iopl(1).expect("level 1 is taken");
    let _ = run(&space, code!("cli")).trapped(13);
    set_iopl(3).expect("level 3 is taken");
    assert!(run(&space, code!("cli")).ended);
    assert!(run(&space, code!("in al, 0x20")).ended);
    set_iopl(0).expect("level 0 is taken");
    let code = code!("mov eax, 0x40000000", "ud2", ".ascii \"xen\"", "cpuid");
    let stop = run(&space, code);
    assert!(stop.ended);
    assert_eq!(stop.frame.rbx, 0x566e_6558);
}
test!("user.emulated", emulated_instructions_of_user_code);

/// core 3.1: each mode finds its own GS base; FS stays.
fn segment_bases_follow_the_mode() {
    let space = UserSpace::new();
    probe::write(space.data(), 0x11).expect("the data page is writable");
    probe::write(space.data() + 8, 0x22).expect("the data page is writable");
    let kernel = [0x33u64];
    let set = |which: SegmentBase, base| {
        call(Hypercall::SetSegmentBase, [which.number(), base, 0, 0, 0]).expect("a base is taken");
    };
    set(SegmentBase::GsUser, UserSpace::DATA);
    set(SegmentBase::Fs, UserSpace::DATA + 8);
    set(SegmentBase::GsKernel, probe::address(&kernel));
    for _ in 0..2 {
        let stop = run(&space, code!("mov rax, gs:[0]", "mov rdx, fs:[0]"));
        assert!(stop.ended, "{}", stop.frame);
        assert_eq!((stop.frame.rax, stop.frame.rdx), (0x11, 0x22));
        let frame = probe::execute(code!("mov rax, gs:[0]"), &pattern()).ended();
        assert_eq!(frame.rax, 0x33);
    }
    for which in [SegmentBase::Fs, SegmentBase::GsUser, SegmentBase::GsKernel] {
        set(which, 0);
    }
}
test!("user.bases", segment_bases_follow_the_mode);

/// core 3.7: entering user mode with IF set unmasks; without, the mask stays and the frame shows it.
fn the_mask_across_user_mode() {
    let space = UserSpace::new();
    let frame = IretContext { rflags: 0x2, ..UserSpace::frame() };
    let stop = space.run(code!("nop"), &frame, &pattern());
    assert_eq!(stop.frame.cs, u64::from(selector::GUEST_CS) | 1 << 32);
    assert_eq!(stop.frame.rflags & flag::IF, 0);
    let stop = run(&space, code!("nop"));
    assert_eq!(stop.frame.saved_mask(), 0);
    let _ = mask_address();
}
test!("user.mask", the_mask_across_user_mode);

/// core 3.7, pitfall 12: a return to user space at an address that is not canonical.
fn a_bad_target_in_user_space() {
    let space = UserSpace::new();
    let frame = IretContext { rip: guests::NOT_CANONICAL, ..UserSpace::frame() };
    let stop = space.run(code!("nop"), &frame, &pattern()).trapped(13);
    let _ = events::mask_upcalls();
    assert_eq!(stop.frame.rip, guests::NOT_CANONICAL);
    assert!(stop.frame.from_user(), "{}", stop.frame);
}
test!("user.bad-target", a_bad_target_in_user_space);
