//! Markers for the counting plugin: no-ops with a number in them, which only an emulator that looks for them sees. A
//! marker costs one instruction and does nothing, so the programs that are measured keep theirs.
//!
//! A marker is the eight bytes [`OPCODE`] and [`word`], the long no-op `nop dword ptr [rax + rax + word]`.
#![no_std]
#![forbid(unsafe_code)]

/// The first four bytes of a marker.
pub const OPCODE: u32 = 0x0084_1f0f;
/// What the upper twelve bits of a marker's word are.
const MAGIC: u16 = 0x5ea;

/// What a marker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The window of this number begins.
    Begin,
    /// It ends.
    End,
    /// A point is reached: what counts is everything since power-on.
    Point,
}

/// Point: the guest's `/init` runs.
pub const INIT: u16 = 1;
/// Point: dom0 has listed its guests.
pub const LISTED: u16 = 2;
/// Point: the first instruction of a guest's kernel, or of the kernel alone on a machine. The plugin finds it itself.
pub const KERNEL: u16 = 3;
/// Window: dom0 makes a guest.
pub const CREATE: u16 = 16;
/// Window: dom0 ends a guest.
pub const DESTROY: u16 = 17;
/// Window: from the first instruction of a kernel until a text was printed. The plugin finds both itself.
pub const PRINTED: u16 = 18;
/// Window: 32 pages are pinned and unpinned.
pub const PIN: u16 = 32;
/// Window: 32 copies of 4,000 bytes at an odd offset.
pub const COPY_ODD: u16 = 33;
/// Window: 32 copies of a whole page.
pub const COPY_PAGE: u16 = 34;
/// Window: 32 copies of 8 bytes.
pub const COPY_SMALL: u16 = 35;
/// Window: TCP from one guest to another.
pub const STREAM: u16 = 40;
/// Window: round trips of a byte between two guests.
pub const TRIPS: u16 = 41;
/// Window: packets of UDP from one guest to another.
pub const PACKETS: u16 = 42;
/// Window: TCP from a guest to the host of the emulated machine.
pub const TO_HOST: u16 = 43;
/// Window: TCP from the host of the emulated machine to a guest.
pub const FROM_HOST: u16 = 44;
/// Window of the first metric of the benchmark program; the others follow.
pub const METRICS: u16 = 256;
/// Window of the first thing the benchmark program reads from disks; the others follow.
pub const READS: u16 = 768;
/// Window of the first script the benchmark program runs; the others follow.
pub const SCRIPTS: u16 = 512;

/// The last four bytes of a marker.
#[must_use]
pub const fn word(kind: Kind, number: u16) -> u32 {
    (MAGIC as u32) << 20 | (kind as u32) << 16 | number as u32
}

/// What the marker with these eight bytes says; `None` if it is none.
#[must_use]
pub const fn parse(code: [u8; 8]) -> Option<(Kind, u16)> {
    let [a, b, c, d, low, high, kind, magic] = code;
    if u32::from_le_bytes([a, b, c, d]) != OPCODE || u16::from_le_bytes([kind, magic]) >> 4 != MAGIC {
        return None;
    }
    let kind = match kind & 0xf {
        0 => Kind::Begin,
        1 => Kind::End,
        2 => Kind::Point,
        _ => return None,
    };
    Some((kind, u16::from_le_bytes([low, high])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_read_back_and_nothing_else_is_one() {
        for kind in [Kind::Begin, Kind::End, Kind::Point] {
            let mut code = [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
            code[4..].copy_from_slice(&word(kind, 0xabcd).to_le_bytes());
            assert_eq!(parse(code), Some((kind, 0xabcd)));
            code[7] ^= 1;
            assert_eq!(parse(code), None);
        }
        // The no-op compilers pad with.
        assert_eq!(parse([0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0]), None);
    }
}
