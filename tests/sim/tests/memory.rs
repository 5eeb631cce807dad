//! How much memory a domain has, who pays for it, and what it costs to find some.

use hv_core::addr::Frame;
use hv_core::domain::life::kept_frames;
use hv_core::machine::Exit;
use hv_core::paging::BUDGET;
use hv_core::{dispatch, trap};
use hypercall_abi::domctl::{CreateDomain, Domctl, DomctlOp, INTERFACE_VERSION};
use hypercall_abi::event::{AllocUnbound, EventOp};
use hypercall_abi::grant::{GrantOp, MapGrantRef, SetupTable, UnmapGrantRef, entry, map, status};
use hypercall_abi::memory::{MemoryOp, Reservation};
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, pte};
use hypercall_abi::tenon::{GRADUALLY, MORE};
use hypercall_abi::{Errno, Hypercall, domid};
use sim::world::build::{self, at, page};
use sim::world::script::{Actor, Stage, Went, tell};
use std::sync::atomic::Ordering::Relaxed;
use zerocopy::IntoBytes;

const LEAF: u64 = pte::PRESENT | pte::USER;

/// A call for one extent; answers how it went and what it left in the array.
fn reservation(stage: &mut Stage, who: &Actor, op: MemoryOp, order: u32, word: u64) -> (Went, u64) {
    let extent_start = stage.put(who, 256, &word);
    let (nr_extents, extent_order) = (1, order);
    let arg = Reservation { extent_start, nr_extents, extent_order, domid: domid::SELF, ..Reservation::default() };
    let arg = stage.put(who, 0, &arg);
    let went = stage.call(who, Hypercall::MemoryOp, &[op.number(), arg]);
    (went, stage.get(who, extent_start))
}

fn populate(stage: &mut Stage, who: &Actor) -> Option<u64> {
    let (went, frame) = reservation(stage, who, MemoryOp::PopulatePhysmap, 0, 999);
    (went.result == Ok(1)).then_some(frame)
}

fn give_back(stage: &mut Stage, who: &Actor, frame: u64) {
    assert_eq!(reservation(stage, who, MemoryOp::DecreaseReservation, 0, frame).0.result, Ok(1));
}

fn has(stage: &mut Stage, who: &Actor) -> u64 {
    let arg = stage.put(who, 0, &domid::SELF);
    let went = stage.call(who, Hypercall::MemoryOp, &[MemoryOp::CurrentReservation.number(), arg]);
    went.result.expect("its own")
}

fn update(stage: &mut Stage, who: &Actor, table: Frame, slot: usize, val: u64) {
    let arg = stage.put(who, 512, &MmuUpdate { ptr: table.address() + 8 * slot as u64, val });
    let went = stage.call(who, Hypercall::MmuUpdate, &[arg, 1, 0, u64::from(domid::SELF)]);
    assert_eq!(went.result, Ok(0));
}

fn set_limit(stage: &Stage, who: &Actor, limit: u64) {
    stage.domain(who).max_pages.store(limit, Relaxed);
}

/// A guest mapped each page it got and gave it back at once: it kept the page, and its count never moved. With 16 MiB it
/// came to own 478 of 511 MiB.
#[test]
fn a_domain_owns_no_more_than_its_limit() {
    tell(600, |stage| {
        let guest = stage.enter(false);
        let limit = stage.domain(&guest).max_pages.load(Relaxed);
        let mut kept = 0;
        for slot in build::SLOTS..400 {
            let Some(frame) = populate(stage, &guest) else { break };
            update(stage, &guest, guest.pages[page::L1], slot, frame << 12 | LEAF | pte::WRITE);
            give_back(stage, &guest, frame);
            kept += 1;
        }
        let (owned, told) = (stage.world.frames.owned(guest.id), has(stage, &guest));
        assert!(u64::from(owned) <= limit, "{owned} frames owned, {told} told, {limit} allowed");
        assert_eq!((kept, told), (limit - build::PAGES as u64, limit), "given back or not, what it maps is its own");
        for slot in build::SLOTS..build::SLOTS + 8 {
            update(stage, &guest, guest.pages[page::L1], slot, 0);
        }
        assert_eq!(has(stage, &guest), build::PAGES as u64, "with the last mapping they are gone");
    });
}

