//! Decoding of the few instructions ring 0 carries out for a guest: privileged ones a PV kernel still executes, and plain
//! writes to a page-table page (ABI core 3.9, 4.7).
//!
//! Touches: a copy of at most 15 code bytes, and the guest's registers to compute an address.
//! Never touches: memory. What may be done is decided by the callers, `emulate` and `paging`.

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

/// Bases of FS and GS, for operands with such a prefix.
#[derive(Clone, Copy, Debug, Default)]
pub struct SegmentBases {
    /// FS base.
    pub fs: u64,
    /// GS base.
    pub gs: u64,
}

/// Decodes the instruction of 64-bit code at `registers.rip`, of which these are the first bytes. `None`: cut short, or not
/// one we carry out.
#[must_use]
pub fn decode(code: &[u8], registers: &Registers, bases: SegmentBases) -> Option<Decoded> {
    let code = code.get(..LONGEST).unwrap_or(code);
    let mut decoder = Decoder { code, at: 0, registers, operand16: false, address32: false, rex: None, base: 0 };
    let opcode = loop {
        match decoder.next()? {
            0x66 => decoder.operand16 = true,
            0x67 => decoder.address32 = true,
            0x64 => decoder.base = bases.fs,
            0x65 => decoder.base = bases.gs,
            // Lock and repeat change nothing here: every write is atomic, no string instruction is decoded. Segment
            // overrides other than FS and GS have no effect in 64-bit mode.
            0xf0 | 0xf2 | 0xf3 | 0x26 | 0x2e | 0x36 | 0x3e => {}
            rex @ 0x40..=0x4f => {
                decoder.rex = Some(rex);
                break decoder.next()?; // anything between REX and opcode would cancel it; then it is no opcode of ours
            }
            opcode => break opcode,
        }
    };
    let instruction = if opcode == 0x0f { decoder.two_bytes()? } else { decoder.one_byte(opcode)? };
    Some(Decoded { instruction, length: decoder.at as u64 })
}

/// What an instruction is decoded from: bytes copied from the guest, of which those before `at` have been looked at.
struct Decoder<'a> {
    code: &'a [u8],
    at: usize,
    registers: &'a Registers,
    operand16: bool,
    address32: bool,
    rex: Option<u8>,
    /// Of the segment that a prefix names.
    base: u64,
}

impl Decoder<'_> {
    fn rex_bit(&self, bit: u8) -> u8 {
        self.rex.map_or(0, |rex| rex >> bit & 1)
    }

    fn size(&self) -> u8 {
        match (self.rex_bit(3), self.operand16) {
            (1, _) => 8,
            (_, true) => 2,
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
                let which = match (opcode, modrm, modrm >> 3 & 7) {
                    (1, 0xd1, _) => return Some(Instruction::Xsetbv),
                    (0, _, 0) => SystemRegister::Ldt,
                    (0, _, 1) => SystemRegister::Task,
                    (1, 0..0xc0, 0) => SystemRegister::Gdt,
                    (1, 0..0xc0, 1) => SystemRegister::Idt,
                    (1, _, 4) => SystemRegister::MachineStatus,
                    _ => return None,
                };
                if modrm >= 0xc0 {
                    let to = Err(modrm & 7 | self.rex_bit(0) << 3);
                    return Some(Instruction::StoreSystem { which, to, size });
                }
                let size = if matches!(which, SystemRegister::Gdt | SystemRegister::Idt) { 10 } else { 2 };
                Instruction::StoreSystem { which, to: Ok(self.effective_address(modrm, 0)?), size }
            }
            0x06 => Instruction::Clts,
            0x09 => Instruction::Wbinvd,
            opcode @ 0x20..=0x23 => {
                let modrm = self.next()?;
                let special = modrm >> 3 & 7 | self.rex_bit(2) << 3;
                let moved = Move { special, general: modrm & 7 | self.rex_bit(0) << 3 };
                match opcode {
                    0x20 => Instruction::FromControl(moved),
                    0x21 => Instruction::FromDebug(moved),
                    0x22 => Instruction::ToControl(moved),
                    _ => Instruction::ToDebug(moved),
                }
            }
            0x30 => Instruction::Wrmsr,
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
        let mut address = self.effective_address(modrm, constant_bytes)?;
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
                    address = address.wrapping_add(units.cast_unsigned().wrapping_mul(u64::from(size)));
                    bit
                }
            };
            source = Source::Constant(bit & (bits - 1));
        }
        let legacy_bytes = self.rex.is_none();
        Some(Instruction::Write(Write { change, address, size, source, legacy_bytes }))
    }

    /// The address a ModRM byte names. `tail`: bytes of constant that follow, which count for RIP-relative addresses.
    fn effective_address(&mut self, modrm: u8, tail: u8) -> Option<u64> {
        let (mode, rm) = (modrm >> 6, modrm & 7);
        let address = match (mode, rm) {
            (3, _) => return None, // a register operand writes no memory
            (0, 5) => {
                let displacement = self.signed(4)?;
                let next = self.at as u64 + u64::from(tail);
                self.registers.rip.wrapping_add(next).wrapping_add(displacement)
            }
            (_, 4) => {
                let sib = self.next()?;
                let index = sib >> 3 & 7 | self.rex_bit(1) << 3;
                let base = sib & 7 | self.rex_bit(0) << 3;
                let scaled = if index == 4 { 0 } else { self.registers.general(index) << (sib >> 6) };
                let base = if sib & 7 == 5 && mode == 0 { self.signed(4)? } else { self.registers.general(base) };
                base.wrapping_add(scaled)
            }
            _ => self.registers.general(rm | self.rex_bit(0) << 3),
        };
        let displacement = match mode {
            1 => self.signed(1)?,
            2 => self.signed(4)?,
            _ => 0,
        };
        let address = address.wrapping_add(displacement);
        Some(self.base.wrapping_add(if self.address32 { address & 0xffff_ffff } else { address }))
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

    fn write_of(bytes: &[u8], registers: &Registers) -> (Change, u64, u8, Source, u64) {
        let bases = SegmentBases { fs: 0x1000_0000, gs: 0x2000_0000 };
        let decoded = decode(bytes, registers, bases).expect("decodes");
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
        let one = |bytes: &[u8]| {
            decode(bytes, &Registers::default(), SegmentBases::default()).map(|d| (d.instruction, d.length))
        };
        assert_eq!(one(&[0xfa]), Some((Instruction::Cli, 1)));
        assert_eq!(one(&[0x0f, 0x20, 0xd0]), Some((Instruction::FromControl(Move { special: 2, general: 0 }), 3)));
        assert_eq!(one(&[0x41, 0x0f, 0x22, 0xe4]), Some((Instruction::ToControl(Move { special: 4, general: 12 }), 4)));
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
            if let Some(decoded) = decode(used, &registers, SegmentBases::default()) {
                known += 1;
                assert!(decoded.length <= length as u64, "round {round}: {used:x?}");
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
