//! What is checked while guests run, after each step, and while all CPUs rest.

use super::{DEAF, EPISODE, Everybody, LONGEST_STEP, Mood, STILL, STILL_WITH_OTHERS, UNAUDITED};
use crate::world::Context;
use crate::world::audit::On;
use hv_core::addr::{Frame, GuestVirt};
use hv_core::domain::Life;
use hv_core::frame::Use;
use hv_core::lock::Held;
use hv_core::machine::{CpuState, Exit, mode};
use hv_core::sched::life::Step;
use hv_core::vcpu::Vcpu;
use hv_core::vcpu::debug::DR6_CLEAR;
use hv_core::{claim, flags};
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

impl Everybody {
    /// A step has been taken.
    fn count_step(&mut self) {
        if self.m.busy() > 1 {
            self.note("steps while other CPUs were at work");
        }
        (self.steps, self.episode, self.stuck) = (self.steps + 1, self.episode + 1, 0);
        self.unaudited += 1;
        if self.steps >= self.wanted && self.mood == Mood::Hostile {
            self.episode = self.episode.max(EPISODE);
        }
    }

    /// The most steps that end between two audits of all: those after which not all CPUs come to rest, and those that others
    /// are in the middle of when all are to.
    fn most_unaudited(&self) -> u64 {
        let others = self.m.cpu_count() as u64 - 1;
        others + if others == 0 || self.gathers == 8 { 1 } else { UNAUDITED }
    }

    /// The audit, of all or, while others are in the middle of something, of what holds at any time.
    pub(super) fn look(&mut self, all: bool) -> ControlFlow<()> {
        let found = if all {
            let (steps, most) = (std::mem::take(&mut self.unaudited), self.most_unaudited());
            if steps == 0 || steps > most {
                return self.fail(format!("{steps} steps between two audits of all, and 1 to {most} should be"));
            }
            self.totals.audits += 1;
            self.totals.worst = self.totals.worst.max(steps);
            let on: Vec<On> = self.cpus.iter().filter_map(|cpu| cpu.on).collect();
            self.audit.look(self.m, self.world, &on)
        } else {
            let on: Vec<On> = self.here().on.into_iter().collect();
            self.audit.glance(self.m, self.world, &on)
        };
        match found {
            Ok(()) => ControlFlow::Continue(()),
            Err(why) => self.fail(why),
        }
    }

    /// A call that goes on gets somewhere, and keeps no interrupt out.
    fn goes_on(&mut self, ctx: &Context<'_>, what: Step) -> Result<(), String> {
        let index = ctx.vcpu.index();
        match ctx.state.call.filter(|_| matches!(what, Step::Call(_))).map(|call| format!("{call:?}")) {
            Some(place) => {
                let (last, still) = self.places.entry(index).or_default();
                *still = if *last == place { *still + 1 } else { 0 };
                *last = place;
                if *still > if self.m.cpu_count() > 1 { STILL_WITH_OTHERS } else { STILL } {
                    return Err(format!("P8: {still} steps, and no further than {last}"));
                }
            }
            None if what != Step::Gone => _ = self.places.remove(&index),
            None => {}
        }
        let (typed, several) = (self.m.has_typed(), self.m.cpu_count() > 1);
        let here = self.here();
        here.deaf = if typed { here.deaf + 1 } else { 0 };
        if here.deaf > DEAF + 2 * u64::from(several) {
            return Err(format!("P8: an interrupt has waited for {} steps", here.deaf));
        }
        if self.rng.one_in(16) {
            self.m.type_key();
        }
        if self.rng.one_in(16) {
            // Mostly one that somebody takes; now and then far too many.
            let taken: Vec<u8> = (0..=u8::MAX).filter(|vector| self.world.message_taker(*vector).is_some()).collect();
            let vector = if self.rng.one_in(4) { None } else { self.rng.pick(&taken) };
            self.m.send_message(vector.unwrap_or(self.rng.below(256) as u8));
            self.note("messages of devices");
        }
        if self.m.holds_messages() {
            self.note("steps while messages waited");
        }
        Ok(())
    }

