//! A gateway between the network stacks of another project: DHCP and TCP as others understand them, over wires that lose
//! frames.

mod common;
use common::world::{ROUTER, ROUTER_MAC, SECOND, Sent, UPLINK, settings};
use network::{Address, Addressing, FrameInfo, Gateway, Mac, PortId, Station, Transported};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};
use std::collections::VecDeque;
use test_random::Random;

/// A network device: frames that wait for the stack, and frames that the stack sent.
#[derive(Default)]
struct Wire {
    arrived: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
}

struct Arrived(Vec<u8>);
struct Free<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl TxToken for Free<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut frame = vec![0; length];
        let result = fill(&mut frame);
        self.0.push(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Free<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived, Free<'_>)> {
        self.arrived.pop_front().map(|frame| (Arrived(frame), Free(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Free<'_>> {
        Some(Free(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        (capabilities.medium, capabilities.max_transmission_unit) = (Medium::Ethernet, 1_514);
        capabilities
    }
}

struct Stack {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: Option<SocketHandle>,
    tcp: Vec<SocketHandle>,
}

fn buffer() -> tcp::SocketBuffer<'static> {
    tcp::SocketBuffer::new(vec![0; 16_384])
}

impl Stack {
    fn new(mac: [u8; 6], address: Option<[u8; 4]>) -> Self {
        let mut wire = Wire::default();
        let config = Config::new(EthernetAddress(mac).into());
        let mut interface = Interface::new(config, &mut wire, Instant::from_millis(0));
        let mut sockets = SocketSet::new(vec![]);
        let dhcp = match address {
            Some(address) => {
                interface.update_ip_addrs(|all| all.push(IpCidr::new(IpAddress::Ipv4(address.into()), 24)).unwrap());
                None
            }
            None => Some(sockets.add(dhcpv4::Socket::new())),
        };
        Self { wire, interface, sockets, dhcp, tcp: Vec::new() }
    }

    fn add_tcp(&mut self) -> &mut tcp::Socket<'static> {
        let handle = self.sockets.add(tcp::Socket::new(buffer(), buffer()));
        self.tcp.push(handle);
        self.sockets.get_mut(handle)
    }

    fn socket(&mut self, index: usize) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.tcp[index])
    }

    fn connect(&mut self, to: [u8; 4], port: u16, own: u16) {
        self.add_tcp();
        let handle = *self.tcp.last().unwrap();
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        let to = IpAddress::Ipv4(Ipv4Address::from(to));
        socket.connect(self.interface.context(), (to, port), own).unwrap();
    }

    fn address(&self) -> Option<Ipv4Address> {
        self.interface.ipv4_addr()
    }

    fn poll(&mut self, now: Instant) {
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        let Some(handle) = self.dhcp else { return };
        if let Some(dhcpv4::Event::Configured(config)) = self.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
            assert_eq!(config.dns_servers.first().map(|server| server.octets()), Some([192, 0, 2, 3]));
            self.interface.update_ip_addrs(|all| {
                all.clear();
                all.push(IpCidr::Ipv4(config.address)).unwrap();
            });
            self.interface.routes_mut().add_default_ipv4_route(config.router.unwrap()).unwrap();
        }
    }
}

struct Machine {
    gateway: Gateway,
    guests: Vec<Stack>,
    outer: Stack,
    random: Random,
    /// One frame in so many is lost.
    loss: usize,
    now_ms: u64,
}

impl Machine {
    fn new(guests: u16) -> Self {
        let mut settings = settings();
        settings.addressing = Addressing::Static(Address {
            address: UPLINK.into(),
            network: Some("192.0.2.0/24".parse().unwrap()),
            router: Some(ROUTER.into()),
            dns: [Some([192, 0, 2, 3].into()), None, None, None],
        });
        let mut gateway = Gateway::new(settings).unwrap();
        let guests = (0..guests)
            .map(|i| {
                let mac = Mac::of_guest("stack", i.into());
                gateway.guests().attach(PortId(i), mac, None, "stack").unwrap();
                Stack::new(mac.0, None)
            })
            .collect();
        let outer = Stack::new(ROUTER_MAC, Some(ROUTER));
        Self { gateway, guests, outer, random: Random::new(), loss: 30, now_ms: 1_000 }
    }

