//! Prints which code and stack selectors a program has after a system call, and which it and its tracer are shown. The kernel
//! may leave by SYSRET, which loads other selectors than the kernel's; those that it shows must stay its own.
//!
//! For guests of tests. Its exit status is 0 unless a register was lost or a step ended elsewhere.
#![no_std]
#![no_main]

#[path = "microbench/linux.rs"]
#[expect(dead_code, reason = "what the benchmark program needs is more")]
mod linux;

use core::arch::{asm, global_asm, naked_asm};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use linux::{call, checked, println};

/// Numbers of system calls.
mod number {
    pub(super) const RT_SIGACTION: usize = 13;
    pub(super) const SETITIMER: usize = 38;
    pub(super) const WAIT4: usize = 61;
    pub(super) const PTRACE: usize = 101;
    pub(super) const GETPPID: usize = 110;
}

/// Signals, and the number of bytes of the instruction here that raises each and is not repeated.
const ILL: usize = 4;
const TRAP: usize = 5;
const SEGV: usize = 11;
const ALRM: usize = 14;
const SKIPPED: [(usize, usize); 4] = [(ILL, 2), (TRAP, 0), (SEGV, 2), (ALRM, 0)];
/// Rounds of those that raise signals.
const ROUNDS: u32 = 20;
/// Requests to ptrace.
const TRACE_ME: usize = 0;
const CONTINUE: usize = 7;
const STEP: usize = 9;
const GET_REGISTERS: usize = 12;
/// Words that `GET_REGISTERS` writes, and where RIP, CS and SS are.
const REGISTERS: usize = 27;
const RIP: usize = 16;
const CS: usize = 17;
const SS: usize = 20;

/// Signals taken, and the selectors of their frames: CS, and SS above it. 0 before the first; `usize::MAX` if they differed.
static SIGNALS: AtomicU32 = AtomicU32::new(0);
static FRAMES: AtomicUsize = AtomicUsize::new(0);

// What the tracer steps through: the stops are where the RIPs of `STEPS` are.
global_asm!(
    ".global stepped",
    "stepped: mov eax, {}",
    "syscall",
    "int3",
    "nop",
    "mov eax, {}",
    "syscall",
    "nop",
    "ret",
    const number::GETPPID,
    const number::GETPPID,
);
unsafe extern "C" {
    safe fn stepped();
}
/// Offsets in `stepped`: after the breakpoint, and after each step.
const STEPS: [usize; 5] = [8, 9, 14, 16, 17];

/// Where the kernel enters.
///
/// # Safety
/// For the kernel alone.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("xor ebp, ebp", "and rsp, -16", "call {main}", "ud2", main = sym main)
}

extern "C" fn main() -> ! {
    let [cs, ss] = after_call();
    for (signal, _) in SKIPPED {
        take(signal);
    }
    for _ in 0..ROUNDS {
        raise();
    }
    wait_for_timer();
    println!("selectors: {cs:#x} {ss:#x} after a system call");
    let frames = FRAMES.load(Relaxed);
    println!("selectors: {:#x} {:#x} in {} signals", frames & 0xffff, frames >> 16, SIGNALS.load(Relaxed));
    let [cs, ss] = traced();
    println!("selectors: {cs:#x} {ss:#x} in {} stops", STEPS.len());
    linux::exit(0)
}

/// Installs the handler.
fn take(signal: usize) {
    const RESTORER: usize = 0x0400_0000;
    let action = [on_signal as *const () as usize, RESTORER, linux::restore as *const () as usize, 0];
    // SAFETY: the kernel reads the action (handler, flags, restorer, mask of eight bytes); both functions are what it expects.
    checked(unsafe { call(number::RT_SIGACTION, [signal, action.as_ptr() as usize, 0, 8, 0]) });
}

