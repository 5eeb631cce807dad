//! Reservations (core 4.10) and grants (io 1).

use crate::calls::NOBODY;
use crate::ground::{GREF, Ground};
use crate::shape::Place::{Arg, U16, U32, U64};
use crate::shape::{Answer, Class, HANDLES, Shape, Target, Want, Wants, done, refused, want};
use guests::abi::grant::{
    Copy, CopySide, GetVersion, GrantOp, MapGrantRef, QuerySize, SetVersion, SetupTable, UnmapAndReplace,
    UnmapGrantRef, map, status,
};
use guests::abi::memory::{Exchange, MemoryMap, MemoryOp, Reservation};
use guests::abi::{Errno, domid};

pub(crate) fn memory_op(g: &Ground, t: &Target) -> Shape {
    const CITE: &str = "core 4.10";
    let (good, none) = (done(CITE), want(Answer::Value(0), CITE));
    let shape = Shape::new([t.op, 0, 0, 0, 0]);
    let command = MemoryOp::from_number(t.op).expect("it is of the list");
    match command {
        MemoryOp::IncreaseReservation | MemoryOp::DecreaseReservation | MemoryOp::PopulatePhysmap => {
            let wanted = Reservation { nr_extents: 1, domid: domid::SELF, ..Reservation::default() };
            let one = want(Answer::Value(1), CITE);
            let (extent, good) = match command {
                MemoryOp::DecreaseReservation => (g.lost_frame(), one),
                MemoryOp::PopulatePhysmap => (0x3fff, one),
                // There may be no room, which is no error.
                _ => (0, done(CITE)),
            };
            let list = match command {
                MemoryOp::DecreaseReservation => Wants::input(good),
                MemoryOp::IncreaseReservation => Wants::output(good).with(Class::Null, done("Xen")),
                _ => Wants::output(good),
            };
            shape
                .part(Arg(1), &wanted, Wants::input(good).faults(none))
                .part(U64(0), &extent, list.faults(none))
                .domain(U16(24), NOBODY, none)
                .count(U64(8), 1 << 26, none)
                .count(U64(8), u64::MAX, none)
                .count(U32(16), 60, none)
                .domain(U16(24), if g.subject { 0 } else { NOBODY }, none)
        }
        MemoryOp::MaximumRamPage => shape.address(Arg(1), Wants::any(good)),
        MemoryOp::CurrentReservation | MemoryOp::MaximumReservation => {
            let shape = shape.part(Arg(1), &domid::SELF, Wants::input(good));
            let shape = shape.domain(U16(0), NOBODY, refused(Errno::Srch, "Xen"));
            if g.subject { shape.domain(U16(0), 0, refused(Errno::Perm, "Xen")) } else { shape }
        }
        MemoryOp::MemoryMap => {
            // Xen has none for its first domain.
            let arg = MemoryMap { nr_entries: 8, ..MemoryMap::default() };
            let none = refused(Errno::NoSys, CITE);
            shape
                .part(Arg(1), &arg, Wants::output(good).on_xen(Wants::input(none)))
                .part(U64(8), &[0u8; 20], Wants::output(good).on_xen(Wants::any(none)))
                .count(U32(0), 0, refused(Errno::Inval, "Xen").xen(none.answer))
        }
        MemoryOp::MachineMemoryMap => {
            let arg = MemoryMap { nr_entries: 128, ..MemoryMap::default() };
            let perm = Wants::any(refused(Errno::Perm, CITE));
            let pick = |first: Wants| if g.first { first } else { perm };
            let wants = pick(Wants::output(good));
            // Without a buffer pieces are only counted.
            shape.part(Arg(1), &arg, wants).part(U64(8), &[0u8; 20], pick(Wants::output(good).with(Class::Null, good)))
        }
        MemoryOp::Exchange => {
            // Nothing to exchange, so that Xen does it; the lists are looked at all the same.
            let list = Reservation { extent_start: g.scratch.address(), domid: domid::SELF, ..Reservation::default() };
            let arg = Exchange { given: list, wanted: list, nr_exchanged: 0 };
            let never = refused(Errno::NoSys, "differences").xen(Answer::Done);
            let bad = refused(Errno::Inval, "Xen");
            let shape = shape.part(Arg(1), &arg, Wants::input(never));
            let shape =
                shape.count(U64(64), 1, bad).count(U64(8), 1, bad).count(U32(16), 60, refused(Errno::Perm, "Xen"));
            shape.domain(U16(24), NOBODY, bad)
        }
        MemoryOp::MachphysMapping => shape.part(Arg(1), &[0u64; 3], Wants::output(good)),
    }
}

