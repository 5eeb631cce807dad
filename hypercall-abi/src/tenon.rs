//! Our own extension, beside Xen's ABI and inert for guests that do not ask for it.

abi! {
    /// First argument of the `Tenon` hypercall.
    pub enum TenonOp: u32 {
        /// `(op, domain, address of a CrashReport)`: why a domain crashed. For domains with authority over it.
        CrashReport = 0,
    }

    /// Why a domain crashed. Its registers are read with `domctl(GetVcpuContext)`.
    pub struct CrashReport: 136 {
        /// The vcpu that did it.
        vcpu: u32,
        /// Bytes of `text` in use; 0 if the domain did not crash.
        length: u32,
        /// The reason in words, for a person.
        text: [u8; 128],
    }
}
