//! `event_channel_op` (ABI core 5.2).
//!
//! A reply is written before any port is changed: a call whose reply cannot be written changes no port.

use super::port::{Binding, PortState};
use crate::addr::FrameSlot;
use crate::domain::Powers;
use crate::prelude::*;
use hypercall_abi::event::{
    AllocUnbound, BindInterdomain, BindIpi, BindVcpu, BindVirq, EventOp, InitControl, PORTS, PortArg, PortStatus,
    Reset, Status, VIRQS, Virq,
};
use zerocopy::{Immutable, IntoBytes};

/// Carries out one `event_channel_op`.
///
/// # Errors
/// Those of ABI core 5.2, table of commands.
pub fn event_channel_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let (command, arg) = (call.command(), call.args[1]);
    match EventOp::from_number(command).ok_or(Errno::NoSys)? {
        EventOp::Send => {
            let PortArg { port } = ctx.read(arg)?;
            ctx.world.send(ctx.m, ctx.domain, Port(port)).ok_or(Errno::Inval)?;
        }
        EventOp::BindInterdomain => bind_interdomain(ctx, arg)?,
        EventOp::BindVirq => bind_virq(ctx, arg)?,
        EventOp::Close => {
            let PortArg { port } = ctx.read(arg)?;
            let (world, m) = (ctx.world, ctx.m);
            let _guard = world.ports.lock(ctx.held);
            world.close(m, ctx.domain, Port(port))?;
        }
        EventOp::Status => status(ctx, arg)?,
        EventOp::AllocUnbound => {
            let call: AllocUnbound = ctx.read(arg)?;
            let domain = ctx.controlled(call.dom)?;
            let remote = if call.remote_dom == domid::SELF { ctx.domain.id() } else { DomainId(call.remote_dom) };
            let state = PortState { binding: Binding::Unbound(remote), vcpu: VcpuId(0) };
            reply_then_bind(ctx, domain, arg, |port| AllocUnbound { port: port.0, ..call }, |_| Ok(state))?;
        }
        EventOp::BindIpi => {
            let call: BindIpi = ctx.read(arg)?;
            let state = PortState { binding: Binding::Ipi, vcpu: existing(ctx, call.vcpu)?.number() };
            reply_then_bind(ctx, ctx.domain, arg, |port| BindIpi { port: port.0, ..call }, |_| Ok(state))?;
        }
        EventOp::BindVcpu => bind_vcpu(ctx, arg)?,
        EventOp::Unmask => {
            let PortArg { port } = ctx.read(arg)?;
            ensure!(port < PORTS, Errno::Inval);
            ctx.world.unmask(ctx.m, ctx.domain, Port(port));
        }
        EventOp::Reset => {
            let Reset { dom } = ctx.read(arg)?;
            let domain = ctx.controlled(dom)?;
            let (world, m) = (ctx.world, ctx.m);
            let _guard = world.ports.lock(ctx.held);
            world.close_all(m, domain);
        }
        EventOp::BindPirq => return Err(Errno::Perm.into()),
        EventOp::ExpandArray => return Err(Errno::OpNotSupp.into()),
        EventOp::InitControl => init_control(ctx, arg)?,
        EventOp::SetPriority => return Err(Errno::NoSys.into()),
    }
    Ok(0)
}

/// Closes all ports of a dying domain, and frees the frames that held their words.
pub(crate) fn end<M: Machine>(cpu_ctx: &mut CpuCtx<'_, M>, domain: &Domain) -> Result<(), Halt> {
    let (world, m) = (cpu_ctx.world, cpu_ctx.m);
    let _guard = world.ports.lock(cpu_ctx.held);
    world.close_all(m, domain);
    domain.port_frames.iter().filter_map(FrameSlot::take).for_each(|frame| world.frames.retire(frame));
    Ok(())
}

/// Always refuses, because there are no FIFO events. A hypervisor with FIFO events would accept some arguments: the error for
/// these is `NoSys`. For any other argument, the error is the one that such a hypervisor returns.
fn init_control<M: Machine>(ctx: &mut Ctx<'_, M>, arg: u64) -> Result<(), Errno> {
    const BLOCK: u32 = 72;
    let call: InitControl = ctx.read(arg)?;
    existing(ctx, call.vcpu)?;
    ensure!(call.offset.is_multiple_of(8) && call.offset <= low32(PAGE_BYTES) - BLOCK, Errno::Inval);
    let (frame, id) = (Frame::new(call.control_gfn).ok_or(Errno::Inval)?, ctx.domain.id());
    ctx.world.frames.take_writable(ctx.m, frame, id, id).map_err(|_| Errno::Inval)?;
    ctx.world.frames.drop_use(frame, id);
    Err(Errno::NoSys)
}

fn existing<'a, M: Machine>(ctx: &Ctx<'a, M>, number: u32) -> Result<&'a Vcpu, Errno> {
    ctx.world.vcpu(ctx.domain, VcpuId(number)).ok_or(Errno::NoEnt)
}

