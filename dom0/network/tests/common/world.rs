//! A gateway between guests and an outer network, both of which are models.

use super::dhcp::{payload, take_apart};
use super::{Fill, ethernet, fill, ipv4, tcp, udp};
use network::{Addressing, FrameInfo, Gateway, GatewaySettings, Mac, Output, PortId, Station};

pub const SECOND: u64 = 1_000_000_000;
pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const GATEWAY: [u8; 4] = [10, 77, 0, 1];
pub const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const UPLINK: [u8; 4] = [192, 0, 2, 15];
/// The router and DHCP server of the outer network.
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
pub const ROUTER: [u8; 4] = [192, 0, 2, 2];
pub const DNS: [u8; 4] = [192, 0, 2, 3];
/// A station far away.
pub const FAR: [u8; 4] = [198, 51, 100, 7];

/// What the gateway sent.
#[derive(Debug, Default)]
pub struct Sent {
    pub to_guests: Vec<(PortId, Vec<u8>, FrameInfo)>,
    pub to_uplink: Vec<(Vec<u8>, FrameInfo)>,
}

impl Output for Sent {
    fn to_guest(&mut self, port: PortId, frame: &[u8], info: FrameInfo) {
        self.to_guests.push((port, frame.to_vec(), info));
    }

    fn to_uplink(&mut self, frame: &[u8], info: FrameInfo) {
        self.to_uplink.push((frame.to_vec(), info));
    }
}

pub struct Guest {
    pub port: PortId,
    pub mac: [u8; 6],
    pub address: [u8; 4],
}

pub struct World {
    pub gateway: Gateway,
    pub guests: Vec<Guest>,
    pub now: u64,
}

pub fn settings() -> GatewaySettings {
    GatewaySettings {
        mac: Mac(GATEWAY_MAC),
        network: "10.77.0.0/24".parse().unwrap(),
        address: GATEWAY.into(),
        dns: [None; 4],
        lease_seconds: 3_600,
        mtu: 1_500,
        domain: "test".into(),
        uplink_mac: Mac(UPLINK_MAC),
        uplink_mtu: 1_500,
        addressing: Addressing::Dhcp,
        seed: 7,
    }
}

impl World {
    pub fn new(guests: u16, settings: GatewaySettings) -> Self {
        let mut gateway = Gateway::new(settings).unwrap();
        let guests = (0..guests)
            .map(|i| {
                let (port, name) = (PortId(i * 3), format!("guest{i}"));
                let mac = Mac::of_guest(&name, 0);
                let address = gateway.guests().attach(port, mac, None, &name).unwrap().octets();
                Guest { port, mac: mac.0, address }
            })
            .collect();
        Self { gateway, guests, now: SECOND }
    }

    /// A world whose uplink has its address, and whose router is known.
    pub fn connected(guests: u16) -> Self {
        let mut world = Self::new(guests, settings());
        world.connect(3_600);
        world
    }

    pub fn turn(&mut self) -> (Sent, Option<u64>) {
        let mut sent = Sent::default();
        let next = self.gateway.turn(self.now, &mut sent);
        (sent, next)
    }

    /// Lets time pass until the gateway sends a frame to the uplink. Returns the frame.
    pub fn wait(&mut self) -> Vec<u8> {
        for _ in 0..10_000 {
            let (sent, next) = self.turn();
            if let Some((frame, _)) = sent.to_uplink.into_iter().next() {
                return frame;
            }
            let next = next.expect("the gateway is to be called again");
            assert!(next > self.now);
            self.now = next;
        }
        panic!("the gateway sends nothing");
    }

    pub fn guest(&mut self, index: usize, frame: &[u8], info: FrameInfo) -> Sent {
        let (mut sent, mut frame) = (Sent::default(), frame.to_vec());
        self.gateway.receive_guest(self.guests[index].port, &mut frame, info, self.now, &mut sent);
        sent
    }

    pub fn uplink(&mut self, frame: &[u8], info: FrameInfo) -> Sent {
        let (mut sent, mut frame) = (Sent::default(), frame.to_vec());
        self.gateway.receive_uplink(&mut frame, info, self.now, &mut sent);
        sent
    }

