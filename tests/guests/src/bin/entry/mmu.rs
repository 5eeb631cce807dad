//! Page tables (core 4).

use crate::calls::NOBODY;
use crate::ground::Ground;
use crate::shape::Place::{Arg, U32, U64};
use crate::shape::{Class, HANDLES, Place, Shape, Target, Want, Wants, done, refused};
use guests::abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, MulticallEntry, UpdateCommand, uvmf};
use guests::abi::{Errno, Hypercall, domid};
use guests::memory::PAGE;
use guests::tables::current_root;

const SELF: u64 = domid::SELF as u64;
/// A domain is 16 bits of an argument; above them a call may look at nothing.
const SELF_AND_MORE: u64 = SELF | 1 << 16;

/// A domain among the arguments of a call on page tables.
fn foreign(g: &Ground, shape: Shape, place: Place, dom0: Want) -> Shape {
    let shape = shape.domain(place, NOBODY, refused(Errno::Srch, "core 4.4"));
    if g.subject { shape.domain(place, 0, dom0) } else { shape }
}

/// The count of what was done: who cannot be told is not.
fn told(shape: Shape, good: Want) -> Shape {
    shape.part(Arg(2), &0u32, Wants::any(Want { cite: "Xen", ..good }))
}

pub(crate) fn mmu_update(g: &Ground, t: &Target) -> Shape {
    const CITE: &str = "core 4.4";
    let command = UpdateCommand::from_number(t.op).expect("it is of the list");
    let (good, bad) = (done(CITE), refused(Errno::Inval, "Xen"));
    let frame = g.scratch.frame(0).expect("the page is ours");
    let val = match command {
        UpdateCommand::Normal | UpdateCommand::PreserveAd | UpdateCommand::NoTranslate => 0,
        UpdateCommand::MachPhys => g.scratch.first(),
    };
    let unknown = refused(Errno::NoSys, CITE);
    // Four bytes on it is another command; so are the last bytes of a page.
    let target = Wants::any(bad)
        .with(Class::Unmapped, good)
        .with(Class::ReadOnly, good)
        .with(Class::Misaligned, unknown)
        .with(Class::PageEnd, unknown);
    let update = MmuUpdate { ptr: (frame * PAGE) | t.op, val };
    let mut shape = Shape::new([0, 1, 0, SELF, 0]).part(Arg(0), &update, Wants::input(good));
    shape = told(shape, good);
    shape = shape.address(U64(0), target).machine().low(t.op);
    shape = shape.count(Arg(1), 2, refused(Errno::Fault, HANDLES));
    shape = shape.count(Arg(1), 0x7fff_ffff, refused(Errno::Fault, HANDLES));
    shape = shape.domain(Arg(3), SELF | (NOBODY + 1) << 16, refused(Errno::Srch, CITE));
    if g.subject {
        shape = shape.domain(Arg(3), SELF | 1 << 16, refused(Errno::Perm, CITE));
    }
    foreign(g, shape, Arg(3), refused(Errno::Perm, CITE))
}

