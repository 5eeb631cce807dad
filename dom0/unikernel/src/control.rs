//! Authority over other domains: what a toolstack needs, as safe functions (ABI core 4, 5; the `domctl` numbers).
//!
//! None of these functions can change the meaning of an address of this domain. Frames of other domains are written
//! through [`crate::memory::Foreign`].

use crate::hypercall;
use alloc::boxed::Box;
use alloc::string::String;
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::{
    CreateDomain, DomainInfo, Domctl, DomctlOp, INTERFACE_VERSION, MaxMem, MaxVcpus, VcpuContextArg,
};
use hypercall_abi::event::PORTS;
use hypercall_abi::grant::{SetupTable, status};
use hypercall_abi::memory::MemoryOp;
use hypercall_abi::mmu::{MmuextCommand, MmuextOp};
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::{Errno, tenon};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Calls `domctl` with a payload; returns the structure as the hypervisor left it.
fn domctl<T: IntoBytes + Immutable>(op: DomctlOp, domain: u16, payload: &T) -> Result<Domctl, Errno> {
    domctl_answer(op, domain, payload).map(|(_, arg)| arg)
}

/// Like [`domctl`], but also returns the result of the call.
fn domctl_answer<T: IntoBytes + Immutable>(op: DomctlOp, domain: u16, payload: &T) -> Result<(u64, Domctl), Errno> {
    let mut arg =
        Domctl { cmd: op as u32, interface_version: INTERFACE_VERSION, domain, pad: [0; 3], payload: [0; 128] };
    let bytes = payload.as_bytes();
    arg.payload.get_mut(..bytes.len()).ok_or(Errno::Inval)?.copy_from_slice(bytes);
    // SAFETY: only `set_vcpu` and `vcpu` put addresses in the payload, of objects that live longer than this call.
    let answer = unsafe { hypercall::domctl(&mut arg) }?;
    Ok((answer, arg))
}

/// Creates an empty domain, paused.
///
/// # Errors
/// `Perm`, `NoMem`, or `Inval` for an impossible number of vcpus.
pub fn create(uuid: &[u8; 16], vcpus: u32) -> Result<u16, Errno> {
    let wanted = CreateDomain {
        handle: *uuid,
        max_vcpus: vcpus,
        max_evtchn_port: PORTS - 1,
        max_grant_frames: -1,
        max_maptrack_frames: -1,
        grant_opts: 1,
        ..CreateDomain::default()
    };
    let domain = domctl(DomctlOp::CreateDomain, 0, &wanted)?.domain;
    if let Err(why) = domctl(DomctlOp::MaxVcpus, domain, &MaxVcpus { max: vcpus }) {
        destroy(domain)?;
        return Err(why);
    }
    Ok(domain)
}

/// Limits a domain's memory to `kib` KiB.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn set_max_memory(domain: u16, kib: u64) -> Result<(), Errno> {
    domctl(DomctlOp::MaxMem, domain, &MaxMem { max_memkb: kib }).map(drop)
}

/// Lets a domain run.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn unpause(domain: u16) -> Result<(), Errno> {
    domctl(DomctlOp::UnpauseDomain, domain, &0u64).map(drop)
}

/// Pauses a domain.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn pause(domain: u16) -> Result<(), Errno> {
    domctl(DomctlOp::PauseDomain, domain, &0u64).map(drop)
}

/// Destroys a domain and frees all it had. This may take long.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn destroy(domain: u16) -> Result<(), Errno> {
    domctl(DomctlOp::DestroyDomain, domain, &0u64).map(drop)
}

/// Does one step of destroying a domain; returns true when the domain is gone and all it had is free.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn destroy_gradually(domain: u16) -> Result<bool, Errno> {
    let (answer, _) = domctl_answer(DomctlOp::DestroyDomain, domain, &tenon::GRADUALLY)?;
    Ok(answer != tenon::MORE)
}

/// The domain with the lowest number at or above `from`.
///
/// # Errors
/// `Perm`.
pub fn info(from: u16) -> Result<Option<DomainInfo>, Errno> {
    match domctl(DomctlOp::GetDomainInfo, from, &0u64) {
        Ok(arg) => DomainInfo::read_from_prefix(&arg.payload).map(|(info, _)| Some(info)).map_err(|_| Errno::Inval),
        Err(Errno::Srch) => Ok(None),
        Err(why) => Err(why),
    }
}

/// Sets the state of a vcpu that does not run.
///
/// # Errors
/// `Perm`, `Srch`, `Busy`, and `Inval` for a vcpu that does not exist or for an impossible state.
pub fn set_vcpu(domain: u16, vcpu: u32, context: &VcpuContext) -> Result<(), Errno> {
    let address = (&raw const *context).addr() as u64;
    let arg = VcpuContextArg { vcpu, pad: 0, context: address };
    domctl(DomctlOp::SetVcpuContext, domain, &arg).map(drop)
}

