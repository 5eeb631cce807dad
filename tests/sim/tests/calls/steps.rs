//! Calls that take several steps.

use hv_core::addr::{Frame, VcpuId};
use hv_core::call::{Call, Next};
use hv_core::domain::ops;
use hv_core::lock::Held;
use hv_core::machine::{Clock, Exit, Frames};
use hv_core::world::{CpuCtx, Ctx};
use hv_core::{dispatch, trap};
use hypercall_abi::domctl::{Domctl, DomctlOp, INTERFACE_VERSION};
use hypercall_abi::memory::{MemoryOp, Reservation};
use hypercall_abi::mmu::{MmuextCommand, MmuextOp, MulticallEntry, pte};
use hypercall_abi::sched::SchedOp;
use hypercall_abi::{Hypercall, domid};
use sim::world::audit::On;
use sim::world::build::{self, at, page};
use sim::world::script::tell;
use std::sync::atomic::Ordering::Relaxed;

/// 64 extents of 512 frames were zeroed in one step: 128 MiB with interrupts off (P8; XSA-31, XSA-158).
#[test]
fn large_extents_come_one_in_a_step() {
    tell(4096, |stage| {
        let guest = stage.enter(false);
        stage.domain(&guest).max_pages.store(4096, Relaxed);
        let extent_start = stage.put(&guest, 256, &[0u64, 512, 1024, 1536]);
        let reservation =
            Reservation { extent_start, nr_extents: 4, extent_order: 9, domid: domid::SELF, ..Default::default() };
        let arg = stage.put(&guest, 0, &reservation);
        let went = stage.call(&guest, Hypercall::MemoryOp, &[MemoryOp::PopulatePhysmap as u64, arg]);
        assert_eq!((went.result, went.steps), (Ok(4), 4));
        assert!(went.longest < 50_000, "{went:?}");
    });
}

/// Lists went on though the timer was due: each of their elements may be as long as a call (P8; XSA-27).
#[test]
fn lists_pause_when_the_timer_is_due() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let flush = MmuextOp { cmd: MmuextCommand::TlbFlushLocal as u32, ..Default::default() };
        let ops = stage.put(&guest, 0, &[flush; 8]);
        stage.world.sched.here(stage.m).arm_by(stage.m, stage.m.now());
        let went = stage.call(&guest, Hypercall::MmuextOp, &[ops, 8, 0, u64::from(domid::SELF)]);
        assert_eq!((went.result, went.steps), (Ok(0), 8));
        let args = [ops, 1, 0, u64::from(domid::SELF), 0, 0];
        let entry = MulticallEntry { op: Hypercall::MmuextOp.number(), result: -1, args };
        let list = stage.put(&guest, 1024, &[entry; 8]);
        let went = stage.call(&guest, Hypercall::Multicall, &[list, 8]);
        assert_eq!((went.result, went.steps), (Ok(0), 8));
    });
}

/// A call that another CPU's pause came into was dropped: its vcpu went on without an answer, and without the rest.
#[test]
fn a_call_goes_on_after_a_pause() {
    tell(5000, |stage| {
        let [guest, dom0] = [stage.enter(false), stage.enter(true)];
        stage.domain(&guest).max_pages.store(8192, Relaxed);
        let extent_start = stage.put(&guest, 256, &[0u64, 512, 1024, 1536]);
        let reservation =
            Reservation { extent_start, nr_extents: 4, extent_order: 9, domid: domid::SELF, ..Default::default() };
        let arg = stage.put(&guest, 0, &reservation);
        let args = [MemoryOp::PopulatePhysmap as u64, arg, 0, 0, 0, 0];
        let list = stage.put(&guest, 512, &MulticallEntry { op: Hypercall::MemoryOp.number(), result: -1, args });
        let domctl = |cmd: DomctlOp| Domctl {
            cmd: cmd as u32,
            interface_version: INTERFACE_VERSION,
            domain: guest.id.0,
            ..Default::default()
        };
        let pause = stage.put(&dom0, 0, &domctl(DomctlOp::PauseDomain));
        let (d0, world, m) = (stage.domain(&dom0), stage.world, stage.m);
        for (calls, number, first, second) in
            [(1, Hypercall::MemoryOp, args[0], arg), (2, Hypercall::Multicall, list, 1)]
        {
            stage.on_cpu(&guest, |ctx, _| {
                (ctx.state.regs.rax, ctx.state.regs.rdi, ctx.state.regs.rsi) = (number.number(), first, second);
                let _ = trap::handle(ctx, Exit::Syscall);
                let _ = dispatch::step(ctx);
                let vcpu = world.vcpu(d0, VcpuId(0)).expect("it has one");
                let mut own = vcpu.state.try_take().expect("nobody has it");
                let mut cpu_ctx = CpuCtx { m, world, held: &mut Held::entering_ring_0() };
                let mut other = Ctx::new(&mut cpu_ctx, d0, vcpu, &mut own);
                assert_eq!(
                    ops::domctl(&mut other, &mut Call::new(Hypercall::Domctl.number(), [pause, 0, 0, 0, 0, 0])),
                    Ok(0)
                );
                let mut steps = 1;
                while ctx.state.call.is_some() {
                    let _ = dispatch::step(ctx);
                    steps += 1;
                    if steps == 2 {
                        world.unpause(m, ctx.domain);
                    }
                }
                assert!(steps >= 4, "{number:?}: {steps}");
                assert_eq!(ctx.state.regs.rax, if number == Hypercall::MemoryOp { 4 } else { 0 });
            });
            let owned = stage.world.frames.owned(guest.id);
            assert_eq!(owned as usize, build::PAGES + calls * 4 * 512);
        }
    });
}

