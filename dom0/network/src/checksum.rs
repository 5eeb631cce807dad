//! Checksums of IP, TCP and UDP: ones'-complement sums.
//!
//! Touches: bytes of a frame that the caller passes.
//! Guarantees: a frame is changed in its checksum alone, and only if the checksum could be computed.

use crate::bytes::put16;
use crate::headers::{Headers, L4};
use core::fmt;

/// Why the checksum of a frame cannot be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotFinish {
    /// The frame carries neither TCP nor UDP as far as the headers are understood.
    Protocol,
    /// The frame has only a part of what the checksum covers.
    Fragment,
    /// The headers are not this frame's: they end beyond it.
    Length,
}

impl fmt::Display for CannotFinish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Protocol => "a checksum is to be computed, but the frame is neither TCP nor UDP",
            Self::Fragment => "a checksum is to be computed, but the frame is a fragment",
            Self::Length => "a checksum is to be computed, but the headers end beyond the frame",
        })
    }
}

/// Computes the checksum of a frame whose checksum is [`Blank`](crate::Checksum::Blank): the field holds the sum of the pseudo
/// header, and afterwards the checksum.
///
/// # Errors
/// Says why there is no such checksum. The frame is unchanged.
pub fn finish(frame: &mut [u8], headers: &Headers) -> Result<(), CannotFinish> {
    let (transport, fragment) = headers.transport().ok_or(CannotFinish::Protocol)?;
    let udp = match transport.protocol {
        L4::Tcp { .. } => false,
        L4::Udp { .. } => true,
        L4::Icmp { .. } | L4::Icmp6 { .. } => return Err(CannotFinish::Protocol),
    };
    if fragment.is_some() {
        return Err(CannotFinish::Fragment);
    }
    let covered = frame.get(transport.at..transport.end).ok_or(CannotFinish::Length)?;
    let checksum = complement(sum(covered, 0), udp);
    put16(frame, transport.checksum_at(), checksum).ok_or(CannotFinish::Length)
}

/// Returns the checksum for a sum. UDP has no checksum 0: that means "none" there.
pub(crate) const fn complement(sum: u16, udp: bool) -> u16 {
    if udp && sum == 0xffff { 0xffff } else { !sum }
}

/// Returns the ones'-complement sum of `start` and the 16-bit numbers in `bytes`. An odd last byte counts as the high one.
#[must_use]
pub fn sum(bytes: &[u8], start: u16) -> u16 {
    // The sum does not depend on the order of bytes, apart from being in that order itself. So words are summed as they are
    // read.
    let mut total = u64::from(start.swap_bytes());
    let mut add = |word: u64| {
        let (sum, carry) = total.overflowing_add(word);
        total = sum + u64::from(carry);
    };
    let (blocks, rest) = bytes.as_chunks::<32>();
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        words.iter().for_each(|&word| add(u64::from_le_bytes(word)));
    }
    let (words, tail) = rest.as_chunks::<8>();
    words.iter().for_each(|&word| add(u64::from_le_bytes(word)));
    let mut last = [0; 8];
    last.iter_mut().zip(tail).for_each(|(to, from)| *to = *from);
    add(u64::from_le_bytes(last));
    fold(total).swap_bytes()
}

/// Returns the ones'-complement sum of the four 16-bit numbers in `total`.
#[expect(clippy::cast_possible_truncation, reason = "two folds leave 16 bits of 32")]
const fn fold(total: u64) -> u16 {
    let half = (total >> 32) + (total & 0xffff_ffff);
    let half = (half >> 32) + (half & 0xffff_ffff);
    let quarter = (half >> 16) + (half & 0xffff);
    ((quarter >> 16) + (quarter & 0xffff)) as u16
}

/// Returns the ones'-complement sum of two numbers.
pub(crate) const fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + carry as u16
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::vec::Vec;

    /// Sums as the definition does: number by number.
    fn slow(bytes: &[u8], start: u16) -> u16 {
        let mut total = u32::from(start);
        for pair in bytes.chunks(2) {
            total += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
        }
        while total > 0xffff {
            total = (total >> 16) + (total & 0xffff);
        }
        u16::try_from(total).unwrap()
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            state >> 33
        };
        for length in 0..300 {
            for pattern in 0..8 {
                let bytes: Vec<u8> = (0..length)
                    .map(|_| match pattern {
                        0 => 0,
                        1 => 0xff,
                        _ => random().to_le_bytes()[0],
                    })
                    .collect();
                let start = u16::try_from(random() & 0xffff).unwrap();
                assert_eq!(sum(&bytes, start), slow(&bytes, start), "{length} bytes, pattern {pattern}");
            }
        }
    }

    #[test]
    fn the_example_of_rfc_1071_holds() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0), 0xddf2);
    }
}
