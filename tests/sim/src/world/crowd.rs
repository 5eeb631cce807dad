//! Domains that do a few things very often, all of their vcpus at once: they wake each other, sleep, set timers, change what
//! a page is, pause and destroy each other. They do nothing they should not, so that a vcpu which sleeps though an event is
//! due has been forgotten.

use super::Context;
use super::build::{self, at, page};
use super::calls::{Invented, Pen};
use super::hostile::{Everybody, Mood, play};
use hv_core::addr::{DomainId, Port, VcpuId};
use hv_core::domain::{Domain, Life};
use hv_core::event::port::Binding;
use hv_core::lock::{Held, Nothing};
use hv_core::machine::{Clock, Exit, Interrupt};
use hypercall_abi::event::{BindIpi, EventOp, PortArg};
use hypercall_abi::grant::{Copy as GrantCopy, CopySide, GrantOp};
use hypercall_abi::memory::{MemoryOp, Reservation};
use hypercall_abi::mmu::{MmuextCommand, MmuextOp};
use hypercall_abi::sched::{Poll, SchedOp};
use hypercall_abi::shared::{offset, vcpu_info};
use hypercall_abi::tenon::TenonOp;
use hypercall_abi::vcpu::VcpuOp;
use hypercall_abi::{Hypercall, domid};
use std::ops::ControlFlow;
use zerocopy::{Immutable, IntoBytes};

/// Vcpus of a domain.
pub(super) const VCPUS: u32 = 3;

/// Lets a crowd take so many steps on so many CPUs, with the audits of [`super::hostile`].
///
/// # Errors
/// As [`super::hostile::run`].
pub fn run(seed: u64, cpus: usize, steps: u64) -> Result<super::Totals, String> {
    play(seed, cpus, steps, Mood::Crowded)
}

impl Everybody {
    /// Domains come until there are enough.
    pub(super) fn gather_crowd(&mut self, held: &mut Held<Nothing>) -> ControlFlow<()> {
        let alive = |domain: &&Domain| domain.life() == Life::Alive && domain.shutdown_reason().is_none();
        let enough = self.world.domains.iter().filter(alive).count() >= self.tastes.domains;
        let room = self.world.frames.unpromised_frames() > 200;
        let known = |id| self.world.domain(id).is_some();
        self.models.retain(|id, _| known(DomainId(*id)));
        if !enough && room {
            self.controller(held)?;
        }
        if self.steps >= self.wanted { self.end() } else { ControlFlow::Continue(()) }
    }

    /// What a guest of a crowd does next.
    pub(super) fn crowd(&mut self, ctx: &mut Context<'_>) -> Exit {
        self.m.pass(1_000);
        let number = ctx.vcpu.number().0;
        ctx.state.regs.rsp = at(page::STACK + 1) - 0x400 * u64::from(number) - 8;
        ctx.state.regs.rip = at(page::CODE);
        if !self.rng.one_in(4) {
            self.take_events(ctx);
        }
        let model = self.models.get(&ctx.domain.id().0).cloned().unwrap_or_default();
        let mut pen = Pen { rng: &mut self.rng, ctx, model: &model };
        let others: Vec<&Domain> = self
            .world
            .domains
            .iter()
            .filter(|domain| domain.life() != Life::Free && domain.id() != ctx.domain.id())
            .collect();
        let dead = |domain: &&&Domain| domain.life() == Life::Dying || domain.shutdown_reason().is_some();
        let dead = others.iter().find(dead).copied();
        let other = pen.rng.pick(&others);
        let destroys = others.len() + 1 >= self.tastes.domains && pen.rng.one_in(300);
        let invented = match (dead.or(other), other) {
            (Some(doomed), _) if dead.is_some() && pen.rng.one_in(4) || destroys => pen.destroy(doomed.id().0),
            (_, Some(other)) if pen.rng.one_in(12) => pen.pause(other.id().0),
            (_, Some(other)) if pen.rng.one_in(30) => pen.fill(other.id().0),
            (_, Some(other)) if self.tastes.greedy && pen.rng.one_in(3) => match pen.rng.below(3) {
                0 => pen.limit(other.id()),
                _ => pen.fill(other.id().0),
            },
            _ if self.tastes.pages && pen.rng.one_in(2) => pen.retype(),
            _ => match pen.rng.below(20) {
                0..=2 => pen.sched_op(SchedOp::Block, 0),
                3 => Pen::made(Hypercall::Tenon, TenonOp::Wait.name(), [TenonOp::Wait.number(), 0, 0]),
                4 => pen.sched_op(SchedOp::Yield, 0),
                5..=8 => pen.ring(),
                9 | 10 => pen.nudge(),
                11 => pen.alarm(),
                12 => pen.poll(),
                13 => pen.copy(),
                14 => pen.forget(),
                15 => return Exit::Interrupt(Interrupt::Other),
                _ => pen.retype(),
            },
        };
        self.call(ctx, invented, invented.call.number())
    }

    /// A guest's handler: it takes what is pending, all at once.
    fn take_events(&self, ctx: &Context<'_>) {
        let Some(shared) = ctx.domain.shared_info() else { return };
        if let Some((frame, place)) = ctx.vcpu.record() {
            self.m.poke(frame, (place + vcpu_info::PENDING_SEL) / 8, 0);
            self.m.poke(frame, place / 8, 0);
        }
        self.m.poke(shared, offset::EVTCHN_PENDING / 8, 0);
    }
}

