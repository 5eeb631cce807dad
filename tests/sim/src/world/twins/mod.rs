//! Two worlds in which a guest does the same, one with fast paths and one without: they are to be the same after each step.
//!
//! The entry code is assembly, which no simulation runs; [`entry`] has a copy of it that goes by the same `Entry`.

mod entry;

use super::Context;
use super::build::{self, BASE, PAGES, at, page};
use super::machine::WholeMachine;
use super::script::{Actor, Stage};
use crate::rng::Rng;
pub(super) use entry::enters;
use entry::value;
use hv_core::addr::{Frame, GuestVirt};
use hv_core::claim;
use hv_core::flags;
use hv_core::frame::FrameTable;
use hv_core::lean::{self, End};
use hv_core::machine::{CpuState, Cpus, Exit, Frames, Interrupt, Registers, mode};
use hv_core::{dispatch, trap};
use hypercall_abi::callback::Assist;
use hypercall_abi::mmu::{MmuextCommand, pte};
use hypercall_abi::{Hypercall, domid, selector};

/// Frames of each world besides what is set aside for its domains.
const MEMORY: usize = GUESTS * 160;
/// Guests of a pair of worlds, one after the other.
const GUESTS: usize = 12;
/// Steps of a guest, if it lives that long.
const STEPS: u64 = 2_000;
/// Steps of a call after which it is taken for one that never ends.
const ENDLESS: usize = 2_000;
/// What happened.
#[derive(Clone, Copy, Default, Debug)]
pub struct Totals {
    /// Steps done in both worlds and compared.
    pub steps: u64,
    /// Those in which the entry code did all by itself.
    pub entered: u64,
    /// Those that took a fast path in the rules.
    pub short: u64,
    /// Guests that crashed, in both worlds.
    pub crashes: u64,
}

/// How a world did its part of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Did {
    Entered,
    Short,
    Long,
}

/// Lets a guest do the same in two worlds, for so many steps.
///
/// # Errors
/// The first difference, with the seed and the step.
pub fn run(seed: u64, steps: u64) -> Result<Totals, String> {
    let mut totals = Totals::default();
    let mut rng = Rng::new(seed);
    while totals.steps < steps {
        let (mut one, mut other) = (Stage::new(MEMORY, WholeMachine::new), Stage::new(MEMORY, WholeMachine::new));
        other.world.frames.set_fast_paths(false);
        for _ in 0..GUESTS {
            let [guest, twin] = [&mut one, &mut other].map(enter);
            assert_eq!(guest.pages, twin.pages, "both worlds begin alike");
            if build::is_ordinary(&guest.pages) {
                let (one, other) = ((&mut one, &guest), (&mut other, &twin));
                live(&mut rng, one, other, &mut totals)
                    .map_err(|why| format!("seed {seed} step {}: {why}", totals.steps))?;
            }
        }
    }
    Ok(totals)
}

fn enter(stage: &mut Stage) -> Actor {
    let guest = stage.enter(false);
    let assists = stage.call(&guest, Hypercall::VmAssist, &[0, Assist::WritablePagetables.number()]);
    assert_eq!(assists.result, Ok(0));
    guest
}

/// A guest lives in both worlds.
fn live(
    rng: &mut Rng,
    (one, guest): (&mut Stage, &Actor),
    (other, twin): (&mut Stage, &Actor),
    totals: &mut Totals,
) -> Result<(), String> {
    let from = totals.steps;
    one.on_cpu(guest, |one, _| {
        other.on_cpu(twin, |other, _| {
            while totals.steps < from + STEPS && one.domain.runs() {
                let act = Act::invent(rng, one, guest);
                let did = [act.done(one), act.done(other)];
                totals.steps += 1;
                totals.entered += u64::from(did[0] == Did::Entered);
                totals.short += u64::from(did[0] == Did::Short);
                let same = if did[1] == Did::Short { Err("fast paths are off".into()) } else { compare(one, other) };
                same.map_err(|why| format!("{did:?} {act:x?}: {why}"))?;
                // Where they are lost, the guest has no use for them.
                (one.state.regs.rcx, one.state.regs.r11) = (other.state.regs.rcx, other.state.regs.r11);
            }
            totals.crashes += u64::from(!one.domain.runs());
            Ok(())
        })
    })
}

