//! Calls that went wrong once, told as stories.

mod console;
mod grants;
mod steps;

use grants::{grant, granter, map_grant};
use hv_core::addr::{DomainId, Frame, HOLE_START, VcpuId};
use hv_core::audit::Fact;
use hv_core::domain::{Domain, Powers, Spec};
use hypercall_abi::context::flags;
use hypercall_abi::domctl::{Domctl, DomctlOp, INTERFACE_VERSION};
use hypercall_abi::event::{AllocUnbound, BindIpi, EventOp, InitControl};
use hypercall_abi::memory::{Exchange, MemoryOp, Reservation};
use hypercall_abi::mmu::{MmuUpdate, pte};
use hypercall_abi::vcpu::{RegisterVcpuInfo, VcpuOp};
use hypercall_abi::{Errno, Hypercall, domid};
use sim::world::build::{self, at, page};
use sim::world::script::{Actor, Stage, tell};

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
        let spec = Spec { id: None, powers: Powers::CONSOLE_WRITE, vcpus: 2, max_pages: 7, handle: [9; 16] };
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
