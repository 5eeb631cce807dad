//! Headers, checksums and segments against frames that other code has built and takes apart.

mod common;
use common::{Fill, checksum, ethernet, fill, ipv4, ipv6, is_right, mutate, tcp, udp};
use network::checksum::{CannotFinish, finish};
use network::segment::{CannotCut, Cut};
use network::{Fragment, Headers, Kind, L4, Mac, Malformed, Protocol, Segmentation};
use test_random::Random;

const TO: [u8; 6] = [0, 0x16, 0x3e, 1, 2, 3];
const FROM: [u8; 6] = [0, 0x16, 0x3e, 4, 5, 6];
const A: [u8; 4] = [10, 77, 0, 9];
const B: [u8; 4] = [192, 0, 2, 200];
const A6: [u8; 16] = [0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
const B6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 1];

/// Parses what a switch sees: the first 256 bytes.
fn parse(frame: &[u8]) -> Headers {
    Headers::parse(&frame[..frame.len().min(256)], frame.len()).unwrap()
}

fn tcp4(flags: u8, options: &[u8], ip_options: &[u8], payload: &[u8], how: Fill) -> Vec<u8> {
    let mut segment = tcp((40_000, 80), 0xffff_ff00, flags, options, payload);
    fill(&A, &B, 6, &mut segment, how);
    ethernet(TO, FROM, 0x800, &ipv4(A, B, 6, 0xfffe, 0x4000, ip_options, &segment))
}

fn tcp6(flags: u8, extensions: &[u8], payload: &[u8], how: Fill) -> Vec<u8> {
    let mut segment = tcp((40_000, 80), 0xffff_ff00, flags, &[], payload);
    fill(&A6, &B6, 6, &mut segment, how);
    let next = if extensions.is_empty() { 6 } else { 0 };
    ethernet(TO, FROM, 0x86dd, &ipv6(A6, B6, next, &[extensions, &segment].concat()))
}

#[test]
fn the_fast_way_and_the_general_way_say_the_same() {
    let frame = tcp4(0x10, &[1; 12], &[], b"hello", Fill::Whole);
    let headers = parse(&frame);
    let Kind::Ipv4(ip) = headers.kind else { panic!("{headers:?}") };
    assert_eq!((headers.destination, headers.source, headers.vlan), (Mac(TO), Mac(FROM), None));
    assert_eq!((ip.source.octets(), ip.destination.octets()), (A, B));
    assert_eq!((ip.at, ip.header, ip.end, ip.fragment), (14, 20, frame.len(), None));
    let (transport, _) = headers.transport().unwrap();
    assert_eq!(transport.protocol, L4::Tcp { source: 40_000, destination: 80, header: 32 });
    assert_eq!((transport.at, transport.end, transport.checksum_at()), (34, frame.len(), 50));

    // A tag leads the same packet through the general way: everything lies four bytes further.
    let mut tagged = frame.clone();
    tagged.splice(12..12, [0x81, 0, 0x20, 7]);
    let general = parse(&tagged);
    assert_eq!(general.vlan, Some(0x2007));
    let Kind::Ipv4(tagged) = general.kind else { panic!("{general:?}") };
    assert_eq!((tagged.at, tagged.end), (ip.at + 4, ip.end + 4));
    let (tagged, _) = general.transport().unwrap();
    assert_eq!((tagged.at, tagged.end, tagged.protocol), (transport.at + 4, transport.end + 4, transport.protocol));
}

