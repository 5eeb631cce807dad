//! The smallest program: what `fork_exec` executes.
#![no_std]
#![no_main]

use core::arch::naked_asm;
use core::panic::PanicInfo;

/// Where the kernel enters.
///
/// # Safety
/// For the kernel alone.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    // exit_group(0)
    naked_asm!("xor edi, edi", "mov eax, 231", "syscall", "ud2")
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}
