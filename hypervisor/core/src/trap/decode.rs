//! Decoding of the few instructions ring 0 carries out for a guest: privileged ones a PV kernel still executes, and plain
//! writes to a page-table page (ABI core 3.9, 4.7).
//!
//! Touches: a copy of at most 15 code bytes, and the guest's registers to compute an address.
//! Never touches: memory. What may be done is decided by the callers, `emulate` and `paging`.

use crate::addr::long;
use crate::machine::Registers;

/// The longest an instruction can be.
pub const LONGEST: usize = 15;

/// The second operand of a memory instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// A general register, numbered as in the instruction.
    Register(u8),
    /// A constant, sign-extended to the operand size.
    Constant(u64),
}

/// What an instruction does to its memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Store.
    Mov,
    /// Store, and load the old value into the register.
    Xchg,
    /// Store if equal to the accumulator.
    CmpXchg,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Set a bit.
    Bts,
    /// Clear a bit.
    Btr,
}

/// Where the port number of an I/O instruction comes from, and its operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortAccess {
    /// `None`: in DX.
    pub port: Option<u8>,
    /// Bytes: 1, 2 or 4.
    pub size: u8,
}

/// A move between a control or debug register and a general one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// Number of the control or debug register.
    pub special: u8,
    /// Number of the general register, as in the instruction.
    pub general: u8,
    /// Bytes of it: 8 in 64-bit code, else 4.
    pub size: u8,
}

/// What SGDT, SIDT, SLDT, STR and SMSW store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SystemRegister {
    /// Limit and base of the global descriptor table.
    Gdt,
    /// Limit and base of the interrupt descriptor table.
    Idt,
    /// Selector of the local descriptor table.
    Ldt,
    /// Selector of the task-state segment.
    Task,
    /// The low half of CR0.
    MachineStatus,
}

/// An instruction ring 0 knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Instruction {
    /// Clear the interrupt flag.
    Cli,
    /// Set the interrupt flag.
    Sti,
    /// Read a port into the accumulator.
    In(PortAccess),
    /// Write the accumulator to a port.
    Out(PortAccess),
    /// Move from control register to general register.
    FromControl(Move),
    /// Move from general register to control register.
    ToControl(Move),
    /// Move from debug register to general register.
    FromDebug(Move),
    /// Move from general register to debug register.
    ToDebug(Move),
    /// Clear CR0.TS.
    Clts,
    /// Read a model-specific register.
    Rdmsr,
    /// Write a model-specific register.
    Wrmsr,
    /// Set XCR0.
    Xsetbv,
    /// Read the time-stamp counter.
    Rdtsc,
    /// Read it and TSC_AUX.
    Rdtscp,
    /// Write back caches.
    Wbinvd,
    /// CPUID.
    Cpuid,
    /// INT n.
    Int(u8),
    /// Store a system register that UMIP keeps from ring 3.
    StoreSystem {
        /// Which.
        which: SystemRegister,
        /// Where to: a linear address, or a general register.
        to: Result<u64, u8>,
        /// Bytes of the operand.
        size: u8,
    },
    /// A write to memory.
    Write(Write),
}

/// A write to memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Write {
    /// What kind.
    pub change: Change,
    /// Linear address of the operand, segment base included.
    pub address: u64,
    /// Operand size in bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// The other operand.
    pub source: Source,
    /// Whether byte registers 4..8 mean AH, CH, DH, BH.
    pub legacy_bytes: bool,
}

impl Write {
    /// The register that a number means, and the bit at which the operand begins in it.
    fn place(&self, number: u8) -> (u8, u32) {
        let high_byte = self.size == 1 && self.legacy_bytes && (4..8).contains(&number);
        if high_byte { (number - 4, 8) } else { (number, 0) }
    }

    /// The value of the other operand.
    #[must_use]
    pub fn operand(&self, registers: &Registers) -> u64 {
        let value = match self.source {
            Source::Constant(value) => value,
            Source::Register(number) => {
                let (number, shift) = self.place(number);
                registers.general(number) >> shift
            }
        };
        truncate(value, self.size)
    }

    /// Loads a register operand.
    pub fn load(&self, registers: &mut Registers, number: u8, value: u64) {
        load_register(registers, self.place(number), self.size, value);
    }
}

