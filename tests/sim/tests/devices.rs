//! What a domain with devices may do, and nobody else: messages of devices, PCI configuration, frames outside RAM, ids asked
//! for, and that its turn comes soon.

use hv_core::addr::{DomainId, Port, VcpuId};
use hv_core::domain::Domain;
use hv_core::machine::{Arrived, Exit, FIRST_MESSAGE, Frames, Interrupt, MESSAGES};
use hv_core::sched::life::{self, Runner, Step};
use hv_core::trap;
use hv_core::vcpu::Place;
use hv_core::world::CpuCtx;
use hypercall_abi::domctl::{CreateDomain, Domctl, DomctlOp, INTERFACE_VERSION, IomemPermission};
use hypercall_abi::event::{EventOp, PortArg, PortStatus, Status};
use hypercall_abi::mmu::pte;
use hypercall_abi::shared::offset;
use hypercall_abi::tenon::{BindMessage, TenonOp};
use hypercall_abi::{Errno, Hypercall, domid};
use sim::world::Context;
use sim::world::build::{at, page};
use sim::world::machine::{self, WholeMachine};
use sim::world::script::{Actor, Stage, tell};
use std::ops::ControlFlow;
use zerocopy::IntoBytes;

/// Has a domain bind a vector to a port of another, or of its own.
fn bind(stage: &mut Stage, who: &Actor, of: u16, vcpu: u32) -> Result<BindMessage, Errno> {
    let arg = stage.put(who, 0, &BindMessage { vcpu, ..Default::default() });
    let args = [TenonOp::BindMessage.number(), of.into(), arg];
    stage.call(who, Hypercall::Tenon, &args).result.map(|_| stage.get(who, arg))
}

fn close(stage: &mut Stage, who: &Actor, port: u32) {
    let arg = stage.put(who, 0, &PortArg { port });
    assert_eq!(stage.call(who, Hypercall::EventChannelOp, &[EventOp::Close.number(), arg]).result, Ok(0));
}

/// Whether a port is pending; it is not afterwards.
fn take_pending(stage: &Stage, who: &Actor, port: u32) -> bool {
    let shared = stage.domain(who).shared_info().expect("it has one");
    let word = offset::EVTCHN_PENDING / 8 + port as usize / 64;
    let bits = stage.m.peek(shared, word);
    stage.m.poke(shared, word, bits & !(1 << (port % 64)));
    bits >> (port % 64) & 1 != 0
}

/// A message of a device comes while a domain's vcpu is on the CPU.
fn interrupt(stage: &mut Stage, during: &Actor, vector: u8) {
    stage.on_cpu(during, |ctx, _| {
        let _ = trap::handle(ctx, Exit::Interrupt(Interrupt::Message(vector)));
    });
}

