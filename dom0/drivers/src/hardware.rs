//! What drivers ask of the machine.

use crate::pci::Address;
use core::fmt;
use disk::BusAddress;

/// The configuration space of PCI, by the ports 0xcf8 and 0xcfc ([`Address::selector`]).
pub trait ConfigurationPorts: fmt::Debug {
    /// Reads the 32 bits at `register`, a multiple of 4. All ones where no function answers.
    fn read(&self, function: Address, register: u8) -> u32;

    /// Writes the 32 bits at `register`, a multiple of 4.
    fn write(&self, function: Address, register: u8, value: u32);
}

/// Registers of a device: a part of a BAR. Each access is made once, as wide as its name says, in the order of the calls.
/// Outside the part, or off a multiple of the width, reads give ones and writes do nothing.
pub trait Registers: fmt::Debug {
    /// Bytes of the part.
    fn bytes(&self) -> usize;

    /// Reads 8 bits.
    fn read8(&self, offset: usize) -> u8;
    /// Reads 16 bits, little endian.
    fn read16(&self, offset: usize) -> u16;
    /// Reads 32 bits, little endian.
    fn read32(&self, offset: usize) -> u32;

    /// Writes 8 bits.
    fn write8(&self, offset: usize, value: u8);
    /// Writes 16 bits, little endian.
    fn write16(&self, offset: usize, value: u16);
    /// Writes 32 bits, little endian.
    fn write32(&self, offset: usize, value: u32);

    /// Writes 64 bits as two halves, the lower one first, as virtio has its registers written (1.2, section 4.1.3.1).
    fn write64(&self, offset: usize, value: u64) {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.write32(offset, u32::from_le_bytes([a, b, c, d]));
        self.write32(offset + 4, u32::from_le_bytes([e, f, g, h]));
    }
}

/// A run of memory that a device reads and writes beside us. It begins with zeroes, at a multiple of a page. Outside it, or off a
/// multiple of the width, loads give zero and stores do nothing. Loads acquire and stores release.
pub trait DmaMemory: fmt::Debug {
    /// Its length.
    fn bytes(&self) -> usize;

    /// What a device calls the byte at `offset`, which is below the length.
    fn bus_address(&self, offset: usize) -> BusAddress;

    /// Loads 8 bits.
    fn load8(&self, offset: usize) -> u8;
    /// Loads 16 bits.
    fn load16(&self, offset: usize) -> u16;
    /// Loads 64 bits.
    fn load64(&self, offset: usize) -> u64;

    /// Stores 8 bits.
    fn store8(&self, offset: usize, value: u8);
    /// Stores 16 bits.
    fn store16(&self, offset: usize, value: u16);
    /// Stores 64 bits.
    fn store64(&self, offset: usize, value: u64);
}
