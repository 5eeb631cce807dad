//! `xen_version`, `sysctl`, and the page of hypercall stubs (ABI core 1.8, 8.1).

use super::console::read_log;
use crate::addr::HOLE_START;
use crate::domain::Powers;
use crate::policy;
use crate::prelude::*;
use hypercall_abi::stub;
use hypercall_abi::sysctl::{INTERFACE_VERSION, PhysInfo, ReadConsole, Sysctl, SysctlOp};
use hypercall_abi::version::{CompileInfo, FeatureInfo, VersionOp, feature};
use zerocopy::{FromBytes, IntoBytes};

/// `xen_version` (ABI core 8.1): version and features.
///
/// # Errors
/// `NoSys` for unknown commands, `Perm` for what only the toolstack may know, `Inval` for a word of
/// features that is neither Xen's first nor Tenon's.
pub fn xen_version<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    let (command, arg) = (call.command(), call.args[1]);
    match VersionOp::from_number(command).ok_or(Errno::NoSys)? {
        VersionOp::Version => return Ok(policy::VERSION),
        VersionOp::Extraversion => ctx.write(arg, &text::<16>(b".0-tenon"))?,
        VersionOp::CompileInfo => {
            let info = CompileInfo { compiler: text(b"rustc"), by: text(b"tenon"), ..Default::default() };
            ctx.write(arg, &info)?;
        }
        VersionOp::Capabilities => ctx.write(arg, &text::<1024>(b"xen-3.0-x86_64 "))?,
        VersionOp::Changeset => ctx.write(arg, &text::<64>(env!("CARGO_PKG_VERSION").as_bytes()))?,
        VersionOp::PlatformParameters => ctx.write(arg, &HOLE_START)?,
        VersionOp::GetFeatures => {
            let mut info: FeatureInfo = ctx.read(arg)?;
            let powers = if ctx.domain.may(Powers::CONTROL) { feature::DOM0 } else { 0 };
            info.submap = match info.submap_idx {
                0 => {
                    feature::MMU_PT_UPDATE_PRESERVE_AD
                        | feature::HIGHMEM_ASSIST
                        | feature::GNTTAB_MAP_AVAIL_BITS
                        | powers
                }
                feature::TENON_SUBMAP => 0,
                _ => return Err(Errno::Inval.into()),
            };
            ctx.write(arg, &info)?;
        }
        VersionOp::Pagesize if arg == 0 => return Ok(PAGE_BYTES),
        VersionOp::Pagesize => return Err(Errno::Inval.into()),
        VersionOp::GuestHandle => {
            let handle = ctx.domain.notes.with(|notes| notes.handle);
            ctx.write(arg, &handle)?;
        }
        VersionOp::Commandline => return Err(Errno::Perm.into()),
        VersionOp::BuildId => return Err(Errno::NoSys.into()),
    }
    Ok(0)
}

/// Returns a field with this text, padded with zeros.
fn text<const N: usize>(from: &[u8]) -> [u8; N] {
    let mut field = [0; N];
    fill(&mut field, from);
    field
}

/// `sysctl`: facts about the machine, for a toolstack.
///
/// # Errors
/// `Perm` without authority, `Acces` for another interface version, `NoSys` for unknown commands.
pub fn sysctl<M: Machine>(ctx: &mut Ctx<'_, M>, call: &mut Call) -> Answer {
    ctx.control()?;
    let arg = call.args[0];
    let mut call: Sysctl = ctx.read(arg)?;
    ensure!(call.interface_version == INTERFACE_VERSION, Errno::Acces);
    match SysctlOp::from_number(u64::from(call.cmd)).ok_or(Errno::NoSys)? {
        SysctlOp::PhysInfo => {
            let info = PhysInfo {
                nr_cpus: ctx.world.sched.online().len(),
                // Frames that are set aside count as taken: they are for the hypervisor.
                free_pages: u64::from(ctx.world.frames.unpromised_frames()),
                total_pages: u64::from(ctx.world.frames.ram_frames()),
                max_mfn: ctx.m.frame_limit().saturating_sub(1),
                ..PhysInfo::default()
            };
            fill(&mut call.payload, info.as_bytes());
        }
        SysctlOp::ReadConsole => {
            let (mut wanted, _) = ReadConsole::read_from_prefix(&call.payload).map_err(|_| Errno::Inval)?;
            read_log(ctx, &mut wanted)?;
            fill(&mut call.payload, wanted.as_bytes());
        }
    }
    ctx.write(arg, &call)?;
    Ok(0)
}

/// Fills a page of the caller with hypercall stubs (ABI core 1.8).
///
/// # Errors
/// `Inval` for an address that is not a writable page of the caller's own.
pub fn fill_hypercall_page<M: Machine>(ctx: &mut Ctx<'_, M>, address: u64) -> Result<(), Errno> {
    let frame = Frame::containing(address).filter(|_| address.is_multiple_of(PAGE_BYTES)).ok_or(Errno::Inval)?;
    let id = ctx.domain.id();
    ctx.world.frames.take_writable(ctx.m, frame, id, id).map_err(|_| Errno::Inval)?;
    for (number, slot) in (0u8..).zip((0..PAGE_SIZE).step_by(stub::SIZE)) {
        ctx.m.write(frame, slot, &stub::code(number));
    }
    ctx.world.frames.drop_use(frame, id);
    Ok(())
}