#[test]
fn a_message_raises_the_port_it_is_bound_to_and_no_other() {
    tell(300, |stage| {
        let [dom0, guest] = [stage.enter(true), stage.enter(false)];
        assert_eq!(bind(stage, &guest, domid::SELF, 0).map(|_| ()), Err(Errno::Perm));
        assert_eq!(bind(stage, &dom0, domid::SELF, 7).map(|_| ()), Err(Errno::Inval));
        assert_eq!(bind(stage, &dom0, 0x7000, 0).map(|_| ()), Err(Errno::Srch));
        let own = bind(stage, &dom0, domid::SELF, 1).expect("it may");
        let theirs = bind(stage, &dom0, guest.id.0, 0).expect("it controls others");
        assert_eq!((own.address, theirs.address), (0xfee0_0000, 0xfee0_0000), "this CPU's");
        assert_ne!(own.data, theirs.data);
        let [mine, other] = [own.data, theirs.data].map(|data| u8::try_from(data).expect("a vector"));
        let status = stage.put(&dom0, 0, &Status { dom: domid::SELF, port: own.port, ..Default::default() });
        stage.call(&dom0, Hypercall::EventChannelOp, &[EventOp::Status.number(), status]);
        let status: Status = stage.get(&dom0, status);
        assert_eq!((status.status, status.detail, status.vcpu), (PortStatus::Pirq.code(), own.data, 1));
        // Whoever's guest it interrupts.
        interrupt(stage, &guest, mine);
        assert_eq!([take_pending(stage, &dom0, own.port), take_pending(stage, &guest, theirs.port)], [true, false]);
        interrupt(stage, &dom0, other);
        assert_eq!([take_pending(stage, &dom0, own.port), take_pending(stage, &guest, theirs.port)], [false, true]);
        // Nobody sends through it but the device.
        let arg = stage.put(&dom0, 0, &PortArg { port: own.port });
        let sent = stage.call(&dom0, Hypercall::EventChannelOp, &[EventOp::Send.number(), arg]);
        assert_eq!(sent.result, Err(Errno::Inval));
        // A stray message finds nobody, and the vector is free for others.
        close(stage, &dom0, own.port);
        interrupt(stage, &guest, mine);
        assert!(!take_pending(stage, &dom0, own.port));
        assert_eq!(bind(stage, &dom0, domid::SELF, 0).map(|bound| bound.data), Ok(mine.into()));
        // So is that of a domain that is gone.
        let arg = stage.put(&dom0, 0, &domctl(DomctlOp::DestroyDomain, guest.id.0, &[]));
        assert_eq!(stage.call(&dom0, Hypercall::Domctl, &[arg]).result, Ok(0));
        interrupt(stage, &dom0, other);
        assert_eq!(stage.world.message_taker(other), None);
    });
}

#[test]
fn vectors_run_out_and_int_0x80_is_none() {
    tell(300, |stage| {
        let dom0 = stage.enter(true);
        let bound: Vec<u32> =
            std::iter::from_fn(|| bind(stage, &dom0, domid::SELF, 0).ok()).map(|it| it.data).collect();
        assert_eq!(bound.len(), MESSAGES - 1);
        assert!(bound.iter().all(|data| *data != 0x80 && *data >= FIRST_MESSAGE.into() && *data < 0xe0));
        assert_eq!(bind(stage, &dom0, domid::SELF, 0).map(|_| ()), Err(Errno::NoSpc));
        // A reply that cannot be written takes no vector.
        close(stage, &dom0, 1);
        let args = [TenonOp::BindMessage.number(), domid::SELF.into(), at(page::CODE)];
        let shown = pte::PRESENT | pte::USER;
        let code = dom0.pages[page::CODE].address() | shown;
        assert_eq!(stage.call(&dom0, Hypercall::UpdateVaMapping, &[at(page::CODE), code, 0]).result, Ok(0));
        assert_eq!(stage.call(&dom0, Hypercall::Tenon, &args).result, Err(Errno::Fault));
        assert!(bind(stage, &dom0, domid::SELF, 0).is_ok());
    });
}

/// Messages that nobody waits for are let in 64 times, and then not before the next tick.
#[test]
fn a_storm_costs_a_constant() {
    tell(300, |stage| {
        let dom0 = stage.enter(true);
        let bound = bind(stage, &dom0, domid::SELF, 0).expect("it may");
        let vector = u8::try_from(bound.data).expect("a vector");
        let let_in = (0..1000).take_while(|_| {
            interrupt(stage, &dom0, vector);
            !stage.m.holds_messages()
        });
        assert_eq!(let_in.count(), 1 + 64, "one that is waited for, and as many as are no storm");
        assert!(stage.m.armed() <= stage.m.time() + 1_000_000, "the next tick is not far");
        stage.world.tick(stage.m, u64::MAX);
        assert!(!stage.m.holds_messages());
        // Those that somebody waits for are none.
        for _ in 0..1000 {
            assert!(take_pending(stage, &dom0, bound.port));
            interrupt(stage, &dom0, vector);
        }
        assert!(!stage.m.holds_messages());
    });
}

/// A kernel that looks for events itself.
struct Waiter {
    port: Port,
    /// Turns so far, and times its CPU slept.
    seen: [u32; 2],
}

impl Waiter {
    fn head(m: &WholeMachine, domain: &Domain) -> u64 {
        m.peek(domain.shared_info().expect("it has one"), 0) & 0xffff
    }
}

