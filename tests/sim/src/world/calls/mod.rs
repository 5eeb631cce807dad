//! Invents calls: every number and operation of the ABI, with arguments that often make sense and often do not.
//!
//! [`pen`] has what arguments are made of; [`pages`], [`grants`], [`events`], [`vcpus`] and [`control`] make them.

mod control;
mod events;
mod grants;
mod pages;
mod pen;
mod vcpus;

use super::build::{self, at, page};
use hv_core::addr::Frame;
use hypercall_abi::mmu::MulticallEntry;
use hypercall_abi::{Hypercall, domid};
pub use pen::Pen;

/// What is in the registers of a call.
pub type Args = [u64; 6];

/// A call to be made.
#[derive(Clone, Copy, Debug)]
pub struct Invented {
    /// Its number and name.
    pub call: Hypercall,
    /// The operation.
    pub op: &'static str,
    /// Arguments.
    pub args: Args,
    /// Where a status of 16 bits must be 0 for success.
    pub status: Option<u64>,
}

/// What is known of a domain besides what the hypervisor knows.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Its first pages.
    pub pages: Vec<Frame>,
    /// Handles of grants it has mapped, where, and the bus address it was told.
    pub handles: Vec<(u32, u64, u64)>,
}

impl Pen<'_, '_> {
    /// A call. Families that make the others interesting come more often.
    pub fn invent(&mut self) -> Invented {
        const OFTEN: [Hypercall; 12] = [
            Hypercall::MmuUpdate,
            Hypercall::MmuextOp,
            Hypercall::UpdateVaMapping,
            Hypercall::GrantTableOp,
            Hypercall::GrantTableOp,
            Hypercall::GrantTableOp,
            Hypercall::EventChannelOp,
            Hypercall::EventChannelOp,
            Hypercall::VcpuOp,
            Hypercall::MemoryOp,
            Hypercall::Multicall,
            Hypercall::Domctl,
        ];
        let all = if self.rng.one_in(2) { &OFTEN[..] } else { Hypercall::ALL };
        let call = self.rng.pick(all).unwrap_or(Hypercall::Iret);
        self.arguments(call)
    }

    /// A call of a family.
    pub fn arguments(&mut self, call: Hypercall) -> Invented {
        let mut status = None;
        let mut args = [0; 6];
        for arg in &mut args {
            *arg = self.edge();
        }
        let op = match call {
            Hypercall::MemoryOp => self.memory(&mut args),
            Hypercall::XenVersion => self.version(&mut args),
            Hypercall::ConsoleIo => self.console(&mut args),
            Hypercall::GrantTableOp => self.grant(&mut args, &mut status),
            Hypercall::VmAssist => self.assist(&mut args),
            Hypercall::VcpuOp => self.vcpu_op(&mut args),
            Hypercall::SetSegmentBase => self.segment_base(&mut args),
            Hypercall::MmuextOp => self.mmuext_ops(&mut args),
            Hypercall::SchedOp => self.sched(&mut args),
            Hypercall::CallbackOp => self.callback(&mut args),
            Hypercall::EventChannelOp => self.event(&mut args),
            Hypercall::PhysdevOp => self.physdev(&mut args),
            Hypercall::Domctl => self.domctl(&mut args),
            Hypercall::Sysctl => self.sysctl(&mut args),
            Hypercall::Tenon => self.tenon(&mut args),
            _ => {
                self.without_operations(call, &mut args);
                ""
            }
        };
        Invented { call, op, args, status }
    }

    /// Arguments of a call that does one thing.
    fn without_operations(&mut self, call: Hypercall, args: &mut Args) {
        match call {
            Hypercall::SetTrapTable => args[0] = if self.rng.one_in(30) { 0 } else { self.trap_table() },
            Hypercall::MmuUpdate => self.mmu_updates(args),
            Hypercall::SetGdt => self.gdt(args),
            Hypercall::StackSwitch => args[1] = self.mostly(&[at(page::STACK + 1), at(page::STACK) + 0x800]),
            Hypercall::SetCallbacks => args[..3].iter_mut().for_each(|arg| *arg = self.mostly(&[build::HANDLER])),
            Hypercall::SetDebugreg => self.breakpoint(args),
            Hypercall::GetDebugreg => args[0] = self.below(8),
            Hypercall::UpdateDescriptor => self.descriptor(args),
            Hypercall::Multicall => self.calls(args),
            Hypercall::UpdateVaMapping => self.va_mapping(args),
            Hypercall::UpdateVaMappingOtherdomain => {
                self.va_mapping(args);
                if self.rng.one_in(2) {
                    args[3] = u64::from(domid::SELF);
                }
            }
            Hypercall::SetTimerOp => self.timer(args),
            Hypercall::NmiOp => self.nmi(args),
            _ => {} // it has none, or they are numbers that mean nothing
        }
    }

    /// A list of calls.
    fn calls(&mut self, args: &mut Args) {
        let (list, count) = self.list(6, |pen| {
            let inner = pen.arguments_inside();
            MulticallEntry { op: inner.call.number(), result: 0, args: inner.args }
        });
        [args[0], args[1]] = [list, count];
    }

    /// A call for a list of calls: no list again, most of the time, and nothing that ends the domain.
    fn arguments_inside(&mut self) -> Invented {
        const SIMPLE: [Hypercall; 12] = [
            Hypercall::UpdateVaMapping,
            Hypercall::StackSwitch,
            Hypercall::FpuTaskswitch,
            Hypercall::SetSegmentBase,
            Hypercall::UpdateDescriptor,
            Hypercall::SetDebugreg,
            Hypercall::XenVersion,
            Hypercall::SetTimerOp,
            Hypercall::MmuUpdate,
            Hypercall::MmuextOp,
            Hypercall::GrantTableOp,
            Hypercall::Iret,
        ];
        if self.rng.one_in(30) {
            // A list in a list: the first entry of the arguments, whatever it is by now.
            return Invented {
                call: Hypercall::Multicall,
                op: "",
                args: [at(page::ARGS), 3, 0, 0, 0, 0],
                status: None,
            };
        }
        let call = self.rng.pick(&SIMPLE).unwrap_or(Hypercall::XenVersion);
        self.arguments(call)
    }
}
