//! The few instructions that ring 0 carries out for a guest (ABI core 3.9, 3.13, 3.14, 4.7).
//!
//! Touches: the vcpu's registers, its code bytes (copied once), the CPU state a privileged instruction would change.
//! Never touches: devices. Ports read as all ones and swallow what is written, but for those of [`config`].

use super::config;
use super::decode::{
    self, Change, Decoded, Instruction, LONGEST, Mode, Move, PortAccess, Segment, Source, Span, SystemRegister, Write,
    load_register, truncate,
};
use super::table::gate_of;
use super::{deliver_page_fault, set_cr2};
use crate::addr::PAGE_SHIFT;
use crate::claim::GuestMemory;
use crate::claim::walks::Kind;
use crate::flags;
use crate::host::ops::fill_hypercall_page;
use crate::machine::Registers;
use crate::paging::Stop;
use crate::paging::ops::{TableWritten, load_kernel_root, write_own_table};
use crate::policy::{self, CR0_TS, CR4_FIXED, cr4_choice};
use crate::prelude::*;
use crate::vcpu::debug::port_breakpoints;
use crate::vcpu::ops::{read_debug, set_task_switched, write_debug};
use hypercall_abi::callback::Assist;
use hypercall_abi::selector;
use hypercall_abi::tenon::RefusalKind;

/// UD2 and the letters "xen", which a guest puts before CPUID to ask us rather than the hardware.
const FORCED_CPUID: [u8; 7] = [0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2];
const DEBUG: u8 = 1;
/// DR6: a single step.
const DR6_STEP: u64 = 1 << 14;

/// Memory as the vcpu sees it in the mode it is in.
fn memory<'a, M: Machine>(ctx: &Ctx<'a, M>) -> Option<GuestMemory<'a, M>> {
    Some(GuestMemory::new(ctx.m, &ctx.world.frames, ctx.state.root()?).remembering(ctx.walks, Kind::Code))
}

/// The code that a vcpu executes.
struct Code {
    /// What its descriptor makes of it.
    mode: Mode,
    /// Linear address of the instruction.
    at: u64,
    /// Bytes left in its segment.
    left: u64,
}

/// Finds the code, by the descriptor of CS; `None` if that is no code segment, or the instruction lies outside it.
fn code<M: Machine>(ctx: &Ctx<'_, M>) -> Option<Code> {
    let regs = &ctx.state.regs;
    let cs = low16(regs.cs);
    if cs == selector::GUEST_CS {
        return Some(Code { mode: Mode::Bits64, at: regs.rip, left: u64::MAX });
    }
    let descriptor = descriptor(ctx, cs).filter(|descriptor| descriptor.is(Descriptor::CODE))?;
    if descriptor.is(Descriptor::LONG) {
        return Some(Code { mode: Mode::Bits64, at: regs.rip, left: u64::MAX });
    }
    let mode = if descriptor.is(Descriptor::WIDE) { Mode::Bits32 } else { Mode::Bits16 };
    let Span { base, last } = descriptor.span();
    let left = last.checked_sub(mode.wrap(regs.rip))?.saturating_add(1);
    Some(Code { mode, at: mode.wrap(base.wrapping_add(regs.rip)), left })
}

/// A descriptor of a code or data segment.
#[derive(Clone, Copy)]
struct Descriptor(u64);

impl Descriptor {
    const WRITABLE: u64 = 1 << 41;
    const EXPAND_DOWN: u64 = 1 << 42;
    const CODE: u64 = 1 << 43;
    /// Of code or data, and present.
    const USABLE: u64 = 1 << 44 | 1 << 47;
    const LONG: u64 = 1 << 53;
    const WIDE: u64 = 1 << 54;
    const PAGES: u64 = 1 << 55;

