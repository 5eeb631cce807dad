//! `sched_op`, `set_timer_op` and the timers of `vcpu_op` (ABI core 5.4, 6.3).

use crate::addr::Port;
use crate::domain::vcpu::{Place, Vcpu, polling};
use crate::event::port::Binding;
use crate::machine::Machine;
use crate::world::{Ctx, Next};
use core::sync::atomic::Ordering;
use hypercall_abi::Errno;
use hypercall_abi::event::PORTS;
use hypercall_abi::sched::{POLL_MAX_PORTS, Poll, RemoteShutdown, SchedOp, Shutdown, ShutdownReason};

/// A deadline further away than this is taken for a mistake of the guest's clock, as Xen does (ABI core 6.3).
const ABSURD: u64 = 1 << 50;
/// When a timer with an absurd deadline fires, from now.
const ABSURD_DELAY: u64 = 100_000_000;
/// The shortest period of a tick.
const MIN_PERIOD: u64 = 1_000_000;

/// Carries out one `sched_op`.
///
/// # Errors
/// Those of ABI core 5.4.
pub fn sched_op<M: Machine>(ctx: &mut Ctx<'_, M>, command: u64, arg: u64) -> Result<u64, Errno> {
    match SchedOp::from_number(command).ok_or(Errno::NoSys)? {
        SchedOp::Yield => ctx.next = Next::Leave,
        SchedOp::Block => block(ctx),
        SchedOp::Shutdown => {
            let Shutdown { reason } = ctx.read(arg)?;
            if ShutdownReason::from_number(u64::from(reason)).is_none() {
                return Err(Errno::Inval);
            }
            ctx.world.shut_down(ctx.m, ctx.domain, reason);
            ctx.next = Next::Leave;
        }
        SchedOp::Poll => poll(ctx, arg)?,
        SchedOp::RemoteShutdown => {
            let RemoteShutdown { domain, reason, .. } = ctx.read(arg)?;
            ctx.control()?;
            let domain = ctx.named(domain)?;
            ctx.world.shut_down(ctx.m, domain, reason);
        }
        SchedOp::ShutdownCode | SchedOp::Watchdog | SchedOp::PinOverride => return Err(Errno::NoSys),
    }
    Ok(0)
}

fn block<M: Machine>(ctx: &mut Ctx<'_, M>) {
    ctx.world.set_upcall_mask(ctx.m, ctx.vcpu, false);
    sleep(ctx);
}

/// Goes to sleep unless an upcall is due by now.
fn sleep<M: Machine>(ctx: &mut Ctx<'_, M>) {
    ctx.vcpu.moves(Place::Running, Place::Blocked);
    if ctx.world.upcall_due(ctx.m, ctx.vcpu) && ctx.vcpu.moves(Place::Blocked, Place::Running) {
        return;
    }
    ctx.next = Next::Leave;
}

fn poll<M: Machine>(ctx: &mut Ctx<'_, M>, arg: u64) -> Result<(), Errno> {
    let call: Poll = ctx.read(arg)?;
    if call.nr_ports > POLL_MAX_PORTS {
        return Err(Errno::Inval);
    }
    let port_at = |ctx: &Ctx<'_, M>, n: u32| -> Result<Port, Errno> {
        let port: u32 = ctx.read(call.ports.wrapping_add(u64::from(n) * 4))?;
        let bound = port < PORTS && ctx.world.port(ctx.m, ctx.domain, Port(port)).binding != Binding::Closed;
        if bound { Ok(Port(port)) } else { Err(Errno::Inval) }
    };
    let mut watched = polling::MANY;
    for n in 0..call.nr_ports {
        let port = port_at(ctx, n)?;
        watched = if call.nr_ports == 1 { port.0 } else { polling::MANY };
    }
    // From here on a raised port finds us; then we look whether one was raised before.
    if call.nr_ports > 0 {
        ctx.vcpu.polling.store(watched, Ordering::SeqCst);
    }
    ctx.vcpu.moves(Place::Running, Place::Blocked);
    let mut due = ctx.world.upcall_due(ctx.m, ctx.vcpu);
    for n in 0..call.nr_ports {
        // Read again: had the guest changed the list meanwhile, it would only wake itself early or late.
        due = due || port_at(ctx, n).is_ok_and(|port| ctx.world.is_pending(ctx.m, ctx.domain, port));
    }
    if call.timeout != 0 && call.timeout <= ctx.m.now() {
        due = true;
    }
    if due && ctx.vcpu.moves(Place::Blocked, Place::Running) {
        ctx.vcpu.polling.store(polling::NO, Ordering::SeqCst);
        return Ok(());
    }
    if call.timeout != 0 {
        ctx.vcpu.poll_deadline.store(call.timeout, Ordering::Relaxed);
        ctx.world.sched.expect(ctx.m, call.timeout);
    }
    ctx.next = Next::Leave;
    Ok(())
}

/// Sets or cancels (0) the one-shot timer.
pub fn set_timer<M: Machine>(ctx: &mut Ctx<'_, M>, deadline: u64) {
    if deadline == 0 {
        ctx.vcpu.deadline.store(u64::MAX, Ordering::Relaxed);
        return;
    }
    let now = ctx.m.now();
    let deadline = if deadline.saturating_sub(now) > ABSURD { now.saturating_add(ABSURD_DELAY) } else { deadline };
    start_timer(ctx, deadline);
}

/// Starts the one-shot timer; a deadline in the past fires at once.
pub fn start_timer<M: Machine>(ctx: &mut Ctx<'_, M>, deadline: u64) {
    if deadline <= ctx.m.now() {
        ctx.vcpu.deadline.store(u64::MAX, Ordering::Relaxed);
        ctx.world.raise_virq(ctx.m, ctx.vcpu, hypercall_abi::event::Virq::Timer);
    } else {
        ctx.vcpu.deadline.store(deadline, Ordering::Relaxed);
        ctx.world.sched.expect(ctx.m, deadline);
    }
}

/// Starts a vcpu's tick.
///
/// # Errors
/// `Inval` for a period below a millisecond.
pub fn start_tick<M: Machine>(ctx: &mut Ctx<'_, M>, vcpu: &Vcpu, period: u64) -> Result<(), Errno> {
    if period < MIN_PERIOD {
        return Err(Errno::Inval);
    }
    let next = ctx.m.now().saturating_add(period);
    vcpu.next_tick.store(next, Ordering::Relaxed);
    vcpu.period.store(period, Ordering::Relaxed);
    ctx.world.sched.expect(ctx.m, next);
    Ok(())
}
