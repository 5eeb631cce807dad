//! What the hypervisor tells of itself, and the toolstack's calls (core 8).

use crate::calls::{NOBODY, NOTHING};
use crate::ground::Ground;
use crate::shape::Place::{Arg, U16, U32, U64};
use crate::shape::{Answer, Class, HANDLES, Shape, Target, Wants, done, refused, want};
use alloc::boxed::Box;
use guests::abi::Errno;
use guests::abi::context::VcpuContext;
use guests::abi::domctl::{self, Domctl, DomctlOp, IomemPermission};
use guests::abi::physdev::ConsoleIo;
use guests::abi::sysctl::{self, Sysctl, SysctlOp};
use guests::abi::tenon::{BindMessage, CrashReport, Refusals, TenonOp};
use guests::abi::version::{FeatureInfo, VersionOp};
use zerocopy::IntoBytes;

pub(crate) fn xen_version(t: &Target) -> Shape {
    const CITE: &str = "core 8.1";
    let good = done(CITE);
    let shape = Shape::new([t.op, 0, 0, 0, 0]).count(Arg(0), 99, refused(Errno::NoSys, "Xen"));
    let part = |shape: Shape, length: usize, wants| shape.part(Arg(1), &[0u8; 1024][..length], wants);
    let output = Wants::output(good);
    match VersionOp::from_number(t.op).expect("it is of the list") {
        VersionOp::Version => shape.address(Arg(1), Wants::any(good)),
        VersionOp::Extraversion => part(shape, 16, output),
        VersionOp::CompileInfo => part(shape, 144, output),
        VersionOp::Capabilities => part(shape, 1024, output),
        VersionOp::Changeset => part(shape, 64, output),
        VersionOp::PlatformParameters => part(shape, 8, output),
        VersionOp::GuestHandle => part(shape, 16, output),
        VersionOp::GetFeatures => {
            let shape = shape.part(Arg(1), &FeatureInfo::default(), Wants::output(good));
            shape.count(U32(0), 1, refused(Errno::Inval, CITE))
        }
        VersionOp::Pagesize => {
            let wants = Wants::any(refused(Errno::Inval, CITE)).with(Class::Null, want(Answer::Value(4096), CITE));
            shape.address(Arg(1), wants)
        }
        // Not told, or not there.
        VersionOp::Commandline => {
            let never = refused(Errno::Perm, CITE);
            part(shape, 1024, Wants::any(never).on_xen(output))
        }
        VersionOp::BuildId => {
            let never = refused(Errno::NoSys, CITE);
            // Xen's begins with the room there is; without an address it tells the length.
            let wants = Wants::any(never).on_xen(output.with(Class::Null, good));
            shape.part(Arg(1), &[20u32; 6], wants)
        }
    }
}

pub(crate) fn console_io(g: &Ground, t: &Target) -> Shape {
    const CITE: &str = "core 8.2";
    let good = done(CITE);
    let perm = refused(Errno::Perm, CITE);
    let shape = Shape::new([t.op, 2, 0, 0, 0]).count(Arg(0), 99, refused(Errno::NoSys, "Xen"));
    let fault = refused(Errno::Fault, HANDLES);
    match ConsoleIo::from_number(t.op).expect("it is of the list") {
        ConsoleIo::Write => {
            // Who has no console writes to the log.
            shape.part(Arg(2), b"  ", Wants::input(good)).count(Arg(1), 3, fault).count(Arg(1), 0x7fff_ffff, fault)
        }
        ConsoleIo::Read => {
            // Xen notices a bad buffer when there is a byte to put in it; ours before a byte is taken from the console.
            let wants = Wants::output(good).on_xen(Wants::any(good));
            shape.part(Arg(2), b"  ", if g.console { wants } else { Wants::any(perm) })
        }
    }
}

/// A call with an interface version for those with authority; others learn nothing at all.
fn toolstack(g: &Ground, wants: Wants) -> Wants {
    g.either(wants, Wants::any(refused(Errno::Perm, "core 8.2")))
}

pub(crate) fn platform_op() -> Shape {
    let version = refused(Errno::Acces, "Xen");
    let wants = Wants::any(refused(Errno::Perm, "core 8.2")).on_xen(Wants::input(version));
    Shape::new([0; 5]).part(Arg(0), &[0u64; 17], wants)
}

pub(crate) fn sysctl(g: &Ground, t: &Target) -> Shape {
    let arg = Sysctl {
        cmd: u32::try_from(t.op).expect("32 bits"),
        interface_version: sysctl::INTERFACE_VERSION,
        payload: [0; 128],
    };
    let perm = refused(Errno::Perm, "core 8.2");
    let shape = Shape::new([0; 5]).count(U32(4), 1, g.either(refused(Errno::Acces, "Xen"), perm)).count(
        U32(0),
        99,
        g.either(refused(Errno::NoSys, "Xen"), perm),
    );
    match SysctlOp::from_number(t.op).expect("it is of the list") {
        // Room for no text: the buffer is not looked at.
        SysctlOp::PhysInfo | SysctlOp::ReadConsole => {
            shape.part(Arg(0), &arg, toolstack(g, Wants::output(done("Xen"))))
        }
    }
}

