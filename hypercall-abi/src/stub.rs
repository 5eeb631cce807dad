//! The page of hypercall stubs, for kernels without a hypercall instruction of their own (core 1.8).

use crate::Hypercall;

/// Bytes of a stub; a page holds 128.
pub const SIZE: usize = 32;

/// The code of one stub; what it does not need is INT3.
#[must_use]
pub fn code(number: u8) -> [u8; SIZE] {
    /// push rcx; push r11; mov eax, number; syscall; pop r11; pop rcx; ret
    const CALL: [u8; 14] = [0x51, 0x41, 0x53, 0xb8, 0, 0, 0, 0, 0x0f, 0x05, 0x41, 0x5b, 0x59, 0xc3];
    /// push rcx; push r11; push rax; mov eax, number; syscall. The kernel jumps here, and iret does not come back.
    const IRET: [u8; 11] = [0x51, 0x41, 0x53, 0x50, 0xb8, 0, 0, 0, 0, 0x0f, 0x05];
    let mut stub = [0xcc; SIZE];
    let (template, place): (&[u8], usize) =
        if u64::from(number) == Hypercall::Iret.number() { (&IRET, 5) } else { (&CALL, 4) };
    stub.iter_mut().zip(template).for_each(|(to, byte)| *to = *byte);
    stub[place] = number;
    stub
}