/// One thing a guest does.
#[derive(Clone, Debug)]
pub(super) struct Act {
    /// Its registers, when it leaves.
    pub(super) regs: Registers,
    pub(super) exit: Exit,
    /// Words it has written before: frame, place, value.
    pub(super) written: Vec<(Frame, usize, u64)>,
}

impl Act {
    /// Something that may take a fast path, with everything that decides it changed now and then.
    pub(super) fn invent(rng: &mut Rng, ctx: &Context<'_>, guest: &Actor) -> Self {
        let mut act = Self { regs: ctx.state.regs, exit: Exit::Syscall, written: Vec::new() };
        act.bytes(rng, ctx);
        let general = |rng: &mut Rng| if rng.one_in(3) { rng.word() } else { rng.word() & 0xffff_ffff };
        let regs = &mut act.regs;
        for number in [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] {
            *regs.general_mut(number) = general(rng);
        }
        (regs.cs, regs.ss) = (selector::GUEST_CS.into(), selector::GUEST_SS.into());
        regs.rflags = 0x202 | rng.word() & 0xcd5 & !if rng.one_in(8) { 0 } else { flags::TF };
        regs.rip = at(page::CODE) + 8 * rng.below(200) as u64 + rng.below(8) as u64;
        regs.rsp = ctx.state.kernel_sp.wrapping_sub(8 * rng.below(40) as u64);
        if !ctx.state.kernel_mode {
            act.user(rng);
            return act;
        }
        match rng.below(13) {
            which @ 0..=4 => act.some_call(rng, guest, which),
            5..=7 => act.back(rng, ctx),
            8 => act.exit = segment_base(rng, &mut act.regs, &mut act.written, guest),
            9 | 10 => act.table_write(rng, guest),
            11 if rng.one_in(2) => act.switch(rng, guest),
            11 => act.multicall(rng, guest),
            _ => {
                let error = 4 | [0, 1, 2, 3, 16, 17][rng.below(6)];
                // The CPU has the address from the instruction: none is at hand that writes to the tables.
                let page = if error == 7 { page::DATA + rng.below(60) } else { rng.below(64) };
                act.exit = Exit::Fault { vector: 14, error, address: at(page) + rng.below(4096) as u64 };
            }
        }
        act
    }

    /// A call that may take a fast path.
    fn some_call(&mut self, rng: &mut Rng, guest: &Actor, which: usize) {
        match which {
            0 => self.updates(rng, guest),
            1 => self.call(Hypercall::UpdateVaMapping, [leaf_address(rng), leaf(rng, guest), rng.below(4) as u64, 0]),
            2 => {
                let tops = [page::STACK + 1, page::STACK + 1, page::DATA + 1, page::DATA + 2];
                let top = if rng.one_in(40) { page::L1 + 1 } else { rng.pick(&tops).unwrap_or(page::STACK + 1) };
                let top = at(top).wrapping_sub(if rng.one_in(6) { 8 } else { 0 });
                self.call(Hypercall::StackSwitch, [selector::GUEST_SS.into(), top, 0, 0]);
            }
            3 => {
                let base = if rng.one_in(4) { rng.word() } else { rng.word() >> 17 };
                self.call(Hypercall::SetSegmentBase, [rng.below(4) as u64 | rng.word() << 32, base, 0, 0]);
            }
            _ if rng.one_in(3) => self.one_operation(rng, guest),
            _ => self.roots(rng, guest, at(page::ARGS)),
        }
    }

    /// A list of calls: those that may take a fast path, and one that has none.
    fn multicall(&mut self, rng: &mut Rng, guest: &Actor) {
        let mut list = Vec::new();
        let most = if rng.one_in(8) { 40 } else { 5 };
        let count = 1 + rng.below(most);
        for _ in 0..count {
            let which = rng.below(5);
            self.some_call(rng, guest, which);
            let [number, rest @ ..] = self.entry();
            list.push(if rng.one_in(12) { Hypercall::XenVersion.number() } else { number });
            list.extend(rest);
        }
        let to = if rng.one_in(20) { page::L1 } else { page::MORE_ARGS };
        self.write(guest, at(page::MORE_ARGS), &list);
        self.call(Hypercall::Multicall, [at(to), count as u64, 0, 0]);
    }

    /// The call in the registers, as an entry of a list.
    fn entry(&self) -> [u64; 8] {
        let Registers { rax, rdi, rsi, rdx, r10, .. } = self.regs;
        [rax, u64::MAX, rdi, rsi, rdx, r10, 0, 0]
    }

