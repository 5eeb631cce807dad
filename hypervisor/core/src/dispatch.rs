//! One match from a call to the function that carries it out, and the one place where a refusal in words, by paging or grants,
//! becomes a number: an errno for a call, a status for an element of `grant_table_op`. (The other nouns refuse with the ABI's
//! errno.)
//!
//! Touches: argument registers and the result register.
//! Never touches: what the calls are about.
//! Keeps: P8. A call is carried out in steps; what is not finished stays in [`VcpuState::call`] and goes on before the guest
//! does. The guest never sees a half-done call, and no register of its own holds our place in one.
//!
//! [`VcpuState::call`]: crate::vcpu::VcpuState::call

use crate::call::Multicall;
use crate::fault::{Fault, planted};
use crate::paging::{Refused, Stop};
use crate::prelude::*;
use crate::{domain, event, grant, host, memory, paging, sched, trap, vcpu};
use hypercall_abi::Hypercall;
use hypercall_abi::grant::status;
use hypercall_abi::mmu::MulticallEntry;

/// How many entries of a multicall one step carries out.
pub(crate) const MULTICALL_STEP: u32 = 32;

/// Carries out one step of the vcpu's call, if it has one.
pub fn step<M: Machine>(ctx: &mut Ctx<'_, M>) -> Next {
    let Some(mut call) = ctx.state.call.take() else { return Next::Stay };
    if call.multicall.is_none() && call.number == Hypercall::Multicall as u64 {
        call.multicall = Some(Multicall::new(call.args[0], low32(call.args[1]).into()));
    }
    let answer = match call.multicall {
        None => execute(ctx, &mut call),
        Some(list) => multicall(ctx, &mut call, list),
    };
    // Of a list only the entry that ended the step counts.
    let leaves = answer == Err(Halt::Leave) || call.multicall.is_some_and(|list| list.leaves);
    match settle(ctx, &call, answer) {
        Ok(value) => {
            ctx.state.regs.rax = value;
            ctx.may_sysret = true; // SYSCALL has lost RCX and R11 already
        }
        // Also if the domain has been paused meanwhile: it goes on when that is over.
        Err(Halt::More) => ctx.state.call = Some(call),
        Err(_) => {}
    }
    ctx.end_visits();
    if leaves { Next::Leave } else { Next::Stay }
}

/// Between two steps of a call: lets interrupts that wait come in, as they would if the guest ran (P8). What the timer or a
/// kick wants is seen to afterwards.
pub fn let_in<M: Machine>(ctx: &Ctx<'_, M>) {
    if !planted(Fault::DeafCalls) {
        ctx.world.arrived(ctx.m, &ctx.m.let_in());
    }
}

/// The value of RAX for an answer, if it is time for one. What is refused is noted.
pub(crate) fn settle<M: Machine>(ctx: &Ctx<'_, M>, call: &Call, answer: Answer) -> Answer {
    answer.or_else(|halt| match halt {
        Halt::Refused(errno) => {
            ctx.note_refused_call(call.number, call.args[0], call.args[1], errno);
            Ok(errno.to_rax())
        }
        Halt::Leave => Ok(0),
        Halt::More | Halt::Gone => Err(halt),
    })
}

impl From<Stop> for Halt {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::More => Self::More,
            Stop::Refused(why) => Self::Refused(why.into()),
        }
    }
}

impl From<Refused> for Errno {
    fn from(why: Refused) -> Self {
        use Refused::*;
        match why {
            NotYourDevice => Self::Perm,
            Unfinished | Raced => Self::Busy,
            NoMemory | OverLimit => Self::NoMem,
            Unknown => Self::NoSys,
            Dying => Self::Srch,
            NotOwner | NoSuchFrame | WrongType | TooManyUses | BadBits | CacheBits | HoleSlot | NotTable
            | AlreadyPinned | NotPinned | BadDescriptor | Misaligned | NotMapped | Mismatch | NotTableWrite => {
                Self::Inval
            }
        }
    }
}

impl From<grant::GrantRefused> for i16 {
    fn from(why: grant::GrantRefused) -> Self {
        use grant::GrantRefused::*;
        match why {
            NoSuchGrant => status::BAD_GNTREF,
            NoSuchPage => status::BAD_PAGE,
            NoSuchHandle => status::BAD_HANDLE,
            NoSuchDomain => status::BAD_DOMAIN,
            NoAuthority => status::PERMISSION_DENIED,
            NoHandle => status::NO_SPACE,
            WrongBusAddress => status::BAD_DEV_ADDR,
            BadList => status::BAD_VIRT_ADDR,
            BadCopy => status::BAD_COPY_ARG,
            NotGranted | CannotGrow | CannotMap => status::GENERAL_ERROR,
        }
    }
}