/// Finds a free port of `domain`, writes what `reply` returns for this port to the address `reply_to`, and gives the port the
/// state that `commit` returns. `commit` may change the other end of the channel, or refuse. The lock `World::ports` is held
/// from the call of `commit` until the state is stored (P5). Returns the port.
pub(super) fn reply_then_bind<'a, M: Machine, T: IntoBytes + Immutable>(
    ctx: &mut Ctx<'a, M>,
    domain: &'a Domain,
    reply_to: u64,
    reply: impl Fn(Port) -> T,
    commit: impl Fn(Port) -> Result<PortState, Errno>,
) -> Result<Port, Errno> {
    // The lock is not held while the reply is copied to the guest. If another vcpu has bound the port meanwhile, the next free
    // port is tried.
    loop {
        let (world, m) = (ctx.world, ctx.m);
        let port = {
            let _guard = world.ports.lock(ctx.held);
            world.free_port(m, domain)?
        };
        ctx.write(reply_to, &reply(port))?;
        let _guard = world.ports.lock(ctx.held);
        if world.port(m, domain, port).binding == Binding::Closed {
            world.set_port(m, domain, port, commit(port)?);
            world.clear_pending(m, domain, port);
            return Ok(port);
        }
    }
}

fn bind_interdomain<M: Machine>(ctx: &mut Ctx<'_, M>, arg: u64) -> Result<(), Errno> {
    let call: BindInterdomain = ctx.read(arg)?;
    let remote = ctx.named(call.remote_dom)?;
    let (world, m, me) = (ctx.world, ctx.m, ctx.domain.id());
    let at = Port(call.remote_port);
    let waits_for_me = |state: PortState| state.binding == Binding::Unbound(me);
    ensure!(waits_for_me(world.port(m, remote, at)), Errno::Inval);
    let reply = |local: Port| BindInterdomain { local_port: local.0, ..call };
    let local = reply_then_bind(ctx, ctx.domain, arg, reply, |local| {
        let state = world.port(m, remote, at);
        ensure!(waits_for_me(state), Errno::Inval);
        world.set_port(m, remote, at, PortState { binding: Binding::Interdomain(me, local), ..state });
        Ok(PortState { binding: Binding::Interdomain(remote.id(), at), vcpu: VcpuId(0) })
    })?;
    // Events that the other end sent before this call were dropped. This event stands for them (ABI core 5.2).
    world.raise(m, ctx.domain, local);
    Ok(())
}

fn bind_virq<M: Machine>(ctx: &mut Ctx<'_, M>, arg: u64) -> Result<(), Errno> {
    let call: BindVirq = ctx.read(arg)?;
    ensure!(call.virq < VIRQS, Errno::Inval);
    let virq = Virq::from_number(u64::from(call.virq));
    let per_vcpu = virq.is_some_and(Virq::per_vcpu);
    ensure!(per_vcpu || call.vcpu == 0, Errno::Inval);
    let power = match virq {
        Some(Virq::Console) => Powers::CONSOLE_READ,
        Some(Virq::DomExc) => Powers::CONTROL,
        // No other VIRQ of the whole machine is ever raised. But a kernel of dom0 might expect to bind such a VIRQ, so a domain
        // with `MACHINE` is allowed to bind it. (This arm is also reached for VIRQs of one vcpu and for `Virq::Argo`. For
        // these, `power` is not looked at: see below.)
        _ => Powers::MACHINE,
    };
    ensure!(per_vcpu || virq == Some(Virq::Argo) || ctx.domain.may(power), Errno::Perm);
    let vcpu = existing(ctx, call.vcpu)?;
    let slot = nth(&vcpu.virqs, call.virq).ok_or(Errno::Inval)?;
    ensure!(slot.load(Acquire) == 0, Errno::Exist);
    let state = PortState { binding: Binding::Virq(call.virq), vcpu: vcpu.number() };
    let reply = |port: Port| BindVirq { port: port.0, ..call };
    reply_then_bind(ctx, ctx.domain, arg, reply, |port| {
        let bound = slot.compare_exchange(0, low16(u64::from(port.0)), AcqRel, Acquire);
        bound.map(|_| state).map_err(|_| Errno::Exist)
    })?;
    Ok(())
}

fn bind_vcpu<M: Machine>(ctx: &mut Ctx<'_, M>, arg: u64) -> Result<(), Errno> {
    let call: BindVcpu = ctx.read(arg)?;
    let vcpu = existing(ctx, call.vcpu)?.number();
    let (world, m, port) = (ctx.world, ctx.m, Port(call.port));
    let _guard = world.ports.lock(ctx.held);
    let state = world.port(m, ctx.domain, port);
    match state.binding {
        Binding::Interdomain(..) | Binding::Unbound(_) | Binding::Message(_) => {}
        Binding::Virq(virq) if !Virq::from_number(u64::from(virq)).is_some_and(Virq::per_vcpu) => {}
        _ => return Err(Errno::Inval),
    }
    world.set_port(m, ctx.domain, port, PortState { vcpu, ..state });
    Ok(())
}

fn status<M: Machine>(ctx: &mut Ctx<'_, M>, arg: u64) -> Result<(), Errno> {
    let mut call: Status = ctx.read(arg)?;
    let domain = ctx.controlled(call.dom)?;
    ensure!((1..PORTS).contains(&call.port), Errno::Inval);
    let state = ctx.world.port(ctx.m, domain, Port(call.port));
    (call.status, call.detail, call.remote_port) = match state.binding {
        Binding::Closed => (PortStatus::Closed.code(), 0, 0),
        Binding::Unbound(remote) => (PortStatus::Unbound.code(), u32::from(remote.0), 0),
        Binding::Interdomain(remote, port) => (PortStatus::Interdomain.code(), u32::from(remote.0), port.0),
        Binding::Virq(virq) => (PortStatus::Virq.code(), virq, 0),
        Binding::Ipi => (PortStatus::Ipi.code(), 0, 0),
        Binding::Message(vector) => (PortStatus::Pirq.code(), vector.into(), 0),
    };
    call.vcpu = state.vcpu.0;
    ctx.write(arg, &call)
}
