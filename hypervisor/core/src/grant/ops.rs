//! `grant_table_op` (ABI io 1.3). One bad element never fails its array: each has a status of its own.

use super::pin::{Handle, Pin};
use super::{Grants, HANDLES_PER_FRAME, MAX_FRAMES, MAX_HANDLE_FRAMES};
use crate::addr::{DomainId, Frame, GuestVirt, PAGE_SIZE};
use crate::dispatch::{Call, Progress};
use crate::domain::Domain;
use crate::lock::{Held, Nothing};
use crate::machine::Machine;
use crate::paging::{BUDGET, Outcome, Slot, Stop};
use crate::world::{Ctx, World};
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall_abi::grant::{
    Copy, CopySide, GetVersion, GrantOp, MapGrantRef, QuerySize, SetVersion, SetupTable, UnmapGrantRef, map, status,
};
use hypercall_abi::mmu::pte;
use hypercall_abi::{Errno, domid};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Elements handled before others get a chance (P8).
const BATCH: u64 = 16;
/// Handles looked at in one step of a domain's end.
const SWEEP: u32 = 1024;

/// An element is done with this status, or not yet.
type Element = Result<i16, Stop>;

/// Carries out one step of a `grant_table_op`.
///
/// # Errors
/// `Fault` for an array the caller cannot read or write, `Inval` for a count other than 1 where only 1 makes sense,
/// `NoSys` for unknown and unsupported operations.
pub fn grant_table_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Result<Progress, Errno> {
    let [command, array, count, ..] = call.args;
    if count > u64::from(u32::MAX >> 1) {
        return Err(Errno::Inval);
    }
    let one = if count == 1 { Ok(()) } else { Err(Errno::Inval) };
    match GrantOp::from_number(command).ok_or(Errno::NoSys)? {
        GrantOp::MapGrantRef => return each(ctx, call, map_one),
        GrantOp::UnmapGrantRef => return each(ctx, call, unmap_one),
        GrantOp::Copy => return each(ctx, call, copy_one),
        GrantOp::SetupTable => {
            one?;
            setup_table(ctx, array)?;
        }
        GrantOp::QuerySize => {
            one?;
            let mut query: QuerySize = ctx.read(array)?;
            query.status = match ctx.controlled(query.dom) {
                Ok(domain) => {
                    query.nr_frames = domain.grants.size();
                    query.max_nr_frames = MAX_FRAMES;
                    status::OKAY
                }
                Err(Errno::Perm) => status::PERMISSION_DENIED,
                Err(_) => status::BAD_DOMAIN,
            };
            ctx.write(array, &query)?;
        }
        GrantOp::SetVersion => {
            one?;
            let SetVersion { version } = ctx.read(array)?;
            ctx.write(array, &SetVersion { version: 1 })?;
            match version {
                1 => {}
                2 => return Err(Errno::NoSys),
                _ => return Err(Errno::Inval),
            }
        }
        GrantOp::GetVersion => {
            one?;
            let mut query: GetVersion = ctx.read(array)?;
            ctx.controlled(query.dom)?;
            query.version = 1;
            ctx.write(array, &query)?;
        }
        GrantOp::Transfer => return Err(Errno::OpNotSupp),
        GrantOp::DumpTable
        | GrantOp::UnmapAndReplace
        | GrantOp::GetStatusFrames
        | GrantOp::SwapGrantRef
        | GrantOp::CacheFlush => return Err(Errno::NoSys),
    }
    Ok(Progress::Done(0))
}