#[test]
fn every_kind_of_frame_is_known() {
    let arp = [0, 1, 8, 0, 6, 4, 0, 1, 0, 0x16, 0x3e, 4, 5, 6, 10, 77, 0, 9, 0, 0, 0, 0, 0, 0, 10, 77, 0, 1];
    let Kind::Arp(arp) = parse(&ethernet([0xff; 6], FROM, 0x806, &arp)).kind else { panic!() };
    assert_eq!((arp.operation, arp.sender_mac, arp.sender.octets()), (1, Mac(FROM), A));
    assert_eq!(arp.target.octets(), [10, 77, 0, 1]);

    // Padding after a short packet belongs to nothing.
    let mut padded = ethernet(TO, FROM, 0x800, &ipv4(A, B, 17, 1, 0, &[1; 8], &udp((68, 67), b"x")));
    padded.resize(60, 0);
    let headers = parse(&padded);
    let (transport, fragment) = headers.transport().unwrap();
    assert_eq!((transport.protocol, fragment), (L4::Udp { source: 68, destination: 67 }, None));
    assert_eq!((transport.at, transport.end), (42, 51));

    let part = |offset: u16| ethernet(TO, FROM, 0x800, &ipv4(A, B, 17, 7, offset, &[], &udp((1, 2), b"abcdefgh")));
    let Kind::Ipv4(first) = parse(&part(0x2000)).kind else { panic!() };
    assert_eq!(first.fragment, Some(Fragment { id: 7, offset: 0, more: true }));
    assert!(first.transport.is_some());
    let Kind::Ipv4(later) = parse(&part(0x2001)).kind else { panic!() };
    assert_eq!((later.fragment, later.transport), (Some(Fragment { id: 7, offset: 8, more: true }), None));
    assert_eq!(parse(&part(0x1fff)).kind, Kind::Malformed(Malformed::Fragment));

    // Hop-by-hop options of 16 bytes, a routing header, destination options, then ICMP.
    let mut extensions = vec![43, 1];
    extensions.resize(16, 0);
    extensions.extend([60, 0, 0, 1, 0, 0, 0, 0, 58, 0, 0, 0, 0, 0, 0, 0, 134, 0, 0, 0]);
    let Kind::Ipv6(ip) = parse(&ethernet(TO, FROM, 0x86dd, &ipv6(A6, B6, 0, &extensions))).kind else { panic!() };
    assert_eq!((ip.header, ip.routed, ip.protocol), (72, true, 58));
    assert_eq!(ip.transport.unwrap().protocol, L4::Icmp6 { kind: 134 });
    let fragment = ipv6(A6, B6, 44, &[17, 0, 0, 9, 1, 2, 3, 4, 0, 0, 0, 0]);
    let Kind::Ipv6(ip) = parse(&ethernet(TO, FROM, 0x86dd, &fragment)).kind else { panic!() };
    assert_eq!(ip.fragment, Some(Fragment { id: 0x0102_0304, offset: 8, more: true }));

    assert_eq!(parse(&ethernet(TO, FROM, 0x88cc, &[])).kind, Kind::Other(0x88cc));
    assert_eq!(Headers::parse(&[0; 13], 13), Err(Malformed::Frame));
    assert_eq!(Headers::parse(&[0; 60], 13), Err(Malformed::Frame));
}

#[test]
fn contradictions_are_named() {
    let good = tcp4(0x10, &[], &[], b"hello", Fill::Whole);
    let with = |at: usize, byte: u8| {
        let mut frame = good.clone();
        frame[at] = byte;
        parse(&frame).kind
    };
    assert_eq!(with(14, 0x55), Kind::Malformed(Malformed::Ipv4Header));
    assert_eq!(with(14, 0x44), Kind::Malformed(Malformed::Ipv4Header));
    assert_eq!(with(17, 46), Kind::Malformed(Malformed::Ipv4Length));
    assert_eq!(with(17, 19), Kind::Malformed(Malformed::Ipv4Length));
    assert_eq!(with(46, 0x40), Kind::Malformed(Malformed::Tcp));
    assert_eq!(with(46, 0x70), Kind::Malformed(Malformed::Tcp));
    assert_eq!(parse(&ethernet(TO, FROM, 0x8100, &[0, 1, 8])).kind, Kind::Malformed(Malformed::Vlan));
    assert_eq!(parse(&ethernet(TO, FROM, 0x806, &[0; 28])).kind, Kind::Malformed(Malformed::Arp));
    let mut datagram = udp((1, 2), b"abc");
    datagram[5] = 12;
    assert_eq!(
        parse(&ethernet(TO, FROM, 0x800, &ipv4(A, B, 17, 1, 0, &[], &datagram))).kind,
        Kind::Malformed(Malformed::Udp)
    );
    assert_eq!(
        parse(&ethernet(TO, FROM, 0x800, &ipv4(A, B, 1, 1, 0, &[], &[8, 0, 0]))).kind,
        Kind::Malformed(Malformed::Icmp)
    );
    // More extension headers than are followed, and ones that end beyond the first bytes.
    let many = [[60, 0, 0, 0, 0, 0, 0, 0]; 9].concat();
    assert_eq!(
        parse(&ethernet(TO, FROM, 0x86dd, &ipv6(A6, B6, 60, &many))).kind,
        Kind::Malformed(Malformed::Extensions)
    );
    let mut long = vec![6, 30];
    long.resize(600, 0);
    assert_eq!(
        parse(&ethernet(TO, FROM, 0x86dd, &ipv6(A6, B6, 0, &long))).kind,
        Kind::Malformed(Malformed::Extensions)
    );
    let short = ipv6(A6, B6, 6, &[0; 20]);
    assert_eq!(parse(&ethernet(TO, FROM, 0x86dd, &short[..50])).kind, Kind::Malformed(Malformed::Ipv6Length));
    assert_eq!(parse(&ethernet(TO, FROM, 0x86dd, &short[..30])).kind, Kind::Malformed(Malformed::Ipv6Header));
}

