//! System calls of user code, and calls 23 and 25 that only look like those that the entry code takes.

use crate::stage::{
    FSGSBASE, SP, Stage, TOP, Trip, check_entry, check_fault, check_syscall, check_syscall_at, kernel_gs, register,
    register_ordinary, set_base, set_cr4,
};
use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackType, IretContext, SegmentBase};
use guests::abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp};
use guests::abi::{Errno, Hypercall, domid, selector};
use guests::memory::PAGE;
use guests::probe::{self, Registers, UserSpace, call, call_number, execute};
use guests::tables::{BRANCH, LEAF, current_root};
use guests::{NOT_CANONICAL, code, events, flag, hypercall, mask_address, pattern, registers_of, test};
use unikernel::traps::{self, EVENT, SYSCALL};

fn an_ordinary_call() {
    let stage = Stage::new();
    for _ in 0..3 {
        stage.ordinary();
    }
}
test!("stubs.call", an_ordinary_call);

/// core 3.3: the frame has the mask as it was.
fn a_call_with_events_masked() {
    let stage = Stage::new();
    for rflags in [0x2, 0x202, 0x2] {
        let trip = Trip::with_flags(rflags);
        check_syscall(&stage.go(code!("syscall"), &trip), &trip);
    }
    stage.ordinary();
}
test!("stubs.call.masked", a_call_with_events_masked);

/// core 3.4: flags that user code has set are in the frame, and do not reach the handler.
fn flags_at_a_call() {
    let stage = Stage::new();
    let set = code!("push rbx", "popfq", "syscall");
    for bits in [flag::TF, flag::NT, flag::AC, flag::DF, flag::TF | flag::NT | flag::AC | flag::DF | 0x8d5] {
        for masked in [false, true] {
            let mut trip = Trip::with_flags(if masked { 2 } else { 0x202 });
            trip.registers.rbx = bits | 2;
            let stop = stage.go(set, &trip);
            trip.frame.rflags |= bits;
            check_syscall_at(&stop, &trip, UserSpace::CODE + 4);
        }
    }
    stage.ordinary();
}
test!("stubs.call.flags", flags_at_a_call);

/// The stack pointer of user code is a number to us, whatever it is.
fn stack_pointers_at_a_call() {
    let stage = Stage::new();
    for rsp in [0, 1, 0x7fff_ffff_ffff, NOT_CANONICAL, 0xffff_8300_0000_1000, u64::MAX] {
        let mut trip = Trip::new();
        trip.registers.rbx = rsp;
        let stop = stage.go(code!("mov rsp, rbx", "syscall"), &trip);
        trip.frame.rsp = rsp;
        check_syscall_at(&stop, &trip, UserSpace::CODE + 5);
    }
    stage.ordinary();
}
test!("stubs.call.rsp", stack_pointers_at_a_call);

/// core 3.1: each mode finds its own GS base, whoever has set it and however often they are exchanged.
fn bases_of_both_modes() {
    let stage = Stage::new();
    let (user, kernel) = (0x1234_5678_9000, 0xffff_ffff_8765_4000);
    set_base(SegmentBase::GsUser, user);
    set_base(SegmentBase::GsKernel, kernel);
    let read = |after: u64, want: u64| {
        let mut trip = Trip::new();
        trip.registers.rbx = after;
        let stop = stage.go(code!("rdgsbase rdx", "wrgsbase rbx", "syscall"), &trip);
        trip.registers.rdx = want;
        check_syscall_at(&stop, &trip, UserSpace::CODE + 12);
        assert_eq!(kernel_gs(), kernel);
    };
    read(0x1111_0000, user);
    read(0xffff_9000_0000_0000, 0x1111_0000);
    read(5, 0xffff_9000_0000_0000);
    set_base(SegmentBase::GsUser, user + 1);
    assert_eq!(kernel_gs(), kernel);
    read(0, user + 1);
    // The handler itself sees the kernel's.
    register(CallbackType::Syscall, CALLBACK_MASKS_EVENTS, code!("rdgsbase r8", "jmp r15").start);
    let mut trip = Trip::new();
    trip.registers.r15 = traps::handler_address(SYSCALL);
    let stop = stage.go(code!("syscall"), &trip);
    trip.registers.r8 = kernel;
    check_syscall(&stop, &trip);
    register_ordinary();
    for base in [SegmentBase::GsUser, SegmentBase::GsKernel] {
        set_base(base, 0);
    }
}
test!("stubs.call.bases", bases_of_both_modes);