    /// Lets a millisecond pass.
    fn step(&mut self) {
        self.now_ms += 1;
        let (now, now_ns) = (Instant::from_millis(i64::try_from(self.now_ms).unwrap()), self.now_ms * (SECOND / 1_000));
        let mut sent = Sent::default();
        self.gateway.turn(now_ns, &mut sent);
        for (i, guest) in self.guests.iter_mut().enumerate() {
            guest.poll(now);
            for mut frame in guest.wire.sent.drain(..) {
                let port = PortId(u16::try_from(i).unwrap());
                self.gateway.receive_guest(port, &mut frame, FrameInfo::default(), now_ns, &mut sent);
            }
        }
        self.outer.poll(now);
        for mut frame in self.outer.wire.sent.drain(..) {
            self.gateway.receive_uplink(&mut frame, FrameInfo::default(), now_ns, &mut sent);
        }
        for (port, frame, _) in sent.to_guests {
            if self.random.below(self.loss) != 0 {
                self.guests[usize::from(port.0)].wire.arrived.push_back(frame);
            }
        }
        for (frame, _) in sent.to_uplink {
            if self.random.below(self.loss) != 0 {
                self.outer.wire.arrived.push_back(frame);
            }
        }
    }

    /// Lets time pass until something is so. It has to be within two minutes.
    fn until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        for _ in 0..120_000 {
            if is_so(self) {
                return;
            }
            self.step();
        }
        panic!("after two minutes: not {what}");
    }
}

/// Sends what is left, and takes what has arrived.
fn pump(socket: &mut tcp::Socket<'_>, left: &mut &[u8], taken: &mut Vec<u8>) {
    if socket.can_send() && !left.is_empty() {
        let count = socket.send_slice(left).unwrap();
        *left = &left[count..];
    }
    while socket.can_recv() {
        socket
            .recv(|bytes| {
                taken.extend_from_slice(bytes);
                (bytes.len(), ())
            })
            .unwrap();
    }
}

#[test]
fn guests_obtain_addresses_and_connect_outwards() {
    let mut machine = Machine::new(3);
    machine.until("all guests have an address", |machine| machine.guests.iter().all(|guest| guest.address().is_some()));
    for (i, guest) in machine.guests.iter_mut().enumerate() {
        let own = machine.gateway.address_of(PortId(u16::try_from(i).unwrap()));
        assert_eq!(guest.address(), own);
        machine.outer.add_tcp().listen(80).unwrap();
        // All from the same port of theirs.
        guest.connect(ROUTER, 80, 50_000);
    }
    let data: Vec<Vec<u8>> = (0..3).map(|_| machine.random.bytes(200_000)).collect();
    let mut left: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    // The peer sends back what it takes.
    let (mut taken, mut echoed) = (vec![Vec::new(); 3], vec![0; 3]);
    let mut back = vec![Vec::new(); 3];
    machine.until("all bytes are back", |machine| {
        for i in 0..3 {
            pump(machine.guests[i].socket(0), &mut left[i], &mut back[i]);
            let (from, mut nothing) = (echoed[i], Vec::new());
            pump(machine.outer.socket(i), &mut &[][..], &mut taken[i]);
            let mut rest = &taken[i][from..];
            pump(machine.outer.socket(i), &mut rest, &mut nothing);
            echoed[i] = taken[i].len() - rest.len();
            taken[i].extend(nothing);
        }
        back.iter().all(|back| back.len() >= 200_000)
    });
    assert!(back == data);
    // The peer sees one address, and a port for each.
    let mut ports: Vec<u16> = (0..3)
        .map(|i| {
            let remote = machine.outer.socket(i).remote_endpoint().unwrap();
            assert_eq!(remote.addr, IpAddress::Ipv4(UPLINK.into()));
            remote.port
        })
        .collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 3);
}

#[test]
fn a_forward_leads_to_the_named_guest() {
    let mut machine = Machine::new(3);
    machine.until("all guests have an address", |machine| machine.guests.iter().all(|guest| guest.address().is_some()));
    machine.gateway.forward(Transported::Tcp, 2_222, PortId(1), 22).unwrap();
    machine.guests.iter_mut().for_each(|guest| guest.add_tcp().listen(22).unwrap());
    machine.outer.connect(UPLINK, 2_222, 40_000);
    let data = machine.random.bytes(100_000);
    let (mut left, mut taken) = (data.as_slice(), Vec::new());
    machine.until("all bytes are there", |machine| {
        pump(machine.outer.socket(0), &mut left, &mut Vec::new());
        pump(machine.guests[1].socket(0), &mut &[][..], &mut taken);
        taken.len() >= 100_000
    });
    assert!(taken == data);
    assert!([0, 2].iter().all(|&i| !machine.guests[i].socket(0).is_active()));
    machine.outer.socket(0).close();
    machine.until("the guest sees the end", |machine| !machine.guests[1].socket(0).may_recv());
}
