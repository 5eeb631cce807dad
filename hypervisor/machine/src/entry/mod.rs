//! Running a guest is a function call: [`Hardware::enter`] goes in, and comes back when the guest needs attention.

use crate::memory::address_of;
use crate::percpu::{self, Cpu};
use crate::{Hardware, apic, report, smp, timer};
use core::arch::asm;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::{AtomicU64, fence};
use hv_core::addr::{GuestVirt, low32};
use hv_core::machine::entry::{FAILED_RETURN, SYSCALL, SYSCALL32, SYSENTER};
use hv_core::machine::{Arrived, Exit, FIRST_MESSAGE, Interrupt, MESSAGES, Machine, Registers};
use hypercall_abi::selector::{GUEST_CS, GUEST_SS};
use x86_64::registers::control::Cr2;
use x86_64::registers::segmentation::{SS, Segment};

/// What the assembly is told.
#[cfg(target_os = "none")]
mod told {
    pub(super) use core::mem::offset_of;
    pub(super) use hv_core::flags;
    pub(super) use hv_core::machine::{Entry, mode};
    pub(super) use hypercall_abi::Hypercall;
    pub(super) use hypercall_abi::callback::SegmentBase;
    pub(super) use hypercall_abi::shared::vcpu_info;
}
#[cfg(target_os = "none")]
use told::*;

/// Flat selectors of 64-bit guest code and data (ABI core 1.6).
const FLAT: (u64, u64) = (GUEST_CS as u64, GUEST_SS as u64);
/// TF, RF, VM: SYSRET handles none of them the way IRET does.
const EXACT_FLAGS: u64 = 0x3_0100;
/// IOPL and IF, of which a guest has IF alone.
const CHECKED_FLAGS: u64 = 0x3200;
const IF: u64 = 0x200;
/// Virtual-8086 mode, which no CPU has in 64-bit mode.
#[cfg(target_os = "none")]
const VM: u64 = 1 << 17;
/// What RFLAGS may hold in ring 3.
const RING_3_FLAGS: u64 = hv_core::flags::GUEST | IF | 2;

/// NMIs seen; nobody asked for one.
static NMIS: AtomicU64 = AtomicU64::new(0);

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("vectors.s"), options(att_syntax));
#[cfg(target_os = "none")]
core::arch::global_asm!(
    include_str!("entry.s"),
    VM = const VM,
    HOST_STACK = const percpu::HOST_STACK,
    SCRATCH = const percpu::SCRATCH,
    REGISTERS_END = const percpu::REGISTERS_END,
    ENTRY = const percpu::ENTRY,
    MODE_IN_CPU = const offset_of!(percpu::Cpu, entry) + offset_of!(Entry, mode),
    ROOT = const percpu::ROOT,
    USER = const mode::USER,
    KERNEL = const mode::KERNEL,
    MODE = const offset_of!(Entry, mode),
    OTHER_GS = const offset_of!(Entry, other_gs),
    KERNEL_CR3 = const offset_of!(Entry, kernel_cr3),
    USER_CR3 = const offset_of!(Entry, user_cr3),
    INFO = const offset_of!(Entry, info),
    FRAME = const offset_of!(Entry, frame),
    FRAME_SP = const offset_of!(Entry, frame_sp),
    BACK = const offset_of!(Entry, back),
    BACK_SP = const offset_of!(Entry, back_sp),
    HANDLER = const offset_of!(Entry, syscall),
    FAULT = const offset_of!(Entry, fault),
    ENTRY_CR2 = const offset_of!(Entry, cr2),
    FROM_USER = const offset_of!(Entry, from_user),
    RULED = const offset_of!(Entry, ruled),
    ENTRY_RAX = const offset_of!(Entry, rax),
    ENTRY_RDX = const offset_of!(Entry, rdx),
    RECORD_CR2 = const vcpu_info::CR2,
    IRET = const Hypercall::Iret as u64,
    SET_SEGMENT_BASE = const Hypercall::SetSegmentBase as u64,
    GS_USER = const SegmentBase::GsUser as u64,
    GUEST_FLAGS = const flags::GUEST,
    SYSCALL = const SYSCALL,
    SYSCALL32 = const SYSCALL32,
    SYSENTER = const SYSENTER,
    FAILED_RETURN = const FAILED_RETURN,
    EXACT_FLAGS = const EXACT_FLAGS,
    DR6_CLEAR = const hv_core::vcpu::debug::DR6_CLEAR,
    nested = sym nested,
    nmis = sym NMIS,
);

unsafe extern "C" {
    pub(crate) static entry_vectors: u8;
    pub(crate) static entry_clac: u8;
    pub(crate) static entry_syscall: u8;
    pub(crate) static entry_syscall32: u8;
    pub(crate) static entry_sysenter: u8;
    pub(crate) static entry_debug: u8;
    pub(crate) static entry_page_fault: u8;
    pub(crate) static entry_nmi: u8;
    pub(crate) static entry_double_fault: u8;
    pub(crate) static entry_machine_check: u8;
    fn enter_guest(registers: *mut Registers);
    fn enter_guest_sysret(registers: *mut Registers);
}

