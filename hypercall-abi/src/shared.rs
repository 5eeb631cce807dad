//! Pages both sides write: shared_info, vcpu_info, time (core 10.1, 10.2).

abi! {
    /// Time of a vcpu: written by the hypervisor under a version (core 6.1).
    pub struct TimeInfo: 32 {
        /// Odd while the record changes.
        version: u32,
        /// Zero.
        pad0: u32,
        /// The counter at `system_time`.
        tsc_timestamp: u64,
        /// Nanoseconds since the hypervisor started.
        system_time: u64,
        /// Multiplier of the shifted difference, in 2^-32.
        tsc_to_system_mul: u32,
        /// Left shift of the difference, right if negative.
        tsc_shift: i8,
        /// Bit 0: the same on all vcpus. Bit 1: the guest was stopped.
        flags: u8,
        /// Zero.
        pad1: [u8; 2],
    }
    /// Bit of [`TimeInfo::flags`]: every vcpu's tuple agrees.
    pub const TIME_TSC_STABLE: u8 = 1;

    /// When the hypervisor started, in time since 1970 (UTC): written by the hypervisor under a version.
    pub struct WallClock: 16 {
        /// Odd while the record changes.
        version: u32,
        /// Seconds.
        sec: u32,
        /// Nanoseconds.
        nsec: u32,
        /// Seconds, upper half.
        sec_hi: u32,
    }
}

/// vcpu_info records inside the shared_info page.
pub const LEGACY_VCPUS: usize = 32;

/// Offsets inside the shared_info page (core 10.1).
pub mod offset {
    /// Pending bits: 64 words.
    pub const EVTCHN_PENDING: usize = 0x800;
    /// Mask bits: 64 words.
    pub const EVTCHN_MASK: usize = 0xa00;
    /// A [`super::WallClock`].
    pub const WALLCLOCK: usize = 0xc00;
}

/// What a vcpu and the hypervisor share: offsets inside a vcpu_info record (core 10.2).
pub mod vcpu_info {
    /// `evtchn_upcall_pending`: set by the hypervisor, cleared by the guest: an event waits.
    pub const UPCALL_PENDING: usize = 0;
    /// `evtchn_upcall_mask`: the guest's virtual interrupt mask.
    pub const UPCALL_MASK: usize = 1;
    /// `evtchn_pending_sel`: which words of the pending bits to look at.
    pub const PENDING_SEL: usize = 8;
    /// `arch.cr2`: address of the last page fault.
    pub const CR2: usize = 0x10;
    /// `time`: a [`super::TimeInfo`].
    pub const TIME: usize = 0x20;
    /// Size of the record.
    pub const SIZE: usize = 64;
}
