//! Descriptor tables of a guest: GDT frames, single descriptors, the LDT (ABI core 3.10).
//!
//! A GDT frame is mapped into this CPU's window only while it holds a use as descriptors; the use is dropped after the
//! window has let go of it. LDT pages are mapped when the CPU first asks for a descriptor in them.

use crate::addr::{Frame, GuestVirt};
use crate::claim;
use crate::dispatch::{Progress, stopped};
use crate::machine::Machine;
use crate::paging::{BUDGET, Stop};
use crate::world::Ctx;
use hypercall_abi::{Errno, selector};

/// Descriptors in a frame.
const PER_FRAME: u64 = 512;
/// Descriptors an LDT may have.
const MAX_LDT: u32 = 8192;

/// Replaces the caller's GDT.
///
/// # Errors
/// `Inval` for too many entries or a frame that cannot hold descriptors; the old table stays then.
pub fn set_gdt<M: Machine>(ctx: &mut Ctx<'_, M>, list: u64, entries: u64) -> Result<Progress, Errno> {
    let count = u32::try_from(entries).ok().filter(|n| *n <= u32::from(selector::GUEST_ENTRIES)).ok_or(Errno::Inval)?;
    let mut numbers = [0u64; 14];
    let used = usize::try_from(entries.div_ceil(PER_FRAME)).map_err(|_| Errno::Inval)?;
    for (n, number) in (0u64..).zip(numbers.iter_mut().take(used)) {
        *number = ctx.read(list.wrapping_add(n * 8))?;
    }
    match take(ctx, numbers.get(..used).ok_or(Errno::Inval)?) {
        Ok(gdt) => {
            install(ctx, gdt, count);
            Ok(Progress::Done(0))
        }
        Err(stop) => stopped(stop),
    }
}

/// Takes a use as descriptors of every frame, or of none.
fn take<M: Machine>(ctx: &mut Ctx<'_, M>, numbers: &[u64]) -> Result<[Option<Frame>; 14], Stop> {
    let mut gdt = [None; 14];
    let mut session = ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held);
    let mut result = Ok(());
    for (slot, number) in gdt.iter_mut().zip(numbers) {
        let taken = Frame::new(*number)
            .ok_or(Stop::Refused(crate::paging::Refused::NoSuchFrame))
            .and_then(|frame| session.take_descriptors(frame).map(|()| frame));
        match taken {
            Ok(frame) => *slot = Some(frame),
            Err(stop) => {
                result = Err(stop);
                break;
            }
        }
    }
    drop(session);
    if result.is_err() {
        gdt.iter().flatten().for_each(|frame| _ = ctx.world.frames.drop_use(*frame));
    }
    result.map(|()| gdt)
}

/// Loads a GDT whose frames hold their uses, and drops the uses of the old one.
fn install<M: Machine>(ctx: &mut Ctx<'_, M>, gdt: [Option<Frame>; 14], entries: u32) {
    let old = core::mem::replace(&mut ctx.own.gdt, gdt);
    ctx.own.gdt_entries = entries;
    ctx.m.load_gdt(&gdt);
    old.iter().flatten().for_each(|frame| _ = ctx.world.frames.drop_use(*frame));
}

/// Changes one descriptor in the caller's memory.
///
/// # Errors
/// `Inval` for forbidden descriptors, unaligned addresses and frames that are not the caller's.
pub fn update_descriptor<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64, descriptor: u64) -> Result<Progress, Errno> {
    let mut session = ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held);
    match session.update_descriptor(address, descriptor) {
        Ok(()) => Ok(Progress::Done(0)),
        Err(stop) => stopped(stop).map_err(|_| Errno::Inval),
    }
}

/// Sets the caller's LDT.
///
/// # Errors
/// `Inval` for more entries than an LDT has, or an address that is no page of the guest.
pub fn set_ldt<M: Machine>(ctx: &mut Ctx<'_, M>, base: GuestVirt, entries: u32) -> Result<(), Errno> {
    if entries > MAX_LDT || (entries > 0 && (base.offset() != 0 || !base.is_guests())) {
        return Err(Errno::Inval);
    }
    if (ctx.own.ldt_base, ctx.own.ldt_entries) == (base, entries) {
        return Ok(());
    }
    (ctx.own.ldt_base, ctx.own.ldt_entries) = (base, entries);
    forget_ldt_pages(ctx);
    Ok(())
}

/// Empties the LDT window and drops the uses of the pages that were in it.
pub fn forget_ldt_pages<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let old = core::mem::take(&mut ctx.own.ldt_mapped);
    ctx.m.load_ldt(ctx.own.ldt_entries);
    old.iter().flatten().for_each(|frame| _ = ctx.world.frames.drop_use(*frame));
}

/// The CPU asked for a descriptor at a byte offset of the LDT: maps the page it is in. False if the guest has none there.
pub fn map_ldt_page<M: Machine>(ctx: &mut Ctx<'_, M>, offset: u32) -> bool {
    let page = offset >> crate::addr::PAGE_SHIFT;
    let (Ok(number), Some(root)) = (u8::try_from(page), ctx.own.kernel_root) else {
        return false;
    };
    if offset / 8 >= ctx.own.ldt_entries {
        return false;
    }
    let at = ctx.own.ldt_base.plus(u64::from(page) << crate::addr::PAGE_SHIFT);
    let Some(frame) = claim::walk(ctx.m, &ctx.world.frames, root, at).and_then(|path| path.frame()) else {
        return false;
    };
    match ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held).take_descriptors(frame) {
        Ok(()) => {}
        Err(Stop::More) => return true, // the guest tries again
        Err(Stop::Refused(_)) => return false,
    }
    match ctx.own.ldt_mapped.get_mut(usize::from(number)) {
        Some(slot @ None) => {
            *slot = Some(frame);
            ctx.m.map_ldt(number, frame);
            true
        }
        _ => {
            ctx.world.frames.drop_use(frame);
            false
        }
    }
}