/// CS and SS as the program itself reads them.
fn after_call() -> [usize; 2] {
    let (cs, ss);
    // SAFETY: no memory is involved.
    unsafe {
        asm!(
            "syscall",
            "mov edi, cs",
            "mov esi, ss",
            inlateout("rax") number::GETPPID => _,
            lateout("rdi") cs,
            lateout("rsi") ss,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        )
    }
    [cs, ss]
}

/// Raises three signals, each right after a system call; no register is lost on the way.
fn raise() {
    const MARKS: [u64; 2] = [0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321];
    macro_rules! raise {
        ($instruction:literal) => {
            let (mut rcx, mut r11): (u64, u64);
            // SAFETY: the handler leads behind the instruction, which has no effect.
            unsafe {
                asm!("syscall", "mov rcx, rdi", "mov r11, rsi", "xor eax, eax", $instruction,
                     inlateout("rax") number::GETPPID => _, in("rdi") MARKS[0], in("rsi") MARKS[1],
                     lateout("rcx") rcx, lateout("r11") r11)
            }
            assert_eq!([rcx, r11], MARKS, "a signal changed RCX or R11");
        };
    }
    raise!("int3");
    raise!("ud2");
    raise!("mov byte ptr [rax], al");
}

/// A timer of 10 ms interrupts user mode right after a system call.
fn wait_for_timer() {
    let before = SIGNALS.load(Relaxed);
    let timer = [0, 0, 0, 10_000_usize];
    // SAFETY: the kernel reads the interval and the first time, in seconds and microseconds.
    checked(unsafe { call(number::SETITIMER, [0, timer.as_ptr() as usize, 0, 0, 0]) });
    while SIGNALS.load(Relaxed) == before {
        core::hint::spin_loop();
    }
}

/// Notes the selectors of the interrupted code, and leads it past the instruction.
extern "C" fn on_signal(signal: usize, _: usize, context: *mut [usize; 26]) {
    // SAFETY: `struct ucontext` begins with these words, which are the handler's.
    let context = unsafe { &mut *context };
    let (rip, selectors) = (21, context[23]);
    let seen = selectors & 0xffff | (selectors >> 48) << 16;
    if FRAMES.swap(seen, Relaxed) != seen && SIGNALS.load(Relaxed) > 0 {
        FRAMES.store(usize::MAX, Relaxed);
    }
    context[rip] += SKIPPED.iter().find(|(number, _)| *number == signal).map_or(0, |(_, bytes)| *bytes);
    SIGNALS.fetch_add(1, Relaxed);
}

/// CS and SS of a child as its tracer reads them, at a breakpoint after a system call and at steps over another.
fn traced() -> [usize; 2] {
    let child = linux::fork(|| {
        // SAFETY: no memory is involved.
        checked(unsafe { call(number::PTRACE, [TRACE_ME, 0, 0, 0, 0]) });
        stepped();
    });
    let mut seen = None;
    for offset in STEPS {
        assert_eq!(status(child), 0x057f, "a child does not stop at SIGTRAP");
        let mut registers = [0_usize; REGISTERS];
        // SAFETY: the kernel writes the registers.
        checked(unsafe { call(number::PTRACE, [GET_REGISTERS, child, 0, registers.as_mut_ptr() as usize, 0]) });
        assert_eq!(registers[RIP], stepped as *const () as usize + offset, "a step ended elsewhere");
        let now = [registers[CS], registers[SS]];
        assert_eq!(*seen.get_or_insert(now), now, "the selectors change");
        let request = if offset == STEPS[STEPS.len() - 1] { CONTINUE } else { STEP };
        // SAFETY: no memory of this process is involved.
        checked(unsafe { call(number::PTRACE, [request, child, 0, 0, 0]) });
    }
    assert_eq!(status(child), 0, "the child failed");
    seen.unwrap_or_default()
}

/// Waits for a child to stop or end.
fn status(child: usize) -> u32 {
    let mut status = 0_u32;
    // SAFETY: the kernel writes the status.
    checked(unsafe { call(number::WAIT4, [child, &raw mut status as usize, 0, 0, 0]) });
    status
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("selectors: {info}");
    linux::exit(1)
}
