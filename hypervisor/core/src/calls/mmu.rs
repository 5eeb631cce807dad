//! The calls that change page tables and flush translations (ABI core 4).
//!
//! Requests are copied in first, a few at a time; then the paging lock is taken and they are carried out; then their
//! number moves on. The paging lock is never held across a guest copy.

use super::descriptors;
use crate::addr::{CpuSet, DomainId, Frame, GuestVirt, PAGE_SIZE};
use crate::dispatch::{Call, Progress, stopped};
use crate::domain::Domain;
use crate::machine::{Flush, Machine};
use crate::paging::{BUDGET, Outcome, Stop};
use crate::world::Ctx;
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, uvmf};
use hypercall_abi::{Errno, domid, stub};
use zerocopy::{FromZeros, IntoBytes};

/// Requests copied in at a time.
const BATCH: usize = 16;

/// Whose frames may be mapped and whose tables changed, as the upper argument of `mmu_update` says (ABI core 4.4).
fn parties<'a, M: Machine>(ctx: &Ctx<'a, M>, domains: u64) -> Result<(&'a Domain, DomainId), Errno> {
    let [low, high] =
        [domains & 0xffff, domains >> 16 & 0xffff].map(|half| u16::try_from(half).unwrap_or(domid::INVALID));
    let tables = if high == 0 { ctx.domain } else { ctx.controlled(high - 1)? };
    let frames = if low == domid::SELF { tables.id() } else { ctx.controlled(low)?.id() };
    Ok((tables, frames))
}

/// One step of `mmu_update`.
///
/// # Errors
/// Those of ABI core 4.4, after the number of requests done has been told.
pub fn mmu_update<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Result<Progress, Errno> {
    let [list, count, done_out, domains, ..] = call.args;
    let (tables, from) = parties(ctx, domains)?;
    let now = usize::try_from(count & 0x7fff_ffff).unwrap_or(BATCH).min(BATCH);
    let mut requests = [MmuUpdate::new_zeroed(); BATCH];
    let requests = requests.get_mut(..now).ok_or(Errno::Inval)?;
    let copied = ctx.read_bytes(list, requests.as_mut_bytes());
    let mut outcome = copied.map_err(Err);
    let mut done = 0;
    if copied.is_ok() {
        let mut session = tables.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held);
        for request in &*requests {
            if let Err(stop) = session.mmu_update(request.ptr, request.val, from) {
                if let Stop::Refused(why) = stop {
                    let rip = ctx.own.regs.rip;
                    log::debug!(
                        "{} mmu_update {:#x} <- {:#x} at {rip:#x}: {why:?}",
                        ctx.domain.id(),
                        request.ptr,
                        request.val
                    );
                }
                outcome = Err(Ok(stop));
                break;
            }
            done += 1;
        }
    }
    advance(call, done, size_of::<MmuUpdate>() as u64);
    end_of_batch(ctx, call, done_out, outcome)
}

/// Moves a call's place in its array on by `done` requests.
fn advance(call: &mut Call, done: u64, size: u64) {
    call.args[0] = call.args[0].wrapping_add(done.wrapping_mul(size));
    call.args[1] = (call.args[1] & 0x7fff_ffff).saturating_sub(done);
    call.done += done;
}

/// What a step of a batch ends with: more to do, all done, or the first error; the count of requests done is told with the
/// latter two. `Err(Err(..))` is an error already, `Err(Ok(..))` what paging said.
fn end_of_batch<M: Machine>(
    ctx: &Ctx<'_, M>,
    call: &Call,
    done_out: u64,
    outcome: Result<(), Result<Stop, Errno>>,
) -> Result<Progress, Errno> {
    let result = match outcome {
        Ok(()) if call.args[1] > 0 => return Ok(Progress::More),
        Ok(()) => Ok(Progress::Done(0)),
        Err(Ok(stop)) => stopped(stop),
        Err(Err(errno)) => Err(errno),
    };
    if result != Ok(Progress::More) && done_out != 0 {
        ctx.write(done_out, &u32::try_from(call.done).unwrap_or(u32::MAX))?;
    }
    result
}