/// core 3.4: the handler is the one that was registered last, and masks events only if that was asked for.
fn another_handler() {
    let stage = Stage::new();
    stage.ordinary();
    let other = code!("mov r8, rsp", "jmp r15");
    let mut trip = Trip::new();
    trip.registers.r15 = traps::handler_address(SYSCALL);
    for flags in [CALLBACK_MASKS_EVENTS, 0, CALLBACK_MASKS_EVENTS, 0] {
        register(CallbackType::Syscall, flags, other.start);
        for rflags in [0x202, 2] {
            trip.frame.rflags = rflags;
            let mut stop = stage.go(code!("syscall"), &trip);
            assert_eq!(stop.handler_mask, u8::from(flags == CALLBACK_MASKS_EVENTS || rflags == 2), "{flags}");
            stop.handler_mask = 1;
            let mut seen = trip;
            seen.registers.r8 = SP - 56;
            check_syscall(&stop, &seen);
        }
        register_ordinary();
        stage.ordinary();
    }
    // core 3.2: without one the call is #UD where it stands.
    register(CallbackType::Syscall, CALLBACK_MASKS_EVENTS, 0);
    let mut trip = Trip::new();
    let stop = stage.go(code!("syscall"), &trip);
    // The instruction has done its work by then.
    (trip.frame.rcx, trip.frame.r11) = (UserSpace::CODE + 2, trip.user_flags());
    check_fault(&stop, &trip, (6, 0, UserSpace::CODE));
    register_ordinary();
    // core 10.4: the old way to register all of them does not mask.
    let [event, failsafe, syscall] = [traps::EVENT, traps::FAILSAFE, SYSCALL].map(traps::handler_address);
    call(Hypercall::SetCallbacks, [event, failsafe, syscall, 0, 0]).expect("callbacks are taken");
    let mut stop = stage.go(code!("syscall"), &trip);
    assert_eq!(stop.handler_mask, 0);
    stop.handler_mask = 1;
    check_syscall(&stop, &trip);
    register(CallbackType::Event, CALLBACK_MASKS_EVENTS, event);
    register_ordinary();
    stage.ordinary();
}
test!("stubs.call.handler", another_handler);

/// Without its GS instructions the guest sees the same.
fn without_gs_instructions() {
    let stage = Stage::new();
    set_base(SegmentBase::GsUser, UserSpace::DATA);
    probe::store(stage.space.data(), 0x55);
    for on in [false, true, false] {
        set_cr4(FSGSBASE, on);
        stage.ordinary();
        let mut trip = Trip::new();
        let stop = stage.go(code!("mov rdx, gs:[0]", "syscall"), &trip);
        trip.registers.rdx = 0x55;
        check_syscall_at(&stop, &trip, UserSpace::CODE + 11);
        let stop = stage.go(code!("rdgsbase rdx", "syscall"), &trip);
        assert_eq!(stop.frame.vector, if on { SYSCALL } else { 6 });
    }
    set_cr4(FSGSBASE, true);
    set_base(SegmentBase::GsUser, 0);
}
test!("stubs.call.fsgsbase", without_gs_instructions);

/// What a call that answers keeps (core 1.7): all but RAX, RCX and R11, and those never show anything of the hypervisor's.
#[track_caller]
fn check_kept(registers: Registers, answer: u64) {
    let code = code!("syscall");
    let frame = execute(code, &registers).ended();
    let after = registers_of(&frame);
    let rcx_r11 = Registers { rcx: after.rcx, r11: after.r11, ..registers };
    assert_eq!(after, Registers { rax: answer, rsp: probe::stack_end(), ..rcx_r11 }, "{frame}");
    assert!([registers.rcx, code.start + 2].contains(&after.rcx), "{frame}");
    let flags = frame.rflags & !flag::RF | flag::IF;
    assert!([registers.r11, flags].contains(&after.r11), "{frame}");
}

