//! `grant_table_op` (ABI io 1.3). One bad element never fails its array: each has a status of its own.

use super::pin::{Claimed, Handle, Pin};
use super::{GrantRefused, Grants, HANDLES_PER_FRAME, MAX_FRAMES, MAX_HANDLE_FRAMES, filled};
use crate::claim::Access;
use crate::fault::{Fault, planted};
use crate::frame;
use crate::paging::{Session, Slot, Stop};
use crate::prelude::*;
use crate::world::DomainBuilder;
use hypercall_abi::grant::{
    Copy, CopySide, GetVersion, GrantOp, MapGrantRef, QuerySize, SetVersion, SetupTable, UnmapAndReplace,
    UnmapGrantRef, map, status,
};
use hypercall_abi::mmu::pte;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Elements handled before others get a chance (P8).
const BATCH: u64 = 32;
/// Handles given up in one step of a domain's end.
const SWEEP: u32 = 1024;

/// Why an element is not done.
enum Failed {
    /// It is refused.
    GrantRefused(GrantRefused),
    /// Not yet.
    More,
}

impl From<GrantRefused> for Failed {
    fn from(why: GrantRefused) -> Self {
        Self::GrantRefused(why)
    }
}

impl From<Stop> for Failed {
    fn from(stop: Stop) -> Self {
        if stop == Stop::More { Self::More } else { Self::GrantRefused(GrantRefused::CannotMap) }
    }
}

/// The status for what was done or refused.
fn status_of<T>(outcome: &Result<T, GrantRefused>) -> i16 {
    outcome.as_ref().err().map_or(status::OKAY, |why| i16::from(*why))
}

/// Carries out one step of a `grant_table_op`.
///
/// # Errors
/// `Fault` for an array the caller cannot read or write, `Inval` for a count other than 1 where only 1 makes sense,
/// `NoSys` for unknown and unsupported operations.
pub fn grant_table_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    call.args[2] = low32(call.args[2]).into();
    let [command, array, count, ..] = call.args;
    ensure!(count <= u64::from(u32::MAX >> 1), Errno::Inval);
    let one = if count == 1 { Ok(array) } else { Err(Errno::Inval) };
    match GrantOp::from_number(low32(command).into()).ok_or(Errno::NoSys)? {
        GrantOp::MapGrantRef => return each::<_, _, 2>(ctx, call, map_one, |one| &mut one.status),
        GrantOp::UnmapGrantRef => {
            return each::<_, _, 1>(ctx, call, |ctx, one| unmap_one(ctx, one, None), |one| &mut one.status);
        }
        GrantOp::UnmapAndReplace => return each::<_, _, 1>(ctx, call, replace_one, |one| &mut one.status),
        GrantOp::Copy => return each::<_, _, 1>(ctx, call, copy_one, |one| &mut one.status),
        GrantOp::SetupTable => setup_table(ctx, one?)?,
        GrantOp::QuerySize => {
            let mut query: QuerySize = ctx.read(one?)?;
            let domain = controlled(ctx, query.dom);
            query.status = status_of(&domain);
            if let Ok(domain) = domain {
                (query.nr_frames, query.max_nr_frames) = (filled(&domain.grants.table), MAX_FRAMES);
            }
            ctx.write(array, &query)?;
        }
        GrantOp::SetVersion => {
            let SetVersion { version } = ctx.read(array)?;
            ctx.write(array, &SetVersion { version: 1 })?;
            ensure!(version != 2, Errno::NoSys);
            ensure!(version == 1, Errno::Inval);
        }
        GrantOp::GetVersion => {
            let query: GetVersion = ctx.read(array)?;
            ctx.controlled(query.dom)?;
            ctx.write(array, &GetVersion { version: 1, ..query })?;
        }
        GrantOp::Transfer => return Err(Errno::OpNotSupp.into()),
    }
    Ok(0)
}