impl Runner<WholeMachine> for Waiter {
    fn run(&mut self, ctx: &mut Context<'_>) -> Option<Exit> {
        self.seen[0] += 1;
        (ctx.state.regs.rax, ctx.state.regs.rdi) = (Hypercall::Tenon.number(), TenonOp::Wait.number());
        Some(Exit::Syscall)
    }

    fn seen(&mut self, _: &mut Context<'_>, _: Step) -> ControlFlow<()> {
        if self.seen[0] == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, WholeMachine>) -> ControlFlow<(), Arrived> {
        self.seen[1] += 1;
        let (m, world) = (cpu_ctx.m, cpu_ctx.world);
        let (domain, port) =
            world.domains.iter().find_map(|it| Some((world.domain(it.id())?, self.port))).expect("it lives");
        let vcpu = world.vcpu(domain, VcpuId(0)).expect("it has one");
        assert_eq!((vcpu.place(), Self::head(m, domain)), (Place::Blocked, 0x100));
        assert!(world.raise(m, domain, port) && !world.raise(m, domain, port));
        assert_eq!((vcpu.place(), Self::head(m, domain)), (Place::Queued, 0x101));
        ControlFlow::Continue(Arrived::default())
    }
}

#[test]
fn waiting_ends_with_any_event_and_leaves_the_mask() {
    tell(300, |stage| {
        let dom0 = stage.enter(true);
        let bound = bind(stage, &dom0, domid::SELF, 0).expect("it may");
        let shared = stage.domain(&dom0).shared_info().expect("it has one");
        stage.m.poke(shared, 0, 0x100); // masked, nothing pending
        stage.world.unpause(stage.m, stage.domain(&dom0));
        let mut waiter = Waiter { port: Port(bound.port), seen: [0; 2] };
        life::live(&mut stage.cpu_ctx(), &mut waiter);
        // Once it sleeps until the event; then an event is there, so it does not.
        assert_eq!(waiter.seen, [3, 1]);
        assert_eq!(Waiter::head(stage.m, stage.domain(&dom0)), 0x101);
    });
}

fn domctl(op: DomctlOp, domain: u16, payload: &[u8]) -> Domctl {
    let mut call = Domctl { cmd: op as u32, interface_version: INTERFACE_VERSION, domain, ..Default::default() };
    call.payload[..payload.len()].copy_from_slice(payload);
    call
}

#[test]
fn an_id_is_given_to_who_asks_for_it() {
    tell(600, |stage| {
        let dom0 = stage.enter(true);
        assert_eq!(dom0.id, DomainId(8), "the first ids are given by request only");
        let create = |stage: &mut Stage, id: u16| {
            let wanted = CreateDomain { max_vcpus: 1, ..Default::default() };
            let arg = stage.put(&dom0, 0, &domctl(DomctlOp::CreateDomain, id, wanted.as_bytes()));
            let went = stage.call(&dom0, Hypercall::Domctl, &[arg]).result;
            went.map(|_| stage.get::<Domctl>(&dom0, arg).domain)
        };
        assert_eq!(create(stage, 5), Ok(5));
        assert_eq!([create(stage, 5), create(stage, 5 + 128)], [Err(Errno::Exist); 2], "it, and its slot, are taken");
        assert_eq!(create(stage, 0x7ff0), Err(Errno::Inval));
        assert_eq!(create(stage, 0), Ok(9), "what was asked for does not change whose turn it is");
    });
}

