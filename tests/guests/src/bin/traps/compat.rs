//! 32-bit user code: its system calls (core 3.2, 3.4), and instructions that are carried out for it (core 3.9).

use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackRegister, CallbackType, IretContext};
use guests::abi::{Hypercall, selector};
use guests::memory::{PAGE, Pages};
use guests::probe::{self, Registers, Stop, UserSpace, call, trap_stack_end};
use guests::{code, events, flag, hypercall, pattern, set_iopl, test};
use unikernel::time;
use unikernel::traps::{self, SYSCALL};

const END: u64 = UserSpace::DATA + PAGE;
const STACK: u64 = selector::GUEST_SS as u64;

fn register(kind: CallbackType, address: u64) {
    let arg = CallbackRegister { kind: kind as u16, flags: CALLBACK_MASKS_EVENTS, pad: 0, address };
    call(Hypercall::CallbackOp, [0, probe::address(&arg), 0, 0, 0]).expect("a callback is taken");
}

/// Runs bytes as 32-bit user code.
fn run(space: &UserSpace, bytes: &[u8]) -> Stop {
    let frame = IretContext { cs: u64::from(selector::GUEST_CS32), ..UserSpace::frame() };
    let stop = space.run_bytes(bytes, &frame, &pattern());
    let _ = events::mask_upcalls();
    assert_eq!(stop.base, trap_stack_end(), "{}", stop.frame);
    assert_eq!(stop.frame.rflags & (flag::IF | flag::IOPL), flag::IF);
    assert_eq!(stop.handler_selectors, (selector::GUEST_CS, selector::GUEST_SS));
    assert_eq!((stop.handler_mask, stop.frame.saved_mask()), (1, 0));
    stop
}

fn syscall_from_32_bit_code() {
    let space = UserSpace::new();
    register(CallbackType::Syscall32, traps::handler_address(SYSCALL));
    // STD; SYSCALL: the direction does not reach the handler, and the frame shows it.
    let stop = run(&space, &[0xfd, 0x0f, 0x05]).trapped(SYSCALL);
    let frame = &stop.frame;
    assert_eq!((frame.rip, frame.cs), (UserSpace::CODE + 3, u64::from(selector::GUEST_CS32)), "{frame}");
    assert_eq!((frame.rsp, frame.ss), (END, STACK), "{frame}");
    assert_eq!((frame.rflags & flag::DF, stop.handler_rflags & flag::DF), (flag::DF, 0));
    // Without a callback it is #UD at the instruction.
    register(CallbackType::Syscall32, 0);
    let stop = run(&space, &[0x90, 0x0f, 0x05]).trapped(6);
    assert_eq!((stop.frame.rip, stop.frame.cs), (UserSpace::CODE + 1, u64::from(selector::GUEST_CS32)));
    // That of 64-bit code is another.
    let stop = space.run(code!("syscall"), &UserSpace::frame(), &pattern()).trapped(SYSCALL);
    let _ = events::mask_upcalls();
    assert_eq!(stop.frame.cs, u64::from(selector::GUEST_CS));
}
test!("compat.syscall", syscall_from_32_bit_code);