/// Carries out a few elements of an array and moves the call's place in it on. Of an element its last `OUT` words are written
/// back, which hold what the operation answers. A caller whose array cannot be written loses the answer: it may have a handle
/// that it does not know.
fn each<M: Machine, T: FromBytes + IntoBytes + Immutable, const OUT: usize>(
    ctx: &mut Ctx<'_, M>,
    call: &mut Call,
    one: fn(&mut Ctx<'_, M>, &mut T) -> Result<(), Failed>,
    status: fn(&mut T) -> &mut i16,
) -> Answer {
    for _ in 0..call.args[2].min(BATCH) {
        let mut element: T = ctx.read(call.args[1])?;
        let at = GuestVirt(call.args[1]);
        let kept = if planted(Fault::KeepFrame) { ctx.memory()?.frame(at, Access::Write).ok() } else { None };
        *status(&mut element) = match one(ctx, &mut element) {
            Ok(()) => status::OKAY,
            Err(Failed::GrantRefused(why)) => why.into(),
            Err(Failed::More) => return Err(Halt::More),
        };
        match kept.filter(|_| at.offset() + size_of::<T>() <= PAGE_SIZE) {
            Some(frame) => ctx.m.write(frame, at.offset(), element.as_bytes()),
            None => {
                let suffix = <[u64; OUT]>::read_from_suffix(element.as_bytes());
                let (before, answer) = suffix.map_err(|_| Errno::Fault)?;
                ctx.write(at.plus(long(before.len())).0, &answer)?;
            }
        }
        call.args[1] = call.args[1].wrapping_add(bytes_of::<T>());
        call.args[2] -= 1;
    }
    if call.args[2] == 0 { Ok(0) } else { Err(Halt::More) }
}

/// The domain whose table an operation is about.
fn controlled<'a, M: Machine>(ctx: &Ctx<'a, M>, id: u16) -> Result<&'a Domain, GrantRefused> {
    let why = |errno| if errno == Errno::Perm { GrantRefused::NoAuthority } else { GrantRefused::NoSuchDomain };
    ctx.controlled(id).map_err(why)
}

fn setup_table<M: Machine>(ctx: &mut Ctx<'_, M>, at: u64) -> Result<(), Errno> {
    let mut call: SetupTable = ctx.read(at)?;
    let wanted = call.nr_frames;
    let grown = controlled(ctx, call.dom).and_then(|domain| ctx.cpu_ctx().grow_table(domain, wanted));
    call.status = status_of(&grown);
    if let Ok(grants) = grown {
        let list = GuestVirt(call.frame_list);
        ensure!(list.is_guests(), Errno::Fault);
        for (n, slot) in (0..u64::from(wanted)).zip(&grants.table) {
            if ctx.write(list.plus(n * 8).0, &slot.get().map_or(0, Frame::number)).is_err() {
                call.status = GrantRefused::BadList.into();
            }
        }
    }
    ctx.write(at, &call)
}

fn map_one<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut MapGrantRef) -> Result<(), Failed> {
    (call.handle, call.dev_bus_addr) = (u32::MAX, 0);
    let [host, device, by_entry] = [map::HOST, map::DEVICE, map::CONTAINS_PTE].map(|flag| call.flags & flag != 0);
    ensure!(host || device, GrantRefused::NoSuchGrant);
    let owner = ctx.named(call.dom).map_err(|_| GrantRefused::NoSuchDomain)?;
    let (m, me) = (ctx.m, ctx.domain);
    let handle = me.grants.next_free(m).map_or_else(|| free_handle(ctx), Ok)?;
    let pinned = ctx.cpu_ctx().pin(owner, call.gref, me.id(), call.flags & map::READONLY == 0);
    let mapped = pinned.map_err(Failed::GrantRefused).and_then(|pin| {
        if host {
            map_host(ctx, call, pin).inspect_err(|_| ctx.cpu_ctx().unpin(pin, me.id()))?;
        }
        (call.handle, call.dev_bus_addr) = (handle.number(), pin.frame.address());
        Ok(Handle { pin, host, device, by_entry })
    });
    handle.set(mapped.as_ref().ok().copied());
    mapped.map(|_| ())
}

/// Claims the caller's lowest free handle; another frame of handles is allocated when all are taken.
#[cold]
fn free_handle<'a, M: Machine>(ctx: &mut Ctx<'a, M>) -> Result<Claimed<'a>, GrantRefused> {
    let (m, world, domain) = (ctx.m, ctx.world, ctx.domain);
    let grants = &domain.grants;
    let _guard = grants.lock.lock(ctx.held);
    // Handles that others give up from here on are noted in place of what is taken out, and are kept.
    let from = grants.free.swap(u32::MAX, SeqCst);
    for number in from..MAX_HANDLE_FRAMES * HANDLES_PER_FRAME {
        let slot = nth(&grants.handles, number / HANDLES_PER_FRAME).ok_or(GrantRefused::NoHandle)?;
        if slot.get().is_none() {
            match world.frames.allocate_for(m, domain.id()) {
                Ok(frame) => slot.set(frame),
                Err(_) => {
                    grants.free.fetch_min(number, SeqCst);
                    return Err(GrantRefused::NoHandle);
                }
            }
        }
        if let Some(claimed) = grants.claim_free(m, number) {
            grants.free.fetch_min(number + 1, SeqCst);
            return Ok(claimed);
        }
    }
    Err(GrantRefused::NoHandle)
}

