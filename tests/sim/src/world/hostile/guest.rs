//! What guests do next, and what is learned of their calls.

use super::{Everybody, Mood, RESERVE};
use crate::rng::Rng;
use crate::world::Context;
use crate::world::build::{self, at, page};
use crate::world::calls::{Invented, Pen};
use crate::world::machine::{GDT_WINDOW, LDT_WINDOW, Race};
use hv_core::addr::Frame;
use hv_core::domain::{Domain, Life, Powers};
use hv_core::flags;
use hv_core::machine::{Exit, Interrupt, Registers};
use hv_core::vcpu::debug::DR6_CLEAR;
use hypercall_abi::grant::{entry, map};
use hypercall_abi::{Errno, Hypercall};

/// Instructions that ring 0 carries out for a guest, or refuses.
const INSTRUCTIONS: [&[u8]; 44] = [
    &[0x0f, 0x31],
    &[0x0f, 0x01, 0xf9],
    &[0xfa],
    &[0xfb],
    &[0xec],
    &[0xed],
    &[0x66, 0xed],
    &[0xe4, 0x42],
    &[0xee],
    &[0xef],
    &[0x0f, 0x20, 0xc0],
    &[0x0f, 0x22, 0xc0],
    &[0x0f, 0x20, 0xd0],
    &[0x0f, 0x22, 0xd3],
    &[0x0f, 0x20, 0xd8],
    &[0x0f, 0x22, 0xd8],
    &[0x0f, 0x20, 0xe0],
    &[0x0f, 0x22, 0xe3],
    &[0x0f, 0x21, 0xf8],
    &[0x0f, 0x23, 0xfb],
    &[0x0f, 0x23, 0xc3],
    &[0x0f, 0x06],
    &[0x0f, 0x32],
    &[0x0f, 0x30],
    &[0x0f, 0x01, 0xd1],
    &[0x0f, 0x09],
    &[0x0f, 0xa2],
    &[0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2],
    &[0xcd, 0x20],
    &[0xcd, 0x81],
    &[0x48, 0x89, 0x18],
    &[0x48, 0x87, 0x18],
    &[0xf0, 0x48, 0x0f, 0xb1, 0x18],
    &[0x89, 0x18],
    &[0x88, 0x38],
    &[0x66, 0x89, 0x18],
    &[0x48, 0xc7, 0x00, 0, 0, 0, 0],
    &[0xf0, 0x48, 0x0f, 0xba, 0x28, 1],
    &[0xf0, 0x48, 0x0f, 0xba, 0x30, 63],
    &[0x48, 0x81, 0x08, 0x42, 0, 0, 0],
    &[0x48, 0x83, 0x20, 0xbf],
    &[0x64, 0x48, 0x89, 0x18],
    &[0x65, 0x48, 0x89, 0x04, 0xd8],
    &[0xc7, 0x40, 0x04, 0, 0, 0, 0],
];

impl Everybody {
    /// What the guest on this CPU does next.
    pub(in crate::world) fn act(&mut self, ctx: &mut Context<'_>) -> Exit {
        if self.mood == Mood::Crowded {
            return self.crowd(ctx);
        }
        let paired = self.mood == Mood::Paired;
        if !paired {
            self.m.pass(1_000);
        }
        let reaping = matches!(self.mood, Mood::Reaping(_));
        if let Mood::Reaping(id) = self.mood
            && id != ctx.domain.id()
            && self.rng.one_in(4)
        {
            return Exit::Interrupt(Interrupt::Timer);
        }
        self.registers(&mut ctx.state.regs);
        // Another CPU of the guest is at work.
        let race = (!paired && self.rng.one_in(4)).then(|| Race {
            frames: &self.world.frames,
            over: self.models.get(&ctx.domain.id().0).map(|model| model.pages.clone()).unwrap_or_default(),
            rng: Rng::new(self.rng.word()),
            odds: 3 + self.rng.below(20),
        });
        self.m.set_race(race);
        if !reaping {
            self.scribble(ctx);
            if self.rng.one_in(8) {
                self.prepare_table(ctx);
            }
        }
        self.here().work = self.m.work_with(&self.world.frames);
        let line = |exit: Exit| format!("{}v{} {exit:x?}", ctx.domain.id(), ctx.vcpu.number().0);
        let mode = if ctx.state.kernel_mode { 0 } else { 1 };
        let sysenter = ctx.m.loaded().sysenter; // else it is a fault like others
        let exit = match (mode, self.rng.below(40)) {
            (_, 18..=22 | 32..=39) if sysenter => Exit::Sysenter,
            (_, 0) => Exit::Interrupt(Interrupt::Console),
            (_, 1) => {
                self.m.pass(300_000);
                Exit::Interrupt(Interrupt::Timer)
            }
            (_, 2) => Exit::Interrupt(Interrupt::Kick),
            (1, 3..=20) => Exit::Syscall,
            (1, 21) => Exit::Syscall32,
            (0, 3..=31) => return self.hypercall(ctx),
            _ if reaping => Exit::Interrupt(Interrupt::Other),
            _ => {
                let exit = self.fault(ctx);
                let text =
                    format!("{}v{} {exit:x?} at {:#x}", ctx.domain.id(), ctx.vcpu.number().0, ctx.state.regs.rip);
                self.say(text);
                return exit;
            }
        };
        let text = line(exit);
        self.say(text);
        exit
    }

