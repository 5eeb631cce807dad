//! Calls that went wrong once, told as stories.

use hv_core::addr::{DomainId, Frame, HOLE_START, VcpuId};
use hv_core::audit::Fact;
use hv_core::call::{Call, Next};
use hv_core::domain::{Domain, Powers, Spec, ops};
use hv_core::lock::Held;
use hv_core::machine::{Clock, Exit, Frames};
use hv_core::world::{CpuCtx, Ctx};
use hv_core::{dispatch, trap};

use hypercall_abi::context::flags;
use hypercall_abi::domctl::{Domctl, DomctlOp, INTERFACE_VERSION};
use hypercall_abi::event::{AllocUnbound, BindIpi, EventOp, InitControl};
use hypercall_abi::grant::{
    GrantOp, MapGrantRef, QuerySize, SetupTable, UnmapAndReplace, UnmapGrantRef, entry, map, status,
};
use hypercall_abi::memory::{Exchange, MemoryOp, Reservation};
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, MulticallEntry, pte};
use hypercall_abi::physdev::ConsoleIo;
use hypercall_abi::sched::SchedOp;
use hypercall_abi::sysctl::{ReadConsole, Sysctl, SysctlOp};
use hypercall_abi::vcpu::{RegisterVcpuInfo, VcpuOp};
use hypercall_abi::{Errno, Hypercall, domid};
use sim::world::audit::On;
use sim::world::build::{self, at, page};
use sim::world::script::{Actor, Stage, tell};
use std::sync::atomic::Ordering::Relaxed;
use zerocopy::{FromBytes, IntoBytes};

/// What a toolstack reads of the log, in pieces.
fn dmesg(stage: &mut Stage, dom0: &Actor, clear: bool) -> String {
    let (buffer, mut text, mut index) = (at(page::MORE_ARGS), Vec::new(), 0);
    loop {
        let wanted = ReadConsole { incremental: 1, index, buffer, count: 300, ..Default::default() };
        let told = read_console(stage, dom0, wanted);
        if told.count == 0 {
            break;
        }
        text.extend((0..u64::from(told.count)).map(|n| stage.get::<u8>(dom0, buffer + n)));
        index = told.index;
    }
    if clear {
        read_console(stage, dom0, ReadConsole { clear: 1, incremental: 1, index, ..Default::default() });
    }
    String::from_utf8(text).expect("it is ASCII")
}

fn read_console(stage: &mut Stage, dom0: &Actor, wanted: ReadConsole) -> ReadConsole {
    let mut arg = Sysctl {
        cmd: SysctlOp::ReadConsole as u32,
        interface_version: hypercall_abi::sysctl::INTERFACE_VERSION,
        payload: [0; 128],
    };
    arg.payload[..24].copy_from_slice(wanted.as_bytes());
    let arg = stage.put(dom0, 0, &arg);
    assert_eq!(stage.call(dom0, Hypercall::Sysctl, &[arg]).result, Ok(0));
    let told: Sysctl = stage.get(dom0, arg);
    ReadConsole::read_from_prefix(&told.payload).expect("it is there").0
}

fn write_log(stage: &mut Stage, guest: &Actor, text: &[u8]) {
    let mut page = [0u8; 2048];
    page[..text.len()].copy_from_slice(text);
    let buffer = stage.put(guest, 0, &page);
    let went = stage.call(guest, Hypercall::ConsoleIo, &[ConsoleIo::Write as u64, text.len() as u64, buffer]);
    assert_eq!(went.result, Ok(0));
}

/// A newline in what a guest wrote began a line of ring 0, or of another guest; and a guest that wrote much drove out what
/// ring 0 and others had said.
#[test]
fn a_guest_writes_lines_of_its_own_alone() {
    tell(300, |stage| {
        let [dom0, quiet, loud] = [stage.enter(true), stage.enter(false), stage.enter(false)];
        let logged = String::from_utf8(stage.m.logged.lock().expect("one thread").clone()).expect("text");
        write_log(stage, &quiet, b"here I am\n");
        let forged = format!("[error] mfn 0x1: bad\n({}) forged\n\x1b[2J no end", quiet.id);
        for _ in 0..1000 {
            write_log(stage, &loud, forged.as_bytes());
        }
        let log = dmesg(stage, &dom0, true);
        let mine = format!("({}) ", loud.id);
        let (first, others) = log.split_at(log.find(&mine).expect("it has written"));
        assert_eq!(first, format!("{logged}({}) here I am\n", quiet.id));
        assert!(others.len() < 4096 && others.lines().all(|line| line.starts_with(&mine)), "{others}");
        assert!(others.is_ascii() && !others.contains('\x1b') && others.contains(" lines left out] "), "{others}");
        assert_eq!(dmesg(stage, &dom0, false), "", "cleared");
        write_log(stage, &quiet, b"still\n");
        assert_eq!(dmesg(stage, &dom0, false), format!("({}) still\n", quiet.id));
    });
}

