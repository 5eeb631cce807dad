//! `sched_op`, `set_timer_op` and the timers of `vcpu_op` (ABI core 5.4, 6.3).

use crate::event::UpcallMask;
use crate::event::port::Binding;
use crate::fault::{Fault, planted};
use crate::prelude::*;
use crate::vcpu::polling;
use hypercall_abi::event::Virq;
use hypercall_abi::sched::{POLL_MAX_PORTS, Poll, RemoteShutdown, SchedOp, Shutdown, ShutdownReason};

/// A deadline that is more than this many nanoseconds away is taken for a mistake of the guest's clock, as in Xen (ABI core
/// 6.3).
const ABSURD: u64 = 1 << 50;
/// How many nanoseconds from now a timer with such a deadline fires.
const ABSURD_DELAY: u64 = 100_000_000;
/// The shortest period of a periodic timer, in nanoseconds.
const MIN_PERIOD: u64 = 1_000_000;

/// Carries out one `sched_op`.
///
/// # Errors
/// Those of ABI core 5.4.
pub fn sched_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let (command, arg) = (call.command(), call.args[1]);
    match SchedOp::from_number(command).ok_or(Errno::NoSys)? {
        SchedOp::Yield => return Err(Halt::Leave),
        SchedOp::Block => return block(ctx),
        SchedOp::Shutdown => {
            let Shutdown { reason } = ctx.read(arg)?;
            ensure!(ShutdownReason::from_number(u64::from(reason)).is_some(), Errno::Inval);
            ctx.world.shut_down(ctx.m, ctx.domain, reason);
            return Err(Halt::Leave);
        }
        SchedOp::Poll => return poll(ctx, arg),
        SchedOp::RemoteShutdown => {
            let RemoteShutdown { domain, reason, .. } = ctx.read(arg)?;
            let domain = ctx.named(domain)?;
            ctx.control()?;
            ctx.world.shut_down(ctx.m, domain, reason);
        }
        SchedOp::ShutdownCode | SchedOp::Watchdog | SchedOp::PinOverride => return Err(Errno::NoSys.into()),
    }
    Ok(0)
}

/// Unmasks upcalls, and makes the vcpu sleep unless an upcall is due.
fn block<M: Machine>(ctx: &mut Ctx<'_, M>) -> Answer {
    UpcallMask::of(ctx.m, ctx.vcpu).set(false);
    let running = Place::Running(ctx.m.this_cpu());
    if planted(Fault::SleepBlindly) && ctx.world.upcall_due(ctx.m, ctx.vcpu) {
        return Ok(0);
    }
    ctx.vcpu.moves(running, Place::Blocked);
    // The move back fails if another CPU has woken the vcpu meanwhile. Then the vcpu is queued, or has even been taken by a CPU
    // that waits until this one has let go of it.
    if !planted(Fault::SleepBlindly) && ctx.world.upcall_due(ctx.m, ctx.vcpu) && ctx.vcpu.moves(Place::Blocked, running)
    {
        return Ok(0);
    }
    Err(Halt::Leave)
}

/// Carries out `tenon_op(Wait)`, which Xen does not have: makes the vcpu sleep until an upcall is pending, whether upcalls are
/// masked or not. The mask stays as it is.
pub(crate) fn wait<M: Machine>(ctx: &mut Ctx<'_, M>) -> Answer {
    let came = |ctx: &Ctx<'_, M>| UpcallMask::of(ctx.m, ctx.vcpu).is_awaited();
    if planted(Fault::WaitBlindly) && came(ctx) {
        return Ok(0);
    }
    ctx.vcpu.polling.store(polling::ANY, SeqCst);
    let running = Place::Running(ctx.m.this_cpu());
    ctx.vcpu.moves(running, Place::Blocked);
    // From here on an event wakes the vcpu. Now look for one that came before.
    if !planted(Fault::WaitBlindly) && came(ctx) && ctx.vcpu.moves(Place::Blocked, running) {
        ctx.vcpu.polling.store(polling::NO, SeqCst);
        return Ok(0);
    }
    Err(Halt::Leave)
}