    /// P12, and that the CPU has loaded what the vcpu owns.
    pub(super) fn fit_to_run(&mut self, ctx: &Context<'_>) -> Result<(), String> {
        let regs = &ctx.state.regs;
        if regs.cs & !0xffff != 0 || regs.cs & 3 != 3 || regs.ss & !0xffff != 0 || regs.ss & 3 != 3 {
            return Err(format!("P12: cs {:#x}, ss {:#x}", regs.cs, regs.ss));
        }
        if regs.rflags & !(flags::GUEST | flags::IF) != 0 || regs.rflags & (flags::IF | 2) != flags::IF | 2 {
            return Err(format!("P12: rflags {:#x}", regs.rflags));
        }
        let loaded = ctx.m.loaded().clone();
        if loaded.root.is_none() || loaded.root != ctx.state.root() {
            return Err(format!("P12: root {:?} is loaded, {:?} should be", loaded.root, ctx.state.root()));
        }
        let same = loaded.gdt == ctx.state.gdt
            && loaded.ldt == ctx.state.ldt_mapped
            && loaded.ldt_entries == ctx.state.ldt_entries
            && loaded.cr4 == ctx.state.cr4
            && loaded.xcr0 == ctx.state.xcr0
            && loaded.tsc_aux == ctx.state.tsc_aux
            && loaded.task_switched == ctx.state.task_switched;
        if !same {
            return Err(format!("F: {loaded:?} is loaded"));
        }
        let on =
            |dr7: u64| dr7 & 0xff & !(0..4).filter(|n| dr7 >> (16 + 4 * n) & 3 == 2).fold(0, |on, n| on | 3 << (2 * n));
        if on(ctx.state.debug[7]) != loaded.debug[7] & 0xff || loaded.debug[6] != DR6_CLEAR {
            return Err(format!("F: breakpoints {:x?} are loaded, not {:x?}", loaded.debug, ctx.state.debug));
        }
        if loaded.sysenter != (ctx.state.callbacks.sysenter.address != 0) {
            return Err(format!("F: SYSENTER is {}, the vcpu has {:?}", loaded.sysenter, ctx.state.callbacks.sysenter));
        }
        let shown = loaded.gdt.iter().chain(&loaded.ldt).flatten();
        for frame in shown {
            if !ctx.world.frames.holds_descriptors(*frame) {
                return Err(format!("P12: {frame:?} is shown to the CPU and holds no descriptors"));
            }
        }
        Ok(())
    }

    /// What the entry code of this CPU may do for the guest is what the rules would.
    pub(super) fn entry_is_sound(&self, ctx: &Context<'_>) -> Result<(), String> {
        let (entry, own, frames) = (ctx.m.entry(), &*ctx.state, &ctx.world.frames);
        let value = |word: &AtomicU64| word.load(Relaxed);
        let kernel = match value(&entry.mode) {
            mode::SLOW => return Ok(()),
            mode::ROOTLESS if own.kernel_mode && own.user_root.is_none() => return Ok(()),
            now => now == mode::KERNEL,
        };
        let root = |root: Option<Frame>| root.map_or(0, Frame::address);
        let known = [
            kernel.into(),
            value(&entry.kernel_cr3),
            value(&entry.user_cr3),
            value(&entry.syscall),
            value(&entry.info),
        ];
        let record = ctx.vcpu.record().map_or(0, |(frame, at)| frame.address() + at as u64);
        let right =
            [own.kernel_mode.into(), root(own.kernel_root), root(own.user_root), own.callbacks.syscall.address, record];
        if known != right || own.nmi_masked || own.areas_stale || !own.callbacks.syscall.masks_events {
            return Err(format!("P12: the entry code knows {known:x?}, and not {right:x?}"));
        }
        for (what, at, sp) in [("frame", &entry.frame, &entry.frame_sp), ("back", &entry.back, &entry.back_sp)] {
            let (page, sp) = (Frame::containing(value(at)), value(sp));
            let kind = page.and_then(|page| frames.info(page)).map(|info| info.kind);
            if !kind.is_some_and(|kind| kind.used_as == Use::Writable) {
                return Err(format!("P1: the entry code writes its {what} to {page:?}, which is {kind:?}"));
            }
            let path = own.kernel_root.and_then(|root| claim::walk(ctx.m, frames, root, GuestVirt(sp)));
            let there = path.filter(|path| path.writable && path.user).and_then(|path| path.frame());
            if there != page && ctx.m.cpu_count() == 1 {
                return Err(format!("P4: the entry code has its {what} in {page:?}, and the guest in {there:?}"));
            }
        }
        Ok(())
    }