/// A record moved to the page it was in held a use that nobody dropped: the page was lost with its domain (P2, P11).
#[test]
fn a_vcpu_record_does_not_move_to_where_it_is() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let mfn = stage.domain(&guest).shared_info().expect("it has one").number();
        let arg = stage.put(&guest, 0, &RegisterVcpuInfo { mfn, offset: 512, reserved: 0 });
        let went = stage.call(&guest, Hypercall::VcpuOp, &[VcpuOp::RegisterVcpuInfo.number(), 0, arg]);
        assert_eq!(went.result, Err(Errno::Acces));
    });
}

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

/// Two thousand bytes were printed in one step, each of which waits for the line: a fifth of a second on a real one (P8).
#[test]
fn printing_does_not_wait_for_the_line() {
    tell(200, |stage| {
        let dom0 = stage.enter(true);
        let text = [*b"abcdefg"; 43];
        let at = stage.put(&dom0, 0, &text);
        stage.m.line.store(10, Relaxed);
        let went = stage.call(&dom0, Hypercall::ConsoleIo, &[ConsoleIo::Write as u64, 301, at]);
        assert_eq!((went.result, went.steps), (Ok(0), 31), "ten bytes a step");
        assert_eq!(*stage.m.printed.lock().expect("one thread"), text.as_flattened());
    });
}

fn grant(stage: &Stage, from: &Actor, to: &Actor) {
    let table = stage.domain(from).grants.table_frames().next().expect("it has a table");
    let word = u64::from(entry::PERMIT_ACCESS) | u64::from(to.id.0) << 16 | from.pages[page::DATA].number() << 32;
    stage.m.poke(table, 5, word);
}

/// A domain that has granted nothing yet, but has a table.
fn granter(stage: &mut Stage) -> Actor {
    let owner = stage.enter(false);
    let frame_list = at(page::MORE_ARGS);
    let setup = SetupTable { dom: domid::SELF, nr_frames: 1, frame_list, ..Default::default() };
    let arg = stage.put(&owner, 0, &setup);
    let went = stage.call(&owner, Hypercall::GrantTableOp, &[GrantOp::SetupTable as u64, arg, 1]);
    assert_eq!(went.result, Ok(0));
    owner
}

fn map_grant_at(stage: &mut Stage, who: &Actor, of: &Actor, host_addr: u64, flags: u32) -> MapGrantRef {
    let call = MapGrantRef { host_addr, flags, gref: 5, dom: of.id.0, ..Default::default() };
    let arg = stage.put(who, 512, &call);
    let went = stage.call(who, Hypercall::GrantTableOp, &[GrantOp::MapGrantRef as u64, arg, 1]);
    assert_eq!(went.result, Ok(0));
    stage.get(who, arg)
}

fn map_grant(stage: &mut Stage, who: &Actor, of: &Actor) -> i16 {
    map_grant_at(stage, who, of, at(build::PAGES + 1), map::HOST).status
}

/// An entry in use was given to whoever it named by then: the recorded grantee counts (ABI io 1.4, step 2; XSA-230).
#[test]
fn a_grant_in_use_is_for_the_one_who_uses_it() {
    tell(300, |stage| {
        let [owner, first, second] = [granter(stage), stage.enter(false), stage.enter(false)];
        grant(stage, &owner, &first);
        assert_eq!(map_grant(stage, &first, &owner), status::OKAY);
        grant(stage, &owner, &second);
        assert_eq!(map_grant(stage, &second, &owner), status::GENERAL_ERROR);
    });
}

