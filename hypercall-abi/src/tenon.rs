//! Our own extension, beside Xen's ABI and inert for guests that do not ask for it.

/// First word of the payload of `domctl(DestroyDomain)`, where Xen has none: the caller has other work, and calls again.
pub const GRADUALLY: u64 = u64::from_le_bytes(*b"gradual\0");
/// What such a call answers while there is more to do.
pub const MORE: u64 = 1;

abi! {
    /// First argument of the `Tenon` hypercall.
    pub enum TenonOp: u32 {
        /// `(op, domain, address of a CrashReport)`: why a domain crashed. For domains with authority over it.
        CrashReport = 0,
        /// `(op, domain, address of Refusals)`: what a domain was refused last. For domains with authority over it.
        Refusals = 1,
        /// `(op, domain, address of a BindMessage)`: joins a free port of a domain to message-signalled interrupts, of the
        /// caller or, with authority over it, of another. For who has devices. `Inval`: no such vcpu; `NoSpc`: no free port or
        /// vector. `event_channel_op(Close)` parts them.
        BindMessage = 2,
        /// `(op)`: sleeps until an event is pending for the vcpu, whether its upcall mask is set or not, and leaves the mask as
        /// it is. For a kernel that looks for events itself, without an upcall.
        Wait = 3,
    }

    /// A port that a device raises, by what its driver writes into the device's table of messages (MSI-X).
    pub struct BindMessage: 24 {
        /// In: the vcpu it notifies.
        vcpu: u32,
        /// Out: the port.
        port: u32,
        /// Out: the address of the message.
        address: u64,
        /// Out: the data of the message.
        data: u32,
        /// Zero.
        pad: u32,
    }

    /// What a guest's kernel was refused.
    pub enum RefusalKind: u32 {
        /// A hypercall: its number, and its first two arguments; for `MmuUpdate` and `MmuextOp` the request that failed.
        Call = 0,
        /// A write to one of its page tables: RIP; the address, and the entry.
        TableWrite = 1,
        /// An instruction that nobody carries out for it: RIP; its first eight bytes. It got #GP.
        Instruction = 2,
        /// RDMSR: RIP; the register. It got #GP.
        ReadMsr = 3,
        /// WRMSR: RIP; the register, and the value. It got #GP.
        WriteMsr = 4,
    }

    /// Something a guest's kernel was refused, as often as it was refused in a row.
    pub struct Refusal: 40 {
        /// A [`RefusalKind`].
        kind: u32,
        /// The vcpu that asked.
        vcpu: u32,
        /// The number of the error; 0 if there is none.
        errno: u32,
        /// How often.
        times: u32,
        /// See [`RefusalKind`].
        number: u64,
        /// See [`RefusalKind`].
        args: [u64; 2],
    }

    /// The last refusals of a domain.
    pub struct Refusals: 328 {
        /// How many there are, the first of `list`.
        count: u64,
        /// From the oldest to the newest.
        list: [Refusal; 8],
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
