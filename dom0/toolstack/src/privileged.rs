//! What the toolstack needs of the hypervisor. Each method is one privileged call, or a few that belong together.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::{DomainInfo, info};
use hypercall_abi::sysctl::PhysInfo;
use hypercall_abi::tenon::Refusals;

pub use hypercall_abi::DomainId;

/// Authority over domains. The hypervisor may refuse any call; no call does more work than one turn allows.
#[allow(clippy::missing_errors_doc, reason = "said above")]
pub trait Hypervisor {
    /// Why a call was refused.
    type Error: fmt::Display;

    /// Creates an empty domain, paused, with room for `vcpus` vcpus (domctl `createdomain`, `max_vcpus`).
    fn create(&self, uuid: &[u8; 16], vcpus: u32) -> Result<DomainId, Self::Error>;

    /// Limits the domain's memory to `kib` KiB (domctl `max_mem`).
    fn set_max_memory(&self, domain: DomainId, kib: u64) -> Result<(), Self::Error>;

    /// Allocates zeroed frames for the domain's pages from `first` on, one for each element of `frames`. Returns how
    /// many it got (memory_op `populate_physmap`).
    fn populate(&self, domain: DomainId, first: Pfn, frames: &mut [MachineFrame]) -> Result<usize, Self::Error>;

    /// Writes into one frame of the domain, by a foreign mapping; `bytes` must not cross its end. Callers mostly write
    /// to the same frame several times in a row, so an implementation should keep the last one mapped.
    fn write(&self, domain: DomainId, frame: MachineFrame, offset: usize, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Writes into page `pfn` of a domain whose pages have these `frames`. Like [`Hypervisor::write`], but an
    /// implementation may map several pages at once.
    fn fill(
        &self,
        domain: DomainId,
        frames: &[MachineFrame],
        pfn: Pfn,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), Self::Error>;

    /// Allocates a port of the domain, for `remote` to bind (event_channel_op `alloc_unbound`).
    fn open_port(&self, domain: DomainId, remote: DomainId) -> Result<u32, Self::Error>;

    /// The first frame of the domain's grant table, version 1 (grant_table_op `setup_table`).
    fn grant_table(&self, domain: DomainId) -> Result<MachineFrame, Self::Error>;

    /// Pins at most [`LEAVES`](crate::create::LEAVES) frames as L1 tables: the hypervisor checks each of their entries
    /// (mmuext_op).
    fn pin_leaves(&self, domain: DomainId, frames: &[MachineFrame]) -> Result<(), Self::Error>;

    /// Unpins such frames; those that the pinned root leads to stay tables (mmuext_op).
    fn unpin_leaves(&self, domain: DomainId, frames: &[MachineFrame]) -> Result<(), Self::Error>;

    /// Pins a frame as L4 table: the hypervisor checks all tables below it that are not checked yet (mmuext_op).
    fn pin_root(&self, domain: DomainId, frame: MachineFrame) -> Result<(), Self::Error>;

    /// Sets the state of a vcpu, which must not run (domctl `setvcpucontext`).
    fn set_vcpu(&self, domain: DomainId, vcpu: u32, context: &VcpuContext) -> Result<(), Self::Error>;

    /// Reads the state of a vcpu (domctl `getvcpucontext`).
    fn vcpu(&self, domain: DomainId, vcpu: u32) -> Result<Box<VcpuContext>, Self::Error>;

    /// Lets the domain run (domctl `unpausedomain`).
    fn unpause(&self, domain: DomainId) -> Result<(), Self::Error>;

    /// Pauses the domain (domctl `pausedomain`).
    fn pause(&self, domain: DomainId) -> Result<(), Self::Error>;

    /// Does one piece of destroying the domain (domctl `destroydomain`). To be called until it returns
    /// [`Progress::Done`]; then everything the domain had is free.
    fn destroy(&self, domain: DomainId) -> Result<Progress, Self::Error>;

    /// The domain with the lowest number at or above `from` (domctl `getdomaininfo`).
    fn info(&self, from: DomainId) -> Result<Option<DomainInfo>, Self::Error>;

    /// Which vcpu crashed the domain and why, as the hypervisor recorded it; `None` if there was no crash.
    fn crash_report(&self, domain: DomainId) -> Result<Option<(u32, String)>, Self::Error>;

    /// The last requests of the domain's kernel that the hypervisor refused.
    fn refusals(&self, domain: DomainId) -> Result<Refusals, Self::Error>;

    /// Memory and CPUs of the machine (sysctl `physinfo`).
    fn physical_info(&self) -> Result<PhysInfo, Self::Error>;

    /// The version of the hypervisor's ABI: `4.17.0-tenon` (xen_version).
    fn version(&self) -> String;

    /// Reads the hypervisor's log from position `from` on into `to`. Returns how many bytes it read, and the position
    /// to continue at. With `clear`, it forgets the log before `from` (sysctl `readconsole`).
    fn read_log(&self, from: u32, clear: bool, to: &mut [u8]) -> Result<(usize, u32), Self::Error>;
}

/// Whether work that is done a piece at a time is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More pieces are left.
    More,
    /// All pieces are done.
    Done,
}

/// All domains.
///
/// # Errors
/// Those of [`Hypervisor::info`].
pub fn domains<H: Hypervisor>(hypervisor: &H) -> Result<Vec<DomainInfo>, H::Error> {
    let mut all = Vec::new();
    let mut next = Some(DomainId(0));
    while let Some(from) = next {
        let Some(domain) = hypervisor.info(from)? else { break };
        next = domain.domain.checked_add(1).map(DomainId);
        all.push(domain);
    }
    Ok(all)
}

/// The state of a domain, a letter or a dash for each flag: running, blocked, paused, shut down, dying.
#[must_use]
pub fn states(domain: &DomainInfo) -> String {
    let states =
        [(info::RUNNING, 'r'), (info::BLOCKED, 'b'), (info::PAUSED, 'p'), (info::SHUTDOWN, 's'), (info::DYING, 'd')];
    states.into_iter().map(|(bit, letter)| if domain.flags & bit != 0 { letter } else { '-' }).collect()
}

/// A domain as a line of a table: number, MiB, vcpus, state, seconds.
pub struct Summary<'a>(pub &'a DomainInfo);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(domain) = self;
        let mib = domain.tot_pages >> 8;
        write!(f, "{:>5} {mib:>8} {:>5} ", domain.domain, domain.nr_online_vcpus)?;
        f.write_str(&states(domain))?;
        let tenths = domain.cpu_time / 100_000_000;
        write!(f, " {:>7}.{}", tenths / 10, tenths % 10)
    }
}