/// Goes on with a list of calls (ABI core 4.9): each result is stored, none stops the list. One with which the vcpu leaves
/// its CPU ends the step.
#[inline(never)]
fn multicall<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call, mut list: Multicall) -> Answer {
    const RESULT: u64 = long(core::mem::offset_of!(MulticallEntry, result));
    let end = ctx.world.sched.step_end(ctx.m);
    list.leaves = false;
    call.multicall = Some(list);
    for _ in 0..MULTICALL_STEP {
        if list.left == 0 {
            return Ok(0);
        }
        if !list.running {
            let entry: MulticallEntry = ctx.read(list.at)?;
            (call.number, call.args, call.done) = (entry.op, entry.args, 0);
            list.running = true;
        }
        call.multicall = Some(list);
        let nested = call.number == Hypercall::Multicall as u64;
        let answer = if nested { Err(Errno::Inval.into()) } else { execute(ctx, call) };
        list.leaves = answer == Err(Halt::Leave);
        call.multicall = Some(list); // also if the result cannot be stored
        ctx.write(list.at.wrapping_add(RESULT), &settle(ctx, call, answer)?)?;
        let next = list.at.wrapping_add(bytes_of::<MulticallEntry>());
        list = Multicall { at: next, left: list.left - 1, running: false, ..list };
        if list.leaves || list.left > 0 && (ctx.m.now() >= end || !ctx.domain.runs()) {
            break; // each entry may have been as long as a call of its own, or have ended the domain
        }
    }
    call.multicall = Some(list);
    if list.left == 0 { Ok(0) } else { Err(Halt::More) }
}

/// Carries out a step of a call that is no list.
fn execute<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    use Hypercall::*;
    match Hypercall::from_number(call.number).ok_or(Errno::NoSys)? {
        SetTrapTable => trap::ops::set_trap_table(ctx, call),
        MmuUpdate => paging::ops::mmu_update(ctx, call),
        SetGdt => vcpu::descriptors::set_gdt(ctx, call),
        StackSwitch => vcpu::ops::stack_switch(ctx, call),
        SetCallbacks => trap::ops::set_callbacks(ctx, call),
        FpuTaskswitch => vcpu::ops::fpu_taskswitch(ctx, call),
        SetDebugreg => vcpu::ops::set_debugreg(ctx, call),
        GetDebugreg => vcpu::ops::get_debugreg(ctx, call),
        UpdateDescriptor => paging::ops::update_descriptor(ctx, call),
        MemoryOp => memory::memory_op(ctx, call),
        UpdateVaMapping => paging::ops::update_va_mapping(ctx, call),
        UpdateVaMappingOtherdomain => paging::ops::update_va_mapping_otherdomain(ctx, call),
        SetTimerOp => sched::ops::set_timer_op(ctx, call),
        XenVersion => host::ops::xen_version(ctx, call),
        ConsoleIo => host::console::console_io(ctx, call),
        GrantTableOp => grant::ops::grant_table_op(ctx, call),
        VmAssist => domain::ops::vm_assist(ctx, call),
        Iret => trap::ops::iret(ctx, call),
        VcpuOp => vcpu::ops::vcpu_op(ctx, call),
        SetSegmentBase => vcpu::ops::set_segment_base(ctx, call),
        MmuextOp => paging::ops::mmuext_op(ctx, call),
        NmiOp => trap::ops::nmi_op(ctx, call),
        SchedOp => sched::ops::sched_op(ctx, call),
        CallbackOp => trap::ops::callback_op(ctx, call),
        EventChannelOp => event::ops::event_channel_op(ctx, call),
        PhysdevOp => vcpu::ops::physdev_op(ctx, call),
        Domctl => domain::ops::domctl(ctx, call),
        Sysctl => host::ops::sysctl(ctx, call),
        Tenon => domain::ops::tenon_op(ctx, call),
        PlatformOp => Err(Errno::Perm.into()),
        Multicall | SchedOpCompat | EventChannelOpCompat => Err(Errno::NoSys.into()),
    }
}
