//! One match from a call to the function that carries it out, and the one place where a refusal becomes a number.
//!
//! Touches: argument registers and the result register.
//! Never touches: what the calls are about.
//! Keeps: P8. A call is carried out in steps; what is not finished stays in [`VcpuState::call`] and goes on before the guest
//! does. The guest never sees a half-done call, and no register of its own holds our place in one.
//!
//! [`VcpuState::call`]: crate::domain::vcpu::VcpuState::call

use crate::calls::{cpu, descriptors, info, mmu, vcpu};
use crate::domain::control;
use crate::event::bind;
use crate::machine::{Machine, Registers};
use crate::paging::{Refused, Stop};
use crate::sched::ops;
use crate::world::Ctx;
use crate::{grant, memory};
use hypercall_abi::mmu::MulticallEntry;
use hypercall_abi::{Errno, Hypercall};

/// How many entries of a multicall one step carries out.
const MULTICALL_STEP: u32 = 32;

/// A hypercall on its way.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its number, as the guest gave it.
    pub number: u64,
    /// Its arguments; a call over an array moves them on as it goes.
    pub args: [u64; 6],
    /// Elements of its array done so far.
    pub done: u64,
    /// The list it is an entry of.
    multicall: Option<Multicall>,
}

/// A list of calls on its way.
#[derive(Clone, Copy, Debug)]
struct Multicall {
    /// Address of the entry that is being carried out, or comes next.
    at: u64,
    /// Entries from there on.
    left: u64,
    /// Whether `Call` holds that entry.
    running: bool,
}

/// How far a step came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The call is over; this is its result.
    Done(u64),
    /// There is more to do.
    More,
    /// The call has replaced the registers: it has no result.
    Gone,
}

impl Call {
    /// The call in a guest's registers (ABI core 1.7).
    #[must_use]
    pub fn from_registers(regs: &Registers) -> Self {
        Self {
            number: regs.rax,
            args: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
            done: 0,
            multicall: None,
        }
    }
}

/// Carries out one step of the vcpu's call, if it has one.
pub fn step<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let Some(mut call) = ctx.own.call.take() else { return };
    if call.multicall.is_none() && Hypercall::from_number(call.number) == Some(Hypercall::Multicall) {
        call.multicall = Some(Multicall { at: call.args[0], left: call.args[1], running: false });
    }
    let progress = match call.multicall {
        None => finish(execute(ctx, &mut call)),
        Some(list) => multicall(ctx, &mut call, list),
    };
    match progress {
        Progress::Done(result) => {
            ctx.own.regs.rax = result;
            ctx.short = true; // SYSCALL has lost RCX and R11 already
        }
        // A vcpu that crashed or was told to stop has no call to go on with.
        Progress::More if ctx.domain.runs() => ctx.own.call = Some(call),
        Progress::More | Progress::Gone => {}
    }
}

/// What a call answers when paging has stopped it.
///
/// # Errors
/// The number for the refusal.
pub fn stopped(stop: Stop) -> Result<Progress, Errno> {
    match stop {
        Stop::More => Ok(Progress::More),
        Stop::Refused(why) => Err(why.into()),
    }
}

impl From<Refused> for Errno {
    fn from(why: Refused) -> Self {
        match why {
            Refused::NotOwner | Refused::NotYourDevice => Self::Perm,
            Refused::Unfinished | Refused::Raced => Self::Busy,
            Refused::NoMemory => Self::NoMem,
            Refused::Unknown => Self::NoSys,
            Refused::Dying => Self::Srch,
            Refused::NoSuchFrame
            | Refused::WrongType
            | Refused::TooManyUses
            | Refused::BadBits
            | Refused::CacheBits
            | Refused::HoleSlot
            | Refused::NotTable
            | Refused::AlreadyPinned
            | Refused::NotPinned
            | Refused::BadDescriptor
            | Refused::Misaligned
            | Refused::NotMapped
            | Refused::Mismatch
            | Refused::NotTableWrite => Self::Inval,
        }
    }
}

fn finish(result: Result<Progress, Errno>) -> Progress {
    result.unwrap_or_else(|errno| Progress::Done(errno.to_rax()))
}