/// What a balloon does: a page nothing refers to is free at once, and can be had again.
#[test]
fn a_balloon_gives_and_takes() {
    tell(300, |stage| {
        let guest = stage.enter(false);
        set_limit(stage, &guest, build::PAGES as u64);
        assert_eq!(populate(stage, &guest), None);
        let last = build::PAGES - 1;
        let free = stage.world.frames.free_frames();
        for _ in 0..3 {
            update(stage, &guest, guest.pages[page::L1], last, 0);
            let frame = if has(stage, &guest) == build::PAGES as u64 { guest.pages[last].number() } else { 0 };
            give_back(stage, &guest, frame);
            assert_eq!((has(stage, &guest), stage.world.frames.free_frames()), (build::PAGES as u64 - 1, free + 1));
            let again = populate(stage, &guest).expect("there is room again");
            assert_eq!(again, frame, "the frame that was freed last");
            assert_eq!(populate(stage, &guest), None);
        }
    });
}

/// Tables that take more than one step to take down keep what they lead to a while; a guest does not have to know that.
#[test]
fn what_is_left_to_take_down_does_not_count() {
    tell(300, |stage| {
        let guest = stage.enter(false);
        set_limit(stage, &guest, 100);
        let more: Vec<Frame> =
            (0..14).map(|_| Frame::new(populate(stage, &guest).expect("there is room")).expect("a frame")).collect();
        let [root, l3, l2, page] = [more[0], more[1], more[2], more[3]];
        let entry = |to: Frame| to.address() | LEAF;
        stage.m.poke(root, 0, entry(l3));
        stage.m.poke(l3, 0, entry(l2));
        for (slot, l1) in more[4..].iter().enumerate() {
            stage.m.poke(l2, slot, entry(*l1));
            (0..512).for_each(|slot| stage.m.poke(*l1, slot, entry(page)));
        }
        for command in [MmuextCommand::PinL4, MmuextCommand::Unpin] {
            let arg =
                stage.put(&guest, 0, &MmuextOp { cmd: command as u32, arg1: root.number(), ..Default::default() });
            let went = stage.call(&guest, Hypercall::MmuextOp, &[arg, 1, 0, u64::from(domid::SELF)]);
            assert_eq!(went.result, Ok(0), "{command:?}");
        }
        assert!(stage.world.frames.info(page).expect("RAM").owner.refs > 1, "still being taken down");
        set_limit(stage, &guest, stage.world.frames.owned(guest.id).into());
        give_back(stage, &guest, page.number());
        assert!(populate(stage, &guest).is_some(), "the page given back has made room");
    });
}

/// Maps 16 grants for a device: many handles, and no entry of a page table. Answers the statuses and the longest step.
fn map_some(stage: &mut Stage, guest: &Actor, gref: u32) -> (Vec<i16>, u64) {
    let call = MapGrantRef { flags: map::DEVICE, gref, dom: guest.id.0, ..Default::default() };
    let arg = stage.put(guest, 0, &[call; 16]);
    let longest = stage.on_cpu(guest, |ctx, _| {
        let regs = &mut ctx.state.regs;
        (regs.rax, regs.rdi) = (Hypercall::GrantTableOp.number(), GrantOp::MapGrantRef as u64);
        (regs.rsi, regs.rdx) = (arg, 16);
        let _ = trap::handle(ctx, Exit::Syscall);
        let mut longest = 0;
        while ctx.state.call.is_some() {
            let before = ctx.m.work_with(&ctx.world.frames);
            let _ = dispatch::step(ctx);
            longest = longest.max(ctx.m.work_with(&ctx.world.frames) - before);
        }
        longest
    });
    (stage.get::<[MapGrantRef; 16]>(guest, arg).map(|call| call.status).to_vec(), longest)
}

