//! What the tests share: frames built field by field, by other code than the crate's.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod dhcp;
pub mod world;

use test_random::Random;

/// Changes a few bytes, often to values at a limit, or cuts the frame, or makes it longer.
pub fn mutate(random: &mut Random, frame: &mut Vec<u8>) {
    for _ in 0..=random.below(4) {
        if frame.is_empty() {
            return;
        }
        let at = random.below(frame.len().min(400));
        match random.below(12) {
            0 => frame.truncate(at),
            1 => frame.push(random.byte()),
            2 => frame[at] = 0,
            3 => frame[at] = 0xff,
            4 => frame[at] ^= 1 << random.below(8),
            5 => frame[at] = frame[at].wrapping_add(1),
            6 => frame[at] = frame[at].wrapping_sub(1),
            7 => {
                let from = random.below(frame.len());
                frame[at] = frame[from];
            }
            _ => frame[at] = random.byte(),
        }
    }
}

/// Returns the checksum over the parts, as RFC 1071 defines it: number by number.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut total = 0_u32;
    for pair in bytes.chunks(2) {
        total += u32::from(pair[0]) * 256 + u32::from(*pair.get(1).unwrap_or(&0));
    }
    while total > 0xffff {
        total = total / 65_536 + total % 65_536;
    }
    !u16::try_from(total).unwrap()
}

/// Puts an Ethernet header before a packet.
pub fn ethernet(to: [u8; 6], from: [u8; 6], ether_type: u16, packet: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ether_type.to_be_bytes(), packet].concat()
}

/// Puts an IPv4 header with options before a payload. `fragment` is the field with flags and offset.
pub fn ipv4(
    from: [u8; 4],
    to: [u8; 4],
    protocol: u8,
    id: u16,
    fragment: u16,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    assert!(options.len().is_multiple_of(4));
    let header = 20 + options.len();
    let mut packet = vec![0x40 | u8::try_from(header / 4).unwrap(), 0];
    packet.extend(u16::try_from(header + payload.len()).unwrap().to_be_bytes());
    packet.extend(id.to_be_bytes());
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(from);
    packet.extend(to);
    packet.extend(options);
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

/// Puts an IPv6 header before a payload, which begins with extension headers if `next` names one.
pub fn ipv6(from: [u8; 16], to: [u8; 16], next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(from);
    packet.extend(to);
    packet.extend(payload);
    packet
}

/// Returns the pseudo header.
pub fn pseudo(from: &[u8], to: &[u8], protocol: u8, length: usize) -> Vec<u8> {
    [from, to, &[0, protocol], &u32::try_from(length).unwrap().to_be_bytes()].concat()
}

/// A TCP segment without its checksum.
pub fn tcp(ports: (u16, u16), sequence: u32, flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    assert!(options.len().is_multiple_of(4));
    let mut segment = Vec::new();
    segment.extend(ports.0.to_be_bytes());
    segment.extend(ports.1.to_be_bytes());
    segment.extend(sequence.to_be_bytes());
    segment.extend(0x0102_0304_u32.to_be_bytes());
    segment.extend([u8::try_from((20 + options.len()) / 4).unwrap() << 4, flags, 0x20, 0, 0, 0, 0, 0]);
    segment.extend(options);
    segment.extend(payload);
    segment
}

/// A UDP datagram without its checksum.
pub fn udp(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(ports.0.to_be_bytes());
    datagram.extend(ports.1.to_be_bytes());
    datagram.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    datagram
}

/// Whether the field of a checksum is to hold the checksum or the sum of the pseudo header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fill {
    Whole,
    Blank,
}

/// Fills in the checksum of TCP (at 16) or UDP (at 6).
pub fn fill(from: &[u8], to: &[u8], protocol: u8, segment: &mut [u8], fill: Fill) {
    let at = if protocol == 6 { 16 } else { 6 };
    segment[at..at + 2].fill(0);
    let pseudo = pseudo(from, to, protocol, segment.len());
    let value = match fill {
        Fill::Blank => !checksum(&[&pseudo]),
        Fill::Whole => match checksum(&[&pseudo, segment]) {
            0 if protocol == 17 => 0xffff,
            sum => sum,
        },
    };
    segment[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Whether the checksum of a segment or datagram is right.
pub fn is_right(from: &[u8], to: &[u8], protocol: u8, segment: &[u8]) -> bool {
    checksum(&[&pseudo(from, to, protocol, segment.len()), segment]) == 0
}
