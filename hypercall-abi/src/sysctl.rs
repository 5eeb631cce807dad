//! The toolstack's calls on the machine: Xen's sysctl, as far as ours uses it, in version 0x15 (Xen 4.17).

/// [`Sysctl::interface_version`].
pub const INTERFACE_VERSION: u32 = 0x15;

abi! {
    /// Commands of `sysctl`.
    pub enum SysctlOp: u32 {
        /// [`ReadConsole`].
        ReadConsole = 1,
        /// [`PhysInfo`].
        PhysInfo = 3,
    }

    /// The argument of `sysctl`.
    pub struct Sysctl: 136 {
        /// A [`SysctlOp`].
        cmd: u32,
        /// [`INTERFACE_VERSION`].
        interface_version: u32,
        /// The command's own structure.
        payload: [u8; 128],
    }

    /// Reads what the hypervisor has logged last, and what domains without the console have written for it.
    pub struct ReadConsole: 24 {
        /// In: not 0 to leave out from now on what has been read.
        clear: u8,
        /// In: not 0 to begin at `index`, if that is still there.
        incremental: u8,
        /// Zero.
        pad: u16,
        /// In: where to begin. Out: where the next call may go on.
        index: u32,
        /// Where the text goes.
        buffer: u64,
        /// In: room, out: bytes read.
        count: u32,
        /// Zero.
        pad2: u32,
    }

    /// What the machine has. Fields we do not tell are zero.
    pub struct PhysInfo: 112 {
        /// Threads of a core.
        threads_per_core: u32,
        /// Cores of a socket.
        cores_per_socket: u32,
        /// CPUs in use.
        nr_cpus: u32,
        /// Highest number of a CPU.
        max_cpu_id: u32,
        /// NUMA nodes.
        nr_nodes: u32,
        /// Highest number of a node.
        max_node_id: u32,
        /// Their frequency.
        cpu_khz: u32,
        /// Capabilities.
        capabilities: u32,
        /// More of them.
        arch_capabilities: u32,
        /// Zero.
        pad: u32,
        /// Pages of RAM: free, of a domain, or the hypervisor's own.
        total_pages: u64,
        /// Free pages.
        free_pages: u64,
        /// Pages to be cleared.
        scrub_pages: u64,
        /// Pages claimed.
        outstanding_pages: u64,
        /// Highest frame.
        max_mfn: u64,
        /// CPUID words.
        hw_cap: [u32; 8],
    }
}
