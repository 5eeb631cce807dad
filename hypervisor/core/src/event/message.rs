//! Message-signalled interrupts of devices: each vector raises one port.
//!
//! Touches: the words that join vectors to ports, and the argument of [`bind`] in the caller's memory.
//! Never touches: a device. [`bind`] returns an address and data; the device's driver writes these into the device's table of
//! messages (MSI-X).
//! Keeps: P5. A vector and the port that it is joined to name each other. Both records are changed under one hold of the lock
//! `World::ports`.

use super::ops::reply_then_bind;
use super::port::{Binding, PortState};
use crate::addr::ones;
use crate::domain::Powers;
use crate::machine::{Arrived, FIRST_MESSAGE};
use crate::prelude::*;
use hypercall_abi::event::Virq;
use hypercall_abi::tenon::BindMessage;

impl World {
    /// Raises an event for each of the interrupts in `arrived`. These came while this CPU slept, or between two steps of a
    /// call.
    pub(crate) fn arrived<M: Machine>(&self, m: &M, arrived: &Arrived) {
        if arrived.console {
            self.raise_global(m, Virq::Console);
        }
        for (first, word) in (FIRST_MESSAGE..).step_by(64).zip(arrived.messages) {
            ones(word)
                .filter_map(|bit| first.checked_add(u8::try_from(bit).ok()?))
                .for_each(|vector| self.message(m, vector));
        }
    }

    /// Raises the port that `vector` is joined to. If there is no such port, or the port is pending already, counts the message
    /// as useless. After too many useless messages, this CPU holds messages back for a while (`Cpu::useless_message`).
    pub(crate) fn message<M: Machine>(&self, m: &M, vector: u8) {
        let raised = self.messages.taker(vector).is_some_and(|(domain, port)| {
            let domain = self.domain(domain).filter(|it| self.port(m, it, port).binding == Binding::Message(vector));
            domain.is_some_and(|domain| self.raise(m, domain, port))
        });
        if !raised {
            self.sched.here(m).useless_message(m);
        }
    }
}

/// Carries out `tenon_op(BindMessage)`, which Xen does not have: joins a free vector to a free port of domain `id`. The port
/// will notify the vcpu that `arg` names. Writes to `arg` the port, and the address and data that a device must write in order
/// to raise the port. The device's messages will interrupt the CPU that carries out this call.
///
/// # Errors
/// `Perm` if the caller does not have [`Powers::DEVICES`], or if `id` is another domain and the caller does not have
/// [`Powers::CONTROL`]; `Srch` if there is no domain `id`; `Fault` if `arg` cannot be read or written; `Inval` if the domain
/// has no vcpu of that number; `NoSpc` if no port or no vector is free; `NoDev` if messages cannot reach this CPU.
pub(crate) fn bind<M: Machine>(ctx: &mut Ctx<'_, M>, id: u16, arg: u64) -> Result<(), Errno> {
    ensure!(ctx.domain.may(Powers::DEVICES), Errno::Perm);
    let domain = ctx.controlled(id)?;
    let call: BindMessage = ctx.read(arg)?;
    let vcpu = VcpuId(call.vcpu);
    ctx.world.vcpu(domain, vcpu).ok_or(Errno::Inval)?;
    let (world, m) = (ctx.world, ctx.m);
    let vector = world.messages.reserve().ok_or(Errno::NoSpc)?;
    let bound = m.message(vector).ok_or(Errno::NoDev).and_then(|(address, data)| {
        let reply = |port: Port| BindMessage { port: port.0, address, data, ..call };
        reply_then_bind(ctx, domain, arg, reply, |port| {
            world.messages.join(vector, domain.id(), port);
            Ok(PortState { binding: Binding::Message(vector), vcpu })
        })
    });
    if bound.is_err() {
        world.messages.free(vector);
    }
    bound.map(|_| ())
}
