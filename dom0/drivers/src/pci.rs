//! PCI: the search for functions, and a driver's access to a function (PCI Local Bus 3.0, section 6; PCI-to-PCI Bridge 1.2).

mod bar;
mod function;
mod msix;

use crate::hardware::ConfigurationPorts;
use core::fmt;

pub use bar::{BadBar, Bar, TOP};
pub use function::{Capability, Function};
pub(crate) use msix::msix_mask;
pub use msix::{Message, Msix};

/// A function of a device on a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    bus: u8,
    device: u8,
    function: u8,
}

impl Address {
    /// The address of function 0 to 7 of device 0 to 31. Higher bits are cut off.
    #[must_use]
    pub const fn new(bus: u8, device: u8, function: u8) -> Self {
        Self { bus, device: device & 31, function: function & 7 }
    }

    /// Returns the value for port 0xcf8 that makes port 0xcfc show `register`, a multiple of 4 (PCI 3.0, section 3.2.2.3.2).
    #[must_use]
    pub const fn selector(self, register: u8) -> u32 {
        let function = (self.bus as u32) << 16 | (self.device as u32) << 11 | (self.function as u32) << 8;
        1 << 31 | function | (register & 0xfc) as u32
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// A function that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The address of the function.
    pub address: Address,
    /// The vendor ID.
    pub vendor: u16,
    /// The device ID.
    pub device: u16,
    /// The class, the subclass and the programming interface.
    pub class: [u8; 3],
    /// The kind of the function's configuration space: 0 for a device, 1 for a bridge.
    header: u8,
}

impl Found {
    /// Returns whether the function is a bridge to another bus.
    #[must_use]
    pub const fn is_bridge(&self) -> bool {
        self.header == 1
    }

    /// Returns the name of the function's class.
    #[must_use]
    pub const fn class_name(&self) -> &'static str {
        let [class, subclass, _] = self.class;
        match (class, subclass) {
            (1, 0) => "SCSI controller",
            (1, 1) => "IDE controller",
            (1, 6) => "SATA controller",
            (1, 8) => "NVMe controller",
            (1, _) => "storage controller",
            (2, 0) => "Ethernet controller",
            (2, _) => "network controller",
            (3, _) => "display",
            (4, _) => "sound",
            (5, _) => "memory controller",
            (6, 0) => "host bridge",
            (6, 1) => "ISA bridge",
            (6, 4) => "PCI bridge",
            (6, _) => "bridge",
            (7, _) => "serial port",
            (8, _) => "system device",
            (9, _) => "input device",
            (12, 3) => "USB controller",
            (12, _) => "serial bus",
            _ => "device",
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [class, subclass, _] = self.class;
        let Self { address, vendor, device, .. } = self;
        write!(f, "{address} {} ({vendor:04x}:{device:04x}, class {class:02x}{subclass:02x})", self.class_name())
    }
}

/// A set of buses: one bit for each.
#[derive(Clone, Copy, Debug, Default)]
struct Buses([u64; 4]);

impl Buses {
    fn has(&self, bus: u8) -> bool {
        self.0.get(usize::from(bus / 64)).is_some_and(|word| word & 1 << (bus % 64) != 0)
    }

    fn add(&mut self, bus: u8) {
        if let Some(word) = self.0.get_mut(usize::from(bus / 64)) {
            *word |= 1 << (bus % 64);
        }
    }
}

/// Finds all functions of bus 0 and of each bus that bridges lead to. Each bus is visited once.
#[derive(Debug)]
pub struct Scan<'a, C> {
    ports: &'a C,
    /// The buses that a bridge leads to, and the buses whose visit has begun.
    known: Buses,
    begun: Buses,
    bus: u8,
    /// The device (times 8) and function that come next on the bus. 256 at the end of the bus.
    next: u16,
}

impl<'a, C: ConfigurationPorts> Scan<'a, C> {
    /// Begins a search at bus 0.
    #[must_use]
    pub fn new(ports: &'a C) -> Self {
        let mut begun = Buses::default();
        begun.add(0);
        Self { ports, known: Buses::default(), begun, bus: 0, next: 0 }
    }

    /// Returns the function at an address, and whether its device has several functions. `None` if there is no function.
    fn look(&self, address: Address) -> Option<(Found, bool)> {
        let ids = Bytes(self.ports.read(address, 0));
        // No vendor has the ID of all ones, which is read where there is no function. Some bridges return zeroes there.
        if ids.low() == 0xffff || ids.low() == 0 {
            return None;
        }
        let class = Bytes(self.ports.read(address, 0x08)).all();
        let kind = Bytes(self.ports.read(address, 0x0c)).all()[2];
        let [_, interface, subclass, base] = class;
        let class = [base, subclass, interface];
        let found = Found { address, vendor: ids.low(), device: ids.high(), class, header: kind & 0x7f };
        Some((found, kind & 0x80 != 0))
    }

    /// Returns the next bus to visit. `None` if all were visited.
    fn next_bus(&mut self) -> Option<u8> {
        let bus = (0..=255).find(|bus| self.known.has(*bus) && !self.begun.has(*bus))?;
        self.begun.add(bus);
        Some(bus)
    }
}

impl<C: ConfigurationPorts> Iterator for Scan<'_, C> {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        loop {
            if self.next >= 256 {
                self.bus = self.next_bus()?;
                self.next = 0;
            }
            let (device, function) = (u8::try_from(self.next / 8).ok()?, u8::try_from(self.next % 8).ok()?);
            let found = self.look(Address::new(self.bus, device, function));
            // Functions above 0 exist only if function 0 has the bit for several functions.
            let more = function > 0 || found.is_some_and(|(_, many)| many);
            self.next += if more { 1 } else { 8 };
            let Some((found, _)) = found else { continue };
            if found.is_bridge() {
                self.known.add(Bytes(self.ports.read(found.address, 0x18)).all()[1]);
            }
            return Some(found);
        }
    }
}

/// A register of 32 bits, for access to its parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes(pub(crate) u32);

impl Bytes {
    /// Returns the bytes, the lowest first.
    pub(crate) const fn all(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }

    /// Returns the lower 16 bits.
    pub(crate) const fn low(self) -> u16 {
        let [a, b, _, _] = self.all();
        u16::from_le_bytes([a, b])
    }

    /// Returns the upper 16 bits.
    pub(crate) const fn high(self) -> u16 {
        let [_, _, c, d] = self.all();
        u16::from_le_bytes([c, d])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn a_selector_names_a_register() {
        assert_eq!(Address::new(0, 0, 0).selector(0), 0x8000_0000);
        assert_eq!(Address::new(0x12, 0x1f, 7).selector(0x3d), 0x8012_ff3c);
        assert_eq!(format!("{}", Address::new(0x12, 0x1f, 7)), "12:1f.7");
    }

    #[test]
    fn what_is_found_is_named() {
        let address = Address::new(0, 3, 0);
        let found = Found { address, vendor: 0x1af4, device: 0x1001, class: [1, 0, 0], header: 0 };
        assert_eq!(format!("{found}"), "00:03.0 SCSI controller (1af4:1001, class 0100)");
    }
}