#[test]
fn frames_of_devices_are_handed_on_by_who_has_them() {
    tell(300, |stage| {
        let [dom0, guest] = [stage.enter(true), stage.enter(false)];
        let limit = stage.m.frame_limit();
        let first = u32::try_from(limit).expect("a small machine");
        stage.domain(&dom0).space.devices.allow(first..first + 8).expect("the first range");
        let show = |stage: &mut Stage, who: &Actor, frame: u64| {
            let entry = frame << 12 | pte::PRESENT | pte::WRITE | pte::USER | pte::PCD | pte::PWT;
            stage.call(who, Hypercall::UpdateVaMapping, &[at(page::DATA), entry, 0]).result
        };
        let hand_on = |stage: &mut Stage, who: &Actor, first_frame: u64, nr_frames: u64, allow: u8| {
            let range = IomemPermission { first_frame, nr_frames, allow, pad: [0; 7] };
            let arg = stage.put(who, 0, &domctl(DomctlOp::IomemPermission, guest.id.0, range.as_bytes()));
            stage.call(who, Hypercall::Domctl, &[arg]).result
        };
        assert_eq!(show(stage, &guest, limit), Err(Errno::Perm));
        assert_eq!(hand_on(stage, &guest, limit, 1, 1), Err(Errno::Perm));
        for (frame, count, allow, why) in [
            (limit + 7, 2, 1, Errno::Perm),
            (3, 1, 1, Errno::Perm),
            (limit, 0, 1, Errno::Inval),
            (limit, u64::MAX, 1, Errno::Inval),
            (u64::MAX, 1, 1, Errno::Inval),
            (limit, 1, 0, Errno::OpNotSupp),
        ] {
            assert_eq!(hand_on(stage, &dom0, frame, count, allow), Err(why), "{frame:#x} {count} {allow}");
        }
        assert_eq!(hand_on(stage, &dom0, limit + 4, 2, 1), Ok(0));
        assert_eq!([limit + 3, limit + 6].map(|frame| show(stage, &guest, frame)), [Err(Errno::Perm); 2]);
        assert_eq!([limit + 4, limit + 5].map(|frame| show(stage, &guest, frame)), [Ok(0); 2]);
        let full = (0..16).map(|_| hand_on(stage, &dom0, limit, 1, 1)).collect::<Result<Vec<_>, _>>();
        assert_eq!(full, Err(Errno::NoSpc));
    });
}

/// Executes an instruction at the beginning of the code page.
fn execute(stage: &mut Stage, who: &Actor, code: &[u8], rax: u64, rdx: u64) -> u64 {
    let mut bytes = [0x90; 8];
    bytes[..code.len()].copy_from_slice(code);
    stage.m.poke(who.pages[page::CODE], 0, u64::from_le_bytes(bytes));
    stage.on_cpu(who, |ctx, _| {
        let regs = &mut ctx.state.regs;
        (regs.rip, regs.rax, regs.rdx) = (at(page::CODE), rax, rdx);
        ctx.state.iopl = 1;
        let _ = trap::handle(ctx, Exit::Fault { vector: 13, error: 0, address: 0 });
        assert_eq!(ctx.state.regs.rip, at(page::CODE) + code.len() as u64, "it was carried out");
        ctx.state.regs.rax
    })
}

#[test]
fn pci_configuration_is_for_who_has_devices() {
    const OUT_EAX: &[u8] = &[0xef];
    const OUT_AX: &[u8] = &[0x66, 0xef];
    const IN_EAX: &[u8] = &[0xed];
    const IN_AL: &[u8] = &[0xec];
    tell(300, |stage| {
        let [dom0, guest] = [stage.enter(true), stage.enter(false)];
        for who in [&guest, &dom0] {
            execute(stage, who, OUT_EAX, 0xff00_1234, 0xcf8);
            execute(stage, who, OUT_AX, 0xabcd, 0xcf8);
            execute(stage, who, OUT_AX, 0xabcd, 0xcfe);
            execute(stage, who, OUT_EAX, 0xabcd, 0xcfe);
            execute(stage, who, OUT_EAX, 6, 0xcf9);
        }
        let configured = std::mem::take(&mut *stage.m.configured.lock().expect("nobody panicked"));
        assert_eq!(configured, [(0xcf8, 4, 0x8000_1234), (0xcfe, 2, 0xabcd)], "no reset, and no reserved bits");
        assert_eq!(execute(stage, &guest, IN_EAX, 0, 0xcfc), 0xffff_ffff);
        assert_eq!(execute(stage, &dom0, IN_EAX, 0, 0xcfc), 0xcfc_0004);
        assert_eq!(execute(stage, &dom0, IN_AL, 0, 0xcff), 1);
        assert_eq!(execute(stage, &dom0, IN_EAX, 0, 0xcfd), 0xffff_ffff, "it would pass the last port");
    });
}

