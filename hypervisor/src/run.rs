//! The life of the CPU: the rules' order, with the machine to run guests, until the machine is turned off.

use core::ops::ControlFlow;
use hv_core::lean::{self, End, Way};
use hv_core::machine::Exit;
use hv_core::sched::life::{self, Runner};
use hv_core::world::{Ctx, Site};
use hv_machine::{Hardware, Return, Verdict};
use hypercall_abi::sched::ShutdownReason;

/// Runs guests on this CPU.
struct Guests;

impl Runner<Hardware> for Guests {
    fn run(&mut self, ctx: &mut Ctx<'_, Hardware>) -> Option<Exit> {
        let m = ctx.m;
        let end = lean::run(ctx, |ctx, way| {
            m.enter(&mut ctx.own.regs, if way == Way::Short { Return::Short } else { Return::Exact });
        });
        let exit = m.end(&ctx.own.regs);
        (end == End::Exit).then_some(exit)
    }

    fn idle(&mut self, site: &mut Site<'_, Hardware>) -> ControlFlow<(), bool> {
        ControlFlow::Continue(site.m.idle())
    }
}

/// Runs domains until the one that may turns the machine off.
pub(crate) fn run(site: &mut Site<'_, Hardware>) -> ! {
    let reason = life::live(site, &mut Guests).unwrap_or(0); // ours lives until a domain ends the machine
    site.m.power_off(match ShutdownReason::from_number(u64::from(reason)) {
        Some(ShutdownReason::Poweroff | ShutdownReason::Reboot) => Verdict::SUCCESS,
        _ => Verdict::of_domain(reason),
    })
}