/// Loads `size` bytes of a register from a bit on; four bytes clear those above them.
pub fn load_register(registers: &mut Registers, (number, shift): (u8, u32), size: u8, value: u64) {
    let slot = registers.general_mut(number);
    let field = if size == 4 { u64::MAX } else { truncate(u64::MAX, size) << shift };
    *slot = *slot & !field | truncate(value, size) << shift;
}

/// A decoded instruction and its length in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decoded {
    /// What it is.
    pub instruction: Instruction,
    /// By how much RIP moves on.
    pub length: u64,
}

/// What the descriptor of its code segment makes of code: how wide addresses and operands are without a prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// D and L clear. The instruction pointer has 32 bits all the same, and wraps there.
    Bits16,
    /// D set.
    Bits32,
    /// L set.
    Bits64,
}

impl Mode {
    /// An address, or an instruction pointer, as wide as it is here.
    #[must_use]
    pub fn wrap(self, address: u64) -> u64 {
        if self == Self::Bits64 { address } else { address & 0xffff_ffff }
    }
}

/// A segment register, numbered as in instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the registers' own names")]
pub enum Segment {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

/// Where a segment that may be written lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// Its linear address.
    pub base: u64,
    /// The last offset in it.
    pub last: u64,
}

impl Span {
    /// The whole of memory.
    pub const ALL: Self = Self { base: 0, last: u64::MAX };
}

/// Decodes the instruction at `registers.rip`, of which these are the first bytes. `segments` finds where a segment lies,
/// `None` for one that is not to be written. `None`: cut short, or not one we carry out.
#[must_use]
pub fn decode<F>(code: &[u8], registers: &Registers, mode: Mode, segments: F) -> Option<Decoded>
where
    F: Fn(Segment) -> Option<Span>,
{
    let code = code.get(..LONGEST).unwrap_or(code);
    let (rex, segment) = (None, None);
    let mut decoder = Decoder { code, at: 0, registers, mode, segments, operand: false, address: false, rex, segment };
    let opcode = loop {
        match decoder.next()? {
            0x66 => decoder.operand = true,
            0x67 => decoder.address = true,
            0x64 => decoder.segment = Some(Segment::Fs),
            0x65 => decoder.segment = Some(Segment::Gs),
            // Lock and repeat change nothing here: every write is atomic, no string instruction is decoded.
            0xf0 | 0xf2 | 0xf3 => {}
            // Segment overrides other than FS and GS have no effect in 64-bit mode.
            0x26 | 0x2e | 0x36 | 0x3e if mode == Mode::Bits64 => {}
            0x26 => decoder.segment = Some(Segment::Es),
            0x2e => decoder.segment = Some(Segment::Cs),
            0x36 => decoder.segment = Some(Segment::Ss),
            0x3e => decoder.segment = Some(Segment::Ds),
            rex @ 0x40..=0x4f if mode == Mode::Bits64 => {
                decoder.rex = Some(rex);
                break decoder.next()?; // anything between REX and opcode would cancel it; then it is no opcode of ours
            }
            opcode => break opcode,
        }
    };
    let instruction = if opcode == 0x0f { decoder.two_bytes()? } else { decoder.one_byte(opcode)? };
    Some(Decoded { instruction, length: long(decoder.at) })
}

/// What an instruction is decoded from: bytes copied from the guest, of which those before `at` have been looked at.
struct Decoder<'a, F> {
    code: &'a [u8],
    at: usize,
    registers: &'a Registers,
    mode: Mode,
    segments: F,
    /// Operands have the other size.
    operand: bool,
    /// Addresses have the other size.
    address: bool,
    rex: Option<u8>,
    /// That a prefix names.
    segment: Option<Segment>,
}