    /// Nobody sleeps to whom an event is due.
    pub(super) fn forgotten(&mut self) -> ControlFlow<()> {
        let sleeps = |vcpu: &&Vcpu| self.world.sleeps_through(self.m, vcpu);
        let alive = self.alive().filter(|domain| domain.life() == Life::Alive);
        match alive.flat_map(|domain| self.world.vcpus_of(domain)).find(sleeps).map(Vcpu::index) {
            Some(index) => self.fail(format!("vcpu {index} sleeps, and an event is due")),
            None => ControlFlow::Continue(()),
        }
    }

    /// What a step has come to.
    pub(super) fn judge(&mut self, ctx: &mut Context<'_>, what: Step) -> ControlFlow<()> {
        let looked = self.m.work_with(&self.world.frames) - self.here().work;
        if what == Step::Gone && self.rng.one_in(15) {
            // The selectors of the vcpu that comes next do not load.
            self.m.refuse([0x2b, 0, 0x47, 0xffff]);
        }
        if what == Step::Gone && ctx.domain.last_words().length > 0 {
            self.note("times a domain that had crashed left the CPU");
        }
        if let Step::Call(_) = what {
            let index = ctx.vcpu.index();
            let name = self.pending.get(&index).map_or("?", |pending| pending.call.name());
            self.totals.longest = self.totals.longest.max((looked, name));
            if looked > LONGEST_STEP {
                return self.fail(format!("P8: one step of {name} looked {looked} times at memory"));
            }
            if ctx.state.call.is_some() {
                self.note("steps that left a call unfinished");
            }
            self.learn_if_done(ctx);
        } else if let Step::Exit(exit) = what {
            let kind = match exit {
                Exit::Syscall => "exits by SYSCALL",
                Exit::Syscall32 => "exits by SYSCALL from compatibility code",
                Exit::Sysenter => "exits by SYSENTER",
                Exit::Fault { .. } => "exits by a fault",
                Exit::ReturnFault { .. } => "exits by a fault of the return",
                Exit::Interrupt(_) => "exits by an interrupt",
            };
            self.note(kind);
            // A call that is carried out at once.
            if exit == Exit::Syscall {
                self.learn_if_done(ctx);
            }
            if let Some(wanted) = self.here().stepped.take()
                && ctx.state.debug[6] != wanted
            {
                return self.fail(format!("P10: DR6 is {:#x}, not {wanted:#x}", ctx.state.debug[6]));
            }
            if matches!(exit, Exit::Fault { vector: 13 | 14 | 6, .. }) && ctx.state.trap.is_none() && ctx.domain.runs()
            {
                self.note("instructions carried out, or faults repaired");
            }
        }
        if let Err(why) = self.goes_on(ctx, what) {
            return self.fail(why);
        }
        if ctx.state.kernel_mode && ctx.state.regs.cs == 0xe008 {
            return self.fail("P12: a guest in ring 0".into());
        }
        self.count_step();
        ControlFlow::Continue(())
    }

    /// What is done while all CPUs rest: the audit, and what somebody outside does.
    pub(super) fn inspect(&mut self, ctx: &Context<'_>, what: Step) -> ControlFlow<()> {
        self.look(true)?;
        if let Mood::Reaping(id) = self.mood
            && id == ctx.domain.id()
            && self.alive().all(|domain| domain.id() == id)
        {
            self.funeral(ctx, id)?;
        }
        if what != Step::Gone {
            // Nobody holds a lock but for what a vcpu owns.
            self.attend(&mut Held::entering_ring_0())?;
        }
        ControlFlow::Continue(())
    }
}
