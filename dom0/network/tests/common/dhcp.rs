//! DHCP as the other side speaks it.

use super::{Fill, ethernet, fill, ipv4, udp};
use std::collections::BTreeMap;

/// A message, taken apart.
#[derive(Debug)]
pub struct Dhcp {
    pub to_mac: [u8; 6],
    pub from_mac: [u8; 6],
    pub from: [u8; 4],
    pub to: [u8; 4],
    pub operation: u8,
    pub transaction: [u8; 4],
    pub client: [u8; 4],
    pub yours: [u8; 4],
    pub mac: [u8; 6],
    pub options: BTreeMap<u8, Vec<u8>>,
}

/// Takes a frame apart whose every checksum has to be right. Returns `None` if the frame is no DHCP.
pub fn take_apart(frame: &[u8]) -> Option<Dhcp> {
    let ports = frame.get(34..38)?;
    if frame[12..14] != [8, 0] || frame[23] != 17 || ![[0, 67, 0, 68], [0, 68, 0, 67]].iter().any(|p| p == ports) {
        return None;
    }
    assert_eq!(super::checksum(&[&frame[14..34]]), 0);
    assert_eq!(usize::from(u16::from_be_bytes([frame[16], frame[17]])), frame.len() - 14);
    assert!(super::is_right(&frame[26..30], &frame[30..34], 17, &frame[34..]));
    let message = &frame[42..];
    assert!(message.len() >= 300 && message[236..240] == [0x63, 0x82, 0x53, 0x63]);
    let (mut options, mut rest) = (BTreeMap::new(), &message[240..]);
    while rest[0] != 0xff {
        let (value, after) = rest[2..].split_at(usize::from(rest[1]));
        assert!(options.insert(rest[0], value.to_vec()).is_none(), "an option is there twice");
        rest = after;
    }
    Some(Dhcp {
        to_mac: frame[..6].try_into().unwrap(),
        from_mac: frame[6..12].try_into().unwrap(),
        from: frame[26..30].try_into().unwrap(),
        to: frame[30..34].try_into().unwrap(),
        operation: message[0],
        transaction: message[4..8].try_into().unwrap(),
        client: message[12..16].try_into().unwrap(),
        yours: message[16..20].try_into().unwrap(),
        mac: message[28..34].try_into().unwrap(),
        options,
    })
}

/// The payload of a message.
pub fn payload(
    operation: u8,
    transaction: [u8; 4],
    client: [u8; 4],
    yours: [u8; 4],
    mac: [u8; 6],
    options: &[(u8, &[u8])],
) -> Vec<u8> {
    let mut message = vec![operation, 1, 6, 0];
    message.extend(transaction);
    message.extend([0; 4]);
    message.extend(client);
    message.extend(yours);
    message.extend([0; 8]);
    message.extend(mac);
    message.resize(236, 0);
    message.extend([0x63, 0x82, 0x53, 0x63]);
    for (number, value) in options {
        message.extend([*number, u8::try_from(value.len()).unwrap()]);
        message.extend(*value);
    }
    message.push(0xff);
    message
}

/// A client's frame to all.
pub fn question(mac: [u8; 6], kind: u8, client: [u8; 4], options: &[(u8, &[u8])]) -> Vec<u8> {
    let kind = [kind];
    let options = [&[(53, &kind[..])], options].concat();
    let mut datagram = udp((68, 67), &payload(1, [1, 2, 3, 4], client, [0; 4], mac, &options));
    fill(&client, &[255; 4], 17, &mut datagram, Fill::Whole);
    ethernet([0xff; 6], mac, 0x800, &ipv4(client, [255; 4], 17, 0, 0, &[], &datagram))
}
