//! Traps, callbacks, segment bases, assists (core 3).

abi! {
    /// One gate of a vcpu's trap table (core 10.4).
    pub struct TrapInfo: 16 {
        /// Exception vector.
        vector: u8,
        /// Bits 0-1: least privileged ring that may raise it by INT n; bit 2: masks events.
        flags: u8,
        /// Ignored for 64-bit guests.
        cs: u16,
        /// Zero.
        pad: u32,
        /// Handler; 0 ends the list.
        address: u64,
    }
    /// Bit of [`TrapInfo::flags`]: the handler starts with events masked.
    pub const TRAP_MASKS_EVENTS: u8 = 4;

    /// Commands of `callback_op` (core 3.4).
    pub enum CallbackOp: u32 {
        /// [`CallbackRegister`].
        Register = 0,
        /// [`CallbackUnregister`].
        Unregister = 1,
    }

    /// What a callback is for (core 3.4); 3, an old name of `Sysenter`, is refused like any number nobody knows.
    pub enum CallbackType: u16 {
        /// Event upcall.
        Event = 0,
        /// Segment registers that did not load.
        Failsafe = 1,
        /// SYSCALL from 64-bit user code.
        Syscall = 2,
        /// Non-maskable interrupt.
        Nmi = 4,
        /// SYSENTER from compatibility code.
        Sysenter = 5,
        /// SYSCALL from compatibility code.
        Syscall32 = 7,
    }

    /// Registers a callback.
    pub struct CallbackRegister: 16 {
        /// A [`CallbackType`].
        kind: u16,
        /// Bit 0: mask events.
        flags: u16,
        /// Zero.
        pad: u32,
        /// Handler.
        address: u64,
    }
    /// Bit of [`CallbackRegister::flags`].
    pub const CALLBACK_MASKS_EVENTS: u16 = 1;

    /// Unregisters a callback.
    pub struct CallbackUnregister: 4 {
        /// A [`CallbackType`].
        kind: u16,
        /// Zero.
        pad: u16,
    }

    /// What the guest leaves on its stack for `iret` (core 3.7).
    pub struct IretContext: 72 {
        /// RAX.
        rax: u64,
        /// R11.
        r11: u64,
        /// RCX.
        rcx: u64,
        /// Bit 8: RCX and R11 may be lost.
        flags: u64,
        /// RIP.
        rip: u64,
        /// CS in bits 0..16.
        cs: u64,
        /// RFLAGS; IF becomes the upcall mask.
        rflags: u64,
        /// RSP.
        rsp: u64,
        /// SS in bits 0..16.
        ss: u64,
    }
    /// Bit of [`IretContext::flags`]: RCX and R11 need not be restored.
    pub const IRET_IN_SYSCALL: u64 = 1 << 8;

    /// First argument of `set_segment_base` (core 3.11).
    pub enum SegmentBase: u32 {
        /// FS.
        Fs = 0,
        /// The GS base of user mode.
        GsUser = 1,
        /// The GS base of kernel mode.
        GsKernel = 2,
        /// A selector for the GS of user mode.
        GsUserSelector = 3,
    }

    /// Second argument of `vm_assist` (core 3.12).
    pub enum Assist: u32 {
        /// Accepted without effect.
        FourGbSegments = 0,
        /// Accepted without effect.
        FourGbSegmentsNotify = 1,
        /// Writes to page tables are emulated.
        WritablePagetables = 2,
        /// Accepted without effect.
        PaeExtendedCr3 = 3,
        /// The guest's IOPL is compared with its real privilege.
        ArchitecturalIopl = 4,
        /// Runstate records carry an update flag.
        RunstateUpdateFlag = 5,
        /// User roots do not show the machine-to-physical table.
        M2pStrict = 32,
    }
}
/// First argument of `vm_assist`: enable.
pub const ASSIST_ENABLE: u32 = 0;
/// First argument of `vm_assist`: disable.
pub const ASSIST_DISABLE: u32 = 1;