    fn is(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    fn span(self) -> Span {
        let base = self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000;
        let limit = self.0 & 0xffff | self.0 >> 32 & 0xf_0000;
        Span { base, last: if self.is(Self::PAGES) { limit << 12 | 0xfff } else { limit } }
    }
}

/// The descriptor of a selector, as the guest's tables have it now.
fn descriptor<M: Machine>(ctx: &Ctx<'_, M>, selector: u16) -> Option<Descriptor> {
    const LOCAL: u16 = 4;
    let index = usize::from(selector >> 3);
    let word = match selector | 3 {
        3 => return None,
        selector::GUEST_CS32 => 0x00cf_fb00_0000_ffff,
        selector::GUEST_SS => 0x00cf_f300_0000_ffff,
        _ if selector & LOCAL != 0 => {
            if index >= usize::try_from(ctx.state.ldt_entries).ok()? {
                return None;
            }
            ctx.read(ctx.state.ldt_base.plus(long(index) * 8).0).ok()?
        }
        _ => ctx.m.page((*ctx.state.gdt.get(index / 512)?)?).get(index % 512)?.load(Relaxed),
    };
    Some(Descriptor(word)).filter(|descriptor| descriptor.is(Descriptor::USABLE))
}

/// Where a segment lies that an instruction is to write. Segments that grow downwards are left to the guest's fault.
fn segment<M: Machine>(ctx: &Ctx<'_, M>, mode: Mode, which: Segment) -> Option<Span> {
    if mode == Mode::Bits64 {
        let base = match which {
            Segment::Fs => ctx.m.fs_base(),
            Segment::Gs => ctx.m.gs_base(),
            _ => 0,
        };
        return Some(Span { base, ..Span::ALL });
    }
    let [ds, es, fs, gs] = ctx.m.data_selectors();
    let selector = match which {
        Segment::Es => es,
        Segment::Cs => return None, // code is not writable
        Segment::Ss => low16(ctx.state.regs.ss),
        Segment::Ds => ds,
        Segment::Fs => fs,
        Segment::Gs => gs,
    };
    let descriptor = descriptor(ctx, selector)?;
    let writable =
        descriptor.is(Descriptor::WRITABLE) && descriptor.0 & (Descriptor::CODE | Descriptor::EXPAND_DOWN) == 0;
    writable.then(|| descriptor.span())
}

/// Copies the code of an instruction, up to the end of its segment and of what is mapped.
#[inline(always)]
fn fetch<M: Machine>(ctx: &Ctx<'_, M>) -> Option<(Mode, heapless::Vec<u8, LONGEST>)> {
    let Code { mode, at, left } = code(ctx)?;
    let (memory, at) = (memory(ctx)?, GuestVirt(at));
    let mut bytes = heapless::Vec::from_array([0; LONGEST]);
    if left < long(LONGEST) {
        bytes.truncate(low16(left).into());
    }
    let here = bytes.len().min(PAGE_SIZE - at.offset());
    let (first, rest) = bytes.split_at_mut_checked(here)?;
    memory.read_bytes(at, first).ok()?;
    if memory.read_bytes(GuestVirt(mode.wrap(at.plus(long(here)).0)), rest).is_err() {
        bytes.truncate(here);
    }
    Some((mode, bytes))
}

fn decode_here<M: Machine>(ctx: &Ctx<'_, M>) -> Option<Decoded> {
    let (mode, bytes) = fetch(ctx)?;
    decode::decode(&bytes, &ctx.state.regs, mode, |which| segment(ctx, mode, which))
}

/// Moves past an instruction.
fn advance<M: Machine>(ctx: &mut Ctx<'_, M>, length: u64) {
    let next = ctx.state.regs.rip.wrapping_add(length);
    ctx.state.regs.rip = code(ctx).map_or(next, |code| code.mode.wrap(next));
}

/// Moves past an instruction that has been carried out.
fn retire<M: Machine>(ctx: &mut Ctx<'_, M>, length: u64) {
    retire_at_breakpoint(ctx, length, 0);
}

/// The same, with the bits of DR6 for the breakpoints it met.
fn retire_at_breakpoint<M: Machine>(ctx: &mut Ctx<'_, M>, length: u64, met: u64) {
    advance(ctx, length);
    let regs = &mut ctx.state.regs;
    regs.rflags &= !flags::RF;
    let status = met | if regs.rflags & flags::TF != 0 { DR6_STEP } else { 0 };
    if status != 0 {
        ctx.state.debug[6] |= status;
        ctx.state.raise(DEBUG, None);
    }
}

/// If RIP is at a forced CPUID, answers it.
pub fn forced_cpuid<M: Machine>(ctx: &mut Ctx<'_, M>) -> bool {
    if !fetch(ctx).is_some_and(|(_, bytes)| bytes.starts_with(&FORCED_CPUID)) {
        return false;
    }
    cpuid(ctx);
    retire(ctx, long(FORCED_CPUID.len()));
    true
}

fn cpuid<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let [leaf, subleaf] = [ctx.state.regs.rax, ctx.state.regs.rcx].map(low32);
    let [a, b, c, d] = policy::cpuid(ctx.m, leaf, subleaf, ctx.state.xcr0).map(u64::from);
    let regs = &mut ctx.state.regs;
    (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (a, b, c, d);
}

/// An INT n whose hardware gate is closed to ring 3: delivered if the guest's own gate is open to its caller. False if
/// the general-protection fault stands.
pub fn software_interrupt<M: Machine>(ctx: &mut Ctx<'_, M>, vector: u8) -> bool {
    let caller = if ctx.state.kernel_mode { 1 } else { 3 };
    let gate = gate_of(ctx, vector);
    let found = decode_here(ctx).filter(|found| found.instruction == Instruction::Int(vector));
    let Some(Decoded { length, .. }) = found.filter(|_| gate.address != 0 && gate.flags & 3 >= caller) else {
        return false;
    };
    advance(ctx, length);
    ctx.state.raise(vector, None);
    true
}

/// Carries out the privileged instruction at RIP. False: the fault is the guest's.
pub fn instruction<M: Machine>(ctx: &mut Ctx<'_, M>) -> bool {
    let Some(Decoded { instruction, length }) = decode_here(ctx) else { return false };
    let kernel = ctx.state.kernel_mode;
    let done = match instruction {
        Instruction::Cli | Instruction::Sti => has_iopl(ctx),
        Instruction::In(access) | Instruction::Out(access) => {
            let Some(port) = port_access(ctx, access) else { return false };
            if matches!(instruction, Instruction::In(_)) {
                read_port(ctx, port, access.size);
            } else {
                config::write(ctx, port, access.size, low32(ctx.state.regs.rax));
            }
            let met = port_breakpoints((ctx.state.cr4, &ctx.state.debug), port, access.size);
            retire_at_breakpoint(ctx, length, met);
            return true;
        }
        Instruction::FromControl(moved) if kernel => from_control(ctx, moved),
        Instruction::ToControl(moved @ Move { special: 3, .. }) if kernel => {
            match load_kernel_root(ctx, operand(ctx, moved) >> PAGE_SHIFT) {
                Err(Stop::More) => return true, // the guest executes it again
                loaded => loaded.is_ok(),
            }
        }
        Instruction::ToControl(moved) if kernel => to_control(ctx, moved),
        Instruction::FromDebug(Move { special, general, size }) if kernel => read_debug(ctx, special.into())
            .map(|value| load_register(&mut ctx.state.regs, (general, 0), size, value))
            .is_ok(),
        Instruction::ToDebug(moved) if kernel => write_debug(ctx, moved.special.into(), operand(ctx, moved)).is_ok(),
        Instruction::Rdtsc if kernel => {
            read_counter(ctx);
            true
        }
        Instruction::Rdtscp if kernel => {
            read_counter(ctx);
            ctx.state.regs.rcx = ctx.state.tsc_aux.into();
            true
        }
        Instruction::Clts if kernel => {
            set_task_switched(ctx, false);
            true
        }
        Instruction::Rdmsr if kernel => read_msr(ctx),
        Instruction::Wrmsr if kernel => write_msr(ctx),
        Instruction::Xsetbv if kernel => set_xcr0(ctx),
        Instruction::Wbinvd => kernel,
        Instruction::StoreSystem { which, to, size } => return store_system(ctx, (which, to, size), length),
        Instruction::Cpuid => {
            cpuid(ctx);
            true
        }
        _ => false,
    };
    if done {
        retire(ctx, length);
    }
    done
}

/// Notes the instruction at RIP, for which the guest's kernel gets a general-protection fault.
#[cold]
#[inline(never)]
pub fn note_refused<M: Machine>(ctx: &Ctx<'_, M>) {
    let regs = &ctx.state.regs;
    let register = u64::from(low32(regs.rcx));
    let (kind, args) = match decode_here(ctx).map(|found| found.instruction) {
        Some(Instruction::Rdmsr) => (RefusalKind::ReadMsr, [register, 0]),
        Some(Instruction::Wrmsr) => (RefusalKind::WriteMsr, [register, regs.rdx << 32 | regs.rax & 0xffff_ffff]),
        _ => {
            let mut code = [0; 8];
            fill(&mut code, fetch(ctx).map(|(_, bytes)| bytes).as_deref().unwrap_or_default());
            (RefusalKind::Instruction, [u64::from_le_bytes(code), 0])
        }
    };
    ctx.note_refusal(kind, regs.rip, args, None);
}

/// SGDT, SIDT, SLDT, STR, SMSW with UMIP on: the guest gets constants, not where ring 0 keeps its tables (P10).
fn store_system<M: Machine>(
    ctx: &mut Ctx<'_, M>,
    (which, to, size): (SystemRegister, Result<u64, u8>, u8),
    length: u64,
) -> bool {
    /// The base shown for GDT and IDT: in no guest's reach, and in nobody's use.
    const NOWHERE: u64 = 0xffff_ffff_ffff_0000;
    let (value, limit_bits) = match which {
        SystemRegister::Gdt | SystemRegister::Idt => (NOWHERE, 16),
        SystemRegister::Ldt | SystemRegister::Task => (0, 0),
        SystemRegister::MachineStatus => (policy::cr0(ctx.state.task_switched), 0),
    };
    match to {
        Err(number) => load_register(&mut ctx.state.regs, (number, 0), size, value),
        Ok(address) => {
            let Some(memory) = memory(ctx) else { return false };
            let bytes = (u128::from(value) << limit_bits).to_le_bytes();
            let stored = memory.write_bytes(GuestVirt(address), bytes.get(..usize::from(size)).unwrap_or_default());
            if let Err(fault) = stored {
                deliver_page_fault(ctx, fault.error(), fault.address.0);
                return true;
            }
        }
    }
    retire(ctx, length);
    true
}

/// Whether the caller's virtual IOPL lets it use ports and the interrupt flag.
fn has_iopl<M: Machine>(ctx: &Ctx<'_, M>) -> bool {
    let privilege = match (ctx.state.kernel_mode, ctx.domain.assisted(Assist::ArchitecturalIopl)) {
        (false, _) => 3,
        (true, false) => 1,
        (true, true) => 0,
    };
    ctx.state.iopl >= privilege
}

/// The port of an I/O instruction, if the caller may use it.
fn port_access<M: Machine>(ctx: &Ctx<'_, M>, access: PortAccess) -> Option<u16> {
    let port = access.port.map_or(ctx.state.regs.rdx & 0xffff, u64::from);
    let number = u16::try_from(port).ok()?;
    if has_iopl(ctx) {
        return Some(number);
    }
    let (bitmap, covers) = ctx.state.iobitmap;
    if u32::from(number) + u32::from(access.size) > covers {
        return None;
    }
    let mut bits = [0u8; 2];
    ctx.read_bytes(bitmap.plus(port / 8).0, &mut bits).ok()?;
    let wanted = ((1u16 << access.size) - 1) << (port % 8);
    (u16::from_le_bytes(bits) & wanted == 0).then_some(number)
}

/// No domain has a device behind another port than those of PCI configuration: ones, except where ones would make a guest wait
/// for a counter (ABI core 3.9).
fn read_port<M: Machine>(ctx: &mut Ctx<'_, M>, port: u16, size: u8) {
    const PIT_CHANNEL_2: u16 = 0x42;
    let otherwise = if port == PIT_CHANNEL_2 { 0 } else { u64::MAX };
    let value = config::read(ctx, port, size).unwrap_or(otherwise);
    load_register(&mut ctx.state.regs, (0, 0), size, value);
}

/// The general register of a move.
fn operand<M: Machine>(ctx: &Ctx<'_, M>, Move { general, size, .. }: Move) -> u64 {
    truncate(ctx.state.regs.general(general), size)
}

fn from_control<M: Machine>(ctx: &mut Ctx<'_, M>, Move { special, general, size }: Move) -> bool {
    let value = match special {
        0 => policy::cr0(ctx.state.task_switched),
        2 => ctx.state.cr2,
        3 => ctx.state.kernel_root.map_or(0, Frame::address),
        4 => ctx.state.cr4 | CR4_FIXED,
        _ => return false,
    };
    load_register(&mut ctx.state.regs, (general, 0), size, value);
    true
}

fn to_control<M: Machine>(ctx: &mut Ctx<'_, M>, moved: Move) -> bool {
    let value = operand(ctx, moved);
    match moved.special {
        0 if value | CR0_TS == policy::cr0(true) => set_task_switched(ctx, value & CR0_TS != 0),
        2 => set_cr2(ctx, value),
        // The bits a guest may choose; the others are ignored (ABI core 3.9).
        4 => {
            ctx.state.cr4 = value & cr4_choice(ctx.m);
            ctx.m.set_guest_cr4(ctx.state.cr4);
        }
        _ => return false,
    }
    true
}

/// RDTSC for a guest's kernel: with CR4.TSD it is user mode that the guest keeps away from the counter, but both are in
/// ring 3.
fn read_counter<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let counter = ctx.m.tsc();
    (ctx.state.regs.rax, ctx.state.regs.rdx) = (counter & 0xffff_ffff, counter >> 32);
}