    /// The list by which our patches of Linux switch to another process, often in one page with the roots.
    fn switch(&mut self, rng: &mut Rng, guest: &Actor) {
        let to = at(page::MORE_ARGS) + [0, 0, 0, 8, 4096 - 128, 4096 - 64][rng.below(6)];
        let operations = [at(page::MORE_ARGS) + 512, at(page::MORE_ARGS) + 512, at(page::ARGS)][rng.below(3)];
        self.roots(rng, guest, operations);
        let mut list = self.entry().to_vec();
        self.some_call(rng, guest, 2);
        list.extend(self.entry());
        if rng.one_in(8) {
            list[rng.below(16)] = rng.word() >> 40;
        }
        self.write(guest, to, &list);
        self.call(Hypercall::Multicall, [to, 2, 0, 0]);
    }

    /// An operation of `mmuext_op` alone.
    fn one_operation(&mut self, rng: &mut Rng, guest: &Actor) {
        use MmuextCommand as C;
        let command = [C::TlbFlushLocal, C::InvlpgLocal, C::TlbFlushLocal, C::PinL1, C::Unpin][rng.below(5)];
        let table = guest.pages[page::L1].number();
        let target = if command == C::InvlpgLocal { leaf_address(rng) } else { table };
        self.write(guest, at(page::ARGS), &[command as u64, target, 0]);
        self.call(Hypercall::MmuextOp, [at(page::ARGS), 1, 0, domid::SELF.into()]);
    }

    /// User code leaves: a system call, or a page fault.
    fn user(&mut self, rng: &mut Rng) {
        self.regs.rsp = rng.word() >> 17;
        if rng.one_in(2) {
            (self.regs.rip, self.regs.rcx) = (self.regs.rcx >> 17, self.regs.rcx >> 17);
            self.regs.r11 = self.regs.rflags;
            return;
        }
        let error = 4 | [0, 2, 3, 7, 16, 1][rng.below(6)] | if rng.one_in(1000) { 8 } else { 0 };
        self.exit = Exit::Fault { vector: 14, error, address: rng.word() >> 17 };
    }

    /// The upcall bytes change now and then.
    fn bytes(&mut self, rng: &mut Rng, ctx: &Context<'_>) {
        if let (Some((frame, at)), true) = (ctx.vcpu.record(), rng.one_in(4)) {
            let bytes = [0, 0, 0, 0x100, 0x001, 0x101, 0x200][rng.below(7)];
            self.written.push((frame, at / 8, bytes));
        }
    }

    fn call(&mut self, call: Hypercall, [a, b, c, d]: [u64; 4]) {
        let regs = &mut self.regs;
        (regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.r10) = (call.number(), a, b, c, d);
        (regs.rcx, regs.r11) = (regs.rip, regs.rflags);
    }

    fn write(&mut self, guest: &Actor, to: u64, values: &[u64]) {
        for (word, value) in ((to - BASE) as usize / 8..).zip(values) {
            self.written.push((guest.pages[word / 512], word % 512, *value));
        }
    }

    fn updates(&mut self, rng: &mut Rng, guest: &Actor) {
        if rng.one_in(6) {
            // The page of a stack becomes another one.
            let slot = guest.pages[page::L1].address() + 8 * [page::STACK, page::DATA][rng.below(2)] as u64;
            let to = guest.pages[page::DATA + rng.below(PAGES - page::DATA)];
            self.write(guest, at(page::ARGS), &[slot, to.address() | pte::PRESENT | pte::WRITE | pte::USER]);
            return self.call(Hypercall::MmuUpdate, [at(page::ARGS), 1, 0, domid::SELF.into()]);
        }
        if rng.one_in(8) {
            return self.long_list(rng, guest);
        }
        let count = if rng.one_in(2) { 1 } else { 1 + rng.below(40) };
        let mut requests = Vec::new();
        for _ in 0..count {
            // A flush for an upper table comes when a step of the call ends, and steps may be longer on the fast path.
            let upper = [page::L2, page::KERNEL_ROOT][rng.below(2)];
            let tables = [page::L1, page::L1, page::L1, page::DATA + 3, if count == 1 { upper } else { page::L1 }];
            let table = guest.pages[rng.pick(&tables).unwrap_or(page::L1)];
            let slot = if rng.one_in(100) { page::STACK + rng.below(500) } else { PAGES + rng.below(20) } as u64;
            // (The page of the list stays: it is read again where a step of the call begins.)
            let command = [0, 0, 2, 1][rng.below(4)] * u64::from(!rng.one_in(3));
            requests.extend([table.address() + 8 * slot + command, leaf(rng, guest)]);
        }
        self.write(guest, at(page::ARGS), &requests);
        let told = if rng.one_in(6) { at(page::MORE_ARGS) } else { 0 };
        let owner = if rng.one_in(10) { 3 } else { u64::from(domid::SELF) };
        self.call(Hypercall::MmuUpdate, [at(page::ARGS), count as u64, told, owner]);
    }