/// Uses up all 8,192 handles of a domain that has a grant table.
fn fill_handles(stage: &mut Stage, guest: &Actor) {
    let table = stage.domain(guest).grants.table_frames().next().expect("it has a table");
    let frame = guest.pages[page::DATA].number();
    let grant = u64::from(entry::PERMIT_ACCESS) | u64::from(guest.id.0) << 16 | frame << 32;
    (0..40).for_each(|gref| stage.m.poke(table, gref, grant));
    for n in 0..32 * 16 {
        let (statuses, longest) = map_some(stage, guest, n / 15);
        assert_eq!(statuses, [status::OKAY; 16], "call {n}");
        assert!(longest < 4_000, "call {n} looked {longest} times at memory in one step");
    }
}

fn set_up_table(stage: &mut Stage, guest: &Actor, nr_frames: u32) {
    let setup = SetupTable { dom: domid::SELF, nr_frames, frame_list: at(page::MORE_ARGS), ..Default::default() };
    let arg = stage.put(guest, 0, &setup);
    assert_eq!(stage.call(guest, Hypercall::GrantTableOp, &[GrantOp::SetupTable as u64, arg, 1]).result, Ok(0));
    assert_eq!(stage.get::<SetupTable>(guest, arg).status, status::OKAY);
}

/// Each grant that was mapped began a search through all handles at the first: 16 times 8,192 in a step (P8).
#[test]
fn a_free_handle_is_not_searched_for_from_the_first() {
    tell(300, |stage| {
        let guest = stage.enter(false);
        set_up_table(stage, &guest, 1);
        fill_handles(stage, &guest);
        let (statuses, longest) = map_some(stage, &guest, 39);
        assert_eq!(statuses, [status::NO_SPACE; 16]);
        assert!(longest < 4_000, "looked {longest} times at memory");
        for handle in [8_191, 5, 6_000] {
            let call = UnmapGrantRef { handle, dev_bus_addr: guest.pages[page::DATA].address(), ..Default::default() };
            let arg = stage.put(&guest, 0, &call);
            let went = stage.call(&guest, Hypercall::GrantTableOp, &[GrantOp::UnmapGrantRef as u64, arg, 1]);
            assert_eq!((went.result, stage.get::<UnmapGrantRef>(&guest, arg).status), (Ok(0), status::OKAY));
        }
        let (statuses, longest) = map_some(stage, &guest, 39);
        assert_eq!(statuses[..4], [status::OKAY, status::OKAY, status::OKAY, status::NO_SPACE]);
        assert!(longest < 2 * 8_192 + 8_000, "one pass over the handles: {longest}");
    });
}

/// One guest that takes all the memory there is does not keep another from its event channels and grants.
#[test]
fn what_a_domain_may_need_is_set_aside() {
    tell(400, |stage| {
        let [greedy, guest, dom0] = [stage.enter(false), stage.enter(false), stage.enter(true)];
        set_limit(stage, &greedy, 1 << 20);
        while populate(stage, &greedy).is_some() {}
        let before = stage.world.frames.free_frames();

        set_up_table(stage, &guest, 32);
        let mut ports = 0;
        let refused = loop {
            let arg = stage.put(&guest, 0, &AllocUnbound { dom: domid::SELF, remote_dom: domid::SELF, port: 0 });
            let went = stage.call(&guest, Hypercall::EventChannelOp, &[EventOp::AllocUnbound.number(), arg]);
            let Ok(0) = went.result else { break went.result };
            ports += 1;
        };
        assert_eq!((ports, refused), (4095, Err(Errno::NoSpc)));

        fill_handles(stage, &guest);
        assert_eq!(before - stage.world.frames.free_frames(), kept_frames(2) - 7, "all that can be needed was needed");

        let mut call =
            Domctl { cmd: DomctlOp::CreateDomain as u32, interface_version: INTERFACE_VERSION, ..Default::default() };
        let wanted = CreateDomain { max_vcpus: 1, ..Default::default() };
        call.payload[..size_of::<CreateDomain>()].copy_from_slice(wanted.as_bytes());
        let arg = stage.put(&dom0, 0, &call);
        assert_eq!(stage.call(&dom0, Hypercall::Domctl, &[arg]).result, Err(Errno::NoMem), "what is left is set aside");
    });
}

