//! The contract between ring 0 and every guest: Xen's 64-bit paravirtual ABI as data, and nothing else.
//!
//! Touches: nothing; these are numbers and layouts, the same for ring 0, dom0, test guests and tools.
//! Never touches: memory, registers, policy. What a call may do and to whom is `hv-core`'s business.
//! Keeps: one definition per number and per structure. Section numbers are those of the project's ABI documents
//! ("core" and "io"); layouts are asserted at compile time.
#![no_std]
#![forbid(unsafe_code)]

/// Defines the parts of the ABI, as many as are given: enums of numbers, with a checked conversion from the guest's register
/// and a printable name; structures, with all that plain ones need and their size asserted; and other items as they are.
macro_rules! abi {
    ($(#[$meta:meta])* pub enum $name:ident: $repr:ty { $($(#[$item:meta])* $variant:ident = $value:expr,)* }
    $($rest:tt)*) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
        #[repr($repr)]
        pub enum $name { $($(#[$item])* $variant = $value,)* }

        impl $name {
            /// Every number there is.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The variant with this number, or `None` if the ABI has none.
            #[must_use]
            pub fn from_number(number: u64) -> Option<Self> {
                $(if number == $value { return Some(Self::$variant); })*
                None
            }

            /// The number in the ABI.
            #[must_use]
            pub const fn number(self) -> u64 {
                self as u64
            }

            /// The same in 32 bits, as fields of structures have it.
            #[must_use]
            pub const fn code(self) -> u32 {
                self as u32
            }

            /// The name as this crate spells it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }
        }
        abi! { $($rest)* }
    };
    ($(#[$meta:meta])* pub struct $name:ident: $size:literal { $($(#[$item:meta])* $field:ident: $ty:ty,)* }
    $($rest:tt)*) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$item])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);

        impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
        abi! { $($rest)* }
    };
    ($other:item $($rest:tt)*) => {
        $other
        abi! { $($rest)* }
    };
    () => {};
}

pub mod bundle;
pub mod callback;
pub mod context;
pub mod domctl;
pub mod errno;
pub mod event;
pub mod first;
pub mod grant;
pub mod memory;
pub mod mmu;
pub mod physdev;
pub mod sched;
pub mod shared;
pub mod start_info;
pub mod stub;
pub mod sysctl;
pub mod tenon;
pub mod vcpu;
pub mod version;

pub use errno::Errno;