#[inline(never)]
fn map_host<M: Machine>(ctx: &mut Ctx<'_, M>, call: &MapGrantRef, pin: Pin) -> Result<(), Failed> {
    let software = u64::from(call.flags >> 16) << 9 & pte::AVAILABLE_LOW;
    let rights = if pin.writable { pte::WRITE } else { 0 };
    let raw = pin.frame.address() | pte::PRESENT | pte::USER | pte::ACCESSED | pte::DIRTY | pte::NX | rights | software;
    let root = ctx.state.kernel_root;
    let mut session = ctx.session(ctx.domain);
    let slot = slot_of(&session, root, call.host_addr, call.flags & map::CONTAINS_PTE != 0)?;
    Ok(session.map_leaf(slot, raw, pin.owner)?)
}

/// The L1 slot that a linear address, or the machine address of an entry, names.
fn slot_of<M: Machine>(
    session: &Session<'_, M>,
    root: Option<Frame>,
    address: u64,
    of_entry: bool,
) -> Result<Slot, GrantRefused> {
    let root = root.ok_or(GrantRefused::CannotMap)?;
    let slot = if of_entry { Slot::at(address) } else { session.slot_of(root, GuestVirt(address)) };
    slot.map_err(|_| GrantRefused::CannotMap)
}

fn replace_one<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut UnmapAndReplace) -> Result<(), Failed> {
    let unmap = UnmapGrantRef { host_addr: call.host_addr, handle: call.handle, ..UnmapGrantRef::default() };
    unmap_one(ctx, &unmap, Some(call.new_addr).filter(|at| *at != 0))
}

/// Unmaps a grant; `by`: the entry of this address is moved to where it was mapped.
#[inline(always)]
fn unmap_one<M: Machine>(ctx: &mut Ctx<'_, M>, call: &UnmapGrantRef, by: Option<u64>) -> Result<(), Failed> {
    let (m, me) = (ctx.m, ctx.domain);
    let (mut handle, claimed) = me.grants.claim_handle(m, call.handle).ok_or(GrantRefused::NoSuchHandle)?;
    let done = unmap_halves(ctx, call, by, &mut handle);
    let in_use = handle.host || handle.device;
    if !in_use {
        ctx.cpu_ctx().unpin(handle.pin, me.id());
    }
    claimed.set(Some(handle).filter(|_| in_use));
    done
}

/// Takes from a handle what an element asks for.
fn unmap_halves<M: Machine>(
    ctx: &mut Ctx<'_, M>,
    call: &UnmapGrantRef,
    by: Option<u64>,
    handle: &mut Handle,
) -> Result<(), Failed> {
    let bus = [0, handle.pin.frame.address()];
    ensure!(!handle.device || bus.contains(&call.dev_bus_addr), GrantRefused::WrongBusAddress);
    if call.host_addr != 0 && handle.host {
        unmap_host(ctx, call.host_addr, by, handle)?;
        handle.host = false;
    }
    handle.device &= call.dev_bus_addr == 0;
    Ok(())
}

/// Removes the mapping of a grant at an address, and flushes it.
#[inline(never)]
fn unmap_host<M: Machine>(ctx: &mut Ctx<'_, M>, at: u64, by: Option<u64>, handle: &Handle) -> Result<(), Failed> {
    let (root, pin) = (ctx.state.kernel_root, handle.pin);
    let mut session = ctx.session(ctx.domain);
    let slot = slot_of(&session, root, at, handle.by_entry)?;
    let by =
        by.map(|at| if handle.by_entry { Err(GrantRefused::CannotMap) } else { slot_of(&session, root, at, false) });
    Ok(session.unmap_leaf(slot, pin.frame, pin.writable, by.transpose()?)?) // the session flushes when it ends
}