#[test]
fn blank_checksums_are_finished() {
    let mut random = Random::new();
    for length in (0..200).chain([1_400, 1_401, 65_000]) {
        let payload = random.bytes(length);
        for (mut blank, whole) in [
            (tcp4(0x18, &[1; 12], &[], &payload, Fill::Blank), tcp4(0x18, &[1; 12], &[], &payload, Fill::Whole)),
            (tcp6(0x18, &[], &payload, Fill::Blank), tcp6(0x18, &[], &payload, Fill::Whole)),
        ] {
            let headers = parse(&blank);
            finish(&mut blank, &headers).unwrap();
            assert_eq!(blank, whole, "{length} bytes");
        }
        let datagram = |how| {
            let mut datagram = udp((53, 1024), &payload);
            fill(&A, &B, 17, &mut datagram, how);
            let mut frame = ethernet(TO, FROM, 0x800, &ipv4(A, B, 17, 1, 0, &[], &datagram));
            frame.resize(frame.len().max(60), 0xee);
            frame
        };
        let mut blank = datagram(Fill::Blank);
        let headers = parse(&blank);
        finish(&mut blank, &headers).unwrap();
        assert_eq!(blank, datagram(Fill::Whole), "UDP of {length} bytes");
    }
}

#[test]
fn a_udp_checksum_of_zero_is_written_as_ones() {
    // Payloads of two bytes: one of the 65,536 makes the sum all ones.
    let mut zeroes = 0;
    for word in 0..=u16::MAX {
        let mut datagram = udp((53, 1024), &word.to_be_bytes());
        fill(&A, &B, 17, &mut datagram, Fill::Blank);
        let mut frame = ethernet(TO, FROM, 0x800, &ipv4(A, B, 17, 1, 0, &[], &datagram));
        let headers = parse(&frame);
        finish(&mut frame, &headers).unwrap();
        assert_ne!(frame[40..42], [0, 0]);
        zeroes += usize::from(frame[40..42] == [0xff, 0xff]);
        assert!(is_right(&A, &B, 17, &frame[34..]));
    }
    assert_eq!(zeroes, 1);
}

#[test]
fn what_has_no_checksum_of_its_own_is_refused() {
    let refused = |mut frame: Vec<u8>| {
        let (headers, before) = (parse(&frame), frame.clone());
        let refusal = finish(&mut frame, &headers).unwrap_err();
        assert_eq!(frame, before);
        refusal
    };
    let packet = |protocol, fragment, payload: &[u8]| {
        ethernet(TO, FROM, 0x800, &ipv4(A, B, protocol, 1, fragment, &[], payload))
    };
    assert_eq!(refused(packet(17, 0x2000, &udp((1, 2), b"abcdefgh"))), CannotFinish::Fragment);
    assert_eq!(refused(packet(17, 0x0001, &udp((1, 2), b"abcdefgh"))), CannotFinish::Protocol);
    assert_eq!(refused(packet(1, 0, &[8, 0, 0, 0, 0, 0, 0, 0])), CannotFinish::Protocol);
    assert_eq!(refused(packet(4, 0, &tcp4(0x10, &[], &[], b"", Fill::Blank)[14..])), CannotFinish::Protocol);
    let frame = tcp4(0x10, &[], &[], b"hello", Fill::Blank);
    let headers = parse(&frame);
    let mut short = frame[..frame.len() - 1].to_vec();
    assert_eq!(finish(&mut short, &headers), Err(CannotFinish::Length));
}

/// Cuts a frame, checks each segment by itself, and returns the segments.
fn cut(frame: &[u8], protocol: Protocol, size: u16) -> Result<Vec<Vec<u8>>, CannotCut> {
    let headers = parse(frame);
    let mut buffer = [0xaa; 65_536];
    let mut cut = Cut::new(frame, &headers, Segmentation { protocol, bytes: size }, &mut buffer)?;
    let (expected, mut segments) = (cut.left(), Vec::new());
    while let Some(segment) = cut.next_segment() {
        segments.push(segment.to_vec());
    }
    assert_eq!(segments.len(), expected);
    Ok(segments)
}

