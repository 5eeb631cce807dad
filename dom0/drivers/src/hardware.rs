//! What drivers ask of the machine.

use crate::pci::Address;
use core::fmt;
use disk::BusAddress;

/// The configuration space of PCI, by the ports 0xcf8 and 0xcfc ([`Address::selector`]).
pub trait ConfigurationPorts: fmt::Debug {
    /// Reads the 32 bits at `register`, a multiple of 4. Returns all ones if there is no such function.
    fn read(&self, function: Address, register: u8) -> u32;

    /// Writes the 32 bits at `register`, a multiple of 4.
    fn write(&self, function: Address, register: u8, value: u32);
}

/// Registers of a device: a part of a BAR. Each call makes one access of the width in its name; accesses keep the order of the
/// calls. If an offset is outside the part or no multiple of the width, reads return all ones and writes do nothing.
pub trait Registers: fmt::Debug {
    /// Returns the length of the part in bytes.
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

    /// Writes 64 bits as two halves of 32 bits, the lower half first, as virtio requires (1.2, section 4.1.3.1).
    fn write64(&self, offset: usize, value: u64) {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.write32(offset, u32::from_le_bytes([a, b, c, d]));
        self.write32(offset + 4, u32::from_le_bytes([e, f, g, h]));
    }
}

/// A run of memory that the driver and a device both read and write. It starts at a page boundary, filled with zeroes. If an
/// offset is outside the run or no multiple of the width, loads return zero and stores do nothing. Loads acquire and stores
/// release.
pub trait DmaMemory: fmt::Debug {
    /// Returns the length of the run in bytes.
    fn bytes(&self) -> usize;

    /// Returns the address by which a device reaches the byte at `offset`. `offset` must be below the length.
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

    /// Copies the bytes from `offset` on into `into`. Fills `into` with zeroes if they are not all inside the run. The device
    /// may write meanwhile, so each byte is one that was there at some moment of the call.
    fn read_bytes(&self, offset: usize, into: &mut [u8]);
    /// Copies `from` to the bytes from `offset` on. Does nothing if they are not all inside the run.
    fn write_bytes(&self, offset: usize, from: &[u8]);
}
