//! System calls of 32-bit user code (core 3.2, 3.4).

use guests::abi::callback::{CALLBACK_MASKS_EVENTS, CallbackRegister, CallbackType, IretContext};
use guests::abi::{Hypercall, selector};
use guests::memory::PAGE;
use guests::probe::{self, Stop, UserSpace, call, trap_stack_end};
use guests::{code, events, flag, pattern, test};
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