impl<M: Machine> CpuCtx<'_, M> {
    /// Gives a table at least `frames` frames; those it has stay where they are.
    fn grow_table<'a>(&mut self, domain: &'a Domain, frames: u32) -> Result<&'a Grants, GrantRefused> {
        ensure!(frames <= MAX_FRAMES, GrantRefused::CannotGrow);
        let _guard = domain.grants.lock.lock(self.held);
        self.world.fill_table(self.m, domain, frames).map_err(|_| GrantRefused::CannotGrow)?;
        Ok(&domain.grants)
    }

    /// Gives up what a dying domain has mapped. Its page tables, and with them the mappings, go afterwards; the frames
    /// stay referenced by the entries until then.
    ///
    /// # Errors
    /// `More` until all is given up.
    pub(crate) fn unmap_grants(&mut self, domain: &Domain) -> Result<(), Halt> {
        let (m, grants) = (self.m, &domain.grants);
        let mut left = SWEEP;
        for number in 0..filled(&grants.handles) * HANDLES_PER_FRAME {
            let Some((handle, claimed)) = grants.claim_handle(m, number) else { continue };
            claimed.set(None);
            self.unpin(handle.pin, domain.id());
            left = left.checked_sub(1).ok_or(Halt::More)?;
        }
        Ok(())
    }
}

/// Gives a domain that nobody sees yet the first frame of its table.
///
/// # Errors
/// `NoMem` without memory for it.
pub(crate) fn begin<M: Machine>(builder: &mut DomainBuilder<'_, M>) -> Result<(), Errno> {
    Ok(builder.world.fill_table(builder.m, builder.domain, 1)?)
}

impl World {
    /// Fills the first `frames` places of a table. Others are kept from it by its lock, or do not know of the domain yet.
    fn fill_table<M: Machine>(&self, m: &M, domain: &Domain, frames: u32) -> Result<(), frame::Refused> {
        for (table, active) in domain.grants.table.iter().zip(&domain.grants.active).take(index(frames)) {
            if active.get().is_none() {
                active.set(self.frames.allocate_for(m, domain.id())?);
            }
            if table.get().is_none() {
                table.set(self.frames.lend(m, domain.id())?);
            }
        }
        Ok(())
    }
}

/// One side of a copy while it lasts: a frame granted, or one of the caller's own.
struct Side {
    frame: Frame,
    writable: bool,
    pin: Option<Pin>,
}

fn copy_one<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Copy) -> Result<(), Failed> {
    const SOURCE_GREF: u16 = 1;
    const DEST_GREF: u16 = 2;
    if call.len == 0 {
        return Ok(());
    }
    let fits = |side: &CopySide| usize::from(side.offset) + usize::from(call.len) <= PAGE_SIZE;
    ensure!(fits(&call.source) && fits(&call.dest), GrantRefused::BadCopy);
    let source = open(ctx, &call.source, call.flags & SOURCE_GREF != 0, false)?;
    let dest = open(ctx, &call.dest, call.flags & DEST_GREF != 0, true);
    if let Ok(dest) = &dest {
        let from = (source.frame, usize::from(call.source.offset));
        ctx.m.copy(from, (dest.frame, usize::from(call.dest.offset)), usize::from(call.len));
    }
    close(ctx, source);
    close(ctx, dest?);
    Ok(())
}

fn open<M: Machine>(
    ctx: &mut Ctx<'_, M>,
    side: &CopySide,
    granted: bool,
    writable: bool,
) -> Result<Side, GrantRefused> {
    let me = ctx.domain.id();
    if granted {
        let owner = ctx.named(side.domid).map_err(|_| GrantRefused::NoSuchDomain)?;
        let pin = ctx.cpu_ctx().pin(owner, low32(side.gref_or_frame), me, writable)?;
        return Ok(Side { frame: pin.frame, writable, pin: Some(pin) });
    }
    ensure!(ctx.is_own(side.domid), GrantRefused::NoAuthority);
    let frame = Frame::new(side.gref_or_frame).ok_or(GrantRefused::NoSuchPage)?;
    ctx.world.frames.hold(ctx.m, frame, me, me, writable).map_err(|_| GrantRefused::NoSuchPage)?;
    Ok(Side { frame, writable, pin: None })
}

fn close<M: Machine>(ctx: &mut Ctx<'_, M>, side: Side) {
    let me = ctx.domain.id();
    match side.pin {
        Some(pin) => ctx.cpu_ctx().unpin(pin, me),
        None => ctx.world.frames.let_go(side.frame, me, side.writable),
    }
}