/// Calls an entry of `entry.s` to the guest, which keeps RBX and RBP alone: so what is not needed is not saved.
macro_rules! enter_by {
    ($entry:ident, $registers:expr) => {
        asm!(
            "call {}", sym $entry, inout("rdi") &raw mut *$registers => _,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _, clobber_abi("sysv64"),
        )
    };
}

/// What a return to the guest must keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Return {
    /// Every register.
    Exact,
    /// RCX and R11 may be lost, as after a hypercall: the fast path may be taken.
    Sysret,
}

impl Hardware {
    /// Runs the guest whose state is in `registers`, those of [`Machine::begin`], and in the CPU, until it leaves, with
    /// interrupts on. What [`Hardware::entry`] allows is done without leaving.
    ///
    /// The rules have seen to RFLAGS (IF set, IOPL 0) and to CS and SS of ring 3; what else may be wrong with them
    /// comes back as [`Exit::ReturnFault`].
    ///
    /// [`Hardware::entry`]: hv_core::machine::CpuState::entry
    pub fn enter(&self, registers: &mut Registers, how: Return) {
        debug_assert_eq!(percpu::this().registers_end.load(Relaxed), (&raw const *registers).wrapping_add(1) as u64);
        if how == Return::Sysret && may_sysret(registers) {
            // SAFETY: as below; CS and SS are the flat ones of ring 3, RIP is canonical, and RFLAGS has been looked at.
            unsafe { enter_by!(enter_guest_sysret, registers) };
        } else {
            self.enter_exactly(registers);
        }
        // On a CPU these change nothing: a guest runs in ring 3, with IF set and IOPL 0. QEMU's emulation saves flags that it
        // has not computed yet, and lets an IRET of ring 3 enter virtual-8086 mode, where CS and SS are any numbers, IOPL may
        // be 3, and CLI works (SECURITY.md).
        registers.rflags = registers.rflags & RING_3_FLAGS | IF;
        registers.cs |= 3;
        registers.ss |= 3;
    }

    #[inline(always)]
    fn enter_exactly(&self, registers: &mut Registers) {
        let ring_3 = registers.cs & registers.ss & 3 == 3;
        // One test, and so one way out.
        assert!(
            ring_3 & (registers.rflags & CHECKED_FLAGS == IF),
            "a guest must run in ring 3, interruptible, with IOPL 0"
        );
        // SAFETY:
        // 1. `registers` is exclusively ours until the call returns; its end is 16-aligned (its type is), as the CPU
        //    needs it, and the entry code writes nothing outside it but what `Entry` leads to, which the rules vouch for.
        // 2. CS and SS are of ring 3 (asserted), so the guest cannot touch memory of ring 0 (P12).
        // 3. The entry code keeps RBX and RBP on this stack and comes back by the address in `Cpu`; the rest is told clobbered.
        unsafe { enter_by!(enter_guest, registers) }
    }

    /// The vcpu runs no more; says what its last exit was.
    pub fn end(&self, registers: &Registers) -> Exit {
        let cpu = percpu::this();
        cpu.in_guest.store(false, Relaxed);
        self.decode(cpu, registers)
    }

    /// What the entry code left in the error word, as an [`Exit`].
    #[expect(clippy::cast_possible_truncation, reason = "the word has two halves, and a vector is a byte")]
    fn decode(&self, cpu: &Cpu, registers: &Registers) -> Exit {
        let (kind, error) = (low32(registers.error >> 32), low32(registers.error));
        match kind {
            SYSCALL => Exit::Syscall,
            SYSCALL32 => Exit::Syscall32,
            SYSENTER => Exit::Sysenter,
            0x80 | 0..=0x1f => Exit::Fault { vector: kind as u8, error, address: fault_address(kind) },
            FAILED_RETURN.. => {
                let vector = kind - FAILED_RETURN;
                Exit::ReturnFault { vector: vector as u8, error, address: fault_address(vector) }
            }
            vector => Exit::Interrupt(interrupt(cpu, vector)),
        }
    }

    /// Sleeps until an interrupt; returns those of the console and of devices. Several can come at once; the others need no
    /// word, as the caller looks at its deadlines and at its queue anyway.
    pub fn idle(&self) -> Arrived {
        let cpu = percpu::this();
        cpu.idle.store(true, SeqCst);
        if cpu.woken.load(Relaxed) == 0 {
            // SAFETY: interrupts come in at HLT alone (STI delays them by one instruction); `nested` handles them
            // and touches nothing but `cpu.woken`, `cpu.messages`, the controllers and the console's ring, none of
            // which is locked here.
            unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
        }
        cpu.idle.store(false, SeqCst);
        came_in(cpu)
    }
}

impl Machine for Hardware {
    fn begin(&self, registers: &mut Registers) {
        let (cpu, end) = (percpu::this(), address_of((&raw mut *registers).wrapping_add(1)));
        cpu.tss.rsp0.store(end, Relaxed);
        cpu.registers_end.store(end, Relaxed);
        cpu.in_guest.store(true, Relaxed);
        // Either we see the request for a flush, or the CPU that makes it sees us in the guest and interrupts.
        if smp::several() {
            fence(SeqCst);
        }
        smp::flush_if_asked(cpu);
    }

