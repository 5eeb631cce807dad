//! Devices of the machine, for a domain that has them: the ports of PCI configuration, windows over registers of devices, and
//! interrupts of devices.
//!
//! A device that masters the bus can be programmed to write to any memory, also to this domain's. So ports and windows are made
//! by `unsafe` functions. Their contract is what Rust cannot check: the device is given only addresses of memory that is set
//! aside or pinned for it.

use crate::dma::Bytes;
use crate::events::Channel;
use crate::hypercall;
use crate::memory::{PAGE, Window};
use crate::sync::MaskMutex;
use core::arch::asm;
use drivers::hardware::{ConfigurationPorts, Registers};
use drivers::pci::{Address, Message};
use hypercall_abi::Errno;

/// The port to which the selector of a configuration register is written.
const SELECT: u16 = 0xcf8;
/// The port by which the selected register is read and written.
const DATA: u16 = 0xcfc;

/// Held from the write to [`SELECT`] until the access to [`DATA`], so that no other register is selected in between.
static SELECTED: MaskMutex<()> = MaskMutex::new(());

/// The configuration space of PCI. The hypervisor carries out each access for a domain with devices; for any other domain, all
/// functions of PCI seem to be absent.
#[derive(Clone, Copy, Debug)]
pub struct Ports(());

impl Ports {
    /// Asks the hypervisor for the right to use ports.
    ///
    /// # Safety
    /// Whoever configures a device through this value lets the device master the bus only after a reset, and gives it only
    /// addresses of memory that the device may write: memory of a [`crate::dma::Dma`], or pages that stay pinned until the
    /// device has answered or was reset.
    ///
    /// # Errors
    /// The hypervisor's error.
    pub unsafe fn open() -> Result<Self, Errno> {
        hypercall::set_iopl(1)?;
        Ok(Self(()))
    }
}

/// Writes 32 bits to a port.
fn output(port: u16, value: u32) {
    // SAFETY: `Ports::open` has made the instruction legal, and the contract of `Ports::open` covers what the device does then.
    // The instruction itself touches no memory and no flags.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// Reads 32 bits from a port.
fn input(port: u16) -> u32 {
    let value;
    // SAFETY: as in `output`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) };
    value
}

impl ConfigurationPorts for Ports {
    fn read(&self, function: Address, register: u8) -> u32 {
        let _selected = SELECTED.lock();
        output(SELECT, function.selector(register));
        input(DATA)
    }

    fn write(&self, function: Address, register: u8, value: u32) {
        let _selected = SELECTED.lock();
        output(SELECT, function.selector(register));
        output(DATA, value);
    }
}

/// Binds an event channel that a device raises by sending a message; returns the channel and the message. The caller masks the
/// device's table entry with this message before it drops the channel: another channel may get the same message later.
///
/// # Errors
/// As [`hypercall::bind_message`].
pub fn message_interrupt() -> Result<(Channel, Message), Errno> {
    let bound = hypercall::bind_message(0)?;
    Ok((Channel::adopt(bound.port), Message { address: bound.address, data: bound.data }))
}

/// Registers of a device, mapped uncached until this value is dropped. Dropping it flushes the whole TLB, so it is not for
/// paths that must be fast.
#[derive(Debug)]
pub struct RegisterWindow {
    bytes: Bytes,
    _window: Window,
}

// SAFETY: every access is volatile, and the registers are the same for every vcpu.
unsafe impl Send for RegisterWindow {}

impl RegisterWindow {
    /// Maps `bytes` bytes at a machine address outside RAM. The address need not be the start of a page.
    ///
    /// # Safety
    /// The bytes are registers of a device that is used as [`Ports::open`] says.
    ///
    /// # Errors
    /// `Inval` if `bytes` is 0; `NoMem` if no addresses are free for the window; otherwise the hypervisor's error, in
    /// particular for RAM, and for frames that are no device of this domain.
    pub unsafe fn map(address: u64, bytes: u32) -> Result<Self, Errno> {
        let within = address % PAGE;
        let pages = (within + u64::from(bytes)).div_ceil(PAGE);
        if bytes == 0 {
            return Err(Errno::Inval);
        }
        let window = Window::map_registers(address / PAGE, pages)?;
        let base = window.pointer().wrapping_add(usize::try_from(within).map_err(|_| Errno::Inval)?);
        let count = usize::try_from(bytes).map_err(|_| Errno::Inval)?;
        // SAFETY:
        // 1. The window maps these pages writable and is dropped with this value.
        // 2. They are not RAM: the hypervisor refuses RAM that is mapped uncached. So no Rust reference leads to them.
        let bytes = unsafe { Bytes::new(base, count) };
        Ok(Self { bytes, _window: window })
    }

    fn read<T: Width>(&self, offset: usize, otherwise: T) -> T {
        let Some(register) = self.bytes.at::<T>(offset) else { return otherwise };
        // SAFETY: `at` makes sure that the register is inside the window and aligned; it is mapped, by the contract of
        // `Bytes::new`; any bits are a `T`. A register may change at any moment and by being read, so the read is volatile and
        // made once.
        unsafe { register.read_volatile() }
    }

    fn write<T: Width>(&self, offset: usize, value: T) {
        let Some(register) = self.bytes.at::<T>(offset) else { return };
        // SAFETY: as in `read`; the contract of `map` covers what the device does then.
        unsafe { register.write_volatile(value) };
    }
}

/// The widths of an access: unsigned integers that one instruction reads or writes.
trait Width: Copy {}
impl Width for u8 {}
impl Width for u16 {}
impl Width for u32 {}

impl Registers for RegisterWindow {
    fn bytes(&self) -> usize {
        self.bytes.count()
    }

    fn read8(&self, offset: usize) -> u8 {
        self.read(offset, u8::MAX)
    }

    fn read16(&self, offset: usize) -> u16 {
        self.read(offset, u16::MAX)
    }

    fn read32(&self, offset: usize) -> u32 {
        self.read(offset, u32::MAX)
    }

    fn write8(&self, offset: usize, value: u8) {
        self.write(offset, value);
    }

    fn write16(&self, offset: usize, value: u16) {
        self.write(offset, value);
    }

    fn write32(&self, offset: usize, value: u32) {
        self.write(offset, value);
    }
}
