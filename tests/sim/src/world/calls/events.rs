//! Calls about events.

use super::{Args, Pen};
use hv_core::addr::Port;
use hv_core::domain::Life;
use hv_core::event::port::Binding;
use hypercall_abi::domid;
use hypercall_abi::event::{
    AllocUnbound, BindInterdomain, BindIpi, BindVcpu, BindVirq, EventOp, InitControl, PortArg, Reset, Status, VIRQS,
};

impl Pen<'_, '_> {
    /// Ports of living domains that wait for the caller.
    fn waiting(&self) -> Vec<(u16, u32)> {
        let (ctx, me) = (self.ctx, self.ctx.domain.id());
        let alive = ctx.world.domains.iter().filter(|domain| domain.life() == Life::Alive);
        alive
            .flat_map(|domain| (1..48).map(move |port| (domain, port)))
            .filter(|(domain, port)| ctx.world.port(ctx.m, domain, Port(*port)).binding == Binding::Unbound(me))
            .map(|(domain, port)| (domain.id().0, port))
            .collect()
    }

    pub(super) fn event(&mut self, args: &mut Args) -> &'static str {
        let (mut op, mut number) = self.op(EventOp::ALL, EventOp::number);
        let waiting = self.waiting();
        if op == Some(EventOp::Reset) && !self.rng.one_in(5) {
            (op, number) = (Some(EventOp::Send), EventOp::Send.number());
        }
        // Who finds nobody waiting mostly waits for somebody.
        if op == Some(EventOp::BindInterdomain) && waiting.is_empty() && !self.rng.one_in(4) {
            (op, number) = (Some(EventOp::AllocUnbound), EventOp::AllocUnbound.number());
        }
        args[0] = number;
        let port = self.port();
        args[1] = match op {
            Some(EventOp::BindInterdomain) => {
                let (remote_dom, remote_port) = self.rng.pick(&waiting).unwrap_or((domid::SELF, port));
                self.put(&BindInterdomain { remote_dom, remote_port, ..Default::default() })
            }
            Some(EventOp::BindVirq) => {
                let (virq, vcpu) = (self.small32(u64::from(VIRQS) + 1), self.rng.below(2) as u32);
                self.put(&BindVirq { virq, vcpu, port: 0 })
            }
            Some(EventOp::Status) => {
                let dom = self.domid();
                self.put(&Status { dom, port, ..Default::default() })
            }
            Some(EventOp::AllocUnbound) => {
                let (dom, remote_dom) = (self.domid(), if self.rng.one_in(4) { self.domid() } else { self.other() });
                self.put(&AllocUnbound { dom, remote_dom, port: 0 })
            }
            Some(EventOp::BindIpi) => {
                let vcpu = self.vcpu();
                self.put(&BindIpi { vcpu, port: 0 })
            }
            Some(EventOp::BindVcpu) => {
                let vcpu = self.vcpu();
                self.put(&BindVcpu { port, vcpu })
            }
            Some(EventOp::Reset) => {
                let dom = self.domid();
                self.put(&Reset { dom })
            }
            Some(EventOp::InitControl) => {
                let (control_gfn, offset, vcpu) = (self.frame(), self.small32(4096), self.vcpu());
                self.put(&InitControl { control_gfn, offset, vcpu, ..Default::default() })
            }
            _ => self.put(&PortArg { port }),
        };
        op.map_or("?", EventOp::name)
    }
}