/// An entry named by its machine address was taken for a page if it was the first of its table, and a page that was named
/// by an address inside it for an entry: neither could be unmapped again (ABI io 1.3).
#[test]
fn a_grant_is_unmapped_where_it_was_mapped() {
    tell(300, |stage| {
        let [owner, user] = [granter(stage), stage.enter(false)];
        grant(stage, &owner, &user);
        let first_entry = user.pages[page::L1].address();
        let by_entry = map::HOST | map::CONTAINS_PTE;
        let inside = at(build::PAGES + 1) + 24;
        for (host_addr, flags) in [(first_entry, by_entry), (first_entry + 8 * 30, by_entry), (inside, map::HOST)] {
            let mapped = map_grant_at(stage, &user, &owner, host_addr, flags);
            assert_eq!(mapped.status, status::OKAY);
            let call = UnmapGrantRef { host_addr, handle: mapped.handle, ..Default::default() };
            let arg = stage.put(&user, 512, &call);
            let went = stage.call(&user, Hypercall::GrantTableOp, &[GrantOp::UnmapGrantRef as u64, arg, 1]);
            assert_eq!(went.result, Ok(0));
            assert_eq!(stage.get::<UnmapGrantRef>(&user, arg).status, status::OKAY, "at {host_addr:#x}");
        }
    });
}

fn replace_grant(stage: &mut Stage, user: &Actor, host_addr: u64, new_addr: u64, handle: u32) -> i16 {
    let call = UnmapAndReplace { host_addr, new_addr, handle, ..Default::default() };
    let arg = stage.put(user, 512, &call);
    let went = stage.call(user, Hypercall::GrantTableOp, &[GrantOp::UnmapAndReplace as u64, arg, 1]);
    assert_eq!(went.result, Ok(0));
    stage.get::<UnmapAndReplace>(user, arg).status
}

/// unmap_and_replace was refused (ABI io 1.3): the entry of the second address takes the place of the mapping.
#[test]
fn a_grant_is_unmapped_and_another_page_takes_its_place() {
    tell(300, |stage| {
        let [owner, user] = [granter(stage), stage.enter(false)];
        grant(stage, &owner, &user);
        let (host, new) = (at(build::PAGES + 1), at(page::DATA + 3));
        stage.m.poke(user.pages[page::DATA + 3], 7, 0x77);
        let mapped = map_grant_at(stage, &user, &owner, host, map::HOST);
        assert_eq!(mapped.status, status::OKAY);
        for (at, by) in [(host, host), (host, 1 << 40), (host + 4096, new)] {
            assert_eq!(replace_grant(stage, &user, at, by, mapped.handle), status::GENERAL_ERROR, "{at:#x} by {by:#x}");
        }
        assert_eq!(replace_grant(stage, &user, host, new, mapped.handle), status::OKAY);
        let read = |stage: &mut Stage, at: u64| stage.on_cpu(&user, |ctx, _| ctx.read::<u64>(at));
        assert_eq!((read(stage, host + 56), read(stage, new)), (Ok(0x77), Err(Errno::Fault)));
        assert_eq!(replace_grant(stage, &user, host, new, mapped.handle), status::BAD_HANDLE);
        // Without a second address it unmaps.
        let mapped = map_grant_at(stage, &user, &owner, new, map::HOST);
        assert_eq!(replace_grant(stage, &user, new, 0, mapped.handle), status::OKAY);
        assert_eq!(read(stage, new), Err(Errno::Fault));
    });
}

/// A domain that had not set up its table had none, so that its references were bad, not merely unset (ABI io 1.3).
#[test]
fn a_domain_has_a_grant_table_from_the_start() {
    tell(300, |stage| {
        let [owner, user] = [stage.enter(false), stage.enter(false)];
        let query = stage.put(&owner, 0, &QuerySize { dom: domid::SELF, ..Default::default() });
        assert_eq!(stage.call(&owner, Hypercall::GrantTableOp, &[GrantOp::QuerySize as u64, query, 1]).result, Ok(0));
        assert_eq!(stage.get::<QuerySize>(&owner, query).nr_frames, 1);
        assert_eq!(map_grant(stage, &user, &owner), status::GENERAL_ERROR);
        grant(stage, &owner, &user);
        assert_eq!(map_grant(stage, &user, &owner), status::OKAY);
    });
}