fn set_xcr0<M: Machine>(ctx: &mut Ctx<'_, M>) -> bool {
    let regs = &ctx.state.regs;
    let value = regs.rdx << 32 | regs.rax & 0xffff_ffff;
    if regs.rcx & 0xffff_ffff != 0 || !policy::xcr0_valid(ctx.m, value) {
        return false;
    }
    ctx.state.xcr0 = value;
    ctx.m.set_xcr0(value);
    true
}

/// Model-specific registers a guest may know of (ABI core 3.14).
pub(crate) mod msr {
    pub(crate) const TSC: u32 = 0x10;
    pub(crate) const PLATFORM_ID: u32 = 0x17;
    pub(crate) const APIC_BASE: u32 = 0x1b;
    pub(crate) const FEATURE_CONTROL: u32 = 0x3a;
    pub(crate) const MICROCODE: u32 = 0x8b;
    pub(crate) const PLATFORM_INFO: u32 = 0xce;
    pub(crate) const MISC_FEATURES: u32 = 0x140;
    pub(crate) const MISC_ENABLE: u32 = 0x1a0;
    pub(crate) const PAT: u32 = 0x277;
    pub(crate) const HYPERCALL_PAGE: u32 = 0x4000_0000;
    pub(crate) const EFER: u32 = 0xc000_0080;
    pub(crate) const FS_BASE: u32 = 0xc000_0100;
    pub(crate) const GS_BASE: u32 = 0xc000_0101;
    pub(crate) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(crate) const TSC_AUX: u32 = 0xc000_0103;
    pub(crate) const HWCR: u32 = 0xc001_0015;
    pub(crate) const DE_CFG: u32 = 0xc001_1029;
}
/// SCE LME LMA NXE.
const EFER: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;
/// WB WT UC- UC WC WP UC UC.
const PAT: u64 = 0x0000_0501_0007_0406;
/// MISC_ENABLE: fast strings, without which a guest drops ERMS; branch trace, precise events unavailable; xTPR disabled.
/// Limit-CPUID (22) and execute-disable (34) are clear, MONITOR (18) as in CPUID.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12 | 1 << 23;