    fn let_in(&self) -> Arrived {
        let cpu = percpu::this();
        // SAFETY: as in `idle`: interrupts come in after NOP alone, and no lock is held here either.
        unsafe { asm!("sti", "nop", "cli", options(nostack)) };
        came_in(cpu)
    }
}

/// Sees to the requests that interrupts in ring 0 have left; returns those that the rules see to.
fn came_in(cpu: &Cpu) -> Arrived {
    smp::flush_if_asked(cpu);
    let woken = cpu.woken.swap(0, Relaxed);
    let messages = match woken & bit(Interrupt::Message(0)) {
        0 => [0; _],
        _ => cpu.messages.each_ref().map(|word| word.swap(0, Relaxed)),
    };
    Arrived { console: woken & bit(Interrupt::Console) != 0, messages }
}

/// Whether SYSRET does the same as IRET, but for RCX and R11. It must not meet a RIP that is not canonical: on
/// some CPUs it would fault in ring 0 with the guest's stack. And after an entry that left SS null, some CPUs
/// would keep it so.
#[inline(always)]
fn may_sysret(registers: &Registers) -> bool {
    let flags = registers.rflags & (EXACT_FLAGS | CHECKED_FLAGS);
    (registers.cs ^ FLAT.0) | (registers.ss ^ FLAT.1) | (flags ^ IF) == 0
        && GuestVirt(registers.rip).is_canonical()
        && SS::get_reg().0 != 0
}

/// CR2, for page faults: nothing can have overwritten it since, as ring 0 takes no page fault it survives.
fn fault_address(vector: u32) -> u64 {
    if vector == 14 { Cr2::read_raw() } else { 0 }
}

/// Acknowledges an interrupt.
fn interrupt(cpu: &Cpu, vector: u32) -> Interrupt {
    let kind = match vector {
        apic::TIMER => timer::fired(cpu),
        apic::KICK => Interrupt::Kick,
        apic::SERIAL => {
            crate::serial::receive();
            Interrupt::Console
        }
        apic::FLUSH => {
            smp::flush_if_asked(cpu);
            Interrupt::Other
        }
        _ => match u8::try_from(vector) {
            Ok(vector) if message(vector).is_some() => Interrupt::Message(vector),
            _ => Interrupt::Other,
        },
    };
    if vector != apic::SPURIOUS {
        apic::acknowledge();
    }
    kind
}

/// The number of a vector among those of messages.
fn message(vector: u8) -> Option<usize> {
    Some(usize::from(vector.checked_sub(FIRST_MESSAGE)?)).filter(|number| *number < MESSAGES)
}

/// The bit in [`Cpu::woken`] for a kind of interrupt.
fn bit(kind: Interrupt) -> u32 {
    match kind {
        Interrupt::Timer => 1,
        Interrupt::Kick => 2,
        Interrupt::Console => 4,
        Interrupt::Other => 8,
        Interrupt::Message(_) => 16,
    }
}

/// A pair made by an instruction that may fault: where it is, and where to go on if it does.
#[repr(C)]
struct Fixup {
    site: u64,
    resume: u64,
}

unsafe extern "C" {
    static __start_hv_fixups: Fixup;
    static __stop_hv_fixups: Fixup;
}

/// Where to go on after a fault at `site`, if the instruction there is allowed to fault.
fn fixup(site: u64) -> Option<u64> {
    let (start, stop) = (&raw const __start_hv_fixups, &raw const __stop_hv_fixups);
    let bytes = stop as usize - start as usize;
    // SAFETY: `link.ld` puts the pairs, and nothing else, between these symbols, in constant memory.
    let all = unsafe { core::slice::from_raw_parts(start, bytes / size_of::<Fixup>()) };
    all.iter().find(|fixup| fixup.site == site).map(|fixup| fixup.resume)
}

/// An exception or interrupt that came while ring 0 ran.
extern "C" fn nested(registers: &mut Registers) {
    let vector = registers.error >> 32;
    match u32::try_from(vector) {
        // Only `idle` and `let_in` let interrupts in.
        Ok(vector @ 0x20..) => {
            let cpu = percpu::this();
            // One interrupt each time: a device that sends faster than this is done would keep ring 0 here for ever.
            registers.rflags &= !IF;
            let kind = interrupt(cpu, vector);
            cpu.woken.fetch_or(bit(kind), Relaxed);
            if let Interrupt::Message(vector) = kind
                && let Some(number) = message(vector)
                && let Some(word) = cpu.messages.get(number / 64)
            {
                word.fetch_or(1 << (number % 64), Relaxed);
            }
        }
        Ok(11..=14) => match fixup(registers.rip) {
            Some(resume) => registers.rip = resume,
            None => report::fatal(vector, registers, Cr2::read_raw()),
        },
        _ => report::fatal(vector, registers, Cr2::read_raw()),
    }
}
