//! Turns what a network device does for Linux on or off, and shows by its exit status whether that has come to be: `offloads
//! eth0 off`. For guests of tests, whose shell has no program that does so.
#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;

/// Numbers of system calls.
mod number {
    pub(super) const IOCTL: usize = 16;
    pub(super) const SOCKET: usize = 41;
    pub(super) const EXIT_GROUP: usize = 231;
}

/// What is turned on and off: the command that asks for the state, and the one that sets it. Packets of several parts, segments
/// of TCP, segments of anything, joined segments. A driver allows the second only with the first.
const OFFLOADS: [[u32; 2]; 4] = [[0x18, 0x19], [0x1e, 0x1f], [0x23, 0x24], [0x2b, 0x2c]];

/// Exit statuses.
const DONE: usize = 0;
const NOT_DONE: usize = 1;
const USAGE: usize = 2;

/// Where the kernel enters: the stack holds the number of arguments and the arguments.
///
/// # Safety
/// For the kernel alone.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("mov rdi, rsp", "xor ebp, ebp", "and rsp, -16", "call {main}", "ud2", main = sym main)
}

extern "C" fn main(stack: *const usize) -> ! {
    // SAFETY: the kernel put the number of arguments there.
    let count = unsafe { *stack };
    if count != 3 {
        exit(USAGE);
    }
    let argument = |index: usize| {
        // SAFETY: there are three arguments, behind their number, which are C strings for the life of the process.
        unsafe { CStr::from_ptr(*stack.add(1 + index) as *const c_char) }.to_bytes()
    };
    let wanted = match argument(2) {
        b"on" => 1,
        b"off" => 0,
        _ => exit(USAGE),
    };
    let name = argument(1);
    let mut is_done = true;
    for [get, set] in OFFLOADS {
        // What cannot be set shows when the state is asked for.
        let _ = ask(name, set, wanted);
        is_done &= ask(name, get, 0) == Some(wanted);
    }
    exit(if is_done { DONE } else { NOT_DONE })
}

/// Gives a command and a value to a network device. Returns the value that the device leaves. `None` if the command fails.
fn ask(name: &[u8], command: u32, value: u32) -> Option<u32> {
    const INTERNET: usize = 2;
    const DATAGRAM: usize = 2;
    const ETHTOOL: usize = 0x8946;
    // The command and its value (`struct ethtool_value`); the device's name and where they are (`struct ifreq`).
    let mut words = [command, value];
    let mut request = [0_u8; 40];
    request.get_mut(..name.len().min(15))?.copy_from_slice(name.get(..name.len().min(15))?);
    request.get_mut(16..24)?.copy_from_slice(&(words.as_mut_ptr() as usize).to_le_bytes());
    // SAFETY: no memory is involved.
    let socket = unsafe { call(number::SOCKET, [INTERNET, DATAGRAM, 0]) };
    let socket = usize::try_from(socket).ok()?;
    // The process ends soon, and the socket with it.
    // SAFETY: the kernel reads the request, and reads and writes the words.
    let done = unsafe { call(number::IOCTL, [socket, ETHTOOL, request.as_mut_ptr() as usize]) };
    let [_, value] = words;
    (done == 0).then_some(value)
}

fn exit(status: usize) -> ! {
    // SAFETY: the process ends.
    unsafe { call(number::EXIT_GROUP, [status, 0, 0]) };
    unreachable!("exit_group returns to nobody")
}

/// A system call.
///
/// # Safety
/// What the call does to the memory of the process must be sound.
unsafe fn call(number: usize, [a, b, c]: [usize; 3]) -> isize {
    let result;
    // SAFETY: the kernel's convention.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    exit(NOT_DONE)
}
