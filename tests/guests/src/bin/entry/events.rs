//! Event channels, the scheduler, vcpus (core 5, 6, 7).

use crate::calls::{NOBODY, NOTHING};
use crate::ground::Ground;
use crate::shape::Place::{Arg, U16, U32, U64};
use crate::shape::{Answer, Class, Shape, Target, Wants, done, refused, want};
use alloc::boxed::Box;
use guests::abi::context::VcpuContext;
use guests::abi::event::{
    AllocUnbound, BindInterdomain, BindIpi, BindVcpu, BindVirq, EventOp, PortArg, Reset, Status, Virq,
};
use guests::abi::sched::{Poll, RemoteShutdown, SchedOp, Shutdown};
use guests::abi::vcpu::{RegisterArea, RegisterVcpuInfo, SetPeriodicTimer, SetSingleshotTimer, VcpuOp};
use guests::abi::{Errno, domid};
use zerocopy::IntoBytes;

/// Long enough for none of ours to be meant.
const NO_FRAME: u64 = 0xf_ffff_ffff;

pub(crate) fn event_channel_op(g: &Ground, t: &Target) -> Shape {
    const CITE: &str = "core 5.2";
    let (good, bad) = (done(CITE), refused(Errno::Inval, CITE));
    let (no_domain, not_ours) = (refused(Errno::Srch, CITE), refused(Errno::Perm, CITE));
    let no_vcpu = refused(Errno::NoEnt, CITE);
    let port = g.port();
    let shape = Shape::new([t.op, 0, 0, 0, 0]).count(Arg(0), 99, refused(Errno::NoSys, "Xen"));
    let own = |shape: Shape| if g.subject { shape.domain(U16(0), 0, not_ours) } else { shape };
    let of_port = |shape: Shape| {
        let arg = PortArg { port };
        shape.part(Arg(1), &arg, Wants::input(good)).count(U32(0), NOTHING, bad)
    };
    match EventOp::from_number(t.op).expect("it is of the list") {
        EventOp::BindInterdomain => {
            let arg = BindInterdomain { remote_dom: domid::SELF, remote_port: port, ..BindInterdomain::default() };
            let shape = shape.part(Arg(1), &arg, Wants::output(good)).count(U32(4), NOTHING, bad);
            let shape = shape.domain(U16(0), NOBODY, no_domain);
            if g.subject { shape.domain(U16(0), 0, bad) } else { shape }
        }
        EventOp::BindVirq => {
            let arg = BindVirq { virq: Virq::Xenpmu as u32, ..BindVirq::default() };
            let shape = shape.part(Arg(1), &arg, Wants::output(good));
            shape.count(U32(0), 24, bad).count(U32(4), NOTHING, no_vcpu)
        }
        // For domains with devices, of which there are none.
        EventOp::BindPirq => {
            let wants = Wants::any(refused(Errno::Perm, CITE)).on_xen(Wants::input(bad));
            shape.part(Arg(1), &[u32::from(u16::MAX), 0, 0], wants)
        }
        EventOp::Close | EventOp::Send => of_port(shape).count(U32(0), 0, bad),
        // Any port there can be.
        EventOp::Unmask => of_port(shape).count(U32(0), 0, done("Xen")),
        EventOp::Status => {
            let arg = Status { dom: domid::SELF, port, ..Status::default() };
            let shape = shape.part(Arg(1), &arg, Wants::output(good)).count(U32(4), NOTHING, bad);
            own(shape.domain(U16(0), NOBODY, no_domain))
        }
        EventOp::AllocUnbound => {
            let arg = AllocUnbound { dom: domid::SELF, remote_dom: domid::SELF, port: 0 };
            own(shape.part(Arg(1), &arg, Wants::output(good)).domain(U16(0), NOBODY, no_domain))
        }
        EventOp::BindIpi => {
            shape.part(Arg(1), &BindIpi::default(), Wants::output(good)).count(U32(0), NOTHING, no_vcpu)
        }
        EventOp::BindVcpu => {
            let shape = shape.part(Arg(1), &BindVcpu { port, vcpu: 0 }, Wants::input(good));
            shape.count(U32(0), NOTHING, bad).count(U32(4), NOTHING, no_vcpu)
        }
        EventOp::Reset => {
            // A good one would close what the guest lives by.
            let nobody = u16::try_from(NOBODY).expect("16 bits");
            own(shape.part(Arg(1), &Reset { dom: nobody }, Wants::input(no_domain)).domain(U16(0), NOBODY, no_domain))
        }
        EventOp::InitControl => {
            // A good one would be refused here, and on Xen change the events of the whole domain: see `differences`.
            let shape = shape.part(Arg(1), &[NO_FRAME, NOTHING << 32, 0], Wants::input(no_vcpu));
            shape.count(U32(12), 0, bad)
        }
        EventOp::ExpandArray => {
            let never = refused(Errno::OpNotSupp, CITE);
            shape.part(Arg(1), &NO_FRAME, Wants::any(never).on_xen(Wants::input(never)))
        }
        EventOp::SetPriority => {
            let never = refused(Errno::NoSys, CITE);
            shape.part(Arg(1), &[port, 0], Wants::any(never).on_xen(Wants::input(never)))
        }
    }
}

