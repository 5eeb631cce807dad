//! Event channels (core 5).

/// Ports of the 2-level format; port 0 is never valid (core 5.1).
pub const PORTS: u32 = 4096;

abi! {
    /// Commands of `event_channel_op` (core 5.2).
    pub enum EventOp: u32 {
        /// [`BindInterdomain`].
        BindInterdomain = 0,
        /// [`BindVirq`].
        BindVirq = 1,
        /// Physical interrupts: for domains with devices.
        BindPirq = 2,
        /// [`PortArg`].
        Close = 3,
        /// [`PortArg`].
        Send = 4,
        /// [`Status`].
        Status = 5,
        /// [`AllocUnbound`].
        AllocUnbound = 6,
        /// [`BindIpi`].
        BindIpi = 7,
        /// [`BindVcpu`].
        BindVcpu = 8,
        /// [`PortArg`].
        Unmask = 9,
        /// [`Reset`].
        Reset = 10,
        /// FIFO format: refused, guests fall back to 2-level.
        InitControl = 11,
        /// FIFO format: refused.
        ExpandArray = 12,
        /// FIFO format: refused, Linux ignores it.
        SetPriority = 13,
    }

    /// Virtual interrupts (core 5.3). The others below [`VIRQS`] are dom0's, and nothing here raises them.
    pub enum Virq: u32 {
        /// Timer, per vcpu.
        Timer = 0,
        /// Debug request, per vcpu.
        Debug = 1,
        /// Bytes on the machine's console, dom0.
        Console = 2,
        /// A domain died, shut down or was created, dom0.
        DomExc = 3,
        /// Profiler, per vcpu, never raised.
        Xenoprof = 7,
        /// Console ring, dom0.
        ConRing = 8,
        /// Argo.
        Argo = 11,
        /// Performance counters, per vcpu, never raised.
        Xenpmu = 13,
    }
}

/// Number of virtual interrupts there can be.
pub const VIRQS: u32 = 24;

impl Virq {
    /// Whether each vcpu has one of its own.
    #[must_use]
    pub const fn per_vcpu(self) -> bool {
        matches!(self, Self::Timer | Self::Debug | Self::Xenoprof | Self::Xenpmu)
    }
}

abi! {
    /// Joins a port of ours to an unbound port of another domain.
    pub struct BindInterdomain: 12 {
        /// In: the other domain.
        remote_dom: u16,
        /// Zero.
        pad: u16,
        /// In: its port.
        remote_port: u32,
        /// Out: our port.
        local_port: u32,
    }

    /// Binds a virtual interrupt.
    pub struct BindVirq: 12 {
        /// In: a [`Virq`].
        virq: u32,
        /// In: the vcpu it goes to.
        vcpu: u32,
        /// Out: our port.
        port: u32,
    }

    /// A port of the caller: close, send, unmask.
    pub struct PortArg: 4 {
        /// In.
        port: u32,
    }

    /// Asks what a port is.
    pub struct Status: 24 {
        /// In: whose port.
        dom: u16,
        /// Zero.
        pad: u16,
        /// In: which.
        port: u32,
        /// Out: a [`PortStatus`].
        status: u32,
        /// Out: the vcpu it notifies.
        vcpu: u32,
        /// Out: remote domain in the low half (unbound, interdomain); pirq or virq number otherwise.
        detail: u32,
        /// Out: remote port (interdomain).
        remote_port: u32,
    }

    /// [`Status::status`].
    pub enum PortStatus: u32 {
        /// Not in use.
        Closed = 0,
        /// Waiting for the other side.
        Unbound = 1,
        /// Joined to a port of a domain.
        Interdomain = 2,
        /// Interrupt of a device; here its vector.
        Pirq = 3,
        /// Virtual interrupt.
        Virq = 4,
        /// Interprocessor interrupt.
        Ipi = 5,
    }

    /// Allocates a port that another domain may join.
    pub struct AllocUnbound: 8 {
        /// In: whose port; SELF, or another domain with authority over it.
        dom: u16,
        /// In: who may join.
        remote_dom: u16,
        /// Out.
        port: u32,
    }

    /// Allocates a port by which vcpus of the caller interrupt one of them.
    pub struct BindIpi: 8 {
        /// In: the vcpu to notify.
        vcpu: u32,
        /// Out.
        port: u32,
    }

    /// Moves a port to another vcpu.
    pub struct BindVcpu: 8 {
        /// In.
        port: u32,
        /// In.
        vcpu: u32,
    }

    /// Names a vcpu's control block of FIFO events.
    pub struct InitControl: 24 {
        /// In: the frame it lies in.
        control_gfn: u64,
        /// In: where in the frame.
        offset: u32,
        /// In.
        vcpu: u32,
        /// Out: bits of a link.
        link_bits: u8,
        /// Zero.
        pad: [u8; 7],
    }

    /// Closes all ports of a domain.
    pub struct Reset: 2 {
        /// In.
        dom: u16,
    }
}
