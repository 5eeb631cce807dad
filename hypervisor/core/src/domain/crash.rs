//! The end of a domain by itself: it shuts down, or crashes.
//!
//! Touches: what the toolstack can read about the end, and where its vcpus are.
//! Never touches: the domain's memory, which stays so that it can be examined.

use super::Powers;
use crate::prelude::*;
use core::fmt::{self, Write};
use hypercall_abi::event::Virq;
use hypercall_abi::sched::ShutdownReason;
use log::Level;

/// Tells that the caller's domain has crashed, and that its vcpu must not run any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "the vcpu must not run on"]
pub struct Crashed;

/// Ends the caller's domain for a fault of its own (P7). The toolstack prints `why`.
#[cold]
#[inline(never)]
pub fn crash<M: Machine>(ctx: &mut Ctx<'_, M>, why: fmt::Arguments<'_>) -> Crashed {
    let number = ctx.vcpu.number().0;
    ctx.domain.notes.with(|notes| {
        if notes.report.length == 0 {
            let mut text = Text::<128>::default();
            let _ = text.write_fmt(why);
            (notes.report.vcpu, notes.report.length) = (number, low32(long(text.0.len())));
            fill(&mut notes.report.text, text.0.as_bytes());
        }
    });
    let regs = &ctx.state.regs;
    let (rip, cs, rsp, rflags) = (regs.rip, regs.cs, regs.rsp, regs.rflags);
    ctx.domain.log(ctx.m, Level::Warn, format_args!("{}v{number} crashed: {why}", ctx.domain.id()));
    ctx.domain.log(ctx.m, Level::Info, format_args!("rip {rip:#x} cs {cs:#x} rsp {rsp:#x} flags {rflags:#x}"));
    ctx.state.call = None;
    ctx.state.trap = None;
    ctx.world.shut_down(ctx.m, ctx.domain, ShutdownReason::Crash.code());
    Crashed
}

/// Text that is cut to the size of its buffer.
#[derive(Default, Debug)]
pub struct Text<const N: usize>(pub heapless::String<N>);

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| self.0.push(c)).map_err(|_| fmt::Error)
    }
}

impl World {
    /// Records that a domain has ended by itself: its vcpus stop, and the toolstack gets the interrupt [`Virq::DomExc`].
    pub fn shut_down<M: Machine>(&self, m: &M, domain: &Domain, reason: u32) {
        if domain.note_shutdown(reason) {
            self.vcpus_of(domain).for_each(|vcpu| self.sched.nudge(m, vcpu));
            self.raise_global(m, Virq::DomExc);
            if domain.may(Powers::MACHINE) {
                self.ended.store(reason.saturating_add(1), SeqCst);
            }
        }
    }

    /// Takes the shutdown reason of a domain that may turn the machine off, if it has shut down. Returned only once.
    pub fn end(&self) -> Option<u32> {
        if self.ended.load(Relaxed) == 0 { None } else { self.ended.swap(0, SeqCst).checked_sub(1) }
    }
}