/// `update_va_mapping`, also for frames of another domain (ABI core 4.5).
///
/// # Errors
/// Those of ABI core 4.5; nothing is flushed then.
pub fn update_va_mapping<M: Machine>(
    ctx: &mut Ctx<'_, M>,
    address: u64,
    value: u64,
    flags: u64,
    id: u16,
) -> Result<Progress, Errno> {
    let from = ctx.controlled(id)?.id();
    let root = ctx.own.kernel_root.ok_or(Errno::Inval)?;
    let at = GuestVirt(address);
    let updated = ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held).update_va(root, at, value, from);
    if let Err(stop) = updated {
        if let Stop::Refused(why) = stop {
            let rip = ctx.own.regs.rip;
            log::debug!("{} update_va_mapping {address:#x} <- {value:#x} at {rip:#x}: {why:?}", ctx.domain.id());
        }
        return stopped(stop);
    }
    let what = match flags & uvmf::KIND {
        uvmf::TLB_FLUSH => Flush::All,
        uvmf::INVLPG => Flush::Page(at),
        _ => return Ok(Progress::Done(0)),
    };
    let who = match flags & !uvmf::KIND {
        0 => CpuSet::only(ctx.m.this_cpu()),
        uvmf::ALL => ctx.domain.space.cpus(),
        bitmap => vcpus_in(ctx, bitmap)?,
    };
    flush(ctx, who, what);
    Ok(Progress::Done(0))
}

/// The CPUs that may hold translations of the vcpus in a bitmap. All that may hold any of the domain's are a superset.
fn vcpus_in<M: Machine>(ctx: &Ctx<'_, M>, bitmap: u64) -> Result<CpuSet, Errno> {
    let _: u64 = ctx.read(bitmap).map_err(|_| Errno::Inval)?;
    Ok(ctx.domain.space.cpus())
}

fn flush<M: Machine>(ctx: &Ctx<'_, M>, who: CpuSet, what: Flush) {
    match what {
        Flush::All => ctx.world.frames.epochs().flush(ctx.m, who),
        Flush::Page(at) if at.in_hole() => {}
        Flush::Page(_) => ctx.m.flush(who, what),
    }
}

/// One step of `mmuext_op`.
///
/// # Errors
/// Those of ABI core 4.6, after the number of operations done has been told.
pub fn mmuext_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Result<Progress, Errno> {
    let [list, count, done_out, id, ..] = call.args;
    let id = u16::try_from(id).map_err(|_| Errno::Srch)?;
    let target = ctx.controlled(id)?;
    let mut outcome = Ok(());
    let mut done = 0;
    for n in 0..(count & 0x7fff_ffff).min(BATCH as u64) {
        let at = list.wrapping_add(n * size_of::<MmuextOp>() as u64);
        outcome = match ctx.read::<MmuextOp>(at) {
            Err(errno) => Err(Err(errno)),
            Ok(op) => one_mmuext(ctx, target, &op),
        };
        if outcome.is_err() {
            break;
        }
        done += 1;
    }
    advance(call, done, size_of::<MmuextOp>() as u64);
    end_of_batch(ctx, call, done_out, outcome)
}

fn one_mmuext<M: Machine>(ctx: &mut Ctx<'_, M>, target: &Domain, op: &MmuextOp) -> Result<(), Result<Stop, Errno>> {
    use MmuextCommand as C;
    let command = C::from_number(u64::from(op.cmd)).ok_or(Err(Errno::NoSys))?;
    let foreign = target.id() != ctx.domain.id();
    if foreign && !matches!(command, C::PinL1 | C::PinL2 | C::PinL3 | C::PinL4 | C::Unpin | C::ClearPage | C::CopyPage)
    {
        return Err(Err(Errno::Perm));
    }
    let frame = || Frame::new(op.arg1).ok_or(Err(Errno::Inval));
    let here = CpuSet::only(ctx.m.this_cpu());
    let pin = |ctx: &mut Ctx<'_, M>, level| {
        let frame = frame()?;
        target.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held).pin(frame, level).map_err(Ok)
    };
    match command {
        C::PinL1 => pin(ctx, 1)?,
        C::PinL2 => pin(ctx, 2)?,
        C::PinL3 => pin(ctx, 3)?,
        C::PinL4 => pin(ctx, 4)?,
        C::Unpin => {
            let frame = frame()?;
            target.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held).unpin(frame).map_err(Ok)?;
        }
        C::NewBaseptr => load_kernel_root(ctx, op.arg1).map_err(Ok)?,
        C::NewUserBaseptr => load_user_root(ctx, op.arg1).map_err(Ok)?,
        C::TlbFlushLocal => flush(ctx, here, Flush::All),
        C::InvlpgLocal => flush(ctx, here, Flush::Page(GuestVirt(op.arg1))),
        C::TlbFlushMulti => flush(ctx, vcpus_in(ctx, op.arg2).map_err(Err)?, Flush::All),
        C::InvlpgMulti => flush(ctx, vcpus_in(ctx, op.arg2).map_err(Err)?, Flush::Page(GuestVirt(op.arg1))),
        C::TlbFlushAll => flush(ctx, ctx.domain.space.cpus(), Flush::All),
        C::InvlpgAll => flush(ctx, ctx.domain.space.cpus(), Flush::Page(GuestVirt(op.arg1))),
        C::FlushCache | C::FlushCacheGlobal => return Err(Err(Errno::Acces)),
        C::SetLdt => {
            let entries = u32::try_from(op.arg2 & 0xffff_ffff).unwrap_or(u32::MAX);
            descriptors::set_ldt(ctx, GuestVirt(op.arg1), entries).map_err(Err)?;
        }
        C::ClearPage => {
            let frame = frame()?;
            let mut session = ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held);
            session.clear_page(frame, target.id()).map_err(Ok)?;
        }
        C::CopyPage => {
            let to = frame()?;
            let source = Frame::new(op.arg2).ok_or(Err(Errno::Inval))?;
            let mut session = ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held);
            session.copy_page(source, to, target.id()).map_err(Ok)?;
        }
        C::MarkSuper | C::UnmarkSuper => return Err(Err(Errno::OpNotSupp)),
    }
    Ok(())
}