fn read_msr<M: Machine>(ctx: &mut Ctx<'_, M>) -> bool {
    let value = match low32(ctx.state.regs.rcx) {
        msr::TSC => ctx.m.tsc(),
        msr::APIC_BASE => 0xfee0_0800 | if ctx.vcpu.number().0 == 0 { 0x100 } else { 0 },
        msr::FEATURE_CONTROL => 1,
        msr::MISC_ENABLE => MISC_ENABLE,
        msr::PAT => PAT,
        msr::EFER => EFER,
        msr::FS_BASE => ctx.m.fs_base(),
        msr::GS_BASE => ctx.m.gs_base(),
        msr::KERNEL_GS_BASE => ctx.m.entry().other_gs.load(Relaxed),
        msr::TSC_AUX => u64::from(ctx.state.tsc_aux),
        msr::DE_CFG => 2,
        msr::PLATFORM_ID | msr::PLATFORM_INFO | msr::MICROCODE => 0,
        msr::MISC_FEATURES | msr::HYPERCALL_PAGE | msr::HWCR => 0,
        _ => return false,
    };
    let regs = &mut ctx.state.regs;
    (regs.rax, regs.rdx) = (value & 0xffff_ffff, value >> 32);
    true
}

fn write_msr<M: Machine>(ctx: &mut Ctx<'_, M>) -> bool {
    let regs = &ctx.state.regs;
    let value = regs.rdx << 32 | regs.rax & 0xffff_ffff;
    let base = GuestVirt(value).is_canonical();
    match low32(regs.rcx) {
        msr::FS_BASE if base => ctx.m.set_fs_base(value),
        msr::GS_BASE if base => ctx.m.set_gs_base(value),
        msr::KERNEL_GS_BASE if base => ctx.m.entry().other_gs.store(value, Relaxed),
        msr::EFER => return value == EFER,
        msr::MICROCODE | msr::MISC_FEATURES => return value == 0,
        msr::MISC_ENABLE | msr::HWCR | msr::DE_CFG => {} // dropped
        msr::TSC_AUX if value >> 32 == 0 => {
            ctx.state.tsc_aux = low32(value);
            ctx.m.set_tsc_aux(ctx.state.tsc_aux);
        }
        msr::HYPERCALL_PAGE => return fill_hypercall_page(ctx, value).is_ok(),
        _ => return false,
    }
    true
}

