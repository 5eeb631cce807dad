//! Devices of the machine, for a domain that has them: the ports of PCI configuration, windows over their registers, and their
//! interrupts.
//!
//! Whoever programs a device that masters the bus reaches all memory, ours first. So ports and windows are made by `unsafe`
//! functions, whose contract is what Rust cannot check: that the device is told of no memory but such as is set aside for it or
//! pinned.

use crate::dma::Bytes;
use crate::events::Channel;
use crate::hypercall;
use crate::memory::{PAGE, Window};
use crate::sync::MaskMutex;
use core::arch::asm;
use drivers::hardware::{ConfigurationPorts, Registers};
use drivers::pci::{Address, Message};
use hypercall_abi::Errno;

/// The port that says which register is meant, and the one where it appears.
const SELECT: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// Held between the two ports, so that nobody selects another register in between.
static SELECTED: MaskMutex<()> = MaskMutex::new(());

/// The configuration space of PCI. The hypervisor carries out each access for a domain with devices; for others all functions
/// are absent.
#[derive(Clone, Copy, Debug)]
pub struct Ports(());

impl Ports {
    /// Asks for the right to use ports.
    ///
    /// # Safety
    /// Whoever configures a device through this lets it master the bus only after a reset, and tells it only of memory that it may
    /// write: of [`crate::dma::Dma`], or pinned for it until it has answered or was reset.
    ///
    /// # Errors
    /// Why the hypervisor refused.
    pub unsafe fn open() -> Result<Self, Errno> {
        hypercall::set_iopl(1)?;
        Ok(Self(()))
    }
}

/// Writes 32 bits to a port.
fn output(port: u16, value: u32) {
    // SAFETY: `Ports::open` has made the instruction legal, and its contract covers what the device does then. It touches no
    // memory and no flags of ours.
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

/// A port that a device raises by sending a message. The device's entry for it is masked before the channel is dropped: another
/// port may get the message later.
///
/// # Errors
/// As [`hypercall::bind_message`].
pub fn message_interrupt() -> Result<(Channel, Message), Errno> {
    let bound = hypercall::bind_message(0)?;
    Ok((Channel::adopt(bound.port), Message { address: bound.address, data: bound.data }))
}

/// Registers of a device, mapped uncached until this is dropped. Dropping it makes every translation be forgotten: not on a path
/// that must be fast.
#[derive(Debug)]
pub struct RegisterWindow {
    bytes: Bytes,
    _window: Window,
}

// SAFETY: every access is volatile, and the registers are the same for every vcpu.
unsafe impl Send for RegisterWindow {}

impl RegisterWindow {
    /// Maps `bytes` bytes at a machine address outside RAM, which need not begin a page.
    ///
    /// # Safety
    /// They are registers of a device that is used as [`Ports::open`] says.
    ///
    /// # Errors
    /// `Inval` for nothing to map; `NoMem` without room for a window; otherwise why the hypervisor refused: in particular RAM,
    /// and what is not this domain's device.
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
        // SAFETY: `at` keeps it inside and aligned; mapped by the contract of `Bytes::new`; any bits are a `T`. A register may
        // change at any moment, and by being read: volatile, and once.
        unsafe { register.read_volatile() }
    }

    fn write<T: Width>(&self, offset: usize, value: T) {
        let Some(register) = self.bytes.at::<T>(offset) else { return };
        // SAFETY: as in `read`; what the device does then is covered by the contract of `map`.
        unsafe { register.write_volatile(value) };
    }
}

/// How wide an access is: unsigned integers that one instruction reads and writes.
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
