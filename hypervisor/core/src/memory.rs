//! Memory reservations: `memory_op` (ABI core 4.10).
//!
//! Touches: which frames a domain owns, and the machine-to-physical table.
//! Never touches: page tables. A frame that is still mapped leaves its domain when its last mapping goes.

use crate::addr::{M2P_END, M2P_START, PAGE_SHIFT};
use crate::domain::Powers;
use crate::fault::{Fault, planted};
use crate::frame::Refused;
use crate::frame::pool::MAX_ORDER;
use crate::prelude::*;
use hypercall_abi::memory::{
    COMMAND_BITS, E820_RAM, E820Entry, Exchange, MachphysMapping, MemoryMap, MemoryOp, Reservation,
};

/// Frames handled before the call is interrupted (P8), unless one extent has more.
const BATCH: u64 = 64;

/// Carries out one step of a `memory_op`.
///
/// # Errors
/// Those of ABI core 4.10. A shortage of memory is not an error: the call returns how many extents it has done.
pub fn memory_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let [command, arg, ..] = call.args;
    let highest = ctx.m.frame_limit().saturating_sub(1);
    match MemoryOp::from_number(command & ((1 << COMMAND_BITS) - 1)).ok_or(Errno::NoSys)? {
        op @ (MemoryOp::IncreaseReservation | MemoryOp::DecreaseReservation | MemoryOp::PopulatePhysmap) => {
            let start = command >> COMMAND_BITS;
            call.done = call.done.max(start);
            let answer = reservation(ctx, call, op, arg);
            return if let Err(Halt::Refused(_)) = answer { Ok(start) } else { answer };
        }
        MemoryOp::MaximumRamPage => return Ok(highest),
        MemoryOp::CurrentReservation => {
            let domain = ctx.controlled(ctx.read(arg)?)?;
            return Ok(ctx.world.frames.owned(domain.id()).into());
        }
        MemoryOp::MaximumReservation => return Ok(ctx.controlled(ctx.read(arg)?)?.max_pages.load(Relaxed)),
        MemoryOp::MachphysMapping => {
            ctx.write(arg, &MachphysMapping { v_start: M2P_START, v_end: M2P_END, max_mfn: highest })?;
        }
        MemoryOp::MemoryMap => memory_map(ctx, arg, false)?,
        // The first domain asks for the machine's map. It gets that of its own memory, since it may map nothing else.
        MemoryOp::MachineMemoryMap if ctx.domain.may(Powers::MACHINE) => memory_map(ctx, arg, true)?,
        MemoryOp::MachineMemoryMap => return Err(Errno::Perm.into()),
        MemoryOp::Exchange => exchange(ctx, arg)?,
    }
    Ok(0)
}

/// Refuses to exchange frames. As in a hypervisor that can, errors in the argument are reported first.
fn exchange<M: Machine>(ctx: &Ctx<'_, M>, arg: u64) -> Result<(), Errno> {
    let Exchange { given, wanted, nr_exchanged } = ctx.read(arg)?;
    let both = [&given, &wanted];
    ensure!(both.iter().all(|side| side.extent_order <= MAX_ORDER), Errno::Perm);
    let frames = both.map(|side| side.nr_extents.checked_mul(1 << side.extent_order).ok_or(Errno::Inval));
    ensure!(frames[0]? == frames[1]? && given.domid == wanted.domid && nr_exchanged <= given.nr_extents, Errno::Inval);
    ensure!(both.iter().all(|side| is_list(side.extent_start, side.nr_extents)), Errno::Fault);
    ctx.controlled(given.domid)?;
    Err(Errno::NoSys)
}

/// Whether a list of this many words lies in addresses that a guest may use.
fn is_list(start: u64, words: u64) -> bool {
    let last = words.checked_mul(8).and_then(|bytes| start.checked_add(bytes.saturating_sub(1)));
    last.is_some_and(|last| [start, last].iter().all(|at| GuestVirt(*at).is_guests()) && start >> 63 == last >> 63)
}