/// Makes the vcpu sleep until one of the ports in the argument is pending, or an upcall is due, or the timeout has passed.
fn poll<M: Machine>(ctx: &mut Ctx<'_, M>, arg: u64) -> Answer {
    let call: Poll = ctx.read(arg)?;
    ensure!(call.nr_ports <= POLL_MAX_PORTS, Errno::Inval);
    let port_at = |ctx: &Ctx<'_, M>, n: u32| -> Result<Port, Errno> {
        let port = Port(ctx.read(call.ports.wrapping_add(u64::from(n) * 4))?);
        ensure!(ctx.world.port(ctx.m, ctx.domain, port).binding != Binding::Closed, Errno::Inval);
        Ok(port)
    };
    let mut watched = polling::NO;
    for n in 0..call.nr_ports {
        let port = port_at(ctx, n)?;
        watched = if call.nr_ports == 1 { port.0 } else { polling::MANY };
    }
    // After the next two lines, whoever raises one of the ports finds this vcpu. Ports raised before that are looked for below.
    ctx.vcpu.polling.store(watched, SeqCst);
    ctx.domain.begin_poll(ctx.vcpu.number());
    if call.timeout != 0 {
        ctx.vcpu.poll_deadline.store(call.timeout, Relaxed);
        ctx.world.sched.expect(ctx.m, ctx.vcpu, call.timeout);
    }
    let running = Place::Running(ctx.m.this_cpu());
    ctx.vcpu.moves(running, Place::Blocked);
    // The list of ports is read a second time. A guest that has changed it meanwhile only makes itself wake early or late.
    let pending = |n| port_at(ctx, n).is_ok_and(|port| ctx.world.is_pending(ctx.m, ctx.domain, port));
    let late = call.timeout != 0 && call.timeout <= ctx.m.now();
    let due = late || ctx.world.upcall_due(ctx.m, ctx.vcpu) || (0..call.nr_ports).any(pending);
    if due && ctx.vcpu.moves(Place::Blocked, running) {
        ctx.vcpu.polling.store(polling::NO, SeqCst);
        ctx.vcpu.poll_deadline.store(u64::MAX, Relaxed);
        ctx.domain.end_poll(ctx.vcpu.number());
        return Ok(0);
    }
    Err(Halt::Leave)
}

/// `set_timer_op`: sets or cancels (0) the one-shot timer.
pub fn set_timer_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let now = ctx.m.now();
    match call.args[0] {
        0 => ctx.vcpu.deadline.store(u64::MAX, Relaxed),
        absurd if absurd.saturating_sub(now) > ABSURD => start_timer(ctx, now.saturating_add(ABSURD_DELAY)),
        deadline => start_timer(ctx, deadline),
    }
    Ok(0)
}

/// Starts the one-shot timer; a deadline in the past fires at once.
pub fn start_timer<M: Machine>(ctx: &mut Ctx<'_, M>, deadline: u64) {
    if deadline <= ctx.m.now() {
        ctx.vcpu.deadline.store(u64::MAX, Relaxed);
        ctx.world.raise_virq(ctx.m, ctx.vcpu, Virq::Timer);
    } else {
        set_timer(ctx, deadline);
    }
}

/// Sets the one-shot timer to a deadline in the future.
pub(crate) fn set_timer<M: Machine>(ctx: &Ctx<'_, M>, deadline: u64) {
    ctx.vcpu.deadline.store(deadline, Relaxed);
    ctx.world.sched.expect(ctx.m, ctx.vcpu, deadline);
}

/// Starts a vcpu's periodic timer.
///
/// # Errors
/// `Inval` for a period below a millisecond.
pub fn start_tick<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu, period: u64) -> Result<(), Errno> {
    ensure!(period >= MIN_PERIOD, Errno::Inval);
    let next = ctx.m.now().saturating_add(period);
    vcpu.next_tick.store(next, Relaxed);
    vcpu.period.store(period, Relaxed);
    // The periodic timer fires only while the vcpu runs, so only the CPU that runs the vcpu sets its timer for it.
    match vcpu.place() {
        Place::Running(cpu) if cpu == ctx.m.this_cpu() => ctx.world.sched.here(ctx.m).arm_by(ctx.m, next),
        _ => ctx.world.sched.nudge(ctx.m, vcpu),
    }
    Ok(())
}