pub(crate) fn mmuext_op(g: &Ground, t: &Target) -> Shape {
    use MmuextCommand as C;
    const CITE: &str = "core 4.6";
    let command = MmuextCommand::from_number(t.op).expect("it is of the list");
    let scratch = |i| g.scratch.frame(i).expect("the page is ours");
    if command == C::Unpin {
        let _ = g.chain.pin(1);
    }
    let (arg1, arg2) = match command {
        C::PinL1 | C::Unpin => (g.chain.frame(1), 0),
        C::PinL2 => (g.chain.frame(2), 0),
        C::PinL3 => (g.chain.frame(3), 0),
        C::PinL4 => (g.chain.frame(4), 0),
        C::NewBaseptr => (current_root(), 0),
        C::ClearPage => (scratch(0), 0),
        C::CopyPage => (scratch(0), scratch(1)),
        C::SetLdt => (0, 1),
        C::NewUserBaseptr
        | C::TlbFlushLocal
        | C::InvlpgLocal
        | C::TlbFlushMulti
        | C::InvlpgMulti
        | C::TlbFlushAll
        | C::InvlpgAll
        | C::FlushCache
        | C::FlushCacheGlobal
        | C::MarkSuper
        | C::UnmarkSuper => (0, 0),
    };
    let good = match command {
        // Xen's first domain has devices, and with them this right.
        C::FlushCache | C::FlushCacheGlobal => refused(Errno::Acces, CITE).xen(crate::shape::Answer::Done),
        C::MarkSuper | C::UnmarkSuper => refused(Errno::OpNotSupp, CITE),
        _ => done(CITE),
    };
    let op = MmuextOp { cmd: command as u32, pad: 0, arg1, arg2 };
    let mut shape = Shape::new([0, 1, 0, SELF, 0]).part(Arg(0), &op, Wants::input(good));
    shape = told(shape, good);
    let bad = refused(Errno::Inval, CITE);
    shape = match command {
        C::InvlpgLocal | C::InvlpgAll => shape.address(U64(8), Wants::any(good)),
        C::InvlpgMulti | C::TlbFlushMulti => shape.part(U64(16), &1u64, Wants::input(good).faults(bad)),
        C::SetLdt => {
            let bad_classes = [Class::Misaligned, Class::Hypervisor, Class::NotCanonical, Class::PageEnd];
            let wants = bad_classes.iter().fold(Wants::any(good), |wants, class| wants.with(*class, bad));
            shape.address(U64(8), wants).count(U64(16), 8193, bad)
        }
        _ => shape,
    };
    let fault = refused(Errno::Fault, HANDLES);
    let next = if good.answer.refuses() { Want { xen: good.xen.map(|_| fault.answer), ..good } } else { fault };
    shape =
        shape.count(Arg(1), 2, next).count(Arg(1), 0x7fff_ffff, next).count(U32(0), 99, refused(Errno::NoSys, CITE));
    shape = shape.domain(Arg(3), SELF_AND_MORE, Want { cite: "Xen", ..good });
    foreign(g, shape, Arg(3), refused(Errno::Perm, CITE))
}

/// The address whose entry is changed. Nothing is put there: the ground mends itself.
fn mapping(shape: Shape) -> Shape {
    let bad = refused(Errno::Inval, "core 4.5");
    let wants = [Class::Null, Class::Hypervisor, Class::NotCanonical];
    shape.address(Arg(0), wants.iter().fold(Wants::any(done("core 4.5")), |wants, class| wants.with(*class, bad)))
}

pub(crate) fn update_va_mapping(g: &Ground) -> Shape {
    let good = done("core 4.5");
    let flags = uvmf::TLB_FLUSH;
    let shape = mapping(Shape::new([g.window.address(), 0, 0, 0, 0]));
    let bitmap = Wants::input(good).with(Class::Null, good);
    shape.part(Arg(2), &1u64, bitmap).low(flags)
}

pub(crate) fn update_va_mapping_otherdomain(g: &Ground) -> Shape {
    let shape = mapping(Shape::new([g.window.address(), 0, uvmf::INVLPG, SELF, 0]));
    let shape = shape.domain(Arg(3), SELF_AND_MORE, done("Xen"));
    foreign(g, shape, Arg(3), refused(Errno::Perm, "core 4.4"))
}

pub(crate) fn multicall() -> Shape {
    let good = done("core 4.9");
    let entry = MulticallEntry { op: Hypercall::XenVersion.number(), ..MulticallEntry::default() };
    let fault = refused(Errno::Fault, "core 4.9");
    Shape::new([0, 1, 0, 0, 0]).part(Arg(0), &entry, Wants::output(good)).count(Arg(1), 2, fault).count(
        Arg(1),
        u64::from(u32::MAX),
        fault,
    )
}
