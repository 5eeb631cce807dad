//! The serial number of a disk.

use super::tables::SERIAL_BYTES;
use core::fmt;

/// A serial number: up to 20 bytes, usually ASCII text, chosen by the maker of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial([u8; SERIAL_BYTES]);

impl Serial {
    /// Makes a serial number. A zero byte ends a number of fewer than 20 bytes.
    #[must_use]
    pub const fn new(bytes: [u8; SERIAL_BYTES]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes of the number, before the first zero byte.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes().escape_ascii())
    }
}

/// What is known of a disk's serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The number is not read yet. Call [`Blk::identify`](super::Blk::identify) again after the disk's interrupt, or after a
    /// while.
    Pending,
    /// The serial number.
    Known(Serial),
    /// The disk has no serial number to report.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    #[test]
    fn a_serial_number_ends_with_the_first_zero_and_is_printed_safely() {
        let mut bytes = [0; SERIAL_BYTES];
        bytes[..7].copy_from_slice(b"vda\x1b\0zz");
        assert_eq!(Serial::new(bytes).bytes(), b"vda\x1b");
        assert_eq!(format!("{}", Serial::new(bytes)), "vda\\x1b");
        assert_eq!(Serial::new([b'x'; SERIAL_BYTES]).bytes().len(), 20);
        assert_eq!(Serial::new([0; SERIAL_BYTES]).bytes(), b"");
    }
}