/// A write to a page that the guest has mapped read-only because it is one of its L1 tables: carried out as an update of
/// one entry (ABI core 4.7). False: an ordinary page fault.
pub fn table_write<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64) -> bool {
    let Some(Decoded { instruction: Instruction::Write(write), length }) = decode_here(ctx) else { return false };
    let Write { change, address: at, size, .. } = write;
    let page = !(PAGE_BYTES - 1);
    if at & page != address & page || at & u64::from(size).wrapping_sub(1) != 0 {
        return false;
    }
    let (operand, accumulator) = (write.operand(&ctx.state.regs), ctx.state.regs.rax);
    let shift = 8 * low32(at & 7);
    let field = truncate(u64::MAX, size) << shift;
    // The entry is replaced only if it still holds what the new value was computed from; else we look again.
    let written = write_own_table(ctx, GuestVirt(at), |entry| {
        let old = (entry & field) >> shift;
        decode::apply(change, old, operand, accumulator, size).map(|new| entry & !field | new << shift)
    });
    match written {
        TableWritten::Done(entry, stored) => {
            finish_write(&mut ctx.state.regs, &write, (entry & field) >> shift, stored);
            retire(ctx, length);
            true
        }
        TableWritten::Again => true,
        TableWritten::NotOurs => false,
    }
}

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;

