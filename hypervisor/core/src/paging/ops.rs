//! Calls by which a guest changes its page tables and flushes translations (ABI core 4).
//!
//! Requests are copied in, a few at a time; then the paging lock is taken and they are carried out; then the call's
//! count of requests done moves on. The paging lock is never held while guest memory is copied.

use super::{Outcome, Refused, Stop};
use crate::addr::CpuSet;
use crate::machine::Flush;
use crate::prelude::*;
use crate::vcpu::descriptors;
use hypercall_abi::mmu::{MmuUpdate, MmuextCommand, MmuextOp, uvmf};
use hypercall_abi::tenon::RefusalKind;
use log::Level::Debug;
use zerocopy::{FromZeros, IntoBytes};

/// Most requests copied in at a time.
pub(crate) const BATCH: usize = 32;
/// The bits of a count that hold the number. Xen uses the top bit to mark a call that it continues.
pub(crate) const COUNT: u64 = 0x7fff_ffff;

/// Decodes the domains that `mmu_update` names: the one whose tables are changed, and the one whose frames may be
/// mapped (ABI core 4.4).
fn parties<'a, M: Machine>(ctx: &Ctx<'a, M>, domains: u64) -> Result<(&'a Domain, DomainId), Errno> {
    let [low, high] = [domains, domains >> 16].map(low16);
    let tables = high.checked_sub(1).map_or(Ok(ctx.domain), |id| ctx.controlled(id))?;
    let frames = if low == domid::SELF { tables.id() } else { ctx.controlled(low)?.id() };
    Ok((tables, frames))
}

/// One step of `mmu_update`.
///
/// # Errors
/// Those of ABI core 4.4; the number of requests done has been written before.
pub fn mmu_update<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    // Most calls have one request, and need no room for more.
    if call.args[1] & COUNT == 1 { updates::<M, 1>(ctx, call) } else { updates::<M, BATCH>(ctx, call) }
}

fn updates<M: Machine, const BATCH: usize>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let [list, count, _, domains, ..] = call.args;
    let (tables, from) = parties(ctx, domains)?;
    let mut requests = [MmuUpdate::new_zeroed(); BATCH];
    let now = usize::try_from(count & COUNT).unwrap_or(BATCH).min(BATCH);
    let requests = requests.get_mut(..now).ok_or(Errno::Inval)?;
    let mut done = 0;
    let outcome = ctx.read_bytes(list, requests.as_mut_bytes()).map_err(Halt::Refused).and_then(|()| {
        let (m, domain, rip) = (ctx.m, ctx.domain, ctx.state.regs.rip);
        let updated = ctx.session(tables).mmu_updates(requests, from, &mut done);
        updated.inspect_err(|stop| {
            let (id, request) = (domain.id(), requests.get(done));
            domain.log(m, Debug, format_args!("{id} mmu_update {request:x?} at {rip:#x}: {stop:?}"));
        })?;
        Ok(())
    });
    end_of_batch(ctx, call, (long(done), size_of::<MmuUpdate>()), outcome)
}

/// Ends a step of a batch: moves the call's place in its array on by `done` requests of `size` bytes. Returns that
/// there is more to do, that all is done, or the first error; unless there is more, the count of requests done is
/// written first.
fn end_of_batch<M: Machine>(
    ctx: &Ctx<'_, M>,
    call: &mut Call,
    (done, size): (u64, usize),
    outcome: Result<(), Halt>,
) -> Answer {
    call.args[0] = call.args[0].wrapping_add(done.wrapping_mul(long(size)));
    call.args[1] = (call.args[1] & COUNT).saturating_sub(done);
    call.done = call.done.saturating_add(done);
    let answer = if call.args[1] == 0 { outcome.map(|()| 0) } else { outcome.and(Err(Halt::More)) };
    if answer != Err(Halt::More) && call.args[2] != 0 {
        let _ = ctx.write(call.args[2], &low32(call.done)); // as in Xen, a bad count pointer is ignored
    }
    answer
}

/// `update_va_mapping` (ABI core 4.5).
///
/// # Errors
/// Those of ABI core 4.5; nothing is flushed then.
pub fn update_va_mapping<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    update_va(ctx, call, domid::SELF)
}

/// `update_va_mapping_otherdomain`: like [`update_va_mapping`], but for frames of another domain.
///
/// # Errors
/// As [`update_va_mapping`].
pub fn update_va_mapping_otherdomain<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    update_va(ctx, call, low16(call.args[3]))
}

