//! The descriptor tables of a vcpu: GDT frames and the LDT (ABI core 3.10).
//!
//! A GDT frame is mapped into this CPU's window only while the vcpu holds a use of it as descriptors; the use is
//! dropped after the frame was removed from the window. An LDT page is mapped when the CPU first needs a descriptor in
//! it.

use super::MAX_LDT;
use super::context::VcpuUses;
use crate::addr::PAGE_SHIFT;
use crate::claim;
use crate::paging::Stop;
use crate::prelude::*;
use hypercall_abi::selector;

/// Number of descriptors in a frame.
pub(super) const PER_FRAME: u64 = 512;

/// `set_gdt`: replaces the caller's GDT.
///
/// # Errors
/// `Inval` for too many entries or for a frame that cannot hold descriptors; the old GDT then stays.
pub fn set_gdt<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let (list, entries) = (call.args[0], u64::from(low32(call.args[1])));
    ensure!(entries <= u64::from(selector::GUEST_ENTRIES), Errno::Inval);
    let mut numbers = [0; 14];
    for (n, number) in (0..entries.div_ceil(PER_FRAME)).zip(&mut numbers) {
        *number = ctx.read(list.wrapping_add(n * 8))?;
    }
    let (domain, mut new) = (ctx.domain, VcpuUses::default());
    let outcome = new.take_gdt(&mut ctx.session(domain), &numbers, entries);
    if let Err(stop) = outcome {
        new.give_back(&mut ctx.cpu_ctx(), domain);
        return Err(stop.into());
    }
    let old = VcpuUses { gdt: core::mem::replace(&mut ctx.state.gdt, new.gdt), ..VcpuUses::default() };
    ctx.state.gdt_entries = low32(entries);
    ctx.m.load_gdt(ctx.state.gdt_pages());
    old.give_back(&mut ctx.cpu_ctx(), domain);
    Ok(0)
}

/// Sets the caller's LDT.
///
/// # Errors
/// `Inval` for more entries than an LDT can have, or for an address that is not a page of the guest.
pub fn set_ldt<M: Machine>(ctx: &mut Ctx<'_, M>, base: GuestVirt, entries: u32) -> Result<(), Errno> {
    ensure!(entries == 0 || entries <= MAX_LDT && base.offset() == 0 && base.is_guests(), Errno::Inval);
    if (ctx.state.ldt_base, ctx.state.ldt_entries) != (base, entries) {
        (ctx.state.ldt_base, ctx.state.ldt_entries) = (base, entries);
        forget_ldt_pages(ctx);
    }
    Ok(())
}

/// Empties the LDT window, and drops the uses of the pages that were in it.
pub fn forget_ldt_pages<M: Machine>(ctx: &mut Ctx<'_, M>) {
    let old = core::mem::take(&mut ctx.state.ldt_mapped);
    ctx.m.load_ldt(ctx.state.ldt_entries);
    let me = ctx.domain.id();
    old.iter().flatten().for_each(|frame| _ = ctx.world.frames.drop_use(*frame, me));
}

/// Maps the LDT page with the descriptor at byte offset `offset`, which the CPU needs. Returns false if the guest has
/// no such descriptor.
pub fn map_ldt_page<M: Machine>(ctx: &mut Ctx<'_, M>, offset: u32) -> bool {
    if offset / 8 >= ctx.state.ldt_entries {
        return false;
    }
    let at = ctx.state.ldt_base.plus(u64::from(offset) & !0xfff);
    let (Ok(page), Some(root)) = (u8::try_from(offset >> PAGE_SHIFT), ctx.state.kernel_root) else { return false };
    let path = claim::walk(ctx.m, &ctx.world.frames, root, at);
    let Some(frame) = path.and_then(|path| path.frame()) else { return false };
    match ctx.session(ctx.domain).take_descriptors(frame) {
        Ok(()) => {}
        Err(Stop::More) => return true, // the guest executes the instruction again
        Err(Stop::Refused(_)) => return false,
    }
    let Some(slot @ None) = ctx.state.ldt_mapped.get_mut(usize::from(page)) else {
        ctx.world.frames.drop_use(frame, ctx.domain.id());
        return false;
    };
    *slot = Some(frame);
    ctx.m.map_ldt(page, frame);
    true
}