    /// What ring 3 can do without asking: change its registers.
    fn registers(&mut self, regs: &mut Registers) {
        let rng = &mut self.rng;
        if !rng.one_in(300) {
            regs.rsp = at(page::STACK + 1) - 8 * rng.below(200) as u64;
        } else {
            regs.rsp = rng.word();
        }
        if rng.one_in(3) {
            regs.rip = at(page::CODE) + rng.below(0x700) as u64;
        }
        regs.rflags ^= rng.word() & 0xcd5; // arithmetic flags and DF
        for n in [0, 1, 2, 3, 6, 7, 8, 9, 12] {
            if rng.one_in(2) {
                *regs.general_mut(n) = rng.word() >> rng.below(64);
            }
        }
    }

    /// What a guest does to its own memory and what it shares.
    fn scribble(&mut self, ctx: &Context<'_>) {
        let domain = ctx.domain;
        match self.rng.below(6) {
            0 | 5 => {
                // It grants a page.
                let tables: Vec<Frame> = domain.grants.table_frames().collect();
                let others: Vec<u16> = self.alive().map(|d| d.id().0).collect();
                let pages = self.models.get(&domain.id().0).map(|model| model.pages.clone()).unwrap_or_default();
                let (Some(table), Some(to), Some(_)) = (tables.first(), self.rng.pick(&others), pages.first()) else {
                    return;
                };
                let n = if self.rng.one_in(8) { 0 } else { page::DATA };
                let frame = pages.get(n + self.rng.below(pages.len() - n)).map_or(0, |f| f.number());
                let read_only = if self.rng.one_in(4) { entry::READONLY } else { 0 };
                let flags = if self.rng.one_in(8) { self.rng.below(0x200) as u16 } else { entry::PERMIT_ACCESS };
                let word = u64::from(flags | read_only) | u64::from(to) << 16 | frame << 32;
                self.m.poke(*table, self.rng.below(24), word);
            }
            1 => {
                if let Some(shared) = domain.shared_info() {
                    // Pending, masked, upcalls: all of it is the guest's to change.
                    let at = self.rng.pick(&[0, 0, 1, 8, 0x100, 0x140, 0x180]).unwrap_or(0);
                    let value = self.rng.pick(&[0, 1, u64::MAX, 0x100]).unwrap_or(0);
                    self.m.poke(shared, at, value);
                }
            }
            2 => {
                // Upcalls are let in.
                if let Some(shared) = domain.shared_info() {
                    self.m.poke(shared, 0, 0);
                    (0x140..0x180).for_each(|at| self.m.poke(shared, at, 0));
                }
            }
            _ => {}
        }
    }

    /// A page as a table: what the guest prepares while it may write it, before it maps it read-only. Here the frame is
    /// written directly, if nothing but a read-only mapping leads to it.
    fn prepare_table(&mut self, ctx: &Context<'_>) {
        let Some(model) = self.models.get(&ctx.domain.id().0) else { return };
        let spare = self.rng.pick(&page::SPARE).unwrap_or(0);
        let (Some(frame), Some(target)) = (model.pages.get(spare), self.rng.pick(&model.pages)) else { return };
        let idle = |info: hv_core::frame::table::Info| {
            info.kind.count == 0
                && info.owner.allocated
                && info.owner.owner == hv_core::frame::Owner::Guest(ctx.domain.id())
        };
        if ctx.world.frames.info(*frame).is_some_and(idle) {
            // A real guest would map it writable for this; that it has not been since is what matters.
            let at = self.rng.below(512);
            let bits = self.rng.pick(&[0x25u64, 0x27, 0x67, 0x61, 0]).unwrap_or(0);
            self.m.poke(*frame, at, if bits == 0 { 0 } else { target.address() | bits });
        }
    }