/// A root that takes more than one step to judge was a fault for the guest that loaded it (ABI core 3.9).
#[test]
fn a_root_may_be_loaded_in_several_steps() {
    tell(300, |stage| {
        let guest = stage.enter(false);
        stage.domain(&guest).max_pages.store(100, Relaxed);
        let more: Vec<Frame> = (100..112)
            .map(|pfn| stage.world.frames.populate(stage.m, guest.id, 0, pfn, 100).expect("there is room"))
            .collect();
        let link = |table: Frame, slot: usize, to: Frame| {
            stage.m.poke(table, slot, to.address() | pte::PRESENT | pte::WRITE | pte::USER);
        };
        link(more[0], 0, more[1]);
        link(more[1], 0, more[2]);
        (3..12).for_each(|n| link(more[2], n, more[n]));
        let code = stage.domain(&guest); // its root shows the code until the new one is loaded
        assert!(code.runs());
        stage.m.write(guest.pages[page::CODE], 0, &[0x0f, 0x22, 0xd8]); // mov cr3, rax
        stage.on_cpu(&guest, |ctx, audit| {
            let mut tries = 0;
            while ctx.state.regs.rip == at(page::CODE) {
                ctx.state.regs.rax = more[0].address();
                let _ = trap::handle(ctx, Exit::Fault { vector: 13, error: 0, address: 0 });
                assert_eq!(ctx.state.trap, None);
                audit.look(ctx.m, ctx.world, &[On::stage(ctx)]).unwrap();
                tries += 1;
            }
            assert_eq!((ctx.state.kernel_root, tries), (Some(more[0]), 2));
        });
    });
}

/// A vcpu that blocks in a list of calls leaves its CPU before the next entry.
#[test]
fn an_entry_that_blocks_ends_the_step() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let entry = |op: Hypercall, first| MulticallEntry { op: op.number(), result: -1, args: [first, 0, 0, 0, 0, 0] };
        let entries = [entry(Hypercall::SchedOp, SchedOp::Yield as u64), entry(Hypercall::StackSwitch, 0)];
        let list = stage.put(&guest, 512, &entries);
        stage.on_cpu(&guest, |ctx, _| {
            let regs = &mut ctx.state.regs;
            (regs.rax, regs.rdi, regs.rsi) = (Hypercall::Multicall.number(), list, 2);
            let _ = trap::handle(ctx, Exit::Syscall);
            assert_eq!(dispatch::step(ctx), Next::Leave);
            let results = |ctx: &Ctx<'_, _>| {
                ctx.read::<[MulticallEntry; 2]>(list).expect("it is mapped").map(|entry| entry.result)
            };
            assert_eq!((ctx.state.call.is_some(), results(ctx)), (true, [0, -1]));
            assert_eq!(dispatch::step(ctx), Next::Stay);
            assert_eq!((ctx.state.call.is_some(), results(ctx)), (false, [0, 0]));
        });
    });
}
