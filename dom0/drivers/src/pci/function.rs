//! One function, as its driver sees it.

use super::{Address, Bytes};
use crate::hardware::ConfigurationPorts;

/// The register with the command in its lower and the status in its upper half.
const COMMAND: u8 = 0x04;
/// The device answers at its memory BARs.
const MEMORY: u16 = 1 << 1;
/// The device may read and write memory, and send messages.
const BUS_MASTER: u16 = 1 << 2;
/// The device raises no interrupt line.
const NO_INTERRUPT_LINE: u16 = 1 << 10;
/// The device answers at its BARs, of ports or memory. Off while a BAR is measured.
const DECODE: u16 = 1 | MEMORY;
/// In the status: there is a list of capabilities.
const HAS_LIST: u16 = 1 << 4;
/// The register that locates the first capability, and the first register that a capability may have.
const LIST: u8 = 0x34;
const FIRST: u8 = 0x40;
/// The maximum number of capabilities: there is room for no more.
const MOST: usize = 48;

/// A function with a driver.
#[derive(Clone, Debug)]
pub struct Function<C> {
    ports: C,
    address: Address,
}

/// A capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// The ID of the capability.
    pub id: u8,
    /// The first register of the capability.
    pub at: u8,
}

impl<C: ConfigurationPorts> Function<C> {
    /// Makes the access to the function at an address. Changes nothing in the function.
    #[must_use]
    pub const fn new(ports: C, address: Address) -> Self {
        Self { ports, address }
    }

    /// Returns the function's address.
    #[must_use]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// Reads a register, a multiple of 4.
    #[must_use]
    pub fn read(&self, register: u8) -> u32 {
        self.ports.read(self.address, register)
    }

    /// Writes a register, a multiple of 4.
    pub fn write(&self, register: u8, value: u32) {
        self.ports.write(self.address, register, value);
    }

    fn command(&self) -> u16 {
        Bytes(self.read(COMMAND)).low()
    }

    /// Writes the command, and zeroes to the status, which change nothing: only ones clear its bits.
    fn set_command(&self, command: u16) {
        self.write(COMMAND, u32::from(command));
    }

    /// Makes the device answer at its BARs, and raise no interrupt line.
    pub fn answer(&self) {
        self.set_command(self.command() | MEMORY | NO_INTERRUPT_LINE);
    }

    /// Allows or forbids the device to read and write memory and to send messages. Accesses under way may still end.
    pub fn set_bus_master(&self, on: bool) {
        let others = self.command() & !BUS_MASTER;
        self.set_command(if on { others | BUS_MASTER } else { others });
    }

    /// Does `f` while the device answers at no BAR.
    pub(super) fn while_silent<T>(&self, f: impl FnOnce() -> T) -> T {
        let command = self.command();
        self.set_command(command & !DECODE);
        let result = f();
        self.set_command(command);
        result
    }

    /// Returns the capabilities in the order of the list. An invalid link ends the list, as does the maximum length.
    pub fn capabilities(&self) -> impl Iterator<Item = Capability> + '_ {
        let listed = Bytes(self.read(COMMAND)).high() & HAS_LIST != 0;
        let mut at = if listed { Bytes(self.read(LIST)).all()[0] & 0xfc } else { 0 };
        let next = move || {
            let here = (at >= FIRST).then_some(at)?;
            let [id, next, _, _] = Bytes(self.read(here)).all();
            at = next & 0xfc;
            Some(Capability { id, at: here })
        };
        core::iter::from_fn(next).take(MOST)
    }
}
