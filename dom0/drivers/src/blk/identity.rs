//! The serial number of a disk.

use super::tables::SERIAL_BYTES;
use core::fmt;

/// A serial number: text of up to 20 bytes, as whoever made the disk wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial([u8; SERIAL_BYTES]);

impl Serial {
    /// The serial number in these bytes, which end with a zero if there are fewer.
    #[must_use]
    pub const fn new(bytes: [u8; SERIAL_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes before the first that is zero.
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
    /// The disk has been asked. Ask again after its interrupt, or after a while.
    Pending,
    /// It has answered.
    Known(Serial),
    /// It does not say.
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
