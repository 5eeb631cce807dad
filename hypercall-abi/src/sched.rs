//! Scheduling calls (core 5.4).

abi! {
    /// Commands of `sched_op`.
    pub enum SchedOp: u32 {
        /// Let another vcpu run.
        Yield = 0,
        /// Unmask upcalls and sleep until one is due.
        Block = 1,
        /// [`Shutdown`].
        Shutdown = 2,
        /// [`Poll`].
        Poll = 3,
        /// Dom0.
        RemoteShutdown = 4,
        /// Says the reason of a shutdown to come.
        ShutdownCode = 5,
        /// Refused.
        Watchdog = 6,
        /// Dom0.
        PinOverride = 7,
    }

    /// Ends the domain.
    pub struct Shutdown: 4 {
        /// A [`ShutdownReason`].
        reason: u32,
    }

    /// Ends another domain, which must be asked by somebody with authority over it.
    pub struct RemoteShutdown: 8 {
        /// Which.
        domain: u16,
        /// Zero.
        pad: u16,
        /// A [`ShutdownReason`].
        reason: u32,
    }

    /// Why a domain ended.
    pub enum ShutdownReason: u32 {
        /// Power off.
        Poweroff = 0,
        /// Start again.
        Reboot = 1,
        /// Suspend.
        Suspend = 2,
        /// Crashed.
        Crash = 3,
        /// Watchdog.
        Watchdog = 4,
        /// Soft reset.
        SoftReset = 5,
    }

    /// Sleeps until one of some ports is raised.
    pub struct Poll: 24 {
        /// Address of an array of u32 ports.
        ports: u64,
        /// How many, at most 128.
        nr_ports: u32,
        /// Zero.
        pad: u32,
        /// Absolute time in ns, 0 = none.
        timeout: u64,
    }
}
/// Most ports one poll may name.
pub const POLL_MAX_PORTS: u32 = 128;
