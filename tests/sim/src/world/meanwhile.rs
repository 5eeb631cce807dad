//! Told stories of two CPUs: what one does while the other waits until all have flushed, answers that it has, or is at any
//! other place where the two can meet.

use super::audit::On;
use super::build::{self, at, page};
use super::machine::WholeMachine;
use super::script::{Actor, Stage, tell_of_two};
use super::{Context, turns, twins};
use crate::machine::Seen;
use hv_core::addr::{CpuId, CpuSet, ENTRIES, Frame, GuestVirt, VcpuId};
use hv_core::domain::{Domain, Life};
use hv_core::lean;
use hv_core::lock::Held;
use hv_core::machine::{CpuState, Exit, Interrupt, mode};
use hv_core::paging::{BUDGET, Session};
use hv_core::world::{CpuCtx, Ctx, World};
use hv_core::{dispatch, trap};
use hypercall_abi::callback::IretContext;
use hypercall_abi::domctl::{Domctl, DomctlOp, INTERFACE_VERSION};
use hypercall_abi::grant::{Copy, CopySide, GrantOp, SetupTable};
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, pte};
use hypercall_abi::{Errno, Hypercall, domid};
use std::cell::Cell;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use zerocopy::IntoBytes;

/// A page that becomes a table.
const LIST: usize = page::DATA;
/// Steps after which a call is left as it is.
const ENOUGH: u64 = 50;

/// Makes a call, as far as it goes in some steps; answers what it answered.
fn call(ctx: &mut Context<'_>, call: Hypercall, args: [u64; 4]) -> Option<Result<u64, Errno>> {
    let regs = &mut ctx.state.regs;
    (regs.rax, [regs.rdi, regs.rsi, regs.rdx, regs.r10]) = (call.number(), args);
    let _ = trap::handle(ctx, Exit::Syscall);
    for _ in 0..ENOUGH {
        if ctx.state.call.is_none() {
            return Some(Errno::from_rax(ctx.state.regs.rax));
        }
        let _ = dispatch::step(ctx);
    }
    ctx.state.call.take().map_or_else(|| Some(Errno::from_rax(ctx.state.regs.rax)), |_| None)
}

/// Makes one `mmuext_op`.
fn mmuext(ctx: &mut Context<'_>, op: MmuextCommand, frame: Frame) -> Option<Result<u64, Errno>> {
    let arg = at(page::ARGS) + 0x800;
    let op = MmuextOp { cmd: op as u32, pad: 0, arg1: frame.number(), arg2: 0 };
    ctx.write_bytes(arg, op.as_bytes()).expect("the argument page is mapped");
    call(ctx, Hypercall::MmuextOp, [arg, 1, 0, domid::SELF.into()])
}

/// Maps a page anew at its address.
fn map(ctx: &mut Context<'_>, page: usize, frame: Frame, flags: u64) {
    let entry = frame.address() | pte::PRESENT | pte::USER | pte::ACCESSED | flags;
    assert_eq!(call(ctx, Hypercall::UpdateVaMapping, [at(page), entry, 0, 0]), Some(Ok(0)));
}