    fn hypercall(&mut self, ctx: &mut Context<'_>) -> Exit {
        let model = self.models.get(&ctx.domain.id().0).cloned().unwrap_or_default();
        let mut pen = Pen { rng: &mut self.rng, ctx, model: &model };
        let invented = match self.mood {
            Mood::Reaping(id) if id == ctx.domain.id() => {
                let next = self.world.domains.iter().find(|d| d.life() != Life::Free && d.id() != id);
                match next {
                    Some(domain) => pen.destroy(domain.id().0),
                    None => {
                        return Exit::Interrupt(Interrupt::Other);
                    }
                }
            }
            _ => {
                let dead = |d: &&Domain| match d.life() {
                    Life::Free => false,
                    Life::Alive => d.shutdown_reason().is_some(),
                    Life::Dying => true,
                };
                let dead = self.world.domains.iter().find(dead).filter(|_| ctx.domain.may(Powers::CONTROL));
                match dead {
                    // Its memory is wanted where the reserve has been used.
                    Some(dead) if pen.rng.one_in(if self.audit.reserve.len() < RESERVE { 2 } else { 6 }) => {
                        pen.destroy(dead.id().0)
                    }
                    _ => {
                        // With several CPUs a domain that is paused may be on its way off one.
                        let pauses = self.m.cpu_count() > 1
                            && self.mood == Mood::Hostile
                            && ctx.domain.may(Powers::CONTROL)
                            && pen.rng.one_in(10);
                        let other = |d: &&Domain| d.life() == Life::Alive && d.id() != ctx.domain.id();
                        let others: Vec<u16> = self.world.domains.iter().filter(other).map(|d| d.id().0).collect();
                        match pen.rng.pick(&others) {
                            Some(other) if pauses => pen.pause(other),
                            _ if self.m.cpu_count() > 1 && pen.rng.one_in(5) => pen.retype(),
                            _ => pen.invent(),
                        }
                    }
                }
            }
        };
        let rsp = if invented.call == Hypercall::Iret && !pen.rng.one_in(30) { Some(pen.iret_frame()) } else { None };
        let number =
            if pen.rng.one_in(100) && self.mood == Mood::Hostile { pen.edge() } else { invented.call.number() };
        ctx.state.regs.rsp = rsp.unwrap_or(ctx.state.regs.rsp);
        self.call(ctx, invented, number)
    }

    /// A call, of this number.
    pub(in crate::world) fn call(&mut self, ctx: &mut Context<'_>, invented: Invented, number: u64) -> Exit {
        let regs = &mut ctx.state.regs;
        regs.rax = number;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = invented.args;
        if number == invented.call.number() {
            self.pending.insert(ctx.vcpu.index(), invented);
        } else {
            self.pending.remove(&ctx.vcpu.index());
        }
        let (id, vcpu) = (ctx.domain.id(), ctx.vcpu.number().0);
        self.say(format!("{id}v{vcpu} {}({}) {:x?}", invented.call.name(), invented.op, invented.args));
        let regs = &mut ctx.state.regs;
        (regs.rcx, regs.r11) = (regs.rip, regs.rflags);
        Exit::Syscall
    }

    fn fault(&mut self, ctx: &mut Context<'_>) -> Exit {
        let rng = &mut self.rng;
        let common = [14, 14, 14, 13, 13, 13, 6, 0x80, 1, 3, 7, 0, 4, 5, 8, 10, 11, 12, 16, 17, 19, 21];
        let vector = if rng.one_in(500) { rng.below(32) as u8 } else { rng.pick(&common).unwrap_or(14) };
        let user = 4; // guest kernel and guest user code are in ring 3
        let (mut error, mut address) = (0, 0);
        match vector {
            14 => {
                let windows = [GDT_WINDOW, LDT_WINDOW, LDT_WINDOW + 8, LDT_WINDOW + 0xfff8];
                (error, address) = match rng.below(8) {
                    0 | 1 => (0, rng.pick(&windows).unwrap_or(0)),
                    2 => (rng.below(8) as u32, rng.word()),
                    3..=5 => (7, at(page::L1) + 8 * (build::PAGES + rng.below(30)) as u64),
                    _ => (4 | rng.below(32) as u32 & !8, at(rng.below(64))),
                };
                // The CPU reads descriptors with rights of its own.
                error |= if windows.contains(&address) { 0 } else { user };
                if rng.one_in(2000) {
                    error |= 8;
                }
            }
            13 => error = if rng.one_in(3) { (rng.below(256) as u32) << 3 | 2 } else { 0 },
            8 | 10 | 11 | 12 | 17 | 21 => error = rng.below(0x1_0000) as u32,
            _ => {}
        }
        if rng.one_in(6) {
            let vector = 11 + rng.below(4) as u8;
            let address = if vector == 14 { GDT_WINDOW + 8 * rng.below(0x2000) as u64 } else { 0 };
            return Exit::ReturnFault { vector, error: if vector == 14 { 0 } else { error }, address };
        }
        self.code(ctx, address);
        if vector == 1 {
            self.step(ctx);
        }
        Exit::Fault { vector, error, address }
    }