fn answer(result: Result<u64, Errno>) -> u64 {
    result.unwrap_or_else(Errno::to_rax)
}

/// The number of a call is all of RAX.
fn numbers_that_only_look_so() {
    let stage = Stage::new();
    for number in [23, 25] {
        for high in [1 << 32, 1 << 63, 0xffff_ffff_0000_0000] {
            check_kept(Registers { rax: number | high, rdi: 1, ..pattern() }, answer(Err(Errno::NoSys)));
            stage.ordinary();
        }
    }
    assert_eq!(call_number(1 << 40 | 23, [0; 5]), Errno::NoSys.to_rax());
}
test!("stubs.call.number", numbers_that_only_look_so);

/// core 3.1: set_segment_base takes canonical addresses; whatever it refuses, it has changed nothing.
fn bases_by_call() {
    let stage = Stage::new();
    let user_gs = |want: u64| {
        let mut trip = Trip::new();
        let stop = stage.go(code!("rdgsbase rdx", "syscall"), &trip);
        trip.registers.rdx = want;
        check_syscall_at(&stop, &trip, UserSpace::CODE + 7);
    };
    let set = |which: u64, base: u64| Registers { rax: 25, rdi: which, rsi: base, ..pattern() };
    let mut last = 0x77_0000;
    set_base(SegmentBase::GsUser, last);
    let good = [0, 1, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX];
    let bad = [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, NOT_CANONICAL, 0x7fff_ffff_ffff_ffff];
    for gs in [true, false] {
        set_cr4(FSGSBASE, gs);
        for base in good {
            for which in [1, 0xdead_beef_0000_0001] {
                check_kept(set(which, base), 0);
            }
            check_kept(set(99, base), answer(Err(Errno::Inval)));
            last = base;
            check_kept(set(0, base), 0);
        }
        for base in bad {
            for which in 0..3 {
                check_kept(set(which, base), answer(Err(Errno::Inval)));
            }
        }
        set_cr4(FSGSBASE, true);
        user_gs(last);
    }
    // FS and the kernel's GS base go elsewhere.
    check_kept(set(0, 0x1000), 0);
    check_kept(set(2, 0x2000), 0);
    user_gs(last);
    assert_eq!(kernel_gs(), 0x2000);
    check_kept(set(3, 0), 0);
    user_gs(0);
    // A single step is over when the call is.
    let step = code!("push rbx", "popfq", "syscall", "nop", "nop");
    let registers = Registers { rbx: flag::TF | 2, ..set(1, 0x3000) };
    let stop = execute(step, &registers).trapped(1);
    assert_eq!(stop.frame.rip, step.start + 5, "{}", stop.frame);
    assert_eq!(stop.frame.rax, 0);
    user_gs(0x3000);
    for base in [SegmentBase::Fs, SegmentBase::GsUser, SegmentBase::GsKernel] {
        set_base(base, 0);
    }
}
test!("stubs.call.set-base", bases_by_call);

