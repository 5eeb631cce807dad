//! What a CPU remembers of its walks is what a walk would find. One test, because a planted fault is planted in the whole
//! process.

use hv_core::addr::Frame;
use hv_core::dispatch;
use hv_core::fault::{Fault, plant};
use hv_core::lean::{self, End};
use hv_core::machine::{CpuState, Exit, Frames, Interrupt, mode};
use hv_core::world::Ctx;
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, pte};
use hypercall_abi::{Hypercall, domid, selector};
use sim::world::build::{self, BASE, at, page};
use sim::world::machine::WholeMachine;
use sim::world::script::{Actor, Stage, tell};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;

const TABLE: u64 = pte::PRESENT | pte::WRITE | pte::USER | pte::ACCESSED;

/// How the page of arguments becomes another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    /// Another L1 table, by an L2 entry, with the flush that comes with that.
    Upper,
    /// Another root, which leads elsewhere.
    Root,
    /// Another leaf, without a flush.
    Leaf,
    /// Another L1 table, while the vcpu is not on the CPU, but one of another domain.
    Away,
    /// Another L1 table, while the vcpu is not on the CPU, and nobody is.
    Asleep,
}

impl Change {
    /// Where in the tables of a guest it is, and what it writes.
    fn entry(self, guest: &Actor) -> (u64, u64) {
        let [l1, _, l3] = page::SPARE.map(|n| guest.pages[n]);
        let (table, slot, to) = match self {
            Self::Upper | Self::Away | Self::Asleep => (page::L2, BASE >> 21, l1),
            Self::Root => (page::USER_ROOT, BASE >> 39, l3),
            Self::Leaf => (page::L1, page::ARGS as u64, guest.pages[page::DATA]),
        };
        (guest.pages[table].address() + slot % 512 * 8, to.address() | TABLE)
    }
}

/// Writes a second L1 table, L2 and L3, in which the page of arguments is another.
fn put_tables(m: &WholeMachine, guest: &Actor) {
    let [l1, l2, l3] = page::SPARE.map(|n| guest.pages[n]);
    put(m, l1, page::ARGS as u64, guest.pages[page::DATA].address() | TABLE);
    put(m, l2, BASE >> 21, l1.address() | TABLE);
    put(m, l3, BASE >> 30, l2.address() | TABLE);
}

/// Writes a word of a page.
fn put(m: &WholeMachine, frame: Frame, slot: u64, value: u64) {
    m.write(frame, usize::try_from(slot % 512 * 8).expect("small"), &value.to_le_bytes());
}

fn update(ctx: &mut Ctx<'_, WholeMachine>, (slot, entry): (u64, u64)) {
    let (domain, id) = (ctx.domain, ctx.domain.id());
    assert_eq!(ctx.session(domain).mmu_update(slot, entry, id), Ok(()));
}

/// What the guest's kernel finds at the address of its arguments.
fn look(ctx: &mut Ctx<'_, WholeMachine>) -> u64 {
    ctx.read(at(page::ARGS)).expect("it is mapped")
}

/// Whether the guest's kernel finds the new page after a change.
fn finds(how: Change) -> bool {
    let (said, hear) = mpsc::channel();
    tell(200, move |stage| {
        let [guest, other] = [stage.enter(false), stage.enter(false)];
        put(stage.m, guest.pages[page::ARGS], 0, 1);
        put(stage.m, guest.pages[page::DATA], 0, 2);
        put_tables(stage.m, &guest);
        let entry = how.entry(&guest);
        let found = match how {
            Change::Away | Change::Asleep => {
                stage.on_cpu(&guest, |ctx, _| assert_eq!(look(ctx), 1));
                if how == Change::Away {
                    stage.on_cpu(&other, |_, _| {});
                }
                let (domain, mut cpu_ctx) = (stage.domain(&guest), stage.cpu_ctx());
                let updated = cpu_ctx.session(domain).mmu_update(entry.0, entry.1, guest.id);
                assert_eq!(updated, Ok(()));
                stage.on_cpu(&guest, |ctx, _| look(ctx))
            }
            Change::Root => stage.on_cpu(&guest, |ctx, _| {
                update(ctx, entry);
                assert_eq!((look(ctx), look(ctx)), (1, 1));
                let (domain, old, new) = (ctx.domain, ctx.state.kernel_root, Some(guest.pages[page::USER_ROOT]));
                assert_eq!(ctx.session(domain).switch_root(old, new, || {}), Ok(()));
                ctx.state.kernel_root = new;
                look(ctx)
            }),
            Change::Upper | Change::Leaf => stage.on_cpu(&guest, |ctx, _| {
                assert_eq!((look(ctx), look(ctx)), (1, 1));
                update(ctx, entry);
                look(ctx)
            }),
        };
        said.send(found == 2).expect("somebody listens");
    });
    hear.recv().expect("the story was told")
}

/// Enters a guest to which fast paths are open.
fn ordinary(stage: &mut Stage) -> Actor {
    (0..4).map(|_| stage.enter(false)).find(|guest| build::is_ordinary(&guest.pages)).expect("most are")
}