abi! {
    /// Hypercall numbers: `rax` at SYSCALL (core 10.5). Those of Xen's that are not here (19, 27, 31, 34, 37 to 48) are
    /// refused with `NoSys` like any number nobody knows.
    pub enum Hypercall: u64 {
        /// `set_trap_table(traps)` (core 10.4).
        SetTrapTable = 0,
        /// `mmu_update(updates, count, done, domains)` (core 4.4).
        MmuUpdate = 1,
        /// `set_gdt(frames, entries)` (core 3.10).
        SetGdt = 2,
        /// `stack_switch(ss, sp)` (core 3.10).
        StackSwitch = 3,
        /// `set_callbacks(event, failsafe, syscall)`: the older form of `CallbackOp` (core 3.4).
        SetCallbacks = 4,
        /// `fpu_taskswitch(set)` (core 3.11).
        FpuTaskswitch = 5,
        /// The oldest scheduler call; refused (core 8.2).
        SchedOpCompat = 6,
        /// `platform_op(op)`: dom0 (core 8.2).
        PlatformOp = 7,
        /// `set_debugreg(register, value)` (core 3.11).
        SetDebugreg = 8,
        /// `get_debugreg(register)` (core 3.11).
        GetDebugreg = 9,
        /// `update_descriptor(maddr, descriptor)` (core 3.10).
        UpdateDescriptor = 10,
        /// `memory_op(cmd, arg)` (core 4.10).
        MemoryOp = 12,
        /// `multicall(entries, count)` (core 4.9).
        Multicall = 13,
        /// `update_va_mapping(va, entry, flags)` (core 4.5).
        UpdateVaMapping = 14,
        /// `set_timer_op(deadline)` (core 6.3).
        SetTimerOp = 15,
        /// The multiplexed event-channel call of old guests; refused (core 5.2).
        EventChannelOpCompat = 16,
        /// `xen_version(cmd, arg)` (core 8.1).
        XenVersion = 17,
        /// `console_io(cmd, count, buffer)` (core 8.2).
        ConsoleIo = 18,
        /// `grant_table_op(cmd, array, count)` (io 1.3).
        GrantTableOp = 20,
        /// `vm_assist(cmd, type)` (core 3.12).
        VmAssist = 21,
        /// `update_va_mapping_otherdomain(va, entry, flags, domain)` (core 4.5).
        UpdateVaMappingOtherdomain = 22,
        /// `iret()` (core 3.7).
        Iret = 23,
        /// `vcpu_op(cmd, vcpu, arg)` (core 7).
        VcpuOp = 24,
        /// `set_segment_base(which, base)` (core 3.11).
        SetSegmentBase = 25,
        /// `mmuext_op(ops, count, done, domain)` (core 4.6).
        MmuextOp = 26,
        /// `nmi_op(cmd, arg)` (core 8.2).
        NmiOp = 28,
        /// `sched_op(cmd, arg)` (core 5.4).
        SchedOp = 29,
        /// `callback_op(cmd, arg)` (core 3.4).
        CallbackOp = 30,
        /// `event_channel_op(cmd, arg)` (core 5.2).
        EventChannelOp = 32,
        /// `physdev_op(cmd, arg)` (core 8.2).
        PhysdevOp = 33,
        /// `sysctl(op)`: toolstack; see [`sysctl`].
        Sysctl = 35,
        /// `domctl(op)`: toolstack; see [`domctl`].
        Domctl = 36,
        /// Our own extension; see [`tenon`]. Xen leaves this number to the architecture and uses it for nothing.
        Tenon = 55,
    }
}

/// The number of a domain, as calls have it. Those from [`domid::SELF`] on name no domain but a role (ABI core 10.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub u16);

impl core::fmt::Display for DomainId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.fmt(f)
    }
}

/// Domain ids that name a role instead of a domain (core 10.7).
pub mod domid {
    /// The caller, and the first of them.
    pub const SELF: u16 = 0x7ff0;
    /// Device memory.
    pub const IO: u16 = 0x7ff1;
    /// The hypervisor.
    pub const XEN: u16 = 0x7ff2;
    /// Shared copy-on-write memory; unused.
    pub const COW: u16 = 0x7ff3;
    /// Nobody.
    pub const INVALID: u16 = 0x7ff4;
    /// The idle domain.
    pub const IDLE: u16 = 0x7fff;
}

/// Flat selectors in the hypervisor's part of every GDT (core 1.6).
pub mod selector {
    /// First selector value that belongs to the hypervisor.
    pub const FIRST_RESERVED: u16 = 0xe000;
    /// Entries a guest may use in its GDT.
    pub const GUEST_ENTRIES: u16 = 7168;
    /// Ring-0 code.
    pub const HYPERVISOR_CS: u16 = 0xe008;
    /// Ring-0 data.
    pub const HYPERVISOR_DS: u16 = 0xe010;
    /// 32-bit code of a guest.
    pub const GUEST_CS32: u16 = 0xe023;
    /// Data and stack of a guest, kernel and user.
    pub const GUEST_SS: u16 = 0xe02b;
    /// 64-bit code of a guest, kernel and user.
    pub const GUEST_CS: u16 = 0xe033;
    /// The hypervisor's task-state segment.
    pub const TSS: u16 = 0xe040;
    /// The current vcpu's local descriptor table.
    pub const LDT: u16 = 0xe050;
}
