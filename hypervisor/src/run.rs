//! The life of the CPU: the rules' order, with the machine to run guests, until the machine is turned off.

use core::ops::ControlFlow;
use hv_core::lean::{self, End, Resume};
use hv_core::machine::{Arrived, Exit};
use hv_core::sched::life::{self, Runner};
use hv_core::world::{CpuCtx, Ctx};
use hv_machine::{Hardware, Return, Verdict};
use hypercall_abi::sched::ShutdownReason;

/// Runs guests on this CPU.
struct Guests;

impl Runner<Hardware> for Guests {
    fn run(&mut self, ctx: &mut Ctx<'_, Hardware>) -> Option<Exit> {
        let m = ctx.m;
        let end = lean::run(ctx, |ctx, way| {
            m.enter(&mut ctx.state.regs, if way == Resume::Sysret { Return::Sysret } else { Return::Exact });
        });
        let exit = m.end(&ctx.state.regs);
        (end == End::Exit).then_some(exit)
    }

    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, Hardware>) -> ControlFlow<(), Arrived> {
        ControlFlow::Continue(cpu_ctx.m.idle())
    }
}

/// Runs domains until the one that may turns the machine off.
pub(crate) fn run(cpu_ctx: &mut CpuCtx<'_, Hardware>) -> ! {
    let reason = life::live(cpu_ctx, &mut Guests).unwrap_or(0); // ours lives until a domain ends the machine
    cpu_ctx.m.power_off(match ShutdownReason::from_number(u64::from(reason)) {
        Some(ShutdownReason::Poweroff | ShutdownReason::Reboot) => Verdict::SUCCESS,
        _ => Verdict::of_domain(reason),
    })
}