impl<F: Fn(Segment) -> Option<Span>> Decoder<'_, F> {
    fn rex_bit(&self, bit: u8) -> u8 {
        self.rex.map_or(0, |rex| rex >> bit & 1)
    }

    fn size(&self) -> u8 {
        match (self.rex_bit(3), self.operand == (self.mode == Mode::Bits16)) {
            (1, _) => 8,
            (_, false) => 2,
            _ => 4,
        }
    }

    /// Bytes of an address.
    fn address_size(&self) -> u8 {
        match (self.mode, self.address) {
            (Mode::Bits64, false) => 8,
            (Mode::Bits16, false) | (Mode::Bits32, true) => 2,
            _ => 4,
        }
    }

    fn next(&mut self) -> Option<u8> {
        let byte = *self.code.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// A little-endian value of `size` bytes, sign-extended.
    fn signed(&mut self, size: u8) -> Option<u64> {
        let mut value = 0u64;
        for n in 0..u32::from(size) {
            value |= u64::from(self.next()?) << (8 * n);
        }
        Some(sign_extend(value, size))
    }

    fn one_byte(&mut self, opcode: u8) -> Option<Instruction> {
        let size = if opcode & 1 == 0 { 1 } else { self.size() };
        let port_size = size.min(4);
        Some(match opcode {
            0xfa => Instruction::Cli,
            0xfb => Instruction::Sti,
            0xe4 | 0xe5 => Instruction::In(PortAccess { port: Some(self.next()?), size: port_size }),
            0xec | 0xed => Instruction::In(PortAccess { port: None, size: port_size }),
            0xe6 | 0xe7 => Instruction::Out(PortAccess { port: Some(self.next()?), size: port_size }),
            0xee | 0xef => Instruction::Out(PortAccess { port: None, size: port_size }),
            0xcd => Instruction::Int(self.next()?),
            0x08 | 0x09 => self.write(Change::Or, size, None)?,
            0x20 | 0x21 => self.write(Change::And, size, None)?,
            0x86 | 0x87 => self.write(Change::Xchg, size, None)?,
            0x88 | 0x89 => self.write(Change::Mov, size, None)?,
            0x80 | 0x81 | 0x83 => {
                let constant = if opcode == 0x81 { size.min(4) } else { 1 };
                self.write(Change::And, size, Some((constant, &[(1, Change::Or), (4, Change::And)])))?
            }
            0xc6 | 0xc7 => self.write(Change::Mov, size, Some((size.min(4), &[(0, Change::Mov)])))?,
            _ => return None,
        })
    }

    fn two_bytes(&mut self) -> Option<Instruction> {
        let size = self.size();
        Some(match self.next()? {
            opcode @ 0x00..=0x01 => {
                let modrm = self.next()?;
                let table = if self.mode == Mode::Bits64 { 10 } else { 6 };
                let (which, bytes) = match (opcode, modrm, modrm >> 3 & 7) {
                    (1, 0xd1, _) => return Some(Instruction::Xsetbv),
                    (1, 0xf9, _) => return Some(Instruction::Rdtscp),
                    (0, _, 0) => (SystemRegister::Ldt, 2),
                    (0, _, 1) => (SystemRegister::Task, 2),
                    (1, 0..0xc0, 0) => (SystemRegister::Gdt, table),
                    (1, 0..0xc0, 1) => (SystemRegister::Idt, table),
                    (1, _, 4) => (SystemRegister::MachineStatus, 2),
                    _ => return None,
                };
                if modrm >= 0xc0 {
                    let to = Err(modrm & 7 | self.rex_bit(0) << 3);
                    return Some(Instruction::StoreSystem { which, to, size });
                }
                let place = self.effective_address(modrm, 0)?;
                Instruction::StoreSystem { which, to: Ok(self.linear(place, bytes)?), size: bytes }
            }
            0x06 => Instruction::Clts,
            0x09 => Instruction::Wbinvd,
            opcode @ 0x20..=0x23 => {
                let modrm = self.next()?;
                let special = modrm >> 3 & 7 | self.rex_bit(2) << 3;
                let size = if self.mode == Mode::Bits64 { 8 } else { 4 };
                let moved = Move { special, general: modrm & 7 | self.rex_bit(0) << 3, size };
                match opcode {
                    0x20 => Instruction::FromControl(moved),
                    0x21 => Instruction::FromDebug(moved),
                    0x22 => Instruction::ToControl(moved),
                    _ => Instruction::ToDebug(moved),
                }
            }
            0x30 => Instruction::Wrmsr,
            0x31 => Instruction::Rdtsc,
            0x32 => Instruction::Rdmsr,
            0xa2 => Instruction::Cpuid,
            0xab => self.write(Change::Bts, size, None)?,
            0xb3 => self.write(Change::Btr, size, None)?,
            0xba => self.write(Change::Bts, size, Some((1, &[(5, Change::Bts), (6, Change::Btr)])))?,
            0xb0 => self.write(Change::CmpXchg, 1, None)?,
            0xb1 => self.write(Change::CmpXchg, size, None)?,
            _ => return None,
        })
    }

    /// A memory write: ModRM, address and, for groups, the bytes of the constant and the change its /digit chooses.
    fn write(&mut self, change: Change, size: u8, group: Option<(u8, &[(u8, Change)])>) -> Option<Instruction> {
        let modrm = self.next()?;
        let digit = modrm >> 3 & 7;
        let bits = u64::from(size) * 8;
        let (constant_bytes, choices) = group.unwrap_or((0, &[]));
        let mut place = self.effective_address(modrm, constant_bytes)?;
        let (change, mut source) = if group.is_some() {
            let change = choices.iter().find(|(number, _)| *number == digit)?.1;
            (change, Source::Constant(self.signed(constant_bytes)?))
        } else {
            (change, Source::Register(digit | self.rex_bit(2) << 3))
        };
        if matches!(change, Change::Bts | Change::Btr) {
            let bit = match source {
                // A constant bit number wraps inside the operand.
                Source::Constant(bit) => bit,
                // One in a register reaches beyond the operand, in steps of its size, forwards and backwards.
                Source::Register(number) => {
                    let bit = sign_extend(truncate(self.registers.general(number), size), size);
                    let units = bit.cast_signed() >> bits.trailing_zeros();
                    place.1 = place.1.wrapping_add(units.cast_unsigned().wrapping_mul(u64::from(size)));
                    bit
                }
            };
            source = Source::Constant(bit & (bits - 1));
        }
        let (legacy_bytes, address) = (self.rex.is_none(), self.linear(place, size)?);
        Some(Instruction::Write(Write { change, address, size, source, legacy_bytes }))
    }

    /// The segment and offset a ModRM byte names. `tail`: bytes of constant that follow, which count for RIP-relative
    /// addresses.
    fn effective_address(&mut self, modrm: u8, tail: u8) -> Option<(Segment, u64)> {
        let (mode, rm) = (modrm >> 6, modrm & 7);
        if mode == 3 {
            return None; // a register operand writes no memory
        }
        if self.mode != Mode::Bits64 && self.address_size() == 2 {
            return self.effective_address_16(mode, rm);
        }
        let mut segment = Segment::Ds;
        let mut of = |number: u8| {
            if matches!(number, 4 | 5) {
                segment = Segment::Ss;
            }
            self.registers.general(number)
        };
        let address = match (mode, rm) {
            (0, 5) => {
                let displacement = self.signed(4)?;
                let next = long(self.at) + u64::from(tail);
                let rip = if self.mode == Mode::Bits64 { self.registers.rip.wrapping_add(next) } else { 0 };
                rip.wrapping_add(displacement)
            }
            (_, 4) => {
                let sib = self.next()?;
                let index = sib >> 3 & 7 | self.rex_bit(1) << 3;
                let base = sib & 7 | self.rex_bit(0) << 3;
                let scaled = if index == 4 { 0 } else { self.registers.general(index) << (sib >> 6) };
                let base = if sib & 7 == 5 && mode == 0 { self.signed(4)? } else { of(base) };
                base.wrapping_add(scaled)
            }
            _ => of(rm | self.rex_bit(0) << 3),
        };
        let displacement = match mode {
            1 => self.signed(1)?,
            2 => self.signed(4)?,
            _ => 0,
        };
        Some((segment, address.wrapping_add(displacement)))
    }

    /// The same with 16-bit addresses.
    fn effective_address_16(&mut self, mode: u8, rm: u8) -> Option<(Segment, u64)> {
        let Registers { rbx, rbp, rsi, rdi, .. } = *self.registers;
        let (segment, address) = match (mode, rm) {
            (_, 0) => (Segment::Ds, rbx.wrapping_add(rsi)),
            (_, 1) => (Segment::Ds, rbx.wrapping_add(rdi)),
            (_, 2) => (Segment::Ss, rbp.wrapping_add(rsi)),
            (_, 3) => (Segment::Ss, rbp.wrapping_add(rdi)),
            (_, 4) => (Segment::Ds, rsi),
            (_, 5) => (Segment::Ds, rdi),
            (0, 6) => (Segment::Ds, self.signed(2)?),
            (_, 6) => (Segment::Ss, rbp),
            _ => (Segment::Ds, rbx),
        };
        let displacement = match mode {
            1 => self.signed(1)?,
            2 => self.signed(2)?,
            _ => 0,
        };
        Some((segment, address.wrapping_add(displacement)))
    }

    /// The linear address of an operand, which lies in its segment as a whole, and does not wrap.
    fn linear(&self, (segment, offset): (Segment, u64), size: u8) -> Option<u64> {
        if let (Mode::Bits64, None, false) = (self.mode, self.segment, self.address) {
            return Some(offset);
        }
        let offset = truncate(offset, self.address_size());
        let more = u64::from(size.saturating_sub(1));
        let Span { base, last } = (self.segments)(self.segment.unwrap_or(segment))?;
        let at = self.mode.wrap(base.wrapping_add(offset));
        let fits = || offset + more <= last && self.mode.wrap(at + more) == at + more;
        (self.mode == Mode::Bits64 || fits()).then_some(at)
    }
}

