//! Calls about physical devices (core 8.2).

abi! {
    /// Commands of `physdev_op` a PV guest uses.
    pub enum PhysdevOp: u32 {
        /// Interrupt line handled.
        IrqEoi = 12,
        /// [`SetIopl`].
        SetIopl = 6,
        /// [`SetIobitmap`].
        SetIobitmap = 7,
    }

    /// The guest kernel's virtual I/O privilege level.
    pub struct SetIopl: 4 {
        /// 0..=3.
        iopl: u32,
    }

    /// The ports user code may use.
    pub struct SetIobitmap: 16 {
        /// Address of the bitmap.
        bitmap: u64,
        /// Ports it covers.
        nr_ports: u32,
        /// Zero.
        pad: u32,
    }

    /// Commands of `console_io` (core 8.2).
    pub enum ConsoleIo: u32 {
        /// Print.
        Write = 0,
        /// Read what was typed.
        Read = 1,
    }
}