/// Goes on with a list of calls (ABI core 4.9): each result is stored, none stops the list.
fn multicall<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call, mut list: Multicall) -> Progress {
    const RESULT: u64 = core::mem::offset_of!(MulticallEntry, result) as u64;
    for _ in 0..MULTICALL_STEP {
        if list.left == 0 {
            return Progress::Done(0);
        }
        if !list.running {
            let Ok(entry) = ctx.read::<MulticallEntry>(list.at) else {
                return Progress::Done(Errno::Fault.to_rax());
            };
            (call.number, call.args, call.done) = (entry.op, entry.args, 0);
            list.running = true;
        }
        let nested = Hypercall::from_number(call.number) == Some(Hypercall::Multicall);
        let progress = if nested { Progress::Done(Errno::Inval.to_rax()) } else { finish(execute(ctx, call)) };
        match progress {
            Progress::More => {
                call.multicall = Some(list);
                return Progress::More;
            }
            Progress::Gone => return Progress::Gone,
            Progress::Done(result) => {
                if ctx.write(list.at.wrapping_add(RESULT), &result).is_err() {
                    return Progress::Done(Errno::Fault.to_rax());
                }
            }
        }
        list = Multicall {
            at: list.at.wrapping_add(size_of::<MulticallEntry>() as u64),
            left: list.left - 1,
            running: false,
        };
        if !ctx.domain.runs() {
            return Progress::Gone;
        }
    }
    call.multicall = Some(list);
    Progress::More
}

fn execute<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Result<Progress, Errno> {
    let number = Hypercall::from_number(call.number).ok_or(Errno::NoSys)?;
    let [a, b, c, d, ..] = call.args;
    let value = match number {
        Hypercall::SetTrapTable => cpu::set_trap_table(ctx, a)?,
        Hypercall::MmuUpdate => return mmu::mmu_update(ctx, call),
        Hypercall::SetGdt => return descriptors::set_gdt(ctx, a, b),
        Hypercall::StackSwitch => cpu::stack_switch(ctx, a, b),
        Hypercall::SetCallbacks => cpu::set_callbacks(ctx, [a, b, c])?,
        Hypercall::FpuTaskswitch => cpu::fpu_taskswitch(ctx, a),
        Hypercall::SetDebugreg => cpu::write_debug(ctx, a, b)?,
        Hypercall::GetDebugreg => cpu::read_debug(ctx, a)?,
        Hypercall::UpdateDescriptor => return descriptors::update_descriptor(ctx, a, b),
        Hypercall::MemoryOp => return memory::memory_op(ctx, call),
        Hypercall::UpdateVaMapping => return mmu::update_va_mapping(ctx, a, b, c, hypercall_abi::domid::SELF),
        Hypercall::UpdateVaMappingOtherdomain => {
            let id = u16::try_from(d).map_err(|_| Errno::Srch)?;
            return mmu::update_va_mapping(ctx, a, b, c, id);
        }
        Hypercall::SetTimerOp => {
            ops::set_timer(ctx, a);
            0
        }
        Hypercall::XenVersion => info::xen_version(ctx, a, b)?,
        Hypercall::ConsoleIo => return info::console_io(ctx, &mut call.args),
        Hypercall::GrantTableOp => return grant::grant_table_op(ctx, call),
        Hypercall::VmAssist => cpu::vm_assist(ctx, a, b)?,
        Hypercall::Iret => {
            ctx.short = cpu::iret(ctx);
            return Ok(Progress::Gone);
        }
        Hypercall::VcpuOp => return vcpu::vcpu_op(ctx, a, b, c),
        Hypercall::SetSegmentBase => cpu::set_segment_base(ctx, a, b)?,
        Hypercall::MmuextOp => return mmu::mmuext_op(ctx, call),
        Hypercall::NmiOp => cpu::nmi_op(ctx, a, b)?,
        Hypercall::SchedOp => ops::sched_op(ctx, a, b)?,
        Hypercall::CallbackOp => cpu::callback_op(ctx, a, b)?,
        Hypercall::EventChannelOp => bind::event_channel_op(ctx, a, b)?,
        Hypercall::PhysdevOp => cpu::physdev_op(ctx, a, b)?,
        Hypercall::Domctl => return control::domctl(ctx, a),
        Hypercall::Tenon => control::tenon_op(ctx, a, b, c)?,
        Hypercall::PlatformOp => return Err(Errno::Perm),
        Hypercall::Multicall
        | Hypercall::SchedOpCompat
        | Hypercall::EventChannelOpCompat
        | Hypercall::PhysdevOpCompat
        | Hypercall::XsmOp
        | Hypercall::XenoprofOp
        | Hypercall::HvmOp
        | Hypercall::Sysctl
        | Hypercall::KexecOp
        | Hypercall::TmemOp
        | Hypercall::ArgoOp
        | Hypercall::XenpmuOp
        | Hypercall::DmOp
        | Hypercall::HypfsOp
        | Hypercall::Mca => return Err(Errno::NoSys),
    };
    Ok(Progress::Done(value))
}
