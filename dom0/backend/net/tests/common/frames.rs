//! Frames with right headers, and random ones.

use network::Mac;
use test_random::Random;

/// An Ethernet frame that carries nothing known.
pub fn plain(to: Mac, from: Mac, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &[0x88, 0xb5], payload].concat()
}

/// An Ethernet frame of random bytes after the header, of `length` bytes in all.
pub fn any(to: Mac, from: Mac, length: usize, random: &mut Random) -> Vec<u8> {
    let mut payload = vec![0; length.max(14) - 14];
    for chunk in payload.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
    }
    plain(to, from, &payload)
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u64 = words.map(u64::from).sum::<u64>() + u64::from(start);
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// TCP over IPv4 with a payload. The checksum field holds the sum of the pseudo header alone.
pub fn tcp4_blank(to: Mac, from: Mac, payload: &[u8]) -> Vec<u8> {
    let length = 40 + payload.len();
    let mut ip = vec![0x45, 0, (length >> 8) as u8, length as u8, 0, 7, 0x40, 0, 64, 6, 0, 0];
    ip.extend([10, 0, 0, from.0[5], 10, 0, 0, to.0[5]]);
    let header = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&header.to_be_bytes());
    let pseudo = sum(&ip[12..20], 6 + (20 + payload.len()) as u32);
    let mut tcp = vec![0x12, 0x34, 0, 80, 0, 0, 1, 0, 0, 0, 0, 0, 0x50, 0x18, 0x10, 0, 0, 0, 0, 0];
    tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
    [&to.0[..], &from.0, &[8, 0], &ip, &tcp, payload].concat()
}

/// Whether the checksums of a frame of TCP over IPv4 are right.
pub fn is_right_tcp4(frame: &[u8]) -> bool {
    let ip = &frame[14..34];
    let length = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let tcp = &frame[34..14 + length];
    sum(ip, 0) == 0xffff && sum(tcp, u32::from(sum(&ip[12..20], 6 + tcp.len() as u32))) == 0xffff
}