/// Whether a list that first switches to another root is read on, and gets its results, where it is under that root.
fn switch_is_read_on() -> bool {
    let (said, hear) = mpsc::channel();
    tell(200, move |stage| {
        let guest = ordinary(stage);
        put_tables(stage.m, &guest);
        let (call, list) = (|call: Hypercall| call.number(), at(page::ARGS));
        let [kernel, user] = [page::USER_ROOT, page::KERNEL_ROOT].map(|n| guest.pages[n].number());
        let operations = [MmuextCommand::NewBaseptr as u64, kernel, 0, MmuextCommand::NewUserBaseptr as u64, user, 0];
        let pages = [page::ARGS, page::DATA].map(|n| guest.pages[n]);
        for (frame, sp) in pages.into_iter().zip([8, 16]) {
            let roots = [call(Hypercall::MmuextOp), 1, list + 512, 2, 0, domid::SELF.into(), 0, 0];
            let stack = [call(Hypercall::StackSwitch), 1, selector::GUEST_SS.into(), at(page::STACK) + sp];
            let words = (0..).zip(roots.into_iter().chain(stack)).chain((64..).zip(operations));
            words.for_each(|(slot, word)| put(stage.m, frame, slot, word));
        }
        let read_on = stage.on_cpu(&guest, |ctx, _| {
            update(ctx, Change::Root.entry(&guest));
            let mut runs = 0;
            let end = lean::run(ctx, |ctx, _| {
                runs += 1;
                let exit = if runs == 1 { Exit::Syscall } else { Exit::Interrupt(Interrupt::Other) };
                let regs = &mut ctx.state.regs;
                (regs.rax, regs.rdi, regs.rsi) = (call(Hypercall::Multicall), list, 2);
                ctx.m.keep_exit(&mut ctx.state.regs, exit);
            });
            assert!(end == End::Call || runs == 2, "the list takes a fast path");
            while ctx.state.call.is_some() {
                let _ = dispatch::step(ctx);
            }
            let results = pages.map(|page| [1, 9].map(|word| ctx.m.page(page)[word].load(Relaxed)));
            ctx.state.kernel_sp == at(page::STACK) + 16 && results == [[1, 1], [0, 0]]
        });
        said.send(read_on).expect("somebody listens");
    });
    hear.recv().expect("the story was told")
}

/// Whether the entry code knows where the kernel's stack is, after the guest has put another page there by a call that takes
/// the fast path.
fn stack_is_found() -> bool {
    let (said, hear) = mpsc::channel();
    tell(200, move |stage| {
        let guest = ordinary(stage);
        let (slot, to) = (guest.pages[page::L1].address() + page::STACK as u64 * 8, guest.pages[page::DATA]);
        let list = stage.put(&guest, 0, &MmuUpdate { ptr: slot, val: to.address() | TABLE });
        let known = stage.on_cpu(&guest, |ctx, _| {
            let mut known = Vec::new();
            let end = lean::run(ctx, |ctx, _| {
                let entry = ctx.m.entry();
                assert_eq!(entry.mode.load(Relaxed), mode::KERNEL, "fast paths are open to this guest");
                known.push(Frame::containing(entry.frame.load(Relaxed)));
                let exit = if known.len() == 1 { Exit::Syscall } else { Exit::Interrupt(Interrupt::Other) };
                let regs = &mut ctx.state.regs;
                (regs.rax, regs.rdi, regs.rsi) = (Hypercall::MmuUpdate.number(), list, 1);
                (regs.rdx, regs.r10) = (0, u64::from(domid::SELF));
                ctx.m.keep_exit(&mut ctx.state.regs, exit);
            });
            assert_eq!((end, ctx.state.regs.rax), (End::Exit, Hypercall::MmuUpdate.number()));
            known
        });
        assert_eq!((known.len(), known[0]), (2, Some(guest.pages[page::STACK])));
        said.send(known[1] == Some(to)).expect("somebody listens");
    });
    hear.recv().expect("the story was told")
}

#[test]
fn what_is_remembered_is_what_a_walk_would_find() {
    let cases = [
        (Change::Upper, Fault::SeenOverFlush),
        (Change::Root, Fault::SeenOverRoot),
        (Change::Leaf, Fault::SeenOverLeaf),
        (Change::Away, Fault::SeenByOthers),
        (Change::Asleep, Fault::LeaveEarly),
    ];
    for (how, fault) in cases {
        assert!(finds(how), "{how:?}");
        plant(Some(fault));
        let found = finds(how);
        plant(None);
        assert!(!found, "{how:?} does not show {fault:?}");
    }
    assert!(switch_is_read_on());
    plant(Some(Fault::SeenOverRoot));
    let read_on = switch_is_read_on();
    plant(None);
    assert!(!read_on, "a list that is elsewhere under the new root does not show {:?}", Fault::SeenOverRoot);
    assert!(stack_is_found());
    plant(Some(Fault::StayArmed));
    let found = stack_is_found();
    plant(None);
    assert!(!found, "a stack that was moved does not show {:?}", Fault::StayArmed);
}
