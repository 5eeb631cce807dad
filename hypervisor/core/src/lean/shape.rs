//! The instructions by which kernels write to page tables, recognized by their first bytes. The address is known from
//! the fault, so it is not computed.
//!
//! Keeps: what is recognized here is what `decode` finds.

use crate::addr::PAGE_BYTES;
use crate::machine::Registers;
use crate::paging::Edit;
use crate::trap::decode::{Change, Source, Write};

/// The form of an instruction that writes to a page table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// The eight bytes of code that begin with the instruction.
    pub code: u64,
    /// The write; its address is 0.
    pub write: Write,
    /// The instruction's length in bytes.
    pub length: u64,
    /// How it changes an entry.
    pub(super) effect: Effect,
}

/// How a write changes an entry. A number of type `usize` is the place of the operand's register
/// ([`Registers::place`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    /// The entry gets the register's value.
    Store(usize),
    /// The entry gets the register's value, and the register the entry's.
    Exchange(usize),
    /// The entry gets the register's value if the entry equals RAX.
    CompareExchange(usize),
    /// One byte of the entry is ANDed with these bits.
    AndByte(u64),
    /// The bit with this number is cleared.
    ClearBit(u64),
    /// Another change: call `decode`.
    Unknown,
}

impl Shape {
    /// The shape of eight zeros, which is never used on a fast path.
    pub const NONE: Self = {
        let source = Source::Constant(0);
        let write = Write { change: Change::Mov, address: 0, size: 1, source, legacy_bytes: false };
        Self { code: 0, write, length: 0, effect: Effect::Unknown }
    };

    /// Returns the change of the entry that `address` lies in. `None` for an unaligned wide write, and for a page's
    /// first entry, where a write that began in the page before faults as well.
    #[inline(always)]
    pub(super) fn edit(&self, address: u64, registers: &Registers) -> Option<Edit> {
        let aligned = || address & 7 == 0 && !address.is_multiple_of(PAGE_BYTES);
        match self.effect {
            Effect::Store(place) | Effect::Exchange(place) => aligned().then(|| Edit::to(registers.word(place))),
            Effect::CompareExchange(place) => {
                aligned().then(|| Edit { only: Some(registers.rax), ..Edit::to(registers.word(place)) })
            }
            Effect::AndByte(bits) => Some(Edit { keep: !((!bits & 0xff) << (8 * (address & 7))), ..Edit::to(0) }),
            Effect::Unknown => None,
            Effect::ClearBit(bit) => aligned().then(|| Edit { keep: !(1 << (bit & 63)), ..Edit::to(0) }),
        }
    }
}

/// Returns the shape of the write at the start of these eight bytes of flat 64-bit code. `None` if this is no write of
/// a known form, or may be longer than eight bytes: call `decode`.
#[must_use]
pub fn shape(code: u64) -> Option<Shape> {
    const ADDRESS_SIZE: u64 = 4;
    let mut bytes = Bytes { code, taken: 0 };
    let mut opcode = bytes.next();
    // LOCK does not matter here. On a single CPU, Linux replaces it by the DS segment override, which does not matter
    // either.
    if matches!(opcode, 0xf0 | 0x3e) {
        opcode = bytes.next();
    }
    let legacy_bytes = opcode & 0xf0 != 0x40;
    let mut rex = 0;
    if !legacy_bytes {
        (rex, opcode) = (opcode & 0xf, bytes.next());
    }
    let two_bytes = opcode == 0x0f;
    if two_bytes {
        opcode = bytes.next();
    }
    let modrm = bytes.next();
    let (mode, digit, base) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
    let skip = match (mode, base) {
        (3, _) | (0, 5) => return None, // a register, or relative to RIP
        (0, 4) if bytes.next() & 7 == 5 => return None,
        (0, _) => 0,
        (1, 4) => 2,
        (1, _) => 1,
        (_, 4) => 1 + ADDRESS_SIZE,
        _ => ADDRESS_SIZE,
    };
    bytes.skip(skip);
    let wide = rex & 8 != 0;
    let [number, ..] = (digit | (rex & 4) << 1).to_le_bytes();
    let (register, place) = (Source::Register(number), Registers::place(number));
    let (change, size, source, effect) = match (two_bytes, opcode, digit) {
        (false, 0x89, _) if wide => (Change::Mov, 8, register, Effect::Store(place)),
        (false, 0x87, _) if wide => (Change::Xchg, 8, register, Effect::Exchange(place)),
        (true, 0xb1, _) if wide => (Change::CmpXchg, 8, register, Effect::CompareExchange(place)),
        (false, 0x80, 4) => {
            let bits = sign_extended(bytes.next());
            (Change::And, 1, Source::Constant(bits), Effect::AndByte(bits))
        }
        (true, 0xba, 6) if wide => {
            let bit = bytes.next() & 63;
            (Change::Btr, 8, Source::Constant(bit), Effect::ClearBit(bit))
        }
        _ => return None,
    };
    let length = bytes.taken;
    let write = Write { change, address: 0, size, source, legacy_bytes };
    (length <= 8).then_some(Shape { code, write, length, effect })
}

