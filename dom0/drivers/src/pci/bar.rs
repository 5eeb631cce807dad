//! Base address registers: where a device answers (PCI 3.0, section 6.2.5.1).

use super::{Bytes, Function};
use crate::hardware::ConfigurationPorts;
use core::fmt;
use core::ops::Range;

/// The end of the machine addresses that a frame number of the hypervisor reaches: 16 TiB.
pub const TOP: u64 = 1 << 44;
/// The first of the six registers.
const FIRST: u8 = 0x10;
/// The number of registers of a device.
const COUNT: u8 = 6;

/// Memory at which a device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// The machine address.
    pub address: u64,
    /// The length in bytes, a power of two.
    pub bytes: u64,
}

/// Why a BAR cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadBar {
    /// The device has no such BAR, or the register is no valid BAR.
    Missing,
    /// The BAR is of I/O ports.
    Ports,
    /// The firmware has given the BAR no address.
    NotPlaced,
    /// The BAR lies in RAM.
    InRam,
    /// The BAR reaches above 16 TiB.
    TooHigh,
}

impl fmt::Display for BadBar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "is missing or malformed",
            Self::Ports => "is of ports, not of memory",
            Self::NotPlaced => "has no address: the firmware has not set it",
            Self::InRam => "lies in RAM",
            Self::TooHigh => "lies above 16 TiB, where the hypervisor maps nothing",
        })
    }
}

impl Bar {
    /// Checks where the BAR lies.
    fn judge(self, ram: &[Range<u64>]) -> Result<Self, BadBar> {
        let end = self.address.checked_add(self.bytes).ok_or(BadBar::TooHigh)?;
        if self.address == 0 {
            Err(BadBar::NotPlaced)
        } else if end > TOP {
            Err(BadBar::TooHigh)
        } else if ram.iter().any(|ram| ram.start < end && self.address < ram.end) {
            Err(BadBar::InRam)
        } else {
            Ok(self)
        }
    }
}

impl<C: ConfigurationPorts> Function<C> {
    /// Measures a BAR, 0 to 5, and checks where it lies. While it is measured, the device answers at none of its BARs. `ram`:
    /// the machine addresses of all RAM.
    ///
    /// # Errors
    /// Why the BAR cannot be used.
    pub fn bar(&self, index: u8, ram: &[Range<u64>]) -> Result<Bar, BadBar> {
        let lower = Some(index).filter(|index| *index < COUNT).map(|index| FIRST + 4 * index).ok_or(BadBar::Missing)?;
        let kind = self.read(lower) & 7;
        // Bit 0: I/O ports. Bits 1 and 2: 0 for an address of 32 bits, 2 for one of 64 bits, which takes the next register as
        // well.
        let upper = match kind {
            _ if kind & 1 != 0 => return Err(BadBar::Ports),
            0 => None,
            4 if index + 1 < COUNT => Some(lower + 4),
            _ => return Err(BadBar::Missing),
        };
        let (low, low_mask) = self.measure(lower);
        // For an address of 32 bits, the mask has ones above.
        let (high, high_mask) = upper.map_or((0, !0), |register| self.measure(register));
        let joined = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low & !0xf);
        let (address, mask) = (joined(high, low), joined(high_mask, low_mask));
        let bytes = mask.wrapping_neg();
        // A register that is not implemented reads as zeroes.
        if low_mask & !0xf == 0 && (upper.is_none() || high_mask == 0) || !bytes.is_power_of_two() {
            return Err(BadBar::Missing);
        }
        Bar { address, bytes }.judge(ram)
    }

    /// Returns the value of a register, and which of its bits can be set.
    fn measure(&self, register: u8) -> (u32, u32) {
        self.while_silent(|| {
            let value = self.read(register);
            self.write(register, !0);
            let mask = self.read(register);
            self.write(register, value);
            (value, mask)
        })
    }

    /// Reads a register that locates a table: returns the BAR, and the offset in it (MSI-X, section 6.8.2).
    pub(super) fn place(&self, register: u8) -> (u8, u32) {
        let value = self.read(register);
        (Bytes(value).all()[0] & 7, value & !7)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_in_ram_or_nowhere_is_refused() {
        let bar = |address, bytes| Bar { address, bytes };
        let ram = [0..0xa_0000, 0x10_0000..0x8000_0000];
        assert_eq!(bar(0, 4096).judge(&ram), Err(BadBar::NotPlaced));
        assert_eq!(bar(0x7fff_f000, 4096).judge(&ram), Err(BadBar::InRam));
        assert_eq!(bar(0x8000_0000, 4096).judge(&ram), Ok(bar(0x8000_0000, 4096)));
        assert_eq!(bar(0x7000_0000, 1 << 31).judge(&ram), Err(BadBar::InRam));
        assert_eq!(bar(0xb_0000, 0x10_0000).judge(&ram), Err(BadBar::InRam));
        assert_eq!(bar(0xb_0000, 0x1_0000).judge(&ram), Ok(bar(0xb_0000, 0x1_0000)));
        assert_eq!(bar(TOP - 4096, 4096).judge(&ram), Ok(bar(TOP - 4096, 4096)));
        assert_eq!(bar(TOP - 4096, 8192).judge(&ram), Err(BadBar::TooHigh));
        assert_eq!(bar(u64::MAX - 4095, 4096).judge(&ram), Err(BadBar::TooHigh));
    }
}