fn update_va<M: Machine>(ctx: &mut Ctx<'_, M>, call: &Call, id: u16) -> Answer {
    let [at, value, flags, ..] = call.args;
    let from = ctx.controlled(id)?.id();
    let root = ctx.state.kernel_root.ok_or(Errno::Inval)?;
    let at = GuestVirt(at);
    let updated = ctx.session(ctx.domain).update_va(root, at, value, from);
    updated.inspect_err(|stop| {
        let (id, rip) = (ctx.domain.id(), ctx.state.regs.rip);
        let what = format_args!("{id} update_va_mapping {at:?} <- {value:#x} at {rip:#x}: {stop:?}");
        ctx.domain.log(ctx.m, Debug, what);
    })?;
    let what = match flags & uvmf::KIND {
        uvmf::TLB_FLUSH => Flush::All,
        uvmf::INVLPG => Flush::Page(at),
        _ => return Ok(0),
    };
    let who = match flags & !uvmf::KIND {
        0 => CpuSet::only(ctx.m.this_cpu()),
        uvmf::ALL => ctx.domain.space.cpus(),
        bitmap => vcpus_in(ctx, bitmap)?,
    };
    flush(ctx, who, what);
    Ok(0)
}

/// The CPUs that may hold translations of the vcpus in a bitmap. Returns a superset: those that may hold any of the
/// domain's.
fn vcpus_in<M: Machine>(ctx: &Ctx<'_, M>, bitmap: u64) -> Result<CpuSet, Errno> {
    let _: u64 = ctx.read(bitmap)?;
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
/// Those of ABI core 4.6; the number of operations done has been written before.
pub fn mmuext_op<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let [list, count, _, id, ..] = call.args;
    let target = ctx.controlled(low16(id))?;
    let batch = (count & COUNT).min(long(BATCH));
    let end = if batch > 1 { ctx.world.sched.step_end(ctx.m) } else { 0 };
    let mut done = 0u64;
    let mut outcome = Ok(());
    while outcome.is_ok() && done < batch {
        let at = list.wrapping_add(done.wrapping_mul(bytes_of::<MmuextOp>()));
        outcome = ctx.read(at).map_err(Halt::Refused).and_then(|op| one_mmuext(ctx, target, &op));
        done = done.saturating_add(u64::from(outcome.is_ok()));
        if done < batch && ctx.m.now() >= end {
            break; // each operation may cost as much as a whole call
        }
    }
    end_of_batch(ctx, call, (done, size_of::<MmuextOp>()), outcome)
}

fn one_mmuext<M: Machine>(ctx: &mut Ctx<'_, M>, target: &Domain, op: &MmuextOp) -> Result<(), Halt> {
    use MmuextCommand as C;
    let command = C::from_number(u64::from(op.cmd)).ok_or(Errno::NoSys)?;
    let for_others =
        matches!(command, C::PinL1 | C::PinL2 | C::PinL3 | C::PinL4 | C::Unpin | C::ClearPage | C::CopyPage);
    ensure!(for_others || target.id() == ctx.domain.id(), Errno::Perm);
    let frame = || Frame::new(op.arg1).ok_or(Errno::Inval);
    let page = Flush::Page(GuestVirt(op.arg1));
    let here = CpuSet::only(ctx.m.this_cpu());
    match command {
        C::PinL1 => ctx.session(target).pin(frame()?, 1)?,
        C::PinL2 => ctx.session(target).pin(frame()?, 2)?,
        C::PinL3 => ctx.session(target).pin(frame()?, 3)?,
        C::PinL4 => ctx.session(target).pin(frame()?, 4)?,
        C::Unpin => ctx.session(target).unpin(frame()?)?,
        C::NewBaseptr => load_kernel_root(ctx, op.arg1)?,
        C::NewUserBaseptr => load_user_root(ctx, op.arg1)?,
        C::TlbFlushLocal => flush(ctx, here, Flush::All),
        C::InvlpgLocal => flush(ctx, here, page),
        C::TlbFlushMulti => flush(ctx, vcpus_in(ctx, op.arg2).map_err(|_| Errno::Inval)?, Flush::All),
        C::InvlpgMulti => flush(ctx, vcpus_in(ctx, op.arg2).map_err(|_| Errno::Inval)?, page),
        C::TlbFlushAll => flush(ctx, ctx.domain.space.cpus(), Flush::All),
        C::InvlpgAll => flush(ctx, ctx.domain.space.cpus(), page),
        C::FlushCache | C::FlushCacheGlobal => return Err(Errno::Acces.into()),
        C::SetLdt => descriptors::set_ldt(ctx, GuestVirt(op.arg1), low32(op.arg2))?,
        C::ClearPage => ctx.session(ctx.domain).clear_page(frame()?, target.id())?,
        C::CopyPage => {
            let source = Frame::new(op.arg2).ok_or(Errno::Inval)?;
            ctx.session(ctx.domain).copy_page(source, frame()?, target.id())?;
        }
        C::MarkSuper | C::UnmarkSuper => return Err(Errno::OpNotSupp.into()),
    }
    Ok(())
}