    /// The guest steps to where somebody may have a breakpoint. DR6 is to name its own, and nobody else's.
    fn step(&mut self, ctx: &mut Context<'_>) {
        let to = build::BREAKPOINTS + self.rng.below(2) as u64;
        ctx.state.regs.rip = to;
        self.m.single_step(to);
        let own = (0..4).filter(|&n| ctx.state.debug[n] == to).fold(0, |bits, n| bits | 1 << n);
        self.here().stepped = Some(ctx.state.debug[6] | DR6_CLEAR | 1 << 14 | own);
        self.note("single steps");
    }

    /// Puts an instruction where the guest stands.
    fn code(&mut self, ctx: &mut Context<'_>, address: u64) {
        let mut bytes = self.rng.pick(&INSTRUCTIONS).unwrap_or(&[0xfa]).to_vec();
        if self.rng.one_in(6) {
            let n = self.rng.below(bytes.len());
            bytes[n] = self.rng.below(256) as u8;
        }
        let near_the_end = self.rng.one_in(8);
        let to = if near_the_end { at(page::CODE + 1) - self.rng.below(16) as u64 } else { at(page::CODE) + 64 };
        let model = self.models.get(&ctx.domain.id().0).cloned().unwrap_or_default();
        let (rbx, rcx, rdx) = {
            let mut pen = Pen { rng: &mut self.rng, ctx, model: &model };
            pen.write(to, &bytes);
            let frame = model.pages.get(page::DATA).map_or(0, |f| f.address());
            let root = model.pages.first().map_or(0, |f| f.address());
            let choices = [frame | 0x27, frame | 0x25, 0, root, pen.edge(), 0x8005_0033, 7];
            let msrs =
                [0x10, 0x1b, 0x277, 0xc000_0080, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0xc000_0103, 0x4000_0000];
            let rbx = pen.rng.pick(&choices).unwrap_or(0);
            let rcx = if pen.rng.one_in(4) { pen.edge() } else { pen.rng.pick(&msrs).unwrap_or(0) };
            (rbx, rcx, pen.edge())
        };
        let regs = &mut ctx.state.regs;
        regs.rip = to;
        regs.rbx = rbx;
        regs.rax = if address != 0 { address } else { rbx };
        if self.rng.one_in(2) {
            (regs.rcx, regs.rdx) = (rcx, if self.rng.one_in(2) { 0 } else { rdx });
        }
        if self.rng.one_in(20) {
            regs.rflags |= flags::TF;
        }
        if self.rng.one_in(10) {
            // Whatever the descriptor makes of it: 32-bit code, entries of the guest's own tables, no code at all.
            regs.cs = self.rng.pick(&[0xe023, 0xe02b, 0x3, 0xb, 0xf, 0xfff3, 0xffff]).unwrap_or(0xe033);
        }
    }

    /// If the call of this vcpu is over, something is learned from it.
    pub(in crate::world) fn learn_if_done(&mut self, ctx: &Context<'_>) {
        if ctx.state.call.is_none()
            && let Some(done) = self.pending.remove(&ctx.vcpu.index())
        {
            self.learn(ctx, done);
        }
    }

    /// What was learned from a call that is over.
    fn learn(&mut self, ctx: &Context<'_>, done: Invented) {
        let result = Errno::from_rax(ctx.state.regs.rax);
        let model = self.models.get(&ctx.domain.id().0).cloned().unwrap_or_default();
        let pen = Pen { rng: &mut self.rng, ctx, model: &model };
        let status: Option<u16> = done.status.and_then(|at| pen.read(at));
        // A reservation answers how many extents are done, those before its start included.
        let some = match (done.op, result) {
            ("IncreaseReservation" | "DecreaseReservation" | "PopulatePhysmap", Ok(n)) => n > done.args[0] >> 6,
            (_, result) => result.is_ok(),
        };
        let ok = some && done.status.is_none_or(|_| status == Some(0));
        if ok && done.call == Hypercall::GrantTableOp && done.op == "MapGrantRef" {
            let list = done.args[1];
            let mut maps = Vec::new();
            for n in 0..done.args[2].min(3) {
                let element: Option<hypercall_abi::grant::MapGrantRef> = pen.read(list.wrapping_add(n * 32));
                maps.extend(element.filter(|e| e.status == 0).map(|e| {
                    let host = if e.flags & map::HOST != 0 { e.host_addr } else { 0 };
                    (e.handle, host, if e.flags & map::DEVICE != 0 { e.dev_bus_addr } else { 0 })
                }));
            }
            if let Some(model) = self.models.get_mut(&ctx.domain.id().0) {
                model.handles.extend(maps);
                let excess = model.handles.len().saturating_sub(12);
                model.handles.drain(..excess);
            }
        }
        self.counted(done, ok);
    }

    fn counted(&mut self, done: Invented, ok: bool) {
        let count = self.totals.calls.entry((done.call.name(), done.op)).or_default();
        *count = (count.0 + 1, count.1 + u64::from(ok));
    }
}