    /// Answers the DHCP client's question as a server does. Returns what the gateway sent then.
    pub fn serve(&mut self, question: &[u8], kind: u8, yours: [u8; 4], lease: u32) -> Sent {
        let question = take_apart(question).expect("the gateway asks a DHCP server");
        assert_eq!(question.mac, UPLINK_MAC);
        let lease = lease.to_be_bytes();
        let options: &[(u8, &[u8])] =
            &[(53, &[kind]), (54, &ROUTER), (1, &[255, 255, 255, 0]), (3, &ROUTER), (6, &DNS), (51, &lease)];
        let mut datagram = udp((67, 68), &payload(2, question.transaction, [0; 4], yours, UPLINK_MAC, options));
        fill(&ROUTER, &yours, 17, &mut datagram, Fill::Whole);
        let frame = ethernet(UPLINK_MAC, ROUTER_MAC, 0x800, &ipv4(ROUTER, yours, 17, 0, 0, &[], &datagram));
        self.uplink(&frame, FrameInfo::default())
    }

    /// Obtains the uplink's address, and makes the router known.
    pub fn connect(&mut self, lease: u32) {
        let question = self.wait();
        let sent = self.serve(&question, 2, UPLINK, lease);
        let request = take_apart(&sent.to_uplink[0].0).unwrap();
        assert_eq!((request.options[&53][0], &request.options[&50][..]), (3, &UPLINK[..]));
        let announced = self.serve(&sent.to_uplink[0].0, 5, UPLINK, lease);
        assert_eq!(announced.to_uplink[0].0[12..14], [8, 6]);
        assert_eq!(self.gateway.uplink_address().unwrap().address.octets(), UPLINK);
        if let Some(guest) = self.guests.first() {
            let frame = self.guest_frame(0, 17, FAR, &udp((9, 9), b"first"));
            assert_eq!(guest_port(&frame), 9);
            let _ = guest;
            let asked = self.guest(0, &frame, FrameInfo::default());
            assert_eq!(asked.to_uplink.len(), 1, "asks for the router, and the frame waits");
            let released = self.uplink(&arp(2, ROUTER_MAC, ROUTER, UPLINK), FrameInfo::default());
            assert_eq!(released.to_uplink.len(), 1, "the frame that waited");
        }
    }

    /// A guest's frame to the gateway, with its checksums.
    pub fn guest_frame(&self, index: usize, protocol: u8, to: [u8; 4], segment: &[u8]) -> Vec<u8> {
        let guest = &self.guests[index];
        let mut segment = segment.to_vec();
        if protocol != 1 {
            fill(&guest.address, &to, protocol, &mut segment, Fill::Whole);
        }
        ethernet(GATEWAY_MAC, guest.mac, 0x800, &ipv4(guest.address, to, protocol, 77, 0, &[], &segment))
    }
}

fn guest_port(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[34], frame[35]])
}

/// A frame from the outer network to the uplink.
pub fn from_far(protocol: u8, from: [u8; 4], segment: &[u8]) -> Vec<u8> {
    let mut segment = segment.to_vec();
    if protocol != 1 {
        fill(&from, &UPLINK, protocol, &mut segment, Fill::Whole);
    }
    ethernet(UPLINK_MAC, ROUTER_MAC, 0x800, &ipv4(from, UPLINK, protocol, 78, 0, &[], &segment))
}

/// An ARP packet.
pub fn arp(operation: u8, mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let packet = [&[0, 1, 8, 0, 6, 4, 0, operation][..], &mac, &sender, &[0; 6], &target].concat();
    ethernet([0xff; 6], mac, 0x806, &packet)
}

/// An ICMP echo, or its answer.
pub fn echo(kind: u8, number: u16, data: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0];
    message.extend(number.to_be_bytes());
    message.extend([0, 1]);
    message.extend(data);
    let sum = super::checksum(&[&message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// A SYN.
pub fn syn(ports: (u16, u16)) -> Vec<u8> {
    tcp(ports, 1, 2, &[2, 4, 5, 0xb4], &[])
}