/// AMD's CPUs refuse it in long mode, Intel's do not; nor does QEMU, whatever the vendor. Xen offers it on Intel's alone, and
/// does not survive it on QEMU's Intel (a double fault), so what is expected is the ABI document's.
fn sysenter_from_32_bit_code() {
    let space = UserSpace::new();
    register(CallbackType::Sysenter, traps::handler_address(SYSCALL));
    let sysenter = [0x90, 0x0f, 0x34];
    let stop = run(&space, &sysenter);
    if stop.frame.vector == 6 {
        assert_eq!(stop.frame.rip, UserSpace::CODE + 1);
        return;
    }
    let stop = stop.trapped(SYSCALL);
    let frame = &stop.frame;
    // The instruction tells nothing of where it came from.
    assert_eq!((frame.rip, frame.rsp, frame.cs, frame.ss), (0, 0, 3, STACK), "{frame}");
    // A single step over it is its caller's, and not the handler's: POPF with TF, SYSENTER. The step is over by then: the
    // next exception for a breakpoint names that alone.
    let step = [0x9c, 0x80, 0x4c, 0x24, 0x01, 0x01, 0x9d, 0x0f, 0x34];
    let stop = run(&space, &step).trapped(SYSCALL);
    assert_eq!((stop.frame.rflags & flag::TF, stop.handler_rflags & flag::TF), (flag::TF, 0), "{}", stop.frame);
    let debug = |register, value| {
        call(Hypercall::SetDebugreg, [register, value, 0, 0, 0]).expect("the register takes it");
    };
    for (register, value) in [(6, 0), (0, UserSpace::CODE + 1), (7, 0x401)] {
        debug(register, value);
    }
    let _ = run(&space, &[0x90, 0x90, 0x0f, 0x0b]).trapped(1);
    for register in [7, 0] {
        debug(register, 0);
    }
    assert_eq!(call(Hypercall::GetDebugreg, [6, 0, 0, 0, 0]), Ok(0xffff_0ff1));
    // core 3.2: without a callback it is #GP(0), where it stands.
    register(CallbackType::Sysenter, 0);
    let stop = run(&space, &sysenter).trapped(13);
    let place = (stop.frame.rip, stop.frame.rsp, stop.frame.cs & 0xffff);
    assert_eq!(place, (UserSpace::CODE + 1, END, u64::from(selector::GUEST_CS32)), "{}", stop.frame);
    assert_eq!(stop.frame.error, 0);
}
test!("compat.sysenter", sysenter_from_32_bit_code);

/// Runs bytes as code of the segment `cs`, starting at an offset of it, until the UD2 behind them.
fn run_in(space: &UserSpace, cs: u64, rip: u64, bytes: &[u8], registers: &Registers) -> Stop {
    let frame = IretContext { cs, rip, rax: registers.rax, rcx: registers.rcx, ..UserSpace::frame() };
    let stop = space.run_bytes(&[bytes, &[0x0f, 0x0b]].concat(), &frame, registers);
    let _ = events::mask_upcalls();
    assert_eq!(stop.frame.cs & 0xffff, cs, "{}", stop.frame);
    stop
}