/// Without FIFO events, nobody looked at what is wrong with a control block (ABI core 5.2).
#[test]
fn a_control_block_is_looked_at_before_it_is_refused() {
    tell(300, |stage| {
        let [guest, other] = [stage.enter(false), stage.enter(false)];
        let good = guest.pages[page::DATA].number();
        for (control_gfn, offset, vcpu, answer) in [
            (good, 0, 9, Errno::NoEnt),
            (good, 4, 0, Errno::Inval),
            (good, 4096 - 64, 0, Errno::Inval),
            (u64::MAX, 0, 0, Errno::Inval),
            (other.pages[page::DATA].number(), 0, 0, Errno::Inval),
            (guest.pages[page::L1].number(), 0, 0, Errno::Inval),
            (good, 4096 - 72, 1, Errno::NoSys),
        ] {
            let arg = stage.put(&guest, 0, &InitControl { control_gfn, offset, vcpu, ..Default::default() });
            let went = stage.call(&guest, Hypercall::EventChannelOp, &[EventOp::InitControl as u64, arg]);
            assert_eq!(went.result, Err(answer), "{control_gfn:#x} {offset} {vcpu}");
        }
        let went = stage.call(&guest, Hypercall::EventChannelOp, &[EventOp::InitControl as u64, 8]);
        assert_eq!(went.result, Err(Errno::Fault));
    });
}

/// exchange was refused without a look at its lists (ABI core 4.10; XSA-212).
#[test]
fn an_exchange_is_looked_at_before_it_is_refused() {
    tell(300, |stage| {
        let guest = stage.enter(false);
        let list = |extent_start, nr_extents, extent_order| Reservation {
            extent_start,
            nr_extents,
            extent_order,
            domid: domid::SELF,
            ..Default::default()
        };
        let (one, hole) = (list(at(page::ARGS), 1, 0), list(HOLE_START, 1, 0));
        for (given, wanted, nr_exchanged, answer) in [
            (list(0, 1, 40), one, 0, Errno::Perm),
            (one, list(at(page::ARGS), 2, 0), 0, Errno::Inval),
            (one, one, 2, Errno::Inval),
            (list(0, u64::MAX, 1), list(0, u64::MAX, 1), 0, Errno::Inval),
            (one, Reservation { domid: 0x7123, ..one }, 0, Errno::Inval),
            (one, hole, 0, Errno::Fault),
            (list(0, 1 << 60, 0), list(0, 1 << 60, 0), 1 << 59, Errno::Fault),
            (one, one, 0, Errno::NoSys),
        ] {
            let arg = stage.put(&guest, 0, &Exchange { given, wanted, nr_exchanged });
            let went = stage.call(&guest, Hypercall::MemoryOp, &[MemoryOp::Exchange as u64, arg]);
            assert_eq!(went.result, Err(answer), "{given:?} {wanted:?} {nr_exchanged}");
        }
        let went = stage.call(&guest, Hypercall::MemoryOp, &[MemoryOp::Exchange as u64, 8]);
        assert_eq!(went.result, Err(Errno::Fault));
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

/// Without its header an XSAVE area is empty: the FPU state in a context was not used (ABI core 10.3).
#[test]
fn the_fpu_state_of_a_context_counts() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let mut context = build::context(&guest.pages);
        (context.flags, context.fpu_ctxt[0]) = (context.flags | flags::I387_VALID, 0x7f);
        let arg = stage.put(&guest, 0, &context);
        let went = stage.call(&guest, Hypercall::VcpuOp, &[VcpuOp::Initialise.number(), 1, arg]);
        assert_eq!(went.result, Ok(0));
        let vcpu = stage.world.vcpu(stage.domain(&guest), VcpuId(1)).expect("it has two");
        let area = vcpu.state.try_take().expect("nobody has it").fpu.expect("it has one");
        assert_eq!((stage.m.peek(area, 0), stage.m.peek(area, 64)), (0x7f, 3));
    });
}

/// Where a page was found is remembered until an entry on the way to it has let go of something (P1, P3).
#[test]
fn a_page_found_before_is_not_used_after_it_went() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let (place, page) = (at(page::DATA), |n: usize| guest.pages[page::DATA + n]);
        let write = |stage: &mut Stage, value: u64| stage.on_cpu(&guest, |ctx, _| ctx.write(place, &value));
        let show = |stage: &mut Stage, frame: Frame, flags: u64| {
            let entry = frame.address() | flags | pte::USER;
            stage.call(&guest, Hypercall::UpdateVaMapping, &[place, entry, 0]).result
        };
        assert_eq!((write(stage, 1), write(stage, 2)), (Ok(()), Ok(())));
        assert_eq!(show(stage, page(1), pte::PRESENT | pte::WRITE), Ok(0));
        assert_eq!(write(stage, 3), Ok(()));
        assert_eq!([stage.m.peek(page(0), 0), stage.m.peek(page(1), 0)], [2, 3]);
        assert_eq!((show(stage, page(1), pte::PRESENT), write(stage, 4)), (Ok(0), Err(Errno::Fault)));
        assert_eq!((show(stage, page(1), pte::PRESENT | pte::WRITE), write(stage, 5)), (Ok(0), Ok(())));
        assert_eq!((show(stage, page(1), 0), write(stage, 6)), (Ok(0), Err(Errno::Fault)));
        assert_eq!((show(stage, page(1), pte::PRESENT | pte::WRITE), write(stage, 7)), (Ok(0), Ok(())));
        let l2_slot = guest.pages[page::L2].address() + (build::BASE >> 21) % 512 * 8;
        let list = stage.put(&guest, 0, &MmuUpdate { ptr: l2_slot, val: 0 });
        let went = stage.call(&guest, Hypercall::MmuUpdate, &[list, 1, 0, u64::from(domid::SELF)]);
        assert_eq!((went.result, write(stage, 8)), (Ok(0), Err(Errno::Fault)));
        assert_eq!(stage.m.peek(page(1), 0), 7);
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

