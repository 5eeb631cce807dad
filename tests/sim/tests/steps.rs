//! Calls that need many steps come to an end, and nobody waits for them (P8).

use hv_core::addr::{Frame, VcpuId};
use hv_core::domain::Powers;
use hv_core::machine::{Arrived, Exit, Interrupt};
use hv_core::sched::SLICE;
use hv_core::sched::life::{self, Runner, Step};
use hv_core::world::CpuCtx;
use hypercall_abi::event::{BindVirq, EventOp, Virq};
use hypercall_abi::mmu::{MmuUpdate, MulticallEntry, pte};
use hypercall_abi::vcpu::VcpuOp;
use hypercall_abi::{Hypercall, domid};
use sim::world::Context;
use sim::world::build::{self, at, page};
use sim::world::machine::{self, WholeMachine};
use sim::world::script::{Actor, Stage, tell};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering::Relaxed;

/// How long a step of the call takes, in nanoseconds.
const STEP: u64 = 50_000;
const TABLE: u64 = pte::PRESENT | pte::WRITE | pte::USER | pte::ACCESSED;

/// Changes an entry of the guest's one L1 table.
fn show(stage: &mut Stage, guest: &Actor, slot: usize, entry: u64) {
    let ptr = guest.pages[page::L1].address() + slot as u64 * 8;
    let list = stage.put(guest, 0, &MmuUpdate { ptr, val: entry });
    let went = stage.call(guest, Hypercall::MmuUpdate, &[list, 1, 0, u64::from(domid::SELF)]);
    assert_eq!(went.result, Ok(0), "slot {slot} <- {entry:#x}");
}

/// The frames that a guest can have as pages of descriptors, once nothing maps them for writing.
fn descriptor_pages(stage: &mut Stage, guest: &Actor) -> Vec<Frame> {
    let pages = page::GDT..page::GDT + 14;
    pages.clone().for_each(|n| show(stage, guest, n, 0));
    pages.map(|n| guest.pages[n]).collect()
}

/// The frames of a table were all taken within the budget of one step, and given back when that was too little: a table of
/// 9 frames or more started over for ever (ABI core 3.10).
#[test]
fn a_gdt_of_any_size_is_taken() {
    for count in [1, 8, 9, 14] {
        tell(200, move |stage| {
            let guest = stage.enter(false);
            let frames = descriptor_pages(stage, &guest);
            let numbers: Vec<u64> = frames.iter().take(count).map(|frame| frame.number()).collect();
            let list =
                stage.put(&guest, 1024, &<[u64; 14]>::try_from([&numbers[..], &[0; 14][count..]].concat()).unwrap());
            let went = stage.call(&guest, Hypercall::SetGdt, &[list, count as u64 * 512]);
            assert_eq!((went.result, went.steps), (Ok(0), 1), "{count} frames");
            assert!(frames.iter().take(count).all(|frame| stage.world.frames.holds_descriptors(*frame)));
        });
    }
}

/// A tree of tables whose judgement takes more than one step: a root, and 9 L1 tables.
fn long_tree(stage: &Stage, guest: &Actor, pfn: u64) -> Frame {
    let more: Vec<Frame> = (pfn..pfn + 12)
        .map(|pfn| stage.world.frames.populate(stage.m, guest.id, 0, pfn, 100).expect("there is room"))
        .collect();
    let link = |table: Frame, slot: usize, to: Frame| stage.m.poke(table, slot, to.address() | TABLE);
    link(more[0], 0, more[1]);
    link(more[1], 0, more[2]);
    (3..12).for_each(|n| link(more[2], n, more[n]));
    more[0]
}

/// The first root of a new vcpu went back whenever the second took another step, and was judged again: for ever.
#[test]
fn a_vcpu_may_start_with_two_long_roots() {
    tell(300, |stage| {
        let guest = stage.enter(false);
        stage.domain(&guest).max_pages.store(100, Relaxed);
        let roots = [long_tree(stage, &guest, 100), long_tree(stage, &guest, 112)];
        let mut context = build::context(&guest.pages);
        (context.ctrlreg[3], context.ctrlreg[1]) = (roots[0].address(), roots[1].address());
        let gdt = descriptor_pages(stage, &guest);
        context.gdt_ents = 14 * 512;
        context.gdt_frames[..14].iter_mut().zip(&gdt).for_each(|(number, frame)| *number = frame.number());
        let arg = stage.put(&guest, 0, &context);
        let went = stage.call(&guest, Hypercall::VcpuOp, &[VcpuOp::Initialise.number(), 1, arg]);
        assert_eq!(went.result, Ok(0));
        assert!((4..=6).contains(&went.steps), "{went:?}");
        let vcpu = stage.world.vcpu(stage.domain(&guest), VcpuId(1)).expect("it has two");
        let own = vcpu.state.try_take().expect("nobody has it");
        assert_eq!([own.kernel_root, own.user_root], roots.map(Some));
    });
}

/// One guest makes a call that takes minutes, another waits for the machine's console.
struct Caller {
    waits: Option<hv_core::addr::DomainId>,
    list: u64,
    count: u64,
    /// Steps of the call so far.
    steps: u64,
    /// The key that was typed after this many, and after how many more the other guest ran.
    typed: u64,
    heard: Option<u64>,
}