/// Makes a frame the kernel root of the calling vcpu, and loads it.
///
/// # Errors
/// Why the frame cannot be an L4 table.
pub fn load_kernel_root<M: Machine>(ctx: &mut Ctx<'_, M>, number: u64) -> Outcome<()> {
    let new = Frame::new(number).ok_or(Refused::NoSuchFrame)?;
    let (m, old) = (ctx.m, ctx.state.kernel_root);
    ctx.session(ctx.domain).switch_root(old, Some(new), || m.load_root(new))?;
    ctx.state.kernel_root = Some(new);
    // The LDT's pages are those that the new tables map; an LDT without entries has no pages mapped.
    if old != Some(new) && ctx.state.ldt_entries > 0 {
        descriptors::forget_ldt_pages(ctx);
    }
    Ok(())
}

/// Makes a frame (or none, for 0) the user root of the calling vcpu.
fn load_user_root<M: Machine>(ctx: &mut Ctx<'_, M>, number: u64) -> Outcome<()> {
    let new = if number == 0 { None } else { Some(Frame::new(number).ok_or(Refused::NoSuchFrame)?) };
    let old = ctx.state.user_root;
    ctx.session(ctx.domain).switch_root(old, new, || {})?;
    ctx.state.user_root = new;
    Ok(())
}

/// `update_descriptor`: changes one descriptor in the caller's memory.
///
/// # Errors
/// `Inval` for a forbidden descriptor, an unaligned address, or a frame that is not the caller's.
pub fn update_descriptor<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let [address, descriptor, ..] = call.args;
    match ctx.session(ctx.domain).update_descriptor(address, descriptor) {
        Ok(()) => Ok(0),
        Err(Stop::More) => Err(Halt::More),
        Err(Stop::Refused(_)) => Err(Errno::Inval.into()),
    }
}

/// The result of an emulated write to a page table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableWritten {
    /// The write is done: the entry's old value, and whether a new one was stored.
    Done(u64, bool),
    /// The write is not done yet: the guest executes the instruction again.
    Again,
    /// This is no write to an own L1 table: the guest gets the fault.
    NotOurs,
}

/// Replaces the entry, in an own L1 table of the caller, at address `at`. `change` computes the new entry from the old
/// one; if it returns `None`, nothing is stored. If the entry changes in between, this starts over.
pub fn write_own_table<M: Machine>(
    ctx: &mut Ctx<'_, M>,
    at: GuestVirt,
    change: impl Fn(u64) -> Option<u64>,
) -> TableWritten {
    const TRIES: u32 = 8;
    let Some(root) = ctx.state.kernel_root else { return TableWritten::NotOurs };
    let (m, domain) = (ctx.m, ctx.domain);
    let mut session = ctx.session(domain);
    for _ in 0..TRIES {
        let found = match session.find_table_write(root, at) {
            Ok(found) => found,
            Err(Stop::More) => return TableWritten::Again,
            Err(Stop::Refused(_)) => return TableWritten::NotOurs,
        };
        let Some(new) = change(found.value) else { return TableWritten::Done(found.value, false) };
        match session.write_table(found.slot, Some(found.value), new) {
            Ok(None) => return TableWritten::Done(found.value, true),
            Ok(Some(_)) => {}
            Err(Stop::More) => return TableWritten::Again,
            Err(Stop::Refused(why)) => {
                drop(session); // logging may wait, and must not hold the lock
                let id = domain.id();
                domain.log(m, Debug, format_args!("{id} wrote {new:#x} to its table through {at:?}: {why:?}"));
                ctx.note_refusal(RefusalKind::TableWrite, ctx.state.regs.rip, [at.0, new], Some(why.into()));
                return TableWritten::NotOurs;
            }
        }
    }
    TableWritten::Again
}
