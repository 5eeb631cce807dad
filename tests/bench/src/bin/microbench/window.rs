//! Windows: what is counted together.

use core::arch::asm;
use marker::{Kind, OPCODE, word};

/// Runs `work` inside the window `NUMBER`.
#[inline(always)]
pub(crate) fn window<const NUMBER: u16>(work: impl FnOnce()) {
    // SAFETY: a no-op. (It claims to touch memory, so that the work stays on its side of it.)
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::Begin, NUMBER), options(nostack, preserves_flags)) }
    work();
    // SAFETY: as above.
    unsafe { asm!(".long {}, {}", const OPCODE, const word(Kind::End, NUMBER), options(nostack, preserves_flags)) }
}