/// Reads the state of a vcpu.
///
/// # Errors
/// `Perm`, `Srch`, `Busy`, `Inval` for a vcpu that does not exist, `NoData` for one that has no state yet.
pub fn vcpu(domain: u16, vcpu: u32) -> Result<Box<VcpuContext>, Errno> {
    let mut context = Box::<VcpuContext>::default();
    let address = (&raw mut *context).addr() as u64;
    domctl(DomctlOp::GetVcpuContext, domain, &VcpuContextArg { vcpu, pad: 0, context: address })?;
    Ok(context)
}

/// Allocates frames for a domain's pages from `first` on, one for each element of `frames`; returns how many it got.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn populate(domain: u16, first: u64, frames: &mut [u64]) -> Result<usize, Errno> {
    for (page, slot) in (first..).zip(frames.iter_mut()) {
        *slot = page;
    }
    // SAFETY: frames are only added to a domain; those added to our own are not mapped anywhere.
    let count = unsafe { hypercall::reservation(MemoryOp::PopulatePhysmap, frames, domain) }?;
    Ok(usize::try_from(count).unwrap_or(0).min(frames.len()))
}

/// Allocates `2^order` contiguous frames for a domain's pages from `first` on. Returns the first frame, or `None` if
/// there are no such frames.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn populate_run(domain: u16, first: u64, order: u32) -> Result<Option<u64>, Errno> {
    let mut extent = [first];
    let command = MemoryOp::PopulatePhysmap;
    // SAFETY: as in [`populate`].
    let count = unsafe { hypercall::reservation_of_order(command, &mut extent, order, domain) }?;
    Ok((count == 1).then_some(extent[0]))
}

/// The first frame of a domain's grant table.
///
/// # Errors
/// `Perm`, or `Inval` for a domain without grant table.
pub fn grant_table(domain: u16) -> Result<u64, Errno> {
    let mut frame = [0u64];
    let mut arg = [SetupTable {
        dom: domain,
        nr_frames: 1,
        frame_list: frame.as_mut_ptr().addr() as u64,
        ..SetupTable::default()
    }];
    // SAFETY: the call writes one word to `frame`, and maps nothing.
    unsafe { hypercall::setup_grant_tables(&mut arg) }?;
    if arg[0].status != status::OKAY {
        return Err(if arg[0].status == status::PERMISSION_DENIED { Errno::Perm } else { Errno::Inval });
    }
    Ok(frame[0])
}

/// Pins at most 16 frames of another domain as L1 tables.
///
/// # Errors
/// `Inval` for tables that break a rule, or for more than 16; `Perm`, `Srch`.
pub fn pin_leaves(domain: u16, frames: impl Iterator<Item = u64>) -> Result<(), Errno> {
    pins(MmuextCommand::PinL1, domain, frames)
}

/// Unpins at most 16 frames of another domain.
///
/// # Errors
/// `Inval` for a frame that is not pinned, or for more than 16; `Perm`, `Srch`.
pub fn unpin(domain: u16, frames: impl Iterator<Item = u64>) -> Result<(), Errno> {
    pins(MmuextCommand::Unpin, domain, frames)
}

fn pins(command: MmuextCommand, domain: u16, frames: impl Iterator<Item = u64>) -> Result<(), Errno> {
    let mut ops = [MmuextOp { cmd: command as u32, pad: 0, arg1: 0, arg2: 0 }; 16];
    let mut count = 0;
    for frame in frames {
        ops.get_mut(count).ok_or(Errno::Inval)?.arg1 = frame;
        count += 1;
    }
    // SAFETY: pinning changes no mapping.
    unsafe { hypercall::mmuext_op(ops.get(..count).unwrap_or_default(), domain) }.map(drop)
}

/// Pins a frame of another domain as its root table. The hypervisor checks all page tables below it that are not
/// checked yet.
///
/// # Errors
/// `Inval` for tables that break a rule, `Perm`, `Srch`.
pub fn pin_root(domain: u16, frame: u64) -> Result<(), Errno> {
    let op = MmuextOp { cmd: MmuextCommand::PinL4 as u32, pad: 0, arg1: frame, arg2: 0 };
    // SAFETY: pinning changes no mapping.
    unsafe { hypercall::mmuext_op(&[op], domain) }.map(drop)
}

/// Which vcpu crashed a domain and why, as the hypervisor recorded it; `None` if there was no crash.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn crash_report(domain: u16) -> Result<Option<(u32, String)>, Errno> {
    let tenon::CrashReport { vcpu, length, text } = match hypercall::crash_report(domain) {
        Err(Errno::NoSys) => return Ok(None),
        report => report?,
    };
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    let text = text.get(..length).unwrap_or_default();
    Ok((length > 0).then(|| (vcpu, String::from_utf8_lossy(text).into_owned())))
}

/// The last requests of a domain that the hypervisor refused, from the oldest to the newest.
///
/// # Errors
/// `Perm`, `Srch`.
pub fn refusals(domain: u16) -> Result<tenon::Refusals, Errno> {
    match hypercall::refusals(domain) {
        Err(Errno::NoSys) => Ok(tenon::Refusals::default()),
        refusals => refusals,
    }
}

/// Ends this domain for `reason`.
pub fn shutdown(reason: ShutdownReason) -> ! {
    hypercall::shutdown(reason)
}