/// Writes the map of the caller's memory: a single range of RAM. With `counts`, a call without buffer only gets the
/// number of ranges.
fn memory_map<M: Machine>(ctx: &Ctx<'_, M>, arg: u64, counts: bool) -> Result<(), Errno> {
    let mut map: MemoryMap = ctx.read(arg)?;
    if !counts || map.buffer != 0 {
        ensure!(map.nr_entries > 0, Errno::Inval);
        let size = ctx.domain.max_pages.load(Relaxed) << PAGE_SHIFT;
        ctx.write(map.buffer, &E820Entry { address: 0, size, kind: E820_RAM })?;
    }
    map.nr_entries = 1;
    ctx.write(arg, &map)
}

/// Continues with an array of extents, of which `call.done` are done; returns how many are done then. An invalid
/// argument is refused.
fn reservation<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call, op: MemoryOp, arg: u64) -> Answer {
    let wanted: Reservation = ctx.read(arg)?;
    let domain = ctx.controlled(wanted.domid)?;
    let last = u64::from(u32::MAX >> COMMAND_BITS); // Xen cannot continue a longer list
    ensure!(wanted.extent_order <= MAX_ORDER && (call.done..=last).contains(&wanted.nr_extents), Errno::Inval);
    let batch = (BATCH >> wanted.extent_order).max(1);
    let last = wanted.nr_extents.min(call.done.saturating_add(batch));
    for extent in call.done..last {
        let slot = wanted.extent_start.wrapping_add(extent.wrapping_mul(8));
        let done = match op {
            MemoryOp::DecreaseReservation => decrease(ctx, domain, slot, wanted.extent_order),
            _ => populate(ctx, domain, slot, wanted.extent_order, op == MemoryOp::PopulatePhysmap),
        };
        match done {
            Ok(()) => {}
            Err(Halt::More) => {
                call.done = extent;
                return Err(Halt::More);
            }
            Err(_) => return Ok(extent),
        }
    }
    call.done = last;
    if last == wanted.nr_extents { Ok(last) } else { Err(Halt::More) }
}

fn decrease<M: Machine>(ctx: &Ctx<'_, M>, domain: &Domain, slot: u64, order: u32) -> Result<(), Halt> {
    let first: u64 = ctx.read(slot)?;
    for n in 0..1u64 << order {
        let frame = first.checked_add(n).and_then(Frame::new).ok_or(Errno::Inval)?;
        ctx.world.frames.give_back(ctx.m, frame, domain.id()).map_err(Errno::from)?;
    }
    Ok(())
}

/// Gives a domain the frames of one extent. With `physmap` the guest names the pages that the frames get; otherwise it
/// only learns the frames.
fn populate<M: Machine>(
    ctx: &mut Ctx<'_, M>,
    domain: &Domain,
    slot: u64,
    order: u32,
    physmap: bool,
) -> Result<(), Halt> {
    const NO_PAGE: u64 = u64::MAX;
    let limit = || domain.max_pages.load(Relaxed);
    let spare = planted(Fault::CountApart) && u64::from(ctx.world.frames.owned(domain.id())) < limit();
    let page: u64 = if physmap { ctx.read(slot)? } else { NO_PAGE };
    // The slot of the array is written to before frames are given, so that a guest with a bad array gets nothing.
    ctx.write(slot, &page)?;
    let (frames, m) = (&ctx.world.frames, ctx.m);
    let give = || frames.populate(m, domain.id(), order, page, if spare { u64::MAX } else { limit() });
    let mut given = give();
    if given == Err(Refused::OverLimit) {
        // Frames that the domain gave back may still be held by a table that is being undone.
        ctx.session(domain).run()?;
        given = give();
    }
    Ok(ctx.write(slot, &given.map_err(Errno::from)?.number())?)
}