    /// A list as Linux makes it, which fast paths carry out as a whole: leaves of one table, for the guest's own data.
    fn long_list(&mut self, rng: &mut Rng, guest: &Actor) {
        let count = 1 + rng.below(255);
        let requests: Vec<u64> = (0..count)
            .flat_map(|_| {
                let slot = guest.pages[page::L1].address() + 8 * (PAGES + rng.below(20)) as u64;
                let data = guest.pages[page::DATA + 4 + rng.below(PAGES - page::DATA - 4)];
                let rights = pte::PRESENT | pte::USER | [0, pte::WRITE][rng.below(2)];
                [slot, if rng.one_in(3) { 0 } else { data.address() | rights }]
            })
            .collect();
        self.write(guest, at(page::ARGS), &requests);
        self.call(Hypercall::MmuUpdate, [at(page::ARGS), count as u64, 0, domid::SELF.into()]);
    }

    /// Both roots become others, by operations at this address.
    fn roots(&mut self, rng: &mut Rng, guest: &Actor, operations: u64) {
        let root = |rng: &mut Rng| {
            let pages = [page::KERNEL_ROOT, page::USER_ROOT, page::KERNEL_ROOT, page::USER_ROOT, page::L3];
            guest.pages[rng.pick(&pages).unwrap_or(0)].number()
        };
        let commands = [MmuextCommand::NewBaseptr as u64, MmuextCommand::NewUserBaseptr as u64];
        let second = if rng.one_in(60) { 0 } else { root(rng) };
        self.write(guest, operations, &[commands[0], root(rng), 0, commands[usize::from(!rng.one_in(6))], second, 0]);
        self.call(Hypercall::MmuextOp, [operations, 2 - u64::from(rng.one_in(8)), 0, domid::SELF.into()]);
    }

    /// The way back, to the kernel or to user code, most often from where Linux has its frame.
    fn back(&mut self, rng: &mut Rng, ctx: &Context<'_>) {
        let top = ctx.state.kernel_sp;
        let sp = if rng.one_in(8) { self.regs.rsp } else { top.wrapping_sub(72) };
        let cs = [0xe033, 0xe033, 0xe033, 0xe030, 0x33, 0xe031][rng.below(6)];
        let rflags = 0x202 ^ if rng.one_in(4) { 0x200 } else { 0 } ^ rng.word() & 0xcd5 & !flags::TF;
        let how = if rng.one_in(5) { 0x100 } else { 0 };
        let user = cs & 3 == 3 || rng.one_in(30);
        let rsp = if user { rng.word() >> 17 } else { top.wrapping_sub(8 * rng.below(40) as u64) };
        let frame = [rng.word(), rng.word(), rng.word(), how, rng.word() >> 17, cs, rflags, rsp, 0xe02b];
        let inside = (BASE..=at(PAGES) - 72).contains(&sp) && sp & 7 == 0;
        // Into the page that is there, whichever it is.
        if inside && let Some(root) = ctx.state.kernel_root {
            for (n, value) in frame.iter().enumerate() {
                let to = GuestVirt(sp + 8 * n as u64);
                let path = claim::walk(ctx.m, &ctx.world.frames, root, to).filter(|path| path.writable);
                if let Some(frame) = path.and_then(|path| path.frame()) {
                    self.written.push((frame, to.offset() / 8, *value));
                }
            }
        }
        self.regs.rsp = sp;
        self.call(Hypercall::Iret, [self.regs.rdi, self.regs.rsi, self.regs.rdx, self.regs.r10]);
    }

