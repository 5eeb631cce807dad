//! What a domain's kernel was refused is kept for the toolstack, so that no guest dies without a word.

use hv_core::machine::{Exit, Frames};
use hv_core::trap;
use hypercall_abi::mmu::{MmuUpdate, MulticallEntry, pte};
use hypercall_abi::tenon::{Refusal, RefusalKind, Refusals, TenonOp};
use hypercall_abi::{Errno, Hypercall, domid};
use sim::world::build::{at, page};
use sim::world::script::{Actor, Stage, tell};

const GP: u8 = 13;

/// What a toolstack is told.
fn told(stage: &mut Stage, dom0: &Actor, of: &Actor) -> Vec<Refusal> {
    let to = stage.put(dom0, 0, &Refusals::default());
    let went = stage.call(dom0, Hypercall::Tenon, &[TenonOp::Refusals.number(), of.id.0.into(), to]);
    assert_eq!(went.result, Ok(0));
    let told: Refusals = stage.get(dom0, to);
    told.list[..usize::try_from(told.count).expect("a few")].to_vec()
}

fn call(number: u64, args: [u64; 2], errno: Errno, times: u32) -> Refusal {
    Refusal { kind: RefusalKind::Call as u32, vcpu: 0, errno: errno as u32, times, number, args }
}

#[test]
fn refused_calls_are_told_with_what_they_asked_for() {
    tell(300, |stage| {
        let [guest, dom0] = [stage.enter(false), stage.enter(true)];
        assert_eq!(told(stage, &dom0, &guest), []);
        // The second request is for a frame that is none of its own.
        let slot = guest.pages[page::L1].address() + 60 * 8;
        let entries = [0, 0xf000_0000 | pte::PRESENT | pte::USER];
        let list = stage.put(&guest, 0, &entries.map(|val| MmuUpdate { ptr: slot, val }));
        let went = stage.call(&guest, Hypercall::MmuUpdate, &[list, 2, 0, u64::from(domid::SELF)]);
        assert_eq!(went.result, Err(Errno::Perm));
        let first = call(Hypercall::MmuUpdate.number(), [slot, entries[1]], Errno::Perm, 1);
        assert_eq!(told(stage, &dom0, &guest), [first]);
        // What repeats is counted, in a list of calls as well.
        let entry = MulticallEntry { op: Hypercall::EventChannelOp.number(), result: -1, args: [99, 7, 0, 0, 0, 0] };
        let list = stage.put(&guest, 512, &[entry; 3]);
        assert_eq!(stage.call(&guest, Hypercall::Multicall, &[list, 3]).result, Ok(0));
        let second = call(entry.op, [99, 7], Errno::NoSys, 3);
        assert_eq!(told(stage, &dom0, &guest), [first, second]);
        // Whoever has no authority is told nothing, and another domain's book is another.
        let asks = [TenonOp::Refusals.number(), dom0.id.0.into(), list];
        assert_eq!(stage.call(&guest, Hypercall::Tenon, &asks).result, Err(Errno::Perm));
        assert_eq!(told(stage, &dom0, &dom0), []);
    });
}

#[test]
fn instructions_that_end_in_a_fault_are_told() {
    tell(300, |stage| {
        let [guest, dom0] = [stage.enter(false), stage.enter(true)];
        let rip = at(page::CODE);
        let run = |stage: &mut Stage, code: &[u8], rcx: u64, kernel: bool| {
            stage.m.write(guest.pages[page::CODE], 0, code);
            stage.on_cpu(&guest, |ctx, _| {
                (ctx.state.regs.rip, ctx.state.regs.rcx, ctx.state.kernel_mode) = (rip, rcx, kernel);
                (ctx.state.regs.rax, ctx.state.regs.rdx) = (0xffff_ffff_0000_0001, 2);
                let _ = trap::handle(ctx, Exit::Fault { vector: GP, error: 0, address: 0 });
                let trap = ctx.state.trap.take();
                ctx.state.kernel_mode = true;
                trap.map(|trap| trap.vector)
            })
        };
        // rdmsr, and wrmsr, of registers that no guest has; what is carried out is not told.
        assert_eq!(run(stage, &[0x0f, 0x32, 0x90], 0x1a0, true), None);
        assert_eq!(run(stage, &[0x0f, 0x32, 0x90], 0x1_0000_0345, true), Some(GP));
        assert_eq!(run(stage, &[0x0f, 0x30, 0x90], 0x345, true), Some(GP));
        // lgdt: nobody's. The same of a process is its kernel's business.
        let lgdt = [0x0f, 0x01, 0x10, 0x90, 0x90, 0x90, 0x90, 0xcc];
        assert_eq!(run(stage, &lgdt, 0, true), Some(GP));
        assert_eq!(run(stage, &lgdt, 0, false), Some(GP));
        let fault =
            |kind: RefusalKind, args| Refusal { kind: kind as u32, vcpu: 0, errno: 0, times: 1, number: rip, args };
        let told = told(stage, &dom0, &guest);
        assert_eq!(
            told[..2],
            [fault(RefusalKind::ReadMsr, [0x345, 0]), fault(RefusalKind::WriteMsr, [0x345, 2 << 32 | 1])]
        );
        assert_eq!(told[2..], [fault(RefusalKind::Instruction, [u64::from_le_bytes(lgdt), 0])]);
    });
}