/// One guest computes, and a domain with devices is woken by each message; or it computes as well, and yields.
struct Sharing {
    /// The domain with devices, and its vector.
    serves: DomainId,
    vector: u8,
    /// It never finds an end to its work, and lets others run after so many steps.
    flooded: Option<u64>,
    /// Nanoseconds that each has run: the guest, the other.
    ran: [u64; 2],
    /// The longest time from a message to the turn of who takes it.
    latest: u64,
    sent: Option<u64>,
    until: u64,
}

impl Runner<WholeMachine> for Sharing {
    fn run(&mut self, ctx: &mut Context<'_>) -> Option<Exit> {
        const STEP: u64 = 100_000;
        let serves = ctx.domain.id() == self.serves;
        if serves && let Some(sent) = self.sent.take() {
            self.latest = self.latest.max(ctx.m.time() - sent);
        }
        ctx.m.pass(STEP);
        self.ran[usize::from(serves)] += STEP;
        if ctx.m.is_due() {
            return Some(Exit::Interrupt(Interrupt::Timer));
        }
        let regs = &mut ctx.state.regs;
        if serves {
            // Its work for one message is done in a step, and it looks for the next.
            let shared = ctx.domain.shared_info().expect("it has one");
            (0..4096 / 8).take(8).for_each(|word| ctx.m.poke(shared, offset::EVTCHN_PENDING / 8 + word, 0));
            ctx.m.poke(shared, 0, 0x100);
            ctx.m.poke(shared, 1, 0);
            (regs.rax, regs.rdi) = match self.flooded {
                Some(steps) if !(self.ran[1] / STEP).is_multiple_of(steps) => {
                    return Some(Exit::Interrupt(Interrupt::Other));
                }
                Some(_) => (Hypercall::SchedOp.number(), 0), // yield
                None => (Hypercall::Tenon.number(), TenonOp::Wait.number()),
            };
            return Some(Exit::Syscall);
        }
        if self.sent.is_none() && self.flooded.is_none() {
            self.sent = Some(ctx.m.time());
            return Some(Exit::Interrupt(Interrupt::Message(self.vector)));
        }
        Some(Exit::Interrupt(Interrupt::Other))
    }

    fn seen(&mut self, ctx: &mut Context<'_>, _: Step) -> ControlFlow<()> {
        if ctx.m.time() > self.until { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn idle(&mut self, cpu_ctx: &mut CpuCtx<'_, WholeMachine>) -> ControlFlow<(), Arrived> {
        ControlFlow::Continue(machine::arrived(cpu_ctx.m.idle().unwrap_or(Interrupt::Kick)))
    }
}

/// A domain that others wait for has its turn a millisecond after it is woken, but not more than half of the CPU, however much
/// there is to do.
#[test]
fn who_serves_others_is_soon_there_and_leaves_them_half() {
    for flooded in [None, Some(10), Some(30), Some(u64::MAX)] {
        tell(300, move |stage| {
            let [guest, dom0] = [stage.enter(false), stage.enter(true)];
            let bound = bind(stage, &dom0, domid::SELF, 0).expect("it may");
            let vector = u8::try_from(bound.data).expect("a vector");
            for who in [&guest, &dom0] {
                stage.world.unpause(stage.m, stage.domain(who));
            }
            let until = stage.m.time() + 1_000_000_000;
            let start = [0; 2];
            let mut sharing = Sharing { serves: dom0.id, vector, flooded, ran: start, latest: 0, sent: None, until };
            life::live(&mut stage.cpu_ctx(), &mut sharing);
            let [theirs, ours] = sharing.ran.map(|ran| ran as f64 / 1e9);
            sim::tell(format_args!("flooded {flooded:?}: {theirs:.2} s and {ours:.2} s, latest {} ns", sharing.latest));
            if flooded.is_some() {
                assert!((0.4..0.65).contains(&theirs), "{theirs}");
            } else {
                assert!(sharing.latest <= 1_300_000, "{} ns", sharing.latest);
                assert!(theirs > 0.8 && ours > 0.05, "{theirs} {ours}");
            }
        });
    }
}