/// Checks the segments of a frame against the frame.
fn check(frame: &[u8], protocol: Protocol, size: u16, segments: &[Vec<u8>]) {
    let headers = parse(frame);
    let (whole, _) = headers.transport().unwrap();
    let L4::Tcp { header, .. } = whole.protocol else { panic!() };
    let data = whole.at + header;
    let mut payload: Vec<u8> = Vec::new();
    for (i, segment) in segments.iter().enumerate() {
        let parsed = parse(segment);
        assert_eq!(segment[..14], frame[..14]);
        match (protocol, parsed.kind) {
            (Protocol::Tcp4, Kind::Ipv4(ip)) => {
                assert_eq!(ip.end, segment.len());
                assert_eq!(checksum(&[&segment[ip.at..ip.at + ip.header]]), 0);
                let id = |frame: &[u8]| u16::from_be_bytes([frame[ip.at + 4], frame[ip.at + 5]]);
                assert_eq!(id(segment), id(frame).wrapping_add(u16::try_from(i).unwrap()));
                assert!(is_right(&A, &B, 6, &segment[whole.at..]));
            }
            (Protocol::Tcp6, Kind::Ipv6(ip)) => {
                assert_eq!(ip.end, segment.len());
                assert!(is_right(&A6, &B6, 6, &segment[whole.at..]));
            }
            (_, other) => panic!("{other:?}"),
        }
        let (first, last) = (i == 0, i + 1 == segments.len());
        let sequence = |frame: &[u8]| u32::from_be_bytes(*frame[whole.at + 4..].first_chunk().unwrap());
        assert_eq!(sequence(segment), sequence(frame).wrapping_add(u32::try_from(payload.len()).unwrap()));
        let (flags, was) = (segment[whole.at + 13], frame[whole.at + 13]);
        assert_eq!(flags & 0x09, if last { was & 0x09 } else { 0 }, "FIN and PSH are the last one's");
        assert_eq!(flags & 0x80, if first { was & 0x80 } else { 0 }, "CWR is the first one's");
        assert_eq!(flags & 0x76, was & 0x76);
        // Ports, acknowledgement, window, urgent pointer and options stay.
        let stays = [whole.at..whole.at + 4, whole.at + 8..whole.at + 13, whole.at + 14..whole.at + 16];
        stays
            .into_iter()
            .chain(std::iter::once(whole.at + 18..data))
            .for_each(|range| assert_eq!(segment[range.clone()], frame[range]));
        assert!(last || segment.len() == data + usize::from(size));
        payload.extend(&segment[data..]);
    }
    assert!(payload == frame[data..], "the payloads of the segments are the frame's");
}

#[test]
fn segments_are_right_and_reassemble() {
    let mut random = Random::new();
    for round in 0..3_000 {
        let length = match round % 4 {
            0 => random.below(200),
            1 => random.below(4_000),
            2 => 1_448 * random.below(12),
            _ => random.below(64_000),
        };
        let payload = random.bytes(length);
        let flags = [0x10, 0x18, 0x19, 0x11, 0x98, 0x58, 0xd9][random.below(7)];
        let (protocol, frame) = match random.below(4) {
            0 => (Protocol::Tcp4, tcp4(flags, &[1; 12], &[], &payload, Fill::Blank)),
            1 => (Protocol::Tcp4, tcp4(flags, &[], &[1; 8], &payload, Fill::Whole)),
            2 => (Protocol::Tcp6, tcp6(flags, &[], &payload, Fill::Blank)),
            _ => (Protocol::Tcp6, tcp6(flags, &[6, 0, 1, 4, 0, 0, 0, 0], &payload, Fill::Blank)),
        };
        let size = u16::try_from(48 + random.below(1_500)).unwrap();
        match cut(&frame, protocol, size) {
            Ok(segments) => check(&frame, protocol, size, &segments),
            Err(refusal) => {
                assert_eq!(refusal, CannotCut::Size);
                assert!(usize::from(size) > frame.len());
            }
        }
    }
}