    /// A write to the L1 table, by an instruction of one of the kinds that kernels use, or of another.
    fn table_write(&mut self, rng: &mut Rng, guest: &Actor) {
        const CODE: [&[u8]; 8] = [
            &[0x48, 0x89, 0x07],                   // mov [rdi], rax
            &[0x48, 0x87, 0x07],                   // xchg [rdi], rax
            &[0xf0, 0x48, 0x0f, 0xb1, 0x17],       // lock cmpxchg [rdi], rdx
            &[0x3e, 0x80, 0x27, 0xfd],             // and byte [rdi], 0xfd, once a lock
            &[0xf0, 0x48, 0x0f, 0xba, 0x37, 0x06], // lock btr [rdi], 6
            &[0x89, 0x07],                         // mov [rdi], eax
            &[0x48, 0x09, 0x07],                   // or [rdi], rax
            &[0, 0, 0, 0, 0, 0, 0, 0],
        ];
        let code = CODE[rng.below(CODE.len())];
        let mut bytes = [0x90; 16];
        let skew = (self.regs.rip & 7) as usize;
        bytes[skew..skew + code.len()].copy_from_slice(code);
        let words = [0, 8].map(|n| u64::from_le_bytes(bytes[n..n + 8].try_into().expect("eight")));
        self.write(guest, self.regs.rip & !7, &words);
        let slot = if rng.one_in(60) { 0 } else { PAGES + rng.below(20) } as u64;
        let address = at(page::L1) + 8 * slot + if rng.one_in(8) { rng.below(8) as u64 } else { 0 };
        (self.regs.rdi, self.regs.rax) = (address, leaf(rng, guest));
        self.regs.rdx = leaf(rng, guest);
        self.exit = Exit::Fault { vector: 14, error: 7, address };
    }

    /// Carries it out in one of the worlds.
    fn done(&self, ctx: &mut Context<'_>) -> Did {
        for (frame, word, value) in &self.written {
            ctx.m.poke(*frame, *word, *value);
        }
        let kernel = ctx.state.kernel_mode;
        if trap::prepare(ctx).is_err() || ctx.state.kernel_mode != kernel {
            return Did::Long; // an event has come first
        }
        let (mut runs, mut entered) = (0, false);
        let end = lean::run(ctx, |ctx, _| {
            runs += 1;
            let mut exit = Exit::Interrupt(Interrupt::Other);
            assert!(runs == 1 || !ctx.world.upcall_due(ctx.m, ctx.vcpu), "an event waits, and the guest goes on");
            if runs > 1 {
                know_all(ctx);
            }
            if runs == 1 {
                ctx.state.regs = self.regs;
                entered = enters(ctx, self.exit);
                exit = if entered { exit } else { self.exit };
            }
            ctx.m.keep_exit(&mut ctx.state.regs, exit);
        });
        let long = runs == 1 && !entered && end == End::Exit;
        if long {
            let _ = trap::handle(ctx, self.exit); // a domain that has crashed does not run
        }
        for _ in 0..ENDLESS {
            if ctx.state.call.is_none() || !ctx.domain.runs() {
                break;
            }
            let _ = dispatch::step(ctx);
        }
        if ctx.domain.runs() {
            let _ = trap::prepare(ctx);
        }
        match (entered, long) {
            (true, _) => Did::Entered,
            (_, true) => Did::Long,
            _ => Did::Short,
        }
    }
}

/// After a fast path, the entry code knows the roots, and where the stack is.
fn know_all(ctx: &Context<'_>) {
    let (entry, own) = (ctx.m.entry(), &ctx.state);
    if !matches!(value(&entry.mode), mode::USER | mode::KERNEL) {
        return;
    }
    let (sp, root) = (own.kernel_sp.wrapping_sub(72), own.kernel_root.expect("it runs"));
    let page = claim::walk(ctx.m, &ctx.world.frames, root, GuestVirt(sp)).and_then(|path| path.frame());
    let known = [&entry.kernel_cr3, &entry.user_cr3, &entry.back_sp].map(value);
    assert_eq!(known, [root.address(), own.user_root.map_or(0, Frame::address), sp]);
    assert_eq!(Frame::containing(value(&entry.back)), page, "the page of the stack");
}