pub(crate) fn sched_op(g: &Ground, t: &Target) -> Shape {
    const CITE: &str = "core 5.4";
    let (good, bad) = (done(CITE), refused(Errno::Inval, CITE));
    let never = refused(Errno::NoSys, CITE);
    let shape = Shape::new([t.op, 0, 0, 0, 0]).count(Arg(0), 99, refused(Errno::NoSys, "Xen"));
    match SchedOp::from_number(t.op).expect("it is of the list") {
        SchedOp::Yield => shape.address(Arg(1), Wants::any(good)),
        SchedOp::Block => {
            g.wake_soon();
            shape.address(Arg(1), Wants::any(good))
        }
        SchedOp::Shutdown => shape.part(Arg(1), &Shutdown { reason: 0 }, Wants::input(want(Answer::Ends, CITE))),
        SchedOp::Poll => {
            let arg = Poll { nr_ports: 1, timeout: 1, ..Poll::default() };
            let shape = shape.part(Arg(1), &arg, Wants::input(good)).part(U64(0), &g.port(), Wants::input(good));
            shape.count(U32(8), 129, bad).count(U32(8), u64::from(u32::MAX), bad)
        }
        SchedOp::RemoteShutdown => {
            let nobody = u16::try_from(NOBODY).expect("16 bits");
            let no_domain = refused(Errno::Srch, "Xen");
            let arg = RemoteShutdown { domain: nobody, pad: 0, reason: 0 };
            let shape = shape.part(Arg(1), &arg, Wants::input(no_domain)).domain(U16(0), NOBODY, no_domain);
            if g.subject { shape.domain(U16(0), 0, refused(Errno::Perm, CITE)) } else { shape }
        }
        SchedOp::ShutdownCode => {
            shape.part(Arg(1), &Shutdown { reason: 0 }, Wants::any(never).on_xen(Wants::input(good)))
        }
        // Identity 99 is no watchdog.
        SchedOp::Watchdog => shape.part(Arg(1), &[99u32, 0], Wants::any(never).on_xen(Wants::input(bad))),
        SchedOp::PinOverride => shape.part(Arg(1), &[-1i32], Wants::any(never).on_xen(Wants::input(bad))),
    }
}

pub(crate) fn vcpu_op(t: &Target) -> Shape {
    const CITE: &str = "core 7";
    const TIMERS: &str = "core 6.3";
    let (good, bad) = (done(CITE), refused(Errno::Inval, CITE));
    let shape = Shape::new([t.op, 0, 0, 0, 0]).count(Arg(1), NOTHING, refused(Errno::NoEnt, CITE)).count(
        Arg(0),
        99,
        refused(Errno::NoSys, CITE),
    );
    let other = |mut shape: Shape| {
        shape.args[1] = 1;
        shape
    };
    // Where the guest wants something written: an address in the structure, which is tried when it is written.
    let area = Wants::any(good)
        .with(Class::Hypervisor, refused(Errno::Fault, "core 1.7"))
        .with(Class::NotCanonical, refused(Errno::Fault, "core 1.7"));
    let of_area = |shape: Shape| shape.part(Arg(2), &RegisterArea::default(), Wants::input(good)).address(U64(0), area);
    match VcpuOp::from_number(t.op).expect("it is of the list") {
        VcpuOp::Initialise => {
            let context = Box::<VcpuContext>::default();
            let exists = refused(Errno::Exist, CITE);
            shape.part(Arg(2), context.as_bytes(), Wants::input(exists))
        }
        VcpuOp::Up => shape.address(Arg(2), Wants::any(good)),
        VcpuOp::Down => other(shape).address(Arg(2), Wants::any(good)),
        VcpuOp::IsUp => shape.address(Arg(2), Wants::any(want(Answer::Value(1), CITE))),
        VcpuOp::GetRunstateInfo => shape.part(Arg(2), &[0u64; 6], Wants::output(good)),
        VcpuOp::RegisterRunstateMemoryArea => other(of_area(shape)),
        VcpuOp::SetPeriodicTimer => {
            let arg = SetPeriodicTimer { period_ns: 1_000_000_000 };
            let shape = shape.part(Arg(2), &arg, Wants::input(done(TIMERS)));
            shape.count(U64(0), 999_999, refused(Errno::Inval, TIMERS))
        }
        VcpuOp::StopPeriodicTimer => shape.address(Arg(2), Wants::any(done(TIMERS))),
        VcpuOp::SetSingleshotTimer => {
            let arg = SetSingleshotTimer { timeout_abs_ns: u64::MAX >> 2, ..SetSingleshotTimer::default() };
            let shape = shape.part(Arg(2), &arg, Wants::input(done(TIMERS)));
            shape.count(Arg(1), 1, refused(Errno::Inval, TIMERS))
        }
        VcpuOp::StopSingleshotTimer => {
            let shape = shape.address(Arg(2), Wants::any(done(TIMERS)));
            shape.count(Arg(1), 1, refused(Errno::Inval, TIMERS))
        }
        VcpuOp::RegisterVcpuInfo => {
            let arg = RegisterVcpuInfo { mfn: NO_FRAME, offset: 0, reserved: 0 };
            let outside = refused(Errno::NxIo, "Xen");
            let no_frame = refused(Errno::Inval, "Xen");
            let shape = other(shape).part(Arg(2), &arg, Wants::input(no_frame));
            shape.count(U32(8), 4096 - 56, outside).count(U32(8), 4, outside)
        }
        VcpuOp::SendNmi => other(shape).address(Arg(2), Wants::any(bad).with(Class::Null, good)),
        // Of a vcpu that may move there is nothing to tell; Xen ties the only CPU's to it.
        VcpuOp::GetPhysid => shape.part(Arg(2), &0u64, Wants::any(bad).on_xen(Wants::output(good))),
        VcpuOp::RegisterVcpuTimeMemoryArea => other(of_area(shape)),
        VcpuOp::RegisterRunstatePhysArea | VcpuOp::RegisterVcpuTimePhysArea => {
            shape.address(Arg(2), Wants::any(refused(Errno::NoSys, CITE)))
        }
    }
}