const fn sign_extended(byte: u64) -> u64 {
    byte.wrapping_shl(56).cast_signed().wrapping_shr(56).cast_unsigned()
}

/// Bytes of code, the first one in the lowest bits.
struct Bytes {
    code: u64,
    taken: u64,
}

impl Bytes {
    fn next(&mut self) -> u64 {
        let byte = self.code & 0xff;
        self.skip(1);
        byte
    }

    fn skip(&mut self, bytes: u64) {
        self.taken += bytes;
        self.code = u32::try_from(8 * bytes).ok().and_then(|bits| self.code.checked_shr(bits)).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Registers;
    use crate::trap::decode::{Decoded, Instruction, Mode, Span, decode};

    /// Compares with `decode`; returns whether the code has a shape.
    fn agrees(code: u64) -> bool {
        let bytes = code.to_le_bytes();
        let Some(Shape { write, length, .. }) = shape(code) else { return false };
        let mut long = [0; 15];
        long[..8].copy_from_slice(&bytes);
        let decoded = decode(&long, &Registers::default(), Mode::Bits64, |_| Some(Span::ALL));
        let Some(Decoded { instruction: Instruction::Write(found), length: found_length }) = decoded else {
            panic!("{bytes:x?} is {write:?}, but {decoded:?}");
        };
        assert_eq!((Write { address: 0, ..found }, found_length), (write, length), "{bytes:x?}");
        true
    }

    #[test]
    fn a_shape_is_what_decode_finds() {
        // All prefixes, REX, opcodes, operand forms and scale-index-base bytes; the bytes after them do not matter.
        let mut shapes = 0u64;
        for prefix in [None, Some(0xf0), Some(0x3e), Some(0xf2), Some(0x66)] {
            for rex in [None].into_iter().chain((0x40..=0x4f).map(Some)) {
                for opcode in (0..=0xffu64).map(|byte| (byte, 1)).chain((0..=0xff).map(|byte| (byte << 8 | 0x0f, 2))) {
                    for modrm in 0..=0xffu64 {
                        for sib in [0, 4, 5, 0x25, 0x65, 0xff, 0x80] {
                            let (mut code, mut at) = (0u64, 0);
                            for byte in [prefix, rex].into_iter().flatten() {
                                code |= byte << at;
                                at += 8;
                            }
                            code |= opcode.0 << at;
                            at += 8 * opcode.1;
                            code |= modrm << at | sib << (at + 8);
                            if at + 16 < 64 {
                                code |= 0x9f71_83c5_e2a4_06d8 << (at + 16);
                            }
                            shapes += u64::from(agrees(code));
                        }
                    }
                }
            }
        }
        assert!(shapes > 10_000, "{shapes} shapes");
        assert_eq!(shape(Shape::NONE.code), None);
    }
}