/// Carries out a few elements of an array and moves the call's place in it on.
fn each<M: Machine, T: FromBytes + IntoBytes + Immutable>(
    ctx: &mut Ctx<'_, M>,
    call: &mut Call,
    one: fn(&mut Ctx<'_, M>, &mut T) -> Result<(), Stop>,
) -> Result<Progress, Errno> {
    for _ in 0..call.args[2].min(BATCH) {
        let mut element: T = ctx.read(call.args[1])?;
        // Tried before anything is done: an element whose answer cannot be told is not carried out.
        ctx.write(call.args[1], &element)?;
        if one(ctx, &mut element).is_err() {
            return Ok(Progress::More);
        }
        ctx.write(call.args[1], &element)?;
        call.args[1] = call.args[1].wrapping_add(size_of::<T>() as u64);
        call.args[2] -= 1;
    }
    Ok(if call.args[2] == 0 { Progress::Done(0) } else { Progress::More })
}

fn setup_table<M: Machine>(ctx: &mut Ctx<'_, M>, at: u64) -> Result<(), Errno> {
    let mut call: SetupTable = ctx.read(at)?;
    call.status = match ctx.controlled(call.dom) {
        Err(Errno::Perm) => status::PERMISSION_DENIED,
        Err(_) => status::BAD_DOMAIN,
        Ok(domain) => match ctx.world.grow_table(ctx.m, ctx.held, domain, call.nr_frames) {
            Err(status) => status,
            Ok(()) => {
                for (n, slot) in (0u64..).zip(&domain.grants.table).take(usize::try_from(call.nr_frames).unwrap_or(0)) {
                    let frame = u64::from(slot.load(Ordering::Acquire));
                    ctx.write(call.frame_list.wrapping_add(n * 8), &frame)?;
                }
                status::OKAY
            }
        },
    };
    ctx.write(at, &call)
}

impl World {
    /// Gives a table at least `frames` frames; those it has stay where they are.
    fn grow_table<M: Machine>(&self, m: &M, held: &mut Held<Nothing>, domain: &Domain, frames: u32) -> Result<(), i16> {
        let wanted = usize::try_from(frames).unwrap_or(usize::MAX);
        if frames > MAX_FRAMES {
            return Err(status::GENERAL_ERROR);
        }
        let grants = &domain.grants;
        let _guard = grants.lock.lock(held);
        for (table, active) in grants.table.iter().zip(&grants.active).take(wanted) {
            if active.load(Ordering::Acquire) == 0 {
                store(active, self.frames.allocate(m).map_err(|_| status::GENERAL_ERROR)?);
            }
            if table.load(Ordering::Acquire) == 0 {
                store(table, self.frames.lend(m, domain.id()).map_err(|_| status::GENERAL_ERROR)?);
            }
        }
        Ok(())
    }
}

fn store(slot: &AtomicU32, frame: Frame) {
    slot.store(u32::try_from(frame.number()).unwrap_or(0), Ordering::Release);
}

/// The status an outcome of paging becomes; `More` stays.
fn outcome(done: Outcome<()>, refused: i16) -> Element {
    match done {
        Ok(()) => Ok(status::OKAY),
        Err(Stop::More) => Err(Stop::More),
        Err(Stop::Refused(_)) => Ok(refused),
    }
}

fn map_one<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut MapGrantRef) -> Result<(), Stop> {
    (call.handle, call.dev_bus_addr) = (u32::MAX, 0);
    call.status = match try_map(ctx, call) {
        Ok(status) => status?,
        Err(status) => status,
    };
    Ok(())
}

fn try_map<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut MapGrantRef) -> Result<Element, i16> {
    let (host, device) = (call.flags & map::HOST != 0, call.flags & map::DEVICE != 0);
    if !host && !device {
        return Err(status::BAD_GNTREF);
    }
    let owner = ctx.named(call.dom).map_err(|_| status::BAD_DOMAIN)?;
    let writable = call.flags & map::READONLY == 0;
    let (world, m, me) = (ctx.world, ctx.m, ctx.domain);
    let handle = world.free_handle(m, ctx.held, me)?;
    let pin = world.pin(m, ctx.held, owner, call.gref, me.id(), writable)?;
    if host {
        let mapped = map_host(ctx, call, pin);
        if mapped != Ok(status::OKAY) {
            world.unpin(m, ctx.held, pin);
            return Ok(mapped);
        }
    }
    me.grants.set_handle(m, handle, Some(Handle { pin, host, device }));
    (call.handle, call.dev_bus_addr) = (handle, pin.frame.address());
    Ok(Ok(status::OKAY))
}

