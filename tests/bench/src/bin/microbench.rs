//! The benchmark program: init of a Linux that is measured. See the library for what it measures.
//!
//! Touches: its own memory and Linux, through system calls.
//! Keeps: one thread; a child of `fork` only writes memory, exits or executes.
#![no_std]
#![no_main]

#[path = "microbench/clock.rs"]
mod clock;
#[path = "microbench/disks.rs"]
mod disks;
#[path = "microbench/linux.rs"]
mod linux;
#[path = "microbench/metrics.rs"]
mod metrics;
#[path = "microbench/network.rs"]
mod network;
#[path = "microbench/press.rs"]
mod press;
#[path = "microbench/scripts.rs"]
mod scripts;
#[path = "microbench/wall.rs"]
mod wall;
#[path = "microbench/window.rs"]
mod window;

use core::arch::{asm, naked_asm};
use core::panic::PanicInfo;
use linux::println;
use marker::{INIT, Kind, OPCODE, word};
use microbench::{DONE, REACHED, mode};

/// Where the kernel enters: the stack holds the number of arguments, the arguments, the environment and the auxiliary vector.
///
/// # Safety
/// For the kernel alone.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("mov rdi, rsp", "xor ebp, ebp", "and rsp, -16", "call {main}", "ud2", main = sym main)
}

extern "C" fn main(stack: *const usize) -> ! {
    // SAFETY: the kernel put the vectors of a process there, which nobody changes.
    let process = unsafe { linux::Process::new(stack) };
    match process.argument(1).unwrap_or_default() {
        word if word == mode::BOOT.as_bytes() => reached(),
        word if word == mode::GUEST.as_bytes() => {
            metrics::run(&process);
            println!("{DONE}");
        }
        word if word == mode::DISKS.as_bytes() => {
            disks::run();
            println!("{DONE}");
        }
        word if word == mode::SERVE.as_bytes() => network::serve(),
        word if word == mode::NETWORK.as_bytes() => {
            network::run();
            println!("{DONE}");
        }
        word if word == mode::HOST_GUEST.as_bytes() || word == mode::HOST_ALONE.as_bytes() => {
            network::with_host(word == mode::HOST_ALONE.as_bytes(), process.argument(2).unwrap_or_default());
            println!("{DONE}");
        }
        word if word == mode::FLOOD.as_bytes() => network::flood(process.argument(2).unwrap_or_default()),
        word if word == mode::PRESS.as_bytes() => {
            press::run();
            println!("{DONE}");
            linux::exit(0);
        }
        word if word == mode::INTERRUPT.as_bytes() => {
            press::interrupt();
            println!("{DONE}");
            linux::exit(0);
        }
        word if word == mode::SCRIPTS.as_bytes() => {
            scripts::run();
            println!("{DONE}");
        }
        word if word == mode::WALL.as_bytes() => {
            reached();
            wall::run(&process);
            println!("{DONE}");
        }
        word if word == mode::WAIT.as_bytes() => {
            reached();
            loop {
                linux::pause();
            }
        }
        _ => println!("microbench: the first argument must be a mode"),
    }
    linux::power_off()
}

fn reached() {
    // SAFETY: a no-op.
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::Point, INIT), options(nostack, preserves_flags)) }
    println!("{REACHED}");
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("microbench: {info}");
    linux::power_off()
}
