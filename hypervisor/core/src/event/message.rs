//! Message-signalled interrupts of devices: each vector raises one port.
//!
//! Touches: the words that join vectors to ports. Never touches: a device. Whoever drives the device writes what [`bind`]
//! returns into its table of messages.
//! Keeps: P5. A vector and its port name each other, and change together under the lock of ports.

use super::ops::reply_then_bind;
use super::port::{Binding, PortState};
use crate::addr::ones;
use crate::domain::Powers;
use crate::machine::{Arrived, FIRST_MESSAGE};
use crate::prelude::*;
use hypercall_abi::event::Virq;
use hypercall_abi::tenon::BindMessage;

impl World {
    /// Raises the events of interrupts that came while ring 0 slept or was between two steps of a call.
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

    /// Raises the port of a vector. A message without a port, or for a port that is pending already, counts as part of a storm.
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

/// Joins a free vector to a free port of domain `id`, and writes to `arg` what a device must send in order to raise the port.
/// Messages come to the CPU on which this is called. Our own `tenon_op(BindMessage)`.
///
/// # Errors
/// `Perm` for a caller without devices, or for another domain without authority over it; `Inval` for a vcpu that the domain
/// does not have; `NoSpc` without a free port or vector; `NoDev` if messages do not reach this CPU.
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