fn map_host<M: Machine>(ctx: &mut Ctx<'_, M>, call: &MapGrantRef, pin: Pin) -> Element {
    let software = u64::from(call.flags >> 16) << 9 & pte::AVAILABLE_LOW;
    let rights = if pin.writable { pte::WRITE } else { 0 };
    let raw = pin.frame.address() | pte::PRESENT | pte::USER | pte::ACCESSED | pte::DIRTY | pte::NX | rights | software;
    let root = ctx.own.kernel_root;
    let mut session = ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held);
    let slot = match slot_of(&session, root, call.host_addr, call.flags & map::CONTAINS_PTE != 0) {
        Ok(slot) => slot,
        Err(status) => return Ok(status),
    };
    outcome(session.map_leaf(slot, raw, pin.owner), status::BAD_VIRT_ADDR)
}

/// The L1 slot that a linear address, or the machine address of an entry, names.
fn slot_of<M: Machine>(
    session: &crate::paging::Session<'_, M>,
    root: Option<Frame>,
    address: u64,
    contains_pte: bool,
) -> Result<Slot, i16> {
    if contains_pte {
        return Slot::at(address).map_err(|_| status::BAD_VIRT_ADDR);
    }
    let root = root.ok_or(status::BAD_VIRT_ADDR)?;
    session.slot_of(root, GuestVirt(address)).map_err(|_| status::BAD_VIRT_ADDR)
}

fn unmap_one<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut UnmapGrantRef) -> Result<(), Stop> {
    call.status = match try_unmap(ctx, call) {
        Ok(status) => status?,
        Err(status) => status,
    };
    Ok(())
}

fn try_unmap<M: Machine>(ctx: &mut Ctx<'_, M>, call: &UnmapGrantRef) -> Result<Element, i16> {
    let (world, m, me) = (ctx.world, ctx.m, ctx.domain);
    let mut handle = me.grants.handle(m, call.handle).ok_or(status::BAD_HANDLE)?;
    if call.dev_bus_addr != 0 && call.dev_bus_addr != handle.pin.frame.address() {
        return Err(status::BAD_DEV_ADDR);
    }
    if call.host_addr != 0 && handle.host {
        let root = ctx.own.kernel_root;
        let mut session = me.space.open(m, &world.frames, BUDGET, ctx.held);
        // An entry named by its machine address is 8-aligned inside a table; a mapped page is page-aligned.
        let contains_pte = !call.host_addr.is_multiple_of(PAGE_SIZE as u64);
        let slot = slot_of(&session, root, call.host_addr, contains_pte)?;
        match outcome(session.unmap_leaf(slot, handle.pin.frame, handle.pin.writable), status::GENERAL_ERROR) {
            Ok(status::OKAY) => handle.host = false, // the session flushes when it ends, before the pin goes
            other => return Ok(other),
        }
    }
    if call.dev_bus_addr != 0 {
        handle.device = false;
    }
    if handle.host || handle.device {
        me.grants.set_handle(m, call.handle, Some(handle));
    } else {
        me.grants.set_handle(m, call.handle, None);
        world.unpin(m, ctx.held, handle.pin);
    }
    Ok(Ok(status::OKAY))
}

impl World {
    /// The number of a free handle; another frame of them is allocated when all are taken.
    fn free_handle<M: Machine>(&self, m: &M, held: &mut Held<Nothing>, domain: &Domain) -> Result<u32, i16> {
        let grants = &domain.grants;
        let _guard = grants.lock.lock(held);
        for (chunk, slot) in (0u32..).zip(&grants.handles).take(MAX_HANDLE_FRAMES) {
            if slot.load(Ordering::Acquire) == 0 {
                store(slot, self.frames.allocate(m).map_err(|_| status::NO_SPACE)?);
            }
            let first = chunk * HANDLES_PER_FRAME;
            let free = (first..first + HANDLES_PER_FRAME).find(|handle| {
                grants.handle_words(m, *handle).is_some_and(|[word, _]| word.load(Ordering::Acquire) == 0)
            });
            if let Some(handle) = free {
                return Ok(handle);
            }
        }
        Err(status::NO_SPACE)
    }
}