/// All that a domain is, room by room. When it ticks next depends on the time.
fn facts(stage: &Stage, domain: &Domain) -> Vec<String> {
    let mut facts = Vec::new();
    stage.world.facts(stage.m, domain, &mut |fact| {
        let fact = match fact {
            Fact::Runs { vcpu, online, deadlines, period, .. } => {
                Fact::Runs { vcpu, online, deadlines, period, next_tick: 0 }
            }
            fact => fact,
        };
        facts.push(format!("{fact:?}"));
    });
    facts
}

fn destroy(stage: &mut Stage, dom0: &Actor, id: DomainId) {
    let cmd = DomctlOp::DestroyDomain as u32;
    let call = Domctl { cmd, interface_version: INTERFACE_VERSION, domain: id.0, ..Default::default() };
    let arg = stage.put(dom0, 0, &call);
    assert_eq!(stage.call(dom0, Hypercall::Domctl, &[arg]).result, Ok(0));
}

/// What a domain is in each room ends with it (P10, P11): the next one in its place is as the first one was.
#[test]
fn a_domain_in_the_place_of_a_dead_one_is_as_the_first_was() {
    tell(400, |stage| {
        let dom0 = stage.enter(true);
        let other = granter(stage);
        let spec = Spec { powers: Powers::CONSOLE_WRITE, vcpus: 2, max_pages: 7, handle: [9; 16] };
        let born = |stage: &mut Stage| stage.cpu_ctx().create(&spec).map(Domain::id).expect("room for a domain");
        let first = born(stage);
        let at_birth = facts(stage, stage.world.domain(first).expect("it lives"));
        destroy(stage, &dom0, first);
        // One that has something in every room.
        let guest = granter(stage);
        let idle = facts(stage, stage.domain(&guest));
        grant(stage, &guest, &other);
        grant(stage, &other, &guest);
        let arg = stage.put(&guest, 0, &AllocUnbound { dom: domid::SELF, remote_dom: other.id.0, port: 0 });
        let unbound = stage.call(&guest, Hypercall::EventChannelOp, &[EventOp::AllocUnbound as u64, arg]);
        let arg = stage.put(&guest, 0, &BindIpi { vcpu: 0, port: 0 });
        let ipi = stage.call(&guest, Hypercall::EventChannelOp, &[EventOp::BindIpi as u64, arg]);
        let timer = stage.call(&guest, Hypercall::SetTimerOp, &[1 << 60]);
        assert_eq!([unbound.result, ipi.result, timer.result], [Ok(0); 3]);
        assert_eq!([map_grant(stage, &other, &guest), map_grant(stage, &guest, &other)], [0; 2]);
        let busy = facts(stage, stage.domain(&guest));
        for room in ["Vcpu", "Granted", "Held", "Port", "Runs"] {
            let some =
                |facts: &[String]| facts.iter().filter(|fact| fact.starts_with(room)).cloned().collect::<Vec<_>>();
            assert_ne!(some(&idle), some(&busy), "{room}");
        }
        destroy(stage, &dom0, guest.id);
        // Its vcpus' slots are the next one's; its own slot comes round when all others have had their turn.
        let heir = loop {
            let next = born(stage);
            assert_eq!(facts(stage, stage.world.domain(next).expect("it lives")), at_birth, "{next}");
            if next.slot() == guest.id.slot() {
                break next;
            }
            destroy(stage, &dom0, next);
        };
        assert_ne!(heir, guest.id);
    });
}