impl Runner<WholeMachine> for Caller {
    fn run(&mut self, ctx: &mut Context<'_>) -> Option<Exit> {
        let regs = &mut ctx.state.regs;
        if Some(ctx.domain.id()) == self.waits {
            if self.steps > self.typed {
                self.heard.get_or_insert(self.steps - self.typed);
            }
            (regs.rax, regs.rdi) = (Hypercall::SchedOp.number(), 1); // block
        } else {
            (regs.rax, regs.rdi, regs.rsi) = (Hypercall::Multicall.number(), self.list, self.count);
        }
        Some(Exit::Syscall)
    }

    fn seen(&mut self, ctx: &mut Context<'_>, what: Step) -> ControlFlow<()> {
        if matches!(what, Step::Call(_)) && Some(ctx.domain.id()) != self.waits {
            self.steps += 1;
            ctx.m.pass(STEP);
            if self.steps == self.typed {
                ctx.m.type_key();
            }
        }
        let over = self.heard.is_some() || self.steps > self.typed && ctx.state.call.is_none();
        if over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, WholeMachine>) -> ControlFlow<(), Arrived> {
        match cpu_ctx.m.idle().unwrap_or(Interrupt::Kick) {
            Interrupt::Kick => panic!("nobody wants to run"),
            interrupt => ControlFlow::Continue(machine::arrived(interrupt)),
        }
    }
}

/// An unfinished call was stepped on without letting an interrupt in: a list of calls as long as a guest likes, all of its
/// pages being the same one, kept a key from dom0 until it was over.
#[test]
fn a_key_is_heard_while_a_call_goes_on() {
    const PAGES: u16 = 400;
    tell(300, |stage| {
        let [guest, dom0] = [stage.enter(false), stage.enter(true)];
        assert!(stage.domain(&dom0).may(Powers::CONSOLE_READ));
        let virq = BindVirq { virq: Virq::Console as u32, ..Default::default() };
        let arg = stage.put(&dom0, 0, &virq);
        let went = stage.call(&dom0, Hypercall::EventChannelOp, &[EventOp::BindVirq.number(), arg]);
        assert_eq!(went.result, Ok(0));
        // Events are let in, and every page from here on shows the same list.
        let shared = stage.domain(&dom0).shared_info().expect("it has one");
        (0x140..0x180).for_each(|word| stage.m.poke(shared, word, 0));
        let version = MulticallEntry { op: Hypercall::XenVersion.number(), result: -1, args: [0; 6] };
        let list = page::MORE_ARGS;
        stage.put(&guest, (list - page::ARGS) as u64 * 4096, &[version; 64]);
        let first = build::PAGES;
        for slot in first..first + usize::from(PAGES) {
            show(stage, &guest, slot, guest.pages[list].address() | TABLE | pte::DIRTY);
        }
        let (list, count) = (at(first), u64::from(PAGES) * 64);
        let mut caller = Caller { waits: Some(dom0.id), list, count, steps: 0, typed: 20, heard: None };
        life::live(&mut stage.cpu_ctx(), &mut caller);
        let heard = caller.heard.expect("dom0 hears of the key before the call is over");
        assert!(heard <= SLICE / STEP + 1, "{heard} steps later: longer than the slice of the guest that calls");
        sim::tell(format_args!(
            "a key is heard {heard} steps after it was typed, in a call of {} and more",
            caller.steps
        ));
    });
}

/// The only guest yields in a list of calls.
struct Yielding {
    list: u64,
    count: u64,
    steps: u64,
    /// How many steps after it was typed the key was heard.
    heard: Option<u64>,
}

/// After so many steps a key is typed.
const TYPED: u64 = 10;

impl Runner<WholeMachine> for Yielding {
    fn run(&mut self, ctx: &mut Context<'_>) -> Option<Exit> {
        let regs = &mut ctx.state.regs;
        (regs.rax, regs.rdi, regs.rsi) = (Hypercall::Multicall.number(), self.list, self.count);
        Some(Exit::Syscall)
    }

    fn seen(&mut self, ctx: &mut Context<'_>, what: Step) -> ControlFlow<()> {
        if matches!(what, Step::Call(_)) {
            self.steps += 1;
            if self.steps > TYPED && !ctx.m.has_typed() {
                self.heard.get_or_insert(self.steps - TYPED);
            }
            if self.steps == TYPED {
                ctx.m.type_key();
            }
        }
        let over = self.steps > TYPED && ctx.state.call.is_none();
        if over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn idle(&mut self, _: &mut CpuCtx<'_, WholeMachine>) -> ControlFlow<(), Arrived> {
        panic!("nobody wants to run")
    }
}

/// A list of yields kept interrupts out for as long as it was: each step of it ended with the vcpu leaving its CPU, to which it
/// came back at once, and interrupts were let in only after a step after which it stayed.
#[test]
fn a_key_is_heard_while_a_list_of_yields_goes_on() {
    tell(300, |stage| {
        let guest = stage.enter(false);
        let entry = MulticallEntry { op: Hypercall::SchedOp.number(), result: -1, args: [0; 6] };
        let list = stage.put(&guest, 0, &[entry; 50]);
        stage.world.unpause(stage.m, stage.domain(&guest));
        let mut yielding = Yielding { list, count: 50, steps: 0, heard: None };
        life::live(&mut stage.cpu_ctx(), &mut yielding);
        assert_eq!((yielding.heard, yielding.steps), (Some(1), 50), "steps later, of so many");
    });
}