/// core 3.8: a kernel that has let events in by itself, while one waits, has it when it comes back from whatever it asks for.
fn an_event_that_waits_for_any_call() {
    let stage = Stage::new();
    let table = MmuUpdate { ptr: stage.chain.machine_slot(1, 100), val: 0 };
    let roots = [current_root(), stage.space.root()];
    let new_root = |cmd: MmuextCommand, root: u64| MmuextOp { cmd: cmd as u32, pad: 0, arg1: root, arg2: 0 };
    let bases = [new_root(MmuextCommand::NewBaseptr, roots[0]), new_root(MmuextCommand::NewUserBaseptr, roots[1])];
    let own = u64::from(domid::SELF);
    let ask = |call: Hypercall, [rdi, rsi, rdx, r10]: [u64; 4]| Registers {
        rax: call.number(),
        rdi,
        rsi,
        rdx,
        r10,
        ..pattern()
    };
    let (stack, base) = (u64::from(selector::GUEST_SS), SegmentBase::GsUser.number());
    let syscall = code!("mov byte ptr [rbx], 0", "syscall", "nop");
    let write = code!("mov byte ptr [rbx], 0", "mov [rdi], rax", "nop");
    let rdmsr = code!("mov byte ptr [rbx], 0", "rdmsr", "nop");
    let ways = [
        (syscall, ask(Hypercall::SetSegmentBase, [base, 0, 0, 0]), 5),
        (syscall, ask(Hypercall::SetSegmentBase, [SegmentBase::Fs.number(), 0, 0, 0]), 5),
        (syscall, ask(Hypercall::StackSwitch, [stack, SP, 0, 0]), 5),
        (syscall, ask(Hypercall::MmuUpdate, [probe::address(&table), 1, 0, own]), 5),
        (syscall, ask(Hypercall::UpdateVaMapping, [TOP, stage.chain.page_entry(0, LEAF), 0, 0]), 5),
        (syscall, ask(Hypercall::MmuextOp, [probe::address(&bases), 2, 0, own]), 5),
        (write, Registers { rdi: stage.chain.slot(1, 100), rax: 0, ..pattern() }, 6),
        (rdmsr, Registers { rcx: 0xc000_0102, ..pattern() }, 5),
    ];
    call(Hypercall::VmAssist, [0, 2, 0, 0, 0]).expect("the assist is known");
    let port = hypercall::bind_ipi(0).expect("a port is free");
    for waits in [false, true, false, true] {
        for (n, (code, registers, length)) in ways.into_iter().enumerate() {
            if waits {
                hypercall::send(port).expect("an IPI can be sent");
                assert!(events::upcall_pending());
            }
            let stop = probe::execute_until_event(code, &Registers { rbx: mask_address(), ..registers });
            let stop = if waits { stop.trapped(EVENT) } else { stop };
            if waits {
                assert_eq!(stop.frame.rip, code.start + length, "{n}: {}", stop.frame);
            } else {
                let _ = stop.ended();
            }
            events::scan();
        }
        stage.ordinary();
    }
    hypercall::close(port).expect("the port is ours");
}
test!("stubs.call.event", an_event_that_waits_for_any_call);

/// A call that ends where the lower half of the address space does: the address behind it is not canonical (core 3.5).
fn calls_at_the_end_of_the_lower_half() {
    let stage = Stage::new();
    let beyond = 0x8000_0000_0000;
    // The same tables lead to the stack and, at their other end, to a page that ends in SYSCALL.
    for level in [3, 2] {
        stage.chain.update(level, 511, stage.chain.entry(level - 1, BRANCH)).expect("an entry is taken");
    }
    stage.chain.update(1, 511, stage.chain.page_entry(1, LEAF)).expect("an entry is taken");
    let roots = [current_root(), stage.space.root()].map(|root| root * PAGE + 255 * 8);
    for slot in roots {
        probe::mmu_update(slot, stage.chain.entry(3, BRANCH)).expect("an entry is taken");
    }
    probe::store_bytes(stage.chain.page_address(1) + PAGE - 2, &[0x0f, 0x05]);
    // From user mode that is a number in the frame.
    let trip = Trip { frame: IretContext { rip: beyond - 2, ..Trip::new().frame }, ..Trip::new() };
    check_syscall_at(&stage.go(code!("nop"), &trip), &trip, beyond);
    // The kernel cannot go on there.
    for number in [17, 25] {
        let registers = Registers { rax: number, rdi: 1, rsi: 0x4000, r15: beyond - 2, ..pattern() };
        let stop = execute(code!("jmp r15"), &registers).trapped(13);
        assert_eq!((stop.frame.rip, stop.frame.error), (beyond, 0), "{}", stop.frame);
        assert!(!stop.frame.from_user(), "{}", stop.frame);
    }
    for slot in roots {
        probe::mmu_update(slot, 0).expect("an entry is taken");
    }
    check_entry(&stage.go(code!("syscall"), &Trip::new()), &Trip::new());
    set_base(SegmentBase::GsUser, 0);
}
test!("stubs.call.edge", calls_at_the_end_of_the_lower_half);
