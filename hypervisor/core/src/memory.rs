//! Memory reservations: `memory_op` (ABI core 4.10).
//!
//! Touches: which frames a domain has, and the machine-to-physical table.
//! Never touches: page tables. A frame that is still mapped leaves its domain when the last mapping goes.

use crate::addr::{DomainId, Frame, M2P_END, M2P_START};
use crate::dispatch::{Call, Progress};
use crate::domain::Domain;
use crate::machine::Machine;
use crate::world::Ctx;
use core::sync::atomic::Ordering;
use hypercall_abi::Errno;
use hypercall_abi::memory::{COMMAND_BITS, E820_RAM, E820Entry, MachphysMapping, MemoryMap, MemoryOp, Reservation};

/// Extents handled before others get a chance (P8).
const BATCH: u64 = 64;
/// The largest extent: 2^9 frames, a superpage's worth.
const MAX_ORDER: u32 = 9;

/// Carries out one step of a `memory_op`.
///
/// # Errors
/// Those of ABI core 4.10. Shortage is no error: the call answers how many extents it has done.
pub fn memory_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Result<Progress, Errno> {
    let [command, arg, ..] = call.args;
    let start = command >> COMMAND_BITS;
    let number = command & ((1 << COMMAND_BITS) - 1);
    let value = match MemoryOp::from_number(number).ok_or(Errno::NoSys)? {
        op @ (MemoryOp::IncreaseReservation | MemoryOp::DecreaseReservation | MemoryOp::PopulatePhysmap) => {
            return Ok(reservation(ctx, call, op, start, arg));
        }
        MemoryOp::MaximumRamPage => ctx.m.frame_limit().saturating_sub(1),
        MemoryOp::CurrentReservation => {
            let id: u16 = ctx.read(arg)?;
            ctx.controlled(id)?.pages.load(Ordering::Relaxed)
        }
        MemoryOp::MaximumReservation => {
            let id: u16 = ctx.read(arg)?;
            ctx.controlled(id)?.max_pages.load(Ordering::Relaxed)
        }
        MemoryOp::MachphysMapping => {
            let mapping =
                MachphysMapping { v_start: M2P_START, v_end: M2P_END, max_mfn: ctx.m.frame_limit().saturating_sub(1) };
            ctx.write(arg, &mapping)?;
            0
        }
        MemoryOp::MemoryMap => {
            let mut map: MemoryMap = ctx.read(arg)?;
            if map.nr_entries == 0 {
                return Err(Errno::Inval);
            }
            let pages = ctx.domain.max_pages.load(Ordering::Relaxed);
            let entry = E820Entry { address: 0, size: pages << crate::addr::PAGE_SHIFT, kind: E820_RAM };
            ctx.write(map.buffer, &entry)?;
            map.nr_entries = 1;
            ctx.write(arg, &map)?;
            0
        }
        MemoryOp::MachineMemoryMap => return Err(Errno::Perm),
        MemoryOp::MachphysMfnList
        | MemoryOp::AddToPhysmap
        | MemoryOp::AddToPhysmapBatch
        | MemoryOp::Exchange
        | MemoryOp::GetVnumainfo
        | MemoryOp::ReservedDeviceMemoryMap
        | MemoryOp::AcquireResource => return Err(Errno::NoSys),
    };
    Ok(Progress::Done(value))
}

/// Goes on with an array of extents. `call.done` counts those done.
fn reservation<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call, op: MemoryOp, start: u64, arg: u64) -> Progress {
    let first = call.done.max(start);
    let Ok(wanted) = ctx.read::<Reservation>(arg) else {
        return Progress::Done(start);
    };
    let Ok(domain) = ctx.controlled(wanted.domid) else {
        return Progress::Done(start);
    };
    if wanted.extent_order > MAX_ORDER || first > wanted.nr_extents {
        return Progress::Done(start);
    }
    let last = wanted.nr_extents.min(first.saturating_add(BATCH));
    for extent in first..last {
        let slot = wanted.extent_start.wrapping_add(extent.wrapping_mul(8));
        let done = match op {
            MemoryOp::DecreaseReservation => decrease(ctx, domain, slot, wanted.extent_order),
            MemoryOp::PopulatePhysmap => populate(ctx, domain, slot, wanted.extent_order, true),
            _ => populate(ctx, domain, slot, wanted.extent_order, false),
        };
        if done.is_err() {
            return Progress::Done(extent);
        }
    }
    call.done = last;
    if last == wanted.nr_extents { Progress::Done(last) } else { Progress::More }
}

fn decrease<M: Machine>(ctx: &Ctx<'_, M>, domain: &Domain, slot: u64, order: u32) -> Result<(), Errno> {
    let first: u64 = ctx.read(slot)?;
    for n in 0..1u64 << order {
        let frame = first.checked_add(n).and_then(Frame::new).ok_or(Errno::Inval)?;
        ctx.world.frames.give_back(ctx.m, frame, domain.id()).map_err(|_| Errno::Inval)?;
        domain.pages.fetch_sub(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Gives a domain the frames of one extent. With `physmap` the guest names the pages they are to be; otherwise it learns
/// only the frames.
fn populate<M: Machine>(ctx: &Ctx<'_, M>, domain: &Domain, slot: u64, order: u32, physmap: bool) -> Result<(), Errno> {
    const NO_PAGE: u64 = u64::MAX;
    let page: u64 = if physmap { ctx.read(slot)? } else { NO_PAGE };
    let count = 1u64 << order;
    // The reply is tried before anything is given: a guest whose array is bad has got nothing.
    ctx.write(slot, &page)?;
    reserve(domain, count)?;
    let given = give(ctx, domain.id(), page, order);
    let Ok(frame) = given else {
        domain.pages.fetch_sub(count, Ordering::Relaxed);
        return Err(Errno::NoMem);
    };
    ctx.write(slot, &frame.number())
}

fn give<M: Machine>(ctx: &Ctx<'_, M>, id: DomainId, page: u64, order: u32) -> Result<Frame, Errno> {
    let frames = &ctx.world.frames;
    let given = if order == 0 {
        frames.populate(ctx.m, id, page)
    } else {
        frames.allocate_run(ctx.m, crate::frame::Owner::Guest(id), order, page)
    };
    given.map_err(|_| Errno::NoMem)
}

/// Counts pages towards the domain's limit.
fn reserve(domain: &Domain, count: u64) -> Result<(), Errno> {
    let limit = domain.max_pages.load(Ordering::Relaxed);
    let step = |pages: u64| pages.checked_add(count).filter(|pages| *pages <= limit);
    domain.pages.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).map(|_| ()).map_err(|_| Errno::NoMem)
}
