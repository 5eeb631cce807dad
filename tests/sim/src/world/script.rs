//! A stage for told stories: domains that do one thing at a time, with an audit after each step.

use super::Context;
use super::audit::{Audit, On};
use super::build::{self, at, page};
use super::machine::WholeMachine;
use super::turns::as_cpu;
use hv_core::addr::{DomainId, Frame, GuestVirt, VcpuId};
use hv_core::claim::GuestMemory;
use hv_core::domain::life::kept_frames;
use hv_core::domain::{Domain, Powers, Spec};
use hv_core::frame::table::WORDS;
use hv_core::lock::{Held, Nothing};
use hv_core::machine::Exit;
use hv_core::sched::switch;
use hv_core::world::{CpuCtx, Ctx, World};
use hv_core::{dispatch, trap};
use hypercall_abi::{Errno, Hypercall};
use std::sync::atomic::AtomicU64;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Steps of a call after which it is taken for one that never ends.
const ENDLESS: u64 = 2_000;

/// A world for one test.
pub struct Stage {
    /// Its machine.
    pub m: &'static WholeMachine,
    /// The rules.
    pub world: &'static World,
    held: Held<Nothing>,
    audit: Audit,
}

/// A domain on the stage.
#[derive(Clone, Debug)]
pub struct Actor {
    /// Its number.
    pub id: DomainId,
    /// Its first pages, see [`page`].
    pub pages: Vec<Frame>,
}

/// How a call went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Went {
    /// Its result.
    pub result: Result<u64, Errno>,
    /// Steps it took.
    pub steps: u64,
    /// Most looks at memory, and at words of the frame table, in one of them.
    pub longest: u64,
}

/// Domains for which a stage has what is set aside for each, besides the frames that a story asks for.
const ACTORS: usize = 6;

/// Tells a story on a thread with room for a world, whose domains can have so many frames of memory.
pub fn tell(memory: usize, story: impl FnOnce(&mut Stage) + Send + 'static) {
    tell_on(memory, WholeMachine::new, story);
}

/// The same on a machine of two CPUs, of which the story says what each does.
pub fn tell_of_two(memory: usize, story: impl FnOnce(&mut Stage) + Send + 'static) {
    tell_on(memory, WholeMachine::for_two, |stage| {
        let (m, world) = (stage.m, stage.world);
        (0..m.cpu_count()).for_each(|cpu| as_cpu(cpu, || world.sched.join(m)));
        m.looks_at(world);
        story(stage);
    });
}

fn tell_on(memory: usize, machine: fn(usize) -> WholeMachine, story: impl FnOnce(&mut Stage) + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(64 << 20);
    let thread = thread.spawn(move || story(&mut Stage::new(memory, machine)));
    if let Err(panic) = thread.expect("a thread").join() {
        std::panic::resume_unwind(panic);
    }
}

impl Stage {
    /// A world on such a machine, whose domains can have so many frames of memory.
    pub fn new(memory: usize, machine: fn(usize) -> WholeMachine) -> Self {
        let frames = memory + ACTORS * kept_frames(2) as usize;
        let m: &'static WholeMachine = Box::leak(Box::new(machine(frames)));
        let world: &'static World = Box::leak(Box::new(World::new()));
        let words: Vec<AtomicU64> = (0..frames * WORDS).map(|_| AtomicU64::new(0)).collect();
        world.frames.init(words.leak());
        world.frames.reserve(Frame::from_u32(0), 1);
        world.frames.add(Frame::from_u32(1), frames as u32 - 1);
        Self { m, world, held: Held::entering_ring_0(), audit: Audit::new(frames) }
    }
}

impl Stage {
    /// A domain that runs, with two vcpus; `control`: with every power.
    pub fn enter(&mut self, control: bool) -> Actor {
        let powers = if control { Powers::all() } else { Powers::empty() };
        let spec = Spec { id: None, powers, vcpus: 2, max_pages: 0, handle: [9; 16] };
        let id = self.cpu_ctx().create(&spec).map(Domain::id).expect("room for a domain");
        let domain = self.world.domain(id).expect("it lives");
        let pages = build::build(self.m, self.world, &mut self.held, domain, 1).expect("room for its pages");
        Actor { id: domain.id(), pages }
    }

    /// The domain behind an actor.
    #[must_use]
    pub fn domain(&self, actor: &Actor) -> &'static Domain {
        self.world.domain(actor.id).expect("it lives")
    }

    /// Where its rules are carried out.
    pub fn cpu_ctx(&mut self) -> CpuCtx<'_, WholeMachine> {
        CpuCtx { m: self.m, world: self.world, held: &mut self.held }
    }

    /// Puts a structure into the argument page at an offset; says where.
    pub fn put<T: IntoBytes + Immutable>(&mut self, actor: &Actor, offset: u64, value: &T) -> u64 {
        let to = at(page::ARGS) + offset;
        let view = GuestMemory::new(self.m, &self.world.frames, actor.pages[page::KERNEL_ROOT]);
        view.write(GuestVirt(to), value).expect("the argument page is mapped");
        to
    }

    /// Reads a structure back.
    #[must_use]
    pub fn get<T: FromBytes + IntoBytes>(&self, actor: &Actor, from: u64) -> T {
        let view = GuestMemory::new(self.m, &self.world.frames, actor.pages[page::KERNEL_ROOT]);
        view.read(GuestVirt(from)).expect("it is mapped")
    }

    /// Vcpu 0 of a domain comes to the CPU, does something, and leaves.
    pub fn on_cpu<R>(&mut self, actor: &Actor, what: impl FnOnce(&mut Context<'_>, &mut Audit) -> R) -> R {
        let domain = self.domain(actor);
        let vcpu = self.world.vcpu(domain, VcpuId(0)).expect("it has one");
        let mut own = vcpu.state.try_take().expect("nobody has it");
        let mut cpu_ctx = CpuCtx { m: self.m, world: self.world, held: &mut self.held };
        let mut ctx = Ctx::new(&mut cpu_ctx, domain, vcpu, &mut own);
        switch::arrive(&mut ctx).expect("its segment registers load");
        let result = what(&mut ctx, &mut self.audit);
        switch::depart(&mut ctx);
        result
    }

    /// A call from start to end.
    pub fn call(&mut self, actor: &Actor, call: Hypercall, args: &[u64]) -> Went {
        self.on_cpu(actor, |ctx, audit| {
            let arg = |n: usize| args.get(n).copied().unwrap_or(0);
            ctx.state.regs.rax = call.number();
            let regs = &mut ctx.state.regs;
            [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = [0, 1, 2, 3, 4, 5].map(arg);
            let _ = trap::handle(ctx, Exit::Syscall);
            let (mut steps, mut longest) = (0, 0);
            while ctx.state.call.is_some() {
                let before = ctx.m.work_with(&ctx.world.frames);
                let _ = dispatch::step(ctx);
                longest = longest.max(ctx.m.work_with(&ctx.world.frames) - before);
                steps += 1;
                assert!(steps <= ENDLESS, "{}{args:x?}: {steps} steps, and no end", call.name());
                if let Err(why) = audit.look(ctx.m, ctx.world, &[On::stage(ctx)]) {
                    panic!("{}{args:x?}: {why}", call.name());
                }
            }
            Went { result: Errno::from_rax(ctx.state.regs.rax), steps, longest }
        })
    }
}
