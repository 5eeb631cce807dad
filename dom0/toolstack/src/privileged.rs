//! What the toolstack asks of the hypervisor. Each method is one privileged call, or a few that belong together.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use guest_image::{MachineFrame, Pfn};
use hypercall_abi::context::VcpuContext;
use hypercall_abi::domctl::{DomainInfo, info};
use hypercall_abi::tenon::Refusals;

/// A domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub u16);

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Authority over domains. Every call may be refused.
#[allow(clippy::missing_errors_doc, reason = "said above")]
pub trait Hypervisor {
    /// Why a call was refused.
    type Error: fmt::Display;

    /// Makes an empty domain, paused, with room for `vcpus` (domctl `createdomain`, `max_vcpus`).
    fn create(&mut self, uuid: &[u8; 16], vcpus: u32) -> Result<DomainId, Self::Error>;

    /// Limits its memory (domctl `max_mem`).
    fn set_max_memory(&mut self, domain: DomainId, kib: u64) -> Result<(), Self::Error>;

    /// Gives it zeroed frames for the pages from `first` on, as many as `frames` has room for, and says
    /// how many it got (memory_op `populate_physmap`).
    fn populate(&mut self, domain: DomainId, first: Pfn, frames: &mut [MachineFrame]) -> Result<usize, Self::Error>;

    /// Writes into one of its frames, within the frame (a mapping of a foreign frame). Frames come mostly
    /// several times in a row: keeping the last one mapped pays.
    fn write(&mut self, domain: DomainId, frame: MachineFrame, offset: usize, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Writes into page `pfn`, given the frames of all pages: as [`Hypervisor::write`], for those that map several pages
    /// at once.
    fn fill(
        &mut self,
        domain: DomainId,
        frames: &[MachineFrame],
        pfn: Pfn,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), Self::Error>;

    /// Opens a port of the domain for `remote` to bind (event_channel_op `alloc_unbound`).
    fn open_port(&mut self, domain: DomainId, remote: DomainId) -> Result<u32, Self::Error>;

    /// The first frame of its grant table, version 1 (grant_table_op `setup_table`).
    fn grant_table(&mut self, domain: DomainId) -> Result<MachineFrame, Self::Error>;

    /// Pins a frame as L4 table; this is where the hypervisor judges the page tables (mmuext_op).
    fn pin_root(&mut self, domain: DomainId, frame: MachineFrame) -> Result<(), Self::Error>;

    /// Sets a vcpu's state, which must not run (domctl `setvcpucontext`).
    fn set_vcpu(&mut self, domain: DomainId, vcpu: u32, context: &VcpuContext) -> Result<(), Self::Error>;

    /// A vcpu's state (domctl `getvcpucontext`).
    fn vcpu(&mut self, domain: DomainId, vcpu: u32) -> Result<Box<VcpuContext>, Self::Error>;

    /// Lets the domain run (domctl `unpausedomain`).
    fn unpause(&mut self, domain: DomainId) -> Result<(), Self::Error>;

    /// Stops it (domctl `pausedomain`).
    fn pause(&mut self, domain: DomainId) -> Result<(), Self::Error>;

    /// Ends it for good, and returns when everything it had is free (domctl `destroydomain`, repeated).
    fn destroy(&mut self, domain: DomainId) -> Result<(), Self::Error>;

    /// The domain with the lowest number at or above `from` (domctl `getdomaininfo`).
    fn info(&mut self, from: DomainId) -> Result<Option<DomainInfo>, Self::Error>;

    /// Which vcpu crashed the domain and why, in the hypervisor's words; `None` if it knows of no crash.
    fn crash_report(&mut self, domain: DomainId) -> Result<Option<(u32, String)>, Self::Error>;

    /// What the hypervisor refused the domain's kernel last.
    fn refusals(&mut self, domain: DomainId) -> Result<Refusals, Self::Error>;
}

/// All domains.
///
/// # Errors
/// Those of [`Hypervisor::info`].
pub fn domains<H: Hypervisor>(hypervisor: &mut H) -> Result<Vec<DomainInfo>, H::Error> {
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
