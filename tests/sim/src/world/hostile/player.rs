//! The life of a CPU: it runs guests, and has its steps watched.

use super::{Everybody, UNAUDITED, lock};
use crate::world::Context;
use crate::world::audit::On;
use crate::world::machine::{self, WholeMachine};
use crate::world::turns::{self, Gathered};
use hv_core::call::Next;
use hv_core::lean::{self, End};
use hv_core::machine::{Arrived, Exit, Interrupt};
use hv_core::sched::life::{Runner, Step};
use hv_core::world::CpuCtx;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard};

/// Plays the guests on one CPU.
pub(super) struct Player<'a> {
    pub(super) m: &'static WholeMachine,
    pub(super) cpu: usize,
    /// A guest goes on so long before its CPU answers that is to flush.
    pub(super) late: usize,
    pub(super) everybody: &'a Mutex<Everybody>,
}

impl Player<'_> {
    /// What is known of everybody. Only while no rule is asked, and nobody else goes on.
    fn all(&self) -> MutexGuard<'_, Everybody> {
        let mut all = lock(self.everybody);
        all.cpu = self.cpu;
        all
    }
}

impl Player<'_> {
    /// The guest runs until it leaves.
    fn leave(&mut self, ctx: &mut Context<'_>) -> Exit {
        let _outside = turns::outside();
        let several = self.m.cpu_count() > 1;
        {
            let mut all = self.all();
            if let Err(why) = all.fit_to_run(ctx).and_then(|()| all.entry_is_sound(ctx)) {
                _ = all.fail(why);
            }
            all.here().on = Some(On::of(ctx, true));
            if self.m.take_typed() {
                return Exit::Interrupt(Interrupt::Console); // before its first instruction
            }
            if let Some(vector) = self.m.take_message() {
                return Exit::Interrupt(Interrupt::Message(vector));
            }
        }
        loop {
            let (wanders, goes_on, answers) =
                self.m.dice(|rng| (rng.one_in(3), several && rng.one_in(2), rng.one_in(self.late)));
            if wanders {
                self.m.dice(|rng| self.m.wander(&ctx.world.frames, rng));
            }
            if !goes_on {
                break;
            }
            self.m.rest();
            if answers && self.m.is_asked() {
                return Exit::Interrupt(Interrupt::Other); // others wait that long
            }
            if self.m.is_stopped() {
                return Exit::Interrupt(Interrupt::Other);
            }
        }
        if self.m.take_kick() {
            return Exit::Interrupt(Interrupt::Kick);
        }
        if several && self.m.is_due() {
            return Exit::Interrupt(Interrupt::Timer);
        }
        self.all().act(ctx)
    }
}

impl Runner<WholeMachine> for Player<'_> {
    fn run(&mut self, ctx: &mut Context<'_>) -> Option<Exit> {
        let mut exit = None;
        let end = lean::run(ctx, |ctx, _| {
            let goes_on = match exit {
                None => ControlFlow::Continue(()),
                Some(exit) => {
                    self.all().note("exits that took a fast path");
                    self.seen(ctx, Step::Exit(exit))
                }
            };
            let now = match goes_on {
                ControlFlow::Continue(()) if ctx.domain.runs() => {
                    self.m.answer_late();
                    self.leave(ctx)
                }
                // It is about to be told to leave, and interrupts come in all the same.
                _ if self.m.take_typed() => Exit::Interrupt(Interrupt::Console),
                _ => Exit::Interrupt(Interrupt::Other),
            };
            self.m.keep_exit(&mut ctx.state.regs, now);
            exit = Some(now);
        });
        exit.filter(|_| end == End::Exit)
    }

    fn seen(&mut self, ctx: &mut Context<'_>, what: Step) -> ControlFlow<()> {
        let _outside = turns::outside();
        let everyone = {
            let mut all = self.all();
            if self.m.is_stopped() {
                return all.end();
            }
            let judged = all.judge(ctx, what);
            let stays = what != Step::Gone && what != Step::Call(Next::Leave) && ctx.domain.runs();
            let ticks = matches!(what, Step::Exit(Exit::Interrupt(_)));
            all.here().on = Some(On { ticks, ..On::of(ctx, stays) });
            judged?;
            let drawn = all.rng.below(8) < all.gathers;
            let everyone = self.m.cpu_count() == 1 || drawn || all.unaudited >= UNAUDITED || self.m.gathers();
            all.totals.followed += u64::from(everyone);
            everyone
        };
        let looked = if everyone && self.m.gather() == Gathered::ByUs {
            let looked = self.all().inspect(ctx, what);
            self.m.scatter();
            looked
        } else {
            self.all().look(false)
        };
        // Others may take steps before this CPU goes on with what follows from its own: a vcpu that leaves is not gone yet.
        while self.m.cpu_count() > 1 && self.m.dice(|rng| rng.one_in(3)) {
            self.m.linger();
        }
        let mut all = self.all();
        if what == Step::Gone {
            all.here().on = None;
        }
        all.here().work = self.m.work_with(&ctx.world.frames);
        if self.m.is_stopped() { all.end() } else { looked }
    }

    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, WholeMachine>) -> ControlFlow<(), Arrived> {
        let _outside = turns::outside();
        let interrupt = match self.m.idle() {
            Some(interrupt) => interrupt,
            None => {
                self.all().stuck(cpu_ctx.held)?;
                Interrupt::Kick
            }
        };
        if self.m.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(machine::arrived(interrupt)) }
    }
}