#[test]
fn what_cannot_be_cut_is_refused() {
    let good = tcp4(0x10, &[], &[], &[7; 3_000], Fill::Blank);
    let refused = |frame: &[u8], protocol, size| cut(frame, protocol, size).unwrap_err();
    assert_eq!(refused(&good, Protocol::Tcp6, 1_000), CannotCut::Protocol);
    assert_eq!(refused(&good, Protocol::Tcp4, 47), CannotCut::Size);
    assert_eq!(refused(&good, Protocol::Tcp4, 9_000), CannotCut::Size);
    assert_eq!(refused(&[&good[..], &[0]].concat(), Protocol::Tcp4, 1_000), CannotCut::Length);
    for flags in [0x02, 0x12, 0x04, 0x14] {
        let frame = tcp4(flags, &[], &[], &[7; 3_000], Fill::Blank);
        assert_eq!(refused(&frame, Protocol::Tcp4, 1_000), CannotCut::Flags);
    }
    let fragment = ethernet(TO, FROM, 0x800, &ipv4(A, B, 6, 1, 0x2000, &[], &good[34..]));
    assert_eq!(refused(&fragment, Protocol::Tcp4, 1_000), CannotCut::Fragment);
    let tunnel = ethernet(TO, FROM, 0x800, &ipv4(A, B, 4, 1, 0, &[], &good[14..]));
    assert_eq!(refused(&tunnel, Protocol::Tcp4, 1_000), CannotCut::Protocol);
    let datagram = ethernet(TO, FROM, 0x800, &ipv4(A, B, 17, 1, 0, &[], &udp((1, 2), &[0; 3_000])));
    assert_eq!(refused(&datagram, Protocol::Tcp4, 1_000), CannotCut::Protocol);
    let routed = [&[6, 0, 0, 1, 0, 0, 0, 0][..], &good[34..]].concat();
    let routed = ethernet(TO, FROM, 0x86dd, &ipv6(A6, B6, 43, &routed));
    assert_eq!(refused(&routed, Protocol::Tcp6, 1_000), CannotCut::Routed);
    let headers = parse(&good);
    let how = Segmentation { protocol: Protocol::Tcp4, bytes: 1_000 };
    assert_eq!(Cut::new(&good, &headers, how, &mut [0; 1_053]).unwrap_err(), CannotCut::Buffer);
    assert!(Cut::new(&good, &headers, how, &mut [0; 1_054]).is_ok());
    // Headers of another frame.
    assert_eq!(Cut::new(&good[..60], &headers, how, &mut [0; 4_000]).unwrap_err(), CannotCut::Length);
}

#[test]
fn no_frame_makes_a_function_panic() {
    let mut random = Random::new();
    let seeds = [
        tcp4(0x10, &[1; 12], &[], &[1; 200], Fill::Blank),
        tcp4(0x18, &[], &[1; 40], &[1; 500], Fill::Blank),
        tcp6(0x10, &[], &[1; 300], Fill::Blank),
        tcp6(0x10, &[6, 0, 1, 4, 0, 0, 0, 0], &[2; 100], Fill::Blank),
        ethernet(TO, FROM, 0x800, &ipv4(A, B, 17, 1, 0, &[], &udp((68, 67), &[0; 300]))),
        ethernet(TO, FROM, 0x86dd, &ipv6(A6, B6, 44, &[60, 0, 0, 1, 9, 9, 9, 9, 43, 0, 0, 0, 0, 0, 0, 0, 6, 2, 0, 1])),
        ethernet(TO, FROM, 0x8100, &[0, 7, 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]),
    ];
    let mut buffer = [0; 2_048];
    let (mut parsed, mut finished, mut segments) = (0, 0, 0);
    for round in 0..2_000_000 {
        let mut frame = if round % 16 == 0 {
            let length = random.below(120);
            random.bytes(length)
        } else {
            seeds[random.below(seeds.len())].clone()
        };
        mutate(&mut random, &mut frame);
        // The length may be anything: more than the bytes that are there, or fewer.
        let length = if random.below(8) == 0 { random.below(70_000) } else { frame.len() };
        let Ok(headers) = Headers::parse(&frame[..frame.len().min(256)], length) else { continue };
        parsed += 1;
        if let Some((transport, _)) = headers.transport() {
            assert!(transport.at <= transport.end && transport.end <= length);
            assert!(transport.checksum_at() + 2 <= transport.end);
        }
        finished += usize::from(finish(&mut frame, &headers).is_ok());
        let protocol = if random.below(2) == 0 { Protocol::Tcp4 } else { Protocol::Tcp6 };
        let bytes = random.below(400);
        if let Ok(mut cut) = Cut::new(&frame, &headers, Segmentation { protocol, bytes }, &mut buffer) {
            let left = cut.left();
            assert!(left <= frame.len() / 48 + 1);
            for _ in 0..left {
                assert!(cut.next_segment().is_some());
                segments += 1;
            }
            assert!(cut.next_segment().is_none());
        }
    }
    // The frames were not all refused at once.
    println!("{parsed} parsed, {finished} finished, {segments} segments");
    assert!(parsed > 1_500_000 && finished > 300_000 && segments > 100_000);
}
