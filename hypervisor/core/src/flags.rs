//! RFLAGS bits.

/// Trap.
pub const TF: u64 = 1 << 8;
/// Interrupt.
pub const IF: u64 = 1 << 9;
/// Direction.
pub const DF: u64 = 1 << 10;
/// I/O privilege level.
pub const IOPL: u64 = 3 << 12;
/// Nested task.
pub const NT: u64 = 1 << 14;
/// Resume.
pub const RF: u64 = 1 << 16;
/// Virtual 8086.
pub const VM: u64 = 1 << 17;
/// Alignment check.
pub const AC: u64 = 1 << 18;
/// What a guest may have in RFLAGS: the arithmetic flags, TF, DF, NT, RF, AC, ID and the bit that is always set.
pub const GUEST: u64 = 0xd5 | TF | DF | 1 << 11 | NT | RF | AC | 1 << 21 | 2;

/// The I/O privilege level in flags.
#[must_use]
pub const fn iopl(flags: u64) -> u8 {
    flags.to_le_bytes()[1] >> 4 & 3
}