impl Grants {
    /// Gives up what a dying domain has mapped. Its page tables, and with them the mappings, go afterwards; the frames
    /// stay referenced by the entries until then.
    pub(crate) fn unmap_all<M: Machine>(
        &self,
        world: &World,
        m: &M,
        held: &mut Held<Nothing>,
        _domain: &Domain,
    ) -> Progress {
        let frames = self.handles.iter().take_while(|slot| slot.load(Ordering::Acquire) != 0).count();
        let all = u32::try_from(frames).unwrap_or(0) * HANDLES_PER_FRAME;
        let mut found = 0;
        for number in 0..all {
            let Some(handle) = self.handle(m, number) else { continue };
            self.set_handle(m, number, None);
            world.unpin(m, held, handle.pin);
            found += 1;
            if found == SWEEP {
                return Progress::More;
            }
        }
        Progress::Done(0)
    }
}

/// One side of a copy while it lasts.
enum Side {
    Granted(Pin),
    Own(Frame, bool),
}

fn copy_one<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Copy) -> Result<(), Stop> {
    call.status = try_copy(ctx, call).err().unwrap_or(status::OKAY);
    Ok(())
}

fn try_copy<M: Machine>(ctx: &mut Ctx<'_, M>, call: &Copy) -> Result<(), i16> {
    const SOURCE_GREF: u16 = 1;
    const DEST_GREF: u16 = 2;
    if call.len == 0 {
        return Ok(());
    }
    let length = usize::from(call.len);
    let fits = |side: &CopySide| usize::from(side.offset) + length <= PAGE_SIZE;
    if !fits(&call.source) || !fits(&call.dest) {
        return Err(status::BAD_COPY_ARG);
    }
    let source = open(ctx, &call.source, call.flags & SOURCE_GREF != 0, false)?;
    let result = open(ctx, &call.dest, call.flags & DEST_GREF != 0, true).map(|dest| {
        let [from, to] = [&source, &dest].map(|side| match side {
            Side::Granted(pin) => pin.frame,
            Side::Own(frame, _) => *frame,
        });
        copy_bytes(ctx.m, (from, usize::from(call.source.offset)), (to, usize::from(call.dest.offset)), length);
        close(ctx, dest);
    });
    close(ctx, source);
    result
}

fn open<M: Machine>(ctx: &mut Ctx<'_, M>, side: &CopySide, granted: bool, writable: bool) -> Result<Side, i16> {
    let (world, m, me) = (ctx.world, ctx.m, ctx.domain.id());
    if granted {
        let owner = ctx.named(side.domid).map_err(|_| status::BAD_DOMAIN)?;
        let gref = u32::try_from(side.gref_or_frame & 0xffff_ffff).unwrap_or(u32::MAX);
        return world.pin(m, ctx.held, owner, gref, me, writable).map(Side::Granted);
    }
    if side.domid != domid::SELF && DomainId(side.domid) != me {
        return Err(status::PERMISSION_DENIED);
    }
    let frame = Frame::new(side.gref_or_frame).ok_or(status::BAD_PAGE)?;
    let taken =
        if writable { world.frames.take_writable(m, frame, me, me) } else { world.frames.take_ref(frame, me, me) };
    taken.map(|()| Side::Own(frame, writable)).map_err(|_| status::BAD_PAGE)
}

fn close<M: Machine>(ctx: &mut Ctx<'_, M>, side: Side) {
    match side {
        Side::Granted(pin) => ctx.world.unpin(ctx.m, ctx.held, pin),
        Side::Own(frame, true) => _ = ctx.world.frames.drop_use(frame),
        Side::Own(frame, false) => ctx.world.frames.drop_ref(frame),
    }
}

fn copy_bytes<M: Machine>(m: &M, (from, from_at): (Frame, usize), (to, to_at): (Frame, usize), length: usize) {
    if length == PAGE_SIZE {
        return m.copy(from, to);
    }
    let mut buffer = [0u8; 256];
    let mut done = 0;
    while done < length {
        let now = (length - done).min(buffer.len());
        let Some(part) = buffer.get_mut(..now) else { return };
        m.read(from, from_at + done, part);
        m.write(to, to_at + done, part);
        done += now;
    }
}
