//! Calls about physical devices (core 8.2).

numbers! {
    /// Commands of `physdev_op` a PV guest uses.
    PhysdevOp: u32 {
        /// Interrupt line handled.
        IrqEoi = 12,
        /// [`SetIopl`].
        SetIopl = 6,
        /// [`SetIobitmap`].
        SetIobitmap = 7,
    }
}
layout! {
    /// The guest kernel's virtual I/O privilege level.
    SetIopl: 4 {
        /// 0..=3.
        iopl: u32,
    }
}
layout! {
    /// The ports user code may use.
    SetIobitmap: 16 {
        /// Address of the bitmap.
        bitmap: u64,
        /// Ports it covers.
        nr_ports: u32,
        /// Zero.
        pad: u32,
    }
}
numbers! {
    /// Commands of `console_io` (core 8.2).
    ConsoleIo: u32 {
        /// Print.
        Write = 0,
        /// Read what was typed.
        Read = 1,
    }
}