/// Makes a frame the caller's kernel root and loads it.
///
/// # Errors
/// Why the frame is no L4.
pub fn load_kernel_root<M: Machine>(ctx: &mut Ctx<'_, M>, number: u64) -> Outcome<()> {
    let new = Frame::new(number).ok_or(crate::paging::Refused::NoSuchFrame)?;
    let old = ctx.own.kernel_root;
    let m = ctx.m;
    ctx.domain.space.open(m, &ctx.world.frames, BUDGET, ctx.held).switch_root(old, Some(new), || m.load_root(new))?;
    ctx.own.kernel_root = Some(new);
    if old != Some(new) {
        descriptors::forget_ldt_pages(ctx);
    }
    Ok(())
}

/// Makes a frame, or nothing (0), the caller's user root.
fn load_user_root<M: Machine>(ctx: &mut Ctx<'_, M>, number: u64) -> Outcome<()> {
    let new = if number == 0 { None } else { Some(Frame::new(number).ok_or(crate::paging::Refused::NoSuchFrame)?) };
    let old = ctx.own.user_root;
    ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held).switch_root(old, new, || {})?;
    ctx.own.user_root = new;
    Ok(())
}

/// How an emulated write to a page table went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableWritten {
    /// The entry held this; the flag says whether a new one was stored.
    Done(u64, bool),
    /// Not yet: the guest executes the instruction again.
    Again,
    /// The fault is the guest's.
    NotOurs,
}

/// Replaces the entry of the caller's own L1 table that an address leads to by what `change` makes of it; `None` stores
/// nothing. If the entry changes meanwhile, it starts over.
pub fn write_own_table<M: Machine>(
    ctx: &mut Ctx<'_, M>,
    at: GuestVirt,
    change: impl Fn(u64) -> Option<u64>,
) -> TableWritten {
    const TRIES: u32 = 8;
    let Some(root) = ctx.own.kernel_root else {
        return TableWritten::NotOurs;
    };
    let mut session = ctx.domain.space.open(ctx.m, &ctx.world.frames, BUDGET, ctx.held);
    for _ in 0..TRIES {
        let found = match session.find_table_write(root, at) {
            Ok(found) => found,
            Err(Stop::More) => return TableWritten::Again,
            Err(Stop::Refused(_)) => return TableWritten::NotOurs,
        };
        let Some(new) = change(found.value) else {
            return TableWritten::Done(found.value, false);
        };
        match session.write_table(found.slot, Some(found.value), new) {
            Ok(None) => return TableWritten::Done(found.value, true),
            Ok(Some(_)) => {}
            Err(Stop::More) => return TableWritten::Again,
            Err(Stop::Refused(why)) => {
                log::debug!("{} wrote {new:#x} to its table through {at:?}: {why:?}", ctx.domain.id());
                return TableWritten::NotOurs;
            }
        }
    }
    TableWritten::Again
}

/// Fills a page of the caller with hypercall stubs (ABI core 1.8).
///
/// # Errors
/// `Inval` for an address that is not a writable page of its own.
pub fn fill_hypercall_page<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64) -> Result<(), Errno> {
    let frame = Frame::containing(address).filter(|_| address.is_multiple_of(PAGE_SIZE as u64)).ok_or(Errno::Inval)?;
    let id = ctx.domain.id();
    ctx.world.frames.take_writable(ctx.m, frame, id, id).map_err(|_| Errno::Inval)?;
    for (number, slot) in (0u8..).zip((0..PAGE_SIZE).step_by(stub::SIZE)) {
        ctx.m.write(frame, slot, &stub::code(number));
    }
    ctx.world.frames.drop_use(frame);
    Ok(())
}
