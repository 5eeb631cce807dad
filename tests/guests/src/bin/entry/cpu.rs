//! Traps, callbacks, descriptors, segment bases, debug registers (core 3).

use crate::ground::Ground;
use crate::shape::Place::{Arg, U16, U32, U64};
use crate::shape::{Answer, Class, Shape, Target, Wants, Way, done, refused, want};
use guests::abi::callback::{
    ASSIST_ENABLE, CallbackOp, CallbackRegister, CallbackType, CallbackUnregister, IretContext,
};
use guests::abi::callback::{SegmentBase, TrapInfo};
use guests::abi::physdev::{PhysdevOp, SetIobitmap, SetIopl};
use guests::abi::{Errno, selector};
use guests::{code, probe};
use unikernel::traps;

/// An address that is kept, whatever it is, if a CPU takes it.
fn kept(cite: &'static str) -> Wants {
    Wants::any(done(cite)).with(Class::NotCanonical, refused(Errno::Inval, cite))
}

pub(crate) fn set_trap_table() -> Shape {
    const CITE: &str = "core 10.4";
    let gates = [traps::gate(0x41, 0, true), TrapInfo::default()];
    Shape::new([0; 5])
        .part(Arg(0), &gates, Wants::input(done(CITE)).with(Class::Null, done(CITE)))
        .address(U64(8), kept(CITE))
}

pub(crate) fn set_gdt(g: &Ground) -> Shape {
    let frames = [g.descriptors.frame(0).expect("the page is ours")];
    let bad = refused(Errno::Inval, "core 3.10");
    let entries = u64::from(selector::GUEST_ENTRIES);
    Shape::new([0, 1, 0, 0, 0])
        .part(Arg(0), &frames, Wants::input(done("core 3.10")))
        .count(Arg(1), entries + 1, bad)
        .count(Arg(1), u64::from(u32::MAX), bad)
        .count(Arg(1), 513, refused(Errno::Fault, "core 1.7"))
}

pub(crate) fn set_callbacks() -> Shape {
    // What no CPU takes is passed over.
    let wants = Wants::any(done("Xen"));
    Shape::new([0; 5]).address(Arg(0), wants).address(Arg(1), wants).address(Arg(2), wants)
}

pub(crate) fn set_debugreg() -> Shape {
    let perm = refused(Errno::Perm, "core 3.11");
    let wants = Wants::any(done("core 3.11")).with(Class::Hypervisor, perm).with(Class::NotCanonical, perm);
    Shape::new([0; 5]).address(Arg(1), wants).count(Arg(0), 8, refused(Errno::NoDev, "core 3.11"))
}

pub(crate) fn get_debugreg() -> Shape {
    Shape::new([0; 5]).address(Arg(1), Wants::any(done("core 3.11"))).count(
        Arg(0),
        8,
        refused(Errno::NoDev, "core 3.11"),
    )
}

pub(crate) fn update_descriptor() -> Shape {
    let (good, bad) = (done("core 3.10"), refused(Errno::Inval, "core 3.10"));
    let wants = Wants::any(bad).with(Class::Unmapped, good).with(Class::ReadOnly, good);
    Shape::new([0; 5]).address(Arg(0), wants).machine()
}

pub(crate) fn set_segment_base(t: &Target) -> Shape {
    let shape = Shape::new([t.op, 0, 0, 0, 0]).count(Arg(0), 4, refused(Errno::Inval, "Xen"));
    match SegmentBase::from_number(t.op).expect("it is of the list") {
        SegmentBase::Fs | SegmentBase::GsUser | SegmentBase::GsKernel => shape.address(Arg(1), kept("core 3.11")),
        SegmentBase::GsUserSelector => shape.address(Arg(1), Wants::any(done("core 3.11"))),
    }
}

pub(crate) fn vm_assist(t: &Target) -> Shape {
    Shape::new([u64::from(ASSIST_ENABLE), t.op, 0, 0, 0])
        .address(Arg(2), Wants::any(done("core 3.12")))
        .count(Arg(1), 33, refused(Errno::Inval, "core 3.12"))
        .count(Arg(1), 64 + t.op, refused(Errno::Inval, "core 3.12"))
        .count(Arg(0), 2, refused(Errno::NoSys, "core 3.12"))
}

pub(crate) fn callback_op(t: &Target) -> Shape {
    const CITE: &str = "core 3.4";
    let kind = u16::try_from(t.sub).expect("16 bits");
    let shape = Shape::new([t.op, 0, 0, 0, 0]);
    let no_such = refused(Errno::NoSys, CITE);
    match CallbackOp::from_number(t.op).expect("it is of the list") {
        CallbackOp::Register => {
            let address = traps::handler_address(traps::EVENT);
            let arg = CallbackRegister { kind, address, ..CallbackRegister::default() };
            let shape = shape.part(Arg(1), &arg, Wants::input(done(CITE))).address(U64(8), kept(CITE));
            shape.count(U16(0), 3, no_such).count(U16(0), 100, no_such)
        }
        CallbackOp::Unregister => {
            let good = match CallbackType::from_number(t.sub) {
                Some(CallbackType::Nmi) => done(CITE),
                _ => refused(Errno::Inval, CITE),
            };
            let arg = CallbackUnregister { kind, pad: 0 };
            shape.part(Arg(1), &arg, Wants::input(good)).count(U16(0), 3, no_such).count(U16(0), 100, no_such)
        }
    }
}

pub(crate) fn nmi_op(t: &Target) -> Shape {
    let shape = Shape::new([t.op, 0, 0, 0, 0]);
    if t.op == 1 {
        return shape.address(Arg(1), Wants::any(done("core 8.2")));
    }
    // core 10.4: two words, the second unused.
    let handler = [traps::handler_address(2), 0];
    shape.part(Arg(1), &handler, Wants::input(done("core 8.2"))).address(U64(0), kept("Xen"))
}

/// core 3.7: what cannot be read is the domain's end; the frame is only read.
pub(crate) fn iret() -> Shape {
    let frame = IretContext { ..probe::kernel_frame(code!("nop")) };
    let back = done("core 3.7");
    let mut shape = Shape::new([0; 5]);
    shape.way = Way::Iret;
    shape.part(Arg(0), &frame, Wants::input(back).faults(want(Answer::Ends, "core 3.7")))
}

pub(crate) fn physdev_op(t: &Target) -> Shape {
    let (good, bad) = (done("core 8.2"), refused(Errno::Inval, "core 8.2"));
    let shape = Shape::new([t.op, 0, 0, 0, 0]);
    match PhysdevOp::from_number(t.op).expect("it is of the list") {
        PhysdevOp::SetIopl => shape.part(Arg(1), &SetIopl { iopl: 1 }, Wants::input(good)).count(U32(0), 4, bad),
        PhysdevOp::SetIobitmap => {
            let arg = SetIobitmap { nr_ports: 8, ..SetIobitmap::default() };
            let outside = refused(Errno::Inval, "Xen");
            let wants = Wants::any(good).with(Class::Hypervisor, outside).with(Class::NotCanonical, outside);
            shape.part(Arg(1), &arg, Wants::input(good)).address(U64(0), wants).count(U32(8), 0x1_0001, outside)
        }
        // core 8.2: nothing about real interrupts.
        PhysdevOp::IrqEoi => {
            let wants = Wants::any(refused(Errno::NoSys, "core 8.2")).on_xen(Wants::input(bad));
            shape.part(Arg(1), &[u32::from(u16::MAX)], wants)
        }
    }
}