/// What another CPU does to the tables of a domain.
fn elsewhere(m: &WholeMachine, world: &World, domain: &Domain, work: impl FnOnce(&mut Session<'_, WholeMachine>)) {
    turns::as_cpu(1, || work(&mut domain.space.open(m, &world.frames, BUDGET, &mut Held::entering_ring_0())));
}

/// What the other CPU does, and at how many places it could have come before.
type Next = (usize, Box<dyn FnOnce()>);

thread_local! {
    static NEXT: Cell<Option<Next>> = const { Cell::new(None) };
}

/// A place where another CPU can come between.
pub(super) fn come_between() {
    match NEXT.take() {
        Some((0, work)) => work(),
        Some((places, work)) => NEXT.set(Some((places - 1, work))),
        None => {}
    }
}

/// The other CPU does something at one place after another where it can come between what the rules do: whether it came, for
/// one place, must be answered by `story` with [`came`].
fn at_every_place(story: fn(&mut Stage, &Actor, usize) -> bool) {
    const MOST: usize = 1_000;
    for place in 0..MOST {
        let (said, hear) = mpsc::channel();
        tell_of_two(300, move |stage| {
            let guest = ordinary(stage);
            said.send(story(stage, &guest, place)).expect("somebody listens");
        });
        if !hear.recv().expect("the story was told") {
            assert!(place > 0, "nobody can come between");
            return;
        }
    }
    panic!("{MOST} places, and no end");
}

/// The other CPU does something when so many places have been passed.
fn next(place: usize, work: impl FnOnce() + 'static) {
    NEXT.set(Some((place, Box::new(work))));
}

/// Whether it has come.
fn came() -> bool {
    NEXT.take().is_none()
}

/// A guest to whom fast paths are open.
fn ordinary(stage: &mut Stage) -> Actor {
    let guest = (0..2).map(|_| stage.enter(true)).find(|guest| build::is_ordinary(&guest.pages));
    guest.expect("one of two is")
}

/// Two CPUs, and one domain's first vcpu on the first.
fn with_guest(story: fn(&mut Stage, &Actor)) {
    tell_of_two(300, move |stage| {
        let guest = stage.enter(true);
        story(stage, &guest);
    });
}

/// A flush counts from its beginning. While one waits until all have flushed, a CPU that has done so already runs its guest,
/// finds a page that may be written, and then the last use of that page as such ends: the CPU must flush once more before
/// the page can be a table.
pub fn a_use_that_ends_during_a_flush() {
    with_guest(|stage, guest| {
        let (m, world, domain, frame) = (stage.m, stage.world, stage.domain(guest), guest.pages[LIST]);
        let root = guest.pages[page::KERNEL_ROOT];
        stage.on_cpu(guest, |ctx, audit| {
            m.meanwhile(move || {
                m.remember(&world.frames, frame, Seen::Page { writable: true });
                let entry = frame.address() | pte::PRESENT | pte::USER | pte::ACCESSED;
                let id = domain.id();
                elsewhere(m, world, domain, |session| {
                    assert_eq!(session.update_va(root, GuestVirt(at(LIST)), entry, id), Ok(()));
                });
            });
            assert_eq!(mmuext(ctx, MmuextCommand::TlbFlushAll, frame), Some(Ok(0)));
            assert_eq!(mmuext(ctx, MmuextCommand::PinL1, frame), Some(Ok(0)));
            audit.look(ctx.m, ctx.world, &[On::stage(ctx)]).unwrap();
        });
    });
}

/// A page that was found before a flush is looked for again after it. While a copy waits for a flush, another vcpu makes the
/// page in which the list is a table; the answer must not be written into it.
pub fn a_list_that_becomes_a_table_during_a_flush() {
    with_guest(|stage, guest| {
        let (m, world, domain) = (stage.m, stage.world, stage.domain(guest));
        // Words of a copy between even frames are entries that are not present.
        let mut even = (page::DATA + 1..).filter(|page| guest.pages[*page].number().is_multiple_of(2));
        let [source, to] = [(); 2].map(|()| even.next().expect("every other one"));
        let [list, dest, source] = [LIST, to, source].map(|page| guest.pages[page]);
        let root = guest.pages[page::KERNEL_ROOT];
        stage.on_cpu(guest, |ctx, audit| {
            // The destination was a table, so that its use waits for a flush.
            map(ctx, to, dest, 0);
            assert_eq!(mmuext(ctx, MmuextCommand::PinL1, dest), Some(Ok(0)));
            assert_eq!(mmuext(ctx, MmuextCommand::Unpin, dest), Some(Ok(0)));
            let side = |frame: Frame| CopySide { gref_or_frame: frame.number(), domid: domid::SELF, offset: 0, pad: 0 };
            let copy = Copy { source: side(source), dest: side(dest), len: 8, ..Default::default() };
            ctx.write_bytes(at(LIST), copy.as_bytes()).expect("it may be written");
            m.meanwhile(move || {
                let entry = list.address() | pte::PRESENT | pte::USER | pte::ACCESSED;
                let id = domain.id();
                elsewhere(m, world, domain, |session| {
                    assert_eq!(session.update_va(root, GuestVirt(at(LIST)), entry, id), Ok(()));
                    assert_eq!(session.pin(list, 1), Ok(()));
                });
            });
            let answer = call(ctx, Hypercall::GrantTableOp, [GrantOp::Copy.number(), at(LIST), 1, 0]);
            assert!(!m.has_meanwhile(), "the copy has waited for a flush");
            assert_eq!(answer, Some(Err(Errno::Fault)), "the answer cannot be told");
            audit.look(ctx.m, ctx.world, &[On::stage(ctx)]).unwrap();
        });
    });
}

/// A domain that a call has found stays until the step ends. While a frame for its grant table waits for a flush, another CPU
/// destroys it.
pub fn a_domain_that_dies_during_a_flush() {
    with_guest(|stage, guest| {
        let [victim, reaper] = [stage.enter(false), stage.enter(true)];
        let (m, world, id) = (stage.m, stage.world, victim.id);
        let destroy = Domctl {
            cmd: DomctlOp::DestroyDomain as u32,
            interface_version: INTERFACE_VERSION,
            domain: id.0,
            ..Default::default()
        };
        let destroy = stage.put(&reaper, 0, &destroy);
        let table = SetupTable { dom: id.0, nr_frames: 2, frame_list: at(page::ARGS) + 0x100, ..Default::default() };
        let table = stage.put(guest, 0, &table);
        let reaps = stage.domain(&reaper);
        stage.on_cpu(guest, |ctx, audit| {
            // A frame that somebody has used: whoever gets it waits for a flush.
            let used = ctx.world.frames.allocate(ctx.m).expect("there is memory");
            ctx.world.frames.retire(used);
            m.meanwhile(move || {
                turns::as_cpu(1, || {
                    let vcpu = world.vcpu(reaps, VcpuId(0)).expect("it has one");
                    let mut own = vcpu.state.try_take().expect("nobody has it");
                    let mut cpu_ctx = CpuCtx { m, world, held: &mut Held::entering_ring_0() };
                    let mut ctx = Ctx::new(&mut cpu_ctx, reaps, vcpu, &mut own);
                    call(&mut ctx, Hypercall::Domctl, [destroy, 0, 0, 0]);
                });
            });
            let grown = call(ctx, Hypercall::GrantTableOp, [GrantOp::SetupTable.number(), table, 1, 0]);
            assert!(!m.has_meanwhile(), "it has waited for a flush");
            assert_eq!(grown, Some(Ok(0)));
            audit.look(ctx.m, ctx.world, &[On::stage(ctx)]).unwrap();
            let domain = ctx.world.domains.iter().find(|domain| domain.id() == id).expect("its slot");
            assert_ne!(domain.life(), Life::Free, "P11: it is unmade while it is visited");
        });
    });
}

/// The last use of a page as writable ends after the entry is gone. While a fast path makes an entry read-only, another CPU of
/// the guest flushes, and then looks at the entry: if it finds that it may write, it must flush once more before the page can
/// be a table.
pub fn a_page_that_is_looked_at_while_its_entry_changes() {
    at_every_place(|stage, guest, place| {
        let (m, world, frame) = (stage.m, stage.world, guest.pages[LIST]);
        let (table, domain) = (guest.pages[page::L1], stage.domain(guest));
        turns::as_cpu(1, || domain.space.enter(&world.frames, CpuId(1)));
        stage.on_cpu(guest, |ctx, audit| {
            next(place, move || {
                turns::as_cpu(1, || {
                    world.frames.epochs().flush(m, CpuSet::only(CpuId(1)));
                    let writable = m.peek(table, LIST) & pte::WRITE != 0;
                    m.remember(&world.frames, frame, Seen::Page { writable });
                });
            });
            let entry = frame.address() | pte::PRESENT | pte::USER | pte::ACCESSED | pte::DIRTY;
            let update = MmuUpdate { ptr: table.address() + 8 * LIST as u64, val: entry };
            let changed = ctx.session(domain).mmu_update(update.ptr, update.val, domain.id());
            let came = came();
            assert_eq!(changed, Ok(()));
            assert_eq!(mmuext(ctx, MmuextCommand::PinL1, frame), Some(Ok(0)));
            audit.look(ctx.m, ctx.world, &[On::stage(ctx)]).unwrap();
            came
        })
    });
}

/// The end of a frame's last use is stamped before the count says so. While a use as writable ends that is not an entry's, as a
/// copy's does, another CPU makes the page a table, if it can: whoever may still know it as writable has flushed.
pub fn a_page_that_becomes_a_table_while_its_last_use_ends() {
    at_every_place(|stage, guest, place| {
        let (m, world, frame) = (stage.m, stage.world, guest.pages[LIST]);
        let (root, domain) = (guest.pages[page::KERNEL_ROOT], stage.domain(guest));
        stage.on_cpu(guest, |ctx, audit| {
            let id = domain.id();
            assert_eq!(mmuext(ctx, MmuextCommand::TlbFlushAll, frame), Some(Ok(0)));
            m.remember(&world.frames, frame, Seen::Page { writable: true });
            assert_eq!(world.frames.take_writable(m, frame, id, id), Ok(()));
            let entry = frame.address() | pte::PRESENT | pte::USER | pte::ACCESSED | pte::DIRTY;
            assert_eq!(ctx.session(domain).update_va(root, GuestVirt(at(LIST)), entry, id), Ok(()));
            next(place, move || elsewhere(m, world, domain, |session| _ = session.pin(frame, 1)));
            world.frames.let_go(frame, id, true);
            let came = came();
            audit.look(ctx.m, ctx.world, &[On::stage(ctx)]).unwrap();
            came
        })
    });
}

/// A CPU answers what it was asked, and then says what its entry code may do. The other CPU has waited for that: it makes the
/// kernel's stack a table, and user code's next system call must not be written into it.
pub fn a_stack_that_becomes_a_table_before_a_system_call() {
    tell_of_two(300, |stage| {
        let guest = &ordinary(stage);
        let (m, world, domain, stack) = (stage.m, stage.world, stage.domain(guest), guest.pages[page::STACK]);
        let root = guest.pages[page::KERNEL_ROOT];
        stage.on_cpu(guest, |ctx, audit| {
            // Into user mode, and once round: the stack has been found.
            let top = at(page::STACK + 1);
            let frame = IretContext { rip: 0x1000, cs: 0xe033, rflags: 0x202, ss: 0xe02b, ..IretContext::default() };
            ctx.state.regs.rsp = top - 72;
            ctx.write_bytes(top - 72, frame.as_bytes()).expect("the stack may be written");
            let _ = call(ctx, Hypercall::Iret, [0; 4]);
            let mut modes = Vec::new();
            let mut enter = |ctx: &mut Context<'_>| {
                m.answer_late();
                modes.push(ctx.m.entry().mode.load(Relaxed));
                if modes.len() == 2 {
                    twins::enters(ctx, Exit::Syscall);
                }
                ctx.m.keep_exit(&mut ctx.state.regs, Exit::Interrupt(Interrupt::Other));
            };
            lean::run(ctx, |ctx, _| enter(ctx));
            m.ask(0);
            m.meanwhile(move || {
                (0..ENTRIES).for_each(|at| m.poke(stack, at, 0));
                let entry = stack.address() | pte::PRESENT | pte::USER | pte::ACCESSED | pte::DIRTY;
                elsewhere(m, world, domain, |session| {
                    assert_eq!(session.update_va(root, GuestVirt(at(page::STACK)), entry, domain.id()), Ok(()));
                    assert_eq!(session.pin(stack, 1), Ok(()));
                });
            });
            lean::run(ctx, |ctx, _| enter(ctx));
            assert!(!m.has_meanwhile(), "the other CPU went on");
            assert_eq!(modes[0], mode::USER, "fast paths are open to this guest");
            audit.look(ctx.m, ctx.world, &[On::stage(ctx)]).unwrap();
        });
    });
}