/// Bytes, and RAX after them; 0 before.
type Carried = (&'static [u8], u64);

/// What is carried out in code of a segment at the beginning of the code page.
fn carried_out(space: &UserSpace, cs: u64, start: u64, cases: &[Carried]) {
    let registers = Registers { rax: 0, rdx: 0x20, ..pattern() };
    set_iopl(3).expect("level 3 is taken");
    for (bytes, rax) in cases {
        let frame = run_in(space, cs, start, bytes, &registers).trapped(6).frame;
        assert_eq!((frame.rip, frame.rax), (start + bytes.len() as u64, *rax), "{bytes:x?}: {frame}");
    }
    set_iopl(0).expect("level 0 is taken");
    for (bytes, _) in cases {
        let frame = run_in(space, cs, start, bytes, &registers).trapped(13).frame;
        assert_eq!((frame.rip, frame.error), (start, 0), "{bytes:x?}: {frame}");
    }
}

const FORCED_CPUID: [u8; 7] = *b"\x0f\x0bxen\x0f\xa2";

/// core 3.9: what is carried out for 64-bit code is for 32-bit code too. 0x48 is no prefix there: DEC EAX, and then IN.
fn instructions_of_32_bit_code() {
    let (space, cs) = (UserSpace::new(), u64::from(selector::GUEST_CS32));
    let cases: [Carried; 8] = [
        (&[0xec], 0xff),
        (&[0xe5, 0x20], 0xffff_ffff),
        (&[0x66, 0xed], 0xffff),
        (&[0x2e, 0xed], 0xffff_ffff),
        (&[0xee], 0),
        (&[0x67, 0xe7, 0x20], 0),
        (&[0xfa], 0),
        (&[0xfb], 0),
    ];
    carried_out(&space, cs, UserSpace::CODE, &cases);
    let leaf = Registers { rax: 0x4000_0000, ..pattern() };
    let frame = run_in(&space, cs, UserSpace::CODE, &FORCED_CPUID, &leaf).trapped(6).frame;
    assert_eq!((frame.rip, frame.rbx), (UserSpace::CODE + 7, 0x566e_6558));
    set_iopl(3).expect("level 3 is taken");
    let frame = run_in(&space, cs, UserSpace::CODE, &[0x48, 0xec], &Registers { rax: 0, ..pattern() }).trapped(6).frame;
    assert_eq!((frame.rip, frame.rax), (UserSpace::CODE + 2, 0xffff_ffff), "DEC EAX; IN AL, DX");
    // A single step over it is seen.
    let step = [0x9c, 0x80, 0x4c, 0x24, 0x01, 0x01, 0x9d, 0xec, 0x90];
    let frame = run_in(&space, cs, UserSpace::CODE, &step, &pattern()).trapped(1).frame;
    assert_eq!(frame.rip, UserSpace::CODE + 8);
    set_iopl(0).expect("level 0 is taken");
    // INT n through a gate that is open to ring 3, and one that is not.
    for (level, vector, after) in [(3, 0x41, 2), (0, 13, 0)] {
        guests::install_gate(traps::gate(0x41, level, true));
        let frame = run_in(&space, cs, UserSpace::CODE, &[0xcd, 0x41], &pattern()).trapped(vector).frame;
        assert_eq!(frame.rip, UserSpace::CODE + after);
    }
    // SGDT into the stack's segment, where UMIP keeps it from ring 3: six bytes.
    if core::arch::x86_64::__cpuid_count(7, 0).ecx & 4 != 0 {
        let at = space.data() + 0x100;
        probe::write(at, u64::MAX).expect("the data page is writable");
        let registers = Registers { rbx: UserSpace::DATA + 0x100, ..pattern() };
        let _ = run_in(&space, cs, UserSpace::CODE, &[0x36, 0x0f, 0x01, 0x03], &registers).trapped(6);
        assert_eq!(probe::read(at), Ok(0xffff_ffff_0000_0000));
        // XOR EAX, EAX; MOV DS, EAX: a null segment is not written.
        let null = [0x31, 0xc0, 0x8e, 0xd8, 0x0f, 0x01, 0x03];
        assert_eq!(run_in(&space, cs, UserSpace::CODE, &null, &registers).trapped(13).frame.rip, UserSpace::CODE + 4);
    }
}
test!("compat.emulated", instructions_of_32_bit_code);

/// core 3.9: size and place of code come from the descriptor: 16-bit code, a base, and a limit that ends it.
fn instructions_of_other_segments() {
    let space = UserSpace::new();
    let page = Pages::allocate(1).expect("a page is free");
    let frame = page.frame(0).expect("the page is ours");
    let code = |width: u64, limit: u64| {
        let base = UserSpace::CODE;
        0x0000_fb00_0000_0000 | width << 54 | limit | (base & 0xff_ffff) << 16 | (base >> 24) << 56
    };
    let entries = [(1, code(0, 0xffff)), (2, code(1, 0xffff)), (3, code(1, 8))];
    for (index, descriptor) in entries {
        probe::write(page.address() + index * 8, descriptor).expect("the page is writable");
    }
    page.set_writable(0, false).expect("a page can be made read-only");
    call(Hypercall::SetGdt, [probe::address(&[frame]), 16, 0, 0, 0]).expect("the table is taken");
    let narrow: [Carried; 4] = [(&[0xed], 0xffff), (&[0x66, 0xed], 0xffff_ffff), (&[0xe4, 0x20], 0xff), (&[0xfa], 0)];
    carried_out(&space, 0xb, 0, &narrow);
    carried_out(&space, 0x13, 0, &[(&[0xed], 0xffff_ffff), (&[0x66, 0xed], 0xffff)]);
    // The port number lies beyond the end of the segment: no IN, but the fault of the fetch.
    set_iopl(3).expect("level 3 is taken");
    let nops = [0x90; 8];
    let bytes = [&nops[..], &[0xe4, 0x20]].concat();
    let frame = run_in(&space, 0x1b, 0, &bytes, &pattern()).trapped(13).frame;
    assert_eq!((frame.rip, frame.error), (8, 0));
    set_iopl(0).expect("level 0 is taken");
    call(Hypercall::SetGdt, [0; 5]).expect("no table is taken");
    page.set_writable(0, true).expect("the page is free again");
}
test!("compat.segments", instructions_of_other_segments);

/// core 3.1: no guest leaves ring 3, loses interrupts or gets an I/O privilege level. A CPU refuses a return from ring 3 to
/// virtual-8086 mode, and QEMU's emulation does not: there CS may hold any number, so that its lowest bits say ring 0.
fn return_to_virtual_8086_mode() {
    const IRET: u8 = 0xcf;
    const VM_IOPL_3: u32 = 0x2_3002;
    const IF: u32 = 0x200;
    const TF: u32 = 0x100;
    let space = UserSpace::new();
    space.map_low();
    // What runs there, and with which flags besides IOPL 3. A loop waits for the timer.
    let cases: [(&[u8], u32); 12] = [
        (&[0x0f, 0x0b], 0),
        (&[0x90, 0x90], TF),
        (&[0xf1], 0),
        (&[0xcc], IF),
        (&[0xcd, 0x80], 0),
        (&[0xfa, 0x0f, 0x0b], IF),
        (&[0xec, 0x0f, 0x0b], 0),
        (&[0x0f, 0x20, 0xc0], 0),
        (&[0xf4], 0),
        (&[0xa1, 0xff, 0xff], 0),
        (&[0x66, 0xea, 0, 0, 0, 0x10, 0, 0], 0),
        (&[0xeb, 0xfe], IF),
    ];
    for (bytes, flags) in cases {
        // The lowest bits of CS and SS: each level.
        for level in 0..4_u32 {
            // CS is the level, so address 1 of its segment comes after 16 bytes for each level.
            let code = [&[IRET], &[0x90; 48][..level as usize * 16], bytes, &[0x0f, 0x0b]].concat();
            let stack: [u32; 9] = [1, level, VM_IOPL_3 | flags, 0xff0, 0x100 + level, 0, 0, 0, 0];
            for (index, word) in stack.chunks(2).enumerate() {
                let high = word.get(1).copied().unwrap_or_default();
                let at = space.data() + 0x800 + index as u64 * 8;
                probe::write(at, u64::from(word[0]) | u64::from(high) << 32).expect("the data page is writable");
            }
            let frame = IretContext { rsp: UserSpace::DATA + 0x800, ..UserSpace::frame() };
            hypercall::set_singleshot_timer(0, time::now_ns() + 1_000_000).expect("a timer is set");
            let stop = space.run_bytes_until_event(&code, &frame, &pattern());
            hypercall::stop_singleshot_timer(0).expect("the timer is stopped");
            events::scan();
            let _ = events::mask_upcalls();
            let rflags = (stop.frame.rflags | stop.handler_rflags) & (flag::IF | flag::IOPL);
            assert_eq!(rflags, flag::IF, "{bytes:x?}, level {level}: {}", stop.frame);
            assert_eq!(stop.handler_rflags & flag::IF, flag::IF, "{bytes:x?}, level {level}: {}", stop.frame);
            assert_eq!(stop.handler_selectors, (selector::GUEST_CS, selector::GUEST_SS));
        }
    }
}
test!("compat.virtual_8086", return_to_virtual_8086_mode);