/// Compares the worlds: the vcpu, the CPU, all memory and the words of all frames.
fn compare(one: &Context<'_>, other: &Context<'_>) -> Result<(), String> {
    // What was in RCX and R11 may be lost where the guest has no use for it; the last error word is nobody's.
    let lost = one.may_sysret || other.may_sysret;
    let vcpu = |ctx: &Context<'_>| {
        let own = &ctx.state;
        let mut regs = Registers { error: 0, scratch: 0, ..own.regs };
        if lost {
            (regs.rcx, regs.r11) = (0, 0);
        }
        let roots = [own.kernel_root, own.user_root];
        let waits = (own.trap, own.nmi_masked, own.nmi_pending, own.areas_stale, own.call.is_some());
        (regs, own.kernel_mode, roots, own.kernel_sp, own.kernel_ss, own.cr2, waits)
    };
    let cpu = |ctx: &Context<'_>| {
        let loaded = ctx.m.loaded().clone();
        let gs = value(&ctx.m.entry().other_gs);
        (loaded.root, loaded.fs_base, loaded.gs_base, gs, ctx.m.flushes(), ctx.domain.runs())
    };
    if vcpu(one) != vcpu(other) {
        return Err(format!("{:x?}\n, but {:x?}", vcpu(one), vcpu(other)));
    }
    if cpu(one) != cpu(other) {
        return Err(format!("{:x?}, but {:x?}", cpu(one), cpu(other)));
    }
    compare_memory((one.m, &one.world.frames), (other.m, &other.world.frames))
}

/// Compares all memory and the words of all frames.
pub(super) fn compare_memory(
    (one, frames): (&WholeMachine, &FrameTable),
    (other, other_frames): (&WholeMachine, &FrameTable),
) -> Result<(), String> {
    let words = |(m, frames): (&WholeMachine, &FrameTable), frame| {
        let mut info = frames.info(frame);
        if let Some(info) = &mut info {
            info.kind.turn = 0; // a batch holds a page once, and not once for each request
        }
        (info, frames.stamped(frame), m.m2p(frame))
    };
    for frame in (0..one.frame_limit()).filter_map(Frame::new) {
        let (mine, others) = (words((one, frames), frame), words((other, other_frames), frame));
        if mine != others {
            return Err(format!("{frame:?} is {mine:?}, but {others:?}"));
        }
        if !one.words(frame, |mine| other.words(frame, |others| mine == others)) {
            let differ = (0..512).find(|at| one.peek(frame, *at) != other.peek(frame, *at)).unwrap_or(0);
            let [mine, others] = [one, other].map(|m| m.peek(frame, differ));
            return Err(format!("word {differ} of {frame:?} is {mine:#x}, but {others:#x}"));
        }
    }
    Ok(())
}

/// An entry for an L1 table: to one of the guest's pages, most often, with rights as they come.
fn leaf(rng: &mut Rng, guest: &Actor) -> u64 {
    if rng.one_in(4) {
        return if rng.one_in(2) { 0 } else { rng.word() & !pte::PRESENT };
    }
    let some = if rng.one_in(6) { rng.below(PAGES) } else { page::DATA + rng.below(PAGES - page::DATA) };
    let frame = if rng.one_in(30) { Frame::from_u32(rng.below(MEMORY) as u32) } else { guest.pages[some] };
    let rights = [pte::PRESENT, pte::PRESENT | pte::WRITE][rng.below(2)] | if rng.one_in(8) { 0 } else { pte::USER };
    frame.address() | rights | if rng.one_in(3) { pte::ACCESSED | pte::DIRTY } else { 0 } | (rng.word() & pte::NX)
}

fn leaf_address(rng: &mut Rng) -> u64 {
    at(if rng.one_in(40) { rng.below(600) } else { PAGES + rng.below(20) })
}

/// RDMSR or WRMSR of a segment base.
fn segment_base(rng: &mut Rng, regs: &mut Registers, written: &mut Vec<(Frame, usize, u64)>, guest: &Actor) -> Exit {
    let code: u64 = if rng.one_in(2) { 0x320f } else { 0x300f };
    regs.rip &= !7;
    let word = (regs.rip - BASE) as usize / 8;
    written.push((guest.pages[word / 512], word % 512, code));
    regs.rcx = 0xc000_0100 + rng.below(4) as u64;
    if rng.one_in(2) {
        regs.rdx &= 0x7fff;
    }
    Exit::Fault { vector: 13, error: 0, address: 0 }
}