/// What the longest step of each of some calls costs on a machine whose memory is in pieces.
fn costs(memory: usize) -> Vec<(&'static str, u64)> {
    let (send, costs) = std::sync::mpsc::channel();
    tell(memory, move |stage| {
        let [guest, holder, dom0] = [stage.enter(false), stage.enter(false), stage.enter(true)];
        set_limit(stage, &guest, 1 << 20);
        set_limit(stage, &holder, 1 << 20);
        // Every second frame belongs to somebody, and so do all that lie together.
        let take = |order| stage.world.frames.populate(stage.m, holder.id, order, 0, 1 << 20);
        let all: Vec<Frame> = std::iter::from_fn(|| take(0).ok()).collect();
        for frame in all.iter().filter(|frame| frame.index() % 2 == 1) {
            assert_eq!(stage.world.frames.give_back(stage.m, *frame, holder.id), Ok(()));
        }
        while take(1).is_ok() {}
        for order in [1, 5, 9] {
            let (went, _) = reservation(stage, &guest, MemoryOp::PopulatePhysmap, order, 999);
            assert_eq!(went.result, Ok(0), "no run is free");
            send.send(("a run that is not there", went.longest)).expect("it is awaited");
        }
        for frame in all.iter().rev().take(1024).filter(|frame| frame.index() % 2 == 0) {
            assert_eq!(stage.world.frames.give_back(stage.m, *frame, holder.id), Ok(()));
        }
        for (order, what) in [(0, "one frame"), (9, "a run")] {
            let (went, frame) = reservation(stage, &guest, MemoryOp::PopulatePhysmap, order, 999);
            assert_eq!(went.result, Ok(1), "order {order}");
            send.send((what, went.longest)).expect("it is awaited");
            if order == 0 {
                let (went, _) = reservation(stage, &guest, MemoryOp::DecreaseReservation, 0, frame);
                send.send(("one frame given back", went.longest)).expect("it is awaited");
            }
        }
        let (cmd, domain) = (DomctlOp::DestroyDomain as u32, holder.id.0);
        let mut call = Domctl { cmd, interface_version: INTERFACE_VERSION, domain, ..Default::default() };
        call.payload[..8].copy_from_slice(&GRADUALLY.to_le_bytes());
        let arg = stage.put(&dom0, 0, &call);
        let ends = (1..).find(|_| {
            // Each call is a step, which goes through so many frames; some of them take more looks than others.
            let went = stage.call(&dom0, Hypercall::Domctl, &[arg]);
            assert!(went.steps == 1 && went.longest < 8 * u64::from(BUDGET), "the end of a domain: {went:?}");
            assert!([Ok(MORE), Ok(0)].contains(&went.result), "{went:?}");
            went.result == Ok(0)
        });
        assert!(ends > Some(1), "a domain of many frames ends at once");
    });
    costs.into_iter().collect()
}

/// A run of frames was searched for through the whole table with interrupts off: 37 ms at 16 GiB (P8).
#[test]
fn two_sizes_of_machine_cost_the_same() {
    let [small, large] = [costs(9_000), costs(27_000)];
    sim::tell(format_args!("longest steps: {small:?}"));
    assert_eq!(small, large, "a step costs more where the machine is larger");
}
