//! What the toolstack asks of the hypervisor. Each method is one privileged call, or a few that belong together.

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

/// Authority over domains. Every call may be refused, and none does more than a turn may take.
#[allow(clippy::missing_errors_doc, reason = "said above")]
pub trait Hypervisor {
    /// Why a call was refused.
    type Error: fmt::Display;

    /// Makes an empty domain, paused, with room for `vcpus` (domctl `createdomain`, `max_vcpus`).
    fn create(&self, uuid: &[u8; 16], vcpus: u32) -> Result<DomainId, Self::Error>;

    /// Limits its memory (domctl `max_mem`).
    fn set_max_memory(&self, domain: DomainId, kib: u64) -> Result<(), Self::Error>;

    /// Gives it zeroed frames for the pages from `first` on, as many as `frames` has room for, and says
    /// how many it got (memory_op `populate_physmap`).
    fn populate(&self, domain: DomainId, first: Pfn, frames: &mut [MachineFrame]) -> Result<usize, Self::Error>;

    /// Writes into one of its frames, within the frame (a mapping of a foreign frame). Frames come mostly
    /// several times in a row: keeping the last one mapped pays.
    fn write(&self, domain: DomainId, frame: MachineFrame, offset: usize, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Writes into page `pfn`, given the frames of all pages: as [`Hypervisor::write`], for those that map several pages
    /// at once.
    fn fill(
        &self,
        domain: DomainId,
        frames: &[MachineFrame],
        pfn: Pfn,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), Self::Error>;

    /// Opens a port of the domain for `remote` to bind (event_channel_op `alloc_unbound`).
    fn open_port(&self, domain: DomainId, remote: DomainId) -> Result<u32, Self::Error>;

    /// The first frame of its grant table, version 1 (grant_table_op `setup_table`).
    fn grant_table(&self, domain: DomainId) -> Result<MachineFrame, Self::Error>;

    /// Pins frames as L1 tables, at most [`LEAVES`](crate::create::LEAVES): the hypervisor judges each of their entries
    /// (mmuext_op).
    fn pin_leaves(&self, domain: DomainId, frames: &[MachineFrame]) -> Result<(), Self::Error>;

    /// Lets go of such pins; what the root leads to stays a table (mmuext_op).
    fn unpin_leaves(&self, domain: DomainId, frames: &[MachineFrame]) -> Result<(), Self::Error>;

    /// Pins a frame as L4 table; this is where the hypervisor judges the page tables (mmuext_op).
    fn pin_root(&self, domain: DomainId, frame: MachineFrame) -> Result<(), Self::Error>;

    /// Sets a vcpu's state, which must not run (domctl `setvcpucontext`).
    fn set_vcpu(&self, domain: DomainId, vcpu: u32, context: &VcpuContext) -> Result<(), Self::Error>;

    /// A vcpu's state (domctl `getvcpucontext`).
    fn vcpu(&self, domain: DomainId, vcpu: u32) -> Result<Box<VcpuContext>, Self::Error>;

    /// Lets the domain run (domctl `unpausedomain`).
    fn unpause(&self, domain: DomainId) -> Result<(), Self::Error>;

    /// Stops it (domctl `pausedomain`).
    fn pause(&self, domain: DomainId) -> Result<(), Self::Error>;

    /// Goes on ending it for good, by as much as may be done at once (domctl `destroydomain`): to be called until it
    /// answers [`Progress::Done`]; then everything it had is free.
    fn destroy(&self, domain: DomainId) -> Result<Progress, Self::Error>;

    /// The domain with the lowest number at or above `from` (domctl `getdomaininfo`).
    fn info(&self, from: DomainId) -> Result<Option<DomainInfo>, Self::Error>;

    /// Which vcpu crashed the domain and why, in the hypervisor's words; `None` if it knows of no crash.
    fn crash_report(&self, domain: DomainId) -> Result<Option<(u32, String)>, Self::Error>;

    /// What the hypervisor refused the domain's kernel last.
    fn refusals(&self, domain: DomainId) -> Result<Refusals, Self::Error>;

    /// Memory and CPUs of the machine (sysctl `physinfo`).
    fn physical_info(&self) -> Result<PhysInfo, Self::Error>;

    /// The version of its ABI in words: `4.17.0-tenon` (xen_version).
    fn version(&self) -> String;

    /// What it has logged, from position `from` on: how many bytes of `to` are filled, and where to go on. With `clear`,
    /// what is before `from` is forgotten (sysctl `readconsole`).
    fn read_log(&self, from: u32, clear: bool, to: &mut [u8]) -> Result<(usize, u32), Self::Error>;
}

/// How far work is that is done a piece at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do.
    More,
    /// All is done.
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

/// What a domain does, a letter or a dash each: runs, blocked, paused, shut down, dying.
#[must_use]
pub fn states(domain: &DomainInfo) -> String {
    let states =
        [(info::RUNNING, 'r'), (info::BLOCKED, 'b'), (info::PAUSED, 'p'), (info::SHUTDOWN, 's'), (info::DYING, 'd')];
    states.into_iter().map(|(bit, letter)| if domain.flags & bit != 0 { letter } else { '-' }).collect()
}

/// A domain as a line of a list: number, MiB, vcpus, state, seconds.
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
