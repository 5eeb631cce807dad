//! The toolstack's calls on domains: Xen's domctl, as far as ours uses it. Xen versions this interface and may change it
//! between releases; the numbers here are those of version 0x15 (Xen 4.17).

/// [`Domctl::interface_version`].
pub const INTERFACE_VERSION: u32 = 0x15;

abi! {
    /// Commands of `domctl`.
    pub enum DomctlOp: u32 {
        /// [`CreateDomain`]; `domain` in: the id that is asked for, 0 for any; out: the id. `Exist` if it, or one that shares
        /// its slot, is taken.
        CreateDomain = 1,
        /// Ends a domain and returns all it had. A caller whose payload begins with [`crate::tenon::GRADUALLY`] gets
        /// [`crate::tenon::MORE`] after each step, to call again; for any other the call goes on by itself.
        DestroyDomain = 2,
        /// Stops it from running.
        PauseDomain = 3,
        /// Lets it run.
        UnpauseDomain = 4,
        /// [`DomainInfo`] of the domain with the lowest id at or above `domain`.
        GetDomainInfo = 5,
        /// [`MaxMem`].
        MaxMem = 11,
        /// [`VcpuContextArg`].
        SetVcpuContext = 12,
        /// [`VcpuContextArg`].
        GetVcpuContext = 13,
        /// [`MaxVcpus`].
        MaxVcpus = 15,
        /// [`IomemPermission`].
        IomemPermission = 20,
    }

    /// The argument of `domctl`.
    pub struct Domctl: 144 {
        /// A [`DomctlOp`].
        cmd: u32,
        /// [`INTERFACE_VERSION`].
        interface_version: u32,
        /// Which domain.
        domain: u16,
        /// Zero.
        pad: [u16; 3],
        /// The command's own structure.
        payload: [u8; 128],
    }

    /// A domain to be.
    pub struct CreateDomain: 64 {
        /// Unused.
        ssidref: u32,
        /// Its UUID.
        handle: [u8; 16],
        /// Only 0: a PV guest.
        flags: u32,
        /// Unused.
        iommu_opts: u32,
        /// Vcpus it may have.
        max_vcpus: u32,
        /// Ports it may have.
        max_evtchn_port: u32,
        /// Frames its grant table may have; negative: default.
        max_grant_frames: i32,
        /// Frames its table of mapped grants may have; negative: default.
        max_maptrack_frames: i32,
        /// Grant version 1.
        grant_opts: u32,
        /// Unused.
        vmtrace_size: u32,
        /// Unused.
        cpupool_id: u32,
        /// Unused.
        arch: [u32; 2],
    }

    /// What is known of a domain.
    pub struct DomainInfo: 112 {
        /// Its id.
        domain: u16,
        /// Zero.
        pad1: u16,
        /// [`info`] bits.
        flags: u32,
        /// Pages it has.
        tot_pages: u64,
        /// Pages it may have.
        max_pages: u64,
        /// Zero.
        outstanding_pages: u64,
        /// Zero.
        shr_pages: u64,
        /// Zero.
        paged_pages: u64,
        /// Frame of its shared_info page.
        shared_info_frame: u64,
        /// Nanoseconds its vcpus have run.
        cpu_time: u64,
        /// Vcpus online.
        nr_online_vcpus: u32,
        /// Highest vcpu number.
        max_vcpu_id: u32,
        /// Zero.
        ssidref: u32,
        /// Its UUID.
        handle: [u8; 16],
        /// Zero.
        cpupool: u32,
        /// Zero.
        gpaddr_bits: u8,
        /// Zero.
        pad2: [u8; 7],
        /// Zero.
        arch_config: [u32; 2],
    }
}
/// Bits of [`DomainInfo::flags`].
pub mod info {
    /// Being destroyed.
    pub const DYING: u32 = 1;
    /// Has shut down; the reason is in bits 16..24.
    pub const SHUTDOWN: u32 = 1 << 2;
    /// Paused by the toolstack.
    pub const PAUSED: u32 = 1 << 3;
    /// No vcpu wants to run.
    pub const BLOCKED: u32 = 1 << 4;
    /// A vcpu runs.
    pub const RUNNING: u32 = 1 << 5;
    /// Where the shutdown reason starts.
    pub const SHUTDOWN_SHIFT: u32 = 16;
}
abi! {
    /// A limit.
    pub struct MaxMem: 8 {
        /// In KiB.
        max_memkb: u64,
    }

    /// A vcpu's state, in or out.
    pub struct VcpuContextArg: 16 {
        /// Which.
        vcpu: u32,
        /// Zero.
        pad: u32,
        /// Address of a [`crate::context::VcpuContext`].
        context: u64,
    }

    /// Frames of devices that a domain may map from now on.
    pub struct IomemPermission: 24 {
        /// The first.
        first_frame: u64,
        /// How many.
        nr_frames: u64,
        /// 1. What was allowed is not taken back: `OpNotSupp` for 0.
        allow: u8,
        /// Zero.
        pad: [u8; 7],
    }

    /// How many vcpus to give.
    pub struct MaxVcpus: 4 {
        /// Number.
        max: u32,
    }
}