/// RFLAGS after a bitwise operation of so many bytes.
#[inline(always)]
pub(crate) fn flags_of(rflags: u64, result: u64, size: u8) -> u64 {
    /// Which numbers of four bits have an even number of ones.
    const EVEN: u64 = 0x9669;
    let folded = (result ^ result >> 4) & 0xf;
    let zero = if result == 0 { ZF } else { 0 };
    let negative = result >> (u32::from(size) * 8 - 1) & 1;
    rflags & !(CF | PF | ZF | SF | OF) | ((EVEN >> folded & 1) * PF) | zero | (negative * SF)
}

/// Registers and flags as a write leaves them that found `old` and `stored` something or not.
pub(crate) fn finish_write(regs: &mut Registers, write: &Write, old: u64, stored: bool) {
    let set = |rflags: u64, flag: u64, on: bool| if on { rflags | flag } else { rflags & !flag };
    match (write.change, write.source) {
        (Change::Xchg, Source::Register(number)) => write.load(regs, number, old),
        (Change::CmpXchg, _) => {
            regs.rflags = set(regs.rflags, ZF, stored);
            if !stored {
                write.load(regs, 0, old);
            }
        }
        (Change::Bts | Change::Btr, Source::Constant(bit)) => {
            regs.rflags = set(regs.rflags, CF, old.wrapping_shr(low32(bit)) & 1 != 0);
        }
        (Change::And | Change::Or, _) => {
            let result = decode::apply(write.change, old, write.operand(regs), 0, write.size).unwrap_or(0);
            regs.rflags = flags_of(regs.rflags, result, write.size);
        }
        _ => {}
    }
}