/// The low `size` bytes of a value.
#[must_use]
pub fn truncate(value: u64, size: u8) -> u64 {
    if size >= 8 { value } else { value & ((1 << (u32::from(size) * 8)) - 1) }
}

fn sign_extend(value: u64, size: u8) -> u64 {
    let unused = 64u32.saturating_sub(u32::from(size) * 8);
    ((value << unused).cast_signed() >> unused).cast_unsigned()
}

/// The result of a change, and whether the instruction stores at all: `old` is what memory holds, `operand` the register
/// or constant, `accumulator` RAX. All are truncated to the operand size.
#[must_use]
pub fn apply(change: Change, old: u64, operand: u64, accumulator: u64, size: u8) -> Option<u64> {
    // Decoding has reduced a bit number to less than the operand's bits.
    let bit = u32::try_from(operand & 63).unwrap_or(0);
    let new = match change {
        Change::Mov | Change::Xchg => operand,
        Change::CmpXchg if truncate(accumulator, size) != old => return None,
        Change::CmpXchg => operand,
        Change::And => old & operand,
        Change::Or => old | operand,
        Change::Bts => old | 1u64.wrapping_shl(bit),
        Change::Btr => old & !1u64.wrapping_shl(bit),
    };
    Some(truncate(new, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The segments of 64-bit code.
    fn long(segment: Segment) -> Option<Span> {
        let base = match segment {
            Segment::Fs => 0x1000_0000,
            Segment::Gs => 0x2000_0000,
            _ => 0,
        };
        Some(Span { base, ..Span::ALL })
    }

    fn write_of(bytes: &[u8], registers: &Registers) -> (Change, u64, u8, Source, u64) {
        let decoded = decode(bytes, registers, Mode::Bits64, long).expect("decodes");
        match decoded.instruction {
            Instruction::Write(Write { change, address, size, source, .. }) => {
                (change, address, size, source, decoded.length)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_forms_linux_writes_page_tables_with() {
        let r =
            Registers { rbx: 0x5000, rdx: 0x6000, rdi: 0x7000, rip: 0x100, r9: 0x9000, rcx: 70, ..Default::default() };
        assert_eq!(write_of(&[0x48, 0x89, 0x2b], &r), (Change::Mov, 0x5000, 8, Source::Register(5), 3));
        assert_eq!(
            write_of(&[0x48, 0x89, 0x34, 0xda], &r),
            (Change::Mov, 0x6000 + 8 * 0x5000, 8, Source::Register(6), 4)
        );
        assert_eq!(write_of(&[0x48, 0x87, 0x07], &r), (Change::Xchg, 0x7000, 8, Source::Register(0), 3));
        assert_eq!(write_of(&[0xf0, 0x80, 0x27, 0xfd], &r), (Change::And, 0x7000, 1, Source::Constant(!2), 4));
        assert_eq!(write_of(&[0xf0, 0x48, 0x0f, 0xb1, 0x17], &r), (Change::CmpXchg, 0x7000, 8, Source::Register(2), 5));
        assert_eq!(write_of(&[0xf0, 0x48, 0x0f, 0xba, 0x37, 5], &r), (Change::Btr, 0x7000, 8, Source::Constant(5), 6));
        assert_eq!(
            write_of(&[0x48, 0xc7, 0x05, 0x10, 0, 0, 0, 1, 0, 0, 0], &r),
            (Change::Mov, 0x100 + 11 + 0x10, 8, Source::Constant(1), 11)
        );
        assert_eq!(
            write_of(&[0x65, 0x49, 0x89, 0x41, 0xf8], &r),
            (Change::Mov, 0x2000_8ff8, 8, Source::Register(0), 5)
        );
        assert_eq!(write_of(&[0x48, 0x0f, 0xab, 0x0f], &r), (Change::Bts, 0x7008, 8, Source::Constant(6), 4));
        assert_eq!(write_of(&[0x83, 0x0f, 0xff], &r), (Change::Or, 0x7000, 4, Source::Constant(u64::MAX), 3));
    }

    #[test]
    fn privileged_instructions() {
        let one =
            |bytes: &[u8]| decode(bytes, &Registers::default(), Mode::Bits64, long).map(|d| (d.instruction, d.length));
        assert_eq!(one(&[0xfa]), Some((Instruction::Cli, 1)));
        assert_eq!(
            one(&[0x0f, 0x20, 0xd0]),
            Some((Instruction::FromControl(Move { special: 2, general: 0, size: 8 }), 3))
        );
        assert_eq!(
            one(&[0x41, 0x0f, 0x22, 0xe4]),
            Some((Instruction::ToControl(Move { special: 4, general: 12, size: 8 }), 4))
        );
        assert_eq!(one(&[0x66, 0xef]), Some((Instruction::Out(PortAccess { port: None, size: 2 }), 2)));
        assert_eq!(one(&[0x0f, 0x01, 0xd1]), Some((Instruction::Xsetbv, 3)));
        assert_eq!(one(&[0x0f, 0x01, 0xd0]), None);
        let store = |which, to, size| Instruction::StoreSystem { which, to, size };
        assert_eq!(one(&[0x0f, 0x01, 0x00]), Some((store(SystemRegister::Gdt, Ok(0), 10), 3)));
        assert_eq!(one(&[0x48, 0x0f, 0x01, 0xe1]), Some((store(SystemRegister::MachineStatus, Err(1), 8), 4)));
        assert_eq!(one(&[0x0f, 0x00, 0xc8]), Some((store(SystemRegister::Task, Err(0), 4), 3)));
        assert_eq!(one(&[0x0f, 0x01, 0xc8]), None);
        assert_eq!(one(&[0x66, 0xcd, 0x20]), Some((Instruction::Int(0x20), 3)));
        assert_eq!(one(&[0x0f]), None);
        assert_eq!(one(&[]), None);
    }

    /// 32-bit and 16-bit code: no REX, other default sizes, segments that count, addresses that wrap.
    #[test]
    fn narrow_code() {
        let segments = |segment| match segment {
            Segment::Ds => Some(Span { base: 0x1_0000, last: 0xffff_ffff }),
            Segment::Ss => Some(Span { base: 0xffff_0000, last: 0xffff }),
            Segment::Es => Some(Span { base: 0, last: 0xfff }),
            _ => None,
        };
        let high = 0xdead_beef_0000_0000;
        let r = Registers {
            rax: high | 0x10,
            rbx: 0xff00,
            rbp: 0x200,
            rsi: 0x300,
            rdi: 0xffff_fff0,
            ..Registers::default()
        };
        let one = |mode, bytes: &[u8]| decode(bytes, &r, mode, segments).map(|d| (d.instruction, d.length));
        let to = |mode, bytes: &[u8]| match one(mode, bytes) {
            Some((Instruction::Write(write), length)) => Some((write.address, write.size, length)),
            _ => None,
        };
        let input = |port, size| Instruction::In(PortAccess { port, size });
        assert_eq!(one(Mode::Bits32, &[0xed]), Some((input(None, 4), 1)));
        assert_eq!(one(Mode::Bits32, &[0x66, 0xed]), Some((input(None, 2), 2)));
        assert_eq!(one(Mode::Bits16, &[0xed]), Some((input(None, 2), 1)));
        assert_eq!(one(Mode::Bits16, &[0x66, 0xe5, 7]), Some((input(Some(7), 4), 3)));
        // 0x48 is DEC EAX here, and no prefix.
        assert_eq!(one(Mode::Bits32, &[0x48, 0xed]), None);
        let moved = Move { special: 0, general: 0, size: 4 };
        assert_eq!(one(Mode::Bits32, &[0x0f, 0x20, 0xc0]), Some((Instruction::FromControl(moved), 3)));
        // mov [eax], ecx; mov [edi + 0x20], ecx; mov [ebp], ecx; mov es:[eax], cx; mov [0x44], ecx
        assert_eq!(to(Mode::Bits32, &[0x89, 0x08]), Some((0x1_0010, 4, 2)));
        assert_eq!(to(Mode::Bits32, &[0x89, 0x4f, 0x20]), Some((0x1_0010, 4, 3)));
        assert_eq!(to(Mode::Bits32, &[0x89, 0x4d, 0]), Some((0xffff_0200, 4, 3)));
        assert_eq!(to(Mode::Bits32, &[0x26, 0x66, 0x89, 0x08]), Some((0x10, 2, 4)));
        assert_eq!(to(Mode::Bits32, &[0x89, 0x0d, 0x44, 0, 0, 0]), Some((0x1_0044, 4, 6)));
        // Beyond ES, in FS, which is not writable, and across the end of the address space.
        assert_eq!(to(Mode::Bits32, &[0x26, 0x89, 0x88, 0xed, 0x0f, 0, 0]), None);
        assert_eq!(to(Mode::Bits32, &[0x26, 0x89, 0x88, 0xec, 0x0f, 0, 0]), Some((0xffc, 4, 7)));
        assert_eq!(to(Mode::Bits32, &[0x64, 0x89, 0x08]), None);
        assert_eq!(to(Mode::Bits32, &[0x89, 0x4f, 0x0d]), None);
        assert_eq!(to(Mode::Bits16, &[0x36, 0x89, 0x0e, 0xff, 0xff]), None);
        assert_eq!(to(Mode::Bits16, &[0x36, 0x88, 0x0e, 0xff, 0xff]), Some((0xffff_ffff, 1, 5)));
        // mov [bx + si], cx; mov [bp + si], cx; mov [0x1234], ecx; and the same sizes by prefix from 32-bit code.
        assert_eq!(to(Mode::Bits16, &[0x89, 0x08]), Some((0x1_0200, 2, 2)));
        assert_eq!(to(Mode::Bits16, &[0x89, 0x0a]), Some((0xffff_0500, 2, 2)));
        assert_eq!(to(Mode::Bits16, &[0x66, 0x89, 0x0e, 0x34, 0x12]), Some((0x1_1234, 4, 5)));
        assert_eq!(to(Mode::Bits32, &[0x67, 0x66, 0x89, 0x48, 0x80]), Some((0x1_0180, 2, 5)));
        assert_eq!(to(Mode::Bits16, &[0x67, 0x89, 0x08]), Some((0x1_0010, 2, 3)));
        // SGDT stores six bytes.
        let store = Instruction::StoreSystem { which: SystemRegister::Gdt, to: Ok(0x1_0010), size: 6 };
        assert_eq!(one(Mode::Bits32, &[0x0f, 0x01, 0x00]), Some((store, 3)));
        assert_eq!(one(Mode::Bits32, &[0x0f, 0x01, 0xf9]), Some((Instruction::Rdtscp, 3)));
    }

    #[test]
    fn random_bytes_never_panic_and_never_decode_past_their_end() {
        let mut seed = 0x1234_5678_9abc_def1_u64;
        let mut known = 0u32;
        for round in 0..200_000 {
            let mut bytes = [0u8; 15];
            for byte in &mut bytes {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                *byte = seed.to_le_bytes()[3];
            }
            let length = (seed % 16) as usize;
            let registers = Registers { rax: seed, rbx: !seed, ..Default::default() };
            let used = bytes.get(..length).unwrap_or(&bytes);
            for mode in [Mode::Bits16, Mode::Bits32, Mode::Bits64] {
                if let Some(decoded) = decode(used, &registers, mode, long) {
                    known += 1;
                    assert!(decoded.length <= length as u64, "round {round}: {used:x?}");
                }
            }
        }
        assert!(known > 1000, "only {known} decoded");
    }

    #[test]
    fn changes() {
        assert_eq!(apply(Change::And, 0xff, !2, 0, 1), Some(0xfd));
        assert_eq!(apply(Change::CmpXchg, 5, 9, 5, 8), Some(9));
        assert_eq!(apply(Change::CmpXchg, 5, 9, 6, 8), None);
        assert_eq!(apply(Change::Btr, 0xff, 5, 0, 8), Some(0xdf));
        assert_eq!(apply(Change::Mov, 0, u64::MAX, 0, 4), Some(0xffff_ffff));
    }
}