pub(crate) fn domctl(g: &Ground, t: &Target) -> Shape {
    let op = DomctlOp::from_number(t.op).expect("it is of the list");
    let nobody = u16::try_from(NOBODY).expect("16 bits");
    let mut arg = Domctl {
        cmd: u32::try_from(t.op).expect("32 bits"),
        interface_version: domctl::INTERFACE_VERSION,
        domain: nobody,
        pad: [0; 3],
        payload: [0; 128],
    };
    let perm = refused(Errno::Perm, "core 8.2");
    let no_domain = refused(Errno::Srch, "Xen");
    let shape = Shape::new([0; 5]).count(U32(4), 1, g.either(refused(Errno::Acces, "Xen"), perm)).domain(
        U16(8),
        NOBODY,
        g.either(no_domain, perm),
    );
    // What only others can have done to them.
    let (own, bad) = (u64::from(g.own), g.either(refused(Errno::Inval, "Xen"), perm));
    let good = done("Xen");
    let input = toolstack(g, Wants::input(good));
    match op {
        DomctlOp::CreateDomain => {
            // Flags nobody knows: no domain is made.
            arg.domain = 0;
            let flags = 20;
            arg.payload[flags..flags + 4].copy_from_slice(u32::MAX.as_bytes());
            let mut shape = shape.part(Arg(0), &arg, toolstack(g, Wants::input(bad)));
            shape.domains.clear();
            shape.domain(U16(8), NOBODY, bad)
        }
        DomctlOp::GetDomainInfo => {
            arg.domain = g.own;
            shape.part(Arg(0), &arg, toolstack(g, Wants::output(done("Xen"))))
        }
        DomctlOp::DestroyDomain => {
            arg.domain = g.spare();
            shape.part(Arg(0), &arg, input).domain(U16(8), own, bad)
        }
        DomctlOp::PauseDomain | DomctlOp::UnpauseDomain => {
            arg.domain = g.child;
            shape.part(Arg(0), &arg, input).domain(U16(8), own, bad)
        }
        DomctlOp::MaxMem => {
            arg.domain = g.child;
            shape.part(Arg(0), &arg, input)
        }
        DomctlOp::MaxVcpus => {
            arg.domain = g.child;
            arg.payload[0] = 1;
            shape.part(Arg(0), &arg, input).domain(U16(8), own, bad).count(U32(16), 2, bad).count(U32(16), 1 << 31, bad)
        }
        DomctlOp::IomemPermission => {
            // Frames that are no device's: nothing is handed on.
            arg.domain = g.child;
            let range = IomemPermission { first_frame: 1, nr_frames: 1, allow: 1, ..IomemPermission::default() };
            arg.payload[..size_of_val(&range)].copy_from_slice(range.as_bytes());
            let refused = perm.xen(Answer::Done);
            let shape = shape.part(Arg(0), &arg, toolstack(g, Wants::input(refused)));
            shape.domain(U16(8), own, refused).count(U64(24), 0, bad)
        }
        DomctlOp::SetVcpuContext => {
            // There is no root in it.
            arg.domain = g.spare();
            let context = Box::<VcpuContext>::default();
            let wants = toolstack(g, Wants::input(bad));
            // Without an address Xen makes the vcpu as it was.
            let null = g.either(refused(Errno::Fault, HANDLES), perm).xen(Answer::Done);
            let list = wants.with(Class::Null, null);
            let shape = shape.part(Arg(0), &arg, wants).part(U64(24), context.as_bytes(), list);
            shape.domain(U16(8), own, bad).count(U32(16), NOTHING, bad)
        }
        DomctlOp::GetVcpuContext => {
            arg.domain = g.child;
            let context = Box::<VcpuContext>::default();
            let output = toolstack(g, Wants::output(good));
            // Xen writes the call back as it was.
            let back = good.xen(Answer::Refused(Errno::Fault));
            let input = toolstack(g, Wants::input(good).with(Class::ReadOnly, back));
            let shape = shape.part(Arg(0), &arg, input).part(U64(24), context.as_bytes(), output);
            let no_state = g.either(refused(Errno::NoData, "Xen"), perm);
            let shape = shape.domain(U16(8), own, bad).domain(U16(8), u64::from(g.spare()), no_state);
            shape.count(U32(16), NOTHING, bad)
        }
    }
}

pub(crate) fn tenon(g: &Ground, t: &Target) -> Shape {
    const CITE: &str = "tenon.rs";
    let perm = refused(Errno::Perm, CITE);
    let absent = Wants::any(refused(Errno::NoSys, CITE));
    let shape = Shape::new([t.op, u64::from(g.own), 0, 0, 0]);
    let no_domain = g.either(refused(Errno::Srch, CITE), perm).xen(Answer::Refused(Errno::NoSys));
    // What each of them writes.
    let output = match TenonOp::from_number(t.op).expect("it is of the list") {
        TenonOp::CrashReport => CrashReport::default().as_bytes().to_vec(),
        TenonOp::Refusals => Refusals::default().as_bytes().to_vec(),
        TenonOp::BindMessage => BindMessage::default().as_bytes().to_vec(),
        TenonOp::Wait => {
            g.wake_soon();
            return shape.address(Arg(2), Wants::any(done(CITE)).on_xen(absent));
        }
    };
    let wants = g.either(Wants::output(done(CITE)), Wants::any(perm)).on_xen(absent);
    shape.part(Arg(2), &output[..], wants).domain(Arg(1), NOBODY, no_domain)
}
