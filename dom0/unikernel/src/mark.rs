//! Markers for the counting plugin (`marker`): where a measured stretch of work begins and ends.

use core::arch::asm;
pub use marker::{CREATE, DESTROY, LISTED};
use marker::{Kind, OPCODE, word};

/// The window `NUMBER` begins.
pub fn begin<const NUMBER: u16>() {
    // SAFETY: a no-op. (It claims to touch memory, so that the work stays on its side of it.)
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::Begin, NUMBER), options(nostack, preserves_flags)) }
}

/// The window `NUMBER` ends.
pub fn end<const NUMBER: u16>() {
    // SAFETY: a no-op, as in `begin`.
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::End, NUMBER), options(nostack, preserves_flags)) }
}

/// The point `NUMBER` is reached.
pub fn point<const NUMBER: u16>() {
    // SAFETY: a no-op, as in `begin`.
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::Point, NUMBER), options(nostack, preserves_flags)) }
}
