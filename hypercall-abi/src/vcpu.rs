//! Calls on vcpus (core 6, 7).

abi! {
    /// Commands of `vcpu_op`.
    pub enum VcpuOp: u32 {
        /// Set the first state: a [`crate::context::VcpuContext`].
        Initialise = 0,
        /// Bring online.
        Up = 1,
        /// Take offline; it continues after this call when brought up again.
        Down = 2,
        /// 1 if online, 0 if not.
        IsUp = 3,
        /// Copies out a [`RunstateInfo`].
        GetRunstateInfo = 4,
        /// [`RegisterArea`]: where to keep the runstate.
        RegisterRunstateMemoryArea = 5,
        /// [`SetPeriodicTimer`].
        SetPeriodicTimer = 6,
        /// No argument.
        StopPeriodicTimer = 7,
        /// [`SetSingleshotTimer`].
        SetSingleshotTimer = 8,
        /// No argument.
        StopSingleshotTimer = 9,
        /// [`RegisterVcpuInfo`].
        RegisterVcpuInfo = 10,
        /// No argument.
        SendNmi = 11,
        /// Dom0.
        GetPhysid = 12,
        /// [`RegisterArea`]: where to keep a second copy of the time.
        RegisterVcpuTimeMemoryArea = 13,
        /// Not offered.
        RegisterRunstatePhysArea = 14,
        /// Not offered.
        RegisterVcpuTimePhysArea = 15,
    }

    /// Names a place in the guest's memory.
    pub struct RegisterArea: 8 {
        /// Guest virtual address.
        address: u64,
    }

    /// Moves a vcpu's record, see [`crate::shared::vcpu_info`].
    pub struct RegisterVcpuInfo: 16 {
        /// Frame number.
        mfn: u64,
        /// Byte in the frame; 8-aligned.
        offset: u32,
        /// Zero.
        reserved: u32,
    }

    /// A tick.
    pub struct SetPeriodicTimer: 8 {
        /// Nanoseconds, at least one millisecond.
        period_ns: u64,
    }

    /// One interrupt at a time to come.
    pub struct SetSingleshotTimer: 16 {
        /// Absolute system time in nanoseconds.
        timeout_abs_ns: u64,
        /// Bit 0: fail if in the past; ignored.
        flags: u32,
        /// Zero.
        pad: u32,
    }

    /// [`RunstateInfo::state`] (core 6.4).
    pub enum Runstate: u32 {
        /// On a CPU.
        Running = 0,
        /// Wants one.
        Runnable = 1,
        /// Sleeps.
        Blocked = 2,
        /// Down or paused.
        Offline = 3,
    }

    /// How a vcpu has spent its time; written by the hypervisor.
    pub struct RunstateInfo: 48 {
        /// A [`Runstate`].
        state: u32,
        /// Zero.
        pad: u32,
        /// When it was entered; bit 63 while the record is being changed.
        state_entry_time: u64,
        /// Nanoseconds spent in each state.
        time: [u64; 4],
    }
}
/// Bit of [`RunstateInfo::state_entry_time`] set while the record changes.
pub const RUNSTATE_UPDATE: u64 = 1 << 63;
