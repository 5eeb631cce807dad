//! A vcpu's state as a structure: `vcpu_op(initialise)` and the toolstack (core 10.3).

use crate::callback::TrapInfo;

abi! {
    /// General registers in the order of the ABI.
    pub struct UserRegs: 200 {
        /// R15.
        r15: u64,
        /// R14.
        r14: u64,
        /// R13.
        r13: u64,
        /// R12.
        r12: u64,
        /// RBP.
        rbp: u64,
        /// RBX.
        rbx: u64,
        /// R11.
        r11: u64,
        /// R10.
        r10: u64,
        /// R9.
        r9: u64,
        /// R8.
        r8: u64,
        /// RAX.
        rax: u64,
        /// RCX.
        rcx: u64,
        /// RDX.
        rdx: u64,
        /// RSI.
        rsi: u64,
        /// RDI.
        rdi: u64,
        /// Private to the hypervisor.
        error_code: u32,
        /// Private to the hypervisor.
        entry_vector: u32,
        /// RIP.
        rip: u64,
        /// CS.
        cs: u16,
        /// Zero.
        pad0: u16,
        /// The upcall mask at the time.
        saved_upcall_mask: u8,
        /// Zero.
        pad1: [u8; 3],
        /// RFLAGS.
        rflags: u64,
        /// RSP.
        rsp: u64,
        /// SS in the low half.
        ss: u64,
        /// ES in the low half.
        es: u64,
        /// DS in the low half.
        ds: u64,
        /// FS in the low half.
        fs: u64,
        /// GS in the low half.
        gs: u64,
    }

    /// All of a vcpu (core 10.3).
    pub struct VcpuContext: 0x1430 {
        /// FXSAVE image.
        fpu_ctxt: [u8; 512],
        /// [`flags`].
        flags: u64,
        /// General registers.
        user_regs: UserRegs,
        /// One gate per vector.
        trap_ctxt: [TrapInfo; 256],
        /// Address of the local descriptor table.
        ldt_base: u64,
        /// Its descriptors.
        ldt_ents: u64,
        /// Frames of the global descriptor table.
        gdt_frames: [u64; 16],
        /// Its descriptors.
        gdt_ents: u64,
        /// Stack segment of the guest kernel.
        kernel_ss: u64,
        /// Stack of the guest kernel.
        kernel_sp: u64,
        /// CR0..CR7; 1 is the user root, 3 the kernel root, as frame << 12.
        ctrlreg: [u64; 8],
        /// DR0..DR7.
        debugreg: [u64; 8],
        /// Event upcall.
        event_callback_eip: u64,
        /// Failsafe callback.
        failsafe_callback_eip: u64,
        /// System calls.
        syscall_callback_eip: u64,
        /// Bits of `vm_assist`.
        vm_assist: u64,
        /// FS base.
        fs_base: u64,
        /// GS base of kernel mode.
        gs_base_kernel: u64,
        /// GS base of user mode.
        gs_base_user: u64,
    }
}

/// Bits of [`VcpuContext::flags`].
pub mod flags {
    /// `fpu_ctxt` is to be used.
    pub const I387_VALID: u64 = 1;
    /// Starts in kernel mode.
    pub const IN_KERNEL: u64 = 1 << 2;
    /// The failsafe callback masks events.
    pub const FAILSAFE_MASKS_EVENTS: u64 = 1 << 3;
    /// The syscall callback masks events.
    pub const SYSCALL_MASKS_EVENTS: u64 = 1 << 4;
    /// Runs at once.
    pub const ONLINE: u64 = 1 << 5;
}