pub(crate) fn grant_table_op(g: &Ground, t: &Target) -> Shape {
    const CITE: &str = "io 1.3";
    let status = |at, status| want(Answer::Status(at, status), CITE);
    let bad_count = refused(Errno::Inval, CITE);
    let missing = refused(Errno::Fault, HANDLES);
    let no_such = refused(Errno::NoSys, CITE);
    let shape = Shape::new([t.op, 0, 1, 0, 0]).count(Arg(0), 99, no_such);
    let array = |shape: Shape| {
        shape.count(Arg(2), 2, missing).count(Arg(2), 0x7fff_ffff, missing).count(Arg(2), 1 << 31, bad_count)
    };
    let single = |shape: Shape| shape.count(Arg(2), 0, bad_count).count(Arg(2), 2, bad_count);
    match GrantOp::from_number(t.op).expect("it is of the list") {
        GrantOp::MapGrantRef => {
            let (flags, dom) = (map::HOST, g.own);
            let arg = MapGrantRef { flags, gref: GREF, dom, ..MapGrantRef::default() };
            let (good, bad) = (status(18, status::OKAY), want(Answer::Status(18, status::GENERAL_ERROR), "Xen"));
            let bad_classes = [Class::Null, Class::Hypervisor, Class::NotCanonical];
            let wants = bad_classes.iter().fold(Wants::any(good), |wants, class| wants.with(*class, bad));
            let shape = shape.part(Arg(1), &arg, Wants::output(good)).address(U64(0), wants);
            let shape = shape.domain(U16(16), NOBODY, status(18, status::BAD_DOMAIN));
            array(shape).count(U32(12), 0x7000, status(18, status::BAD_GNTREF))
        }
        GrantOp::UnmapGrantRef => {
            let arg = UnmapGrantRef { host_addr: g.window.address(), handle: g.mapped(), ..Default::default() };
            let (good, bad) = (status(20, status::OKAY), want(Answer::Status(20, status::GENERAL_ERROR), CITE));
            let wants = Wants::any(bad).with(Class::Null, good).with(Class::Misaligned, want(good.answer, "Xen"));
            let shape = shape.part(Arg(1), &arg, Wants::output(good)).address(U64(0), wants).at(g.window.address());
            let shape = shape.count(U32(16), u64::from(u32::MAX), status(20, status::BAD_HANDLE));
            // There is no mapping for devices whose address could be wrong.
            array(shape).count(U64(8), 1 << 12, want(good.answer, "Xen"))
        }
        GrantOp::UnmapAndReplace => {
            let arg = UnmapAndReplace { host_addr: g.window.address(), handle: g.mapped(), ..Default::default() };
            let (good, bad) = (status(20, status::OKAY), want(Answer::Status(20, status::GENERAL_ERROR), CITE));
            // Without a new address it only unmaps. An empty entry is moved like any other.
            let nowhere = [Class::Misaligned, Class::Hypervisor, Class::NotCanonical];
            let wants = nowhere.iter().fold(Wants::any(good), |wants, class| wants.with(*class, bad));
            let shape = shape.part(Arg(1), &arg, Wants::output(good)).address(U64(8), wants).at(0);
            array(shape.count(U32(16), u64::from(u32::MAX), status(20, status::BAD_HANDLE)))
        }
        GrantOp::SetupTable => {
            let arg = SetupTable { dom: domid::SELF, nr_frames: 1, ..SetupTable::default() };
            let good = status(8, status::OKAY);
            // What cannot be written is told in the status, if it is an address of the guest's.
            let list = want(Answer::Status(8, status::BAD_VIRT_ADDR), "Xen");
            let list = [Class::Null, Class::Unmapped, Class::ReadOnly, Class::PageEnd]
                .iter()
                .fold(Wants::output(good), |wants, class| wants.with(*class, list));
            let shape = shape.part(Arg(1), &arg, Wants::output(good)).part(U64(16), &0u64, list);
            let shape = whose(g, shape, 8).count(U32(4), 100_000, status(8, status::GENERAL_ERROR));
            single(shape)
        }
        GrantOp::Transfer => {
            let never = refused(Errno::OpNotSupp, CITE);
            let xen = Wants::output(status(16, status::BAD_PAGE));
            shape.part(Arg(1), &[0xf_ffff_ffffu64, 0, 0], Wants::any(never).on_xen(xen))
        }
        GrantOp::Copy => {
            let side = |i| CopySide {
                gref_or_frame: g.scratch.frame(i).expect("the page is ours"),
                domid: domid::SELF,
                ..CopySide::default()
            };
            let arg = Copy { source: side(0), dest: side(0), len: 8, ..Copy::default() };
            let good = status(36, status::OKAY);
            let denied = status(36, status::PERMISSION_DENIED);
            let shape = shape.part(Arg(1), &arg, Wants::output(good));
            let shape = shape.domain(U16(8), NOBODY, denied).domain(U16(24), NOBODY, denied);
            array(shape).count(U16(32), 5000, status(36, status::BAD_COPY_ARG))
        }
        GrantOp::QuerySize => {
            let arg = QuerySize { dom: domid::SELF, ..QuerySize::default() };
            let good = status(12, status::OKAY);
            single(whose(g, shape.part(Arg(1), &arg, Wants::output(good)), 12))
        }
        GrantOp::SetVersion => {
            let good = done(CITE);
            let shape = shape.part(Arg(1), &SetVersion { version: 1 }, Wants::output(good));
            // Xen does not look at the count.
            shape.count(Arg(2), 0, done("Xen")).count(Arg(2), 2, done("Xen")).count(U32(0), 7, bad_count)
        }
        GrantOp::GetVersion => {
            let arg = GetVersion { dom: domid::SELF, ..GetVersion::default() };
            let shape = shape.part(Arg(1), &arg, Wants::output(done(CITE)));
            let shape = shape.domain(U16(0), NOBODY, refused(Errno::Srch, "Xen"));
            let shape = shape.count(Arg(2), 0, done("Xen")).count(Arg(2), 2, done("Xen"));
            if g.subject { shape.domain(U16(0), 0, refused(Errno::Perm, "Xen")) } else { shape }
        }
    }
}

/// Whose table: the first two bytes; the status is at byte `at`.
fn whose(g: &Ground, shape: Shape, at: u64) -> Shape {
    let status = |status| -> Want { want(Answer::Status(at, status), "io 1.3") };
    let shape = shape.domain(U16(0), NOBODY, status(status::BAD_DOMAIN));
    if g.subject { shape.domain(U16(0), 0, status(status::PERMISSION_DENIED)) } else { shape }
}
