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
/// Both decodings: while a BAR is measured, the device answers nowhere.
const DECODE: u16 = 1 | MEMORY;
/// In the status: there is a list of capabilities.
const HAS_LIST: u16 = 1 << 4;
/// Where the list begins, and the first register it may have a part in.
const LIST: u8 = 0x34;
const FIRST: u8 = 0x40;
/// More capabilities than these do not fit.
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
    /// What it is.
    pub id: u8,
    /// Its first register.
    pub at: u8,
}

impl<C: ConfigurationPorts> Function<C> {
    /// The function at an address. Nothing is changed yet.
    #[must_use]
    pub const fn new(ports: C, address: Address) -> Self {
        Self { ports, address }
    }

    /// Where it is.
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

    /// Writes the command. The status half is left: its bits are cleared by writing ones.
    fn set_command(&self, command: u16) {
        self.write(COMMAND, u32::from(command));
    }

    /// Makes the device answer at its BARs, and raise no interrupt line.
    pub fn answer(&self) {
        self.set_command(self.command() | MEMORY | NO_INTERRUPT_LINE);
    }

    /// Lets the device read and write memory and send messages, or no longer. It may go on with what it has begun.
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

    /// The capabilities, in the order of the list, which ends where it leaves its place or is too long.
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