/// Calls that a crowd makes, with arguments where no other vcpu's are.
impl Pen<'_, '_> {
    fn argument<T: IntoBytes + Immutable>(&mut self, value: &T) -> u64 {
        let to = at(page::CODE) + 0x100 + 0x100 * u64::from(self.ctx.vcpu.number().0);
        self.write(to, value.as_bytes());
        to
    }

    fn made(call: Hypercall, op: &'static str, args: [u64; 3]) -> Invented {
        let [a, b, c] = args;
        Invented { call, op, args: [a, b, c, domid::SELF.into(), 0, 0], status: None }
    }

    fn sched_op(&mut self, op: SchedOp, arg: u64) -> Invented {
        Self::made(Hypercall::SchedOp, op.name(), [op.number(), arg, 0])
    }

    /// A port that notifies a vcpu, if it has one.
    fn port_of(&self, vcpu: VcpuId) -> Option<u32> {
        let ctx = self.ctx;
        (1..16).find(|port| {
            let state = ctx.world.port(ctx.m, ctx.domain, Port(*port));
            state.binding == Binding::Ipi && state.vcpu == vcpu
        })
    }

    fn some_vcpu(&mut self) -> VcpuId {
        VcpuId(self.rng.below(VCPUS as usize) as u32)
    }

    /// Sends an event to a vcpu, which gets a port first.
    fn ring(&mut self) -> Invented {
        let vcpu = self.some_vcpu();
        match self.port_of(vcpu) {
            Some(port) => {
                let arg = self.argument(&PortArg { port });
                Self::made(Hypercall::EventChannelOp, "Send", [EventOp::Send.number(), arg, 0])
            }
            None => {
                let arg = self.argument(&BindIpi { vcpu: vcpu.0, port: 0 });
                Self::made(Hypercall::EventChannelOp, "BindIpi", [EventOp::BindIpi.number(), arg, 0])
            }
        }
    }

    fn nudge(&mut self) -> Invented {
        let vcpu = self.some_vcpu();
        Self::made(Hypercall::VcpuOp, "SendNmi", [VcpuOp::SendNmi.number(), vcpu.0.into(), 0])
    }

    fn alarm(&mut self) -> Invented {
        let deadline = self.ctx.m.now() + self.rng.below(200_000) as u64;
        Self::made(Hypercall::SetTimerOp, "", [deadline, 0, 0])
    }

    fn poll(&mut self) -> Invented {
        let port = self.port_of(self.ctx.vcpu.number()).unwrap_or(1);
        let to = at(page::CODE) + 0x180 + 0x100 * u64::from(self.ctx.vcpu.number().0);
        self.write(to, &port.to_le_bytes());
        let timeout = self.ctx.m.now() + 100_000;
        let arg = self.argument(&Poll { ports: to, nr_ports: 1, pad: 0, timeout });
        self.sched_op(SchedOp::Poll, arg)
    }

    /// Copies to a page that was a table perhaps, by a list in another.
    fn copy(&mut self) -> Invented {
        let [source, dest] = [page::DATA, self.rng.pick(&page::SPARE[..2]).unwrap_or(5)].map(|n| self.page(n));
        let side = |frame| CopySide { gref_or_frame: frame, domid: domid::SELF, offset: 0, pad: 0 };
        let copy = GrantCopy { source: side(source), dest: side(dest), len: 8, ..Default::default() };
        let list = at(page::SPARE[2]) + 0x40 * u64::from(self.ctx.vcpu.number().0);
        self.write(list, copy.as_bytes());
        Self::made(Hypercall::GrantTableOp, "Copy", [GrantOp::Copy.number(), list, 1])
    }

    /// Has all CPUs of the domain flush.
    fn forget(&mut self) -> Invented {
        let op = MmuextCommand::TlbFlushAll;
        let arg = self.argument(&MmuextOp { cmd: op as u32, pad: 0, arg1: 0, arg2: 0 });
        Self::made(Hypercall::MmuextOp, op.name(), [arg, 1, 0])
    }

    /// Lets another domain have one frame more than it has, or no more than at first.
    fn limit(&mut self, id: DomainId) -> Invented {
        // (By what takes no lock: another CPU may be in the middle of it.)
        let (owned, first) = (u64::from(self.ctx.world.frames.owned(id)), build::PAGES as u64);
        let most = if owned < first + 20 && !self.rng.one_in(4) { owned + 1 } else { first };
        self.set_limit(id.0, most)
    }

    /// Gives another domain a frame, if it may have one more.
    fn fill(&mut self, domid: u16) -> Invented {
        let list = at(page::CODE) + 0x180 + 0x100 * u64::from(self.ctx.vcpu.number().0);
        self.write(list, &u64::MAX.to_le_bytes());
        let reservation = Reservation { extent_start: list, nr_extents: 1, domid, ..Default::default() };
        let arg = self.argument(&reservation);
        Self::made(Hypercall::MemoryOp, "IncreaseReservation", [MemoryOp::IncreaseReservation.number(), arg, 0])
    }
}
