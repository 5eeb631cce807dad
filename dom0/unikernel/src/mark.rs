//! Markers for the counting plugin (`marker`): the begin and end of a measured stretch of work.

use core::arch::asm;
pub use marker::{COPY_ODD, COPY_PAGE, COPY_SMALL, CREATE, DESTROY, LISTED, PIN};
use marker::{Kind, OPCODE, word};

/// Marks the begin of window `NUMBER`.
pub fn begin<const NUMBER: u16>() {
    // SAFETY: a no-op. (To the compiler it touches memory, so no access of the measured work is moved across it.)
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::Begin, NUMBER), options(nostack, preserves_flags)) }
}

/// Marks the end of window `NUMBER`.
pub fn end<const NUMBER: u16>() {
    // SAFETY: a no-op, as in `begin`.
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::End, NUMBER), options(nostack, preserves_flags)) }
}

/// Marks that point `NUMBER` is reached.
pub fn point<const NUMBER: u16>() {
    // SAFETY: a no-op, as in `begin`.
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::Point, NUMBER), options(nostack, preserves_flags)) }
}
